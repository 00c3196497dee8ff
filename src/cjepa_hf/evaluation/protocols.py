"""Frozen evaluation protocols. A protocol is a file: its tasks and rules never change under a name."""

import json
import platform
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

import cjepa_hf
from cjepa_hf.simulators.push_t import push_t_success, state_errors

_VALIDATION_SEED = 2_000_003
_FOLDER = resources.files("cjepa_hf.evaluation") / "protocols"


def protocol_names() -> list[str]:
    """What [`load_protocol`] takes."""
    frozen = [path.name.removesuffix(".json") for path in _FOLDER.iterdir() if path.name.endswith(".json")]
    return sorted([*frozen, "cf-rollout-validation", "pusht-25-validation"])


def load_protocol(name: str) -> dict[str, Any]:
    """
    The protocol of this name: its rules, and `tasks`. Those of "pusht-25" are a dict of arrays: "state" [n, 7],
    "goal_state" [n, 7], "actions" [n, goal_offset, 2] (the demonstration between them), "block_move" [n] px, "bin" [n].
    Those of "cf-rollout" are a list of scenes, see [`make_cf_rollout_scene`].

    "pusht-25-validation" and "cf-rollout-validation" have other tasks by the same recipes, drawn when asked for (the 100
    scenes of the latter in about a minute): choose planners, settings and training recipes on them.
    """
    if name == "cf-rollout-validation":
        return make_cf_rollout_protocol(100, seed=_VALIDATION_SEED) | {"name": name}
    if name == "pusht-25-validation":
        protocol = make_push_t_protocol(seed=_VALIDATION_SEED) | {"name": name}
        protocol["tasks"] = {key: np.array(value) for key, value in protocol["tasks"].items()}
        return protocol
    path = _FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"unknown protocol {name!r}; expected one of {protocol_names()}.")
    protocol = json.loads(path.read_text())
    if name == "cf-rollout":
        return protocol
    protocol["tasks"] = {key: np.array(value) for key, value in protocol["tasks"].items()}
    return protocol


def make_push_t_protocol(
    num_tasks: int = 200, goal_offset: int = 25, budget: int = 50, bin_edge: float = 75.0, seed: int = 1_000_003
) -> dict[str, Any]:
    """
    Draws the tasks of `pusht-25` (half of them in each bin); the file in the package was written by this function.

    Each task is a stretch of an own "gentle" episode that no data set holds (split "test" of a seed of its own): a
    start, and as goal the state `goal_offset` steps later. Kept are those in which the block moves more than 20 px or
    turns more than 20 degrees (so that none is solved at the start) and everything stays on the table throughout.
    """
    from cjepa_hf.data.collect import run_episode
    from cjepa_hf.simulators.push_t import PushTWorld

    world, rng = PushTWorld(), np.random.default_rng(seed)
    tasks = {key: [] for key in ("state", "goal_state", "actions", "block_move", "bin")}
    room = {"near": num_tasks // 2, "far": num_tasks - num_tasks // 2}
    index = 0
    while sum(room.values()):
        episode = run_episode(world, "gentle", (seed, 2, index), 80)
        index += 1
        start = int(rng.integers(5, 81 - goal_offset))
        state, goal = (np.round(episode["state"][t], 4) for t in (start, start + goal_offset))
        move = float(np.linalg.norm(goal[2:4] - state[2:4]))
        turn = float(state_errors(state, goal)[1])
        name = "near" if move < bin_edge else "far"
        inside = _inside(episode["state"][start : start + goal_offset + 1])
        if not inside or not room[name] or not (move > 20 or turn > np.deg2rad(20)) or push_t_success(goal, state):
            continue
        room[name] -= 1
        actions = np.round(episode["actions"][start : start + goal_offset].astype(float), 6)
        for key, value in zip(tasks, (state, goal, actions, round(move, 2), name)):
            tasks[key].append(value if isinstance(value, float | str) else value.tolist())
    return {
        "name": f"pusht-{goal_offset}",
        "version": 1,
        "environment": "cjepa_hf/PushT-v0",
        "description": (
            f"{num_tasks} held-out Push-T tasks: reach the state {goal_offset} steps ahead within {budget} steps. Goals "
            "are images; current proprioception may be used, goal proprioception not."
        ),
        "success": "agent and block jointly within 20 px and the block's angle within 20 degrees, at any step",
        "angle_rule": "modulo",
        "goal_offset": goal_offset,
        "budget": budget,
        "goal_proprio_weight": 0.0,
        "bins": {"near": f"block moves less than {bin_edge:g} px", "far": f"block moves {bin_edge:g} px or more"},
        "filter": "block moves more than 20 px or turns more than 20 degrees; along the whole demonstration the block's "
        "origin stays in (60, 450) and the agent in (15, 497) px",
        "source": {"policy": "gentle", "seed": seed, "split": "test", "episode_length": 80},
        "tasks": tasks,
    }


def make_cf_rollout_scene(seed: int, index: int) -> dict[str, Any] | None:
    """
    Scene `index` of `cf-rollout` (None: what happens in it changes when its start is rounded).

    {"objects": [[shape, color, material, x, y, vx, vy, angle, spin]] (the start, world units), "unsure": {removed: pairs
    not to be asked about}, "questions": [{"removed", "question", "options", "pairs" (of each option), "negated",
    "answers"}]}: the counterfactual questions of the scene, balanced.
    """
    from cjepa_hf.data.clevrer import scene_annotation, scene_predictions
    from cjepa_hf.simulators.collisions import VISIBLE_FRAMES, CollisionScene, sample_scene
    from cjepa_hf.simulators.questions import VideoTruth, answer_question, make_counterfactual_questions

    random, wording = (np.random.default_rng(np.random.SeedSequence((seed, stream, index))) for stream in (0, 1))
    scene = sample_scene(random)
    objects = [
        [o.shape, o.color, o.material, *(round(v, 4) for v in (*o.position, *o.velocity, o.angle, o.angular_velocity))]
        for o in scene.world.objects
    ]
    world = cf_rollout_world(objects)
    episode, removals = world.simulate(), {i: world.without(i).simulate(VISIBLE_FRAMES) for i in world.ids}
    same = episode.pairs() == scene.episode.pairs() and all(
        removals[i].pairs() ^ scene.removals[i].pairs() <= scene.unsure[i] for i in world.ids
    )
    if not same:
        return None
    rounded = CollisionScene(world, episode, removals, scene.unsure)
    truth = VideoTruth(scene_annotation(rounded, index), scene_predictions(rounded, index))
    questions = []
    for question in make_counterfactual_questions(truth, wording):
        right, negated = answer_question(truth, question), "negate" in question["program"]
        found: list[list] = [None] * len(right)
        for gone in world.ids:
            for pair in ((a, b) for a in world.ids for b in world.ids if a < b):
                # which option this pair decides, if `gone` is what the question takes away
                truth.counterfactuals = {i: {pair} if i == gone else set() for i in world.ids}
                for k, answer in enumerate(answer_question(truth, question)):
                    if (answer == "correct") != negated:
                        found[k], removed = list(pair), gone
        truth = VideoTruth(scene_annotation(rounded, index), scene_predictions(rounded, index))
        questions.append(
            {
                "removed": removed,
                "question": question["question"],
                "options": [choice["choice"] for choice in question["choices"]],
                "pairs": found,
                "negated": negated,
                "answers": right,
            }
        )
    unsure = {str(i): sorted(map(list, pairs)) for i, pairs in scene.unsure.items() if pairs}
    return {"objects": objects, "unsure": unsure, "questions": questions}


def cf_rollout_world(objects: list[list]) -> Any:
    """The [`CollisionWorld`] of a scene's "objects"."""
    from cjepa_hf.simulators.collisions import CollisionObject, CollisionWorld

    return CollisionWorld(
        [CollisionObject(*o[:3], tuple(o[3:5]), tuple(o[5:7]), angle=o[7], angular_velocity=o[8]) for o in objects]
    )


def make_cf_rollout_protocol(
    num_scenes: int = 500, seed: int = 1_000_003, progress: bool = False, scenes: Sequence[dict] | None = None
) -> dict[str, Any]:
    """
    Draws `cf-rollout` (about 0.5 s per scene); the file in the package was written by this function. Its scenes follow the
    recipe of `cjepa-hf collect collisions` but from random numbers of their own, so that no data set holds them.
    """
    from cjepa_hf.simulators.collisions import PHYSICS_VERSION

    if scenes is None:
        scenes, index = [], 0
        with tqdm(total=num_scenes, desc="scenes", disable=not progress) as bar:
            while len(scenes) < num_scenes:
                scene = make_cf_rollout_scene(seed, index)
                index += 1
                if scene is not None:
                    scenes.append(scene)
                    bar.update()
    return {
        "name": "cf-rollout",
        "version": 1,
        "environment": "cjepa_hf.CollisionWorld",
        "physics_version": PHYSICS_VERSION,
        "description": f"{len(scenes)} held-out collision scenes: imagine each without one of its objects.",
        "removals": "every object whose first contact lies in frames 8 to 112",
        "first_contact": [8, 112],
        "frame_skip": 4,
        "starts": {
            "B": "branch point: up to 6 observed steps that end with the frame of the removed object's first contact, which "
            "is the last in which both worlds are the same",
            "A": "the beginning: frames 0, 4, 8 are observed",
        },
        "history_length": 6,
        "early_history_length": 3,
        "entries": "an object that enters later is shown for 3 steps, as it was in the video, as long as it has had no "
        "contact",
        "entry_steps": 3,
        "last_frame": 127,
        "events": "pairs without the removed object that collide after the start and up to the last frame; pairs that met "
        "before, and pairs whose meeting depends on noise of 1e-3, are not asked about",
        "readout": "a linear probe reads positions from slots; whether a pair touches between two steps is judged by a "
        "logistic regression on how near they come, or on that and the kink of their paths. Both learn from the video "
        "slots of training scenes; which of the two, and its threshold, each system chooses by its F1 on videos of the "
        "validation split imagined from their beginning. Nothing learns from a counterfactual.",
        "cells": "(happens in the video, happens without the object); informative: the two differ",
        "third_object": "informative, and before the pair meets (in the world where it does) one of the two touches a third "
        "object in the world without the removed one: free flight is not enough",
        "displaced": "objects in view that are more than 0.28, their radius, from where the video has them",
        "horizons": [16, 32, 48, 64],
        "horizons_from": "the removed object's first contact",
        "wrong_object": "removes another object that is in view at the start, the one with the next higher number",
        "source": {"recipe": "collect collisions", "seed": seed},
        "tasks": list(scenes),
    }


def measured_on(device: str) -> dict[str, Any]:
    """The entries of a file of results that say where it was measured: device, hardware and versions."""
    return {
        "device": device,
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "cjepa_hf": cjepa_hf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _inside(states: np.ndarray) -> bool:
    """Whether the block's origin stays in (60, 450) and the agent in (15, 497), px, in all states [T, 7]."""
    agent, block = states[:, :2], states[:, 2:4]
    return bool(((block > 60) & (block < 450)).all() and ((agent > 15) & (agent < 497)).all())


def main() -> None:
    """Prints a protocol: `python -m cjepa_hf.evaluation.protocols pusht-25 > pusht-25.json`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "pusht-25"
    made = {"pusht-25": make_push_t_protocol, "cf-rollout": lambda: make_cf_rollout_protocol(progress=True)}
    if name not in made:
        raise SystemExit(f"unknown protocol {name!r}; expected one of {sorted(made)}")
    print(protocol_text(made[name]()))


def protocol_text(protocol: dict[str, Any]) -> str:
    """The content of its file: the tasks stand on lines of their own."""
    if isinstance(protocol["tasks"], dict):
        return json.dumps(protocol, separators=(",", ":")).replace('"tasks":', '\n"tasks":')
    rules = json.dumps({key: value for key, value in protocol.items() if key != "tasks"}, indent=1)
    scenes = ",\n".join(json.dumps(scene, separators=(",", ":")) for scene in protocol["tasks"])
    return f'{rules[:-2]},\n "tasks": [\n{scenes}\n]}}'


if __name__ == "__main__":
    main()
