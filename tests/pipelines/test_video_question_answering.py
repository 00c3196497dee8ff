import numpy as np
import pytest
import torch
from transformers import pipeline

from cjepa_hf import (
    AloeConfig,
    AloeForVideoQuestionAnswering,
    AloeProcessor,
    CJepaConfig,
    CJepaModel,
    bundled_checkpoint,
)
from cjepa_hf.data.clevrer import scene_annotation, scene_predictions
from cjepa_hf.imagination import Empty, extend_video, imagine
from cjepa_hf.models.aloe import QUESTION_TYPES
from cjepa_hf.question_videos import described_objects, question_type_of, removed_object
from cjepa_hf.simulators.collisions import sample_scene
from cjepa_hf.simulators.questions import VideoTruth, make_questions
from cjepa_hf.simulators.rendering import COLORS, MATERIALS, SHAPES, render_collisions
from cjepa_hf.slot_probe import SlotProbe

N, D, T, SEEN = 4, 16, 20, 5  # 5 of 20 observed frames are seen, 4 apart
OPTIONS = ["The red cube collides with the blue sphere", "The blue sphere and the blue cube collide"]
WITHOUT = {"question": "Which event will happen if the red cube is removed?", "options": OPTIONS}
ATTRIBUTES = {"color": ("red", "blue"), "material": ("metal", "rubber"), "shape": ("cube", "sphere")}


def draw():
    """Slots of a video: red cube, blue sphere, blue cube from frame 14 on, nothing; and the probe that knows them."""
    slots = 0.05 * torch.randn(T, N, D, generator=torch.Generator().manual_seed(1)) + 2 * torch.eye(N, D)
    slots[:, :3, 4:6] = torch.tensor([[0.0, 0], [10.0, 0], [20.0, 0]])
    slots[:, 1, 4] -= torch.linspace(0, 9, T)  # the sphere comes to the red cube
    slots[:14, 2] = slots[:, 3] = 0
    present = (slots != 0).any(-1)
    labels = {name: torch.tensor(values).expand(T, -1).flatten() for name, values in
              {"color": [0, 1, 1, 0], "material": [0, 0, 1, 0], "shape": [0, 1, 0, 0]}.items()}  # fmt: skip
    probe = SlotProbe.fit(
        slots.flatten(0, 1), present=present.flatten(), positions=slots.flatten(0, 1)[:, 4:6], labels=labels,
        attributes=ATTRIBUTES, ridge=1e-6,
    )  # fmt: skip
    return slots, probe


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    aloe = AloeForVideoQuestionAnswering(
        AloeConfig(
            num_slots=N,
            slot_size=D,
            num_frames=SEEN,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    ).eval()
    with torch.no_grad():
        aloe.position_embedding.normal_()
        for parameter in aloe.option_head.parameters():
            parameter.mul_(3)
    world = CJepaModel(
        CJepaConfig(
            num_slots=N,
            slot_size=D,
            num_attention_heads=2,
            num_hidden_layers=1,
            intermediate_size=32,
            history_length=3,
            prediction_length=2,
            frame_skip=2,
        )
    ).eval()
    processor = AloeProcessor(num_frames=SEEN, observed_frames=T, min_imagined_frames=4)
    return {"model": aloe, "processor": processor, "world_model": world, "probe": draw()[1]}


@pytest.fixture(scope="module")
def ask(parts):
    return pipeline("video-question-answering", **parts, device="cpu", num_future_frames=8)


def expected_scores(parts, video, question, kind):
    inputs = parts["processor"](video, question["question"], options=question["options"], question_types=kind)
    with torch.no_grad():
        return parts["model"](**inputs).option_logits.sigmoid().tolist()


def test_descriptive_questions_are_answered_from_what_was_seen(ask, parts):
    slots, _ = draw()
    result = ask({"slots": slots, "question": "How many collisions happen?"})
    assert result["question_type"] == "descriptive" and result["options"] is None and result["removed"] is None
    inputs = parts["processor"](slots, "How many collisions happen?")
    with torch.no_grad():
        scores = parts["model"](**inputs).answer_logits[0, 1:].softmax(-1)
    np.testing.assert_allclose(list(result["scores"].values()), scores, atol=1e-5)
    assert result["answer"] == list(result["scores"])[int(scores.argmax())]
    assert result["frames"] == parts["processor"].frame_indices(T).tolist() and result["imagined_frames"] == []


def test_predictive_questions_see_imagined_frames(ask, parts):
    slots, _ = draw()
    question = {"question": "What will happen next?", "options": OPTIONS}
    longer = extend_video(parts["world_model"], slots[None], num_frames=8)[0]
    result = ask({"slots": slots, **question})
    scores = expected_scores(parts, longer, question, "predictive")
    np.testing.assert_allclose(result["scores"], scores, atol=1e-5)
    assert result["imagined_frames"] == [f for f in result["frames"] if f >= T] != []
    assert [one["answer"] for one in result["options"]] == ["correct" if s > 0.5 else "wrong" for s in scores]
    assert result["answer"] == [text for text, s in zip(OPTIONS, scores) if s > 0.5]
    # frames that were imagined before are taken as they are; nothing is imagined if so asked
    np.testing.assert_allclose(ask({"slots": longer, **question})["scores"], scores, atol=1e-5)
    seen = ask({"slots": longer, **question}, frames_from="observed")
    assert seen["imagined_frames"] == []
    np.testing.assert_allclose(seen["scores"], expected_scores(parts, slots, question, "predictive"), atol=1e-5)


def test_counterfactual_questions_see_a_video_without_the_object(ask, parts):
    slots, probe = draw()
    result = ask({"slots": slots, **WITHOUT})
    assert result["removed"] == {"slot": 0, "object": "red metal cube", "branch": 6}
    imagined = imagine(
        parts["world_model"], slots[None], [Empty(0)], num_frames=14, start=6, frame_skip=2,
        empty_slot=probe.empty_slot, entries=True,
    ).slots[0, 0]  # fmt: skip
    video = torch.cat([slots[:6], imagined])
    video[:, 0] = probe.empty_slot
    torch.testing.assert_close(video[14, 2], slots[14, 2])  # what enters later is shown
    np.testing.assert_allclose(result["scores"], expected_scores(parts, video, WITHOUT, "counterfactual"), atol=1e-5)
    assert result["imagined_frames"] == [f for f in result["frames"] if f >= 6]


def test_the_branch_can_be_the_first_contact_or_a_frame(ask, parts):
    slots, probe = draw()
    result = ask({"slots": slots, **WITHOUT}, contact_distance=3.0)
    distance = (probe.positions(slots[:, 0]) - probe.positions(slots[:, 1])).norm(dim=-1)
    assert result["removed"]["branch"] == int((distance < 3).byte().argmax()) > 6
    untouched = ask({"slots": slots, **WITHOUT}, contact_distance=1e-3)
    assert untouched["removed"]["branch"] == T and untouched["imagined_frames"] == []
    video = slots.clone()
    video[:, 0] = probe.empty_slot
    scores = expected_scores(parts, video, WITHOUT, "counterfactual")
    np.testing.assert_allclose(untouched["scores"], scores, atol=1e-5)
    assert ask({"slots": slots, **WITHOUT}, branch=9)["removed"]["branch"] == 9


def test_the_released_behaviour_leaves_counterfactual_videos_as_they_were(ask, parts):
    slots, _ = draw()
    result = ask({"slots": slots, **WITHOUT}, frames_from="released")
    assert result["removed"] is None and result["imagined_frames"] == []
    np.testing.assert_allclose(result["scores"], expected_scores(parts, slots, WITHOUT, "counterfactual"), atol=1e-5)
    after = ask({"slots": slots, "question": "What will happen next?", "options": OPTIONS}, frames_from="released")
    assert after["imagined_frames"]


def test_all_questions_of_a_video_together_give_the_same_answers(ask):
    slots, _ = draw()
    questions = [
        WITHOUT,
        {"question": "Are there any metal objects?"},
        {"question": "What will happen next?", "options": OPTIONS[:1]},
        {"question": "What will happen without the blue sphere?", "options": OPTIONS},
        {"question": "Which of the following is responsible for the collision?", "options": OPTIONS},
    ]
    together = ask({"slots": slots, "questions": questions})
    assert [one["question_type"] for one in together] == [
        "counterfactual", "descriptive", "predictive", "counterfactual", "explanatory",
    ]  # fmt: skip
    for question, result in zip(questions, together, strict=True):
        alone = ask({"slots": slots, **question})
        values = [
            list(r["scores"].values()) if question.get("options") is None else r["scores"] for r in (alone, result)
        ]
        np.testing.assert_allclose(*values, atol=1e-5)
        assert alone["removed"] == result["removed"] and alone["frames"] == result["frames"]


def test_options_about_objects_that_are_not_there_are_noted(ask):
    slots, _ = draw()
    options = ["The red sphere collides with the blue sphere", "The blue object collides with the red cube"]
    notes = ask({"slots": slots, **WITHOUT, "options": options})["notes"]
    assert len(notes) == 2 and 'no object of the video fit "red sphere"' in notes[0]
    assert '2 objects of the video fit "blue object"' in notes[1]
    assert ask({"slots": slots, **WITHOUT})["notes"] == []


@pytest.mark.parametrize(
    "change, options, match",
    [
        ({"question": "What will happen if the red sphere is removed?"}, {}, "no object of the video fit"),
        ({"question": "What will happen without the blue object?"}, {}, '2 objects of the video fit "blue object"'),
        ({"question": "What will happen without it?"}, {}, "does not say which object"),
        ({"removed_slot": 4}, {}, "removed_slot=4 must be"),
        ({"removed_slot": 3}, {}, "is empty in all frames"),
        ({"options": None}, dict(), "unknown word 'x'"),
        ({"slots": torch.zeros(T - 1, N, D)}, {}, "a video of 19 frames"),
        ({}, dict(branch=1), "branch=1 must be"),
        ({}, dict(branch="contact"), "needs contact_distance"),
        ({}, dict(frames_from="dreams"), "must be one of"),
        ({}, dict(horizon=3), "unknown option"),
        ({"question_type": "descriptive"}, {}, "have no options"),
        ({"question": "What happens?"}, {}, "cannot be told"),
        ({"options": None, "keep": True}, {}, "give its options"),
        ({"video": "x.mp4"}, {}, "expected a dictionary"),
    ],
)
def test_bad_input_is_refused(ask, change, options, match):
    slots, _ = draw()
    inputs = {"slots": slots, **WITHOUT, **change}
    if inputs.pop("keep", False):
        inputs["options"] = None
    elif inputs["options"] is None:
        inputs = {"slots": slots, "question": "How many x collide?"}
    with pytest.raises(ValueError, match=match):
        ask(inputs, **options)


def test_missing_parts_are_named(parts):
    slots, probe = draw()
    bare = pipeline("video-question-answering", model=parts["model"], processor=parts["processor"], device="cpu")
    with pytest.raises(ValueError, match="need a world model"):
        bare({"slots": slots, **WITHOUT})
    assert bare({"slots": slots, **WITHOUT}, frames_from="observed")["removed"] is None
    blind = pipeline("video-question-answering", **{**parts, "probe": None}, device="cpu")
    with pytest.raises(ValueError, match="what an empty slot looks like"):
        blind({"slots": slots, **WITHOUT})
    with pytest.raises(ValueError, match="there is no probe"):
        blind({"slots": slots, **WITHOUT}, empty_slot=probe.empty_slot)
    named = blind({"slots": slots, **WITHOUT, "removed_slot": 0}, empty_slot=probe.empty_slot)
    assert named["removed"] == {"slot": 0, "object": None, "branch": 6}


def test_words_tell_types_and_objects():
    assert question_type_of("Without the gray object, what will not happen?", ["x"]) == "counterfactual"
    assert question_type_of("x", None) == "descriptive" and question_type_of("x", ["y"], "predictive") == "predictive"
    text = "The red metal cube's entrance, or the presence of the sphere"
    assert described_objects(text, ATTRIBUTES) == ["red metal cube", "sphere"]


def test_types_and_objects_of_generated_questions_are_told_from_their_words():
    attributes = {"color": COLORS, "material": MATERIALS, "shape": SHAPES}
    generator, removals = np.random.default_rng(0), 0
    for index in range(3):
        scene = sample_scene(generator)
        truth = VideoTruth(scene_annotation(scene, index), scene_predictions(scene, index))
        for question in make_questions(truth, generator):
            options = [choice["choice"] for choice in question.get("choices", ())] or None
            assert question_type_of(question["question"], options) == question["question_type"]
            assert all(described_objects(option, attributes) for option in options or ())
            if question["question_type"] == "counterfactual":
                words, removals = removed_object(question["question"]), removals + 1
                assert set(words.split()) - {"object"} <= set(question["program"])
    assert removals


def test_model_processor_and_probe_are_loaded_from_folders(ask, parts, tmp_path):
    ask.save_pretrained(tmp_path / "aloe")
    parts["world_model"].save_pretrained(tmp_path / "world")
    again = pipeline(
        "video-question-answering", model=str(tmp_path / "aloe"), world_model=tmp_path / "world", device="cpu"
    )
    slots, _ = draw()
    np.testing.assert_allclose(
        again({"slots": slots, **WITHOUT})["scores"], ask({"slots": slots, **WITHOUT})["scores"], atol=1e-5
    )


def test_the_shipped_model_answers_about_videos_that_it_has_not_seen():
    """From frames to answers of all types."""
    ask = pipeline(
        "video-question-answering",
        model=str(bundled_checkpoint("collisions_aloe")),
        world_model=bundled_checkpoint("collisions"),
        device="cpu",
    )
    generator, right = np.random.default_rng(2026), {kind: [] for kind in QUESTION_TYPES}
    for index in range(6):
        scene = sample_scene(generator)
        truth = VideoTruth(scene_annotation(scene, index), scene_predictions(scene, index))
        questions = make_questions(truth, generator)
        asked = [
            {"question": one["question"], "options": [choice["choice"] for choice in one.get("choices", ())] or None}
            for one in questions
        ]
        frames = render_collisions(scene.episode.states[:128], resolution=64)
        for answer, question in zip(ask({"video": frames, "questions": asked}), questions, strict=True):
            if answer["options"] is None:
                right["descriptive"].append(answer["answer"] == question["answer"])
            else:
                pairs = zip(answer["options"], question["choices"], strict=True)
                right[question["question_type"]] += [one["answer"] == choice["answer"] for one, choice in pairs]
    events = right["explanatory"] + right["predictive"] + right["counterfactual"]
    # who reads the words alone is right about 0.46 of the questions and 0.6 of the options
    assert np.mean(right["descriptive"]) > 0.6 and np.mean(events) > 0.75 and min(map(len, right.values())) > 5
