"""`pipeline("video-question-answering")`: answers to questions about a video, from slots that were seen or imagined."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Pipeline

from cjepa_hf.imagination import extend_video, remove_object
from cjepa_hf.models.aloe import AloeForVideoQuestionAnswering, AloeProcessor
from cjepa_hf.models.cjepa import CJepaModel
from cjepa_hf.question_videos import described_objects, first_imagined_frame, question_type_of, removed_object
from cjepa_hf.slot_probe import in_words

from .counterfactual_rollout import find_probe, find_slot, video_slots
from .goal_planning import _default_image_processor

_PREPROCESS_PARAMETERS = ("seed",)
_FORWARD_PARAMETERS = (
    "frames_from",
    "start",
    "branch",
    "contact_distance",
    "empty_slot",
    "num_future_frames",
    "frame_skip",
    "match_slots",
)
_FRAMES_FROM = ("imagined", "released", "observed")


class VideoQuestionAnsweringPipeline(Pipeline):
    """
    Answers questions in CLEVRER's language with an [`AloeForVideoQuestionAnswering`] that looks at slots.

    ```python
    ask = pipeline("video-question-answering", model=aloe, world_model=world_model, slot_encoder=encoder, probe=folder)
    ask({"video": "video.mp4", "question": "What will happen if the red cube is removed?",
         "options": ["The gray cube and the sphere collide", "The sphere collides with the cylinder"]})
    ```

    Which slots a question is answered from (`frames_from`):

    - "imagined" (default): descriptive and explanatory questions see the observed frames; predictive ones the observed
      frames followed by imagined ones; counterfactual ones a video in which the object is gone: observed frames without
      it up to the branch, frames imagined by the world model from there on.
    - "released": as C-JEPA's released code: only predictive questions see imagined frames, counterfactual ones the video as
      it was. (The released code also draws the first frame at random; here it is `start`.)
    - "observed": nothing is imagined.

    The question's object is found among the slots by a [`SlotProbe`] that reads color, material and shape from them:
    `probe=` (object or folder), else the one beside the world model, the slot encoder or the ALOE. Without one, a
    counterfactual question needs `removed_slot`, or is an error that says so.

    Input: a dictionary, or a list of them:
        video: path, frames or slots (as in "counterfactual-rollout"), or slots: float [T, N, D]. All observed frames
            (the processor's `observed_frames`); slots may go on with frames that were imagined before.
        question; options: list of texts for all but descriptive questions; question_type: told from the words by default;
            removed_slot: number of the slot that a counterfactual question takes away.
        questions: instead, a list of dictionaries with these keys: all are answered together, and a list comes back.

    Options, at construction or at the call:
        frames_from; start: first frame that is seen (see [`AloeProcessor.frame_indices`]).
        branch: first imagined frame of counterfactual videos: a number, "start" (as soon as the world model has its
            history) or "contact" (when the removed object first comes within `contact_distance` of another one: until
            then nothing else has changed, so what was observed is true). Default: "contact" if `contact_distance` is given.
        contact_distance: between centers, in the unit of the positions that the slot encoder or the probe tells. Rather
            too large (a few frames more are imagined) than too small (frames after an unnoticed contact count as true).
        empty_slot: [D], what a slot without object looks like; default: the probe's or the encoder's.
        num_future_frames (the processor's), frame_skip (the world model's), match_slots (False): of the rollouts.
        seed (0): of encoders with random initial slots.

    Output per question: a dictionary
        question, question_type,
        answer: the answer, or the list of options that are judged correct,
        scores: {answer: probability}, or one probability per option,
        options: None, or [{"option", "answer": "correct" or "wrong", "score"}],
        frames: the frames that were seen, imagined_frames: those of them that were imagined,
        removed: None, or {"slot", "object" (in words, with a probe), "branch": first imagined frame},
        notes: what is doubtful, such as an option about an object that the video does not show.

    Objects that enter after the branch are shown to the world model from the video when they do. Errors are ValueErrors:
    unknown words, videos that are too short, a removed object that is not there or not unique, and missing parts.
    """

    _load_tokenizer = False
    _load_image_processor = None
    _load_video_processor = False
    _load_feature_extractor = False
    _load_processor = None

    def __init__(
        self,
        model: AloeForVideoQuestionAnswering,
        *args,
        world_model: CJepaModel | str | os.PathLike | None = None,
        slot_encoder=None,
        probe=None,
        **kwargs,
    ):
        if not isinstance(model, AloeForVideoQuestionAnswering):
            raise ValueError(
                f"video-question-answering needs an AloeForVideoQuestionAnswering, got {type(model).__name__}"
            )
        super().__init__(model, *args, **kwargs)
        if isinstance(world_model, str | os.PathLike):
            world_model = CJepaModel.from_pretrained(world_model)
        if world_model is not None and world_model.config.slot_size != model.config.slot_size:
            raise ValueError(
                f"the world model's slots have size {world_model.config.slot_size}, those of the answering model "
                f"{model.config.slot_size}: both must be trained on slots of one encoder"
            )
        self.world_model = None if world_model is None else world_model.to(self.device).eval()
        if slot_encoder is None and world_model is not None:
            slot_encoder = world_model.slot_encoder
        self.slot_encoder = None if slot_encoder is None else slot_encoder.to(self.device).eval()
        self.probe = find_probe(probe, world_model, slot_encoder, model)
        if self.processor is None:
            config = model.config
            self.processor = AloeProcessor(
                max_question_length=config.max_question_length,
                max_choice_length=config.max_choice_length,
                num_frames=config.num_frames,
            )
        if self.image_processor is None and slot_encoder is not None:
            self.image_processor = _default_image_processor(slot_encoder.config)

    def __call__(self, inputs: dict[str, Any] | list[dict[str, Any]], **kwargs):
        """See the class."""
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the answering model, its processor and the probe; not the world model and the slot encoder."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        if self.probe is not None:
            self.probe.save_pretrained(save_directory)

    def _sanitize_parameters(self, **parameters):
        known = (*_PREPROCESS_PARAMETERS, *_FORWARD_PARAMETERS)
        if unknown := set(parameters) - set(known):
            raise ValueError(f"unknown option(s) {sorted(unknown)}; video-question-answering takes {sorted(known)}")
        if parameters.get("frames_from", "imagined") not in _FRAMES_FROM:
            raise ValueError(f"frames_from={parameters['frames_from']!r} must be one of {_FRAMES_FROM}")
        before = {name: parameters.pop(name) for name in _PREPROCESS_PARAMETERS if name in parameters}
        return before, parameters, {}

    def preprocess(self, inputs: dict[str, Any], seed: int = 0) -> dict[str, Any]:
        asked = {"question", "options", "question_type", "removed_slot"}
        if (
            not isinstance(inputs, Mapping)
            or ("video" in inputs) == ("slots" in inputs)
            or ("question" in inputs) == ("questions" in inputs)
            or set(inputs) - {"video", "slots", "questions", *asked}
        ):
            given = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(
                f'expected a dictionary with "video" or "slots", and "question" (with "options", "question_type") or '
                f'"questions"; got {given}'
            )
        single = "question" in inputs
        questions = [{name: inputs[name] for name in asked & set(inputs)}] if single else list(inputs["questions"])
        if not questions:
            raise ValueError("no questions given")
        prepared = []
        for question in questions:
            if not isinstance(question, Mapping) or "question" not in question or set(question) - asked:
                raise ValueError(f"a question is a dictionary with some of {sorted(asked)}, got {question!r}")
            options = question.get("options")
            kind = question_type_of(question["question"], options, question.get("question_type"))
            prepared.append({**question, "options": options, "question_type": kind})
        video = inputs.get("video", inputs.get("slots"))
        slots = video_slots(video, self.slot_encoder, self.image_processor, self.model.config, seed=seed)
        observed = self.processor.observed_frames
        if len(slots) < observed:
            raise ValueError(
                f"a video of {len(slots)} frames: the answering model was made for {observed} observed frames "
                "(observed_frames of its processor)"
            )
        return {"slots": slots, "raw": {"questions": prepared, "single": single}}

    def _forward(
        self,
        inputs: dict[str, Any],
        *,
        frames_from: str = "imagined",
        start: int | None = None,
        branch: str | int | None = None,
        contact_distance: float | None = None,
        empty_slot=None,
        num_future_frames: int | None = None,
        frame_skip: int | None = None,
        match_slots: bool = False,
    ) -> dict[str, Any]:
        slots, questions, processor = inputs["slots"], inputs["raw"]["questions"], self.processor
        contact_distance = processor.contact_distance if contact_distance is None else contact_distance
        future = processor.num_future_frames if num_future_frames is None else num_future_frames
        observed = processor.observed_frames
        kinds = [question["question_type"] for question in questions]
        rollout = {"match_slots": match_slots}
        if self.world_model is not None:
            rollout["frame_skip"] = self.world_model.config.frame_skip if frame_skip is None else frame_skip

        # videos: what was given, the same with imagined frames after it, then one per counterfactual question
        videos, place = [slots], [0] * len(questions)
        imagined_from = [observed] * len(questions)
        removed: list[dict | None] = [None] * len(questions)
        known = len(slots) - observed >= processor.min_imagined_frames
        if frames_from == "observed":
            videos = [slots[:observed]]
        elif "predictive" in kinds and not known:
            self._check_world_model("predictive")
            videos.append(extend_video(self.world_model, slots[None, :observed], num_frames=future, **rollout)[0])
            place = [1 if kind == "predictive" else 0 for kind in kinds]
        rows = [i for i, kind in enumerate(kinds) if kind == "counterfactual" and frames_from == "imagined"]
        if rows:
            self._check_world_model("counterfactual")
            empty = self._empty_slot(empty_slot, slots)
            gone = torch.tensor(
                [self._removed_slot(questions[i], slots[:observed]) for i in rows], device=slots.device
            )
            first = self._branches(slots[:observed], gone, branch, contact_distance, rollout["frame_skip"])
            without = remove_object(
                self.world_model,
                slots[:observed].expand(len(gone), -1, -1, -1),
                gone,
                first,
                empty_slot=empty,
                **rollout,
            )
            names = None if self.probe is None else self.probe.describe(slots[:observed])
            for row, i in enumerate(rows):
                place[i], imagined_from[i] = len(videos) + row, int(first[row])
                name = names and names[int(gone[row])]
                removed[i] = {
                    "slot": int(gone[row]),
                    "object": name and in_words(name),
                    "branch": int(first[row]),
                }
            videos.extend(without)

        features = processor(
            [video.cpu() for video in videos],
            [question["question"] for question in questions],
            options=[question["options"] for question in questions],
            question_types=kinds,
            start=start,
            video_index=place,
        ).to(self.model.device)
        outputs = self.model(**features)
        answers = processor.post_process_answers(outputs, features)
        frames = [
            processor.frame_indices(len(videos[p]), kind, start).tolist() for p, kind in zip(place, kinds, strict=True)
        ]
        notes = [self._notes(question, slots[:observed]) for question in questions]
        return {
            "raw": {**inputs["raw"], "rows": list(zip(answers, frames, imagined_from, removed, notes, strict=True))}
        }

    def _check_world_model(self, kind: str) -> None:
        if self.world_model is None:
            raise ValueError(
                f"a {kind} question is answered from imagined frames, which need a world model: pass world_model=... to "
                f"pipeline(), or frames_from='observed'"
            )
        if self.world_model.config.action_size:
            raise ValueError("the world model takes actions, which nobody takes in these videos: use one without")

    def _empty_slot(self, empty_slot, slots) -> torch.Tensor:
        for source in (
            empty_slot,
            getattr(self.probe, "empty_slot", None),
            getattr(self.slot_encoder, "empty_slot", None),
        ):
            if source is not None:
                return torch.as_tensor(source).to(slots)
        raise ValueError(
            "to take an object away, the answering model needs to know what an empty slot looks like: pass empty_slot [D] "
            "(the mean of slots without object), or a probe that was fitted with such slots"
        )

    def _removed_slot(self, question, slots) -> int:
        if question.get("removed_slot") is not None:
            slot = question["removed_slot"]
            if isinstance(slot, bool) or not isinstance(slot, int) or not 0 <= slot < slots.shape[1]:
                raise ValueError(f"removed_slot={slot!r} must be a number in 0 ... {slots.shape[1] - 1}")
            return slot
        return find_slot(self.probe, slots, removed_object(question["question"]))

    def _branches(self, slots, gone, branch, contact_distance, skip) -> torch.Tensor:
        """First imagined frame for each removed slot, int64 [R]; the video's length if there is nothing to imagine."""
        total = len(slots)
        if branch is None:
            branch = "start" if contact_distance is None else "contact"
        if branch == "start":
            return torch.full_like(gone, min(self.world_model.config.history_length * skip, total))
        if branch != "contact":
            if isinstance(branch, bool) or not isinstance(branch, int) or not skip <= branch <= total:
                raise ValueError(f"branch={branch!r} must be 'start', 'contact' or a frame from {skip} to {total}")
            return torch.full_like(gone, branch)
        if contact_distance is None:
            raise ValueError(
                "branch='contact' needs contact_distance, the distance between the centers of touching objects"
            )
        if hasattr(self.slot_encoder, "positions"):
            positions = self.slot_encoder.positions(slots)
        elif self.probe is not None and self.probe.has_positions:
            positions = self.probe.positions(slots)
        else:
            raise ValueError(
                f"branch='contact' (the default with contact_distance={contact_distance:g}) needs positions: a slot encoder or a "
                "probe that tells them, or branch='start'"
            )
        present = None if self.probe is None else self.probe.present(slots).expand(len(gone), -1, -1)
        return first_imagined_frame(positions.expand(len(gone), -1, -1, -1), gone, contact_distance, skip, present)

    def _notes(self, question, slots) -> list[str]:
        """Objects of the options that the video does not show, or shows twice."""
        if self.probe is None or not self.probe.attributes or question["options"] is None:
            return []
        notes = []
        for option in question["options"]:
            for words in described_objects(option, self.probe.attributes):
                try:
                    self.probe.find(slots, words)
                except ValueError as error:
                    notes.append(f"option {option!r}: {error}")
        return notes

    def postprocess(self, outputs: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        raw, results = outputs["raw"], []
        for question, row in zip(raw["questions"], raw["rows"], strict=True):
            answer, frames, imagined_from, removed, notes = row
            options, kind = question["options"], question["question_type"]
            verdicts = None
            if options is not None:
                verdicts = [
                    {"option": text, "answer": "correct" if correct else "wrong", "score": score}
                    for text, correct, score in zip(options, answer["options"], answer["scores"], strict=True)
                ]
            results.append(
                {
                    "question": question["question"],
                    "question_type": kind,
                    "answer": answer["answer"]
                    if options is None
                    else [one["option"] for one in verdicts if one["answer"] == "correct"],
                    "scores": answer["scores"],
                    "options": verdicts,
                    "frames": frames,
                    "imagined_frames": [frame for frame in frames if frame >= imagined_from],
                    "removed": removed,
                    "notes": notes,
                }
            )
        return results[0] if raw["single"] else results
