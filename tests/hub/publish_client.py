"""Publishing to a Hub and loading from it, as processes of their own (see client.py, which says how steps are run).

python publish_client.py FOLDER STEP ...
"""

import json
import shutil
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModel

CLEVRER = "cjepa-clevrer-savi-2of7"  # an entry at full size


def faults(folder, **plan):
    (folder.parent / "store" / "faults.json").write_text(json.dumps(plan))


def message(function, *arguments, **keywords):
    """Kind and text of the error, which must come."""
    try:
        function(*arguments, **keywords)
    except Exception as error:
        return [type(error).__name__, str(error)]
    raise RuntimeError("there was no error")


def predicted(net):
    config = net.config
    slots = torch.linspace(-1, 1, config.history_length * 4 * config.slot_size)
    with torch.no_grad():
        output = net.eval().predict(slots.reshape(1, config.history_length, 4, config.slot_size))
    return output.flatten()[:8].tolist()


def entry(folder, name, seed):
    """A folder as `cjepa-hf convert --config NAME` writes it, with random weights."""
    from cjepa_hf.hub.convert import hub_configs

    torch.manual_seed(seed)
    net = AutoModel.from_config(AutoConfig.from_pretrained(hub_configs()[name]))
    target = folder / f"{name}-{seed}"
    net.save_pretrained(target)
    for file in hub_configs()[name].iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, target / file.name)
    return target, net


def tiny(folder):
    """A predictor with an encoder inside."""
    from cjepa_hf import CJepaConfig, CJepaModel, ColorIsaConfig

    torch.manual_seed(3)
    encoder = ColorIsaConfig(num_slots=4, slot_size=16, hidden_size=16, mlp_size=16, stem_channels=8)
    sizes = dict(slot_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    net = CJepaModel(CJepaConfig(**sizes, slot_encoder_config=encoder))
    net.save_pretrained(folder / "tiny")
    return folder / "tiny", net


# ---- who publishes


def publish_models(folder):
    from cjepa_hf.cli import main
    from cjepa_hf.hub.publish import publish

    first, old = entry(folder, CLEVRER, 0)
    second, new = entry(folder, CLEVRER, 1)
    repo, result = f"galilai/{CLEVRER}", {"predicted": [predicted(old), predicted(new)]}
    result["status"] = main(["publish", str(first), repo])
    HfApi().create_tag(repo, tag="v1")
    result["branch"] = publish(second, repo, revision="next")["url"]
    result["pull request"] = publish(second, repo, create_pr=True)["url"]
    result["untouched"] = sorted(path.name for path in first.iterdir())
    return result


def publish_others(folder):
    """Code, a private repository, and one that holds what an earlier upload left."""
    from cjepa_hf.hub.publish import publish

    target, net = tiny(folder)
    publish(target, "tester/code", with_code=True)
    publish(target, "tester/secret", private=True)
    api = HfApi()
    api.create_repo("tester/stale")
    for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "notes.txt"):
        api.upload_file(repo_id="tester/stale", path_or_fileobj=b"old", path_in_repo=name)
    publish(target, "tester/stale")
    return predicted(net)


def publish_slots(folder):
    from cjepa_hf.data import write_slot_dataset
    from cjepa_hf.hub.publish import publish

    random = np.random.default_rng(0)
    episodes = [{"episode_id": f"e{i}", "slots": random.normal(size=(13, 4, 16))} for i in range(3)]
    write_slot_dataset(folder / "slots", {"train": episodes[:2], "validation": episodes[2:]}, frame_skip=2)
    return publish(folder / "slots", "tester/slots")["files"]


def publish_in_vain(folder):
    """A commit that the Hub fails, a wrong token, and one that may not write."""
    from cjepa_hf.hub.publish import publish

    target, _ = tiny(folder)
    faults(folder, commit=99)
    result = {"failed": message(publish, target, f"galilai/{CLEVRER}")}
    faults(folder)
    for token in ("hf_wrong", "hf_reader"):
        result[token] = message(publish, target, f"galilai/{CLEVRER}", token=token)
    return result


def upload_damaged(folder):
    """Repositories as one finds them: weights that are cut off, and none at all."""
    target, _ = tiny(folder)
    api = HfApi()
    for name in ("truncated", "empty"):
        api.create_repo(f"tester/{name}")
        api.upload_file(repo_id=f"tester/{name}", path_or_fileobj=target / "config.json", path_in_repo="config.json")
    weights = (target / "model.safetensors").read_bytes()
    api.upload_file(
        repo_id="tester/truncated", path_or_fileobj=weights[: len(weights) // 2], path_in_repo="model.safetensors"
    )


# ---- who loads


def load_by_name(folder):
    from cjepa_hf import CJepaModel

    repo = f"galilai/{CLEVRER}"
    nets = {
        revision or "auto": (CJepaModel if revision else AutoModel).from_pretrained(
            repo, revision=revision or "main", use_safetensors=True
        )
        for revision in ("main", "v1", "next", "refs/pr/1", None)
    }
    return {name: [type(net).__name__, predicted(net)] for name, net in nets.items()}


def load_offline(folder):
    from cjepa_hf import CJepaModel

    net = CJepaModel.from_pretrained(f"galilai/{CLEVRER}", use_safetensors=True)
    return predicted(net), message(CJepaModel.from_pretrained, "tester/code", use_safetensors=True)


def load_slots(folder):
    from cjepa_hf.data import SlotWindows, StreamingSlotWindows, load_slot_dataset

    windows = SlotWindows(load_slot_dataset("tester/slots"), history_length=2, prediction_length=1, frame_skip=2)
    streamed = load_slot_dataset("tester/slots", "train", streaming=True)
    again = list(StreamingSlotWindows(streamed, history_length=2, prediction_length=1, frame_skip=2))
    total = sum(window["slots"].double().sum().item() for window in again)
    return [
        len(windows),
        len(again),
        windows.get_batch(list(range(len(windows))))["slots"].double().sum().item(),
        total,
    ]


def load_private(folder):
    from cjepa_hf import CJepaModel

    refused = message(CJepaModel.from_pretrained, "tester/secret", token=False, use_safetensors=True)
    return [predicted(CJepaModel.from_pretrained("tester/secret", use_safetensors=True)), refused]


def load_in_vain(folder):
    from cjepa_hf import CJepaModel

    result = {}
    for name in ("missing", "empty", "truncated"):
        result[name] = message(CJepaModel.from_pretrained, f"tester/{name}", use_safetensors=True)
    load = CJepaModel.from_pretrained
    result["revision"] = message(load, f"galilai/{CLEVRER}", revision="v9", use_safetensors=True)
    result["token"] = message(
        load, "tester/secret", token="hf_wrong", cache_dir=folder / "other", use_safetensors=True
    )
    return result


def load_broken_off(folder):
    """A download that breaks off after a megabyte."""
    from cjepa_hf import CJepaModel

    faults(folder, download={"match": "model.safetensors", "bytes": 1_000_000, "times": 1})
    keywords = {"revision": "v1", "cache_dir": folder / "broken", "use_safetensors": True}
    return predicted(CJepaModel.from_pretrained(f"galilai/{CLEVRER}", **keywords))


def load_later(folder):
    """From a server that sends no byte of the weights, and from the same when it does again."""
    from cjepa_hf import CJepaModel

    def load():
        return CJepaModel.from_pretrained(f"galilai/{CLEVRER}", use_safetensors=True)

    faults(folder, download={"match": "model.safetensors", "bytes": 0, "times": 999})
    error = message(load)
    faults(folder)
    return error, predicted(load())


def load_code(folder):
    """In an environment without this package."""
    sys.modules["cjepa_hf"] = None  # an import of it fails
    net = AutoModel.from_pretrained("tester/code", trust_remote_code=True, use_safetensors=True)
    return [predicted(net), type(net).__module__]


def load_all(folder):
    """Every entry at full size: published, loaded by its name."""
    import cjepa_hf
    from cjepa_hf.hub.convert import hub_configs
    from cjepa_hf.hub.publish import publish

    result = {}
    for name, source in hub_configs().items():
        if not (source / "config.json").is_file():
            continue
        target, net = entry(folder, name, 0)
        publish(target, f"galilai/{name}")
        shutil.rmtree(target)
        cls = getattr(cjepa_hf, type(net).__name__)
        loaded, problems = cls.from_pretrained(f"galilai/{name}", use_safetensors=True, output_loading_info=True)
        state, other = net.state_dict(), loaded.state_dict()
        same = all(torch.equal(state[key].nan_to_num(), other[key].nan_to_num()) for key in state)
        result[name] = same and not any(problems.values())
    return result


if __name__ == "__main__":
    results = {}
    for step in sys.argv[2:]:
        try:
            results[step] = globals()[step](Path(sys.argv[1]))
        except Exception:
            results[step] = {"error": traceback.format_exc()}
    Path(sys.argv[1], "results_of_steps.json").write_text(json.dumps(results))
