"""Runs policies on the tasks of a Push-T protocol, many tasks in lockstep."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from cjepa_hf.data.extract import drawn_size
from cjepa_hf.evaluation.metrics import success_rate
from cjepa_hf.planning.mpc import MPCPolicy
from cjepa_hf.planning.planners import CEMPlanner
from cjepa_hf.simulators.push_t import PROPRIO_INDICES, PushTEnv, PushTWorld, push_t_success, state_errors
from cjepa_hf.simulators.rendering import block_vertices, render_push_t

# act(observation or None, active bool [n]) -> actions [n, 2]; observe() tells whether the next call reads one
ActFunction = Callable[[dict[str, np.ndarray] | None, np.ndarray], np.ndarray]


@dataclass
class PushTResults:
    """
    What a policy did on n tasks.

    success: bool [n], at any step. steps: int [n] taken. position_error px, angle_error rad: [n] at the last step.
    plans: int [n]. seconds_per_plan: planning time, current images encoded, over all plans (tasks plan together;
    0 without plans). bins: str [n]. states: [n, budget + 1, 7], the last one repeated after a task has ended.
    """

    success: np.ndarray
    steps: np.ndarray
    position_error: np.ndarray
    angle_error: np.ndarray
    plans: np.ndarray
    seconds_per_plan: float
    bins: np.ndarray
    states: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Success with 95 % Wilson intervals, over all tasks and per bin, and median final errors."""
        result = success_rate(self.success)
        result["bins"] = {str(name): success_rate(self.success[self.bins == name]) for name in np.unique(self.bins)}
        result["median_position_error_px"] = float(np.median(self.position_error))
        result["median_angle_error_deg"] = float(np.rad2deg(np.median(self.angle_error)))
        if self.plans.any():
            result["plans_per_task"] = float(self.plans.mean())
            result["seconds_per_plan"] = self.seconds_per_plan
        return result


def select_tasks(protocol: dict[str, Any], num_tasks: int | None) -> dict[str, np.ndarray]:
    """The first `num_tasks` tasks of a protocol (all without)."""
    total = len(protocol["tasks"]["state"])
    if num_tasks is not None and not 1 <= num_tasks <= total:
        raise ValueError(f"num_tasks={num_tasks}: protocol {protocol['name']} has {total} tasks.")
    return {key: value[:num_tasks] for key, value in protocol["tasks"].items()}


def run_policy(
    policy: MPCPolicy,
    protocol: dict[str, Any],
    *,
    num_tasks: int | None = None,
    use_proprio: bool = True,
    resolution: int | None = None,
    style: str = "smooth",
    on_plan: Callable[[int, np.ndarray, MPCPolicy], None] | None = None,
    progress: bool = True,
) -> PushTResults:
    """
    Runs an [`MPCPolicy`] in closed loop from images: it sees the goal's frame, the current frames and, with
    `use_proprio`, the agent's current position and velocity.

    Args:
        resolution: of the frames, pixels; default: what the slot encoder of the policy's model takes.
        on_plan: called after every planning with (step, states [n, 7], policy).
    """
    tasks = select_tasks(protocol, num_tasks)
    resolution = resolution or drawn_size(policy.model)
    envs, goals = _reset(tasks, resolution, style, protocol["angle_rule"])
    policy.reset({"pixels": goals, "goal_state": tasks["goal_state"]})
    seconds = 0.0

    def act(step, states, active):
        nonlocal seconds
        if not policy.needs_observation:
            return policy.act(None, active)
        observation = {"pixels": render_push_t(states, resolution=resolution, style=style), "state": states}
        if use_proprio:
            observation["proprio"] = states[:, list(PROPRIO_INDICES)]
        observation["block_velocity"] = np.stack([env.world.block_velocity for env in envs])
        start, before = time.perf_counter(), policy.num_plans.sum()
        with warnings.catch_warnings():
            if not use_proprio:  # asked for: the policy need not warn of it
                warnings.simplefilter("ignore")
            actions = policy.act(observation, active)
        if policy.num_plans.sum() > before:
            seconds += time.perf_counter() - start
            if on_plan is not None:
                on_plan(step, states, policy)
        return actions

    results = _run(envs, tasks, protocol, act, progress)
    results.plans = policy.num_plans.copy()
    results.seconds_per_plan = seconds / max(int(results.plans.sum()), 1)
    return results


def run_actions(
    actions: np.ndarray, protocol: dict[str, Any], *, num_tasks: int | None = None, progress: bool = False
) -> PushTResults:
    """Runs given actions [n, steps, 2] open loop (zeros after the last): the replayed demonstration, random, no-op."""
    tasks = select_tasks(protocol, num_tasks)
    envs, _ = _reset(tasks, 8, "smooth", protocol["angle_rule"])

    def act(step, states, active):
        return actions[:, step] if step < actions.shape[1] else np.zeros((len(actions), 2))

    return _run(envs, tasks, protocol, act, progress)


def run_baseline(name: str, protocol: dict[str, Any], *, num_tasks: int | None = None, seed: int = 0) -> PushTResults:
    """ "replay" (the demonstration's actions), "no-op", or "random" (independent Gaussian actions of its spread)."""
    tasks = select_tasks(protocol, num_tasks)
    demonstration = tasks["actions"]
    if name == "replay":
        actions = demonstration
    elif name == "no-op":
        actions = np.zeros_like(demonstration)
    elif name == "random":
        rng = np.random.default_rng(seed)
        shape = (len(demonstration), protocol["budget"], 2)
        actions = np.clip(rng.normal(0.0, demonstration.std(), shape), -1.0, 1.0)
    else:
        raise ValueError(f'baseline {name!r}: expected "replay", "no-op" or "random".')
    return run_actions(actions, protocol, num_tasks=num_tasks)


def simulator_policy(
    action_mean: torch.Tensor,
    action_std: torch.Tensor,
    *,
    frame_skip: int,
    planner: CEMPlanner | None = None,
    replanner: CEMPlanner | None = None,
    schedule: str = "shrinking",
    generator: torch.Generator | None = None,
) -> MPCPolicy:
    """The true simulator in the place of the world model: what a perfect model would reach with this planner."""
    policy = MPCPolicy(
        planner=planner,
        replanner=replanner,
        make_cost=lambda observation, goal: _SimulatorCost(policy, observation, goal),
        frame_skip=frame_skip,
        schedule=schedule,
        action_mean=action_mean,
        action_std=action_std,
        generator=generator,
    )
    return policy


class _SimulatorCost:
    """Squared distance of agent and T (mean over its vertices) from the goal after a plan, in px^2."""

    def __init__(self, policy, observation, goal):
        self.policy = policy
        self.states = np.asarray(observation["state"])
        self.velocities = np.asarray(observation["block_velocity"])
        self.goals = np.asarray(goal["goal_state"])
        self.world = PushTWorld()

    def __call__(self, actions: torch.Tensor) -> torch.Tensor:
        raw = self.policy.to_environment(actions).numpy().astype(float)  # [B, S, H * frame_skip, 2]
        final = np.empty((*raw.shape[:2], 7))
        for task, sample in np.ndindex(raw.shape[:2]):
            self.world.set_state(self.states[task], self.velocities[task])
            for action in raw[task, sample]:
                final[task, sample] = self.world.step(action)
        agent = np.square(final[..., :2] - self.goals[:, None, :2]).sum(-1)
        vertices = block_vertices(final.reshape(-1, 7)[:, 2:5]).reshape(*final.shape[:2], 16)
        goal = block_vertices(self.goals[:, 2:5]).reshape(-1, 1, 16)
        block = np.square(vertices - goal).sum(-1) / 8
        return torch.from_numpy(agent + block)


def _reset(tasks, resolution, style, angle_rule):
    envs, goals = [], []
    for state, goal_state in zip(tasks["state"], tasks["goal_state"]):
        env = PushTEnv(resolution=resolution, style=style, angle_rule=angle_rule)
        _, info = env.reset(options={"state": state, "goal_state": goal_state})
        envs.append(env)
        goals.append(info["goal"])
    return envs, np.stack(goals)


def _run(envs, tasks, protocol, act, progress) -> PushTResults:
    budget, rule = protocol["budget"], protocol["angle_rule"]
    goal = tasks["goal_state"]
    states = np.stack([env.world.state for env in envs])
    trajectory = [states.copy()]
    success = push_t_success(goal, states, rule)
    if success.any():
        raise ValueError(f"tasks {np.flatnonzero(success).tolist()} start solved: a protocol must drop them.")
    active, steps = ~success, np.zeros(len(envs), dtype=int)
    for step in tqdm(range(budget), desc="steps", disable=not progress, leave=False):
        if not active.any():
            break
        actions = act(step, states, active)
        for task in np.flatnonzero(active):
            states[task] = envs[task].world.step(actions[task])
        steps += active
        success |= active & push_t_success(goal, states, rule)
        active = ~success
        trajectory.append(states.copy())
    trajectory += [states.copy()] * (budget + 1 - len(trajectory))
    position, angle = state_errors(goal, states, rule)
    return PushTResults(
        success=success,
        steps=steps,
        position_error=position,
        angle_error=angle,
        plans=np.zeros(len(envs), dtype=int),
        seconds_per_plan=0.0,
        bins=tasks["bin"],
        states=np.stack(trajectory, axis=1),
    )
