"""Speed of the simulators: steps of Push-T, frames drawn, collision scenes. One process, prints json.

python benchmarks/simulator.py --output benchmarks/results/simulator.json
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from common import hardware, seconds, write_result

from cjepa_hf.simulators.collisions import VISIBLE_FRAMES, sample_scene
from cjepa_hf.simulators.push_t import PushTWorld
from cjepa_hf.simulators.rendering import render_collisions, render_push_t

STEPS, FRAMES, SCENES = 5000, 1000, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="also write the json to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    world, actions = PushTWorld(), rng.uniform(-1, 1, (STEPS, 2))
    world.set_state(np.array([256.0, 400.0, 256.0, 256.0, 0.5, 0.0, 0.0]))
    states = np.zeros((FRAMES, 7))

    def push():
        for index, action in enumerate(actions):
            state = world.step(action)
            if index < FRAMES:
                states[index] = state

    result = {"benchmark": "simulator", "hardware": hardware(torch, torch.device("cpu")), "repeats": args.repeats}
    times = seconds(push, args.repeats + 1, lambda: None)[1:]
    result["push_t_steps_per_s"] = STEPS / statistics.median(times)
    for style in ("smooth", "aliased"):
        times = seconds(lambda style=style: render_push_t(states, style=style), args.repeats + 1, lambda: None)[1:]
        result[f"push_t_frame_64px_{style}_ms"] = 1000 * statistics.median(times) / FRAMES

    worlds = [sample_scene(np.random.default_rng(seed)).world for seed in range(SCENES)]
    times = seconds(lambda: [world.simulate() for world in worlds], args.repeats + 1, lambda: None)[1:]
    result["collision_videos_of_175_frames_per_s"] = SCENES / statistics.median(times)
    states = worlds[0].simulate().states[:VISIBLE_FRAMES]
    times = seconds(lambda: render_collisions(states, resolution=64), args.repeats + 1, lambda: None)[1:]
    result["collision_frames_64px_per_s"] = len(states) / statistics.median(times)
    write_result(result, args.output)


if __name__ == "__main__":
    main()
