"""Planning evaluated in several processes, also of several machines: every process plans with some of the seeds."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from .suite import _pooled, evaluate_push_t


def evaluate_push_t_in_processes(
    model: str,
    *,
    planners: Sequence[str] = ("default",),
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    progress: bool = True,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    **arguments: Any,
) -> dict[str, Any] | None:
    """
    [`evaluate_push_t`], whose seeds are shared among the processes that `accelerate launch` or `torchrun` started (RANK and
    WORLD_SIZE); in one process the same. A seed's tasks are planned together in one process, so that the results are those
    of one process, in the same order.

    Returns:
        The results in the first process, None in the others. Controls and the true simulator run in the first one.

    Raises `ValueError` for more processes than seeds.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return evaluate_push_t(
            model, planners=planners, seeds=seeds, device=device, progress=progress, on_row=on_row, **arguments
        )
    if len(seeds) < world:
        raise ValueError(f"{world} processes share {len(seeds)} seeds: start at most one process for each seed")
    # results are gathered once, by whoever is ready first waiting for the others
    state = PartialState(cpu=True, timeout=timedelta(days=7))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    is_first = state.process_index == 0
    if not is_first:
        arguments |= {"controls": False, "simulator_tasks": None}
    mine = list(seeds)[state.process_index :: world]
    part = evaluate_push_t(
        model, planners=planners, seeds=mine, device=device, progress=progress and is_first,
        on_row=on_row if is_first else None, **arguments,
    )  # fmt: skip
    rows = gather_object(part["rows"])
    if not is_first:
        return None
    planned = [row for row in rows if not _is_extra(row)]
    order = {name: place for place, name in enumerate(dict.fromkeys(row["name"] for row in part["rows"]))}
    planned.sort(key=lambda row: (order[row["name"]], list(seeds).index(row["seed"])))
    part["rows"][:] = planned + [row for row in rows if _is_extra(row)]
    part["pooled"] = {name: _pooled(part["rows"], name) for name in dict.fromkeys(row["name"] for row in part["rows"])}
    part["num_processes"] = world
    if on_row is not None:
        on_row(part)
    return part


def _is_extra(row: dict[str, Any]) -> bool:
    """Whether a row is a control or the true simulator."""
    return row["name"] in ("replay", "random", "no-op") or row["name"].startswith("true simulator")
