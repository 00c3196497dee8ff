"""Configuration of the slot encoder that follows objects."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..cjepa.configuration_cjepa import check_keys


@strict
class CropSlotsConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CropSlotsModel`]. The defaults are the encoder of our collision world.

    There is no slot for the background, which is constant. Lengths are in units of the view, whose origin is in the middle
    of the picture, x to the right and y down.

    Args:
        num_slots (`int`, defaults to 6): Slots N, the most objects that can be seen at once.
        slot_size (`int`, defaults to 64): Size D of a slot: position (2), whether it is empty (1), appearance and pose,
            turned by a fixed rotation.
        image_size (`int`, defaults to 64): Height and width of the input, in pixels.
        view_size (pair of `float`, defaults to `(6.0, 4.0)`): Width and height of what the picture shows.
        object_radius (`float`, defaults to 0.28): About the radius of the objects, which are of similar size.
        foreground_threshold (`float`, defaults to 0.08): Pixels that differ from the background by this much (in [0, 1],
            the largest over the channels) count as objects, those that differ less in part.
        gate (`float`, defaults to 1.5): An object has no pixels further than this from its center, in radii.
        birth_share, death_share (`float`, defaults to 0.3 and 0.1): Share of an object's area that makes an object where
            there was none, and below which one is given up.
        memory (`float`, defaults to 25.0): Frames that the appearance of an object is averaged over.
        crop_size (`int`, defaults to 16): Height and width of the crops in pixels.
        channels (pair of `int`, defaults to `(16, 32)`): Of the two convolutions.
        hidden_size (`int`, defaults to 64): Width of the layer after them, and of the decoder.
        appearance_size (`int`, defaults to 12): Numbers for what an object keeps: color, shape, material.
        pose_size (`int`, defaults to 4): Numbers for what changes besides its position: how it is turned.
        max_offset (`float`, defaults to 0.4): Bound of the learned offset between the centroid of an object's pixels and
            its position.
        num_waves (`int`, defaults to 8): Plane waves that describe the decoder's positions.
        wavelengths (pair of `float`, defaults to `(0.25, 2.0)`): Shortest and longest of them.
        content_noise (`float`, defaults to 0.1): Standard deviation of the noise added to appearance and pose before
            decoding in training; with content_loss_weight it leaves in them only what drawing needs.
        content_loss_weight (`float`, defaults to 1e-5): Weight of the squared appearance and pose.
        appearance_variance, pose_variance (`float`, defaults to 1.0 and 0.03): Variances that appearance and pose are
            scaled to in the slots after training. Positions are not scaled: distances of slots are distances in the view.

    Unknown keys are a ValueError that names the nearest field.
    """

    model_type = "crop-slots"

    num_slots: int = 6
    slot_size: int = 64
    image_size: int = 64
    view_size: tuple[float | int, ...] | list[float | int] = (6.0, 4.0)
    object_radius: float | int = 0.28
    foreground_threshold: float | int = 0.08
    gate: float | int = 1.5
    birth_share: float | int = 0.3
    death_share: float | int = 0.1
    memory: float | int = 25.0
    crop_size: int = 16
    channels: tuple[int, ...] | list[int] = (16, 32)
    hidden_size: int = 64
    appearance_size: int = 12
    pose_size: int = 4
    max_offset: float | int = 0.4
    num_waves: int = 8
    wavelengths: tuple[float | int, ...] | list[float | int] = (0.25, 2.0)
    content_noise: float | int = 0.1
    content_loss_weight: float | int = 1e-5
    appearance_variance: float | int = 1.0
    pose_variance: float | int = 0.03

    def __post_init__(self, **kwargs):
        check_keys(self, kwargs)
        super().__post_init__(**kwargs)
        self._check_fields()

    @property
    def object_area(self) -> float:
        """Of a disc of object_radius, in pixels."""
        width, height = self.view_size
        return math.pi * self.object_radius**2 * self.image_size**2 / (width * height)

    def _check_fields(self):
        # not a validator of @strict, whose errors are no ValueError
        for name in ("num_slots", "image_size", "hidden_size", "appearance_size", "pose_size", "num_waves"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        used = 3 + self.appearance_size + self.pose_size
        if self.slot_size < used:
            raise ValueError(
                f"slot_size={self.slot_size} must be at least {used}: position (2), empty or not (1), appearance_size="
                f"{self.appearance_size} and pose_size={self.pose_size}."
            )
        for name in ("view_size", "channels", "wavelengths"):
            value = getattr(self, name)
            if len(value) != 2 or not min(value) > 0:
                raise ValueError(f"{name}={value} must be two positive numbers.")
        positive = ("object_radius", "foreground_threshold", "gate", "memory", "max_offset")
        for name in (*positive, "appearance_variance", "pose_variance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        for name in ("content_noise", "content_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if not 0 < self.death_share < self.birth_share < 1:
            raise ValueError(
                f"death_share={self.death_share} and birth_share={self.birth_share} must be shares of an object's area, "
                "the first one smaller."
            )
        if self.crop_size < 4 or self.crop_size % 4 or self.crop_size > self.image_size:
            raise ValueError(
                f"crop_size={self.crop_size} must be a multiple of 4, at most image_size={self.image_size}."
            )
        needed = math.ceil(2 * self.gate * self.object_radius * self.image_size / min(self.view_size)) + 1
        if self.crop_size < needed:
            raise ValueError(
                f"crop_size={self.crop_size} does not hold an object of radius {self.object_radius} in a view of "
                f"{self.view_size} with gate={self.gate}; expected at least {needed} pixels."
            )


__all__ = ["CropSlotsConfig"]
