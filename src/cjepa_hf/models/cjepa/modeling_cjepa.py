"""C-JEPA: a masked predictor of object slots (Causal-JEPA, arXiv 2602.11389, section 3).

Axes are named once: B batch, S plan samples, T observed frames, P predicted frames, N slots, D slot size, M tokens per
frame (slots, then proprioception, then action), H heads, E embedding size of an auxiliary.
"""

import functools
import itertools
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, cached_file, extract_commit_hash
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_cjepa import CJepaConfig


@dataclass
class CJepaOutput(ModelOutput):
    """
    Output of [`CJepaModel.forward`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `future_slots`): future_loss + weight *
            history_loss + proprio_loss.
        history_loss, future_loss, proprio_loss (`torch.Tensor` of shape `()`, *optional*): The terms, unweighted.
        predicted_slots (`torch.Tensor` of shape `(B, T + P, N, D)`): Output at every token; only hidden and future
            tokens are trained.
        predicted_proprio_embeddings (`torch.Tensor` of shape `(B, T + P, E)`, *optional*).
        slot_mask (`torch.BoolTensor` of shape `(B, T, N)`, *optional*): What was hidden (True), `None` if nothing.
        hidden_states (`tuple(torch.Tensor)`, *optional*): Input of every layer and the output of the last, each
            `(B, (T + P) * M, hidden_size)`, time-major.
        attentions (`tuple(torch.Tensor)`, *optional*): Per layer `(B, H, (T + P) * M, (T + P) * M)`.
    """

    loss: torch.Tensor | None = None
    history_loss: torch.Tensor | None = None
    future_loss: torch.Tensor | None = None
    proprio_loss: torch.Tensor | None = None
    predicted_slots: torch.Tensor | None = None
    predicted_proprio_embeddings: torch.Tensor | None = None
    slot_mask: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class CJepaRolloutOutput(ModelOutput):
    """
    Output of [`CJepaModel.rollout`].

    Args:
        slots (`torch.Tensor` of shape `(B, K, N, D)` or `(B, S, K, N, D)`): The imagined frames.
        proprio_embeddings (`torch.Tensor` of shape `(B, K, E)` or `(B, S, K, E)`, *optional*).
    """

    slots: torch.Tensor | None = None
    proprio_embeddings: torch.Tensor | None = None


# ------------------------------------------------------------------------------------------------- slot assignment


@functools.lru_cache(maxsize=32)
def _assignment_tables(n: int) -> list[tuple[list[int], list[list[int]], list[list[int]]]]:
    """Subsets of columns by size: (bit masks, columns in each, index of the subset without that column)."""
    levels, index = [], {0: 0}
    for size in range(1, n + 1):
        subsets = [sum(1 << c for c in columns) for columns in itertools.combinations(range(n), size)]
        columns = [[c for c in range(n) if mask >> c & 1] for mask in subsets]
        without = [[index[mask & ~(1 << c)] for c in cols] for mask, cols in zip(subsets, columns)]
        levels.append((subsets, columns, without))
        index = {mask: position for position, mask in enumerate(subsets)}
    return levels


MAX_ASSIGNED_SLOTS = 16


def solve_assignment(cost: torch.Tensor) -> torch.Tensor:
    """
    Exact minimum-cost assignment, batched, by dynamic programming over subsets of columns.

    Args:
        cost (`torch.Tensor` of shape `(..., N, N)`): `cost[..., i, j]` of giving row i column j; N up to 16.

    Returns:
        `torch.LongTensor` of shape `(..., N)`: the column of every row.
    """
    n = cost.shape[-1]
    if cost.shape[-2] != n:
        raise ValueError(f"cost has shape {tuple(cost.shape)}: expected a square matrix in the last two axes.")
    if n > MAX_ASSIGNED_SLOTS:
        raise ValueError(f"{n} slots: exact batched assignment takes at most {MAX_ASSIGNED_SLOTS}.")
    batch = cost.shape[:-2]
    cost = cost.detach().reshape(-1, n, n)
    best = cost.new_zeros(cost.shape[0], 1)
    choices = []
    # After row i, best[:, s] is the cheapest way to give rows 0..i the columns of subset s (|s| = i + 1).
    for row, (_, columns, without) in enumerate(_assignment_tables(n)):
        columns = torch.tensor(columns, device=cost.device)
        total = best[:, torch.tensor(without, device=cost.device)] + cost[:, row][:, columns]
        best, choice = total.min(dim=-1)
        choices.append(choice)
    result = torch.empty(cost.shape[0], n, dtype=torch.long, device=cost.device)
    subset = torch.zeros(cost.shape[0], 1, dtype=torch.long, device=cost.device)
    for row in range(n - 1, -1, -1):
        _, columns, without = _assignment_tables(n)[row]
        choice = choices[row].gather(1, subset)
        result[:, row] = torch.tensor(columns, device=cost.device)[subset, choice].squeeze(1)
        subset = torch.tensor(without, device=cost.device)[subset, choice]
    return result.reshape(*batch, n)


def assign_slots(slots: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """
    Order of `slots` that matches `reference` with the least squared error (exact, batched, no gradient).

    Args:
        slots (`torch.Tensor` of shape `(..., N, D)`): Slots to reorder.
        reference (`torch.Tensor` of shape `(..., N, D)`): Slots that set the order; leading axes broadcast.

    Returns:
        `torch.LongTensor` of shape `(..., N)`: `slots[order[i]]` belongs to `reference[i]`; apply it with
        [`reorder_slots`].
    """
    if slots.shape[-2:] != reference.shape[-2:]:
        raise ValueError(f"slots {tuple(slots.shape)} and reference {tuple(reference.shape)} differ in (N, D).")
    slots, reference = slots.detach().float(), reference.detach().float()
    cost = (reference.unsqueeze(-2) - slots.unsqueeze(-3)).square().sum(-1)  # rows: reference, columns: slots
    return solve_assignment(cost)


def reorder_slots(slots: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`slots` [..., N, D] in the order [..., N] that [`assign_slots`] returned."""
    return slots.gather(-2, order.unsqueeze(-1).expand(*order.shape, slots.shape[-1]))


# ---------------------------------------------------------------------------------------------------- transformer


def fast_dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """
    Dropout. On a CPU PyTorch draws one Bernoulli number after the other, half of a training step at the paper's size; 16 of
    NumPy's random bits for every number decide the same (p to within 1 / 65536) many times as fast. PyTorch's generator
    seeds them, so that `torch.manual_seed` and its saved states reproduce them.
    """
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    seed = int(torch.randint(2**63 - 1, ()))
    bits = np.random.SFC64(seed).random_raw((x.numel() + 3) // 4).view(np.int16)
    bits = torch.from_numpy(bits)[: x.numel()].view(x.shape)
    # All in 16-bit integers, which PyTorch vectorises, while it does not vectorise comparisons and casts from them: 0 or 1,
    # then the bits of 0 or of the scale, in x's type if it has 16 bits too.
    first_kept = min(max(round(p * 2**16), 1), 2**16 - 1) - 2**15
    scale = torch.tensor(1 / (1 - p), dtype=x.dtype if x.element_size() == 2 else torch.bfloat16)
    kept = bits.clamp_(first_kept - 1, first_kept).sub_(first_kept - 1).mul_(int(scale.view(torch.int16)))
    kept = kept.view(scale.dtype)
    return x * kept if x.dtype == kept.dtype else x * kept.to(x.dtype).mul_(1 / (1 - p) / float(scale))


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention that also returns its weights; query, key, value are [B, H, L, head_dim]."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = fast_dropout(weights, dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


# exp of anything up to here, summed over all tokens, is far from the limits of float32 on both sides
MAX_EXPONENT = 60.0


@torch.autocast("cpu", enabled=False)
def cpu_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float = 0.0):
    """
    Attention of query [heads, Lq, head_dim], key and value [heads, L, head_dim] by plain products, in float32 whatever their
    type: with tens of tokens and heads of width 8, PyTorch's fused kernel takes about twice as long in inference and more in
    training, and so do products and softmax in bfloat16.
    """
    query, key = query.float(), key.float()
    scores = torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=scaling)
    if not _small_exponents(scores):
        return torch.bmm(fast_dropout(scores.softmax(dim=-1), dropout, True), value.float())
    # Softmax reduces short rows, which is slow here. With the sums of the exponentials as one more column of the
    # product, attention takes three quarters of the time.
    values = key.new_ones(*value.shape[:2], value.shape[2] + 1)
    values[..., :-1] = value
    output = torch.bmm(scores.exp_(), values)
    return output[..., :-1] / output[..., -1:]


# Types as wide as a whole head, by its bytes: with them, one element moves where a loop over a few would.
_HEAD_TYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def _wide_type(x: torch.Tensor, head_dim: int) -> torch.dtype | None:
    """A type to move heads of `x` in, or None: gradients do not pass through a view in another type."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return _HEAD_TYPES.get(head_dim * x.element_size())


def _heads_first(parts: torch.Tensor, num_heads: int, head_dim: int) -> torch.Tensor:
    """K tensors side by side, [B, L, K * num_heads * head_dim], as [K, B * num_heads, L, head_dim]."""
    batch, length, wide = *parts.shape[:2], _wide_type(parts, head_dim)
    if wide is None:
        return parts.view(batch, length, -1, num_heads, head_dim).permute(2, 0, 3, 1, 4).flatten(1, 2).contiguous()
    heads = parts.view(wide).view(batch, length, -1, num_heads).permute(2, 0, 3, 1).contiguous()
    return heads.view(parts.dtype).view(-1, batch * num_heads, length, head_dim)


def _tokens_first(heads: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B * num_heads, L, head_dim] as [B, L, num_heads * head_dim]: undoes [`_heads_first`] of one tensor."""
    length, head_dim = heads.shape[1:]
    wide = _wide_type(heads, head_dim)
    if wide is None:
        return heads.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)
    tokens = heads.contiguous().view(wide).view(-1, num_heads, length).transpose(1, 2).contiguous()
    return tokens.view(heads.dtype)


def _small_exponents(scores: torch.Tensor) -> bool:
    """Whether softmax needs no maximum taken off, where that can be asked and no gradient is needed."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    low, high = scores.aminmax()
    return bool(torch.maximum(-low, high) < MAX_EXPONENT)


def _read(states: torch.Tensor, read: int | torch.Tensor | None) -> torch.Tensor:
    """The states [B, L, ...] that are read: all (None), the last `read` of them, or those at the indices `read` [B, K]."""
    if read is None:
        return states
    if isinstance(read, int):
        return states[:, -read:]
    return states.gather(1, read.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


class CJepaAttention(nn.Module):
    """Multi-head attention over all tokens, bidirectional in time and over slots."""

    def __init__(self, config: CJepaConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, read: int | torch.Tensor | None = None):
        """States [B, L, hidden_size] -> those that are `read` (see [`_read`]), attended to all [B, K, hidden_size]."""
        batch, _, size = hidden_states.shape
        implementation = self.config._attn_implementation
        if read is None:
            parts = [self.qkv(hidden_states)]
        else:
            # The queries of what is read suffice, while keys and values come from everything.
            weight, bias = self.qkv.weight, self.qkv.bias
            query = F.linear(_read(hidden_states, read), weight[:size], bias[:size])
            parts = [query, F.linear(hidden_states, weight[size:], bias[size:])]
        dropout = self.config.attention_dropout if self.training else 0.0
        if implementation == "sdpa" and hidden_states.device.type == "cpu":
            heads = [x for part in parts for x in _heads_first(part, self.num_heads, self.head_dim)]
            output = cpu_attention(*heads, scaling=self.scaling, dropout=dropout).to(hidden_states.dtype)
            output = _tokens_first(output, self.num_heads)
            return self.out_proj(output), None
        heads = (batch, -1, self.num_heads, self.head_dim)
        query, key, value = (x.reshape(heads).transpose(1, 2) for part in parts for x in part.split(size, dim=-1))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention(
            self, query, key, value, None, dropout=dropout, scaling=self.scaling, is_causal=False
        )
        output = output.reshape(batch, -1, size).to(hidden_states.dtype)
        return self.out_proj(output), weights


@functools.cache
def _has_fused_gelu() -> bool:
    operators = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(operators, "_linear_pointwise")):
        return False
    return hasattr(operators, "_is_mkldnn_bf16_supported") and operators._is_mkldnn_bf16_supported()


def _fuses_gelu(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN's product with the GELU in it serves: apart, they pass over the widest activation twice more."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _has_fused_gelu()
    )


class CJepaMlp(nn.Module):
    """LayerNorm, Linear, GELU, Linear; the norm stands inside, as in the released code."""

    def __init__(self, config: CJepaConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.exact_gelu = config.hidden_act == "gelu"
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.norm(hidden_states)
        if self.exact_gelu and _fuses_gelu(hidden_states, self.fc1.weight):
            hidden_states = torch.ops.mkldnn._linear_pointwise(
                hidden_states, self.fc1.weight, self.fc1.bias, "gelu", [], "none"
            )
        else:
            hidden_states = self.activation(self.fc1(hidden_states))
        hidden_states = fast_dropout(hidden_states, self.dropout, self.training)
        return fast_dropout(self.fc2(hidden_states), self.dropout, self.training)


class CJepaLayer(GradientCheckpointingLayer):
    """x + attention(x), then x + mlp(x). Without `norm_first` nothing normalises the input of attention."""

    def __init__(self, config: CJepaConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.norm_first else nn.Identity()
        self.attention = CJepaAttention(config)
        self.mlp = CJepaMlp(config)

    def forward(self, hidden_states: torch.Tensor, read: int | torch.Tensor | None = None) -> torch.Tensor:
        attended, _ = self.attention(self.norm(hidden_states), read)
        hidden_states = _read(hidden_states, read) + attended
        return hidden_states + self.mlp(hidden_states)


def _indices(batch: int, length: int, read: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """
    Indices [B, K] along the tokens [B, L] of those that are `read` (bool [B, ...], L in all; None: every one), in order. K is
    the most of any sample; others get some that are not read as well.
    """
    if read is None:
        return torch.arange(length, device=device).expand(batch, -1)
    read = read.flatten(1)
    # 0 or 1 ranks as they stand: what is read first
    return read.byte().argsort(dim=1, descending=True, stable=True)[:, : int(read.sum(1).max())]


def _written(states: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`states` [B, L, size] with `values` [B, K, size] at the indices [B, K]."""
    return states.to(values.dtype).scatter(1, index.unsqueeze(-1).expand(-1, -1, states.shape[-1]), values)


class CJepaPredictor(nn.Module):
    """The masked predictor over tokens [B, T, M, hidden_size] of slots and auxiliaries (paper section 3.2)."""

    def __init__(self, config: CJepaConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.mask_token = nn.Parameter(torch.zeros(size))
        self.time_embedding = nn.Parameter(torch.zeros(config.history_length + config.prediction_length, size))
        self.anchor_projection = nn.Linear(size, size)
        if config.anchor == "last_visible":
            # How long ago the anchor was seen: without it, an old and a fresh anchor look alike.
            self.age_embedding = nn.Parameter(torch.zeros(config.history_length + config.prediction_length, size))
        if config.residual_prediction == "velocity":
            self.velocity_gain = nn.Parameter(torch.zeros(config.history_length + config.prediction_length))
            self.velocity_map = nn.Linear(size, size, bias=False) if config.velocity_map else nn.Identity()
        self.layers = nn.ModuleList([CJepaLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.head = nn.Linear(size, size)

    def forward(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor | None,
        future_only: bool = False,
        read: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            tokens (`torch.Tensor` of shape `(B, T, M, hidden_size)`): Observed tokens, T up to history_length.
            hidden (`torch.BoolTensor` of shape `(B, T, M)`, *optional*): True where a token is hidden.
            future_only (`bool`): Return the P future frames alone, skipping what they do not need (nothing hidden).
            read (`torch.BoolTensor` of shape `(B, T + P, M)`, *optional*): With `hidden`, the tokens whose output is
                wanted, among them all that are hidden or future; the others may be 0, and what only they need is skipped.

        Returns:
            `torch.Tensor` of shape `(B, T + P, M, hidden_size)`, or `(B, P, M, hidden_size)`.
        """
        config = self.config
        batch, steps, width, size = tokens.shape
        horizon = config.prediction_length
        # Short histories are aligned to the right: the last observed frame always has the same time row.
        time = self.time_embedding[config.history_length - steps :].unsqueeze(1)  # [T + P, 1, size]
        visible = tokens + time[:steps]
        if hidden is None:
            anchors = tokens[:, :1] if config.anchor == "first" else tokens[:, -1:]
            queries = self.mask_token + time[steps:]
            if config.anchor == "last_visible":
                queries = queries + self.age_embedding[1 : horizon + 1].unsqueeze(1)
            states = torch.cat([visible, queries + self.anchor_projection(anchors)], dim=1).flatten(1, 2)
            wanted = horizon * width if future_only else None
            base = self._base(tokens, future_only)
        else:
            # Below, K is an axis of tokens of all frames and slots: those that are read (all, where nothing is said).
            index = _indices(batch, (steps + horizon) * width, read, tokens.device)
            frame, slot = index // width, index % width
            # seen[b, k]: the last observed frame, up to its own, in which the token of this slot was visible.
            observed = torch.arange(steps, device=tokens.device)[:, None]
            seen = torch.where(hidden, 0, observed).cummax(dim=1).values
            seen = torch.cat([seen, seen[:, -1:].expand(-1, horizon, -1)], dim=1).flatten(1).gather(1, index)
            source = seen * width + slot
            flat = tokens.flatten(1, 2)
            last = _read(flat, source)
            queries = self.mask_token + time.squeeze(1)[frame]
            if config.anchor == "first":
                queries = queries + _read(self.anchor_projection(tokens[:, 0]), slot)
            else:
                queries = queries + self.age_embedding[frame - seen] + self.anchor_projection(last)
            is_query = F.pad(hidden.flatten(1), (0, horizon * width), value=True).gather(1, index)
            states = torch.cat([visible, visible.new_zeros(batch, horizon, width, size)], dim=1).flatten(1, 2)
            queries = torch.where(is_query.unsqueeze(-1), queries, _read(states, index).to(queries.dtype))
            states = _written(states, index, queries)
            base = self._last_seen(flat, last, source, hidden.flatten(1), width, frame - seen)
            wanted = None if read is None else index

        for layer in self.layers[:-1]:
            states = layer(states)
        output = self.head(self.norm(self.layers[-1](states, wanted)))
        if config.residual_prediction is not None:
            output = output + base
        if hidden is not None and read is not None:
            output = _written(output.new_zeros(batch, (steps + horizon) * width, size), index, output)
        return output.unflatten(1, (-1, width))

    def _base(self, tokens: torch.Tensor, future_only: bool) -> torch.Tensor | None:
        """
        What residual prediction starts from [B, (T + P) * M, size] (or the P future frames) where nothing of `tokens`
        [B, T, M, size] is hidden: the last state, or its constant-velocity continuation.
        """
        if self.config.residual_prediction is None:
            return None
        observed, horizon = tokens[:, :0] if future_only else tokens, self.config.prediction_length
        future = tokens[:, -1:].expand(-1, horizon, -1, -1)
        if self.config.residual_prediction == "velocity" and tokens.shape[1] > 1:
            velocity = self._velocity(tokens[:, -1:] - tokens[:, -2:-1])
            future = future + self.velocity_gain[1 : horizon + 1, None, None] * velocity
        return torch.cat([observed, future], dim=1).flatten(1, 2)

    def _last_seen(self, tokens, last, source, hidden, width, age) -> torch.Tensor | None:
        """
        The same [B, K, size] for the tokens that are read, where some of the observed `tokens` [B, T * M, size] are `hidden`
        bool [B, T * M]: from `last` [B, K, size], the tokens at `source` [B, K], seen `age` [B, K] frames ago; `width` is M.
        """
        if self.config.residual_prediction != "velocity":
            return last
        # A velocity needs the frame before the last visible one to be visible too.
        before = (source - width).clamp(min=0)
        known = ~hidden.gather(1, before) & (source >= width)
        velocity = self._velocity(last - _read(tokens, before)) * known.unsqueeze(-1)
        return last + self.velocity_gain[age].unsqueeze(-1) * velocity

    def _velocity(self, change):
        """What goes on of a change between two frames; nothing of one by more than velocity_limit."""
        limit = self.config.velocity_limit
        if limit is not None:
            change = change * (change.square().mean(dim=-1, keepdim=True) <= limit**2)
        return self.velocity_map(change)


# ---------------------------------------------------------------------------------------------------------- model

_STATISTICS = ("action_mean", "action_std", "proprio_mean", "proprio_std")


class SafePreTrainedModel(PreTrainedModel):
    """Base of the models: weights come from safetensors alone, and what cannot be loaded says why and what helps."""

    # Arguments that give the files beside its weights: {"name": folder}, or those of a repository on the Hub; None if made here.
    loaded_from: dict | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, use_safetensors: bool | None = True, **kwargs):
        """
        As transformers', from safetensors alone: pickled weights are refused unless `use_safetensors=False`. Weights that
        lack a tensor of the model are refused too, where transformers would make it up and log that; with
        `output_loading_info=True` (model and report are returned) it is initialised, for training.

        Raises `OSError` where a model is missing, damaged, not whole or may not be read, `ConnectionError` (which is one)
        where its download broke off. `AutoModel` reads config.json before it calls this: errors of that file are
        transformers'.
        """
        name = pretrained_model_name_or_path
        with_report = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": use_safetensors, "output_loading_info": True}
        try:
            model, report = super().from_pretrained(name, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"the weights of {name} are cut off or damaged ({error}). Copy the folder again, or download it again with "
                "force_download=True; if that does not help, they are damaged where they were published."
            ) from error
        except Exception as error:
            cause = error.__cause__
            if use_safetensors and "use_safetensors=True" in str(error):  # transformers' advice is to allow pickles
                raise OSError(
                    f"{name} holds no model.safetensors. Weights that are pickles are refused, because loading them can run "
                    "any code: files of the paper's authors become safetensors by `cjepa-hf convert`, for others ask their "
                    "publisher."
                ) from error
            refused = isinstance(cause, HfHubHTTPError) and not isinstance(cause, RepositoryNotFoundError)
            if refused and cause.response.status_code in (401, 403):
                raise OSError(
                    f"the Hub does not accept the token for {name} ({cause.server_message}). Log in again (`hf auth "
                    "login`), or correct HF_TOKEN or token=; a public model needs none (token=False)."
                ) from error
            for broken in (error, cause):  # huggingface_hub's client, whose errors transformers may wrap
                if is_broken_connection(broken):
                    raise ConnectionError(
                        f"the download of {name} broke off ({type(broken).__name__}: {broken}). Call again: files that "
                        "arrived whole are kept."
                    ) from error
            raise
        model.loaded_from = _origin(name, kwargs)
        if with_report:
            return model, report
        if missing := sorted(report["missing_keys"]):
            raise OSError(
                f"the weights of {name} lack {len(missing)} tensors that a {cls.__name__} of this configuration needs, "
                f"{missing[0]} first: with made-up ones its results would mean nothing. Give the config.json and the weights "
                "that were saved together; output_loading_info=True returns the model all the same, to train it."
            )
        return model


def is_broken_connection(error: BaseException | None) -> bool:
    """Whether an error comes from the client that huggingface_hub talks to the Hub with; its errors have no base of their own."""
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests")


def _origin(name, kwargs) -> dict:
    """Where a model was loaded from, so that it is found again: an absolute path, or a repository at the very commit."""
    if Path(name).is_dir():
        return {"name": str(Path(name).resolve())}
    hub = {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if kwargs.get(key) is not None}
    revision = kwargs.get("revision")
    with suppress(OSError):  # asks nobody: the file has just been read
        config = cached_file(name, "config.json", revision=revision, **{**hub, "local_files_only": True})
        revision = extract_commit_hash(config, None) or revision
    return {"name": str(name), "revision": revision, **hub}


class SlotWorldModel(SafePreTrainedModel):
    """
    What world models of slots share, whatever their predictor: checked inputs, `predict` and `rollout`, the slot encoder
    they carry, and the statistics that lead to and from environment units. [`CJepaModel`] and `DinoWmModel` are two.

    A subclass names its `predictor_class`, a module `predictor(tokens [B, T, M, hidden_size], None, future_only=True) ->
    [B, P, M, hidden_size]`, and defines `forward`.
    """

    predictor_class: type[nn.Module]
    main_input_name = "slots"
    _keep_in_fp32_modules_strict = ["action_mean", "action_std", "proprio_mean", "proprio_std"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        self.predictor = self.predictor_class(config)
        if config.action_size:
            self.action_embedding = nn.Linear(config.action_size, config.action_embedding_size)
            self.register_buffer("action_mean", torch.full((config.action_size,), float("nan")))
            self.register_buffer("action_std", torch.full((config.action_size,), float("nan")))
        if config.proprio_size:
            self.proprio_embedding = nn.Linear(config.proprio_size, config.proprio_embedding_size)
            self.register_buffer("proprio_mean", torch.full((config.proprio_size,), float("nan")))
            self.register_buffer("proprio_std", torch.full((config.proprio_size,), float("nan")))
        self.slot_encoder = None
        if config.slot_encoder_config is not None:
            self.slot_encoder = AutoModel.from_config(config.slot_encoder_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SlotWorldModel):
            for name in _STATISTICS:
                buffer = getattr(module, name, None)
                if buffer is not None:
                    init.constant_(buffer, float("nan"))

    def _apply(self, fn, recurse=True):
        # Statistics stay in float32 whatever the model is cast to: rounded, they would shift every executed action.
        exact = {name: buffer for name, buffer in self._buffers.items() if name in _STATISTICS}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    @property
    def slots_keep_roles(self) -> bool:
        """Whether slot i is the same object in every scene, so that slots may be compared by their place in the set."""
        return bool(getattr(self.slot_encoder, "slots_keep_roles", False))

    # ------------------------------------------------------------------------------------------------- inputs

    def _checked(self, name: str, value, last: int, axes: str, ndim: int | tuple[int, ...]) -> torch.Tensor:
        """`value` in the model's dtype, after checks that name the argument."""
        ndim = (ndim,) if isinstance(ndim, int) else ndim
        if not last:
            raise ValueError(f"This model was built without {name}: leave {name} out.")
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is {type(value).__name__}: expected a torch.Tensor of shape {axes}.")
        if value.ndim not in ndim or value.shape[-1] != last:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {axes} with last axis {last}.")
        if not value.is_floating_point():
            raise ValueError(f"{name} has dtype {value.dtype}: expected floating point, convert it with .float().")
        # The sum is NaN or infinite if any entry is: one cheap pass instead of a full comparison.
        if not torch.compiler.is_compiling() and not torch.isfinite(value.detach().sum(dtype=torch.float32)):
            raise ValueError(
                f"{name} holds NaN or infinite values: replace them after normalising "
                "(`torch.nan_to_num(x, 0.0)` puts the mean there)."
            )
        return value.to(self.dtype)

    def _check_auxiliaries(self, actions, proprio, batch: int, steps: int | None):
        config = self.config
        for name, value, size in (("actions", actions, config.action_size), ("proprio", proprio, config.proprio_size)):
            if size and value is None:
                raise ValueError(f"This model was built with {name} of size {size}: pass {name}.")
            if value is not None and (value.shape[0] != batch or (steps is not None and value.shape[-2] != steps)):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}: expected batch {batch}"
                    + (f" and {steps} frames, one per frame of slots." if steps is not None else ".")
                )

    def _check_slots(self, slots, max_steps: int | None) -> torch.Tensor:
        slots = self._checked("slots", slots, self.config.slot_size, "(B, T, N, D)", 4)
        if slots.shape[1] < 1 or slots.shape[2] < 1:
            raise ValueError(f"slots has shape {tuple(slots.shape)}: at least one frame and one slot are needed.")
        if max_steps is not None and slots.shape[1] > max_steps:
            raise ValueError(
                f"slots has {slots.shape[1]} frames, but history_length={max_steps}: pass the last {max_steps} frames."
            )
        return slots

    def embed_proprio(self, proprio: torch.Tensor) -> torch.Tensor:
        """Embeds normalised proprioception [..., P] to [..., E]."""
        return self.proprio_embedding(proprio.to(self.dtype))

    def embed_actions(self, actions: torch.Tensor) -> torch.Tensor:
        """Embeds normalised action blocks [..., A] to [..., E]."""
        return self.action_embedding(actions.to(self.dtype))

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Slots [B, T, N, D] of frames [B, T, 3, H, W], by the slot encoder this checkpoint carries: in the units of that
        encoder's own image processor (which `AutoImageProcessor.from_pretrained` loads from the same folder).
        """
        if self.slot_encoder is None:
            raise ValueError(
                "This model carries no slot encoder (slot_encoder_config is None): encode the frames with the encoder "
                "it was trained with, or train with `--slot_encoder <folder>` to put one in."
            )
        if pixel_values.ndim != 5:
            raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}: expected (B, T, 3, H, W).")
        return self.slot_encoder(pixel_values).slots

    def _tokens(self, slots, actions, proprio) -> torch.Tensor:
        """[B, T, M, hidden_size]: slots, then proprioception, then action, as tokens or concatenated to every slot."""
        auxiliaries = []
        if self.config.proprio_size:
            auxiliaries.append(self.embed_proprio(proprio).unsqueeze(-2))
        if self.config.action_size:
            auxiliaries.append(self.embed_actions(actions).unsqueeze(-2))
        if self.config.auxiliary_fusion == "tokens":
            return torch.cat([slots, *auxiliaries], dim=-2)
        return torch.cat([slots, *(x.expand(*slots.shape[:-1], -1) for x in auxiliaries)], dim=-1)

    def _with_actions(self, tokens: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """`tokens` [B, T, M, hidden_size] with the action part replaced by `embedded` [B, T, E]."""
        if self.config.auxiliary_fusion == "tokens":
            return torch.cat([tokens[..., :-1, :], embedded.unsqueeze(-2)], dim=-2)
        size = embedded.shape[-1]
        embedded = embedded.unsqueeze(-2).expand(*tokens.shape[:-1], -1)
        return torch.cat([tokens[..., :-size], embedded], dim=-1)

    def _split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Slots [..., N, D] and proprioception embeddings [..., E] of tokens [..., M, hidden_size]."""
        config = self.config
        num_slots = tokens.shape[-2] - config.num_auxiliary_tokens
        slots = tokens[..., :num_slots, : config.slot_size]
        if not config.proprio_size:
            return slots, None
        if config.auxiliary_fusion == "tokens":
            return slots, tokens[..., num_slots, :]
        end = config.slot_size + config.proprio_embedding_size
        return slots, tokens[..., 0, config.slot_size : end]

    # ---------------------------------------------------------------------------------------------- inference

    def predict(
        self, slots: torch.Tensor, *, actions: torch.Tensor | None = None, proprio: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The next `prediction_length` frames of slots [B, P, N, D] after slots [B, T, N, D]; nothing is hidden."""
        slots = self._check_slots(slots, self.config.history_length)
        if actions is not None:
            actions = self._checked("actions", actions, self.config.action_size, "(B, T, A)", 3)
        if proprio is not None:
            proprio = self._checked("proprio", proprio, self.config.proprio_size, "(B, T, P)", 3)
        self._check_auxiliaries(actions, proprio, slots.shape[0], slots.shape[1])
        return self._split(self.predictor(self._tokens(slots, actions, proprio), None, future_only=True))[0]

    def rollout(
        self,
        slots: torch.Tensor,
        *,
        actions: torch.Tensor | None = None,
        proprio: torch.Tensor | None = None,
        num_steps: int | None = None,
        match_slots: bool = False,
        window_length: int | None = None,
    ) -> CJepaRolloutOutput:
        """
        Imagines `num_steps` = K frames, feeding predictions back (windows of at most `window_length` frames).

        Args:
            slots (`torch.Tensor` of shape `(B, T, N, D)`): Observed frames.
            actions (`torch.Tensor` of shape `(B, T + K - 1, A)` or `(B, S, T + K - 1, A)`, *optional*): Action k
                belongs to frame k, observed or imagined. With candidates the results have an S axis after B.
            proprio (`torch.Tensor` of shape `(B, T, P)`, *optional*): Of the observed frames; later ones are imagined.
            num_steps (`int`, *optional*): K; follows from `actions` when they are given.
            match_slots (`bool`): Keep the order of slots by optimal assignment to the frame before (the released
                planner does; needless for encoders whose slots keep their roles).
            window_length (`int`, *optional*): Frames the predictor sees at most; history_length by default.
        """
        config = self.config
        slots = self._check_slots(slots, None)
        batch, steps, num_slots, _ = slots.shape
        window = config.history_length if window_length is None else window_length
        if not 1 <= window <= config.history_length:
            raise ValueError(f"window_length={window} must lie in 1..history_length={config.history_length}.")
        num_samples = None
        if actions is not None:
            actions = self._checked("actions", actions, config.action_size, "(B, T + K - 1, A)", (3, 4))
            num_samples = actions.shape[1] if actions.ndim == 4 else None
            available = actions.shape[-2] - steps + 1
            if num_steps is None:
                num_steps = available
            if num_steps != available:
                raise ValueError(
                    f"actions has {actions.shape[-2]} steps: {steps} observed frames and num_steps={num_steps} need "
                    f"{steps + num_steps - 1}."
                )
        if proprio is not None:
            proprio = self._checked("proprio", proprio, config.proprio_size, "(B, T, P)", 3)
            if proprio.shape[1] != steps:
                raise ValueError(f"proprio has {proprio.shape[1]} frames: expected {steps}, one per frame of slots.")
        self._check_auxiliaries(actions, proprio, batch, None)
        if num_steps is None or num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: a rollout needs at least one step.")

        embedded = self.embed_actions(actions) if actions is not None else None
        observed = actions[..., :steps, :] if actions is not None and num_samples is None else None
        if num_samples is not None:
            # The scene is embedded once; every candidate then gets its own action on the observed frames.
            observed = actions.new_zeros(batch, steps, config.action_size)
        history = self._tokens(slots, observed, proprio)[:, -window:]
        if num_samples is not None:
            history = history.repeat_interleave(num_samples, dim=0)
            embedded = embedded.flatten(0, 1)
            history = self._with_actions(history, embedded[:, max(steps - window, 0) : steps])

        frames, done = [], 0
        while done < num_steps:
            predicted = self.predictor(history, None, future_only=True)[:, : num_steps - done]
            if match_slots:
                slot_part = (..., slice(num_slots), slice(config.slot_size))
                order = assign_slots(predicted[:, 0][slot_part], history[:, -1][slot_part])
                order = order.unsqueeze(1).expand(-1, predicted.shape[1], -1)
                reordered = reorder_slots(predicted[:, :, :num_slots], order)
                predicted = torch.cat([reordered, predicted[:, :, num_slots:]], dim=2)
            frames.append(predicted)
            done += predicted.shape[1]
            if done < num_steps:
                if embedded is not None:
                    start = steps + done - predicted.shape[1]
                    predicted = self._with_actions(predicted, embedded[:, start : start + predicted.shape[1]])
                history = torch.cat([history, predicted], dim=1)[:, -window:]
        imagined, proprio_embeddings = self._split(torch.cat(frames, dim=1))
        if num_samples is not None:
            imagined = imagined.unflatten(0, (batch, num_samples))
            if proprio_embeddings is not None:
                proprio_embeddings = proprio_embeddings.unflatten(0, (batch, num_samples))
        return CJepaRolloutOutput(slots=imagined, proprio_embeddings=proprio_embeddings)

    def token_loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean squared error per token [...] of [..., D]."""
        return (prediction.float() - target.detach().float()).square().mean(-1)

    # --------------------------------------------------------------------------------------------- statistics

    def set_statistics(self, **statistics) -> None:
        """Sets `action_mean`, `action_std` [action_size], `proprio_mean`, `proprio_std` [proprio_size] (raw units)."""
        for name, value in statistics.items():
            buffer = getattr(self, name, None) if name in _STATISTICS else None
            if buffer is None:
                raise ValueError(f"{name!r} is no statistic of this model: expected some of {_STATISTICS}.")
            value = torch.as_tensor(value, dtype=torch.float32)
            if value.shape != buffer.shape or not torch.isfinite(value).all():
                raise ValueError(f"{name}={value.tolist()}: expected {buffer.numel()} finite numbers.")
            if name.endswith("_std") and (value <= 0).any():
                raise ValueError(f"{name}={value.tolist()}: standard deviations must be positive.")
            buffer.copy_(value)

    def _statistics(self, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        mean = getattr(self, f"{kind}_mean", None)
        if mean is None:
            raise ValueError(f"This model was built without {kind}.")
        std = getattr(self, f"{kind}_std")
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise ValueError(
                f"This checkpoint has no {kind} statistics, so environment units cannot be converted: call "
                f"model.set_statistics({kind}_mean=..., {kind}_std=...) with those of its training data."
            )
        return mean.float(), std.float()

    def normalize_actions(self, actions: torch.Tensor) -> torch.Tensor:
        """Action blocks [..., A] from environment units to the units the model works in."""
        mean, std = self._statistics("action")
        return (actions - mean) / std

    def denormalize_actions(self, actions: torch.Tensor) -> torch.Tensor:
        """Action blocks [..., A] back to environment units."""
        mean, std = self._statistics("action")
        return actions * std + mean

    def normalize_proprio(self, proprio: torch.Tensor) -> torch.Tensor:
        """Proprioception [..., P] from environment units to the units the model works in."""
        mean, std = self._statistics("proprio")
        return (proprio - mean) / std


class CJepaModel(SlotWorldModel):
    """
    C-JEPA world model: predicts hidden and future object slots from visible ones, actions and proprioception.

    `forward`, `predict`, `rollout` and planners work in normalised units. The buffers `action_mean`, `action_std`
    [action_size] and `proprio_mean`, `proprio_std` [proprio_size] hold the training statistics (NaN: unknown).

    Example:

    ```python
    >>> import torch
    >>> from cjepa_hf import CJepaConfig, CJepaModel

    >>> model = CJepaModel(CJepaConfig(action_size=10, proprio_size=4)).eval()
    >>> slots, actions, proprio = torch.randn(2, 1, 4, 128), torch.randn(2, 300, 5, 10), torch.randn(2, 1, 4)
    >>> model.rollout(slots, actions=actions, proprio=proprio).slots.shape
    torch.Size([2, 300, 5, 4, 128])
    ```
    """

    config: CJepaConfig
    predictor_class = CJepaPredictor
    base_model_prefix = "cjepa"
    _no_split_modules = ["CJepaLayer"]
    _supports_flash_attn = True
    _supports_flex_attn = True
    _can_record_outputs = {"hidden_states": CJepaLayer, "attentions": CJepaAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, CJepaPredictor):
            init.trunc_normal_(module.mask_token, std=0.02)
            init.normal_(module.time_embedding, std=1.0)
            if hasattr(module, "age_embedding"):
                init.zeros_(module.age_embedding)
            if hasattr(module, "velocity_gain"):
                ages = torch.arange(len(module.velocity_gain), dtype=torch.float32)
                init.copy_(module.velocity_gain, ages.to(module.velocity_gain))
                if self.config.velocity_map:
                    init.eye_(module.velocity_map.weight)
                    module.velocity_map.weight._is_hf_initialized = True
            if self.config.residual_prediction is not None:
                # Starts as "nothing changes" (or constant velocity): the first step of training already predicts well.
                init.zeros_(module.head.weight)
                module.head.weight._is_hf_initialized = True

    # -------------------------------------------------------------------------------------------------- masks

    def draw_slot_mask(
        self, slots: torch.Tensor, generator: torch.Generator | None = None, moving: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Draws a training mask per sample as the configuration says (see `mask_strategy` in [`CJepaConfig`]).

        Args:
            slots (`torch.Tensor` of shape `(B, T, N, D)`): The observed window.
            moving (`torch.BoolTensor` of shape `(B, N)`, *optional*): Slots that may be hidden when
                `mask_static_slots=False`; by default those that change inside `slots`.

        Returns:
            `torch.BoolTensor` of shape `(B, T, N)`, True where hidden.
        """
        config = self.config
        batch, steps, num_slots, _ = slots.shape
        device = slots.device
        span = steps - config.visible_prefix
        mask = torch.zeros(batch, steps, num_slots, dtype=torch.bool, device=device)
        low, high = config.masked_slots_range
        if span <= 0 or high == 0:
            return mask
        if config.mask_static_slots:
            maskable = torch.ones(batch, num_slots, dtype=torch.bool, device=device)
        elif moving is not None:
            maskable = moving
        else:
            change = (slots - slots[:, :1]).float().square().mean(-1).sqrt().amax(dim=1)
            maskable = change > config.static_slot_tolerance

        # named only where there is one: with it, drawing cannot be compiled for dynamic shapes
        options = {"device": device} if generator is None else {"device": device, "generator": generator}

        def uniform(*shape):
            return torch.rand(*shape, **options)

        count = torch.randint(low, high + 1, (batch,), **options)
        count = torch.minimum(count, maskable.sum(-1))
        count = torch.where(uniform(batch) < config.mask_probability, count, 0)

        later = mask[:, config.visible_prefix :]  # a view: what is set below lands in `mask`
        if config.mask_strategy == "object":
            later |= (_ranks(uniform(batch, num_slots).masked_fill(~maskable, 2.0)) < count[:, None])[:, None]
        elif config.mask_strategy == "token":
            noise = uniform(batch, span, num_slots).masked_fill(~maskable[:, None], 2.0)
            later |= (_ranks(noise.flatten(1)) < (count * span)[:, None]).unflatten(1, (span, num_slots))
        else:
            frame = torch.arange(span, device=device)
            for tube in range(high):
                length = torch.randint(1, span + 1, (batch, 1), **options)
                start = (uniform(batch, 1) * (span - length + 1)).long()
                slot_rank = _ranks(uniform(batch, num_slots).masked_fill(~maskable, 2.0))
                # Fill span tokens in the order: inside the span, slot by slot; what does not fit spills next to it.
                outside = ((start - frame).clamp(min=0) + (frame - start - length + 1).clamp(min=0))[:, :, None]
                key = (outside * num_slots + slot_rank[:, None]) * span + frame[:, None]
                taken = later | ~maskable[:, None]
                key = key + taken * (4 * span * span * num_slots)
                chosen = (_ranks(key.flatten(1)) < span).unflatten(1, (span, num_slots)) & ~taken
                later |= chosen & (tube < count)[:, None, None]
        return mask

    def _full_mask(self, slot_mask: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        batch, steps, num_slots, _ = slots.shape
        if slot_mask.dtype != torch.bool:
            raise ValueError(f"slot_mask has dtype {slot_mask.dtype}: expected torch.bool (True = hidden).")
        if slot_mask.shape == (batch, num_slots):
            slot_mask = slot_mask[:, None].repeat(1, steps, 1)
            slot_mask[:, : self.config.visible_prefix] = False
        if slot_mask.shape != (batch, steps, num_slots):
            raise ValueError(
                f"slot_mask has shape {tuple(slot_mask.shape)}: expected {(batch, steps, num_slots)} or, for whole "
                f"objects, {(batch, num_slots)}."
            )
        if not torch.compiler.is_compiling() and slot_mask[:, : self.config.visible_prefix].any():
            raise ValueError(
                f"slot_mask hides a frame of the visible prefix ({self.config.visible_prefix} frame(s)): a slot that "
                "was never seen has no anchor. Leave the first frames False."
            )
        return slot_mask

    # ------------------------------------------------------------------------------------------------ forward

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
        slot_mask: torch.Tensor | None = None,
        trained_only: bool = False,
        **kwargs,
    ) -> CJepaOutput:
        """
        Predicts hidden history and future slots; with `future_slots` also the losses (paper section 3.3).

        Args:
            slots (`torch.Tensor` of shape `(B, T, N, D)`): Observed frames, T from 1 to history_length. Shorter
                histories are aligned to the right.
            actions (`torch.Tensor` of shape `(B, T, A)`, *optional*): Normalised action block taken at every frame.
            proprio (`torch.Tensor` of shape `(B, T, P)`, *optional*): Normalised proprioception.
            future_slots (`torch.Tensor` of shape `(B, prediction_length, N, D)`, *optional*): Targets.
            future_proprio (`torch.Tensor` of shape `(B, prediction_length, P)`, *optional*): Targets.
            slot_mask (`torch.BoolTensor` of shape `(B, T, N)` or `(B, N)`, *optional*): True = hidden. By default
                masks are drawn per sample in training mode, and nothing is hidden in eval mode.
            trained_only (`bool`): With `future_slots`, leave out what no loss reads: the losses and their gradients are the
                same (but for what dropout draws); predictions of the tokens that no loss reads are meaningless.
            output_attentions, output_hidden_states (`bool`, *optional*): Attentions need
                `model.set_attn_implementation("eager")`.
        """
        if kwargs.get("output_attentions") and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs eager attention, not {self.config._attn_implementation!r}: call "
                "model.set_attn_implementation('eager')."
            )
        config = self.config
        slots = self._check_slots(slots, config.history_length)
        batch, steps, num_slots, _ = slots.shape
        if actions is not None:
            actions = self._checked("actions", actions, config.action_size, "(B, T, A)", 3)
        if proprio is not None:
            proprio = self._checked("proprio", proprio, config.proprio_size, "(B, T, P)", 3)
        self._check_auxiliaries(actions, proprio, batch, steps)
        if slot_mask is not None:
            slot_mask = self._full_mask(slot_mask, slots)
        elif self.training and config.masked_slots_range[1] > 0 and config.mask_probability > 0:
            slot_mask = self.draw_slot_mask(slots)

        tokens = self._tokens(slots, actions, proprio)
        hidden = read = None
        if slot_mask is not None:
            hidden = F.pad(slot_mask, (0, config.num_auxiliary_tokens))
        if not trained_only:
            predicted = self.predictor(tokens, hidden)
        elif future_slots is None:
            raise ValueError("trained_only=True leaves out what no loss reads: without future_slots there is no loss.")
        elif hidden is None:
            predicted = self.predictor(tokens, None, future_only=True)
            predicted = F.pad(predicted, (0, 0, 0, 0, steps, 0))
        else:
            # Compiled code wants shapes that do not depend on what is hidden.
            if not torch.compiler.is_compiling():
                read = F.pad(self._trained_history(slot_mask), (0, config.num_auxiliary_tokens))
                read = F.pad(read, (0, 0, 0, config.prediction_length), value=True)
            predicted = self.predictor(tokens, hidden, read=read)
        predicted_slots, predicted_proprio = self._split(predicted)

        loss = history_loss = future_loss = proprio_loss = None
        if future_slots is not None:
            expected = (batch, config.prediction_length, num_slots, config.slot_size)
            future_slots = self._checked("future_slots", future_slots, config.slot_size, "(B, P, N, D)", 4)
            if future_slots.shape != expected:
                raise ValueError(f"future_slots has shape {tuple(future_slots.shape)}: expected {expected}.")
            future_loss = self.token_loss(predicted_slots[:, steps:], future_slots).mean()
            loss = future_loss
            if slot_mask is not None:
                history_loss = self._history_loss(predicted_slots[:, :steps], slots, slot_mask)
                loss = loss + config.history_loss_weight * history_loss
            if config.proprio_size and future_proprio is not None:
                future_proprio = self._checked("future_proprio", future_proprio, config.proprio_size, "(B, P, P)", 3)
                # The target is detached, as in the released code: the embedding learns from its use as input.
                target = self.embed_proprio(future_proprio).detach()
                if target.shape[:2] != (batch, config.prediction_length):
                    raise ValueError(
                        f"future_proprio has shape {tuple(future_proprio.shape)}: expected "
                        f"{(batch, config.prediction_length, config.proprio_size)}."
                    )
                proprio_loss = F.mse_loss(predicted_proprio[:, steps:].float(), target.float())
                loss = loss + proprio_loss
        return CJepaOutput(
            loss=loss,
            history_loss=history_loss,
            future_loss=future_loss,
            proprio_loss=proprio_loss,
            predicted_slots=predicted_slots,
            predicted_proprio_embeddings=predicted_proprio,
            slot_mask=slot_mask,
        )

    def token_loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss (`loss_type`) per token [...] of [..., D]; it equals the mean squared error where errors are small."""
        error = super().token_loss(prediction, target)
        if self.config.loss_type == "mse":
            return error
        delta = self.config.huber_delta
        return 2 * error / (1 + (1 + error / delta**2).sqrt())  # 2 delta^2 (sqrt(1 + error / delta^2) - 1)

    def _trained_history(self, slot_mask: torch.Tensor) -> torch.Tensor:
        """What of the history the loss reads, bool [B, T, N]: all that is hidden, and its anchors where the configuration says so."""
        if not self.config.anchor_in_history_loss:
            return slot_mask
        prefix = torch.arange(slot_mask.shape[1], device=slot_mask.device)[:, None] < self.config.visible_prefix
        return slot_mask | (prefix & slot_mask.any(dim=1, keepdim=True))

    def _history_loss(self, prediction: torch.Tensor, slots: torch.Tensor, slot_mask: torch.Tensor) -> torch.Tensor:
        """
        Mean over samples of the mean over their hidden tokens. A sample counts the same however much of it is hidden,
        so equal shards of a batch give the same loss and gradient as the whole.
        """
        counted = self._trained_history(slot_mask)
        error = (self.token_loss(prediction, slots) * counted).sum(dim=(1, 2))
        return (error / counted.sum(dim=(1, 2)).clamp(min=1)).mean()


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Rank of every value within its row [B, K]."""
    return values.argsort(dim=-1).argsort(dim=-1)


__all__ = [
    "CJepaConfig",
    "CJepaModel",
    "CJepaOutput",
    "CJepaRolloutOutput",
    "SafePreTrainedModel",
    "SlotWorldModel",
    "assign_slots",
]
