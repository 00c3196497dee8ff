"""Frames to slots, with small encoders that are easy to foresee."""

import json
import os
import signal
import zlib
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import Array2D, Array4D, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PilImage
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from cjepa_hf.data.extract import drawn_size, extract_slots, open_encoder
from cjepa_hf.data.slots import METADATA_FILE, SlotWindows, load_slot_dataset
from cjepa_hf.models.color_isa import ColorIsaConfig, ColorIsaImageProcessor, ColorIsaModel
from cjepa_hf.models.videosaur import VideoSaurConfig, VideoSaurImageProcessor, VideoSaurModel
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
    folder = extract_slots(source, encoder, tmp_path / "slots", batch_size=batch_size, progress=False)
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


@pytest.mark.parametrize("size", [None, 64, 96])
def test_frames_are_drawn_as_large_as_the_encoder_takes_them(tmp_path, size):
    train = rows([6])
    source, encoder = collected(tmp_path / "source", train), Encoder()
    if size:
        encoder.config = SimpleNamespace(image_size=size)
    folder = extract_slots(source, encoder, tmp_path / "slots", **SILENT)
    (row,) = read(folder)
    np.testing.assert_allclose(row["slots"], expected_slots(train[0], size or 64), atol=1e-4)
    assert json.loads((folder / METADATA_FILE).read_text())["source"]["render"]["resolution"] == (size or 64)
    # what was drawn is what counts when it goes on, not how it was asked for
    again = Encoder()
    again.config = getattr(encoder, "config", None)
    extract_slots(source, again, folder, render_resolution=size or 64, **SILENT)
    assert not again.batches
    with pytest.raises(FileExistsError, match="is a finished dataset"):
        extract_slots(source, again, folder, render_resolution=32, **SILENT)


def test_a_world_model_draws_what_its_encoder_takes():
    encoder = SimpleNamespace(config=SimpleNamespace(image_size=48))
    assert drawn_size(SimpleNamespace(slot_encoder=encoder, config=SimpleNamespace(image_size=8))) == 48
    assert drawn_size(SimpleNamespace(slot_encoder=None)) == drawn_size(None) == 64


def test_a_model_that_is_no_slot_encoder_is_named(tmp_path):
    class Flat(Encoder):  # images, as most vision models take
        def forward(self, pixel_values):
            _, _, height, width = pixel_values.shape  # a ValueError of videos
            return SimpleNamespace(slots=torch.zeros(height, width))

    class Dull(Encoder):
        def forward(self, pixel_values):
            return SimpleNamespace(last_hidden_state=pixel_values)

    source = collected(tmp_path / "source", rows([6]))
    with pytest.raises(
        ValueError, match=r"Flat does not take pixel_values \(6, 1, 3, 64, 64\) .*returns slots \[6, 1"
    ):
        extract_slots(source, Flat(), tmp_path / "flat", **SILENT)
    with pytest.raises(ValueError, match=r"returned no slots for pixel_values .*expected slots \[6, 1, N, D\]"):
        extract_slots(source, Dull(), tmp_path / "dull", **SILENT)
    for wrong in ("num_frames", "num_videos", "render_resolution"):
        with pytest.raises(ValueError, match=f"{wrong} must be at least 1"):
            extract_slots(source, Encoder(), tmp_path / "none", **{wrong: 0}, **SILENT)
    assert not (tmp_path / "none").exists()


def test_an_encoder_that_fails_at_once_leaves_the_folder_to_another(tmp_path, monkeypatch, caplog):
    def dull():
        encoder = Encoder()
        encoder.after = lambda encoder, slots: slots if len(encoder.batches) < 3 else None
        return encoder

    source, output = collected(tmp_path / "source", rows([20, 21, 22])), tmp_path / "slots"
    with pytest.raises(ValueError, match="returned no slots"):
        extract_slots(source, dull(), output, batch_size=10, progress=False)
    assert not list(output.iterdir())
    with pytest.raises(ValueError, match="returned no slots"):
        extract_slots(source, dull(), output, batch_size=10, progress=False, frames_per_file=1)
    with pytest.raises(ValueError, match="made with other arguments"):  # a file is finished: nothing is lost
        extract_slots(source, Encoder(), output, **SILENT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="returned no slots"):
        extract_slots(source, dull(), tmp_path / "two", batch_size=10, progress=False)
    assert f"remove {tmp_path / 'two' / '.partial'} first" in caplog.text and (tmp_path / "two" / ".partial").is_dir()


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


def test_an_encoder_saved_without_an_image_processor_gets_the_one_of_its_kind(tmp_path):
    source = DatasetDict(train=dataset(rows([6], kind="array")))
    backbone = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    model = VideoSaurModel(VideoSaurConfig(image_size=16, slot_size=8, renderer_size=8, backbone_config=backbone))
    model.save_pretrained(tmp_path / "encoder")
    _, processor, _ = open_encoder(tmp_path / "encoder", None, None, None)
    assert processor.to_dict() == VideoSaurImageProcessor(size=16).to_dict()
    (row,) = read(extract_slots(source, tmp_path / "encoder", tmp_path / "slots", **SILENT))
    processor.save_pretrained(tmp_path / "encoder")
    (expected,) = read(extract_slots(source, tmp_path / "encoder", tmp_path / "expected", **SILENT))
    np.testing.assert_array_equal(row["slots"], expected["slots"])


class Seeded(torch.nn.Module):
    """Slots are running sums that start from a seed; the rest as [`Encoder`]."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.projection = torch.nn.Parameter(torch.randn(3 * 64, N * D, generator=generator))
        self.batches = []

    def forward(self, pixel_values, seeds=None, state=None):
        assert (seeds is None) != (state is None)
        self.batches.append(tuple(pixel_values.shape[:2]))
        small = torch.nn.functional.adaptive_avg_pool2d(pixel_values.flatten(0, 1), 8).flatten(1)
        slots = (small @ self.projection).view(*pixel_values.shape[:2], N, D)
        if state is None:
            state = torch.stack([torch.randn(N, D, generator=torch.Generator().manual_seed(s)) for s in seeds])
        slots = torch.cat([state[:, None], slots], dim=1).cumsum(1)[:, 1:]
        return SimpleNamespace(slots=slots, state=slots[:, -1])


@pytest.mark.parametrize("batch_size, num_videos", [(12, 2), (64, 8), (1, 1)])
def test_an_encoder_with_seeds_and_state_goes_through_videos_side_by_side(tmp_path, batch_size, num_videos):
    train = rows(LENGTHS, kind="array")
    source, encoder = DatasetDict(train=dataset(train)), Seeded()
    sizes = {"batch_size": batch_size, "num_videos": num_videos}
    folder = extract_slots(source, encoder, tmp_path / "slots", **sizes, progress=False)
    assert max(b for b, _ in encoder.batches) == min(num_videos, 5)
    assert max(t for _, t in encoder.batches) <= batch_size // num_videos
    for row, original in zip(read(folder), train, strict=True):
        pixels = torch.from_numpy(original["frames"]).permute(0, 3, 1, 2)[None] / 255
        with torch.no_grad():
            expected = Seeded()(pixels, seeds=[zlib.crc32(f"0 {row['episode_id']}".encode())]).slots[0]
        np.testing.assert_allclose(row["slots"], expected, atol=1e-3)
    other = read(extract_slots(source, encoder, tmp_path / "other", seed=1, **sizes, progress=False))
    assert np.abs(other[0]["slots"][0] - read(folder)[0]["slots"][0]).max() > 0.1


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "data").glob("*.parquet"))}


@pytest.mark.parametrize("make", [Encoder, Seeded])
def test_several_processes_write_the_same_files_as_one(tmp_path, make):
    train, validation = rows([*LENGTHS, 30, 30, 7]), rows([21, 23, 40], seed=1, prefix="v")
    train[1]["state"][4] = np.nan
    source = collected(tmp_path / "source", train, validation)
    one = extract_slots(source, make(), tmp_path / "one", batch_size=10, **SILENT)
    load_slot_dataset(one)  # both processes find the cache made
    children = []
    for rank in (1, 0):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            torch.set_num_threads(1)
            os.environ.update(RANK=str(rank), WORLD_SIZE="2")
            try:
                encoder = make()
                extract_slots(source, encoder, tmp_path / "two", batch_size=10, **SILENT)
                (tmp_path / f"rank{rank}").write_text(str(sum(b * t for b, t in encoder.batches)))
            finally:
                os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert bytes_of(tmp_path / "two") == bytes_of(one) and len(bytes_of(one)) == 7
    assert (tmp_path / "two" / METADATA_FILE).read_text() == (one / METADATA_FILE).read_text()
    assert all(int((tmp_path / f"rank{rank}").read_text()) > 0 for rank in (0, 1))


def test_another_source_of_equal_lengths_is_noticed(tmp_path):
    first = collected(tmp_path / "x" / "source", rows(LENGTHS))
    encoder = Encoder()
    encoder.after = lambda encoder, slots: slots if len(encoder.batches) < 3 else slots[:, :, :1].squeeze(2)
    with pytest.raises(ValueError, match="the encoder returned slots"):  # an interruption
        extract_slots(first, encoder, tmp_path / "slots", batch_size=30, **SILENT)
    second = collected(tmp_path / "y" / "source", rows(LENGTHS, seed=1))
    with pytest.raises(ValueError, match=r"made with other arguments \(source: .*content"):
        extract_slots(second, Encoder(), tmp_path / "slots", batch_size=30, **SILENT)
    copied = collected(tmp_path / "z" / "source", rows(LENGTHS))
    assert extract_slots(copied, Encoder(), tmp_path / "slots", batch_size=30, **SILENT)


def test_videos_from_files_are_encoded_and_damaged_ones_named(tmp_path, caplog):
    av = pytest.importorskip("av")
    array = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    (tmp_path / "clips").mkdir()
    for name in ("b", "a"):
        with av.open(str(tmp_path / "clips" / f"{name}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=25)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "bgr0"
            for frame in array:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"nothing")
    (tmp_path / "clips" / "empty.mkv").write_bytes(b"")
    np.save(tmp_path / "clips" / "one.npy", array[:1])
    (tmp_path / "clips" / "pictures").mkdir()
    (tmp_path / "clips" / "pictures" / "0.png").write_bytes(b"nothing")
    folder = extract_slots(tmp_path / "clips", Encoder(), tmp_path / "slots", **SILENT)
    found = {row["episode_id"]: row["slots"] for row in read(folder)}
    assert list(found) == ["a", "b", "one"] and found["one"].shape == (1, N, D)
    np.testing.assert_allclose(found["a"], expected_slots({"frames": array}), atol=1e-4)
    assert load_slot_dataset(folder).metadata["fps"] is None  # not known of all
    (message,) = [r.getMessage() for r in caplog.records if "damaged" in r.message]
    assert "3 damaged episodes of clips" in message
    assert all(f"'{name}'" in message for name in ("broken", "empty", "pictures"))
    assert "3 episodes were left out" in (folder / "README.md").read_text()
    assert str(tmp_path) not in (folder / METADATA_FILE).read_text()  # it may be published
    with pytest.raises(ValueError, match=r"'broken'.* is complete without them"):
        extract_slots(tmp_path / "clips", Encoder(), folder, strict=True, **SILENT)


def test_videos_of_different_sizes_need_an_image_processor_side_by_side(tmp_path):
    for name, size in (("a", 16), ("b", 24)):
        (tmp_path / "clips").mkdir(exist_ok=True)
        np.save(tmp_path / "clips" / f"{name}.npy", np.zeros((4, size, size, 3), np.uint8))
    with pytest.raises(ValueError, match=r"different frame sizes .* give an image_processor"):
        extract_slots(tmp_path / "clips", Seeded(), tmp_path / "slots", **SILENT)
    assert len(read(extract_slots(tmp_path / "clips", Encoder(), tmp_path / "frames", **SILENT))) == 2


def test_reading_goes_on_while_the_encoder_runs_and_never_far_ahead(tmp_path):
    """Memory does not grow with the number of videos: few are read before they are needed."""
    from cjepa_hf.data.extract import encode_videos
    from cjepa_hf.data.video import FrameVideo

    opened = []

    def video(number):
        def open_frames():
            opened.append(number)
            return np.zeros((10, 16, 16, 3), np.uint8).__getitem__

        return FrameVideo(open_frames, 10, str(number))

    encoder, ahead = Encoder(), []
    encoder.after = lambda encoder, slots: ahead.append(len(opened) - len(encoder.batches)) or slots
    groups = ([video(2 * i), video(2 * i + 1)] for i in range(20))
    results = list(encode_videos(groups, encoder, batch_size=10, num_readers=3))
    assert [[job.video.name for job in group] for group in results[:2]] == [["0", "1"], ["2", "3"]]
    assert max(ahead) <= 4 and sorted(opened) == list(range(40))
