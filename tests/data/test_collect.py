import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import cjepa_hf
from cjepa_hf.data.clevrer import ClevrerFolder
from cjepa_hf.data.collect import collect_collisions, collect_push_t, run_episode, sample_encoder_frames
from cjepa_hf.simulators.collisions import CollisionWorld
from cjepa_hf.simulators.push_t import PushTWorld, block_distance
from cjepa_hf.simulators.questions import answer_question
from cjepa_hf.simulators.rendering import GOAL_POSE, render_collisions, render_push_t

SMALL = {"num_episodes": {"train": 5, "validation": 2}, "episode_length": 12, "shard_size": 2, "progress": False}


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def load(folder, tmp_path):
    return datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    return collect_push_t(tmp_path_factory.mktemp("collected") / "push_t", num_workers=1, **SMALL)


def test_load_dataset_gives_the_documented_columns(collected, tmp_path):
    dataset = load(collected, tmp_path)
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 5, "validation": 2}
    assert dataset["train"].features == datasets.Features(
        {
            "episode_id": datasets.Value("string"),
            "actions": datasets.Array2D((None, 2), "float32"),
            "state": datasets.Array2D((None, 7), "float32"),
            "proprio": datasets.Array2D((None, 4), "float32"),
            "contacts": datasets.Array2D((None, 3), "bool"),
        }
    )
    ids = [*dataset["train"]["episode_id"], *dataset["validation"]["episode_id"]]
    assert len(set(ids)) == 7 and ids[0] == "push_t-gentle-s0-train-000000"
    for row in dataset["train"].with_format("numpy"):
        assert row["actions"].shape == (13, 2) and row["state"].shape == (13, 7) and row["contacts"].shape == (13, 3)
        assert np.isnan(row["actions"][-1]).all() and (np.abs(row["actions"][:-1]) <= 1).all()
        assert np.isfinite(row["state"]).all() and not row["contacts"][-1].any()
        np.testing.assert_array_equal(row["proprio"], row["state"][:, [0, 1, 5, 6]])
    description = json.loads((collected / "collection.json").read_text())
    assert description["schema_version"] == 1 and description["policy"] == "gentle" and description["seed"] == 0
    assert sorted(p.name for p in collected.iterdir()) == ["README.md", "collection.json", "data"]


def test_stored_episodes_are_what_the_simulator_does(collected, tmp_path):
    for index, row in enumerate(load(collected, tmp_path)["train"].with_format("numpy")):
        episode = run_episode(PushTWorld(), "gentle", (0, 0, index), 12)
        np.testing.assert_array_equal(row["actions"], episode["actions"])
        np.testing.assert_array_equal(row["state"], episode["state"].astype(np.float32))
        np.testing.assert_array_equal(row["contacts"], episode["contacts"])


@pytest.mark.parametrize("policy", ["gentle", "weak"])
def test_replaying_the_stored_actions_gives_the_states_and_contacts(policy):
    for index in range(5):
        episode = run_episode(PushTWorld(), policy, (3, 1, index), 60)
        world = PushTWorld(episode["state"][0])
        for t in range(60):
            state = world.step(episode["actions"][t].tolist())
            np.testing.assert_allclose(state, episode["state"][t + 1], rtol=0, atol=1e-6)
            np.testing.assert_array_equal(world.contacts, episode["contacts"][t])


def test_policies_push_as_they_say():
    episodes = {
        policy: [run_episode(PushTWorld(), policy, (0, 0, i), 80) for i in range(30)] for policy in ("gentle", "weak")
    }
    spread = {p: np.concatenate([e["actions"][:-1] for e in es]).std() for p, es in episodes.items()}
    touching = {p: np.concatenate([e["contacts"][:-1, 0] for e in es]).mean() for p, es in episodes.items()}
    assert 0.12 < spread["gentle"] < 0.22 and 0.4 < spread["weak"] < 0.6
    assert touching["gentle"] > 0.5 > touching["weak"] > 0.15
    for episode in episodes["weak"]:
        target = episode["state"][:-1, :2] + 100 * episode["actions"][:-1]
        offset = np.abs(target - episode["state"][:-1, 2:4])
        assert ((offset <= 100.001) | (np.abs(episode["actions"][:-1]) == 1)).all()
    assert all(((e["state"][:, :2] > 0) & (e["state"][:, :2] < 512)).all() for e in episodes["gentle"])


def test_mixture_alternates_between_the_policies():
    for index, policy in ((0, "gentle"), (1, "weak")):
        mixed = run_episode(PushTWorld(), "mixture", (0, 0, index), 20)
        pure = run_episode(PushTWorld(), policy, (0, 0, index), 20)
        np.testing.assert_array_equal(mixed["state"], pure["state"])


def test_splits_seeds_and_indices_have_streams_of_their_own():
    streams = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    starts = [run_episode(PushTWorld(), "gentle", stream, 1)["state"][0] for stream in streams]
    assert len({start.tobytes() for start in starts}) == len(streams)


def test_shard_size_does_not_change_the_episodes(collected, tmp_path):
    other = collect_push_t(tmp_path / "other", num_workers=1, **{**SMALL, "shard_size": 100})
    first, second = load(collected, tmp_path / "a"), load(other, tmp_path / "b")
    for split in ("train", "validation"):
        table, same = first[split].with_format("numpy"), second[split].with_format("numpy")
        assert list(table["episode_id"]) == list(same["episode_id"])
        for name in ("actions", "state"):
            np.testing.assert_array_equal(np.stack(list(table[name])), np.stack(list(same[name])))


def test_frames_are_those_of_the_states(tmp_path):
    arguments = {**SMALL, "num_episodes": {"train": 1}, "frames_resolution": 32}
    folder = collect_push_t(tmp_path / "frames", num_workers=1, **arguments)
    row = load(folder, tmp_path)["train"][0]
    assert len(row["frames"]) == 13 and all(isinstance(frame, Image.Image) for frame in row["frames"])
    states = run_episode(PushTWorld(), "gentle", (0, 0, 0), 12)["state"]
    np.testing.assert_array_equal(
        np.stack([np.asarray(frame) for frame in row["frames"]]), render_push_t(states, resolution=32)
    )


def test_a_finished_collection_is_left_as_it_is(collected):
    before = {p: p.stat().st_mtime_ns for p in collected.rglob("*")}
    assert collect_push_t(collected, num_workers=2, **SMALL) == collected
    assert {p: p.stat().st_mtime_ns for p in collected.rglob("*")} == before


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"policy": "weak"}, {"episode_length": 13}, {"num_episodes": {"train": 5}}]
)
def test_a_folder_made_with_other_arguments_is_refused(collected, change):
    before = content(collected)
    with pytest.raises(ValueError, match=rf"other arguments \({next(iter(change))}: .* there, .* asked for"):
        collect_push_t(collected, **{**SMALL, **change})
    assert content(collected) == before


def test_foreign_and_damaged_folders_are_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a Push-T collection"):
        collect_push_t(tmp_path, **SMALL)
    assert content(tmp_path) == {"note.txt": b"mine"}
    folder = collect_push_t(tmp_path / "push_t", num_workers=1, **SMALL)
    shard = next((folder / "data").glob("train-00001*"))
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match="lacks train-00001-of-00003"):
        collect_push_t(folder, **SMALL)
    shard.write_bytes(kept)
    (folder / "collection.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        collect_push_t(folder, **SMALL)


def test_a_full_disk_is_a_clear_error_and_the_collection_goes_on_later(collected, tmp_path):
    folder = tmp_path / "push_t"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = max(p.stat().st_size for p in (collected / "data").iterdir())
    try:
        # the first shards fit, the largest does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
        with pytest.raises(OSError, match="nothing incomplete was kept"):
            collect_push_t(folder, num_workers=1, **SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in folder.iterdir()) == [".collecting"]
    assert not list(folder.rglob("*.partial"))
    collect_push_t(folder, num_workers=1, **SMALL)
    assert content(folder) == content(collected)


# The package without its __init__, which imports torch: in three processes that takes longer than all of the test.
SCRIPT = """
import sys, types
sys.modules["cjepa_hf"] = types.ModuleType("cjepa_hf")
sys.modules["cjepa_hf"].__path__ = [sys.argv[2]]
from cjepa_hf.data.collect import collect_push_t
if __name__ == "__main__":
    collect_push_t(sys.argv[1], num_episodes={"train": 160}, episode_length=80, shard_size=4, num_workers=2, progress=False)
"""


def test_kill_9_then_resume_with_other_workers_gives_the_same_bytes(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "push_t"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # a process group of its own, so that its workers can be found again
    command = [sys.executable, script, folder, Path(cjepa_hf.__file__).parent]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    working, deadline = folder / ".collecting" / "data", time.monotonic() + 120
    while not list(working.glob("train-*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while True:  # the workers end with their parent
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "orphaned workers"
        time.sleep(0.02)
    assert 1 <= len(list(working.glob("train-*.parquet"))) < 40
    assert sorted(p.name for p in folder.iterdir()) == [".collecting"]
    with pytest.raises((FileNotFoundError, datasets.exceptions.DatasetNotFoundError, ValueError)):
        load(folder, tmp_path)  # a partial folder is no dataset

    arguments = {"num_episodes": {"train": 160}, "shard_size": 4, "num_workers": 1, "progress": False}
    with pytest.raises(ValueError, match="other arguments"):
        collect_push_t(folder, **{**arguments, "seed": 1})
    collect_push_t(folder, **arguments)
    assert content(folder) == content(collect_push_t(tmp_path / "whole", **arguments))


def test_an_interruption_before_the_last_files_is_finished(collected, tmp_path):
    folder = collect_push_t(tmp_path / "push_t", num_workers=1, **SMALL)
    settings = json.loads((folder / "collection.json").read_text())
    (folder / "collection.json").unlink()
    (folder / "README.md").unlink()
    (folder / ".collecting").mkdir()
    (folder / ".collecting" / "collection.json").write_text(json.dumps(settings))
    collect_push_t(folder, num_workers=1, **SMALL)
    assert content(folder) == content(collected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "strong"}, "policy"),
        ({"seed": -1}, "seed"),
        ({"num_episodes": {"train": 0}}, "no episode"),
        ({"num_episodes": {"training": 5}}, "splits"),
        ({"num_episodes": {"train": 1.5}}, "num_episodes"),
        ({"episode_length": 0}, "episode_length"),
        ({"num_workers": 0}, "num_workers"),
        ({"shard_size": 0}, "shard_size"),
        ({"frames_resolution": 1}, "frames_resolution"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        collect_push_t(tmp_path / "push_t", **{**SMALL, **change})
    assert not (tmp_path / "push_t").exists()


def test_encoder_frames_show_their_states_and_cover_the_table():
    frames, states, goals = sample_encoder_frames(300, seed=4, resolution=32)
    assert frames.shape == (300, 32, 32, 3) and states.shape == (300, 7) and goals.shape == (300, 3)
    np.testing.assert_array_equal(frames, render_push_t(states, goal_pose=goals, resolution=32))
    assert (goals == np.array(GOAL_POSE)).all(axis=1).sum() == 90
    moved = goals[(goals != np.array(GOAL_POSE)).any(axis=1)]
    assert moved[:, :2].min() >= 110 and moved[:, :2].max() <= 400
    scattered = (states[:, 5:] == 0).all(axis=1)
    assert scattered.sum() >= 90 and (block_distance(states[scattered]) > 14.9).all()
    assert states[scattered, :2].min() < 50 and states[scattered, :2].max() > 462
    again = sample_encoder_frames(300, seed=4, resolution=32)
    assert all(np.array_equal(a, b) for a, b in zip(again, (frames, states, goals)))
    assert not np.array_equal(sample_encoder_frames(300, seed=5, resolution=32)[1], states)


def test_encoder_frames_in_another_style_show_the_same_scenes():
    smooth, aliased = (sample_encoder_frames(8, seed=0, style=style) for style in ("smooth", "aliased"))
    np.testing.assert_array_equal(smooth[1], aliased[1])
    assert np.abs(smooth[0].astype(int) - aliased[0]).mean() < 2


@pytest.mark.parametrize("arguments", [{"num_frames": 0, "seed": 0}, {"num_frames": 3, "seed": -1}])
def test_bad_encoder_frame_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="whole number"):
        sample_encoder_frames(**arguments)


def test_stored_pngs_are_plain_rgb(tmp_path):
    arguments = {**SMALL, "num_episodes": {"train": 1}, "episode_length": 1, "frames_resolution": 64}
    folder = collect_push_t(tmp_path / "frames", num_workers=1, **arguments)
    rows = load(folder, tmp_path)["train"].cast_column("frames", datasets.List(datasets.Image(decode=False)))
    image = Image.open(io.BytesIO(rows[0]["frames"][0]["bytes"]))
    assert image.format == "PNG" and image.mode == "RGB" and image.size == (64, 64)


SCENES = {"num_scenes": {"train": 3, "validation": 1}, "shard_size": 2, "progress": False}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return collect_collisions(
        tmp_path_factory.mktemp("scenes") / "collisions", num_workers=1, frames_resolution=32, **SCENES
    )


def test_collected_scenes_load_as_a_dataset_and_as_clevrer(scenes, tmp_path):
    rows = load(scenes, tmp_path)
    assert list(rows["train"]["episode_id"]) == ["video_00000", "video_00001", "video_00002"]
    assert list(rows["validation"]["episode_id"]) == ["video_00003"]
    row = rows["validation"].with_format("numpy")[0]
    assert row["state"].shape == (128, 60) and len(row["frames"]) == 128
    np.testing.assert_array_equal(row["frames"][70], render_collisions(row["state"][70], resolution=32)[0])
    folder = ClevrerFolder(scenes)
    for split, numbers in (("train", [0, 1, 2]), ("validation", [3])):
        assert list(folder.files("annotation", split)) == list(folder.files("predictions", split)) == numbers
        for variant in (None, "plain"):
            questions = folder.questions(split, variant)
            assert [scene["scene_index"] for scene in questions] == numbers
            for scene in questions:
                truth = folder.truth(scene["scene_index"], split)
                for question in scene["questions"]:
                    stored = question.get("answer") or [c["answer"] for c in question["choices"]]
                    assert answer_question(truth, question) == stored


def test_stored_starts_replay_to_the_stored_scene_and_its_counterfactuals(scenes, tmp_path):
    states = load(scenes, tmp_path)["train"].with_format("numpy")[1]["state"]
    content = json.loads(ClevrerFolder(scenes).files("predictions", "train")[1].read_text())
    world = CollisionWorld.from_dict(content["initial_state"])
    np.testing.assert_array_equal(world.simulate(128).states.astype(np.float32), states)
    for prediction in content["predictions"][1:]:
        rest = world.without(prediction["what_if"]).simulate(128)
        assert [c["frame"] for c in prediction["collisions"]] == [c.frame for c in rest.collisions]


def test_an_interrupted_collection_of_scenes_is_finished_to_the_same_bytes(scenes, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "collisions")
    working = folder / ".collecting"
    for name in ("data", "annotations", "predictions"):
        working.mkdir(exist_ok=True)
        (folder / name).rename(working / name)
    (working / ".questions").mkdir()
    settings = json.loads((folder / "collection.json").read_text())
    (working / "collection.json").write_text(json.dumps(settings))
    for name in ("collection.json", "README.md"):
        (folder / name).unlink()
    questions = {p.stem: json.loads(p.read_text()) for p in (folder / "questions").iterdir()}
    parts = {"train-00000-of-00002": ("train", 0, 2), "validation-00000-of-00001": ("validation", 0, 1)}
    for name, (split, start, end) in parts.items():
        part = {"": questions[split][start:end], "_plain": questions[f"{split}_plain"][start:end]}
        (working / ".questions" / f"{name}.json").write_text(json.dumps(part))
    (working / "data" / "train-00001-of-00002.parquet").unlink()  # the shard that was not done
    collect_collisions(folder, num_workers=1, frames_resolution=32, **SCENES)
    assert content(folder) == content(scenes)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_scenes": {"dev": 1}}, "splits"), ({"seed": -1}, "seed"), ({"frames_resolution": 2}, "frames_resolution")],
)
def test_bad_arguments_of_scenes_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        collect_collisions(tmp_path / "collisions", **{**SCENES, **change})
    assert not (tmp_path / "collisions").exists()


def test_a_folder_of_push_t_is_refused_for_scenes(collected):
    with pytest.raises(ValueError, match="other arguments"):
        collect_collisions(collected, **SCENES)


def moved_into_place(run) -> list[str]:
    """Names of the Parquet files that `run()` moves to their places."""
    names, replace = set(), os.replace

    def noting(source, target):
        replace(source, target)
        names.add(Path(target).name)

    os.replace = noting
    run()
    return sorted(name for name in names if name.endswith(".parquet"))


@pytest.mark.parametrize("world", ["push_t", "collisions"])
def test_several_processes_collect_the_same_files_as_one(tmp_path, world):
    def collect(folder):
        if world == "push_t":
            return collect_push_t(folder, num_workers=1, **SMALL)
        return collect_collisions(
            folder, num_scenes={"train": 3, "validation": 1}, shard_size=1, num_workers=1, progress=False
        )

    one = collect(tmp_path / "one")
    children = []
    for rank in (1, 0):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os.environ.update(RANK=str(rank), WORLD_SIZE="2")
            try:
                shards = moved_into_place(lambda: collect(tmp_path / "two"))
                (tmp_path / f"rank{rank}").write_text(json.dumps(shards))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert content(tmp_path / "two") == content(one)
    shards = [set(json.loads((tmp_path / f"rank{rank}").read_text())) for rank in (0, 1)]
    assert all(shards) and not shards[0] & shards[1]
    assert len(shards[0] | shards[1]) == len(list((one / "data").glob("*.parquet"))) == 4
