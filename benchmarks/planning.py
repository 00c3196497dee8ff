"""Speed of planning, as json: one CEM iteration at the paper's size, and whole plans with a checkpoint.

    python benchmarks/planning.py --output benchmarks/results/planning.json
    python benchmarks/planning.py --model path/to/checkpoint --output benchmarks/results/planning_checkpoint.json

The iteration (300 candidates, horizon 5, windows of 1, 2, 3, 3, 3 frames, 6 layers, 16 heads, D 128, MLP 2048, 4 slots
and 2 auxiliary tokens) counts as 214 GFLOP whatever an implementation skips. Its time is given in units of that work at
the rate of a 2048^3 bfloat16 matrix product measured between its repetitions, so that machines compare. Whole
plans are one search each, without the second one of `default_policy`, which depends on the task: `cjepa-hf evaluate` times
all of it. Run it on an idle machine.
"""

import argparse
from pathlib import Path

from common import hardware, in_units, restart_with_allocator_settings, seconds, summary, write_result

ITERATION_GFLOP = 214.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint to time whole plans with; without, only the paper's size is timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--threads", type=int, help="torch threads (torch's choice without)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunks", type=int, nargs="*", help="candidates per chunk to try (the default without)")
    parser.add_argument("--tasks", type=int, default=1, help="tasks planned together in the plans")
    parser.add_argument("--profile", action="store_true", help="add where the time of one iteration goes")
    parser.add_argument("--no_allocator_settings", action="store_true", help="leave glibc's settings as they are")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.device == "cpu" and not args.no_allocator_settings:
        restart_with_allocator_settings()

    import torch

    from cjepa_hf import CJepaConfig, CJepaModel
    from cjepa_hf.planning import (
        CEMPlanner,
        RolloutCost,
        SlotGoalCost,
        default_planner,
        default_replanner,
        sampling_planner,
        sampling_replanner,
    )

    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    torch.manual_seed(0)

    def cost_of(model, batch=1, **options):
        config = model.config
        slots = torch.randn(2, batch, config.num_slots, config.slot_size)
        proprio = torch.zeros(2, batch, config.proprio_size) if config.proprio_size else [None, None]
        return RolloutCost(
            model,
            SlotGoalCost(match_slots=options.get("match_slots", True)),
            slots[0].unsqueeze(1),
            slots[1],
            proprio=proprio[0].unsqueeze(1) if config.proprio_size else None,
            goal_proprio=proprio[1],
            **options,
        )

    result = {"benchmark": "planning", "hardware": hardware(torch, device), "dtype": args.dtype, "iterations": []}
    model = CJepaModel(CJepaConfig(action_size=10, proprio_size=4)).eval().to(device=device, dtype=dtype)
    actions = torch.randn(1, 300, 5, 10)
    for chunk in args.chunks or [None]:
        for match_slots in (False, True):
            cost_fn = cost_of(model, max_candidates_per_chunk=chunk, match_slots=match_slots)
            timing = in_units(lambda fn=cost_fn: fn(actions), ITERATION_GFLOP, args.repeats, torch, device)
            result["iterations"].append(
                {"candidates_per_chunk": cost_fn.chunk_size, "match_slots_in_rollout": match_slots, **timing}
            )

    if args.profile:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        cost_fn = cost_of(model)
        with torch.profiler.profile(activities=activities) as profile:
            cost_fn(actions)
            synchronize()
        attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        events = sorted(profile.key_averages(), key=lambda event: -getattr(event, attribute))
        total = sum(getattr(event, attribute) for event in events)
        result["profile"] = {event.key: round(getattr(event, attribute) / total, 4) for event in events[:12]}

    if args.model:
        model = CJepaModel.from_pretrained(args.model, use_safetensors=True).eval().to(device)
        result["plans"] = {"model": args.model, "model_dtype": str(model.dtype), "tasks": args.tasks, "planners": {}}
        small = {"match_slots": False, "window": getattr(model.config, "planning_window", None)}
        kinds = {
            "paper": ((CEMPlanner(),), {"match_slots": True}),
            "default": ((default_planner(model.config.frame_skip), *4 * (default_replanner(),)), small),
            "sampling": ((sampling_planner(model.config.frame_skip), *4 * (sampling_replanner(),)), small),
        }
        for name, (planners, options) in kinds.items():
            rows = []
            for horizon, planner in zip(range(5, 0, -1), planners, strict=False):
                cost_fn = cost_of(model, args.tasks, **options)

                def plan(planner=planner, cost_fn=cost_fn, horizon=horizon):
                    size = model.config.action_size
                    return planner.plan(
                        cost_fn, batch_size=args.tasks, horizon=horizon, action_size=size, device=device
                    )

                plan()
                rows.append(
                    {"horizon": horizon, "planner": repr(planner), **summary(seconds(plan, args.repeats, synchronize))}
                )
            result["plans"]["planners"][name] = {
                **options,
                "plans": rows,
                "seconds_until_the_goal": sum(row["median_s"] for row in rows),
                "seconds_per_task": sum(row["median_s"] for row in rows) / args.tasks,
            }
    write_result(result, args.output)


if __name__ == "__main__":
    main()
