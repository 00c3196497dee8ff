from .configuration_cjepa import CJepaConfig
from .modeling_cjepa import CJepaModel, CJepaOutput, CJepaRolloutOutput, SlotWorldModel, assign_slots

__all__ = ["CJepaConfig", "CJepaModel", "CJepaOutput", "CJepaRolloutOutput", "SlotWorldModel", "assign_slots"]
