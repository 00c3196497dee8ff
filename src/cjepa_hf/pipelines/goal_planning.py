"""`pipeline("goal-planning")`: from an image of the scene and an image of the goal to actions."""

import dataclasses
import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from cjepa_hf.models.cjepa import SlotWorldModel
from cjepa_hf.models.color_isa import ColorIsaModel
from cjepa_hf.planning import (
    CEMGDPlanner,
    CEMPlanner,
    ICEMPlanner,
    MPPIPlanner,
    SlotGoalCost,
    default_planner,
    default_policy,
)
from cjepa_hf.planning.mpc import RETRY_ABOVE, needs_matching

_PLANNERS = {"cem": CEMPlanner, "cem-gd": CEMGDPlanner, "icem": ICEMPlanner, "mppi": MPPIPlanner}
_FORWARD_PARAMETERS = (
    "horizon",
    "planner",
    "num_samples",
    "num_iterations",
    "num_elites",
    "seed",
    "match_slots",
    "proprio_weight",
    "action_bounds",
)


class GoalPlanningPipeline(Pipeline):
    """
    Plans actions that lead from one scene to another with a [`CJepaModel`] or [`DinoWmModel`] (open loop; [`MPCPolicy`]
    closes it).

    ```python
    planner = pipeline("goal-planning", model=folder)
    plan = planner({"start": "start.png", "goal": "goal.png", "proprio": [x, y, vx, vy]})
    plan["actions"]      # [horizon * frame_skip, a] in environment units
    ```

    Input: a dictionary, or a list of them (planned one after another; each plan depends on its own input alone):
        start, goal: images (PIL, a path, or RGB [H, W, 3] as uint8 or as float in [0, 1]) or slots [N, D].
        proprio: [P], optional, current proprioception in environment units. A model that takes it and gets none uses
            the mean of its training data, with a warning.
        goal_proprio: [P], optional; without it the proprioception term is left out of the cost.

    Options, at construction or at the call:
        horizon (5): blocks of frame_skip actions to plan.
        planner: "cem" (the paper's), "cem-gd", "icem", "mppi", or a planner object; without, as in [`default_policy`].
        num_samples, num_iterations, num_elites: change these of the planner.
        seed (0): equal seeds give equal plans.
        match_slots: compare slots by optimal assignment or by their place in the set; by default assignment, unless the
            model's slot encoder keeps roles. proprio_weight (1.0): of [`SlotGoalCost`].
        action_bounds ((-1.0, 1.0)): limits of raw actions, or None.

    Output: a dictionary
        actions: float32 [horizon * frame_skip, a], environment units.
        slots: float32 [horizon, N, D], the imagined frame after each block.
        cost: float, the cost of this plan.
        proprio: float32 [P], the proprioception that was used in environment units, or None.

    Errors are ValueErrors: a model without action statistics, images without a slot encoder, wrong shapes, and (with a
    [`ColorIsaModel`] inside) images whose channels are in the order BGR.
    """

    _load_tokenizer = False
    _load_image_processor = None
    _load_video_processor = False
    _load_feature_extractor = False
    _load_processor = False

    def __init__(self, model: SlotWorldModel, *args, **kwargs):
        if not isinstance(model, SlotWorldModel):
            raise ValueError(f"goal-planning needs a CJepaModel or DinoWmModel, got {type(model).__name__}")
        super().__init__(model, *args, **kwargs)
        if self.image_processor is None and model.slot_encoder is not None:
            self.image_processor = _default_image_processor(model.slot_encoder.config)

    def __call__(self, inputs: dict[str, Any] | list[dict[str, Any]], **kwargs) -> dict[str, Any] | list[dict]:
        """See the class."""
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the model and its image processor. (The inherited method would copy code that then asks for trust.)"""
        self.model.save_pretrained(save_directory, **kwargs)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(save_directory)

    def _sanitize_parameters(self, **parameters):
        unknown = set(parameters) - set(_FORWARD_PARAMETERS)
        if unknown:
            raise ValueError(f"unknown option(s) {sorted(unknown)}; goal-planning takes {sorted(_FORWARD_PARAMETERS)}")
        return {}, parameters, {}

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        known = {"start", "goal", "proprio", "goal_proprio"}
        if not isinstance(inputs, dict) or not {"start", "goal"} <= set(inputs) <= known:
            given = sorted(inputs) if isinstance(inputs, dict) else type(inputs).__name__
            raise ValueError(
                f'expected a dictionary with "start", "goal" and perhaps "proprio", "goal_proprio"; got {given}'
            )
        observation, goal = self._scene(inputs["start"], "start"), self._scene(inputs["goal"], "goal")
        for scene, name in ((observation, "proprio"), (goal, "goal_proprio")):
            if inputs.get(name) is None:
                continue
            size = self.model.config.proprio_size
            if size == 0:
                raise ValueError(f"{name} was given, but this model takes no proprioception: leave it out")
            value = torch.as_tensor(np.asarray(inputs[name], dtype=np.float32))
            if value.shape != (size,) or not value.isfinite().all():
                raise ValueError(f"{name} must be {size} finite numbers in environment units, got {inputs[name]!r}")
            scene["proprio"] = value.unsqueeze(0)
        return {"observation": observation, "goal": goal}

    def _scene(self, scene: Any, name: str) -> dict[str, torch.Tensor]:
        if isinstance(scene, str | os.PathLike):
            scene = _read_image(scene)
        if not isinstance(scene, Image.Image):
            array = scene.detach().cpu() if torch.is_tensor(scene) else np.asarray(scene)
            if array.ndim not in (2, 3) or (isinstance(array, np.ndarray) and array.dtype.kind not in "biuf"):
                raise ValueError(
                    f"{name} is {type(scene).__name__} of shape {list(array.shape)}: give one image (PIL, a path, RGB "
                    "[H, W, 3]) or slots [N, D]"
                )
            if isinstance(array, np.ndarray):  # copied: torch takes no negative strides (bgr[..., ::-1])
                array = torch.from_numpy(array.copy())
            if array.ndim == 2:
                size = self.model.config.slot_size
                if array.shape[1] != size or not array.is_floating_point():
                    raise ValueError(
                        f"{name} has two axes, so it should be float slots [N, D={size}], got {array.dtype} "
                        f"{list(array.shape)}; images are RGB [H, W, 3]"
                    )
                return {"slots": array.float().unsqueeze(0)}
            scene = array.numpy()
        if self.model.slot_encoder is None:
            raise ValueError(
                f"{name} is an image, and this model holds no slot encoder: encode it yourself and give slots [N, D]"
            )
        if self.image_processor is None:
            raise ValueError(
                "no image processor was found beside the model: pass image_processor=... to pipeline(), or save one "
                "into the model's folder with image_processor.save_pretrained(folder)"
            )
        pixel_values = self.image_processor([scene], return_tensors="pt")["pixel_values"]
        self._check_channel_order(pixel_values, name)
        return {"pixel_values": pixel_values}

    def _check_channel_order(self, pixel_values: torch.Tensor, name: str) -> None:
        """An encoder of colors draws again what it sees: BGR images far worse than the same ones turned to RGB."""
        encoder = self.model.slot_encoder
        if not isinstance(encoder, ColorIsaModel):
            return
        both = torch.cat([pixel_values, pixel_values.flip(-3)]).to(device=encoder.device, dtype=encoder.dtype)
        with torch.inference_mode():
            drawn = encoder.decode(encoder(both).slots).reconstruction
        given, turned = (drawn - both).float().square().mean(dim=(1, 2, 3)).sqrt().tolist()
        if turned < given / 2:
            raise ValueError(
                f"{name} seems to be BGR: the slot encoder draws it again with an error of {given:.3f}, and of {turned:.3f} "
                "with red and blue swapped. Give RGB images (image[..., ::-1])"
            )

    def _forward(
        self,
        inputs: dict[str, Any],
        *,
        horizon: int = 5,
        planner: str | CEMPlanner | None = None,
        num_samples: int | None = None,
        num_iterations: int | None = None,
        num_elites: int | None = None,
        seed: int = 0,
        match_slots: bool | None = None,
        proprio_weight: float = 1.0,
        action_bounds: tuple[float, float] | None = (-1.0, 1.0),
    ) -> dict[str, Any]:
        retry = {"retry_above": RETRY_ABOVE} if planner is None else {}
        if isinstance(planner, str):
            if planner not in _PLANNERS:
                raise ValueError(f"planner must be one of {sorted(_PLANNERS)} or a planner object, got {planner!r}")
            planner = _PLANNERS[planner]()
        changes = {"num_samples": num_samples, "num_iterations": num_iterations, "num_elites": num_elites}
        changes = {key: value for key, value in changes.items() if value is not None}
        if changes:
            planner = dataclasses.replace(planner or default_planner(self.model.config.frame_skip), **changes)
        if match_slots is None:
            match_slots = needs_matching(self.model)
        policy = default_policy(
            self.model,
            seed=seed,
            planner=planner,
            cost=SlotGoalCost(match_slots=match_slots, proprio_weight=proprio_weight),
            match_slots=match_slots,
            **retry,
            schedule="receding",
            horizon=horizon,
            receding_horizon=horizon,
            action_bounds=action_bounds,
        )
        policy.reset(inputs["goal"])
        policy.act(inputs["observation"])
        proprio = None
        if self.model.config.proprio_size:
            proprio = inputs["observation"].get("proprio")
            proprio = self.model.proprio_mean if proprio is None else proprio[0]
        return {
            "actions": torch.from_numpy(policy.last_plan.environment_actions[0]),
            "slots": policy.imagine()[0],
            "cost": policy.last_plan.cost[0],
            "proprio": proprio,
        }

    def postprocess(self, outputs: dict[str, Any]) -> dict[str, Any]:
        proprio = outputs["proprio"]
        return {
            "actions": outputs["actions"].numpy(),
            "slots": outputs["slots"].float().numpy(),
            "cost": float(outputs["cost"]),
            "proprio": None if proprio is None else proprio.float().numpy(),
        }


def _read_image(path: str | os.PathLike) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): give a PNG or JPEG file") from error
    if image.mode not in ("RGB", "RGBA", "P"):
        raise ValueError(f"{path} is an image of mode {image.mode!r}: give one in color (RGB)")
    return image.convert("RGB")


def _default_image_processor(encoder_config):
    """The image processor registered for this kind of slot encoder, at the size the encoder takes."""
    classes = IMAGE_PROCESSOR_MAPPING.get(type(encoder_config), None) or {}
    image_processor_class = next((value for value in classes.values() if value is not None), None)
    size = getattr(encoder_config, "image_size", None)
    if image_processor_class is None:
        return None
    return image_processor_class() if size is None else image_processor_class(size=size)
