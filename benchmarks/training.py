"""Speed of a training step at the paper's size, as json.

    python benchmarks/training.py --output benchmarks/results/training.json

One step (batch 256, 3 + 1 frames of 4 slots and 2 auxiliary tokens, 6 layers, 16 heads, D 128, MLP 2048: forward, backward,
clipping, AdamW) counts as 129 GFLOP whatever an implementation skips. Its time is given in units of that work at the rate
of a 2048^3 bfloat16 matrix product measured between its repetitions. Run it on an idle machine.
"""

import argparse
from pathlib import Path

from common import hardware, in_units, restart_with_allocator_settings, write_result

STEP_GFLOP = 129.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", nargs="+", default=["no", "bf16"], choices=["no", "bf16"])
    parser.add_argument("--threads", type=int, help="torch threads (torch's choice without)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="add where the time of one step goes")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        restart_with_allocator_settings()

    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from cjepa_hf import CJepaConfig, CJepaModel
    from cjepa_hf.training import TrainArguments
    from cjepa_hf.training.trainer import compute_gradients, make_optimizers

    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    result = {"benchmark": "training", "hardware": hardware(torch, device), "batch_size": 256, "steps": []}
    for precision in args.precision:
        AcceleratorState._reset_state()
        accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
        torch.manual_seed(0)
        model = CJepaModel(CJepaConfig(action_size=10, proprio_size=4)).train()
        optimizers = make_optimizers(model, TrainArguments(output_dir="unused"))
        model, *optimizers = accelerator.prepare(model, *optimizers)

        def draw(*shape):
            return torch.randn(256, *shape, device=device)

        batch = {"slots": draw(3, 4, 128), "actions": draw(3, 10), "proprio": draw(3, 4)}
        batch |= {"future_slots": draw(1, 4, 128), "future_proprio": draw(1, 4)}

        def step(model=model, optimizers=optimizers, accelerator=accelerator, batch=batch):
            compute_gradients(
                accelerator, model, lambda m, b: (m(**b, trained_only=True).loss, {}), [batch], seed=0, step=0
            )
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        row = {"precision": precision, **in_units(step, STEP_GFLOP, args.repeats, torch, device)}
        if args.profile:
            with torch.profiler.profile() as profile:
                step()
            events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
            total = sum(event.self_cpu_time_total for event in events)
            row["profile"] = {event.key: round(event.self_cpu_time_total / total, 4) for event in events[:12]}
        result["steps"].append(row)
    write_result(result, args.output)


if __name__ == "__main__":
    main()
