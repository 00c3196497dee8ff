"""What the benchmarks share: timing, the bfloat16 matrix product that is their unit, and the machine's description."""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

PRODUCT_SIZE = 2048
# glibc otherwise gives large activations back to the kernel after every use, and faults them in again.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}


def seconds(function, repeats: int, synchronize) -> list[float]:
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> dict:
    return {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times), "repeats": len(times)}


def hardware(torch, device) -> dict:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "fast_allocator": "MALLOC_TRIM_THRESHOLD_" in os.environ,
    }


def restart_with_allocator_settings() -> None:
    """Starts this script again with `ALLOCATOR` in the environment, where glibc is used: it reads them at the start."""
    if platform.libc_ver()[0] == "glibc" and not set(ALLOCATOR) & set(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})


def in_units(function, gflop: float, repeats: int, torch, device) -> dict:
    """
    Time of `function` in units of `gflop` at the rate of a 2048^3 bfloat16 matrix product, measured between its
    repetitions, so that both see the same clock and the same neighbors.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    left, right = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device).to(torch.bfloat16) for _ in range(2))

    def product():
        return left @ right

    seconds(product, 3, synchronize)
    seconds(function, 2, synchronize)
    products, times = [], []
    for _ in range(repeats):
        products += seconds(product, 5, synchronize)
        times += seconds(function, 1, synchronize)
    rate = 2 * PRODUCT_SIZE**3 / statistics.median(products) / 1e9
    return {**summary(times), "product_gflop_per_s": rate, "units": statistics.median(times) * rate / gflop}


def write_result(result: dict, output: Path | None) -> None:
    """Prints a result as JSON and, if asked, writes it to a file."""
    text = json.dumps(result, indent=2)
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(output.name + ".tmp")
        temporary.write_text(text + "\n")
        os.replace(temporary, output)
