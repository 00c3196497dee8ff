"""What it takes to convert files of the released sizes, as json: seconds and memory, imports aside.

    python benchmarks/convert.py --output benchmarks/results/convert.json

Look-alikes with random numbers (names and shapes of tests/data/original_keys.json) are written to a temporary folder: a
CLEVRER predictor; VideoSAUR as Lightning saves it (with the optimizer's state), over DINOv2 ViT-S/14 as released and over
ViT-B/14; SAVi as nerv saves it; a Push-T world model with its encoder; ALOE; slots of CLEVRER videos in two sizes, to see
whether memory grows with the file. Each is converted and saved by a process of its own, which has imported everything
before. Memory is the peak of the resident set, mapped pages of the file included, above what the imports take. Run it
on an idle machine. The largest file needs twice its size on the disk.
"""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import hardware, write_result

KEYS = Path(__file__).parents[1] / "tests" / "data" / "original_keys.json"
SECONDS = {"predictor": 3, "videosaur": 10, "videosaur_vit_b": 10}  # marks
TIMES_FILE_SIZE = 3  # mark of every checkpoint's memory
SLOTS_MIB = 2000  # mark of slots of any size
ENTRIES = {
    "predictor": "cjepa-clevrer-savi-2of7",
    "videosaur": "videosaur-clevrer",
    "videosaur_vit_b": "videosaur-clevrer",
    "savi": "savi-clevrer",
    "push_t_world_model": "cjepa-pusht-1of4",
    "aloe": "aloe-clevrer",
}
VIT_B = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 518, "patch_size": 14}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[*ENTRIES, "slots"], choices=[*ENTRIES, "slots"])
    parser.add_argument("--slots-gb", nargs="+", type=float, default=[0.5, 2.0], help="sizes of the slot files")
    parser.add_argument("--repeats", type=int, default=3, help="processes per checkpoint (slots: one)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--convert", nargs=3, metavar=("CASE", "FILE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        print(json.dumps(convert(*args.convert)))
        return

    import torch

    result = {"benchmark": "convert", "hardware": hardware(torch, torch.device("cpu")), "cases": []}
    for case in args.cases:
        for size in args.slots_gb if case == "slots" else [None]:
            with tempfile.TemporaryDirectory() as folder:
                result["cases"].append(measure(case, size, Path(folder), args.repeats))
    write_result(result, args.output)


def measure(case: str, size: float | None, folder: Path, repeats: int) -> dict:
    """Row of a case: the median time and the largest memory of `repeats` processes."""
    file = folder / "original"
    write_slots(file, size) if case == "slots" else write_checkpoint(case, file)
    mib = file.stat().st_size / 2**20
    runs = []
    for repeat in range(1 if case == "slots" else repeats):
        command = [sys.executable, __file__, "--convert", case, str(file), str(folder / f"converted{repeat}")]
        runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    seconds = sorted(run["seconds"] for run in runs)
    row = {"case": case, "file_mib": round(mib, 1), "seconds": seconds[len(seconds) // 2], "seconds_of_runs": seconds}
    row["cpu_seconds_of_runs"] = sorted(run["cpu_seconds"] for run in runs)
    row["peak_mib"] = max(run["peak_mib"] for run in runs)
    row["imports_mib"] = max(run["imports_mib"] for run in runs)
    row["peak_over_file"] = round(row["peak_mib"] / mib, 2)
    row["marks"] = {"seconds": SECONDS.get(case)}
    row["marks"]["peak_mib"] = SLOTS_MIB if case == "slots" else round(TIMES_FILE_SIZE * mib, 1)
    row["met"] = all(mark is None or row[name] < mark for name, mark in row["marks"].items())
    return row


# ---------------------------------------------------------------------------------------------- the process measured


def convert(case: str, file: str, folder: str) -> dict:
    from cjepa_hf.hub import convert as hub
    from cjepa_hf.models import aloe, cjepa, savi, videosaur  # noqa: F401

    before = memory_mib("VmRSS")
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    start, cpu = time.perf_counter(), time.process_time()
    if case == "slots":
        hub.convert_original_slots(file, output_dir=folder)
    else:
        config = json.loads(hub.config_file(ENTRIES[case]).read_text())
        if case == "videosaur_vit_b":
            config |= {"backbone_config": VIT_B, "transform_size": 1536}
        hub.convert_original_checkpoint(file, config).save_pretrained(folder)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = memory_mib("VmHWM") - before
    return {
        "seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3), "peak_mib": round(peak, 1), "imports_mib": round(before),
    }  # fmt: skip


def memory_mib(field: str) -> float:
    """`VmRSS` or `VmHWM` (its peak); where there is no /proc, the peak since the start."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


# --------------------------------------------------------------------------------------------------- the look-alikes


def write_checkpoint(case: str, file: Path) -> None:
    import torch

    from cjepa_hf.hub.convert import _ALOE_FLAGS  # constants that the converter checks

    def drawn(shapes):
        return {key: 0.02 * torch.randn(shape) for key, shape in shapes.items()}

    keys, predictor_frames = json.loads(KEYS.read_text()), 4 if case == "push_t_world_model" else 16
    predictor = keys["predictor"] | {"time_pos_embed": [1, predictor_frames, 1, 128]}
    if case == "predictor":
        content = drawn(predictor)
    elif case == "push_t_world_model":
        shapes = {f"predictor.{key}": shape for key, shape in predictor.items()} | keys["push_t"]
        for part, wrapped in (("encoder", "encoder"), ("processor", "slot_attention"), ("initializer", "initializer")):
            inside = {key: shape for key, shape in keys["videosaur"].items() if key.startswith(f"{part}.")}
            shapes |= {f"{wrapped}.backbone.{key.removeprefix(f'{part}.')}": shape for key, shape in inside.items()}
        content = drawn({f"model.{key}": shape for key, shape in shapes.items()})
    elif case.startswith("videosaur"):
        shapes = keys["videosaur"]
        if case == "videosaur_vit_b":
            shapes = {key: widened(key, shape) for key, shape in shapes.items()}
        trained = {key: shape for key, shape in shapes.items() if not key.startswith("encoder.module.backbone.")}
        moments = [{"exp_avg": a, "exp_avg_sq": b} for a, b in zip(*(drawn(trained).values() for _ in range(2)))]
        states = {"state": dict(enumerate(moments)), "param_groups": [{"lr": 1e-4}]}
        content = {"state_dict": drawn(shapes), "optimizer_states": [states], "epoch": 1, "global_step": 100_000}
    else:
        tensors = drawn(keys[case])
        if case == "aloe":
            tensors |= {f"transformer_model.{key}": torch.tensor(map_) + 0.0 for key, map_ in _ALOE_FLAGS.items()}
        content = {"state_dict": tensors, "it": 1, "epoch": 8}
        moments = [{"exp_avg": a, "exp_avg_sq": b} for a, b in zip(*(drawn(keys[case]).values() for _ in range(2)))]
        content["opt_state_dict"] = {"state": dict(enumerate(moments)), "param_groups": [{"lr": 1e-4}]}
    torch.save(content, file)


def widened(key: str, shape: list[int]) -> list[int]:
    """The shape over a backbone of twice the width."""
    if key.startswith("encoder.module.backbone."):
        return [2 * size if size in (384, 1536) else size for size in shape]
    if key.startswith("encoder.module.output_transform."):
        return [2 * size if size in (384, 768) else size for size in shape]
    if key.startswith("decoder.module.output_transform."):
        return [384 + size if size == 580 else size for size in shape]
    return shape


class Video:
    """Pickled as a fresh float32 [128, 7, 128] array, so that no more than one is in memory."""

    def __init__(self, random):
        self.random = random

    def __reduce__(self):
        return self.random.standard_normal((128, 7, 128), dtype="float32").__reduce__()


def write_slots(file: Path, gigabytes: float) -> None:
    import numpy as np

    random = np.random.default_rng(0)
    count = round(gigabytes * 1e9 / (128 * 7 * 128 * 4))
    parts = {"train": (0, count // 2), "val": (count // 2, 3 * count // 4), "test": (3 * count // 4, count)}
    splits = {split: {f"{i}_pixels.mp4": Video(random) for i in range(*span)} for split, span in parts.items()}
    with file.open("wb") as stream:
        pickler = pickle.Pickler(stream, protocol=4)
        pickler.fast = True  # no memo, which would keep every array
        pickler.dump(splits)


if __name__ == "__main__":
    main()
