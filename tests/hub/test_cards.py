"""Cards say what their files say, and no number that is in none of them."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard
from transformers import PreTrainedConfig

import cjepa_hf
from cjepa_hf import CJepaConfig, CJepaModel, ColorIsaConfig, DinoWmConfig, DinoWmModel, PatchEncoderConfig
from cjepa_hf.cli import main
from cjepa_hf.hub.cards import _KINDS, card
from cjepa_hf.hub.convert import hub_configs
from cjepa_hf.hub.publish import publish

ROOT = Path(__file__).parents[2]
ENTRIES = hub_configs()


def numbers(value):
    """All numbers in a json value, those inside its texts too."""
    if isinstance(value, dict):
        return numbers(list(value.values()))
    if isinstance(value, list):
        return {number for item in value for number in numbers(item)}
    if isinstance(value, (int, float)):
        return {float(value), round(float(value), 3)}
    return {float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", str(value))}


@pytest.mark.parametrize("name", ENTRIES)
def test_the_cards_of_the_repository_are_up_to_date(name):
    """Otherwise: cjepa-hf card --all model_cards."""
    text = (ROOT / "model_cards" / f"{name}.md").read_text(encoding="utf-8")
    assert text == card(ENTRIES[name], f"galilai/{name}")
    assert {path.stem for path in (ROOT / "model_cards").glob("*.md")} == set(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_number_of_a_card_is_in_a_file(name):
    source = json.loads((ENTRIES[name] / "source.json").read_text())
    values = [json.loads(path.read_text()) for path in ENTRIES[name].glob("*.json")]
    values += [json.loads((ROOT / path).read_text()) for path in source.get("results", [])]
    # names of files and repositories, the license (2.0), the citation, the interval (95 %), the channels of pixels (3)
    known = {95.0, 2026.0, 2602.11389, 2.0, 3.0} | numbers([name, *source.get("results", [])])
    text = card(ENTRIES[name], f"galilai/{name}")
    unknown = numbers(text) - {number for value in values for number in numbers(value)} - known
    assert not unknown


def test_a_model_without_a_stated_license_is_not_licensed_for_its_owner(tmp_path):
    CJepaModel(CJepaConfig(num_hidden_layers=1, intermediate_size=16)).save_pretrained(tmp_path)
    text = card(tmp_path, "me/mine")
    assert ModelCard(text).data.license is None and "apache" not in text.lower()


@pytest.mark.parametrize("name", ENTRIES)
def test_the_metadata_of_a_card_is_what_the_hub_reads(name):
    source = json.loads((ENTRIES[name] / "source.json").read_text())
    dataset = name.endswith("-slots")
    parsed = (DatasetCard if dataset else ModelCard)(card(ENTRIES[name], f"galilai/{name}"))
    assert parsed.data.license == "apache-2.0"
    if dataset:
        files = parsed.data.configs[0]["data_files"]
        assert [file["split"] for file in files] == source["dataset"]["splits"]
        return
    assert parsed.data.library_name == "cjepa_hf" and f'from_pretrained("galilai/{name}"' in parsed.text
    results = {result.metric_name: result for result in parsed.data.eval_results or []}
    for row in source["paper"]["results"]:
        result = results.pop(f"{row['name']}, as the paper reports")
        assert result.metric_value == row["value"] and result.source_url == source["paper"]["url"]
    assert bool(results) == ("bundled" in source)  # only ours were measured here


def test_a_measured_number_is_the_files(tmp_path):
    for name, rate in (("a", 0.5), ("b", 0.25)):
        row = {"name": "default", "rate": rate, "low": 0.1, "high": 0.9, "n": 8}
        (tmp_path / f"{name}.json").write_text(json.dumps({"protocol": {"name": "pusht-25"}, "rows": [row]}))
    text = card(ENTRIES["cjepa-pusht-small"], results=[tmp_path / "a.json", tmp_path / "b.json"])
    assert "| 0.5 | 0.1 to 0.9 | 8 | `a.json` |" in text and "| 0.25 | 0.1 to 0.9 | 8 | `b.json` |" in text
    assert "0.925" not in text
    (tmp_path / "c.json").write_text("{}")
    for file in ("c.json", "missing.json"):
        with pytest.raises(ValueError, match=file):
            card(ENTRIES["cjepa-pusht-small"], results=[tmp_path / file])


def test_a_card_shows_rollouts_of_its_models_beside_what_is_easy_and_leaves_controls_to_the_file(tmp_path):
    found = {"value": 0.25, "low": 0.2, "high": 0.3, "n": 9}
    names = ["copy the video", "true positions", "mine, empty", "mine, drop", "mine, no removal", "other, empty"]
    rows = [
        {
            "name": name,
            "start": start,
            "position_error": {"16": found, "32": found | {"value": 0.125}},
            "cell_mean": found,
        }
        for start in "BA"
        for name in names
    ]
    values = {
        "protocol": {"name": "cf-rollout"},
        "models": {"mine": "runs/mine", "other": "runs/other"},
        "slots": {"encoder": "mine"},
    }
    values |= {"factual": [{"name": "mine", "f1": found | {"value": 0.75}}], "rows": rows}
    (tmp_path / "a.json").write_text(json.dumps(values))
    text = card(ENTRIES["cjepa-pusht-small"], results=[tmp_path / "a.json"])
    table = [line for line in text.splitlines() if line.endswith("`a.json` |")]
    assert len(table) == 7 and not [line for line in table if "drop" in line or "no removal" in line or "true" in line]
    assert [line for line in table if "other, empty" in line]  # beside it, but not its own result
    assert "mine, empty, from pixels | 0.125 | 0.2 to 0.3 | 9 |" in text and "mine, from pixels | 0.75 |" in text
    indexed = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert indexed == {"f1": 0.75, "position_error": 0.125, "accuracy": 0.25}


def test_a_card_shows_answers_by_type_beside_those_without_the_video(tmp_path):
    rate = {"rate": 0.5, "low": 0.4, "high": 0.6, "n": 20}
    types = {"descriptive": rate | {"rate": 0.75}, "counterfactual": rate}
    rows = [
        {"name": "runs/aloe", "kind": "model", "overall": rate | {"rate": 0.625}, "questions": types},
        {"name": "runs/words", "kind": "text-only", "overall": rate | {"rate": 0.25}, "questions": types},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows, "dataset": "runs/question_videos"}))
    text = card(ENTRIES["aloe-clevrer"], results=[tmp_path / "a.json"])
    assert "descriptive questions right, aloe | 0.75 | 0.4 to 0.6 | 20 | `a.json` |" in text
    assert "all questions right, the words alone | 0.25 | 0.4 to 0.6 | 20 |" in text
    indexed = [result.metric_value for result in ModelCard(text).data.eval_results]
    assert 0.625 in indexed and 0.25 not in indexed  # controls stay in the table


def test_the_command_writes_a_card_and_keeps_one_that_is_there(tmp_path, capsys):
    (tmp_path / "config.json").write_text((ENTRIES["savi-clevrer"] / "config.json").read_text())
    assert main(["card", str(tmp_path), "--repo-id", "me/savi"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert 'SaviModel.from_pretrained("me/savi"' in text and "nothing was measured" in text
    (tmp_path / "README.md").write_text("mine")
    assert main(["card", str(tmp_path)]) == 2 and "--force" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"
    assert main(["card", str(tmp_path), "--force"]) == 0 and "# " in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("tokens", ["patches", "slots"])
def test_baselines_have_cards(tokens, tmp_path):
    backbone = ColorIsaConfig(num_slots=4, slot_size=16, hidden_size=16, mlp_size=16, stem_channels=8)
    encoder = PatchEncoderConfig(backbone_config=backbone, grid_size=4, merge=2) if tokens == "patches" else backbone
    sizes = {"num_slots": encoder.num_slots, "slot_size": encoder.slot_size, "action_size": 10}
    model = DinoWmModel(
        DinoWmConfig(
            **sizes, token_type=tokens, num_hidden_layers=1, num_attention_heads=2, slot_encoder_config=encoder
        )
    )
    model.save_pretrained(tmp_path / "world")
    model.slot_encoder.save_pretrained(tmp_path / "encoder")
    shown = publish(tmp_path / "world", "me/world", dry_run=True)["files"]
    assert {"README.md", "model.safetensors"} <= set(shown)
    text = card(tmp_path / "world", "me/world")
    assert f"{encoder.num_slots} {tokens} of size {encoder.slot_size}" in text and "encoder (" in text
    assert (
        'DinoWmModel.from_pretrained("me/world"' in text and "model.rollout(slots, actions=actions, num_steps" in text
    )
    text = card(tmp_path / "encoder", "me/encoder")
    assert f"{'4 x 4 tokens' if tokens == 'patches' else '4 slots'} of size {encoder.slot_size}" in text
    assert f'{type(model.slot_encoder).__name__}.from_pretrained("me/encoder"' in text


def test_every_model_of_the_package_has_a_card():
    configurations = {getattr(cjepa_hf, name) for name in cjepa_hf.__all__ if name.endswith("Config")}
    assert {one.model_type for one in configurations if issubclass(one, PreTrainedConfig)} == set(_KINDS)


def test_what_is_no_model_has_no_card(tmp_path):
    with pytest.raises(ValueError, match="neither a model"):
        card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert'"):
        card(tmp_path)
