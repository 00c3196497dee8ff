"""CLEVRER's files: where they are, what they hold, and the same files written for scenes of the collision world.

Real CLEVRER and what `cjepa-hf collect collisions` writes are read alike. Splits are "train", "validation" ("val" in
some copies) and "test"; a video's number is its scene_index, and its files are found by it, in any of the usual folders:
`videos/train/video_00000-01000/video_00012.mp4` or `train/video_00012.mp4`,
`annotations/train/annotation_00000-01000/annotation_00012.json` or `annotation_train/...`, `questions/train.json`,
`predictions/.../sim_00012.json` (NS-DR's form; ours hold the counterfactual truth) and
`derender_proposals/proposal_00012.json`.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cjepa_hf.simulators.collisions import RADIUS, VISIBLE_FRAMES, CollisionEpisode, CollisionScene
from cjepa_hf.simulators.questions import VideoTruth

SPLITS = ("train", "validation", "test")
# Of the real data set, where folders do not name the split.
CLEVRER_SCENES = {"train": range(0, 10_000), "validation": range(10_000, 15_000), "test": range(15_000, 20_000)}
PREDICTION_STEP = 5  # frames between the places of a trajectory in a predictions file

_NAMES = {
    "video": re.compile(r"(?:video_)?(\d+)(?:_pixels)?\.(?:mp4|avi|npz)"),
    "annotation": re.compile(r"annotation_(\d+)\.json"),
    "predictions": re.compile(r"sim_(\d+)\.json"),
    "proposals": re.compile(r"proposal_(\d+)\.json"),
}
_KEY = re.compile(r"(?:.*_)?(\d+)(?:_pixels)?")


def scene_index(name: str) -> int:
    """The number of a video by its name, file or slot key: "video_00012.mp4", "12_pixels.mp4", "video_00012" -> 12.

    Raises:
        ValueError: the name ends with no number.
    """
    stem = re.sub(r"\.\w+$", "", os.path.basename(str(name)))
    match = _KEY.fullmatch(stem)
    if match is None:
        raise ValueError(f"{name!r} names no video; expected something like video_00012.mp4 or 12_pixels.mp4.")
    return int(match[1])


class ClevrerFolder:
    """Finds the files of a data set in CLEVRER's layout.

    Args:
        root: the folder with `videos`, `annotations`, `questions`, ...; any of them may be missing.

    Raises:
        FileNotFoundError: no such folder.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"no folder {root}: give the one that holds CLEVRER's videos, annotations, questions."
            )
        self._found: dict[str, dict[str, dict[int, Path]]] = {}

    def files(self, kind: str, split: str) -> dict[int, Path]:
        """Paths by scene_index.

        Args:
            kind: "video", "annotation", "predictions" or "proposals".
            split: "train", "validation" or "test".

        Raises:
            ValueError: unknown kind or split; two files of one video.
        """
        split = _split(split)
        if kind not in _NAMES:
            raise ValueError(f"kind={kind!r}; expected one of {tuple(_NAMES)}.")
        if kind not in self._found:
            found: dict[str, dict[int, Path]] = {name: {} for name in SPLITS}
            for folder, subfolders, names in os.walk(self.root):
                subfolders[:] = sorted(d for d in subfolders if not d.startswith("."))
                for name in sorted(names):
                    match = _NAMES[kind].fullmatch(name)
                    if match is None:
                        continue
                    path, index = Path(folder) / name, int(match[1])
                    files = found[_split_of(path.relative_to(self.root), index)]
                    if index in files:
                        raise ValueError(f"{files[index]} and {path} are both of video {index}: keep one of them.")
                    files[index] = path
            self._found[kind] = {name: dict(sorted(files.items())) for name, files in found.items()}
        return self._found[kind][split]

    def questions(self, split: str, variant: str | None = None) -> list[dict[str, Any]]:
        """The scenes of a question file: [{"scene_index", "video_filename", "questions"}].

        Args:
            variant: of our own sets, "plain" for counterfactual questions without balance.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no question file.
        """
        split, ending = _split(split), "" if variant is None else f"_{variant}"
        stems = [split, "val"] if split == "validation" else [split]
        tried = [folder / f"{stem}{ending}.json" for stem in stems for folder in (self.root / "questions", self.root)]
        path = next((p for p in tried if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no questions of the {split} split: looked for {', '.join(map(str, tried))}.")
        return load_questions(path)

    def truth(self, index: int, split: str) -> VideoTruth:
        """What annotation and (where there are any) predictions say about a video.

        Raises:
            FileNotFoundError: it has no annotation (those of CLEVRER's test split are not public).
            ValueError: a file is damaged.
        """
        path = self.files("annotation", split).get(index)
        if path is None:
            raise FileNotFoundError(
                f"no annotation of video {index} of the {split} split in {self.root}"
                + (": CLEVRER has published none for its test split." if _split(split) == "test" else ".")
            )
        predictions = self.files("predictions", split).get(index)
        return VideoTruth(read_json(path), None if predictions is None else read_json(predictions))


def _split(name):
    name = "validation" if name == "val" else name
    if name not in SPLITS:
        raise ValueError(f"split={name!r}; expected one of {SPLITS}.")
    return name


def _split_of(path, index):
    """By the innermost folder that names a split, else by CLEVRER's numbers."""
    for part in reversed(path.parts[:-1]):
        words = re.split(r"[_\-. ]", part.lower())
        for split, names in (
            ("train", {"train", "training"}),
            ("validation", {"validation", "val", "valid"}),
            ("test", {"test"}),
        ):
            if names & set(words):
                return split
    return next((split for split, scenes in CLEVRER_SCENES.items() if index in scenes), "train")


def read_json(path: str | os.PathLike) -> Any:
    """A JSON file; ValueError that names it if it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid json ({error}): copy or download it again.") from None


def load_questions(path: str | os.PathLike) -> list[dict[str, Any]]:
    """A question file of any split; test files have neither programs nor answers.

    Raises:
        ValueError: it is not one; the message says where.
    """
    scenes = read_json(path)
    if not isinstance(scenes, list):
        raise ValueError(f"{path} holds a {type(scenes).__name__}; expected a list of scenes.")
    for place, scene in enumerate(scenes):
        try:
            scene["scene_index"]
            for question in scene["questions"]:
                question["question_id"], question["question"]
                if question["question_type"] != "descriptive":
                    for choice in question["choices"]:
                        choice["choice_id"], choice["choice"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: scene {place} is not in CLEVRER's form ({error!r}).") from None
    return scenes


def write_submission(
    path: str | os.PathLike, answers: Iterable[Mapping[str, Any]], questions: Iterable[Mapping[str, Any]]
) -> Path:
    """Write the file that CLEVRER's EvalAI challenge takes.

    Args:
        answers: [{"scene_index", "questions": [{"question_id", "answer"} or {"question_id", "choices": [{"choice_id",
            "answer": "correct" | "wrong"}]}]}], in any order; other keys (scores) are left out.
        questions: the scenes of the question file (`load_questions`): each question must be answered.

    Raises:
        ValueError: a question or an option has no answer, or a wrong kind of answer; nothing is written.
    """
    given = {}
    for scene in answers:
        for answer in scene["questions"]:
            given[scene["scene_index"], answer["question_id"]] = answer
    content = []
    for scene in questions:
        entry = {"scene_index": scene["scene_index"], "questions": []}
        for question in scene["questions"]:
            number, where = (
                question["question_id"],
                f"scene {scene['scene_index']}, question {question['question_id']}",
            )
            answer = given.get((scene["scene_index"], number))
            if answer is None:
                raise ValueError(f"{where} ({question['question']!r}) has no answer; a submission needs all.")
            if question["question_type"] == "descriptive":
                if not isinstance(answer.get("answer"), str):
                    raise ValueError(f"{where}: answer {answer.get('answer')!r}; expected a word.")
                entry["questions"].append({"question_id": number, "answer": answer["answer"]})
                continue
            verdicts = {c["choice_id"]: c["answer"] for c in answer.get("choices", ())}
            choices = []
            for choice in question["choices"]:
                verdict = verdicts.get(choice["choice_id"])
                if verdict not in ("correct", "wrong"):
                    raise ValueError(
                        f"{where}, option {choice['choice_id']}: {verdict!r}; expected 'correct' or 'wrong'."
                    )
                choices.append({"choice_id": choice["choice_id"], "answer": verdict})
            entry["questions"].append({"question_id": number, "choices": choices})
        content.append(entry)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# Files of our own scenes


def video_names(scene: Mapping[str, Any]) -> list[str]:
    """Names under which the slots of a scene's video may be stored, the likeliest first."""
    names = []
    if scene.get("video_filename"):
        path = Path(scene["video_filename"])
        names += [path.stem, path.name]
    if scene.get("scene_index") is not None:
        number = scene["scene_index"]
        names += [f"{number}_pixels.mp4", f"{number}_pixels", str(number)]
    return names


def question_episode(episode_id: str, question_id: int | str) -> str:
    """
    Name of the video that a counterfactual question is answered from, where there is one
    (`cjepa_hf.question_videos` imagines them).
    """
    return f"{episode_id}_question_{question_id}"


def video_filename(index: int) -> str:
    return f"video_{index:05d}.mp4"


def scene_path(kind: str, split: str, index: int) -> str:
    """Where a file of a video is, as in CLEVRER's folders of 1000: "annotations/train/annotation_00000-01000/..."."""
    folder, stem, ending = {
        "video": ("videos", "video", "mp4"),
        "annotation": ("annotations", "annotation", "json"),
        "predictions": ("predictions", "sim", "json"),
    }[kind]
    low = index // 1000 * 1000
    return f"{folder}/{split}/{stem}_{low:05d}-{low + 1000:05d}/{stem}_{index:05d}.{ending}"


def scene_annotation(scene: CollisionScene, index: int) -> dict[str, Any]:
    """CLEVRER's annotation of a scene: lengths in world units (origin in the middle of the view, x right, y down)."""
    episode, n = scene.episode, len(scene.world.ids)
    places, angles = episode.positions.round(5).tolist(), episode.angles.round(5).tolist()
    velocities, spins = episode.velocities.round(5).tolist(), episode.angular_velocities.round(5).tolist()
    seen = episode.in_view.tolist()
    return {
        "scene_index": index,
        "video_filename": video_filename(index),
        "object_property": [
            {"object_id": i, "color": o.color, "material": o.material, "shape": o.shape}
            for i, o in zip(episode.ids, episode.objects)
        ],
        "motion_trajectory": [
            {
                "frame_id": t,
                "objects": [
                    {
                        "object_id": episode.ids[k],
                        "location": [*places[t][k], RADIUS],
                        "orientation": [0.0, 0.0, angles[t][k]],
                        "velocity": [*velocities[t][k], 0.0],
                        "angular_velocity": [0.0, 0.0, spins[t][k]],
                        "inside_camera_view": seen[t][k],
                    }
                    for k in range(n)
                ],
            }
            for t in range(VISIBLE_FRAMES)
        ],
        "collision": [
            {"object_ids": list(c.pair), "frame_id": c.frame, "location": [*(round(v, 5) for v in c.location), RADIUS]}
            for c in episode.collisions
            if c.frame < VISIBLE_FRAMES
        ],
    }


def scene_predictions(scene: CollisionScene, index: int) -> dict[str, Any]:
    """The truth of a scene and of all its removals in NS-DR's form, and what replays it.

    `predictions[0]` is the scene itself with its hidden frames, each other one the first 128 frames without the object
    `what_if`. Beside NS-DR's keys: `unsure`, pairs whose meeting depends on tiny noise or happens out of view, and
    `initial_state` (`CollisionWorld.from_dict`).
    """
    kinds = {
        i: {"color": o.color, "material": o.material, "shape": o.shape}
        for i, o in zip(scene.world.ids, scene.world.objects)
    }

    def prediction(what_if, episode: CollisionEpisode, unsure=()):
        places, seen = episode.positions.round(5).tolist(), episode.in_view
        return {
            "what_if": what_if,
            "trajectory": [
                {
                    "frame_index": t,
                    "objects": [
                        {**kinds[i], "x": places[t][k][0], "y": places[t][k][1]}
                        for k, i in enumerate(episode.ids)
                        if seen[t, k]
                    ],
                }
                for t in range(0, len(places), PREDICTION_STEP)
            ],
            "collisions": [{"frame": c.frame, "objects": [kinds[i] for i in c.pair]} for c in episode.collisions],
            "unsure": [[kinds[i] for i in pair] for pair in sorted(unsure)],
        }

    return {
        "scene_index": index,
        "video_filename": video_filename(index),
        "objects": [{"id": i, **kind} for i, kind in kinds.items()],
        "predictions": [
            prediction(-1, scene.episode),
            *(prediction(gone, episode, scene.unsure[gone]) for gone, episode in scene.removals.items()),
        ],
        "initial_state": scene.world.to_dict(),
    }
