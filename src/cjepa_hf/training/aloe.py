"""Trains ALOE to answer questions about videos from their slots: `cjepa-hf train aloe` and `examples/train_aloe.py`.

Slots come from a slot dataset (one episode per video), questions from a file in CLEVRER's format. A second training with
`--text_only true` sees no slots: what it answers is what the words alone give away, the baseline of every accuracy.

Where annotations tell when objects touch, a first training with `--contacts_only true` teaches the model to see that without
any question, a second one with `--statements true` and no questions to say which pairs collide, and a third one with questions
goes on from there (`--init_model`): from questions alone, contacts are learned late, if at all. It needs a probe that tells the
attributes that annotations name objects by (`cjepa-hf probe` for the collision world, else `SlotProbe.fit`).
"""

import copy
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from ..data.clevrer import ClevrerFolder, load_questions, question_episode, read_json, video_filename, video_names
from ..data.slots import SlotDataset, frame_columns, load_slot_dataset
from ..models.aloe import QUESTION_TYPES, AloeConfig, AloeForVideoQuestionAnswering, AloeProcessor
from ..models.aloe.modeling_aloe import contact_losses, with_context
from ..simulators.questions import ATTRIBUTES, VideoTruth, make_statements
from ..slot_probe import SlotProbe
from .arguments import TrainArguments, config_arguments, config_fields, config_overrides, parse_arguments
from .trainer import (
    TrainResult,
    card_text,
    make_accelerator,
    result_files,
    steps_taken,
    train_and_save,
    training_results,
)

STATEMENTS = "statements"  # the question_id of what is asked beside the questions of a file
MODEL_INPUTS = ("slots", "input_ids", "attention_mask", "is_option", "video_index", "labels")


@dataclass(kw_only=True)
class AloeTrainArguments(TrainArguments):
    """Arguments of the training of ALOE beside [`TrainArguments`] and the fields of [`AloeConfig`]."""

    fixed_on_resume: ClassVar = (
        *TrainArguments.fixed_on_resume,
        "train_split",
        "init_model",
        "text_only",
        "whiten_slots",
        "structured_positions",
        "group_by_video",
        "random_start",
        "question_types",
        "observed_frames",
        "contacts_only",
        "contact_weight",
        "statements",
    )

    # > Parameters that control the data
    dataset: str = HfArg(
        help="Slot dataset, a folder or the id of a dataset repository on the Hub: one episode per video, named as the "
        "video is (video_00012, video_00012.mp4, 12_pixels.mp4 or 12)."
    )
    dataset_revision: str | None = HfArg(default=None, help="Branch, tag or commit of a dataset on the Hub.")
    questions: str | None = HfArg(default=None, help="Questions to train on: a .json file in CLEVRER's format.")
    validation_questions: str | None = HfArg(default=None, help="Questions to evaluate on; left out: no evaluation.")
    train_split: str = HfArg(default="train", help="Split of the slot dataset that holds the training videos.")
    validation_split: str = HfArg(default="validation", help="Split that holds the validation videos.")
    question_types: str = HfArg(
        default="all", help="all, or a comma-separated choice of " + ", ".join(QUESTION_TYPES) + "."
    )
    random_start: bool = HfArg(
        default=True,
        help="Draw the first of the frames that a question sees anew each time, as the released code does.",
    )
    observed_frames: int = HfArg(default=128, help="Frames of a video before imagined ones.")
    unknown_word: str | None = HfArg(
        default=None, help="A word of the vocabulary that stands for unknown ones; left out: they are an error."
    )
    group_by_video: bool = HfArg(
        default=False,
        help="batch_size counts videos, each with all of its questions (12.5 in the collision world, 15 in CLEVRER), not "
        "questions; with --video_attends_to_text false this is where a video encoded once saves the most.",
    )
    text_only: bool = HfArg(default=False, help="Replace all slots by zeros: the text-only baseline.")
    annotations: str | None = HfArg(
        default=None,
        help="Folder in CLEVRER's layout with annotations of the videos: the model then also learns which objects touch. "
        "Needs slot_probe.",
    )
    slot_probe: str | None = HfArg(
        default=None,
        help="Folder or Hub id with the probe that tells the objects of slots (`cjepa-hf probe`); needed by annotations and by "
        "slot_neighbors.",
    )
    contacts_only: bool = HfArg(
        default=False,
        help="Learn from annotations alone, before there are questions; batch_size counts videos. Trains what reads the "
        "slots, and nothing else.",
    )
    contact_weight: float = HfArg(default=0.5, help="Weight of the loss of contacts beside that of the questions.")
    statements: bool = HfArg(
        default=False,
        help="Ask two questions more about every annotated training video: which of some pairs of objects collide in it, and "
        "which next, as if its end were not known (not beside questions about videos without imagined frames). Without "
        "questions, these alone.",
    )

    # > Parameters that control the model
    whiten_slots: bool = HfArg(
        default=False,
        help="Start from a projection of whitened slots, in which small differences between slots (such as material) count "
        "as much as large ones (such as position).",
    )
    structured_positions: bool = HfArg(
        default=False,
        help="Start from positions that are a frame's (sines and cosines) plus a slot's (random), not from zeros: who is in "
        "the same frame, and which frame is next, then need not be learned.",
    )
    init_model: str | None = HfArg(default=None, help="ALOE (folder or Hub id) whose weights training starts from.")

    def __post_init__(self):
        super().__post_init__()
        self.chosen_types()

        if self.init_model and (self.whiten_slots or self.structured_positions):
            raise ValueError(
                "whiten_slots and structured_positions set weights that init_model brings: leave them out"
            )
        if self.contacts_only and (self.questions is not None or self.statements):
            raise ValueError("contacts_only asks no questions: leave questions and statements out")
        if self.questions is None and not (self.contacts_only or self.statements):
            raise ValueError("give questions to train on; or contacts_only, or statements, with annotations")
        if self.contacts_only and not self.annotations:
            raise ValueError("contacts_only learns from annotations: give their folder")
        if self.annotations and not self.slot_probe:
            raise ValueError(
                "annotations name objects by their attributes: give the slot_probe that finds them in slots"
            )
        if self.statements and not self.annotations:
            raise ValueError("statements are made from annotations: give their folder")
        if self.annotations and self.text_only:
            raise ValueError("text_only sees no slots, and so no contacts: leave annotations out")
        if not 0 <= self.contact_weight < float("inf"):
            raise ValueError(f"contact_weight={self.contact_weight} must be 0 or more")
        if not self.annotations:
            self.contact_weight = 0.0  # so that a run is not resumed without its annotations
        if self.contacts_only and self.validation_questions:
            raise ValueError("contacts_only asks no questions: leave validation_questions out")
        if self.statements and not {"explanatory", "predictive"} & set(self.chosen_types()):
            raise ValueError(
                f"question_types={self.question_types!r} leaves statements out, which are explanatory and predictive: add "
                "one, or leave statements out"
            )

    def chosen_types(self) -> tuple[str, ...]:
        """The question types to train on; ValueError for an unknown one."""
        if self.question_types == "all":
            return QUESTION_TYPES
        chosen = tuple(self.question_types.replace(" ", "").split(","))
        for name in chosen:
            if name not in QUESTION_TYPES:
                raise ValueError(
                    f"question_types names {name!r}: expected all, or some of {', '.join(QUESTION_TYPES)}"
                )
        return chosen


# --- data ----------------------------------------------------------------------------------------------------------


def imagination_settings(dataset: SlotDataset) -> dict[str, Any] | None:
    """With what `cjepa-hf imagine` made a dataset: `contact_distance`, `num_future_frames`, ...; None of other datasets."""
    source = dataset.metadata.get("source")
    return source if isinstance(source, dict) and "contact_distance" in source else None


class SlotContacts:
    """
    Which objects of the slots of annotated videos begin to touch, and what the other one is.

    Args:
        dataset: slot dataset whose episodes are named after videos. What is imagined (`cjepa-hf imagine`) is unknown.
        annotations: folder in CLEVRER's layout.
        split: of the annotations.
        probe: tells color, material and shape of slots, by which objects are found.
        observed_frames: of a video; later ones, and those after the end of the annotation, are unknown.
        statements: make them; they are drawn from a fixed seed.
        num_future_frames: the last observed frames, about which some statements ask what happens next; 0: no such statements.

    Attributes:
        partner: int8 [E, observed_frames, N], the slot whose object the slot's object begins to touch in a frame; -1: none,
            -2: not known, as it is not told to be one object of the annotation; -3: an object that no slot is told to be.
        attributes: int8 [E, N, A], attributes of every slot's object, places in those of `probe`; -1: not known.
        found, num_objects: how many of the objects that are in view for some frames were found.
        statements: by the name of a video questions about which pairs collide in it, and which next, as if it had ended
            before its last `num_future_frames` (`make_statements`).

    Raises `ValueError` where no video is annotated or no object is found, for damaged annotations, and for a probe of other
    slots or attributes.
    """

    def __init__(
        self,
        dataset: SlotDataset,
        annotations: str | Path,
        split: str,
        probe: SlotProbe,
        observed_frames: int,
        *,
        statements: bool = False,
        num_future_frames: int = 0,
    ):
        self.observed_frames = observed_frames
        self.statements: dict[str, list[dict[str, Any]]] = {}
        names = dataset.data.with_format(None)["episode_id"]
        files = ClevrerFolder(annotations).files("annotation", split)
        numbers = {
            name: index
            for index in files
            for name in video_names({"scene_index": index, "video_filename": video_filename(index)})
        }
        if unknown := set(probe.attributes) - set(ATTRIBUTES):
            raise ValueError(
                f"the probe tells {', '.join(unknown)}; annotations have {', '.join(ATTRIBUTES)} of objects"
            )
        if len(probe.weight) != dataset.slot_size + 1:
            raise ValueError(
                f"the probe reads slots of size {len(probe.weight) - 1}, those of {dataset.name} have {dataset.slot_size}: it "
                "was fitted on another encoder's"
            )
        self.partner = np.full((len(names), observed_frames, dataset.num_slots), -2, np.int8)
        self.attributes = np.full((len(names), dataset.num_slots, len(probe.attributes)), -1, np.int8)
        self.found = self.num_objects = 0
        column = frame_columns(dataset.data, ["slots"])["slots"]
        annotated = [episode for episode, name in enumerate(names) if name in numbers]
        if not annotated:
            raise ValueError(
                f"no annotation of the split {split!r} in {annotations} is of {names[0]}, ...: expected the videos of "
                f"{dataset.name}"
            )
        for episode in annotated:
            index = numbers[names[episode]]
            annotation = read_json(files[index])
            try:
                truth = VideoTruth(annotation)
            except ValueError as error:
                raise ValueError(f"{files[index]}: {error}") from error
            length = min(observed_frames, int(dataset.lengths[episode]), len(truth.seen))
            slots = torch.from_numpy(column.gather(np.array([episode]), np.arange(length)[None])[0])
            keys = [tuple(truth.attributes[i][name] for name in probe.attributes) for i in truth.ids]
            told = [None if words is None else tuple(words.values()) for words in probe.describe(slots)]
            # an object that looks like another one, to the annotation or to the probe, is not told
            slot_of = {
                i: told.index(key)
                for i, key in zip(truth.ids, keys, strict=True)
                if told.count(key) == keys.count(key) == 1
            }
            for i, slot in slot_of.items():
                words = truth.attributes[i]
                self.attributes[episode, slot] = [
                    values.index(words[name]) for name, values in probe.attributes.items()
                ]
            self.num_objects += len(truth.objects)
            self.found += len(set(truth.objects) & set(slot_of))
            self.partner[episode, :length, list(slot_of.values())] = -1
            for event in truth.events:
                if event.kind == "collision" and event.frame < length:
                    for a, b in (event.objects, event.objects[::-1]):
                        if a in slot_of:
                            self.partner[episode, event.frame, slot_of[a]] = slot_of.get(b, -3)
            if statements:
                generator, start = np.random.default_rng([0, index]), observed_frames - num_future_frames
                made = [make_statements(truth, generator)]
                made += [make_statements(truth, generator, start=start)] if 0 < start < observed_frames else []
                self.statements[names[episode]] = [{"question_id": STATEMENTS, **one} for one in made if one]

        if not self.found:
            raise ValueError(
                f"none of {self.num_objects} annotated objects is found among the slots of {dataset.name}: is the probe that "
                "of their encoder?"
            )

    def gather(self, episodes: np.ndarray, frames: np.ndarray, stride: int) -> Tensor:
        """
        Labels int64 [V, T, N, 1 + A] for `contact_losses`: contacts of episodes [V] that begin in frames [V, T] or in the
        `stride - 1` frames after each.
        """
        within = frames[..., None] + np.arange(stride)  # [V, T, stride]
        known = within < self.observed_frames
        partner = self.partner[
            episodes[:, None, None], np.minimum(within, self.observed_frames - 1)
        ]  # [V, T, stride, N]
        partner = np.where(known[..., None], partner, -2).astype(np.int64)
        first = ((partner >= 0) | (partner == -3)).argmax(2)[:, :, None]  # of several contacts the first
        partner = np.take_along_axis(partner, first, axis=2)[:, :, 0]  # [V, T, N]
        touches = np.where(partner == -2, -1, (partner != -1).astype(np.int64))
        other = self.attributes[episodes[:, None, None], np.maximum(partner, 0)].astype(np.int64)
        other = np.where((partner >= 0)[..., None], other, -1)
        return torch.from_numpy(np.concatenate([touches[..., None], other], axis=-1))


class VideoBatches(torch.utils.data.Dataset):
    """What [`ContactDataset`] and [`QuestionDataset`] share: items are fetched in whole batches, from views of the slots."""

    def __init__(
        self, dataset: SlotDataset, processor: AloeProcessor, random_start: bool, contacts: SlotContacts | None
    ):
        self.dataset, self.processor, self.contacts = dataset, processor, contacts
        self.random_start = random_start
        self._slots = frame_columns(dataset.data, ["slots"])["slots"]

    def view(self, episodes: np.ndarray, first: np.ndarray | int = 0) -> dict[str, Tensor]:
        """`slots` [V, T, N, D] of frames of `episodes` [V], from `first` [V] on, and their `contacts`, if there are some."""
        starts = self.processor.num_starts
        start = torch.randint(starts, (len(episodes), 1)).numpy() if self.random_start else (starts - 1) // 2
        steps = np.arange(self.processor.num_frames) * self.processor.stride
        frames = np.broadcast_to(np.reshape(first, (-1, 1)) + start + steps, (len(episodes), len(steps)))
        batch = {"slots": torch.from_numpy(self._slots.gather(episodes, frames))}
        if self.contacts is not None:
            batch["contacts"] = self.contacts.gather(episodes, frames, self.processor.stride)
        return batch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`__getitems__` has made the batch already."""
        return batch

    def __getstate__(self) -> dict:
        # Views would be pickled as copies; the dataset is pickled as the paths of its memory-mapped files.
        return {key: value for key, value in self.__dict__.items() if key != "_slots"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._slots = frame_columns(self.dataset.data, ["slots"])["slots"]


class ContactDataset(VideoBatches):
    """
    The annotated videos of `contacts`, fetched in batches for [`AloeForVideoQuestionAnswering`] without texts: `slots` float32
    [V, T, N, D] and `contacts` int64 [V, T, N, 1 + A].
    """

    def __init__(self, dataset: SlotDataset, contacts: SlotContacts, processor: AloeProcessor, random_start: bool):
        super().__init__(dataset, processor, random_start, contacts)
        self.episodes = np.flatnonzero((contacts.partner >= -1).any((1, 2)))
        for episode in self.episodes:
            processor.frame_indices(int(dataset.lengths[episode]))  # long enough

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self.view(self.episodes[np.asarray(indices, np.int64)])


class QuestionDataset(VideoBatches):
    """
    Questions of one split with the slots of their videos, fetched in batches for [`AloeForVideoQuestionAnswering`].
    In what `cjepa-hf imagine` made, counterfactual questions are asked about their own video, the one without the object;
    elsewhere about the video as it was, as in the released code.

    Args:
        dataset: indexable slot dataset with one episode per video (names: `data.clevrer.video_names`).
        scenes: as a CLEVRER question file holds them.
        processor: tokenizes, and chooses the frames.
        question_types: those to take.
        random_start: draw the first frame by torch's generator at every access; else the middle one.
        text_only: zeros in place of all slots.
        contacts: of the videos, for the batches.

    A batch of B questions with S text sequences (one per descriptive question, one per option) is a dict: `slots`
    float32 [V, T, N, D] (each video once for every choice of frames), `input_ids` int64 [S, L], `attention_mask` bool
    [S, L], `is_option` bool [S], `video_index` int64 [S], `question_index` int64 [S] (in the batch), `labels` int64 [S]
    (answer, or 1 / 0 for correct / wrong; -1 = unknown), `question_type` int64 [B], the place in `QUESTION_TYPES`, and, if
    they are known, `contacts` int64 [V, T, N, 1 + A].

    Attributes:
        scenes, questions: for each item its scene and its question, as in the file.
        fingerprint: of what is asked about which videos, and the answers.
        missing_videos: names of videos with questions but without slots; their questions are left out.

    Raises `ValueError` for questions that are malformed, outside the vocabulary or too long (naming scene and question),
    for videos too short, for imagined ones with fewer imagined frames than `processor` looks at, and where no video has
    slots.
    """

    def __init__(
        self,
        dataset: SlotDataset,
        scenes: Iterable[Mapping[str, Any]],
        processor: AloeProcessor,
        *,
        question_types: Sequence[str] = QUESTION_TYPES,
        random_start: bool = False,
        text_only: bool = False,
        contacts: SlotContacts | None = None,
    ):
        super().__init__(dataset, processor, random_start, contacts)
        self.text_only = text_only
        imagined = imagination_settings(dataset)
        episodes = {name: place for place, name in enumerate(dataset.data.with_format(None)["episode_id"])}
        self.scenes, self.questions, self.missing_videos = [], [], []
        texts, labels, episode, types, shifts = [], [], [], [], []
        for scene in scenes:
            names = video_names(scene)
            episode_name = next((name for name in names if name in episodes), None)
            if episode_name is None:
                self.missing_videos.append(names[0] if names else "(a scene without a name)")
                continue
            for question in scene["questions"]:
                try:
                    kind = question["question_type"]
                    if kind not in QUESTION_TYPES:
                        raise ValueError(f"question type {kind!r}: expected one of {', '.join(QUESTION_TYPES)}")
                    if kind not in question_types:
                        continue
                    text, label = self._encode(question)
                    place = episodes[episode_name]
                    if imagined and kind == "counterfactual":
                        own = question_episode(episode_name, question["question_id"])
                        if own not in episodes:  # its object was not found
                            self.missing_videos.append(own)
                            continue
                        place = episodes[own]
                    # what happens next in a statement is among the observed frames
                    after = kind == "predictive" and question["question_id"] != STATEMENTS
                    shift = processor.frame_indices(int(dataset.lengths[place]), kind if after else None, 0)[0]
                    if imagined and after and not shift:
                        raise ValueError(
                            f"{imagined['num_future_frames']} frames were imagined, and fewer than min_imagined_frames="
                            f"{processor.min_imagined_frames} are not looked at"
                        )
                except (ValueError, KeyError, TypeError) as error:
                    reason = f"it has no {error}" if isinstance(error, KeyError) else error
                    number = question.get("question_id") if isinstance(question, Mapping) else question
                    raise ValueError(f"question {number} of {names[0]}: {reason}") from error
                self.scenes.append(scene)
                self.questions.append(question)
                texts.append(text)
                labels += label
                episode.append(place)
                types.append(QUESTION_TYPES.index(kind))
                shifts.append(shift)
        if not self.questions:
            known = ", ".join(list(episodes)[:3])
            wanted = ", ".join(self.missing_videos[:3])
            raise ValueError(
                f"no question to ask about {dataset.name}: its episodes are named {known}, ..."
                + (f"; the questions are about {wanted}, ..." if wanted else "; the file has none of these types")
            )
        self.counts = np.array([len(text) for text in texts])
        self.first = np.cumsum(self.counts) - self.counts
        self.tokens = np.concatenate(texts).astype(np.int32)
        self.labels = np.array(labels, np.int64)
        self.episode, self.types = np.array(episode), np.array(types)
        self.first_frame = np.array(shifts)
        parts = (self.counts, self.tokens, self.labels, self.episode, self.types, self.first_frame)
        self.fingerprint = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]

    def _encode(self, question: Mapping[str, Any]) -> tuple[np.ndarray, list[int]]:
        if question["question_type"] == "descriptive":
            answer = question.get("answer")
            label = -1 if answer is None else self.processor.answer_label(str(answer))
            return self.processor.encode_question(question["question"]), [label]
        choices = question["choices"]
        text = self.processor.encode_question(question["question"], [choice["choice"] for choice in choices])
        known = {"correct": 1, "wrong": 0, None: -1}
        for choice in choices:
            if choice.get("answer") not in known:
                raise ValueError(f"an option's answer is {choice['answer']!r}: expected correct or wrong")
        return text, [known[choice.get("answer")] for choice in choices]

    def __len__(self) -> int:
        return len(self.questions)

    def select(self, indices: Iterable[int]) -> "QuestionDataset":
        """The questions `indices`, in that order."""
        indices = np.asarray(list(indices), np.int64)
        part = copy.copy(self)
        part.scenes = [self.scenes[i] for i in indices]
        part.questions = [self.questions[i] for i in indices]
        for name in ("counts", "first", "episode", "types", "first_frame"):
            setattr(part, name, getattr(self, name)[indices])
        return part

    def _rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The text sequences of questions `indices` [B], int64 [S], and the place in `indices` of each."""
        counts = self.counts[indices]
        before = np.cumsum(counts) - counts
        rows = np.repeat(self.first[indices] - before, counts) + np.arange(counts.sum())
        return rows, np.repeat(np.arange(len(indices)), counts)

    def known_labels(self) -> np.ndarray:
        """Labels int64 of all text sequences, in order."""
        return self.labels[self._rows(np.arange(len(self)))[0]]

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        indices = np.asarray(indices, np.int64)
        rows, question = self._rows(indices)
        tokens = torch.from_numpy(self.tokens[rows].astype(np.int64))
        # questions about the same frames of a video share them, also where the first one is drawn
        views = np.stack([self.episode[indices], self.first_frame[indices]], axis=1)
        views, view = np.unique(views, axis=0, return_inverse=True)
        if self.text_only:
            batch = {"slots": torch.zeros(len(views), self.processor.num_frames, *self._slots.shape)}
        else:
            batch = self.view(views[:, 0], views[:, 1])
        types = torch.from_numpy(self.types[indices])
        question = torch.from_numpy(question)
        batch |= {
            "input_ids": tokens,
            "attention_mask": tokens != 0,
            "is_option": (types != QUESTION_TYPES.index("descriptive"))[question],
            "video_index": torch.from_numpy(view.reshape(-1))[question],
            "question_index": question,
            "labels": torch.from_numpy(self.labels[rows]),
            "question_type": types,
        }
        return batch


class QuestionsByVideo(torch.utils.data.Dataset):
    """The same batches with one item per scene: all of its questions. [`QuestionDataset`] gives one item per question."""

    def __init__(self, questions: QuestionDataset):
        self.questions, self.fingerprint = questions, questions.fingerprint
        groups: dict[int, list[int]] = {}
        for index, scene in enumerate(questions.scenes):
            groups.setdefault(id(scene), []).append(index)
        self.groups = [np.array(group) for group in groups.values()]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self.questions.__getitems__(np.concatenate([self.groups[index] for index in indices]))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    collate = staticmethod(QuestionDataset.collate)


def with_statements(scene: Mapping[str, Any], statements: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """A scene of a question file with the questions more that there are under the name of its video."""
    more = next((statements[name] for name in video_names(scene) if name in statements), [])
    return {**scene, "questions": [*scene["questions"], *more]}


# --- objective and metrics -----------------------------------------------------------------------------------------


def question_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of the answers plus binary cross entropy of the options, each the mean over its own sequences."""
    output = model(**{name: batch[name] for name in MODEL_INPUTS})
    return output.loss, {"answer_loss": output.answer_loss.detach(), "option_loss": output.option_loss.detach()}


# How often contacts begin is what a model gets wrong, not what the other object is: most of the weight.
TOUCH_WEIGHT, OTHER_WEIGHT = 5.0, 0.5


def contact_loss(contact_logits: Tensor, contacts: Tensor, sizes: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of `contact_losses`, and both."""
    touch, other = contact_losses(contact_logits, contacts, sizes)
    parts = {"touch_loss": touch.detach(), "other_loss": other.detach()}
    return TOUCH_WEIGHT * touch + OTHER_WEIGHT * other, parts


def contact_objective(
    sizes: Sequence[int],
) -> Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
    """The loss of contacts alone, on batches of a [`ContactDataset`]."""

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return contact_loss(model(batch["slots"]).contact_logits, batch["contacts"], sizes)

    return loss_fn


def contact_metrics(sizes: Sequence[int]) -> Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]:
    """Losses, and how well contacts are told: `contact_f1` at probability 1/2, the mean over batches."""

    def metric_fn(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, contacts = model(batch["slots"]).contact_logits, batch["contacts"]
        loss, parts = contact_loss(logits, contacts, sizes)
        told, true = (logits[..., 0] > 0) & (contacts[..., 0] >= 0), contacts[..., 0] > 0
        f1 = 2 * (told & true).sum() / (told.sum() + true.sum()).clamp(min=1)
        return {"loss": loss, **parts, "contact_f1": f1}

    return metric_fn


def question_objective(
    sizes: Sequence[int], weight: float
) -> Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
    """[`question_loss`] plus `weight` times the loss of the contacts in the same batch."""

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        output = model(**{name: batch[name] for name in MODEL_INPUTS})
        contact, parts = contact_loss(output.contact_logits, batch["contacts"], sizes)
        parts |= {"answer_loss": output.answer_loss.detach(), "option_loss": output.option_loss.detach()}
        return output.loss + weight * contact, parts

    return loss_fn


def right_sequences(output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """
    What a batch got right: bool [S] of every answer and option, and bool [B] of every question (all of its options). An
    option counts as correct above 0; the answer is the best one, padding left out.
    """
    answered = output.answer_logits[:, 1:].argmax(-1) + 1 == batch["labels"]
    chosen = (output.option_logits > 0) == (batch["labels"] == 1)
    right = torch.where(batch["is_option"], chosen, answered)
    wrong = torch.zeros(len(batch["question_type"]), device=right.device).index_add_(
        0, batch["question_index"], (~right).float()
    )
    return right, wrong == 0


def question_metrics(dataset: QuestionDataset) -> Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]:
    """
    Accuracies whose means over the questions of `dataset` are: `accuracy` of all questions (as the paper's average:
    weighted by their number), `<type>_accuracy` per question (all options right) and `<type>_option_accuracy`.
    """
    questions = np.bincount(dataset.types, minlength=len(QUESTION_TYPES))
    options = np.bincount(dataset.types, weights=dataset.counts, minlength=len(QUESTION_TYPES))
    if (dataset.known_labels() < 0).any():
        raise ValueError("the validation questions have no answers: evaluate on a split that has them")

    def metric_fn(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        output = model(**{name: batch[name] for name in MODEL_INPUTS})
        right, solved = right_sequences(output, batch)
        types, batch_size = batch["question_type"], len(batch["question_type"])
        metrics = {"loss": output.loss, "accuracy": solved.double().mean()}
        for kind, name in enumerate(QUESTION_TYPES):
            if questions[kind]:
                # the trainer weights batches by their questions: scaled so that this gives the mean over the type
                scale = len(dataset) / batch_size
                metrics[f"{name}_accuracy"] = (solved & (types == kind)).sum().double() * (scale / questions[kind])
                if name != "descriptive":
                    hits = (right & (types == kind)[batch["question_index"]]).sum().double()
                    metrics[f"{name}_option_accuracy"] = hits * (scale / options[kind])
        return metrics

    return metric_fn


# --- from arguments to a trained folder ----------------------------------------------------------------------------


def build_model(
    args: AloeTrainArguments, overrides: Mapping[str, Any], dataset: SlotDataset, probe: SlotProbe | None = None
) -> tuple[AloeForVideoQuestionAnswering, AloeProcessor]:
    """The model to train, sized by the slots, and its processor. ValueError where they contradict `overrides`."""
    imagined = imagination_settings(dataset) or {}
    imagined = {name: imagined[name] for name in ("contact_distance", "num_future_frames") if name in imagined}
    if imagined:  # however few were imagined, they are what predictive questions are about
        imagined["min_imagined_frames"] = imagined["num_future_frames"]
    if args.init_model:
        processor = AloeProcessor.from_pretrained(args.init_model)
        for name, value in imagined.items():
            setattr(processor, name, value)
        model = AloeForVideoQuestionAnswering.from_pretrained(
            args.init_model, use_safetensors=True, dtype=torch.float32
        )
        found = {name: getattr(model.config, name) for name in config_fields(AloeConfig)}
        found |= {"num_slots": dataset.num_slots, "slot_size": dataset.slot_size}
        for name, value in (found | dict(overrides)).items():
            if getattr(model.config, name) != value:
                raise ValueError(f"{args.init_model} has {name}={getattr(model.config, name)}, expected {value}")
        if args.observed_frames not in (AloeTrainArguments.observed_frames, processor.observed_frames):
            raise ValueError(
                f"{args.init_model} was made for observed_frames={processor.observed_frames}, not {args.observed_frames}"
            )
        if probe is not None and model.config.slot_neighbors and not torch.equal(model.slot_coordinates, probe.weight):
            raise ValueError(
                f"{args.init_model} finds neighbors by another probe than {args.slot_probe}: give the one it was trained with"
            )
        return model, processor
    fields = {"num_slots": dataset.num_slots, "slot_size": dataset.slot_size}
    if probe is not None and args.annotations:
        fields["contact_attributes"] = [len(values) for values in probe.attributes.values()]
    words = AloeProcessor()
    fields |= {"vocab_size": len(words.words) + 1, "num_answers": len(words.answers) + 1}
    for name, value in fields.items():
        if overrides.get(name, value) != value:
            raise ValueError(f"{name}={overrides[name]}, but the data have {value}: leave {name} out")
    config = AloeConfig(**fields | dict(overrides))
    processor = AloeProcessor(
        max_question_length=config.max_question_length,
        max_choice_length=config.max_choice_length,
        num_frames=config.num_frames,
        observed_frames=args.observed_frames,
        unknown_word=args.unknown_word,
        **imagined,
    )
    model = AloeForVideoQuestionAnswering(config)
    if config.slot_neighbors:
        if probe is None or not probe.has_positions:
            raise ValueError(
                f"slot_neighbors={config.slot_neighbors}: which slots are near is read by a probe, give slot_probe, fitted with "
                "positions"
            )
        if probe.weight.shape != model.slot_coordinates.shape:
            raise ValueError(
                f"slot_probe reads slots of size {len(probe.weight) - 1}, those of the data have {config.slot_size}: it was "
                "fitted on another encoder's"
            )
        model.slot_coordinates.copy_(probe.weight)
    return model, processor


@torch.no_grad()
def whiten_projection(
    model: AloeForVideoQuestionAnswering, videos: QuestionDataset | ContactDataset, num_views: int = 1024
) -> None:
    """
    Sets the projection of slots to whitening followed by a rotation: whatever differs between the slots of `videos` (with
    their context, if the model reads it) has variance 1 in what the model reads, down to a hundredth of the largest standard
    deviation, and the largest directions if there are more than it has room for. Weights alone change.
    """
    chosen = np.random.default_rng(0).permutation(len(videos))[:num_views]
    slots = with_context(videos.__getitems__(np.sort(chosen))["slots"], model.config.slot_context)
    slots = slots.flatten(0, 2).double()
    mean = slots.mean(0)
    variance, directions = torch.linalg.eigh((slots - mean).T @ (slots - mean) / len(slots))
    if not variance.max() > 1e-12:
        raise ValueError(f"all slots of {videos.dataset.name} are the same: there is nothing to whiten")
    weight = model.slot_projection.weight
    scale = (variance.clamp(min=0) + 1e-4 * variance.max()).rsqrt()
    whitener = (directions * scale).T[-len(weight) :]  # the largest come last
    whitening = torch.nn.init.orthogonal_(torch.empty(len(weight), len(whitener))).double() @ whitener
    weight[:, : len(mean)] = whitening.to(weight)
    model.slot_projection.bias.copy_(-whitening @ mean)


@torch.no_grad()
def structure_positions(model: AloeForVideoQuestionAnswering) -> None:
    """
    Sets the positions of slots to a part of their frame, sines and cosines with periods of 3 to 4 * num_frames frames, plus a
    part of their slot, random: as large as what is read of whitened slots. Weights alone change.
    """
    config = model.config
    half = config.hidden_size // 2
    periods = 3 * (4 * config.num_frames / 3) ** torch.linspace(0, 1, half)
    angle = 2 * torch.pi * torch.arange(config.num_frames)[:, None] / periods
    frames = torch.zeros(config.num_frames, config.hidden_size)
    frames[:, :half], frames[:, half : 2 * half] = angle.sin(), angle.cos()
    slots = 0.3 * torch.randn(config.num_slots, config.hidden_size)
    places = (0.5 * frames[:, None] + slots).flatten(0, 1)
    model.position_embedding[1 : 1 + len(places)] = places.to(model.position_embedding)


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Trains as the command line `argv` (default: `sys.argv[1:]`) says and leaves the model in `--output_dir`."""
    classes = [AloeTrainArguments, config_arguments(AloeConfig)]
    args, given = parse_arguments(classes, argv, description=__doc__)
    overrides = config_overrides(given)
    accelerator = make_accelerator(args)
    scenes = None if args.questions is None else load_questions(args.questions)
    validation_scenes = load_questions(args.validation_questions) if args.validation_questions else None
    validates = validation_scenes is not None
    if args.contacts_only:
        validates = bool(ClevrerFolder(args.annotations).files("annotation", args.validation_split))
        if not validates and accelerator.is_main_process:
            print(
                f"no evaluation: {args.annotations} has no annotations of the split {args.validation_split}",
                file=sys.stderr,
            )
    with accelerator.main_process_first():  # the first process prepares the memory-mapped files
        slots = load_slot_dataset(args.dataset, args.train_split, revision=args.dataset_revision)
        validation_slots = None
        if validates:
            validation_slots = load_slot_dataset(args.dataset, args.validation_split, revision=args.dataset_revision)
    probe = None if args.slot_probe is None else SlotProbe.from_pretrained(args.slot_probe)
    torch.manual_seed(args.seed)
    model, processor = build_model(args, overrides, slots, probe)
    sizes = model.config.contact_attributes
    if args.annotations and sizes != [len(values) for values in probe.attributes.values()]:
        raise ValueError(
            f"{args.init_model} has contact_attributes={sizes}, but the probe tells attributes with "
            f"{[len(values) for values in probe.attributes.values()]} values: leave annotations out, or start from a model that "
            "was trained with this probe"
        )
    contacts = validation_contacts = None
    if args.annotations:
        known = (args.annotations, args.train_split, probe, processor.observed_frames)
        # next to questions about what happens after the same frames, they would be asked in the same words about others
        apart = args.questions is None or imagination_settings(slots) is not None
        future = processor.num_future_frames if apart else 0
        contacts = SlotContacts(slots, *known, statements=args.statements, num_future_frames=future)
        if args.statements and scenes is None:
            scenes = [{"video_filename": name, "questions": made} for name, made in contacts.statements.items()]
        elif args.statements:
            scenes = [with_statements(scene, contacts.statements) for scene in scenes]
        if args.contacts_only and validation_slots is not None:
            known = (args.annotations, args.validation_split, probe, processor.observed_frames)
            validation_contacts = SlotContacts(validation_slots, *known)
    options = {"question_types": args.chosen_types(), "text_only": args.text_only}
    if args.contacts_only:
        videos = ContactDataset(slots, contacts, processor, args.random_start)
        validation = None
        if validation_slots is not None:
            validation = ContactDataset(validation_slots, validation_contacts, processor, False)
        for name, parameter in model.named_parameters():
            parts = ("slot_projection", "neighbors", "position_embedding", "contact_")
            layers = tuple(f"layers.{index}." for index in range(model.config.contact_layer))
            parameter.requires_grad_(name.startswith((*parts, *layers)))
    else:
        videos = QuestionDataset(
            slots, scenes, processor, random_start=args.random_start, contacts=contacts, **options
        )
        validation = None
        if validation_slots is not None:
            validation = QuestionDataset(validation_slots, validation_scenes, processor, **options)
            if args.eval_samples and args.eval_samples < len(validation):
                chosen = np.random.default_rng(0).permutation(len(validation))[: args.eval_samples]
                validation = validation.select(np.sort(chosen))
        if (videos.known_labels() < 0).any():
            raise ValueError(f"{args.questions} holds questions without answers: train on a split that has them")
    if sizes and contacts is None:  # a head without labels
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith("contact_"))
    if args.whiten_slots and not args.text_only:
        whiten_projection(model, videos)
    if args.structured_positions:
        structure_positions(model)
    if accelerator.is_main_process:
        if contacts is not None:
            print(
                f"{contacts.found} of {contacts.num_objects} annotated objects found among the slots", file=sys.stderr
            )
        for name, part in (("training", videos), ("validation", validation)):
            if isinstance(part, QuestionDataset) and part.missing_videos:
                names = ", ".join(part.missing_videos[:3])
                print(f"{len(part.missing_videos)} {name} videos have no slots: {names}, ...", file=sys.stderr)
    if args.contacts_only:
        loss_fn, metric_fn = contact_objective(sizes), contact_metrics(sizes)
    else:
        loss_fn = question_loss if contacts is None else question_objective(sizes, args.contact_weight)
        metric_fn = question_metrics(validation) if validation is not None else None

    num_statements = 0
    if args.statements:
        num_statements = sum(question["question_id"] == STATEMENTS for question in videos.questions)

    def files(result):
        results = training_results(
            result,
            model.parameters(),
            args.dataset,
            **{"training_videos" if args.contacts_only else "training_questions": len(videos) - num_statements},
            **({"training_statements": num_statements} if args.statements else {}),
            **{
                "validation_videos" if args.contacts_only else "validation_questions": 0
                if validation is None
                else len(validation)
            },
            dataset_revision=args.dataset_revision,
            slot_encoder=slots.metadata.get("encoder"),
        )
        return result_files(args, overrides, results) | {
            "processor_config.json": processor.to_json_string(),
            "README.md": model_card(model, args, results),
        }

    return train_and_save(
        model,
        QuestionsByVideo(videos) if args.group_by_video and not args.contacts_only else videos,
        validation,
        loss_fn,
        args,
        files,
        accelerator,
        metric_fn=metric_fn if validation is not None else None,
    )


def model_card(model: AloeForVideoQuestionAnswering, args: AloeTrainArguments, results: Mapping[str, Any]) -> str:
    """README.md of a trained folder: what it is, how it was trained, what was measured."""
    config = model.config
    encoder = (results["slot_encoder"] or {}).get("name")
    sees = "no slots at all: the text-only baseline" if args.text_only else f"{config.num_frames} frames of a video"
    if args.contacts_only:
        learned, batches = f"contacts in {results['training_videos']:,} annotated videos", "videos"
        validated = f"On {results['validation_videos']:,} videos."
    else:
        parts = [f"{results['training_questions']:,} questions ({args.question_types})"] if args.questions else []
        if args.statements:
            parts.append(f"{results['training_statements']:,} more about which pairs of objects collide")
        learned = ", ".join([*parts, *(["contacts in the same videos"] if args.annotations else [])])
        batches = "videos" if args.group_by_video else "questions"
        validated = (
            f"On {results['validation_questions']:,} questions. A multiple-choice question is right when all of its options "
            "are; `accuracy` weights the types by their questions."
        )
    return card_text(
        model,
        args,
        results,
        about="ALOE ([paper](https://arxiv.org/abs/2012.08508)) answers CLEVRER's questions about a video from its "
        f"{config.num_slots} object slots of size {config.slot_size}. It sees {sees}."
        + (" This one has learned no answers yet, only which objects touch." if args.contacts_only else ""),
        training=[
            f"slots: `{results['dataset']}`, split `{args.train_split}`" + (f", by `{encoder}`" if encoder else ""),
            f"{learned}, {steps_taken(args, results, batches)}",
            f"{results['parameters']:,} parameters, {config.num_hidden_layers} layers",
        ],
        validation=validated,
        tags=["c-jepa", "aloe"],
        task=None if args.contacts_only else "visual-question-answering",
        processor="AloeProcessor",
    )


if __name__ == "__main__":
    main()
