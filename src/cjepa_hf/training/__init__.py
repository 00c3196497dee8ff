"""Training on slots and frames: one Accelerate loop (`trainer.py`) and one script module per model.

This module stays light (no torch): scripts call [`use_fast_cpu_allocator`] before anything heavy is imported.
"""

import os
import platform
import shutil
import sys
from collections.abc import Sequence

# Large activations are otherwise handed back to the kernel after every step and faulted in again: two trainings side
# by side then spend half of their time in the kernel.
CPU_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}


def use_fast_cpu_allocator(argv: Sequence[str] | None = None) -> None:
    """Restarts this process, once, with glibc settings that keep freed memory in the process.

    glibc reads them only when a process starts. Nothing happens off Linux/glibc, where there is an NVIDIA GPU, where
    either variable is already set, or with `--allocator_settings false` / `--no_allocator_settings` in `argv`
    (default: `sys.argv[1:]`).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    words = " ".join(argv).replace("-", "_").replace("=", " ").lower()
    if "no_allocator_settings" in words or any(
        f"allocator_settings {no}" in words for no in ("false", "no", "f", "n", "0")
    ):
        return
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc" or shutil.which("nvidia-smi"):
        return
    if any(name in os.environ for name in CPU_ALLOCATOR):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **CPU_ALLOCATOR})
