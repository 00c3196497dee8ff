from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cjepa_hf.models.cjepa import CJepaConfig, CJepaModel, CJepaRolloutOutput
from cjepa_hf.planning import CEMPlanner, MPCPolicy, SlotGoalCost

FRAME_SKIP, ACTION_SIZE = 5, 2
MEAN = torch.linspace(-0.02, 0.02, FRAME_SKIP * ACTION_SIZE)
STD = torch.linspace(0.1, 0.3, FRAME_SKIP * ACTION_SIZE)
SPEED = 0.1


class ExactModel:
    """A world whose one slot is a position that every raw action moves by SPEED * action, and its perfect model."""

    device, dtype, training = torch.device("cpu"), torch.float32, False

    def __init__(self, proprio_size=0):
        self.config = SimpleNamespace(
            frame_skip=FRAME_SKIP,
            history_length=3,
            prediction_length=1,
            action_size=FRAME_SKIP * ACTION_SIZE,
            proprio_size=proprio_size,
            slot_size=2,
            hidden_size=2,
            intermediate_size=8,
            num_attention_heads=1,
            num_auxiliary_tokens=1 + bool(proprio_size),
        )
        self.action_mean, self.action_std = MEAN, STD
        self.calls = []

    def rollout(self, slots, *, actions, proprio=None, num_steps, match_slots, window_length):
        self.calls.append({"slots": slots, "actions": actions, "proprio": proprio})
        raw = (actions * STD + MEAN).unflatten(-1, (FRAME_SKIP, ACTION_SIZE)).sum(-2)
        path = slots[:, None, -1:] + SPEED * raw[:, :, slots.shape[1] - 1 :].cumsum(2).unsqueeze(3)
        embeddings = None if proprio is None else path[..., 0, :]
        return CJepaRolloutOutput(slots=path, proprio_embeddings=embeddings)

    def normalize_proprio(self, proprio):
        return proprio / 10

    def embed_proprio(self, proprio):
        return proprio


def planner(**kwargs):
    return CEMPlanner(**{"num_samples": 200, "num_iterations": 8, "num_elites": 20, **kwargs})


def tasks(batch=3):
    generator = np.random.default_rng(0)
    start = generator.uniform(-1, 1, (batch, 1, 2)).astype(np.float32)
    goal = start + generator.uniform(0.3, 0.6, (batch, 1, 2)).astype(np.float32)
    return start, goal


def execute(policy, start, goal, steps, active=None, proprio=False):
    """Runs the true world; returns positions [steps + 1, B, 2] and actions [steps, B, 2]."""
    position, path, done = start[:, 0].copy(), [start[:, 0].copy()], []
    policy.reset({"slots": goal})
    for _ in range(steps):
        observation = None
        if policy.needs_observation:
            observation = {"slots": position[:, None], **({"proprio": position} if proprio else {})}
        actions = policy.act(observation, active)
        position = position + SPEED * actions
        path.append(position)
        done.append(actions)
    return np.stack(path), np.stack(done)


def test_receding_plans_reach_the_goals_of_all_tasks():
    start, goal = tasks()
    policy = MPCPolicy(ExactModel(), planner())
    path, actions = execute(policy, start, goal, 25)
    assert np.abs(path[-1] - goal[:, 0]).max() < 0.05
    assert np.abs(actions).max() <= 1
    assert policy.num_plans.tolist() == [1, 1, 1]
    assert policy.last_plan.seconds > 0


def test_receding_horizon_is_what_is_executed_before_the_next_plan():
    start, goal = tasks()
    policy = MPCPolicy(ExactModel(), planner(), receding_horizon=2)
    execute(policy, start, goal, 21)
    assert policy.num_plans.tolist() == [3, 3, 3]


def test_shrinking_horizons_aim_at_one_moment_and_start_again():
    start, goal = tasks()
    model = ExactModel()
    policy = MPCPolicy(model, planner(), schedule="shrinking")
    horizons = []
    plan_with_info = policy.planner.plan_with_info

    def recorded(cost_fn, **kwargs):
        horizons.append((kwargs["horizon"], kwargs["initial"] is not None))
        if kwargs["initial"] is not None:  # what the plan before left to do, without the block just executed
            assert torch.equal(kwargs["initial"], policy.last_plan.actions[:, 1:])
        return plan_with_info(cost_fn, **kwargs)

    policy.planner.plan_with_info = recorded
    path, _ = execute(policy, start, goal, 35)
    assert horizons == [(5, False), (4, True), (3, True), (2, True), (1, True), (5, False), (4, True)]
    assert np.abs(path[25] - goal[:, 0]).max() < 0.03


def test_a_plan_starts_from_the_rest_of_the_previous_one():
    start, goal = tasks()
    policy = MPCPolicy(ExactModel(), planner(), receding_horizon=2)
    initials = []
    plan_with_info = policy.planner.plan_with_info

    def recorded(cost_fn, **kwargs):
        initials.append(kwargs["initial"])
        return plan_with_info(cost_fn, **kwargs)

    policy.planner.plan_with_info = recorded
    policy.reset({"slots": goal})
    policy.act({"slots": start})
    first = policy.last_plan.actions
    for _ in range(9):
        policy.act()
    policy.act({"slots": start})
    assert initials[0] is None
    assert torch.equal(initials[1][:, :3], first[:, 2:]) and (initials[1][:, 3:] == 0).all()


def test_plans_that_go_on_from_the_last_one_are_the_replanners():
    start, goal = tasks()
    again = CEMPlanner(num_samples=7, num_iterations=1, num_elites=2, var_scale=1e-6)
    model = ExactModel()
    policy = MPCPolicy(model, planner(), replanner=again, schedule="shrinking")
    execute(policy, start, goal, 30)
    shapes = [tuple(call["actions"].shape[1:3]) for call in model.calls]
    counts = {horizon: {samples for samples, h in shapes if h == horizon} for horizon in range(1, 6)}
    assert 7 not in counts[5] and all(counts[horizon] <= {7, 1} for horizon in range(1, 5))


class SleepyPlanner(CEMPlanner):
    """Gives the plan of doing nothing to the tasks `asleep` of its call number `when`; notes how many tasks it was given."""

    def plan_with_info(self, cost_fn, **kwargs):
        output = super().plan_with_info(cost_fn, **kwargs)
        self.seen = [*getattr(self, "seen", []), kwargs["batch_size"]]
        if len(self.seen) == self.when:
            output.actions[self.asleep] = -MEAN / STD
            output.cost = cost_fn(output.actions.unsqueeze(1))[:, 0]
        return output


@pytest.mark.parametrize("of_the_model", [True, False])
def test_plans_that_leave_too_much_of_the_cost_are_searched_for_once_more(of_the_model):
    start, goal = tasks()
    sleepy = SleepyPlanner(num_samples=200, num_iterations=8, num_elites=20)
    sleepy.when, sleepy.asleep = 1, [1]
    options = {}
    if not of_the_model:
        exact = ExactModel()

        def make_cost(observation, goal):
            return lambda actions: (
                (
                    exact.rollout(
                        torch.as_tensor(observation["slots"])[:, None],
                        actions=actions,
                        num_steps=5,
                        match_slots=False,
                        window_length=None,
                    ).slots[:, :, -1]
                    - torch.as_tensor(goal["slots"])[:, None]
                )
                .square()
                .mean((2, 3))
            )

        options = {
            "make_cost": make_cost,
            "model": None,
            "frame_skip": FRAME_SKIP,
            "action_mean": MEAN,
            "action_std": STD,
        }
    policy = MPCPolicy(**{"model": ExactModel(), "planner": sleepy, "retry_above": 0.1, **options})
    policy.reset({"slots": goal})
    policy.act({"slots": start})
    assert sleepy.seen == [3, 1]
    assert policy.last_plan.cost.max() < 1e-3 and policy.last_plan.history[-1].max() < 1e-3
    moved = np.abs(policy.last_plan.environment_actions).sum((1, 2))
    assert (moved > 1).all()
    assert policy.num_plans.tolist() == [1, 1, 1]


def test_of_two_searches_the_cheaper_plan_is_taken_and_plans_that_go_on_are_not_repeated():
    start, goal = tasks()
    sleepy = SleepyPlanner(num_samples=200, num_iterations=8, num_elites=20)
    sleepy.when, sleepy.asleep = 2, [0, 2]
    policy = MPCPolicy(ExactModel(), sleepy, retry_above=1e-12, receding_horizon=2)
    policy.reset({"slots": goal})
    policy.act({"slots": start})
    assert sleepy.seen == [3, 3]
    assert policy.last_plan.cost.max() < 1e-3  # though the second search gave two tasks up
    for _ in range(9):
        policy.act()
    policy.act({"slots": start})
    assert sleepy.seen == [3, 3, 3]


def test_where_doing_nothing_has_no_finite_cost_nothing_is_searched_for_again():
    start, goal = tasks()
    sleepy = SleepyPlanner(num_samples=50, num_iterations=2, num_elites=5)
    sleepy.when = 0

    def make_cost(observation, goal):
        return lambda actions: (
            actions.square().mean((2, 3)).where(actions[:, :, 0, 0] > -MEAN[0] / STD[0] + 0.01, torch.nan)
        )

    options = {"frame_skip": FRAME_SKIP, "action_mean": MEAN, "action_std": STD, "retry_above": 1e-9}
    policy = MPCPolicy(None, sleepy, make_cost=make_cost, **options)
    policy.reset({"slots": goal})
    policy.act({"slots": start})
    assert sleepy.seen == [3]


def test_the_default_holds_pushes_over_a_block_and_corrects_them_action_by_action():
    policy = MPCPolicy(ExactModel())
    assert (policy.planner.held_steps, policy.replanner.held_steps) == (FRAME_SKIP, 1)
    assert policy.replanner.var_scale < policy.planner.var_scale
    given = planner()
    assert MPCPolicy(ExactModel(), given).replanner is given


def test_finished_tasks_leave_the_batch():
    start, goal = tasks()
    model = ExactModel()
    policy = MPCPolicy(model, planner())
    active = np.array([True, False, True])
    _, actions = execute(policy, start, goal, 25, active)
    assert {len(call["slots"]) for call in model.calls} <= {1, 2}
    assert (actions[:, 1] == 0).all() and (np.abs(actions[:, [0, 2]]).max((0, 2)) > 0).all()
    assert policy.num_plans.tolist() == [1, 0, 1]
    assert policy.last_plan.tasks.tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"task\(s\) \[1\] were inactive before"):
        policy.act({"slots": start})
    assert (policy.act({"slots": start}, np.zeros(3, bool)) == 0).all()


def test_executed_actions_are_the_plan_in_environment_units():
    start, goal = tasks()
    policy = MPCPolicy(ExactModel(), planner())
    _, actions = execute(policy, start, goal, 25)
    plan = policy.last_plan
    want = (plan.actions * STD + MEAN).reshape(3, 25, 2).clamp(-1, 1).numpy()
    np.testing.assert_allclose(actions.swapaxes(0, 1), want, atol=1e-6)
    np.testing.assert_allclose(plan.environment_actions, want, atol=1e-6)
    torch.testing.assert_close(policy.to_normalized(policy.to_environment(plan.actions)), plan.actions)


def test_candidates_respect_the_bounds_of_raw_actions():
    start, goal = tasks()
    goal = goal + 10
    for bounds, limit in (((-0.2, 0.2), 0.2), (None, np.inf)):
        model = ExactModel()
        policy = MPCPolicy(model, planner(), action_bounds=bounds)
        execute(policy, start, goal, 5)
        raw = torch.cat([(call["actions"] * STD + MEAN).flatten() for call in model.calls])
        assert raw.abs().max() <= limit + 1e-6
        assert (limit == 0.2) or raw.abs().max() > 0.5


def test_imagined_slots_are_those_of_the_last_plan():
    start, goal = tasks()
    policy = MPCPolicy(ExactModel(), planner())
    path, _ = execute(policy, start, goal, 25)
    imagined = policy.imagine()
    assert imagined.shape == (3, 5, 1, 2)
    np.testing.assert_allclose(imagined[:, :, 0].numpy(), path[5::5].swapaxes(0, 1), atol=1e-5)


def test_history_holds_past_frames_and_the_blocks_between_them():
    start, goal = tasks()
    model = ExactModel(proprio_size=2)
    policy = MPCPolicy(model, planner(), history_length=3, receding_horizon=2)
    path, actions = execute(policy, start, goal, 21, proprio=True)
    last = model.calls[-1]
    assert last["slots"].shape[1:] == (3, 1, 2)
    np.testing.assert_allclose(last["slots"][0, :, 0].numpy(), path[[10, 15, 20], 0], atol=1e-6)
    np.testing.assert_allclose(last["proprio"][0].numpy() * 10, path[[10, 15, 20], 0], atol=1e-6)
    past = (last["actions"][0, 0, :2] * STD + MEAN).reshape(10, 2).numpy()
    np.testing.assert_allclose(past, actions[10:20, 0], atol=1e-5)


def test_a_task_that_misses_a_frame_of_the_history_cannot_come_back():
    start, goal = tasks()
    policy = MPCPolicy(ExactModel(), planner(), history_length=3)
    policy.reset({"slots": goal})
    absent = np.array([True, False, True])
    for step in range(10):
        policy.act({"slots": start} if policy.needs_observation else None, absent if step >= 5 else None)
    with pytest.raises(ValueError, match=r"task\(s\) \[1\] were inactive"):
        policy.act({"slots": start})


def test_missing_proprioception_becomes_the_mean_with_one_warning():
    start, goal = tasks()
    model = ExactModel(proprio_size=2)
    policy = MPCPolicy(model, planner(), receding_horizon=1)
    with pytest.warns(UserWarning, match="trained with proprioception") as caught:
        execute(policy, start, goal, 11)
    assert len(caught) == 1
    assert all((call["proprio"] == 0).all() for call in model.calls)


def test_proprioception_in_other_units_is_warned_about():
    start, goal = tasks()
    policy = MPCPolicy(ExactModel(proprio_size=2), planner())
    policy.reset({"slots": goal})
    with pytest.warns(UserWarning, match=r"standard deviations from the mean.*environment units"):
        policy.act({"slots": start, "proprio": np.full((3, 2), 1e4, np.float32)})


def test_goal_proprioception_enters_the_cost_only_when_given():
    start, goal = tasks()
    for extra, differs in (({}, False), ({"proprio": np.full((3, 2), 50, np.float32)}, True)):
        policy = MPCPolicy(ExactModel(proprio_size=2), planner(), SlotGoalCost(proprio_weight=1.0))
        policy.reset({"slots": goal, **extra})
        policy.act({"slots": start, "proprio": start[:, 0]})
        assert (policy.last_plan.cost > 1).all() == differs


def test_any_cost_can_stand_in_for_the_model():
    """The true world as the model: costs come from `make_cost` alone, and see only the rows of active tasks."""
    start, goal = tasks()
    rows = []

    def make_cost(observation, goal):
        rows.append((len(observation["state"]), len(goal["state"])))
        here, there = (torch.as_tensor(x["state"]) for x in (observation, goal))

        def cost_fn(actions):
            end = here[:, None] + SPEED * policy.to_environment(actions).sum(-2)
            return (end - there[:, None]).square().sum(-1)

        return cost_fn

    policy = MPCPolicy(planner=planner(), make_cost=make_cost, frame_skip=FRAME_SKIP, action_mean=MEAN, action_std=STD)
    policy.reset({"state": goal[:, 0]})
    position = start[:, 0].copy()
    active = np.array([True, True, False])
    for step in range(25):
        position = position + SPEED * policy.act({"state": position} if step == 0 else None, active)
    assert rows == [(2, 2)]
    assert np.abs(position[:2] - goal[:2, 0]).max() < 0.05
    with pytest.raises(ValueError, match="without the model"):
        policy.imagine()


def test_pixels_are_encoded_by_the_model_that_holds_an_encoder():
    start, goal = tasks()
    model = ExactModel()
    model.encode = lambda pixel_values: pixel_values[:, :, :2, 0, :1].mT  # the position is written into pixel (0, 0)

    def image_processor(images, return_tensors):
        return {"pixel_values": torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])}

    def image(position):
        pixels = np.zeros((len(position), 4, 4, 3), np.float32)
        pixels[:, 0, 0, :2] = position[:, 0]
        return pixels

    policy = MPCPolicy(model, planner(), image_processor=image_processor)
    from_slots = MPCPolicy(model, planner())
    policy.reset({"pixels": image(goal)})
    from_slots.reset({"slots": goal})
    actions = policy.act({"pixels": image(start)})
    np.testing.assert_array_equal(actions, from_slots.act({"slots": start}))
    with pytest.raises(ValueError, match="need an image_processor"):
        from_slots.reset({"pixels": image(goal)})


def test_equal_seeds_give_equal_actions():
    start, goal = tasks()
    runs = [
        execute(MPCPolicy(ExactModel(), planner(), generator=torch.Generator().manual_seed(seed)), start, goal, 6)[1]
        for seed in (3, 3, 4)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_a_real_model_plans_in_environment_units_only_with_statistics():
    torch.manual_seed(0)
    config = CJepaConfig(
        slot_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, action_size=10
    )
    model = CJepaModel(config).eval()
    with pytest.raises(ValueError, match="set_statistics"):
        MPCPolicy(model)
    model.set_statistics(action_mean=MEAN, action_std=STD)
    policy = MPCPolicy(model, max_candidates_per_chunk=50)
    slots = torch.randn(2, 4, 16)
    policy.reset({"slots": slots + 1})
    actions = policy.act({"slots": slots})
    assert actions.shape == (2, 2) and np.isfinite(actions).all()
    raw = model.denormalize_actions(policy.last_plan.actions).reshape(2, 25, 2).clamp(-1, 1)
    np.testing.assert_allclose(policy.last_plan.environment_actions, raw.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"schedule": "cyclic"}, "schedule"),
        ({"horizon": 0}, "horizon must be a whole number"),
        ({"horizon": "5"}, "horizon must be a whole number"),
        ({"receding_horizon": 6}, "receding_horizon must be between 1 and horizon=5"),
        ({"window": 4}, "window must be between 1 and the model's 3"),
        ({"planner": CEMPlanner(held_steps=3)}, "does not split into held_steps=3"),
        ({"action_bounds": (1.0, -1.0)}, r"low < high, or None, got \(1.0, -1.0\)"),
        ({"action_bounds": (-1.0, 0.0, 1.0)}, "low < high"),
        ({"frame_skip": 4}, "the model was trained with 5"),
        ({"history_length": 4}, "history_length must be between 1 and the model's 3"),
        ({"action_mean": MEAN}, "both action_mean and action_std"),
        ({"action_mean": MEAN[:9], "action_std": STD[:9]}, "does not split into frame_skip=5"),
        ({"retry_above": 0.0}, "retry_above must be a positive share, or None, got 0.0"),
        ({"model": None}, "needs a model, or make_cost"),
    ],
)
def test_settings_that_cannot_work_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MPCPolicy(**{"model": ExactModel(), **kwargs})


def test_wrong_use_is_explained():
    start, goal = tasks()
    policy = MPCPolicy(ExactModel(), planner())
    with pytest.raises(ValueError, match="call reset"):
        policy.act({"slots": start})
    policy.reset({"slots": goal})
    with pytest.raises(ValueError, match="needs an observation"):
        policy.act()
    with pytest.raises(ValueError, match="3 goals, but an observation of 2 tasks"):
        policy.act({"slots": start[:2]})
    with pytest.raises(ValueError, match=r"slots must be \[B, N, D=2\]"):
        policy.act({"slots": start[:, 0]})
    with pytest.raises(ValueError, match=r'expected "slots", "pixels" or "pixel_values"'):
        policy.act({"state": start})
    with pytest.raises(ValueError, match="one row per task"):
        policy.act({"slots": start, "proprio": start[:2]})
