"""World models against each other on equal terms: `cjepa-hf evaluate --suite NAME`, `examples/compare_push_t.py`.

A suite is a table of cells. A cell is a dict of command-line options of `examples/train.py` (or `train_dino_wm.py`); the
cells of a suite share data, steps, batch, optimizer, tasks and planner, and each is trained with several seeds. A cell is
done when its json exists: the same command goes on with what is missing.

- `push-t`: the paper's baselines. DINO-WM over patch tokens of the slot encoder's own features, the same autoregressive
  predictor over slots (OC-DINO-WM), OC-JEPA and C-JEPA. All predict the change from the last frame.
- `masking`: the paper's ablation, object, token and tube masks over 25 % and 50 % of the slots, and our masks of what moves.
  Histories are not cut short here: one or two frames leave the kinds of masks little to differ in.
- `auxiliary`: actions and proprioception as tokens or concatenated to every slot; 1, 2 and 3 frames of history.
- `flags`: what is ours and not the paper's (norm before attention, residual prediction, anchor, mixed history), each alone on
  top of the released objective (1 of 4 slots hidden).
"""

import argparse
import csv
import io
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import success_rate

# The recipe of examples/push_t/world_model.yaml in parts: every cell has the first, and its own choice of the others.
RECIPE = {
    "max_steps": 16000, "batch_size": 128, "optimizer": "muon", "muon_learning_rate": 0.005, "learning_rate": 0.0015,
    "weight_decay": 0.0001, "warmup_steps": 200, "ema_decay": 0.999, "gradient_clip": 1.0, "slot_noise": 0.02,
    "eval_every": 0, "save_every": 1000, "log_every": 50,
}  # fmt: skip
MIXED_HISTORY = {"history_crop_probability": 0.7}
OURS = {"norm_first": "true", "residual_prediction": "last", "anchor": "last_visible"}
HIDDEN_ALONE = {"anchor_in_history_loss": "false"}
MOVING = {"num_masked_slots": "0,2", "mask_static_slots": "false", "static_slot_tolerance": 0.1}
NO_MASKS = {"num_masked_slots": 0}
# An autoregressive model learns from histories of every length as it is.
DINO_WM = {"residual_prediction": "last"}
SIZES = {
    "small": {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256, "hidden_dropout": 0.0,
              "attention_dropout": 0.0},
    "paper": {"num_hidden_layers": 6, "num_attention_heads": 16, "intermediate_size": 2048, "hidden_dropout": 0.1,
              "attention_dropout": 0.1, "batch_size": 256},
}  # fmt: skip
HEAD_DIM = {"small": 16, "paper": 64}

C_JEPA = MIXED_HISTORY | OURS | HIDDEN_ALONE | MOVING
THREE_FRAMES = OURS | HIDDEN_ALONE
CONCATENATED = {"auxiliary_fusion": "concat", "action_embedding_size": 8, "proprio_embedding_size": 8}
PATCHES, SLOTS = "dino-wm of patches", "dino-wm of slots"
SUITES: dict[str, dict[str, dict[str, Any]]] = {
    "push-t": {
        "dino-wm-patches": {"model": PATCHES, **DINO_WM},
        "oc-dino-wm": {"model": SLOTS, **DINO_WM},
        "oc-jepa": C_JEPA | NO_MASKS,
        "c-jepa": C_JEPA,
    },
    "masking": {
        "none": THREE_FRAMES | NO_MASKS,
        **{
            f"{kind}-{25 * count}%": THREE_FRAMES | {"mask_strategy": kind, "num_masked_slots": count}
            for count in (1, 2)
            for kind in ("object", "token", "tube")
        },
        "object-0-2-moving": THREE_FRAMES | MOVING,
    },
    "auxiliary": {
        "tokens": C_JEPA,
        "concatenated": C_JEPA | CONCATENATED,
        "history-2": C_JEPA | {"history_length": 2},
        "history-1": C_JEPA | {"history_length": 1},
    },
    "flags": {
        "none": {},
        "none-adamw": {"optimizer": "adamw", "learning_rate": 0.0005},
        "norm-first": {"norm_first": "true"},
        "last-anchor": {"anchor": "last_visible"},
        # which of two visible frames a prediction is a change from is unknown with an anchor in the first
        "residual": {"residual_prediction": "last", "anchor": "last_visible"},
        "mixed-history": MIXED_HISTORY,
        "all": MIXED_HISTORY | OURS,
    },
}
# What the differences of a suite are taken from.
REFERENCES = {"push-t": "c-jepa", "masking": "none", "auxiliary": "tokens", "flags": "none"}
# A plan starts from one observed frame. While it is imagined the model sees all the frames it was trained with, except where
# every model of the suite has learned from single frames: one is enough then, and cheaper.
PLANNERS = {name: "default/window=1" if name == "push-t" else "default/window=3" for name in SUITES}
PAPER_TASKS, PAPER_PLANS = 50, 2


def cell_names(suite: str, seeds: Sequence[int]) -> list[tuple[str, int]]:
    """(variant, seed) of every cell, the first seed of all variants before the second of any."""
    return [(variant, seed) for seed in seeds for variant in SUITES[suite]]


def training_options(suite: str, variant: str, seed: int, *, size: str = "small", **more: Any) -> dict[str, Any]:
    """The options of a cell's training beside its folders; `model` says of which kind it is."""
    cell = dict(SUITES[suite][variant])
    model = cell.pop("model", "cjepa")
    options = {"model": model, **RECIPE, **SIZES[size], "seed": seed, **cell, **more}
    if model != "cjepa":
        options |= {"head_dim": HEAD_DIM[size], "token_type": model.rsplit(" ", 1)[1]}
    return options


def planner_of(suite: str, variant: str) -> str:
    window = SUITES[suite][variant].get("history_length")
    return f"default/window={window}" if window else PLANNERS[suite]


# --- data ----------------------------------------------------------------------------------------------------------


def prepare_data(args: argparse.Namespace, patches: bool) -> dict[str, dict[str, Any]]:
    """
    {"slots": {"dataset", "encoder", "described"}, "patches": ...}: the slot dataset (`args.slots`, or extracted) and, if
    asked for, patch tokens of the same episodes by the same encoder's features. Everything is resumable.
    """
    from cjepa_hf.data.extract import extract_slots

    extraction = {"num_frames": args.num_frames, "device": args.device, "progress": not args.json}
    slots = args.slots
    if slots is None:
        slots = extract_slots(args.episodes, str(args.encoder), args.output_dir / "slots", **extraction)
    data = {"slots": {"dataset": slots, "encoder": args.encoder, "described": _describe(slots)}}
    if patches:
        encoder = args.output_dir / "patch_encoder"
        if not (encoder / "model.safetensors").is_file():
            _make_patch_encoder(args, encoder)
        tokens = args.output_dir / "patch_tokens"
        extract_slots(args.episodes, str(encoder), tokens, dtype="float16", **extraction)
        data["patches"] = {"dataset": tokens, "encoder": encoder, "described": _describe(tokens)}
        if data["patches"]["described"] != data["slots"]["described"]:
            raise ValueError(
                f"the slots in {slots} are of other episodes or frames ({data['slots']['described']}) than the patch "
                f"tokens in {tokens} ({data['patches']['described']}): leave --slots out, and both are extracted from "
                "--episodes"
            )
    return data


def _make_patch_encoder(args: argparse.Namespace, folder: Path) -> None:
    """8 x 8 tokens of 2 x 2 averages of the encoder's features, standardized on frames of the first episodes."""
    import torch

    from cjepa_hf import ColorIsaImageProcessor, PatchEncoderModel
    from cjepa_hf.data.video import open_source
    from cjepa_hf.training.trainer import save_model_folder

    encoder = PatchEncoderModel.from_backbone(str(args.encoder), grid_size=8, merge=2)
    processor = ColorIsaImageProcessor(size=encoder.config.image_size)
    videos = open_source(str(args.episodes)).splits["train"]
    frames = [next(video.chunks(16, stride=5)) for video in itertools.islice(videos, 100)]
    encoder.set_feature_statistics(torch.cat([processor(clip)["pixel_values"] for clip in frames]))
    save_model_folder(encoder, folder, {"preprocessor_config.json": processor.to_json_string()})


def _describe(dataset: Path) -> dict[str, Any]:
    metadata = json.loads((Path(dataset) / "slot_dataset.json").read_text(encoding="utf-8"))
    return {"content": metadata["source"]["content"], "splits": metadata["splits"]}


# --- one cell ------------------------------------------------------------------------------------------------------


def cell_settings(suite: str, variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Everything whose other value would make another cell."""
    more = {} if args.max_steps is None else {"max_steps": args.max_steps}
    given = zip(args.more[::2], args.more[1::2], strict=True)
    more |= {name.removeprefix("--"): int(value) if value.isdigit() else value for name, value in given}
    return {
        "training": training_options(suite, variant, seed, size=args.size, **more),
        "planner": args.planner or planner_of(suite, variant),
        "protocol": args.protocol,
        "num_tasks": args.num_tasks,
    }


def run_cell(suite: str, variant: str, seed: int, args: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    """Trains (an interrupted training continues), evaluates and times a cell; writes and returns its results."""
    from transformers import AutoConfig

    from cjepa_hf.training.trainer import write_text

    from .protocols import load_protocol, measured_on
    from .suite import evaluate_push_t

    settings = cell_settings(suite, variant, seed, args)
    folder = args.output_dir / suite / f"{variant}_seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    options = dict(settings["training"])
    model = options.pop("model")
    source = data["patches" if model == PATCHES else "slots"]
    options |= {"dataset": source["dataset"], "slot_encoder": source["encoder"], "output_dir": folder}
    options |= {"use_cpu": "true"} if args.device == "cpu" else {}
    training = train_apart(model, [word for key, value in options.items() for word in (f"--{key}", str(value))])
    results = evaluate_push_t(
        str(folder),
        protocol=args.protocol,
        planners=[settings["planner"]],
        num_tasks=args.num_tasks,
        device=args.device,
        progress=not args.json,
    )
    config = AutoConfig.from_pretrained(folder)
    cell = {"suite": suite, "variant": variant, "seed": seed, **settings, "data": source["described"]}
    cell |= {"tokens": config.num_slots, "width": config.slot_size, "trained": training}
    cell |= {"evaluation": results["rows"][0]}
    if args.time_plans and seed == args.seeds[0]:
        cell["paper_planner_seconds"] = time_plans(
            folder, "paper", load_protocol(args.protocol), args.time_plans, args.device
        )
    cell |= {**measured_on(args.device), "processor": _processor(), "load_average": os.getloadavg()[0]}
    cell |= {"commit": _commit()}
    write_text(_result_file(args.output_dir, suite, variant, seed), json.dumps(cell, indent=1) + "\n")
    return cell


def train_apart(model: str, words: list[str]) -> dict[str, Any]:
    """[`train_here`] in a process of its own: the memory it needs is its own, and every cell starts alike."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(train_here, model, words).result()


def train_here(model: str, words: list[str]) -> dict[str, Any]:
    """
    Runs a training and tells what it took. `seconds`: wall time of the steps alone; `cpu_seconds`: of all threads, with
    reading the data and the last evaluation; `peak_memory_mib`: the process's own (files read through the memory map do
    not count), and `peak_gpu_memory_mib` where there is a GPU. The latter three are of the last process if it `resumed`.
    """
    import torch

    from cjepa_hf.training import cjepa, dino_wm
    from cjepa_hf.training.trainer import read_log, write_text

    folder = Path(words[words.index("--output_dir") + 1])
    record = folder / "resources.json"
    began = time.process_time()
    with _Watch() as memory:
        result = (cjepa if model == "cjepa" else dino_wm).main(words)
    trained = json.loads((folder / "training_results.json").read_text(encoding="utf-8"))
    if record.is_file():  # complete before: this time nothing was trained
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["steps"] == result.step:
            return known
    report = {
        "steps": result.step,
        "seconds": [line["seconds"] for line in read_log(folder / "log.jsonl") if "seconds" in line][-1],
        "cpu_seconds": round(time.process_time() - began, 1),
        "peak_memory_mib": round(memory.peak / 2**20),
        "resumed": result.resumed_from is not None,
        "parameters": trained["parameters"],
        "validation": trained["validation"],
    }
    if torch.cuda.is_available():
        report["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    write_text(record, json.dumps(report, indent=1))
    return report


class _Watch:
    """The most anonymous memory of this process in bytes, looked at five times a second; ends with the parent."""

    def __enter__(self):
        self.peak, self._done, self._parent = 0, threading.Event(), os.getppid()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while True:
            self.peak = max(self.peak, self._now())
            if os.getppid() != self._parent:  # killed: the training saves a checkpoint and stops, as with Ctrl-C
                os.kill(os.getpid(), signal.SIGTERM)
                self._done.wait()
                os._exit(1)  # nobody waits for what would be said
            if self._done.wait(0.2):
                break

    @staticmethod
    def _now() -> int:
        try:
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
        except (OSError, StopIteration):  # not Linux: the peak of everything resident
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else 1024 * peak


def time_plans(folder: Path, planner: str, protocol: dict[str, Any], count: int, device: str = "cpu") -> list[float]:
    """Seconds of the first plan of each of the first `count` tasks, one task after the other, encoding included."""
    from transformers import AutoImageProcessor, AutoModel

    from .push_t import run_policy
    from .suite import make_policy

    model = AutoModel.from_pretrained(folder, use_safetensors=True).eval().to(device)
    policy = make_policy(model, planner, image_processor=AutoImageProcessor.from_pretrained(folder))
    seconds = []
    for task in range(count):
        one = {key: value[task : task + 1] for key, value in protocol["tasks"].items()}
        run = run_policy(policy, protocol | {"budget": 1, "tasks": one}, progress=False)
        seconds.append(run.seconds_per_plan)
    return seconds


def _processor() -> str:
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """The commit of the checkout that this file is of, with a + where the package was changed since; None without one."""

    def git(*words):
        return subprocess.run(["git", "-C", str(Path(__file__).parents[1]), *words], capture_output=True, text=True)

    try:
        if git("ls-files", "--error-unmatch", __file__).returncode:
            return None
        return git("rev-parse", "--short", "HEAD").stdout.strip() + (
            "+" if git("diff", "HEAD", "--", ".").stdout else ""
        )
    except OSError:  # no git
        return None


# --- tables --------------------------------------------------------------------------------------------------------


def task_difference(first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """
    Mean of first - second, bool [seeds, tasks] each, the k-th seed of one against the k-th of the other on the same tasks,
    with a 95 % interval over tasks: a task counts once however many seeds tried it.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"the same seeds and tasks are needed, got {first.shape} and {second.shape}")
    per_task = (first - second).mean(axis=0)
    error = per_task.std(ddof=1) / np.sqrt(len(per_task)) if len(per_task) > 1 else float("nan")
    mean = float(per_task.mean())
    return {
        "difference": mean,
        "low": mean - 1.96 * float(error),
        "high": mean + 1.96 * float(error),
        "by_seed": (first - second).mean(axis=1).tolist(),
        "tasks": len(per_task),
    }


def _result_file(folder: Path, suite: str, variant: str, seed: int) -> Path:
    return folder / suite / f"{variant}_seed{seed}.json"


def tabulate(suite: str, folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """{"suite", "reference", "rows": one per variant with results, "missing": cells without, ...} from the files."""
    found: dict[str, dict[int, Any]] = {}
    missing = []
    for variant, seed in cell_names(suite, seeds):
        path = _result_file(folder, suite, variant, seed)
        if path.is_file():
            found.setdefault(variant, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
        else:
            missing.append(f"{variant}_seed{seed}")
    reference = REFERENCES[suite]
    rows = []
    for variant in SUITES[suite]:
        if variant in found:
            cells = found[variant]
            rows.append({"variant": variant, "seeds": sorted(cells), **_row(list(cells.values()))})
            both = sorted(cells.keys() & found.get(reference, {}).keys())
            if both and variant != reference:
                pairs = [[side[seed]["evaluation"]["success"] for seed in both] for side in (cells, found[reference])]
                rows[-1]["difference"] = task_difference(*pairs)
    shared = ("protocol", "num_tasks", "device", "hardware", "processor", "versions", "commit")
    every = [cell for cells in found.values() for cell in cells.values()]
    measured = {key: _alike([cell[key] for cell in every]) for key in shared}
    return {"suite": suite, "reference": reference, **measured, "rows": rows, "missing": missing}


def _row(cells: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(values):
        return statistics.fmean(values)

    successes = [cell["evaluation"]["success"] for cell in cells]
    trained = [cell["trained"] for cell in cells]
    whole = [one for one in trained if not one["resumed"]]
    errors = [one["validation"] for one in trained]
    steps = max(int(name.removeprefix("copy_mse_")) for name in errors[0] if name.startswith("copy_mse_"))
    row = {
        **success_rate(np.concatenate(successes)),
        "by_seed": [float(np.mean(success)) for success in successes],
        "tokens": cells[0]["tokens"],
        "width": cells[0]["width"],
        "parameters": trained[0]["parameters"],
        "steps": trained[0]["steps"],
        "batch_size": cells[0]["training"]["batch_size"],
        "planner": cells[0]["planner"],
        "imagined_frames": steps,
        "error_against_copying": mean([e[f"mse_{steps}"] / e[f"copy_mse_{steps}"] for e in errors]),
        "training_minutes": mean([one["seconds"] for one in trained]) / 60,
        # of a resumed training only the last part is known
        "training_cpu_minutes": None if not whole else mean([one["cpu_seconds"] for one in whole]) / 60,
        "peak_memory_mib": max(one["peak_memory_mib"] for one in trained),
        "plan_seconds_per_task": mean(
            [cell["evaluation"]["seconds_per_plan"] * cell["evaluation"]["plans_per_task"] for cell in cells]
        ),
    }
    row["load_average"] = max(cell["load_average"] for cell in cells)
    gpu = [one["peak_gpu_memory_mib"] for one in trained if "peak_gpu_memory_mib" in one]
    row |= {"peak_gpu_memory_mib": max(gpu)} if gpu else {}
    seconds = [value for cell in cells for value in cell.get("paper_planner_seconds", ())]
    if seconds:
        row["paper_seconds_per_plan"] = mean(seconds)
        row["paper_plans_timed"] = len(seconds)
        row[f"paper_seconds_of_{PAPER_TASKS}_tasks_extrapolated"] = PAPER_TASKS * PAPER_PLANS * mean(seconds)
    return row


def _alike(values: list[Any]) -> Any:
    """The one value of all cells, or a list of those there are."""
    different = [value for k, value in enumerate(values) if value not in values[:k]]
    return different[0] if len(different) == 1 else different


def print_table(table: dict[str, Any]) -> None:
    """The table of [`tabulate`], and what its columns mean."""
    rows, total = table["rows"], f"paper_seconds_of_{PAPER_TASKS}_tasks_extrapolated"
    timed = any(total in row for row in rows)
    print(f"{table['suite']}: {table['protocol']}, success on the same tasks; differences from {table['reference']}")
    head = (
        f"{'':<18}{'n':>5}{'success':>9}  {'95 % interval':<16}{'by seed':<18}{'difference, 95 %':<25}{'tokens':>10}"
    )
    head += f"{'error':>7}{'train min':>10}{'cpu min':>9}{'MiB':>7}{'s/task':>8}"
    print(head + (f"{'paper s/plan':>14}{f'{PAPER_TASKS} tasks':>10}" if timed else ""))
    for row in rows:
        seeds = " ".join(f"{rate:.3f}" for rate in row["by_seed"])
        line = f"{row['variant']:<18}{row['n']:>5}{row['rate']:>9.3f}  "
        line += f"{'[{low:.3f}, {high:.3f}]'.format(**row):<16}{seeds:<18}"
        gap = row.get("difference")
        line += f"{'{difference:+.3f} [{low:+.3f}, {high:+.3f}]'.format(**gap) if gap else '-':<25}"
        line += f"{'{tokens} x {width}'.format(**row):>10}{row['error_against_copying']:>7.3f}{row['training_minutes']:>10.1f}"
        cpu = row["training_cpu_minutes"]
        line += (
            f"{'-' if cpu is None else f'{cpu:.1f}':>9}{row['peak_memory_mib']:>7}{row['plan_seconds_per_task']:>8.2f}"
        )
        if total in row:
            plans = f"{row['paper_seconds_per_plan']:.2f} (n={row['paper_plans_timed']})"
            line += f"{plans:>14}{row[total]:>9.0f}s"
        print(line)
    print(
        "n: tasks x seeds (tasks repeat, the interval over them is too narrow by that; differences count a task once). "
        "error: of the last imagined frame, as a share of copying's. s/task: planning with the default planner, tasks "
        "planned together."
    )
    if timed:
        print(
            f"paper s/plan: the paper's CEM, one task at a time, n plans timed; {PAPER_TASKS} tasks: extrapolated from "
            f"them, with {PAPER_PLANS} plans per task, the most that the budget allows."
        )
    if table["missing"]:
        print(f"missing cells ({len(table['missing'])}): {', '.join(table['missing'])}")


def write_table(table: dict[str, Any], folder: Path) -> list[Path]:
    """`<suite>.json`, `.csv` and `.png` in the folder, each written in one move; returns their paths."""
    from cjepa_hf.training.trainer import write_text

    paths = [folder / f"{table['suite']}.{ending}" for ending in ("json", "csv", "png")]
    write_text(paths[0], json.dumps(table, indent=1) + "\n")
    flat = []
    for row in table["rows"]:
        gap = {f"difference_{key}": value for key, value in row.get("difference", {}).items()}
        flat.append({key: value for key, value in row.items() if key != "difference"} | gap)
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()}
        for row in flat
    )
    write_text(paths[1], text.getvalue())
    temporary = paths[2].with_name(f".{paths[2].name}.{os.getpid()}")
    draw(table).save(temporary, format="png")
    os.replace(temporary, paths[2])
    return paths


def draw(table: dict[str, Any]):
    """A picture of the table: success with intervals and each seed, and the paper planner's seconds where timed."""
    from PIL import Image, ImageDraw, ImageFont

    rows, scale = table["rows"], 2
    timed = [row["paper_seconds_per_plan"] for row in rows if "paper_seconds_per_plan" in row]
    left, top, step, wide = 190, 60, 34, 420
    width = left + wide + 40 + (wide + 60 if timed else 0)
    height = top + step * len(rows) + 50
    image = Image.new("RGB", (scale * width, scale * height), "white")
    canvas = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=13 * scale)

    def text(x, y, words, anchor, color="black"):
        canvas.text((scale * x, scale * y), words, fill=color, font=font, anchor=anchor)

    def line(x0, y0, x1, y1, color, thick=1):
        canvas.line([scale * x0, scale * y0, scale * x1, scale * y1], fill=color, width=scale * thick)

    def dot(x, y, radius, color):
        canvas.ellipse(
            [scale * (x - radius), scale * (y - radius), scale * (x + radius), scale * (y + radius)], fill=color
        )

    def axis(start, title, ticks, place):
        text(start, 20, title, "lm")
        for value in ticks:
            line(place(value), top - 8, place(value), top + step * len(rows), (225, 225, 225))
            text(place(value), top + step * len(rows) + 14, f"{value:g}", "mm", (90, 90, 90))

    lowest = min([min(row["low"], *row["by_seed"]) for row in rows], default=0.0)
    floor = int(10 * lowest) / 10

    def success(value):
        return left + wide * (value - floor) / (1 - floor)

    ticks = [round(floor + 0.1 * k, 1) for k in range(round(10 * (1 - floor)) + 1)]
    n = max((row["n"] for row in rows), default=0)
    axis(left, f"success on {table['protocol']} (n up to {n}; dots: seeds)", ticks, success)
    if timed:
        low, high = np.floor(np.log10(min(timed))), np.ceil(np.log10(max(timed)) + 1e-9)
        start = left + wide + 60

        def duration(value):
            return start + wide * (np.log10(value) - low) / (high - low)

        axis(start, "seconds per plan, the paper's CEM", 10.0 ** np.arange(low, high + 1), duration)
    for index, row in enumerate(rows):
        y = top + step * (index + 0.5)
        text(left - 12, y, row["variant"], "rm")
        for rate in row["by_seed"]:
            dot(success(rate), y, 3, (170, 190, 215))
        line(success(row["low"]), y, success(row["high"]), y, (31, 119, 180), 2)
        dot(success(row["rate"]), y, 5, (31, 119, 180))
        if "paper_seconds_per_plan" in row:
            value = row["paper_seconds_per_plan"]
            line(start, y, duration(value), y, (214, 39, 40), 8)
            text(duration(value) + 6, y, f"{value:.3g} (n={row['paper_plans_timed']})", "lm")
    return image.resize((width, height), Image.Resampling.LANCZOS)


# --- command line --------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None, suite: str | None = None) -> dict[str, Any]:
    """Runs what is missing of a suite and prints, writes and returns its table."""
    parser = argparse.ArgumentParser(
        prog=None if suite else "cjepa-hf evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=list(SUITES), required=suite is None, default=suite)
    parser.add_argument("--output-dir", "--output_dir", type=Path, required=True)
    parser.add_argument(
        "--episodes", type=Path, help="collected Push-T episodes: for patch tokens, and slots without --slots"
    )
    parser.add_argument("--slots", type=Path, help="slot dataset of the episodes (default: extracted from them)")
    parser.add_argument("--encoder", type=Path, help="the slot encoder (of --slots, if given)")
    parser.add_argument("--num-frames", "--num_frames", type=int,
                        help="extract the episodes of each split that hold its first frames, so many (default: all)")  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", default=[""], help='cells whose name (VARIANT_seedK) begins so; "*" is anything: "*seed0"'
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings (default: 0 1 2)")
    parser.add_argument(
        "--size", choices=list(SIZES), default="small", help="of the predictors (default: %(default)s)"
    )
    parser.add_argument("--max-steps", "--max_steps", type=int, help="of every training (default: 16000)")
    parser.add_argument("--protocol", default="pusht-25", help="(default: %(default)s)")
    parser.add_argument("--num-tasks", "--num_tasks", type=int, help="only the first tasks (default: all)")
    parser.add_argument("--planner", help="in place of the suite's, see `cjepa-hf evaluate --help`")
    parser.add_argument("--time-plans", "--time_plans", type=int,
                        help="plans of the paper's CEM timed per variant, first seed (default: 2 in push-t, else 0)")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="run nothing: the table of what is there")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument(
        "--more", nargs=argparse.REMAINDER, default=[], metavar="--NAME VALUE", help="last: options of every training"
    )
    args = parser.parse_args(argv)
    if len(args.more) % 2:
        parser.error(f"--more {' '.join(args.more)}: give pairs of --NAME VALUE")
    if args.time_plans is None:
        args.time_plans = 2 if args.suite == "push-t" else 0
    wanted = cell_names(args.suite, args.seeds)
    chosen = [cell for cell in wanted if any(fnmatch("{}_seed{}".format(*cell), f"{part}*") for part in args.only)]
    if not chosen:
        names = ", ".join("{}_seed{}".format(*cell) for cell in wanted)
        parser.error(f"no cell is named like {args.only}; there are {names}")
    if not args.table:
        _run(args, wanted, chosen)
    table = tabulate(args.suite, args.output_dir, args.seeds)
    if table["rows"]:
        paths = write_table(table, args.output_dir)
    if args.json:
        print(json.dumps(table, indent=1))
    else:
        print_table(table)
        if table["rows"]:
            print("written: " + ", ".join(map(str, paths)))
    return table


def _run(args: argparse.Namespace, wanted: list[tuple[str, int]], chosen: list[tuple[str, int]]) -> None:
    import torch

    from .protocols import load_protocol
    from .push_t import select_tasks

    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    select_tasks(load_protocol(args.protocol), args.num_tasks)  # a wrong number is said before the work begins
    finished = {}
    for cell in wanted:
        path = _result_file(args.output_dir, args.suite, *cell)
        if path.is_file():
            finished[path] = json.loads(path.read_text(encoding="utf-8"))
            _require_same(path, finished[path], cell_settings(args.suite, *cell, args))
    todo = [cell for cell in chosen if _result_file(args.output_dir, args.suite, *cell) not in finished]
    patches = any(SUITES[args.suite][variant].get("model") == PATCHES for variant, _ in todo)
    if todo and (args.encoder is None or (args.episodes is None and (patches or args.slots is None))):
        raise ValueError("--encoder is needed, and --episodes (without them only --slots, and no patch tokens)")
    data = prepare_data(args, patches) if todo else {}
    for path, cell in finished.items() if todo else ():
        _require_same(path, cell, {"data": data["slots"]["described"]})
    for variant, seed in todo:
        print(f"== {args.suite}: {variant}, seed {seed}", file=sys.stderr, flush=True)
        run_cell(args.suite, variant, seed, args, data)


def _require_same(path: Path, cell: dict[str, Any], settings: dict[str, Any]) -> None:
    changed = {key: (cell[key], value) for key, value in settings.items() if cell[key] != value}
    if changed:
        raise ValueError(f"{path} was made with other settings (then, now): {changed}. Give another --output-dir")


if __name__ == "__main__":
    main()
