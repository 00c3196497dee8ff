import json

import numpy as np
import pytest
import torch
from transformers import pipeline

from cjepa_hf import AloeConfig, AloeForVideoQuestionAnswering, AloeProcessor, CJepaConfig, CJepaModel, SlotProbe
from cjepa_hf.checkpoints import bundled_checkpoint
from cjepa_hf.cli import main
from cjepa_hf.data.clevrer import ClevrerFolder, load_questions, question_episode
from cjepa_hf.data.collect import collect_collisions
from cjepa_hf.data.extract import extract_slots
from cjepa_hf.data.slots import load_slot_dataset, write_slot_dataset
from cjepa_hf.data.state_slots import empty_slot, state_encoder, write_state_slots
from cjepa_hf.evaluation.clevrer import answer_questions
from cjepa_hf.question_videos import write_question_videos, write_true_question_videos
from cjepa_hf.training.aloe import QuestionDataset

N, D, T, SEEN, VIDEOS, MORE = 4, 16, 20, 5, 3, 8
OPTIONS = ["The red cube collides with the blue sphere", "The blue sphere and the blue cube collide"]
ATTRIBUTES = {"color": ("red", "blue"), "material": ("metal", "rubber"), "shape": ("cube", "sphere")}
CHOICES = [{"choice_id": i, "choice": text, "answer": "wrong"} for i, text in enumerate(OPTIONS)]
QUESTIONS = [
    {"question_id": 0, "question_type": "descriptive", "question": "How many collisions happen?", "answer": "1"},
    {"question_id": 1, "question_type": "predictive", "question": "What will happen next?", "choices": CHOICES},
    {"question_id": 2, "question_type": "counterfactual", "choices": CHOICES,
     "question": "Which event will happen if the red cube is removed?"},
    {"question_id": 3, "question_type": "counterfactual", "choices": CHOICES,
     "question": "What will happen without the blue cube?"},
    {"question_id": 4, "question_type": "counterfactual", "choices": CHOICES,
     "question": "What will happen without the red sphere?"},
]  # fmt: skip


def draw(seed):
    """Slots of a video: red cube, blue sphere that comes to it, blue cube from frame 14 on, nothing."""
    slots = 0.05 * torch.randn(T, N, D, generator=torch.Generator().manual_seed(seed)) + 2 * torch.eye(N, D)
    slots[:, :3, 4:6] = torch.tensor([[0.0, 0], [10.0, 0], [20.0, 0]])
    slots[:, 1, 4] -= torch.linspace(0, 8 + seed, T)
    slots[:14, 2] = slots[:, 3] = 0
    return slots


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Slots, questions about them, a world model with a probe beside it."""
    folder = tmp_path_factory.mktemp("question_videos")
    episodes = [{"episode_id": f"video_{i:05d}", "slots": draw(i).numpy()} for i in range(VIDEOS)]
    encoder = {"name": "drawn", "config_hash": "0"}
    write_slot_dataset(folder / "slots", {"train": episodes, "test": episodes[:2]}, frame_skip=2, encoder=encoder)
    (folder / "questions").mkdir()
    for split, count in (("train", VIDEOS), ("test", 2)):
        scenes = [
            {"scene_index": i, "video_filename": f"video_{i:05d}.mp4", "questions": QUESTIONS} for i in range(count)
        ]
        (folder / "questions" / f"{split}.json").write_text(json.dumps(scenes))
    torch.manual_seed(0)
    CJepaModel(
        CJepaConfig(
            num_slots=N, slot_size=D, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32,
            history_length=3, prediction_length=2, frame_skip=2,
        )
    ).save_pretrained(folder / "world")  # fmt: skip
    slots = draw(0)
    present = (slots != 0).any(-1)
    labels = {"color": [0, 1, 1, 0], "material": [0, 0, 1, 0], "shape": [0, 1, 0, 0]}
    SlotProbe.fit(
        slots.flatten(0, 1), present=present.flatten(), positions=slots.flatten(0, 1)[:, 4:6],
        labels={name: torch.tensor(values).expand(T, -1).flatten() for name, values in labels.items()},
        attributes=ATTRIBUTES, ridge=1e-6,
    ).save_pretrained(folder / "world")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def made(folder):
    main([
        "imagine", str(folder / "slots"), "--questions", str(folder), "--model", str(folder / "world"), "--output-dir",
        str(folder / "made"), "--num-frames", str(MORE), "--contact-distance", "3", "--device", "cpu", "--json",
    ])  # fmt: skip
    return folder / "made"


def test_an_aloe_sees_in_the_dataset_what_the_pipeline_shows_it(folder, made):
    torch.manual_seed(1)
    config = AloeConfig(
        num_slots=N, slot_size=D, num_frames=SEEN, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    aloe = AloeForVideoQuestionAnswering(config).eval()
    with torch.no_grad():
        aloe.position_embedding.normal_()
    processor = AloeProcessor(num_frames=SEEN, observed_frames=T, min_imagined_frames=4)
    ask = pipeline(
        "video-question-answering", model=aloe, processor=processor, world_model=folder / "world", device="cpu",
        probe=folder / "world",
    )  # fmt: skip
    data = load_slot_dataset(made, "train")
    scenes = load_questions(folder / "questions" / "train.json")
    for scene in scenes:
        scene["questions"] = scene["questions"][:4]
    given = answer_questions(aloe, QuestionDataset(data, scenes, processor), progress=False)
    for index, scene in enumerate(given):
        asked = [
            {
                "question": q["question"],
                "options": OPTIONS if "choices" in q else None,
                "question_type": q["question_type"],
            }
            for q in QUESTIONS[:4]
        ]
        shown = ask({"slots": draw(index), "questions": asked}, num_future_frames=MORE, contact_distance=3.0)
        assert shown[0]["answer"] == scene["questions"][0]["answer"]
        for found, expected in zip(scene["questions"][1:], shown[1:], strict=True):
            scores = torch.tensor([choice["score"] for choice in found["choices"]]).sigmoid()
            np.testing.assert_allclose(scores, expected["scores"], atol=1e-5)
        without = [shown[i]["scores"][0] for i in (2, 3)]
        assert abs(without[0] - without[1]) > 1e-3  # each without its own object


def test_a_model_trained_on_the_videos_knows_where_they_begin_to_be_imagined(made, folder):
    from cjepa_hf.training.aloe import main as train

    train([
        "--dataset", str(made), "--questions", str(folder / "questions" / "train.json"), "--output_dir",
        str(folder / "aloe"), "--max_steps", "1", "--batch_size", "2", "--group_by_video", "true",
        "--video_attends_to_text", "false", "--num_frames", str(SEEN), "--observed_frames", str(T), "--hidden_size", "16",
        "--num_hidden_layers", "1", "--num_attention_heads", "2", "--intermediate_size", "32",
    ])  # fmt: skip
    processor = AloeProcessor.from_pretrained(folder / "aloe")
    assert processor.contact_distance == 3.0 and processor.num_future_frames == MORE
    assert AloeForVideoQuestionAnswering.from_pretrained(folder / "aloe").config.video_attends_to_text is False
    ask = pipeline(
        "video-question-answering", model=AloeForVideoQuestionAnswering.from_pretrained(folder / "aloe"),
        processor=AloeProcessor.from_pretrained(folder / "aloe"), world_model=folder / "world", device="cpu",
        probe=folder / "world",
    )  # fmt: skip
    question = {"question": "What will happen without the red cube?", "options": OPTIONS}
    assert ask({"slots": draw(0), "question": "What will happen next?", "options": OPTIONS})["imagined_frames"]
    first = int((draw(0)[:, 1, 4] < 3).nonzero()[0])
    assert ask({"slots": draw(0), **question})["removed"]["branch"] == first
    assert ask({"slots": draw(0), **question}, branch="start")["removed"]["branch"] == 6  # 3 steps of 2 frames


def test_videos_are_named_extended_and_empty_where_an_object_is_gone(folder, made):
    data = load_slot_dataset(made, "train")
    assert data.data.with_format(None)["episode_id"] == [
        name
        for name in [f"video_{i:05d}" for i in range(VIDEOS)]
        + [question_episode(f"video_{i:05d}", q) for i in range(VIDEOS) for q in (2, 3)]
    ]
    assert data.lengths.tolist() == [T + MORE] * VIDEOS + [T] * 2 * VIDEOS
    slots = torch.as_tensor(np.asarray(data.data.with_format("numpy")[VIDEOS]["slots"]))
    probe = SlotProbe.from_pretrained(folder / "world")
    assert torch.allclose(slots[:, 0], probe.empty_slot.expand(T, -1))
    first = int((draw(0)[:, 1, 4] < 3).nonzero()[0])  # the sphere is near the cube
    assert 2 < first < T - 1 and torch.equal(slots[:first, 1], draw(0)[:first, 1])
    assert not torch.equal(slots[first, 1], draw(0)[first, 1])
    assert load_slot_dataset(made, "test").lengths.tolist() == [T + MORE] * 2 + [T] * 4


def test_questions_about_objects_that_are_not_there_are_listed_and_finished_folders_kept(folder, made):
    metadata = json.loads((made / "slot_dataset.json").read_text())
    assert [one["episode_id"] for one in metadata["skipped"] if one["split"] == "train"] == [
        question_episode(f"video_{i:05d}", 4) for i in range(VIDEOS)
    ]
    assert 'no object of the video fit "red sphere"' in metadata["skipped"][0]["reason"]
    # in training and evaluation they are left out, not asked about the video as it was
    questions = QuestionDataset(
        load_slot_dataset(made, "train"),
        load_questions(folder / "questions" / "train.json"),
        AloeProcessor(num_frames=SEEN, observed_frames=T, min_imagined_frames=4),
    )
    assert questions.missing_videos == [question_episode(f"video_{i:05d}", 4) for i in range(VIDEOS)]
    assert 4 not in [question["question_id"] for question in questions.questions]
    assert metadata["source"]["world_model"] == "world" and metadata["encoder"]["name"] == "drawn"
    before = (made / "slot_dataset.json").stat().st_mtime_ns
    parts = {
        "world_model": CJepaModel.from_pretrained(folder / "world"),
        "probe": SlotProbe.from_pretrained(folder / "world"),
        "world_model_name": "world",
        "num_future_frames": MORE,
        "progress": False,
    }
    write_question_videos(folder / "slots", folder, output_dir=made, contact_distance=3.0, **parts)
    assert (made / "slot_dataset.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="made with other arguments"):
        write_question_videos(folder / "slots", folder, output_dir=made, contact_distance=2.0, **parts)
    retrained = CJepaModel.from_pretrained(folder / "world")
    next(retrained.parameters()).data.add_(1)
    with pytest.raises(FileExistsError, match="made with other arguments"):
        write_question_videos(
            folder / "slots", folder, output_dir=made, contact_distance=3.0, **parts | {"world_model": retrained}
        )
    for wrong in ({"contact_distance": float("nan")}, {"num_future_frames": 0}, {"num_videos": {"train": -1}}):
        with pytest.raises(ValueError, match="must be a positive"):
            write_question_videos(
                folder / "slots", folder, output_dir=folder / "other", **parts | {"contact_distance": 3.0} | wrong
            )
    with pytest.raises(ValueError, match="splits are"):
        write_question_videos(
            folder / "slots", folder, output_dir=folder / "other", contact_distance=3.0, splits=["validation"], **parts
        )


def test_videos_without_questions_and_objects_that_look_empty_are_named(folder, tmp_path):
    parts = {
        "world_model": CJepaModel.from_pretrained(folder / "world"),
        "probe": SlotProbe.from_pretrained(folder / "world"),
        "contact_distance": 3.0,
        "progress": False,
    }
    slots = draw(0)
    slots[:, 3] = 1000  # beside it all others look empty
    for name, found in (("clip_1", draw(0)), ("video_00000", slots)):
        episodes = [{"episode_id": name, "slots": found.numpy()}]
        write_slot_dataset(
            tmp_path / name, {"train": episodes}, frame_skip=2, encoder={"name": "x", "config_hash": "0"}
        )
    with pytest.raises(ValueError, match="no question of the split 'train' is about clip_1"):
        write_question_videos(tmp_path / "clip_1", folder, output_dir=tmp_path / "a", **parts)
    made = write_question_videos(tmp_path / "video_00000", folder, output_dir=tmp_path / "b", **parts)
    skipped = json.loads((made / "slot_dataset.json").read_text())["skipped"]
    assert "looks empty in all frames" in skipped[0]["reason"]


def test_interrupted_it_goes_on_and_makes_the_same(folder, made, monkeypatch):
    arguments = [
        "imagine", str(folder / "slots"), "--questions", str(folder), "--model", str(folder / "world"), "--output-dir",
        str(folder / "again"), "--num-frames", str(MORE), "--contact-distance", "3", "--device", "cpu", "--json",
    ]  # fmt: skip
    import cjepa_hf.question_videos as module

    real, calls = module.remove_object, []

    def fail(*given, **more):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*given, **more)

    original = module.write_question_videos
    small = {"batch_size": 1, "frames_per_file": 40}
    monkeypatch.setattr(module, "write_question_videos", lambda *a, **k: original(*a, **k, **small))
    monkeypatch.setattr(module, "remove_object", fail)
    assert main(arguments) != 0 and len(calls) == 2
    monkeypatch.setattr(module, "remove_object", real)
    assert main(arguments) == 0
    for split in ("train", "test"):
        one, other = (load_slot_dataset(folder / name, split) for name in ("made", "again"))
        rows = {name: i for i, name in enumerate(other.data.with_format(None)["episode_id"])}
        for index, name in enumerate(one.data.with_format(None)["episode_id"]):
            found, expected = (
                data.data.with_format("numpy")[i]["slots"] for data, i in ((other, rows[name]), (one, index))
            )
            np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)
        assert len(rows) == len(one)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return collect_collisions(folder / "scenes", num_scenes={"test": 2}, seed=3, num_workers=1, progress=False)


def _episodes(folder):
    data = load_slot_dataset(folder, "test")
    names = data.data.with_format(None)["episode_id"]
    return {name: np.asarray(row["slots"]) for name, row in zip(names, data.data.with_format("numpy"), strict=True)}


def test_the_simulators_videos_go_on_from_what_was_seen_and_lack_one_object(scenes, tmp_path):
    write_state_slots(scenes, tmp_path / "slots", progress=False)
    command = ["imagine", str(tmp_path / "slots"), "--questions", str(scenes), "--output-dir", str(tmp_path / "true")]
    assert main([*command, "--model", "simulator", "--device", "cpu", "--json"]) == 0
    seen, true = _episodes(tmp_path / "slots"), _episodes(tmp_path / "true")
    folder, asked = ClevrerFolder(scenes), []
    probe = SlotProbe.from_pretrained(_fit_probe(tmp_path / "slots", tmp_path))
    for index, path in folder.files("predictions", "test").items():
        name, told = f"video_{index:05d}", json.loads(path.read_text())
        np.testing.assert_allclose(true[name][:128], seen[name], atol=1e-5)  # annotations are rounded
        assert len(true[name]) == 160
        (scene,) = [s for s in folder.questions("test") if s["scene_index"] == index]
        for question in scene["questions"]:
            if question["question_type"] != "counterfactual":
                continue
            video = true[question_episode(name, question["question_id"])]
            gone = [
                k for k in range(6) if (video[:, k] == empty_slot()).all() and (seen[name][:, k] != empty_slot()).any()
            ]
            assert len(gone) == 1 and len(video) == 128
            # the collector's own simulation, which answers come from, puts the others where this video has them
            (what_if,) = [p for p in told["predictions"] if p["what_if"] == gone[0]]
            asked.append(question)
            for moment in what_if["trajectory"]:
                if moment["frame_index"] >= 128:
                    continue
                found = probe.positions(torch.from_numpy(video[moment["frame_index"]]))
                present = (video[moment["frame_index"]] != empty_slot()).any(-1)
                places = sorted((o["x"], o["y"]) for o in moment["objects"] if abs(o["x"]) < 3 and abs(o["y"]) < 2)
                np.testing.assert_allclose(sorted(found[present].tolist()), places, atol=1e-3)
    assert asked
    processor = AloeProcessor(num_frames=25, observed_frames=128, min_imagined_frames=4)
    questions = QuestionDataset(load_slot_dataset(tmp_path / "true", "test"), folder.questions("test"), processor)
    assert not questions.missing_videos


def _fit_probe(slots, folder):
    """Reads positions exactly: true states are linear in their slots."""
    data = load_slot_dataset(slots, "test").data.with_format("numpy")
    seen = torch.from_numpy(np.concatenate([np.asarray(row["slots"]) for row in data])).flatten(0, 1)
    states = torch.from_numpy(np.concatenate([np.asarray(row["state"]) for row in data])).unflatten(-1, (6, -1))
    present = (seen != torch.from_numpy(empty_slot())).any(-1)
    SlotProbe.fit(
        seen, present=present, positions=states[..., 1:3].flatten(0, 1).float(), labels={}, attributes={}, ridge=1e-9
    ).save_pretrained(folder / "probe")
    return folder / "probe"


def test_the_simulators_videos_are_seen_by_the_datasets_own_encoder(scenes, tmp_path):
    encoder = str(bundled_checkpoint("collisions"))
    extract_slots(scenes, encoder, tmp_path / "slots", num_frames=128, device="cpu", progress=False)
    with pytest.raises(ValueError, match="give that encoder"):
        write_true_question_videos(tmp_path / "slots", scenes, tmp_path / "true", progress=False)
    with pytest.raises(ValueError, match="config_hash differs"):
        write_true_question_videos(
            tmp_path / "slots", scenes, tmp_path / "true", encoder=str(bundled_checkpoint()), progress=False
        )
    write_true_question_videos(
        tmp_path / "slots",
        scenes,
        tmp_path / "true",
        encoder=encoder,
        num_future_frames=4,
        device="cpu",
        progress=False,
    )
    seen, true = _episodes(tmp_path / "slots"), _episodes(tmp_path / "true")
    for name, slots in seen.items():
        np.testing.assert_allclose(true[name][:128], slots, atol=1e-5)
        assert len(true[name]) == 132
    assert len(true) > len(seen)


def test_other_scenes_than_those_of_the_slots_are_refused_and_nothing_is_left(scenes, tmp_path):
    other = collect_collisions(tmp_path / "other", num_scenes={"test": 2}, seed=4, num_workers=1, progress=False)
    write_state_slots(other, tmp_path / "slots", progress=False)
    with pytest.raises(ValueError, match="slots of video_00000 differ by up to"):
        write_true_question_videos(tmp_path / "slots", scenes, tmp_path / "true", progress=False)
    with pytest.raises(ValueError, match="num_videos names train: expected some of test"):
        write_true_question_videos(
            tmp_path / "slots", other, tmp_path / "true", num_videos={"train": 1}, progress=False
        )
    write_true_question_videos(tmp_path / "slots", other, tmp_path / "true", progress=False)
    drawn = load_slot_dataset(tmp_path / "slots", "test").data.with_format("numpy")
    episodes = [{"episode_id": row["episode_id"], "slots": np.asarray(row["slots"])[:64]} for row in drawn]
    write_slot_dataset(tmp_path / "short", {"test": episodes}, frame_skip=4, encoder=state_encoder())
    with pytest.raises(ValueError, match="has 64 frames: expected 128"):
        write_true_question_videos(tmp_path / "short", other, tmp_path / "false", progress=False)


def test_what_the_simulator_did_not_make_it_does_not_continue(folder, tmp_path):
    with pytest.raises(ValueError, match="give that encoder"):
        write_true_question_videos(folder / "slots", folder, tmp_path / "true", progress=False)
    with pytest.raises(ValueError, match="give that encoder"):
        write_true_question_videos(folder / "slots", folder, tmp_path / "true", encoder="state", progress=False)
    episodes = [{"episode_id": "video_00000", "slots": np.zeros((128, 6, 64), np.float32)}]
    write_slot_dataset(tmp_path / "slots", {"train": episodes}, frame_skip=4, encoder=state_encoder())
    with pytest.raises(ValueError, match="no file of predictions for video_00000"):
        write_true_question_videos(tmp_path / "slots", folder, tmp_path / "true", progress=False)
