"""Training of ALOE: what a batch holds, and that a tiny task is learned from slots and not from words."""

import copy
import json
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from cjepa_hf.data.slots import load_slot_dataset, write_slot_dataset
from cjepa_hf.models.aloe import AloeConfig, AloeForVideoQuestionAnswering, AloeProcessor
from cjepa_hf.models.aloe.modeling_aloe import with_context
from cjepa_hf.slot_probe import SlotProbe
from cjepa_hf.training.aloe import (
    AloeTrainArguments,
    ContactDataset,
    QuestionDataset,
    QuestionsByVideo,
    SlotContacts,
    build_model,
    main,
    question_loss,
    question_metrics,
    structure_positions,
    whiten_projection,
    with_statements,
)
from cjepa_hf.training.arguments import config_arguments, config_overrides, parse_arguments
from cjepa_hf.training.trainer import read_log

COLORS = ("red", "blue", "green", "cyan")
FRAMES, N, D = 8, 3, 6
TINY = dict(num_frames=2, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
TINY |= dict(hidden_dropout=0, attention_dropout=0, word_embedding_size=12, answer_hidden_size=32)
TEXT = dict(max_question_length=8, max_choice_length=8)


def video(index: int) -> tuple[dict, dict]:
    """Slots that each show one color (dimension = color), and questions about which colors there are."""
    rng = np.random.default_rng(index)
    shown = rng.choice(4, rng.integers(1, N + 1), replace=False)
    slots = np.zeros((FRAMES, N, D), np.float32)
    slots[:, np.arange(len(shown)), shown] = 3
    slots[..., -1] = np.arange(FRAMES)[:, None] / FRAMES
    episode = {"episode_id": f"video_{index:05d}", "slots": slots}
    questions = []
    for number, color in enumerate(rng.choice(4, 2, replace=False)):
        question = {"question_id": number, "question_type": "descriptive", "question_subtype": "exist"}
        question |= {"question": f"Are there any {COLORS[color]} objects?"}
        questions.append(question | {"answer": "yes" if color in shown else "no"})
    choices = [
        {
            "choice_id": number,
            "choice": f"The {COLORS[color]} cube collides with the sphere",
            "answer": "correct" if color in shown else "wrong",
        }
        for number, color in enumerate(rng.choice(4, rng.integers(2, 4), replace=False))
    ]
    kind = ("counterfactual", "predictive")[index % 2]
    text = ("Without the metal cylinder, what will happen?", "What will happen next?")[index % 2]
    questions.append({"question_id": 2, "question": text, "question_type": kind, "choices": choices})
    return episode, {"scene_index": index, "video_filename": f"video_{index:05d}.mp4", "questions": questions}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder with `slots`, train.json and validation.json."""
    root = tmp_path_factory.mktemp("aloe")
    splits = {"train": range(300), "validation": range(10000, 10060)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        episodes = {name: (video(index)[0] for index in numbers) for name, numbers in splits.items()}
        write_slot_dataset(root / "slots", episodes, frame_skip=1, encoder={"name": "hand-made"})
        for name, numbers in splits.items():
            (root / f"{name}.json").write_text(json.dumps([video(index)[1] for index in numbers]))
        yield root


def command(data, output, *more: str) -> list[str]:
    words = f"--dataset {data}/slots --questions {data}/train.json --validation_questions {data}/validation.json "
    words += f"--output_dir {output} --observed_frames {FRAMES} --max_steps 100 --batch_size 32 --optimizer muon "
    words += (
        "--muon_learning_rate 0.01 --learning_rate 3e-3 --warmup_steps 10 --eval_every 0 --save_every 50 --use_cpu "
    )
    words += " ".join(f"--{name} {value}" for name, value in {**TINY, **TEXT}.items())
    return [*words.split(), *more]


def read(path) -> list[dict]:
    return json.loads(Path(path).read_text())


def test_training_learns_from_the_slots_and_the_folder_loads(data, tmp_path):
    output = tmp_path / "model"
    result = main(command(data, output))
    log = [line["loss"] for line in read_log(output / "log.jsonl") if "loss" in line]
    assert log[-1] < 0.3 * log[0]
    metrics = result.metrics
    assert metrics["accuracy"] > 0.9 and metrics["descriptive_accuracy"] > 0.9
    assert metrics["predictive_option_accuracy"] > 0.9 and metrics["predictive_accuracy"] > 0.8

    model = AloeForVideoQuestionAnswering.from_pretrained(output).eval()
    processor = AloeProcessor.from_pretrained(output)
    assert model.config.num_slots == N and processor.observed_frames == FRAMES and processor.num_frames == 2
    slots = torch.zeros(FRAMES, N, D)
    slots[:, 0, COLORS.index("blue")] = 3
    slots[..., -1] = torch.arange(FRAMES)[:, None] / FRAMES
    inputs = processor(slots, ["Are there any blue objects?", "Are there any red objects?"])
    answers = processor.post_process_answers(model(**inputs), inputs)
    assert [answer["answer"] for answer in answers] == ["yes", "no"]
    assert read(output / "training_results.json")["validation"] == metrics
    card = (output / "README.md").read_text()
    assert "descriptive_accuracy" in card and "hand-made" in card


def test_without_slots_the_same_training_stays_near_chance(data, tmp_path):
    result = main(command(data, tmp_path / "blind", "--text_only", "true", "--max_steps", "60"))
    assert result.metrics["descriptive_accuracy"] < 0.7 and result.metrics["accuracy"] < 0.6
    assert "text-only baseline" in (tmp_path / "blind" / "README.md").read_text()


def test_a_killed_run_continues_bit_for_bit(data, tmp_path):
    more = ["--lr_scheduler", "constant", "--hidden_dropout", "0.1", "--max_steps"]
    main(command(data, tmp_path / "parts", *more, "4"))
    main(command(data, tmp_path / "whole", *more, "8"))
    resumed = main(command(data, tmp_path / "parts", *more, "8"))
    assert resumed.resumed_from is not None and resumed.step == 8
    first, second = (
        AloeForVideoQuestionAnswering.from_pretrained(tmp_path / name).state_dict() for name in ("parts", "whole")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="text_only"):
        main(command(data, tmp_path / "parts", *more, "9", "--text_only", "true"))


def test_the_example_runs_the_shared_loop(data, tmp_path, monkeypatch):
    script = Path(__file__).parents[2] / "examples" / "train_aloe.py"
    monkeypatch.setattr(sys, "argv", [str(script), *command(data, tmp_path / "example", "--max_steps", "2")])
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "example" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["small", "clevrer", "contacts", "statements"])
def test_the_configurations_of_the_examples_parse(name):
    path = Path(__file__).parents[2] / "examples" / "aloe" / f"{name}.yaml"
    more = ["--dataset", "x", "--output_dir", "x"]
    more += ["--annotations", "x", "--slot_probe", "x"] if name in ("contacts", "statements") else ["--questions", "x"]
    args, config = parse_arguments([AloeTrainArguments, config_arguments(AloeConfig)], [str(path), *more])
    model = AloeForVideoQuestionAnswering(AloeConfig(**config_overrides(config)))
    parameters = sum(p.numel() for p in model.parameters())
    if name != "statements":  # it goes on with a model
        assert parameters == 2_879_427 if name == "clevrer" else parameters < 1_500_000
    assert args.max_steps > args.warmup_steps


# --- batches -------------------------------------------------------------------------------------------------------


def dataset_of(data, split="validation", processor=None, **options) -> QuestionDataset:
    processor = processor or AloeProcessor(num_frames=2, observed_frames=FRAMES)
    return QuestionDataset(
        load_slot_dataset(data / "slots", split), read(data / f"{split}.json"), processor, **options
    )


def test_a_batch_equals_the_processor_question_by_question(data):
    questions = dataset_of(data)
    chosen = [0, 2, 5, 7]
    batch = questions.__getitems__(chosen)
    counts = [len(questions.questions[i].get("choices", [0])) for i in chosen]
    assert batch["question_index"].tolist() == np.repeat(np.arange(4), counts).tolist()
    rows = 0
    for place, index in enumerate(chosen):
        scene, question = questions.scenes[index], questions.questions[index]
        options = [choice["choice"] for choice in question["choices"]] if "choices" in question else None
        slots = torch.from_numpy(video(scene["scene_index"])[0]["slots"])
        one = questions.processor(slots, question["question"], options, question["question_type"])
        part = slice(rows, rows + counts[place])
        torch.testing.assert_close(batch["slots"][batch["video_index"][rows]], one["slots"][0])
        assert torch.equal(batch["input_ids"][part], one["input_ids"])
        assert torch.equal(batch["attention_mask"][part], one["attention_mask"].bool())
        assert torch.equal(batch["is_option"][part], one["is_option"])
        if options is None:
            expected = [questions.processor.answer_label(question["answer"])]
        else:
            expected = [int(choice["answer"] == "correct") for choice in question["choices"]]
        assert batch["labels"][part].tolist() == expected
        rows = part.stop
    assert rows == len(batch["labels"])


def test_predictive_questions_see_the_imagined_frames_and_only_they(data):
    processor = AloeProcessor(num_frames=2, observed_frames=4, min_imagined_frames=4)
    questions = dataset_of(data, processor=processor)
    batch = questions.__getitems__(range(len(questions)))
    frames = batch["slots"][:, :, 0, -1]
    predictive = torch.zeros(len(frames), dtype=torch.bool)
    predictive[batch["video_index"][(batch["question_type"] == 2)[batch["question_index"]]]] = True
    assert (frames[predictive] == torch.tensor([4.0, 6.0]) / FRAMES).all() and predictive.any()
    assert (frames[~predictive] == torch.tensor([0.0, 2.0]) / FRAMES).all()


def test_random_starts_cover_all_first_frames_and_the_default_repeats(data):
    torch.manual_seed(0)
    random = dataset_of(data, random_start=True)
    first = torch.cat([random.__getitems__(range(100))["slots"][:, 0, 0, -1] for _ in range(3)]) * FRAMES
    assert random.processor.num_starts == 4 and set(first.tolist()) == {0.0, 1.0, 2.0, 3.0}
    fixed = dataset_of(data)
    assert (fixed.__getitems__(range(100))["slots"][:, 0, 0, -1] * FRAMES == 1).all()


def one_question_each(slots, folder) -> QuestionDataset:
    """One question about each of the videos `slots` [B, T, N, D], all frames of which are seen."""
    episodes = [{"episode_id": str(i), "slots": video} for i, video in enumerate(slots)]
    dataset = load_slot_dataset(write_slot_dataset(folder / "slots", {"train": episodes}, frame_skip=1), "train")
    asked = {
        "question_id": 0,
        "question_type": "descriptive",
        "question": "How many collisions happen?",
        "answer": "1",
    }
    scenes = [{"scene_index": i, "video_filename": f"{i}.mp4", "questions": [asked]} for i in range(len(slots))]
    frames = slots.shape[1]
    return QuestionDataset(dataset, scenes, AloeProcessor(num_frames=frames, observed_frames=frames))


def test_whitened_slots_have_the_same_variance_in_all_directions(tmp_path):
    rng = np.random.default_rng(0)
    mixing = np.linalg.qr(rng.normal(size=(D, D)))[0] * np.geomspace(1, 0.05, D)
    slots = (rng.normal(size=(9, 50, N, D)) @ mixing.T + 3).astype(np.float32)
    questions = one_question_each(slots, tmp_path)
    model = AloeForVideoQuestionAnswering(AloeConfig(num_slots=N, slot_size=D, **TINY))
    flags = model.slot_projection.weight[:, D:].clone()
    whiten_projection(model, questions)
    assert torch.equal(model.slot_projection.weight[:, D:], flags)
    slots = torch.from_numpy(slots).flatten(0, 2)
    with torch.no_grad():
        read = slots @ model.slot_projection.weight[:, :D].T + model.slot_projection.bias
    sizes = torch.linalg.svdvals(read - read.mean(0))[:D] / len(read) ** 0.5
    assert sizes.min() > 0.85 and sizes.max() < 1.15 and read.mean(0).abs().max() < 0.2


def test_whitened_context_makes_small_movements_as_large_as_positions(tmp_path):
    rng = np.random.default_rng(0)
    speed = 0.05 * rng.normal(size=(64, 1, N, 1))  # positions of about 1, moved by 0.05 per frame
    slots = rng.normal(size=(64, 1, N, 1)) + speed * np.arange(9)[None, :, None, None]
    slots = np.concatenate([slots, np.zeros((64, 9, N, D - 1))], axis=-1).astype(np.float32)
    questions = one_question_each(slots, tmp_path)
    model = AloeForVideoQuestionAnswering(
        AloeConfig(num_slots=N, slot_size=D, slot_context=1, **TINY | {"num_frames": 9})
    )
    whiten_projection(model, questions)
    video = torch.from_numpy(slots)
    read = (
        with_context(video, 1) @ model.slot_projection.weight[:, : 3 * D].detach().T
        + model.slot_projection.bias.detach()
    )
    read = read[:, 1:-1].flatten(0, 2)
    speed = torch.from_numpy(np.broadcast_to(speed[..., 0], (64, 7, N)).reshape(-1).astype(np.float32))
    solution = torch.linalg.lstsq(torch.cat([read, torch.ones(len(read), 1)], 1), speed[:, None]).solution[:-1]
    # a change of the speed by a standard deviation moves what is read by about as much as noise of size 1
    assert (speed.std() / solution.norm()) > 0.5


def test_structured_positions_tell_frames_and_slots_apart_and_near_frames_are_alike():
    torch.manual_seed(0)
    model = AloeForVideoQuestionAnswering(AloeConfig(num_slots=N, slot_size=D, **TINY | {"num_frames": 25}))
    structure_positions(model)
    table = model.position_embedding.detach()
    assert not table[0].any() and not table[1 + 25 * N :].any()
    table = table[1 : 1 + 25 * N].unflatten(0, (25, N))
    frames, slots = table.mean(1), table - table.mean(1, keepdim=True)
    torch.testing.assert_close(slots, slots[:1].expand_as(slots))  # the same in all frames
    distance = torch.cdist(frames, frames)
    assert (distance[0, 1:4].diff() > 0).all() and distance[0, 1] < 0.75 * distance[0, 12]
    assert distance[~torch.eye(25, dtype=torch.bool)].min() > 0.3 and torch.cdist(slots[0], slots[0])[0, 1] > 0.3


def test_grouped_by_video_every_question_comes_once_with_its_video(data):
    questions = dataset_of(data)
    grouped = QuestionsByVideo(questions)
    assert len(grouped) == len({scene["scene_index"] for scene in questions.scenes})
    for index, group in enumerate(grouped.groups):
        assert len(set(questions.episode[group].tolist())) == 1
        batch, expected = grouped.__getitems__([index]), questions.__getitems__(group)
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert sorted(np.concatenate(grouped.groups).tolist()) == list(range(len(questions)))
    both = grouped.__getitems__([1, 0])
    assert both["labels"].tolist() == [label for i in (1, 0) for label in grouped.__getitems__([i])["labels"].tolist()]


def test_a_copied_or_selected_dataset_gives_the_same_batches(data):
    questions = dataset_of(data)
    expected = questions.__getitems__([3, 8])
    for same in (
        copy.deepcopy(questions).__getitems__([3, 8]),  # through the same states as in a worker of a DataLoader
        questions.select([3, 8]).__getitems__([0, 1]),
    ):
        assert all(torch.equal(expected[name], same[name]) for name in expected)


def test_metrics_are_means_over_questions_and_options_whatever_the_batches(data):
    questions = dataset_of(data)
    torch.manual_seed(0)
    model = AloeForVideoQuestionAnswering(AloeConfig(num_slots=N, slot_size=D, **TINY)).eval()
    metric_fn = question_metrics(questions)
    totals = {}
    for first in range(0, len(questions), 7):
        indices = range(first, min(first + 7, len(questions)))
        with torch.no_grad():
            for name, value in metric_fn(model, questions.__getitems__(indices)).items():
                totals[name] = totals.get(name, 0) + float(value) * len(indices) / len(questions)
    with torch.no_grad():
        batch = questions.__getitems__(range(len(questions)))
        output = model(**{name: batch[name] for name in batch if name != "question_type"})
    solved, hits, kinds = [], [], []
    for index in range(len(questions)):
        rows = batch["question_index"] == index
        if "choices" in questions.questions[index]:
            hits.append(((output.option_logits[rows] > 0) == (batch["labels"][rows] == 1)).tolist())
        else:
            hits.append([output.answer_logits[rows][0, 1:].argmax() + 1 == batch["labels"][rows][0]])
        solved.append(all(hits[-1]))
        kinds.append(questions.questions[index]["question_type"])
    assert totals["accuracy"] == pytest.approx(np.mean(solved))
    for kind in ("descriptive", "predictive", "counterfactual"):
        of_kind = [index for index, name in enumerate(kinds) if name == kind]
        assert totals[f"{kind}_accuracy"] == pytest.approx(np.mean([solved[i] for i in of_kind]))
        if kind != "descriptive":
            options = np.concatenate([hits[i] for i in of_kind])
            assert totals[f"{kind}_option_accuracy"] == pytest.approx(options.mean())


def test_the_loss_function_is_the_models_loss(data):
    questions = dataset_of(data)
    model = AloeForVideoQuestionAnswering(AloeConfig(num_slots=N, slot_size=D, **TINY)).eval()
    loss, terms = question_loss(model, questions.__getitems__(range(6)))
    assert loss.item() == pytest.approx((terms["answer_loss"] + terms["option_loss"]).item())
    assert set(terms) == {"answer_loss", "option_loss"} and loss.requires_grad


# --- bad input -----------------------------------------------------------------------------------------------------


def test_questions_that_cannot_be_asked_name_their_scene(data):
    slots = load_slot_dataset(data / "slots", "validation")
    processor = AloeProcessor(num_frames=2, observed_frames=FRAMES)

    def with_question(**changes):
        scene = video(10000)[1]
        scene["questions"][2] |= changes
        return [scene]

    cases = [
        ({"question": "What will occur next?"}, "question 2 of video_10000: unknown word 'occur'"),
        ({"question_type": "odd"}, "question type 'odd'"),
        ({"choices": []}, "at least one"),
        ({"question": " ".join(["the"] * 21)}, "at most 20 fit"),
        ({"choices": [{"choice": "The cube", "answer": "maybe"}]}, "expected correct or wrong"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            QuestionDataset(slots, with_question(**changes), processor)
    scene = video(10000)[1]
    del scene["questions"][2]["choices"]
    with pytest.raises(ValueError, match="has no 'choices'"):
        QuestionDataset(slots, [scene], processor)
    with pytest.raises(ValueError, match="expected at least observed_frames=128"):
        QuestionDataset(slots, [video(10000)[1]], AloeProcessor())
    with pytest.raises(ValueError, match="its episodes are named video_10000"):
        QuestionDataset(slots, [video(77)[1]], processor)
    found = QuestionDataset(slots, [video(77)[1], video(10000)[1]], processor)
    assert found.missing_videos == ["video_00077"] and len(found) == 3


def test_training_refuses_unanswered_questions_and_contradictions(data, tmp_path):
    scenes = read(data / "train.json")
    del scenes[0]["questions"][0]["answer"]
    (tmp_path / "test.json").write_text(json.dumps(scenes))
    with pytest.raises(ValueError, match="without answers"):
        main(command(data, tmp_path / "x", "--questions", str(tmp_path / "test.json")))
    with pytest.raises(ValueError, match="num_slots=4, but the data have 3"):
        main(command(data, tmp_path / "x", "--num_slots", "4"))
    with pytest.raises(ValueError, match="expected all, or some of descriptive"):
        main(command(data, tmp_path / "x", "--question_types", "predictiv"))
    with pytest.raises(ValueError, match=r"hidden_size='wide'.* int"):
        main(command(data, tmp_path / "x", "--hidden_size", "wide"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid json"):
        main(command(data, tmp_path / "x", "--questions", str(tmp_path / "bad.json")))


def test_training_starts_from_a_given_model(data, tmp_path):
    source = AloeForVideoQuestionAnswering(AloeConfig(num_slots=N, slot_size=D, **TINY))
    source.save_pretrained(tmp_path / "source")
    AloeProcessor(num_frames=2, observed_frames=FRAMES).save_pretrained(tmp_path / "source")
    base = ["--dataset", "x", "--questions", "x", "--output_dir", "x", "--init_model", str(tmp_path / "source")]
    args = parse_arguments(AloeTrainArguments, base)[0]
    model, processor = build_model(args, {}, load_slot_dataset(data / "slots", "train"))
    assert torch.equal(model.layers[1].fc1.weight, source.layers[1].fc1.weight)
    assert processor.observed_frames == FRAMES
    with pytest.raises(ValueError, match="has num_hidden_layers=2, expected 3"):
        build_model(args, {"num_hidden_layers": 3}, load_slot_dataset(data / "slots", "train"))


# --- contacts ------------------------------------------------------------------------------------------------------

KINDS = [(color, shape) for color in ("red", "blue") for shape in ("cube", "sphere")]
ATTRIBUTES = {"color": ("red", "blue"), "shape": ("cube", "sphere")}
LENGTH, SLOTS, SIZE = 12, 4, 8


def touching_video(index: int) -> tuple[np.ndarray, dict]:
    """Three of four kinds of objects; two of them meet in most videos. Slots: presence, x, y, 0, kind."""
    rng = np.random.default_rng(index)
    kinds, places = rng.permutation(4)[:3], rng.permutation(SLOTS)[:3]
    meeting, frame = rng.permutation(3)[:2], int(rng.integers(3, 9))
    where = np.tile(np.array([[0, 0], [6, 0], [0, 6]]) + rng.uniform(-1, 1, (3, 2)), (LENGTH, 1, 1))
    collisions = []
    if index % 4:
        one, other = meeting
        away = np.abs(np.arange(LENGTH) - frame)[:, None] * [0.7, 0]
        where[:, one] = where[:, other] + [0.5, 0] + away
        collisions = [{"frame_id": frame, "object_ids": [int(one) + 10, int(other) + 10]}]
    slots = np.zeros((LENGTH, SLOTS, SIZE), np.float32)
    slots[:, places, 0], slots[:, places, 1:3] = 1, where
    slots[:, places, 4 + kinds] = 1
    annotation = {
        "scene_index": index,
        "video_filename": f"video_{index:05d}.mp4",
        "object_property": [
            {"object_id": k + 10, "color": KINDS[kind][0], "material": "metal", "shape": KINDS[kind][1]}
            for k, kind in enumerate(kinds)
        ],
        "motion_trajectory": [
            {
                "frame_id": t,
                "objects": [
                    {"object_id": k + 10, "inside_camera_view": True, "velocity": [0, 0, 0]} for k in range(3)
                ],
            }
            for t in range(LENGTH)
        ],
        "collision": collisions,
    }
    return slots, {"annotation": annotation, "places": places, "frame": frame, "meeting": meeting}


@pytest.fixture(scope="module")
def touching(tmp_path_factory):
    """Folder with `slots`, `annotations` and a probe of such videos, and one episode that is no video."""
    root = tmp_path_factory.mktemp("touching")
    splits, shown, present, labels = {"train": range(200), "validation": range(5000, 5040)}, [], [], []
    episodes = {}
    for split, numbers in splits.items():
        episodes[split] = []
        for index in numbers:
            slots, truth = touching_video(index)
            episodes[split].append({"episode_id": f"video_{index:05d}", "slots": slots})
            folder = root / "scenes" / "annotations" / split
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"annotation_{index:05d}.json").write_text(json.dumps(truth["annotation"]))
            shown.append(slots[0])
            present.append(slots[0, :, 0] > 0)
            labels.append(slots[0, :, 4:].argmax(-1))
    episodes["train"].append({"episode_id": "video_00001_question_3", "slots": touching_video(1)[0]})
    slots, present, labels = (torch.from_numpy(np.concatenate(x)) for x in (shown, present, labels))
    probe = SlotProbe.fit(
        slots, present=present, positions=slots[:, 1:3], labels={"color": labels // 2, "shape": labels % 2},
        attributes=ATTRIBUTES,
    )  # fmt: skip
    probe.save_pretrained(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        write_slot_dataset(root / "slots", episodes, frame_skip=1, encoder={"name": "hand-made"})
        yield root


def contacts_of(root, split="train", observed=LENGTH) -> tuple[SlotContacts, list[str]]:
    dataset = load_slot_dataset(root / "slots", split)
    contacts = SlotContacts(dataset, root / "scenes", split, SlotProbe.from_pretrained(root), observed)
    return contacts, dataset.data.with_format(None)["episode_id"]


def test_contacts_of_slots_are_those_of_the_annotated_objects(touching):
    contacts, names = contacts_of(touching)
    assert contacts.found == contacts.num_objects == 600
    for index in (1, 2, 8):
        truth = touching_video(index)[1]
        partner = contacts.partner[names.index(f"video_{index:05d}")]
        one, other = truth["places"][truth["meeting"]]
        empty = (set(range(SLOTS)) - set(truth["places"])).pop()
        expected = np.full((LENGTH, SLOTS), -1)
        expected[:, empty] = -2
        if index % 4:
            expected[truth["frame"], one], expected[truth["frame"], other] = other, one
        assert np.array_equal(partner, expected)
    # what is no annotated video, imagined for a question, tells nothing
    assert (contacts.partner[names.index("video_00001_question_3")] == -2).all()


def test_a_seen_frame_stands_for_the_contacts_until_the_next_one(touching):
    contacts, names = contacts_of(touching)
    truth = touching_video(1)[1]
    episode, frame = np.array([names.index("video_00001")]), truth["frame"]
    one, other = truth["places"][truth["meeting"]]
    labels = contacts.gather(episode, np.arange(0, LENGTH, 3)[None], 3)[0]
    touches = torch.zeros(4, dtype=torch.long)
    touches[frame // 3] = 1
    assert torch.equal(labels[:, one, 0], touches) and torch.equal(labels[:, other, 0], touches)
    kind = touching_video(1)[0][0, other, 4:].argmax()
    assert labels[frame // 3, one, 1:].tolist() == [kind // 2, kind % 2]
    assert (labels[..., 1:][labels[..., 0] != 1] == -1).all()
    # frames that come after those that were observed are unknown, also as part of a seen frame's time
    late, _ = contacts_of(touching, observed=frame)
    assert (late.gather(episode, np.array([[frame]]), 1) == -1).all()
    assert late.gather(episode, np.array([[frame - 1]]), 3)[0, 0, one, 0] == 0


def test_a_contact_with_an_object_that_was_not_found_counts_without_its_attributes(touching, tmp_path):
    slots, truth = touching_video(1)
    one, other = truth["places"][truth["meeting"]]
    slots[:, other] = 0  # the encoder has missed it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        write_slot_dataset(
            tmp_path / "slots", {"train": [{"episode_id": "video_00001", "slots": slots}]}, frame_skip=1,
            encoder={"name": "hand-made"},
        )  # fmt: skip
        dataset = load_slot_dataset(tmp_path / "slots", "train")
        contacts = SlotContacts(dataset, touching / "scenes", "train", SlotProbe.from_pretrained(touching), LENGTH)
    assert (contacts.found, contacts.num_objects) == (2, 3)
    labels = contacts.gather(np.array([0]), np.arange(LENGTH)[None], 1)[0]
    assert labels[truth["frame"], one].tolist() == [1, -1, -1]
    assert (labels[:, other] == -1).all()


def one_video(folder, slots, annotation, probe, name="video_00000") -> SlotContacts:
    (folder / "scenes" / "annotations" / "train").mkdir(parents=True)
    path = folder / "scenes" / "annotations" / "train" / "annotation_00000.json"
    path.write_text(json.dumps({**annotation, "scene_index": 0, "video_filename": "video_00000.mp4"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        write_slot_dataset(
            folder / "slots", {"train": [{"episode_id": name, "slots": slots}]}, frame_skip=1,
            encoder={"name": "hand-made"},
        )  # fmt: skip
        dataset = load_slot_dataset(folder / "slots", "train")
        return SlotContacts(dataset, folder / "scenes", "train", probe, len(slots), statements=True)


def test_of_several_contacts_in_the_time_of_a_frame_the_first_counts(touching, tmp_path):
    slots, truth = touching_video(1)
    annotation, places = truth["annotation"], truth["places"]
    annotation["collision"] = [
        {"frame_id": 4, "object_ids": [10, 11]}, {"frame_id": 5, "object_ids": [10, 12]},
    ]  # fmt: skip
    contacts = one_video(tmp_path, slots, annotation, SlotProbe.from_pretrained(touching))
    labels = contacts.gather(np.array([0]), np.array([[3, 5]]), 3)[0]
    for frame, other in ((0, places[1]), (1, places[2])):
        kind = slots[0, other, 4:].argmax()
        assert labels[frame, places[0]].tolist() == [1, kind // 2, kind % 2]


def test_objects_that_look_alike_and_frames_without_annotation_are_unknown(touching, tmp_path):
    slots, truth = touching_video(1)
    annotation, places = truth["annotation"], truth["places"]
    # the probe tells no material: two of the three are alike to it
    annotation["object_property"][1] |= annotation["object_property"][0] | {"object_id": 11, "material": "rubber"}
    slots[:, places[1], 4:] = slots[:, places[0], 4:]
    annotation["collision"] = [{"frame_id": 4, "object_ids": [10, 12]}]
    annotation["motion_trajectory"] = annotation["motion_trajectory"][:8]
    contacts = one_video(tmp_path, slots, annotation, SlotProbe.from_pretrained(touching))
    assert (contacts.found, contacts.num_objects) == (1, 3)
    assert (contacts.partner[0, :, places[:2]] == -2).all()
    assert contacts.partner[0, :, places[2]].tolist() == [-1] * 4 + [-3] + [-1] * 3 + [-2] * 4
    # to words they are alike in nothing: every pair is asked about; alike in all, they are left out
    (question,) = contacts.statements["video_00000"]
    assert len(question["choices"]) == 3
    annotation["object_property"][1]["material"] = "metal"
    contacts = one_video(tmp_path / "alike", slots, annotation, SlotProbe.from_pretrained(touching))
    assert contacts.statements == {"video_00000": []}


def test_statements_about_what_happens_next_are_about_observed_frames(touching):
    dataset, observed, future = load_slot_dataset(touching / "slots", "train"), LENGTH - 2, 4
    contacts = SlotContacts(
        dataset, touching / "scenes", "train", SlotProbe.from_pretrained(touching), observed, statements=True,
        num_future_frames=future,
    )  # fmt: skip
    frames = {index: touching_video(index)[1]["frame"] for index in range(200) if index % 4}
    asked = {int(name[-5:]) for name, made in contacts.statements.items() if len(made) == 2}
    assert asked == {index for index, frame in frames.items() if frame >= observed - future}
    index = min(asked)
    kinds = [question["question_type"] for question in contacts.statements[f"video_{index:05d}"]]
    assert kinds == ["explanatory", "predictive"]

    processor = AloeProcessor(num_frames=4, observed_frames=observed, min_imagined_frames=1)
    real = {"question_id": 0, "question": "What will happen next?", "question_type": "predictive"}
    real["choices"] = [{"choice_id": 0, "choice": "The red cube collides with the sphere", "answer": "correct"}]
    scene = {"scene_index": index, "video_filename": f"video_{index:05d}.mp4", "questions": [real]}
    questions = QuestionDataset(dataset, [with_statements(scene, contacts.statements)], processor)
    assert questions.first_frame.tolist() == [LENGTH - observed, 0, 0]  # imagined frames are for the real one alone


def contacts_command(root, output, *more: str) -> list[str]:
    words = f"--dataset {root}/slots --annotations {root}/scenes --slot_probe {root} --output_dir {output} "
    words += f"--observed_frames {LENGTH} --contacts_only true --batch_size 50 --max_steps 150 --learning_rate 3e-3 "
    words += "--warmup_steps 10 --eval_every 0 --eval_samples 0 --save_every 0 --use_cpu --whiten_slots true "
    words += "--video_attends_to_text false --slot_context 1 --slot_neighbors 1 --contact_layer 1 "
    words += " ".join(
        f"--{name} {value}" for name, value in {**TINY, **TEXT, "num_frames": 6, "max_choice_length": 12}.items()
    )
    return [*words.split(), *more]


def test_contacts_are_learned_and_questions_are_trained_from_there(touching, tmp_path):
    start = main(contacts_command(touching, tmp_path / "start", "--eval_every", "150"))
    assert start.metrics["contact_f1"] > 0.8 and start.metrics["other_loss"] < 0.3
    model = AloeForVideoQuestionAnswering.from_pretrained(tmp_path / "start")
    assert model.config.contact_attributes == [2, 2]
    probe = SlotProbe.from_pretrained(touching)
    assert torch.equal(model.slot_coordinates, probe.weight)
    assert "contacts in 200 annotated videos" in (tmp_path / "start" / "README.md").read_text()

    scenes = []
    for index in range(200):
        question = {"question_id": 0, "question": "How many collisions happen?", "question_type": "descriptive"}
        question["answer"] = str(int(index % 4 > 0))
        scenes.append({"scene_index": index, "video_filename": f"video_{index:05d}.mp4", "questions": [question]})
    (tmp_path / "train.json").write_text(json.dumps(scenes))
    words = f"--dataset {touching}/slots --annotations {touching}/scenes --slot_probe {touching} --use_cpu "
    words += f"--questions {tmp_path}/train.json --init_model {tmp_path}/start --output_dir {tmp_path}/model "
    words += "--max_steps 3 --batch_size 8 --eval_every 0 --save_every 1 --warmup_steps 1 --log_every 1 "
    words += "--group_by_video true --statements true"
    settings = read(tmp_path / "start" / "processor_config.json") | {"num_future_frames": 4}
    (tmp_path / "start" / "processor_config.json").write_text(json.dumps(settings))
    main(words.split())
    # what happens next is not asked beside questions about videos without imagined frames
    results = read(tmp_path / "model" / "training_results.json")
    assert results["training_questions"] == results["training_statements"] == 200
    alone = [str(tmp_path / "alone") if word == f"{tmp_path}/model" else word for word in words.split()]
    place = alone.index("--questions")
    alone = [*alone[:place], *alone[place + 2 :]]
    main(alone)
    results = read(tmp_path / "alone" / "training_results.json")
    late = sum(index % 4 > 0 and touching_video(index)[1]["frame"] >= LENGTH - 4 for index in range(200))
    assert (results["training_questions"], results["training_statements"]) == (0, 200 + late) and late
    # nor does a run go on with other questions about as many videos
    (tmp_path / "start" / "processor_config.json").write_text(json.dumps(settings | {"num_future_frames": 5}))
    with pytest.raises(ValueError, match="was trained with data_fingerprint="):
        main([*alone, "--max_steps", "4"])
    # a run does not go on without what it learned from
    kept = " ".join(words.replace("--max_steps 3", "--max_steps 4").split()).replace("--statements true", "")
    with pytest.raises(ValueError, match=r"contact_weight=0\.5, this run has 0\.0"):
        main(kept.replace(f"--annotations {touching}/scenes", "").split())
    AloeForVideoQuestionAnswering(
        AloeConfig(num_slots=SLOTS, slot_size=SIZE, **TINY | {"num_frames": 6})
    ).save_pretrained(tmp_path / "plain")
    AloeProcessor(num_frames=6, observed_frames=LENGTH).save_pretrained(tmp_path / "plain")
    with pytest.raises(
        ValueError, match=r"contact_attributes=None, but the probe tells attributes with \[2, 2\] values"
    ):
        main([*words.split(), "--init_model", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "x")])
    line = next(line for line in read_log(tmp_path / "model" / "log.jsonl") if "loss" in line)
    assert line["touch_loss"] < 0.2 and line["answer_loss"] > 0
    contact = 5 * line["touch_loss"] + 0.5 * line["other_loss"]
    assert line["loss"] == pytest.approx(line["answer_loss"] + line["option_loss"] + 0.5 * contact, rel=1e-4)


def test_learning_contacts_alone_leaves_what_answers_as_it_was(touching, tmp_path):
    models = []
    for steps in ("1", "5"):
        result = main(contacts_command(touching, tmp_path / steps, "--max_steps", steps, "--contact_layer", "1"))
        assert result.metrics["contact_f1"] >= 0  # at the end, as the validation split is annotated
        models.append(AloeForVideoQuestionAnswering.from_pretrained(tmp_path / steps).state_dict())
    changed = {name.split(".")[0] for name, value in models[0].items() if not torch.equal(value, models[1][name])}
    assert changed == {"slot_projection", "neighbors", "position_embedding", "layers", "contact_norm", "contact_head"}
    for name in models[0]:
        if name.startswith("layers.1."):
            assert torch.equal(models[0][name], models[1][name]), name
    card = (tmp_path / "5" / "README.md").read_text()
    assert "learned no answers yet" in card and "visual-question-answering" not in card


def test_contacts_that_cannot_be_learned_say_why(touching, data, tmp_path):
    for words, message in (
        (["--questions", "x"], "contacts_only asks no questions"),
        (["--annotations", str(data)], "no annotation of the split 'train'"),
        (["--slot_neighbors", "4"], "slot_neighbors=4 must be below num_slots=4"),
        (["--video_attends_to_text", "true"], "video_attends_to_text False"),
    ):
        with pytest.raises(ValueError, match=message):
            main(contacts_command(touching, tmp_path / "x", *words))
    base = ["--dataset", "x", "--output_dir", "x"]
    with pytest.raises(ValueError, match="give the slot_probe"):
        parse_arguments(AloeTrainArguments, [*base, "--questions", "x", "--annotations", "x"])
    with pytest.raises(ValueError, match="give questions to train on; or"):
        parse_arguments(AloeTrainArguments, base)
    with pytest.raises(ValueError, match="statements are made from annotations"):
        parse_arguments(AloeTrainArguments, [*base, "--statements", "true"])
    with pytest.raises(ValueError, match="contacts_only learns from annotations"):
        parse_arguments(AloeTrainArguments, [*base, "--contacts_only", "true"])
    with pytest.raises(ValueError, match="slot_neighbors=1: which slots are near is read by a probe"):
        main(command(data, tmp_path / "x", "--slot_neighbors", "1"))
    more = ["--annotations", "x", "--slot_probe", "x", "--statements", "true", "--question_types", "predictive"]
    parse_arguments(AloeTrainArguments, [*base, *more])
    with pytest.raises(ValueError, match="leaves statements out, which are explanatory"):
        parse_arguments(
            AloeTrainArguments,
            [
                *base,
                "--annotations",
                "x",
                "--slot_probe",
                "x",
                "--statements",
                "true",
                "--question_types",
                "descriptive, counterfactual",
            ],
        )
    with pytest.raises(ValueError, match="leave validation_questions out"):
        main(contacts_command(touching, tmp_path / "x", "--validation_questions", "x"))
    slots = torch.randn(64, SIZE)
    blind = dict(
        present=torch.arange(64) < 32, labels={"shape": torch.arange(64) % 2}, attributes={"shape": ("a", "b")}
    )
    SlotProbe.fit(slots, positions=slots[:, :2], **blind).save_pretrained(tmp_path / "blind")
    with pytest.raises(ValueError, match="none of 600 annotated objects is found"):
        main(contacts_command(touching, tmp_path / "x", "--slot_probe", str(tmp_path / "blind")))
    slots = torch.randn(64, SIZE + 1)
    SlotProbe.fit(slots, positions=slots[:, :2], **blind).save_pretrained(tmp_path / "other")
    for words in ([], ["--slot_neighbors", "0"]):
        with pytest.raises(ValueError, match=r"reads slots of size 9, those of .* have 8"):
            main(contacts_command(touching, tmp_path / "x", "--slot_probe", str(tmp_path / "other"), *words))
    good = touching_video(1)[1]["annotation"]
    for bad in (
        {"object_property": []},
        [1],
        good | {"collision": [{"frame_id": 3, "object_ids": [10, 11, 12]}]},
        good | {"collision": [{"frame_id": -3, "object_ids": [10, 11]}]},
        good | {"collision": [{"frame_id": 3, "object_ids": [10, 99]}]},
    ):
        (tmp_path / "annotation_00001.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=r"annotation_00001\.json: not an annotation of CLEVRER"):
            main(contacts_command(touching, tmp_path / "x", "--annotations", str(tmp_path)))


def test_videos_of_contacts_come_in_whole_batches(touching):
    contacts, names = contacts_of(touching)
    processor = AloeProcessor(num_frames=4, observed_frames=LENGTH)
    videos = ContactDataset(load_slot_dataset(touching / "slots", "train"), contacts, processor, random_start=False)
    assert len(videos) == 200  # not what was imagined
    batch = copy.deepcopy(videos).__getitems__([3, 1])
    assert "_slots" not in videos.__getstate__()  # views would go to workers as copies
    slots, _ = touching_video(int(names[int(videos.episodes[3])][-5:]))
    assert batch["slots"].shape == (2, 4, SLOTS, SIZE) and batch["contacts"].shape == (2, 4, SLOTS, 3)
    assert torch.equal(batch["slots"][0], torch.from_numpy(slots[1::3][:4]))
    episode = videos.episodes[[3]]
    assert torch.equal(batch["contacts"][:1], contacts.gather(episode, np.arange(1, LENGTH, 3)[None][:, :4], 3))
    drawn = ContactDataset(videos.dataset, contacts, processor, random_start=True)
    torch.manual_seed(0)
    starts = {
        next(k for k in range(3) if torch.equal(one["slots"][0], torch.from_numpy(slots[k::3][:4])))
        for one in (drawn.__getitems__([3]) for _ in range(20))
    }
    assert starts == {0, 1, 2}


def test_questions_about_the_future_bring_the_contacts_of_the_frames_that_they_see(touching):
    observed = LENGTH - 4
    contacts, names = contacts_of(touching, observed=observed)
    processor = AloeProcessor(num_frames=4, observed_frames=observed, min_imagined_frames=1)
    index = next(k for k in range(1, 40) if k % 4 and touching_video(k)[1]["frame"] in (5, 6))
    choices = [{"choice_id": 0, "choice": "The red cube collides with the sphere", "answer": "correct"}]
    scene = {"scene_index": index, "video_filename": f"video_{index:05d}.mp4"}
    scene["questions"] = [
        {"question_id": 0, "question": "What will happen next?", "question_type": "predictive", "choices": choices}
    ]
    questions = QuestionDataset(load_slot_dataset(touching / "slots", "train"), [scene], processor, contacts=contacts)
    batch = questions.__getitems__([0])
    frames = processor.frame_indices(LENGTH, "predictive")
    assert frames[0] >= 4 and (frames >= observed).any()
    episode = np.array([names.index(f"video_{index:05d}")])
    assert torch.equal(batch["contacts"], contacts.gather(episode, frames[None], processor.stride))
    assert (batch["contacts"][0, torch.from_numpy(frames >= observed)] == -1).all()
    assert (batch["contacts"][..., 0] == 1).any()
