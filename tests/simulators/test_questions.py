import numpy as np
import pytest

from cjepa_hf.data.clevrer import scene_annotation, scene_predictions
from cjepa_hf.models.aloe.processing_aloe import CLEVRER_ANSWERS, CLEVRER_WORDS
from cjepa_hf.simulators.collisions import sample_scene
from cjepa_hf.simulators.questions import (
    Event,
    VideoTruth,
    answer_question,
    copy_factual_answer,
    make_counterfactual_questions,
    make_questions,
    make_statements,
    run_program,
)

RED, BLUE, GREEN, GRAY = range(4)
KINDS = [
    ("red", "metal", "cube"),
    ("blue", "rubber", "sphere"),
    ("green", "metal", "sphere"),
    ("gray", "rubber", "cube"),
]


def kind(object_id):
    return dict(zip(("color", "material", "shape"), KINDS[object_id]))


def written_by_hand():
    """Red glides into blue (20), blue into green (50), blue leaves (90); green enters at 30, gray at 60 and stops at 100."""
    frames = []
    for t in range(128):
        seen = [True, t < 90, t >= 30, t >= 60]
        speed = [0.5 if t <= 20 else 0.0, 0.5 if t > 20 else 0.0, 0.5 if t < 50 else 0.3, 0.4 if t < 100 else 0.015]
        rows = [
            {"object_id": i, "location": [0, 0, 0.2], "velocity": [v, 0, 9.0], "inside_camera_view": s}
            for i, (v, s) in enumerate(zip(speed, seen))
        ]
        frames.append({"frame_id": t, "objects": rows})
    collisions = [((1, 0), 20), ((1, 2), 50)]
    return {
        "scene_index": 3,
        "video_filename": "video_00003.mp4",
        "object_property": [{"object_id": i, **kind(i)} for i in range(4)],
        "motion_trajectory": frames,
        "collision": [{"object_ids": list(pair), "frame_id": t, "location": [0, 0, 0]} for pair, t in collisions],
    }


def predictions_by_hand():
    def prediction(what_if, *collisions):
        collisions = [{"frame": t, "objects": [kind(a), kind(b)]} for a, b, t in collisions]
        return {"what_if": what_if, "trajectory": [], "collisions": collisions}

    return {
        "predictions": [
            prediction(-1, (RED, BLUE, 20), (BLUE, GREEN, 50), (GREEN, GRAY, 140)),
            prediction(RED, (GREEN, GRAY, 80)),
            prediction(BLUE, (RED, GREEN, 60), (RED, GRAY, 150)),
            prediction(GREEN, (RED, BLUE, 20)),
            prediction(GRAY, (RED, BLUE, 20), (BLUE, GREEN, 50)),
        ]
    }


@pytest.fixture(scope="module")
def truth():
    return VideoTruth(written_by_hand(), predictions_by_hand())


@pytest.fixture(scope="module")
def generated():
    """(truth, questions, plain counterfactual questions) of five videos."""
    videos = []
    for seed in range(5):
        scene = sample_scene(np.random.default_rng(seed))
        truth = VideoTruth(scene_annotation(scene, seed), scene_predictions(scene, seed))
        plain = make_counterfactual_questions(truth, np.random.default_rng(seed), balanced=False)
        videos.append((truth, make_questions(truth, np.random.default_rng(seed)), plain))
    return videos


def obj(*values):
    names = {
        "red": "color",
        "blue": "color",
        "green": "color",
        "gray": "color",
        "metal": "material",
        "rubber": "material",
    }
    return ["objects", *(w for v in values for w in (v, f"filter_{names.get(v, 'shape')}"))]


RED_CUBE, BLUE_ONE, GREEN_ONE, GRAY_ONE = ([*obj(c), "unique"] for c in ("red", "blue", "green", "gray"))
METAL_BALL = [*obj("metal", "sphere"), "unique"]


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        (["events", *BLUE_ONE, "filter_collision", "first", "filter_order", *BLUE_ONE, "get_col_partner", "query_color"], "red"),
        (["events", *BLUE_ONE, "filter_collision", "last", "filter_order", *BLUE_ONE, "get_col_partner", "query_shape"], "sphere"),
        (["events", *RED_CUBE, "filter_collision", "unique", *RED_CUBE, "get_col_partner", "query_material"], "rubber"),
        (["events", "objects", "filter_in", "second", "filter_order", "get_object", "query_color"], "gray"),
        (["events", "objects", "filter_collision", "count"], "2"),
        (["events", "events", *GREEN_ONE, "filter_in", "unique", "filter_after", "objects", "filter_collision", "count"], "1"),
        (["events", "events", *GREEN_ONE, "filter_in", "unique", "filter_before", "objects", "filter_collision", "count"], "1"),
        (["events", *obj("cube"), "filter_in", "count"], "1"),
        (["events", *obj("cube"), "filter_out", "exist"], "no"),
        (["events", *obj("sphere"), "filter_out", "exist"], "yes"),
        (["objects", "null", "filter_moving", "count"], "4"),
        (["objects", "start", "get_frame", "filter_moving", "count"], "1"),
        (["objects", "start", "get_frame", "filter_stationary", "unique", "query_color"], "blue"),
        (["objects", "end", "get_frame", "filter_moving", "unique", "query_color"], "green"),
        (["objects", "end", "get_frame", "filter_stationary", "count"], "2"),
        ([*obj("metal"), "events", *GRAY_ONE, "filter_in", "unique", "get_frame", "filter_moving", "count"], "1"),
    ],
)  # fmt: skip
def test_programs_of_a_video_written_by_hand(truth, program, answer):
    assert run_program(truth, program) == answer


def test_entries_and_exits_are_dated_by_the_frame_after_the_change(truth):
    entries = [e for e in truth.events if e.kind != "collision"]
    assert entries == [Event("in", (GREEN,), 30), Event("in", (GRAY,), 60), Event("out", (BLUE,), 90)]


def test_what_is_responsible_goes_back_in_time_through_all_objects(truth):
    exit_of_blue = next(e for e in truth.events if e.kind == "out")
    assert [(e.kind, e.objects) for e in truth.ancestors(exit_of_blue)] == [
        ("collision", (RED, BLUE)), ("in", (GREEN,)), ("collision", (BLUE, GREEN))
    ]  # fmt: skip
    question = ["events", *("events", *BLUE_ONE, "filter_out", "unique"), "filter_ancestor", "belong_to"]
    crash = ["events", *RED_CUBE, "filter_collision", *BLUE_ONE, "filter_collision", "unique"]
    entrance = ["events", *GRAY_ONE, "filter_in", "unique"]
    answers = [run_program(truth, question, choice) for choice in (crash, entrance, RED_CUBE, GRAY_ONE, METAL_BALL)]
    assert answers == ["yes", "no", "yes", "no", "yes"]
    assert run_program(truth, [*question, "negate"], crash) == "no"


def possible(first, second):
    return ["all_events", *first, "filter_collision", *second, "filter_collision", "unique"]


def test_predictions_ask_which_pairs_collide_after_the_video(truth):
    pairs = [possible(GREEN_ONE, GRAY_ONE), possible(RED_CUBE, BLUE_ONE)]
    assert [run_program(truth, ["unseen_events", "belong_to"], p) for p in pairs] == ["yes", "no"]


def test_counterfactuals_ask_which_pairs_collide_without_the_object_until_frame_127(truth):
    def ask(gone, *pair):
        return run_program(truth, ["all_events", *gone, "get_counterfact", "belong_to"], possible(*pair))

    assert ask(RED_CUBE, GREEN_ONE, GRAY_ONE) == "yes" and ask(RED_CUBE, BLUE_ONE, GREEN_ONE) == "no"
    assert ask(BLUE_ONE, RED_CUBE, GREEN_ONE) == "yes" and ask(BLUE_ONE, RED_CUBE, GRAY_ONE) == "no"


def test_copying_the_video_ignores_the_removal(truth):
    program = ["all_events", *RED_CUBE, "get_counterfact", "belong_to"]
    pairs = [(BLUE_ONE, GREEN_ONE), (GREEN_ONE, GRAY_ONE), (BLUE_ONE, GRAY_ONE)]
    question = {
        "question_type": "counterfactual",
        "program": program,
        "choices": [{"program": possible(*p)} for p in pairs],
    }
    assert answer_question(truth, question) == ["wrong", "correct", "wrong"]
    assert copy_factual_answer(truth, question) == ["correct", "wrong", "wrong"]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ([*obj("yellow"), "unique", "query_color"], "'yellow' is no shape"),
        (["objects", "yellow", "filter_color", "unique", "query_shape"], 'no objects that are "yellow".*red metal cube'),
        (["objects", "sphere", "filter_shape", "unique", "query_color"], '2 objects that are "sphere"'),
        (["events", *GRAY_ONE, "filter_collision", "unique", *GRAY_ONE, "get_col_partner", "query_color"], "found none"),
        (["events", *GREEN_ONE, "filter_collision", "second", "filter_order", *GREEN_ONE, "get_col_partner", "query_color"], "no second"),
        (["count"], "not well-formed"),
        (["objects", "filter_moving", "count"], "need a time"),
        (["objects", "big", "filter_size"], "unknown token 'big'"),
        (["objects"], "expected one answer"),
    ],
)  # fmt: skip
def test_programs_that_do_not_fit_the_video_are_refused_with_the_reason(truth, program, message):
    with pytest.raises(ValueError, match=message):
        run_program(truth, program)


def test_without_predictions_the_future_and_counterfactuals_are_refused():
    truth = VideoTruth(written_by_hand())
    with pytest.raises(ValueError, match="give its predictions"):
        run_program(truth, ["unseen_events", "belong_to"], possible(RED_CUBE, BLUE_ONE))
    with pytest.raises(ValueError, match="give its predictions"):
        run_program(truth, ["all_events", *RED_CUBE, "get_counterfact", "belong_to"], possible(BLUE_ONE, GREEN_ONE))
    with pytest.raises(ValueError, match="need its predictions"):
        make_questions(truth, np.random.default_rng(0))
    with pytest.raises(ValueError, match="has no program"):
        answer_question(truth, {"question_id": 1, "question_type": "descriptive", "question": "What?"})


def test_damaged_and_foreign_files_are_refused():
    annotation, predictions = written_by_hand(), predictions_by_hand()
    del annotation["collision"]
    with pytest.raises(ValueError, match="not an annotation"):
        VideoTruth(annotation)
    predictions["predictions"][1]["collisions"][0]["objects"][0]["color"] = "purple"
    with pytest.raises(ValueError, match="do not belong to video_00003"):
        VideoTruth(written_by_hand(), predictions)


def test_a_video_with_two_objects_that_look_alike_is_refused():
    annotation, predictions = written_by_hand(), {"predictions": [predictions_by_hand()["predictions"][0]]}
    predictions["predictions"][0]["collisions"] = []
    annotation["object_property"][BLUE].update(kind(RED))
    with pytest.raises(ValueError, match="two objects with the same color, material and shape"):
        make_questions(VideoTruth(annotation, predictions), np.random.default_rng(0))


def test_the_executor_agrees_with_every_stored_answer(generated):
    number = 0
    for truth, questions, plain in generated:
        for question in [*questions, *plain]:
            stored = question["answer"] if "answer" in question else [c["answer"] for c in question["choices"]]
            assert answer_question(truth, question) == stored, question
            number += 1
    assert number > 60


def test_generated_words_and_answers_are_those_of_clevrer(generated):
    for _, questions, plain in generated:
        for question in [*questions, *plain]:
            words = question["question"].lower().replace("?", "").split(" ")
            assert set(words) <= set(CLEVRER_WORDS) and len(words) <= 20, question["question"]
            assert question.get("answer", "yes") in CLEVRER_ANSWERS
            for choice in question.get("choices", ()):
                words = choice["choice"].lower().split(" ")
                assert set(words) <= set(CLEVRER_WORDS) and len(words) <= 12, choice["choice"]


def test_a_video_has_the_questions_of_clevrer_in_its_order(generated):
    types = ["descriptive", "explanatory", "predictive", "counterfactual"]
    for _, questions, _ in generated:
        assert [q["question_id"] for q in questions] == list(range(len(questions)))
        places = [types.index(q["question_type"]) for q in questions]
        assert places == sorted(places) and places.count(0) == 11
        subtypes = [q["question_subtype"] for q in questions if q["question_type"] == "descriptive"]
        assert subtypes.count("count") == 4 and subtypes.count("exist") == 2
        assert len({q["question"] for q in questions[:11]}) == 11
        for q in questions:
            answers = [c["answer"] for c in q.get("choices", ())]
            if q["question_type"] == "predictive":
                assert sorted(answers) == ["correct", "wrong"]
            elif q["question_type"] != "descriptive":
                assert 2 <= len(answers) <= 4 and [c["choice_id"] for c in q["choices"]] == list(range(len(answers)))


def test_balanced_options_defeat_copying_and_plain_ones_do_not(generated):
    def copied(pairs):
        right = [
            given == choice["answer"]
            for truth, questions in pairs
            for q in questions
            if q["question_type"] == "counterfactual"
            for given, choice in zip(copy_factual_answer(truth, q), q["choices"])
        ]
        return np.mean(right)

    assert 0.4 <= copied([(t, q) for t, q, _ in generated]) <= 0.65 < 0.75 < copied([(t, p) for t, _, p in generated])
    for truth, questions, _ in generated:
        for q in questions:
            if q["question_type"] == "counterfactual":
                stored = [c["answer"] for c in q["choices"]]
                assert len(set(stored)) == 2 and copy_factual_answer(truth, q) != stored


def test_statements_are_pairs_of_which_half_collide_and_the_executor_agrees(truth):
    question = make_statements(truth, np.random.default_rng(0))
    assert question["question_type"] == "explanatory"
    assert [choice["answer"] for choice in question["choices"]].count("correct") == 2  # of 6 pairs
    assert len(question["choices"]) == 5
    assert answer_question(truth, question) == [choice["answer"] for choice in question["choices"]]
    words = set(f"{question['question']} {' '.join(c['choice'] for c in question['choices'])}".lower().split())
    assert {word.strip("?") for word in words} <= set(CLEVRER_WORDS)
    assert question == make_statements(truth, np.random.default_rng(0))
    assert len(make_statements(truth, np.random.default_rng(0), most=2)["choices"]) == 2


def test_statements_about_what_happens_next_take_the_video_as_if_it_had_ended(truth):
    question = make_statements(truth, np.random.default_rng(0), start=40)
    assert question["question_type"] == "predictive" and "next" in question["question"]
    first, second, third = question["choices"]
    assert first["choice"] == "The metal sphere and the rubber sphere collide" and first["answer"] == "correct"
    assert second["choice"] == "The red object and the rubber sphere collide" and second["answer"] == "wrong"  # before
    assert third["answer"] == "wrong"
    assert (
        make_statements(truth, np.random.default_rng(0), start=50) is not None
    )  # the first frame that is asked about
    assert make_statements(truth, np.random.default_rng(0), start=51) is None  # nothing collides any more
    assert truth.collided == {(RED, BLUE), (BLUE, GREEN)} and truth.unseen == {(GREEN, GRAY)}  # as they were


def test_a_pair_that_collides_again_collides_next():
    annotation = written_by_hand()
    annotation["collision"].append({"object_ids": [RED, BLUE], "frame_id": 60})
    question = make_statements(VideoTruth(annotation), np.random.default_rng(0), start=55)
    assert [choice["answer"] for choice in question["choices"]] == ["correct", "wrong", "wrong"]
    assert question["choices"][0]["choice"] == "The rubber sphere and the metal cube collide"


def test_questions_depend_on_the_generator_alone(generated):
    truth, questions, _ = generated[0]
    assert make_questions(truth, np.random.default_rng(0)) == questions
    assert make_questions(truth, np.random.default_rng(1)) != questions
