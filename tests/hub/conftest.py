"""A Hub on this computer, for the tests that need one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The folder that the Hub stores, and a function that runs steps of client.py, in a process with empty caches.

    Called again with the same name, the process has the caches that are there.
    """
    root = tmp_path_factory.mktemp("hub")
    port_file = root / "port"
    command = [
        sys.executable,
        str(HERE / "local_hub.py"),
        "--root",
        str(root / "store"),
        "--port-file",
        str(port_file),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text()):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the local Hub did not start")
            time.sleep(0.05)
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        environment = {name: value for name, value in os.environ.items() if name not in offline} | {
            "HF_ENDPOINT": f"http://127.0.0.1:{port_file.read_text()}",
            "HF_TOKEN": "hf_local",
            "HF_HUB_DISABLE_XET": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
            "CUDA_VISIBLE_DEVICES": "",
        }

        def client(name, *steps, script="client.py", **variables):
            folder = root / name
            folder.mkdir(exist_ok=True)
            command = [sys.executable, str(HERE / script), str(folder), *steps]
            own = environment | {"HF_HOME": str(folder / "home")} | variables
            result = subprocess.run(command, env=own, capture_output=True, text=True, timeout=600)
            assert result.returncode == 0, result.stderr
            return json.loads((folder / "results_of_steps.json").read_text())

        yield root / "store", client
    finally:
        server.terminate()
        server.wait()
