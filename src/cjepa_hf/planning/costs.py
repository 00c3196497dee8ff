"""What a plan costs: objectives on imagined slots, and the rollout that imagines them for every candidate."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from cjepa_hf.models.cjepa import CJepaRolloutOutput, SlotWorldModel
from cjepa_hf.models.cjepa.modeling_cjepa import assign_slots, reorder_slots

# objective(slots [B, S, K, N, D], proprio_embeddings [B, S, K, E] or None, goal_slots [B, N, D],
#           goal_proprio_embeddings [B, E] or None) -> [B, S]
Objective = Callable[
    [torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None],
    torch.Tensor,
]


@dataclass(kw_only=True)
class SlotGoalCost:
    """
    Distance of the last imagined frame from the goal (paper, "Planning on Push-T"): the mean squared error of the
    slots, matched optimally, over (N, D), plus `proprio_weight` times the mean squared error of the embedded
    proprioception over E. The second term is left out where the goal has no proprioception.

    Args:
        proprio_weight: weight of the proprioception term (1 in the paper).
        match_slots: match imagined and goal slots by optimal assignment, as the paper does; without, slot i is compared
            with goal slot i, which is right (and cheaper) for encoders whose slots keep their roles.
        slot_weights: one weight per goal slot, to ignore a static background for instance. The cost is then the
            weighted mean; the matching itself does not see the weights.
    """

    proprio_weight: float = 1.0
    match_slots: bool = True
    slot_weights: Sequence[float] | None = None

    def __post_init__(self):
        if not (math.isfinite(self.proprio_weight) and self.proprio_weight >= 0):
            raise ValueError(f"proprio_weight must be finite and not negative, got {self.proprio_weight}")
        if self.slot_weights is not None and (min(self.slot_weights) < 0 or not sum(self.slot_weights) > 0):
            raise ValueError(f"slot_weights must not be negative and not all 0, got {self.slot_weights}")

    def __call__(
        self,
        slots: torch.Tensor,
        proprio_embeddings: torch.Tensor | None,
        goal_slots: torch.Tensor,
        goal_proprio_embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            slots: [B, S, K, N, D] imagined frames, of which the last counts.
            proprio_embeddings: [B, S, K, E] or None.
            goal_slots: [B, N, D].
            goal_proprio_embeddings: [B, E] or None.

        Returns:
            [B, S] float32 costs.
        """
        last, goal = slots[:, :, -1].float(), goal_slots.float().unsqueeze(1)
        if last.shape[-2:] != goal.shape[-2:]:
            raise ValueError(
                f"imagined slots [N, D] = {list(last.shape[-2:])} and goal slots {list(goal.shape[-2:])} must have the "
                "same shape: encode start and goal with the same encoder"
            )
        goal = goal.expand_as(last)
        if self.match_slots:
            last = reorder_slots(last, assign_slots(last, goal))
        error = (last - goal).square().mean(-1)
        if self.slot_weights is None:
            cost = error.mean(-1)
        else:
            weights = torch.tensor(self.slot_weights, device=error.device, dtype=error.dtype)
            if len(weights) != error.shape[-1]:
                raise ValueError(f"{len(weights)} slot_weights for {error.shape[-1]} slots")
            cost = (error * weights).sum(-1) / weights.sum()
        if self.proprio_weight and goal_proprio_embeddings is not None and proprio_embeddings is not None:
            gap = proprio_embeddings[:, :, -1].float() - goal_proprio_embeddings.float().unsqueeze(1)
            cost = cost + self.proprio_weight * gap.square().mean(-1)
        return cost


class RolloutCost:
    """
    `cost_fn(actions [B, S, H, A]) -> [B, S]`: imagines every candidate with `model.rollout`, then asks `objective`.

    Everything is in the model's normalised units. Candidates are imagined in chunks, so the memory in use does not
    grow with the number of samples or tasks.

    Args:
        model: a [`CJepaModel`] or [`DinoWmModel`] in eval mode.
        objective: for example [`SlotGoalCost`]. Planners that follow gradients need a differentiable one.
        slots: [B, T, N, D], the observed frames, 1 <= T <= history_length.
        goal_slots: [B, N, D].
        proprio: [B, T, P], normalised; required if the model takes proprioception.
        goal_proprio: [B, P], normalised, or None.
        past_actions: [B, T - 1, A], normalised: what was done between the observed frames (T > 1 only).
        max_candidates_per_chunk: candidates imagined together. None: 512 on a CPU, where larger chunks gain nothing, else
            as many as `max_memory` allows.
        max_memory: bound in bytes on the activations of one chunk (an estimate that errs on the high side).
        match_slots: keep the slot order along the rollout by optimal assignment, as the paper's planner does.
        window: frames the predictor sees at most (history_length without). 1 is the cheapest, and enough where one
            frame with proprioception tells the state.
    """

    def __init__(
        self,
        model: SlotWorldModel,
        objective: Objective,
        slots: torch.Tensor,
        goal_slots: torch.Tensor,
        *,
        proprio: torch.Tensor | None = None,
        goal_proprio: torch.Tensor | None = None,
        past_actions: torch.Tensor | None = None,
        max_candidates_per_chunk: int | None = None,
        max_memory: int = 2**30,
        match_slots: bool = False,
        window: int | None = None,
    ):
        config = model.config
        if model.training:
            raise ValueError(
                "the model is in training mode, where dropout makes costs random: call model.eval() first"
            )
        if config.action_size == 0:
            raise ValueError("this model takes no actions (action_size=0), so there is nothing to plan")
        if slots.ndim != 4 or goal_slots.shape != (slots.shape[0], *slots.shape[2:]):
            raise ValueError(
                f"expected slots [B, T, N, D] and goal_slots [B, N, D], got {list(slots.shape)} and "
                f"{list(goal_slots.shape)}"
            )
        batch, frames = slots.shape[:2]
        for name, value, size in (("proprio", proprio, (batch, frames)), ("goal_proprio", goal_proprio, (batch,))):
            if value is None:
                continue
            if config.proprio_size == 0:
                raise ValueError(f"{name} was given, but this model takes no proprioception: leave it out")
            if tuple(value.shape) != (*size, config.proprio_size):
                raise ValueError(f"{name} must be {[*size, config.proprio_size]}, got {list(value.shape)}")
        if config.proprio_size and proprio is None:
            raise ValueError(
                "this model takes proprioception: give `proprio` (zeros are the mean, in normalised units)"
            )
        past_shape = None if past_actions is None else tuple(past_actions.shape)
        if past_shape != (None if frames == 1 else (batch, frames - 1, config.action_size)):
            raise ValueError(
                f"{frames} observed frames need past_actions [B, T - 1, A] = "
                f"{[batch, frames - 1, config.action_size]} (None for one frame), got {past_shape}"
            )
        for name, value in (("slots", slots), ("goal_slots", goal_slots), ("proprio", proprio)):
            if value is not None and not value.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinite values")
        self.model, self.objective = model, objective
        self.match_slots, self.window = match_slots, window
        dtype, device = model.dtype, model.device

        def move(value):
            if value is None:
                return None
            value = value.to(device=device, dtype=dtype)
            with torch.inference_mode(False):  # no gradient passes by tensors of inference mode
                return value.clone() if value.is_inference() else value

        self.slots, self.goal_slots, self.proprio = move(slots), move(goal_slots), move(proprio)
        self.past_actions = move(past_actions)
        with torch.inference_mode(False), torch.no_grad():
            self.goal_proprio_embeddings = None if goal_proprio is None else model.embed_proprio(move(goal_proprio))
        if max_candidates_per_chunk is not None and max_candidates_per_chunk < 1:
            raise ValueError(f"max_candidates_per_chunk must be at least 1, got {max_candidates_per_chunk}")
        if max_candidates_per_chunk is None and device.type == "cpu":
            max_candidates_per_chunk = 512
        affordable = max_memory // self._candidate_bytes()
        if affordable < 1:
            raise ValueError(
                f"max_memory={max_memory} bytes is less than one candidate needs (about {self._candidate_bytes()})"
            )
        self.chunk_size = int(min(affordable, max_candidates_per_chunk or affordable))
        self.max_memory = max_memory

    def _candidate_bytes(self) -> int:
        """Activations alive at once in one layer of the predictor, plus the frames a rollout keeps, per candidate."""
        config = self.model.config
        frames = min(self.window or config.history_length, config.history_length) + config.prediction_length
        tokens = frames * (self.slots.shape[2] + config.num_auxiliary_tokens)
        heads = config.num_attention_heads * getattr(config, "head_dim", 0)  # where they are no parts of hidden_size
        width = (
            10 * config.hidden_size + 4 * heads + 2 * config.intermediate_size + config.num_attention_heads * tokens
        )
        return tokens * width * self.model.dtype.itemsize

    @torch.inference_mode()
    def __call__(self, actions: torch.Tensor) -> torch.Tensor:
        """[B, S, H, A] normalised actions -> [B, S] float32 costs."""
        costs = actions.new_empty(actions.shape[:2], dtype=torch.float32)
        for rows, samples in self._chunks(actions, self.chunk_size):
            costs[rows, samples] = self._chunk(rows, actions[rows, samples])
        return costs

    def with_gradient(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, H, A] normalised actions -> [B, S] float32 costs, and the gradient of each, [B, S, H, A]."""
        # all layers of all steps are kept until the gradient has passed by them
        kept = self._candidate_bytes() * self.model.config.num_hidden_layers * actions.shape[2]
        if kept > self.max_memory:
            raise ValueError(
                f"max_memory={self.max_memory} bytes is less than the gradient of one candidate needs (about {kept}): raise "
                "it, or plan with CEMPlanner, ICEMPlanner or MPPIPlanner"
            )
        costs, gradient = actions.new_empty(actions.shape[:2], dtype=torch.float32), torch.empty_like(actions)
        for rows, samples in self._chunks(actions, min(self.chunk_size, self.max_memory // kept)):
            with torch.inference_mode(False), torch.enable_grad():
                part = actions[rows, samples].detach().clone().requires_grad_()
                cost = self._chunk(rows, part)
                if not cost.requires_grad:
                    raise ValueError(
                        f"{self.objective} passes no gradient on, which CEMGDPlanner needs: plan with CEMPlanner, ICEMPlanner "
                        "or MPPIPlanner"
                    )
                (slope,) = torch.autograd.grad(cost.sum(), part)
            costs[rows, samples], gradient[rows, samples] = cost.detach(), slope
        return costs, gradient

    def _chunks(self, actions: torch.Tensor, size: int) -> Iterator[tuple[slice, slice]]:
        """(tasks, samples) of chunks: whole tasks while one fits, else equal parts of one, as a small rest costs as much."""
        batch, count = actions.shape[:2]
        if batch != self.slots.shape[0]:
            raise ValueError(f"{batch} tasks in actions, {self.slots.shape[0]} in the observation")
        tasks, parts = max(size // count, 1), math.ceil(count / size)
        for start in range(0, batch, tasks):
            for part in range(parts):
                yield slice(start, start + tasks), slice(count * part // parts, count * (part + 1) // parts)

    def _chunk(self, rows: slice, actions: torch.Tensor) -> torch.Tensor:
        output = self._imagine(actions, rows)
        goal_proprio = None if self.goal_proprio_embeddings is None else self.goal_proprio_embeddings[rows]
        return self.objective(output.slots, output.proprio_embeddings, self.goal_slots[rows], goal_proprio)

    @torch.inference_mode()
    def imagine(self, actions: torch.Tensor, rows: slice = slice(None)) -> CJepaRolloutOutput:
        """The model's rollout of candidates [B, S, H, A] for the tasks `rows`: slots [B, S, H, N, D]."""
        return self._imagine(actions, rows)

    def _imagine(self, actions: torch.Tensor, rows: slice) -> CJepaRolloutOutput:
        actions = actions.to(device=self.model.device, dtype=self.model.dtype)
        horizon = actions.shape[2]
        if self.past_actions is not None:
            past = self.past_actions[rows].unsqueeze(1).expand(-1, actions.shape[1], -1, -1)
            actions = torch.cat([past, actions], dim=2)
        return self.model.rollout(
            self.slots[rows],
            actions=actions,
            proprio=None if self.proprio is None else self.proprio[rows],
            num_steps=horizon,
            match_slots=self.match_slots,
            window_length=self.window,
        )
