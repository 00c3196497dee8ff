"""Scores, majority answers and submissions on examples small enough to count by hand."""

import json

import datasets
import numpy as np
import pytest
import torch

from cjepa_hf.data.slots import fingerprint, load_slot_dataset, write_slot_dataset
from cjepa_hf.evaluation.clevrer import (
    answer_questions,
    judge,
    main,
    majority_answers,
    score_answers,
    summarize,
)
from cjepa_hf.evaluation.metrics import wilson_interval
from cjepa_hf.models.aloe import AloeConfig, AloeForVideoQuestionAnswering, AloeProcessor
from cjepa_hf.training.aloe import QuestionDataset, question_metrics


def descriptive(number, answer, subtype="count", text="How many collisions happen?"):
    question = {"question_id": number, "question": text, "question_type": "descriptive"}
    return question | {"question_subtype": subtype, "answer": answer}


def choice(number, kind, *answers):
    text = {"predictive": "What will happen next?", "counterfactual": "Without the red cube, what will happen?"}[kind]
    options = [
        "The cube and the sphere collide",
        "The cyan sphere and the cube collide",
        "The cylinder and the cube collide",
    ]
    choices = [
        {"choice_id": place, "choice": options[place], "answer": "correct" if right else "wrong"}
        for place, right in enumerate(answers)
    ]
    return {"question_id": number, "question": text, "question_type": kind, "choices": choices}


SCENES = [
    {
        "scene_index": 3,
        "video_filename": "video_00003.mp4",
        "questions": [
            descriptive(0, "2"),
            descriptive(1, "yes", "exist", "Are there any red cubes?"),
            choice(2, "predictive", 1, 0),
            choice(3, "counterfactual", 0, 0, 1),
        ],
    },
    {
        "scene_index": 4,
        "video_filename": "video_00004.mp4",
        "questions": [descriptive(0, "0"), choice(1, "counterfactual", 1, 1)],
    },
]


def given(number, *answers):
    if isinstance(answers[0], str):
        return {"question_id": number, "answer": answers[0]}
    verdicts = [{"choice_id": k, "answer": "correct" if yes else "wrong"} for k, yes in enumerate(answers)]
    return {"question_id": number, "choices": verdicts}


PREDICTIONS = [
    # wrong count, right exist, right predictive, one of three counterfactual options wrong
    {"scene_index": 3, "questions": [given(0, "1"), given(1, "yes"), given(2, 1, 0), given(3, 0, 1, 1)]},
    # right count, right counterfactual
    {"scene_index": 4, "questions": [given(0, "0"), given(1, 1, 1)]},
]


def test_a_hand_made_example_scores_as_counted_by_hand():
    scores = score_answers(SCENES, PREDICTIONS)
    rates = {kind: (value["successes"], value["n"]) for kind, value in scores["questions"].items()}
    assert rates == {"descriptive": (2, 3), "predictive": (1, 1), "counterfactual": (1, 2)}
    options = {kind: (value["successes"], value["n"]) for kind, value in scores["options"].items()}
    assert options == {"predictive": (2, 2), "counterfactual": (4, 5)}
    assert scores["overall"]["rate"] == 4 / 6  # questions weigh alike, whatever their type
    assert (scores["overall"]["low"], scores["overall"]["high"]) == wilson_interval(4, 6)
    assert scores["descriptive"]["count"]["rate"] == 0.5 and scores["descriptive"]["exist"]["rate"] == 1
    assert scores["unanswered"] == 0


def test_a_missing_answer_or_option_counts_as_wrong():
    part = [{"scene_index": 3, "questions": [given(1, "yes"), given(2, 1)]}]
    scores = score_answers(SCENES, part)
    assert scores["overall"]["successes"] == 1 and scores["overall"]["n"] == 6 and scores["unanswered"] == 4
    assert scores["options"]["predictive"]["successes"] == 1 and scores["questions"]["predictive"]["successes"] == 0


def test_answers_to_other_questions_and_unanswered_splits_are_refused():
    with pytest.raises(ValueError, match="question 0 of scene 9 is answered, but not asked"):
        judge(SCENES, [{"scene_index": 9, "questions": [given(0, "1")]}])
    with pytest.raises(ValueError, match="answered twice"):
        judge(SCENES, [{"scene_index": 3, "questions": [given(0, "1"), given(0, "2")]}])
    test_split = json.loads(json.dumps(SCENES))
    for scene in test_split:
        for question in scene["questions"]:
            for item in [question, *question.get("choices", [])]:
                item.pop("answer", None)
    with pytest.raises(ValueError, match="none of the questions has an answer"):
        score_answers(test_split, PREDICTIONS)


def test_the_majority_comes_from_training_answers_of_the_same_subtype():
    training = [
        {
            "scene_index": 0,
            "questions": [
                *(descriptive(k, answer) for k, answer in enumerate(["1", "0", "0"])),
                descriptive(3, "no", "exist"),
                choice(4, "counterfactual", 1, 1, 0),
                choice(5, "predictive", 1, 0),
            ],
        }
    ]
    answers = majority_answers(training, SCENES)
    assert answers[0]["questions"][:2] == [given(0, "0"), given(1, "no")]
    assert answers[0]["questions"][2] == given(2, 0, 0)  # a tie: half of the options are not a majority
    assert answers[0]["questions"][3] == given(3, 1, 1, 1)
    scores = score_answers(SCENES, answers)
    assert scores["overall"]["successes"] == 2  # the count of scene 4 and its counterfactual question
    with pytest.raises(ValueError, match="no training questions"):
        majority_answers([], SCENES)


def test_the_overall_rate_is_the_papers_average_of_clevrers_validation_split():
    """Its C-JEPA row: 92.84, 90.74, 86.93, 68.81 by type, 89.40 over all 76,368 questions."""
    rates = {"descriptive": (92.84, 54990), "explanatory": (90.74, 8488)}
    rates |= {"predictive": (86.93, 3557), "counterfactual": (68.81, 9333)}
    verdicts = []
    for kind, (rate, count) in rates.items():
        right = round(rate / 100 * count)
        verdict = {"question_type": kind, "question_subtype": None, "answered": True}
        verdicts += [verdict | {"right": place < right, "options": [True]} for place in range(count)]
    assert 100 * summarize(verdicts)["overall"]["rate"] == pytest.approx(89.40, abs=0.02)


# --- with a model --------------------------------------------------------------------------------------------------

TINY = dict(num_slots=2, slot_size=4, num_frames=2, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
TINY |= dict(intermediate_size=16, answer_hidden_size=16)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder with slots, questions.json and the untrained models a, b (and words, as if trained on words alone)."""
    root = tmp_path_factory.mktemp("clevrer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        rng = np.random.default_rng(0)
        episodes = [
            {"episode_id": name, "slots": rng.normal(size=(8, 2, 4)).astype(np.float32)}
            for name in ("video_00003", "4_pixels.mp4")
        ]
        write_slot_dataset(root / "slots", {"validation": episodes}, frame_skip=1, encoder={"name": "none"})
        (root / "questions.json").write_text(json.dumps(SCENES))
        for seed, name in enumerate(("a", "b", "words")):
            torch.manual_seed(seed)
            AloeForVideoQuestionAnswering(AloeConfig(**TINY)).save_pretrained(root / name)
            AloeProcessor(num_frames=2, observed_frames=8).save_pretrained(root / name)
        yield root


def test_answers_equal_the_metrics_of_training_and_repeat(root):
    model = AloeForVideoQuestionAnswering.from_pretrained(root / "a")
    processor = AloeProcessor.from_pretrained(root / "a")
    slots = load_slot_dataset(root / "slots", "validation")
    questions = QuestionDataset(slots, SCENES, processor)
    answers = answer_questions(model, questions, batch_size=4, progress=False)
    assert answers == answer_questions(model, questions, batch_size=4, progress=False)
    scores = score_answers(SCENES, answers)
    with torch.no_grad():
        metrics = question_metrics(questions)(model.eval(), questions.__getitems__(range(6)))
    assert scores["overall"]["rate"] == pytest.approx(metrics["accuracy"].item())
    for kind in ("descriptive", "predictive", "counterfactual"):
        assert scores["questions"][kind]["rate"] == pytest.approx(metrics[f"{kind}_accuracy"].item())
    assert [q["question_id"] for q in answers[0]["questions"]] == [0, 1, 2, 3]
    assert "score" in answers[0]["questions"][2]["choices"][0]

    random = QuestionDataset(slots, SCENES, processor, random_start=True)
    with pytest.raises(ValueError, match="pass a seed"):
        answer_questions(model, random, progress=False)
    first, second = (answer_questions(model, random, seed=1, progress=False) for _ in range(2))
    assert first == second != answers


def test_the_command_compares_seeds_with_the_baselines(root, tmp_path, capsys):
    words = [str(root / "a"), str(root / "b"), "--dataset", str(root / "slots"), "--questions"]
    words += [str(root / "questions.json"), "--training_questions", str(root / "questions.json"), "--text_only"]
    words += [str(root / "words"), "--output", str(tmp_path / "out.json"), "--submission", str(tmp_path / "sub.json")]
    main(words)
    results = json.loads((tmp_path / "out.json").read_text())
    assert [row["kind"] for row in results["rows"]] == ["model", "model", "text-only", "majority"]
    assert results["scenes_hash"] == fingerprint(SCENES)  # what was asked, not only where it lay
    rates = [row["overall"]["rate"] for row in results["rows"][:2]]
    assert results["mean"]["model"]["overall"] == {
        "mean": pytest.approx(np.mean(rates)), "low": min(rates), "high": max(rates), "n": 2
    }  # fmt: skip
    difference = results["rows"][0]["overall"]["rate"] - results["rows"][2]["overall"]["rate"]
    assert results["against_text_only"]["overall"]["difference"] == pytest.approx(difference)
    assert [scene["scene_index"] for scene in json.loads((tmp_path / "sub.json").read_text())] == [3, 4]
    table = capsys.readouterr().out
    assert "a (model)" in table and "majority" in table and "counterfactual" in table


def test_a_split_without_answers_still_gives_a_submission(root, tmp_path):
    scenes = json.loads(json.dumps(SCENES))
    for scene in scenes:
        for question in scene["questions"]:
            for item in [question, *question.get("choices", [])]:
                item.pop("answer", None)
    (tmp_path / "test.json").write_text(json.dumps(scenes))
    words = [str(root / "a"), "--dataset", str(root / "slots"), "--questions", str(tmp_path / "test.json")]
    results = main([*words, "--submission", str(tmp_path / "sub.json")])
    assert results["rows"] == []
    questions = json.loads((tmp_path / "sub.json").read_text())[0]["questions"]
    assert len(questions) == 4 and set(questions[2]["choices"][0]) == {"choice_id", "answer"}
