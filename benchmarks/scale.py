"""What training and planning cost: tokens, FLOPs, memory and expected hours, as Markdown (docs/scale.md) and json.

    python benchmarks/scale.py --output docs/scale.md
    python benchmarks/scale.py --peak_tflops 989 --utilization 0.1 --gpu "H100 SXM, bfloat16"

FLOPs are counted while the models run (matrix products alone, two FLOPs for each multiplication and addition), and so is
the memory that a training step keeps. Hours follow from two ASSUMPTIONS about the GPU that are arguments: its peak, and the
share of it that these small models reach. No GPU was measured. What was measured on a CPU (benchmarks/results/) stands
beside what the same count gives there, with the share of a matrix product's rate that each run reached.
"""

import argparse
import json
import os
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
WINDOWS, GPUS = (10**4, 10**6, 10**8), (1, 8, 64)
SIZES = {  # the paper's two settings, and the model that ships
    "Push-T, paper": {"action_size": 10, "proprio_size": 4},
    "CLEVRER, paper": {
        "num_slots": 7, "history_length": 6, "prediction_length": 10, "frame_skip": 2, "num_masked_slots": 4,
    },
    "Push-T, shipped": {
        "slot_size": 64, "action_size": 10, "proprio_size": 4, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 256, "norm_first": True, "residual_prediction": "last", "anchor": "last_visible",
    },
}  # fmt: skip


def count_training(options: dict, batch: int = 4) -> dict:
    """Tokens, FLOPs and kept bytes per window of a forward and backward pass, counted on this machine."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cjepa_hf import CJepaConfig, CJepaModel

    torch.manual_seed(0)
    model = CJepaModel(CJepaConfig(**options)).train()
    config = model.config
    inputs = _inputs(config, batch)
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tensors = []
    with FlopCounterMode(display=False) as counter:
        # what is kept must stay alive until it is counted, or storage is used again
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (tensors.append(t), note(t))[1], lambda t: t):
            loss = model(**inputs).loss
        loss.backward()
    frames = config.history_length + config.prediction_length
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "tokens": frames * (config.num_slots + config.num_auxiliary_tokens),
        "parameters": parameters,
        "training_flops_per_window": counter.get_total_flops() / batch,
        "activation_bytes_per_window": sum(n for p, n in kept.items() if p not in weights) / batch,
        "state_bytes": 16 * parameters,  # float32 weights, gradients and AdamW's two moments
        "slot_bytes_per_frame": 4 * config.num_slots * config.slot_size,
    }


def count_rollout(options: dict, candidates: int, horizon: int) -> float:
    """FLOPs of imagining the frames of `candidates` plans of `horizon` actions once (one CEM iteration)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cjepa_hf import CJepaConfig, CJepaModel

    model = CJepaModel(CJepaConfig(**options)).eval()
    config = model.config
    slots = torch.zeros(1, 1, config.num_slots, config.slot_size)
    proprio = torch.zeros(1, 1, config.proprio_size) if config.proprio_size else None
    some = 4  # FLOPs grow in proportion
    actions = torch.zeros(1, some, horizon, config.action_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.rollout(slots, actions=actions, proprio=proprio)
    return counter.get_total_flops() * candidates / some


def _inputs(config, batch):
    import torch

    def draw(*shape):
        return torch.randn(batch, *shape)

    history, future = config.history_length, config.prediction_length
    slots = (config.num_slots, config.slot_size)
    inputs = {"slots": draw(history, *slots), "future_slots": draw(future, *slots)}
    if config.action_size:
        inputs["actions"] = draw(history, config.action_size)
    if config.proprio_size:
        inputs |= {"proprio": draw(history, config.proprio_size), "future_proprio": draw(future, config.proprio_size)}
    return inputs


def measured(sizes: dict) -> list[dict]:
    """Measured seconds beside the FLOPs counted for the same work."""
    rows = []
    training = json.loads((RESULTS / "training.json").read_text())
    for step in training["steps"]:
        flops = 256 * sizes["Push-T, paper"]["training_flops_per_window"]
        precision = {"no": "float32", "bf16": "bfloat16"}[step["precision"]]
        rows.append(_row(f"training step, paper's size, batch 256, {precision}", step["median_s"], flops,
                         step["product_gflop_per_s"]))  # fmt: skip
    planning = json.loads((RESULTS / "planning.json").read_text())
    iteration = planning["iterations"][0]
    flops = count_rollout(SIZES["Push-T, paper"], 300, 5)
    rows.append(_row("CEM iteration, paper's size, 300 candidates, bfloat16", iteration["median_s"], flops,
                     iteration["product_gflop_per_s"]))  # fmt: skip
    plan = planning["plans"]["planners"]["paper"]["plans"][0]
    flops = 30 * count_rollout(SIZES["Push-T, shipped"], 300, 5)
    rows.append(_row("the paper's CEM, shipped model, float32", plan["median_s"], flops,
                     iteration["product_gflop_per_s"]))  # fmt: skip
    run = json.loads((RESULTS / "world_model_seed0_training.json").read_text())
    # 30 % of the batches have 3 frames of history, the others 1 or 2
    whole, two, one = (
        count_training({**SIZES["Push-T, shipped"], "history_length": h})["training_flops_per_window"]
        for h in (3, 2, 1)
    )
    flops = run["step"] * 128 * (0.3 * whole + 0.35 * (one + two))
    rows.append(_row(f"training of the shipped size, {run['step']} steps of 128, float32, one thread",
                     run["training_seconds"], flops, None))  # fmt: skip
    return rows


def _row(name, seconds, flops, product):
    rate = flops / seconds / 1e9
    return {"what": name, "measured_s": seconds, "counted_gflop": flops / 1e9, "gflop_per_s": rate,
            "share_of_product": None if product is None else rate / product}  # fmt: skip


def hours(flops: float, gpus: int, args) -> float:
    efficiency = 1.0 if gpus == 1 else args.scaling_efficiency
    return flops / (gpus * efficiency * args.peak_tflops * 1e12 * args.utilization) / 3600


def report(args) -> tuple[dict, str]:
    sizes = {name: count_training(options) for name, options in SIZES.items()}
    checks = measured(sizes)
    table = []
    for name, size in sizes.items():
        for windows in WINDOWS:
            flops = windows * args.epochs * size["training_flops_per_window"]
            table.append({
                "setting": name, "windows": windows, "tokens": windows * size["tokens"], "flops": flops,
                "data_gb": windows * size["slot_bytes_per_frame"] / 1e9,
                "hours": {str(g): hours(flops, g, args) for g in GPUS},
            })  # fmt: skip
    plans = {name: 30 * count_rollout(SIZES[name], 300, 5) for name in SIZES if "action_size" in SIZES[name]}
    assumptions = {key: getattr(args, key) for key in
                   ("gpu", "peak_tflops", "utilization", "scaling_efficiency", "epochs", "batch_size")}  # fmt: skip
    result = {"benchmark": "scale", "assumptions": assumptions, "sizes": sizes, "table": table,
              "plan_flops": plans, "measured": checks}  # fmt: skip
    return result, _markdown(result)


def _markdown(result) -> str:
    a = result["assumptions"]
    lines = [
        "# What it costs at scale",
        "",
        "Printed by `python benchmarks/scale.py --output docs/scale.md`. FLOPs and memory are counted, hours are **expected**:",
        f"they assume a GPU of {a['peak_tflops']:g} TFLOP/s ({a['gpu']}; the maker's figure) of which these small models "
        f"reach {100 * a['utilization']:g} %",
        f"(an assumption, not measured), {100 * a['scaling_efficiency']:g} % of that on several GPUs, and {a['epochs']} "
        "epochs as in the paper. Hours go with 1 / (peak x share).",
        "",
        "## The models",
        "",
        "| setting | tokens per window | parameters | training GFLOP per window | weights, gradients, AdamW | activations, "
        f"batch {a['batch_size']}, float32 | slots per frame |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, size in result["sizes"].items():
        lines.append(
            f"| {name} | {size['tokens']} | {size['parameters'] / 1e6:.2f} M "
            f"| {size['training_flops_per_window'] / 1e9:.3f} | {size['state_bytes'] / 2**20:.0f} MiB "
            f"| {a['batch_size'] * size['activation_bytes_per_window'] / 2**30:.2f} GiB "
            f"| {size['slot_bytes_per_frame'] / 1024:.1f} KiB |"
        )
    lines += [
        "",
        "Data parallelism is all these models need: weights, gradients and optimizer states fit any GPU hundreds of times. "
        "Sharding them",
        "(FSDP: `--shard_model true`, `examples/accelerate/gpu_fsdp.yaml`) is for models that one GPU does not hold. "
        "`--batch_size` counts the",
        "samples of all processes together: a run is the same whatever their number. FLOPs and activations",
        "are those of the whole model; training leaves out what no loss reads: most of the last layer where few frames are "
        "predicted (Push-T).",
        "",
        "## Training",
        "",
        "A window begins at every frame, so that n windows are about n frames of slots (float32 on disk; `--dtype float16` "
        "halves it).",
        "",
        "| setting | windows | tokens per epoch | FLOP, all epochs | slots on disk | 1 GPU | 8 GPUs | 64 GPUs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["table"]:
        cells = " | ".join(_hours(row["hours"][str(g)]) for g in GPUS)
        lines.append(
            f"| {row['setting']} | {_power(row['windows'])} | {row['tokens']:.1e} | {row['flops']:.1e} "
            f"| {row['data_gb']:.3g} GB | {cells} |"
        )
    lines += [
        "",
        "64 GPUs share a batch of 256 in fours: at that number the network's latency and the start of kernels decide, and the "
        "assumed share is",
        "out of reach unless `--batch_size` grows with it. The same is true of the shipped size on any GPU.",
        "",
        "## Planning",
        "",
        "The paper's CEM (300 candidates, 30 iterations, horizon 5) costs "
        + " and ".join(f"{flops / 1e12:.2f} TFLOP per plan ({name})" for name, flops in result["plan_flops"].items())
        + ".",
        "",
        "## Checked against what was measured",
        "",
        "On two cores of a CPU; the unit is a 2048^3 bfloat16 matrix product on the same cores at the same time.",
        "",
        "| measured | s | counted GFLOP | GFLOP/s | share of a matrix product's rate |",
        "|---|---|---|---|---|",
    ]
    for row in result["measured"]:
        share = "-" if row["share_of_product"] is None else f"{100 * row['share_of_product']:.0f} %"
        lines.append(
            f"| {row['what']} | {row['measured_s']:.2f} | {row['counted_gflop']:.1f} | {row['gflop_per_s']:.0f} | {share} |"
        )
    return "\n".join(lines) + "\n"


def _hours(value: float) -> str:
    if value >= 48:
        return f"{value / 24:.1f} days"
    if value >= 1:
        return f"{value:.1f} h"
    return f"{60 * value:.1f} min" if value >= 1 / 60 else f"{3600 * value:.1f} s" if value > 1 / 3600 else "< 1 s"


def _power(count: int) -> str:
    return f"10^{len(str(count)) - 1}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="A100, bfloat16", help="name of the GPU (default: %(default)s)")
    parser.add_argument("--peak_tflops", type=float, default=312.0, help="its peak; assumption (default: %(default)s)")
    parser.add_argument(
        "--utilization", type=float, default=0.1, help="share of it; assumption (default: %(default)s)"
    )
    parser.add_argument("--scaling_efficiency", type=float, default=0.8, help="on several GPUs (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the page to this file (default: print it)")
    parser.add_argument("--json", action="store_true", help="print the numbers as json")
    args = parser.parse_args()
    if not (0 < args.utilization <= 1 and 0 < args.scaling_efficiency <= 1 and args.peak_tflops > 0):
        parser.error("--utilization and --scaling_efficiency lie in (0, 1], --peak_tflops above 0")
    result, page = report(args)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.output.with_name(args.output.name + ".tmp")
        temporary.write_text(page)
        os.replace(temporary, args.output)
    print(json.dumps(result, indent=1) if args.json else page)


if __name__ == "__main__":
    main()
