"""A Hub on this computer, for the tests that need one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent


class Server:
    """local_hub.py as a process of its own; it keeps its port when it is started again."""

    def __init__(self, root: Path):
        self.root, self.port = root, 0
        self.start()

    def start(self):
        port_file = self.root / "port"
        port_file.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / "local_hub.py"), "--root", str(self.root / "store")]
        command += ["--port", str(self.port), "--port-file", str(port_file)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the local Hub did not start")
            time.sleep(0.05)
        self.port = int(port_file.read_text())

    def kill(self):
        """As by `kill -9`: connections end where they are."""
        self.process.kill()
        self.process.wait()


class Hub(NamedTuple):
    """What the Hub stores, a function that runs steps of a script in a process with empty caches (those of before, if it
    is called again with the same name), and the server."""

    store: Path
    client: Callable
    server: Server


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    yield from _run(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def empty_hub(tmp_path):
    """One that no other test has published to."""
    yield from _run(tmp_path)


def _run(root):
    server = Server(root)
    try:
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        environment = {name: value for name, value in os.environ.items() if name not in offline} | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.port}",
            "HF_TOKEN": "hf_local",
            "HF_HUB_DISABLE_XET": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
            "CUDA_VISIBLE_DEVICES": "",
        }

        def client(name, *steps, script="client.py", python=(sys.executable,), **variables):
            folder = root / name
            folder.mkdir(exist_ok=True)
            own = environment | {"HF_HOME": str(folder / "home")} | variables
            command = [*python, str(HERE / script), str(folder), *steps]
            result = subprocess.run(command, env=own, capture_output=True, text=True, timeout=900)
            assert result.returncode == 0, result.stderr
            return json.loads((folder / "results_of_steps.json").read_text())

        yield Hub(root / "store", client, server)
    finally:
        server.kill()
