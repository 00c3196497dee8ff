"""A world model in stable-worldmodel's own Push-T, under its own CEM and policy, on the tasks of a frozen protocol.

    pip install "cjepa-hf[swm]" pygame shapely imageio
    python benchmarks/stable_worldmodel_push_t.py --output benchmarks/results/pusht-25_stable_worldmodel.json
    python benchmarks/stable_worldmodel_push_t.py --samples 300 --steps 30 --elites 30 --num-tasks 50     # the paper's planner

Their `World` draws the frames (pygame, 224 px, made smaller to what the encoder takes), moves the block and says what a success
is; their `CEMSolver` and `WorldModelPolicy` plan 5 steps of 5 actions ahead, and again when those are done. Ours is the cost alone.
Start and goal states are those of the protocol.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import stable_worldmodel as swm
from stable_worldmodel.policy import PlanConfig, WorldModelPolicy

from cjepa_hf import bundled_checkpoint
from cjepa_hf.evaluation.metrics import success_rate
from cjepa_hf.evaluation.protocols import load_protocol, measured_on
from cjepa_hf.evaluation.push_t import select_tasks
from cjepa_hf.planning.stable_worldmodel import StableWorldModelCost

try:
    from stable_worldmodel.solver import CEMSolver
except ImportError:  # newer releases
    from stable_worldmodel.planning.solver import CEMSolver


def play(cost, tasks, args):
    """Successes bool [n] by their ruling, in the order in which tasks ended, each task in a world of its own; and seconds."""
    count = len(tasks["state"])
    size = cost.model.slot_encoder.config.image_size
    world = swm.World("swm/PushT-v1", num_envs=count, image_shape=(size, size), max_episode_steps=args.budget)
    solver = CEMSolver(cost, num_samples=args.samples, n_steps=args.steps, topk=args.elites, seed=args.seed)
    config = PlanConfig(horizon=5, receding_horizon=5, action_block=cost.frame_skip)
    world.set_policy(WorldModelPolicy(solver, config, process=cost.process()))
    starts = zip(tasks["state"], tasks["goal_state"], strict=True)
    options = [{"state": np.asarray(state), "goal_state": np.asarray(goal)} for state, goal in starts]
    start = time.perf_counter()
    found = world.evaluate(episodes=count, seed=args.seed, options=options, reset_mode="wait")
    return found["episode_successes"].astype(bool), time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(bundled_checkpoint()), help="(default: the shipped one)")
    parser.add_argument("--protocol", default="pusht-25", choices=["pusht-25", "pusht-25-validation"])
    parser.add_argument("--num-tasks", type=int, help="only the first ones (default: all)")
    parser.add_argument("--samples", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--elites", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    frozen = load_protocol(args.protocol)
    args.budget, tasks = frozen["budget"], select_tasks(frozen, args.num_tasks)
    cost = StableWorldModelCost.from_pretrained(args.model)
    cost.objective.proprio_weight = frozen["goal_proprio_weight"]
    successes, seconds = play(cost, tasks, args)
    results = {
        "protocol": {
            key: frozen[key] for key in ("name", "version", "goal_offset", "budget", "goal_proprio_weight", "source")
        },
        "model": "the shipped one" if args.model == str(bundled_checkpoint()) else Path(args.model).name,
        "environment": "swm/PushT-v1",
        "planner": f"their CEM, {args.samples} x {args.steps}, {args.elites} elites, horizon 5, receding 5",
        "seed": args.seed,
        "stable-worldmodel": version("stable-worldmodel"),
        **measured_on("cpu"),
        **success_rate(successes),
        "seconds": seconds,
    }
    print("success {rate:.3f} [{low:.3f}, {high:.3f}], n = {n}, {seconds:.0f} s".format(**results))
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
