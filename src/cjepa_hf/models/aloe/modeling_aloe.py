"""ALOE: attention over the slots of a video and the words of a question (Ding et al. 2021, arXiv 2012.08508), in the
form that C-JEPA evaluates on CLEVRER.

Axes are named once: V videos, T frames, N slots, D slot size, S text sequences (one per descriptive question, one per
option of a multiple-choice question), L text tokens, A answers, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..cjepa.modeling_cjepa import SafePreTrainedModel, fast_dropout
from .configuration_aloe import AloeConfig


@dataclass
class AloeOutput(ModelOutput):
    """
    Output of [`AloeForVideoQuestionAnswering`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `labels`): answer_loss + option_loss. What contacts add is
            left to the training.
        answer_loss (`torch.Tensor` of shape `()`, *optional*): Cross entropy, the mean over descriptive questions.
        option_loss (`torch.Tensor` of shape `()`, *optional*): Binary cross entropy, the mean over options.
        answer_logits (`torch.Tensor` of shape `(S, A)`): Of every answer; means something where not `is_option`.
        option_logits (`torch.Tensor` of shape `(S,)`): Above 0: the option is correct; where `is_option`.
        hidden_states (`tuple(torch.Tensor)`, *optional*): Input of every layer, `(S, 1 + T * N + L, hidden_size)`, and
            the output of the last, `(S, 1, hidden_size)`: only its first token is read.
        attentions (`tuple(torch.Tensor)`, *optional*): Per layer `(S, H, 1 + T * N + L, 1 + T * N + L)`; the last has
            one row, that of the first token. Order: first token, slots (time-major), text.
        contact_logits (`torch.Tensor` of shape `(V, T, N, 1 + sum(contact_attributes))`, *optional*): Of every slot: above 0,
            its object begins to touch another one in this frame or before the next; then that one's attributes.
    """

    loss: torch.Tensor | None = None
    answer_loss: torch.Tensor | None = None
    option_loss: torch.Tensor | None = None
    answer_logits: torch.Tensor | None = None
    option_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    contact_logits: torch.Tensor | None = None


def question_losses(
    answer_logits: torch.Tensor, option_logits: torch.Tensor, labels: torch.Tensor, is_option: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean cross entropy over the descriptive questions and mean binary cross entropy over the options; a part without
    labels is 0.

    Args:
        answer_logits (`torch.Tensor` of shape `(S, A)`), option_logits (`torch.Tensor` of shape `(S,)`).
        labels (`torch.LongTensor` of shape `(S,)`): An answer, or 0 or 1 for an option; negative: unknown, left out.
        is_option (`torch.BoolTensor` of shape `(S,)`).
    """
    known = labels >= 0
    answers, options = known & ~is_option, known & is_option
    answer = F.cross_entropy(answer_logits.float(), labels.where(answers, 0), reduction="none")
    option = F.binary_cross_entropy_with_logits(
        option_logits.float(), labels.where(options, 0).float(), reduction="none"
    )
    # sums divided by counts: no data-dependent shapes, and both heads take part in every backward
    return (
        (answer * answers).sum() / answers.sum().clamp(min=1),
        (option * options).sum() / options.sum().clamp(min=1),
    )


def contact_losses(
    contact_logits: torch.Tensor, contacts: torch.Tensor, sizes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean binary cross entropy of whether the objects of slots begin to touch others, and the mean over contacts of the cross
    entropies of the other's attributes, summed; 0 where nothing is known.

    Args:
        contact_logits (`torch.Tensor` of shape `(V, T, N, 1 + sum(sizes))`).
        contacts (`torch.LongTensor` of shape `(V, T, N, 1 + len(sizes))`): 1 or 0, negative: unknown; then the attributes of
            the other object, negative: unknown.
        sizes (`Sequence[int]`): Values of each attribute.
    """
    touches = contacts[..., 0]
    known = touches >= 0
    touch = F.binary_cross_entropy_with_logits(contact_logits[..., 0].float(), (touches > 0).float(), reduction="none")
    named = (touches > 0) & (contacts[..., 1:] >= 0).all(-1)
    other = contact_logits.new_zeros(named.shape, dtype=torch.float32)
    for logits, label in zip(contact_logits[..., 1:].float().split(list(sizes), dim=-1), contacts[..., 1:].unbind(-1)):
        label = label.where(named, 0)
        other = other + F.cross_entropy(logits.flatten(0, -2), label.flatten(), reduction="none").view_as(label)
    return (
        (touch * known).sum() / known.sum().clamp(min=1),
        (other * named).sum() / named.sum().clamp(min=1),
    )


def with_context(slots: torch.Tensor, context: int) -> torch.Tensor:
    """Slots [V, T, N, D] with themselves in `context` frames before and after, [V, T, N, (2 * context + 1) * D]; the first
    and the last frame are repeated."""
    if not context:
        return slots
    frame = torch.arange(slots.shape[1], device=slots.device)
    places = [(frame + step).clamp(0, slots.shape[1] - 1) for step in range(-context, context + 1)]
    return torch.cat([slots[:, place] for place in places], dim=-1)


@torch.no_grad()
def nearest_slots(slots: torch.Tensor, coordinates: torch.Tensor, count: int) -> torch.Tensor:
    """
    For each of slots [V, T, N, D] the `count` others of its frame that are nearest, nearest first, int64 [V, T, N, count];
    slots that hold no object come last. `coordinates` [D + 1, 3] reads presence (above 0.5), x and y from a slot; the last
    row is the bias. It is the weight of a [`SlotProbe`].
    """
    with torch.autocast(slots.device.type, enabled=False):  # the same neighbors in training and in answering
        read = slots.float() @ coordinates[:-1].float() + coordinates[-1].float()
    present, position = read[..., 0] > 0.5, read[..., 1:]
    distance = (position[..., :, None, :] - position[..., None, :, :]).square().sum(-1)
    distance = distance.masked_fill(~present[..., None, :], torch.finfo(distance.dtype).max)
    distance.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
    return distance.argsort(dim=-1, stable=True)[..., :count]


# Texts of one video that read its slots together, where videos are encoded once.
TEXTS_AT_ONCE = 4


def _text_rows(video_index: torch.Tensor, num_videos: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Texts with videos `video_index` int64 [S], laid out in rows of TEXTS_AT_ONCE about the same video: row and column of
    each text, int64 [S], and the video of each row.
    """
    order = video_index.argsort(stable=True)
    counts = torch.bincount(video_index, minlength=num_videos)
    rank = torch.empty_like(order)  # among the texts of its video
    rank[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[video_index[order]]
    rows = (counts + TEXTS_AT_ONCE - 1) // TEXTS_AT_ONCE
    row = (rows.cumsum(0) - rows)[video_index] + rank // TEXTS_AT_ONCE
    return row, rank % TEXTS_AT_ONCE, torch.arange(num_videos, device=order.device).repeat_interleave(rows)


def _within(index: torch.Tensor, size: int) -> bool:
    return bool((index >= 0).all() and (index < size).all())


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention that also returns its weights; query, key, value are [S, H, tokens, head_dim], the mask is bool or None."""
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    weights = fast_dropout(weights, dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class AloeAttention(nn.Module):
    """Multi-head attention over all tokens."""

    def __init__(self, config: AloeConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, first_only: bool = False):
        batch, _, size = hidden_states.shape
        if first_only:
            weight, bias = self.qkv.weight, self.qkv.bias
            query = F.linear(hidden_states[:, :1], weight[:size], bias[:size])
            key, value = F.linear(hidden_states, weight[size:], bias[size:]).chunk(2, dim=-1)
        else:
            query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (query, key, value))
        dropout = self.config.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        on_cpu = implementation == "sdpa" and self.training and query.device.type == "cpu"
        if on_cpu and (dropout or query.dtype == torch.bfloat16):
            # on a CPU the fused kernel has no dropout, and in bfloat16 its backward takes several times as long
            attention = eager_attention_forward
        else:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling, is_causal=False
        )
        return self.out_proj(output.reshape(batch, -1, size)), weights

    def read_video(self, text, words, video, text_video, first_only: bool) -> torch.Tensor:
        """
        The attention of texts [B, Q, L, size] to all slots of their video and to their own words (bool [B, Q, L]), in one
        softmax: [B, Q, L or 1, size]. `video` is [V, P, size], `text_video` int64 [B] the video of each Q texts.
        """
        size = text.shape[-1]
        slots = F.linear(video, self.qkv.weight[size:], self.qkv.bias[size:]).index_select(0, text_video)
        query, key, value = (
            x.unflatten(-1, (-1, self.head_dim)).movedim(3, 1) for x in self.qkv(text).chunk(3, dim=-1)
        )  # [B, H, Q, L, head_dim]
        query = query[:, :, :, :1] * self.scaling if first_only else query * self.scaling
        slot_key, slot_value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in slots.chunk(2, dim=-1))
        shape, places = query.shape[2:4], slot_key.shape[2]
        scores = torch.cat(
            [
                torch.matmul(query.flatten(2, 3), slot_key.transpose(2, 3)).unflatten(2, shape),
                torch.matmul(query, key.transpose(3, 4)).masked_fill(
                    ~words[:, None, :, None], torch.finfo(query.dtype).min
                ),
            ],
            dim=-1,
        )
        # in bfloat16 too: it sums in float32 inside, and copies cost more than it does
        weights = scores.softmax(dim=-1)
        dropout = self.config.attention_dropout if self.training else 0.0
        weights = fast_dropout(weights, dropout, self.training)
        seen = torch.matmul(weights[..., :places].flatten(2, 3), slot_value).unflatten(2, shape)
        output = seen + torch.matmul(weights[..., places:], value)
        return self.out_proj(output.movedim(1, 3).flatten(3))


class AloeLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)), with ReLU."""

    def __init__(self, config: AloeConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = AloeAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = config.hidden_dropout

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None,
        first_only: bool = False,
        states: torch.Tensor | None = None,
        words: torch.Tensor | None = None,
        text_video: torch.Tensor | None = None,
    ):
        """
        Tokens [S, tokens, size] -> the same, or only the first. With texts `states` [B, Q, L, size], `words` bool [B, Q, L]
        and the videos `text_video` of the B, `hidden_states` are videos that see no text: returns (videos, texts), from the
        last layer with None for the videos.
        """
        if states is not None:
            video = self.norm1(hidden_states)
            attended = self.attention.read_video(self.norm1(states), words, video, text_video, first_only)
            states = self._rest(states[:, :, :1] if first_only else states, attended)
            if first_only:
                return None, states
            attended, _ = self.attention(video, mask)
            return self._rest(hidden_states, attended), states
        attended, _ = self.attention(self.norm1(hidden_states), mask, first_only)
        if first_only:
            hidden_states = hidden_states[:, :1]
        return self._rest(hidden_states, attended)

    def _rest(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + fast_dropout(attended, self.dropout, self.training)
        changed = fast_dropout(F.relu(self.fc1(self.norm2(hidden_states))), self.dropout, self.training)
        return hidden_states + fast_dropout(self.fc2(changed), self.dropout, self.training)


class AloeHead(nn.Module):
    def __init__(self, config: AloeConfig, size: int):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.answer_hidden_size)
        self.fc2 = nn.Linear(config.answer_hidden_size, size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(hidden_states)))


class AloeNeighbors(nn.Module):
    """x + mlp(norm(x and the tokens of the nearest slots)), with ReLU."""

    def __init__(self, config: AloeConfig):
        super().__init__()
        self.count = config.slot_neighbors
        size = config.hidden_size * (1 + self.count)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, tokens: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
        """Tokens [V, T, N, size] of slots and their neighbors int64 [V, T, N, count] -> [V, T, N, size]."""
        read = [tokens]
        for place in nearest.unbind(-1):
            read.append(tokens.gather(2, place[..., None].expand(-1, -1, -1, tokens.shape[-1])))
        return tokens + self.fc2(F.relu(self.fc1(self.norm(torch.cat(read, dim=-1)))))


class AloeForVideoQuestionAnswering(SafePreTrainedModel):
    """
    Answers questions about a video from its slots. One transformer reads a learned first token, the slots of all frames
    and the words; two heads read the first token: one scores the answers of a descriptive question, the other whether
    an option of a multiple-choice question is correct. An option is judged alone, so a question may have any number.

    Example:

    ```python
    >>> import torch
    >>> from cjepa_hf import AloeConfig, AloeForVideoQuestionAnswering, AloeProcessor

    >>> model = AloeForVideoQuestionAnswering(AloeConfig(num_hidden_layers=2)).eval()
    >>> processor = AloeProcessor()
    >>> inputs = processor(
    ...     torch.randn(128, 7, 128),
    ...     ["How many collisions happen?", "What will happen next?"],
    ...     options=[None, ["The red cube collides with the sphere", "The cube and the sphere collide"]],
    ...     question_types=["descriptive", "predictive"],
    ... )
    >>> answers = processor.post_process_answers(model(**inputs), inputs)
    >>> len(answers), len(answers[1]["options"])
    (2, 2)

    ```
    """

    config: AloeConfig
    base_model_prefix = "aloe"
    main_input_name = "slots"
    _no_split_modules = ["AloeLayer"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    supports_gradient_checkpointing = True
    _can_record_outputs = {"hidden_states": AloeLayer, "attentions": AloeAttention}

    def __init__(self, config: AloeConfig):
        super().__init__(config)
        self._can_compile_fullgraph = config.video_attends_to_text
        size = config.hidden_size
        # Constant flags are appended before the projections: to a slot (not text, vision), to a word (part of the
        # question or of what is asked about it; text, not vision).
        self.slot_projection = nn.Linear((2 * config.slot_context + 1) * config.slot_size + 2, size)
        if config.slot_neighbors:
            self.neighbors = AloeNeighbors(config)
            self.register_buffer("slot_coordinates", torch.zeros(config.slot_size + 1, 3))
        self.word_embedding = nn.Embedding(config.vocab_size, config.word_embedding_size)
        self.word_projection = nn.Linear(config.word_embedding_size + 4, size)
        self.first_token = nn.Parameter(torch.zeros(size))
        tokens = 1 + config.num_frames * config.num_slots + config.max_text_length
        self.position_embedding = nn.Parameter(torch.zeros(tokens, size))
        self.layers = nn.ModuleList([AloeLayer(config) for _ in range(config.num_hidden_layers)])
        if config.contact_attributes:
            self.contact_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.contact_head = AloeHead(config, 1 + sum(config.contact_attributes))
        self.answer_head = AloeHead(config, config.num_answers)
        self.option_head = AloeHead(config, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, AloeForVideoQuestionAnswering):
            init.zeros_(module.first_token)
            init.zeros_(module.position_embedding)
            if self.config.slot_neighbors:
                init.zeros_(module.slot_coordinates)

    def _check_slots(self, slots):
        config = self.config
        expected = (config.num_frames, config.num_slots, config.slot_size)
        if slots.ndim != 4 or slots.shape[1:] != expected:
            raise ValueError(
                f"slots has shape {tuple(slots.shape)}: expected (V, {', '.join(map(str, expected))}), videos x "
                f"num_frames x num_slots x slot_size; AloeProcessor chooses the frames."
            )
        if not slots.is_floating_point():
            raise ValueError(f"slots has dtype {slots.dtype}: expected floating point, convert it with .float().")

    def _check(self, slots, input_ids, attention_mask, is_option, video_index, labels):
        config = self.config
        self._check_slots(slots)
        if input_ids.ndim != 2 or input_ids.shape[1] != config.max_text_length:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}: expected (S, {config.max_text_length}), padded by "
                f"AloeProcessor."
            )
        sizes = {"is_option": is_option, "labels": labels, "video_index": video_index}
        for name, value in sizes.items():
            if value is not None and value.shape != input_ids.shape[:1]:
                raise ValueError(f"{name} has shape {tuple(value.shape)}: expected ({len(input_ids)},).")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: expected {tuple(input_ids.shape)}."
            )
        if not len(input_ids):
            raise ValueError("input_ids holds no text.")
        if video_index is not None and (
            video_index.is_floating_point()
            or (not self.config.video_attends_to_text and not _within(video_index, len(slots)))
        ):
            raise ValueError(f"video_index must be integers from 0 to {len(slots) - 1}, got {video_index.tolist()}.")
        if video_index is None and len(slots) != len(input_ids):
            raise ValueError(
                f"{len(slots)} videos and {len(input_ids)} text sequences: pass video_index, the video of each sequence."
            )

    def _read_slots(self, slots: torch.Tensor) -> torch.Tensor:
        """The tokens [V, T * N, hidden_size] of slots [V, T, N, D] before their positions are added."""
        config = self.config
        vision = with_context(slots.to(self.dtype), config.slot_context)
        vision = F.pad(F.pad(vision, (0, 1)), (0, 1), value=1.0)  # the flags 0, 1
        vision = self.slot_projection(vision)
        if config.slot_neighbors:
            vision = self.neighbors(vision, nearest_slots(slots, self.slot_coordinates, config.slot_neighbors))
        return vision.flatten(1, 2)

    def _read_contacts(self, slots: torch.Tensor) -> torch.Tensor:
        """The logits of contacts of slots [V, T, N, D]: what the head sees is told by no text."""
        if not self.config.contact_attributes:
            raise ValueError("this model does not tell contacts (contact_attributes is None): give input_ids.")
        self._check_slots(slots)
        video = self._read_slots(slots)
        video = video + self.position_embedding[1 : 1 + video.shape[1]]
        for layer in self.layers[: self.config.contact_layer]:
            video = layer(video, None)
        return self._contacts(video)

    def _contacts(self, video: torch.Tensor) -> torch.Tensor:
        logits = self.contact_head(self.contact_norm(video))
        return logits.unflatten(1, (self.config.num_frames, self.config.num_slots))

    def _encode_videos_once(self, first, vision, text, words, video_index) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The first token [S, size] after all layers, where videos [V, P, size] see no text [S, L, size], and the logits of
        contacts, if the model has them.
        """
        places = vision.shape[1]
        position = self.position_embedding
        video = vision + position[1 : 1 + places]
        contacts = None
        states = torch.cat([first + position[:1], text + position[1 + places :]], dim=1)
        words = F.pad(words, (1, 0), value=True)
        # padding leaves: what is read goes first, in order, and as many places stay as the longest text has
        order = (~words).byte().argsort(dim=1, stable=True)[:, : int(words.sum(1).max())]
        states = states.gather(1, order[..., None].expand(-1, -1, states.shape[-1]))
        words = words.gather(1, order)
        # texts of one video stand side by side, TEXTS_AT_ONCE to a row, so that its slots are not copied for each
        row, column, text_video = _text_rows(video_index, len(vision))
        rows = states.new_zeros(len(text_video), TEXTS_AT_ONCE, *states.shape[1:])
        rows[row, column] = states
        seen = words.new_zeros(len(text_video), TEXTS_AT_ONCE, words.shape[1])
        seen[..., 0] = True  # also where no text is
        seen[row, column] = words
        for index, layer in enumerate(self.layers):
            if self.config.contact_attributes and index == self.config.contact_layer:
                contacts = self._contacts(video)
            video, rows = layer(video, None, index == len(self.layers) - 1, rows, seen, text_video)
        return rows[row, column, 0], contacts

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        slots: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        is_option: torch.Tensor | None = None,
        video_index: torch.Tensor | None = None,
        question_index: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> AloeOutput:
        """
        Args:
            slots (`torch.Tensor` of shape `(V, num_frames, num_slots, slot_size)`): The videos.
            input_ids (`torch.LongTensor` of shape `(S, max_text_length)`): A descriptive question, padded; or a question
                padded to max_question_length and then one of its options. Left out: nothing is asked, and `contact_logits`
                alone come back.
            attention_mask (`torch.Tensor` of shape `(S, max_text_length)`, *optional*): 1 or True for a word, 0 for
                padding. Default: every token but 0 is a word.
            is_option (`torch.BoolTensor` of shape `(S,)`, *optional*): True for a sequence with an option. Default: all
                are descriptive.
            video_index (`torch.LongTensor` of shape `(S,)`, *optional*): The video of each sequence; default: in order.
            question_index (`torch.LongTensor` of shape `(S,)`, *optional*): The question of each sequence; not read here,
                but by [`AloeProcessor.post_process_answers`].
            labels (`torch.LongTensor` of shape `(S,)`, *optional*): The answer of a descriptive question; 1 or 0 for an
                option that is correct or wrong; negative: unknown.
            output_attentions, output_hidden_states (`bool`, *optional*): Attentions need
                `model.set_attn_implementation("eager")`.

        Raises `ValueError` for shapes that do not fit the configuration.
        """
        if input_ids is None:
            if labels is not None:
                raise ValueError("labels are those of texts: give input_ids.")
            return AloeOutput(contact_logits=self._read_contacts(slots))
        self._check(slots, input_ids, attention_mask, is_option, video_index, labels)
        config = self.config
        wanted = (
            kwargs.get(name, getattr(config, name, False)) for name in ("output_attentions", "output_hidden_states")
        )
        if not config.video_attends_to_text and any(wanted):
            raise ValueError("with video_attends_to_text=False neither attentions nor hidden states are recorded.")
        if is_option is None:
            is_option = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        is_option = is_option.bool()
        words = input_ids != 0 if attention_mask is None else attention_mask.bool()

        vision = self._read_slots(slots)  # once per video, not per sequence
        text = self.word_embedding(input_ids)
        place = torch.arange(config.max_text_length, device=input_ids.device)
        is_question = is_option[:, None] & (place < config.max_question_length)
        flags = torch.stack(
            [is_question, ~is_question, torch.ones_like(is_question), torch.zeros_like(is_question)], -1
        )
        text = self.word_projection(torch.cat([text, flags.to(text.dtype)], dim=-1))
        first = self.first_token.expand(len(text), 1, -1)
        if video_index is None:
            video_index = torch.arange(len(text), device=text.device)
        contacts = None
        if config.video_attends_to_text:
            states = torch.cat([first, vision[video_index], text], dim=1) + self.position_embedding
            seen = words.new_ones(len(words), states.shape[1] - words.shape[1])
            mask = torch.cat([seen, words], dim=1)[:, None, None]
            for index, layer in enumerate(self.layers):
                states = layer(states, mask, index == len(self.layers) - 1)
            first = states[:, 0]
        else:
            first, contacts = self._encode_videos_once(first, vision, text, words, video_index)
        answer_logits, option_logits = self.answer_head(first), self.option_head(first).squeeze(-1)

        loss = answer_loss = option_loss = None
        if labels is not None:
            answer_loss, option_loss = question_losses(answer_logits, option_logits, labels, is_option)
            loss = answer_loss + option_loss
        return AloeOutput(
            loss=loss,
            answer_loss=answer_loss,
            option_loss=option_loss,
            answer_logits=answer_logits,
            option_logits=option_logits,
            contact_logits=contacts,
        )


__all__ = ["AloeForVideoQuestionAnswering", "AloeOutput", "contact_losses", "question_losses"]
