"""Object-centric world models (C-JEPA) on the Hugging Face stack.

Importing the package registers its models with the transformers AutoClasses, its pipelines with
`transformers.pipeline`, and its environments with gymnasium. Everything else is imported when first used.
"""

import importlib
import os

# Threads of GNU OpenMP spin while they wait for each other. If another program holds a core, they spin through its whole
# turn, and plans take many times as long; waiting 2,000 rounds and then asleep costs nothing measurable on idle cores. The
# library reads this when torch loads it, so it must stand before.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from .models.aloe import AloeConfig, AloeForVideoQuestionAnswering, AloeProcessor
from .models.cjepa import CJepaConfig, CJepaModel, CJepaOutput, CJepaRolloutOutput
from .models.color_isa import ColorIsaConfig, ColorIsaImageProcessor, ColorIsaModel
from .models.crop_slots import CropSlotsConfig, CropSlotsImageProcessor, CropSlotsModel
from .models.dino_wm import DinoWmConfig, DinoWmModel, PatchEncoderConfig, PatchEncoderModel
from .models.savi import SaviConfig, SaviImageProcessor, SaviModel
from .models.videosaur import VideoSaurConfig, VideoSaurImageProcessor, VideoSaurModel
from .pipelines import register_pipelines
from .simulators import register_envs

__version__ = "0.1.0"

AutoConfig.register("cjepa", CJepaConfig)
AutoModel.register(CJepaConfig, CJepaModel)
AutoConfig.register("color-isa", ColorIsaConfig)
AutoModel.register(ColorIsaConfig, ColorIsaModel)
AutoImageProcessor.register(ColorIsaConfig, ColorIsaImageProcessor)
AutoConfig.register("crop-slots", CropSlotsConfig)
AutoModel.register(CropSlotsConfig, CropSlotsModel)
AutoImageProcessor.register(CropSlotsConfig, CropSlotsImageProcessor)
AutoConfig.register("dino-wm", DinoWmConfig)
AutoModel.register(DinoWmConfig, DinoWmModel)
AutoConfig.register("patch-encoder", PatchEncoderConfig)
AutoModel.register(PatchEncoderConfig, PatchEncoderModel)
AutoImageProcessor.register(PatchEncoderConfig, ColorIsaImageProcessor)
AutoConfig.register("savi", SaviConfig)
AutoModel.register(SaviConfig, SaviModel)
AutoImageProcessor.register(SaviConfig, SaviImageProcessor)
AutoConfig.register("videosaur", VideoSaurConfig)
AutoModel.register(VideoSaurConfig, VideoSaurModel)
AutoImageProcessor.register(VideoSaurConfig, VideoSaurImageProcessor)
AutoConfig.register("aloe", AloeConfig)
AutoModel.register(AloeConfig, AloeForVideoQuestionAnswering)
AutoProcessor.register(AloeConfig, AloeProcessor)
register_pipelines()
register_envs()

_LAZY = {
    "CollisionWorld": ".simulators.collisions",
    "PushTEnv": ".simulators.push_t",
    "SlotProbe": ".slot_probe",
    "bundled_checkpoint": ".checkpoints",
    "convert_original_checkpoint": ".hub.convert",
    "convert_original_slots": ".hub.convert",
    "extend_video": ".imagination",
    "imagine": ".imagination",
    "influence": ".analysis",
    "plot_influence": ".analysis",
}


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AloeConfig",
    "AloeForVideoQuestionAnswering",
    "AloeProcessor",
    "CJepaConfig",
    "CJepaModel",
    "CJepaOutput",
    "CJepaRolloutOutput",
    "ColorIsaConfig",
    "ColorIsaImageProcessor",
    "ColorIsaModel",
    "CropSlotsConfig",
    "CropSlotsImageProcessor",
    "CropSlotsModel",
    "DinoWmConfig",
    "DinoWmModel",
    "PatchEncoderConfig",
    "PatchEncoderModel",
    "SaviConfig",
    "SaviImageProcessor",
    "SaviModel",
    "VideoSaurConfig",
    "VideoSaurImageProcessor",
    "VideoSaurModel",
    *_LAZY,
]
