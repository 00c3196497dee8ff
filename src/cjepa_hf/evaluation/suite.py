"""`cjepa-hf evaluate`: a world model, its planners and its controls on one frozen protocol."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel

from cjepa_hf.evaluation.metrics import success_rate
from cjepa_hf.evaluation.protocols import load_protocol, measured_on
from cjepa_hf.evaluation.push_t import run_baseline, run_policy, select_tasks, simulator_policy
from cjepa_hf.models.cjepa import SlotWorldModel
from cjepa_hf.planning.costs import SlotGoalCost
from cjepa_hf.planning.mpc import MPCPolicy, default_policy
from cjepa_hf.planning.planners import CEMGDPlanner, CEMPlanner, sampling_planner, sampling_replanner


def make_policy(model: SlotWorldModel, text: str, *, image_processor=None, seed: int = 0) -> MPCPolicy:
    """
    The policy that a name describes: "default" ([`default_policy`]), "sampling" ([`sampling_planner`] and its replanner,
    which need no gradient, without a second search), "paper" (the paper's CEM, receding horizon, windows of the full history, slots matched throughout,
    patches never), or "cem:SAMPLESxITERATIONS:ELITES" (another CEM); "/receding", "/shrinking", "/window=W" and (with cem)
    "/held=STEPS" override single settings.
    """
    name, *changes = text.split("/")
    options: dict[str, Any] = {}
    if name == "paper":
        matched = getattr(model.config, "token_type", "slots") == "slots"
        options = {"planner": CEMPlanner(), "cost": SlotGoalCost(match_slots=matched), "schedule": "receding"}
        options |= {"match_slots": matched, "window": None}
    elif name == "sampling":
        options = {"planner": sampling_planner(model.config.frame_skip), "replanner": sampling_replanner()}
    elif name != "default":
        match = re.fullmatch(r"cem:(\d+)x(\d+):(\d+)", name)
        if match is None:
            raise ValueError(
                f"planner {text!r}: expected default, sampling, paper or cem:SAMPLESxITERATIONS:ELITES (cem:60x5:10)."
            )
        samples, iterations, elites = map(int, match.groups())
        options["planner"] = CEMPlanner(num_samples=samples, num_iterations=iterations, num_elites=elites)
    for change in changes:
        if change in ("receding", "shrinking"):
            options["schedule"] = change
        elif re.fullmatch(r"window=\d+", change):
            options["window"] = int(change.removeprefix("window="))
        elif re.fullmatch(r"held=\d+", change) and "planner" in options:
            steps = int(change.removeprefix("held="))
            options["planner"] = dataclasses.replace(options["planner"], held_steps=steps)
        else:
            raise ValueError(
                f"planner {text!r}: {change!r} is not receding, shrinking, window=W or (after cem:...) held=STEPS."
            )
    return default_policy(model, image_processor=image_processor, seed=seed, **options)


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
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """
    Runs every planner with every seed on the same tasks.

    Args:
        model: folder or Hub id of a [`CJepaModel`] or [`DinoWmModel`] with slot encoder and statistics.
        planners: names, see [`make_policy`].
        simulator_tasks: also plan this many tasks with the true simulator as the model.
        on_row: called with the results so far after every row, so that an interruption loses one row at most.

    Returns:
        {"rows": one dict per planner and seed or control, with rate, 95 % Wilson interval, n and, per task, "success";
        "protocol", "model", "hardware", "versions", ...}.
    """
    frozen = load_protocol(protocol)
    net = AutoModel.from_pretrained(model, use_safetensors=True).eval().to(device)
    if not isinstance(net, SlotWorldModel):
        raise ValueError(f"{model} holds a {type(net).__name__}: give a CJepaModel or DinoWmModel.")
    if net.slot_encoder is None:
        raise ValueError(f"{model} holds no slot encoder, and goals are images: train it with --slot_encoder.")
    if net.config.action_size not in (0, 2 * net.config.frame_skip):
        raise ValueError(
            f"{model} takes action blocks of size {net.config.action_size} ({net.config.frame_skip} actions); those of Push-T "
            "have 2 numbers each."
        )
    processor = AutoImageProcessor.from_pretrained(model)
    # whatever is wrong with the arguments is said before the work begins
    for count in (num_tasks, simulator_tasks):
        select_tasks(frozen, count)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)} names a seed twice.")
    for text in planners:
        make_policy(net, text)
    rows = []

    results = {
        "protocol": {key: value for key, value in frozen.items() if key != "tasks"},
        "model": str(model),
        "frames": style,
        "use_proprio": use_proprio,
        **measured_on(device),
        "rows": rows,
    }

    def add(name, seed, run):
        rows.append({"name": name, "seed": seed, **run.summary(), "success": run.success.tolist()})
        results["pooled"] = {name: _pooled(rows, name) for name in dict.fromkeys(row["name"] for row in rows)}
        if on_row is not None:
            on_row(results)

    for text in planners:
        for seed in seeds:
            policy = make_policy(net, text, image_processor=processor, seed=seed)
            run = run_policy(
                policy, frozen, num_tasks=num_tasks, use_proprio=use_proprio, style=style, progress=progress
            )
            add(text if use_proprio else f"{text}, no proprioception", seed, run)
    if controls:
        for name in ("replay", "random", "no-op"):
            add(name, 0, run_baseline(name, frozen, num_tasks=num_tasks))
    if simulator_tasks:
        name = planners[0]
        like = make_policy(net, name)
        if isinstance(like.planner, CEMGDPlanner):  # the simulator has no gradients
            name = "/".join(["sampling", *name.split("/")[1:]])
            like = make_policy(net, name)
        policy = simulator_policy(
            net.action_mean.cpu(),
            net.action_std.cpu(),
            frame_skip=net.config.frame_skip,
            planner=like.planner,
            replanner=like.replanner,
            schedule=like.schedule,
            generator=torch.Generator().manual_seed(seeds[0]),
        )
        run = run_policy(policy, frozen, num_tasks=simulator_tasks, progress=progress)
        add(f"true simulator, {name}", seeds[0], run)
    return results


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
