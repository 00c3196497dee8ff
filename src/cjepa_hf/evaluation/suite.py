"""`cjepa-hf evaluate`: a world model, its planners and its controls on one frozen protocol."""

import platform
import re
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoImageProcessor

import cjepa_hf
from cjepa_hf.evaluation.metrics import success_rate
from cjepa_hf.evaluation.protocols import load_protocol
from cjepa_hf.evaluation.push_t import run_baseline, run_policy, simulator_policy
from cjepa_hf.models.cjepa import CJepaModel
from cjepa_hf.planning.mpc import MPCPolicy
from cjepa_hf.planning.planners import CEMPlanner, default_planner


def parse_planner(text: str) -> tuple[CEMPlanner, str]:
    """Planner and schedule of "default", "paper" or "cem:SAMPLESxITERATIONS:ELITES", optionally with "/schedule"."""
    name, _, schedule = text.partition("/")
    if schedule not in ("", "receding", "shrinking"):
        raise ValueError(f"planner {text!r}: the schedule must be receding or shrinking.")
    if name == "default":
        return default_planner(), schedule or "shrinking"
    if name == "paper":
        return CEMPlanner(), schedule or "receding"
    match = re.fullmatch(r"cem:(\d+)x(\d+):(\d+)", name)
    if match is None:
        raise ValueError(
            f"planner {text!r}: expected default, paper or cem:SAMPLESxITERATIONS:ELITES (cem:100x10:15)."
        )
    samples, iterations, elites = map(int, match.groups())
    return CEMPlanner(num_samples=samples, num_iterations=iterations, num_elites=elites), schedule or "shrinking"


def evaluate_push_t(
    model: str,
    *,
    protocol: str = "pusht-25",
    planners: Sequence[str] = ("default",),
    seeds: Sequence[int] = (0,),
    num_tasks: int | None = None,
    use_proprio: bool = True,
    style: str = "smooth",
    simulator_tasks: int | None = None,
    controls: bool = False,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """
    Runs every planner with every seed on the same tasks.

    Args:
        model: folder or Hub id of a [`CJepaModel`] with slot encoder and statistics.
        planners: see [`parse_planner`].
        simulator_tasks: also plan this many tasks with the true simulator as the model.

    Returns:
        {"rows": one dict per planner and seed or control, with rate, 95 % Wilson interval, n and, per task, "success";
        "protocol", "model", "hardware", "versions", ...}.
    """
    frozen = load_protocol(protocol)
    net = CJepaModel.from_pretrained(model, use_safetensors=True).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(model)
    rows = []

    def add(name, seed, results):
        rows.append({"name": name, "seed": seed, **results.summary(), "success": results.success.tolist()})

    for text in planners:
        for seed in seeds:
            planner, schedule = parse_planner(text)
            generator = torch.Generator().manual_seed(seed)
            policy = MPCPolicy(net, planner, image_processor=processor, schedule=schedule, generator=generator)
            add(
                f"{text}" + ("" if use_proprio else ", no proprioception"),
                seed,
                run_policy(
                    policy, frozen, num_tasks=num_tasks, use_proprio=use_proprio, style=style, progress=progress
                ),
            )
    if controls:
        for name in ("replay", "random", "no-op"):
            add(name, 0, run_baseline(name, frozen, num_tasks=num_tasks))
    if simulator_tasks:
        planner, schedule = parse_planner(planners[0])
        policy = simulator_policy(
            net.action_mean.cpu(),
            net.action_std.cpu(),
            frame_skip=net.config.frame_skip,
            planner=planner,
            schedule=schedule,
            generator=torch.Generator().manual_seed(seeds[0]),
        )
        add(
            f"true simulator, {planners[0]}",
            seeds[0],
            run_policy(policy, frozen, num_tasks=simulator_tasks, progress=progress),
        )
    return {
        "protocol": {key: value for key, value in frozen.items() if key != "tasks"},
        "model": str(model),
        "frames": style,
        "use_proprio": use_proprio,
        "device": device,
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "cjepa_hf": cjepa_hf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": rows,
        "pooled": {name: _pooled(rows, name) for name in dict.fromkeys(row["name"] for row in rows)},
    }


def _pooled(rows, name):
    """All seeds of a row together: the same tasks again, so the interval says nothing about other tasks."""
    return success_rate([success for row in rows if row["name"] == name for success in row["success"]])


def print_evaluation(results: dict[str, Any]) -> None:
    """The results of [`evaluate_push_t`] as a table."""
    print(f"{results['protocol']['name']}: {results['protocol']['description']}")
    print(
        f"{'':<34}{'seed':>5}{'n':>5}{'success':>9}  {'95 % interval':<14}{'near':>6}{'far':>6}{'plans':>7}{'s/plan':>8}"
    )
    for row in results["rows"]:
        bins = [row["bins"].get(name, {}).get("rate", float("nan")) for name in ("near", "far")]
        plans = f"{row['plans_per_task']:>7.1f}{row['seconds_per_plan']:>8.3f}" if "seconds_per_plan" in row else ""
        print(
            f"{row['name']:<34}{row['seed']:>5}{row['n']:>5}{row['rate']:>9.3f}  [{row['low']:.3f}, {row['high']:.3f}]"
            f"{bins[0]:>6.2f}{bins[1]:>6.2f}{plans}"
        )
