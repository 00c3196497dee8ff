"""Loads ALOE weights of the released code (a small excerpt in tests/data) into our model."""

import re

import torch

from cjepa_hf import AloeConfig, AloeForVideoQuestionAnswering

# the size that the excerpt was recorded with
GOLDEN_CONFIG = dict(num_slots=7, slot_size=64, num_frames=25, word_embedding_size=14, hidden_size=72)
GOLDEN_CONFIG |= dict(num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, answer_hidden_size=64)

_RENAMES = [
    (r"^CLS$", "first_token"),
    (r"^transformer_encoder\.pos_embedding$", "position_embedding"),
    (r"^transformer_encoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)$", r"layers.\1.attention.qkv.\2"),
    (r"^transformer_encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"layers.\1.attention.out_proj."),
    (r"^transformer_encoder\.layers\.(\d+)\.linear([12])\.", r"layers.\1.fc\2."),
    (r"^transformer_encoder\.layers\.(\d+)\.norm([12])\.", r"layers.\1.norm\2."),
    (r"^q_embedding\.", "word_embedding."),
    (r"^q_in_proj\.", "word_projection."),
    (r"^vision_in_proj\.", "slot_projection."),
    (r"^cls_answer_mlp\.0\.", "answer_head.fc1."),
    (r"^cls_answer_mlp\.2\.", "answer_head.fc2."),
    (r"^mc_answer_mlp\.0\.", "option_head.fc1."),
    (r"^mc_answer_mlp\.2\.", "option_head.fc2."),
]
# constant in the released code too, there as untrained parameters
FLAGS = {"text_token": [1, 0], "vision_token": [0, 1], "cls_token": [0, 1]}
FLAGS |= {"mc_question_token": [1, 0], "mc_choice_token": [0, 1]}


def original_name(key: str) -> str | None:
    """Our name of a parameter of the released code; None for a constant flag."""
    key = key.removeprefix("transformer_model.")
    if key in FLAGS:
        return None
    for pattern, replacement in _RENAMES:
        key, found = re.subn(pattern, replacement, key)
        if found:
            return key
    raise KeyError(key)


def golden_aloe(tensors: dict[str, torch.Tensor], **config) -> AloeForVideoQuestionAnswering:
    """A model of the recorded size with the `weights.*` of an excerpt, in eval mode."""
    model = AloeForVideoQuestionAnswering(AloeConfig(**GOLDEN_CONFIG, **config)).eval()
    state = {}
    for key, value in tensors.items():
        if key.startswith("weights."):
            name = original_name(key.removeprefix("weights."))
            if name is None:
                assert value.tolist() == FLAGS[key.rsplit(".", 1)[1]], key
            else:
                state[name] = value.float().reshape(model.get_parameter(name).shape)
    model.load_state_dict(state)
    return model
