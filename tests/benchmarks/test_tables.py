"""The tables of the pages are what the result files say."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import tables

    return tables


def test_every_table_is_on_its_page_as_the_result_files_say(tables, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    tables.main()
    assert not capsys.readouterr().out


def test_a_number_that_no_file_holds_is_found(tables, monkeypatch, capsys, tmp_path):
    for page, _, _ in tables.tables():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((tables.ROOT / page).read_text().replace("0.970", "0.980"))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit):
        tables.main()
    assert "README.md: Push-T is not as the files say" in capsys.readouterr().out
