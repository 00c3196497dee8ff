"""Configuration of the color-prototype slot encoder."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..cjepa.configuration_cjepa import check_keys


@strict
class ColorIsaConfig(PreTrainedConfig):
    r"""
    Configuration of a [`ColorIsaModel`]. The defaults are the Push-T encoder that ships with the package.

    Slot 0 is the background by construction; slots 1 and up are objects, each bound to one color.

    Args:
        num_slots (`int`, defaults to 4): Slots N, the background included.
        slot_size (`int`, defaults to 64): Size D of a slot: 2 numbers of position, 2 of orientation, the rest
            appearance (orientation and appearance together are called content).
        image_size (`int`, defaults to 64): Height and width of the input, in pixels.
        stem_channels, stem_kernel_size, stem_stride (`int`, defaults to 32, 5, 2): The one convolution.
        hidden_size (`int`, defaults to 64): Width of tokens and of the slots inside the attention.
        mlp_size (`int`, defaults to 128): Hidden width of all small MLPs.
        num_iterations (`int`, defaults to 2): Rounds of slot attention.
        num_position_waves, num_moment_waves, num_decoder_waves (`int`, defaults to 16, 24, 8): Plane waves that describe
            token positions, the attention mask about its centroid, and decoder positions about the slot's position.
        position_wavelengths, moment_wavelengths, decoder_wavelengths: Shortest and longest wave, in units of scene_size.
        num_orientation_waves (`int`, defaults to 8): How many of the moment waves go around the compass.
        orientation_wavelength (`float`, defaults to 110.0): Their wavelength in units of scene_size, about the size of
            the objects; the first guess of an object's orientation comes from them.
        mask_threshold (`float`, defaults to 0.3): Attention well below it hardly counts in what a slot gathers.
        moment_scale (`float`, defaults to 20.0): Weight of the attention mask's covariance among its moments.
        max_offset (`float`, defaults to 0.3): Bound of the learned offset between a slot's position and the centroid
            of its attention, in half image widths. 0 switches it off.
        decoder_grid_size, decoder_hidden_size (`int`, defaults to 16, 64): The decoder works on a grid of patches.
        decoder_radius (`float`, defaults to 0.3): Distance (half image widths) that decoder coordinates are divided by.
        color_residual (`float`, defaults to 0.1): How far a drawn color may be from its slot's prototype.
        content_noise (`float`, defaults to 0.1): Standard deviation of the noise added to the content before decoding
            in training; with content_loss_weight it leaves in the content only what drawing needs.
        color_loss_weight (`float`, defaults to 1.0): Weight of the recoloring loss of the attention.
        content_loss_weight (`float`, defaults to 3e-5): Weight of the squared content.
        foreground_weight, foreground_threshold (`float`, defaults to 5.0, 0.12): Pixels further than the threshold from
            the stored background count 1 + foreground_weight times in the losses.
        position_scale (`float`, defaults to 24.0): Scale of positions (half image widths) in the slots.
        content_variance (`float`, defaults to 41.0): Variance that the most variable object's content is scaled to in
            the slots after training. The default weighs turning the Push-T block like moving its corners as far.
        scene_size (`float`, defaults to 512.0): Width of the image in scene units (pixels of the Push-T table).

    Unknown keys are a ValueError that names the nearest field.
    """

    model_type = "color-isa"

    num_slots: int = 4
    slot_size: int = 64
    image_size: int = 64
    stem_channels: int = 32
    stem_kernel_size: int = 5
    stem_stride: int = 2
    hidden_size: int = 64
    mlp_size: int = 128
    num_iterations: int = 2
    num_position_waves: int = 16
    num_moment_waves: int = 24
    num_decoder_waves: int = 8
    num_orientation_waves: int = 8
    orientation_wavelength: float | int = 110.0
    position_wavelengths: tuple[float | int, ...] | list[float | int] = (105.0, 1024.0)
    moment_wavelengths: tuple[float | int, ...] | list[float | int] = (80.0, 300.0)
    decoder_wavelengths: tuple[float | int, ...] | list[float | int] = (60.0, 300.0)
    mask_threshold: float | int = 0.3
    moment_scale: float | int = 20.0
    max_offset: float | int = 0.3
    decoder_grid_size: int = 16
    decoder_hidden_size: int = 64
    decoder_radius: float | int = 0.3
    color_residual: float | int = 0.1
    content_noise: float | int = 0.1
    color_loss_weight: float | int = 1.0
    content_loss_weight: float | int = 3e-5
    foreground_weight: float | int = 5.0
    foreground_threshold: float | int = 0.12
    position_scale: float | int = 24.0
    content_variance: float | int = 41.0
    scene_size: float | int = 512.0

    def __post_init__(self, **kwargs):
        check_keys(self, kwargs)
        super().__post_init__(**kwargs)
        self._check_fields()

    @property
    def mask_size(self) -> int:
        """Height and width of the attention masks."""
        return self.image_size // self.stem_stride

    @property
    def grid_feature_size(self) -> int:
        """Channels of [`ColorIsaModel.grid_features`]."""
        return self.stem_channels + self.num_slots

    def _check_fields(self):
        # not a validator of @strict, whose errors are no ValueError
        for name in ("stem_channels", "stem_stride", "hidden_size", "mlp_size", "num_iterations", "decoder_grid_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_slots < 2:
            raise ValueError(f"num_slots={self.num_slots} must be at least 2: the background and one object.")
        if self.slot_size < 5:
            raise ValueError(
                f"slot_size={self.slot_size} must be at least 5: position (2), orientation (2), appearance."
            )
        if not 2 <= self.num_orientation_waves < self.num_moment_waves:
            raise ValueError(
                f"num_orientation_waves={self.num_orientation_waves} must be at least 2 and less than num_moment_waves="
                f"{self.num_moment_waves}."
            )
        if self.stem_kernel_size % 2 == 0:
            raise ValueError(f"stem_kernel_size={self.stem_kernel_size} must be odd.")
        for name in ("stem_stride", "decoder_grid_size"):
            if self.image_size % getattr(self, name):
                raise ValueError(f"image_size={self.image_size} is not a multiple of {name}={getattr(self, name)}.")
        for name in ("position_wavelengths", "moment_wavelengths", "decoder_wavelengths"):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1]:
                raise ValueError(f"{name}={value} must be a pair (shortest, longest), both positive.")
        for name in (
            "scene_size",
            "position_scale",
            "content_variance",
            "orientation_wavelength",
            "decoder_radius",
            "mask_threshold",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        for name in ("max_offset", "content_noise", "content_loss_weight", "color_loss_weight", "foreground_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")


__all__ = ["ColorIsaConfig"]
