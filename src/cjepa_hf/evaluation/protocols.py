"""Frozen evaluation protocols. A protocol is a file: its tasks and rules never change under a name."""

import json
from importlib import resources
from typing import Any

import numpy as np

from cjepa_hf.simulators.push_t import push_t_success, state_errors

_VALIDATION_SEED = 2_000_003
_FOLDER = resources.files("cjepa_hf.evaluation") / "protocols"


def protocol_names() -> list[str]:
    """What [`load_protocol`] takes."""
    frozen = [path.name.removesuffix(".json") for path in _FOLDER.iterdir() if path.name.endswith(".json")]
    return sorted([*frozen, "pusht-25-validation"])


def load_protocol(name: str) -> dict[str, Any]:
    """
    The protocol of this name: its rules, and `tasks`, a dict of arrays: "state" [n, 7], "goal_state" [n, 7], "actions"
    [n, goal_offset, 2] (the demonstration between them), "block_move" [n] px, "bin" [n].

    "pusht-25-validation" has other tasks by the same recipe, drawn when asked for: choose planners and settings on them.
    """
    if name == "pusht-25-validation":
        protocol = make_push_t_protocol(seed=_VALIDATION_SEED) | {"name": name}
        protocol["tasks"] = {key: np.array(value) for key, value in protocol["tasks"].items()}
        return protocol
    path = _FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"unknown protocol {name!r}; expected one of {protocol_names()}.")
    protocol = json.loads(path.read_text())
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


def _inside(states: np.ndarray) -> bool:
    """Whether the block's origin stays in (60, 450) and the agent in (15, 497), px, in all states [T, 7]."""
    agent, block = states[:, :2], states[:, 2:4]
    return bool(((block > 60) & (block < 450)).all() and ((agent > 15) & (agent < 497)).all())


def main() -> None:
    """Prints the protocol: `python -m cjepa_hf.evaluation.protocols > pusht-25.json`."""
    print(json.dumps(make_push_t_protocol(), separators=(",", ":")).replace('"tasks":', '\n"tasks":'))


if __name__ == "__main__":
    main()
