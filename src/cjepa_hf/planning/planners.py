"""Sampling planners: minimise `cost_fn(actions [B, S, H, A]) -> [B, S]` for B tasks at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

CostFn = Callable[[torch.Tensor], torch.Tensor]
Bounds = tuple[torch.Tensor | float, torch.Tensor | float]


@dataclass
class PlannerOutput:
    """
    actions: [B, H, A], the plan of each task.
    cost: [B], the cost of exactly these actions.
    history: [iterations, B], the lowest cost seen in each iteration.
    """

    actions: torch.Tensor
    cost: torch.Tensor
    history: torch.Tensor


@dataclass(kw_only=True)
class CEMPlanner:
    """
    Cross-entropy method. The defaults are the planner of the paper ("Planning on Push-T").

    Every iteration draws `num_samples` plans from one Gaussian per task (the first plan is its mean itself) and refits
    mean and standard deviation to the `num_elites` cheapest. As in the original, the deviation is the unbiased one of
    the elites and has no floor, and the answer is the final mean.

    Args:
        var_scale: initial standard deviation, in units of the actions the cost takes (the original calls it a variance
            and uses it as a deviation).
        returns: "mean", or "best" for the cheapest plan seen.
        held_steps: the A entries of an action are `held_steps` raw actions in a row, which share each draw of the noise
            (1: every entry has its own). With `held_steps=frame_skip` a block of actions is searched as one push that
            is held, in a space that many times smaller: fewer samples find better plans.
    """

    num_samples: int = 300
    num_iterations: int = 30
    num_elites: int = 30
    var_scale: float = 1.0
    returns: Literal["mean", "best"] = "mean"
    held_steps: int = 1

    def __post_init__(self):
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, got {self.num_iterations}")
        if not 2 <= self.num_elites <= self.num_samples:
            raise ValueError(f"num_elites must be between 2 and num_samples={self.num_samples}, got {self.num_elites}")
        if not self.var_scale > 0:
            raise ValueError(f"var_scale must be positive, got {self.var_scale}")
        if self.returns not in ("mean", "best"):
            raise ValueError(f'returns must be "mean" or "best", got {self.returns!r}')
        if self.held_steps < 1:
            raise ValueError(f"held_steps must be at least 1, got {self.held_steps}")

    def plan(self, cost_fn: CostFn, **kwargs) -> torch.Tensor:
        """The actions [B, H, A] of [`plan_with_info`], which takes the same arguments."""
        return self.plan_with_info(cost_fn, **kwargs).actions

    @torch.no_grad()
    def plan_with_info(
        self,
        cost_fn: CostFn,
        *,
        batch_size: int,
        horizon: int,
        action_size: int,
        initial: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        bounds: Bounds | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> PlannerOutput:
        """
        Plan `batch_size` tasks together.

        Args:
            cost_fn: maps candidate plans [B, S, H, A] to costs [B, S], lower is better. A non-finite cost counts as
                worse than any finite one.
            batch_size, horizon, action_size: B, H, A.
            initial: [B, H, A], mean of the first iteration (0 without).
            generator: makes the samples reproducible. Samples are drawn on its device, so that a CPU generator gives
                the same ones whatever `device` is.
            bounds: (low, high), broadcastable to [A], in the units of the actions; candidates are clamped to them.

        Raises:
            ValueError: wrong shapes, an action size that `held_steps` does not divide, or a task for which no candidate of
                an iteration has a finite cost.
        """
        shape = (batch_size, horizon, action_size)
        if min(shape) < 1:
            raise ValueError(f"batch_size, horizon and action_size must be at least 1, got {shape}")
        if action_size % self.held_steps:
            raise ValueError(f"an action of size {action_size} does not split into held_steps={self.held_steps}")
        noise_shape = (batch_size, horizon, action_size // self.held_steps)
        if initial is None:
            mean = torch.zeros(shape, device=device, dtype=dtype)
        else:
            if tuple(initial.shape) != shape:
                raise ValueError(f"initial must have shape [B, H, A] = {list(shape)}, got {list(initial.shape)}")
            if not initial.isfinite().all():
                raise ValueError("initial holds NaN or infinite actions")
            mean = initial.to(device=device, dtype=dtype)
        std = torch.full_like(mean, self.var_scale)
        if bounds is not None:
            bounds = tuple(torch.as_tensor(bound, device=device, dtype=dtype) for bound in bounds)
            mean = mean.clamp(*bounds)

        kept = None
        best_actions, best_cost, history = mean, None, []
        for iteration in range(self.num_iterations):
            noise = self._noise(self._sample_count(iteration), noise_shape, generator).to(device=device, dtype=dtype)
            candidates = mean.unsqueeze(1) + std.unsqueeze(1) * noise.repeat(1, 1, 1, self.held_steps)
            candidates = self._insert(candidates, mean, kept, iteration)
            if bounds is not None:
                candidates = candidates.clamp(*bounds)
            costs = evaluate_candidates(cost_fn, candidates)

            elite_costs, order = costs.topk(self.num_elites, dim=1, largest=False, sorted=True)
            elites = candidates.gather(1, order[:, :, None, None].expand(-1, -1, horizon, action_size))
            history.append(elite_costs[:, 0])
            if best_cost is None:
                best_cost, best_actions = elite_costs[:, 0], elites[:, 0]
            else:
                better = elite_costs[:, 0] < best_cost
                best_cost = torch.where(better, elite_costs[:, 0], best_cost)
                best_actions = torch.where(better[:, None, None], elites[:, 0], best_actions)
            mean, std = self._update(mean, std, elites, elite_costs, iteration)
            kept = elites

        if self.returns == "mean":
            best_actions = mean
            best_cost = evaluate_candidates(cost_fn, mean.unsqueeze(1))[:, 0]
        return self._refine(PlannerOutput(best_actions, best_cost, torch.stack(history)), cost_fn, elites, bounds)

    def _refine(
        self, output: PlannerOutput, cost_fn: CostFn, elites: torch.Tensor, bounds: Bounds | None
    ) -> PlannerOutput:
        return output

    def _sample_count(self, iteration: int) -> int:
        return self.num_samples

    def _noise(self, count: int, shape: tuple[int, int, int], generator: torch.Generator | None) -> torch.Tensor:
        batch, horizon, size = shape
        device = None if generator is None else generator.device
        return torch.randn(batch, count, horizon, size, generator=generator, device=device)

    def _insert(
        self, candidates: torch.Tensor, mean: torch.Tensor, kept: torch.Tensor | None, iteration: int
    ) -> torch.Tensor:
        candidates[:, 0] = mean
        return candidates

    def _update(
        self, mean: torch.Tensor, std: torch.Tensor, elites: torch.Tensor, costs: torch.Tensor, iteration: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Elites without a finite cost (fewer finite candidates than elites) must not pull the distribution.
        weight = costs.isfinite().to(elites.dtype)[:, :, None, None]
        count = weight.sum(1)
        new_mean = (elites * weight).sum(1) / count
        variance = ((elites - new_mean.unsqueeze(1)).square() * weight).sum(1) / (count - 1).clamp(min=1)
        return new_mean, variance.sqrt()


@dataclass(kw_only=True)
class ICEMPlanner(CEMPlanner):
    """
    iCEM (Pinneri et al., 2020): CEM with noise correlated over time, elites carried from one iteration to the next, a
    moving average of the distribution, fewer samples in later iterations, and the cheapest plan seen as the answer.

    Args:
        noise_beta: exponent of the noise's power spectrum over the plan (0 = white, 2 = random-walk-like).
        steps_per_block: draws inside one action (frame_skip / held_steps), to colour the noise over H * steps_per_block
            of them; 1 colours it over the H actions.
        num_kept_elites: elites of the last iteration that compete again.
        sample_decay: iteration i draws num_samples / sample_decay**i plans, at least 2 * num_elites.
        momentum: share of the old mean and deviation kept at every update.
    """

    num_samples: int = 100
    num_iterations: int = 10
    num_elites: int = 15
    returns: Literal["mean", "best"] = "best"
    noise_beta: float = 2.0
    steps_per_block: int = 1
    num_kept_elites: int = 5
    sample_decay: float = 1.25
    momentum: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.num_kept_elites <= self.num_elites:
            raise ValueError(
                f"num_kept_elites must be between 0 and num_elites={self.num_elites}, got {self.num_kept_elites}"
            )
        if self.sample_decay < 1:
            raise ValueError(f"sample_decay must be at least 1, got {self.sample_decay}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.noise_beta < 0:
            raise ValueError(f"noise_beta must not be negative, got {self.noise_beta}")

    def _sample_count(self, iteration: int) -> int:
        return min(self.num_samples, max(int(self.num_samples / self.sample_decay**iteration), 2 * self.num_elites))

    def _noise(self, count: int, shape: tuple[int, int, int], generator: torch.Generator | None) -> torch.Tensor:
        batch, horizon, size = shape
        if size % self.steps_per_block:
            raise ValueError(
                f"an action of size {size} (without held steps) does not split into "
                f"steps_per_block={self.steps_per_block}"
            )
        steps = horizon * self.steps_per_block
        noise = colored_noise((batch, count, size // self.steps_per_block, steps), self.noise_beta, generator)
        return noise.movedim(-1, 2).reshape(batch, count, horizon, size)

    def _insert(
        self, candidates: torch.Tensor, mean: torch.Tensor, kept: torch.Tensor | None, iteration: int
    ) -> torch.Tensor:
        extra = [candidates]
        if kept is not None and self.num_kept_elites:
            extra.append(kept[:, : self.num_kept_elites])
        if iteration == self.num_iterations - 1:
            extra.append(mean.unsqueeze(1))
        return torch.cat(extra, dim=1)

    def _update(
        self, mean: torch.Tensor, std: torch.Tensor, elites: torch.Tensor, costs: torch.Tensor, iteration: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new_mean, new_std = super()._update(mean, std, elites, costs, iteration)
        return mean.lerp(new_mean, 1 - self.momentum), std.lerp(new_std, 1 - self.momentum)


@dataclass(kw_only=True)
class MPPIPlanner(CEMPlanner):
    """
    Model-predictive path integral control: the mean moves to the elites weighted by
    softmax(-cost / (temperature * standard deviation of the elites' costs)), so that the temperature does not depend
    on the scale of the cost; the sampling deviation shrinks by `std_decay` per iteration.
    """

    num_samples: int = 100
    num_iterations: int = 10
    num_elites: int = 50
    temperature: float = 0.5
    std_decay: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 < self.std_decay <= 1:
            raise ValueError(f"std_decay must be in (0, 1], got {self.std_decay}")

    def _update(
        self, mean: torch.Tensor, std: torch.Tensor, elites: torch.Tensor, costs: torch.Tensor, iteration: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        finite = costs.isfinite()
        gap = (costs - costs[:, :1]).masked_fill(~finite, 0)
        scale = (gap.square().sum(1, keepdim=True) / finite.sum(1, keepdim=True)).sqrt()
        logits = -gap / (self.temperature * scale).clamp(min=torch.finfo(costs.dtype).tiny)
        weights = logits.masked_fill(~finite, -torch.inf).softmax(1).to(elites.dtype)
        return (weights[:, :, None, None] * elites).sum(1), std * self.std_decay


@dataclass(kw_only=True)
class CEMGDPlanner(CEMPlanner):
    """
    CEM-GD (Huang et al., 2021, arXiv 2112.07746): a short CEM finds where to look, then gradient descent through the world
    model improves what it found, and the cheapest plan seen is the answer. A step of it knows a direction for every action,
    for the cost of about three candidates: low costs are reached with a part of the evaluations that sampling needs.

    The cost must have gradients: [`RolloutCost`] with a differentiable objective, or any `cost_fn` that autograd sees through.
    Held actions stay so.

    Args:
        num_gradient_plans: plans improved per task: the answer of the CEM and the cheapest of its last elites, if there are
            that many.
        num_gradient_steps: steps of Adam (betas 0.5 and 0.9, as there are few).
        learning_rate: its first one, in units of the actions the cost takes; every step multiplies it by
            `learning_rate_decay`.
    """

    num_samples: int = 64
    num_iterations: int = 3
    num_elites: int = 8
    num_gradient_plans: int = 4
    num_gradient_steps: int = 8
    learning_rate: float = 0.1
    learning_rate_decay: float = 0.85

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_gradient_plans", "num_gradient_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 < self.learning_rate_decay <= 1:
            raise ValueError(f"learning_rate_decay must be in (0, 1], got {self.learning_rate_decay}")

    @torch.inference_mode(False)  # there are no gradients in it, wherever the caller is
    @torch.no_grad()
    def _refine(
        self, output: PlannerOutput, cost_fn: CostFn, elites: torch.Tensor, bounds: Bounds | None
    ) -> PlannerOutput:
        plans = torch.cat([output.actions.unsqueeze(1), elites[:, : self.num_gradient_plans - 1]], dim=1).clone()
        best_actions, best_cost, lowest = output.actions, output.cost, []

        def keep_cheapest(costs):
            nonlocal best_actions, best_cost
            cost, index = costs.min(dim=1)
            better = cost < best_cost
            actions = plans[torch.arange(len(plans), device=plans.device), index]
            best_cost = torch.where(better, cost, best_cost)
            best_actions = torch.where(better[:, None, None], actions, best_actions)
            lowest.append(cost)

        optimizer = torch.optim.Adam([plans], lr=self.learning_rate, betas=(0.5, 0.9))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.learning_rate_decay)
        for _ in range(self.num_gradient_steps):
            costs, gradient = cost_and_gradient(cost_fn, plans)
            keep_cheapest(costs)
            # what went where no cost is finite begins again at the best
            plans.copy_(torch.where(costs.isfinite()[:, :, None, None], plans, best_actions.unsqueeze(1)))
            held = gradient.unflatten(-1, (self.held_steps, -1)).mean(-2)
            plans.grad = held.repeat(1, 1, 1, self.held_steps)
            optimizer.step()
            schedule.step()
            if bounds is not None:
                plans.clamp_(*bounds)
        keep_cheapest(evaluate_candidates(cost_fn, plans, need_finite=False))
        # the plans before the first step are the search's own
        return PlannerOutput(best_actions, best_cost, torch.cat([output.history, torch.stack(lowest[1:])]))


def default_planner(frame_skip: int = 1) -> CEMPlanner:
    """
    The planner used where none is named and the cost has gradients: CEM-GD over pushes that are held for a whole block of
    `frame_skip` actions, at a small part of the cost of the paper's planner.
    """
    return CEMGDPlanner(num_samples=100, num_iterations=4, num_elites=10, held_steps=frame_skip, num_gradient_steps=6)


def default_replanner() -> CEMPlanner:
    """The planner that corrects a plan of [`default_planner`] once a block of it is done, action by action."""
    return CEMPlanner(num_samples=32, num_iterations=2, num_elites=8, var_scale=0.5)


def sampling_planner(frame_skip: int = 1) -> CEMPlanner:
    """In place of [`default_planner`] where the cost has no gradient, such as the true simulator's: CEM over held pushes."""
    return CEMPlanner(num_samples=100, num_iterations=8, num_elites=12, held_steps=frame_skip)


def sampling_replanner() -> CEMPlanner:
    """The planner that corrects a plan of [`sampling_planner`]."""
    return CEMPlanner(num_samples=32, num_iterations=3, num_elites=8, var_scale=0.5)


def evaluate_candidates(cost_fn: CostFn, candidates: torch.Tensor, *, need_finite: bool = True) -> torch.Tensor:
    """
    Costs [B, S] in float32 of candidates [B, S, H, A], non-finite ones as +inf.

    Raises:
        ValueError: the cost has another shape, or (with `need_finite`) a task has no finite cost at all.
    """
    costs = cost_fn(candidates)
    if tuple(costs.shape) != tuple(candidates.shape[:2]):
        raise ValueError(
            f"cost_fn must return [B, S] = {list(candidates.shape[:2])} for candidates "
            f"{list(candidates.shape)}, got {list(costs.shape)}"
        )
    costs = costs.to(device=candidates.device, dtype=torch.float32)
    finite = costs.isfinite()
    hopeless = ~finite.any(dim=1)
    if need_finite and hopeless.any():
        tasks = hopeless.nonzero().flatten().tolist()
        raise ValueError(
            f"no candidate has a finite cost in task(s) {tasks[:10]} of {len(costs)}: check the observation, the goal "
            "and the model's weights for NaN or overflow"
        )
    return torch.where(finite, costs, torch.inf)


def cost_and_gradient(cost_fn: CostFn, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Costs as [`evaluate_candidates`] gives them, and the gradient of every one, like `candidates` [B, S, H, A] (0 where it is
    not finite). A `cost_fn` with a method `with_gradient(candidates)` that returns both is asked by it.

    Raises:
        ValueError: a cost of another shape, or one that autograd does not see through.
    """
    gradient = None

    def ask(candidates):
        nonlocal gradient
        if hasattr(cost_fn, "with_gradient"):
            costs, gradient = cost_fn.with_gradient(candidates)
            return costs
        with torch.inference_mode(False), torch.enable_grad():
            actions = candidates.detach().clone().requires_grad_()
            costs = cost_fn(actions)
            if not costs.requires_grad:
                raise ValueError(
                    "the cost has no gradient, which CEMGDPlanner needs: plan with CEMPlanner, ICEMPlanner or MPPIPlanner"
                )
            (gradient,) = torch.autograd.grad(costs.sum(), actions)
        return costs.detach()

    costs = evaluate_candidates(ask, candidates, need_finite=False)
    usable = gradient.isfinite() & costs.isfinite()[:, :, None, None]
    return costs, torch.where(usable, gradient, 0).to(candidates)


def colored_noise(shape: tuple[int, ...], beta: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Gaussian noise whose power spectrum over the last axis falls as 1 / f**beta, of variance 1 at every position
    (Timmer and Koenig, 1995). The mean over time is as strong as the slowest oscillation.
    """
    *batch, steps = shape
    device = None if generator is None else generator.device
    if steps == 1 or beta == 0:
        return torch.randn(shape, generator=generator, device=device)
    frequency = torch.fft.rfftfreq(steps, device=device)
    frequency[0] = frequency[1]
    amplitude = frequency ** (-beta / 2)
    # The constant and (for even lengths) the Nyquist component are real: sqrt(2) keeps their power.
    real = torch.randn(*batch, len(amplitude), generator=generator, device=device)
    imaginary = torch.randn(*batch, len(amplitude), generator=generator, device=device)
    single = [0] if steps % 2 else [0, -1]
    real[..., single] *= 2**0.5
    imaginary[..., single] = 0
    # The variance at each position is the sum over the two-sided spectrum.
    power = 4 * amplitude.square()
    power[single] /= 2
    return torch.fft.irfft(torch.complex(real, imaginary) * amplitude, n=steps) * steps / power.sum().sqrt()
