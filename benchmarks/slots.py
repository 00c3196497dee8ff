"""Windows per second from a slot dataset on disk, read by one process. Prints json.

python benchmarks/slots.py > benchmarks/results/slots.json
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch

from cjepa_hf.data import SlotDataset, SlotWindows, load_slot_dataset, window_statistics, write_slot_dataset


def hardware() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores visible, 1 process"


def episodes(count: int, length: int, num_slots: int, slot_size: int):
    random = np.random.default_rng(0)
    for number in range(count):
        yield {
            "episode_id": f"episode-{number:06d}",
            "slots": random.standard_normal((length, num_slots, slot_size), dtype=np.float32),
            "actions": random.standard_normal((length, 2), dtype=np.float32),
            "proprio": random.standard_normal((length, 4), dtype=np.float32),
        }


def windows_per_second(windows: SlotWindows, batch_size: int, repeats: int, num_batches: int) -> dict:
    random, rates = np.random.default_rng(0), []
    for _ in range(repeats + 1):  # the first one reads the file into the page cache
        indices = random.integers(len(windows), size=(num_batches, batch_size))
        start = time.perf_counter()
        for batch in indices:
            windows.get_batch(batch)
        rates.append(indices.size / (time.perf_counter() - start))
    rates = rates[1:]
    chunks = len(windows.dataset.data.data.column("slots").chunks)
    result = {"arrow_chunks": chunks, "median": round(statistics.median(rates)), "n": len(rates)}
    return result | {"lowest": round(min(rates)), "highest": round(max(rates))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--length", type=int, default=81, help="frames per episode")
    parser.add_argument("--num-slots", type=int, default=4)
    parser.add_argument("--slot-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=200, help="batches per repeat")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        data = episodes(args.episodes, args.length, args.num_slots, args.slot_size)
        path = write_slot_dataset(Path(folder, "slots"), {"train": data}, frame_skip=5)
        write_seconds = time.perf_counter() - start
        start = time.perf_counter()
        dataset = load_slot_dataset(path, cache_dir=str(Path(folder, "cache")))
        load_seconds = time.perf_counter() - start
        start = time.perf_counter()
        window_statistics(dataset)
        statistics_seconds = time.perf_counter() - start
        windows = SlotWindows(dataset)
        measure = {"batch_size": args.batch_size, "repeats": args.repeats, "num_batches": args.batches}
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loaded = windows_per_second(windows, **measure)
        # the worst case: as many chunks as a dataset of very many files has, episodes in random order
        pieces = [dataset.data.select(range(i, min(i + 4, len(dataset)))) for i in range(0, len(dataset), 4)]
        many = SlotWindows(SlotDataset(datasets.concatenate_datasets(pieces).shuffle(seed=0), check_values=False))
        result = {
            "benchmark": "slots",
            "unit": "windows/s",
            "window": [windows.steps, args.num_slots, args.slot_size],
            "batch_size": args.batch_size,
            "windows": len(windows),
            "as_loaded": loaded,
            "many_chunks_shuffled": windows_per_second(many, **measure),
            "write_seconds_with_making_the_numbers": round(write_seconds, 2),
            "load_and_check_seconds": round(load_seconds, 2),
            "window_statistics_seconds": round(statistics_seconds, 3),
            "dataset_mib": round(dataset.data.data.nbytes / 2**20),
            "peak_memory_mib_before_and_after_reading": [
                round(m / 2**10) for m in (memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            ],
            "hardware": hardware(),
            "torch": torch.__version__,
            "datasets": datasets.__version__,
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
