"""Configuration of the stochastic SAVi slot encoder."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..cjepa.configuration_cjepa import check_keys


@strict
class SaviConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SaviModel`]. The defaults are the CLEVRER encoder of SlotFormer, which C-JEPA's SAVi slots
    come from.

    Args:
        num_slots (`int`, defaults to 7): Slots N; one of them usually takes the background.
        slot_size (`int`, defaults to 128): Size D of a slot.
        image_size (`int`, defaults to 64): Height and width of the frames in pixels: decoder_grid_size doubled once
            per decoder layer at most.
        encoder_channels (defaults to (64, 64, 64, 64)): Channels of the encoder's convolutions.
        encoder_kernel_size (`int`, defaults to 5): Odd.
        encoder_stride (`int`, defaults to 1): Of the first convolution; 2 is what SlotFormer takes for 128 px frames.
            There are (image_size / encoder_stride) ^ 2 tokens.
        num_iterations (`int`, defaults to 2): Rounds of slot attention at every frame.
        slot_mlp_size (`int`, defaults to 256): Hidden width of the MLP after the recurrent cell.
        attention_eps (`float`, defaults to 1e-6): Added to every attention weight before they are normalized.
        kernel_mlp (`bool`, defaults to `False`): The kernel distribution comes from an MLP instead of one linear layer.
        kernel_prior_variance (`float`, *optional*, defaults to 0.01): Variance that the kernels' distribution is drawn
            to in training; None: kernels are not random at all, and there is no kernel loss.
        sample_in_eval (`bool`, defaults to `True`): Also draw the kernels at random outside of training, as the
            original does; False: take their means, so that slots depend on the frames alone.
        predictor_type (`str`, defaults to `"mlp"`): What leads from one frame's slots to the next: "mlp" (every slot
            alone) or "transformer".
        predictor_norm_first (`bool`, defaults to `True`): Norms before the layers instead of after them. The "mlp"
            then adds its result to the normalized slots, without it to the slots.
        predictor_rnn (`bool`, defaults to `False`): An LSTM per slot after the predictor.
        predictor_num_layers, predictor_num_heads, predictor_ffn_size (`int`, defaults to 2, 4, 512),
            predictor_dropout (`float`, defaults to 0.1): Of the "transformer".
        decoder_channels (defaults to (64, 64, 64, 64)), decoder_kernel_size (`int`, defaults to 5),
            decoder_grid_size (`int`, defaults to 8): A slot is spread over the grid, which transposed convolutions
            double until it has image_size.
        reconstruction_loss_weight, kernel_loss_weight (`float`, defaults to 1.0, 1e-4): Weights of the losses.

    Unknown keys are a ValueError that names the nearest field.
    """

    model_type = "savi"

    num_slots: int = 7
    slot_size: int = 128
    image_size: int = 64
    encoder_channels: tuple[int, ...] | list[int] = (64, 64, 64, 64)
    encoder_kernel_size: int = 5
    encoder_stride: int = 1
    num_iterations: int = 2
    slot_mlp_size: int = 256
    attention_eps: float = 1e-6
    kernel_mlp: bool = False
    kernel_prior_variance: float | int | None = 0.01
    sample_in_eval: bool = True
    predictor_type: str = "mlp"
    predictor_norm_first: bool = True
    predictor_rnn: bool = False
    predictor_num_layers: int = 2
    predictor_num_heads: int = 4
    predictor_ffn_size: int = 512
    predictor_dropout: float | int = 0.1
    decoder_channels: tuple[int, ...] | list[int] = (64, 64, 64, 64)
    decoder_kernel_size: int = 5
    decoder_grid_size: int = 8
    reconstruction_loss_weight: float | int = 1.0
    kernel_loss_weight: float | int = 1e-4

    def __post_init__(self, **kwargs):
        check_keys(self, kwargs)
        super().__post_init__(**kwargs)
        self._check_fields()

    @property
    def mask_size(self) -> int:
        """Height and width of the attention masks."""
        return self.image_size // self.encoder_stride

    @property
    def decoder_strides(self) -> tuple[int, ...]:
        """Of the transposed convolutions: 2 until the grid has image_size, then 1."""
        strides, size = [], self.decoder_grid_size
        for _ in self.decoder_channels:
            strides.append(2 if size < self.image_size else 1)
            size *= strides[-1]
        return tuple(strides)

    def _check_fields(self):
        # not a validator of @strict, whose errors are no ValueError
        positive = ("num_slots", "slot_size", "image_size", "encoder_stride", "num_iterations", "slot_mlp_size")
        positive += ("predictor_num_layers", "predictor_num_heads", "predictor_ffn_size", "decoder_grid_size")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("encoder_channels", "decoder_channels"):
            value = getattr(self, name)
            if not value or min(value) < 1:
                raise ValueError(f"{name}={value} must be at least one positive number of channels.")
        for name in ("encoder_kernel_size", "decoder_kernel_size"):
            value = getattr(self, name)
            if value < 1 or value % 2 == 0:
                raise ValueError(f"{name}={value} must be odd and positive.")
        if self.image_size % self.encoder_stride:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of encoder_stride={self.encoder_stride}."
            )
        size = self.decoder_grid_size
        for stride in self.decoder_strides:
            size *= stride
        if size != self.image_size:
            raise ValueError(
                f"image_size={self.image_size} cannot be drawn: decoder_grid_size={self.decoder_grid_size} doubled by "
                f"{len(self.decoder_channels)} decoder_channels at most gives {size}. Choose a power of two times the "
                "grid, or more channels."
            )
        if self.predictor_type not in ("mlp", "transformer"):
            raise ValueError(f"predictor_type={self.predictor_type!r} must be 'mlp' or 'transformer'.")
        if self.predictor_type == "transformer" and self.slot_size % self.predictor_num_heads:
            raise ValueError(
                f"slot_size={self.slot_size} is not a multiple of predictor_num_heads={self.predictor_num_heads}."
            )
        if self.attention_eps <= 0:
            raise ValueError(f"attention_eps={self.attention_eps} must be positive.")
        if self.kernel_prior_variance is not None and not self.kernel_prior_variance > 0:
            raise ValueError(
                f"kernel_prior_variance={self.kernel_prior_variance} must be positive; None for kernels without noise."
            )
        if not 0 <= self.predictor_dropout < 1:
            raise ValueError(f"predictor_dropout={self.predictor_dropout} must be in [0, 1).")
        for name in ("reconstruction_loss_weight", "kernel_loss_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")


__all__ = ["SaviConfig"]
