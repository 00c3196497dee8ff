"""Collect simulated episodes into a folder: Push-T for `datasets`, the collision world also in CLEVRER's own files.

Also samples single frames of Push-T for training a slot encoder."""

import io
import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm.auto import tqdm

from cjepa_hf.data.clevrer import scene_annotation, scene_path, scene_predictions, video_filename
from cjepa_hf.simulators.collisions import FPS, PHYSICS_VERSION, VISIBLE_FRAMES, sample_scene
from cjepa_hf.simulators.push_t import (
    CONTACT_PAIRS,
    PROPRIO_INDICES,
    STATE_NAMES,
    PushTWorld,
    random_states,
)
from cjepa_hf.simulators.questions import VideoTruth, make_counterfactual_questions, make_questions
from cjepa_hf.simulators.rendering import (
    GOAL_POSE,
    MAX_OBJECTS,
    OBJECT_STATE_NAMES,
    TABLE_SIZE,
    render_collisions,
    render_push_t,
)

POLICIES = ("gentle", "weak", "mixture")
_SPLITS = ("train", "validation", "test")  # the position is part of an episode's seed
_ENCODER_STREAM = 1000  # in the place of a split: frames for the encoder are of no collected episode
_COLLECTOR_VERSION = 1  # counts changes that make other episodes from the same seed
_TITLES = {"push_t": "Push-T", "collisions": "collision world"}
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


def run_episode(world: PushTWorld, policy: str, stream: tuple[int, int, int], length: int) -> dict[str, np.ndarray]:
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
        episode = run_episode(world, settings["policy"], stream, settings["episode_length"])
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


def _write_file(path: Path, content: bytes, *, sync: bool = True) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if sync:
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
    shard is written, README.md and collection.json last. Started in several processes (`accelerate launch`, `torchrun`,
    RANK and WORLD_SIZE), each one writes every n-th shard; all of them must see the folder.

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
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r}; expected one of {POLICIES}.")
    _check_arguments(num_episodes, seed, num_workers, frames_resolution, shard_size, episode_length)
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
    return _collect(
        folder,
        settings,
        _write_shard,
        title=f"push_t ({policy})",
        description=_DESCRIPTION,
        readme=_readme,
        num_workers=num_workers,
        progress=progress,
    )


def _collect(
    folder: Path,
    settings: dict[str, Any],
    write_shard: Callable[[Path, dict[str, Any], str, range], int],
    *,
    title: str,
    description: dict[str, Any],
    readme: Callable[[dict[str, Any]], str],
    finish: Callable[[Path, dict[str, Any]], None] | None = None,
    num_workers: int | None,
    progress: bool,
) -> Path:
    """Write all shards in parallel into a hidden folder, going on where an earlier run stood, and move them into place.

    Args:
        settings: what the content depends on, with `num_episodes` per split and `shard_size`; a folder made with others
            is refused.
        write_shard: writes the Parquet file of a shard (path, settings, split, indices of its episodes), last of all
            that it writes below the hidden folder (`path.parents[1]`), and returns how many episodes these are.
        finish: called with the hidden folder when all shards are there; what it leaves beside `data` is moved too.
    """
    shards = {}
    shard_size = settings["shard_size"]
    for split, count in settings["num_episodes"].items():
        total = math.ceil(count / shard_size)
        for k in range(total):
            name = f"{split}-{k:05d}-of-{total:05d}.parquet"
            shards[name] = (split, range(k * shard_size, min((k + 1) * shard_size, count)))

    data, final = folder / "data", folder / "collection.json"
    working = folder / ".collecting"  # hidden: `load_dataset` never looks inside
    # several processes, also of several machines, share the shards and meet in the folder
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        _wait(lambda: final.exists() or (working / "collection.json").exists())
    found = next((path for path in (final, working / "collection.json") if path.exists()), None)
    if found is not None:
        _check_same(found, settings)
    elif folder.exists() and (not folder.is_dir() or any(path != working for path in folder.iterdir())):
        raise ValueError(
            f"{folder} exists and is not a {_TITLES[settings['simulator']]} collection; choose a new or empty folder."
        )
    if data.exists():
        missing = [name for name in shards if not (data / name).is_file()]
        if missing:
            raise ValueError(
                f"{data} lacks {', '.join(missing[:3])}: files were removed. Delete {folder}, collect again."
            )
    if rank > 0 and data.exists():
        _wait(final.exists)
    if final.exists():
        if rank == 0:
            shutil.rmtree(working, ignore_errors=True)
        return folder

    if not data.exists():
        if rank == 0:
            (working / "data").mkdir(parents=True, exist_ok=True)
        if found is None:
            _write_file(working / "collection.json", _json(settings))
        mine = dict(list(shards.items())[rank::world])
        for name in mine:
            for leftover in (working / "data").glob(f".{name}.*.partial"):
                leftover.unlink(missing_ok=True)
        todo = {name: work for name, work in mine.items() if not (working / "data" / name).exists()}
        done = sum(len(indices) for name, (_, indices) in mine.items() if name not in todo)
        bar = tqdm(
            total=sum(len(indices) for _, indices in mine.values()),
            initial=done,
            unit="episode",
            desc=f"collecting {title}" + (f" (process {rank + 1} of {world})" if world > 1 else ""),
            disable=not progress or rank > 0,
        )
        with bar:
            jobs = [(working / "data" / name, settings, *work) for name, work in todo.items()]
            _run_jobs(write_shard, jobs, num_workers, bar.update)
        if rank > 0:
            _wait(final.exists)
            return folder
        _wait(lambda: all((working / "data" / name).exists() for name in shards))
        if finish is not None:
            finish(working, settings)
        for extra in working.iterdir():
            if extra.is_dir() and extra.name != "data" and not extra.name.startswith("."):
                shutil.rmtree(folder / extra.name, ignore_errors=True)  # of an earlier run that ended here
                os.replace(extra, folder / extra.name)
        os.replace(working / "data", data)  # all shards at once
    _write_file(folder / "README.md", readme(settings).encode())
    _write_file(final, _json({"schema_version": 1, **settings, **description}))
    shutil.rmtree(working, ignore_errors=True)
    return folder


def _wait(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.2)


def _run_jobs(write_shard, jobs, num_workers, update):
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_workers = min(num_workers, len(jobs))
    if num_workers <= 1:
        for job in jobs:
            update(write_shard(*job))
        return
    # spawned: forking a process that has run torch or Arrow threads can hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker) as executor:
        futures = [executor.submit(write_shard, *job) for job in jobs]
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


def _check_arguments(num_episodes, seed, num_workers, frames_resolution, shard_size, episode_length=1):
    unknown = set(num_episodes) - set(_SPLITS)
    if unknown:
        raise ValueError(f"num_episodes has splits {sorted(unknown)}; expected {', '.join(_SPLITS)}.")
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


def collect_collisions(
    output_dir: str | os.PathLike,
    *,
    num_scenes: Mapping[str, int] | None = None,
    seed: int = 0,
    num_workers: int | None = None,
    frames_resolution: int | None = None,
    videos: bool = False,
    shard_size: int = 100,
    progress: bool = True,
) -> Path:
    """Sample scenes of the collision world with questions and true counterfactuals, in CLEVRER's files.

    A scene depends on `seed`, split and its place in the split only; the collection is parallel and goes on after an
    interruption as `collect_push_t` does. Scenes are numbered through all splits in order. The folder has, as CLEVRER
    does (read by `data.clevrer.ClevrerFolder`):

    - `questions/<split>.json`, and `<split>_plain.json`: counterfactual questions of the same videos whose options are
      not balanced over what the removal changes (copying the video's own outcome answers most of them);
    - `annotations/<split>/annotation_AAAAA-BBBBB/annotation_NNNNN.json`;
    - `predictions/<split>/sim_AAAAA-BBBBB/sim_NNNNN.json`: hidden collisions, and the scene without each object, from
      simulation; and its start, for `CollisionWorld.from_dict`;
    - `videos/<split>/video_AAAAA-BBBBB/video_NNNNN.mp4` (480 x 320, 25 per second) if asked for;
    - `data/`: Parquet for `datasets.load_dataset(str(folder))`, one row per video: `episode_id` ("video_NNNNN"),
      `state` [128, 60] float32 (6 places of `OBJECT_STATE_NAMES`), `frames` (128 PNG images) if asked for.

    Args:
        output_dir: the folder: new, empty, or of the same collection.
        num_scenes: per split ("train", "validation", "test"); default 10,000, 1,000 and 1,000.
        seed: >= 0.
        num_workers: processes; default one per core, 1 runs in this process. They are spawned: a script that calls
            this needs `if __name__ == "__main__":`.
        frames_resolution: also store square frames of this many pixels; None: none (they can be drawn from the states).
        videos: also write mp4 files; needs `pip install "cjepa-hf[video]"`.
        shard_size: scenes per Parquet file, which is also what an interruption can lose of each process.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: bad arguments; a folder made with other arguments or holding something else.
        ImportError: `videos` without PyAV.
        OSError: the disk is full or not writable; finished shards are kept.
        RuntimeError: a worker process was killed; finished shards are kept.
    """
    num_scenes = {"train": 10_000, "validation": 1_000, "test": 1_000} if num_scenes is None else dict(num_scenes)
    _check_arguments(num_scenes, seed, num_workers, frames_resolution, shard_size)
    if videos:
        _import_av()
    settings = {
        "simulator": "collisions",
        "collector_version": _COLLISIONS_VERSION,
        "physics_version": PHYSICS_VERSION,
        "seed": int(seed),
        "num_episodes": {split: int(num_scenes[split]) for split in _SPLITS if num_scenes.get(split)},
        "frames_resolution": None if frames_resolution is None else int(frames_resolution),
        "videos": bool(videos),
        "shard_size": int(shard_size),
    }
    return _collect(
        Path(output_dir),
        settings,
        _write_scenes,
        title="collisions",
        description=_COLLISIONS_DESCRIPTION,
        readme=_collisions_readme,
        finish=_join_questions,
        num_workers=num_workers,
        progress=progress,
    )


_COLLISIONS_VERSION = 1  # counts changes that make other scenes or questions from the same seed
_SCENE_STREAM, _QUESTION_STREAM, _PLAIN_STREAM = 2000, 2001, 2002


def _write_scenes(path: Path, settings: dict[str, Any], split: str, indices: range) -> int:
    """The files of the scenes `indices` of a split; the Parquet file comes last: with it the shard counts as done."""
    import pyarrow.parquet
    from datasets import Array2D, Dataset, Features, Image, List, Value

    root, splits = path.parents[1], settings["num_episodes"]
    offset = sum(splits.get(earlier, 0) for earlier in _SPLITS[: _SPLITS.index(split)])
    parts: dict[str, list] = {"": [], "_plain": []}
    columns: dict[str, list] = {"episode_id": [], "state": []}
    for index in indices:
        number, key = offset + index, (settings["seed"], _SPLITS.index(split), index)

        def random(stream, key=key):
            return np.random.default_rng(np.random.SeedSequence((stream, *key)))

        scene = sample_scene(random(_SCENE_STREAM))
        annotation, predictions = scene_annotation(scene, number), scene_predictions(scene, number)
        for kind, content in (("annotation", annotation), ("predictions", predictions)):
            file = root / scene_path(kind, split, number)
            file.parent.mkdir(parents=True, exist_ok=True)
            _write_file(file, json.dumps(content, separators=(",", ":")).encode(), sync=False)
        # from what was stored, which is rounded: answers agree with the files to the last digit
        truth = VideoTruth(annotation, predictions)
        questions = make_questions(truth, random(_QUESTION_STREAM))
        plain = make_counterfactual_questions(truth, random(_PLAIN_STREAM), balanced=False)
        for variant, found in (("", questions), ("_plain", plain)):
            scene_questions = {"scene_index": number, "video_filename": video_filename(number), "questions": found}
            parts[variant].append(scene_questions)
        states = scene.episode.states[:VISIBLE_FRAMES]
        columns["episode_id"].append(f"video_{number:05d}")
        columns["state"].append(states.astype(np.float32))
        if settings["frames_resolution"] is not None:
            frames = render_collisions(states, resolution=settings["frames_resolution"])
            columns.setdefault("frames", []).append([_png(frame) for frame in frames])
        if settings["videos"]:
            _write_video(root / scene_path("video", split, number), render_collisions(states))
    (root / ".questions").mkdir(exist_ok=True)
    _write_file(root / ".questions" / f"{path.stem}.json", json.dumps(parts).encode())
    features = {
        "episode_id": Value("string"),
        "state": Array2D((None, MAX_OBJECTS * len(OBJECT_STATE_NAMES)), "float32"),
    }
    if "frames" in columns:
        features["frames"] = List(Image())
    dataset, buffer = Dataset.from_dict(columns, features=Features(features)), io.BytesIO()
    table = dataset.data.table.replace_schema_metadata(dataset.features.arrow_schema.metadata)
    pyarrow.parquet.write_table(table, buffer)
    _write_file(path, buffer.getvalue())
    return len(indices)


def _join_questions(working: Path, settings: dict[str, Any]) -> None:
    (working / "questions").mkdir(exist_ok=True)
    for split in settings["num_episodes"]:
        parts = [json.loads(p.read_text()) for p in sorted((working / ".questions").glob(f"{split}-*-of-*.json"))]
        for variant in ("", "_plain"):
            scenes = [scene for part in parts for scene in part[variant]]
            _write_file(working / "questions" / f"{split}{variant}.json", json.dumps(scenes).encode())


def _import_av():
    try:
        import av
    except ImportError as error:
        raise ImportError('videos=True needs PyAV: run `pip install "cjepa-hf[video]"`.') from error
    return av


def _write_video(path: Path, frames: np.ndarray) -> None:
    av = _import_av()
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "18", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    _write_file(path, buffer.getvalue(), sync=False)


_COLLISIONS_DESCRIPTION = {
    "columns": {
        "state": f"[{VISIBLE_FRAMES}, {MAX_OBJECTS * len(OBJECT_STATE_NAMES)}] float32: {MAX_OBJECTS} times "
        + ", ".join(OBJECT_STATE_NAMES)
    },
    "units": {"position": "world units, the view is 6 x 4 around 0", "angle": "rad", "velocity": "units/s, rad/s"},
    "fps": FPS,
}


def _collisions_readme(settings):
    files = "".join(
        f"      - split: {split}\n        path: data/{split}-*.parquet\n" for split in settings["num_episodes"]
    )
    counts = ", ".join(f"{count} {split}" for split, count in settings["num_episodes"].items())
    frames, videos = settings["frames_resolution"], settings["videos"]
    more = f"- `frames`: {VISIBLE_FRAMES} PNG images of {frames} px\n" if frames is not None else ""
    return f"""---
configs:
  - config_name: default
    data_files:
{files}tags:
  - video-question-answering
  - world-model
---

# Collision world

{counts} scenes of {VISIBLE_FRAMES} frames ({FPS} per second) with questions in CLEVRER's form, simulated with cjepa-hf,
seed {settings["seed"]}. `questions/`, `annotations/`{", `videos/`" if videos else ""} as in CLEVRER, `predictions/` in
NS-DR's form: what happens after the video, and without each of its objects. In `questions/*_plain.json` the options of
counterfactual questions are not balanced over what the removal changes. One row per video in `data/`:

- `episode_id`: string, the video's name
- `state`: {_COLLISIONS_DESCRIPTION["columns"]["state"]}
{more}
Lengths are world units (the view is 6 x 4, its origin in the middle, x right, y down), angles radians, velocities units
and radians per second. The arguments of the collection are in `collection.json`.
"""


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
        episode = run_episode(world, "gentle", (seed, _ENCODER_STREAM, index), 80)["state"]
        states.append(rng.choice(episode, min(20, left), replace=False))
        left, index = left - len(states[-1]), index + 1
    states = rng.permutation(np.concatenate(states))
    goal_poses = np.tile(GOAL_POSE, (num_frames, 1))
    moved = rng.permutation(num_frames)[: round(0.7 * num_frames)]
    goal_poses[moved, :2] = rng.uniform(110, 400, (len(moved), 2))
    goal_poses[moved, 2] = rng.uniform(0, 2 * math.pi, len(moved))
    frames = render_push_t(states, goal_pose=goal_poses, resolution=resolution, style=style)
    return frames, states, goal_poses
