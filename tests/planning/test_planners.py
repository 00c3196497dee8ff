import math

import pytest
import torch

from cjepa_hf.planning import CEMGDPlanner, CEMPlanner, ICEMPlanner, MPPIPlanner
from cjepa_hf.planning.planners import colored_noise, cost_and_gradient

PLANNERS = [
    CEMPlanner(num_samples=200, num_iterations=12, num_elites=20),
    ICEMPlanner(num_samples=200, num_iterations=20, num_elites=20),
    MPPIPlanner(num_samples=200, num_iterations=20, num_elites=30),
    CEMGDPlanner(num_samples=100, num_iterations=4, num_gradient_steps=16, learning_rate_decay=0.95),
]
TARGETS = torch.tensor([[0.5, -1.0], [1.0, 0.3], [-0.7, 0.0]])


def distance_to_targets(actions):
    """Each of 3 tasks has its own target for every action."""
    return (actions - TARGETS[:, None, None]).square().mean((2, 3))


def plan(planner, cost_fn=distance_to_targets, seed=0, batch_size=3, horizon=4, action_size=2, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return planner.plan_with_info(
        cost_fn, batch_size=batch_size, horizon=horizon, action_size=action_size, generator=generator, **kwargs
    )


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda planner: type(planner).__name__)
class TestEveryPlanner:
    def test_finds_the_optimum_of_each_task(self, planner):
        output = plan(planner)
        assert output.actions.shape == (3, 4, 2)
        assert (output.actions - TARGETS[:, None]).abs().max() < 0.25
        assert output.cost.max() < 0.01
        steps = planner.num_iterations + getattr(planner, "num_gradient_steps", 0)
        assert output.history.shape == (steps, 3)
        assert (output.history[-1] < output.history[0] / 10).all()

    def test_reports_the_cost_of_the_plan_it_returns(self, planner):
        output = plan(planner)
        torch.testing.assert_close(output.cost, distance_to_targets(output.actions.unsqueeze(1))[:, 0])

    def test_equal_seeds_give_equal_plans(self, planner):
        assert torch.equal(plan(planner).actions, plan(planner).actions)
        assert not torch.equal(plan(planner).actions, plan(planner, seed=1).actions)

    def test_keeps_every_candidate_within_the_bounds(self, planner):
        low, high = torch.tensor([-0.2, -0.4]), torch.tensor([1.0, 0.1])
        seen = []

        def cost_fn(actions):
            seen.append((actions >= low).all() and (actions <= high).all())
            return distance_to_targets(actions)

        output = plan(planner, cost_fn, bounds=(low, high))
        assert all(seen)
        assert (output.actions - TARGETS[:, None].clamp(low, high)).abs().max() < 0.25

    def test_non_finite_costs_count_as_worst(self, planner):
        def cost_fn(actions):
            cost = distance_to_targets(actions)
            cost[:, 1::3] = math.nan
            cost[:, 2::3] = -math.inf
            return cost

        output = plan(planner, cost_fn)
        assert output.actions.isfinite().all() and output.history.isfinite().all()
        assert (output.actions - TARGETS[:, None]).abs().max() < 0.4

    def test_says_which_task_has_no_finite_cost(self, planner):
        def cost_fn(actions):
            cost = distance_to_targets(actions)
            cost[1] = math.nan
            return cost

        with pytest.raises(ValueError, match=r"no candidate has a finite cost in task\(s\) \[1\] of 3"):
            plan(planner, cost_fn)

    def test_initial_plan_is_the_first_mean(self, planner):
        means = []

        def cost_fn(actions):
            means.append(actions.mean(1))
            return distance_to_targets(actions)

        plan(planner, cost_fn, initial=torch.full((3, 4, 2), 5.0))
        assert (means[0] - 5).abs().max() < 1

    def test_rejects_wrong_shapes(self, planner):
        with pytest.raises(ValueError, match=r"initial must have shape \[B, H, A\] = \[3, 4, 2\]"):
            plan(planner, initial=torch.zeros(3, 5, 2))
        with pytest.raises(ValueError, match=r"cost_fn must return \[B, S\]"):
            plan(planner, lambda actions: distance_to_targets(actions)[:, :-1])


def test_cem_defaults_are_the_papers():
    planner = CEMPlanner()
    assert (planner.num_samples, planner.num_iterations, planner.num_elites) == (300, 30, 30)
    assert (planner.var_scale, planner.returns) == (1.0, "mean")


def test_cem_follows_the_papers_update_exactly():
    """A second, plain implementation for one task fed with the same noise gives the same plan."""
    planner = CEMPlanner(num_samples=20, num_iterations=5, num_elites=4, var_scale=0.7)
    target = torch.tensor([0.4, -0.3])
    output = plan(planner, lambda actions: (actions - target).square().sum((2, 3)), batch_size=1, horizon=3, seed=5)
    generator = torch.Generator().manual_seed(5)
    mean, std = torch.zeros(3, 2), torch.full((3, 2), 0.7)
    for _ in range(5):
        candidates = torch.randn(20, 3, 2, generator=generator) * std + mean
        candidates[0] = mean
        costs = [(candidate - target).square().sum() for candidate in candidates]
        elites = candidates[torch.stack(costs).argsort()[:4]]
        mean, std = elites.mean(0), elites.std(0)
    torch.testing.assert_close(output.actions[0], mean)


def test_a_task_plans_the_same_whatever_its_neighbors_cost():
    def other_cost(actions):
        cost = distance_to_targets(actions)
        cost[1:] = actions[1:].sum((2, 3))
        return cost

    for planner in PLANNERS:
        assert torch.equal(plan(planner).actions[0], plan(planner, other_cost).actions[0])


def test_icem_evaluates_fewer_candidates_later_and_carries_elites():
    batches = []

    def cost_fn(actions):
        batches.append(actions)
        return distance_to_targets(actions)

    planner = ICEMPlanner(num_samples=100, num_iterations=5, num_elites=10, num_kept_elites=3, sample_decay=2)
    plan(planner, cost_fn)
    assert [batch.shape[1] for batch in batches] == [100, 50 + 3, 25 + 3, 20 + 3, 20 + 3 + 1]
    best = distance_to_targets(batches[0]).argmin(1)
    assert torch.equal(batches[1][:, -3], batches[0][torch.arange(3), best])


@pytest.mark.parametrize("steps", [5, 8])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_colored_noise_has_unit_variance_everywhere_and_the_spectrum_asked_for(steps, beta):
    noise = colored_noise((20000, steps), beta, torch.Generator().manual_seed(0))
    assert noise.shape == (20000, steps)
    assert (noise.var(0) - 1).abs().max() < 0.05
    assert noise.mean().abs() < 0.02
    power = torch.fft.rfft(noise).abs().square().mean(0)
    assert power[1] / power[2] == pytest.approx(2**beta, rel=0.05)
    assert power[0] / power[1] == pytest.approx(1, rel=0.05)


def test_icem_colors_noise_over_raw_steps_inside_blocks():
    planner = ICEMPlanner(steps_per_block=5)
    noise = planner._noise(4000, (1, 5, 10), torch.Generator().manual_seed(0))
    raw = noise.reshape(4000, 25, 2)
    across_blocks = (raw[:, 5::5] * raw[:, 4:-1:5]).mean()
    across_dimensions = (raw[..., 0] * raw[..., 1]).mean()
    assert across_blocks > 0.8 and across_dimensions.abs() < 0.05
    with pytest.raises(ValueError, match="does not split into steps_per_block"):
        planner._noise(4, (1, 5, 9), None)


@pytest.mark.parametrize("kind", [CEMPlanner, ICEMPlanner, MPPIPlanner, CEMGDPlanner])
def test_held_steps_search_one_value_for_all_raw_actions_of_a_block(kind):
    planner = kind(num_samples=200, num_iterations=12, num_elites=20, held_steps=5)
    output = plan(planner, lambda actions: distance_to_targets(actions.unflatten(3, (5, 2)).mean(3)), action_size=10)
    raw = output.actions.unflatten(2, (5, 2))
    torch.testing.assert_close(raw, raw[:, :, :1].expand_as(raw))  # means of equal values, summed in other orders
    assert (raw.mean(2) - TARGETS[:, None]).abs().max() < 0.25
    with pytest.raises(ValueError, match="size 9 does not split into held_steps=5"):
        plan(planner, action_size=9)
    with pytest.raises(ValueError, match="held_steps must be at least 1"):
        kind(held_steps=0)


def test_gradient_steps_lower_the_cost_that_a_short_search_reaches():
    short = plan(CEMPlanner(num_samples=64, num_iterations=3, num_elites=8))
    output = plan(CEMGDPlanner(num_samples=64, num_iterations=3, num_elites=8))
    assert torch.equal(output.history[:3], short.history)  # the search is the same, and goes first
    assert (output.cost < short.cost / 4).all()


def test_gradient_steps_never_give_a_worse_plan_than_the_search():
    planner = CEMGDPlanner(num_samples=64, num_iterations=3, learning_rate=100.0, learning_rate_decay=1.0)
    short = plan(CEMPlanner(num_samples=64, num_iterations=3, num_elites=8))
    assert torch.equal(plan(planner).actions, short.actions)


def test_a_plan_outlives_gradient_steps_that_lead_where_no_cost_is_finite():
    def walled(actions):
        cost = (actions - 1).square().mean((2, 3))
        return cost.masked_fill((actions.abs() > 0.3).flatten(2).any(2), math.inf)

    found = plan(CEMPlanner(num_samples=300, num_iterations=4, num_elites=8, var_scale=0.1), walled)
    output = plan(CEMGDPlanner(num_samples=300, num_iterations=4, var_scale=0.1, learning_rate=0.2), walled)
    assert output.cost.isfinite().all() and (output.cost <= found.cost).all() and output.actions.abs().max() <= 0.3


def test_gradients_are_followed_inside_inference_mode():
    with torch.inference_mode():
        inside = plan(CEMGDPlanner())
    assert torch.equal(inside.actions, plan(CEMGDPlanner()).actions)


def test_a_cost_without_gradient_is_refused_by_the_planner_that_needs_one():
    with pytest.raises(ValueError, match="has no gradient, which CEMGDPlanner needs: plan with CEMPlanner"):
        plan(CEMGDPlanner(), lambda actions: distance_to_targets(actions.detach()))


def test_candidates_without_finite_cost_or_gradient_have_a_gradient_of_zero():
    def cost_fn(actions):
        cost = distance_to_targets(actions)
        return torch.stack(
            [cost[:, 0] * math.nan, cost[:, 1], cost[:, 2] + 0 * actions[:, 2, 0, 0].sub(1).sqrt()], dim=1
        )

    candidates = torch.zeros(3, 3, 4, 2)
    candidates[:, 2, 0, 0] = 1.0  # the square root is 0, its slope infinite
    costs, gradient = cost_and_gradient(cost_fn, candidates)
    assert costs[:, 0].isinf().all() and costs[:, 1:].isfinite().all() and gradient.isfinite().all()
    assert (gradient[:, 0] == 0).all() and (gradient[:, 2, 0, 0] == 0).all()
    expected = (candidates - TARGETS[:, None, None]) * 2 / 8
    torch.testing.assert_close(gradient[:, 1], expected[:, 1])


def test_mppi_does_not_depend_on_the_scale_of_the_cost():
    planner = PLANNERS[2]
    scaled = plan(planner, lambda actions: 1e-4 * distance_to_targets(actions))
    torch.testing.assert_close(scaled.actions, plan(planner).actions, atol=1e-4, rtol=1e-4)
    constant = plan(planner, lambda actions: torch.ones(actions.shape[:2]))
    assert constant.actions.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CEMPlanner(num_elites=400), "num_elites must be between 2 and num_samples=300"),
        (lambda: CEMPlanner(num_iterations=0), "num_iterations"),
        (lambda: CEMPlanner(returns="median"), "returns"),
        (lambda: ICEMPlanner(num_kept_elites=50), "num_kept_elites"),
        (lambda: ICEMPlanner(sample_decay=0.5), "sample_decay"),
        (lambda: MPPIPlanner(temperature=0), "temperature"),
        (lambda: MPPIPlanner(std_decay=1.5), "std_decay"),
        (lambda: CEMGDPlanner(num_gradient_plans=0), "num_gradient_plans"),
        (lambda: CEMGDPlanner(num_gradient_steps=0), "num_gradient_steps"),
        (lambda: CEMGDPlanner(learning_rate=0), "learning_rate"),
        (lambda: CEMGDPlanner(learning_rate_decay=2), "learning_rate_decay"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
