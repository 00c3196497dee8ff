"""Configuration of the VideoSAUR slot encoder."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import Dinov2Config, PreTrainedConfig

from ..cjepa.configuration_cjepa import check_keys

# DINOv2 ViT-S/14, as facebook/dinov2-small
_DINOV2_SMALL = dict(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)


@strict
class VideoSaurConfig(PreTrainedConfig):
    r"""
    Configuration of a [`VideoSaurModel`]. The defaults are the Push-T encoder of C-JEPA (arXiv 2602.11389), a VideoSAUR
    (Zadaianchuk et al. 2023, arXiv 2306.04829) over DINOv2 ViT-S/14. Its CLEVRER encoder differs in `num_slots=7,
    similarity_temperature=0.15, similarity_loss_weight=0.3`.

    Args:
        num_slots (`int`, defaults to 4): Slots N. With random initial slots no weight depends on it.
        slot_size (`int`, defaults to 128): Size D of a slot.
        image_size (`int`, defaults to 196): Height and width of the input in pixels, a multiple of the backbone's patch.
        backbone_config (`dict` or `Dinov2Config`, *optional*): The DINOv2 backbone; `None`: ViT-S/14.
        backbone_features (`"after_norm"` or `"before_norm"`, defaults to `"after_norm"`): Whether slots read, and the
            decoder reconstructs, the patch tokens after the backbone's final LayerNorm, as C-JEPA's encoders do, or
            before it, as the first release of VideoSAUR does. Weights fit one of the two only.
        transform_size (`int`, *optional*): Hidden width of the MLP between backbone and slots; `None`: twice the
            backbone's width.
        feature_size (`int`, *optional*): Its output width; `None`: slot_size.
        initial_slots (`"random"` or `"learned"`, defaults to `"random"`): A Gaussian with learned mean and deviation,
            shared by all slots, or N learned slots.
        num_iterations, first_frame_iterations (`int`, defaults to 2, 3): Rounds of slot attention in each frame, and in
            the first frame of a video.
        attention_size (`int`, *optional*): Width of queries, keys and values of the slot attention; `None`: slot_size.
        attention_eps (`float`, defaults to 1e-8): Added to the attention before it is normalized over patches.
        use_gru (`bool`, defaults to `True`): Update slots with a GRU; `False`: add the update.
        use_mlp (`bool`, defaults to `False`): An MLP after every round of slot attention.
        mlp_size (`int`, *optional*): Its hidden width; `None`: 4 slot_size.
        num_predictor_layers (`int`, defaults to 1): Transformer layers that carry slots to the next frame.
        num_attention_heads (`int`, defaults to 4): Heads of the predictor and of the decoder's allocator.
        intermediate_size (`int`, *optional*): Hidden width of their MLPs; `None`: 4 slot_size.
        residual_scale (`float`, *optional*): Start value of learned scales of their residual branches; `None`: none.
        use_decoder (`bool`, defaults to `True`): Whether the model has the decoder, which the losses and `decode` need and
            slots do not. `False`: an encoder of slots alone, as the one inside of a released world model.
        num_allocator_layers (`int`, defaults to 3): Transformer layers in which the decoder's patches look at the slots.
        renderer_size, num_renderer_layers (`int`, defaults to 1024, 3): The decoder's MLP.
        feature_loss_weight (`float`, defaults to 1.0): Weight of the squared error of the reconstructed features.
        similarity_loss_weight (`float`, defaults to 0.25): Weight of the temporal similarity loss.
        similarity_temperature (`float`, defaults to 0.25): Temperature of its target distribution.
        similarity_threshold (`float`, *optional*, defaults to 0.0): Cosines below it count as no similarity at all.
        similarity_time_shift (`int`, defaults to 1): Frames between the two that are compared.
        similarity_mask_diagonal (`bool`, defaults to `False`): Leave out the similarity of a patch to itself.

    Unknown keys are a ValueError that names the nearest field.
    """

    model_type = "videosaur"
    sub_configs_defaults = {"backbone_config": Dinov2Config}

    num_slots: int = 4
    slot_size: int = 128
    image_size: int = 196
    backbone_config: dict | PreTrainedConfig | None = None
    backbone_features: Literal["after_norm", "before_norm"] = "after_norm"
    transform_size: int | None = None
    feature_size: int | None = None

    initial_slots: Literal["random", "learned"] = "random"
    num_iterations: int = 2
    first_frame_iterations: int = 3
    attention_size: int | None = None
    attention_eps: float | int = 1e-8
    use_gru: bool = True
    use_mlp: bool = False
    mlp_size: int | None = None

    num_predictor_layers: int = 1
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    residual_scale: float | int | None = None
    use_decoder: bool = True
    num_allocator_layers: int = 3
    renderer_size: int = 1024
    num_renderer_layers: int = 3

    feature_loss_weight: float | int = 1.0
    similarity_loss_weight: float | int = 0.25
    similarity_temperature: float | int = 0.25
    similarity_threshold: float | int | None = 0.0
    similarity_time_shift: int = 1
    similarity_mask_diagonal: bool = False

    def __post_init__(self, **kwargs):
        check_keys(self, kwargs)
        backbone = self.backbone_config
        kind = (
            backbone.get("model_type", "dinov2") if isinstance(backbone, dict) else getattr(backbone, "model_type", "")
        )
        if backbone is not None and kind != "dinov2":
            raise ValueError(f"backbone_config is of model_type {kind!r}; VideoSAUR reads a 'dinov2' backbone.")
        if backbone is None:
            self.backbone_config = Dinov2Config(**_DINOV2_SMALL)
        elif isinstance(backbone, dict):
            self.backbone_config = Dinov2Config(**{k: v for k, v in backbone.items() if k != "model_type"})
        for name, default in (
            ("transform_size", 2 * self.backbone_config.hidden_size),
            ("feature_size", self.slot_size),
            ("attention_size", self.slot_size),
            ("mlp_size", 4 * self.slot_size),
            ("intermediate_size", 4 * self.slot_size),
        ):
            if getattr(self, name) is None:
                setattr(self, name, default)
        super().__post_init__(**kwargs)
        self._check_fields()

    def to_dict(self):
        """As transformers', without the place the backbone was loaded from: it means nothing elsewhere."""
        values = super().to_dict()
        if isinstance(values.get("backbone_config"), dict):
            values["backbone_config"].pop("_name_or_path", None)
        return values

    @property
    def mask_size(self) -> int:
        """Height and width of the masks: patches along one side of the image."""
        return self.image_size // self.backbone_config.patch_size

    def _check_fields(self):
        # not a validator of @strict, whose errors are no ValueError
        positive = ("num_slots", "slot_size", "image_size", "transform_size", "feature_size", "num_iterations")
        positive += ("first_frame_iterations", "attention_size", "mlp_size", "num_attention_heads", "renderer_size")
        positive += ("intermediate_size", "num_renderer_layers", "similarity_time_shift")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("num_predictor_layers", "num_allocator_layers", "feature_loss_weight", "similarity_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for name in ("attention_eps", "similarity_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.slot_size % self.num_attention_heads:
            raise ValueError(
                f"slot_size={self.slot_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )
        patch = self.backbone_config.patch_size
        if not isinstance(patch, int):
            raise ValueError(f"backbone_config.patch_size={patch} must be one number: patches are squares.")
        if self.image_size % patch:
            below = self.image_size // patch * patch
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of the backbone's patch_size={patch}: patches would not "
                f"cover the image. The nearest sizes are {below or patch} and {below + patch}."
            )


__all__ = ["VideoSaurConfig"]
