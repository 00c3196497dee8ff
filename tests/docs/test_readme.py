"""The README's quick start runs, and what it names exists."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cjepa_hf.cli import _parser
from cjepa_hf.simulators.rendering import render_push_t

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_quick_start_runs_as_printed(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"## Quick start\n\n```python\n(.*?)```", README, re.DOTALL)
    states = [[256.0, 400.0, 256.0, 300.0, 0.5], [256.0, 380.0, 256.0, 280.0, 0.5]]
    for name, frame in zip(("start.png", "goal.png"), render_push_t(np.array(states), resolution=96)):
        Image.fromarray(frame).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(compile(block, "README.md", "exec"), namespace)
    assert "(25, 2)" in capsys.readouterr().out
    assert namespace["future"].shape == (1, 5, 4, 64)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_commands_and_files_named_on_a_page_exist(page):
    text = (ROOT / page).read_text()
    commands = set(re.findall(r"cjepa-hf (\w+)", text))
    known = next(a for a in _parser()._actions if a.dest == "command").choices
    assert commands and commands <= set(known)
    for path in re.findall(r"(?:docs|examples|benchmarks)/[\w/.-]+\w", text):
        if "runs/" not in path:
            assert (ROOT / path).exists(), path
    for name in re.findall(r"`([\w.-]+\.json)`", text):
        places = [ROOT / "benchmarks/results", ROOT / "src/cjepa_hf/checkpoints/push_t"]
        assert any((place / name).is_file() for place in places), name


@pytest.mark.parametrize(
    "name", ["LICENSE", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt", ".ci/run"]
)
def test_the_repository_has_what_a_project_needs(name):
    assert (ROOT / name).stat().st_size > 0
