"""Converts the files that the C-JEPA paper's authors released (pickles) into this library's models and slot datasets.

The kind of a checkpoint is told from what it holds, never from its name (the released names do not match contents).
Files are read by [`cjepa_hf.hub.tensors.read_pickled`]: nothing in them is run.

Number of slots, attention heads, what was masked in training and where the observed frames end are not in the tensors of
a checkpoint. A pickled module tells them itself; for everything else the configuration does.
"""

import difflib
import importlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from ..data.slots import SlotDatasetWriter
from .tensors import (
    ConversionError,
    PickledArray,
    Record,
    is_module,
    module_attribute,
    module_tensors,
    read_for_streaming,
    read_pickled,
)

__all__ = [
    "ConversionError",
    "config_file",
    "convert_original_checkpoint",
    "convert_original_slots",
    "hub_configs",
    "is_original_slots",
]

logger = logging.get_logger(__name__)

# model_type: module, configuration, model, entries of hub_configs
_MODELS = {
    "cjepa": ("cjepa", "CJepaConfig", "CJepaModel", "cjepa-pusht-1of4, cjepa-clevrer-videosaur-4of7, ..."),
    "videosaur": ("videosaur", "VideoSaurConfig", "VideoSaurModel", "videosaur-pusht or videosaur-clevrer"),
    "savi": ("savi", "SaviConfig", "SaviModel", "savi-clevrer"),
    "aloe": ("aloe", "AloeConfig", "AloeForVideoQuestionAnswering", "aloe-clevrer"),
}


def convert_original_checkpoint(
    path: str | os.PathLike,
    config: PreTrainedConfig | Mapping | str | os.PathLike | None = None,
    *,
    statistics: Mapping | None = None,
) -> PreTrainedModel:
    """A checkpoint of the released code as a model of this library, in eval mode; save it with `save_pretrained`.

    Args:
        path: a CLEVRER predictor (state dict), a Push-T world model (pickled module, or its state dict), VideoSAUR,
            SAVi or ALOE. The file is read as data, nothing in it is run.
        config: configuration of the model: an object, its `to_dict()`, a `config.json`, a folder with one, or the name
            of an entry of `hub_configs`. May be left out for a pickled module alone, which says all that is needed.
        statistics: `action_mean`, `action_std`, `proprio_mean`, `proprio_std` of a world model's training data (raw
            units), which no original file holds. Without them it cannot plan in units of the environment.

    Returns:
        [`CJepaModel`] (with the slot encoder of the file, if its configuration has one), [`VideoSaurModel`],
        [`SaviModel`] or [`AloeForVideoQuestionAnswering`], float32.

    Raises:
        ConversionError: the file cannot be read, holds something else, or does not fit the configuration.
        FileNotFoundError: there is no such file.
    """
    value = read_pickled(path)
    try:
        tensors, modules = _state_dict(value)
        kind, tensors, modules = _kind(tensors, modules)
        given = None if config is None else _config(config, kind)
        return _CONVERTERS[kind](tensors, modules, given, statistics or {})
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None


# --------------------------------------------------------------------------------------------------------------------
# What the file holds


def _state_dict(value, depth: int = 8) -> tuple[dict[str, torch.Tensor], dict[str, Record]]:
    """Tensors by original name, and the records of pickled modules by path (empty for a state dict)."""
    if is_module(value):
        return module_tensors(value)
    for key in ("state_dict", "model_state_dict", "model"):
        if depth and isinstance(value, dict) and (isinstance(value.get(key), dict) or is_module(value.get(key))):
            return _state_dict(value[key], depth - 1)  # a damaged file may hold itself
    if not isinstance(value, dict) or not any(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        raise ConversionError(
            f"it holds no model but {_describe(value)}. Convert a checkpoint (slots are converted by "
            "convert_original_slots)."
        )
    strange = [str(key)[:60] for key, tensor in value.items() if not isinstance(tensor, torch.Tensor)]
    if strange:
        raise ConversionError(
            f"beside tensors its state dict holds {_some(strange)}, which a state dict never does. The file is not what "
            "it seems: do not load it with anything that unpickles, and get it from its publisher again."
        )
    return {str(key): tensor for key, tensor in value.items()}, {}


def _describe(value) -> str:
    if isinstance(value, Record):
        return f"an object {value.module}.{value.name}"[:200]
    if isinstance(value, dict):
        return f"a dictionary with the keys {_some([str(key)[:40] for key in value])}"
    return f"a {type(value).__name__}"


def _some(names, count: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")


def _kind(tensors: dict, modules: dict) -> tuple[str, dict, dict]:
    """Kind of model, and its tensors and modules without the prefixes that wrappers add."""
    for prefix in ("module.", "_orig_mod.", "model.", "module."):  # data parallel, compiled, Lightning
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
            modules = {f"{k}."[len(prefix) :][:-1]: v for k, v in modules.items() if f"{k}.".startswith(prefix)}
    if "time_pos_embed" in tensors:  # the predictor alone
        tensors = {f"predictor.{key}": tensor for key, tensor in tensors.items()}
        modules = {f"predictor.{key}".rstrip("."): value for key, value in modules.items()}
    for key, kind in (
        ("predictor.time_pos_embed", "cjepa"),
        ("processor.module.corrector.to_q.weight", "videosaur"),
        ("kernel_dist_layer.0.weight", "savi"),
        ("transformer_model.q_embedding.weight", "aloe"),
    ):
        if key in tensors:
            return kind, tensors, modules
    raise ConversionError(
        f"its tensors belong to no model of the released code: {_some(tensors)}. Expected a C-JEPA predictor or world "
        "model, VideoSAUR, SAVi or ALOE."
    )


# --------------------------------------------------------------------------------------------------------------------
# Configurations and models


def _class(kind: str, index: int):
    return getattr(importlib.import_module(f"cjepa_hf.models.{_MODELS[kind][0]}"), _MODELS[kind][index])


def _config(config, kind: str) -> PreTrainedConfig:
    """The given configuration as an object of the class of `kind`."""
    if isinstance(config, (str, os.PathLike)):
        path = config_file(config)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConversionError(f"the configuration {path} cannot be read ({error}): pass a config.json.") from None
    if isinstance(config, Mapping):
        values = dict(config)
        found = values.pop("model_type", None)
        if found is None:
            raise ConversionError("the configuration has no model_type: pass a whole config.json or its to_dict().")
        config = None
        if found == kind:
            values.pop("architectures", None), values.pop("transformers_version", None), values.pop("dtype", None)
            try:
                return _class(kind, 1)(**values)
            except ValueError as error:
                raise ConversionError(f"the configuration is not valid: {error}") from None
    else:
        found = getattr(config, "model_type", type(config).__name__)
        if found == kind:
            return config
    raise ConversionError(
        f"it holds a model of the kind {kind!r}, the configuration is one of {found!r}: pass hub_configs/ entry "
        f"{_MODELS[kind][3]}."
    )


def hub_configs() -> dict[str, Path]:
    """Folders of `hub_configs` by name: one per repository to publish, in the wheel and in a checkout."""
    roots = Path(__file__).parents[1], Path(__file__).parents[3]  # the installed package, the checkout above src/
    root = next((root for root in roots if (root / "hub_configs").is_dir()), roots[0])
    return {path.parent.name: path.parent for path in sorted(root.glob("hub_configs/*/source.json"))}


def config_file(config: str | os.PathLike) -> Path:
    """The config.json meant by a file, a folder, or the name of an entry of `hub_configs`."""
    path, entries = Path(config), hub_configs()
    for candidate in (path, path / "config.json", entries.get(str(config), path) / "config.json"):
        if candidate.is_file():
            return candidate
    nearest = difflib.get_close_matches(str(config), entries, n=3)
    hint = f" The nearest entries of hub_configs: {', '.join(nearest)}." if nearest else ""
    raise ConversionError(
        f"there is no configuration {config}: pass a config.json, a folder with one, or its content.{hint}"
    )


def _need_config(kind: str, unknown: str) -> ConversionError:
    return ConversionError(
        f"it holds a model of the kind {kind!r}, but {unknown} cannot be read from it. Pass config= (--config), the "
        f"entry of hub_configs/ for this file: {_MODELS[kind][3]}."
    )


def _loaded(model: PreTrainedModel, tensors: dict[str, tuple[str, torch.Tensor]], fresh: tuple[str, ...] = ()):
    """`model` with the tensors {our name: (original name, tensor)}; all of both must be used, except the names `fresh`."""
    state = model.state_dict()
    unused = [original for name, (original, _) in tensors.items() if name not in state]
    missing = [name for name in state if name not in tensors and name not in fresh]
    if unused or missing:
        parts = []
        if unused:
            parts.append(f"its tensors {_some(unused)} have no place in a model of this configuration")
        if missing:
            parts.append(f"a model of this configuration needs {_some(missing)}, which the file lacks")
        raise ConversionError(f"{'; '.join(parts)}. Pass the configuration that belongs to this file.")
    for name, (original, tensor) in tensors.items():
        target = state[name]
        if [n for n in tensor.shape if n != 1] != [n for n in target.shape if n != 1]:
            raise ConversionError(
                f"its tensor {original} has shape {tuple(tensor.shape)}, in a model of this configuration it has "
                f"{tuple(target.shape)}. Pass the configuration that belongs to this file."
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ConversionError(f"its tensor {original} holds NaN, infinity or no real numbers: download it again.")
    with torch.no_grad():
        for name, (_, tensor) in tensors.items():
            state[name].copy_(tensor.reshape(state[name].shape))
    return model.eval()


def _built(cls, config):
    """A model whose parameters are zero: whatever a file does not hold is not random."""
    with no_init_weights():
        model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def _renamed(tensors: dict, rename: Callable[[str], str], prefix: str = "") -> dict:
    result = {}
    for original, tensor in tensors.items():
        name = prefix + rename(original)
        if name in result:
            raise ConversionError(f"its tensors {result[name][0]} and {original} are the same parameter.")
        result[name] = (original, tensor)
    return result


def _substituted(renames) -> Callable[[str], str]:
    def rename(key: str) -> str:
        for pattern, replacement in renames:
            key, count = re.subn(pattern, replacement, key)
            if count:
                break
        return key

    return rename


# ---- C-JEPA

_cjepa_name = _substituted(
    [
        (r"^predictor\.time_pos_embed$", "predictor.time_embedding"),
        (r"^predictor\.id_projector\.", "predictor.anchor_projection."),
        (r"^predictor\.transformer\.norm\.", "predictor.norm."),
        (r"^predictor\.transformer\.layers\.(\d+)\.0\.in_proj_", r"predictor.layers.\1.attention.qkv."),
        (r"^predictor\.transformer\.layers\.(\d+)\.0\.out_proj\.", r"predictor.layers.\1.attention.out_proj."),
        (r"^predictor\.transformer\.layers\.(\d+)\.1\.0\.", r"predictor.layers.\1.mlp.norm."),
        (r"^predictor\.transformer\.layers\.(\d+)\.1\.1\.", r"predictor.layers.\1.mlp.fc1."),
        (r"^predictor\.transformer\.layers\.(\d+)\.1\.4\.", r"predictor.layers.\1.mlp.fc2."),
        (r"^predictor\.to_out\.", "predictor.head."),
        (r"^(action|proprio)_encoder\.patch_embed\.", r"\1_embedding."),
    ]
)
# Parts of a world model's encoder, and where they stand in a VideoSAUR checkpoint
_ENCODER_PARTS = {
    "encoder.backbone.": "encoder.",
    "slot_attention.backbone.": "processor.",
    "initializer.backbone.": "initializer.",
}
# What the released code does; a model with another choice would load the tensors and compute something else.
_RELEASED = {
    "norm_first": False,
    "residual_prediction": None,
    "anchor": "first",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}


def _split_encoder(tensors: dict, modules: dict) -> tuple[dict, dict, dict, dict]:
    """Tensors and modules of the world model, and those of its encoder under the names of a VideoSAUR checkpoint."""
    parts = []
    for values in (tensors, modules):
        own, encoder = {}, {}
        for key, value in values.items():
            part = next((part for part in _ENCODER_PARTS if f"{key}.".startswith(part)), None)
            if part is None:
                own[key] = value
            else:
                encoder[(_ENCODER_PARTS[part] + key[len(part) :]).rstrip(".")] = value
        parts += [own, encoder]
    return parts[0], parts[2], parts[1], parts[3]


def _convert_cjepa(tensors, modules, config, statistics):
    tensors, modules, encoder_tensors, encoder_modules = _split_encoder(tensors, modules)
    known = _cjepa_fields(tensors, modules)
    if config is None:
        missing = [
            name
            for name in ("num_attention_heads", "num_slots", "history_length", "num_masked_slots")
            if name not in known
        ]
        if missing:
            raise _need_config("cjepa", ", ".join(missing))
        if "action_size" in known and known["action_size"] != 10:
            raise _need_config("cjepa", f"frame_skip (an action block has {known['action_size']} numbers)")
        if "action_size" not in known:
            raise _need_config("cjepa", "frame_skip")
        known["frame_skip"] = 5  # blocks of five two-dimensional actions
        if encoder_tensors:
            image_size = module_attribute(modules.get(""), "encoder_image_size")
            known["slot_encoder_config"] = _videosaur_config(encoder_modules, image_size)
        config = _class("cjepa", 1)(**known)
    else:
        for name, value in known.items():
            if getattr(config, name) != value:
                raise ConversionError(
                    f"the configuration says {name}={getattr(config, name)}, the file {value}. Pass the configuration "
                    "that belongs to this file."
                )
    total, steps = config.history_length + config.prediction_length, tensors["predictor.time_pos_embed"].shape[1]
    if total != steps:
        raise ConversionError(
            f"the configuration says {config.history_length} + {config.prediction_length} frames, the file has {steps}. "
            "Pass the configuration that belongs to this file."
        )
    for name, value in _RELEASED.items():
        if getattr(config, name) != value:
            raise ConversionError(
                f"the configuration says {name}={getattr(config, name)!r}: the released models were trained with {value!r}."
            )

    names = _renamed(tensors, _cjepa_name)
    if config.slot_encoder_config is not None and encoder_tensors:
        kind = config.slot_encoder_config.model_type
        if kind != "videosaur":
            raise ConversionError(
                f"the configuration has an encoder of the kind {kind!r}, the file one of 'videosaur'."
            )
        names |= _videosaur_names(encoder_tensors, config.slot_encoder_config, "slot_encoder.")
    elif config.slot_encoder_config is not None:
        raise ConversionError(
            "the configuration has a slot_encoder_config, but the file holds no encoder: leave it out (set it to None)."
        )
    elif encoder_tensors:
        logger.warning(
            f"{len(encoder_tensors)} tensors of the encoder are left out: config.slot_encoder_config is None."
        )
    fresh = ("action_mean", "action_std", "proprio_mean", "proprio_std")
    model = _loaded(_built(_class("cjepa", 2), config), names, fresh)
    if statistics:
        try:
            model.set_statistics(**statistics)
        except (ValueError, TypeError) as error:
            raise ConversionError(f"the given statistics do not fit: {error}") from None
    return model


def _cjepa_fields(tensors, modules) -> dict:
    """Fields of the configuration that the tensors and, where there are any, the modules determine."""

    def shape(key, length):
        if key not in tensors or tensors[key].dim() != length:
            raise ConversionError(f"it holds no {key} with {length} axes: it is damaged, or of another model.")
        return tensors[key].shape

    width = shape("predictor.time_pos_embed", 4)[-1]
    layers = {int(m[1]) for key in tensors if (m := re.match(r"predictor\.transformer\.layers\.(\d{1,4})\.", key))}
    known = {
        "num_hidden_layers": len(layers),
        "intermediate_size": shape("predictor.transformer.layers.0.1.1.weight", 2)[0],
    }
    embeddings = {}
    for name in ("action", "proprio"):
        key = f"{name}_encoder.patch_embed.weight"
        if key in tensors:
            embeddings[name], known[f"{name}_size"], kernel = shape(key, 3)
            if kernel != 1:
                raise ConversionError(f"its {key} looks at {kernel} frames at a time: the paper's models look at one.")
        else:
            known[f"{name}_size"] = 0
    concatenated = any(size != width for size in embeddings.values())
    known["auxiliary_fusion"] = "concat" if concatenated else "tokens"
    known["slot_size"] = width - sum(embeddings.values()) if concatenated else width
    if concatenated:
        known |= {f"{name}_embedding_size": size for name, size in embeddings.items()}
    if known["slot_size"] < 1:
        raise ConversionError("its embeddings are wider than its predictor: it is damaged, or of another model.")

    predictor = modules.get("predictor")
    attention = modules.get("predictor.transformer.layers.0.0")
    for name, original, module in (
        ("num_slots", "num_slots", predictor),
        ("history_length", "history_frames", predictor),
        ("prediction_length", "pred_frames", predictor),
        ("num_masked_slots", "num_masked_slots", predictor),
        ("num_attention_heads", "num_heads", attention),
    ):
        value = module_attribute(module, original)
        if value is not None:
            known[name] = value
    if "num_slots" in known and not concatenated:
        known["num_slots"] -= len(embeddings)  # the auxiliary tokens are counted there
    return known


# ---- VideoSAUR

_BACKBONE = "encoder.module.backbone."
_dinov2_name = _substituted(
    [
        (r"\.attention\.attention\.query\.", ".attention.q_proj."),  # transformers 4
        (r"\.attention\.attention\.key\.", ".attention.k_proj."),
        (r"\.attention\.attention\.value\.", ".attention.v_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    ]
)
_timm_name = _substituted(
    [
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^blocks\.(\d+)\.attn\.([qkv])\.", r"encoder.layer.\1.attention.\2_proj."),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.o_proj."),
        (r"^blocks\.(\d+)\.ls([12])\.gamma$", r"encoder.layer.\1.layer_scale\2.lambda1"),
        (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
        (r"^norm\.", "layernorm."),
    ]
)
_VIDEOSAUR_RENAMES = [
    (r"^(encoder|processor|decoder)\.module\.", ""),
    (r"(^|\.)layers\.0\.(?=weight|bias)", r"\1norm."),
    (r"(^|\.)layers\.1\.(?=weight|bias)", r"\1fc1."),
    (r"(^|\.)layers\.3\.(?=weight|bias)", r"\1fc2."),
    (r"(^|\.)norm_(feature|slot)s\.", r"\1\2_norm."),
    (r"(^|\.)norm_q\.", r"\1query_norm."),
    (r"(^|\.)norm_k\.", r"\1key_norm."),
    (r"(^|\.)norm_memory\.", r"\1memory_norm."),
    (r"(^|\.)to_q\.", r"\1query."),
    (r"(^|\.)to_k\.", r"\1key."),
    (r"(^|\.)to_v\.", r"\1value."),
    (r"(^|\.)blocks\.", r"\1layers."),
    (r"\.self_attn\.kv\.", ".attention.key_value."),
    (r"\.self_attn\.q\.", ".attention.query."),
    (r"\.self_attn\.", ".attention."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"\.scale([12])\.gamma$", r".scale\1"),
    (r"^pos_emb$", "position_embedding"),
]


def _videosaur_name(key: str) -> str:
    if key.startswith(_BACKBONE):
        return "backbone." + _dinov2_name(key.removeprefix(_BACKBONE))
    decoder = key.startswith("decoder.module.")
    if decoder:
        key = re.sub(r"\.renderer\.layers\.(\d{1,3})\.", lambda m: f".renderer.{int(m[1]) // 2}.", key)
        key = key.replace("decoder.module.output_transform.", "decoder.module.head.")
    for pattern, replacement in _VIDEOSAUR_RENAMES:
        key = re.sub(pattern, replacement, key)
    return f"decoder.{key}" if decoder else key


def _videosaur_names(tensors: dict, config, prefix: str = "") -> dict[str, tuple[str, torch.Tensor]]:
    upstream = f"{_BACKBONE}model."
    timm = {key.removeprefix(upstream): value for key, value in tensors.items() if key.startswith(upstream)}
    wanted = "before_norm" if timm else "after_norm"
    if config.backbone_features != wanted:
        raise ConversionError(
            f"it was trained on backbone features {wanted!r} ({'upstream' if timm else 'C-JEPA'} VideoSAUR), the "
            f"configuration says {config.backbone_features!r}: its slots would be wrong. Set backbone_features={wanted!r}."
        )
    has_decoder = any(key.startswith("decoder.") for key in tensors)
    if config.use_decoder and not has_decoder:
        raise ConversionError(
            "it holds no decoder, the configuration says use_decoder=True. Set it to False: slots do not need the decoder."
        )
    if has_decoder and not config.use_decoder:
        logger.warning("The decoder of the file is left out: the configuration says use_decoder=False.")
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("decoder.")}
    names = _renamed({key: t for key, t in tensors.items() if not key.startswith(upstream)}, _videosaur_name, prefix)
    if not timm:
        return names
    size, patches = config.backbone_config.hidden_size, config.mask_size**2
    if "pos_embed" in timm and timm["pos_embed"].shape[1:2] != (patches + 1,):
        raise ConversionError(
            f"its position embedding has {timm['pos_embed'].shape[1:2]} entries, frames of image_size={config.image_size} "
            f"need {patches + 1}: upstream resamples it in another way than this library. Set image_size accordingly."
        )
    separate = {}
    for key, tensor in timm.items():
        if ".attn.qkv." in key:
            if tensor.shape[0] != 3 * size:
                raise ConversionError(f"its {key} has {tensor.shape[0]} rows, backbone_config needs {3 * size}.")
            separate |= {key.replace(".qkv.", f".{n}."): part for n, part in zip("qkv", tensor.split(size))}
        else:
            separate[key] = tensor
    # not in such a file, and not used: the norm after the features, the token of masked patches
    separate = {
        "norm.weight": torch.ones(size),
        "norm.bias": torch.zeros(size),
        "embeddings.mask_token": torch.zeros(1, size),
    } | separate
    return names | _renamed(separate, _timm_name, f"{prefix}backbone.")


def _convert_videosaur(tensors, modules, config, statistics):
    if config is None:
        raise _need_config("videosaur", "the number of slots, of attention heads and of iterations")
    return _loaded(_built(_class("videosaur", 2), config), _videosaur_names(tensors, config))


def _videosaur_config(modules: dict, image_size: int | None):
    """Configuration of the encoder inside a world model, from its pickled modules (names of a VideoSAUR checkpoint)."""

    def known(path, name, kind=int):
        value = module_attribute(modules.get(path), name, kind)
        if value is None:
            raise _need_config("videosaur", f"{name} of {path}")
        return value

    backbone = module_attribute(modules.get("encoder.module.backbone"), "config", Record)
    if backbone is None or not isinstance(backbone.state, dict) or backbone.name != "Dinov2Config":
        raise _need_config("videosaur", "the backbone's configuration")
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "image_size", "patch_size")
    fields += ("layer_norm_eps", "hidden_act", "qkv_bias", "use_swiglu_ffn", "layerscale_value")
    values = {name: backbone.state[name] for name in fields if isinstance(backbone.state.get(name), (int, float, str))}
    first = known("processor.module", "first_step_corrector_args", dict).get("n_iters")
    corrector, output = "processor.module.corrector", "encoder.module.output_transform.layers"
    blocks = {m[1] for key in modules if (m := re.match(r"processor\.module\.predictor\.blocks\.(\d+)$", key))}
    if image_size is None:
        raise _need_config("videosaur", "the size of the frames")
    return _class("videosaur", 1)(
        num_slots=known("initializer", "n_slots"),
        slot_size=known("initializer", "dim"),
        image_size=image_size,
        backbone_config=values,
        transform_size=known(f"{output}.1", "out_features"),
        feature_size=known(f"{output}.3", "out_features"),
        num_iterations=known(corrector, "n_iters"),
        first_frame_iterations=first if isinstance(first, int) else known(corrector, "n_iters"),
        attention_size=known(f"{corrector}.to_q", "out_features"),
        attention_eps=known(corrector, "eps", (int, float)),
        use_gru=f"{corrector}.gru" in modules,
        use_mlp=f"{corrector}.mlp" in modules,
        num_predictor_layers=len(blocks),
        num_attention_heads=known("processor.module.predictor.blocks.0.self_attn", "num_heads"),
        use_decoder=False,  # no world model holds one
        intermediate_size=known("processor.module.predictor.blocks.0.linear1", "out_features"),
    )


# ---- SAVi and ALOE


def _convert_savi(tensors, modules, config, statistics):
    if config is None:
        raise _need_config("savi", "the number of iterations and how kernels are drawn")
    for key, size in (
        ("encoder_pos_embedding.grid", config.mask_size),
        ("decoder_pos_embedding.grid", config.decoder_grid_size),
    ):
        if key in tensors and tuple(tensors[key].shape) != (1, size, size, 4):
            raise ConversionError(
                f"its {key} has shape {tuple(tensors[key].shape)}, the configuration needs {(1, size, size, 4)}. Pass the "
                "configuration that belongs to this file."
            )
    # The grids are computed; the prior layer is in every file and never used.
    used = {
        k: t
        for k, t in tensors.items()
        if not k.endswith("_pos_embedding.grid") and not k.startswith("prior_slot_layer.")
    }
    return _loaded(_built(_class("savi", 2), config), _renamed(used, str))


_aloe_name = _substituted(
    [
        (r"^CLS$", "first_token"),
        (r"^transformer_encoder\.pos_embedding$", "position_embedding"),
        (r"^transformer_encoder\.layers\.(\d+)\.self_attn\.in_proj_", r"layers.\1.attention.qkv."),
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
)
# untrained parameters there, constants here
_ALOE_FLAGS = {"text_token": [1, 0], "vision_token": [0, 1], "cls_token": [0, 1]}
_ALOE_FLAGS |= {"mc_question_token": [1, 0], "mc_choice_token": [0, 1]}


def _convert_aloe(tensors, modules, config, statistics):
    if config is None:
        raise _need_config("aloe", "the number of attention heads, frames and slots")
    tensors = {key.removeprefix("transformer_model."): tensor for key, tensor in tensors.items()}
    for key, expected in _ALOE_FLAGS.items():
        flag = tensors.pop(key, None)
        if flag is not None and flag.tolist() != expected:
            raise ConversionError(f"its {key} is {flag.tolist()[:4]}, the released code's is {expected}.")
    return _loaded(_built(_class("aloe", 2), config), _renamed(tensors, _aloe_name))


_CONVERTERS = {"cjepa": _convert_cjepa, "videosaur": _convert_videosaur, "savi": _convert_savi, "aloe": _convert_aloe}


# --------------------------------------------------------------------------------------------------------------------
# Slots

_SPLITS = {"train": "train", "val": "validation", "test": "test"}


def is_original_slots(path: str | os.PathLike) -> bool:
    """Whether a file is one of the released pickles of arrays by split and video, rather than a checkpoint."""
    return _is_splits(read_for_streaming(path)[0])


def _is_splits(value) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and set(value) <= set(_SPLITS)
        and all(isinstance(split, dict) for split in value.values())
    )


def convert_original_slots(
    path: str | os.PathLike,
    actions: str | os.PathLike | None = None,
    proprio: str | os.PathLike | None = None,
    states: str | os.PathLike | None = None,
    *,
    output_dir: str | os.PathLike | None = None,
    frame_skip: int | None = None,
    encoder: Mapping | None = None,
    shape: tuple[int, int] | None = None,
    dtype: str = "float32",
    frames_per_file: int = 16384,
) -> Path:
    """The released slots (and actions, proprioception, states) as a slot dataset of this library.

    Files are streamed: memory does not grow with them. Names of the videos become `episode_id`; the splits are `train`,
    `validation` (there `val`) and `test`. Statistics are computed anew, from the training split, without NaN (in the
    released code one NaN, the action after the last frame, makes those of whole columns NaN).

    Args:
        path: pickle `{split: {video: float32 [T, N, D]}}`.
        actions, proprio, states: pickles `{split: {video: float32 [T, size]}}` of the same videos. Videos that they lack
            (the released ones have no test split) get NaN, unknown; videos without slots are left out.
        output_dir: where the dataset goes; default: beside `path`, under its name without ending. Called again after an
            interruption it goes on.
        frame_skip: suggested for windows; default: 5 with actions (Push-T), else 2 (CLEVRER).
        encoder: what made the slots (`{"name": ..., "revision": ...}`); default: the name of the file.
        shape: (N, D) that the slots must have, where it is known.
        dtype: "float32" or "float16" of the stored slots.
        frames_per_file: frames per Parquet file, which bounds memory.

    Returns:
        The folder; read it with [`load_slot_dataset`].

    Raises:
        ConversionError: a file cannot be read or holds something else, lengths differ, slots are not finite.
        FileNotFoundError, FileExistsError: a file is missing; the dataset is finished already.
    """
    path = Path(path)
    slots, release = _splits(path, 3)
    found = {tuple(array.shape[1:]) for _, _, array in _episodes(slots)}
    if shape is not None and found != {tuple(shape)}:
        raise ConversionError(
            f"{path}: slots [N, D] = {sorted(found)[:3]}, expected {list(shape)}: pass the entry of this file."
        )
    columns = {"actions": actions, "proprio": proprio, "state": states}
    columns = {name: (Path(file), *_splits(file, 2)) for name, file in columns.items() if file is not None}
    sizes = {name: _size(file, splits) for name, (file, splits, _) in columns.items()}
    names = {(split, name) for split, name, _ in _episodes(slots)}
    for file, splits, _ in columns.values():
        if names.isdisjoint((split, name) for split, name, _ in _episodes(splits)):
            raise ConversionError(
                f"{file}: it holds none of the videos of {path.name}. Give files that belong together."
            )
    without = {name: 0 for name in columns}
    release = [release, *(column[2] for column in columns.values())]
    writer = SlotDatasetWriter(
        path.with_suffix("") if output_dir is None else output_dir,
        frame_skip=frame_skip or (5 if actions is not None else 2),
        encoder=dict(encoder) if encoder else {"name": path.stem, "revision": None, "config_hash": None},
        source={"slots": path.name} | {name: file.name for name, (file, _, _) in columns.items()},
        dtype=dtype,
        frames_per_file=frames_per_file,
    )
    pending = 0
    for split, name, array in _episodes(slots):
        others = {column: splits.get(split, {}).get(name) for column, (_, splits, _) in columns.items()}
        for column, other in others.items():
            without[column] += other is None
        if name in writer.finished(_SPLITS[split]):
            continue
        try:
            episode = {"episode_id": name, "slots": array.numpy()}
            length = len(episode["slots"])
            for column, other in others.items():
                unknown = np.full((length, sizes[column]), np.nan, np.float32)
                episode[column] = unknown if other is None else other.numpy()
            writer.write(_SPLITS[split], episode)
        except ValueError as error:
            raise ConversionError(
                f"{path}: {split} video {str(name)[:80]!r} cannot be converted: {error}. Give files that belong together; "
                f"what is done stays in {writer.output_dir}."
            ) from None
        pending += array.dtype.itemsize * math.prod(array.shape)
        if pending > 2**27:
            pending = 0
            for let_go in release:
                if let_go is not None:
                    let_go(0)
    for column, count in without.items():
        if count:
            warnings.warn(
                f"{columns[column][0].name} lacks {count} videos of {path.name}: NaN (unknown) there", stacklevel=2
            )
    return writer.close()


def _episodes(splits: dict) -> Iterator[tuple[str, str, PickledArray]]:
    for split, videos in splits.items():
        for name, array in videos.items():
            yield split, name, array


def _splits(path: str | os.PathLike, axes: int):
    """The content of a pickle of arrays with `axes` axes by split and video, and what lets go of its pages."""
    splits, release = read_for_streaming(path)
    if not _is_splits(splits):
        raise ConversionError(
            f"{path}: it holds {_describe(splits)}. Expected a dictionary by split (train, val, test) of dictionaries of "
            "arrays by video; checkpoints are converted by convert_original_checkpoint."
        )
    for split, name, array in _episodes(splits):
        if not isinstance(name, str) or not isinstance(array, PickledArray) or array.dtype is None:
            raise ConversionError(f"{path}: {split} {str(name)[:80]!r} is no array but {_describe(array)}.")
        if len(array.shape) != axes or array.dtype.kind != "f":
            raise ConversionError(
                f"{path}: {split} {name[:80]!r} is {array.dtype} {array.shape}: expected floats with {axes} axes "
                f"{'[T, N, D]' if axes == 3 else '[T, size]'}."
            )
        if 0 in array.shape:
            raise ConversionError(f"{path}: {split} {name[:80]!r} is empty, {array.shape}: download the file again.")
    if not any(splits.values()):
        raise ConversionError(f"{path}: it holds no video.")
    if sum(array.dtype.itemsize * math.prod(array.shape) for *_, array in _episodes(splits)) > os.path.getsize(path):
        raise ConversionError(
            f"{path}: its videos share arrays, and would fill more than the file: it is made to do harm."
        )
    return splits, release


def _size(path: Path, splits: dict) -> int:
    sizes = {array.shape[1] for _, _, array in _episodes(splits)}
    if len(sizes) != 1:
        raise ConversionError(
            f"{path}: its arrays have {sorted(sizes)[:5]} columns: expected the same in every video."
        )
    return sizes.pop()
