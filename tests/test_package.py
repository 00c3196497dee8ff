"""Importing the package."""

import os
import subprocess
import sys

import pytest


def _spin_count(**given: str) -> str:
    """What GNU OpenMP, as it is loaded, says of its waiting threads in a process that imports the package."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = kept | {"OMP_DISPLAY_ENV": "verbose"} | given
    result = subprocess.run(
        [sys.executable, "-c", "import cjepa_hf"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    return lines[0].split("'")[1]


@pytest.mark.skipif(sys.platform != "linux", reason="GOMP_* is read by GNU OpenMP alone, which torch brings on Linux")
def test_waiting_threads_go_to_sleep_soon_unless_the_user_says_otherwise():
    assert _spin_count() == "2000"
    assert _spin_count(GOMP_SPINCOUNT="70") == "70"
    assert _spin_count(OMP_WAIT_POLICY="passive") == "0"
