"""The training loop: order of the data, exact resumption, damaged checkpoints, processes, optimizers."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from cjepa_hf import ColorIsaConfig, ColorIsaModel
from cjepa_hf.training import trainer
from cjepa_hf.training.arguments import TrainArguments
from cjepa_hf.training.trainer import (
    BatchedMuon,
    Ema,
    bare,
    compute_gradients,
    find_checkpoint,
    learning_rate_factor,
    make_accelerator,
    make_optimizers,
    micro_batch_slice,
    read_log,
    save_model_folder,
    shards_model,
    step_indices,
    train,
)


class Net(nn.Module):
    """Small, with a stack of layers (for Muon) and dropout (so that generator states matter)."""

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        torch.manual_seed(0)
        self.inputs = nn.Linear(4, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        x = self.inputs(x)
        for layer in self.layers:
            x = x + self.dropout(torch.relu(layer(x)))
        return self.head(x)


class Points(torch.utils.data.Dataset):
    def __init__(self, count: int = 50):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 4, generator=generator)
        self.y = self.x.prod(-1, keepdim=True)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index]}

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def loss_fn(model, batch):
    error = model(batch["x"]) - batch["y"]
    return error.square().mean(), {"absolute": error.detach().abs().mean()}


def arguments(folder, **changes) -> TrainArguments:
    defaults = dict(
        output_dir=str(folder), max_steps=12, batch_size=16, learning_rate=1e-2, warmup_steps=3, log_every=2,
        eval_every=4, save_every=4, use_cpu=True, ema_decay=0.9,
    )  # fmt: skip
    return TrainArguments(**{**defaults, **changes})


def run(folder, **changes):
    model = Net()
    result = train(model, Points(), Points(20), loss_fn, arguments(folder, **changes))
    return model, result


def curve(folder) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(Path(folder) / "log.jsonl")]


def assert_same_run(first, second, folder, other):
    assert curve(folder) == curve(other)
    for a, b in zip(first.state_dict().values(), second.state_dict().values()):
        assert torch.equal(a, b)


def test_every_epoch_visits_every_sample_once_and_batches_may_cross_epochs():
    seen = [i for step in range(14) for i in step_indices(3, step, batch_size=5, length=7)]
    assert len(seen) == 70
    for epoch in range(10):
        assert sorted(seen[epoch * 7 : epoch * 7 + 7]) == list(range(7))
    assert seen[:7] != seen[7:14]
    assert step_indices(3, 9, 5, 7) == seen[45:50]
    assert step_indices(4, 9, 5, 7) != seen[45:50]
    assert len(step_indices(0, 2, batch_size=40, length=7)) == 40


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_processes_and_micro_batches_share_a_batch_without_overlap(tmp_path, ranks, accumulation):
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    batch = list(range(16))
    parts = [batch[micro_batch_slice(args, m, r, ranks)] for m in range(accumulation) for r in range(ranks)]
    assert sorted(i for part in parts for i in part) == batch
    assert len({len(part) for part in parts}) == 1


def test_training_lowers_the_loss_and_logs_it(tmp_path):
    _, result = run(tmp_path, max_steps=200, eval_every=50, save_every=0)
    lines = read_log(tmp_path / "log.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert result.step == 200
    assert result.metrics["loss"] == [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    assert [line["step"] for line in lines if "eval_loss" in line] == [50, 100, 150, 200]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_resumed_from_a_checkpoint_is_bit_identical(tmp_path, optimizer):
    whole, _ = run(tmp_path / "whole", optimizer=optimizer, save_every=5)  # 5: between two lines of the log
    first = tmp_path / "parts"
    with pytest.raises(RuntimeError, match="power cut"):
        _run_until(first, 7, optimizer=optimizer, save_every=5)
    assert [p.name for p in (first / "checkpoints").glob("step-*")] == ["step-000005"]
    resumed, result = run(first, optimizer=optimizer, save_every=5)
    assert result.resumed_from.name == "step-000005"
    assert_same_run(whole, resumed, tmp_path / "whole", first)


def _run_until(folder, stop: int, **changes):
    calls = 0

    def failing(model, batch):
        nonlocal calls
        calls += model.training
        if calls > stop:
            raise RuntimeError("power cut")
        return loss_fn(model, batch)

    return train(Net(), Points(), Points(20), failing, arguments(folder, **changes))


def test_worker_processes_do_not_change_the_run(tmp_path):
    class Noisy(Points):
        def __getitem__(self, index):
            return {"x": self.x[index] + torch.randn(4), "y": self.y[index]}

    for name, workers in (("none", 0), ("two", 2)):
        train(Net(), Noisy(), None, loss_fn, arguments(tmp_path / name, num_workers=workers, save_every=0))
    assert curve(tmp_path / "none") == curve(tmp_path / "two")


def test_an_iterable_dataset_gives_the_same_run_when_resumed(tmp_path):
    class Stream:
        def __iter__(self):
            points = Points()
            yield from (points[i] for i in range(len(points)))

    whole, parts = Net(), Net()
    train(whole, Stream(), None, loss_fn, arguments(tmp_path / "whole", lr_scheduler="constant"))
    for steps in (8, 12):
        result = train(
            parts,
            Stream(),
            None,
            loss_fn,
            arguments(tmp_path / "parts", max_steps=steps, lr_scheduler="constant", eval_every=2),
        )
    assert result.resumed_from.name == "step-000008"
    assert_same_run(whole, parts, tmp_path / "whole", tmp_path / "parts")


def _slow_run(folder) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads

    def slow(model, batch):
        time.sleep(0.02)
        return loss_fn(model, batch)

    try:
        train(Net(), Points(), None, slow, arguments(folder, max_steps=2000, save_every=10, eval_every=0))
    except KeyboardInterrupt as interrupt:
        (Path(folder) / "interrupt").write_text(str(interrupt))


def _start_slow_run(folder):
    Path(folder).mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_slow_run, args=(folder,))
    process.start()
    return process


def _wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_killed_with_sigkill_continues_bit_for_bit(tmp_path):
    process = _start_slow_run(tmp_path / "killed")
    log = tmp_path / "killed" / "log.jsonl"
    _wait_for(lambda: len(read_log(log)) >= 13, process)
    process.kill()
    process.join()
    before = curve(tmp_path / "killed")
    common = dict(max_steps=2000, save_every=10, eval_every=0)
    last = find_checkpoint(tmp_path / "killed" / "checkpoints")
    assert last is not None and int(last.name[5:]) >= 20
    # both runs stop early, at a step past what the killed one logged
    stop = before[-1]["step"] + 10
    for folder, steps in (("killed", stop - int(last.name[5:])), ("whole", stop)):
        with pytest.raises(RuntimeError, match="power cut"):
            _run_until(tmp_path / folder, steps, **common)
    whole = curve(tmp_path / "whole")
    assert whole[: len(before)] == before
    assert curve(tmp_path / "killed") == whole
    assert len(whole) > len(before)


def test_sigterm_writes_a_checkpoint_of_the_step_it_stopped_at(tmp_path):
    process = _start_slow_run(tmp_path)
    _wait_for(lambda: len(read_log(tmp_path / "log.jsonl")) >= 2, process)
    process.terminate()
    process.join()
    message = (tmp_path / "interrupt").read_text()
    last = find_checkpoint(tmp_path / "checkpoints")
    assert last is not None and last.name in message
    assert message.startswith(f"SIGTERM at step {int(last.name[5:])};")


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, damage):
    run(tmp_path)
    newest = tmp_path / "checkpoints" / "step-000012"
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "truncate":
        weights.write_bytes(data[:-10])
    elif damage == "flip":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "missing":
        weights.unlink()
    else:
        (newest / "manifest.json").unlink()
    assert find_checkpoint(tmp_path / "checkpoints").name == "step-000008"
    assert "step-000012 is passed over" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot resume from"):
        find_checkpoint(tmp_path / "checkpoints", str(newest))
    _, result = run(tmp_path, save_total_limit=1)
    assert result.resumed_from.name == "step-000008"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000012"]
    assert find_checkpoint(tmp_path / "checkpoints") == newest


def test_a_full_disk_leaves_the_last_complete_checkpoint(tmp_path, monkeypatch):
    real, calls = trainer.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(OSError, match=r"step-000008: No space left on device; the last complete .*step-000004"):
        run(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]


def test_a_loss_that_is_not_finite_stops_before_it_is_kept(tmp_path):
    def diverging(model, batch):
        loss, scalars = loss_fn(model, batch)
        return loss * float("nan"), scalars

    with pytest.raises(FloatingPointError, match="loss is nan"):
        train(Net(), Points(), None, diverging, arguments(tmp_path, log_every=100))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_starting_over_does_not_overwrite_an_earlier_run(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        run(tmp_path, resume_from_checkpoint="none")
    with pytest.raises(ValueError, match="is newer than"):
        run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000008"))


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 8}, {"optimizer": "muon"}, {"ema_decay": 0.0}])
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, change):
    run(tmp_path)
    with pytest.raises(ValueError, match=next(iter(change))):
        run(tmp_path, **change)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, one = run(tmp_path)
    second, two = run(tmp_path)
    assert one.metrics == two.metrics
    assert_same_run(first, second, tmp_path, tmp_path)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path, save_every=2, save_total_limit=3)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000008", "step-000010", "step-000012"]


def test_the_saved_weights_are_the_moving_average(tmp_path):
    model, _ = run(tmp_path)
    folder = tmp_path / "checkpoints" / "step-000012"
    average, own = load_file(folder / "ema.safetensors"), load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, average[name])
        assert not torch.equal(parameter, own[name])


def test_a_folder_written_again_keeps_a_probe_and_no_older_weights(tmp_path):
    model = ColorIsaModel(ColorIsaConfig(num_slots=4, slot_size=16, hidden_size=16, mlp_size=16, stem_channels=8))
    for name in ("model-00001-of-00002.safetensors", "slot_probe.safetensors"):
        (tmp_path / name).write_bytes(b"before")
    save_model_folder(model, tmp_path, {"README.md": "new"})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "slot_probe.safetensors"}


def test_ema_follows_its_definition():
    parameter = nn.Parameter(torch.tensor([1.0]))
    ema = Ema({"p": parameter}, 0.5)
    expected = 1.0
    for step, value in enumerate([3.0, -2.0, 5.0, 7.0, 1.0, 0.0, 2.0, 4.0, 9.0, 8.0]):
        parameter.data.fill_(value)
        ema.update({"p": parameter})
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert ema.shadow["p"].item() == pytest.approx(expected, rel=1e-6)


def test_learning_rate_warms_up_and_falls_to_zero(tmp_path):
    args = arguments(tmp_path, max_steps=100, warmup_steps=9)
    factors = [learning_rate_factor(step, args) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert factors[54] == pytest.approx(0.5, abs=0.02) and 0 < factors[99] < 1e-3
    constant = arguments(tmp_path, max_steps=100, warmup_steps=9, lr_scheduler="constant")
    assert {learning_rate_factor(step, constant) for step in range(9, 100)} == {1.0}
    floor = arguments(tmp_path, max_steps=100, warmup_steps=9, lr_floor=0.01)
    assert learning_rate_factor(9, floor) == 1.0 and learning_rate_factor(100, floor) == pytest.approx(0.01)
    halving = arguments(tmp_path, max_steps=100, warmup_steps=9, lr_scheduler="exponential", lr_half_life=20)
    assert [learning_rate_factor(step, halving) for step in (9, 29, 49)] == pytest.approx([1, 0.5, 0.25])
    for wrong in (dict(lr_floor=1.5), dict(lr_half_life=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            arguments(tmp_path, **wrong)


def test_gradients_are_clipped_to_the_global_norm_asked_for_and_logged_as_they_were(tmp_path, monkeypatch):
    real, norms = trainer.make_optimizers, []

    def recording(model, *args):
        optimizers = real(model, *args)
        gradients = [p for p in model.parameters() if p.requires_grad]
        optimizers[0].register_step_pre_hook(
            lambda *_: norms.append(torch.nn.utils.get_total_norm([p.grad for p in gradients]).item())
        )
        return optimizers

    monkeypatch.setattr(trainer, "make_optimizers", recording)
    for name, clip in (("off", 0.0), ("on", 0.01)):
        run(tmp_path / name, gradient_clip=clip, max_steps=2, log_every=1)
    logged = [[line["gradient_norm"] for line in curve(tmp_path / x) if "loss" in line] for x in ("off", "on")]
    assert logged[0][0] == logged[1][0] > 0.02
    assert norms == pytest.approx([*logged[0], 0.01, 0.01], rel=1e-3)


def test_muon_takes_the_matrices_of_the_layer_stack_and_adamw_the_rest(tmp_path):
    model = Net()
    muon, adamw = make_optimizers(model, arguments(tmp_path, optimizer="muon"), {"head": 1e-4})
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    chosen = {id(p) for group in muon.param_groups for p in group["params"]}
    assert chosen == {id(layer.weight) for layer in model.layers}
    rest = [p for group in adamw.param_groups for p in group["params"]]
    assert {id(p) for p in rest} | chosen == {id(p) for p in model.parameters()}
    rates = {id(p): group["lr"] for group in adamw.param_groups for p in group["params"]}
    assert rates[id(model.head.weight)] == 1e-4 and rates[id(model.inputs.weight)] == 1e-2
    decays = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert decays[id(model.inputs.bias)] == 0 and decays[id(model.inputs.weight)] > 0
    with pytest.raises(ValueError, match="no linear layer"):
        make_optimizers(nn.Linear(2, 2), arguments(tmp_path, optimizer="muon"))
    with pytest.raises(ValueError, match="hed"):
        make_optimizers(model, arguments(tmp_path), {"hed": 1e-4})


@pytest.mark.parametrize("size", [8, 80])  # float32 and bfloat16 iterations
def test_batched_muon_takes_the_steps_of_torch_muon(size):
    torch.manual_seed(0)
    shapes = [(size, size), (3 * size, size), (size, 2 * size), (3 * size, size), (size, size)]
    weights = [torch.randn(shape) for shape in shapes]
    results = []
    for kind in (torch.optim.Muon, BatchedMuon):
        parameters = [nn.Parameter(weight.clone()) for weight in weights]
        optimizer = kind(parameters, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        results.append((parameters, optimizer.state_dict()))
    (theirs, their_state), (ours, our_state) = results
    for before, one, two in zip(weights, theirs, ours):
        assert (one - two).norm() < 0.03 * (one - before).norm()  # torch iterates in bfloat16
    for key, value in their_state["state"].items():
        torch.testing.assert_close(value, our_state["state"][key])


def test_accumulation_does_not_change_the_gradient(tmp_path):
    data = Points(16)
    whole = {"x": data.x, "y": data.y}
    parts = [{"x": data.x[i : i + 4], "y": data.y[i : i + 4]} for i in range(0, 16, 4)]
    gradients = []
    for batches in ([whole], parts):
        model = Net(dropout=0)
        compute_gradients(Accelerator(cpu=True), model, loss_fn, batches, 0, 0, len(batches))
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def _gradients_of_two_ranks(folder: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes != 2:
        raise RuntimeError(f"{accelerator.num_processes} processes")
    args = arguments(folder, save_every=0, eval_every=0)
    data = Points(50)
    indices = step_indices(args.seed, 0, args.batch_size, len(data))
    mine = indices[micro_batch_slice(args, 0, accelerator.process_index, 2)]
    model = accelerator.prepare(Net(dropout=0))
    compute_gradients(accelerator, model, loss_fn, [{"x": data.x[mine], "y": data.y[mine]}], 0, 0, 1)
    if accelerator.is_main_process:
        torch.save([p.grad for p in model.parameters()], Path(folder) / "gradients.pt")
    # then whole runs, through checkpoints and evaluation
    torch.manual_seed(0)
    for steps in (6, 12):
        model = Net(dropout=0)
        result = train(
            model, data, Points(21), loss_fn,
            arguments(Path(folder) / "two", max_steps=steps, lr_scheduler="constant", eval_every=2), accelerator=accelerator,
        )  # fmt: skip
    if accelerator.is_main_process:
        (Path(folder) / "two" / "result.json").write_text(json.dumps(result.metrics))


def test_two_processes_give_the_gradient_and_the_run_of_one(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # the ranks are forked: let them start afresh
    debug_launcher(_gradients_of_two_ranks, args=(str(tmp_path),), num_processes=2)
    args, data = arguments(tmp_path), Points(50)
    indices = step_indices(args.seed, 0, args.batch_size, len(data))
    model = Net(dropout=0)
    compute_gradients(Accelerator(cpu=True), model, loss_fn, [{"x": data.x[indices], "y": data.y[indices]}], 0, 0, 1)
    for one, two in zip(model.parameters(), torch.load(tmp_path / "gradients.pt", weights_only=True)):
        torch.testing.assert_close(one.grad, two, atol=1e-6, rtol=0)
    assert max(p.grad.abs().max() for p in model.parameters()) > 1e-2

    model = Net(dropout=0)
    result = train(
        model, data, Points(21), loss_fn, arguments(tmp_path / "one", lr_scheduler="constant", eval_every=2)
    )
    metrics = json.loads((tmp_path / "two" / "result.json").read_text())
    assert metrics == pytest.approx(result.metrics, rel=1e-4)
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_a_batch_that_cannot_be_shared_is_an_error(tmp_path):
    accelerator = Accelerator(cpu=True)
    args = arguments(tmp_path, batch_size=15)
    args.gradient_accumulation_steps = 2
    with pytest.raises(ValueError, match="choose a multiple of 2"):
        train(Net(), Points(), None, loss_fn, args, accelerator=accelerator)


def test_bf16_forwards_train_and_leave_a_plain_model(tmp_path):
    model, result = run(tmp_path, mixed_precision="bf16")
    assert result.step == 12
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.zeros(1, 4)).dtype == torch.float32
    assert "forward" not in vars(model) or not hasattr(model.forward, "__wrapped__")


def test_tensorboard_gets_the_curves(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, report_to="tensorboard")
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_what_shards_otherwise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.DEEPSPEED))
    with pytest.raises(ValueError, match=r"DEEPSPEED is not supported.*gpu_ddp\.yaml.*gpu_fsdp\.yaml"):
        make_accelerator(arguments(tmp_path))


class Imagining(Net):
    """A model that is also called beside its forward, layer by layer, as world models are in rollouts, with a frozen part of
    which it takes the weights alone, as VideoSAUR does."""

    _no_split_modules = ("Linear",)

    def __init__(self, dropout):
        super().__init__(dropout)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.shift = nn.Parameter(torch.full((4,), 0.1))  # of the model itself, not of one of its units

    def forward(self, x):
        return super().forward(x + self.shift + nn.functional.linear(x, self.frozen.weight))

    def rollout(self, x):
        x = self.inputs(x + self.shift)
        for layer in (*self.layers, *self.layers):
            x = x + torch.tanh(layer(x))
        return self.head(x)


def imagining_loss(model, batch):
    loss, scalars = loss_fn(model, batch)
    imagined = (bare(model).rollout(batch["x"]) - batch["y"]).square().mean()
    return loss + 0.1 * imagined, {**scalars, "imagined": imagined.detach()}


SHARDED = dict(optimizer="muon", lr_scheduler="constant", eval_every=2, gradient_accumulation_steps=2)


def _train_sharded(folder: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes != 2:
        raise RuntimeError(f"{accelerator.num_processes} processes")

    def loss(model, batch):
        whole = [name for name, p in bare(model).named_parameters() if not isinstance(p, DTensor)]
        if model.training and whole != ["frozen.weight", "frozen.bias"]:
            raise RuntimeError(f"{whole} are not sharded")
        return imagining_loss(model, batch)

    for steps in (6, 12):  # the second continues the first; 21 samples: a process has a batch less than the other
        args = arguments(Path(folder) / "two", max_steps=steps, shard_model=True, **SHARDED)
        model = Imagining(dropout=0)
        if accelerator.process_index:  # weights are those of the first process
            nn.init.ones_(model.inputs.weight)
        train(model, Points(), Points(21), loss, args, accelerator=accelerator)
    save_file(model.state_dict(), Path(folder) / f"weights_{accelerator.process_index}.safetensors")


def test_two_processes_with_sharded_parameters_give_the_run_of_one_and_its_checkpoints(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # the ranks are forked: let them start afresh
    debug_launcher(_train_sharded, args=(str(tmp_path),), num_processes=2)
    model = Imagining(dropout=0)
    train(model, Points(), Points(21), imagining_loss, arguments(tmp_path / "one", **SHARDED))
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    for rank in (0, 1):
        weights = load_file(tmp_path / f"weights_{rank}.safetensors")
        torch.testing.assert_close(weights, dict(model.state_dict()), atol=1e-4, rtol=1e-3)
    # one process goes on with what two have sharded, as with its own
    runs = []
    for name in ("one", "two"):
        model = Imagining(dropout=0)
        args = arguments(tmp_path / name, **(SHARDED | dict(max_steps=16)))
        result = train(model, Points(), Points(21), imagining_loss, args)
        assert result.resumed_from.name == "step-000012"
        runs.append(dict(model.state_dict()))
    torch.testing.assert_close(*runs, atol=1e-4, rtol=1e-3)


def test_one_process_that_is_launched_to_shard_trains_as_if_it_was_not(tmp_path, monkeypatch):
    plain, _ = run(tmp_path / "plain")
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    alone, _ = run(tmp_path / "alone")
    assert_same_run(plain, alone, tmp_path / "plain", tmp_path / "alone")
    # transformers would leave the weights of every other process out
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_one_process_shards_nothing_and_compiling_goes_without(tmp_path):
    accelerator = Accelerator(cpu=True)
    assert not shards_model(arguments(tmp_path, shard_model=True), accelerator)
    with pytest.raises(ValueError, match="torch_compile and a sharded model"):
        shards_model(arguments(tmp_path, shard_model=True, torch_compile=True), accelerator)
