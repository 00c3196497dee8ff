"""VideoSAUR training over a random backbone: from clips to a folder that loads, and the loss goes down."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, Dinov2Config, Dinov2Model

from cjepa_hf.models.videosaur import VideoSaurImageProcessor, VideoSaurModel
from cjepa_hf.training.trainer import read_log
from cjepa_hf.training.videosaur import VideoSaurTrainArguments, build_model, main

EXAMPLES = Path(__file__).parents[2] / "examples"
BACKBONE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=4)
_TINY = """--num_slots 3 --slot_size 16 --image_size 24 --num_attention_heads 2 --num_allocator_layers 1
--renderer_size 32 --render_resolution 32 --use_cpu --batch_size 8 --clip_length 2 --warmup_steps 5
--learning_rate 3e-3 --gradient_clip 0.5 --num_eval_clips 4 --log_every 5 --eval_every 0"""
TINY = _TINY.split()
RANDOM = [*TINY, "--backbone", "random", "--backbone_config", json.dumps(BACKBONE)]


def test_training_lowers_the_loss_leaves_the_backbone_and_a_folder_that_loads(tmp_path, monkeypatch):
    words = ["train_videosaur.py", *RANDOM, "--output_dir", str(tmp_path), "--max_steps", "60"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(EXAMPLES / "train_videosaur.py"), run_name="__main__")
    log = [line for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    # the similarity loss cannot fall far: its targets, of a random backbone, are close to uniform
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["feature_loss"] < 0.8 * log[0]["feature_loss"]
    results = json.loads((tmp_path / "training_results.json").read_text())
    names = {"loss", "feature_loss", "similarity_loss", "foreground_ari", "foreground_ari_clip"}
    assert set(results["validation"]) == names
    model, processor = AutoModel.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)
    assert type(model) is VideoSaurModel and model.config.num_slots == 3
    assert results["parameters"] == sum(p.numel() for n, p in model.named_parameters() if "backbone" not in n)
    # what is saved extracts; training resizes otherwise
    assert type(processor) is VideoSaurImageProcessor and (processor.resample, processor.antialias) == (
        "bilinear",
        True,
    )
    torch.manual_seed(0)
    untrained = build_model(VideoSaurTrainArguments(output_dir="x", backbone="random"), model_fields(model))[0]
    for name, value in untrained.backbone.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[name]), name


def model_fields(model) -> dict:
    names = ("num_slots", "slot_size", "image_size", "num_attention_heads", "num_allocator_layers", "renderer_size")
    return {name: getattr(model.config, name) for name in names} | {"backbone_config": BACKBONE}


def test_a_pretrained_backbone_is_taken_from_a_folder(tmp_path):
    torch.manual_seed(3)
    pretrained = Dinov2Model(Dinov2Config(**BACKBONE))
    pretrained.save_pretrained(tmp_path / "dino")
    words = [*TINY, "--backbone", str(tmp_path / "dino"), "--validation_split", "none", "--max_steps", "2"]
    main([*words, "--output_dir", str(tmp_path / "run")])
    model = VideoSaurModel.from_pretrained(tmp_path / "run")
    for name, value in pretrained.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[name]), name
    with pytest.raises(ValueError, match="--backbone random"):
        main([*words, "--output_dir", str(tmp_path / "other"), "--backbone_config", json.dumps(BACKBONE)])


def test_training_resizes_as_the_paper_does():
    args = VideoSaurTrainArguments(output_dir="x", backbone="random")
    _, training, saved = build_model(args, dict(image_size=24, backbone_config=BACKBONE))
    assert (training.resample, training.antialias, training.size) == ("bicubic", False, 24)
    assert (saved.resample, saved.antialias, saved.size) == ("bilinear", True, 24)
