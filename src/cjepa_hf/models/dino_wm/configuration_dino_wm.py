"""Configuration of the autoregressive world model of DINO-WM and of the frozen encoder that makes its patch tokens."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from ..cjepa.configuration_cjepa import check_keys


def _inner_config(name: str, value: dict | PreTrainedConfig | None) -> PreTrainedConfig | None:
    """The configuration of a model inside, from its dictionary where that is what a file gave."""
    if not isinstance(value, dict):
        return value
    if "model_type" not in value:
        raise ValueError(f"{name} has no model_type: pass that model's own config or its to_dict().")
    return AutoConfig.for_model(**value)


def _without_place(values: dict, name: str) -> dict:
    """`values` without the place that the inner model was loaded from: it means nothing elsewhere."""
    if isinstance(values.get(name), dict):
        values[name].pop("_name_or_path", None)
    return values


@strict
class DinoWmConfig(PreTrainedConfig):
    r"""
    Configuration of a [`DinoWmModel`]: DINO-WM (arXiv 2411.04983) over patch tokens, and, with `token_type="slots"`, the
    same predictor over slots (OC-DINO-WM in the C-JEPA paper). "Slots" below are whatever tokens a frame has: patches are
    slots with a place. Fields that [`CJepaConfig`] has too mean the same.

    Args:
        num_slots (`int`, defaults to 196): Tokens N of a frame. A model of slots takes any number.
        slot_size (`int`, defaults to 384): Size D of a token.
        token_type (`"patches"` or `"slots"`, defaults to `"patches"`): Patches have a learned embedding for every frame
            and place, and scenes are compared place by place. Slots have one for every frame alone: they are a set.
        history_length (`int`, defaults to 3): Frames T_h the predictor sees at most.
        prediction_length (`int`, defaults to 1): 1 is the only value: frames are predicted one after the other.
        frame_skip (`int`, defaults to 5): Environment steps (or video frames) between two frames of a window.
        action_size, proprio_size (`int`, default to 0): Sizes of one normalised block; 0: none.
        action_embedding_size, proprio_embedding_size (`int`, default to 10): Their embeddings, which are concatenated to
            every token of the frame.
        num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, hidden_dropout, attention_dropout,
        layer_norm_eps: The transformer.
        head_dim (`int`, defaults to 64): Width of an attention head; heads need not add up to the hidden size.
        proprio_loss_weight (`float`, defaults to 1.0): Weight of the proprioception loss. DINO-WM averages over tokens
            and embeddings together, which is `proprio_embedding_size / slot_size` here.
        residual_prediction (`"last"` or `None`): Ours. Predict the change from the last frame.
        slot_encoder_config (`dict` or `PreTrainedConfig`, *optional*): Configuration of the encoder that the checkpoint
            carries, if it does: a [`PatchEncoderConfig`], or any slot encoder's.

    Unknown keys are a ValueError that names the nearest field.
    """

    model_type = "dino-wm"

    num_slots: int = 196
    slot_size: int = 384
    token_type: Literal["patches", "slots"] = "patches"
    history_length: int = 3
    prediction_length: int = 1
    frame_skip: int = 5
    action_size: int = 0
    proprio_size: int = 0
    action_embedding_size: int = 10
    proprio_embedding_size: int = 10

    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    head_dim: int = 64
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5

    proprio_loss_weight: float | int = 1.0
    residual_prediction: Literal["last"] | None = None

    slot_encoder_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        if "hidden_size" in kwargs:
            raise ValueError("hidden_size is derived (slot_size plus the embeddings in use): set slot_size.")
        check_keys(self, kwargs)
        self.slot_encoder_config = _inner_config("slot_encoder_config", self.slot_encoder_config)
        super().__post_init__(**kwargs)
        self._check_fields()

    def to_dict(self):
        """As transformers', without the place the encoder was loaded from: it means nothing elsewhere."""
        return _without_place(super().to_dict(), "slot_encoder_config")

    @property
    def auxiliary_fusion(self) -> str:
        """Always "concat", in the words of [`CJepaConfig`]."""
        return "concat"

    @property
    def num_auxiliary_tokens(self) -> int:
        """Always 0: actions and proprioception are parts of the tokens."""
        return 0

    @property
    def hidden_size(self) -> int:
        """Width of the predictor: slot_size plus the embeddings that are in use."""
        size = self.slot_size
        size += self.proprio_embedding_size if self.proprio_size else 0
        size += self.action_embedding_size if self.action_size else 0
        return size

    @property
    def masked_slots_range(self) -> tuple[int, int]:
        """(0, 0): this model hides nothing."""
        return 0, 0

    def _check_fields(self):
        # not a validator of @strict, whose errors are no ValueError
        for name in (
            "num_slots",
            "slot_size",
            "history_length",
            "frame_skip",
            "action_embedding_size",
            "proprio_embedding_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "intermediate_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("action_size", "proprio_size", "proprio_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or positive.")
        if self.prediction_length != 1:
            raise ValueError(
                f"prediction_length={self.prediction_length} must be 1: this model predicts frame after frame; "
                "`rollout` imagines more."
            )


@strict
class PatchEncoderConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PatchEncoderModel`]: any vision backbone of transformers as an encoder whose "slots" are patches.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`): The backbone, such as a `Dinov2Config` or a
            `Dinov2WithRegistersConfig`; or a [`ColorIsaConfig`], whose `grid_features` are read.
        image_size (`int`, *optional*): Height and width of the input in pixels; default: 196 (14 x 14 patches of 14 pixels),
            or the one size that a [`ColorIsaConfig`] backbone takes.
        grid_size (`int`, *optional*): Tokens along one side. Features are averaged over the cells of this grid, which must
            divide the backbone's; `None`: one token for each of the backbone's patches.
        merge (`int`, defaults to 1): Averages over merge x merge parts of each cell are concatenated instead of one
            average, so that a token still tells where in its cell something is.
        image_mean, image_std (three `float`, *optional*): `(RGB in [0, 1] - mean) / std` is what the backbone sees;
            default: ImageNet's, as DINOv2 wants. For a [`ColorIsaConfig`] backbone: nothing is changed.
        feature_size (`int`, *optional*): Channels of the backbone's features, where its config does not tell.

    Unknown keys are a ValueError that names the nearest field.
    """

    model_type = "patch-encoder"

    backbone_config: dict | PreTrainedConfig | None = None
    image_size: int | None = None
    grid_size: int | None = None
    merge: int = 1
    image_mean: list[float | int] | tuple[float | int, ...] | None = None
    image_std: list[float | int] | tuple[float | int, ...] | None = None
    feature_size: int | None = None

    def __post_init__(self, **kwargs):
        check_keys(self, kwargs)
        if self.backbone_config is None:
            # transformers builds a default of every config to compare with when it writes one
            self.backbone_config = AutoConfig.for_model(
                "dinov2", hidden_size=384, num_attention_heads=6, image_size=518
            )
        self.backbone_config = backbone = _inner_config("backbone_config", self.backbone_config)
        gives_grid = hasattr(backbone, "grid_feature_size")
        if self.image_size is None:
            self.image_size = backbone.image_size if gives_grid else 196
        if self.feature_size is None:
            sizes = getattr(backbone, "hidden_sizes", None)
            self.feature_size = backbone.grid_feature_size if gives_grid else getattr(backbone, "hidden_size", None)
            if self.feature_size is None and sizes:
                self.feature_size = sizes[-1]
        if self.image_mean is None:
            self.image_mean = [0.0] * 3 if gives_grid else [0.485, 0.456, 0.406]
        if self.image_std is None:
            self.image_std = [1.0] * 3 if gives_grid else [0.229, 0.224, 0.225]
        if self.grid_size is None:
            self.grid_size = self.backbone_grid_size
        super().__post_init__(**kwargs)
        self._check_fields()

    def to_dict(self):
        """As transformers', without the place the backbone was loaded from: it means nothing elsewhere."""
        return _without_place(super().to_dict(), "backbone_config")

    @property
    def backbone_grid_size(self) -> int | None:
        """Features along one side of the image as the backbone gives them; None where its config does not tell."""
        backbone = self.backbone_config
        if hasattr(backbone, "grid_feature_size"):
            return backbone.mask_size
        patch = getattr(backbone, "patch_size", None)
        return self.image_size // patch if isinstance(patch, int) else None

    @property
    def num_slots(self) -> int:
        """Tokens of a frame."""
        return self.grid_size**2

    @property
    def slot_size(self) -> int:
        """Size of a token."""
        return self.feature_size * self.merge**2

    def _check_fields(self):
        # not a validator of @strict, whose errors are no ValueError
        if self.feature_size is None:
            raise ValueError(
                f"The config of a {self.backbone_config.model_type!r} backbone does not tell the width of its features: "
                "give feature_size."
            )
        if self.grid_size is None:
            raise ValueError(
                f"The config of a {self.backbone_config.model_type!r} backbone does not tell its patches: give grid_size."
            )
        for name in ("image_size", "grid_size", "merge", "feature_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                f"image_mean={self.image_mean} and image_std={self.image_std} must be three numbers, std positive."
            )
        patch = getattr(self.backbone_config, "patch_size", None)
        if isinstance(patch, int) and self.image_size % patch:
            below = self.image_size // patch * patch
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of the backbone's patch_size={patch}. The nearest sizes "
                f"are {below or patch} and {below + patch}."
            )
        size = getattr(self.backbone_config, "image_size", None)
        if hasattr(self.backbone_config, "grid_feature_size") and size != self.image_size:
            raise ValueError(f"image_size={self.image_size}, but this backbone takes {size} pixels only.")
        grid = self.backbone_grid_size
        if grid is not None and grid % (self.grid_size * self.merge):
            raise ValueError(
                f"grid_size={self.grid_size} x merge={self.merge} must divide the backbone's grid of {grid} x {grid}."
            )


__all__ = ["DinoWmConfig", "PatchEncoderConfig"]
