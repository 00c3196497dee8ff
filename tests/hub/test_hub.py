"""Uploading to a Hub and loading from it, with the real clients, against a small Hub on this computer (local_hub.py)."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cjepa_hf import ColorIsaConfig, ColorIsaModel
from cjepa_hf.training.trainer import push_folder_to_hub


@pytest.fixture(scope="module")
def published(hub):
    return hub[1]("publisher", "push_model", "upload_slots", "train_and_push", "push_pickle", "extract_and_push")


@pytest.fixture(scope="module")
def loaded(hub, published):
    """Another user, whose caches are empty."""
    first = value(published, "push_model")["first"]
    steps = ["load_model:" + first, "load_pickle", "load_slots", "load_missing", "plan", "evaluate_trained"]
    return hub[1]("user", *steps)


def value(results, step):
    result = results[step]
    assert not (isinstance(result, dict) and "error" in result), result["error"]
    return result


def files(store, kind, name):
    """Files of the newest commit."""
    folder = store / kind / "tester" / name
    commit = json.loads((folder / "refs.json").read_text())["branches"]["main"]
    return {str(path.relative_to(folder / commit)) for path in (folder / commit).rglob("*") if path.is_file()}


def commits(store, kind, name):
    return len(json.loads((store / kind / "tester" / name / "refs.json").read_text())["log"])


def test_a_pushed_model_loads_by_its_id_and_by_autoclass(published, loaded):
    old, new = value(published, "push_model")["predicted"]
    result = value(loaded, "load_model")
    assert result["class"] == "CJepaModel" and old != new
    np.testing.assert_allclose(result["predicted"], [old, new, new], rtol=1e-6)  # the old one by its revision


def test_pushed_weights_are_safetensors(hub, published):
    value(published, "push_model")
    assert files(hub[0], "models", "world") >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert not [name for name in files(hub[0], "models", "world") if name.endswith((".bin", ".pt", ".py"))]


def test_pickled_weights_are_refused_and_not_even_downloaded(hub, published, loaded):
    value(published, "push_pickle")
    assert "pytorch_model.bin" in files(hub[0], "models", "pickle")
    assert "tester/pickle" in value(loaded, "load_pickle")
    requests = (hub[0] / "access.log").read_text().splitlines()
    assert [line for line in requests if "tester/pickle/resolve" in line and line.endswith("config.json")]
    assert not [line for line in requests if line.startswith("GET") and "pytorch_model.bin" in line]


def test_an_uploaded_slot_dataset_loads_and_streams(published, loaded):
    result = value(loaded, "load_slots")
    assert result["episodes"] == 6
    np.testing.assert_array_equal(result["first"], value(published, "upload_slots"))
    assert result["windows"] == [[3, 4, 16], 2 * (13 - 6 + 1)]


def test_a_slot_dataset_names_the_commit_of_its_encoder(hub, published):
    value(published, "upload_slots"), value(published, "extract_and_push")
    commit = json.loads((hub.store / "models" / "tester" / "encoder" / "refs.json").read_text())["branches"]["main"]
    for name in ("slots", "extracted"):
        folder = hub.store / "datasets" / "tester" / name
        head = json.loads((folder / "refs.json").read_text())["branches"]["main"]
        encoder = json.loads((folder / head / "slot_dataset.json").read_text())["encoder"]
        assert encoder["name"] == "tester/encoder" and encoder["revision"] == commit


def test_an_extracted_dataset_is_uploaded_with_its_card_and_previews(hub, published):
    assert value(published, "extract_and_push") == 0
    uploaded = files(hub[0], "datasets", "extracted")
    assert uploaded >= {"slot_dataset.json", "README.md", "data/train-00000-of-00001.parquet", "preview/a.gif"}
    # and none of the shards of an earlier upload
    assert "notes.txt" in uploaded and sum(name.endswith(".parquet") for name in uploaded) == 1
    assert not [name for name in uploaded if ".partial" in name]
    assert commits(hub[0], "datasets", "extracted") == 2 + 1


def test_training_reads_from_the_hub_and_uploads_model_and_card(hub, published):
    assert value(published, "train_and_push") == 0
    uploaded = files(hub[0], "models", "trained")
    assert uploaded >= {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"}
    assert uploaded >= {"training_args.json", "training_results.json"}
    assert not [name for name in uploaded if "checkpoints" in name]
    weights = [name for name in uploaded if name.endswith((".bin", ".pkl", ".safetensors"))]
    assert weights == ["model.safetensors"] and "notes.txt" in uploaded  # no pickle, nothing of an earlier upload
    assert commits(hub[0], "models", "trained") == 3 + 1
    folder = hub[0] / "models" / "tester" / "trained"
    commit = json.loads((folder / "refs.json").read_text())["branches"]["main"]
    card = (folder / commit / "README.md").read_text()
    assert "# tester/trained" in card and "`tester/slots`" in card and "tester/encoder" in card


def test_a_training_that_diverged_is_not_uploaded(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **keywords: sent.append(keywords) or "url")
    model = ColorIsaModel(ColorIsaConfig(num_slots=4, slot_size=16, hidden_size=16, mlp_size=16, stem_channels=8))
    arguments = SimpleNamespace(hub_model_id="me/model", output_dir=str(tmp_path))
    name, parameter = next(model.named_parameters())
    before = parameter.detach().clone()
    torch.nn.init.constant_(parameter, torch.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name}.*NaN"):
        push_folder_to_hub(arguments)
    assert sent == []
    parameter.data.copy_(before)
    model.save_pretrained(tmp_path)
    assert push_folder_to_hub(arguments) == "url" and len(sent) == 1


def test_an_uploaded_training_is_evaluated_by_its_id(loaded, hub):
    assert value(loaded, "evaluate_trained") == 0
    results = json.loads((hub[0].parent / "user" / "results.json").read_text())
    assert results["model"] == "tester/trained" and results["rows"][0]["n"] == 1


def test_the_pipeline_plans_with_a_model_of_the_hub(loaded):
    actions = np.array(value(loaded, "plan"))
    assert actions.shape == (4, 2) and np.abs(actions).max() <= 1


def test_a_missing_repository_is_named(loaded):
    messages = value(loaded, "load_missing")
    assert set(messages) == {"slots", "model"} and all("tester/missing" in text for text in messages.values())
