"""
The videos that questions in CLEVRER's language are answered from: what was observed, the same with imagined frames after it
for what happens next, and for every "what if" the video without that object, as a world model imagines it.

[`write_question_videos`] makes them for all questions of a slot dataset, to train and evaluate an ALOE on what
`pipeline("video-question-answering")` shows it; [`write_true_question_videos`] the same with the simulator in the world
model's place, which is what a perfect one would imagine.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .data.clevrer import ClevrerFolder, question_episode, read_json, scene_index, video_names
from .data.extract import drawn_size, encode_scenes, open_encoder, weights_hash
from .data.slots import (
    METADATA_FILE,
    SlotDataset,
    SlotDatasetWriter,
    fingerprint,
    frame_columns,
    is_finished,
    load_slot_dataset,
)
from .data.state_slots import STATE_ENCODER, state_encoder, state_slots
from .imagination import extend_video, first_contact, is_empty, remove_object
from .models.aloe import QUESTION_TYPES
from .models.cjepa import CJepaModel
from .simulators.collisions import VISIBLE_FRAMES, CollisionWorld
from .slot_probe import SlotProbe

__all__ = [
    "described_objects",
    "first_imagined_frame",
    "question_type_of",
    "removed_object",
    "write_question_videos",
    "write_true_question_videos",
]

SAME_SLOTS = 0.01  # differences up to here come from rounding: of annotations, of float16, of another machine

_REMOVED = re.compile(r"\bwithout the ([^,?]+)|\bif the ([^,?]+?) is removed", re.IGNORECASE)


def question_type_of(question: str, options: list[str] | None, given: str | None = None) -> str:
    """
    The type of a question in CLEVRER's language: without options descriptive; about what is responsible explanatory; about
    something removed counterfactual; about what happens next predictive. `ValueError` if it cannot be told, or if what is
    `given` does not fit the options.
    """
    if given is not None and given not in QUESTION_TYPES:
        raise ValueError(f"question_type={given!r}: expected one of {', '.join(QUESTION_TYPES)}")
    if not isinstance(question, str):
        raise ValueError(f"question is {question!r}: expected a text")
    if given is None:
        words = question.lower()
        if options is None:
            if found := re.search(r"\b(responsible|without|removed|will)\b", words):
                raise ValueError(f"{question!r} (with {found[0]!r}) is no descriptive question: give its options")
            given = "descriptive"
        elif "responsible" in words:
            given = "explanatory"
        elif "without" in words or "removed" in words:
            given = "counterfactual"
        elif "next" in words:
            given = "predictive"
        else:
            raise ValueError(f"the type of {question!r} cannot be told from its words: pass question_type")
    if (given == "descriptive") != (options is None):
        raise ValueError(
            f"{given} questions have {'no options' if given == 'descriptive' else 'options'}: {question!r}"
        )
    return given


def removed_object(question: str) -> str:
    """The words for what a counterfactual question takes away: "What happens without the red cube?" -> "red cube"."""
    found = _REMOVED.search(question)
    if found is None:
        raise ValueError(
            f'{question!r} does not say which object is gone: expected "without the ..." or "if the ... is removed", or '
            "removed_slot"
        )
    return (found[1] or found[2]).strip()


def described_objects(text: str, attributes: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The objects that an option names: "the red cube's entrance" -> ["red cube"]."""
    values = [value for name in attributes if name != "shape" for value in attributes[name]]
    nouns = [*attributes.get("shape", ()), "object"]
    pattern = rf"\bthe ((?:(?:{'|'.join(values) or 'x^'}) )*(?:{'|'.join(nouns)}))\b"
    return re.findall(pattern, text, re.IGNORECASE)


def first_imagined_frame(
    positions: torch.Tensor, gone: torch.Tensor, distance: float, skip: int, present: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Frame from which on a video must be imagined where object `gone` int64 [R] is taken away, int64 [R]: its first contact
    (see [`first_contact`]; positions [R, T, N, 2], present [R, T, N]), but not before frame `skip`, as the model needs a
    step of history; T if it touches nothing.
    """
    contact = first_contact(positions, gone, distance, present)
    return torch.where(contact < 0, positions.shape[1], contact.clamp(min=skip))


def write_question_videos(
    dataset: str | os.PathLike,
    questions: str | os.PathLike,
    world_model: CJepaModel,
    output_dir: str | os.PathLike,
    *,
    probe: SlotProbe,
    contact_distance: float,
    splits: Sequence[str] | None = None,
    num_future_frames: int = 32,
    num_videos: dict[str, int] | None = None,
    world_model_name: str | None = None,
    batch_size: int = 64,
    frames_per_file: int = 16384,
    progress: bool = True,
) -> Path:
    """
    Write a slot dataset with the videos that all questions are answered from: every video of `dataset` with
    `num_future_frames` imagined frames after it, and for every counterfactual question the video without the object that
    it names (`question_episode`), imagined from the object's first contact on.

    Args:
        dataset: slot dataset whose episodes are named after videos, all of one length.
        questions: folder with the question files of its splits (as `cjepa-hf collect collisions` writes them).
        probe: finds objects by words, and tells positions and what an empty slot looks like.
        contact_distance: between centers, see [`first_contact`].
        num_videos: for a split, how many videos to take (default: all).
        world_model_name: for the metadata.
        batch_size: videos at a time.

    A question whose object is not found is listed with the reason under `skipped` in the metadata, and has no video.
    Interrupted, it goes on after the last finished file; of a finished folder made with the same arguments, weights and
    questions nothing is written again. Raises `ValueError` for videos of several lengths, parts that do not fit, and a split
    whose videos no question is about.
    """
    if not 0 < contact_distance < float("inf"):
        raise ValueError(f"contact_distance={contact_distance} must be a positive number, 0.75 in the collision world")
    _check_counts(num_future_frames, batch_size, num_videos)
    output_dir = Path(output_dir)
    asked, arguments = _questions_about(dataset, questions, splits, num_videos)
    if probe.empty_slot is None:
        raise ValueError("the probe does not know what an empty slot looks like: fit it with slots without object")
    if not probe.has_positions:
        raise ValueError("the probe tells no positions, and contacts are found with them: fit it with positions")
    if world_model.config.action_size:
        raise ValueError("the world model takes actions, which nobody takes in these videos: use one without")
    skip = world_model.config.frame_skip
    arguments["source"] |= {
        "world_model": world_model_name,
        "weights_hash": weights_hash(world_model),
        "probe_hash": probe.fingerprint(),
        "num_future_frames": num_future_frames,
        "contact_distance": contact_distance,
        "num_videos": num_videos,
    }
    if is_finished(output_dir, arguments):
        return output_dir
    writer = SlotDatasetWriter(output_dir, frames_per_file=frames_per_file, **arguments)
    for split in asked:
        data = load_slot_dataset(dataset, split)
        column = frame_columns(data.data, ["slots"])["slots"]
        names, scenes = _names_and_scenes(data, split, asked[split])
        wanted = list(range(len(data)))[: (num_videos or {}).get(split)]
        lengths = {int(data.lengths[index]) for index in wanted}
        if len(lengths) != 1:
            raise ValueError(f"videos of {dataset} have {min(lengths)} to {max(lengths)} frames: expected one length")
        done, frames = writer.finished(split), np.arange(lengths.pop())
        bar = tqdm(range(0, len(wanted), batch_size), desc=f"imagining, {split}", unit="batch", disable=not progress)
        for start in bar:
            part = np.array(wanted[start : start + batch_size])
            waiting: list[tuple[int, str, int]] = []  # video in this part, name, slot
            slots = torch.from_numpy(column.gather(part, np.tile(frames, (len(part), 1))))
            slots = slots.to(world_model.device)
            never = is_empty(slots, probe.empty_slot).all(dim=1)  # [B, N]
            for row, index in enumerate(part):
                for name, question in _counterfactuals(scenes, names[index]):
                    try:
                        slot = probe.find(slots[row], removed_object(question))
                        if never[row, slot]:
                            raise ValueError(f"slot {slot} looks empty in all frames")
                        waiting.append((row, name, slot))
                    except ValueError as error:
                        writer.skipped.append({"episode_id": name, "split": split, "reason": str(error)})
            made = [(names[index], row) for row, index in enumerate(part)]
            if all(name in done for name in [n for n, _ in made] + [n for _, n, _ in waiting]):
                continue
            videos = extend_video(world_model, slots, num_frames=num_future_frames, frame_skip=skip).cpu().numpy()
            for name, row in made:
                if name not in done:
                    writer.write(split, {"episode_id": name, "slots": videos[row]})
            if waiting:
                rows = torch.tensor([row for row, _, _ in waiting], device=slots.device)
                gone = torch.tensor([slot for _, _, slot in waiting], device=slots.device)
                positions, present = probe.positions(slots)[rows], probe.present(slots)[rows]
                first = first_imagined_frame(positions, gone, contact_distance, skip, present)
                without = remove_object(
                    world_model, slots[rows], gone, first, empty_slot=probe.empty_slot, frame_skip=skip
                )
                for (_, name, _), video in zip(waiting, without.cpu().numpy(), strict=True):
                    if name not in done:
                        writer.write(split, {"episode_id": name, "slots": video})
    return writer.close()


def write_true_question_videos(
    dataset: str | os.PathLike,
    questions: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    encoder: str | os.PathLike | torch.nn.Module | None = None,
    splits: Sequence[str] | None = None,
    num_future_frames: int = 32,
    num_videos: dict[str, int] | None = None,
    device: str | torch.device | None = None,
    batch_size: int = 64,
    frames_per_file: int = 16384,
    progress: bool = True,
) -> Path:
    """
    Write what [`write_question_videos`] writes with the simulator in the world model's place: what really happens after a
    video of the collision world, and without an object. An ALOE's answers from these tell how much the imagination costs.

    Args:
        dataset: slot dataset whose episodes are named after videos; says which videos, and by which encoder.
        questions: folder that `cjepa-hf collect collisions` wrote, with the worlds' initial states.
        encoder: that of `dataset`, model, folder or Hub id; not needed for true states.
        num_videos: for a split, how many videos to take (default: all).
        batch_size: videos at a time.

    Raises `ValueError` for another encoder than that of `dataset`, where there are no initial states, and where they do not
    lead to the videos of `dataset` (the first of every split is compared).
    """
    _check_counts(num_future_frames, batch_size, num_videos)
    folder, output_dir = ClevrerFolder(questions), Path(output_dir)
    asked, arguments = _questions_about(dataset, questions, splits, num_videos)
    encode = _state_encoder(arguments["encoder"], encoder, device)
    arguments["source"] |= {
        "world_model": "simulator",
        "num_future_frames": num_future_frames,
        "contact_distance": None,
        "num_videos": num_videos,
    }
    if is_finished(output_dir, arguments):
        return output_dir
    named = {}
    for split in asked:  # before anything is written
        data = load_slot_dataset(dataset, split, check_values=False)
        names, scenes = _names_and_scenes(data, split, asked[split])
        wanted = names[: (num_videos or {}).get(split)]
        lengths = data.lengths[: len(wanted)]
        if (lengths != VISIBLE_FRAMES).any():
            raise ValueError(
                f"a video of {dataset} has {lengths[lengths != VISIBLE_FRAMES][0]} frames: expected {VISIBLE_FRAMES}, as "
                "simulated"
            )
        starts = folder.files("predictions", split)
        _require_same_video(data, _initial_world(starts, wanted[0]), wanted[0], encode, questions)
        named[split] = wanted, scenes, starts
    writer = SlotDatasetWriter(output_dir, frames_per_file=frames_per_file, **arguments)
    for split, (wanted, scenes, starts) in named.items():
        done = writer.finished(split)
        bar = tqdm(range(0, len(wanted), batch_size), desc=f"true videos, {split}", unit="batch", disable=not progress)
        for start in bar:
            waiting: list[tuple[str, CollisionWorld, int]] = []
            for name in wanted[start : start + batch_size]:
                world = _initial_world(starts, name)
                waiting.append((name, world, VISIBLE_FRAMES + num_future_frames))
                for own, question in _counterfactuals(scenes, name):
                    try:
                        without = world.without(_described_id(world, removed_object(question)))
                        waiting.append((own, without, VISIBLE_FRAMES))
                    except ValueError as error:
                        writer.skipped.append({"episode_id": own, "split": split, "reason": str(error)})
            waiting = [job for job in waiting if job[0] not in done]
            states = [_states(world, length) for _, world, length in waiting]
            for (name, _, _), slots in zip(waiting, encode([name for name, _, _ in waiting], states), strict=True):
                writer.write(split, {"episode_id": name, "slots": slots})
    return writer.close()


def _states(world: CollisionWorld, length: int) -> np.ndarray:
    """float32 [length, 60], as collected scenes hold them."""
    return world.simulate(length).states[:length].astype(np.float32)


def _require_same_video(data: SlotDataset, world: CollisionWorld, name: str, encode: Callable, questions) -> None:
    """That the first video of a dataset is what the simulator and the encoder make of its initial state."""
    seen = frame_columns(data.data, ["slots"])["slots"].gather(np.array([0]), np.arange(VISIBLE_FRAMES)[None])[0]
    (made,) = encode([name], [_states(world, VISIBLE_FRAMES)])
    difference = np.abs(made - seen).max() if made.shape == seen.shape else np.inf
    if not difference < SAME_SLOTS:
        raise ValueError(
            f"{data.name}: the slots of {name} differ by up to {difference:.3g} from those of the scene in {questions}: give "
            "the scenes that they were extracted from, drawn from states at the encoder's size"
        )


def _check_counts(num_future_frames, batch_size, num_videos) -> None:
    counts = {"num_future_frames": num_future_frames, "batch_size": batch_size, **(num_videos or {})}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")


def _questions_about(dataset, questions, splits, num_videos) -> tuple[dict[str, list[dict]], dict[str, Any]]:
    """The scenes of every split's question file, and what the dataset of their videos records."""
    folder, metadata = ClevrerFolder(questions), read_json(Path(dataset) / METADATA_FILE)
    chosen = [split for split in metadata["splits"] if splits is None or split in splits]
    if not chosen or (splits is not None and set(splits) - set(chosen)):
        raise ValueError(f"splits are {list(splits or [])}: {dataset} has {', '.join(metadata['splits'])}")
    if unknown := (num_videos or {}).keys() - set(chosen):
        raise ValueError(f"num_videos names {', '.join(sorted(unknown))}: expected some of {', '.join(chosen)}")
    asked = {split: folder.questions(split) for split in chosen}
    texts = [
        [scene["scene_index"], question["question_id"], question["question"]]
        for scenes in asked.values()
        for scene in scenes
        for question in scene["questions"]
    ]
    source = {
        "name": Path(dataset).resolve().name,
        "fingerprint": metadata["fingerprint"],
        "questions_hash": fingerprint(texts),
        "splits": chosen,
    }
    recorded = {"frame_skip": metadata["frame_skip"], "encoder": metadata["encoder"], "fps": metadata["fps"]}
    return asked, recorded | {"source": source}


def _names_and_scenes(data: SlotDataset, split: str, asked: list[dict]) -> tuple[list[str], dict[str, dict]]:
    """The videos of a split, and the scene of the question file by every name that its video may have."""
    names = list(data.data.with_format(None)["episode_id"])
    scenes = {name: scene for scene in asked for name in video_names(scene)}
    if not any(name in scenes for name in names):
        raise ValueError(
            f"no question of the split {split!r} is about {names[0]}, ...; they are about "
            f"{next(iter(scenes), 'nothing')}"
        )
    return names, scenes


def _counterfactuals(scenes: Mapping[str, dict], name: str) -> Iterator[tuple[str, str]]:
    """The counterfactual questions about a video: the name of each one's own video, and its text."""
    for question in scenes.get(name, {"questions": ()})["questions"]:
        if question["question_type"] == "counterfactual":
            yield question_episode(name, question["question_id"]), question["question"]


def _initial_world(starts: Mapping[int, Path], name: str) -> CollisionWorld:
    """The scene of video `name` at its start; `starts`: files of predictions by the number of the scene."""
    path = starts.get(scene_index(name))
    content = {} if path is None else read_json(path)
    if "initial_state" not in content:
        raise ValueError(
            f"{path or f'no file of predictions for {name}'}: expected the initial state that `cjepa-hf collect collisions` "
            "writes there; other videos cannot be simulated"
        )
    return CollisionWorld.from_dict(content["initial_state"])


def _described_id(world: CollisionWorld, words: str) -> int:
    """The id of the only object that has all of the words; `ValueError` if there is none or more."""
    wanted = set(words.lower().split()) - {"object"}
    found = [i for i, item in zip(world.ids, world.objects) if wanted <= set(item.description.split())]
    if len(found) != 1:
        known = ", ".join(item.description for item in world.objects)
        raise ValueError(f"{len(found)} objects are a {words!r}; there are {known}")
    return found[0]


def _state_encoder(recorded: Mapping[str, Any], encoder, device) -> Callable:
    """
    The encoder that a dataset records, as a function of the names of videos and their states, float32 [T, 60] each, that
    returns their slots [T, N, D]. `ValueError` where `encoder` (model, folder or Hub id) is another one.
    """
    if recorded["name"] == STATE_ENCODER and "velocities" in recorded:  # a folder may be called so too
        if encoder not in (None, STATE_ENCODER):
            raise ValueError(f"encoder={encoder!r}: the dataset holds true states")
        size, velocities = len(recorded["empty_slot"]), bool(recorded["velocities"])
        if state_encoder(size, velocities)["config_hash"] != recorded["config_hash"]:
            raise ValueError(
                "the dataset's true states were made by another version of this library: extract them again"
            )
        return lambda names, states: [state_slots(s, slot_size=size, velocities=velocities) for s in states]
    if encoder is None or encoder == STATE_ENCODER:
        raise ValueError(f"the dataset was made by {recorded['name']!r}: give that encoder")
    model, processor, description = open_encoder(encoder, recorded.get("revision"), None, device)
    for name in ("config_hash", "weights_hash"):
        if description[name] != recorded.get(name):
            raise ValueError(
                f"{description['name']} is not the encoder of the dataset, {recorded['name']!r}: {name} differs"
            )
    resolution = drawn_size(model)

    def encode(names: Sequence[str], states: Sequence[np.ndarray]) -> list[np.ndarray]:
        done = encode_scenes(
            zip(names, states, strict=True), model, processor, resolution=resolution, seed=recorded.get("seed", 0)
        )
        return [np.concatenate(encoded.slots) for encoded in done]

    return encode


def describe_skipped(skipped: Sequence[Mapping[str, Any]]) -> str:
    """One line about the counterfactual questions without video; empty where there are none."""
    if not skipped:
        return ""
    return f"{len(skipped)} counterfactual questions have no video, such as {skipped[0]['episode_id']}: {skipped[0]['reason']}"
