"""Configuration of ALOE, question answering over object slots."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..cjepa.configuration_cjepa import check_keys


@strict
class AloeConfig(PreTrainedConfig):
    r"""
    Configuration of an [`AloeForVideoQuestionAnswering`]. The defaults are the size that C-JEPA's released code trains on
    CLEVRER (2.9 million parameters).

    Args:
        num_slots (`int`, defaults to 7): Slots N per frame.
        slot_size (`int`, defaults to 128): Size D of a slot.
        num_frames (`int`, defaults to 25): Frames T of a video that the model sees.
        vocab_size (`int`, defaults to 82): Words of the questions, token 0 (padding) included.
        num_answers (`int`, defaults to 22): Answers to descriptive questions; answer 0 is padding and never right.
        max_question_length, max_choice_length (`int`, defaults to 20, 12): Tokens of a question and of one of its
            options. A descriptive question may fill both.
        word_embedding_size (`int`, defaults to 14): Size of a word's embedding.
        hidden_size (`int`, defaults to 144): Width of the transformer.
        num_hidden_layers (`int`, defaults to 12): Layers.
        num_attention_heads (`int`, defaults to 8): Heads; must divide `hidden_size`.
        intermediate_size (`int`, defaults to 512): Hidden width of a layer's feed-forward part.
        answer_hidden_size (`int`, defaults to 128): Hidden width of the two answer heads.
        hidden_dropout, attention_dropout (`float`, defaults to 0.1): Dropout after attention and in the feed-forward
            part, and of the attention weights. On a CPU, attention is several times as fast in training without.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the layer norms.
        video_attends_to_text (`bool`, defaults to `True`): Slots attend to the words too, as in the released code. With
            `False` they attend to slots alone, so a video is encoded once for all of its questions and options, not
            once for each (17 per video in CLEVRER), in training and in answering. Shapes then depend on the data:
            such a model cannot be compiled as one graph, and records no attentions.
        slot_context (`int`, defaults to 0): A slot is read together with itself in this many seen frames before and after (the
            first and the last repeated at the ends): what moves, turns, enters or leaves is then told by one token. Needs
            slots that stay with their objects.
        slot_neighbors (`int`, defaults to 0): A slot is read together with this many nearest slots of its frame: who touches
            whom is then told by one token, and need not be found by attention. Which are near is read by the buffer
            `slot_coordinates`, the weight of a [`SlotProbe`]: copied into a new model, saved with it. As long as it is zero,
            neighbors mean nothing.
        contact_attributes (`list[int]`, *optional*): Numbers of values of an object's attributes, in the order of the
            [`SlotProbe`] that the training reads them with, such as [3, 8, 2] shapes, colors and materials. With it, a head on the slots tells of each whether its object begins to touch another one, and which
            attributes that one has. It shapes what questions find in the slots when it is trained; it is not needed to answer.
        contact_layer (`int`, defaults to 1): The head reads what this many layers make of the slots.

    Unknown keys are a ValueError that names the nearest field.
    """

    model_type = "aloe"

    num_slots: int = 7
    slot_size: int = 128
    num_frames: int = 25
    vocab_size: int = 82
    num_answers: int = 22
    max_question_length: int = 20
    max_choice_length: int = 12
    word_embedding_size: int = 14
    hidden_size: int = 144
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 512
    answer_hidden_size: int = 128
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    layer_norm_eps: float | int = 1e-5
    video_attends_to_text: bool = True
    slot_context: int = 0
    slot_neighbors: int = 0
    contact_attributes: list[int] | None = None
    contact_layer: int = 1

    def __post_init__(self, **kwargs):
        check_keys(self, kwargs)
        super().__post_init__(**kwargs)
        self._check_fields()

    @property
    def max_text_length(self) -> int:
        """Tokens of every text sequence: a question and an option, or a descriptive question."""
        return self.max_question_length + self.max_choice_length

    def _check_fields(self):
        # not a validator of @strict, whose errors are no ValueError
        for name in AloeConfig.__annotations__:
            least = 0 if name in ("slot_context", "slot_neighbors", "contact_layer") else 1
            if AloeConfig.__annotations__[name] is int and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.slot_neighbors >= self.num_slots:
            raise ValueError(
                f"slot_neighbors={self.slot_neighbors} must be below num_slots={self.num_slots}: a slot is not its own neighbor."
            )
        if self.contact_attributes is not None:
            if not self.contact_attributes or min(self.contact_attributes) < 1:
                raise ValueError(f"contact_attributes={self.contact_attributes} must be positive sizes, or None.")
            if self.contact_layer >= self.num_hidden_layers or self.video_attends_to_text:
                raise ValueError(
                    f"contact_layer={self.contact_layer} must be below num_hidden_layers={self.num_hidden_layers}, and "
                    "video_attends_to_text False: contacts are told from the video alone."
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1).")
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps={self.layer_norm_eps} must be positive.")


__all__ = ["AloeConfig"]
