"""World-model training: from a slot dataset to a folder that loads, and what a step computes."""

import json
import random
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from huggingface_hub.utils import filter_repo_objects
from torch.distributed.tensor import DTensor
from transformers import AutoImageProcessor

from cjepa_hf.data.extract import open_encoder
from cjepa_hf.data.slots import SlotWindows, load_slot_dataset, window_statistics, write_slot_dataset
from cjepa_hf.models.cjepa import CJepaConfig, CJepaModel
from cjepa_hf.models.color_isa import ColorIsaConfig, ColorIsaImageProcessor, ColorIsaModel
from cjepa_hf.training import cjepa, trainer
from cjepa_hf.training.arguments import parse_arguments
from cjepa_hf.training.cjepa import (
    CJepaTrainArguments,
    main,
    world_model_loss,
    world_model_metrics,
)
from cjepa_hf.training.trainer import compute_gradients, read_log

N, D = 3, 16
TINY = dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, hidden_dropout=0, attention_dropout=0)


def episode(index: int, frames: int = 16) -> dict:
    """Slot 0 follows the actions, slot 1 follows slot 0, slot 2 stands still."""
    rng = np.random.default_rng(index)
    actions = rng.uniform(-1, 1, (frames, 2)).astype(np.float32)
    position = np.concatenate([rng.uniform(-1, 1, (1, 2)), actions[:-1]]).cumsum(0)
    slots = np.zeros((frames, N, D), np.float32)
    slots[:, 0, :2] = position
    slots[1:, 1, :2] = position[:-1]
    slots[:, 2, 2] = 1
    slots[:, :, -1] = np.arange(N)
    actions[-1] = np.nan
    return {"episode_id": f"e{index}", "slots": slots, "actions": actions, "proprio": position.astype(np.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("slots")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        splits = {"train": map(episode, range(100)), "validation": map(episode, range(1000, 1004))}
        write_slot_dataset(root / "data", splits, frame_skip=2, encoder={"name": "hand-made"})
        yield root / "data"


def command(folder, output, *more: str) -> list[str]:
    words = f"--dataset {folder} --output_dir {output} --max_steps 20 --batch_size 16 --learning_rate 3e-3 "
    words += "--warmup_steps 5 --eval_every 0 --save_every 10 --eval_rollout_steps 3 --use_cpu "
    words += " ".join(f"--{name} {value}" for name, value in TINY.items())
    return [*words.split(), "--residual_prediction", "last", *more]


def arguments(*more: str) -> CJepaTrainArguments:
    return parse_arguments(CJepaTrainArguments, ["--output_dir", "x", "--dataset", "x", *more])[0]


def tiny_model(**changes) -> CJepaModel:
    torch.manual_seed(0)
    config = CJepaConfig(num_slots=N, slot_size=D, action_size=4, proprio_size=2, frame_skip=2, **{**TINY, **changes})
    return CJepaModel(config)


STATISTICS = dict(
    action_mean=torch.zeros(4), action_std=torch.ones(4), proprio_mean=torch.zeros(2), proprio_std=torch.ones(2)
)


def batch_of(count: int, frames: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"slots": (N, D), "actions": (4,), "proprio": (2,)}
    return {name: torch.randn(count, frames, *shape, generator=generator) for name, shape in shapes.items()}


def test_training_beats_copying_and_the_folder_loads(folder, tmp_path):
    options = "--max_steps 150 --batch_size 64 --learning_rate 2e-2 --num_masked_slots 0,1"
    metrics = main(command(folder, tmp_path, *options.split(), "--history_crop_probability", "0.7")).metrics
    assert metrics["mse_1"] < 0.7 * metrics["copy_mse_1"]
    assert metrics["mse_3"] < 0.5 * metrics["copy_mse_3"]
    model = CJepaModel.from_pretrained(tmp_path)
    expected = window_statistics(load_slot_dataset(folder), 3, 1, 2)
    for name, value in expected.items():
        assert getattr(model, name).tolist() == pytest.approx(value)
    assert (model.config.num_slots, model.config.slot_size, model.config.frame_skip) == (N, D, 2)
    assert (model.config.action_size, model.config.proprio_size) == (4, 2)

    windows = SlotWindows(load_slot_dataset(folder, "validation"), 3, 3, 2)
    batch = windows.get_batch(range(len(windows)))
    again = world_model_metrics(model.eval(), 3, expected_tensors(expected))(model, batch)
    assert {name: value.item() for name, value in again.items()} == pytest.approx(metrics, rel=1e-4)

    results = json.loads((tmp_path / "training_results.json").read_text())
    assert results["validation"] == metrics and results["step"] == 150
    modes = {(tmp_path / name).stat().st_mode for name in ("model.safetensors", "README.md", "config.json")}
    assert len(modes) == 1  # whoever may read one may read all
    card = (tmp_path / "README.md").read_text()
    assert f"| mse_1 | {metrics['mse_1']:.4g} |" in card and "150 steps" in card
    assert "hand-made" in card


def expected_tensors(statistics):
    return {name: torch.tensor(value) for name, value in statistics.items()}


def test_the_saved_arguments_start_the_same_run_again(folder, tmp_path):
    main(command(folder, tmp_path / "a", "--num_masked_slots", "0,2"))
    saved = json.loads((tmp_path / "a" / "training_args.json").read_text())
    assert saved["num_masked_slots"] == [0, 2]
    main([str(tmp_path / "a" / "training_args.json"), "--output_dir", str(tmp_path / "b")])
    one, two = (
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(tmp_path / x / "log.jsonl")]
        for x in "ab"
    )
    assert one == two
    a, b = (CJepaModel.from_pretrained(tmp_path / x).state_dict() for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_interrupted_training_continues_to_the_same_weights(folder, tmp_path, monkeypatch):
    options = (
        "--history_crop_probability",
        "0.5",
        "--slot_noise",
        "0.01",
        "--optimizer",
        "muon",
        "--ema_decay",
        "0.9",
    )
    main(command(folder, tmp_path / "whole", *options))
    real, calls = trainer.compute_gradients, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > 13:
            raise RuntimeError("power cut")
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_gradients", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        main(command(folder, tmp_path / "parts", *options))
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    monkeypatch.setattr(trainer, "compute_gradients", real)
    result = main(command(folder, tmp_path / "parts", *options))
    assert result.resumed_from.name == "step-000010"
    whole, parts = (CJepaModel.from_pretrained(tmp_path / x).state_dict() for x in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_finished_run_is_not_relabelled_as_another(folder, tmp_path):
    """With equal weights and another configuration the folder would say what was never trained."""
    main(command(folder, tmp_path, "--max_steps", "2"))
    for change in (["--num_masked_slots", "0"], ["--slot_noise", "0.5"], ["--history_crop_probability", "0.5"]):
        with pytest.raises(ValueError, match=rf"{change[0].strip('-')}=.* would not continue it"):
            main(command(folder, tmp_path, "--max_steps", "2", *change))
    assert CJepaModel.from_pretrained(tmp_path).config.num_masked_slots == 1
    assert main(command(folder, tmp_path, "--max_steps", "3", "--learning_rate", "1e-4")).step == 3


def test_training_reads_windows_as_long_as_its_rollouts(folder, tmp_path):
    words = command(
        folder, tmp_path, "--rollout_weight", "1", "--rollout_steps", "3", "--max_steps", "2", "--log_every", "1"
    )
    main([*words, "--validation_split", "none"])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows and all(row["rollout_loss"] > 0 for row in rows)


def test_a_streamed_dataset_trains_to_the_same_statistics(folder, tmp_path):
    main(command(folder, tmp_path, "--streaming", "--shuffle_buffer", "50"))
    model = CJepaModel.from_pretrained(tmp_path)
    expected = window_statistics(load_slot_dataset(folder), 3, 1, 2)
    assert model.action_std.tolist() == pytest.approx(expected["action_std"], rel=1e-5)


def test_training_can_start_from_a_trained_model(folder, tmp_path):
    first = main(command(folder, tmp_path / "a"))
    more = main(command(folder, tmp_path / "b", "--init_model", str(tmp_path / "a"), "--learning_rate", "1e-9"))
    assert more.metrics == pytest.approx(first.metrics, rel=1e-3)
    a, b = (CJepaModel.from_pretrained(tmp_path / x) for x in "ab")
    assert torch.equal(a.action_mean, b.action_mean)


def test_the_slot_encoder_goes_frozen_into_the_model(folder, tmp_path):
    encoder = ColorIsaModel(ColorIsaConfig(num_slots=N, slot_size=D, hidden_size=16, mlp_size=16))
    encoder.save_pretrained(tmp_path / "encoder")
    ColorIsaImageProcessor(size=64).save_pretrained(tmp_path / "encoder")
    main(command(folder, tmp_path / "model", "--slot_encoder", str(tmp_path / "encoder")))
    model = CJepaModel.from_pretrained(tmp_path / "model")
    for name, value in encoder.state_dict().items():
        assert torch.equal(model.slot_encoder.state_dict()[name], value)
    pixels = torch.rand(1, 2, 3, 64, 64)
    torch.testing.assert_close(model.encode(pixels), encoder.eval()(pixels).slots)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert processor.size == 64
    wrong = ColorIsaModel(ColorIsaConfig(num_slots=N + 1, slot_size=D, hidden_size=16))
    wrong.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match="num_slots=4"):
        main(command(folder, tmp_path / "other", "--slot_encoder", str(tmp_path / "wrong")))


def test_an_encoder_with_other_weights_than_the_one_that_made_the_slots_is_refused(folder, tmp_path):
    for name in ("maker", "other"):
        ColorIsaModel(ColorIsaConfig(num_slots=N, slot_size=D, hidden_size=16)).save_pretrained(tmp_path / name)
        ColorIsaImageProcessor().save_pretrained(tmp_path / name)
    _, _, description = open_encoder(tmp_path / "maker", None, None, None)
    splits = {"train": map(episode, range(4)), "validation": map(episode, range(4, 6))}
    write_slot_dataset(tmp_path / "slots", splits, frame_skip=2, encoder=description)
    words = ("--max_steps", "1", "--slot_encoder")
    main(command(tmp_path / "slots", tmp_path / "a", *words, str(tmp_path / "maker")))
    with pytest.raises(ValueError, match="other weights"):
        main(command(tmp_path / "slots", tmp_path / "b", *words, str(tmp_path / "other")))
    # nor is one that hides in the model that training starts from
    splits = {"train": map(episode, range(4)), "validation": map(episode, range(4, 6))}
    description = open_encoder(tmp_path / "other", None, None, None)[2]
    write_slot_dataset(tmp_path / "others_slots", splits, frame_skip=2, encoder=description)
    start = ("--max_steps", "1", "--init_model", str(tmp_path / "a"))
    main(command(tmp_path / "slots", tmp_path / "c", *start))
    with pytest.raises(ValueError, match="other weights"):
        main(command(tmp_path / "others_slots", tmp_path / "d", *start))


def test_the_example_trains(folder, tmp_path, monkeypatch):
    example = Path(__file__).parents[2] / "examples" / "train.py"
    monkeypatch.setattr(sys, "argv", [str(example), *command(folder, tmp_path, "--max_steps", "2")])
    runpy.run_path(str(example), run_name="__main__")
    assert CJepaModel.from_pretrained(tmp_path).config.num_slots == N


class Recorder(torch.nn.Module):
    """A model that notes what it is given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []
        self.train(model.training)

    def forward(self, slots, **kwargs):
        self.seen.append((slots, kwargs))
        return self.model(slots, **kwargs)


def test_cropped_histories_keep_the_frames_next_to_the_future():
    model, batch = tiny_model().train(), batch_of(5)
    recorder = Recorder(model)
    seen = recorder.seen
    loss_fn = world_model_loss(model, arguments("--history_crop_probability", "0.7"), STATISTICS)
    random.seed(0)
    for _ in range(200):
        loss_fn(recorder, batch)
    lengths = [slots.shape[1] for slots, _ in seen]
    shares = [lengths.count(n) / len(lengths) for n in (1, 2, 3)]
    assert shares == pytest.approx([0.35, 0.35, 0.3], abs=0.08)
    for slots, inputs in seen:
        first = 3 - slots.shape[1]
        assert torch.equal(slots, batch["slots"][:, first:3])
        assert torch.equal(inputs["actions"], batch["actions"][:, first:3])
        assert torch.equal(inputs["proprio"], batch["proprio"][:, first:3])
        assert torch.equal(inputs["future_slots"], batch["slots"][:, 3:])
        assert (inputs["slot_mask"] is None) == (slots.shape[1] == 1)
    recorder.eval()
    seen.clear()
    loss_fn(recorder, batch)
    assert seen[0][0].shape[1] == 3 and seen[0][1]["slot_mask"] is None


def test_slot_noise_moves_observed_slots_only_and_does_not_unfreeze_static_ones():
    model = tiny_model(mask_static_slots=False, num_masked_slots=N).train()
    batch = batch_of(64)
    batch["slots"][:, :, 2] = 1.0
    recorder = Recorder(model)
    world_model_loss(model, arguments("--slot_noise", "0.1"), STATISTICS)(recorder, batch)
    ((slots, inputs),) = recorder.seen
    assert (slots - batch["slots"][:, :3]).std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(inputs["future_slots"], batch["slots"][:, 3:]) and inputs["trained_only"]
    assert inputs["slot_mask"][:, 1:, :2].all() and not inputs["slot_mask"][:, :, 2].any()


def recorded(model, batch, *words, empty=None):
    """What the predictor is given for a batch, with the arguments `words`."""
    recorder = Recorder(model)
    world_model_loss(model, arguments(*words), STATISTICS, empty)(recorder, batch)
    return recorder.seen[0]


def test_who_was_absent_stays_absent_in_the_target_and_is_not_hidden():
    empty, batch = torch.full((D,), 0.5), batch_of(32)
    batch["slots"][:, :3, 0] = empty  # enters in the future
    batch["slots"][:, 3:, 1] = empty  # leaves in the future
    batch["slots"][:, :, 2] = 1.0  # there, and still
    model = tiny_model(mask_static_slots=False, num_masked_slots=N).train()
    _, inputs = recorded(model, batch, "--hold_absent", "true", "--mask_present", "true", empty=empty)
    assert (inputs["future_slots"][:, :, 0] == empty).all()
    assert torch.equal(inputs["future_slots"][:, :, 1:], batch["slots"][:, 3:, 1:])
    assert not inputs["slot_mask"][:, :, 0].any() and inputs["slot_mask"][:, 1:, 1:].all()
    _, inputs = recorded(model, batch)
    assert torch.equal(inputs["future_slots"], batch["slots"][:, 3:]) and not inputs["slot_mask"][:, :, 2].any()
    with pytest.raises(ValueError, match="empty_slot"):
        world_model_loss(model, arguments("--hold_absent", "true"), STATISTICS)
    with pytest.raises(ValueError, match="mask_static_slots"):
        world_model_loss(tiny_model(), arguments("--mask_present", "true"), STATISTICS, empty)


def test_cut_histories_keep_the_shortest_length():
    model, batch = tiny_model().train(), batch_of(2)
    random.seed(0)
    words = ("--history_crop_probability", "1", "--shortest_history", "2")
    assert {recorded(model, batch, *words)[0].shape[1] for _ in range(20)} == {2}


# Nothing random but the order of the data: each process draws masks and noise of its own.
SURE = ("--num_masked_slots", "0", "--rollout_weight", "0.5", "--optimizer", "muon", "--num_hidden_layers", "2")


def _train_sharded(folder: str, output: str) -> None:
    torch.set_num_threads(1)
    sharded, shard = [], trainer.shard

    def noting(*given):
        sharded.append(shard(*given))
        return sharded[0]

    trainer.shard = noting  # in this process, which ends here
    main([*command(folder, output, *SURE), "--shard_model", "true"])
    if not all(isinstance(parameter, DTensor) for parameter in sharded[0].parameters()):
        raise RuntimeError("nothing was sharded")


def test_two_processes_that_share_the_parameters_train_the_world_model_of_one(folder, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # the ranks are forked: let them start afresh
    debug_launcher(_train_sharded, args=(str(folder), str(tmp_path / "two")), num_processes=2)
    result = main(command(folder, tmp_path / "one", *SURE))
    first, second = (json.loads((tmp_path / n / "training_results.json").read_text()) for n in ("one", "two"))
    assert second["validation"] == pytest.approx(first["validation"], rel=1e-3)
    assert first["validation"] == result.metrics
    models = [CJepaModel.from_pretrained(tmp_path / name) for name in ("one", "two")]
    torch.testing.assert_close(*(dict(model.state_dict()) for model in models), atol=1e-4, rtol=1e-2)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[0] == configs[1]


def test_windows_with_a_contact_ahead_are_repeated_to_their_share(folder, tmp_path, monkeypatch):
    def with_contacts(index):
        contacts = np.zeros((16, 2), bool)
        contacts[9, 1] = True  # between frames 9 and 10
        return {**episode(index), "contacts": contacts}

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_slot_dataset(tmp_path / "data", {"train": map(with_contacts, range(3))}, frame_skip=2)
    windows = SlotWindows(load_slot_dataset(tmp_path / "data"), 3, 1, 2)  # 9 of each episode, frames s, s+2, s+4 | s+6
    order = cjepa.contact_order(windows, 3, 0.5)
    starts = windows.locate(order)[1]
    ahead = (starts + 4 <= 9) & (starts + 6 > 9)  # s is 4 or 5
    assert set(starts[ahead]) == {4, 5} and ahead.mean() == pytest.approx(0.5)
    assert sorted(order[:27]) == list(range(27))  # nothing is left out
    assert np.array_equal(cjepa.contact_order(windows, 3, 0.1), np.arange(27))  # more than that share already
    plain = SlotWindows(load_slot_dataset(folder), 3, 1, 2)
    with pytest.raises(ValueError, match="contact_share needs the column contacts"):
        cjepa.contact_order(plain, 3, 0.5)
    main([*command(tmp_path / "data", tmp_path / "out", "--validation_split", "none"), "--contact_share", "0.5"])
    state = json.loads((tmp_path / "out" / "checkpoints" / "step-000020" / "state.json").read_text())
    assert state["data_length"] == len(order)


def test_windows_in_which_an_object_turns_are_repeated_to_their_share(tmp_path, monkeypatch):
    def straight_but_once(index):
        slots = np.zeros((40, 4, 16), np.float32)
        slots[:, 0, 0] = np.arange(40) * 0.1
        slots[:, 1, 1] = np.minimum(np.arange(40), 20) * 0.1  # stops at frame 20
        slots[:, 2, 2:4] = [[0.5, 0.0]] * 15 + [[9.0, 1.0]] * 25  # an empty slot until an object appears
        return {"episode_id": str(index), "slots": slots}

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_slot_dataset(tmp_path / "data", {"train": map(straight_but_once, range(2))}, frame_skip=2)
    windows = SlotWindows(load_slot_dataset(tmp_path / "data"), 3, 1, 2)  # frames s, s+2, s+4 | s+6
    empty = torch.zeros(16)
    empty[2] = 0.5
    order = cjepa.turn_order(windows, 3, 0.5, empty_slot=empty)
    starts = windows.locate(order)[1]
    turning = (starts + 4 <= 20) & (starts + 6 > 20) | (starts + 2 < 20) & (starts + 4 > 20)
    repeated = np.bincount(order, minlength=len(windows)) > 1
    assert set(windows.locate(np.flatnonzero(repeated))[1]) <= set(starts[turning])
    assert sorted(order[: len(windows)]) == list(range(len(windows)))  # nothing is left out
    assert np.isin(order, np.flatnonzero(repeated)).mean() == pytest.approx(0.5, abs=0.01)
    blind = cjepa.turn_order(windows, 3, 0.5, empty_slot=empty, positions=lambda slots: slots[..., :1] * 0)
    assert np.array_equal(blind, np.arange(len(windows)))  # nothing moves
    for words in (["--turn_share", "1.0"], ["--turn_share", "0.5", "--contact_share", "0.5"]):
        with pytest.raises(ValueError, match="turn_share"):
            arguments(*words)


def test_the_rollout_loss_compares_all_that_is_imagined_from_the_first_frame():
    model, batch = tiny_model(num_masked_slots=0).train(), batch_of(4)
    loss, terms = world_model_loss(model, arguments("--rollout_weight", "0.5"), STATISTICS)(model, batch)
    plain, plain_terms = world_model_loss(model, arguments(), STATISTICS)(model, batch)
    imagined = model.rollout(
        batch["slots"][:, :1], actions=batch["actions"][:, :3], proprio=batch["proprio"][:, :1], num_steps=3
    ).slots
    expected = (imagined - batch["slots"][:, 1:]).square().mean()
    torch.testing.assert_close(terms["rollout_loss"], expected.detach())
    torch.testing.assert_close(loss, plain + 0.5 * expected)
    assert "rollout_loss" not in plain_terms
    model.eval()
    assert (
        "rollout_loss"
        not in world_model_loss(model, arguments("--rollout_weight", "0.5"), STATISTICS)(model, batch)[1]
    )
    with pytest.raises(ValueError, match="rollout_weight must be at least 0"):
        arguments("--rollout_weight", "-1")


def test_the_rollout_loss_can_go_on_after_the_history_for_longer_than_the_model_predicts_at_once():
    torch.manual_seed(0)
    model = tiny_model(num_masked_slots=0, loss_type="huber").train()
    batch = batch_of(4)
    longer = {name: torch.cat([value, value.flip(1)], dim=1) for name, value in batch.items()}  # 8 frames
    args = arguments("--rollout_weight", "0.5", "--rollout_steps", "4")
    loss, terms = world_model_loss(model, args, STATISTICS)(model, longer)
    plain, _ = world_model_loss(model, arguments(), STATISTICS)(model, batch)
    imagined = model.rollout(
        longer["slots"][:, :3], actions=longer["actions"][:, :6], proprio=longer["proprio"][:, :3], num_steps=4
    ).slots
    expected = model.token_loss(imagined, longer["slots"][:, 3:7]).mean()
    torch.testing.assert_close(terms["rollout_loss"], expected.detach())
    torch.testing.assert_close(loss, plain + 0.5 * expected)
    with pytest.raises(ValueError, match="windows of 4 frames: rollout_steps=4 after a history of 3 needs 7"):
        world_model_loss(model, args, STATISTICS)(model, batch)
    with pytest.raises(ValueError, match="rollout_steps must be at least 0"):
        arguments("--rollout_steps", "-1")


def test_unknown_actions_and_proprioception_become_the_mean():
    model, batch = tiny_model().eval(), batch_of(2)
    filled = {name: value.clone() for name, value in batch.items()}
    batch["actions"][0, 1], batch["proprio"][1, 0] = float("nan"), float("nan")
    filled["actions"][0, 1], filled["proprio"][1, 0] = 3.0, 2.0
    statistics = STATISTICS | dict(action_mean=torch.full((4,), 3.0), proprio_mean=torch.full((2,), 2.0))
    loss_fn = world_model_loss(model, arguments(), statistics)
    assert torch.equal(loss_fn(model, batch)[0], loss_fn(model, filled)[0])


def test_open_loop_metrics_feed_predictions_back():
    model, batch = tiny_model().eval(), batch_of(6, frames=5)
    metrics = world_model_metrics(model, 2, STATISTICS)(model, batch)
    with torch.no_grad():
        first = model.predict(batch["slots"][:, :3], actions=batch["actions"][:, :3], proprio=batch["proprio"][:, :3])
    expected = (first - batch["slots"][:, 3:4]).square().mean()
    torch.testing.assert_close(metrics["mse_1_history"], expected)
    copied = (batch["slots"][:, 2:3] - batch["slots"][:, 3:]).square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(torch.stack([metrics["copy_mse_1"], metrics["copy_mse_2"]]), copied)
    assert metrics["mse_2"] != metrics["mse_2_history"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_slots", "5"], r"num_slots=5, but .* has 3"),
        (["--action_size", "3"], r"action_size=3, but .* has 4"),
        (["--num_hidden_layer", "2"], "did you mean 'num_hidden_layers'"),
        (["--num_attention_heads", "3"], "not a multiple of num_attention_heads"),
        (["--validation_split", "test"], "no split 'test'"),
        (["--history_length", "50"], "no window of"),
        (["--history_crop_probability", "2"], "history_crop_probability"),
    ],
)
def test_arguments_that_contradict_the_data_are_named(folder, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        main(command(folder, tmp_path, *words))


def test_a_model_without_actions_can_be_trained_on_data_with_them(folder, tmp_path):
    main(command(folder, tmp_path, "--action_size", "0", "--proprio_size", "0", "--max_steps", "2"))
    assert CJepaModel.from_pretrained(tmp_path).config.action_size == 0


def test_the_trained_folder_is_uploaded_without_checkpoints(folder, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, *args, **kwargs):
            calls.append(("create_repo", args, kwargs))

        def upload_folder(self, **kwargs):
            calls.append(("upload_folder", (), kwargs))
            assert (tmp_path / "model.safetensors").exists() and (tmp_path / "README.md").exists()
            return "address"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    main(command(folder, tmp_path, "--push_to_hub", "--hub_model_id", "me/model", "--max_steps", "2"))
    assert [name for name, *_ in calls] == ["create_repo", "upload_folder"]
    assert calls[0][1] == ("me/model",)
    upload = calls[1][2]
    assert upload["repo_id"] == "me/model"
    names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert any(name.startswith("checkpoints/") for name in names)
    patterns = {name: upload[name] for name in ("allow_patterns", "ignore_patterns")}
    sent = set(filter_repo_objects(names, **patterns))
    assert {"config.json", "model.safetensors", "README.md", "training_args.json"} <= sent
    assert not any("/" in name or name.endswith((".pt", ".bin", ".pkl")) for name in sent)


def _masked_batch() -> dict[str, torch.Tensor]:
    batch = batch_of(8)
    # between none and all of the slots hidden: shares of a batch differ in what they hide
    batch["slot_mask"] = torch.arange(8)[:, None] % 4 > torch.arange(N)
    return batch


def _two_ranks(path: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes != 2:
        raise RuntimeError(f"{accelerator.num_processes} processes")
    model = tiny_model(residual_prediction="last", anchor="last_visible", norm_first=True).train()
    loss_fn = world_model_loss(model, arguments("--rollout_weight", "0.5"), STATISTICS)
    half = slice(4 * accelerator.process_index, 4 * accelerator.process_index + 4)
    batch = {name: value[half] for name, value in _masked_batch().items()}
    compute_gradients(accelerator, accelerator.prepare(model), loss_fn, [batch], 0, 0)
    if accelerator.is_main_process:
        torch.save({name: p.grad for name, p in model.named_parameters()}, path)


def test_two_processes_give_the_gradient_of_one(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # the ranks are forked: let them start afresh
    debug_launcher(_two_ranks, args=(str(tmp_path / "gradients.pt"),), num_processes=2)
    two = torch.load(tmp_path / "gradients.pt", weights_only=True)
    model = tiny_model(residual_prediction="last", anchor="last_visible", norm_first=True).train()
    loss_fn = world_model_loss(model, arguments("--rollout_weight", "0.5"), STATISTICS)
    compute_gradients(Accelerator(cpu=True), model, loss_fn, [_masked_batch()], 0, 0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, two[name], atol=1e-6, rtol=0)
    assert model.predictor.head.weight.grad.abs().max() > 1e-3
    assert cjepa._may_leave_parameters_unused(
        arguments("--history_crop_probability", "0.7"), {"residual_prediction": "velocity"}
    )
    assert cjepa._may_leave_parameters_unused(arguments("--history_crop_probability", "0.7", "--init_model", "a"), {})
