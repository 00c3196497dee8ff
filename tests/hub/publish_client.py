"""Publishing to a Hub and loading from it, as processes of their own (see client.py, which says how steps are run).

python publish_client.py FOLDER STEP[:NAME,NAME...] ...
"""

import hashlib
import importlib.machinery
import json
import pickle
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, pipeline

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
    publish_with_probe(api)
    return predicted(net)


def publish_with_probe(api):
    """The shipped model with its probe; later the same without: who wants words takes the tag."""
    from cjepa_hf import bundled_checkpoint
    from cjepa_hf.hub.publish import publish

    publish(bundled_checkpoint("collisions"), "tester/collisions")
    api.create_tag("tester/collisions", tag="with-probe")
    api.delete_file("slot_probe.safetensors", "tester/collisions")


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
        revision or "auto": (CJepaModel if revision else AutoModel).from_pretrained(repo, revision=revision or "main")
        for revision in ("main", "v1", "next", "refs/pr/1", None)
    }
    return {name: [type(net).__name__, predicted(net)] for name, net in nets.items()}


def load_probe(folder):
    """That of a revision, with its model, alone, and where there is none."""
    from cjepa_hf import CJepaModel, SlotProbe

    def found(revision):
        net = CJepaModel.from_pretrained("tester/collisions", revision=revision)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            probe = pipeline("counterfactual-rollout", model=net, device="cpu").probe
        return None if probe is None else probe.fingerprint(), net.loaded_from["revision"]

    return {
        "with": found("with-probe"),
        "without": found("main"),
        "alone": SlotProbe.from_pretrained("tester/collisions", revision="with-probe").fingerprint(),
        "messages": {name: message(SlotProbe.from_pretrained, f"tester/{name}") for name in ("collisions", "code")},
    }


def load_offline(folder):
    from cjepa_hf import CJepaModel, SlotProbe

    net = CJepaModel.from_pretrained(f"galilai/{CLEVRER}")
    asked_first = message(SlotProbe.from_pretrained, "tester/stale")  # never before
    return predicted(net), message(CJepaModel.from_pretrained, "tester/code"), load_probe(folder), asked_first


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

    refused = message(CJepaModel.from_pretrained, "tester/secret", token=False)
    return [predicted(CJepaModel.from_pretrained("tester/secret")), refused]


def load_in_vain(folder):
    from cjepa_hf import CJepaModel

    result = {}
    for name in ("missing", "empty", "truncated"):
        result[name] = message(CJepaModel.from_pretrained, f"tester/{name}")
    load = CJepaModel.from_pretrained
    result["revision"] = message(load, f"galilai/{CLEVRER}", revision="v9")
    result["token"] = message(load, "tester/secret", token="hf_wrong", cache_dir=folder / "other")
    return result


def load_broken_off(folder):
    """A download that breaks off after 12 megabytes (what a client keeps of it are whole chunks of 10 MiB)."""
    from cjepa_hf import CJepaModel

    faults(folder, download={"match": "model.safetensors", "bytes": 12_000_000, "times": 1})
    keywords = {"revision": "v1", "cache_dir": folder / "broken"}
    return predicted(CJepaModel.from_pretrained(f"galilai/{CLEVRER}", **keywords))


def load_from_killed(folder, name):
    """From a server that hangs after 12 megabytes, twice: whoever watches kills it, and starts it again at once the first
    time, the second time only when this process has given up."""
    from cjepa_hf import CJepaModel

    def load(cache):
        return digest(CJepaModel.from_pretrained(f"galilai/{name}", cache_dir=folder / cache))

    result = []
    for cache in ("at once", "later"):
        faults(folder, download={"match": "model.safetensors", "bytes": 12_000_000, "times": 1, "hang": True})
        if cache == "at once":
            result.append(load(cache))
            continue
        result.append(message(load, cache))
        (folder / "gave up").touch()
        while not (folder / "it is back").exists():
            time.sleep(0.05)
        result.append(load(cache))
    return result


def load_code(folder):
    """In an environment without this package."""
    packages = [path for path in sys.path if importlib.machinery.PathFinder.find_spec("cjepa_hf", [path])]
    known = message(AutoConfig.from_pretrained, "tester/code", trust_remote_code=False)
    net = AutoModel.from_pretrained("tester/code", trust_remote_code=True)
    return [predicted(net), type(net).__module__, known, packages, "cjepa_hf" in sys.modules]


# ---- every entry of hub_configs, at full size


def digest(net):
    """Of names, shapes and bytes of all weights and statistics."""
    result = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        result.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        result.update(tensor.contiguous().numpy().tobytes())
    return result.hexdigest()


def slots_entry(folder, name):
    """A slot dataset as `cjepa-hf convert --config NAME` writes it, from pickles of two short videos per split, and what
    should be found in it."""
    from cjepa_hf.cli import main
    from cjepa_hf.hub.convert import hub_configs

    source, random = json.loads((hub_configs()[name] / "source.json").read_text()), np.random.default_rng(0)
    sizes = {"slots": (source["dataset"]["num_slots"], source["dataset"]["slot_size"])}
    sizes |= {key: (n,) for key, n in (("actions", 2), ("proprio", 4), ("states", 7)) if key in source["original"]}
    words = []
    for key, size in sizes.items():
        file = folder / f"{name}-{key}.pkl"
        splits = {
            split: {f"{split}_{i}.mp4": random.normal(size=(40, *size)).astype(np.float32) for i in range(2)}
            for split in source["dataset"]["splits"]
        }
        file.write_bytes(
            pickle.dumps({{"validation": "val"}.get(split, split): part for split, part in splits.items()})
        )
        words += [str(file)] if key == "slots" else [f"--{key}", str(file)]
    target = folder / f"{name}-0"
    if main(["convert", *words, "--config", name, "--output-dir", str(target)]):
        raise RuntimeError(f"{name} was not converted")
    return target, {key: source["dataset"][key] for key in ("splits", "columns", "frame_skip")}


def publish_entries(folder, names):
    """With weights of the right shapes, which nobody has trained. What they are, and the commit of the tag v1."""
    from cjepa_hf.hub.publish import publish

    result, api = {}, HfApi()
    for name in names.split(","):
        kind = "dataset" if name.endswith("-slots") else "model"
        target, made = slots_entry(folder, name) if kind == "dataset" else entry(folder, name, 0)
        where = {"repo_id": f"galilai/{name}", "repo_type": kind}
        publish(target, where["repo_id"])
        api.create_tag(**where, tag="v1")
        commit = api.repo_info(**where).sha
        shutil.rmtree(target)
        # one more commit, so that the tag is not what `main` is
        api.upload_file(**where, path_or_fileobj=b"later", path_in_repo="notes.txt")
        result[name] = {"made": made if kind == "dataset" else digest(made), "v1": commit}
    return result


def load_entry(name):
    """By its name, by revision and by AutoModel; the processor that belongs to it."""
    import cjepa_hf

    repo = f"galilai/{name}"
    auto = AutoModel.from_pretrained(repo)
    cls = getattr(cjepa_hf, type(auto).__name__)
    own, problems = cls.from_pretrained(repo, output_loading_info=True)
    old = cls.from_pretrained(repo, revision="v1")
    encoder = getattr(own.config, "slot_encoder_config", None) or own.config
    processor = None
    if encoder.model_type != "cjepa":
        kind = AutoProcessor if encoder.model_type == "aloe" else AutoImageProcessor
        processor = type(kind.from_pretrained(repo)).__name__
    return {
        "class": type(auto).__name__,
        "digests": [digest(net) for net in (auto, own, old)],
        "problems": sorted(name for name, found in problems.items() if found),
        "commits": [
            Path(try_to_load_from_cache(repo, "model.safetensors", revision=revision)).parent.name
            for revision in ("v1", "main")
        ],
        "processor": processor,
    }


def load_slots_entry(name, offline):
    """By `datasets` and by us, whole and streamed, with windows on top; sums of all windows. Offline nothing streams."""
    from datasets import load_dataset

    from cjepa_hf.data import SlotWindows, StreamingSlotWindows, load_slot_dataset

    repo, sizes = f"galilai/{name}", {"history_length": 3, "prediction_length": 1}
    data = load_slot_dataset(repo)
    windows = SlotWindows(data, **sizes, frame_skip=data.frame_skip)
    total = windows.get_batch(list(range(len(windows))))["slots"].double().sum().item()
    result = {
        "splits": sorted(load_dataset(repo)),
        "rows": [load_dataset(repo, split="train").num_rows],
        "windows": [len(windows)],
        "sums": [total],
        "columns": sorted(set(data.data.column_names) - {"episode_id", "slots"}),
        "frame_skip": data.frame_skip,
    }
    if not offline:
        result["rows"].append(len(list(load_dataset(repo, split="train", streaming=True))))
        streamed = load_slot_dataset(repo, "train", streaming=True)
        again = list(StreamingSlotWindows(streamed, **sizes, frame_skip=data.frame_skip))
        result["windows"].append(len(again))
        result["sums"].append(sum(window["slots"].double().sum().item() for window in again))
        result["rows"].append(len(load_slot_dataset(repo, "train", revision="v1")))
    return result


def load_entries(folder, names, offline=False):
    return {
        name: load_slots_entry(name, offline) if name.endswith("-slots") else load_entry(name)
        for name in names.split(",")
    }


def load_entries_offline(folder, names):
    return load_entries(folder, names, offline=True)


if __name__ == "__main__":
    results = {}
    for step in sys.argv[2:]:
        name, *words = step.split(":")
        try:
            results[name] = globals()[name](Path(sys.argv[1]), *words)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    Path(sys.argv[1], "results_of_steps.json").write_text(json.dumps(results))
