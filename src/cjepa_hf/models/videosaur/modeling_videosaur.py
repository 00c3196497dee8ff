"""VideoSAUR (Zadaianchuk et al. 2023, arXiv 2306.04829) as C-JEPA uses it: slot attention over frozen DINOv2 features.

Slots of a frame start from those of the frame before, moved on by a small transformer. A decoder, needed in training
only, reconstructs the features and predicts which patches of the next frame look like each patch.

Three of its rules differ from what one would write today; weights were trained with them, so they are kept: attention
logits of the transformers are multiplied by sqrt(head size), not divided; the GRU of the slot attention updates the
LayerNorm of the slots, not the slots; the first frame of a video gets an iteration more.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, Dinov2Model
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from ..cjepa.modeling_cjepa import SafePreTrainedModel
from ..images import check_pixel_values
from .configuration_videosaur import VideoSaurConfig

logger = logging.get_logger(__name__)


@dataclass
class VideoSaurOutput(ModelOutput):
    """
    Output of [`VideoSaurModel`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Weighted sum of the losses, with `return_loss=True`.
        feature_loss (`torch.Tensor` of shape `()`, *optional*): Mean squared error of the reconstructed features.
        similarity_loss (`torch.Tensor` of shape `()`, *optional*): Cross-entropy of the predicted temporal similarity.
        slots (`torch.Tensor` of shape `[B, T, N, D]`): Slots, after the slot attention of their frame.
        masks (`torch.Tensor` of shape `[B, T, N, H', W']`): Attention of its last iteration, H' = W' = image_size /
            patch_size; it sums to 1 over slots.
        predicted_slots (`torch.Tensor` of shape `[B, T, N, D]`): What the predictor makes of them for the next frame.
        state (`torch.Tensor` of shape `[B, N, D]`): The last prediction: pass it with the next frames of the same videos
            and the result is that of one unbroken run.
        reconstruction (`torch.Tensor` of shape `[B, T, H' W', C]`, *optional*): Reconstructed features.
        decoder_masks (`torch.Tensor` of shape `[B, T, N, H', W']`, *optional*): Share of each slot in a patch's
            reconstruction; sharper than `masks`, and what VideoSAUR is usually evaluated by.
    """

    loss: torch.Tensor | None = None
    feature_loss: torch.Tensor | None = None
    similarity_loss: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    predicted_slots: torch.Tensor | None = None
    state: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    decoder_masks: torch.Tensor | None = None


@dataclass
class VideoSaurDecoderOutput(ModelOutput):
    """
    Output of [`VideoSaurModel.decode`], P = H' W' patches.

    Args:
        reconstruction (`torch.Tensor` of shape `[..., P, C]`): Backbone features, C its width.
        similarity_logits (`torch.Tensor` of shape `[..., P, P]`): For each patch, which patches of a later frame look
            like it (softmax over the last axis).
        masks (`torch.Tensor` of shape `[..., N, H', W']`): Share of each slot in a patch; sums to 1 over slots.
    """

    reconstruction: torch.Tensor | None = None
    similarity_logits: torch.Tensor | None = None
    masks: torch.Tensor | None = None


def time_similarity(
    features: torch.Tensor,
    *,
    temperature: float,
    threshold: float | None = 0.0,
    time_shift: int = 1,
    mask_diagonal: bool = False,
) -> torch.Tensor:
    """For each patch, a distribution over the patches of a later frame by cosine similarity (the target of VideoSAUR's loss).

    Args:
        features: [B, T, P, C], T > time_shift.
        temperature: cosines are divided by it.
        threshold: smaller cosines get no probability; a patch without any larger one gets the uniform distribution.
        time_shift: frames between the two.
        mask_diagonal: a patch and itself get no probability.

    Returns:
        float32 [B, T - time_shift, P, P], rows sum to 1.
    """
    features = F.normalize(features.float(), dim=-1)
    similarity = features[:, :-time_shift] @ features[:, time_shift:].transpose(-1, -2)
    hidden = torch.zeros_like(similarity, dtype=torch.bool) if threshold is None else similarity < threshold
    if mask_diagonal:
        hidden = hidden | torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
    nothing = hidden.all(dim=-1, keepdim=True)
    similarity = similarity.masked_fill(hidden, -torch.inf).masked_fill(nothing, 0.0)
    return (similarity / temperature).softmax(dim=-1)


class VideoSaurMlp(nn.Module):
    """LayerNorm, Linear, ReLU, Linear."""

    def __init__(self, size: int, hidden_size: int, output_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.fc1 = nn.Linear(size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, output_size)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(self.norm(x))))


class VideoSaurInitializer(nn.Module):
    """Slots before the first frame: a Gaussian shared by all slots, or learned ones."""

    def __init__(self, config: VideoSaurConfig):
        super().__init__()
        self.config = config
        if config.initial_slots == "random":
            self.mean = nn.Parameter(torch.empty(1, 1, config.slot_size))
            self.log_std = nn.Parameter(torch.empty(1, 1, config.slot_size))
        else:
            self.slots = nn.Parameter(torch.empty(1, config.num_slots, config.slot_size))

    def forward(self, batch_size: int, noise: torch.Tensor | None) -> torch.Tensor:
        """Noise [B, N, D] of unit variance (not used by learned slots) -> slots [B, N, D]."""
        if self.config.initial_slots == "learned":
            return self.slots.expand(batch_size, -1, -1)
        return self.mean + noise.to(self.mean) * self.log_std.exp()


class VideoSaurSlotAttention(nn.Module):
    """Patches choose among slots, slots gather what chose them (Locatello et al. 2020, arXiv 2006.15055)."""

    def __init__(self, config: VideoSaurConfig):
        super().__init__()
        self.eps, self.scale = config.attention_eps, config.attention_size**-0.5
        self.feature_norm = nn.LayerNorm(config.feature_size)
        self.slot_norm = nn.LayerNorm(config.slot_size)
        self.query = nn.Linear(config.slot_size, config.attention_size, bias=False)
        self.key = nn.Linear(config.feature_size, config.attention_size, bias=False)
        self.value = nn.Linear(config.feature_size, config.attention_size, bias=False)
        self.gru = nn.GRUCell(config.attention_size, config.slot_size) if config.use_gru else None
        self.mlp = VideoSaurMlp(config.slot_size, config.mlp_size, config.slot_size) if config.use_mlp else None

    def project(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [..., P, C] -> keys and values [..., P, attention_size]."""
        features = self.feature_norm(features)
        return self.key(features), self.value(features)

    def forward(self, slots, keys, values, num_iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots [B, N, D], keys and values [B, P, C] -> slots [B, N, D], masks [B, N, P] of the last iteration."""
        for _ in range(num_iterations):
            normed = self.slot_norm(slots)
            logits = self.query(normed) @ keys.transpose(-1, -2) * self.scale
            # eps is too small for half precision
            masks = logits.float().softmax(dim=1)
            weights = masks + self.eps
            weights = weights / weights.sum(dim=-1, keepdim=True)
            update = weights.to(values.dtype) @ values
            if self.gru is None:
                slots = normed + update
            else:
                slots = self.gru(update.flatten(0, 1), normed.flatten(0, 1)).view(slots.shape)
            if self.mlp is not None:
                slots = slots + self.mlp(slots)
        return slots, masks


class VideoSaurAttention(nn.Module):
    """Multi-head attention to the tokens themselves or to a memory, with VideoSAUR's scale."""

    def __init__(self, size: int, num_heads: int, memory_size: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        if memory_size in (None, size):
            self.qkv = nn.Linear(size, 3 * size)
        else:
            self.query, self.key_value = nn.Linear(size, size), nn.Linear(memory_size, 2 * size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, P, C], memory [B, M, C'] -> [B, P, C]."""
        size = x.shape[-1]
        if memory is None:
            query, key, value = self.qkv(x).chunk(3, dim=-1)
        elif hasattr(self, "qkv"):
            weight, bias = self.qkv.weight, self.qkv.bias
            query = F.linear(x, weight[:size], bias[:size])
            key, value = F.linear(memory, weight[size:], bias[size:]).chunk(2, dim=-1)
        else:
            query = self.query(x)
            key, value = self.key_value(memory).chunk(2, dim=-1)
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        # The released code divides the queries by head_size**-0.5. Weights were trained with that.
        y = F.scaled_dot_product_attention(query, key, value, scale=math.sqrt(query.shape[-1]))
        return self.out_proj(y.transpose(1, 2).flatten(2))


class VideoSaurLayer(nn.Module):
    """Pre-norm transformer layer. With a memory, attention goes to the memory alone, which is not normalized."""

    def __init__(
        self,
        size: int,
        num_heads: int,
        intermediate_size: int,
        memory_size: int | None = None,
        residual_scale: float | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(size)
        self.attention = VideoSaurAttention(size, num_heads, memory_size)
        self.norm2 = nn.LayerNorm(size)
        self.fc1 = nn.Linear(size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, size)
        self.scale1 = self.scale2 = None
        if residual_scale is not None:
            self.scale1, self.scale2 = (nn.Parameter(torch.full((size,), float(residual_scale))) for _ in range(2))

    def forward(self, x, memory=None):
        y = self.attention(self.norm1(x), memory)
        x = x + (y if self.scale1 is None else self.scale1 * y)
        y = self.fc2(F.relu(self.fc1(self.norm2(x))))
        return x + (y if self.scale2 is None else self.scale2 * y)


class VideoSaurTransformer(nn.Module):
    """Layers without a final norm."""

    def __init__(self, num_layers: int, *layer_args, **layer_options):
        super().__init__()
        self.layers = nn.ModuleList(VideoSaurLayer(*layer_args, **layer_options) for _ in range(num_layers))

    def forward(self, x, memory=None):
        for layer in self.layers:
            x = layer(x, memory)
        return x


class VideoSaurDecoder(nn.Module):
    """SlotMixer (Sajjadi et al. 2022, arXiv 2206.06922): patches choose among slots first, then one MLP draws them."""

    def __init__(self, config: VideoSaurConfig):
        super().__init__()
        size, num_patches = config.slot_size, config.mask_size**2
        self.scale = size**-0.5
        self.position_embedding = nn.Parameter(torch.empty(1, num_patches, size))
        self.memory_norm = nn.LayerNorm(size)
        self.allocator = VideoSaurTransformer(
            config.num_allocator_layers,
            size,
            config.num_attention_heads,
            config.intermediate_size,
            memory_size=size,
            residual_scale=config.residual_scale,
        )
        self.query_norm = nn.LayerNorm(size)
        self.key_norm = nn.LayerNorm(size)
        self.query = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, size, bias=False)
        widths = [size] + [config.renderer_size] * config.num_renderer_layers
        self.renderer = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        self.head = nn.Linear(config.renderer_size, config.backbone_config.hidden_size + num_patches)

    def forward(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots [M, N, D] -> features and similarity logits [M, P, C + P], masks [M, N, P]."""
        position = self.position_embedding.expand(len(slots), -1, -1)
        queries = self.allocator(position, self.memory_norm(slots))
        logits = self.query(self.query_norm(queries)) @ self.key(self.key_norm(slots)).transpose(-1, -2)
        masks = (logits * self.scale).float().softmax(dim=-1)
        x = masks.to(slots.dtype) @ slots + position
        for layer in self.renderer:
            x = F.relu(layer(x))
        return self.head(x), masks.transpose(-1, -2)


class VideoSaurPreTrainedModel(SafePreTrainedModel):
    config: VideoSaurConfig
    base_model_prefix = "videosaur"
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    memoryless = False  # slots start from those of the frame before
    slots_keep_roles = False  # which slot takes which object depends on the video and on chance
    _no_split_modules = ["Dinov2Layer", "VideoSaurLayer"]
    # what the backbone supports; the small attentions of this file use scaled_dot_product_attention throughout
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        size = self.config.slot_size
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.GRUCell):
            for weight in module.parameters():
                init.uniform_(weight, -(size**-0.5), size**-0.5)
        elif isinstance(module, VideoSaurLayer):
            if module.scale1 is not None:
                init.constant_(module.scale1, self.config.residual_scale)
                init.constant_(module.scale2, self.config.residual_scale)
        elif isinstance(module, VideoSaurInitializer):
            if self.config.initial_slots == "random":
                init.zeros_(module.mean)
                init.constant_(module.log_std, math.log(size**-0.5))
            else:
                init.normal_(module.slots, std=size**-0.5)
        elif isinstance(module, VideoSaurDecoder):
            init.normal_(module.position_embedding, std=size**-0.5)


class VideoSaurModel(VideoSaurPreTrainedModel):
    r"""
    Slot encoder for videos, with the decoder and the losses that train it (model type `"videosaur"`).

    The DINOv2 backbone is frozen: it is always in evaluation mode and its weights take no gradient.

    ```python
    processor = VideoSaurImageProcessor.from_pretrained(folder)
    model = VideoSaurModel.from_pretrained(folder)
    output = model(**processor([frames]), seeds=[0])   # frames uint8 [T, H, W, 3]
    output.slots, output.masks                         # [1, T, N, D], [1, T, N, 14, 14]
    ```

    **Initial slots.** With `initial_slots="random"` the noise of a video is `torch.randn(N, D)` from a CPU generator of
    its own, seeded with that video's entry of `seeds`: it does not depend on the other videos of the batch, on their
    order, on the device, or on how the video is cut into chunks. Without `seeds` noise comes from `generator`; without
    both, in training from PyTorch's global generator, and in evaluation every video takes seed 0. (The released code
    draws from the global generator in evaluation too, so that no two extractions agree.)

    **Long videos.** `forward` already bounds the memory of the backbone by `chunk_size`. To pass a video in parts, give
    each part the `state` of the part before: the result is that of one unbroken run. The released code's own way of
    cutting, which changes the result, is `initial_slots=previous.slots[:, -1]`: a new first frame, which starts from
    slots that the predictor has not moved on and takes `first_frame_iterations`.
    """

    def __init__(self, config: VideoSaurConfig):
        super().__init__(config)
        self.backbone = Dinov2Model(config.backbone_config)
        self.output_transform = VideoSaurMlp(
            config.backbone_config.hidden_size, config.transform_size, config.feature_size
        )
        self.initializer = VideoSaurInitializer(config)
        self.corrector = VideoSaurSlotAttention(config)
        self.predictor = VideoSaurTransformer(
            config.num_predictor_layers,
            config.slot_size,
            config.num_attention_heads,
            config.intermediate_size,
            residual_scale=config.residual_scale,
        )
        self.decoder = VideoSaurDecoder(config) if config.use_decoder else None
        self.backbone.requires_grad_(False)
        self.post_init()

    @classmethod
    def from_pretrained_backbone(cls, backbone: str, *, revision: str | None = None, **config_fields):
        """
        A new model, to be trained, over a pretrained DINOv2.

        Args:
            backbone: folder or Hub id, such as "facebook/dinov2-small". Pickled weights are refused.
            revision: branch, tag or commit on the Hub.
            config_fields: fields of [`VideoSaurConfig`] other than backbone_config.

        Raises:
            ValueError: `backbone` is no DINOv2, or its patches do not fit `image_size`.
            OSError: there is no such folder, and the Hub cannot be reached or has no such repository.
        """
        kind = AutoConfig.from_pretrained(backbone, revision=revision).model_type
        if kind != "dinov2":
            raise ValueError(f"{backbone} is a {kind!r} model; expected a 'dinov2' such as facebook/dinov2-small.")
        pretrained = Dinov2Model.from_pretrained(
            backbone, revision=revision, use_safetensors=True, dtype=torch.float32
        )
        model = cls(VideoSaurConfig(backbone_config=pretrained.config.to_dict(), **config_fields))
        model.backbone.load_state_dict(pretrained.state_dict())
        return model

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        # Here as well as in __init__: loading weights replaces the parameters, and ends with eval().
        self.backbone.requires_grad_(False)
        return self

    def forward(
        self,
        pixel_values: torch.Tensor,
        *,
        initial_slots: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = False,
        chunk_size: int = 128,
        **kwargs,
    ) -> VideoSaurOutput:
        """
        Args:
            pixel_values: float [B, T, 3, H, W], H = W = image_size, normalized (what [`VideoSaurImageProcessor`] returns
                for a list of clips).
            initial_slots: [B, N, D], slots before the first frame, which then takes `first_frame_iterations`. At most one
                of this and the next three is given.
            state: [B, N, D], `output.state` of the frames before these: the run goes on as if unbroken.
            seeds: one number per video, from which its random initial slots are drawn.
            generator: draws the random initial slots of the whole batch.
            return_loss: also decode the slots and return the losses (T > similarity_time_shift).
            chunk_size: frames the backbone sees at once, which bounds memory.

        Returns:
            [`VideoSaurOutput`].

        Raises:
            ValueError: wrong shape, channel order, dtype or range, NaN, arguments that exclude each other, or losses of a
                model without decoder.
        """
        if kwargs.keys() - {"return_dict", "output_attentions", "output_hidden_states"}:
            raise ValueError(
                f"Unexpected inputs {sorted(kwargs)}; VideoSaurModel takes pixel_values, initial_slots, state, seeds, "
                "generator, return_loss and chunk_size."
            )
        self._check_pixels(pixel_values)
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1.")
        batch_size, steps = pixel_values.shape[:2]
        if return_loss:
            self._check_decoder()
        if return_loss and steps <= self.config.similarity_time_shift:
            raise ValueError(
                f"pixel_values has {steps} frames; the losses compare frames {self.config.similarity_time_shift} apart: "
                f"give at least {self.config.similarity_time_shift + 1}."
            )
        given = {"initial_slots": initial_slots, "state": state, "seeds": seeds, "generator": generator}
        if len(given := [name for name, value in given.items() if value is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} all say what slots start from: give one of them.")
        is_first = state is None
        if initial_slots is not None or state is not None:
            slots = self._checked_slots(given[0], initial_slots if is_first else state, batch_size)
        else:
            slots = self.initial_slots(batch_size, seeds=seeds, generator=generator)

        all_slots, all_masks, predicted, targets, target_keys = [], [], [], [], []
        for part in pixel_values.split(max(chunk_size // batch_size, 1), dim=1):
            chunks = [self._backbone(frames, return_loss) for frames in part.flatten(0, 1).split(chunk_size)]
            features = torch.cat([features for features, _ in chunks]).unflatten(0, part.shape[:2])
            if return_loss:
                targets.append(features)
                target_keys.append(torch.cat([keys for _, keys in chunks]).unflatten(0, part.shape[:2]))
            projected = self.corrector.project(self.output_transform(features))
            for key, value in zip(*(x.unbind(dim=1) for x in projected)):
                count = self.config.first_frame_iterations if is_first else self.config.num_iterations
                corrected, masks = self.corrector(slots, key, value, count)
                slots, is_first = self.predictor(corrected), False
                all_slots.append(corrected)
                all_masks.append(masks)
                predicted.append(slots)
        output = VideoSaurOutput(
            slots=torch.stack(all_slots, dim=1),
            masks=self._as_grid(torch.stack(all_masks, dim=1)),
            predicted_slots=torch.stack(predicted, dim=1),
            state=slots,
        )
        if return_loss:
            self._add_losses(output, torch.cat(targets, dim=1), torch.cat(target_keys, dim=1))
        return output

    def initial_slots(
        self,
        batch_size: int,
        *,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Slots [B, N, D] before the first frame; see the class for the rule of the noise."""
        if seeds is not None and len(seeds) != batch_size:
            raise ValueError(f"{len(seeds)} seeds for {batch_size} videos: give one per video.")
        if self.config.initial_slots == "learned":
            return self.initializer(batch_size, None)
        shape = (self.config.num_slots, self.config.slot_size)
        if seeds is None and generator is None and not self.training:
            seeds = [0] * batch_size
        if seeds is not None:
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds])
        else:
            device = self.initializer.mean.device if generator is None else generator.device
            noise = torch.randn(batch_size, *shape, generator=generator, device=device)
        return self.initializer(batch_size, noise)

    def decode(self, slots: torch.Tensor) -> VideoSaurDecoderOutput:
        """Reconstruct the features of frames from their slots [..., N, D]; see [`VideoSaurDecoderOutput`].

        Raises:
            ValueError: slots of another shape, or a model without decoder.
        """
        self._check_decoder()
        if slots.dim() < 2 or slots.shape[-1] != self.config.slot_size:
            raise ValueError(f"slots have shape {tuple(slots.shape)}; expected [..., N, {self.config.slot_size}].")
        leading = slots.shape[:-2]
        decoded, masks = self.decoder(slots.reshape(-1, *slots.shape[-2:]))
        features, logits = decoded.view(*leading, *decoded.shape[1:]).split(
            [self.config.backbone_config.hidden_size, self.config.mask_size**2], dim=-1
        )
        return VideoSaurDecoderOutput(
            reconstruction=features,
            similarity_logits=logits,
            masks=self._as_grid(masks.reshape(*leading, *masks.shape[1:])),
        )

    @torch.no_grad()
    def _backbone(self, frames, with_keys: bool):
        """[M, 3, H, W] -> features [M, P, C], and the keys [M, P, C] of the last layer's attention (heads side by side)."""
        backbone = self.backbone
        hidden = backbone.embeddings(frames)
        for layer in backbone.encoder.layer:
            before, hidden = hidden, layer(hidden)
        keys = layer.attention.k_proj(layer.norm1(before))[:, 1:] if with_keys else None
        if self.config.backbone_features == "after_norm":
            hidden = backbone.layernorm(hidden)
        return hidden[:, 1:], keys

    def _add_losses(self, output, features, keys):
        config = self.config
        decoded = self.decode(output.slots)
        output.feature_loss = F.mse_loss(decoded.reconstruction.float(), features.float())
        target = time_similarity(
            keys,
            temperature=config.similarity_temperature,
            threshold=config.similarity_threshold,
            time_shift=config.similarity_time_shift,
            mask_diagonal=config.similarity_mask_diagonal,
        )
        logits = decoded.similarity_logits[:, : -config.similarity_time_shift].float()
        output.similarity_loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(0, 2))
        output.loss = (
            config.feature_loss_weight * output.feature_loss + config.similarity_loss_weight * output.similarity_loss
        )
        output.reconstruction, output.decoder_masks = decoded.reconstruction, decoded.masks

    def _as_grid(self, masks):
        """[..., N, P] -> [..., N, H', W'] in the model's dtype."""
        return masks.unflatten(-1, (self.config.mask_size, self.config.mask_size)).to(self.dtype)

    def _check_decoder(self):
        if self.decoder is None:
            raise ValueError(
                "This model has no decoder (use_decoder=False), which losses and reconstructions need: load an encoder "
                "that has one, such as the VideoSAUR checkpoint that the world model was trained with."
            )

    def _checked_slots(self, name, slots, batch_size):
        want = f"expected float [{batch_size}, N, {self.config.slot_size}]"
        if not isinstance(slots, torch.Tensor) or not slots.is_floating_point():
            raise ValueError(f"{name} is {getattr(slots, 'dtype', type(slots).__name__)}; {want}.")
        shape = tuple(slots.shape)
        if len(shape) != 3 or shape[0] != batch_size or shape[1] < 1 or shape[2] != self.config.slot_size:
            raise ValueError(f"{name} has shape {shape}; {want}.")
        return slots.to(self.output_transform.fc2.weight)

    def _check_pixels(self, pixel_values):
        # Normalized images stay within 3, and the noise of a test within 6.
        found = check_pixel_values(
            pixel_values, self.config.image_size, "VideoSaurImageProcessor", "normalized RGB", -10, 10
        )
        if found is not None and found[0] >= 0 and found[1] <= 1:
            logger.warning_once(
                "All pixel_values are in [0, 1]: they do not seem to be normalized. Use VideoSaurImageProcessor."
            )


__all__ = [
    "VideoSaurDecoderOutput",
    "VideoSaurModel",
    "VideoSaurOutput",
    "VideoSaurPreTrainedModel",
    "time_similarity",
]
