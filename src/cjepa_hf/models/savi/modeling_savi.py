"""Stochastic SAVi (Kipf et al. 2022, arXiv 2111.12594, in the form of SlotFormer, Wu et al. 2023, arXiv 2210.05861).

A small convolutional encoder, slot attention that is carried from frame to frame, and a decoder that draws every slot
alone and mixes the pictures by their masks. Slots do not start from the last frame's slots but from "kernels" drawn
around their prediction, which keeps slots from freezing on one object. Numbers equal those of the released code; so do
the names of the parameters.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..cjepa.modeling_cjepa import SafePreTrainedModel
from ..images import check_pixel_values
from .configuration_savi import SaviConfig


@dataclass
class SaviState(ModelOutput):
    """
    What a video carries from its last frame to the next: `model(later_frames, state=output.state)`.

    Args:
        slots (`torch.Tensor` of shape `[B, N, D]`): Slots of the last frame.
        memory (`torch.Tensor` of shape `[2, B, N, 2 D]`, *optional*): State of the predictor's LSTM, if it has one.
        generator_states (`torch.Tensor` of shape `[B, S]`, uint8, *optional*): Of the videos' own generators, where
            `seeds` were given.
    """

    slots: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    generator_states: torch.Tensor | None = None


@dataclass
class SaviOutput(ModelOutput):
    """
    Output of [`SaviModel`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Sum of the weighted losses, with `return_loss=True`.
        reconstruction_loss (`torch.Tensor` of shape `()`, *optional*): Mean squared error of the drawn frames.
        kernel_loss (`torch.Tensor` of shape `()`, *optional*): Kullback-Leibler divergence of the kernels' variances
            from the prior's, summed over D, mean over the rest; None without a prior.
        slots (`torch.Tensor` of shape `[B, T, N, D]`): Slots after the attention.
        masks (`torch.Tensor` of shape `[B, T, N, H', W']`): Attention of the last round, H' = W' = image_size /
            encoder_stride; they sum to 1 over slots. `decode(slots).masks` are the masks the frames are drawn with.
        kernels (`torch.Tensor` of shape `[B, T, N, 2 D]`): Means and logarithms of the variances of the kernels.
        reconstruction (`torch.Tensor` of shape `[B, T, 3, H, W]`, *optional*): The drawn frames, in the scale of
            `pixel_values`, with `return_loss=True`.
        decoder_masks (`torch.Tensor` of shape `[B, T, N, H, W]`, *optional*): With `return_loss=True`.
        state (`SaviState`): For the next frames of the same videos.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    kernel_loss: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    kernels: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    decoder_masks: torch.Tensor | None = None
    state: SaviState | None = None


@dataclass
class SaviDecoderOutput(ModelOutput):
    """
    Output of [`SaviModel.decode`].

    Args:
        reconstruction (`torch.Tensor` of shape `[..., 3, H, W]`): The drawn image, in the scale of `pixel_values`.
        masks (`torch.Tensor` of shape `[..., N, H, W]`): Which slot drew each pixel; they sum to 1 over slots.
        images (`torch.Tensor` of shape `[..., N, 3, H, W]`): Every slot's own picture, before the masks.
    """

    reconstruction: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    images: torch.Tensor | None = None


class SaviPositionEmbedding(nn.Module):
    """Adds a linear function of (y, x, 1 - y, 1 - x), each from 0 to 1, to a grid [B, C, H, W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.dense = nn.Linear(4, channels)

    def forward(self, x):
        weight = self.dense.weight
        line = (torch.linspace(0, 1, size, device=x.device, dtype=weight.dtype) for size in x.shape[-2:])
        grid = torch.stack(torch.meshgrid(*line, indexing="ij"), dim=-1)
        return x + self.dense(torch.cat([grid, 1 - grid], dim=-1)).permute(2, 0, 1)


class SaviSlotAttention(nn.Module):
    """Slot attention: tokens choose among the slots, every slot looks at what it was given.

    The recurrent cell continues the slots as they are (VideoSAUR's continues the normalized ones).
    """

    def __init__(self, input_size: int, slot_size: int, mlp_size: int, num_iterations: int, eps: float):
        super().__init__()
        self.num_iterations, self.eps, self.scale = num_iterations, eps, slot_size**-0.5
        self.norm_inputs = nn.LayerNorm(input_size)
        self.project_q = nn.Sequential(nn.LayerNorm(slot_size), nn.Linear(slot_size, slot_size, bias=False))
        self.project_k = nn.Linear(input_size, slot_size, bias=False)
        self.project_v = nn.Linear(input_size, slot_size, bias=False)
        self.gru = nn.GRUCell(slot_size, slot_size)
        self.mlp = nn.Sequential(
            nn.LayerNorm(slot_size), nn.Linear(slot_size, mlp_size), nn.ReLU(), nn.Linear(mlp_size, slot_size)
        )

    def project(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [..., P, C] -> keys and values [..., P, D]."""
        inputs = self.norm_inputs(inputs)
        return self.project_k(inputs), self.project_v(inputs)

    def forward(
        self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, P, D], slots [B, N, D] -> slots [B, N, D] and attention [B, N, P]."""
        for _ in range(self.num_iterations):
            attention = (self.project_q(slots) * self.scale @ keys.mT).softmax(dim=1)
            weights = attention + self.eps
            weights = weights / weights.sum(dim=-1, keepdim=True)
            updates = weights @ values
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(updates)
            slots = slots + self.mlp(slots)
        return slots, attention


class SaviMlpPredictor(nn.Module):
    """Every slot alone; see `SaviConfig.predictor_norm_first`."""

    def __init__(self, config: SaviConfig):
        super().__init__()
        size = config.slot_size
        self.norm_first = config.predictor_norm_first
        self.ln = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.ReLU(), nn.Linear(2 * size, size))

    def forward(self, slots):
        normed = self.ln(slots)
        return self.mlp(normed) + (normed if self.norm_first else slots)


class SaviTransformerPredictor(nn.Module):
    """Slots look at each other."""

    def __init__(self, config: SaviConfig):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            config.slot_size,
            config.predictor_num_heads,
            config.predictor_ffn_size,
            config.predictor_dropout,
            norm_first=config.predictor_norm_first,
            batch_first=True,
        )
        self.transformer_encoder = nn.TransformerEncoder(
            layer, config.predictor_num_layers, enable_nested_tensor=False
        )

    def forward(self, slots):
        return self.transformer_encoder(slots)


class SaviRnnPredictor(nn.Module):
    """Another predictor with an LSTM per slot behind it, which remembers the frames before."""

    def __init__(self, config: SaviConfig, base_predictor: nn.Module):
        super().__init__()
        self.base_predictor = base_predictor
        self.rnn = nn.LSTM(config.slot_size, 2 * config.slot_size)
        self.out_projector = nn.Linear(2 * config.slot_size, config.slot_size)

    def forward(self, slots, memory):
        """Slots [B, N, D] and memory [2, B, N, 2 D] or None -> prediction [B, N, D] and memory."""
        shape = slots.shape
        hidden = None if memory is None else tuple(part.reshape(1, shape[0] * shape[1], -1) for part in memory)
        out, hidden = self.rnn(self.base_predictor(slots).reshape(1, -1, shape[-1]), hidden)
        return self.out_projector(out).view(shape), torch.cat(hidden).view(2, *shape[:2], -1)


class SaviPreTrainedModel(SafePreTrainedModel):
    config: SaviConfig
    base_model_prefix = "savi"
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    supports_gradient_checkpointing = False
    memoryless = False  # slots go on from those of the frame before
    slots_keep_roles = (
        False  # a slot stays with its object inside a video; which object that is differs between videos
    )

    @torch.no_grad()
    def _init_weights(self, module):
        # torch's own start values, which the original trains from (transformers' are far smaller)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.GRUCell | nn.LSTM):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, SaviModel):
            init.normal_(module.init_latents)


class SaviModel(SaviPreTrainedModel):
    r"""
    Stochastic SAVi slot encoder and decoder (model type `"savi"`).

    ```python
    processor = SaviImageProcessor.from_pretrained(folder)
    model = SaviModel.from_pretrained(folder)
    pixel_values = processor([frames]).pixel_values          # [1, T, 3, 64, 64] for frames [T, H, W, 3]
    slots = model(pixel_values, seeds=[0]).slots             # [1, T, N, D]
    model.decode(slots).masks                                # [1, T, N, 64, 64]
    ```
    """

    def __init__(self, config: SaviConfig):
        super().__init__(config)
        size, hidden = config.slot_size, config.encoder_channels[-1]
        self.init_latents = nn.Parameter(torch.empty(1, config.num_slots, size))
        if config.kernel_mlp:
            self.kernel_dist_layer = nn.Sequential(
                nn.Linear(size, 2 * size), nn.LayerNorm(2 * size), nn.ReLU(), nn.Linear(2 * size, 2 * size)
            )
        else:
            self.kernel_dist_layer = nn.Sequential(nn.Linear(size, 2 * size))
        self.slot_attention = SaviSlotAttention(
            size, size, config.slot_mlp_size, config.num_iterations, config.attention_eps
        )

        kernel, last = config.encoder_kernel_size, len(config.encoder_channels) - 1
        layers, channels = [], 3
        for index, out_channels in enumerate(config.encoder_channels):
            stride = config.encoder_stride if index == 0 else 1
            conv = nn.Conv2d(channels, out_channels, kernel, stride=stride, padding=kernel // 2)
            layers.append(nn.Sequential(conv, nn.Identity() if index == last else nn.ReLU()))
            channels = out_channels
        self.encoder = nn.Sequential(*layers)
        self.encoder_pos_embedding = SaviPositionEmbedding(hidden)
        self.encoder_out_layer = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, size), nn.ReLU(), nn.Linear(size, size)
        )

        kernel = config.decoder_kernel_size
        layers, channels = [], size
        for out_channels, stride in zip(config.decoder_channels, config.decoder_strides):
            deconv = nn.ConvTranspose2d(
                channels, out_channels, kernel, stride=stride, padding=kernel // 2, output_padding=stride - 1
            )
            layers.append(nn.Sequential(deconv, nn.ReLU()))
            channels = out_channels
        self.decoder = nn.Sequential(*layers, nn.Conv2d(channels, 4, 1))
        self.decoder_pos_embedding = SaviPositionEmbedding(size)

        predictor = {"mlp": SaviMlpPredictor, "transformer": SaviTransformerPredictor}[config.predictor_type](config)
        self.predictor = SaviRnnPredictor(config, predictor) if config.predictor_rnn else predictor
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        *,
        initial_slots: torch.Tensor | None = None,
        state: SaviState | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        sample: bool | None = None,
        return_loss: bool = False,
        chunk_size: int = 64,
        **kwargs,
    ) -> SaviOutput:
        """
        Args:
            pixel_values: float [B, T, 3, H, W], RGB in [-1, 1], H = W = image_size (what [`SaviImageProcessor`]
                returns for a list of clips).
            initial_slots: [B, N, D], what the first frame starts from instead of the learned start (its kernels are
                drawn around them).
            state: of the frames before, to go on with a video. A video in parts gives what it gives in one piece.
            seeds: one number per video. All that is random about a video then comes from a CPU generator of its own,
                so that its slots depend neither on the other videos of the batch nor on the device. Not needed, and
                not read, where `state` goes on with videos that had seeds.
            generator: where the noise comes from otherwise; default: torch's own.
            sample: draw the kernels at random, instead of taking their means; default: in training, and outside of it
                if `config.sample_in_eval`.
            return_loss: also draw the frames and return the losses.
            chunk_size: frames encoded (and drawn) at once when no gradient is needed, which bounds memory.

        Returns:
            [`SaviOutput`] with slots [B, T, N, D], masks [B, T, N, H', W'] and the state after the last frame.

        Raises:
            ValueError: wrong shape, channel order, dtype or range, NaN, or arguments that contradict each other.
        """
        if kwargs.keys() - {"return_dict", "output_attentions", "output_hidden_states"}:
            raise ValueError(
                f"Unexpected inputs {sorted(kwargs)}; SaviModel takes pixel_values, initial_slots, state, seeds, "
                "generator, sample, return_loss and chunk_size."
            )
        config = self.config
        check_pixel_values(pixel_values, self.config.image_size, "SaviImageProcessor", "RGB in [-1, 1]", -1.01, 1.01)
        batch = len(pixel_values)
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1.")
        if sample is None:
            sample = self.training or config.sample_in_eval
        sample = sample and config.kernel_prior_variance is not None
        latents, memory = self._start(initial_slots, state, batch)
        generators = self._generators(seeds, state, generator, batch)

        slots, masks, kernels = [], [], []
        for index, (keys, values) in enumerate(self._tokens(pixel_values, chunk_size)):
            if index > 0:
                latents, memory = self._predict(slots[-1], memory)
            distribution = self.kernel_dist_layer(latents)
            kernel, log_variance = distribution.chunk(2, dim=-1)
            if sample:
                noise = self._noise(kernel, generators, generator)
                kernel = kernel + noise * (0.5 * log_variance).exp()
            updated, attention = self.slot_attention(keys, values, kernel)
            slots.append(updated)
            masks.append(attention)
            kernels.append(distribution)
        states = None if generators is None else torch.stack([g.get_state() for g in generators])
        output = SaviOutput(
            slots=torch.stack(slots, dim=1),
            masks=torch.stack(masks, dim=1).unflatten(-1, (config.mask_size, config.mask_size)),
            kernels=torch.stack(kernels, dim=1),
            state=SaviState(slots=slots[-1], memory=memory, generator_states=states),
        )
        return self._add_losses(output, pixel_values, chunk_size) if return_loss else output

    def decode(self, slots: torch.Tensor, *, chunk_size: int = 64) -> SaviDecoderOutput:
        """
        Draw slots, observed or imagined. Any number of slots can be drawn together: leave some out to draw a scene
        without them.

        Args:
            slots: [..., N, D].
            chunk_size: scenes drawn at once when no gradient is needed.

        Returns:
            [`SaviDecoderOutput`]: reconstruction [..., 3, H, W], masks [..., N, H, W], images [..., N, 3, H, W].
        """
        config = self.config
        if slots.dim() < 2 or slots.shape[-1] != config.slot_size or 0 in slots.shape:
            raise ValueError(f"slots have shape {tuple(slots.shape)}; expected [..., N, {config.slot_size}].")
        leading, scenes = slots.shape[:-2], slots.reshape(-1, *slots.shape[-2:])
        step = len(scenes) if torch.is_grad_enabled() else max(1, chunk_size)
        parts = [self._decode(part) for part in scenes.split(step)]
        reconstruction, masks, images = (torch.cat(part) if len(parts) > 1 else part[0] for part in zip(*parts))
        return SaviDecoderOutput(
            reconstruction=reconstruction.view(*leading, *reconstruction.shape[1:]),
            masks=masks.view(*leading, *masks.shape[1:]),
            images=images.view(*leading, *images.shape[1:]),
        )

    def _decode(self, scenes):
        """[M, N, D] -> [M, 3, H, W], [M, N, H, W], [M, N, 3, H, W]."""
        grid = self.config.decoder_grid_size
        spread = scenes.flatten(0, 1)[:, :, None, None].expand(-1, -1, grid, grid)
        drawn = self.decoder(self.decoder_pos_embedding(spread)).unflatten(0, scenes.shape[:2])
        images, masks = drawn[:, :, :3], drawn[:, :, 3].softmax(dim=1)
        return (images * masks[:, :, None]).sum(dim=1), masks, images

    def _tokens(self, pixel_values, chunk_size) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [B, P, D] of one frame after the other; many frames go through the encoder together."""
        batch, length = pixel_values.shape[:2]
        step = length if torch.is_grad_enabled() else max(1, chunk_size // batch)
        for frames in pixel_values.split(step, dim=1):
            features = self.encoder_pos_embedding(self.encoder(frames.flatten(0, 1)))
            tokens = self.encoder_out_layer(features.flatten(2).mT)
            keys, values = self.slot_attention.project(tokens)
            yield from zip(*(part.unflatten(0, (batch, -1)).unbind(1) for part in (keys, values)))

    def _start(self, initial_slots, state, batch):
        """What the first frame starts from [B, N, D], and the LSTM's memory."""
        shape = (batch, self.config.num_slots, self.config.slot_size)
        if state is None:
            latents = self.init_latents.expand(batch, -1, -1) if initial_slots is None else initial_slots
            if latents.shape != shape:
                raise ValueError(f"initial_slots has shape {tuple(latents.shape)}; expected {shape}.")
            return latents.to(self.dtype), None
        if initial_slots is not None:
            raise ValueError(
                "initial_slots and state both given: state goes on with a video, initial_slots begin one."
            )
        if state.slots is None or state.slots.shape != shape:
            given = None if state.slots is None else tuple(state.slots.shape)
            raise ValueError(f"state.slots has shape {given}; expected {shape}, the state of the same videos.")
        return self._predict(state.slots.to(self.dtype), state.memory)

    def _predict(self, slots, memory):
        if isinstance(self.predictor, SaviRnnPredictor):
            return self.predictor(slots, memory)
        return self.predictor(slots), None

    def _generators(self, seeds, state, generator, batch) -> list[torch.Generator] | None:
        """The videos' own generators, if they have any."""
        states = None if state is None else state.generator_states
        if seeds is not None and generator is not None:
            raise ValueError("seeds and generator both given: pass one of them.")
        if states is not None:
            if len(states) != batch:
                raise ValueError(f"state holds {len(states)} generators for {batch} videos.")
            generators = [torch.Generator() for _ in range(batch)]
            for one, its_state in zip(generators, states):
                one.set_state(its_state.cpu().clone())  # torch reads a view from where its storage begins
            return generators
        if seeds is None:
            return None
        if len(seeds) != batch:
            raise ValueError(f"{len(seeds)} seeds for {batch} videos; expected one per video.")
        return [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    @staticmethod
    def _noise(like, generators, generator):
        """Standard normal numbers [B, N, D]. One draw per frame, so that parts of a video draw what the whole does."""
        if generators is not None:
            drawn = torch.stack([torch.randn(like.shape[1:], generator=one) for one in generators])
        else:
            device = like.device if generator is None else generator.device
            drawn = torch.randn(like.shape, generator=generator, device=device)
        return drawn.to(like.device, like.dtype)

    def _add_losses(self, output, pixel_values, chunk_size):
        config = self.config
        drawn = self.decode(output.slots, chunk_size=chunk_size)
        output.reconstruction, output.decoder_masks = drawn.reconstruction, drawn.masks
        output.reconstruction_loss = F.mse_loss(drawn.reconstruction.float(), pixel_values.float())
        output.loss = config.reconstruction_loss_weight * output.reconstruction_loss
        if config.kernel_prior_variance is not None:
            # of normal distributions with the same means: the prior has no say in where the kernels are
            log_ratio = output.kernels.chunk(2, dim=-1)[1].float() - torch.tensor(config.kernel_prior_variance).log()
            output.kernel_loss = (0.5 * (log_ratio.exp() - log_ratio - 1)).sum(dim=-1).mean()
            output.loss = output.loss + config.kernel_loss_weight * output.kernel_loss
        return output


__all__ = ["SaviDecoderOutput", "SaviModel", "SaviOutput", "SaviPreTrainedModel", "SaviState"]
