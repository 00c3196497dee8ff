"""Our world models under stable-worldmodel's own solvers and policy (extra `swm`).

```python
import stable_worldmodel as swm
from cjepa_hf.planning.stable_worldmodel import StableWorldModelCost

cost = StableWorldModelCost.from_pretrained(bundled_checkpoint("push_t"))
solver = swm.solver.CEMSolver(cost)        # newer releases: stable_worldmodel.planning.solver
config = swm.PlanConfig(horizon=5, receding_horizon=5, action_block=cost.frame_skip)
policy = swm.policy.WorldModelPolicy(solver, config, process=cost.process())
```

stable-worldmodel itself is not imported: its solvers ask for `get_cost` alone, in every release so far. Solvers that follow
the gradient of the cost are refused; all that sample work.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModel

from cjepa_hf.models.cjepa import SlotWorldModel

from .costs import Objective, RolloutCost, SlotGoalCost
from .mpc import needs_matching


class Standardizer:
    """`(x - mean) / std` over the last axis and back, of arrays or tensors: what stable-worldmodel calls a process."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        self.mean, self.std = mean.detach().cpu().float(), std.detach().cpu().float()

    def _like(self, x):
        if torch.is_tensor(x):
            return self.mean.to(x), self.std.to(x)
        return self.mean.numpy(), self.std.numpy()

    def transform(self, x):
        """Environment units -> normalised."""
        mean, std = self._like(x)
        return (x - mean) / std

    def inverse_transform(self, x):
        """Normalised -> environment units."""
        mean, std = self._like(x)
        return x * std + mean


class StableWorldModelCost(nn.Module):
    """
    `get_cost(info_dict, action_candidates) -> [B, S]` for stable-worldmodel's solvers, by imagining every candidate with a
    [`CJepaModel`] or [`DinoWmModel`]. Give its `process()` to their `WorldModelPolicy`: solvers then work on raw actions
    normalised one by one, which are converted here to the blocks that the model knows.

    Args:
        model: a world model with a slot encoder and statistics.
        image_processor: turns uint8 RGB images into the encoder's pixel values.
        objective: cost of imagined slots, [`SlotGoalCost`] without.
        rollout_options: more arguments of [`RolloutCost`], such as `window=1`. Slots are matched by optimal assignment
            unless they keep their roles (`match_slots` overrides).
    """

    def __init__(
        self,
        model: SlotWorldModel,
        image_processor: Callable,
        objective: Objective | None = None,
        **rollout_options: Any,
    ):
        super().__init__()
        if model.slot_encoder is None:
            raise ValueError("stable-worldmodel plans from pixels, and this model carries no slot encoder")
        if model.config.action_size % model.config.frame_skip or not model.config.action_size:
            raise ValueError(
                f"action_size={model.config.action_size} is no block of frame_skip={model.config.frame_skip} actions"
            )
        matched = needs_matching(model)
        self.model = model.eval()
        self.image_processor = image_processor
        self.objective = objective if objective is not None else SlotGoalCost(match_slots=matched)
        self.rollout_options = {"match_slots": matched} | rollout_options
        self._seen: dict[str, torch.Tensor] | None = None
        self._cost: RolloutCost | None = None
        self.process()  # says what is wrong with the statistics, before anything is planned

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, device: str | torch.device = "cpu", **kwargs):
        """Of a trained folder, or a Hub id; `kwargs` are the other arguments of the class."""
        model = AutoModel.from_pretrained(folder, use_safetensors=True)
        if not isinstance(model, SlotWorldModel):
            raise ValueError(f"{folder} holds a {type(model).__name__}: give a CJepaModel or DinoWmModel")
        return cls(model.to(device), AutoImageProcessor.from_pretrained(folder), **kwargs)

    @property
    def frame_skip(self) -> int:
        """Raw actions in one step of a plan: stable-worldmodel's `action_block`."""
        return self.model.config.frame_skip

    def process(self) -> dict[str, Standardizer]:
        """The `process` of their `WorldModelPolicy`: of single raw actions, and of proprioception where the model takes it.

        Raises:
            ValueError: the model has no statistics.
        """
        # Every place in a block has its own mean and deviation; a raw action gets their average.
        block = (self.frame_skip, -1)
        zero = torch.zeros(self.model.config.action_size, device=self.model.device)
        mean = self.model.denormalize_actions(zero)
        std = self.model.denormalize_actions(zero + 1) - mean
        found = {"action": Standardizer(mean.view(block).mean(0), std.view(block).mean(0))}
        if self.model.config.proprio_size:
            self.model.normalize_proprio(self.model.proprio_mean)  # raises without statistics
            proprio = Standardizer(self.model.proprio_mean, self.model.proprio_std)
            found |= {"proprio": proprio, "goal_proprio": proprio}
        return found

    def get_cost(self, info_dict: Mapping[str, Any], action_candidates: torch.Tensor) -> torch.Tensor:
        """
        Args:
            info_dict: as their policies make it; every value has the axes [B, S, T, ...] and is the same along S. Read are
                "pixels" and "goal" (uint8 [..., H, W, 3], or float [..., 3, H, W] as the slot encoder takes them),
                "proprio" and "goal_proprio" [..., P] where the model takes proprioception, both normalised by `process()`,
                and "action_history" [B, S, T - 1, A] for T > 1 observed frames. Nothing is changed.
            action_candidates: [B, S, H, A], A = frame_skip raw actions, each normalised by `process()`.

        Returns:
            float32 [B, S], lower is better.
        """
        size = self.model.config.action_size
        if action_candidates.ndim != 4 or action_candidates.shape[-1] != size:
            raise ValueError(
                f"action_candidates has shape {list(action_candidates.shape)}: expected [B, S, H, {size}]; set "
                f"action_block={self.frame_skip} in PlanConfig"
            )
        if action_candidates.requires_grad:
            raise ValueError("this cost has no gradient: use a solver that samples (CEM, iCEM, MPPI)")
        seen = self._read(info_dict)
        if len(seen["pixels"]) != len(action_candidates):
            raise ValueError(
                f"{len(action_candidates)} tasks in action_candidates, {len(seen['pixels'])} in info_dict"
            )
        # Solvers ask many times about the same scene: it is encoded once. Compared by content, since ids are not unique.
        if self._seen is None or not _equal(seen, self._seen):
            self._seen, self._cost = {name: value.clone() for name, value in seen.items()}, self._rollout_cost(seen)
        return self._cost(self._to_blocks(action_candidates))

    def criterion(self, info_dict: Mapping[str, Any], action_candidates: torch.Tensor) -> torch.Tensor:
        """[`get_cost`], under the other name that their protocol `Costable` lists."""
        return self.get_cost(info_dict, action_candidates)

    def _read(self, info_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """What a plan depends on, without the axis S."""
        names = ["pixels", "goal"] + (["proprio"] if self.model.config.proprio_size else [])
        for name in names:
            if info_dict.get(name) is None:
                raise ValueError(f"info_dict has no {name!r}, only {sorted(info_dict)}")
        if self.model.config.proprio_size and info_dict.get("goal_proprio") is not None:
            names.append("goal_proprio")
        seen = {name: torch.as_tensor(info_dict[name])[:, 0] for name in names}
        longest = self.model.config.history_length
        frames = min(seen["pixels"].shape[1], longest)
        for name in {"pixels", "proprio"} & set(names):
            seen[name] = seen[name][:, -frames:]
        for name in {"goal", "goal_proprio"} & set(names):
            seen[name] = seen[name][:, -1:]
        if frames > 1:
            if info_dict.get("action_history") is None:
                raise ValueError(f"info_dict has {frames} frames of pixels, but no 'action_history' between them")
            seen["action_history"] = torch.as_tensor(info_dict["action_history"])[:, 0, -(frames - 1) :]
        return seen

    def _rollout_cost(self, seen: dict[str, torch.Tensor]) -> RolloutCost:
        past, goal_proprio = seen.get("action_history"), seen.get("goal_proprio")
        return RolloutCost(
            self.model,
            self.objective,
            self._encode(seen["pixels"]),
            self._encode(seen["goal"])[:, 0],
            proprio=seen.get("proprio"),
            goal_proprio=None if goal_proprio is None else goal_proprio[:, 0],
            past_actions=None if past is None else self._to_blocks(past),
            **self.rollout_options,
        )

    @torch.inference_mode()
    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, T, H, W, 3] or pixel values [B, T, 3, H, W] -> slots [B, T, N, D]."""
        if not images.is_floating_point():
            frames = list(images.flatten(0, 1).cpu().numpy().astype(np.uint8))
            pixels = torch.as_tensor(self.image_processor(frames, return_tensors="pt")["pixel_values"])
            images = pixels.unflatten(0, images.shape[:2])
        return self.model.encode(images.to(device=self.model.device, dtype=self.model.dtype))

    def _to_blocks(self, actions: torch.Tensor) -> torch.Tensor:
        """Blocks [..., A] of raw actions normalised one by one -> blocks in the model's units."""
        actions = actions.to(device=self.model.device, dtype=torch.float32)
        raw = self.process()["action"].inverse_transform(actions.unflatten(-1, (self.frame_skip, -1)))
        return self.model.normalize_actions(raw.flatten(-2))


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)


__all__ = ["StableWorldModelCost", "Standardizer"]
