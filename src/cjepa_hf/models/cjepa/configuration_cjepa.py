"""Configuration of the C-JEPA masked slot predictor."""

import difflib
from dataclasses import fields
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

# Keys that transformers itself writes or passes beside the declared fields.
_TRANSFORMERS_KEYS = {
    "model_type",
    "name_or_path",
    "_name_or_path",
    "_commit_hash",
    "attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "experts_implementation",
    "output_attentions",
    "torch_dtype",
    "num_labels",
    "auto_map",
    "custom_pipelines",
    "per_layer_config",
    "tie_last_hidden_states",
}


def check_keys(config: PreTrainedConfig, given: dict) -> None:
    """ValueError for the config of another model, and for keys that are no field; it names the nearest one."""
    if given.get("model_type", config.model_type) != config.model_type:
        raise ValueError(f"This is the config of a {given['model_type']!r} model; expected {config.model_type!r}.")
    known = {field.name for field in fields(config)}
    for key in given:
        if key not in _TRANSFORMERS_KEYS:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else f" Fields: {', '.join(sorted(known))}."
            raise ValueError(f"Unknown {type(config).__name__} field {key!r}.{hint}")


@strict
class CJepaConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CJepaModel`]. The defaults are the paper's Push-T model (arXiv 2602.11389, 1 of 4 slots masked)
    with the behaviour of the released code; fields below "ours" are improvements, all off by default.

    Args:
        num_slots (`int`, defaults to 4): Slots the model is trained with. Inference takes any number (slots are a set).
        slot_size (`int`, defaults to 128): Size D of a slot.
        history_length (`int`, defaults to 3): Observed frames T_h the predictor sees at most.
        prediction_length (`int`, defaults to 1): Frames T_p predicted in one pass.
        frame_skip (`int`, defaults to 5): Environment steps (or video frames) between two frames of a window.
        action_size (`int`, defaults to 0): Size A of one normalised action block (frame_skip actions). 0: no actions.
        proprio_size (`int`, defaults to 0): Size P of the normalised proprioception. 0: none.
        auxiliary_fusion (`"tokens"` or `"concat"`, defaults to `"tokens"`): Actions and proprioception as extra tokens
            (the paper's choice, order: slots, proprioception, action) or concatenated to every slot.
        action_embedding_size, proprio_embedding_size (`int`, *optional*): `None` means slot_size with "tokens" (nothing
            else is possible there) and 10 with "concat".
        num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, hidden_dropout, attention_dropout,
        layer_norm_eps: The transformer.
        mask_strategy (`"object"`, `"token"` or `"tube"`, defaults to `"object"`): What is hidden in training. *object*
            hides |M| slots in all frames after the visible prefix; *token* hides round(|M| (T - prefix)) tokens drawn
            anywhere in those frames; *tube* hides as many tokens as |M| tubes, each a set of slots held over a
            contiguous span of frames of uniformly drawn length. The paper names tokens and tubes without defining
            them; these definitions are ours.
        num_masked_slots (`int` or inclusive pair `[low, high]`, defaults to 1): |M|, drawn per sample from the pair.
        mask_probability (`float`, defaults to 1.0): Share of the samples that are masked at all.
        visible_prefix (`int`, defaults to 1): First frames that are never hidden (the paper's identity anchor is 1).
        mask_static_slots (`bool`, defaults to `True`): `False` masks only slots that change inside the window.
        static_slot_tolerance (`float`, defaults to 1e-3): A slot is static when the root mean square of its change from
            the first frame stays below this in every frame (slot units).
        history_loss_weight (`float`, defaults to 1.0): Weight of the masked-history loss.
        anchor_in_history_loss (`bool`, defaults to `True`): The released code also averages the visible anchor frame of
            masked slots into the history loss; `False` keeps hidden tokens only.
        loss_type (`"mse"` or `"huber"`, defaults to `"mse"`): "huber" is a pseudo-Huber loss on the root mean square
            error of a token with scale `huber_delta`, robust to slots that jump.
        norm_first (`bool`, defaults to `False`): Ours. LayerNorm before attention (the released code has none there).
        residual_prediction (`"last"`, `"velocity"` or `None`): Ours. Predict the change from the last visible state, or
            from the state continued at constant velocity.
        velocity_limit (`float`, *optional*): Ours, with residual_prediction="velocity". A change between two frames whose
            root mean square is larger (slot units) is a jump, an object that enters or leaves, and tells no velocity.
        velocity_map (`bool`, defaults to `False`): Ours, with residual_prediction="velocity". A learned linear map of the
            velocity, at first the identity, for slots in which not everything that changes goes on changing: noise and
            looks of an encoder's slots have no velocity, positions have.
        anchor (`"first"` or `"last_visible"`, defaults to `"first"`): Ours with "last_visible". Which visible frame of a
            slot identifies its hidden tokens.
        planning_window (`int`, *optional*): Ours. Frames the predictor sees at most when a plan is imagined,
            history_length by default. A model trained with histories of every length, in a scene that one frame and
            proprioception describe, plans as well from 1 at less than half of the cost.
        slot_encoder_config (`dict` or `PreTrainedConfig`, *optional*): Configuration of the slot encoder that the
            checkpoint carries, if it does.
    """

    model_type = "cjepa"

    num_slots: int = 4
    slot_size: int = 128
    history_length: int = 3
    prediction_length: int = 1
    frame_skip: int = 5
    action_size: int = 0
    proprio_size: int = 0
    auxiliary_fusion: Literal["tokens", "concat"] = "tokens"
    action_embedding_size: int | None = None
    proprio_embedding_size: int | None = None

    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5

    mask_strategy: Literal["object", "token", "tube"] = "object"
    num_masked_slots: int | list[int] | tuple[int, int] = 1
    mask_probability: float | int = 1.0
    visible_prefix: int = 1
    mask_static_slots: bool = True
    static_slot_tolerance: float | int = 1e-3

    history_loss_weight: float | int = 1.0
    anchor_in_history_loss: bool = True
    loss_type: Literal["mse", "huber"] = "mse"
    huber_delta: float | int = 0.05

    norm_first: bool = False
    residual_prediction: Literal["last", "velocity"] | None = None
    velocity_limit: float | int | None = None
    velocity_map: bool = False
    anchor: Literal["first", "last_visible"] = "first"
    planning_window: int | None = None

    slot_encoder_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        if "hidden_size" in kwargs:
            raise ValueError("hidden_size is derived (slot_size, plus the embeddings with 'concat'): set slot_size.")
        check_keys(self, kwargs)
        if self.action_embedding_size is None:
            self.action_embedding_size = self.slot_size if self.auxiliary_fusion == "tokens" else 10
        if self.proprio_embedding_size is None:
            self.proprio_embedding_size = self.slot_size if self.auxiliary_fusion == "tokens" else 10
        if isinstance(self.slot_encoder_config, dict):
            encoder = dict(self.slot_encoder_config)
            if "model_type" not in encoder:
                raise ValueError(
                    "slot_encoder_config has no model_type: pass the encoder's own config or its to_dict()."
                )
            self.slot_encoder_config = AutoConfig.for_model(encoder.pop("model_type"), **encoder)
        super().__post_init__(**kwargs)
        self._check_fields()

    def to_dict(self):
        """As transformers', without the place the slot encoder was loaded from: it means nothing elsewhere."""
        values = super().to_dict()
        if isinstance(values.get("slot_encoder_config"), dict):
            values["slot_encoder_config"].pop("_name_or_path", None)
        return values

    @property
    def hidden_size(self) -> int:
        """Width of the predictor: slot_size, or with "concat" slot_size plus the embeddings that are in use."""
        if self.auxiliary_fusion == "tokens":
            return self.slot_size
        size = self.slot_size
        size += self.proprio_embedding_size if self.proprio_size else 0
        size += self.action_embedding_size if self.action_size else 0
        return size

    @property
    def num_auxiliary_tokens(self) -> int:
        """Tokens per frame beside the slots: 0 to 2 with "tokens", none with "concat"."""
        if self.auxiliary_fusion == "concat":
            return 0
        return int(self.proprio_size > 0) + int(self.action_size > 0)

    @property
    def masked_slots_range(self) -> tuple[int, int]:
        """Inclusive range that |M| is drawn from."""
        if isinstance(self.num_masked_slots, int):
            return self.num_masked_slots, self.num_masked_slots
        low, high = self.num_masked_slots
        return low, high

    def _check_fields(self):
        """Cross-field checks. Called here rather than by `@strict`, whose wrapper would hide the ValueError."""
        for name in ("num_slots", "slot_size", "history_length", "prediction_length", "frame_skip", "visible_prefix"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("action_size", "proprio_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 (none) or positive.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"The predictor's width {self.hidden_size} is not a multiple of num_attention_heads="
                f"{self.num_attention_heads}: change slot_size, the embedding sizes or the number of heads."
            )
        if self.auxiliary_fusion == "tokens":
            for name in ("action_embedding_size", "proprio_embedding_size"):
                if getattr(self, name) != self.slot_size:
                    raise ValueError(
                        f"{name}={getattr(self, name)} must equal slot_size={self.slot_size} with "
                        "auxiliary_fusion='tokens': leave it out, or use auxiliary_fusion='concat'."
                    )
        if not isinstance(self.num_masked_slots, int) and len(self.num_masked_slots) != 2:
            raise ValueError(f"num_masked_slots={self.num_masked_slots} must be an int or a pair [low, high].")
        low, high = self.masked_slots_range
        if not 0 <= low <= high <= self.num_slots:
            raise ValueError(
                f"num_masked_slots={self.num_masked_slots} must satisfy 0 <= low <= high <= num_slots={self.num_slots}."
            )
        if high and self.visible_prefix >= self.history_length > 1:
            raise ValueError(
                f"visible_prefix={self.visible_prefix} leaves nothing to hide in history_length={self.history_length} "
                "frames: lower it, or set num_masked_slots=0."
            )
        if not 0.0 <= self.mask_probability <= 1.0:
            raise ValueError(f"mask_probability={self.mask_probability} must lie in [0, 1].")
        if self.planning_window is not None and not 1 <= self.planning_window <= self.history_length:
            raise ValueError(
                f"planning_window={self.planning_window} must lie in 1..history_length={self.history_length}, or be None."
            )
        if self.velocity_limit is not None and self.velocity_limit <= 0:
            raise ValueError(f"velocity_limit={self.velocity_limit} must be positive, or None for no limit.")
        if self.velocity_map and self.residual_prediction != "velocity":
            raise ValueError(
                f'velocity_map needs residual_prediction="velocity", got {self.residual_prediction!r}: without it no velocity '
                "is added."
            )
        if self.huber_delta <= 0:
            raise ValueError(f"huber_delta={self.huber_delta} must be positive.")


__all__ = ["CJepaConfig"]
