"""Frames to slots, with small encoders that are easy to foresee."""

import json
import os
import signal
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import Array2D, Array4D, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PilImage
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from cjepa_hf.data.extract import extract_slots
from cjepa_hf.data.slots import METADATA_FILE, SlotWindows, load_slot_dataset
from cjepa_hf.models.color_isa import ColorIsaConfig, ColorIsaImageProcessor, ColorIsaModel
from cjepa_hf.simulators.rendering import render_push_t

# as `import cjepa_hf` does
AutoConfig.register("color-isa", ColorIsaConfig, exist_ok=True)
AutoModel.register(ColorIsaConfig, ColorIsaModel, exist_ok=True)
AutoImageProcessor.register(ColorIsaConfig, ColorIsaImageProcessor, exist_ok=True)

N, D = 4, 8
SILENT = {"progress": False, "frames_per_file": 30}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class Encoder(torch.nn.Module):
    """A fixed random projection of the 8 x 8 thumbnail; with memory, slots are running means from a random start."""

    def __init__(self, memoryless=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.projection = torch.nn.Parameter(torch.randn(3 * 64, N * D, generator=generator))
        self.memoryless, self.batches, self.after = memoryless, [], lambda encoder, slots: slots

    def forward(self, pixel_values):
        self.batches.append(tuple(pixel_values.shape[:2]))
        assert not torch.is_grad_enabled() and pixel_values.min() >= 0 and pixel_values.max() <= 1
        small = torch.nn.functional.adaptive_avg_pool2d(pixel_values.flatten(0, 1), 8).flatten(1)
        slots = (small @ self.projection).view(*pixel_values.shape[:2], N, D)
        if not self.memoryless:
            slots = torch.cat([torch.randn(len(slots), 1, N, D), slots], dim=1).cumsum(1)[:, 1:]
        return SimpleNamespace(slots=self.after(self, slots))


def rows(lengths, *, seed=0, kind="state", prefix="e"):
    random = np.random.default_rng(seed)
    result = []
    for number, length in enumerate(lengths):
        state = random.uniform([50] * 4 + [0, -9, -9], [450] * 4 + [6, 9, 9], (length, 7)).astype(np.float32)
        row = {
            "episode_id": f"{prefix}{number}",
            "actions": random.uniform(-1, 1, (length, 2)).astype(np.float32),
            "proprio": state[:, [0, 1, 5, 6]],
            "state": state,
            "contacts": random.random((length, 3)) < 0.3,
        }
        row["actions"][-1] = np.nan
        if kind != "state":
            frames = render_push_t(state, resolution=16)
            row["frames"] = frames if kind == "array" else [PilImage.fromarray(f) for f in frames]
        result.append(row)
    return result


def dataset(rows):
    features = {
        "episode_id": Value("string"),
        "actions": Array2D((None, 2), "float32"),
        "proprio": Array2D((None, 4), "float32"),
        "state": Array2D((None, 7), "float32"),
        "contacts": Array2D((None, 3), "bool"),
    }
    if "frames" in rows[0]:
        is_list = isinstance(rows[0]["frames"], list)
        features["frames"] = List(Image()) if is_list else Array4D((None, 16, 16, 3), "uint8")
    return Dataset.from_dict({k: [row[k] for row in rows] for k in features}, features=Features(features))


def collected(folder, train, validation=(), simulator="push_t"):
    """A folder as a collection leaves it."""
    (folder / "data").mkdir(parents=True)
    dataset(train).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    if validation:
        dataset(validation).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    collection = {"simulator": simulator, "units": {"position": "px"}, "fps": 10}
    (folder / "collection.json").write_text(json.dumps(collection))
    return folder


def expected_slots(row, resolution=64):
    frames = row["frames"] if "frames" in row else render_push_t(row["state"], resolution=resolution)
    pixels = torch.from_numpy(np.stack([np.asarray(f) for f in frames])).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        return Encoder()(pixels[None]).slots[0].numpy()


def read(folder, split="train"):
    return list(load_slot_dataset(folder, split).data.with_format("numpy"))


LENGTHS = [22, 5, 31, 9, 24]


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
def test_states_are_drawn_and_encoded_in_even_batches_across_episodes(tmp_path, batch_size):
    train, validation = rows(LENGTHS), rows([21, 23], seed=1, prefix="v")
    source, encoder = collected(tmp_path / "source", train, validation), Encoder()
    folder = extract_slots(source, encoder, tmp_path / "slots", batch_size=batch_size, **SILENT)
    total = sum(LENGTHS)
    sizes = [b for b, _ in encoder.batches]
    assert sizes[: total // batch_size] == [batch_size] * (total // batch_size) and sum(sizes) == total + 44
    for split, originals in (("train", train), ("validation", validation)):
        found = read(folder, split)
        assert [row["episode_id"] for row in found] == [row["episode_id"] for row in originals]
        for row, original in zip(found, originals):
            np.testing.assert_allclose(row["slots"], expected_slots(original), atol=1e-4)
            for column in ("actions", "proprio", "state", "contacts"):
                np.testing.assert_array_equal(row[column], original[column])
    loaded = load_slot_dataset(folder)
    assert loaded.metadata["fps"] == 10 and loaded.metadata["units"] == {"position": "px"}
    assert loaded.metadata["encoder"]["name"] == "Encoder" and loaded.metadata["source"]["name"] == "source"
    assert SlotWindows(loaded)[0]["actions"].shape == (4, 10)
    assert str(tmp_path) not in (folder / METADATA_FILE).read_text()


@pytest.mark.parametrize("kind", ["png", "array"])
def test_stored_frames_are_used(tmp_path, kind):
    train = rows([21, 6], kind=kind)
    folder = extract_slots(DatasetDict(train=dataset(train)), Encoder(), tmp_path / "slots", **SILENT)
    for row, original in zip(read(folder), train, strict=True):
        np.testing.assert_allclose(row["slots"], expected_slots(original), atol=1e-4)


def test_an_encoder_with_memory_gets_whole_episodes_and_the_same_start_each_time(tmp_path):
    source = DatasetDict(train=dataset(rows(LENGTHS, kind="array")))
    encoder = Encoder(memoryless=False)
    first = read(extract_slots(source, encoder, tmp_path / "a", **SILENT))
    assert encoder.batches == [(1, length) for length in LENGTHS]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    source["train"] = source["train"].select([3, 2])
    second = read(extract_slots(source, encoder, tmp_path / "b", **SILENT))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are left alone
    np.testing.assert_array_equal(second[0]["slots"], first[3]["slots"])
    np.testing.assert_array_equal(second[1]["slots"], first[2]["slots"])


def test_a_killed_extraction_goes_on_without_encoding_finished_files_again(tmp_path):
    source = collected(tmp_path / "source", rows(LENGTHS))
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a forked process has none of its parent's threads
        dying = Encoder()
        dying.after = lambda encoder, slots: (
            slots if len(encoder.batches) < 7 else os.kill(os.getpid(), signal.SIGKILL)
        )
        extract_slots(source, dying, tmp_path / "slots", batch_size=10, **SILENT)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with pytest.raises(ValueError, match="is incomplete: its extraction was interrupted"):
        load_slot_dataset(tmp_path / "slots")
    with pytest.raises(ValueError, match=r"made with other arguments .*num_frames"):
        extract_slots(source, Encoder(), tmp_path / "slots", num_frames=30, **SILENT)
    other = Encoder()
    other.projection.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"made with other arguments .*weights_hash"):
        extract_slots(source, other, tmp_path / "slots", **SILENT)
    encoder = Encoder()
    folder = extract_slots(source, encoder, tmp_path / "slots", batch_size=10, **SILENT)
    # the first three episodes (58 frames) were in finished files
    assert sum(b for b, _ in encoder.batches) == sum(LENGTHS[3:])
    whole = extract_slots(source, Encoder(), tmp_path / "whole", batch_size=10, **SILENT)
    for one, other in zip(read(folder), read(whole), strict=True):
        assert one["episode_id"] == other["episode_id"]
        np.testing.assert_allclose(one["slots"], other["slots"], atol=1e-4)
    again = Encoder()
    assert extract_slots(source, again, folder, **SILENT) == folder and not again.batches
    with pytest.raises(FileExistsError, match="is a finished dataset"):
        extract_slots(source, Encoder(), folder, frame_skip=2, **SILENT)


def test_damaged_episodes_are_left_out_by_name(tmp_path, caplog):
    train = rows([21] * 5)
    train[1]["state"][4] = np.nan
    train[3]["actions"] = train[3]["actions"][:-1]
    source, encoder = collected(tmp_path / "source", train), Encoder()
    encoder.after = lambda encoder, slots: slots.masked_fill(
        (torch.arange(sum(b for b, _ in encoder.batches)) == 45)[-len(slots) :].view(-1, 1, 1, 1), torch.inf
    )  # the 46th good frame: in the third good episode, e4
    folder = extract_slots(source, encoder, tmp_path / "slots", **SILENT)
    assert [row["episode_id"] for row in read(folder)] == ["e0", "e2"]
    skipped = json.loads((folder / METADATA_FILE).read_text())["skipped"]
    reasons = {s["episode_id"]: s["reason"] for s in skipped}
    assert set(reasons) == {"e1", "e3", "e4"}
    assert "state is not finite at frame 4" in reasons["e1"]
    assert "actions has the shape (20, 2) for 21 frames" in reasons["e3"]
    assert "slots are not finite" in reasons["e4"]
    (message,) = [r.getMessage() for r in caplog.records if "damaged" in r.message]
    assert "3 damaged episodes of source" in message and all(f"'{name}'" in message for name in reasons)


def test_broken_pictures_are_named(tmp_path):
    train = rows([21, 22, 23], kind="png")
    data = dataset(train)
    table = data.cast_column("frames", List(Image(decode=False)))[:]
    table["frames"][1][7]["bytes"] = table["frames"][1][7]["bytes"][:60]
    damaged = Dataset.from_dict(table, features=data.features)
    folder = extract_slots(DatasetDict(train=damaged), Encoder(), tmp_path / "slots", **SILENT)
    assert [row["episode_id"] for row in read(folder)] == ["e0", "e2"]
    assert load_slot_dataset(folder).metadata["skipped"][0]["episode_id"] == "e1"


def test_a_source_without_any_usable_episode_is_an_error_that_says_why(tmp_path):
    train = rows([21, 22])
    for row in train:
        row["state"][0] = np.nan
    with pytest.raises(ValueError, match=r"none of the 2 episodes of split 'train' .* 'e0': .*not finite at frame 0"):
        extract_slots(collected(tmp_path / "source", train), Encoder(), tmp_path / "slots", **SILENT)
    with pytest.raises(ValueError, match="is incomplete"):
        load_slot_dataset(tmp_path / "slots")


def test_num_frames_splits_and_dtype(tmp_path):
    source = collected(tmp_path / "source", rows(LENGTHS), rows([25], seed=1))
    arguments = {"splits": ["train"], "num_frames": 25, "dtype": "float16", "frame_skip": 2, **SILENT}
    folder = extract_slots(source, Encoder(), tmp_path / "slots", **arguments)
    loaded = load_slot_dataset(folder)
    assert loaded.lengths.tolist() == LENGTHS[:2] and loaded.metadata["splits"].keys() == {"train"}
    assert loaded.data.features["slots"].dtype == "float16" and loaded.frame_skip == 2


def test_an_image_processor_and_render_options_are_used(tmp_path):
    train = rows([21])
    source = collected(tmp_path / "source", train)

    def processor(frames, return_tensors):
        assert return_tensors == "pt" and frames.shape == (21, 32, 32, 3) and frames.dtype == np.uint8
        return {"pixel_values": torch.from_numpy(frames[:, ::2, ::2]).permute(0, 3, 1, 2) / 255}

    options = {"render_resolution": 32, "render_options": {"goal_pose": None}, "image_processor": processor}
    (row,) = read(extract_slots(source, Encoder(), tmp_path / "slots", **options, **SILENT))
    frames = render_push_t(train[0]["state"], resolution=32, goal_pose=None)[:, ::2, ::2]
    np.testing.assert_allclose(row["slots"], expected_slots({"frames": frames}), atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.remove_columns(["state"]), "it needs 'frames' or 'images'"),
        (lambda d: d, "its states cannot be drawn"),
        (lambda d: d.add_column("frames", [0] * len(d)), "must hold one list of frames per episode"),
        (
            lambda d: d.remove_columns("episode_id").add_column("episode_id", ["x"] * len(d)),
            "'x' occurs more than once",
        ),
    ],
)
def test_unusable_sources_are_refused_before_anything_is_written(tmp_path, change, message):
    kind = "png" if "occurs" in message else "state"
    source = DatasetDict(train=change(dataset(rows([21, 22], kind=kind))))
    with pytest.raises(ValueError, match=message):
        extract_slots(source, Encoder(), tmp_path / "slots", **SILENT)
    assert not (tmp_path / "slots").exists()


def test_channels_first_frames_are_refused(tmp_path):
    frames = [np.zeros((3, 3, 16, 16), np.uint8)]
    features = Features({"frames": Array4D((None, 3, 16, 16), "uint8")})
    source = DatasetDict(train=Dataset.from_dict({"frames": frames}, features=features))
    with pytest.raises(ValueError, match=r"frames must be \[T, H, W, 3\], RGB"):
        extract_slots(source, Encoder(), tmp_path / "slots", **SILENT)


def test_frames_of_another_size_than_the_encoder_takes_are_refused(tmp_path):
    encoder = Encoder()
    encoder.config = SimpleNamespace(image_size=64)
    source = collected(tmp_path / "source", rows([21]))
    with pytest.raises(
        ValueError, match=r"frames are 32 x 32 pixels, the encoder takes 64 x 64: .*render_resolution=64"
    ):
        extract_slots(source, encoder, tmp_path / "slots", render_resolution=32, **SILENT)


def test_places_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        extract_slots(tmp_path / "nothing", Encoder(), tmp_path / "slots", **SILENT)
    source = collected(tmp_path / "source", rows([21]))
    with pytest.raises(ValueError, match=r"no split \['test'\]; it has \['train'\]"):
        extract_slots(source, Encoder(), tmp_path / "slots", splits=["test"], **SILENT)
    (source / "collection.json").rename(source / ".collecting")
    with pytest.raises(ValueError, match="is an interrupted collection"):
        extract_slots(source, Encoder(), tmp_path / "slots", **SILENT)


def test_a_saved_encoder_is_loaded_with_its_image_processor(tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "stem_channels": 8, "mlp_size": 16, "decoder_hidden_size": 16}
    model = ColorIsaModel(ColorIsaConfig(image_size=32, slot_size=12, **small)).eval()
    processor = ColorIsaImageProcessor(size=32)
    model.save_pretrained(tmp_path / "my-encoder")
    processor.save_pretrained(tmp_path / "my-encoder")
    train = rows([21, 6], kind="array")
    source = DatasetDict(train=dataset(train))
    folder = extract_slots(source, tmp_path / "my-encoder", tmp_path / "slots", batch_size=8, device="cpu", **SILENT)
    for row, original in zip(read(folder), train, strict=True):
        with torch.no_grad():
            expected = model(**processor(original["frames"])).slots
        np.testing.assert_allclose(row["slots"], expected, atol=1e-4)
    encoder = load_slot_dataset(folder).metadata["encoder"]
    assert encoder["name"] == "my-encoder" and encoder["config_hash"] and encoder["image_processor"]
