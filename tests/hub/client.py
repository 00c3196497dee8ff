"""What a user does with the Hub: run as a process of its own, because the Hub's address is read at import.

    python client.py FOLDER STEP ...

writes FOLDER/results_of_steps.json: what each step returned, or {"error": its traceback}.
"""

import json
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi
from transformers import AutoModel, pipeline

from cjepa_hf import CJepaConfig, CJepaModel, ColorIsaConfig, ColorIsaImageProcessor, ColorIsaModel
from cjepa_hf.cli import main
from cjepa_hf.data import StreamingSlotWindows, load_slot_dataset, write_slot_dataset
from cjepa_hf.data.extract import open_encoder
from cjepa_hf.models.cjepa import CJepaOutput

N, D = 4, 16
ENCODER = ColorIsaConfig(num_slots=N, slot_size=D, hidden_size=16, mlp_size=16, stem_channels=8)
SLOTS = torch.linspace(-1, 1, 2 * N * D).reshape(1, 2, N, D)


def model(seed=0):
    torch.manual_seed(seed)
    config = CJepaConfig(
        slot_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, action_size=4, frame_skip=2,
        slot_encoder_config=ENCODER,
    )  # fmt: skip
    net = CJepaModel(config).eval()
    net.set_statistics(action_mean=torch.zeros(4), action_std=torch.full((4,), 0.2))
    return net


def predicted(net):
    with torch.no_grad():
        output = net.eval()(SLOTS, actions=torch.zeros(1, 2, 4))
    if not isinstance(output, CJepaOutput):
        raise TypeError(f"a {type(net).__name__} returned {type(output).__name__}")
    return output.predicted_slots.flatten()[:8].tolist()


def push_model(folder):
    first = model(seed=1).push_to_hub("tester/world")
    net = model()
    net.push_to_hub("tester/world")
    ColorIsaImageProcessor().push_to_hub("tester/world")
    return {"first": first.oid, "predicted": [predicted(model(seed=1)), predicted(net)]}


def upload_slots(folder):
    """A slot dataset by an encoder that is on the Hub too."""
    torch.manual_seed(2)
    ColorIsaModel(ENCODER).push_to_hub("tester/encoder")
    ColorIsaImageProcessor().push_to_hub("tester/encoder")
    _, _, description = open_encoder("tester/encoder", None, None, "cpu")
    random = np.random.default_rng(0)

    def episode(number):
        slots, actions = random.normal(size=(13, N, D)), random.uniform(-1, 1, (13, 2))
        return {"episode_id": f"e{number}", "slots": slots, "actions": actions}

    splits = {"train": map(episode, range(6)), "validation": map(episode, range(6, 8))}
    write_slot_dataset(folder / "slots", splits, frame_skip=2, encoder=description)
    HfApi().create_repo("tester/slots", repo_type="dataset")
    HfApi().upload_folder(repo_id="tester/slots", repo_type="dataset", folder_path=folder / "slots")
    return np.asarray(load_slot_dataset(folder / "slots").data[0]["slots"])[0, 0].tolist()


def leave_behind(repo, kind, *names):
    """A repository with files of an earlier upload."""
    HfApi().create_repo(repo, repo_type=kind)
    for name in names:
        HfApi().upload_file(repo_id=repo, repo_type=kind, path_or_fileobj=b"old", path_in_repo=name)


def train_and_push(folder):
    words = (
        "train cjepa --dataset tester/slots --slot_encoder tester/encoder --max_steps 2 --batch_size 4 --use_cpu true"
    )
    words += " --eval_every 0 --save_every 1 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 32"
    words += " --history_length 2 --push_to_hub --hub_model_id tester/trained"
    leave_behind("tester/trained", "model", "slot_probe.safetensors", "pytorch_model.bin", "notes.txt")
    (folder / "trained").mkdir()
    (folder / "trained" / "mine.pkl").write_bytes(b"no business of the Hub's")
    return main([*words.split(), "--output_dir", str(folder / "trained")])


def extract_and_push(folder):
    """From files on this computer, with an encoder of the Hub, to a dataset on the Hub."""
    (folder / "clips").mkdir()
    np.save(folder / "clips" / "a.npy", np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8))
    leave_behind("tester/extracted", "dataset", "data/train-00001-of-00002.parquet", "notes.txt")
    words = ["extract", folder / "clips", "--encoder", "tester/encoder", "--output-dir", folder / "extracted"]
    return main([*map(str, words), "--preview", "1", "--push_to_hub", "tester/extracted"])


def push_pickle(folder):
    """A repository as one finds them: weights as a pickle only."""
    (folder / "pickle").mkdir()
    model().config.save_pretrained(folder / "pickle")
    torch.save(model().state_dict(), folder / "pickle" / "pytorch_model.bin")
    HfApi().create_repo("tester/pickle")
    HfApi().upload_folder(repo_id="tester/pickle", folder_path=folder / "pickle")


def load_model(folder, first):
    auto = AutoModel.from_pretrained("tester/world", use_safetensors=True)
    same = CJepaModel.from_pretrained("tester/world", use_safetensors=True)
    old = CJepaModel.from_pretrained("tester/world", revision=first, use_safetensors=True)
    return {"class": type(auto).__name__, "predicted": [predicted(net) for net in (old, same, auto)]}


def load_pickle(folder):
    try:
        CJepaModel.from_pretrained("tester/pickle", use_safetensors=True)
    except OSError as error:
        return str(error)


def load_slots(folder):
    loaded = load_slot_dataset("tester/slots")
    streamed = load_slot_dataset("tester/slots", "validation", streaming=True)
    windows = list(StreamingSlotWindows(streamed, history_length=2, prediction_length=1, frame_skip=2))
    return {
        "episodes": len(loaded),
        "first": np.asarray(loaded.data[0]["slots"])[0, 0].tolist(),
        "windows": [list(windows[0]["slots"].shape), len(windows)],
    }


def load_missing(folder):
    messages = {}
    for name, load in {"slots": load_slot_dataset, "model": CJepaModel.from_pretrained}.items():
        try:
            load("tester/missing")
        except OSError as error:
            messages[name] = str(error)
    return messages


def plan(folder):
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    planner = pipeline("goal-planning", model="tester/world", num_samples=8, num_iterations=1, num_elites=2)
    return planner({"start": images[0], "goal": images[1]}, horizon=2)["actions"].tolist()


def evaluate_trained(folder):
    """The folder that training uploaded, by its id on the command line."""
    words = "evaluate --model tester/trained --num-tasks 1 --planner cem:4x1:2 --json"
    return main([*words.split(), "--output", str(folder / "results.json")])


if __name__ == "__main__":
    results = {}
    for step in sys.argv[2:]:
        name, *words = step.split(":")
        try:
            results[name] = globals()[name](Path(sys.argv[1]), *words)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    Path(sys.argv[1], "results_of_steps.json").write_text(json.dumps(results))
