"""Windows per second from a slot dataset on disk, or what extraction costs beside its forward pass. Prints json.

    python benchmarks/slots.py > benchmarks/results/slots.json
    python benchmarks/slots.py --extraction --episodes 4 --length 64 --repeats 4 > benchmarks/results/extraction.json

The second one writes mp4 files (480 x 320, 128 frames, as CLEVRER's) and takes turns between the encoder alone, on
pixels that are ready in memory, and the whole extraction from files to Parquet. `cpu` counts the processor time of all
threads, `wall` what a clock shows.
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

from cjepa_hf import ColorIsaConfig, ColorIsaImageProcessor, ColorIsaModel, SaviConfig, SaviImageProcessor, SaviModel
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


def write_videos(folder: Path, count: int, length: int) -> None:
    import av

    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:320, :480]
    for number in range(count):
        start, speed = random.uniform(60, 260, (5, 2)), random.uniform(-1, 1, (5, 2))
        colors = random.integers(0, 256, (5, 3))
        with av.open(str(folder / f"video_{number:05d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 480, 320, "yuv420p"
            for t in range(length):
                frame = np.full((320, 480, 3), 132, np.uint8)
                for (y, x), color in zip(start + t * speed, colors):
                    frame[(rows - y) ** 2 + (columns - x) ** 2 < 22**2] = color
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())


def seconds(function) -> tuple[float, float]:
    """By the clock, and of the processor in all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def extraction(args) -> dict:
    from cjepa_hf.data.extract import encode_videos, extract_slots
    from cjepa_hf.data.video import open_videos

    torch.manual_seed(0)
    models = {
        "savi": (SaviModel(SaviConfig()), SaviImageProcessor()),
        "color-isa": (ColorIsaModel(ColorIsaConfig()), ColorIsaImageProcessor()),
    }
    model, processor = models[args.encoder]
    model = model.eval().to(args.device)
    sizes = {"batch_size": args.batch_size, "num_videos": 8}
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder, "videos")
        videos.mkdir()
        write_videos(videos, args.episodes, args.length)
        opened = open_videos(videos)
        pixels = torch.stack([processor(video.frames())["pixel_values"] for video in opened])
        parts = [
            part.to(args.device)
            for group in pixels.split(8)
            for part in (
                group.flatten(0, 1).unsqueeze(1).split(args.batch_size)
                if model.memoryless
                else group.split(max(1, args.batch_size // 8), dim=1)
            )
        ]

        @torch.inference_mode()
        def bare():
            for part in parts:
                model(pixel_values=part, **({} if model.memoryless else {"seeds": range(len(part))})).slots.cpu()

        def whole():
            name = Path(folder, f"slots-{time.monotonic_ns()}")
            extract_slots(videos, model, name, image_processor=processor, progress=False, **sizes)

        def reading():
            for video in open_videos(videos):
                for chunk in video.chunks(args.batch_size):
                    processor(chunk)

        def memory(count):
            for _ in encode_videos(([v] for v in (opened * count)[:count]), model, processor, **sizes):
                pass
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

        times: dict[str, list] = {"bare": [], "whole": [], "reading": []}
        for repeat in range(args.repeats + 1):
            for name, function in (("bare", bare), ("whole", whole), ("reading", reading)):
                value = seconds(function)
                if repeat:  # the first one warms up
                    times[name].append(value)
        median = {name: np.median(values, axis=0) for name, values in times.items()}
        ratio = np.array([np.divide(w, b) - 1 for w, b in zip(times["whole"], times["bare"])])
        return {
            "benchmark": "extraction",
            "encoder": args.encoder,
            "frames": args.episodes * args.length,
            **sizes,
            "repeats": args.repeats,
            **{
                f"{name}_seconds": {"wall": round(float(w), 3), "cpu": round(float(c), 3)}
                for name, (w, c) in median.items()
            },
            "overhead": {
                kind: {
                    "median": round(float(np.median(x)), 3),
                    "lowest": round(float(x.min()), 3),
                    "highest": round(float(x.max()), 3),
                }
                for kind, x in zip(("wall", "cpu"), ratio.T)
            },
            "peak_memory_mib_after_videos": {n: round(memory(n)) for n in (2, 8, 16)},
            "device": str(args.device),
            "load_average": os.getloadavg()[0],
            "threads": torch.get_num_threads(),
            "hardware": hardware(),
            "torch": torch.__version__,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--length", type=int, default=81, help="frames per episode")
    parser.add_argument("--num-slots", type=int, default=4)
    parser.add_argument("--slot-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=200, help="batches per repeat")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--extraction", action="store_true", help="measure the extraction instead")
    parser.add_argument("--encoder", choices=["savi", "color-isa"], default="savi")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.extraction:
        parser.set_defaults(episodes=8, length=128, repeats=5, batch_size=64)
        print(json.dumps(extraction(parser.parse_args()), indent=1))
        return
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
