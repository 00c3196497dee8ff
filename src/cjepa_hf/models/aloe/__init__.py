"""Answers questions about a video from its object slots (ALOE, Ding et al. 2021, arXiv 2012.08508)."""

from .configuration_aloe import AloeConfig
from .modeling_aloe import AloeForVideoQuestionAnswering, AloeOutput
from .processing_aloe import CLEVRER_ANSWERS, CLEVRER_WORDS, QUESTION_TYPES, AloeProcessor

__all__ = [
    "CLEVRER_ANSWERS",
    "CLEVRER_WORDS",
    "QUESTION_TYPES",
    "AloeConfig",
    "AloeForVideoQuestionAnswering",
    "AloeOutput",
    "AloeProcessor",
]
