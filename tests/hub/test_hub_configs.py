"""Every entry of hub_configs is complete, says what the paper says, and fits the released weights at full size."""

import json
import math
import pickle
import re
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

from cjepa_hf import bundled_checkpoint, convert_original_checkpoint
from cjepa_hf.cli import main
from cjepa_hf.hub import convert
from cjepa_hf.hub.cards import card
from cjepa_hf.hub.convert import ConversionError, config_file, hub_configs

ROOT = Path(__file__).parents[2]
KEYS = json.loads((ROOT / "tests" / "data" / "original_keys.json").read_text())
ENTRIES = hub_configs()
SLOTS = [name for name in ENTRIES if name.endswith("-slots")]
MODELS = [name for name in ENTRIES if name not in SLOTS]
# and the names they ship under
OWN = {
    "cjepa-pusht-small": "push_t",
    "cjepa-collisions-small": "collisions",
    "aloe-collisions-small": "collisions_aloe",
}
RELEASED = [name for name in MODELS if name not in OWN]


def read(name, file="config.json"):
    return json.loads((ENTRIES[name] / file).read_text())


def state_dict(name):
    """A checkpoint of the released code with every tensor it has at full size, all zero and without memory."""
    kind = read(name)["model_type"]
    shapes = dict(KEYS["predictor"] if kind == "cjepa" else KEYS[kind])
    if kind == "cjepa":
        frames = 4 if "pusht" in name else 16
        shapes["time_pos_embed"] = [1, frames, 1, 128]
    if name.startswith("cjepa-pusht"):
        parts = ("encoder.", "encoder.backbone."), ("processor.", "slot_attention.backbone.")
        parts += (("initializer.", "initializer.backbone."),)
        shapes = {f"predictor.{key}": shape for key, shape in shapes.items()} | KEYS["push_t"]
        for start, wrapped in parts:
            inside = {key: shape for key, shape in KEYS["videosaur"].items() if key.startswith(start)}
            shapes |= {wrapped + key.removeprefix(start): shape for key, shape in inside.items()}
    tensors = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    for key, flag in convert._ALOE_FLAGS.items():
        if kind == "aloe":
            tensors[f"transformer_model.{key}"] = torch.tensor(flag, dtype=torch.float32)
    return tensors


def test_there_is_an_entry_for_every_released_file():
    expected = {f"cjepa-pusht-{m}of4" for m in range(3)} | {*OWN, "aloe-clevrer", "savi-clevrer"}
    expected |= {f"cjepa-clevrer-{kind}-{m}of7" for kind in ("videosaur", "savi") for m in range(5)}
    expected |= {"videosaur-pusht", "videosaur-clevrer"}
    assert set(MODELS) == expected
    assert set(SLOTS) == {"pusht-videosaur-slots", "clevrer-videosaur-slots", "clevrer-savi-slots"}
    files = [file for name in RELEASED + SLOTS if (file := read(name, "source.json")["original"]["file"])]
    assert len(files) == len(set(files)) == len(RELEASED) - 1 + len(SLOTS)  # no file of ALOE is known
    for name in RELEASED:
        if match := re.fullmatch(r"cjepa-(pusht|clevrer)(?:-(\w+))?-(\d)of\d", name):
            environment, encoder, masked = match.groups()
            file = f"cjepa-ckpts/{environment}_{encoder or 'videosaur'}_{masked}_epoch_30_object.ckpt"
            assert read(name, "source.json")["original"] == {"repository": "HazelNam/CJEPA", "file": file}


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_writes_every_field_and_no_other(name):
    values, config = read(name), AutoConfig.from_pretrained(ENTRIES[name])
    parts = [(values, config)]
    if values.get("slot_encoder_config"):
        parts.append((values["slot_encoder_config"], config.slot_encoder_config))
    for part, own in parts:
        declared = {field for field in type(own).__annotations__ if field in {f.name for f in fields(own)}}
        assert declared <= set(part), "a default that changes would change what is published"
        if name not in OWN:  # those are as save_pretrained wrote them
            assert set(part) <= declared | {"model_type", "architectures"}
        for field in declared - {"backbone_config", "slot_encoder_config"}:
            value = getattr(own, field)
            assert part[field] == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("name", [name for name in RELEASED if name.startswith("cjepa")])
def test_a_world_model_has_the_papers_settings(name):
    config, push_t = AutoConfig.from_pretrained(ENTRIES[name]), "pusht" in name
    assert (config.num_slots, config.frame_skip) == ((4, 5) if push_t else (7, 2))
    assert (config.history_length, config.prediction_length) == ((3, 1) if push_t else (6, 10))
    assert (config.action_size, config.proprio_size) == ((10, 4) if push_t else (0, 0))
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (6, 16, 2048)
    assert (config.slot_size, config.hidden_dropout, config.auxiliary_fusion) == (128, 0.1, "tokens")
    assert config.num_masked_slots == int(re.search(r"-(\d)of", name)[1])
    assert (config.slot_encoder_config is not None) == push_t


def test_the_encoders_have_their_own_settings():
    for name, slots, weight, temperature in (("videosaur-pusht", 4, 0.25, 0.25), ("videosaur-clevrer", 7, 0.3, 0.15)):
        values = read(name)
        assert (values["num_slots"], values["image_size"], values["first_frame_iterations"]) == (slots, 196, 3)
        assert (values["similarity_loss_weight"], values["similarity_temperature"]) == (weight, temperature)
    inside, alone = read("cjepa-pusht-1of4")["slot_encoder_config"], read("videosaur-pusht")
    # the released world models hold no decoder
    assert inside == {key: value for key, value in alone.items() if key != "architectures"} | {"use_decoder": False}
    assert alone["use_decoder"] and read("videosaur-clevrer")["use_decoder"]


def test_the_listed_tensors_have_as_many_numbers_as_the_released_models():
    counts = {kind: sum(map(math.prod, shapes.values())) for kind, shapes in KEYS.items()}
    assert counts["videosaur"] == 26_277_956 and counts["aloe"] == 2_879_437
    assert counts["savi"] == 1_198_980 + 4 * (64**2 + 8**2)  # its two grids are no parameters
    assert counts["predictor"] + 16 * 128 == 3_592_064 and counts["predictor"] + 4 * 128 == 3_590_528


@pytest.mark.parametrize("name", sorted({re.sub(r"\dof", "1of", name) for name in RELEASED}))
def test_the_released_weights_fit_by_name_and_shape(name, monkeypatch):
    """Entries that differ in the number of masked slots alone have the same tensors: one of each is built."""
    monkeypatch.setattr(convert, "read_pickled", lambda path: state_dict(name))
    model = convert_original_checkpoint("released.ckpt", name)
    assert model.config.model_type == read(name)["model_type"]
    assert type(model).__name__ == read(name)["architectures"][0]


def test_from_the_released_file_to_what_would_be_published(tmp_path, capsys):
    name = "cjepa-clevrer-savi-2of7"
    torch.save({key: tensor.clone() for key, tensor in state_dict(name).items()}, tmp_path / "object.ckpt")
    output = tmp_path / "converted"
    assert main(["convert", str(tmp_path / "object.ckpt"), "--config", name, "--output-dir", str(output)]) == 0
    capsys.readouterr()
    assert main(["publish", str(output), f"galilai/{name}", "--dry-run", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "source.json"}
    assert files["README.md"] == (ROOT / "model_cards" / f"{name}.md").stat().st_size


def test_released_slots_become_the_dataset_of_their_entry(tmp_path, capsys):
    def file(slots):
        splits = {"train": {"0_pixels.mp4": np.zeros((9, slots, 128), np.float32)}}
        (tmp_path / f"{slots}.pkl").write_bytes(pickle.dumps(splits))
        return ["convert", str(tmp_path / f"{slots}.pkl"), "--output-dir", str(tmp_path / f"made-{slots}")]

    assert main([*file(7), "--config", "clevrer-savi-slots"]) == 0
    made = tmp_path / "made-7"
    described = json.loads((made / "slot_dataset.json").read_text())
    assert described["frame_skip"] == 2 and described["encoder"]["name"] == "savi-clevrer"
    assert "clevrer_savi_slots.pkl" in (made / "README.md").read_text()
    capsys.readouterr()
    assert main(["publish", str(made), "me/slots", "--dry-run", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert files["README.md"] == len(card(made, "me/slots").encode()) and "source.json" in files
    assert main([*file(4), "--config", "clevrer-savi-slots"]) == 2 and "expected [7, 128]" in capsys.readouterr().err
    assert not (tmp_path / "made-4").exists()
    assert main([*file(7), "--config", "savi-clevrer"]) == 2 and "clevrer-savi-slots" in capsys.readouterr().err


def test_a_released_file_is_not_converted_under_the_entry_of_another(tmp_path, capsys):
    """Their shapes are the same: the card would hold the other's numbers."""
    made = str(tmp_path / "made")
    for file, wrong, right in (
        ("clevrer_savi_2_epoch_30_object.ckpt", "cjepa-clevrer-videosaur-4of7", "cjepa-clevrer-savi-2of7"),
        ("clevrer_videosaur_slots.pkl", "clevrer-savi-slots", "clevrer-videosaur-slots"),
    ):
        (tmp_path / file).write_bytes(b"not read")
        assert main(["convert", str(tmp_path / file), "--config", wrong, "--output-dir", made]) == 2
        assert f"pass {right}" in capsys.readouterr().err
        assert main(["convert", str(tmp_path / file), "--config", right, "--output-dir", made]) == 2
        assert "cannot be read" in capsys.readouterr().err and not Path(made).exists()


@pytest.mark.parametrize("name", ["videosaur-pusht", "savi-clevrer", "cjepa-clevrer-savi-2of7", "aloe-clevrer"])
def test_a_missing_tensor_is_refused(name, monkeypatch):
    tensors = state_dict(name)
    key = max(tensors, key=lambda key: tensors[key].numel())
    monkeypatch.setattr(convert, "read_pickled", lambda path: {k: t for k, t in tensors.items() if k != key})
    with pytest.raises(ConversionError, match=r"lacks|holds no"):
        convert_original_checkpoint("released.ckpt", name)


def test_entries_that_differ_in_masks_alone_have_the_same_shapes():
    for name in RELEASED:
        other = re.sub(r"\dof", "1of", name)
        assert read(name) | {"num_masked_slots": 1} == read(other) | {"num_masked_slots": 1}


@pytest.mark.parametrize("name", MODELS)
def test_the_processor_of_an_entry_loads(name):
    values = read(name)
    encoder = values.get("slot_encoder_config") or values
    expected = {"videosaur": "VideoSaurImageProcessor", "savi": "SaviImageProcessor", "aloe": "AloeProcessor"}
    expected |= {"color-isa": "ColorIsaImageProcessor", "crop-slots": "CropSlotsImageProcessor"}
    expected = expected.get(encoder["model_type"])
    files = {path.name for path in ENTRIES[name].iterdir()} - {"config.json", "source.json"}
    if expected is None:  # a predictor of slots
        assert files == set()
        return
    auto = AutoProcessor if expected == "AloeProcessor" else AutoImageProcessor
    processor = auto.from_pretrained(ENTRIES[name])
    assert type(processor).__name__ == expected and len(files) == 1
    assert getattr(processor, "size", encoder.get("image_size")) == encoder.get("image_size")


@pytest.mark.parametrize("name", OWN)
def test_our_small_model_is_the_one_that_ships(name):
    """After a new one has been trained: copy its configurations into the entry."""
    files = {path.name for path in (ENTRIES[name]).glob("*.json")} - {"source.json"}
    assert len(files) == 2 and "config.json" in files
    for file in files:
        assert read(name, file) == json.loads((bundled_checkpoint(OWN[name]) / file).read_text())


@pytest.mark.parametrize("name", ENTRIES)
def test_a_source_says_where_from_and_under_which_license(name):
    source = read(name, "source.json")
    assert source["license"] == "apache-2.0" and source["title"] and source["training_data"]
    assert ("original" in source) != ("bundled" in source)
    if encoder := source.get("encoder"):
        assert encoder in ENTRIES
    for path in source.get("results", []):
        assert (ROOT / path).is_file()


def test_the_papers_mean_accuracies_are_the_means_over_its_questions():
    counts = {"descriptive": 54990, "explanatory": 8488, "predictive": 3557, "counterfactual": 9333}
    for name in RELEASED:
        if name.startswith("cjepa-clevrer"):
            results = read(name, "source.json")["paper"]["results"]
            values = {result["name"].split(",")[0].split(" ")[0]: result["value"] for result in results}
            mean = sum(counts[kind] * values[kind] for kind in counts) / sum(counts.values())
            assert mean == pytest.approx(values["all"], abs=0.011)


def test_the_wheel_brings_the_entries_and_finds_them(tmp_path, monkeypatch):
    wheel = pytest.importorskip("hatchling.builders.wheel")
    built = next(wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with zipfile.ZipFile(built) as archive:
        inside = [name for name in archive.namelist() if "/hub_configs/" in name]
        archive.extractall(tmp_path / "site", inside)
    monkeypatch.setattr(convert, "__file__", str(tmp_path / "site" / "cjepa_hf" / "hub" / "convert.py"))
    assert set(hub_configs()) == set(ENTRIES)
    found = config_file("cjepa-pusht-1of4")
    assert found.is_relative_to(tmp_path) and json.loads(found.read_text()) == read("cjepa-pusht-1of4")


def test_a_misspelt_entry_names_the_nearest():
    with pytest.raises(ConversionError, match="cjepa-pusht-1of4"):
        config_file("cjepa-pusht-1of")
