"""ALOE is the released code's (excerpts of recorded runs), and its processor reads what CLEVRER asks."""

import json

import pytest
import torch
from aloe_golden import GOLDEN_CONFIG, golden_aloe
from golden import DATA, read
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoProcessor

import cjepa_hf
from cjepa_hf import AloeConfig, AloeForVideoQuestionAnswering, AloeProcessor
from cjepa_hf.models.aloe.modeling_aloe import contact_losses, nearest_slots, question_losses, with_context
from cjepa_hf.training.aloe import right_sequences

TOLERANCE = dict(atol=1e-5, rtol=1e-5)
TINY = dict(num_slots=3, slot_size=8, num_frames=4, hidden_size=24, num_attention_heads=4, num_hidden_layers=2)
TINY |= dict(intermediate_size=32, answer_hidden_size=16)


@pytest.fixture(scope="module")
def recorded():
    """The excerpt, its batch of 4 descriptive questions and 5 with 13 options in our form, and the recorded numbers."""
    data = read("aloe.safetensors")
    with safe_open(DATA / "aloe.safetensors", "pt") as file:
        numbers = {name: json.loads(text) for name, text in file.metadata().items()}
    ids = torch.cat([data["inputs.cls_q_tokens"], data["inputs.mc_q_tokens"]]).long()
    batch = {
        "input_ids": ids,
        "attention_mask": ~torch.cat([data["inputs.cls_q_pad_mask"], data["inputs.mc_q_pad_mask"]]),
        "is_option": torch.arange(17) >= 4,
        "question_index": torch.cat([torch.arange(4), 4 + data["inputs.mc_flag"].long()]),
        "labels": torch.cat([data["inputs.cls_label"], data["inputs.mc_label"].long()]),
        "question_type": torch.cat([torch.zeros(4, dtype=torch.long), data["inputs.mc_subtype"]]),
    }
    return data, batch, numbers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_the_released_code(recorded, attention):
    data, batch, _ = recorded
    model = golden_aloe(data)
    model.set_attn_implementation(attention)
    rows = torch.tensor([1, 4, 5, 6])  # a descriptive question, and the three options of another video's
    slots = torch.cat([data["inputs.cls_video_emb"], data["inputs.mc_video_emb"]]).float()
    with torch.no_grad():
        output = model(
            slots,
            batch["input_ids"][rows],
            batch["attention_mask"][rows],
            is_option=batch["is_option"][rows],
            video_index=torch.tensor([0, 1, 1, 1]),
            output_hidden_states=True,
        )
    torch.testing.assert_close(output.answer_logits[:1], data["outputs.cls_answer_logits"][1:2], **TOLERANCE)
    torch.testing.assert_close(output.option_logits[1:], data["outputs.mc_answer_logits"][:3], **TOLERANCE)
    first = data["outputs.cls.transformer_out_CLS"][1:2]
    torch.testing.assert_close(output.hidden_states[-1][:1, 0], first, **TOLERANCE)
    assert [state.shape[1] for state in output.hidden_states] == [208, 208, 208, 1]


def test_losses_equal_the_released_code(recorded):
    data, batch, numbers = recorded
    answers = torch.cat([data["outputs.cls_answer_logits"], torch.randn(13, 22)])
    options = torch.cat([torch.randn(4), data["outputs.mc_answer_logits"]])
    answer_loss, option_loss = question_losses(answers, options, batch["labels"], batch["is_option"])
    assert answer_loss.item() == pytest.approx(numbers["train_loss"]["cls_answer_loss"], abs=1e-5)
    assert option_loss.item() == pytest.approx(numbers["train_loss"]["mc_answer_loss"], abs=1e-5)

    alone = batch["is_option"]
    answer_loss, option_loss = question_losses(answers[alone], options[alone], batch["labels"][alone], alone[alone])
    assert answer_loss.item() == 0
    assert option_loss.item() == pytest.approx(numbers["train_loss"]["mc_answer_loss"], abs=1e-5)
    unknown = batch["labels"].clone()
    unknown[5:] = -1
    _, option_loss = question_losses(answers, options, unknown, batch["is_option"])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(options[4:5], batch["labels"][4:5].float())
    assert option_loss.item() == pytest.approx(expected.item())


def test_accuracies_equal_the_released_bookkeeping(recorded):
    data, batch, numbers = recorded
    output = cjepa_hf.models.aloe.AloeOutput(
        answer_logits=torch.cat([data["outputs.cls_answer_logits"], torch.zeros(13, 22)]),
        option_logits=torch.cat([torch.zeros(4), data["outputs.mc_answer_logits"]]),
    )
    right, solved = right_sequences(output, batch)
    for kind, name in enumerate(("descriptive", "explanatory", "predictive", "counterfactual")):
        chosen = batch["question_type"] == kind
        assert chosen.sum() == numbers["eval"][f"{name}_bs"]
        assert solved[chosen].float().mean().item() == pytest.approx(numbers["eval"][f"{name}_acc"])
    assert solved[4:].float().mean().item() == pytest.approx(numbers["eval"]["multiple-choice_acc"])
    assert right[4:].float().mean().item() == pytest.approx(0.8461538)  # all options, each by itself


def test_padding_does_not_change_an_answer(recorded):
    data, batch, _ = recorded
    model = golden_aloe(data)
    slots = data["inputs.cls_video_emb"].float()
    ids, mask = batch["input_ids"][1:2], batch["attention_mask"][1:2]
    with torch.no_grad():
        expected = model(slots, ids, mask).answer_logits
        assert torch.equal(model(slots, ids.masked_fill(~mask, 5), mask).answer_logits, expected)
        assert torch.equal(model(slots, ids).answer_logits, expected)  # the mask that token 0 means
        assert not torch.equal(model(slots, ids.masked_fill(~mask, 5)).answer_logits, expected)


@pytest.fixture(scope="module")
def asked():
    return json.loads((DATA / "aloe_questions.json").read_text())


def test_tokens_labels_and_vocabulary_equal_the_released_code(asked):
    processor = AloeProcessor()
    for words, expected in ((processor.words, asked["words"]), (processor.answers, asked["answers"])):
        assert {word: place for place, word in enumerate(words, 1)} | {"PAD": 0} == expected
    for case in asked["tokenizer"]:
        tokens = processor.tokenize(case["text"])
        assert tokens + [0] * (case["pad_num"] - len(tokens)) == case["tokens"]

    questions = {(s["scene_index"], q["question_id"]): q for s in asked["scenes"] for q in s["questions"]}
    answers, answer_ids, options, option_ids, flags = [], [], [], [], []
    for item in asked["items"]:
        question = questions[item["scene_index"], item["question_id"]]
        if item["q_type"] == 0:
            answer_ids += processor.encode_question(question["question"]).tolist()
            answers.append(processor.answer_label(question["answer"]))
        else:
            choices = question["choices"]
            ids = processor.encode_question(question["question"], [choice["choice"] for choice in choices])
            option_ids += ids.tolist()
            options += [int(choice["answer"] == "correct") for choice in choices]
            flags += [(flags[-1] if flags else -1) + 1] * len(choices)
    collated = asked["collated"]
    assert answer_ids == collated["cls_q_tokens"] and answers == collated["cls_label"]
    assert option_ids == collated["mc_q_tokens"] and options == collated["mc_label"] and flags == collated["mc_flag"]


def test_every_question_type_sees_the_frames_of_the_released_code(asked):
    for case, types in asked["frames"].items():
        length, frames = (int(part.split("=")[1]) for part in case.split(","))
        processor = AloeProcessor(num_frames=frames)
        assert processor.num_starts == 8
        for kind, starts in types.items():
            for start, (first, last, stride) in starts.items():
                found = processor.frame_indices(length, kind, int(start.split("=")[1]))
                assert found.tolist() == list(range(first, last + 1, stride)), (case, kind, start)
    assert processor.frame_indices(160)[0] == 3  # the middle one of 8 starts, and the same each time


# --- the model -----------------------------------------------------------------------------------------------------


def tiny(**changes):
    torch.manual_seed(0)
    return AloeForVideoQuestionAnswering(AloeConfig(**TINY | changes)).eval()


def test_auto_classes_load_what_was_saved(tmp_path):
    model = tiny()
    processor = AloeProcessor(num_frames=4, observed_frames=16, unknown_word="object", words=["object", "red", "what"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, AloeConfig) and config.to_dict()["hidden_size"] == 24
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, AloeForVideoQuestionAnswering)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, AloeProcessor) and loaded.to_dict() == processor.to_dict()
    assert loaded.tokenize("What is red?") == [3, 1, 2]


def test_the_default_size_is_the_released_one_without_its_constant_flags():
    with torch.device("meta"):
        model = AloeForVideoQuestionAnswering(AloeConfig())
    assert sum(p.numel() for p in model.parameters()) == 2_879_437 - 5 * 2


def test_any_number_of_options_and_of_videos():
    model = tiny()
    processor = AloeProcessor(num_frames=4, observed_frames=16)
    videos = [torch.randn(16, 3, 8), torch.randn(40, 3, 8)]
    options = ["The cube and the sphere collide", "The sphere collides with the red cube", "The object's entrance"]
    questions = ["How many collisions happen?", "What will happen next?", "What will happen next?"]
    inputs = processor(
        videos,
        questions,
        [None, options[:1], options],
        ["descriptive", "predictive", "counterfactual"],
        video_index=[0, 1, 1],
    )
    assert inputs["input_ids"].shape == (5, 32) and inputs["video_index"].tolist() == [0, 1, 2, 2, 2]
    assert inputs["question_index"].tolist() == [0, 1, 2, 2, 2]
    assert torch.equal(inputs["slots"][1], videos[1][[25, 29, 33, 37]])  # imagined: 24 more frames than 16
    assert torch.equal(inputs["slots"][2], videos[1][[1, 5, 9, 13]])
    with torch.no_grad():
        output = model(**inputs)
    answers = processor.post_process_answers(output, inputs)
    assert answers[0]["answer"] in processor.answers and sum(answers[0]["scores"].values()) == pytest.approx(1)
    assert [len(answer["options"]) for answer in answers[1:]] == [1, 3]
    assert answers[2]["options"] == [logit > 0 for logit in output.option_logits[2:].tolist()]
    # an option is judged alone: the same whatever else is asked
    alone = processor(videos[1], questions[2], options[1:2], "counterfactual")
    with torch.no_grad():
        torch.testing.assert_close(model(**alone).option_logits[0], output.option_logits[3])


def test_questions_about_the_same_frames_share_them():
    processor = AloeProcessor(num_frames=4, observed_frames=16)
    video, option = torch.randn(40, 3, 8), ["The cube and the sphere collide"]
    inputs = processor(
        video,
        ["How many collisions happen?", "What will happen next?", "What will happen without the cube?"],
        [None, option, option * 2],
        ["descriptive", "predictive", "counterfactual"],
    )
    assert len(inputs["slots"]) == 2  # observed frames, and those that end with the imagined ones
    assert inputs["video_index"].tolist() == [0, 1, 0, 0] and inputs["question_index"].tolist() == [0, 1, 2, 2]


def test_context_is_the_slot_itself_before_and_after():
    slots = torch.randn(2, 4, 3, 8)
    seen = with_context(slots, 1)
    assert seen.shape == (2, 4, 3, 24) and torch.equal(seen[..., 8:16], slots)
    assert torch.equal(seen[:, 1:, :, :8], slots[:, :-1]) and torch.equal(seen[:, 0, :, :8], slots[:, 0])
    assert torch.equal(seen[:, :-1, :, 16:], slots[:, 1:]) and torch.equal(seen[:, -1, :, 16:], slots[:, -1])
    model, ids = tiny(slot_context=2), torch.randint(1, 80, (2, 32))
    assert model.slot_projection.in_features == 5 * 8 + 2
    changed = slots.clone()
    changed[:, 3] += 1
    with torch.no_grad():
        assert not torch.equal(model(slots, ids).answer_logits, model(changed, ids).answer_logits)


def test_the_nearest_slots_are_the_objects_nearby_and_empty_slots_come_last():
    slots = torch.zeros(1, 2, 4, 8)
    slots[0, 0, :, 2] = torch.tensor([0.0, 3.0, 1.0, 0.5])  # x
    slots[0, 1, :, 2] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    slots[0, :, :, 0] = torch.tensor([2.0, 2, 2, 0.8])  # the last holds nothing
    coordinates = torch.zeros(9, 3)
    coordinates[8, 0] = -1
    coordinates[0, 0] = coordinates[2, 1] = coordinates[3, 2] = 1
    coordinates[8, 1] = 5  # where the origin is does not matter
    found = nearest_slots(slots, coordinates, 3)
    assert found[0, 0].tolist() == [[2, 1, 3], [2, 0, 3], [0, 1, 3], [0, 2, 1]]
    assert found[0, 1, 0].tolist() == [1, 2, 3]
    # half as many are the first of them
    assert torch.equal(nearest_slots(slots, coordinates, 1), found[..., :1])


def test_a_slot_is_read_with_its_neighbors_and_not_with_the_others():
    torch.manual_seed(0)
    model = tiny(slot_neighbors=1)
    model.slot_coordinates[0, 0] = model.slot_coordinates[2, 1] = 1
    slots = torch.randn(1, 4, 3, 8)
    slots[..., 0], slots[..., 2] = 1, torch.tensor([0.0, 1.0, 5.0])
    seen, changed = model._read_slots(slots).unflatten(1, (4, 3)), slots.clone()
    changed[:, :, 1, 5] += 1  # the nearest of the two others
    moved = (model._read_slots(changed).unflatten(1, (4, 3)) - seen).abs().amax((0, 1, 3))
    assert (moved > 1e-3).all()
    changed = slots.clone()
    changed[:, :, 2, 5] += 1  # the nearest of none
    moved = (model._read_slots(changed).unflatten(1, (4, 3)) - seen).abs().amax((0, 1, 3))
    assert moved[:2].max() == 0 and moved[2] > 1e-3


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_contacts_are_told_without_a_question_and_the_same_with_any(tmp_path, layer):
    options = dict(video_attends_to_text=False, contact_attributes=[4, 2], contact_layer=layer, num_hidden_layers=3)
    model = tiny(**options)
    slots, ids = torch.randn(2, 4, 3, 8), torch.randint(1, 80, (3, 32))
    with torch.no_grad():
        alone = model(slots)
        asked = model(slots, ids, video_index=torch.tensor([0, 1, 1]))
    assert alone.answer_logits is None and alone.contact_logits.shape == (2, 4, 3, 1 + 4 + 2)
    torch.testing.assert_close(asked.contact_logits, alone.contact_logits)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AloeForVideoQuestionAnswering.from_pretrained(tmp_path).eval()(slots)
    torch.testing.assert_close(again.contact_logits, alone.contact_logits)
    with pytest.raises(ValueError, match=r"contact_attributes is None.*give input_ids"):
        tiny()(slots)
    with pytest.raises(ValueError, match="labels are those of texts"):
        model(slots, labels=torch.zeros(2, dtype=torch.long))


def test_the_losses_of_contacts_leave_out_what_is_not_known():
    logits = torch.tensor([[0.0, 2, 0, 0, 1], [1.0, 0, 3, 2, 0], [-1.0, 0, 0, 0, 0], [5.0, 9, 9, 9, 9]]).view(
        1, 1, 4, 5
    )
    contacts = torch.tensor([[1, 0, 1], [1, -1, -1], [0, -1, -1], [-1, -1, -1]]).view(1, 1, 4, 3)
    touch, other = contact_losses(logits, contacts, [2, 2])
    right = -torch.nn.functional.logsigmoid(torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(touch, right.mean())
    expected = -torch.log_softmax(torch.tensor([2.0, 0]), 0)[0] - torch.log_softmax(torch.tensor([0.0, 1]), 0)[1]
    torch.testing.assert_close(other, expected)  # of the first alone: what the second touches is not known
    nothing = contact_losses(logits, torch.full_like(contacts, -1), [2, 2])
    assert [float(part) for part in nothing] == [0.0, 0.0]


def test_a_video_that_does_not_attend_to_text_is_the_same_model_with_a_mask():
    model = tiny(video_attends_to_text=False, hidden_dropout=0, attention_dropout=0)
    plain = AloeForVideoQuestionAnswering(AloeConfig(**TINY)).eval()
    plain.load_state_dict(model.state_dict())
    for parameter in (model.position_embedding, model.first_token):
        torch.nn.init.normal_(parameter)
    plain.load_state_dict(model.state_dict())
    slots, ids = torch.randn(3, 4, 3, 8), torch.randint(1, 80, (11, 32))
    ids[:, 9:20] = 0
    ids[:5, 26:] = 0
    video_index = torch.tensor([2, 0, 0, 2, 2, 2, 0, 2, 2, 1, 0])  # of 3 videos: 4, 1 and 6 texts, mixed
    is_option = torch.arange(11) % 3 > 0
    places = 1 + 12 + 32
    vision = (torch.arange(places) >= 1) & (torch.arange(places) <= 12)

    class Masked(torch.nn.Module):
        """A layer whose slots do not see the first token and the words."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, states, mask, first_only=False):
            return self.layer(states, mask & ~(vision[:, None] & ~vision) if not first_only else mask, first_only)

    plain.layers = torch.nn.ModuleList([Masked(layer) for layer in plain.layers])
    labels = torch.where(is_option, 1, torch.arange(11))
    found = model(slots, ids, is_option=is_option, video_index=video_index, labels=labels)
    expected = plain(slots, ids, is_option=is_option, video_index=video_index, labels=labels)
    torch.testing.assert_close(found.answer_logits, expected.answer_logits)
    torch.testing.assert_close(found.option_logits, expected.option_logits)
    found.loss.backward()
    expected.loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)
    model.train()
    model.activation_checkpointing_enable()
    again = model(slots, ids, is_option=is_option, video_index=video_index, labels=labels)
    torch.testing.assert_close(again.loss, found.loss)
    model.zero_grad()
    again.loss.backward()
    torch.testing.assert_close(model.layers[0].fc1.weight.grad, plain.layers[0].layer.fc1.weight.grad)
    half = model.eval().to(torch.bfloat16)(slots, ids, is_option=is_option, video_index=video_index)
    torch.testing.assert_close(half.option_logits.float(), found.option_logits, atol=0.1, rtol=0.1)
    with pytest.raises(ValueError, match="neither attentions nor hidden states"):
        model(slots, ids, video_index=video_index, output_hidden_states=True)
    with pytest.raises(ValueError, match="video_index must be integers from 0 to 2"):
        model(slots, ids, video_index=video_index + 1)
    with pytest.raises(ValueError, match="holds no text"):
        model(slots, ids[:0], video_index=video_index[:0])


def test_bfloat16_agrees_and_checkpointing_and_compilation_work():
    model = tiny(hidden_dropout=0, attention_dropout=0)
    processor = AloeProcessor(num_frames=4, observed_frames=16)
    inputs = processor(torch.randn(16, 3, 8), ["What will happen next?"], [["The red cube and the sphere collide"]])
    labels = torch.tensor([1])
    expected = model(**inputs, labels=labels)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).option_logits, expected.option_logits)
    model.train()
    model.activation_checkpointing_enable()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, expected.loss)
    assert model.layers[0].fc1.weight.grad.abs().max() > 0
    half = tiny().to(torch.bfloat16)
    output = half(**inputs, labels=labels)
    assert output.option_logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    torch.testing.assert_close(output.option_logits.float(), expected.option_logits, atol=0.05, rtol=0.05)


def test_dropout_acts_in_training_alone():
    model = tiny(hidden_dropout=0.5, attention_dropout=0.5)
    ids = torch.randint(1, 80, (2, 32))
    slots = torch.randn(2, 4, 3, 8)
    with torch.no_grad():
        assert torch.equal(model(slots, ids).answer_logits, model(slots, ids).answer_logits)
        model.train()
        assert not torch.equal(model(slots, ids).answer_logits, model(slots, ids).answer_logits)


def test_configurations_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"Unknown AloeConfig field 'num_slot'\. Did you mean 'num_slots'"):
        AloeConfig(num_slot=7)
    with pytest.raises(ValueError, match="hidden_size=72 is not a multiple of num_attention_heads=5"):
        AloeConfig(**GOLDEN_CONFIG | {"num_attention_heads": 5})
    with pytest.raises(ValueError, match="num_frames=0 must be at least 1"):
        AloeConfig(num_frames=0)
    with pytest.raises(ValueError, match=r"hidden_dropout=1\.0"):
        AloeConfig(hidden_dropout=1.0)


def test_inputs_that_do_not_fit_say_what_was_expected():
    model = tiny()
    slots, ids = torch.randn(2, 4, 3, 8), torch.ones(2, 32, dtype=torch.long)
    cases = [
        (dict(slots=slots[:, :3], input_ids=ids), r"expected \(V, 4, 3, 8\)"),
        (dict(slots=slots.long(), input_ids=ids), "expected floating point"),
        (dict(slots=slots, input_ids=ids[:, :20]), r"expected \(S, 32\)"),
        (dict(slots=slots, input_ids=ids[:1]), "pass video_index"),
        (dict(slots=slots, input_ids=ids, labels=torch.zeros(3)), r"labels has shape \(3,\): expected \(2,\)"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**inputs)


# --- the processor's errors ----------------------------------------------------------------------------------------


def test_unknown_words_are_an_error_or_a_declared_word():
    with pytest.raises(ValueError, match="unknown word 'a' in 'What is a cube\\?'"):
        AloeProcessor().tokenize("What is a cube?")
    with pytest.raises(ValueError, match="did you mean 'sphere'"):
        AloeProcessor().tokenize("the spheer")
    with pytest.raises(ValueError, match="has no words"):
        AloeProcessor().tokenize(" ? ")
    lenient = AloeProcessor(unknown_word="object")
    assert lenient.tokenize("A cube") == lenient.tokenize("object cube")
    with pytest.raises(ValueError, match="unknown_word='thing' is not among the 81 words"):
        AloeProcessor(unknown_word="thing")
    with pytest.raises(ValueError, match="unknown answer '6'"):
        AloeProcessor().answer_label("6")


def test_texts_too_long_say_so_instead_of_being_cut():
    processor = AloeProcessor()
    long = " ".join(["the"] * 33)
    with pytest.raises(ValueError, match="descriptive question of 33 words, at most 32 fit"):
        processor.encode_question(long)
    with pytest.raises(ValueError, match="question with options of 21 words, at most 20 fit"):
        processor.encode_question(" ".join(["the"] * 21), ["the cube"])
    with pytest.raises(ValueError, match="option of 13 words, at most 12 fit"):
        processor.encode_question("the cube", [" ".join(["the"] * 13)])
    assert processor.encode_question(" ".join(["the"] * 32)).shape == (1, 32)


def test_bad_calls_of_the_processor_say_what_was_expected():
    processor = AloeProcessor()
    slots = torch.randn(128, 7, 8)
    cases = [
        (dict(slots=slots[:100], questions="What is red?"), "a video of 100 frames: expected at least"),
        (dict(slots=slots[0], questions="What is red?"), r"expected \(T, N, D\)"),
        (dict(slots=slots, questions=["What is red?"] * 2, options=[None]), "2 questions but 1 options"),
        (dict(slots=[slots] * 2, questions=["What is red?"] * 3), "3 questions but 2 videos"),
        (dict(slots=slots, questions="What is red?", question_types="causal"), "question type 'causal'"),
        (dict(slots=slots, questions="What is red?", options=[]), "at least one"),
        (dict(slots=slots, questions="What is red?", start=8), "must be in 0 ... 7"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            processor(**call)
    with pytest.raises(ValueError, match="words holds 'red' twice"):
        AloeProcessor(words=["red", "red"])
    with pytest.raises(ValueError, match="words holds 'Red'"):
        AloeProcessor(words=["Red"])
