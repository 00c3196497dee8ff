"""Collect Push-T episodes into a `datasets` folder, and sample single frames for training a slot encoder."""

import io
import json
import math
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm.auto import tqdm

from cjepa_hf.simulators.push_t import (
    CONTACT_PAIRS,
    PROPRIO_INDICES,
    STATE_NAMES,
    PushTWorld,
    random_states,
)
from cjepa_hf.simulators.rendering import GOAL_POSE, TABLE_SIZE, render_push_t

POLICIES = ("gentle", "weak", "mixture")
_SPLITS = ("train", "validation", "test")  # the position is part of an episode's seed
_ENCODER_STREAM = 1000  # in the place of a split: frames for the encoder are of no collected episode
_COLLECTOR_VERSION = 1  # counts changes that make other episodes from the same seed
_COG_OFFSET = 45.0  # of the block's center of gravity from its origin, along the stem


# Policies: given a random generator and the episode's length, a function from the state to an action (dx, dy).


def _gentle_policy(rng: np.random.Generator, length: int) -> Callable[[list[float]], tuple[float, float]]:
    """Walk behind the block, push it slowly through its center of gravity, and again."""
    noise = rng.normal(0.0, 0.03, (length, 2))
    for t in range(1, length):
        noise[t] += 0.8 * noise[t - 1]
    noise = iter(noise.tolist())
    pushing, left, limit, aim = True, 0, 0.0, (0.0, 0.0)
    middle, low, high = TABLE_SIZE / 2, 20.0, TABLE_SIZE - 20.0  # walls do not stop the agent

    def act(state):
        nonlocal pushing, left, limit, aim
        x, y, block_x, block_y, angle = state[:5]
        cog_x, cog_y = block_x - _COG_OFFSET * math.sin(angle), block_y + _COG_OFFSET * math.cos(angle)
        near_wall = not (90.0 < cog_x < TABLE_SIZE - 90.0 and 90.0 < cog_y < TABLE_SIZE - 90.0)
        outward = near_wall and aim[0] * (cog_x - middle) + aim[1] * (cog_y - middle) > 0
        if pushing and (left == 0 or outward or not (low < x < high and low < y < high)):
            pushing, left, limit = False, 25, rng.uniform(0.2, 0.5)
            heading = rng.uniform(0.0, 2 * math.pi)
            if near_wall or rng.random() < 0.7:  # a push that leads back to the middle
                heading = math.atan2(middle - cog_y, middle - cog_x) + rng.normal(0.0, 0.4)
            distance = rng.uniform(60.0, 105.0)
            aim = cog_x - distance * math.cos(heading), cog_y - distance * math.sin(heading)
            aim = tuple(min(max(v, low + 5.0), high - 5.0) for v in aim)
        elif not pushing and (left == 0 or math.hypot(aim[0] - x, aim[1] - y) < 12.0):
            pushing, left, limit = True, int(rng.integers(10, 26)), rng.uniform(0.06, 0.22)
            heading, offset = math.atan2(cog_y - y, cog_x - x), rng.normal(0.0, 25.0)
            heading = math.atan2(cog_y + offset * math.cos(heading) - y, cog_x - offset * math.sin(heading) - x)
            aim = math.cos(heading), math.sin(heading)
        left -= 1
        if pushing:
            dx, dy = limit * aim[0], limit * aim[1]
        else:
            dx, dy = (aim[0] - x) / 60.0, (aim[1] - y) / 60.0
            scale = min(1.0, limit / max(math.hypot(dx, dy), 1e-9))
            dx, dy = dx * scale, dy * scale
        noise_x, noise_y = next(noise)
        return min(max(dx + noise_x, -1.0), 1.0), min(max(dy + noise_y, -1.0), 1.0)

    return act


def _weak_policy(rng: np.random.Generator, length: int) -> Callable[[list[float]], tuple[float, float]]:
    """Uniform random actions that stay within 100 px of the block."""
    draws = iter(rng.uniform(-1.0, 1.0, (length, 2)).tolist())

    def act(state):
        return tuple(
            min(max(min(max(p + 100.0 * u, b - 100.0), b + 100.0) - p, -100.0), 100.0) / 100.0
            for p, b, u in zip(state[:2], state[2:4], next(draws))
        )

    return act


def _run_episode(world: PushTWorld, policy: str, stream: tuple[int, int, int], length: int) -> dict[str, np.ndarray]:
    """One episode of `length` actions, hence length + 1 rows; `stream` = (seed, split, index) is all its randomness."""
    rng = np.random.default_rng(np.random.SeedSequence(stream))
    if policy == "mixture":
        policy = "gentle" if stream[2] % 2 == 0 else "weak"
    act = {"gentle": _gentle_policy, "weak": _weak_policy}[policy](rng, length)
    world.set_state(random_states(1, rng)[0])
    states = np.empty((length + 1, 7))
    states[0] = world.settle()
    actions = np.full((length + 1, 2), np.nan, dtype=np.float32)
    contacts = np.zeros((length + 1, 3), dtype=bool)
    for t in range(length):
        # rounded first: replaying the stored action must give the stored states
        actions[t] = act(states[t].tolist())
        states[t + 1] = world.step(actions[t].tolist())
        contacts[t] = world.contacts
    return {"actions": actions, "state": states, "contacts": contacts}


def _features(frames_resolution):
    from datasets import Array2D, Features, Image, List, Value

    features = {
        "episode_id": Value("string"),
        "actions": Array2D((None, 2), "float32"),
        "state": Array2D((None, 7), "float32"),
        "proprio": Array2D((None, 4), "float32"),
        "contacts": Array2D((None, 3), "bool"),
    }
    if frames_resolution is not None:
        features["frames"] = List(Image())
    return Features(features)


def _png(frame):
    return {"path": None, "bytes": cv2.imencode(".png", frame[..., ::-1])[1].tobytes()}


def _write_shard(path: Path, settings: dict[str, Any], split: str, indices: range) -> int:
    """Simulate the episodes `indices` of a split and write them as one Parquet file, whole or not at all."""
    import pyarrow.parquet
    from datasets import Dataset

    world, columns = PushTWorld(), {}
    resolution = settings["frames_resolution"]
    for index in indices:
        stream = (settings["seed"], _SPLITS.index(split), index)
        episode = _run_episode(world, settings["policy"], stream, settings["episode_length"])
        row = {
            "episode_id": f"push_t-{settings['policy']}-s{settings['seed']}-{split}-{index:06d}",
            "actions": episode["actions"],
            "state": episode["state"].astype(np.float32),
            "proprio": episode["state"][:, PROPRIO_INDICES].astype(np.float32),
            "contacts": episode["contacts"],
        }
        if resolution is not None:
            row["frames"] = [_png(frame) for frame in render_push_t(episode["state"], resolution=resolution)]
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    dataset, buffer = Dataset.from_dict(columns, features=_features(resolution)), io.BytesIO()
    # as Dataset.to_parquet, which draws a progress bar of its own; the metadata hold the features
    table = dataset.data.table.replace_schema_metadata(dataset.features.arrow_schema.metadata)
    pyarrow.parquet.write_table(table, buffer)
    _write_file(path, buffer.getvalue())
    return len(indices)


def _write_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: nothing incomplete was kept. Make room, then run the same collection again: "
            "it goes on from the finished files",
            str(path),
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _start_worker():
    cv2.setNumThreads(1)
    # A killed parent cannot stop its workers; they would wait for work for ever.
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (multiprocessing.connection.wait([parent]), os._exit(1)), daemon=True).start()


def collect_push_t(
    output_dir: str | os.PathLike,
    *,
    num_episodes: Mapping[str, int] | None = None,
    episode_length: int = 80,
    policy: str = "gentle",
    seed: int = 0,
    num_workers: int | None = None,
    frames_resolution: int | None = None,
    shard_size: int = 500,
    progress: bool = True,
) -> Path:
    """Collect Push-T episodes with a scripted policy into a folder for `datasets.load_dataset(str(folder))`.

    Every episode has a random stream of its own, so that its data depend on `seed`, split, index, policy and length
    only, neither on `num_workers` nor on `shard_size`. A collection that was interrupted, by kill -9 too, goes on
    where it stood when the same call is made again; a finished one is left as it is. `data/` appears only when every
    shard is written, README.md and collection.json last.

    The folder has one row per episode; T = episode_length + 1 frames: `episode_id`; `actions` [T, 2] float32, relative
    targets in units of 100 px, in [-1, 1], action t is taken at frame t, the last row is NaN (nothing was done after
    the last frame); `state` [T, 7] float32 (`STATE_NAMES`: px, rad in [0, 2 pi), px/s); `proprio` [T, 4] float32 (agent
    xy, agent velocity); `contacts` [T, 3] bool (agent-block, agent-wall, block-wall) during the step after frame t;
    `frames` (a list of T PNG images, the green T at its default pose) if asked for.

    Args:
        output_dir: the folder: new, empty, or of the same collection.
        num_episodes: episodes per split ("train", "validation", "test"); default 10,000 and 500 for validation.
        episode_length: actions per episode; one action lasts 0.1 s.
        policy: "gentle" (walks behind the block and pushes it slowly, mostly towards the middle), "weak" (random
            actions near the block), or "mixture" (episodes alternate between the two).
        seed: >= 0.
        num_workers: processes; default one per core, 1 runs in this process. They are spawned: a script that calls
            this needs `if __name__ == "__main__":`.
        frames_resolution: also store frames of this many pixels; None: none (they can be rendered from the states).
        shard_size: episodes per Parquet file.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: bad arguments; a folder made with other arguments or holding something else.
        OSError: the disk is full or not writable; finished shards are kept.
        RuntimeError: a worker process was killed; finished shards are kept.
    """
    folder = Path(output_dir)
    num_episodes = {"train": 10_000, "validation": 500} if num_episodes is None else dict(num_episodes)
    _check_arguments(num_episodes, episode_length, policy, seed, num_workers, frames_resolution, shard_size)
    settings = {
        "simulator": "push_t",
        "collector_version": _COLLECTOR_VERSION,
        "policy": policy,
        "seed": int(seed),
        "num_episodes": {split: int(num_episodes[split]) for split in _SPLITS if num_episodes.get(split)},
        "episode_length": int(episode_length),
        "frames_resolution": None if frames_resolution is None else int(frames_resolution),
        "shard_size": int(shard_size),
    }
    shards = {}
    for split, count in settings["num_episodes"].items():
        total = math.ceil(count / shard_size)
        for k in range(total):
            name = f"{split}-{k:05d}-of-{total:05d}.parquet"
            shards[name] = (split, range(k * shard_size, min((k + 1) * shard_size, count)))

    data, final = folder / "data", folder / "collection.json"
    working = folder / ".collecting"  # hidden: `load_dataset` never looks inside
    found = next((path for path in (final, working / "collection.json") if path.exists()), None)
    if found is not None:
        _check_same(found, settings)
    elif folder.exists() and (not folder.is_dir() or any(path != working for path in folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a Push-T collection; choose a new or empty folder.")
    if data.exists():
        missing = [name for name in shards if not (data / name).is_file()]
        if missing:
            raise ValueError(
                f"{data} lacks {', '.join(missing[:3])}: files were removed. Delete {folder}, collect again."
            )
    if final.exists():
        shutil.rmtree(working, ignore_errors=True)
        return folder

    if not data.exists():
        (working / "data").mkdir(parents=True, exist_ok=True)
        if found is None:
            _write_file(working / "collection.json", _json(settings))
        for leftover in (working / "data").glob(".*.partial"):
            leftover.unlink(missing_ok=True)
        todo = {name: work for name, work in shards.items() if not (working / "data" / name).exists()}
        done = sum(len(indices) for name, (_, indices) in shards.items() if name not in todo)
        bar = tqdm(
            total=sum(settings["num_episodes"].values()),
            initial=done,
            unit="episode",
            desc=f"collecting push_t ({policy})",
            disable=not progress,
        )
        with bar:
            jobs = [(working / "data" / name, settings, *work) for name, work in todo.items()]
            _run_jobs(jobs, num_workers, bar.update)
        os.replace(working / "data", data)  # all shards at once
    _write_file(folder / "README.md", _readme(settings).encode())
    _write_file(final, _json({"schema_version": 1, **settings, **_DESCRIPTION}))
    shutil.rmtree(working, ignore_errors=True)
    return folder


def _run_jobs(jobs, num_workers, update):
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_workers = min(num_workers, len(jobs))
    if num_workers <= 1:
        for job in jobs:
            update(_write_shard(*job))
        return
    # spawned: forking a process that has run torch or Arrow threads can hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker) as executor:
        futures = [executor.submit(_write_shard, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                update(future.result())
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a collecting process ended without a word (killed, or out of memory), or the calling script lacks "
                '`if __name__ == "__main__":`. Run the same collection again to go on from the finished files, '
                "with fewer `num_workers` if memory is short."
            ) from error
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


_DESCRIPTION = {
    "columns": {
        "actions": "[T, 2] float32, relative target of the agent / 100 px, in [-1, 1]; taken at frame t; last row NaN",
        "state": "[T, 7] float32: " + ", ".join(STATE_NAMES),
        "proprio": "[T, 4] float32: agent_x, agent_y, agent_vx, agent_vy",
        "contacts": "[T, 3] bool during the step after frame t: " + ", ".join(CONTACT_PAIRS),
    },
    "units": {"position": "px of the 512 px table", "angle": "rad in [0, 2 pi)", "velocity": "px/s"},
    "fps": 10,
    "goal_pose": list(GOAL_POSE),
}


def _json(content):
    return (json.dumps(content, indent=2) + "\n").encode()


def _readme(settings):
    files = "".join(
        f"      - split: {split}\n        path: data/{split}-*.parquet\n" for split in settings["num_episodes"]
    )
    counts = ", ".join(f"{count} {split}" for split, count in settings["num_episodes"].items())
    columns = "\n".join(f"- `{name}`: {text}" for name, text in _DESCRIPTION["columns"].items())
    if settings["frames_resolution"] is not None:
        columns += f"\n- `frames`: T PNG images of {settings['frames_resolution']} px"
    return f"""---
configs:
  - config_name: default
    data_files:
{files}tags:
  - robotics
  - world-model
---

# Push-T, policy "{settings["policy"]}"

{counts} episodes of {settings["episode_length"]} actions (T = {settings["episode_length"] + 1} frames, 10 per second),
simulated with cjepa-hf, seed {settings["seed"]}. One row per episode:

- `episode_id`: string
{columns}

Positions are pixels of the 512 px table, angles radians in [0, 2 pi), velocities pixels per second. The arguments of
the collection are in `collection.json`.
"""


def _check_arguments(num_episodes, episode_length, policy, seed, num_workers, frames_resolution, shard_size):
    unknown = set(num_episodes) - set(_SPLITS)
    if unknown:
        raise ValueError(f"num_episodes has splits {sorted(unknown)}; expected {', '.join(_SPLITS)}.")
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r}; expected one of {POLICIES}.")
    whole = [(f"num_episodes[{split!r}]", count, 0) for split, count in num_episodes.items()]
    whole += [("episode_length", episode_length, 1), ("seed", seed, 0), ("shard_size", shard_size, 1)]
    whole += [("num_workers", num_workers, 1)] if num_workers is not None else []
    whole += [("frames_resolution", frames_resolution, 4)] if frames_resolution is not None else []
    for name, value, least in whole:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}={value!r}; expected a whole number, at least {least}.")
    if not any(num_episodes.values()):
        raise ValueError(f"num_episodes={dict(num_episodes)} asks for no episode; give at least one split a count.")


def _check_same(path, settings):
    try:
        there = json.loads(path.read_text())
        other = [name for name in settings if there.get(name) != settings[name]]
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete {path.parent} and collect again.") from error
    if other:
        differences = ", ".join(f"{name}: {there.get(name)!r} there, {settings[name]!r} asked for" for name in other)
        raise ValueError(
            f"{path} belongs to a collection made with other arguments ({differences}). Use those arguments, or "
            "choose another folder."
        )


def sample_encoder_frames(
    num_frames: int, seed: int, resolution: int = 64, style: str = "smooth"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Single Push-T frames for training a slot encoder, in random order.

    70 % of the states come from "gentle" episodes (20 of each; none of a collected data set), 30 % are an agent and a
    block anywhere on the table at rest. The green T is at a random pose in 70 % of the frames, (x, y) U(110, 400)^2
    with any angle, and at its default pose in the rest.

    Args:
        num_frames: n, at least 1.
        seed: the same seed gives the same frames.
        resolution, style: see `render_push_t`.

    Returns:
        frames [n, resolution, resolution, 3] uint8 RGB, states [n, 7] float64, goal poses [n, 3] float64.

    Raises:
        ValueError: bad arguments.
    """
    for name, value, least in (("num_frames", num_frames, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}={value!r}; expected a whole number, at least {least}.")
    rng = np.random.default_rng(np.random.SeedSequence((seed, _ENCODER_STREAM)))
    scattered = random_states(round(0.3 * num_frames), rng, agent_range=(0, TABLE_SIZE), block_range=(0, TABLE_SIZE))
    world, states, left, index = PushTWorld(), [scattered], num_frames - len(scattered), 0
    while left > 0:
        episode = _run_episode(world, "gentle", (seed, _ENCODER_STREAM, index), 80)["state"]
        states.append(rng.choice(episode, min(20, left), replace=False))
        left, index = left - len(states[-1]), index + 1
    states = rng.permutation(np.concatenate(states))
    goal_poses = np.tile(GOAL_POSE, (num_frames, 1))
    moved = rng.permutation(num_frames)[: round(0.7 * num_frames)]
    goal_poses[moved, :2] = rng.uniform(110, 400, (len(moved), 2))
    goal_poses[moved, 2] = rng.uniform(0, 2 * math.pi, len(moved))
    frames = render_push_t(states, goal_pose=goal_poses, resolution=resolution, style=style)
    return frames, states, goal_poses
