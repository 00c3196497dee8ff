"""`cjepa-hf demo`: the shipped world model plans held-out Push-T tasks from pixels, and imagines without an object."""

import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor

from cjepa_hf.evaluation.protocols import load_protocol
from cjepa_hf.evaluation.push_t import PushTResults, run_baseline, run_policy, select_tasks
from cjepa_hf.models.cjepa import CJepaModel
from cjepa_hf.planning.mpc import default_policy
from cjepa_hf.simulators.push_t import PROPRIO_INDICES, PushTWorld
from cjepa_hf.simulators.rendering import AGENT_COLOR, BLOCK_COLOR, TABLE_SIZE, render_push_t

_CELL = 120  # px of one frame in the GIF
_PATH_COLOR = (214, 39, 40)
_REACHED_COLOR = (44, 140, 60)
_RUNNING_COLOR = (120, 120, 120)


def run_demo(
    model_folder: str | Path,
    output_dir: str | Path,
    *,
    num_tasks: int = 10,
    protocol_name: str = "pusht-25",
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """
    Plans the first `num_tasks` tasks of a protocol from start and goal frames, executes them in the simulator and
    writes `push_t.gif` and `counterfactual.png` into `output_dir`.

    Returns:
        {"tasks": one dict per task, "with_proprio", "without_proprio", "replay", "no-op": success with 95 % Wilson
        intervals, "counterfactual": how well the scene without the block was imagined, "files", "seconds"}.
    """
    start = time.perf_counter()
    model = CJepaModel.from_pretrained(model_folder, use_safetensors=True).eval().to(device)
    if not hasattr(model.slot_encoder, "colors"):  # None, or an encoder that cannot say which slot is which object
        kind = "no slot encoder" if model.slot_encoder is None else f"a {type(model.slot_encoder).__name__}"
        raise ValueError(
            f"{model_folder} holds {kind}; the demo needs a ColorIsaModel in it, which knows its objects by color: train "
            "with --slot_encoder, or use `cjepa-hf evaluate`."
        )
    processor = AutoImageProcessor.from_pretrained(model_folder)
    protocol = load_protocol(protocol_name)
    tasks = select_tasks(protocol, num_tasks)
    block, agent = slot_of_color(model, BLOCK_COLOR), slot_of_color(model, AGENT_COLOR)
    if block == agent:
        raise ValueError(
            f"{model_folder}: slot {block} has the colors of both agent and block, so the encoder does not tell them "
            "apart: train it longer."
        )
    if model.config.proprio_size != len(PROPRIO_INDICES):
        raise ValueError(
            f"{model_folder} takes proprioception of size {model.config.proprio_size}; the demo compares planning with and "
            f"without it and needs a model trained with {len(PROPRIO_INDICES)} numbers. Use `cjepa-hf evaluate`."
        )
    output = Path(output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output folder {output} is a file: choose another name")
    output.mkdir(parents=True, exist_ok=True)

    paths: dict[tuple[int, int], np.ndarray] = {}  # (step, task) -> [H, 2] imagined positions of the block, px
    first_plan = {}

    def remember(step, states, policy):
        imagined = policy.imagine()
        positions = model.slot_encoder.positions(imagined)[..., block, :].float().cpu().numpy()
        for row, task in enumerate(policy.last_plan.tasks.tolist()):
            paths[step, task] = positions[row]
        if not first_plan:
            first_plan.update(state=states[0].copy(), actions=policy.last_plan.actions[0].clone())

    def policy():
        return default_policy(model, image_processor=processor, seed=seed)

    results = run_policy(policy(), protocol, num_tasks=num_tasks, on_plan=remember, progress=progress)
    blind = run_policy(policy(), protocol, num_tasks=num_tasks, use_proprio=False, progress=progress)

    files = {"gif": output / "push_t.gif", "counterfactual": output / "counterfactual.png"}
    write_gif(files["gif"], results, tasks, paths)
    counterfactual = without_block(
        model, processor, first_plan["state"], first_plan["actions"], files["counterfactual"]
    )
    rows = [
        {
            "task": task,
            "bin": str(results.bins[task]),
            "success": bool(results.success[task]),
            "steps": int(results.steps[task]),
            "position_error_px": float(results.position_error[task]),
            "angle_error_deg": float(np.rad2deg(results.angle_error[task])),
            "plans": int(results.plans[task]),
            "seconds_per_plan": results.seconds_per_plan,
        }
        for task in range(num_tasks)
    ]
    return {
        "protocol": protocol_name,
        "seed": seed,
        "tasks": rows,
        "with_proprio": results.summary(),
        "without_proprio": blind.summary(),
        "replay": run_baseline("replay", protocol, num_tasks=num_tasks).summary(),
        "no-op": run_baseline("no-op", protocol, num_tasks=num_tasks).summary(),
        "counterfactual": counterfactual,
        "files": {name: str(path) for name, path in files.items()},
        "seconds": time.perf_counter() - start,
    }


def slot_of_color(model: CJepaModel, color: tuple[int, int, int]) -> int:
    """The slot whose color prototype is nearest to an RGB color (0 to 255)."""
    prototypes = (1 - model.slot_encoder.colors.detach()).float().cpu().numpy() * 255
    return int(np.square(prototypes - np.array(color)).sum(-1).argmin())


# ------------------------------------------------------------------------------------------------------- pictures


def write_gif(path: Path, results: PushTResults, tasks: dict[str, np.ndarray], paths: dict) -> None:
    """Every task: the executed frames (red: the imagined path of the block) beside the goal."""
    num_tasks = len(results.success)
    columns = min(num_tasks, 5)
    scale = _CELL / TABLE_SIZE
    goals = render_push_t(tasks["goal_state"], resolution=_CELL)
    last = int(results.steps.max())
    frames = []
    current: list[np.ndarray | None] = [None] * num_tasks
    for step in [*range(0, last, 2), last]:
        shown = render_push_t(results.states[:, step], resolution=_CELL)
        cells = []
        for task in range(num_tasks):
            for planned in range(max(step - 1, 0), step + 1):
                current[task] = paths.get((planned, task), current[task])
            frame = np.concatenate([shown[task], goals[task]], axis=1)
            if current[task] is not None and step < results.steps[task]:
                points = current[task] * scale * 8
                cv2.polylines(frame, [points.round().astype(np.int32)], False, _PATH_COLOR, 2, cv2.LINE_AA, 3)
                for point in points.round().astype(int):
                    cv2.circle(frame, tuple(int(v) for v in point), 16, _PATH_COLOR, -1, cv2.LINE_AA, 3)
            ended = step >= results.steps[task]
            color = _RUNNING_COLOR if not ended else _REACHED_COLOR if results.success[task] else _PATH_COLOR
            frame[:, _CELL - 1 : _CELL + 1] = 230
            header = np.full((18, frame.shape[1], 3), 255, np.uint8)
            state = "reached" if ended and results.success[task] else "not reached" if ended else f"step {step}"
            for text, x in ((f"task {task}: {state}", 4), ("goal", _CELL + 4)):
                cv2.putText(header, text, (x, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.36, color, 1, cv2.LINE_AA)
            cell = np.concatenate([header, frame])
            cells.append(np.pad(cell, ((2, 2), (4, 4), (0, 0)), constant_values=255))
        while len(cells) % columns:
            cells.append(np.full_like(cells[0], 255))
        rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
        frames.append(np.concatenate(rows))
    save_gif(path, frames)


def save_gif(path: Path, frames: list[np.ndarray], milliseconds: int = 160) -> None:
    """Frames uint8 [H, W, 3] as a GIF with one palette, the last frame held; whole or not at all."""
    images = [Image.fromarray(frame) for frame in frames]
    # one palette for all frames, so that still parts do not flicker; the named colors are too rare to be found
    named = np.array([[_PATH_COLOR, _REACHED_COLOR, _RUNNING_COLOR]], np.uint8).repeat(4000, axis=1)
    sample = np.concatenate(
        [frame.reshape(1, -1, 3) for frame in frames[:: max(len(frames) // 4, 1)]] + [named], axis=1
    )
    palette = Image.fromarray(sample).quantize(128)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [milliseconds] * (len(images) - 1) + [2000]
    temporary = path.with_name(path.name + ".tmp")
    images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    temporary.replace(path)


def without_block(
    model: CJepaModel, processor, state: np.ndarray, actions: torch.Tensor, path: Path
) -> dict[str, Any]:
    """
    The same start and actions with the block and without it (its slot dropped from the set), imagined and true.

    Args:
        state: [7] start. actions: [H, A] normalised plan.

    Returns:
        Error of the imagined agent against the truth, with and without the block (px, mean over the H frames), and how
        far the truth moves the agent and the block.
    """
    block, agent = slot_of_color(model, BLOCK_COLOR), slot_of_color(model, AGENT_COLOR)
    frame_skip, horizon = model.config.frame_skip, len(actions)
    frame = render_push_t(state[None], resolution=model.slot_encoder.config.image_size)
    pixels = processor(list(frame), return_tensors="pt")["pixel_values"]
    proprio = torch.as_tensor(state[list(PROPRIO_INDICES)], dtype=torch.float32).view(1, 1, -1)
    keep = [slot for slot in range(model.config.num_slots) if slot != block]
    with torch.inference_mode():
        slots = model.encode(pixels.unsqueeze(1).to(model.device, model.dtype))
        inputs = {
            "actions": actions.unsqueeze(0).to(model.device),
            "proprio": model.normalize_proprio(proprio.to(model.device)),
        }
        factual = model.rollout(slots, **inputs).slots[0]
        counterfactual = model.rollout(slots[:, :, keep], **inputs).slots[0]
        encoder = model.slot_encoder
        drawn = [
            encoder.decode(torch.cat([slots[0], factual])).reconstruction,
            encoder.decode(torch.cat([slots[0, :, keep], counterfactual]), slot_indices=keep).reconstruction,
        ]
        agents = [encoder.positions(factual)[:, agent], encoder.positions(counterfactual)[:, keep.index(agent)]]

    world, raw = PushTWorld(state), model.denormalize_actions(actions.to(model.device)).reshape(-1, 2).clamp(-1, 1)
    true = [state]
    for index, action in enumerate(raw.cpu().double().numpy(), start=1):
        after = world.step(action)
        if index % frame_skip == 0:
            true.append(after)
    true = np.stack(true)
    # the agent is kinematic: without the block it moves exactly as with it
    rows = [
        ("true, as it is", render_push_t(true, resolution=128)),
        ("imagined", _to_uint8(drawn[0])),
        ("true, without the block", render_push_t(true, resolution=128, hide=("block",))),
        ("imagined, without", _to_uint8(drawn[1])),
    ]
    _write_rows(
        path, rows, [f"start ({horizon} x {frame_skip} steps)"] + [f"+{k * frame_skip}" for k in range(1, horizon + 1)]
    )
    errors = [np.linalg.norm(a.float().cpu().numpy() - true[1:, :2], axis=-1).mean() for a in agents]
    return {
        "removed": "block",
        "operator": "drop",
        "agent_error_px_with_block": float(errors[0]),
        "agent_error_px_without_block": float(errors[1]),
        "agent_moves_px": float(np.linalg.norm(true[-1, :2] - true[0, :2])),
        "block_moves_px": float(np.linalg.norm(true[-1, 2:4] - true[0, 2:4])),
    }


def _to_uint8(images: torch.Tensor) -> np.ndarray:
    array = (images.float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()
    return np.stack([cv2.resize(image, (128, 128), interpolation=cv2.INTER_CUBIC) for image in array])


def _write_rows(path: Path, rows: list[tuple[str, np.ndarray]], titles: list[str]) -> None:
    size, margin, top = rows[0][1].shape[1], 150, 20
    canvas = np.full((top + len(rows) * (size + 6), margin + len(titles) * (size + 6), 3), 255, np.uint8)
    for column, title in enumerate(titles):
        x = margin + column * (size + 6)
        cv2.putText(canvas, title, (x, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (60, 60, 60), 1, cv2.LINE_AA)
    for row, (name, frames) in enumerate(rows):
        y = top + row * (size + 6)
        cv2.putText(canvas, name, (4, y + size // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (30, 30, 30), 1, cv2.LINE_AA)
        for column, frame in enumerate(frames):
            x = margin + column * (size + 6)
            canvas[y : y + size, x : x + size] = frame
            cv2.rectangle(canvas, (x, y), (x + size - 1, y + size - 1), (200, 200, 200), 1)
    temporary = path.with_name(path.stem + ".tmp.png")
    Image.fromarray(canvas).save(temporary)
    temporary.replace(path)


def print_report(report: dict[str, Any]) -> None:
    """The report of [`run_demo`] as a table."""
    print(
        f"{'task':>4}  {'bin':<4}  {'success':<7}  {'steps':>5}  {'position px':>11}  {'angle deg':>9}  {'plans':>5}  {'s/plan':>6}"
    )
    for row in report["tasks"]:
        print(
            f"{row['task']:>4}  {row['bin']:<4}  {'yes' if row['success'] else 'no':<7}  {row['steps']:>5}  "
            f"{row['position_error_px']:>11.1f}  {row['angle_error_deg']:>9.1f}  {row['plans']:>5}  "
            f"{row['seconds_per_plan']:>6.2f}"
        )
    print(f"\nSuccess on {len(report['tasks'])} held-out tasks of {report['protocol']} (95 % Wilson interval):")
    names = {
        "with_proprio": "from pixels and current proprioception",
        "without_proprio": "from pixels alone",
        "replay": "replaying the demonstration",
        "no-op": "doing nothing",
    }
    for key, name in names.items():
        s = report[key]
        print(f"  {name:<40} {s['successes']:>2}/{s['n']}  {s['rate']:.2f}  [{s['low']:.2f}, {s['high']:.2f}]")
    c = report["counterfactual"]
    print(
        f"\nWithout the block, imagined: the agent is {c['agent_error_px_without_block']:.1f} px off the truth "
        f"({c['agent_error_px_with_block']:.1f} px with it), over a way of {c['agent_moves_px']:.0f} px."
    )
    print(
        f"Pictures: {report['files']['gif']}, {report['files']['counterfactual']}. {report['seconds']:.0f} s in all."
    )
