"""SAVi training: from clips to a folder that loads, and the loss goes down."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from cjepa_hf.models.savi import SaviImageProcessor, SaviModel
from cjepa_hf.training.savi import main
from cjepa_hf.training.trainer import read_log

EXAMPLES = Path(__file__).parents[2] / "examples"
_TINY = """--num_slots 3 --slot_size 12 --image_size 16 --encoder_channels 8,8 --encoder_kernel_size 3 --slot_mlp_size 16
--encoder_stride 2 --decoder_channels 8,8 --decoder_kernel_size 3 --decoder_grid_size 4 --render_resolution 16 --use_cpu
--batch_size 8 --clip_length 2 --warmup_steps 5 --learning_rate 5e-3 --gradient_clip 0.5 --num_eval_clips 4
--log_every 5 --eval_every 0 --save_every 10"""
TINY = _TINY.split()


def test_training_lowers_the_loss_and_leaves_a_folder_that_loads(tmp_path, monkeypatch):
    words = ["train_savi.py", *TINY, "--output_dir", str(tmp_path), "--max_steps", "40"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(EXAMPLES / "train_savi.py"), run_name="__main__")
    log = [line for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert log[-1]["reconstruction_loss"] < 0.7 * log[0]["reconstruction_loss"] and log[-1]["loss"] < log[0]["loss"]
    results = json.loads((tmp_path / "training_results.json").read_text())["validation"]
    assert {"loss", "reconstruction_loss", "kernel_loss", "foreground_ari", "foreground_ari_clip"} == set(results)
    model, processor = AutoModel.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)
    assert type(model) is SaviModel and type(processor) is SaviImageProcessor and processor.size == 16
    assert model.config.num_slots == 3 and list(model.config.encoder_channels) == [8, 8]

    # the arguments it wrote are those of a run that goes on from it
    more = json.loads((tmp_path / "training_args.json").read_text()) | {
        "output_dir": str(tmp_path / "more"), "max_steps": 1, "init_model": str(tmp_path), "validation_split": "none",
        "learning_rate": 1e-9,
    }  # fmt: skip
    (tmp_path / "more.json").write_text(json.dumps(more))
    main([str(tmp_path / "more.json")])
    continued = AutoModel.from_pretrained(tmp_path / "more")
    torch.testing.assert_close(continued.state_dict(), model.state_dict(), atol=1e-6, rtol=0)


def test_a_run_that_was_stopped_gives_what_an_unbroken_one_gives(tmp_path):
    words = [*TINY, "--validation_split", "none", "--lr_scheduler", "constant", "--flip_probability", "0.5"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main([*words, "--output_dir", str(whole), "--max_steps", "12"])
    main([*words, "--output_dir", str(parts), "--max_steps", "10"])
    result = main([*words, "--output_dir", str(parts), "--max_steps", "12"])
    assert result.resumed_from is not None
    a, b = (SaviModel.from_pretrained(folder).state_dict() for folder in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="clip_length"):
        main([*words, "--output_dir", str(parts), "--max_steps", "14", "--clip_length", "3"])
