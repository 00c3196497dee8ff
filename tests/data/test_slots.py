"""Slot datasets: schema, resumable writing, statistics and windows. Golden data: see README.md in this folder."""

import json
import os
import pickle
import signal
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Array2D, Array3D, Features, Value
from safetensors.numpy import load_file
from torch.utils.data import DataLoader

from cjepa_hf.data import slots as slots_module
from cjepa_hf.data.slots import (
    METADATA_FILE,
    SlotDataset,
    SlotDatasetWriter,
    SlotWindows,
    StreamingSlotWindows,
    load_slot_dataset,
    normalize_windows,
    window_statistics,
    write_slot_dataset,
)

GOLDEN = Path(__file__).parent / "slot_windows_golden.safetensors"
VIDEOS = ("0", "1", "10")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def episodes(count, *, low=18, high=45, seed=0, num_slots=4, slot_size=8, prefix="e", columns=("actions", "proprio")):
    random = np.random.default_rng(seed)
    result = []
    for i in range(count):
        length = int(random.integers(low, high))
        episode = {
            "episode_id": f"{prefix}{i:03d}",
            "slots": random.standard_normal((length, num_slots, slot_size), dtype=np.float32),
            "actions": random.standard_normal((length, 2), dtype=np.float32),
            "proprio": random.standard_normal((length, 4), dtype=np.float32) * 100 + 256,
            "state": random.standard_normal((length, 7), dtype=np.float32),
            "contacts": random.random((length, 3)) < 0.5,
        }
        result.append({k: v for k, v in episode.items() if k in ("episode_id", "slots", *columns)})
    return result


def in_memory(rows):
    features = {
        "episode_id": Value("string"),
        "slots": Array3D((None, *rows[0]["slots"].shape[1:]), "float32"),
        "actions": Array2D((None, 2), "float32"),
        "proprio": Array2D((None, 4), "float32"),
        "state": Array2D((None, rows[0]["state"].shape[1]), "float32") if "state" in rows[0] else None,
    }
    features = Features({k: v for k, v in features.items() if k in rows[0]})
    return datasets.Dataset.from_dict({k: [row[k] for row in rows] for k in features}, features=features)


def expected_windows(rows, steps=4, skip=5):
    """The window rule, spelled out one window at a time."""
    result = []
    for row in rows:
        for s in range(len(row["slots"]) - steps * skip + 1):
            stop = s + steps * skip
            result.append(
                {
                    "slots": row["slots"][s:stop:skip],
                    "actions": row["actions"][s:stop].reshape(steps, -1),
                    "proprio": row["proprio"][s:stop:skip],
                }
            )
    return result


def assert_windows(batch, expected):
    assert set(batch) == set(expected[0])
    for key, values in batch.items():
        assert values.dtype == torch.float32
        np.testing.assert_array_equal(values.numpy(), np.stack([e[key] for e in expected]))


# ---------------------------------------------------------------------------------------------------- golden


def golden_rows(golden, videos=VIDEOS):
    rows = []
    for video in videos:
        actions = golden[f"inputs.action.{video}"]
        slots = golden.get(f"inputs.slots.{video}", np.zeros((len(actions), 4, 16), np.float32))
        state = golden.get(f"inputs.state.{video}", np.zeros((len(actions), 5), np.float32))
        proprio = golden[f"inputs.proprio.{video}"]
        rows.append({"episode_id": video, "slots": slots, "actions": actions, "proprio": proprio, "state": state})
    return rows


def test_windows_and_statistics_equal_the_original():
    golden = load_file(GOLDEN)
    windows = SlotWindows(in_memory(golden_rows(golden)), columns=("slots", "actions", "proprio", "state"))
    assert len(windows) == 52
    episode, start = windows.locate([0, 1, 26, 49, 51])
    assert [(VIDEOS[e], s) for e, s in zip(episode, start)] == [("0", 0), ("0", 1), ("1", 13), ("10", 8), ("10", 10)]
    # the original's statistics also cover the episode that has actions but no slots
    statistics = window_statistics(in_memory(golden_rows(golden, (*VIDEOS, "99"))))
    for key, value in statistics.items():
        np.testing.assert_allclose(value, golden[f"outputs.train.{key}"][0], atol=1e-5, rtol=1e-5)
    assert set(statistics) == {"action_mean", "action_std", "proprio_mean", "proprio_std"}
    for index in (0, 26, 51):
        window = normalize_windows(windows[index], statistics)
        for ours, theirs in (
            ("slots", "pixels_embed"),
            ("actions", "action"),
            ("proprio", "proprio"),
            ("state", "state"),
        ):
            reference = golden[f"outputs.train.sample{index}.{theirs}"]
            np.testing.assert_allclose(window[ours], reference, atol=1e-5, rtol=1e-5)


def test_one_unknown_action_does_not_erase_its_columns():
    golden = load_file(GOLDEN)
    rows = golden_rows(golden, (*VIDEOS, "99"))
    rows[0]["actions"][31] = np.nan
    data = in_memory(rows)
    statistics = window_statistics(data)
    reference = {key: golden[f"nan.{key}"][0] for key in ("action_mean", "action_std")}
    for key, value in reference.items():
        known = np.isfinite(value)
        assert known.sum() == 8  # the original lost two columns
        np.testing.assert_allclose(np.array(statistics[key])[known], value[known], atol=1e-5, rtol=1e-5)
    blocks = np.concatenate([w["actions"] for w in expected_windows(rows)]).reshape(-1, 10)
    np.testing.assert_allclose(statistics["action_mean"], np.nanmean(blocks.astype(np.float64), 0), rtol=1e-6)
    np.testing.assert_allclose(statistics["action_std"], np.nanstd(blocks.astype(np.float64), 0, ddof=1), rtol=1e-6)
    windows = SlotWindows(data)
    first = normalize_windows(windows[0], statistics)["actions"]
    # the original normalizes these two columns to 0 in every sample
    np.testing.assert_allclose(first[:, :8], golden["nan.sample0.action"][:, :8], atol=1e-5, rtol=1e-5)
    assert (first[:, 8:] != 0).all()
    last = windows[12]["actions"]  # frames 12 ... 31 of the first episode
    assert torch.isnan(last[3, 8:]).all() and not torch.isnan(last[:, :8]).any()
    assert (windows.normalize({"actions": last}, statistics)["actions"][3, 8:] == 0).all()


# ---------------------------------------------------------------------------------------------------- windows


def test_every_window_follows_the_rule_whatever_the_number_of_chunks():
    rows = episodes(12, columns=("actions", "proprio"))
    expected = expected_windows(rows)
    whole = in_memory(rows)
    pieces = datasets.concatenate_datasets([whole.select(range(i, min(i + 5, 12))) for i in range(0, 12, 5)])
    for data, chunks in ((whole, 1), (pieces, 3)):
        windows = SlotWindows(data)
        assert len(windows._views["slots"].frames) == chunks and len(windows) == len(expected)
        order = np.random.default_rng(1).permutation(len(windows))
        assert_windows(windows.get_batch(order), [expected[i] for i in order])
        assert_windows({k: v[None] for k, v in windows[-1].items()}, expected[-1:])
    assert windows.skipped_episodes == sum(len(r["slots"]) < 20 for r in rows) > 0
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_windows_follow_select_and_shuffle():
    rows = episodes(10)
    data = in_memory(rows)
    order = [7, 2, 9, 2]
    assert_windows(
        SlotWindows(data.select(order)).get_batch(range(len(SlotWindows(data.select(order))))),
        expected_windows([rows[i] for i in order]),
    )
    shuffled = data.shuffle(seed=3)
    names = shuffled["episode_id"]
    windows = SlotWindows(shuffled.select(range(2, 6)))
    assert_windows(windows.get_batch(range(len(windows))), expected_windows([rows[int(n[1:])] for n in names][2:6]))


def test_a_data_loader_takes_whole_batches_also_in_a_worker():
    rows = episodes(5)
    windows = pickle.loads(pickle.dumps(SlotWindows(in_memory(rows))))
    loader = DataLoader(windows, batch_size=16, collate_fn=windows.collate, num_workers=1)
    batches = list(loader)
    joined = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    assert_windows(joined, expected_windows(rows))


def test_missing_columns_are_absent_keys():
    windows = SlotWindows(in_memory(episodes(3, low=30, columns=())))
    assert set(windows[0]) == {"slots"}
    assert window_statistics(windows.dataset) == {}


def test_windows_that_cannot_exist_are_refused():
    data = in_memory(episodes(3, low=30, high=31))
    with pytest.raises(ValueError, match=r"no window of \(6 \+ 1\) \* 5 = 35 frames; the longest .* has 30"):
        SlotWindows(data, history_length=6)
    with pytest.raises(ValueError, match="frame_skip must be an integer of at least 1"):
        SlotWindows(data, frame_skip=0)
    with pytest.raises(ValueError, match="no window column 'state'"):
        SlotWindows(data, columns=("slots", "state"))


def test_constant_and_never_known_columns_become_zero():
    rows = episodes(4, low=25)
    for row in rows:
        row["actions"][:, 0] = np.float32(0.1)
        row["proprio"][:, 1] = np.nan
        row["proprio"][:, 2] = 1e6
    data = in_memory(rows)
    statistics = window_statistics(data)
    assert statistics["action_std"][::2] == [1.0] * 5 and statistics["proprio_std"][1:3] == [1.0, 1.0]
    batch = normalize_windows(SlotWindows(data).get_batch(range(10)), statistics)
    assert batch["actions"][..., ::2].abs().max() < 1e-6 and (batch["proprio"][..., 1:3] == 0).all()


def test_statistics_keep_their_digits_far_from_zero():
    rows = episodes(4, low=25)
    for row in rows:
        row["proprio"] = row["proprio"] / 100 + np.float32(1e4)
    statistics = window_statistics(in_memory(rows))
    proprio = np.concatenate([w["proprio"] for w in expected_windows(rows)]).astype(np.float64)
    np.testing.assert_allclose(statistics["proprio_std"], proprio.std(0, ddof=1), rtol=1e-9)


def test_statistics_of_another_frame_skip_are_refused():
    data = in_memory(episodes(3, low=30))
    batch = SlotWindows(data).get_batch([0])
    with pytest.raises(ValueError, match="actions have 10 columns"):
        normalize_windows(batch, window_statistics(data, frame_skip=2))
    with pytest.raises(ValueError, match="batch has actions but the statistics have only"):
        normalize_windows(batch, {})


# ---------------------------------------------------------------------------------------------------- files


def write(folder, train, validation=(), **arguments):
    splits = {"train": train} | ({"validation": validation} if validation else {})
    return write_slot_dataset(folder, splits, **{"frame_skip": 5, **arguments})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_written_dataset_loads_back(tmp_path, dtype):
    everything = ("actions", "proprio", "state", "contacts")
    train, validation = episodes(9, columns=everything), episodes(4, seed=1, columns=everything, prefix="v")
    train[0]["actions"][-1] = np.nan
    encoder = {"name": "someone/encoder", "revision": "abc", "config_hash": "123"}
    arguments = {"encoder": encoder, "units": {"proprio": "px"}, "fps": 10, "dtype": dtype, "frames_per_file": 100}
    folder = write(tmp_path / "d", train, validation, **arguments)
    assert len(list((folder / "data").glob("train-*-of-*.parquet"))) > 1
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "data", METADATA_FILE]
    dataset = load_slot_dataset(folder)
    assert (len(dataset), dataset.num_slots, dataset.slot_size, dataset.frame_skip) == (9, 4, 8, 5)
    assert dataset.metadata["encoder"] == encoder and dataset.metadata["fps"] == 10
    for row, original in zip(dataset.data.with_format("numpy"), train):
        assert row["episode_id"] == original["episode_id"]
        np.testing.assert_array_equal(row["slots"], original["slots"].astype(dtype))
        for column in everything:
            np.testing.assert_array_equal(row[column], original[column])
    # statistics of single frames, of the training split only, with NaN left out
    actions = np.concatenate([e["actions"] for e in train]).astype(np.float64)
    np.testing.assert_allclose(dataset.statistics["action_mean"], np.nanmean(actions, 0), rtol=1e-9)
    np.testing.assert_allclose(dataset.statistics["action_std"], np.nanstd(actions, 0, ddof=1), rtol=1e-9)
    windows = SlotWindows(load_slot_dataset(folder, "validation"))
    for e in validation:
        e["slots"] = e["slots"].astype(dtype).astype(np.float32)
    assert_windows(windows.get_batch(range(len(windows))), expected_windows(validation))
    # plain `datasets` reads the same splits
    assert {k: len(v) for k, v in datasets.load_dataset(str(folder)).items()} == {"train": 9, "validation": 4}


def test_a_folder_made_anew_is_not_read_from_the_cache(tmp_path):
    write(tmp_path / "d", episodes(2, seed=0))
    first = load_slot_dataset(tmp_path / "d").data.with_format("numpy")[0]["slots"]
    os.rename(tmp_path / "d", tmp_path / "old")
    rows = episodes(2, seed=5)
    write(tmp_path / "d", rows)
    again = load_slot_dataset(tmp_path / "d").data.with_format("numpy")[0]["slots"]
    np.testing.assert_array_equal(again, rows[0]["slots"])
    assert again.shape != first.shape or (again != first).any()


def test_streamed_windows_are_the_windows_of_the_loaded_dataset(tmp_path):
    rows = episodes(8)
    folder = write(tmp_path / "d", rows, frames_per_file=60)
    stream = load_slot_dataset(folder, streaming=True)
    expected = expected_windows(rows)
    ordered = list(StreamingSlotWindows(stream))
    assert_windows(torch.utils.data.default_collate(ordered), expected)

    def key(window):
        return window["slots"].numpy().tobytes()

    shuffled = StreamingSlotWindows(stream, shuffle_buffer=30, seed=1)
    first, second = [key(w) for w in shuffled], [key(w) for w in shuffled]
    assert first == second and first != [key(w) for w in ordered]
    shuffled.set_epoch(1)
    assert [key(w) for w in shuffled] != first
    assert sorted(first) == sorted(key(w) for w in ordered)
    loader = DataLoader(shuffled, batch_size=8, num_workers=2, collate_fn=shuffled.collate)
    assert sorted(key({"slots": w}) for b in loader for w in b["slots"]) == sorted(first)
    streamed = window_statistics(stream)
    for name, value in window_statistics(in_memory(rows)).items():
        assert streamed[name] == pytest.approx(value)
    with pytest.raises(ValueError, match="is streamed: use StreamingSlotWindows"):
        SlotWindows(stream)
    with pytest.raises(ValueError, match="no window of 100 frames"):
        list(StreamingSlotWindows(stream, frame_skip=25))


def test_a_killed_writer_goes_on_after_its_last_finished_file(tmp_path):
    folder, rows = tmp_path / "d", episodes(9)
    child = os.fork()
    if child == 0:
        writer = SlotDatasetWriter(folder, frame_skip=5, frames_per_file=100)
        for row in rows[:6]:
            writer.write("train", row)
        (writer._data / "train-00009.tmp").write_text("half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with pytest.raises(ValueError, match=r"is incomplete: .* Run the same command again"):
        load_slot_dataset(folder)
    with pytest.raises(Exception, match="doesn't contain any data files"):  # nothing half-written loads anywhere
        datasets.load_dataset(str(folder))
    with pytest.raises(ValueError, match=r"frame_skip: 5 then, 3 now"):
        SlotDatasetWriter(folder, frame_skip=3)
    done = SlotDatasetWriter(folder, frame_skip=5, frames_per_file=100).finished("train")
    assert 0 < len(done) < 6
    asked = []
    write_slot_dataset(folder, {"train": (asked.append(r) or r for r in rows)}, frame_skip=5, frames_per_file=100)
    data = load_slot_dataset(folder).data.with_format("numpy")
    assert list(data["episode_id"]) == [r["episode_id"] for r in rows]
    for row, original in zip(data, rows):
        np.testing.assert_array_equal(row["slots"], original["slots"])
    whole = write(tmp_path / "whole", rows, frames_per_file=100)
    assert (whole / METADATA_FILE).read_text() == (folder / METADATA_FILE).read_text()


@pytest.mark.parametrize("name", ["README.md", METADATA_FILE])
def test_an_interruption_while_finishing_is_resumed(tmp_path, monkeypatch, name):
    rows, real = episodes(4), slots_module.write_text

    def fail(path, text):
        if path.name == name:
            raise OSError(28, "No space left on device")
        real(path, text)

    monkeypatch.setattr(slots_module, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "d", rows, frames_per_file=50)
    with pytest.raises(ValueError, match="is incomplete"):
        load_slot_dataset(tmp_path / "d")
    monkeypatch.undo()
    write(tmp_path / "d", rows, frames_per_file=50)
    assert len(load_slot_dataset(tmp_path / "d", cache_dir=str(tmp_path / "cache"))) == 4


def test_a_full_disk_leaves_no_half_written_file(tmp_path, monkeypatch):
    real = pq.write_table

    def full(table, path, **arguments):
        real(table.slice(0, 1), path, **arguments)
        raise OSError(28, "No space left on device")

    writer = SlotDatasetWriter(tmp_path / "d", frame_skip=5)
    rows = episodes(3)
    for row in rows:
        writer.write("train", row)
    monkeypatch.setattr(slots_module.pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert not any(writer._data.iterdir())
    monkeypatch.undo()
    assert len(load_slot_dataset(writer.close(), cache_dir=str(tmp_path / "cache"))) == 3


def test_a_finished_or_foreign_folder_is_never_overwritten(tmp_path):
    write(tmp_path / "d", episodes(2))
    with pytest.raises(FileExistsError, match="is a finished dataset"):
        write(tmp_path / "d", episodes(2))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        write(tmp_path / "mine", episodes(2))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def spoil(key, value):
    def change(episode):
        episode[key] = value(episode[key])

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (spoil("actions", lambda x: x[:-1]), r"'e001': \d+ frames of actions, \d+ of slots"),
        (spoil("slots", lambda x: x * np.nan), r"'e001': slots are not finite"),
        (spoil("slots", lambda x: x[0]), r"slots must be \[T, N, D\], its shape is \(4, 8\)"),
        (spoil("slots", lambda x: x[:, :3]), r"'e001' has columns .*\(None, 3, 8\).* before it .*\(None, 4, 8\)"),
        (spoil("proprio", lambda x: x * np.inf), r"'e001': proprio hold an infinity"),
        (spoil("episode_id", lambda x: "e000"), "'e000' was written before"),
        (spoil("episode_id", lambda x: None), "episode_id must be a non-empty string"),
        (lambda episode: episode.pop("proprio"), r"'e001' has columns .* the episodes before it"),
        (lambda episode: episode.update(reward=1), "do not follow the schema"),
    ],
)
def test_a_bad_episode_is_refused_and_the_others_are_kept(tmp_path, change, message):
    rows = episodes(3)
    change(rows[1])
    writer = SlotDatasetWriter(tmp_path / "d", frame_skip=5)
    writer.write("train", rows[0])
    with pytest.raises(ValueError, match=message):
        writer.write("train", rows[1])
    writer.write("train", rows[2])
    assert load_slot_dataset(writer.close()).data["episode_id"][:] == ["e000", "e002"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda row: row.pop("slots"), "no column 'slots'"),
        (lambda row: row.pop("episode_id"), "no column 'episode_id'"),
        (spoil("slots", lambda x: np.where(np.arange(len(x))[:, None, None] == 3, np.nan, x)), "'e001' .* at frame 3"),
        (spoil("actions", lambda x: x[1:]), r"episode 'e001' has \d+ frames of slots but \d+ of 'actions'"),
        (spoil("proprio", lambda x: np.full_like(x, -np.inf)), "proprio of episode 'e001' are not finite at frame 0"),
        (spoil("actions", lambda x: None), "column 'actions' has no value in row 1"),
    ],
)
def test_a_dataset_that_breaks_the_schema_is_refused_by_name(change, message):
    rows = episodes(3)
    complete = in_memory(rows)
    change(rows[1])
    if set(rows[1]) != set(rows[0]):
        data = complete.remove_columns(list(set(rows[0]) - set(rows[1])))
    else:
        data = in_memory(rows)
    with pytest.raises(ValueError, match=f"my set: .*{message}"):
        SlotDataset(data, name="my set")


def test_features_of_another_type_are_refused():
    rows = episodes(2)
    data = in_memory(rows)
    lists = data.cast_column("actions", datasets.List(datasets.List(Value("float32"))))
    with pytest.raises(ValueError, match="column 'actions' must be Array2D"):
        SlotDataset(lists)
    with pytest.raises(ValueError, match="says num_slots=7, column 'slots' has 4"):
        SlotDataset(data, {"num_slots": 7})


def test_damaged_folders_are_named(tmp_path):
    def fresh(name):
        return write(tmp_path / name, episodes(6), frames_per_file=60)

    folder = fresh("truncated")
    path = sorted((folder / "data").iterdir())[1]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        load_slot_dataset(folder)
    folder = fresh("missing_file")
    sorted((folder / "data").iterdir())[1].unlink()
    with pytest.raises(ValueError, match=r"num_episodes \d, slot_dataset.json says 6. A file is missing"):
        load_slot_dataset(folder)
    folder = fresh("no_metadata")
    (folder / METADATA_FILE).unlink()
    with pytest.raises(ValueError, match=f"it has no {METADATA_FILE}"):
        load_slot_dataset(folder)
    folder = fresh("other_version")
    metadata = json.loads((folder / METADATA_FILE).read_text())
    (folder / METADATA_FILE).write_text(json.dumps(metadata | {"schema_version": 2}))
    with pytest.raises(ValueError, match="has schema_version 2, this library reads 1"):
        load_slot_dataset(folder)
    (folder / METADATA_FILE).write_text("{")
    with pytest.raises(ValueError, match="is not valid json"):
        load_slot_dataset(folder)
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
        load_slot_dataset(fresh("splits"), "test")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_slot_dataset(tmp_path / "nothing_here")


def test_hub_ids_pass_the_revision_on(tmp_path, monkeypatch):
    folder, calls = write(tmp_path / "d", episodes(3)), []

    def download(repo_id, filename, *, repo_type, revision, **_):
        calls.append((repo_id, filename, repo_type, revision))
        return str(folder / filename)

    def load(source, *, split, revision, streaming, cache_dir):
        calls.append((source, split, revision, streaming))
        return datasets.load_dataset(str(folder), split=split)

    monkeypatch.setattr(slots_module, "hf_hub_download", download)
    monkeypatch.setattr(slots_module, "load_dataset", load)
    assert len(load_slot_dataset("someone/slots", revision="v1")) == 3
    assert calls == [("someone/slots", METADATA_FILE, "dataset", "v1"), ("someone/slots", "train", "v1", False)]
