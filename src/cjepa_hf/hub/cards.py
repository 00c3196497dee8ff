"""Model and dataset cards, written from files alone: configuration, `source.json`, and files of measured results.

A card holds no number that is not in one of these files. Numbers of the paper are labelled as the paper's and never mixed
with measured ones.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from ..data.slots import METADATA_FILE

__all__ = ["card"]

_CITATION = """```bibtex
@inproceedings{nam2026causaljepa,
  title = {Causal-JEPA},
  author = {Nam and Le Lidec and Maes and LeCun and Balestriero},
  booktitle = {International Conference on Machine Learning (ICML)},
  year = {2026},
  url = {https://arxiv.org/abs/2602.11389}
}
```"""
# model_type: class, task on the Hub, tags, call, what it is for
_KINDS = {
    "cjepa": (
        "CJepaModel", "robotics", ["c-jepa", "world-model", "object-centric"],
        "future = model.rollout(slots, {inputs}num_steps=num_steps).slots  # slots [B, T, {num_slots}, {slot_size}]",
        "Imagining what object slots do next, and planning with what is imagined, in scenes like those it was trained on; "
        "research on object-centric world models.",
    ),
    "videosaur": (
        "VideoSaurModel", "image-feature-extraction", ["object-centric", "slots", "video"],
        "slots = model(pixel_values).slots  # pixel_values [B, T, 3, {image_size}, {image_size}] of its image processor",
        "Turning videos like those it was trained on into object slots, for a C-JEPA world model.",
    ),
    "savi": (
        "SaviModel", "image-feature-extraction", ["object-centric", "slots", "video"],
        "slots = model(pixel_values).slots  # pixel_values [B, T, 3, {image_size}, {image_size}] of its image processor",
        "Turning videos like those it was trained on into object slots, for a C-JEPA world model.",
    ),
    "color-isa": (
        "ColorIsaModel", "image-feature-extraction", ["object-centric", "slots"],
        "slots = model(pixel_values).slots  # pixel_values [B, T, 3, {image_size}, {image_size}] of its image processor",
        "Turning images of few objects of constant color, from one fixed camera, into object slots.",
    ),
    "crop-slots": (
        "CropSlotsModel", "image-feature-extraction", ["object-centric", "slots", "video"],
        "slots = model(pixel_values).slots  # pixel_values [B, T, 3, {image_size}, {image_size}] of its image processor",
        "Turning videos of few similar objects, of any color, from one fixed camera into object slots.",
    ),
    "dino-wm": (
        "DinoWmModel", "robotics", ["dino-wm", "world-model"],
        "future = model.rollout(slots, {inputs}num_steps=num_steps).slots  # slots [B, T, {num_slots}, {slot_size}]",
        "Imagining what slots or patches do next, and planning with what is imagined, in scenes like those it was trained "
        "on: a baseline of C-JEPA.",
    ),
    "patch-encoder": (
        "PatchEncoderModel", "image-feature-extraction", ["patches"],
        "slots = model(pixel_values).slots  # pixel_values [B, T, 3, {image_size}, {image_size}] of its image processor",
        "Turning images into the patch tokens of a frozen backbone, for a DINO-WM world model.",
    ),
    "aloe": (
        "AloeForVideoQuestionAnswering", "visual-question-answering", ["object-centric", "question-answering"],
        "logits = model(**inputs)  # of AloeProcessor: slots [B, {num_frames}, {num_slots}, {slot_size}] and questions",
        "Answering CLEVRER's questions about a video from its object slots.",
    ),
}  # fmt: skip


def card(
    folder: str | os.PathLike, repo_id: str | None = None, results: Iterable[str | os.PathLike] | None = None
) -> str:
    """README.md of a model or a slot dataset, from the files in its folder.

    Args:
        folder: with a config.json (a model, or an entry of `hub_configs`), or a slot dataset, or the entry of one.
        repo_id: name on the Hub; default: the folder's name.
        results: json files of `cjepa-hf evaluate` and `benchmarks/encoder_quality.py`; default: those that the folder's
            source.json names (relative to the repository of this package).

    Raises:
        ValueError: the folder is neither, or a file of results is missing or of another kind.
    """
    folder = Path(folder)
    source = _read(folder / "source.json") if (folder / "source.json").is_file() else {}
    repo_id = repo_id or folder.resolve().name
    if (folder / METADATA_FILE).is_file() or "dataset" in source:
        return _dataset_card(folder, repo_id, source)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is neither a model (config.json) nor a slot dataset ({METADATA_FILE})")
    if results is None:
        # the root of a checkout; in an installed package, where the build puts the results
        root = next(
            (p for p in (Path(__file__).parents[3], Path(__file__).parents[1]) if (p / "benchmarks").is_dir()), Path()
        )
        results = [root / path for path in source.get("results", [])]
    return _model_card(folder, repo_id, source, [Path(path) for path in results])


def _read(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): give a json file that is whole") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}: expected a json object")
    return value


def _model_card(folder: Path, repo_id: str, source: dict, results: list[Path]) -> str:
    config = _read(folder / "config.json")
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise ValueError(f"{folder}/config.json is of model_type {kind!r}: expected one of {', '.join(_KINDS)}")
    cls, task, tags, call, use = _KINDS[kind]
    measured = [row for path in results for row in _measured(path)]
    paper = source.get("paper", {}).get("results", [])
    evaluations = [
        EvalResult(
            task_type=row.get("task_type", "robotics"), dataset_type=row["dataset"], dataset_name=row["dataset"], metric_type=row["metric"],
            metric_name=row["name"], metric_value=row["value"],
        )
        for row in measured
        if not row["control"]
    ] + [
        EvalResult(
            task_type=row["task_type"], dataset_type=row["dataset"].lower(), dataset_name=row["dataset"],
            metric_type=row["metric"], metric_name=f"{row['name']}, as the paper reports", metric_value=row["value"],
            source_name="the C-JEPA paper", source_url=source["paper"]["url"],
        )
        for row in paper
    ]  # fmt: skip
    data = ModelCardData(
        license=source.get("license"), library_name="cjepa_hf", pipeline_tag=task if task != "robotics" or config.get("action_size") else None, tags=tags,
        model_name=repo_id.split("/")[-1], eval_results=evaluations or None,
    )  # fmt: skip
    inputs = "actions=actions, " if config.get("action_size") else ""
    inputs += "proprio=proprio, " if config.get("proprio_size") else ""
    lines = [f"---\n{data.to_yaml()}\n---", f"# {repo_id}", f"{source.get('title', _TITLES[kind])}. {_about(config)}"]
    if origin := source.get("original"):
        lines.append(_origin(origin))
    lines += [
        "## Load",
        f"```python\nfrom cjepa_hf import {cls}\n\n"
        f'model = {cls}.from_pretrained("{repo_id}", use_safetensors=True)\n'
        f"{call.format_map({**config, 'inputs': inputs})}\n```",
        "## Intended use",
        use + " Not for decisions about people or safety.",
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(config, source)),
        "## Results",
        _results(measured, paper, source),
        "## Training",
        _training(folder, source),
        *_license(source),
    ]
    return "\n\n".join(lines) + "\n"


_CONTROLS = ("replay", "random", "no-op")  # rows of an evaluation that are no results of the model
_TITLES = {
    "cjepa": "A C-JEPA world model",
    "videosaur": "A VideoSAUR slot encoder",
    "savi": "A stochastic SAVi slot encoder",
    "color-isa": "A small slot encoder for objects of constant color",
    "crop-slots": "A small slot encoder that follows objects in front of a constant background",
    "dino-wm": "A DINO-WM world model",
    "patch-encoder": "An encoder of patches, over a frozen backbone",
    "aloe": "An ALOE, which answers questions about videos from object slots",
}


def _about(config: Mapping) -> str:
    kind = config["model_type"]
    if kind == "patch-encoder":
        return (
            f"It turns frames of {config['image_size']} x {config['image_size']} pixels into {config['grid_size']} x "
            f"{config['grid_size']} tokens of size {config['feature_size'] * config['merge'] ** 2}, features of its backbone "
            f"({config['backbone_config']['model_type']})."
        )
    slots = f"{config['num_slots']} slots of size {config['slot_size']}"
    if kind == "aloe":
        return f"It reads {slots} in each of {config['num_frames']} frames."
    if kind not in ("cjepa", "dino-wm"):
        return f"It turns frames of {config['image_size']} x {config['image_size']} pixels into {slots}."
    inputs = [f"{name} [{size}]" for name in ("action", "proprio") if (size := config.get(f"{name}_size"))]
    encoder = config.get("slot_encoder_config")
    what = "slot "
    if config.get("token_type") == "patches":
        slots, what = slots.replace("slots", "patches"), ""
    return (
        f"It predicts {slots}, {config['frame_skip']} frames ahead per step and {config['prediction_length']} step(s) at a "
        f"time, from up to {config['history_length']} steps"
        + (f" with {' and '.join(inputs)} blocks" if inputs else "")
        + (
            f"; the {what}encoder ({encoder['model_type']}) is inside."
            if encoder
            else f"; the {what}encoder is not inside."
        )
    )


def _origin(origin: Mapping) -> str:
    if origin["file"] is None:
        return f"No original file in {origin['repository']}: {origin['note']}."
    others = [f"`{origin[name]}`" for name in ("actions", "proprio", "states") if name in origin]
    others = f" with {', '.join(others)}" if others else ""
    return (
        f"Converted from `{origin['file']}`{others} of [{origin['repository']}](https://huggingface.co/"
        f"{origin['repository']}) by `cjepa-hf convert`; the weights and numbers are the authors', the file format and the "
        "code are not."
    )


def _limits(config: Mapping, source: Mapping) -> list[str]:
    kind, original = config["model_type"], "original" in source
    limits = ["It knows the kind of scene it was trained on and no other."]
    if kind == "patch-encoder":
        limits = [
            "Its tokens are features of its backbone, as they are: they know what the backbone knows, not objects."
        ]
    if kind in ("cjepa", "dino-wm"):
        if not config.get("slot_encoder_config"):
            encoder = f" (`{source['encoder']}`)" if "encoder" in source else ""
            limits.append(
                f"It takes slots of the encoder it was trained over{encoder}; those of another mean nothing to it."
            )
        if original and config.get("action_size"):
            limits.append(
                "The original file has no statistics of actions and proprioception: planning in units of the environment "
                "refuses until they are set (`model.set_statistics`, or `statistics=` when it is converted)."
            )
        if original and config.get("num_masked_slots"):
            limits.append("The released training code hides the same slots in every sample, not random ones.")
        if original and not config.get("action_size"):
            limits.append(
                "In the released evaluation only predictive questions see imagined frames: the other accuracies depend on "
                "the slot encoder and on the training of ALOE, hardly on this model."
            )
    if kind == "cjepa":
        limits.append('"Causal" means predictive dependence that survives masking; no causal graph is identified.')
    if kind == "videosaur" or (config.get("slot_encoder_config") or {}).get("model_type") == "videosaur":
        limits.append("Slots start from random noise: give a generator for slots that can be had again.")
    if kind == "savi":
        limits.append("Slots are drawn at random in inference too (`sample_in_eval`).")
    if kind == "color-isa" or (config.get("slot_encoder_config") or {}).get("model_type") == "color-isa":
        limits.append("Objects are told apart by their constant colors, from one fixed camera.")
    if kind == "crop-slots" or (config.get("slot_encoder_config") or {}).get("model_type") == "crop-slots":
        limits.append(
            "The camera must not move, and the background is the constant one of its training; objects are of similar size, "
            "hardly hide each other, and move by less than a radius per frame: give it every frame."
        )
    if kind == "aloe":
        if "encoder" in source:
            limits.append(f"It takes slots of `{source['encoder']}`; those of another encoder mean nothing to it.")
        limits.append("It knows the words and answers of CLEVRER alone.")
    return limits


def _measured(path: Path) -> list[dict]:
    """Rows {dataset, metric, name, control, value, interval, n, file} of a file of results."""
    values = _read(path)
    file = "/".join(path.parts[-3:]) if path.parts[-3:-1] == ("benchmarks", "results") else path.name
    if values.get("protocol", {}).get("name", "").startswith("cf-rollout") and "factual" in values:
        return [row | {"file": file} for row in _measured_rollouts(values)]
    if values.get("rows") and all({"questions", "overall"} <= set(row) for row in values["rows"]):
        return [row | {"file": file} for row in _measured_answers(values)]
    if "protocol" in values and "rows" in values:
        names = [row["name"] for row in values["rows"]]
        return [
            {
                "dataset": values["protocol"]["name"], "metric": "success_rate",
                "name": f"success, {row['name']}" + (f", planner seed {row['seed']}" if names.count(row["name"]) > 1 else ""),
                "control": row["name"] in _CONTROLS,
                "value": round(row["rate"], 3), "interval": (round(row["low"], 3), round(row["high"], 3)), "n": row["n"],
                "file": file,
            }
            for row in values["rows"]
        ]  # fmt: skip
    if "fg_ari" in values and "probes" in values:
        probes = values["probes"]["smooth"]
        rows = [("foreground_ari", "foreground ARI of the decoder's masks", values["fg_ari"]["decoder"])]
        rows += [
            (
                f"median_error_{name}",
                f"median error of a ridge probe, {name.replace('_', ', ')}",
                probes[name]["median"],
            )
            for name in ("agent_px", "block_px", "block_deg")
        ]
        return [
            {
                "dataset": "push_t", "metric": metric, "name": name, "value": round(value, 3), "interval": None, "control": False,
                "n": values["frames"], "file": file,
            }
            for metric, name, value in rows
        ]  # fmt: skip
    raise ValueError(
        f"{path} holds no results that a card can show: expected a file of `cjepa-hf evaluate --output` or of "
        "benchmarks/encoder_quality.py"
    )


def _measured_rollouts(values: dict) -> list[dict]:
    """The rows of a file of cf-rollout that say how good its first model is, and those of what it is compared with."""
    first, *others = values["models"]
    own = [first, f"{first}, empty"]
    controls = ["copy the video", "constant velocity"] + [name + how for name in others for how in ("", ", empty")]
    pixels = ", from pixels" if values["slots"]["encoder"] != "state" else ""

    def row(name: str, metric: str, what: str, found: dict) -> dict:
        return {
            "dataset": values["protocol"]["name"], "task_type": "other", "metric": metric, "name": f"{what}, {name}{pixels}",
            "control": name in controls, "value": round(found["value"], 3),
            "interval": (round(found["low"], 3), round(found["high"], 3)), "n": found["n"],
        }  # fmt: skip

    kept = (*controls, *own)
    rows = [
        row(r["name"], "f1", "F1 of the pairs that meet in the video as it is", r["f1"])
        for r in values["factual"]
        if r["name"] in kept
    ]
    for found in values["rows"]:
        if found["start"] == "B" and found["name"] in kept:
            rows += [
                row(found["name"], "position_error", f"error of displaced objects {h} frames after the removal", error)
                for h, error in found["position_error"].items()
                if h in ("32", "64")
            ]
            rows.append(row(found["name"], "accuracy", "mean accuracy of the four cells", found["cell_mean"]))
    return rows


def _measured_answers(values: dict) -> list[dict]:
    """The rows of a file of `python -m cjepa_hf.evaluation.clevrer`: questions right, by type."""
    found = []
    for row in values["rows"]:
        who = {"model": Path(row["name"]).name, "text-only": "the words alone", "majority": "most frequent answer"}
        for kind, rate in {**row["questions"], "all": row["overall"]}.items():
            found.append(
                {
                    "dataset": Path(values["dataset"]).name, "task_type": "visual-question-answering", "metric": "accuracy",
                    "name": f"{kind} questions right, {who[row['kind']]}", "control": row["kind"] != "model",
                    "value": round(rate["rate"], 3), "interval": (round(rate["low"], 3), round(rate["high"], 3)),
                    "n": rate["n"],
                }
            )  # fmt: skip
    return found


def _results(measured: list[dict], paper: list[dict], source: Mapping) -> str:
    parts = []
    if measured:
        rows = [
            f"| {row['dataset']} | {row['name']} | {row['value']} | "
            f"{'{} to {}'.format(*row['interval']) if row['interval'] else '-'} | {row['n']} | `{row['file']}` |"
            for row in measured
        ]
        head = "| on | what | value | 95 % interval | n | from |\n|---|---|---|---|---|---|"
        parts.append("Measured by this project:\n\n" + "\n".join([head, *rows]))
    if paper:
        rows = [f"| {row['dataset']} | {row['name']} | {row['value']:.2f} |" for row in paper]
        head = f"As [the paper]({source['paper']['url']}) reports them, not measured here"
        parts.append(
            "\n".join([f"{head} ({source['paper']['protocol']}):\n", "| on | what | value |\n|---|---|---|", *rows])
        )
    return "\n\n".join(parts) or "None: nothing was measured for this repository."


def _training(folder: Path, source: Mapping) -> str:
    lines = [f"- data: {source['training_data']}"] if "training_data" in source else []
    lines += [f"- training: {source['training']}"] if "training" in source else []
    if (folder / "training_args.json").is_file():
        lines.append("- all arguments: `training_args.json`")
    if (folder / "training_results.json").is_file():
        values = _read(folder / "training_results.json")
        lines.append(f"- {values['step']} steps on `{values['dataset']}`; what was measured: `training_results.json`")
    return "\n".join(lines) or "Not known."


def _license(source: Mapping) -> list[str]:
    if "license" not in source:  # its owner has not said
        return ["## Citation", _CITATION]
    license = source["license"]
    whose = ", as the original repository states" if source.get("original", {}).get("file") else ""
    return ["## License and citation", f"`{license}`{whose}.", _CITATION]


def _dataset_card(folder: Path, repo_id: str, source: dict) -> str:
    if (folder / METADATA_FILE).is_file():
        metadata = _read(folder / METADATA_FILE)
        splits = list(metadata["splits"])
        counts = [f"| {name} | {n['num_episodes']} | {n['num_frames']} |" for name, n in metadata["splits"].items()]
        table = "\n".join(["| split | episodes | frames |\n|---|---|---|", *counts])
        columns = list(metadata["columns"])
        encoder = metadata["encoder"]["name"]
    else:  # the entry of a dataset that is not converted yet
        metadata = source["dataset"]
        splits, columns, encoder = metadata["splits"], metadata["columns"], source["encoder"]
        table = f"Splits: {', '.join(splits)}."
    data = DatasetCardData(
        license=source.get("license"), tags=["object-centric", "slots", "world-model"],
        pretty_name=source.get("title", repo_id.split("/")[-1]),
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
            }
        ],
    )  # fmt: skip
    n, d = metadata["num_slots"], metadata["slot_size"]
    others = "".join(f", `{column}`" for column in columns)
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id}",
        f"{source.get('title', 'Object slots')}, made by the encoder `{encoder}`: one row per episode, with `episode_id`, "
        f"`slots` [T, {n}, {d}]{others} (T rows each).",
    ]
    if origin := source.get("original"):
        lines.append(_origin(origin))
    lines += [
        table,
        "## Load",
        "```python\nfrom cjepa_hf.data import SlotWindows, load_slot_dataset\n\n"
        f'windows = SlotWindows(load_slot_dataset("{repo_id}"), frame_skip={metadata["frame_skip"]})\n```',
        "## Intended use",
        "Training and evaluating models of slots, such as C-JEPA.",
        "## Limits",
        "- Slots of one encoder: models trained on them take no others.\n"
        "- An action of NaN is unknown (nothing followed the last frame). Statistics are of the training split alone, and "
        f"are in `{METADATA_FILE}`.",
        "## Made from",
        f"{source.get('training_data', 'See `source` in ' + METADATA_FILE)}.",
    ]
    lines += _license(source)
    return "\n\n".join(lines) + "\n"
