"""Arguments that every training script shares: one dataclass, read from a JSON or YAML file and `--field value`."""

import contextlib
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator
from transformers import HfArgumentParser, PreTrainedConfig
from transformers.hf_argparser import HfArg


@dataclass(kw_only=True)
class TrainArguments:
    """Arguments of [`~cjepa_hf.training.trainer.train`]; scripts subclass it to add their own.

    Raises `ValueError` for a value out of range or of the wrong type.
    """

    # a run that resumes with another value of one of these would not be the run that its arguments tell of
    fixed_on_resume: ClassVar = ("seed", "batch_size", "optimizer")

    # > Parameters that control where the run lives
    output_dir: str = HfArg(help="Folder of the run: checkpoints/, log.jsonl and, at the end, the trained model.")
    resume_from_checkpoint: str = HfArg(
        default="auto",
        help="auto: continue from the newest complete checkpoint in output_dir, if any; none: start over (refused "
        "where output_dir holds checkpoints); or the path of one checkpoint.",
    )
    seed: int = HfArg(default=0, help="Everything random is a function of this number and the step.")

    # > Parameters that control the amount of training
    max_steps: int = HfArg(default=5000, help="Optimizer steps.")
    batch_size: int = HfArg(
        default=256, help="Samples per optimizer step, counted over all processes and accumulated micro-batches."
    )
    gradient_accumulation_steps: int = HfArg(
        default=1, help="Micro-batches a process cuts its share of a batch into: less memory, the same gradient."
    )

    # > Parameters that control the optimizer
    optimizer: Literal["adamw", "muon"] = HfArg(
        default="adamw", help="muon: Muon for the 2-D weights of the layer stack, AdamW for everything else."
    )
    learning_rate: float = HfArg(default=5e-4, help="Peak learning rate of AdamW.")
    muon_learning_rate: float = HfArg(default=5e-3, help="Peak learning rate of Muon.")
    weight_decay: float = HfArg(default=0.01, help="Decoupled; not applied to biases, norms and embeddings.")
    warmup_steps: int = HfArg(default=100, help="Steps of linear warm-up.")
    lr_scheduler: Literal["cosine", "exponential", "constant"] = HfArg(
        default="cosine",
        help="After the warm-up: cosine ends at lr_floor, exponential halves every lr_half_life steps.",
    )
    lr_floor: float = HfArg(default=0.0, help="Share of the peak learning rate that cosine ends at.")
    lr_half_life: int = HfArg(default=100_000, help="Steps in which exponential halves the learning rate.")
    gradient_clip: float = HfArg(default=1.0, help="Largest global gradient norm; 0: no clipping.")
    ema_decay: float = HfArg(
        default=0.0, help="Moving average of the weights, which is then what is evaluated and saved; 0: off."
    )

    # > Parameters that control speed
    mixed_precision: Literal["no", "bf16"] = HfArg(
        default="no", help="bf16 pays on GPUs; small models on a CPU train faster without."
    )
    torch_compile: bool = HfArg(default=False, help="Compile the model's forward with torch.compile.")
    shard_model: bool = HfArg(
        default=False,
        help="FSDP: every process keeps a part of the weights, gradients and optimizer states, for models that one GPU does "
        "not hold. As launching with examples/accelerate/gpu_fsdp.yaml.",
    )
    use_cpu: bool = HfArg(default=False, help="Train on the CPU although there is a GPU.")
    num_workers: int = HfArg(default=0, help="Processes that read data ahead; 0 reads in the training process.")
    keep_freed_memory: bool = HfArg(
        default=True,
        help="On a CPU with glibc, keep freed memory in the process instead of faulting it in again at every step.",
    )

    # > Parameters that control evaluation, checkpoints and reports
    log_every: int = HfArg(default=10, help="Steps that one line of log.jsonl averages.")
    eval_every: int = HfArg(default=500, help="Steps between evaluations on the validation split; 0: only at the end.")
    eval_samples: int = HfArg(default=2048, help="Validation samples used, evenly spread; 0: all.")
    save_every: int = HfArg(default=500, help="Steps between checkpoints; 0: only at the end.")
    save_total_limit: int = HfArg(default=2, help="Newest checkpoints kept; 0: all.")
    report_to: Literal["none", "tensorboard", "trackio"] = HfArg(
        default="none", help="Where curves go beside log.jsonl; needs `pip install cjepa-hf[trackers]`."
    )

    # > Parameters that control the Hub
    push_to_hub: bool = HfArg(default=False, help="Upload the trained model at the end.")
    hub_model_id: str | None = HfArg(default=None, help="Repository to upload to, as `name/model`.")
    hub_private: bool = HfArg(default=False, help="Create the repository private.")

    def __post_init__(self):
        _check_types(self)
        positive = ["max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "log_every"]
        positive += ["lr_half_life"]
        not_negative = ["muon_learning_rate", "weight_decay", "warmup_steps", "gradient_clip", "ema_decay"]
        not_negative += ["num_workers", "eval_every", "eval_samples", "save_every", "save_total_limit"]
        for name in (*positive, *not_negative):
            value = getattr(self, name)
            if not value >= 0 or (name in positive and value == 0):
                raise ValueError(f"{name} must be {'positive' if name in positive else 'at least 0'}, got {value!r}")
        if not 0 <= self.lr_floor <= 1:
            raise ValueError(f"lr_floor must be in [0, 1], a share of the peak learning rate, got {self.lr_floor!r}")
        if self.ema_decay >= 1:
            raise ValueError(f"ema_decay must be below 1 (0.999, say; 0 turns it off), got {self.ema_decay!r}")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: choose a divisor of batch_size"
            )
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs the repository to upload to: pass --hub_model_id name/model")


def parse_arguments(
    dataclass_types: type | Sequence[type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """Fills dataclasses from `[file.json|file.yaml] --field value ...`; the command line wins over the file.

    Raises `ValueError` for a field that no dataclass has, naming the nearest one, and for a file that does not parse.
    """
    types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(types, description=description, allow_abbrev=False)
    names = [field.name for type_ in types for field in dataclasses.fields(type_)]
    if argv and not argv[0].startswith("-"):
        defaults = _read_file(argv.pop(0))
        for key in defaults:
            if key not in names:
                raise ValueError(_unknown(key, names))
        for action in parser._actions:
            if action.dest in defaults:
                action.required = False
        parser.set_defaults(**defaults)
    *instances, rest = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ValueError(_unknown(rest[0].lstrip("-").split("=")[0], names))
    return tuple(instances)


def _unknown(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), names, n=1)
    return f"unknown argument {name!r}" + (f": did you mean {near[0]!r}?" if near else ": --help lists all arguments")


def _read_file(path: str) -> dict[str, Any]:
    if not path.endswith((".json", ".yaml", ".yml")):
        raise ValueError(f"unexpected argument {path!r}: pass --field value, or first a .json or .yaml file of fields")
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"cannot read the arguments file {path}: {error}") from error
    except Exception as error:  # two parsers, two families of errors
        raise ValueError(f"the arguments file {path} does not parse: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"the arguments file {path} must hold one mapping of fields to values, not {values!r}")
    return values


def _check_types(instance: Any) -> None:
    """Values from a file skip argparse's conversions: hold them to the annotations, and turn `1e-3` strings of YAML
    (a YAML 1.1 float needs a dot) and integers into floats."""
    hints = get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value, hint = getattr(instance, field.name), hints[field.name]
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise ValueError(f"{field.name} must be one of {', '.join(map(str, get_args(hint)))}, got {value!r}")
            continue
        allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if value is None and type(None) in allowed:
            continue
        kind = next(type_ for type_ in allowed if type_ is not type(None))
        if kind is float and (isinstance(value, str) or type(value) is int):
            with contextlib.suppress(ValueError):
                value = float(value)
            setattr(instance, field.name, value)
        if kind in (bool, int, float, str) and type(value) is not kind:
            raise ValueError(f"{field.name} must be {kind.__name__}, got {value!r}")


def config_arguments(config_class: type[PreTrainedConfig]) -> type:
    """A dataclass with the fields that a model's configuration declares itself, all optional, as text."""

    def field(name):
        text = f"{config_class.__name__}.{name}; default {getattr(config_class, name, None)!r}"
        return name, str | None, HfArg(default=None, help=text.replace("%", "%%"))

    text = f"The fields of [`{config_class.__name__}`]; those left out keep their defaults or follow the data."
    return make_dataclass(
        "ConfigArguments",
        [field(name) for name in config_fields(config_class)],
        kw_only=True,
        namespace={"__doc__": text, "types": config_class.__annotations__},
    )


def config_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    """Names of the fields that a configuration declares itself; an encoder inside is no argument."""
    return [name for name in config_class.__annotations__ if name not in ("model_type", "slot_encoder_config")]


def config_overrides(arguments: Any) -> dict[str, Any]:
    """The fields of [`config_arguments`] that were given, read by [`parse_value`] where they are text (those of a file
    may have their types already). ValueError for a value of the wrong type."""
    overrides = {}
    for name, value in dataclasses.asdict(arguments).items():
        if value is None:
            continue
        value = parse_value(value) if isinstance(value, str) else value
        try:
            type_validator(name, value, arguments.types[name])
        except TypeError as error:
            raise ValueError(f"{name}={value!r}: {error}") from None
        overrides[name] = value
    return overrides


def parse_value(text: str) -> Any:
    """ "3" -> 3, "0,2" or "[0, 2]" -> [0, 2], '{"a": 1}' -> {"a": 1}, "true" -> True, "none" -> None, other stays text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in ("none", "null"):
        return None
    try:
        return json.loads(f"[{text}]" if "," in text and text[0] not in "[{" else text)
    except json.JSONDecodeError:
        return text
