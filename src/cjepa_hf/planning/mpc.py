"""Model-predictive control: plan, execute a part, look again, plan again. For many tasks at once."""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from cjepa_hf.models.cjepa import SlotWorldModel

from .costs import Objective, RolloutCost, SlotGoalCost
from .planners import (
    CEMPlanner,
    CostFn,
    PlannerOutput,
    default_planner,
    default_replanner,
    evaluate_candidates,
    sampling_planner,
    sampling_replanner,
)

# Batched over tasks, in environment units: "slots" [B, N, D], or "pixels" (uint8 [B, H, W, 3] or a list of images), or
# "pixel_values" [B, 3, H, W] as an image processor returns them; "proprio" [B, P]; whatever else `make_cost` reads.
Observation = Mapping[str, Any]


@dataclass
class MPCPlan:
    """
    The last plan of a policy, for the b tasks that were active.

    tasks: [b] their indices.
    actions: [b, H, A] normalised action blocks.
    environment_actions: [b, H * frame_skip, a] the same in environment units, clipped to the bounds.
    cost: [b]; history: [iterations, b] the lowest cost of each planner iteration.
    seconds: wall time of planning, encoding included.
    cost_fn: what was minimised.
    """

    tasks: torch.Tensor
    actions: torch.Tensor
    environment_actions: np.ndarray
    cost: torch.Tensor
    history: torch.Tensor
    seconds: float
    cost_fn: CostFn


class MPCPolicy:
    """
    Closed-loop planning for B tasks together, in environment units.

    ```python
    policy = MPCPolicy(model, image_processor=processor)
    policy.reset({"pixels": goal_images})
    while not done.all():
        observation = {"pixels": images, "proprio": proprio} if policy.needs_observation else None
        actions = policy.act(observation, active=~done)     # [B, a], rows of finished tasks are 0
    ```

    Args:
        model: a [`CJepaModel`] or [`DinoWmModel`] with action statistics (and proprioception statistics if it takes any).
            May be left out when `make_cost`, `frame_skip`, `action_mean` and `action_std` are given.
        planner: see `cjepa_hf.planning.planners`. Without, `default_planner`, or `sampling_planner` if `make_cost` is given;
            give that one for a `cost` that is not differentiable.
        replanner: planner of the plans that start from what is left of the last one: they correct that plan and need not
            find it, so that fewer samples of a smaller deviation suffice. Without, `planner` (and `default_replanner` if
            that is left out too).
        cost: objective on imagined slots, [`SlotGoalCost`] without.
        make_cost: `make_cost(observation, goal) -> cost_fn(actions [b, S, H, A]) -> [b, S]` in place of the model's
            rollout, for example the true simulator. Observation and goal hold the rows of the active tasks; actions are
            normalised, `policy.to_environment(actions)` gives raw ones.
        frame_skip: raw actions in one block (the model's without).
        horizon: H, blocks planned.
        receding_horizon: blocks executed before the next plan, with schedule "receding". The paper executes all 5.
        schedule: "receding" plans `horizon` blocks each time. "shrinking" plans again after every block with horizon
            H, H - 1, ..., 1, H, ..., so that every plan aims at the same moment: with a fixed horizon and a cost on the
            last frame alone, replanning after every block puts the goal off for ever.
        history_length: past frames and actions given to the model (1 in the paper's planning). More than one frame
            needs an observation at every block.
        action_bounds: (low, high) of raw actions. Candidates and executed actions are clipped to them; None: neither.
        action_mean, action_std: [A] statistics of an action block in place of the model's.
        retry_above: a plan made without an earlier one to start from, whose cost is more than this share of the cost of
            doing nothing, is searched for once more, and the cheaper of both is taken: what a search misses by ending in a
            local minimum, another one mostly finds. None: never.
        image_processor: turns "pixels" into pixel_values.
        generator: source of the planner's samples; without, a CPU generator seeded with 0.
        rollout_options: `max_candidates_per_chunk`, `max_memory`, `match_slots`, `window` of [`RolloutCost`].

    A plan starts from what is left of the previous one (a warm start), if anything is. A model that takes
    proprioception and is given none uses the mean of its training data, with a warning.
    """

    def __init__(
        self,
        model: SlotWorldModel | None = None,
        planner: CEMPlanner | None = None,
        cost: Objective | None = None,
        *,
        replanner: CEMPlanner | None = None,
        make_cost: Callable[[Observation, Observation], CostFn] | None = None,
        frame_skip: int | None = None,
        horizon: int = 5,
        receding_horizon: int = 5,
        schedule: Literal["receding", "shrinking"] = "receding",
        history_length: int = 1,
        action_bounds: tuple[float, float] | None = (-1.0, 1.0),
        action_mean: torch.Tensor | None = None,
        action_std: torch.Tensor | None = None,
        retry_above: float | None = None,
        image_processor: Callable | None = None,
        generator: torch.Generator | None = None,
        **rollout_options,
    ):
        if model is None and make_cost is None:
            raise ValueError("MPCPolicy needs a model, or make_cost to plan with something else")
        if model is not None and model.config.action_size == 0:
            raise ValueError("this model takes no actions (action_size=0), so there is nothing to plan")
        if schedule not in ("receding", "shrinking"):
            raise ValueError(f'schedule must be "receding" or "shrinking", got {schedule!r}')
        if not isinstance(horizon, int) or horizon < 1:
            raise ValueError(f"horizon must be a whole number of blocks, 1 or more, got {horizon!r}")
        if not 1 <= receding_horizon <= horizon:
            raise ValueError(f"receding_horizon must be between 1 and horizon={horizon}, got {receding_horizon}")
        if action_bounds is not None and not (len(action_bounds) == 2 and action_bounds[0] < action_bounds[1]):
            raise ValueError(f"action_bounds must be (low, high) with low < high, or None, got {action_bounds}")
        if retry_above is not None and not retry_above > 0:
            raise ValueError(f"retry_above must be a positive share, or None, got {retry_above!r}")
        self.frame_skip = frame_skip or (model.config.frame_skip if model is not None else None)
        if self.frame_skip is None:
            raise ValueError("without a model, give frame_skip")
        if model is not None and self.frame_skip != model.config.frame_skip:
            raise ValueError(
                f"frame_skip={self.frame_skip}, but the model was trained with {model.config.frame_skip}: leave it out"
            )
        if model is not None and not 1 <= history_length <= model.config.history_length:
            raise ValueError(
                f"history_length must be between 1 and the model's {model.config.history_length}, got {history_length}"
            )
        if (action_mean is None) != (action_std is None):
            raise ValueError("give both action_mean and action_std, or neither")
        if action_mean is None:
            if model is None:
                raise ValueError("without a model, give action_mean and action_std")
            action_mean, action_std = model.action_mean, model.action_std
        self._mean = torch.as_tensor(action_mean, dtype=torch.float32).cpu()
        self._std = torch.as_tensor(action_std, dtype=torch.float32).cpu()
        if not (self._mean.isfinite().all() and self._std.isfinite().all() and (self._std > 0).all()):
            raise ValueError(
                "the model's action statistics are unknown, so plans cannot be turned into environment units: call "
                "model.set_statistics(action_mean=..., action_std=...) with those of its training data"
            )
        if len(self._mean) % self.frame_skip:
            raise ValueError(
                f"an action block of size {len(self._mean)} does not split into frame_skip={self.frame_skip} actions"
            )
        self.model = model
        if planner is None:
            if make_cost is None:
                planner, replanner = default_planner(self.frame_skip), replanner or default_replanner()
            else:  # which may have no gradient
                planner, replanner = sampling_planner(self.frame_skip), replanner or sampling_replanner()
        self.planner = planner
        self.replanner = replanner if replanner is not None else planner
        for one in (self.planner, self.replanner):
            if len(self._mean) % one.held_steps:
                raise ValueError(
                    f"an action block of size {len(self._mean)} does not split into held_steps={one.held_steps}"
                )
        window = rollout_options.get("window")
        if model is not None and window is not None and not 1 <= window <= model.config.history_length:
            raise ValueError(f"window must be between 1 and the model's {model.config.history_length}, got {window}")
        self.cost = cost if cost is not None else SlotGoalCost()
        self.make_cost = make_cost
        self.horizon = horizon
        self.receding_horizon = receding_horizon if schedule == "receding" else 1
        self.schedule = schedule
        self.history_length = history_length
        self.action_bounds = action_bounds
        self.retry_above = retry_above
        self.image_processor = image_processor
        self.generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self.rollout_options = rollout_options
        self._warned = False
        self._goal: Observation | None = None

    @property
    def action_size(self) -> int:
        """Size a of one raw action."""
        return len(self._mean) // self.frame_skip

    def to_environment(self, actions: torch.Tensor) -> torch.Tensor:
        """Normalised blocks [..., H, A] -> raw actions [..., H * frame_skip, a] in environment units, clipped."""
        raw = actions.to(device="cpu", dtype=torch.float32) * self._std + self._mean
        raw = raw.reshape(*raw.shape[:-2], -1, self.action_size)
        return raw if self.action_bounds is None else raw.clamp(*self.action_bounds)

    def to_normalized(self, actions: torch.Tensor) -> torch.Tensor:
        """Raw actions [..., H * frame_skip, a] in environment units -> normalised blocks [..., H, A]."""
        blocks = actions.reshape(*actions.shape[:-2], -1, len(self._mean))
        return (blocks - self._mean) / self._std

    def reset(self, goal: Observation) -> None:
        """Start B tasks with these goals (see `Observation`); goals never change within a task."""
        self._goal = dict(goal)
        self._size = _batch_size(self._goal, "goal")
        self._goal_slots = self._encode(self._goal) if self.make_cost is None else None
        self._cursor = 0
        self._queue = np.zeros((self._size, 0, self.action_size), dtype=np.float32)
        self._previous: torch.Tensor | None = None
        self._running = np.ones(self._size, dtype=bool)
        self._frames: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._blocks: list[torch.Tensor] = []
        self.num_plans = np.zeros(self._size, dtype=np.int64)
        self.last_plan: MPCPlan | None = None
        self._plan_index = 0

    @property
    def needs_observation(self) -> bool:
        """Whether the next `act` reads its observation."""
        empty = self._cursor == self._queue.shape[1]
        return empty or (self.history_length > 1 and self._cursor % self.frame_skip == 0)

    def act(self, observation: Observation | None = None, active: np.ndarray | None = None) -> np.ndarray:
        """
        One raw action for each task, [B, a] float32 in environment units.

        Args:
            observation: B rows (those of inactive tasks are ignored); read only when `needs_observation`.
            active: bool [B], False for finished tasks: they are left out of planning and get zeros. A finished task
                cannot be taken up again before `reset`.
        """
        if self._goal is None:
            raise ValueError("call reset(goal) before act")
        active = np.ones(self._size, dtype=bool) if active is None else np.asarray(active, dtype=bool)
        if active.shape != (self._size,):
            raise ValueError(f"active must be bool [{self._size}], got shape {list(active.shape)}")
        if (active & ~self._running).any():
            tasks = np.flatnonzero(active & ~self._running).tolist()
            raise ValueError(f"task(s) {tasks} were inactive before and are active again: call reset to start anew")
        self._running = active.copy()
        if not active.any():
            return np.zeros((self._size, self.action_size), dtype=np.float32)
        if self.needs_observation:
            if observation is None:
                raise ValueError("this step needs an observation (needs_observation is True)")
            if _batch_size(observation, "observation") != self._size:
                raise ValueError(
                    f"{self._size} goals, but an observation of {_batch_size(observation, 'observation')} tasks"
                )
            self._observe_and_plan(observation, active)
        actions = self._queue[:, self._cursor].copy()
        self._cursor += 1
        actions[~active] = 0
        return actions

    def imagine(self) -> torch.Tensor:
        """[b, H, N, D]: what the model expects of the last plan, for the tasks `last_plan.tasks`."""
        if self.last_plan is None or not hasattr(self.last_plan.cost_fn, "imagine"):
            raise ValueError("nothing to imagine: no plan was made yet, or it was made without the model")
        return self.last_plan.cost_fn.imagine(self.last_plan.actions.unsqueeze(1)).slots[:, 0]

    def _observe_and_plan(self, observation: Observation, active: np.ndarray) -> None:
        start = time.perf_counter()
        tasks = torch.from_numpy(np.flatnonzero(active))
        observation = _rows(observation, tasks)
        goal = _rows(self._goal, tasks)
        if self.make_cost is None:
            self._remember(observation, tasks)
        if self._cursor < self._queue.shape[1]:
            return

        def cost_of(rows: torch.Tensor) -> CostFn:
            if self.make_cost is None:
                return self._model_cost(_rows(goal, rows), tasks[rows])
            return self.make_cost(_rows(observation, rows), _rows(goal, rows))

        cost_fn = cost_of(torch.arange(len(tasks)))
        horizon, initial = self.horizon, None
        if self.schedule == "shrinking":
            horizon -= self._plan_index % self.horizon
        if self._previous is not None and not (self.schedule == "shrinking" and horizon == self.horizon):
            rest = self._previous[tasks, self.receding_horizon :]
            if rest.shape[1]:
                initial = torch.cat([rest, rest.new_zeros(len(tasks), horizon - rest.shape[1], rest.shape[2])], dim=1)
        output = self._search(cost_fn, len(tasks), horizon, initial)
        if initial is None and self.retry_above is not None:
            idle = torch.zeros(len(tasks), 1, horizon * self.frame_skip, self.action_size)
            idle = self.to_normalized(idle if self.action_bounds is None else idle.clamp(*self.action_bounds))
            limit = self.retry_above * evaluate_candidates(cost_fn, idle.to(output.actions), need_finite=False)[:, 0]
            again = (output.cost > limit).nonzero()[:, 0]
            if len(again):
                second = self._search(cost_of(again.cpu()), len(again), horizon, None)
                better = second.cost < output.cost[again]
                places = again[better]
                output = PlannerOutput(
                    output.actions.index_copy(0, places, second.actions[better]),
                    output.cost.index_copy(0, places, second.cost[better]),
                    output.history.index_copy(1, places, second.history[:, better]),
                )
        raw = self.to_environment(output.actions).numpy()
        self.last_plan = MPCPlan(
            tasks=tasks,
            actions=output.actions,
            environment_actions=raw,
            cost=output.cost,
            history=output.history,
            seconds=time.perf_counter() - start,
            cost_fn=cost_fn,
        )
        self.num_plans[active] += 1
        self._plan_index += 1
        self._previous = torch.zeros(self._size, horizon, len(self._mean))
        self._previous[tasks] = output.actions.cpu()
        self._queue = np.zeros((self._size, self.receding_horizon * self.frame_skip, self.action_size), np.float32)
        self._queue[active] = raw[:, : self._queue.shape[1]]
        self._cursor = 0

    def _search(self, cost_fn: CostFn, count: int, horizon: int, initial: torch.Tensor | None) -> PlannerOutput:
        bounds = None
        if self.action_bounds is not None:
            bounds = tuple((bound - self._mean) / self._std for bound in self.action_bounds)
        return (self.planner if initial is None else self.replanner).plan_with_info(
            cost_fn,
            batch_size=count,
            horizon=horizon,
            action_size=len(self._mean),
            initial=initial,
            generator=self.generator,
            bounds=bounds,
            device="cpu" if self.model is None else self.model.device,
        )

    def _remember(self, observation: Observation, tasks: torch.Tensor) -> None:
        """Append the frame now seen, and the block that led to it, to the history of all tasks."""
        slots = self._encode(observation)
        proprio = self._proprio(observation, len(tasks))

        def scatter(values):
            full = values.new_zeros(self._size, *values.shape[1:])
            full[tasks.to(values.device)] = values
            return full

        if self._frames and self.history_length > 1:
            done = self._queue[:, self._cursor - self.frame_skip : self._cursor]
            self._blocks.append(self.to_normalized(torch.from_numpy(done))[:, 0])
        self._frames.append((scatter(slots), None if proprio is None else scatter(proprio)))
        self._frames = self._frames[-self.history_length :]
        self._blocks = self._blocks[len(self._blocks) - (len(self._frames) - 1) :]

    def _model_cost(self, goal: Observation, tasks: torch.Tensor) -> RolloutCost:
        def stack(values):
            return torch.stack([value[tasks.to(value.device)] for value in values], dim=1)

        goal_proprio = None
        if self.model.config.proprio_size and goal.get("proprio") is not None:
            goal_proprio = self._proprio(goal, len(tasks))
        return RolloutCost(
            self.model,
            self.cost,
            stack([slots for slots, _ in self._frames]),
            self._goal_slots[tasks.to(self._goal_slots.device)],
            proprio=stack([proprio for _, proprio in self._frames]) if self.model.config.proprio_size else None,
            goal_proprio=goal_proprio,
            past_actions=stack(self._blocks) if len(self._frames) > 1 else None,
            **self.rollout_options,
        )

    def _encode(self, observation: Observation) -> torch.Tensor:
        """Slots [b, N, D] of an observation or goal that holds slots or images."""
        model = self.model
        if observation.get("slots") is not None:
            slots = torch.as_tensor(observation["slots"]).to(device=model.device, dtype=model.dtype)
            if slots.ndim != 3 or slots.shape[-1] != model.config.slot_size:
                raise ValueError(f"slots must be [B, N, D={model.config.slot_size}], got {list(slots.shape)}")
            return slots
        pixel_values = observation.get("pixel_values")
        if pixel_values is None:
            if observation.get("pixels") is None:
                raise ValueError(f'expected "slots", "pixels" or "pixel_values", got {sorted(observation)}')
            if self.image_processor is None:
                raise ValueError('"pixels" need an image_processor: give one to MPCPolicy, or give "pixel_values"')
            pixel_values = self.image_processor(list(observation["pixels"]), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            # 64 images at a time bound the memory of the encoder.
            parts = [
                model.encode(part.unsqueeze(1).to(device=model.device, dtype=model.dtype))[:, 0]
                for part in torch.as_tensor(pixel_values).split(64)
            ]
        return torch.cat(parts)

    def _proprio(self, observation: Observation, batch: int) -> torch.Tensor | None:
        """Normalised proprioception [b, P], the mean (zeros) where it is not observed."""
        size = self.model.config.proprio_size
        if size == 0:
            return None
        if observation.get("proprio") is None:
            if not self._warned:
                warnings.warn(
                    'the model was trained with proprioception and the observation has none ("proprio"): the mean of '
                    "the training data stands in for it, which usually makes plans worse",
                    stacklevel=2,
                )
                self._warned = True
            return torch.zeros(batch, size, device=self.model.device, dtype=self.model.dtype)
        proprio = torch.as_tensor(observation["proprio"], dtype=torch.float32, device=self.model.device)
        if tuple(proprio.shape) != (batch, size):
            raise ValueError(f"proprio must be [B, {size}] in environment units, got {list(proprio.shape)}")
        proprio = self.model.normalize_proprio(proprio)
        if proprio.abs().max() > 10:
            warnings.warn(
                f"proprio lies {proprio.abs().max():.0f} standard deviations from the mean of the training data: is it in "
                "environment units, and in the order the model was trained with?",
                stacklevel=2,
            )
        return proprio.to(self.model.dtype)


RETRY_ABOVE = 0.01  # of the default policy, chosen on pusht-25-validation


def needs_matching(model: SlotWorldModel) -> bool:
    """Whether slots must be matched before they are compared: not where every object, or patch, has its own place."""
    return not model.slots_keep_roles


def default_policy(
    model: SlotWorldModel, *, image_processor: Callable | None = None, seed: int = 0, **options
) -> MPCPolicy:
    """
    The policy of `cjepa-hf demo` and `cjepa-hf evaluate`: [`default_planner`], once more where that leaves over 1 % of the
    cost of doing nothing, and [`default_replanner`] after every block with a shrinking horizon. Slots are compared by their place in the set where they keep their roles
    (`model.slots_keep_roles`), else by optimal assignment; at most `model.config.planning_window` frames are seen.
    `options` override arguments of [`MPCPolicy`]; a `planner` among them plans once.
    """
    matched = needs_matching(model)
    defaults = {
        "cost": SlotGoalCost(match_slots=matched),
        "schedule": "shrinking",
        "retry_above": RETRY_ABOVE if options.get("planner") is None else None,
        "match_slots": matched,
        "window": getattr(model.config, "planning_window", None),
        "generator": torch.Generator().manual_seed(seed),
    }
    return MPCPolicy(model, image_processor=image_processor, **(defaults | options))


def _batch_size(observation: Observation, name: str) -> int:
    sizes = {key: len(value) for key, value in observation.items() if value is not None}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"all entries of the {name} must have one row per task, got lengths {sizes}")
    return next(iter(sizes.values()))


def _rows(observation: Observation, tasks: torch.Tensor) -> dict[str, Any]:
    def select(value):
        if torch.is_tensor(value):
            return value[tasks.to(value.device)]
        if isinstance(value, np.ndarray):
            return value[tasks.numpy()]
        return [value[i] for i in tasks.tolist()]

    return {key: None if value is None else select(value) for key, value in observation.items()}
