"""Slot attention with color prototypes and an invariant (ISA-style) read-out, small enough to train on one CPU core.

Memoryless: every frame is read alone. Two ideas make it learn in minutes without labels: the attention itself must be
able to recolor the image with one color per slot, and objects are read out, and drawn, in a frame of their own: position
and orientation (invariant slot attention, Biza et al. 2023, arXiv 2302.04973, there with position and scale). It leans
on objects that keep their color, one color per object; for other scenes use an encoder with pretrained features.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..cjepa.modeling_cjepa import SafePreTrainedModel
from ..images import check_pixel_values
from .configuration_color_isa import ColorIsaConfig

_ROTATION_SEED = 2602  # one rotation for all models, so that their slots are comparable


@dataclass
class ColorIsaOutput(ModelOutput):
    """
    Output of [`ColorIsaModel`]. The axes before N are those of the input: [B, T] for clips, [B] for single frames.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Sum of the weighted losses, with `return_loss=True`.
        reconstruction_loss (`torch.Tensor` of shape `()`, *optional*): Weighted squared error of the drawn image.
        color_loss (`torch.Tensor` of shape `()`, *optional*): Squared error of the image recolored by the attention.
        content_loss (`torch.Tensor` of shape `()`, *optional*): Mean over slots of the squared length of the content.
        slots (`torch.Tensor` of shape `[B, (T,) N, D]`): Slots in the planning latent: `[position_scale * position,
            content_scale * content]`, rotated.
        masks (`torch.Tensor` of shape `[B, (T,) N, H', W']`): Attention masks, H' = W' = image_size / stem_stride; they
            sum to 1 over slots. `decode(slots).masks` are sharper.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    color_loss: torch.Tensor | None = None
    content_loss: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    masks: torch.Tensor | None = None


@dataclass
class ColorIsaDecoderOutput(ModelOutput):
    """
    Output of [`ColorIsaModel.decode`].

    Args:
        reconstruction (`torch.Tensor` of shape `[..., 3, H, W]`): The drawn image, RGB in [0, 1].
        masks (`torch.Tensor` of shape `[..., N, H, W]`): Which slot drew each pixel; they sum to 1 over slots.
    """

    reconstruction: torch.Tensor | None = None
    masks: torch.Tensor | None = None


def _wave_vectors(count: int, wavelengths, scene_size: float) -> torch.Tensor:
    """[count, 2] wave vectors for coordinates in [-1, 1]: geometric wavelengths, directions by the golden ratio."""
    shortest, longest = wavelengths
    index = torch.arange(count, dtype=torch.float64)
    length = shortest * (longest / shortest) ** (index / max(count - 1, 1))
    angle = math.pi * ((index * (math.sqrt(5) - 1) / 2) % 1)
    number = math.pi * scene_size / length
    return torch.stack([number * angle.cos(), number * angle.sin()], dim=-1).float()


def _moment_waves(config: ColorIsaConfig) -> torch.Tensor:
    """[num_moment_waves, 2]: first a half circle of directions at one wavelength, then waves of all sizes."""
    ring = config.num_orientation_waves
    angle = torch.arange(ring) * (math.pi / ring)
    number = math.pi * config.scene_size / config.orientation_wavelength
    others = _wave_vectors(config.num_moment_waves - ring, config.moment_wavelengths, config.scene_size)
    return torch.cat([number * torch.stack([angle.cos(), angle.sin()], dim=-1), others])


def _grid(size: int) -> torch.Tensor:
    """[size * size, 2] centers (x, y) of a size x size grid over [-1, 1]^2, row by row."""
    line = (torch.arange(size, dtype=torch.float32) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def _quadratics(p: torch.Tensor) -> torch.Tensor:
    x, y = p.unbind(-1)
    return torch.stack([x * x, y * y, x * y], dim=-1)


_NUM_MONOMIALS = 10


def _monomials(p: torch.Tensor) -> torch.Tensor:
    """[..., 2] -> [..., 10]: the monomials of x and y up to degree 3."""
    x, y = p.unbind(-1)
    xx, yy, xy = x * x, y * y, x * y
    return torch.stack([torch.ones_like(x), x, y, xx, yy, xy, xx * x, xx * y, xy * y, yy * y], dim=-1)


def _random_rotation(size: int) -> torch.Tensor:
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(_ROTATION_SEED))
    q, r = torch.linalg.qr(noise)
    return (q * r.diagonal().sign()).float()


def _unit(vector: torch.Tensor, softness: float) -> torch.Tensor:
    """Vectors [..., 2] of length 1, or shorter where they are not much longer than `softness`."""
    return vector * (vector.square().sum(dim=-1, keepdim=True) + softness**2).rsqrt()


def _rotate(p: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Points [..., 2] turned so that the x axis falls on the unit vector `direction` [..., 2]."""
    (x, y), (cos, sin) = p.unbind(-1), direction.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)


class ColorIsaMlp(nn.ModuleList):
    """Linear layers of the given sizes with ReLU between them."""

    def __init__(self, *sizes: int):
        super().__init__(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))

    def forward(self, x):
        for index, layer in enumerate(self):
            x = layer(x if index == 0 else F.relu(x, inplace=True))
        return x


class ColorIsaLayer(nn.Module):
    """One round of slot attention: every token chooses among the slots, every slot looks at what it was given."""

    def __init__(self, config: ColorIsaConfig):
        super().__init__()
        self.config = config
        hidden, channels = config.hidden_size, config.stem_channels
        num_moments = 3 + 2 * config.num_moment_waves
        self.query_norm = nn.LayerNorm(hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)
        # Keys are linear in features and positions: projecting the few queries back instead of the many tokens is the
        # same product, and no token of size hidden_size is ever stored.
        self.feature_key = nn.Linear(channels, hidden, bias=False)
        self.position_key = nn.Parameter(torch.empty(hidden, 5 + 2 * config.num_position_waves))
        self.update = nn.Linear(channels + 2 + num_moments, hidden)
        self.input_gates = nn.Linear(hidden, 3 * hidden)
        self.latent_gates = nn.Linear(hidden, 3 * hidden)
        self.mlp_norm = nn.LayerNorm(hidden)
        self.mlp = ColorIsaMlp(hidden, config.mlp_size, hidden)

    def forward(self, latents, features, position_features, moment_features):
        """
        Args: latents [B, N, hidden], features [B, channels, H'W'], position_features [5 + 2 waves, H'W'],
            moment_features [H'W', 5 + 2 waves] float32.
        Returns: latents, attention masks [B, N, H'W'], and of these masks the centroids [B, N, 2], the skewness
            [B, N, 2] (a vector that turns with the object) and moments [B, N, 3 + 2 waves].
        """
        dtype = latents.dtype
        query = self.query(self.query_norm(latents)) * self.config.hidden_size**-0.5
        logits = (query @ self.feature_key.weight) @ features + (query @ self.position_key) @ position_features
        masks = logits.float().softmax(dim=1)
        # A thousand tokens of the background that give a small object 1/1000 each would outweigh its own few tokens:
        # shares far below the threshold count quadratically less, larger ones nearly in full.
        weights = masks.square() / (masks + self.config.mask_threshold)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-4)
        pooled = weights.to(dtype) @ features.transpose(1, 2)
        center, skewness, moments = self._moments(weights, moment_features)
        update = self.update(torch.cat([pooled, center.to(dtype), moments.to(dtype)], dim=-1))
        # a gated recurrent unit
        reset, keep, candidate = self.input_gates(update).chunk(3, dim=-1)
        reset_latent, keep_latent, candidate_latent = self.latent_gates(latents).chunk(3, dim=-1)
        candidate = torch.tanh(candidate + torch.sigmoid(reset + reset_latent) * candidate_latent)
        latents = candidate + torch.sigmoid(keep + keep_latent) * (latents - candidate)
        return latents + self.mlp(self.mlp_norm(latents)), masks, center, skewness, moments

    def _moments(self, weights, moment_features):
        with torch.autocast(weights.device.type, enabled=False):
            raw = weights @ moment_features
            center, second, cos, sin = raw.split([2, 3, *2 * [self.config.num_moment_waves]], dim=-1)
            waves = _moment_waves(self.config).to(center)
            phase = center @ waves.T
            cos_c, sin_c = phase.cos(), phase.sin()
            cos, sin = cos * cos_c + sin * sin_c, sin * cos_c - cos * sin_c
            covariance = self.config.moment_scale * (second - _quadratics(center))
            # odd waves in all directions: a vector that turns with the object, zero for a symmetric one, and, unlike
            # the third moment, hardly touched by a little attention far away
            ring = self.config.num_orientation_waves
            skewness = sin[..., :ring] @ F.normalize(waves[:ring], dim=-1) * (2 / ring)
            moments = torch.cat([covariance, cos, sin], dim=-1)
        return center, skewness, moments


class ColorIsaEncoder(nn.Module):
    """Frames -> position [B, N, 2], content [B, N, D - 2] and attention masks [B, N, H'W'].

    The position is the centroid of the attention mask plus a learned offset. The first two numbers of the content are
    the orientation, a vector along the object: the skewness of the mask, turned by a learned angle, its length learned.
    """

    def __init__(self, config: ColorIsaConfig):
        super().__init__()
        self.config = config
        num_moments = 3 + 2 * config.num_moment_waves
        self.stem = nn.Conv2d(
            3, config.stem_channels, config.stem_kernel_size, config.stem_stride, padding=config.stem_kernel_size // 2
        )
        self.initial_latents = nn.Parameter(torch.empty(config.num_slots, config.hidden_size))
        self.layers = nn.ModuleList(ColorIsaLayer(config) for _ in range(config.num_iterations))
        self.appearance = ColorIsaMlp(config.hidden_size + num_moments, config.mlp_size, config.slot_size - 4)
        # offset of the position (2), turn of the orientation and its length
        self.pose = ColorIsaMlp(config.hidden_size + num_moments, config.mlp_size, 4)

    def forward(self, pixel_values: torch.Tensor, position_features: torch.Tensor, moment_features: torch.Tensor):
        """pixel_values [B, 3, H, W]; position_features [H'W', 5 + 2 waves], moment_features [H'W', 5 + 2 waves]."""
        dtype = self.stem.weight.dtype
        features = F.relu(self.stem(1 - pixel_values.to(dtype)), inplace=True).flatten(2)
        position_features = position_features.T.to(dtype)
        latents = self.initial_latents.expand(len(pixel_values), -1, -1)
        for layer in self.layers:
            latents, masks, position, skewness, moments = layer(latents, features, position_features, moment_features)
        summary = torch.cat([latents, moments.to(latents.dtype)], dim=-1)
        appearance = self.appearance(summary).float()
        offset, turn, length = self.pose(summary).float().split([2, 1, 1], dim=-1)
        position = position + self.config.max_offset * torch.tanh(offset)
        # The centroid of the background only says where the objects are not: it has no position of its own.
        position = torch.cat([torch.zeros_like(position[:, :1]), position[:, 1:]], dim=1)
        orientation = _unit(skewness, 0.01)
        orientation = F.softplus(length + 1) * _rotate(orientation, torch.cat([turn.cos(), turn.sin()], dim=-1))
        return position, torch.cat([orientation, appearance], dim=-1), masks


class ColorIsaDecoder(nn.Module):
    """Position and content of each slot -> mask logits and shades.

    Objects are drawn in their own frame: moving or turning the slot moves or turns the drawing. Every patch of the image
    gets a cubic polynomial of the place within it. Only the background knows absolute positions.
    """

    def __init__(self, config: ColorIsaConfig):
        super().__init__()
        self.config = config
        hidden = config.decoder_hidden_size
        self.relative_projection = nn.Linear(5 + 2 * config.num_decoder_waves, hidden)
        self.absolute_projection = nn.Linear(5 + 2 * config.num_position_waves, hidden)
        self.film = ColorIsaMlp(config.slot_size - 4, config.mlp_size, 2 * hidden)
        self.mlp = ColorIsaMlp(hidden, hidden, 2 * _NUM_MONOMIALS)

    def forward(self, position, content, has_background, grid, waves, absolute_features):
        """
        Args: position [B, N, 2], content [B, N, D - 2], has_background: whether the first slot is the background, grid
            [G, 2], waves [W, 2], absolute_features [G, F].
        Returns: mask logits and shades (in [-1, 1]), both [B, N, G, P] for the P pixels of every patch of the grid.
        """
        batch, dtype = len(position), self.relative_projection.weight.dtype
        first, side = int(has_background), self.config.decoder_grid_size
        orientation, appearance = content.split([2, content.shape[-1] - 2], dim=-1)
        with torch.autocast(position.device.type, enabled=False):
            # points in the frame of each object: moved and turned back
            back = _unit(orientation, 0.01).unsqueeze(-2) * position.new_tensor([1.0, -1.0])
            relative = _rotate(grid - position[:, first:].unsqueeze(-2), back[:, first:])
            phase = relative @ waves.T
            near = (relative / self.config.decoder_radius).clamp(-2, 2)
            features = torch.cat([near, _quadratics(near), phase.cos(), phase.sin()], dim=-1)
            # pixels of a patch about its center, [B, N, P, 2] in units of half a patch, in the same frames
            pixels = _grid(self.config.image_size // side).to(position)
            turned = _rotate(pixels.expand(batch, position.shape[1] - first, -1, 2), back[:, first:])
            turned = torch.cat([pixels.expand(batch, first, -1, 2), turned], dim=1)
            monomials = _monomials(turned).flatten(0, 1)
        scale, shift = self.film(appearance.to(dtype)).unsqueeze(-2).chunk(2, dim=-1)
        objects = slice(first, None)
        drawn = [self._draw(features.to(dtype).flatten(0, 1), self.relative_projection, scale, shift, objects)]
        if has_background:
            absolute = absolute_features.to(dtype).expand(batch, -1, -1)
            drawn.insert(0, self._draw(absolute, self.absolute_projection, scale, shift, slice(0, 1)))
        coefficients = torch.cat(drawn, dim=1).unflatten(-1, (2, -1)).transpose(2, 3).flatten(2, 3)
        with torch.autocast(position.device.type, enabled=False):
            # [B * N, G * 2, monomials] x [B * N, monomials, P]
            values = coefficients.flatten(0, 1).float() @ monomials.transpose(1, 2)
        logits, shade = values.view(batch, -1, 2, side * side, values.shape[-1]).unbind(2)
        return logits, shade.tanh()

    def _draw(self, features, projection, scale, shift, slots):
        """features [B * N', G, F], scale and shift [B, N, 1, hidden] -> [B, N', G, coefficients] for the slots named."""
        scale, shift = 1 + scale[:, slots], shift[:, slots]
        # Scaling the projection instead of its result: no pass over the large result.
        weight = (projection.weight.T * scale).flatten(0, 1)
        bias = (projection.bias * scale + shift).flatten(0, 1)
        hidden = F.relu(torch.baddbmm(bias, features, weight), inplace=True)
        # two axes, or the in-place ReLU of a view would copy
        drawn = self.mlp(hidden.flatten(0, 1))
        return drawn.view(*scale.shape[:2], features.shape[1], -1)


class ColorIsaPreTrainedModel(SafePreTrainedModel):
    config: ColorIsaConfig
    base_model_prefix = "color_isa"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = False
    memoryless = True  # a frame's slots depend on that frame alone
    slots_keep_roles = True  # slot k is the object of color prototype k in every frame: no matching is needed

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ColorIsaLayer):
            init.xavier_uniform_(module.position_key)
        elif isinstance(module, ColorIsaModel):
            init.uniform_(module.colors, 0.0, 1.0)
            init.constant_(module.shades, self.config.color_residual)
            init.zeros_(module.background)
            init.copy_(module.rotation, _random_rotation(self.config.slot_size))
            init.ones_(module.content_scale)
        if isinstance(module, ColorIsaEncoder):
            init.normal_(module.initial_latents)
            # poses start at the centroid and along the skewness
            init.zeros_(module.pose[-1].weight)


class ColorIsaModel(ColorIsaPreTrainedModel):
    r"""
    Slot encoder and decoder for scenes of constant-color objects (model type `"color-isa"`).

    Slot 0 is the background, slot k > 0 the object of color prototype k. Slots come out in the planning latent: their
    mean squared error is a fair planning cost, in which `position_scale` weighs positions and `content_scale` the rest.

    ```python
    processor = ColorIsaImageProcessor.from_pretrained(folder)
    model = ColorIsaModel.from_pretrained(folder)
    slots = model(**processor(frames)).slots           # [T, N, D] for frames [T, H, W, 3]
    model.positions(slots), model.decode(slots).masks  # [T, N, 2] scene units, [T, N, 64, 64]
    ```
    """

    def __init__(self, config: ColorIsaConfig):
        super().__init__(config)
        self.encoder = ColorIsaEncoder(config)
        self.decoder = ColorIsaDecoder(config)
        # Darkness (1 - RGB) of each slot's prototype, and how it changes with the shade that the decoder draws.
        self.colors = nn.Parameter(torch.empty(config.num_slots, 3))
        self.shades = nn.Parameter(torch.empty(config.num_slots, 3))
        # Darkness of the empty scene; the losses weigh pixels that differ from it.
        self.register_buffer("background", torch.empty(3, config.image_size, config.image_size))
        self.register_buffer("rotation", torch.empty(config.slot_size, config.slot_size))
        self.register_buffer("content_scale", torch.empty(()))
        # Fixed features of pixel grids by device; not buffers, so that casting the model leaves them in float32.
        self._fixed_features = {}
        self.post_init()

    def _features(self, device):
        if device not in self._fixed_features:
            # Kept for later calls, so they must be normal tensors even if the first call is made in inference mode:
            # inference tensors cannot take part in training.
            with torch.inference_mode(False):
                self._fixed_features[device] = self._compute_features(device)
        return self._fixed_features[device]

    def _compute_features(self, device):
        config = self.config
        features = {}
        for name, size in (("token", config.mask_size), ("patch", config.decoder_grid_size)):
            p = _grid(size)
            phase = p @ _wave_vectors(config.num_position_waves, config.position_wavelengths, config.scene_size).T
            features[name] = torch.cat([p, _quadratics(p), phase.cos(), phase.sin()], dim=-1)
        p = _grid(config.mask_size)
        phase = p @ _moment_waves(config).T
        features["moment"] = torch.cat([p, _quadratics(p), phase.cos(), phase.sin()], dim=-1)
        features["grid"] = _grid(config.decoder_grid_size)
        features["waves"] = _wave_vectors(config.num_decoder_waves, config.decoder_wavelengths, config.scene_size)
        return {name: value.to(device) for name, value in features.items()}

    def forward(
        self,
        pixel_values: torch.Tensor,
        *,
        return_loss: bool = False,
        target_pixel_values: torch.Tensor | None = None,
        chunk_size: int = 64,
        **kwargs,
    ) -> ColorIsaOutput:
        """
        Args:
            pixel_values: float [B, T, 3, H, W] or [B, 3, H, W], RGB in [0, 1], H = W = image_size (what
                [`ColorIsaImageProcessor`] returns).
            return_loss: also draw the frames and return the (self-supervised) losses.
            target_pixel_values: what is to be drawn, for the loss, when it is not the input itself: the same scenes in
                the style to be learned. Slots then leave out the style of the input.
            chunk_size: frames encoded at once when no gradient is needed, which bounds memory.

        Returns:
            [`ColorIsaOutput`] with slots [B, (T,) N, D] and attention masks [B, (T,) N, H', W'].

        Raises:
            ValueError: wrong shape, channel order, dtype or range, or NaN.
        """
        if kwargs.keys() - {"return_dict", "output_attentions", "output_hidden_states"}:
            raise ValueError(
                f"Unexpected inputs {sorted(kwargs)}; ColorIsaModel takes pixel_values, return_loss and chunk_size."
            )
        self._check_pixels(pixel_values)
        frames = pixel_values.flatten(0, -4)
        leading, size = pixel_values.shape[:-3], self.config.mask_size
        if return_loss or torch.is_grad_enabled():
            position, content, masks = self._encode(frames)
        else:
            parts = [self._encode(chunk) for chunk in frames.split(chunk_size)]
            position, content, masks = (torch.cat(part) for part in zip(*parts))
        slots = self._to_latent(position, content)
        output = ColorIsaOutput(
            slots=slots.view(*leading, *slots.shape[1:]), masks=masks.view(*leading, -1, size, size).to(slots.dtype)
        )
        if return_loss:
            targets = frames
            if target_pixel_values is not None:
                self._check_pixels(target_pixel_values)
                if target_pixel_values.shape != pixel_values.shape:
                    raise ValueError(
                        f"target_pixel_values has shape {tuple(target_pixel_values.shape)}; expected that of "
                        f"pixel_values, {tuple(pixel_values.shape)}."
                    )
                targets = target_pixel_values.flatten(0, -4)
            output = self._add_losses(output, frames, targets, position, content, masks)
        return output

    def grid_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What is known of every place before slots sum it up: frames [B, 3, H, W] in [0, 1] -> [B, stem_channels +
        num_slots, H', W'], the features of the convolution and the attention masks of the last round.
        """
        self._check_pixels(pixel_values)
        size = self.config.mask_size
        features = F.relu(self.encoder.stem(1 - pixel_values.to(self.dtype)))
        masks = self._encode(pixel_values)[2].to(features.dtype)
        return torch.cat([features, masks.unflatten(2, (size, size))], dim=1)

    def decode(self, slots: torch.Tensor, *, slot_indices=None, chunk_size: int = 64) -> ColorIsaDecoderOutput:
        """
        Draw slots, observed or imagined.

        Args:
            slots: [..., N, D] in the planning latent.
            slot_indices: which slots these are, N increasing numbers in [0, num_slots) (default: all, in order). Leave
                objects out to draw a scene without them; keep 0, the background, or objects fill the whole picture.
            chunk_size: scenes drawn at once when no gradient is needed.

        Returns:
            [`ColorIsaDecoderOutput`]: reconstruction [..., 3, H, W] RGB in [0, 1], masks [..., N, H, W].
        """
        indices = list(range(self.config.num_slots)) if slot_indices is None else [int(i) for i in slot_indices]
        if indices != sorted(set(indices)) or not all(0 <= i < self.config.num_slots for i in indices):
            raise ValueError(
                f"slot_indices={indices} must be increasing numbers from 0 to {self.config.num_slots - 1}."
            )
        self._check_slots(slots)
        if slots.shape[-2] != len(indices):
            raise ValueError(
                f"Got {slots.shape[-2]} slots of shape {tuple(slots.shape)} for slots {indices}. Say with slot_indices "
                "which of the model's slots they are."
            )
        leading = slots.shape[:-2]
        position, content = self.split_slots(slots.reshape(-1, *slots.shape[-2:]))
        step = len(position) if torch.is_grad_enabled() else chunk_size
        parts = [
            self._decode(p, c, indices) for p, c in zip(position.split(max(step, 1)), content.split(max(step, 1)))
        ]
        image, masks = (self._from_patches(torch.cat(part)) for part in zip(*parts))
        return ColorIsaDecoderOutput(
            reconstruction=(1 - image).clamp(0, 1).to(slots.dtype).view(*leading, *image.shape[1:]),
            masks=masks.to(slots.dtype).view(*leading, *masks.shape[1:]),
        )

    def positions(self, slots: torch.Tensor) -> torch.Tensor:
        """Where slots [..., N, D] are: [..., N, 2] x (right) and y (down) in scene units, 0 to scene_size.

        The point is near the middle of the object's visible area. The background is always in the middle.
        """
        position, _ = self.split_slots(slots)
        return ((position + 1) * (self.config.scene_size / 2)).to(slots.dtype)

    def split_slots(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots [..., N, D] -> positions [..., N, 2] in half image widths from the middle, and contents
        [..., N, D - 2], as the decoder takes them (float32, not scaled).

        The first two numbers of the content are the orientation, a vector that turns with the object and is shorter
        the less it matters: near 0 for a disk.
        """
        self._check_slots(slots)
        with torch.autocast(slots.device.type, enabled=False):
            scaled = slots.float() @ self.rotation.float().T
        return scaled[..., :2] / self.config.position_scale, scaled[..., 2:] / self.content_scale.float()

    def set_scene(self, colors: torch.Tensor, background: torch.Tensor):
        """Start values from the data: colors [N, 3] and background [3, H, W], RGB in [0, 1]."""
        with torch.no_grad():
            self.colors.copy_(1 - colors)
            self.background.copy_(1 - background)

    def set_content_scale(self, scale: float):
        """Weight of the content against positions in the planning latent; changes every slot the model returns."""
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"content scale {scale} must be positive and finite.")
        self.content_scale.fill_(scale)

    def _encode(self, frames):
        features = self._features(frames.device)
        return self.encoder(frames, features["token"], features["moment"])

    def _decode(self, position, content, indices):
        """-> darkness [B, 3, G, P] and masks [B, N, G, P], pixels in patches."""
        features = self._features(position.device)
        logits, shade = self.decoder(
            position, content, indices[:1] == [0], features["grid"], features["waves"], features["patch"]
        )
        masks = logits.softmax(dim=1)
        colors, shades = self.colors[indices].float(), self.shades[indices].float()
        with torch.autocast(masks.device.type, enabled=False):
            mixture, shape = torch.cat([masks, masks * shade], dim=1), masks.shape[2:]
            image = torch.cat([colors, shades]).T @ mixture.flatten(2)
        return image.view(-1, 3, *shape), masks

    def _to_patches(self, images):
        """[B, C, H, W] -> [B, C, G, P]."""
        side = self.config.decoder_grid_size
        patch = self.config.image_size // side
        images = images.view(*images.shape[:2], side, patch, side, patch).transpose(3, 4)
        return images.reshape(*images.shape[:2], side * side, patch * patch)

    def _from_patches(self, patches):
        """[B, C, G, P] -> [B, C, H, W]."""
        side, size = self.config.decoder_grid_size, self.config.image_size
        patches = patches.view(*patches.shape[:2], side, side, size // side, size // side).transpose(3, 4)
        return patches.reshape(*patches.shape[:2], size, size)

    def _to_latent(self, position, content):
        scaled = torch.cat([self.config.position_scale * position, self.content_scale.float() * content], dim=-1)
        with torch.autocast(scaled.device.type, enabled=False):
            return (scaled @ self.rotation.float()).to(self.dtype)

    def _add_losses(self, output, frames, targets, position, content, masks):
        config = self.config

        def darkness_and_weight(images):
            darkness = 1 - images.float()
            differs = (darkness - self.background.float()).abs().amax(dim=1, keepdim=True)
            return darkness, 1 + config.foreground_weight * (differs > config.foreground_threshold).float()

        darkness, weight = darkness_and_weight(targets)
        noisy = content + config.content_noise * torch.randn_like(content) if self.training else content
        image, _ = self._decode(position, noisy, list(range(config.num_slots)))
        error = image - self._to_patches(darkness)
        output.reconstruction_loss = (self._to_patches(weight) * error.square()).mean()
        if targets is not frames:
            darkness, weight = darkness_and_weight(frames)
        pooled = F.avg_pool2d(darkness, config.stem_stride).flatten(2)
        weight = F.avg_pool2d(weight, config.stem_stride).flatten(2)
        # The background paints the empty scene: with one color for it, objects would have to paint what is drawn there.
        empty = F.avg_pool2d(self.background.float(), config.stem_stride).flatten(1)
        recolored = self.colors[1:].float().T @ masks[:, 1:] + empty * masks[:, :1]
        output.color_loss = (weight * (recolored - pooled).square()).mean()
        output.content_loss = content.square().sum(dim=-1).mean()
        output.loss = (
            output.reconstruction_loss
            + config.color_loss_weight * output.color_loss
            + config.content_loss_weight * output.content_loss
        )
        return output

    def _check_pixels(self, pixel_values):
        size = self.config.image_size
        check_pixel_values(pixel_values, size, "ColorIsaImageProcessor", "RGB in [0, 1]", -0.01, 1.01, images=True)

    def _check_slots(self, slots):
        if slots.dim() < 2 or slots.shape[-1] != self.config.slot_size:
            raise ValueError(f"slots have shape {tuple(slots.shape)}; expected [..., N, {self.config.slot_size}].")


__all__ = ["ColorIsaDecoderOutput", "ColorIsaModel", "ColorIsaOutput", "ColorIsaPreTrainedModel"]
