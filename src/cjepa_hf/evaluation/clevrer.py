"""
Accuracy of answers to questions in CLEVRER's format, beside what needs no video: the most frequent training answer, and an
ALOE trained on the words alone. `python -m cjepa_hf.evaluation.clevrer --help`.

A descriptive question is right when its answer is the stored one; a multiple-choice question is right when all of its
options are judged right, and each option counts by itself too. The overall accuracy is that of all questions together, so
types weigh by their number (in the CLEVRER validation split: descriptive 72 %, counterfactual 12 %).

Predictions have the form of CLEVRER's submission file: [{"scene_index", "questions": [{"question_id", "answer"} or
{"question_id", "choices": [{"choice_id", "answer": "correct" | "wrong"}]}]}].
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.clevrer import load_questions, write_submission
from ..data.slots import fingerprint, load_slot_dataset
from ..models.aloe import QUESTION_TYPES, AloeForVideoQuestionAnswering, AloeProcessor
from ..training.aloe import MODEL_INPUTS, QuestionDataset, imagination_settings
from ..training.trainer import write_text
from .metrics import paired_difference, success_rate

# Copies of this much at a time: about 200 MB of activations in the released code's size.
BATCH_QUESTIONS = 64


@torch.no_grad()
def answer_questions(
    model: AloeForVideoQuestionAnswering,
    questions: QuestionDataset,
    *,
    batch_size: int = BATCH_QUESTIONS,
    seed: int | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """
    The model's answers in the form of a submission file, with `score` (the logit) beside each option.

    Args:
        questions: with `random_start=False` (the default there) every question sees the same frames each time; with
            True the first frame is drawn, as in the released code, from `seed`.
        batch_size: questions at a time.

    A video's questions stand together, in the order of the file.
    """
    if questions.random_start and seed is None:
        raise ValueError("questions draw their frames at random: pass a seed, or make them with random_start=False")
    device, answers, scenes = model.device, questions.processor.answers, {}
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed or 0)
        starts = range(0, len(questions), batch_size)
        for first in tqdm(starts, desc="answering", unit="batch", disable=not progress):
            indices = range(first, min(first + batch_size, len(questions)))
            batch = questions.__getitems__(indices)
            inputs = {name: batch[name].to(device) for name in MODEL_INPUTS if name != "labels"}
            output = model(**inputs)
            best = output.answer_logits[:, 1:].argmax(-1).tolist()  # padding left out
            options = output.option_logits.float().tolist()
            row = 0
            for index in indices:
                scene, question = questions.scenes[index], questions.questions[index]
                if question["question_type"] == "descriptive":
                    given = {"question_id": question["question_id"], "answer": answers[best[row]]}
                    row += 1
                else:
                    choices = []
                    for choice in question["choices"]:
                        verdict = "correct" if options[row] > 0 else "wrong"
                        choices.append({"choice_id": choice["choice_id"], "answer": verdict, "score": options[row]})
                        row += 1
                    given = {"question_id": question["question_id"], "choices": choices}
                entry = scenes.setdefault(scene["scene_index"], {"scene_index": scene["scene_index"], "questions": []})
                entry["questions"].append(given)
    model.train(was_training)
    return list(scenes.values())


def majority_answers(
    training_scenes: Iterable[Mapping[str, Any]], scenes: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """
    Predictions for `scenes` that look at no video and no word: to a descriptive question the most frequent training
    answer of its subtype (count, exist, query_color, ...), to every option "correct" if more than half of the training
    options of its type are.
    """
    counts: dict[tuple, Counter] = {}
    for scene in training_scenes:
        for question in scene["questions"]:
            given = [question] if question["question_type"] == "descriptive" else question["choices"]
            counts.setdefault(_group(question), Counter()).update(item["answer"] for item in given)
    if not counts:
        raise ValueError("there are no training questions to count answers in")

    def frequent(question):
        found = counts.get(_group(question))
        if found is None:  # a subtype that training did not have
            found = sum((c for key, c in counts.items() if key[0] == question["question_type"]), Counter())
        if question["question_type"] != "descriptive":
            return "correct" if found["correct"] > found["wrong"] else "wrong"
        return found.most_common(1)[0][0] if found else None

    predictions = []
    for scene in scenes:
        entry = {"scene_index": scene["scene_index"], "questions": []}
        for question in scene["questions"]:
            answer, given = frequent(question), {"question_id": question["question_id"]}
            if question["question_type"] == "descriptive":
                given["answer"] = answer
            else:
                given["choices"] = [{"choice_id": c["choice_id"], "answer": answer} for c in question["choices"]]
            entry["questions"].append(given)
        predictions.append(entry)
    return predictions


def _group(question: Mapping[str, Any]) -> tuple[str, str | None]:
    return question["question_type"], question.get("question_subtype")


def judge(scenes: Iterable[Mapping[str, Any]], predictions: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    One dict per question of `scenes` whose answers are known, in order: `scene_index`, `question_id`, `question_type`,
    `question_subtype`, `answered` (a prediction is there), `right`, and for multiple choice `options` (bool of each).

    A question or option without prediction is wrong. Raises `ValueError` for predictions about other questions, and
    where no question has an answer.
    """
    scenes = list(scenes)
    given: dict[tuple, Mapping] = {}
    for entry in predictions:
        for question in entry["questions"]:
            key = entry["scene_index"], question["question_id"]
            if key in given:
                raise ValueError(f"question {key[1]} of scene {key[0]} is answered twice")
            given[key] = question
    asked = {(scene["scene_index"], question["question_id"]) for scene in scenes for question in scene["questions"]}
    strange = next((key for key in given if key not in asked), None)
    if strange is not None:
        raise ValueError(f"question {strange[1]} of scene {strange[0]} is answered, but not asked: another split?")
    verdicts = []
    for scene in scenes:
        for question in scene["questions"]:
            key = scene["scene_index"], question["question_id"]
            found = given.get(key)
            verdict = {"scene_index": key[0], "question_id": key[1], "question_type": question["question_type"]}
            verdict |= {"question_subtype": question.get("question_subtype"), "answered": found is not None}
            if question["question_type"] == "descriptive":
                if question.get("answer") is None:
                    continue
                verdict["right"] = found is not None and str(found["answer"]) == str(question["answer"])
            else:
                if any(choice.get("answer") is None for choice in question["choices"]):
                    continue
                chosen = {c["choice_id"]: c["answer"] for c in found["choices"]} if found is not None else {}
                verdict["options"] = [chosen.get(c["choice_id"]) == c["answer"] for c in question["choices"]]
                verdict["right"] = all(verdict["options"])
            verdicts.append(verdict)
    if not verdicts:
        raise ValueError("none of the questions has an answer to compare with: choose a split that has them")
    return verdicts


def summarize(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Rates with 95 % Wilson intervals (`success_rate`) of [`judge`]'s verdicts: `overall` (all questions alike),
    `questions` by type, `options` by type, `descriptive` by subtype, and how many were `unanswered`.

    The intervals take questions for independent; those about one video are not quite.
    """
    present = [kind for kind in QUESTION_TYPES if any(v["question_type"] == kind for v in verdicts)]
    by_type = {kind: [v for v in verdicts if v["question_type"] == kind] for kind in present}
    subtypes = sorted({v["question_subtype"] for v in by_type.get("descriptive", []) if v["question_subtype"]})
    return {
        "overall": success_rate([v["right"] for v in verdicts]),
        "questions": {kind: success_rate([v["right"] for v in group]) for kind, group in by_type.items()},
        "options": {
            kind: success_rate([hit for v in group for hit in v["options"]])
            for kind, group in by_type.items()
            if kind != "descriptive"
        },
        "descriptive": {
            name: success_rate([v["right"] for v in by_type["descriptive"] if v["question_subtype"] == name])
            for name in subtypes
        },
        "unanswered": sum(not v["answered"] for v in verdicts),
    }


def score_answers(scenes: Iterable[Mapping[str, Any]], predictions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """[`summarize`] of [`judge`]: how good `predictions` (a submission file's content) are for `scenes`."""
    return summarize(judge(scenes, predictions))


def _compare(verdicts: list[dict], others: list[dict]) -> dict[str, Any]:
    """Paired difference in right questions, over all and by type."""

    def paired(kind):
        pairs = [(a["right"], b["right"]) for a, b in zip(verdicts, others) if kind in (None, a["question_type"])]
        return paired_difference(*zip(*pairs)) if pairs else None

    groups = {"overall": paired(None)} | {kind: paired(kind) for kind in QUESTION_TYPES}
    return {name: value for name, value in groups.items() if value is not None}


def evaluate_question_answering(
    models: Sequence[str],
    *,
    dataset: str,
    questions: str,
    split: str = "validation",
    training_questions: str | None = None,
    text_only: Sequence[str] = (),
    random_start: int | None = None,
    batch_size: int = BATCH_QUESTIONS,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """
    Every model on the same questions, with its baselines.

    Args:
        models: folders or Hub ids of [`AloeForVideoQuestionAnswering`], for example one per seed.
        dataset, split: slot dataset of the videos.
        questions: question file of that split; with answers they are scored.
        training_questions: question file of the training split, for the majority baseline.
        text_only: models trained with `--text_only true`; they see zeros in place of slots.
        random_start: draw the first frame from this seed as the released code does; None: the middle one.

    Returns:
        {"rows": [{"name", "kind" ("model", "text-only" or "majority"), "overall", "questions", "options", ...}],
        "mean" and "spread" over the models and over the text-only models (of right questions: mean, lowest, highest),
        "against_text_only": the first model against the first text-only model on the same questions,
        "predictions": one list per model, and what was evaluated}. Without answers there are predictions alone.
    """
    scenes = load_questions(questions)
    slots = load_slot_dataset(dataset, split)
    has_answers = any(
        (q.get("answer") if q["question_type"] == "descriptive" else q["choices"][0].get("answer")) is not None
        for scene in scenes
        for q in scene["questions"]
    )
    rows, verdicts, predictions = [], {"model": [], "text-only": [], "majority": []}, []

    def add(name, kind, answers):
        if has_answers:
            verdicts[kind].append(judge(scenes, answers))
            rows.append({"name": name, "kind": kind, **summarize(verdicts[kind][-1])})

    missing: list[str] = []
    settings = imagination_settings(slots)
    for kind, names in (("model", models), ("text-only", text_only)):
        for name in names:
            net = AloeForVideoQuestionAnswering.from_pretrained(name, use_safetensors=True).eval().to(device)
            processor = AloeProcessor.from_pretrained(name)
            asked = QuestionDataset(
                slots, scenes, processor, random_start=random_start is not None, text_only=kind == "text-only"
            )
            missing = asked.missing_videos
            answers = answer_questions(net, asked, batch_size=batch_size, seed=random_start, progress=progress)
            if kind == "model":
                predictions.append(answers)
            add(name, kind, answers)
    if training_questions is not None:
        add("majority", "majority", majority_answers(load_questions(training_questions), scenes))
    results = {
        "models": [str(name) for name in models],
        "dataset": str(dataset),
        "split": split,
        "questions": str(questions),
        "scenes_hash": fingerprint(scenes),
        "random_start": random_start,
        "videos_without_slots": len(missing),
        "imagined": settings
        and {name: settings[name] for name in ("world_model", "contact_distance", "num_future_frames")},
        "rows": rows,
        "mean": {kind: _over_seeds(rows, kind) for kind in verdicts if verdicts[kind]},
        "predictions": predictions,
    }
    if verdicts["model"] and verdicts["text-only"]:
        results["against_text_only"] = _compare(verdicts["model"][0], verdicts["text-only"][0])
    return results


def _over_seeds(rows: list[dict], kind: str) -> dict[str, dict[str, float]]:
    """Mean, lowest and highest rate of the rows of one kind, for all questions, each type and its options."""
    rows = [row for row in rows if row["kind"] == kind]
    columns = {"overall": [row["overall"]["rate"] for row in rows]}
    for name in rows[0]["questions"]:
        columns[name] = [row["questions"][name]["rate"] for row in rows]
    for name in rows[0]["options"]:
        columns[f"{name} options"] = [row["options"][name]["rate"] for row in rows]
    return {
        name: {"mean": float(np.mean(values)), "low": min(values), "high": max(values), "n": len(values)}
        for name, values in columns.items()
    }


def print_results(results: Mapping[str, Any]) -> None:
    """The rows as a table: questions right in percent with the 95 % interval, options right in parentheses."""
    kinds = [kind for kind in QUESTION_TYPES if any(kind in row["questions"] for row in results["rows"])]
    width = max([len(Path(row["name"]).name) + len(row["kind"]) + 3 for row in results["rows"]] + [20])
    print(" " * width + "".join(f"{name:>26}" for name in ("overall", *kinds)))
    for row in results["rows"]:
        label = row["kind"] if row["kind"] == "majority" else f"{Path(row['name']).name} ({row['kind']})"
        cells = [_cell(row["overall"])]
        cells += [_cell(row["questions"][k], row["options"].get(k)) if k in row["questions"] else "" for k in kinds]
        print(f"{label:<{width}}" + "".join(f"{cell:>26}" for cell in cells))
    if results["videos_without_slots"]:
        print(f"{results['videos_without_slots']} videos had no slots: their questions count as wrong")


def _cell(rate: Mapping[str, float], options: Mapping[str, float] | None = None) -> str:
    text = f"{100 * rate['rate']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
    return text + (f" ({100 * options['rate']:.1f})" if options else "")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Accuracy of ALOE on questions in CLEVRER's format, with baselines.")
    parser.add_argument("models", nargs="+", help="trained folders or Hub ids, for example one per seed")
    parser.add_argument("--dataset", required=True, help="slot dataset with the videos")
    parser.add_argument("--split", default="validation", help="its split (default: validation)")
    parser.add_argument("--questions", required=True, help="question file of that split")
    parser.add_argument("--training_questions", help="question file of the training split: the majority baseline")
    parser.add_argument("--text_only", nargs="*", default=[], help="models trained with --text_only true")
    parser.add_argument("--random_start", type=int, metavar="SEED", help="draw the first frame, as the released code")
    parser.add_argument("--batch_size", type=int, default=BATCH_QUESTIONS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", help="write the results to this .json file")
    parser.add_argument("--submission", help="write the first model's answers as a submission file")
    args = parser.parse_args(argv)
    options = {name: value for name, value in vars(args).items() if name not in ("models", "output", "submission")}
    results = evaluate_question_answering(args.models, **options)
    predictions = results.pop("predictions")
    if results["rows"]:
        print_results(results)
    if args.output:
        write_text(args.output, json.dumps(results, indent=1))
    if args.submission:
        write_submission(args.submission, predictions[0], load_questions(args.questions))
    return results


if __name__ == "__main__":
    main()
