"""Arguments: file and command line, unknown names, wrong values."""

import dataclasses
import json

import pytest

from cjepa_hf.models.cjepa import CJepaConfig
from cjepa_hf.models.savi import SaviConfig
from cjepa_hf.models.videosaur import VideoSaurConfig
from cjepa_hf.training import TrainArguments, parse_arguments
from cjepa_hf.training.arguments import config_arguments, config_fields, config_overrides
from cjepa_hf.training.cjepa import CJepaTrainArguments


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: runs/a\nmax_steps: 7\nlearning_rate: 1e-3\noptimizer: muon\ntorch_compile: true\n")
    (args,) = parse_arguments(TrainArguments, [str(path), "--max_steps", "9"])
    assert (args.output_dir, args.max_steps, args.learning_rate) == ("runs/a", 9, 1e-3)
    assert args.optimizer == "muon" and args.torch_compile is True
    assert args.batch_size == TrainArguments.batch_size
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"output_dir": "runs/b", "ema_decay": 0.9}))
    (args,) = parse_arguments(TrainArguments, [str(path)])
    assert (args.output_dir, args.ema_decay) == ("runs/b", 0.9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_step", "3"], "unknown argument 'max_step': did you mean 'max_steps'"),
        (["--max_steps", "0"], "max_steps must be positive"),
        (["--ema_decay", "1"], "ema_decay must be below 1"),
        (["--batch_size", "10", "--gradient_accumulation_steps", "4"], "not a multiple"),
        (["--push_to_hub"], "hub_model_id"),
        (["run.toml"], "unexpected argument 'run.toml'"),
        (["missing.json"], "cannot read the arguments file"),
    ],
)
def test_a_wrong_argument_is_named(words, message):
    if words[0].startswith("-"):
        words = ["--output_dir", "x", *words]
    with pytest.raises(ValueError, match=message):
        parse_arguments(TrainArguments, words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 3", "did you mean 'max_steps'"),
        ("max_steps: many", "max_steps"),
        ("max_steps: 1.5", "max_steps must be int, got 1.5"),
        ("optimizer: sgd", "optimizer must be one of adamw, muon"),
        ("mixed_precision: [no]", "mixed_precision must be one of"),
        ("- 3", "one mapping"),
        ("a: [", "does not parse"),
    ],
)
def test_a_wrong_value_in_a_file_is_named(tmp_path, text, message, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises((ValueError, SystemExit)) as error:
        parse_arguments(TrainArguments, [str(path), "--output_dir", "x"])
    assert message in str(error.value) + capsys.readouterr().err


def test_output_dir_is_required(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(TrainArguments, [])
    assert "--output_dir" in capsys.readouterr().err


def test_help_explains_every_argument(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(TrainArguments, ["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainArguments):
        assert f"--{field.name}" in text


def test_fields_of_a_model_come_from_the_command_line_as_their_types():
    def given(config_class, words):
        (parsed,) = parse_arguments(config_arguments(config_class), words.split())
        return config_overrides(parsed)

    words = "--num_masked_slots 0,2 --hidden_dropout 0 --layer_norm_eps 1e-6 --norm_first true --anchor last_visible "
    words += "--residual_prediction none --mask_strategy tube"
    overrides = given(CJepaConfig, words)
    assert overrides == {
        "num_masked_slots": [0, 2], "hidden_dropout": 0, "layer_norm_eps": 1e-6, "norm_first": True,
        "anchor": "last_visible", "residual_prediction": None, "mask_strategy": "tube",
    }  # fmt: skip
    assert CJepaConfig(**overrides).masked_slots_range == (0, 2)
    words = "--num_slots 5 --encoder_channels 4,8 --predictor_rnn true --kernel_prior_variance none"
    assert given(SaviConfig, words) == {
        "num_slots": 5, "encoder_channels": [4, 8], "predictor_rnn": True, "kernel_prior_variance": None
    }  # fmt: skip
    words = '--backbone_config {"hidden_size":12,"patch_size":4}'
    assert given(VideoSaurConfig, words) == {"backbone_config": {"hidden_size": 12, "patch_size": 4}}
    with pytest.raises(ValueError, match=r"num_slots='many'.* int"):
        given(SaviConfig, "--num_slots many")
    fields = set(config_fields(CJepaConfig))
    assert fields <= set(CJepaConfig().to_dict()) and "slot_encoder_config" not in fields
    assert not fields & {field.name for field in dataclasses.fields(CJepaTrainArguments)}
