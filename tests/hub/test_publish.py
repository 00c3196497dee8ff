"""What is published, what is refused, and that it loads again by its name, against a small Hub on this computer."""

import json
import pickle
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cjepa_hf import CJepaConfig, CJepaModel, ColorIsaConfig, ColorIsaModel, SlotProbe, bundled_checkpoint
from cjepa_hf.cli import main
from cjepa_hf.data import write_slot_dataset
from cjepa_hf.hub.convert import hub_configs
from cjepa_hf.hub.publish import publish

ENTRY = "cjepa-clevrer-savi-2of7"
# one of every kind of entry, beside ENTRY; the slow test takes them all
KINDS = "cjepa-pusht-small", "videosaur-pusht", "savi-clevrer", "aloe-clevrer", "pusht-videosaur-slots"


def value(results, step):
    result = results[step]
    assert not (isinstance(result, dict) and "error" in result), result["error"]
    return result


# ---------------------------------------------------------------------------------------------------- without a Hub


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A predictor with an encoder, as a training leaves it."""
    folder = tmp_path_factory.mktemp("publish") / "model"
    encoder = ColorIsaConfig(num_slots=4, slot_size=16, hidden_size=16, mlp_size=16, stem_channels=8)
    sizes = dict(slot_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    CJepaModel(CJepaConfig(**sizes, slot_encoder_config=encoder)).save_pretrained(folder)
    for name in ("checkpoints/step_5/optimizer.bin", "log.jsonl", ".hidden", "helper.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"1")
    return folder


@pytest.fixture
def model(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_a_dry_run_lists_what_would_go_and_changes_nothing(model, capsys):
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert main(["publish", str(model), "tester/world", "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["files"]) == {"README.md", "config.json", "model.safetensors"}
    assert report["files"]["model.safetensors"] == (model / "model.safetensors").stat().st_size
    assert report["left_out"] == [".hidden", "checkpoints/step_5/optimizer.bin", "helper.py", "log.jsonl"]
    assert report["url"] is None and report["repo_type"] == "model"
    assert before == {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}


def test_a_card_that_is_there_is_kept(model):
    (model / "README.md").write_text("mine")
    assert publish(model, "tester/world", dry_run=True)["files"]["README.md"] == 4


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.ckpt", "slots.pkl", "innocent.json", "notes"])
@pytest.mark.parametrize("protocol", ["zip", 2, 5])
def test_pickles_are_refused_under_any_name(model, name, protocol):
    content = {"weight": [1.0]}
    if protocol == "zip":
        torch.save(content, model / name)
    else:
        (model / name).write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ValueError, match=name):
        publish(model, "tester/world", dry_run=True)


def test_weights_that_do_not_load_are_refused(model):
    whole = (model / "model.safetensors").read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}

    def refused(message):
        with pytest.raises(ValueError, match=message):
            publish(model, "tester/world", dry_run=True)

    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("damaged")
    for change, message in (
        (lambda t: t.pop("predictor.norm.weight"), "1 missing keys"),
        (lambda t: t.update(stranger=torch.zeros(1)), "1 unexpected keys"),
        (lambda t: t.update({"predictor.norm.weight": torch.zeros(3)}), "config.json"),
        (lambda t: t["predictor.norm.weight"].fill_(float("nan")), "predictor.norm.weight"),
    ):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        change(changed)
        (model / "model.safetensors").unlink()
        save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
        refused(message)
    (model / "model.safetensors").unlink()
    refused("no model.safetensors")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a model"):
        publish(tmp_path, "tester/world", dry_run=True)
    with pytest.raises(ValueError, match="no folder"):
        publish(tmp_path / "missing", "tester/world", dry_run=True)
    with pytest.raises(ValueError, match="owner/name"):
        publish(tmp_path, "world", dry_run=True)
    with pytest.raises(ValueError, match="a/b/c"):
        publish(tmp_path, "a/b/c", dry_run=True)


def a_probe(size=16, value=1.0):
    slots = value * torch.randn(64, size, generator=torch.Generator().manual_seed(0))
    return SlotProbe.fit(slots, present=torch.arange(64) < 32, positions=slots[:, :2], labels={}, attributes={})


def test_a_probe_goes_with_its_model_and_one_of_no_use_is_refused(model):
    a_probe().save_pretrained(model)
    for with_code in (False, True):
        assert "slot_probe.safetensors" in publish(model, "tester/world", dry_run=True, with_code=with_code)["files"]
    a_probe(size=8).save_pretrained(model)
    with pytest.raises(ValueError, match="reads slots of size 8, the model's have 16"):
        publish(model, "tester/world", dry_run=True)
    broken = a_probe()
    broken.weight[0] = torch.nan
    broken.save_pretrained(model)
    with pytest.raises(ValueError, match="NaN"):
        publish(model, "tester/world", dry_run=True)


def test_code_goes_with_the_predictor_alone(model, tmp_path):
    report = publish(model, "tester/world", dry_run=True, with_code=True)
    assert {"configuration_cjepa.py", "modeling_cjepa.py", "model.safetensors"} <= set(report["files"])
    assert "helper.py" not in report["files"] and "helper.py" in report["left_out"]
    assert report["files"]["model.safetensors"] < (model / "model.safetensors").stat().st_size  # no encoder
    encoder = ColorIsaConfig(num_slots=4, slot_size=16, hidden_size=16, mlp_size=16, stem_channels=8)
    ColorIsaModel(encoder).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="color-isa"):
        publish(tmp_path / "encoder", "tester/world", dry_run=True, with_code=True)


def test_a_folder_with_a_map_to_code_needs_the_option(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "helper.Model"}}))
    with pytest.raises(ValueError, match="--with-code"):
        publish(model, "tester/world", dry_run=True)


def test_a_slot_dataset_lists_its_shards(tmp_path):
    episode = {"episode_id": "e", "slots": np.zeros((5, 4, 16), np.float32)}
    write_slot_dataset(tmp_path / "slots", {"train": [episode]}, frame_skip=1)
    (tmp_path / "slots" / "extra.pkl").write_bytes(b"1")
    report = publish(tmp_path / "slots", "tester/slots", dry_run=True)
    assert set(report["files"]) == {"README.md", "slot_dataset.json", "data/train-00000-of-00001.parquet"}
    assert report["repo_type"] == "dataset" and report["left_out"] == ["extra.pkl"]
    shard = tmp_path / "slots" / "data" / "train-00000-of-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        publish(tmp_path / "slots", "tester/slots", dry_run=True)


# ------------------------------------------------------------------------------------------------------- with a Hub


@pytest.fixture(scope="module")
def published(hub):
    steps = ["publish_models", "publish_others", "publish_slots", "publish_in_vain", "upload_damaged"]
    steps.append(f"publish_entries:{','.join(KINDS)}")
    return hub[1]("owner", *steps, script="publish_client.py")


@pytest.fixture(scope="module")
def loaded(hub, published):
    """Another user, whose caches are empty."""
    steps = ["load_by_name", "load_probe", "load_slots", "load_private", "load_in_vain", "load_broken_off"]
    steps.append(f"load_entries:{','.join(KINDS)}")
    return hub[1]("reader", *steps, script="publish_client.py", HF_TOKEN="hf_reader")


def refs(hub, name, kind="models"):
    return json.loads((hub[0] / kind / name / "refs.json").read_text())


def files(hub, name, branch="main", kind="models"):
    folder = hub[0] / kind / name / refs(hub, name, kind)["branches"][branch]
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_entry_is_published_in_one_commit_with_a_card(hub, published):
    result = value(published, "publish_models")
    assert result["status"] == 0 and "README.md" not in result["untouched"]
    name = f"galilai/{ENTRY}"
    assert files(hub, name) == {"README.md", "config.json", "model.safetensors", "source.json"}
    assert len(refs(hub, name)["log"]) == 3  # one on main, one on the branch, one in the pull request
    assert set(refs(hub, name)["branches"]) == {"main", "next", "refs/pr/1"}
    assert result["pull request"].endswith("/discussions/1")
    card = (hub[0] / "models" / name / refs(hub, name)["branches"]["main"] / "README.md").read_text()
    assert f'from_pretrained("{name}"' in card and "77.25" in card


def test_it_loads_by_name_branch_tag_and_pull_request(published, loaded):
    old, new = value(published, "publish_models")["predicted"]
    assert not np.allclose(old, new)
    expected = {"main": old, "auto": old, "v1": old, "next": new, "refs/pr/1": new}
    result = value(loaded, "load_by_name")
    assert set(result) == set(expected)
    for revision, (name, numbers) in result.items():
        assert name == "CJepaModel"
        np.testing.assert_allclose(numbers, expected[revision], rtol=1e-5)


def check_probes(result):
    own = SlotProbe.from_pretrained(bundled_checkpoint("collisions")).fingerprint()
    assert result["with"][0] == own == result["alone"] and result["without"][0] is None
    for name, (kind, text) in result["messages"].items():
        assert kind == "FileNotFoundError" and f"tester/{name} holds no slot_probe.safetensors" in text


def test_a_probe_is_published_and_found_with_its_model(hub, published, loaded):
    value(published, "publish_others")
    assert "slot_probe.safetensors" not in files(hub, "tester/collisions")  # on the tag alone
    result = value(loaded, "load_probe")
    check_probes(result)
    there = refs(hub, "tester/collisions")
    assert result["with"][1] == there["tags"]["with-probe"] != there["branches"]["main"] == result["without"][1]


@pytest.fixture(scope="module")
def offline(hub, published, loaded):
    """The reader again, without a network; what the Hub was asked meanwhile."""
    before = (hub.store / "access.log").read_text()
    variables = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    steps = ["load_offline", f"load_entries_offline:{','.join(KINDS)}"]
    result = hub.client("reader", *steps, script="publish_client.py", **variables)
    return result, (hub.store / "access.log").read_text()[len(before) :]


def test_it_loads_without_a_network_from_the_cache(published, offline):
    numbers, (kind, text), probes, (unknown, why) = value(offline[0], "load_offline")
    check_probes(probes)
    assert unknown == "ConnectionError" and "tester/stale holds a slot_probe.safetensors is not known" in why
    assert kind == "OSError" and "cached files" in text  # another one, never loaded there
    np.testing.assert_allclose(numbers, value(published, "publish_models")["predicted"][0], rtol=1e-5)
    assert offline[1] == ""


def check_entry(name, published, result, source):
    if name.endswith("-slots"):
        made = published["made"]
        assert sorted(made["splits"]) == result["splits"] and sorted(made["columns"]) == result["columns"]
        assert made["frame_skip"] == result["frame_skip"]
        assert set(result["rows"]) == {2}  # videos
        assert len(set(result["windows"])) == 1 and result["windows"][0] > 0
        assert result["sums"] == pytest.approx([result["sums"][0]] * len(result["sums"]), rel=1e-9)
        return
    assert result["class"] == json.loads((source / "config.json").read_text())["architectures"][0]
    assert result["digests"] == [published["made"]] * 3 and result["problems"] == []
    old, new = result["commits"]
    assert old == published["v1"] != new
    assert (result["processor"] is None) == (not list(source.glob("*processor_config.json")))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_entry_loads_by_name_revision_and_offline(published, loaded, offline, name):
    made = value(published, "publish_entries")[name]
    check_entry(name, made, value(loaded, "load_entries")[name], hub_configs()[name])
    check_entry(name, made, value(offline[0], "load_entries_offline")[name], hub_configs()[name])


@pytest.mark.slow
def test_every_entry_at_full_size_loads_by_name_revision_and_offline(hub):
    """In a process and with a cache of its own: about 800 MB of weights."""
    entries, script = hub_configs(), {"script": "publish_client.py"}
    names = ",".join(entries)
    published = value(hub.client("publisher of all", f"publish_entries:{names}", **script), "publish_entries")
    loaded = value(hub.client("reader of all", f"load_entries:{names}", **script), "load_entries")
    variables = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"} | script
    again = hub.client("reader of all", f"load_entries_offline:{names}", **variables)
    again = value(again, "load_entries_offline")
    assert set(loaded) == set(again) == set(entries)
    for name, source in entries.items():
        check_entry(name, published[name], loaded[name], source)
        check_entry(name, published[name], again[name], source)


def test_it_loads_with_its_code_where_the_package_is_not_installed(hub, published, tmp_path):
    """An interpreter without its own site-packages, and with all that is installed here but this package."""
    for folder in map(Path, sys.path):
        if folder.name in ("site-packages", "dist-packages"):
            for path in folder.iterdir():
                if "cjepa_hf" not in path.name and path.suffix != ".pth" and not (tmp_path / path.name).exists():
                    (tmp_path / path.name).symlink_to(path)
    variables = {"python": (sys.executable, "-S"), "PYTHONPATH": str(tmp_path)}
    result = hub.client("stranger", "load_code", script="publish_client.py", **variables)
    numbers, module, (kind, text), packages, imported = value(result, "load_code")
    assert packages == [] and not imported  # it is not there, on no path of the process
    assert kind == "ValueError" and "trust_remote_code" in text
    assert module.startswith("transformers_modules")
    np.testing.assert_allclose(numbers, value(published, "publish_others"), rtol=1e-5)
    assert files(hub, "tester/code") >= {"configuration_cjepa.py", "modeling_cjepa.py", "model.safetensors"}


def test_a_private_repository_opens_with_the_token_alone(hub, published, loaded):
    assert refs(hub, "tester/secret")["private"] and not refs(hub, "tester/code")["private"]
    numbers, (kind, text) = value(loaded, "load_private")
    np.testing.assert_allclose(numbers, value(published, "publish_others"), rtol=1e-5)
    assert kind == "OSError" and "tester/secret" in text


def test_weights_of_an_earlier_upload_are_gone(hub, published):
    value(published, "publish_others")
    assert files(hub, "tester/stale") == {"README.md", "config.json", "model.safetensors", "notes.txt"}


def test_a_failed_upload_changes_nothing_and_says_so(hub, published):
    result = value(published, "publish_in_vain")
    assert result["failed"][0] == "ConnectionError" and "nothing in the repository has changed" in result["failed"][1]
    for token in ("hf_wrong", "hf_reader"):
        kind, text = result[token]
        assert kind == "PermissionError" and f"galilai/{ENTRY}" in text and "HF_TOKEN" in text
    assert len(refs(hub, f"galilai/{ENTRY}")["log"]) == 3


def test_a_published_slot_dataset_loads_and_streams_into_windows(hub, published, loaded):
    assert set(value(published, "publish_slots")) == files(hub, "tester/slots", kind="datasets")
    count, streamed, total, again = value(loaded, "load_slots")
    assert count == streamed == 2 * (13 - 6 + 1)
    assert total == pytest.approx(again, rel=1e-9)


def test_what_cannot_be_loaded_is_named_with_what_helps(published, loaded):
    value(published, "upload_damaged")
    result = value(loaded, "load_in_vain")
    for name, words in {
        "missing": ["tester/missing", "token"],
        "empty": ["tester/empty", "holds no model.safetensors", "cjepa-hf convert"],
        "truncated": ["tester/truncated", "cut off or damaged", "force_download=True"],
        "revision": [ENTRY, "v9", "available revisions"],
        "token": ["tester/secret", "does not accept the token", "Invalid credentials", "hf auth login"],
    }.items():
        kind, text = result[name]
        assert kind == "OSError" and all(word in text for word in words), (name, text)
        assert "not set `use_safetensors" not in text  # what transformers advises would allow pickles


def resumed(hub, name):
    """Requests for the rest of an entry's weights."""
    lines = (hub.store / "access.log").read_text().splitlines()
    return [line for line in lines if line.startswith("GET") and name in line and line.endswith("bytes=10485760-")]


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, published, loaded):
    old, _ = value(published, "publish_models")["predicted"]
    np.testing.assert_allclose(value(loaded, "load_broken_off"), old, rtol=1e-5)
    assert json.loads((hub.store / "faults.json").read_text()) == {"download": None}  # it did break off
    assert len(resumed(hub, ENTRY)) == 1


@pytest.mark.slow
def test_a_download_survives_a_killed_server(empty_hub):
    """Started again at once, the same call goes on from the part it has; else the error says so and the next call loads."""
    hub = empty_hub
    name, script = "cjepa-clevrer-savi-1of7", {"script": "publish_client.py"}
    made = value(hub.client("owner of one", f"publish_entries:{name}", **script), "publish_entries")[name]["made"]
    folder = hub.store.parent / "patient"

    def wait(condition):
        deadline = time.monotonic() + 300
        while not condition():
            if client.done():
                raise RuntimeError(str(client.result()))
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(cache):
        wait((hub.store / "hanging").exists)
        wait(lambda: any(path.stat().st_size == 10 * 2**20 for path in (folder / cache).rglob("*.incomplete")))
        hub.server.kill()
        (hub.store / "hanging").unlink()

    with ThreadPoolExecutor() as pool:
        client = pool.submit(hub.client, "patient", f"load_from_killed:{name}", **script)
        kill("at once")
        hub.server.start()
        kill("later")
        wait((folder / "gave up").exists)
        hub.server.start()
        (folder / "it is back").touch()
        at_once, (kind, text), later = value(client.result(), "load_from_killed")
    assert len(resumed(hub, name)) == 1
    assert kind == "ConnectionError" and f"the download of galilai/{name} broke off" in text and "Call again" in text
    assert [at_once, later] == [made, made]
