"""CLEVRER's questions: programs that are answered from annotations, and questions made for a video of `collisions`.

A program is a list of tokens in postfix order that runs on a stack, as in CLEVRER's files. Programs of options run before
the question's own, on the same stack. Rules that its paper leaves open (all frames count from 0):

- an object enters (`in`) at its first frame in view after one out of view, and exits at its first frame out of view; an
  object that is there at frame 0 does not enter;
- it moves if |(vx, vy)| > 0.02; without a time, if it does so in any frame in view; the video ends with frame 127;
- what is responsible for an event: of each object in it the event just before, in time, and so on back; an object is
  responsible if it takes part in one of these events;
- "next" means the hidden frames 128..174; a counterfactual ends with frame 127; both ask only which pairs collide.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cjepa_hf.simulators.rendering import COLORS, MATERIALS, SHAPES

VISIBLE_FRAMES = 128
MOVING_SPEED = 0.02
ATTRIBUTES = ("color", "material", "shape")
_VALUES = {"color": COLORS, "material": MATERIALS, "shape": SHAPES}
_ORDERS = ("first", "second", "last")


class Event(NamedTuple):
    """`kind`: "in", "out", "collision", "start" or "end"; `objects`: ids, ascending; `frame`: None if only possible."""

    kind: str
    objects: tuple[int, ...]
    frame: int | None


class VideoTruth:
    """What an annotation says about a video, and, where known, what a simulator says about the rest.

    Args:
        annotation: as in CLEVRER's `annotation_NNNNN.json`.
        predictions: as in NS-DR's `sim_NNNNN.json`: the first prediction is the video itself with the collisions of
            its hidden frames, each other one the video without an object. `unsure` of a prediction (ours) lists pairs
            that are not to be asked about.

    Raises:
        ValueError: keys are missing, or the two are not of the same objects.
    """

    def __init__(self, annotation: Mapping[str, Any], predictions: Mapping[str, Any] | None = None):
        try:
            self.name = annotation.get("video_filename", "the video")
            properties = annotation["object_property"]
            self.ids = tuple(o["object_id"] for o in properties)
            self.attributes = {o["object_id"]: {a: o[a] for a in ATTRIBUTES} for o in properties}
            places, frames = {i: k for k, i in enumerate(self.ids)}, annotation["motion_trajectory"][:VISIBLE_FRAMES]
            self.seen = np.zeros((len(frames), len(places)), dtype=bool)
            self.speed = np.zeros((len(frames), len(places)))
            for t, frame in enumerate(frames):
                for o in frame["objects"]:
                    k = places[o["object_id"]]
                    self.seen[t, k] = o["inside_camera_view"]
                    self.speed[t, k] = np.hypot(o["velocity"][0], o["velocity"][1])
            events = [
                Event("collision", tuple(sorted(c["object_ids"])), int(c["frame_id"]))
                for c in annotation["collision"]
                if c["frame_id"] < VISIBLE_FRAMES
            ]
            for event in events:
                if len(event.objects) != 2 or not set(event.objects) <= set(self.ids) or event.frame < 0:
                    raise KeyError(f"collision of objects {event.objects} in frame {event.frame}")
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"not an annotation of CLEVRER ({error!r}); expected object_property, motion_trajectory and "
                             "collision.") from None  # fmt: skip
        for object_id, k in places.items():
            for kind, step in (("in", 1), ("out", -1)):
                changes = np.flatnonzero(np.diff(self.seen[:, k].astype(int)) == step) + 1
                events += [Event(kind, (object_id,), int(frame)) for frame in changes]
        self.events = sorted(events, key=lambda e: (e.frame, e.kind, e.objects))
        self.objects = tuple(i for i in self.ids if self.seen[:, places[i]].any())
        self.collided = {e.objects for e in self.events if e.kind == "collision"}
        self.unseen: set[tuple[int, int]] | None = None
        self.unseen_frames: dict[tuple[int, int], int] = {}
        self.counterfactuals: dict[int, set[tuple[int, int]]] | None = None
        self.unsure: dict[int, set[tuple[int, int]]] = {}
        self._places = places
        if predictions is not None:
            self._read_predictions(predictions)

    def _read_predictions(self, predictions):
        by_attributes = {tuple(a[n] for n in ATTRIBUTES): i for i, a in self.attributes.items()}

        def pair(objects):
            return tuple(sorted(by_attributes[tuple(o[n] for n in ATTRIBUTES)] for o in objects))

        try:
            actual, *others = predictions["predictions"]
            late = [c for c in actual["collisions"] if c["frame"] >= VISIBLE_FRAMES]
            self.unseen_frames = {pair(c["objects"]): c["frame"] for c in late}
            self.unseen = set(self.unseen_frames)
            self.counterfactuals = {
                p["what_if"]: {pair(c["objects"]) for c in p["collisions"] if c["frame"] < VISIBLE_FRAMES}
                for p in others
            }
            self.unsure = {p["what_if"]: {pair(o) for o in p.get("unsure", ())} for p in others}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the predictions do not belong to {self.name} or are no NS-DR file ({error!r})."
            ) from None

    def moving(self, object_id: int, frame: int | None) -> bool | None:
        """Whether it moves (see above); None if it is not in view."""
        k = self._places[object_id]
        if frame is None:
            seen = self.seen[:, k]
            return bool((self.speed[seen, k] > MOVING_SPEED).any()) if seen.any() else None
        return bool(self.speed[frame, k] > MOVING_SPEED) if self.seen[frame, k] else None

    def ancestors(self, event: Event) -> list[Event]:
        """The events that are responsible for it, in time."""
        found, todo = set(), [event]
        while todo:
            current = todo.pop()
            for object_id in current.objects:
                trace = [e for e in self.events if object_id in e.objects]
                before = trace[: trace.index(current)]
                if before and before[-1] not in found and before[-1] != event:
                    found.add(before[-1])
                    todo.append(before[-1])
        return [e for e in self.events if e in found]


class _Objects(list):
    """Ids, and the words they were chosen by (for messages)."""

    words: tuple[str, ...] = ()


class _Executor:
    def __init__(self, truth):
        self.truth, self.stack = truth, []

    def run(self, program):
        for token in program:
            method = getattr(self, f"_{token}", None)
            if method is not None:
                method()
            elif token in ("filter_color", "filter_material", "filter_shape"):
                self._filter_attribute(token.removeprefix("filter_"))
            elif token in ("query_color", "query_material", "query_shape"):
                name = token.removeprefix("query_")
                self.stack.append(self.truth.attributes[self._pop(int, token)][name])
            elif token in _ORDERS or any(token in values for values in _VALUES.values()):
                self.stack.append(token)
            else:
                raise ValueError(f"unknown token {token!r} in a program.")

    def _pop(self, kind, token):
        if not self.stack or not isinstance(self.stack[-1], kind):
            on_top = self.stack[-1] if self.stack else "nothing"
            raise ValueError(f"the program is not well-formed: {token} finds {on_top!r} on the stack.")
        return self.stack.pop()

    def _objects(self):
        self.stack.append(_Objects(self.truth.objects))

    def _events(self):
        self.stack.append(list(self.truth.events))

    def _all_events(self):  # what could happen: every pair once
        ids = sorted(self.truth.objects)
        self.stack.append([Event("collision", (a, b), None) for k, a in enumerate(ids) for b in ids[k + 1 :]])

    def _unseen_events(self):
        if self.truth.unseen is None:
            raise ValueError(f"what happens after {self.truth.name} is not known: give its predictions too.")
        self.stack.append([Event("collision", pair, None) for pair in sorted(self.truth.unseen)])

    def _get_counterfact(self):
        gone = self._pop(int, "get_counterfact")
        self._pop(list, "get_counterfact")
        truth = self.truth.counterfactuals
        if truth is None or gone not in truth:
            raise ValueError(
                f"what happens in {self.truth.name} without object {gone} is not known: give its predictions."
            )
        self.stack.append([Event("collision", pair, None) for pair in sorted(truth[gone])])

    def _start(self):
        self.stack.append(Event("start", (), 0))

    def _end(self):
        self.stack.append(Event("end", (), len(self.truth.seen) - 1))

    def _null(self):
        self.stack.append(None)

    def _unique(self):
        values = self._pop(list, "unique")
        if len(values) != 1:
            if isinstance(values, _Objects):
                what = " ".join(sorted(values.words, key=_attribute_place)) or "object"
                raise ValueError(
                    f'{self.truth.name} has {len(values) or "no"} objects that are "{what}"; a description must fit '
                    f"exactly one. It has {', '.join(map(self._name, self.truth.objects))}."
                )
            found = ", ".join(f"{e.kind} of {' and '.join(map(self._name, e.objects))} at {e.frame}" for e in values)
            raise ValueError(f"expected exactly one event in {self.truth.name}, found {found or 'none'}.")
        self.stack.append(values[0])

    def _name(self, object_id):
        return " ".join(self.truth.attributes[object_id][a] for a in ATTRIBUTES)

    def _count(self):
        self.stack.append(str(len(self._pop(list, "count"))))

    def _exist(self):
        self.stack.append("yes" if self._pop(list, "exist") else "no")

    def _negate(self):
        self.stack.append({"yes": "no", "no": "yes"}[self._pop(str, "negate")])

    def _belong_to(self):
        events, asked = self._pop(list, "belong_to"), self._pop((Event, int), "belong_to")
        if isinstance(asked, Event):  # of the same kind and pair, whenever it happens
            inside = any((e.kind, e.objects) == (asked.kind, asked.objects) for e in events)
        else:
            inside = any(asked in e.objects for e in events)
        self.stack.append("yes" if inside else "no")

    def _filter_attribute(self, name):
        value, objects = self._pop(str, f"filter_{name}"), self._pop(_Objects, f"filter_{name}")
        if value not in _VALUES[name]:
            raise ValueError(f"{value!r} is no {name}; expected one of {_VALUES[name]}.")
        chosen = _Objects(i for i in objects if self.truth.attributes[i][name] == value)
        chosen.words = (*objects.words, value)
        self.stack.append(chosen)

    def _filter_motion(self, moving):
        if not self.stack or not (self.stack[-1] is None or isinstance(self.stack[-1], int)):
            raise ValueError("the program is not well-formed: filter_moving and filter_stationary need a time.")
        frame = self.stack.pop()
        objects = self._pop(_Objects, "filter_moving")
        chosen = _Objects(i for i in objects if self.truth.moving(i, frame) is moving)
        chosen.words = (*objects.words, "moving" if moving else "stationary")
        self.stack.append(chosen)

    def _filter_moving(self):
        self._filter_motion(True)

    def _filter_stationary(self):
        self._filter_motion(False)

    def _filter_kind(self, kind):
        objects, events = self._pop((_Objects, int), f"filter_{kind}"), self._pop(list, f"filter_{kind}")
        wanted = set(objects) if isinstance(objects, list) else {objects}
        self.stack.append([e for e in events if e.kind == kind and wanted & set(e.objects)])

    def _filter_in(self):
        self._filter_kind("in")

    def _filter_out(self):
        self._filter_kind("out")

    def _filter_collision(self):
        self._filter_kind("collision")

    def _filter_before(self):
        event, events = self._pop(Event, "filter_before"), self._pop(list, "filter_before")
        self.stack.append([e for e in events if e.frame < event.frame])

    def _filter_after(self):
        event, events = self._pop(Event, "filter_after"), self._pop(list, "filter_after")
        self.stack.append([e for e in events if e.frame > event.frame])

    def _filter_order(self):
        order, events = self._pop(str, "filter_order"), self._pop(list, "filter_order")
        place = {"first": 0, "second": 1, "last": -1}[order]
        if len(events) <= max(place, 0):
            raise ValueError(f"{self.truth.name} has no {order} such event; there are {len(events)}.")
        self.stack.append(events[place])

    def _filter_ancestor(self):
        event = self._pop(Event, "filter_ancestor")
        self._pop(list, "filter_ancestor")
        self.stack.append(self.truth.ancestors(event))

    def _get_frame(self):
        self.stack.append(self._pop(Event, "get_frame").frame)

    def _get_object(self):
        self.stack.append(self._pop(Event, "get_object").objects[0])

    def _get_col_partner(self):
        object_id, event = self._pop(int, "get_col_partner"), self._pop(Event, "get_col_partner")
        if object_id not in event.objects:
            raise ValueError(f"object {object_id} takes no part in the collision of {event.objects}.")
        self.stack.append(next(i for i in event.objects if i != object_id))


def _attribute_place(word):
    return next((k for k, name in enumerate(ATTRIBUTES) if word in _VALUES[name]), -1)


def run_program(truth: VideoTruth, program: Sequence[str], choice: Sequence[str] = ()) -> str:
    """The answer of a program: a count, "yes" or "no", a color, material or shape.

    Args:
        choice: the option's program, which runs first.

    Raises:
        ValueError: the program is not well-formed, or does not fit the video: a description fits no object or several,
            an event did not happen, or what it asks for is not known.
    """
    executor = _Executor(truth)
    executor.run(choice)
    executor.run(program)
    if len(executor.stack) != 1 or not isinstance(executor.stack[0], str):
        raise ValueError(f"the program leaves {executor.stack} on the stack; expected one answer.")
    return executor.stack[0]


def answer_question(truth: VideoTruth, question: Mapping[str, Any]) -> str | list[str]:
    """The answer of a descriptive question, or "correct" / "wrong" of each option.

    Raises:
        ValueError: no program (CLEVRER's test questions have none), or one that does not fit the video.
    """
    if "program" not in question:
        raise ValueError(
            f"question {question.get('question_id')} has no program, so that it cannot be answered by one."
        )
    if question["question_type"] == "descriptive":
        return run_program(truth, question["program"])
    answers = [run_program(truth, question["program"], choice["program"]) for choice in question["choices"]]
    return ["correct" if answer == "yes" else "wrong" for answer in answers]


def copy_factual_answer(truth: VideoTruth, question: Mapping[str, Any]) -> list[str]:
    """Options of a counterfactual question, answered as if removing the object changed nothing (a control)."""
    actual = VideoTruth.__new__(VideoTruth)
    actual.__dict__.update(truth.__dict__, counterfactuals=dict.fromkeys(truth.ids, truth.collided))
    return answer_question(actual, question)


# Making questions. A phrase is (text, program).

# How often real questions name an object by color, material, shape (of 8,082 phrases in explanatory questions).
_EVENT_WEIGHTS = {
    (1, 0, 1): 38, (0, 0, 1): 23, (1, 0, 0): 21, (0, 1, 1): 13, (0, 1, 0): 2, (1, 1, 0): 2, (1, 1, 1): 1.5
}  # fmt: skip
_PRESENCE_WEIGHTS = {
    (1, 1, 1): 26, (1, 0, 1): 23, (1, 1, 0): 21, (1, 0, 0): 13, (0, 1, 1): 12, (0, 0, 1): 4, (0, 1, 0): 1
}  # fmt: skip
# Shares of the counts that real questions have for an answer; everything else is even.
_COUNT_WEIGHTS = {"0": 9862, "1": 11079, "2": 9292, "3": 6525, "4": 3173, "5": 69}
_SUBTYPE_WEIGHTS = {"query_color": 0.37, "query_material": 0.29, "query_shape": 0.34}
_CORRECT_COUNTS = (0.16, 0.20, 0.33, 0.26, 0.05)  # options that are responsible, of up to four
_CANDIDATES = 20  # drawn for each descriptive question
_MAX_WORDS = 20
_UNCLEAR_SPEED = (0.01, 0.04)  # whether this is moving cannot be seen
_NEXT = ("What will happen next?", "Which event will happen next?")
_HIDDEN_MARGIN = (VISIBLE_FRAMES + 3, VISIBLE_FRAMES + 42)  # a predicted collision is clearly after, and in time


def make_questions(
    truth: VideoTruth, generator: np.random.Generator, *, balanced: bool = True
) -> list[dict[str, Any]]:
    """The questions of one video, in CLEVRER's form, order and numbers.

    11 descriptive ones; up to 3 explanatory, 2 predictive and 3 counterfactual ones, as many as the video has.

    Args:
        truth: with predictions.
        generator: all their randomness.
        balanced: counterfactual options are drawn evenly from those whose outcome the removal changes and those it does
            not, so that knowing the video's own collisions does not help; otherwise evenly from right and wrong ones.

    Raises:
        ValueError: no predictions, or two objects look alike.
    """
    if truth.counterfactuals is None:
        raise ValueError(f"{truth.name}: questions need its predictions (hidden collisions and counterfactuals).")
    kinds = [tuple(truth.attributes[i].values()) for i in truth.ids]
    if len(set(kinds)) < len(kinds):
        raise ValueError(
            f"{truth.name} has two objects with the same color, material and shape: neither can be named."
        )
    maker = _Maker(truth, generator)
    questions = [
        *maker.descriptive(),
        *maker.explanatory(),
        *maker.predictive(),
        *maker.counterfactual(balanced),
    ]
    return [{"question_id": k, **question} for k, question in enumerate(questions)]


def make_counterfactual_questions(
    truth: VideoTruth, generator: np.random.Generator, *, balanced: bool = True
) -> list[dict[str, Any]]:
    """Only the counterfactual questions of `make_questions`."""
    questions = _Maker(truth, generator).counterfactual(balanced)
    return [{"question_id": k, **question} for k, question in enumerate(questions)]


def make_statements(
    truth: VideoTruth, generator: np.random.Generator, *, most: int = 12, start: int | None = None
) -> dict[str, Any] | None:
    """
    A question in CLEVRER's form that CLEVRER does not ask: which of up to `most` pairs of objects collide in the video. About
    half of them do, as far as there are such; objects that no words tell from another one are left out, and without a pair it
    is None. There is much to learn from it: options of predictive and counterfactual questions are such pairs, too.

    With `start` it is a predictive question as if the video ended before that frame: which of them collide next. Of the others,
    those that collided before come first, and without one that collides it is None.
    """
    if start is not None:
        truth = _as_if_ended(truth, start)
    maker, happen = _Maker(truth, generator), truth.collided if start is None else truth.unseen
    groups: dict[bool, list] = {True: [], False: []}
    pairs = [pair for pair in maker._pairs() if all(maker._can_be_named(i) for i in pair)]
    for k in generator.permutation(len(pairs)):
        groups[pairs[k] in happen].append(pairs[k])
    groups[False].sort(key=lambda pair: pair not in truth.collided)
    chosen = groups[True][: most // 2]
    if start is not None and not chosen:
        return None
    chosen += groups[False][: min(most - len(chosen), max(2, len(chosen) + 1))]
    if not chosen:
        return None
    options = [maker._pair_phrase(pair) for pair in chosen]
    if start is not None:
        return maker._question("predictive", maker._pick(_NEXT), ["unseen_events", "belong_to"], options)
    return maker._question("explanatory", "Which of the following happen?", ["events", "belong_to"], options)


def _as_if_ended(truth: VideoTruth, frame: int) -> VideoTruth:
    """
    Collisions before `frame` are those of the video, those from then on are what happens next, and what happens after them is
    not known. Nothing else is cut: objects that enter later are still there to be asked about.
    """
    part = copy.copy(truth)
    part.events = [event for event in truth.events if event.frame < frame]
    part.collided = {event.objects for event in part.events if event.kind == "collision"}
    part.unseen = {event.objects for event in truth.events if event.kind == "collision" and event.frame >= frame}
    part.unseen_frames, part.counterfactuals, part.unsure = {}, None, {}
    return part


class _Maker:
    def __init__(self, truth, generator):
        self.truth, self.random = truth, generator
        self._names: dict[tuple, tuple[list, list]] = {}

    def _pick(self, values, weights=None):
        if weights is None:
            return values[int(self.random.random() * len(values))]
        total = np.cumsum(weights)
        return values[int(np.searchsorted(total, self.random.random() * total[-1], side="right"))]

    # Phrases

    def _can_be_named(self, object_id):
        own = self.truth.attributes[object_id]
        return sum(own == self.truth.attributes[i] for i in self.truth.objects) == 1

    def _named(self, object_id, weights=_EVENT_WEIGHTS):
        """(text without "the", program) of a random description that fits this object only."""
        key = object_id, id(weights)
        if key not in self._names:
            own, phrases, chances = self.truth.attributes[object_id], [], []
            for form, weight in weights.items():
                part = {a: own[a] for a, used in zip(ATTRIBUTES, form) if used}
                if sum(part.items() <= self.truth.attributes[i].items() for i in self.truth.objects) == 1:
                    phrases.append((_noun(part), [*_object_program(part), "unique"]))
                    chances.append(weight)
            self._names[key] = phrases, chances
        return self._pick(*self._names[key])

    def _some(self, most, without=()):
        """Attributes of a set phrase: at most so many, those of an object of the video three times out of four."""
        count = self.random.integers(0, most + 1)
        names = [a for a in ATTRIBUTES if a not in without]
        names = [names[k] for k in sorted(self.random.choice(len(names), min(count, len(names)), replace=False))]
        if self.random.random() < 0.75:
            own = self.truth.attributes[self._pick(self.truth.objects)]
            return {a: own[a] for a in names}
        return {a: self._pick(_VALUES[a]) for a in names}

    def _enter_or_exit(self):
        """(text, program of the event, the event), or None if nothing enters or exits."""
        events = [e for e in self.truth.events if e.kind in ("in", "out")]
        if not events:
            return None
        event = self._pick(events)
        text, program = self._named(event.objects[0])
        verb = "enters" if event.kind == "in" else "exits"
        return f"the {text} {verb} the scene", ["events", *program, f"filter_{event.kind}", "unique"], event

    def _time(self):
        """(text, program, frame) of a time to ask about motion."""
        draw = self.random.random()
        if draw < 0.25:
            return "", ["null"], None
        if draw < 0.5:
            return " when the video begins", ["start", "get_frame"], 0
        if draw < 0.75:
            return " when the video ends", ["end", "get_frame"], len(self.truth.seen) - 1
        found = self._enter_or_exit()
        if found is None:
            return None
        text, program, event = found
        return f" when {text}", [*program, "get_frame"], event.frame

    def _clearly_moving(self, frame):
        """Whether it can be seen of every object in view if it moves, and nothing collides just then."""
        low, high = _UNCLEAR_SPEED
        if frame is None:
            speed = np.where(self.truth.seen, self.truth.speed, 0.0).max(axis=0)
        else:
            if any(e.kind == "collision" and abs(e.frame - frame) <= 1 for e in self.truth.events):
                return False
            speed = np.where(self.truth.seen[frame], self.truth.speed[frame], 0.0)
        return not ((speed > low) & (speed < high)).any()

    def _alone(self, event):
        return sum(e.frame == event.frame for e in self.truth.events) == 1

    # Descriptive: each returns (text, program) or None

    def _event_query(self):
        name = self._pick(ATTRIBUTES)
        order = self._pick(("", *_ORDERS))
        if self.random.random() < 0.75:
            target = self._pick(self.truth.objects)
            text, program = self._named(target)
            events = [e for e in self.truth.events if e.kind == "collision" and target in e.objects]
            what = f"object to collide with the {text}"
            body = ["events", *program, "filter_collision"]
            body += [order, "filter_order"] if order else ["unique"]
            body += [*self._named(target)[1], "get_col_partner"]
        else:
            order = order or "first"
            events, what = [e for e in self.truth.events if e.kind == "in"], "object that enters the scene"
            body = ["events", "objects", "filter_in", order, "filter_order", "get_object"]
        if len({e.frame for e in events}) < len(events):
            return None
        what = f"the {order} {what}" if order else f"the {what}"
        return self._pick((f"What {name} is {what}?", f"What is the {name} of {what}?")), [*body, f"query_{name}"]

    def _event_set(self, start, end):
        """Collisions, entries or exits, perhaps before or after another one."""
        program, when = ["events"], ""
        if self.random.random() < 0.6:
            found = self._enter_or_exit()
            if found is None or not self._alone(found[2]):
                return None
            side = self._pick(("before", "after"))
            program, when = ["events", *found[1], f"filter_{side}"], f" {side} {found[0]}"
        if start == "How many" and self.random.random() < 0.4:
            return f"How many collisions happen{when}?", [*program, "objects", "filter_collision", end]
        attributes, way = self._some(2), self._pick(("in", "out"))
        verb = "enter" if way == "in" else "exit"
        that = " that" if end == "exist" else ""
        text = f"{start} {_noun(attributes, plural=True)}{that} {verb} the scene{when}?"
        return text, [*program, *_object_program(attributes), f"filter_{way}", end]

    def _event_count(self):
        return self._event_set("How many", "count")

    def _event_exist(self):
        return self._event_set("Are there any", "exist")

    def _motion(self):
        time, way = self._time(), self._pick(("moving", "stationary"))
        return None if time is None or not self._clearly_moving(time[2]) else (*time[:2], way)

    def _motion_query(self):
        motion = self._motion()
        if motion is None:
            return None
        when, frame, way = motion
        name = self._pick(ATTRIBUTES)
        attributes = self._some(2, without=(name,))
        noun = _noun(attributes)
        what = self._pick((f"the {way} {noun}{when}", f"the {noun} that is {way}{when}"))
        text = self._pick((f"What {name} is {what}?", f"What is the {name} of {what}?"))
        return text, [*_object_program(attributes), *frame, f"filter_{way}", "unique", f"query_{name}"]

    def _motion_count(self):
        motion = self._motion()
        if motion is None:
            return None
        when, frame, way = motion
        attributes = self._some(1)
        noun = _noun(attributes, plural=True)
        text = self._pick((f"How many {noun} are {way}{when}?", f"How many {way} {noun} are there{when}?"))
        return text, [*_object_program(attributes), *frame, f"filter_{way}", "count"]

    def _motion_exist(self):
        motion = self._motion()
        if motion is None:
            return None
        when, frame, way = motion
        attributes = self._some(1)
        text = f"Are there any {way} {_noun(attributes, plural=True)}{when}?"
        return text, [*_object_program(attributes), *frame, f"filter_{way}", "exist"]

    def descriptive(self):
        plan: list[tuple[Callable, int]] = [
            (self._event_query, 3), (self._event_count, 2), (self._event_exist, 1),
            (self._motion_query, 2), (self._motion_count, 2), (self._motion_exist, 1),
        ]  # fmt: skip
        questions, texts = [], set()
        for draw, count in plan:
            candidates: dict[str, dict[str, list]] = {}  # by what is asked, and its answer
            for _ in range(_CANDIDATES * count):
                drawn = draw()
                if drawn is None or len(drawn[0].split()) > _MAX_WORDS:
                    continue
                try:
                    answer = run_program(self.truth, drawn[1])
                except ValueError:  # it does not fit this video
                    continue
                if answer in _COUNT_WEIGHTS or not answer.isdigit():
                    candidates.setdefault(drawn[1][-1], {}).setdefault(answer, []).append(drawn)
            for _ in range(count):
                # the answer first: what is asked must not tell it
                kinds = sorted(candidates)
                if not kinds:
                    break
                kind = self._pick(kinds, [_SUBTYPE_WEIGHTS.get(k, 1) for k in kinds])
                answers = sorted(candidates[kind])
                answer = self._pick(answers, [_COUNT_WEIGHTS.get(a, 1) for a in answers])
                text, program = self._pick(candidates[kind][answer])
                texts.add(text)
                questions.append({
                    "question": text, "question_type": "descriptive", "question_subtype": kind,
                    "program": program, "answer": answer,
                })  # fmt: skip
                for name, found in list(candidates.items()):  # no question twice
                    found = {a: [c for c in cs if c[0] not in texts] for a, cs in found.items()}
                    candidates[name] = {a: cs for a, cs in found.items() if cs}
                    if not candidates[name]:
                        del candidates[name]
        return questions

    # Multiple choice

    def _event_phrase(self, event, possible=False):
        """(text, program) of an event as an option of an explanatory question, or as its target."""
        if event.kind == "collision":
            pair = [event.objects[k] for k in self.random.permutation(2)]
            (a, first), (b, second) = self._named(pair[0]), self._named(pair[1])
            program = ["events", *first, "filter_collision", *second, "filter_collision", "unique"]
            return self._pick(
                (f"the collision between the {a} and the {b}", f"the {a}'s colliding with the {b}")
            ), program
        text, program = self._named(event.objects[0])
        forms = ("entrance", "entering the scene") if event.kind == "in" else ("exit", "exiting the scene")
        return f"the {text}'s {self._pick(forms)}", ["events", *program, f"filter_{event.kind}", "unique"]

    def _pair_phrase(self, pair):
        pair = [pair[k] for k in self.random.permutation(2)]
        (a, first), (b, second) = self._named(pair[0]), self._named(pair[1])
        text = self._pick((f"The {a} collides with the {b}", f"The {a} and the {b} collide"))
        return text, ["all_events", *first, "filter_collision", *second, "filter_collision", "unique"]

    def _question(self, kind, text, program, options):
        choices = []
        for k in self.random.permutation(len(options)):
            words, choice_program = options[k]
            answer = "correct" if run_program(self.truth, program, choice_program) == "yes" else "wrong"
            choices.append({
                "choice_id": len(choices), "choice": words[0].upper() + words[1:],
                "program": choice_program, "answer": answer,
            })  # fmt: skip
        return {"question": text, "question_type": kind, "program": program, "choices": choices}

    def explanatory(self):
        events, questions = self.truth.events, []
        for object_id in self.truth.objects:  # two events at once have no order
            frames = [e.frame for e in events if object_id in e.objects]
            if len(set(frames)) < len(frames):
                return []
        names = [(e.kind, e.objects) for e in events]
        targets = [e for e in events if e.kind in ("collision", "out") and names.count((e.kind, e.objects)) == 1]
        targets = [targets[k] for k in self.random.permutation(len(targets))]
        # few videos ask about exits
        targets.sort(key=lambda e: e.kind == "out" and self.random.random() < 0.7)
        wanted = self._pick((1, 2, 3), (0.2, 0.5, 0.3))
        for target in targets:
            ancestors = self.truth.ancestors(target)
            taking_part = {i for e in ancestors for i in e.objects}
            options = [(i in taking_part, i) for i in self.truth.objects if i not in target.objects]
            for event in events:
                if event.kind != "out" and event != target and names.count((event.kind, event.objects)) == 1:
                    if event.kind == "in" and event.objects[0] in target.objects:
                        continue
                    options.append((event in ancestors, event))
            yes, no = ([o for truth, o in options if truth is side] for side in (True, False))
            if not (yes and no) and self.random.random() < 0.6:  # little to choose from
                continue
            size = min(4, len(options))
            number = int(self.random.choice(5, p=_CORRECT_COUNTS))
            number = min(max(number, size - len(no)), len(yes), size)
            if size < 2:
                continue
            chosen = [yes[k] for k in self.random.choice(len(yes), number, replace=False)] if number else []
            if size - number:
                chosen += [no[k] for k in self.random.choice(len(no), size - number, replace=False)]
            phrases = []
            for option in chosen:
                if isinstance(option, Event):
                    phrases.append(self._event_phrase(option))
                else:
                    text, program = self._named(option, _PRESENCE_WEIGHTS)
                    phrases.append((f"the presence of the {text}", program))
            negate = self.random.random() < 0.5
            text, program = self._event_phrase(target)
            program = ["events", *program, "filter_ancestor", "belong_to", *(["negate"] if negate else [])]
            text = f"Which of the following is {'not ' if negate else ''}responsible for {text}?"
            if len(text.split()) > _MAX_WORDS:
                continue
            questions.append(self._question("explanatory", text, program, phrases))
            if len(questions) == wanted:
                break
        return questions

    def _pairs(self, without=None):
        ids = sorted(i for i in self.truth.objects if i != without)
        return [(a, b) for k, a in enumerate(ids) for b in ids[k + 1 :]]

    def predictive(self):
        low, high = _HIDDEN_MARGIN
        right = [
            p
            for p, frame in sorted(self.truth.unseen_frames.items())
            if low <= frame <= high and set(p) <= set(self.truth.objects)
        ]
        wrong = [p for p in self._pairs() if p not in self.truth.unseen]
        questions = []
        for k in self.random.permutation(len(right))[:2]:
            if not wrong:
                break
            before = [p for p in wrong if p in self.truth.collided]
            never = [p for p in wrong if p not in self.truth.collided]
            pool = before if before and (not never or self.random.random() < 0.4) else never
            text = self._pick(_NEXT)
            options = [self._pair_phrase(right[k]), self._pair_phrase(self._pick(pool))]
            questions.append(self._question("predictive", text, ["unseen_events", "belong_to"], options))
        return questions

    def counterfactual(self, balanced):
        questions, wanted = [], self._pick((2, 3))
        for k in self.random.permutation(len(self.truth.objects)):
            gone = self.truth.objects[k]
            options = [p for p in self._pairs(gone) if p not in self.truth.unsure.get(gone, ())]
            outcome = {p: (p in self.truth.collided, p in self.truth.counterfactuals[gone]) for p in options}
            chosen = self._even_options(outcome, balanced)
            if chosen is None:
                continue
            text, description = self._named(gone, _PRESENCE_WEIGHTS)
            negate = self.random.random() < 0.5
            what = (
                self._pick(("what", "which event", "which of the following")) + " will " + "not " * negate + "happen"
            )
            forms = (f"{what} if the {text} is removed?", f"{what} without the {text}?",
                     f"if the {text} is removed, {what}?", f"without the {text}, {what}?")  # fmt: skip
            words = self._pick(forms)
            program = ["all_events", *description, "get_counterfact", "belong_to", *(["negate"] if negate else [])]
            phrases = [self._pair_phrase(p) for p in chosen]
            questions.append(self._question("counterfactual", words[0].upper() + words[1:], program, phrases))
            if len(questions) == wanted:
                break
        return questions

    def _even_options(self, outcome, balanced):
        """2 to 4 pairs, at least one that will and one that will not collide; None if there are none such."""
        pairs = [list(outcome)[k] for k in self.random.permutation(len(outcome))]
        groups: dict[bool, list] = {True: [], False: []}
        for pair in pairs:
            actual, without = outcome[pair]
            groups[actual != without if balanced else without].append(pair)
        first, second = groups[True], groups[False]
        if not first or not second:
            return None
        if balanced:
            # Of the unchanged ones, both outcomes in turn; most pairs never meet.
            met, never = ([p for p in second if outcome[p][1] is side] for side in (True, False))
            changed = first[:2]
            truths = {outcome[p][1] for p in changed}
            lead, other = (
                (met, never)
                if truths == {False} or (len(truths) == 2 and self.random.random() < 0.5)
                else (never, met)
            )
            mixed = [p for two in zip(lead, other) for p in two]
            mixed += lead[len(other) :] + other[len(lead) :]
            extra = len(changed) + (len(changed) == 1 and self.random.random() < 0.3)
            chosen = changed + mixed[:extra]
        else:
            chosen = first[:2] + second[: max(2, 4 - len(first))] if len(first) < 2 else first[:2] + second[:2]
        return chosen if len({outcome[p][1] for p in chosen}) == 2 else None


def _noun(attributes, plural=False):
    words = [attributes[a] for a in ("color", "material") if a in attributes]
    return " ".join([*words, attributes.get("shape", "object") + "s" * plural])


def _object_program(attributes):
    program = ["objects"]
    for name in ATTRIBUTES:
        if name in attributes:
            program += [attributes[name], f"filter_{name}"]
    return program
