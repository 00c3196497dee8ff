import json
import os

import pytest

from cjepa_hf.data.clevrer import ClevrerFolder, load_questions, scene_index, write_submission
from cjepa_hf.simulators.questions import answer_question

QUESTIONS = [
    {
        "scene_index": 15000,
        "video_filename": "video_15000.mp4",
        "questions": [
            {"question_id": 0, "question": "How many collisions happen?", "question_type": "descriptive"},
            {
                "question_id": 1,
                "question": "What will happen next?",
                "question_type": "predictive",
                "choices": [
                    {"choice_id": 0, "choice": "The cube and the sphere collide"},
                    {"choice_id": 1, "choice": "x"},
                ],
            },
        ],
    }
]
ANSWERS = [
    {
        "scene_index": 15000,
        "questions": [
            {"question_id": 1, "choices": [{"choice_id": 1, "answer": "wrong", "score": -1.0}, {"choice_id": 0, "answer": "correct"}]},
            {"question_id": 0, "answer": "2"},
        ],
    }
]  # fmt: skip


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("{}")


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("video_00012.mp4", 12),
        ("12_pixels.mp4", 12),
        ("0_pixels", 0),
        ("sim_10003.json", 10003),
        ("a/b/annotation_00007.json", 7),
        ("12", 12),
    ],
)
def test_a_video_is_known_by_any_of_its_names(name, index):
    assert scene_index(name) == index
    with pytest.raises(ValueError, match="names no video"):
        scene_index("readme.md")


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        (
            "videos/train/video_train/video_00000-01000/video_00012.mp4",
            "videos/validation/video_validation/video_10000-11000/video_10000.mp4",
            "videos/test/video_test/video_15000-16000/video_15000.mp4",
        ),
        ("train/video_00012.mp4", "val/video_10000.mp4", "test/video_15000.mp4"),
        ("videos/video_00012.mp4", "videos/video_10000.mp4", "videos/video_15000.mp4"),
    ],
)
def test_videos_are_found_in_all_usual_folders(tmp_path, train, validation, test):
    touch(tmp_path, train, validation, test)
    folder = ClevrerFolder(tmp_path)
    for split, index, path in (("train", 12, train), ("validation", 10000, validation), ("test", 15000, test)):
        assert folder.files("video", split) == {index: tmp_path / path}
    assert folder.files("video", "val") == folder.files("video", "validation")


def test_annotations_predictions_and_proposals_are_told_apart(tmp_path):
    touch(
        tmp_path,
        "annotations/validation/annotation_10000-11000/annotation_10001.json",
        "annotation_train/annotation_00000-01000/annotation_00003.json",
        "predictions/train/sim_00000-01000/sim_00003.json",
        "derender_proposals/proposal_00003.json",
        ".collecting/annotations/train/annotation_00009.json",
    )
    folder = ClevrerFolder(tmp_path)
    assert list(folder.files("annotation", "train")) == [3] and list(folder.files("annotation", "validation")) == [
        10001
    ]
    assert list(folder.files("predictions", "train")) == [3] and list(folder.files("proposals", "train")) == [3]


def test_two_files_of_one_video_and_unknown_splits_are_refused(tmp_path):
    touch(tmp_path, "train/video_00001.mp4", "train/copy/video_00001.mp4")
    with pytest.raises(ValueError, match="both of video 1"):
        ClevrerFolder(tmp_path).files("video", "train")
    with pytest.raises(ValueError, match="split='dev'"):
        ClevrerFolder(tmp_path).files("video", "dev")
    with pytest.raises(FileNotFoundError, match="no folder"):
        ClevrerFolder(tmp_path / "nowhere")


def test_questions_are_found_under_both_names_of_the_validation_split(tmp_path):
    touch(tmp_path, "questions/val.json")
    (tmp_path / "questions" / "val.json").write_text(json.dumps(QUESTIONS))
    assert ClevrerFolder(tmp_path).questions("validation") == QUESTIONS
    with pytest.raises(FileNotFoundError, match=r"no questions of the train split: looked for .*train\.json"):
        ClevrerFolder(tmp_path).questions("train")


def test_damaged_question_files_are_refused(tmp_path):
    path = tmp_path / "test.json"
    for content, message in (("[", "not valid json"), ("{}", "list of scenes"), ('[{"scene_index": 1}]', "scene 0")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_questions(path)


def test_a_test_video_has_no_annotation_and_the_error_says_so(tmp_path):
    touch(tmp_path, "test/video_15000.mp4")
    with pytest.raises(FileNotFoundError, match="published none for its test split"):
        ClevrerFolder(tmp_path).truth(15000, "test")


def test_the_submission_has_the_questions_in_order_and_nothing_else(tmp_path):
    path = write_submission(tmp_path / "submission.json", ANSWERS, QUESTIONS)
    assert json.loads(path.read_text()) == [
        {
            "scene_index": 15000,
            "questions": [
                {"question_id": 0, "answer": "2"},
                {"question_id": 1, "choices": [{"choice_id": 0, "answer": "correct"}, {"choice_id": 1, "answer": "wrong"}]},
            ],
        }
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["submission.json"]


def test_an_incomplete_submission_is_not_written(tmp_path):
    partial = [{"scene_index": 15000, "questions": ANSWERS[0]["questions"][1:]}]
    with pytest.raises(ValueError, match=r"scene 15000, question 1 .* has no answer"):
        write_submission(tmp_path / "submission.json", partial, QUESTIONS)
    bad = json.loads(json.dumps(ANSWERS))
    bad[0]["questions"][0]["choices"][0]["answer"] = "yes"
    with pytest.raises(ValueError, match="option 1: 'yes'"):
        write_submission(tmp_path / "submission.json", bad, QUESTIONS)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif("CLEVRER_ROOT" not in os.environ, reason="set CLEVRER_ROOT to a folder with CLEVRER's files")
def test_the_executor_agrees_with_real_clevrer():
    folder, asked, wrong = ClevrerFolder(os.environ["CLEVRER_ROOT"]), 0, []
    limit = int(os.environ.get("CLEVRER_SCENES", 200))
    for scene in folder.questions("validation")[:limit]:
        truth = folder.truth(scene["scene_index"], "validation")
        for question in scene["questions"]:
            if question["question_type"] in ("descriptive", "explanatory"):
                stored = question.get("answer") or [c["answer"] for c in question["choices"]]
                asked += 1
                if answer_question(truth, question) != stored:
                    wrong.append((scene["scene_index"], question["question_id"], question["question"]))
    assert asked > 0 and not wrong, f"{len(wrong)} of {asked}: {wrong[:5]}"
