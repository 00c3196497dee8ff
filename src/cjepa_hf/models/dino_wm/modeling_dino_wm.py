"""DINO-WM (Zhou et al. 2024, arXiv 2411.04983): an autoregressive world model over the patches of a frozen backbone.

Every frame is a grid of tokens, to each of which the embedded action and proprioception of the frame are concatenated.
Tokens attend to all tokens of their own and earlier frames, and the output at a token is that token one frame later. The
same predictor over slots is the C-JEPA paper's OC-DINO-WM.

Axes: B batch, S plan samples, T observed frames, N tokens ("slots") of a frame, D token size, H heads, E embedding size.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..cjepa.modeling_cjepa import CJepaMlp, SafePreTrainedModel, SlotWorldModel, eager_attention_forward, fast_dropout
from .configuration_dino_wm import DinoWmConfig, PatchEncoderConfig


@dataclass
class DinoWmOutput(ModelOutput):
    """
    Output of [`DinoWmModel.forward`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `future_slots`): Mean squared error over the T
            predicted frames, plus the weighted proprio_loss.
        history_loss, future_loss (`torch.Tensor` of shape `()`, *optional*): That error over the T - 1 frames inside the
            history (None for T = 1), and of the frame after it.
        proprio_loss (`torch.Tensor` of shape `()`, *optional*): Unweighted, over the T predicted frames.
        predicted_slots (`torch.Tensor` of shape `(B, T, N, D)`): Entry t is frame t + 1, predicted from frames 0 to t.
        predicted_proprio_embeddings (`torch.Tensor` of shape `(B, T, E)`, *optional*): As the first token of each frame
            tells them.
        hidden_states (`tuple(torch.Tensor)`, *optional*): Input of every layer and the output of the last, each
            `(B, T * N, hidden_size)`, time-major.
        attentions (`tuple(torch.Tensor)`, *optional*): Per layer `(B, H, T * N, T * N)`.
    """

    loss: torch.Tensor | None = None
    history_loss: torch.Tensor | None = None
    future_loss: torch.Tensor | None = None
    proprio_loss: torch.Tensor | None = None
    predicted_slots: torch.Tensor | None = None
    predicted_proprio_embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class PatchEncoderOutput(ModelOutput):
    """
    Output of [`PatchEncoderModel`].

    Args:
        slots (`torch.Tensor` of shape `[B, (T,) N, D]`): Patch tokens, row by row.
    """

    slots: torch.Tensor | None = None


# ------------------------------------------------------------------------------------------------------ predictor


def frame_causal_mask(steps: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask [1, 1, T * N, T * N] for T = `steps` frames of N = `width` tokens: 0 up to the own frame, else -inf."""
    frame = torch.arange(steps, device=like.device).repeat_interleave(width)
    later = frame[None, :] > frame[:, None]
    return torch.zeros_like(later, dtype=like.dtype).masked_fill(later, -torch.inf)[None, None]


class DinoWmAttention(nn.Module):
    """Multi-head attention whose heads have a width of their own."""

    def __init__(self, config: DinoWmConfig):
        super().__init__()
        self.config = config
        self.head_dim, self.num_heads = config.head_dim, config.num_attention_heads
        self.inner_size = config.num_attention_heads * config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * self.inner_size, bias=False)
        self.out_proj = nn.Linear(self.inner_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, num_queries: int | None = None):
        """States [B, L, hidden_size] -> the last `num_queries` (all without) attended; `mask` [1, 1, L, L] is for all."""
        inner = self.inner_size
        if num_queries is None:
            num_queries = hidden_states.shape[1]
            parts = self.qkv(hidden_states).chunk(3, dim=-1)
        else:
            # Only the last frame is read, which sees everything.
            query = F.linear(hidden_states[:, -num_queries:], self.qkv.weight[:inner])
            parts = (query, *F.linear(hidden_states, self.qkv.weight[inner:]).chunk(2, dim=-1))
            mask = None
        query, key, value = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in parts)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        # On a CPU PyTorch's attention takes longer in bfloat16, its gradient more than twice as long.
        on_cpu = query.device.type == "cpu"
        query, key, value = (part.float() if on_cpu else part for part in (query, key, value))
        with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
            output, weights = attention(
                self,
                query,
                key,
                value,
                None if mask is None else mask.to(query.dtype),  # under autocast the states are wider
                dropout=self.config.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                is_causal=False,
            )
        output = self.out_proj(output.reshape(len(output), num_queries, inner).to(hidden_states.dtype))
        return fast_dropout(output, self.config.hidden_dropout, self.training), weights


class DinoWmLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DinoWmConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = DinoWmAttention(config)
        self.mlp = CJepaMlp(config)  # has its norm inside

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None, num_queries: int | None = None
    ) -> torch.Tensor:
        attended, _ = self.attention(self.norm(hidden_states), mask, num_queries)
        if num_queries is not None:
            hidden_states = hidden_states[:, -num_queries:]
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(hidden_states)


class DinoWmPredictor(nn.Module):
    """
    The frame-causal transformer. DINO-WM ends with the LayerNorm, which suits DINOv2's normalised features; the linear
    head after it lets tokens of any scale be predicted.
    """

    def __init__(self, config: DinoWmConfig):
        super().__init__()
        self.config = config
        places = config.num_slots if config.token_type == "patches" else 1
        self.position_embedding = nn.Parameter(torch.zeros(config.history_length, places, config.hidden_size))
        self.layers = nn.ModuleList([DinoWmLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, tokens: torch.Tensor, hidden: None = None, future_only: bool = False) -> torch.Tensor:
        """
        Args:
            tokens (`torch.Tensor` of shape `(B, T, N, hidden_size)`): Observed tokens, T up to history_length. The first
                frame has the first time row: in training every row predicts, so short histories are known.
            hidden: Nothing can be hidden here; the argument is that of the masked predictor.
            future_only (`bool`): Return the frame after the last alone, skipping what it does not need.

        Returns:
            `torch.Tensor` of shape `(B, T, N, hidden_size)`, frames 1 to T, or `(B, 1, N, hidden_size)`, frame T.
        """
        steps, width = tokens.shape[1:3]
        if self.config.token_type == "patches" and width != self.config.num_slots:
            raise ValueError(
                f"slots has {width} tokens per frame, but this model was built for num_slots={self.config.num_slots} "
                "patches, each with its place."
            )
        states = (tokens + self.position_embedding[:steps]).flatten(1, 2)
        mask = frame_causal_mask(steps, width, states) if steps > 1 else None
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            states = layer(states, mask, width if future_only and last else None)
        output = self.head(self.norm(states)).unflatten(1, (-1, width))
        if self.config.residual_prediction is not None:
            output = output + tokens[:, -output.shape[1] :]
        return output


# ---------------------------------------------------------------------------------------------------------- model


class DinoWmModel(SlotWorldModel):
    """
    Autoregressive world model over patch tokens (DINO-WM) or slots (OC-DINO-WM), with the interface of [`CJepaModel`]:
    `forward`, `predict`, `rollout`, `encode`, statistics. Planners, pipelines and training take either.

    Example:

    ```python
    >>> import torch
    >>> from cjepa_hf import DinoWmConfig, DinoWmModel

    >>> config = DinoWmConfig(num_slots=64, slot_size=48, num_hidden_layers=2, action_size=10, proprio_size=4)
    >>> model = DinoWmModel(config).eval()
    >>> slots, actions, proprio = torch.randn(2, 1, 64, 48), torch.randn(2, 3, 5, 10), torch.randn(2, 1, 4)
    >>> model.rollout(slots, actions=actions, proprio=proprio).slots.shape
    torch.Size([2, 3, 5, 64, 48])
    ```
    """

    config: DinoWmConfig
    predictor_class = DinoWmPredictor
    base_model_prefix = "dino_wm"
    _no_split_modules = ["DinoWmLayer"]
    _can_record_outputs = {"hidden_states": DinoWmLayer, "attentions": DinoWmAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DinoWmPredictor):
            init.normal_(module.position_embedding, std=1.0)
            if self.config.residual_prediction is not None:
                # Starts as "nothing changes": the first step of training already predicts well.
                init.zeros_(module.head.weight)
                module.head.weight._is_hf_initialized = True

    @property
    def slots_keep_roles(self) -> bool:
        """Patches have their places; of slots the encoder tells."""
        return self.config.token_type == "patches" or super().slots_keep_roles

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        slots: torch.Tensor,
        *,
        actions: torch.Tensor | None = None,
        proprio: torch.Tensor | None = None,
        future_slots: torch.Tensor | None = None,
        future_proprio: torch.Tensor | None = None,
        slot_mask: None = None,
        **kwargs,
    ) -> DinoWmOutput:
        """
        Predicts every frame from those before it; with `future_slots` also the losses (teacher forcing).

        Args:
            slots (`torch.Tensor` of shape `(B, T, N, D)`): Observed frames, T from 1 to history_length.
            actions (`torch.Tensor` of shape `(B, T, A)`, *optional*): Normalised action block taken at every frame.
            proprio (`torch.Tensor` of shape `(B, T, P)`, *optional*): Normalised proprioception.
            future_slots (`torch.Tensor` of shape `(B, 1, N, D)`, *optional*): The frame after the last.
            future_proprio (`torch.Tensor` of shape `(B, 1, P)`, *optional*): Its proprioception.
            slot_mask: Not possible here; None.
        """
        config = self.config
        if slot_mask is not None:
            raise ValueError("slot_mask was given, but an autoregressive model hides nothing: leave it out.")
        slots = self._check_slots(slots, config.history_length)
        batch, steps, num_slots, _ = slots.shape
        if actions is not None:
            actions = self._checked("actions", actions, config.action_size, "(B, T, A)", 3)
        if proprio is not None:
            proprio = self._checked("proprio", proprio, config.proprio_size, "(B, T, P)", 3)
        self._check_auxiliaries(actions, proprio, batch, steps)
        tokens = self.predictor(self._tokens(slots, actions, proprio))
        predicted_slots, predicted_proprio = self._split(tokens)

        loss = history_loss = future_loss = proprio_loss = None
        if future_slots is not None:
            future_slots = self._future(
                "future_slots", future_slots, (batch, 1, num_slots, config.slot_size), "(B, 1, N, D)"
            )
            error = self._frame_errors(predicted_slots, slots, future_slots)
            loss, future_loss = error.mean(), error[-1]
            history_loss = error[:-1].mean() if steps > 1 else None
            if config.proprio_size and future_proprio is not None:
                future_proprio = self._future(
                    "future_proprio", future_proprio, (batch, 1, config.proprio_size), "(B, 1, P)"
                )
                # Every token carries the proprioception of its frame, and every token has to predict it.
                predicted = tokens[..., config.slot_size : config.slot_size + config.proprio_embedding_size]
                embedded = [self.embed_proprio(x).unsqueeze(2) for x in (proprio, future_proprio)]
                proprio_loss = self._frame_errors(predicted, *embedded).mean()
                loss = loss + config.proprio_loss_weight * proprio_loss
        return DinoWmOutput(
            loss=loss,
            history_loss=history_loss,
            future_loss=future_loss,
            proprio_loss=proprio_loss,
            predicted_slots=predicted_slots,
            predicted_proprio_embeddings=predicted_proprio,
        )

    def _future(self, name: str, value: torch.Tensor, expected: tuple[int, ...], axes: str) -> torch.Tensor:
        value = self._checked(name, value, expected[-1], axes, len(expected))
        if value.shape != expected:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {expected}.")
        return value

    @staticmethod
    def _frame_errors(predicted: torch.Tensor, observed: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
        """[T]: mean squared error of each predicted frame; targets give no gradient."""
        target = torch.cat([observed[:, 1:], future], dim=1).detach()
        return (predicted.float() - target.float()).square().mean(dim=(0, 2, 3))


# -------------------------------------------------------------------------------------------------- patch encoder


class PatchEncoderModel(SafePreTrainedModel):
    r"""
    A frozen vision backbone as an encoder whose slots are patches (model type `"patch-encoder"`), memoryless. It takes the
    place of a slot encoder everywhere: in extraction, in training (`--slot_encoder`), in planning from pixels.

    ```python
    encoder = PatchEncoderModel.from_backbone("facebook/dinov2-small")                  # 196 tokens of size 384
    encoder = PatchEncoderModel.from_backbone(bundled_checkpoint("push_t"), grid_size=8, merge=2)  # 64 of size 144
    encoder.set_feature_statistics(frames)    # for features without a scale of their own
    encoder.save_pretrained(folder)
    ```
    """

    config: PatchEncoderConfig
    base_model_prefix = "patch_encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    memoryless = True  # a frame's tokens depend on that frame alone
    slots_keep_roles = True  # token i is the same place in every frame

    def __init__(self, config: PatchEncoderConfig):
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config)
        self.register_buffer("feature_mean", torch.zeros(config.slot_size))
        self.register_buffer("feature_std", torch.ones(config.slot_size))
        self.post_init()

    @classmethod
    def from_backbone(cls, backbone, **config) -> "PatchEncoderModel":
        """
        Args:
            backbone: a model, a folder or a Hub id of a vision model; of a world model its slot encoder is taken.
            config: fields of [`PatchEncoderConfig`], such as image_size, grid_size, merge.
        """
        if not isinstance(backbone, nn.Module):
            backbone = AutoModel.from_pretrained(backbone, use_safetensors=True, dtype=torch.float32)
        if hasattr(backbone, "slot_encoder"):
            if backbone.slot_encoder is None:
                raise ValueError("this world model carries no slot encoder: give a vision model")
            backbone = backbone.slot_encoder
        model = cls(PatchEncoderConfig(backbone_config=backbone.config, **config))
        model.backbone = backbone
        return model.requires_grad_(False).eval()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, PatchEncoderModel):
            init.zeros_(module.feature_mean)
            init.ones_(module.feature_std)

    def forward(self, pixel_values: torch.Tensor, *, chunk_size: int = 64, **kwargs) -> PatchEncoderOutput:
        """
        Args:
            pixel_values: float [B, T, 3, H, W] or [B, 3, H, W], RGB in [0, 1], H = W = image_size (what
                [`ColorIsaImageProcessor`] with that size returns).
            chunk_size: frames encoded at once, which bounds memory.

        Returns:
            [`PatchEncoderOutput`] with slots [B, (T,) N, D].
        """
        if kwargs.keys() - {"return_dict", "output_attentions", "output_hidden_states"}:
            raise ValueError(f"Unexpected inputs {sorted(kwargs)}; PatchEncoderModel takes pixel_values, chunk_size.")
        size = self.config.image_size
        if pixel_values.ndim not in (4, 5) or pixel_values.shape[-3:] != (3, size, size) or not len(pixel_values):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected [B, T, 3, {size}, {size}] or "
                f"[B, 3, {size}, {size}]. Resize with ColorIsaImageProcessor(size={size})."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values has dtype {pixel_values.dtype}; expected float in [0, 1]: divide by 255.")
        frames = pixel_values.flatten(0, -4)
        slots = torch.cat([self._tokens(chunk) for chunk in frames.split(chunk_size)])
        slots = ((slots.float() - self.feature_mean.float()) / self.feature_std.float()).to(self.dtype)
        return PatchEncoderOutput(slots=slots.unflatten(0, pixel_values.shape[:-3]))

    def _tokens(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames [B, 3, H, W] -> tokens [B, N, D], not normalized."""
        config = self.config
        mean, std = (frames.new_tensor(value).view(3, 1, 1) for value in (config.image_mean, config.image_std))
        grid = self._grid(((frames - mean) / std).to(self.dtype))
        side, merge = config.grid_size, config.merge
        if grid.shape[-1] % (side * merge) or grid.shape[-2:] != (grid.shape[-1], grid.shape[-1]):
            raise ValueError(
                f"the backbone gives {grid.shape[-2]} x {grid.shape[-1]} features, which grid_size={side} x merge={merge} "
                "does not divide"
            )
        grid = F.avg_pool2d(grid, grid.shape[-1] // (side * merge))
        grid = grid.unflatten(3, (side, merge)).unflatten(2, (side, merge))  # [B, C, side, merge, side, merge]
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _grid(self, frames: torch.Tensor) -> torch.Tensor:
        """The backbone's features as a grid [B, C, h, w]."""
        if hasattr(self.backbone, "grid_features"):
            return self.backbone.grid_features(frames)
        features = self.backbone(pixel_values=frames).last_hidden_state
        if features.ndim == 4:  # convolutional
            return features
        # Tokens for the whole image (class, registers) come first.
        side = self.config.backbone_grid_size or math.isqrt(features.shape[1])
        return features[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))

    @torch.no_grad()
    def set_feature_statistics(self, pixel_values: torch.Tensor) -> None:
        """
        Makes every channel of the tokens of these frames [B, 3, H, W] have mean 0 and deviation 1, over all places. Channels
        that hardly vary (less than a hundredth of the most variable one) are divided by that hundredth.
        """
        self.feature_mean.zero_()
        self.feature_std.fill_(1.0)
        tokens = self(pixel_values).slots.flatten(0, -2).double()
        std = tokens.std(dim=0, correction=0)
        if not std.max() > 0:
            raise ValueError(
                f"the tokens of {len(pixel_values)} frame(s) do not vary: give frames of different scenes"
            )
        self.feature_mean.copy_(tokens.mean(dim=0))
        self.feature_std.copy_(std.clamp(min=0.01 * std.max()))


__all__ = [
    "DinoWmConfig",
    "DinoWmModel",
    "DinoWmOutput",
    "PatchEncoderConfig",
    "PatchEncoderModel",
    "PatchEncoderOutput",
]
