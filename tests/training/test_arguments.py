"""Arguments: file and command line, unknown names, wrong values."""

import dataclasses
import json

import pytest

from cjepa_hf.training import TrainArguments, parse_arguments


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
