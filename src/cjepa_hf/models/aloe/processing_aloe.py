"""Slots of a video and questions about it -> the inputs of an AloeForVideoQuestionAnswering, and back to answers."""

import difflib

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

QUESTION_TYPES = ("descriptive", "explanatory", "predictive", "counterfactual")

# All words of CLEVRER's questions and options: token 1 + place in the list. Commas and 's belong to the word.
_WORDS = """
after and any are before begins between blue brown collide collides colliding collision collisions color cube cube's
cube, cubes cyan cylinder cylinder's cylinder, cylinders ends enter entering enters entrance event exit exiting exits
first following for gray green happen how if is last many material metal moving next not object object's object, objects
of presence purple red removed removed, responsible rubber scene second shape sphere sphere's sphere, spheres stationary
that the there to video what when which will with without yellow
"""
CLEVRER_WORDS = tuple(_WORDS.split())
# All answers to CLEVRER's descriptive questions: label 1 + place in the list.
_ANSWERS = "0 1 2 3 4 5 blue brown cube cyan cylinder gray green metal no purple red rubber sphere yellow yes"
CLEVRER_ANSWERS = tuple(_ANSWERS.split())


class AloeProcessor(ProcessorMixin):
    r"""
    Tokenizes questions and options word by word and chooses the frames that a question sees, as C-JEPA's released code
    does (and SlotFormer's before it).

    Args:
        words (`list[str]`, *optional*): The vocabulary; word i is token i + 1, token 0 is padding. Default: CLEVRER's.
        answers (`list[str]`, *optional*): Answers to descriptive questions; answer i is label i + 1. Default: CLEVRER's.
        max_question_length, max_choice_length (`int`, defaults to 20, 12): Tokens of a question and of an option.
        unknown_word (`str`, *optional*): A word of `words` that stands for all unknown ones; without it an unknown word
            is an error.
        num_frames (`int`, defaults to 25): Frames of a video that the model sees.
        observed_frames (`int`, defaults to 128): Frames of a video before the imagined ones.
        min_imagined_frames (`int`, defaults to 23): A predictive question looks at imagined frames from this number on
            (the released code: if the video has more than 150 frames).
        contact_distance (`float`, *optional*), num_future_frames (`int`, defaults to 32): Not used here: with them the
            videos that the model was trained on were imagined (`cjepa-hf imagine`). They are the defaults of
            `pipeline("video-question-answering")`.

    Example:

    ```python
    >>> processor = AloeProcessor()
    >>> processor.frame_indices(160, "predictive")[[0, -1]].tolist()
    [35, 155]

    ```
    """

    model_input_names = ["slots", "input_ids", "attention_mask", "is_option", "video_index", "question_index"]

    def __init__(
        self,
        words: list[str] | None = None,
        answers: list[str] | None = None,
        max_question_length: int = 20,
        max_choice_length: int = 12,
        unknown_word: str | None = None,
        num_frames: int = 25,
        observed_frames: int = 128,
        min_imagined_frames: int = 23,
        contact_distance: float | None = None,
        num_future_frames: int = 32,
    ):
        super().__init__()
        self.words = list(CLEVRER_WORDS if words is None else words)
        self.answers = list(CLEVRER_ANSWERS if answers is None else answers)
        self.max_question_length, self.max_choice_length = max_question_length, max_choice_length
        self.unknown_word, self.num_frames = unknown_word, num_frames
        self.observed_frames, self.min_imagined_frames = observed_frames, min_imagined_frames
        self.contact_distance, self.num_future_frames = contact_distance, num_future_frames
        for name in ("words", "answers"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                twice = next(value for value in values if values.count(value) > 1)
                raise ValueError(f"{name} holds {twice!r} twice.")
        for word in self.words:
            if not word or word != word.lower() or "?" in word or len(word.split()) != 1:
                raise ValueError(f"words holds {word!r}: expected lower-case words without spaces and question marks.")
        for name in (
            "max_question_length",
            "max_choice_length",
            "num_frames",
            "min_imagined_frames",
            "num_future_frames",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer.")
        if contact_distance is not None and not (
            isinstance(contact_distance, int | float) and contact_distance is not True and 0 < contact_distance < 1e9
        ):
            raise ValueError(f"contact_distance={contact_distance!r} must be a positive number or None.")
        if observed_frames < num_frames:
            raise ValueError(f"observed_frames={observed_frames} must be at least num_frames={num_frames}.")
        self._token = {word: place for place, word in enumerate(self.words, 1)}
        self._label = {answer: place for place, answer in enumerate(self.answers, 1)}
        if unknown_word is not None and unknown_word not in self._token:
            raise ValueError(f"unknown_word={unknown_word!r} is not among the {len(self.words)} words: add it there.")

    # ------------------------------------------------------------------------------------------------------- text

    def tokenize(self, text: str) -> list[int]:
        """Token of every word: lower case, without question marks, split at spaces.

        Raises `ValueError` for a word outside the vocabulary (unless there is an `unknown_word`) and for empty text."""
        if not isinstance(text, str):
            raise ValueError(f"text is {text!r}: expected a string.")
        found = text.lower().replace("?", "").split()
        if not found:
            raise ValueError(f"text {text!r} has no words.")
        tokens = [self._token.get(word, self._token.get(self.unknown_word)) for word in found]
        if None in tokens:
            word = found[tokens.index(None)]
            near = difflib.get_close_matches(word, self._token, n=3)
            raise ValueError(
                f"unknown word {word!r} in {text!r}: "
                + (f"did you mean {' or '.join(map(repr, near))}? " if near else "")
                + f"The vocabulary has {len(self.words)} words; declare an unknown_word to accept others."
            )
        return tokens

    def _padded(self, text: str, length: int, what: str) -> list[int]:
        tokens = self.tokenize(text)
        if len(tokens) > length:
            raise ValueError(
                f"{what} of {len(tokens)} words, at most {length} fit: {text!r}. Shorten it, or train a model with more "
                f"(max_question_length={self.max_question_length}, max_choice_length={self.max_choice_length})."
            )
        return tokens + [0] * (length - len(tokens))

    def encode_question(self, question: str, options: list[str] | None = None) -> np.ndarray:
        """
        Tokens of one question, int64 [1, max_question_length + max_choice_length] without options, else
        [options, ...]: the question padded to max_question_length, then the option. 0 is padding.
        """
        if options is None:
            both = self.max_question_length + self.max_choice_length
            return np.array([self._padded(question, both, "descriptive question")], np.int64)
        if isinstance(options, str) or not len(options):
            raise ValueError(f"options of {question!r} are {options!r}: expected a list of strings, at least one.")
        start = self._padded(question, self.max_question_length, "question with options")
        return np.array(
            [start + self._padded(option, self.max_choice_length, "option") for option in options], np.int64
        )

    def answer_label(self, answer: str) -> int:
        """Label of an answer to a descriptive question; `ValueError` for one outside the list."""
        if answer not in self._label:
            raise ValueError(f"unknown answer {answer!r}: expected one of {', '.join(self.answers)}.")
        return self._label[answer]

    # ----------------------------------------------------------------------------------------------------- frames

    @property
    def stride(self) -> int:
        """Frames from one seen frame to the next: 5 with 25 of 128 frames."""
        return self.observed_frames // self.num_frames

    @property
    def num_starts(self) -> int:
        """Number of first frames to choose from: with 25 of 128 frames the first is 0 ... 7."""
        return self.observed_frames - (self.num_frames - 1) * self.stride

    def frame_indices(
        self, length: int, question_type: str | None = None, start: int | np.ndarray | None = None
    ) -> np.ndarray:
        """
        The frames of a video of `length` frames that a question sees, int64 [num_frames] (or [..., num_frames] for an
        array of starts): evenly spaced among the observed ones. A predictive question sees as many frames, but those
        that end with the imagined ones, where there are at least `min_imagined_frames`.

        Args:
            question_type: "predictive" or anything else.
            start: first frame, below `num_starts`; default: the middle one, so that results repeat. The released code
                draws it at random, in training and in evaluation.
        """
        if length < self.observed_frames:
            raise ValueError(
                f"a video of {length} frames: expected at least observed_frames={self.observed_frames}. Extract slots of "
                f"every frame, or set observed_frames and num_frames of the processor (and train with them)."
            )
        start = np.asarray((self.num_starts - 1) // 2 if start is None else start)
        if start.size and not 0 <= start.min() <= start.max() < self.num_starts:
            raise ValueError(f"start={start.tolist()} must be in 0 ... {self.num_starts - 1}.")
        imagined = length - self.observed_frames
        shift = imagined if question_type == "predictive" and imagined >= self.min_imagined_frames else 0
        return start[..., None] + shift + np.arange(self.num_frames) * self.stride

    # ---------------------------------------------------------------------------------------------------- batches

    def __call__(
        self,
        slots: torch.Tensor | np.ndarray | list,
        questions: str | list[str],
        options: list[str] | list[list[str] | None] | None = None,
        question_types: str | list[str | None] | None = None,
        start: int | None = None,
        video_index: list[int] | None = None,
    ) -> BatchFeature:
        """
        Args:
            slots: slots of all frames of one video [T, N, D], or a list of videos (of any lengths).
            questions: one question or several.
            options: for each question its options, None for a descriptive one; for a single question given as a string
                the list of its options.
            question_types: for each question one of "descriptive", "explanatory", "predictive", "counterfactual", or
                None; only "predictive" makes a difference (see `frame_indices`).
            start: first frame, see `frame_indices`.
            video_index: for each question the place of its video in `slots`; default: one video for all questions, or
                as many videos as questions.

        Returns:
            `slots` float [V, num_frames, N, D], each video once for every choice of frames; `input_ids` [S, L],
            `attention_mask` [S, L], `is_option` [S], `video_index` [S] (of `slots`) and `question_index` [S], with one text
            sequence per descriptive question and per option, in order.

        Raises `ValueError` for unknown words, texts too long, videos too short and lists of unequal lengths.
        """
        if isinstance(questions, str):
            questions, options = [questions], None if options is None else [options]
            question_types = (
                [question_types] if question_types is None or isinstance(question_types, str) else question_types
            )
        if isinstance(question_types, str) or question_types is None:
            question_types = [question_types] * len(questions)
        options = [None] * len(questions) if options is None else options
        videos = list(slots) if isinstance(slots, list | tuple) or slots.ndim == 4 else [slots]
        videos = [torch.as_tensor(video) for video in videos]
        if video_index is None:
            video_index = [0] * len(questions) if len(videos) == 1 else list(range(len(videos)))
        for name, value in {"options": options, "question_types": question_types, "videos": video_index}.items():
            if len(value) != len(questions):
                raise ValueError(f"{len(questions)} questions but {len(value)} {name}: expected one per question.")
        if not questions:
            raise ValueError("no questions given.")
        for video in videos:
            if video.ndim != 3:
                raise ValueError(f"slots of a video have shape {tuple(video.shape)}: expected (T, N, D).")
        for kind in question_types:
            if kind not in (None, *QUESTION_TYPES):
                raise ValueError(f"question type {kind!r}: expected one of {', '.join(QUESTION_TYPES)}.")
        seen, texts, places = {}, [], []
        for question, choices, kind, place in zip(questions, options, question_types, video_index, strict=True):
            texts.append(self.encode_question(question, choices))
            frames = self.frame_indices(len(videos[place]), kind, start)
            views = seen.setdefault((place, int(frames[0])), (len(seen), videos[place], frames))
            places.append(views[0])
        counts = torch.tensor([len(text) for text in texts])
        input_ids = torch.from_numpy(np.concatenate(texts))
        return BatchFeature(
            {
                "slots": torch.stack([video[torch.from_numpy(frames)] for _, video, frames in seen.values()]),
                "input_ids": input_ids,
                "attention_mask": (input_ids != 0).long(),
                "is_option": torch.tensor([choices is not None for choices in options]).repeat_interleave(counts),
                "video_index": torch.tensor(places).repeat_interleave(counts),
                "question_index": torch.arange(len(questions)).repeat_interleave(counts),
            }
        )

    def post_process_answers(self, outputs, inputs) -> list[dict]:
        """
        Answers of the model's `outputs` to `inputs`, one dict per question: {"answer": str, "scores": {answer:
        probability}} for a descriptive question, {"options": [bool], "scores": [probability of being correct]} else.
        The answer is the most probable one (padding left out, which is never right); an option is correct above 0.5.
        """
        answers = outputs.answer_logits.detach().float().cpu()[:, 1:].softmax(-1)
        correct = outputs.option_logits.detach().float().cpu().sigmoid()
        question, is_option = inputs["question_index"].cpu(), inputs["is_option"].cpu()
        results = []
        for index in range(int(question.max()) + 1):
            rows = (question == index).nonzero().squeeze(1)
            if is_option[rows[0]]:
                scores = correct[rows].tolist()
                results.append({"options": [score > 0.5 for score in scores], "scores": scores})
            else:
                scores = dict(zip(self.answers, answers[rows[0]].tolist(), strict=True))
                results.append({"answer": max(scores, key=scores.get), "scores": scores})
        return results


__all__ = ["CLEVRER_ANSWERS", "CLEVRER_WORDS", "QUESTION_TYPES", "AloeProcessor"]
