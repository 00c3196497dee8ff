"""How good a slot encoder is on Push-T frames that it has not seen; prints one JSON object.

    python benchmarks/encoder_quality.py --model runs/encoder --masks masks.png

- fg_ari: adjusted Rand index over the pixels of objects, between the true segments and the argmax of the decoder's
  masks at 64 x 64; `attention` scores the attention masks against segments of their own size.
- identity: over whole episodes, frames in which an object is in another slot than in its episode's first frame.
- probes: ridge regression from all slots, trained on `probe` frames, errors on held-out `frames` frames; pixels of the
  512 px table and degrees, median and 90th percentile. "peer" frames are drawn by pygame at 224 px (needs the extra
  `peers`), reduced by the image processor, and read by the probe that was trained on smooth frames.
- alone: object slots drawn with only the background: intersection over union with the whole object (hidden parts
  included), and the share of the pixels of other objects that are drawn.
- content: variance of the agent's slot (planning latent) with the agent near (< 100 px) and away from the block, and
  the root mean square change of position and content between consecutive frames of an episode.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from datasets import load_dataset

from cjepa_hf.data.collect import collect_push_t, sample_encoder_frames
from cjepa_hf.models.color_isa import ColorIsaImageProcessor, ColorIsaModel
from cjepa_hf.simulators.rendering import AGENT_RADIUS, GOAL_POSE, LINE_RADIUS, block_vertices, render_push_t

OBJECTS = ("agent", "goal", "block")
PALETTE = np.array([(255, 255, 255), (214, 39, 40), (44, 160, 44), (31, 119, 180), (255, 187, 0), (148, 103, 189)])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a ColorIsaModel")
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--probe-frames", type=int, default=6000)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1_000_003, help="of the frames and episodes")
    parser.add_argument("--masks", help="write a PNG of mask overlays here")
    parser.add_argument("--output", help="also write the JSON here")
    args = parser.parse_args(argv)
    model = ColorIsaModel.from_pretrained(args.model).eval()
    processor = ColorIsaImageProcessor.from_pretrained(args.model)
    results = {"model": str(args.model), **evaluate_encoder(model, processor, args)}
    text = json.dumps(results, indent=1)
    print(text)
    if args.output:
        temporary = Path(args.output).with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, args.output)


@torch.no_grad()
def evaluate_encoder(model, processor, args) -> dict:
    rng = np.random.default_rng(args.seed)
    seed = int(rng.integers(2**31))
    smooth, states, goals = sample_encoder_frames(args.frames + args.probe_frames, seed=seed)
    held, probe = slice(0, args.frames), slice(args.frames, None)
    slots, attention = encode(model, processor, smooth)
    results = {"frames": args.frames, "probe_frames": args.probe_frames, "episodes": args.episodes, "seed": args.seed}
    masks = decode_masks(model, slots[held])
    results["fg_ari"] = {
        "decoder": mean_fg_ari(segments(states[held], goals[held], masks.shape[-1]), masks.argmax(1)),
        "attention": mean_fg_ari(
            segments(states[held], goals[held], attention.shape[-1]), attention[held].argmax(1).numpy()
        ),
    }
    weights = fit_ridge(slots[probe], targets(states[probe], goals[probe]))
    results["probes"] = {"smooth": probe_errors(weights, slots[held], states[held], goals[held])}
    block_only = fit_ridge(slots[probe][:, 3:4], targets(states[probe], goals[probe]))
    results["probes"]["block_slot_alone"] = {
        k: v
        for k, v in probe_errors(block_only, slots[held][:, 3:4], states[held], goals[held]).items()
        if "block" in k
    }
    for style in ("aliased", "peer"):
        try:
            frames = render_push_t(states[held][:1000], goal_pose=goals[held][:1000], resolution=224, style=style)
        except ImportError:
            continue  # pygame is an extra
        other, _ = encode(model, processor, frames)
        results["probes"][style] = probe_errors(weights, other, states[held][:1000], goals[held][:1000])
    results["alone"] = drawn_alone(model, slots[held], states[held], goals[held])
    results["identity"], results["motion"] = follow_episodes(model, processor, args.episodes, rng)
    results["content"] = agent_content(model, slots[held], states[held])
    if args.masks:
        write_overlays(args.masks, model, smooth[:8], slots[:8], attention[:8])
    return results


def sample_episodes(count, length, rng):
    """States [count, length, 7] of gentle pushes, and a goal pose for each [count, 3]: random, every other default."""
    with tempfile.TemporaryDirectory() as folder:
        seed = int(rng.integers(2**31))
        path = Path(folder) / "episodes"
        collect_push_t(
            path, num_episodes={"train": count}, episode_length=length, seed=seed, num_workers=1, progress=False
        )
        splits = load_dataset(str(path), cache_dir=folder)
        rows = [row["state"] for split in splits.values() for row in split.with_format("numpy")]
    states = np.stack(rows).astype(np.float64)[:, :length]
    goals = np.tile(GOAL_POSE, (count, 1))
    goals[::2] = np.concatenate([rng.uniform(110, 400, (count, 2)), rng.uniform(0, 2 * np.pi, (count, 1))], 1)[::2]
    return states, goals


def encode(model, processor, frames):
    parts = [model(processor(chunk)["pixel_values"]) for chunk in np.array_split(frames, -(-len(frames) // 500))]
    return torch.cat([p.slots for p in parts]), torch.cat([p.masks for p in parts])


def decode_masks(model, slots, **kwargs):
    return np.concatenate([model.decode(part, **kwargs).masks.numpy() for part in slots.split(500)])


def segments(states, goals, size, only=None):
    """True segments, int [n, size, size]: 0 background, 1 agent, 2 goal, 3 block; the label that covers most of the
    pixel. `only`: draw nothing but this label (whole, where others would hide it)."""
    fine = 256
    scale, one = fine / 512, 1 << 4

    def fixed(points):
        return np.rint(((np.asarray(points) + 0.5) * scale - 0.5) * one).astype(np.int32)

    block, goal = fixed(block_vertices(states[:, 2:5], LINE_RADIUS)), fixed(block_vertices(goals))
    agent, labels = fixed(states[:, :2]), np.empty((len(states), size, size), dtype=np.int64)
    for i in range(len(states)):
        canvas = np.zeros((fine, fine), dtype=np.uint8)
        for label, parts in ((2, goal[i]), (3, block[i])):
            for part in parts:
                if only in (None, label):
                    cv2.fillConvexPoly(canvas, part, label, cv2.LINE_8, 4)
        if only in (None, 1):
            cv2.circle(canvas, agent[i].tolist(), round(AGENT_RADIUS * scale * one), 1, -1, cv2.LINE_8, 4)
        shares = [(canvas == k).reshape(size, fine // size, size, -1).mean(axis=(1, 3)) for k in range(4)]
        labels[i] = np.argmax(shares, axis=0)
    return labels


def mean_fg_ari(true, predicted):
    return float(np.mean([rand_index(t[t > 0], p[t > 0]) for t, p in zip(true, predicted)]))


def rand_index(a, b):
    """Adjusted Rand index of two labelings of the same points."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)

    def pairs(x):
        return (x * (x - 1) / 2).sum()

    rows, columns = pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * columns / (len(a) * (len(a) - 1) / 2)
    largest = (rows + columns) / 2
    return 1.0 if largest == expected else float((pairs(table) - expected) / (largest - expected))


def targets(states, goals):
    return np.concatenate(
        [states[:, :4], goals[:, :2], *(f(a)[:, None] for a in (states[:, 4], goals[:, 2]) for f in (np.cos, np.sin))],
        axis=1,
    )


def fit_ridge(slots, values, strength=1e-4):
    x = slots.flatten(1).double().numpy()
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    return np.linalg.solve(x.T @ x + strength * len(x) * np.eye(x.shape[1]), x.T @ values)


def probe_errors(weights, slots, states, goals):
    x = slots.flatten(1).double().numpy()
    p = np.concatenate([x, np.ones((len(x), 1))], axis=1) @ weights

    def turn(predicted, angle):
        difference = np.arctan2(predicted[:, 1], predicted[:, 0]) - angle
        return np.degrees(np.abs((difference + np.pi) % (2 * np.pi) - np.pi))

    errors = {
        "agent_px": np.linalg.norm(p[:, :2] - states[:, :2], axis=1),
        "block_px": np.linalg.norm(p[:, 2:4] - states[:, 2:4], axis=1),
        "block_deg": turn(p[:, 6:8], states[:, 4]),
        "goal_px": np.linalg.norm(p[:, 4:6] - goals[:, :2], axis=1),
        "goal_deg": turn(p[:, 8:10], goals[:, 2]),
    }
    result = {k: {"median": float(np.median(v)), "p90": float(np.quantile(v, 0.9))} for k, v in errors.items()}
    joint = np.hypot(errors["agent_px"], errors["block_px"])
    result["within_tolerance"] = float(((joint < 20) & (errors["block_deg"] < 20)).mean())
    return result


def drawn_alone(model, slots, states, goals):
    result = {}
    true = segments(states, goals, model.config.image_size)
    for label, name in enumerate(OBJECTS, 1):
        mask = decode_masks(model, slots[:, [0, label]], slot_indices=[0, label])[:, 1] > 0.5
        whole = segments(states, goals, model.config.image_size, only=label) == label
        iou = (mask & whole).sum((1, 2)) / (mask | whole).sum((1, 2)).clip(1)
        others = (true > 0) & (true != label) & ~whole
        leak = (mask & others).sum() / others.sum()
        result[name] = {
            "iou_median": float(np.median(iou)),
            "iou_p10": float(np.quantile(iou, 0.1)),
            "leak": float(leak),
        }
    return result


def follow_episodes(model, processor, episodes, rng, length=40):
    """Identity over episodes, and how much the slots move in a frame."""
    states, goals = sample_episodes(episodes, length, rng)
    switches, moves = 0, []
    used = {name: np.zeros(model.config.num_slots, dtype=int) for name in OBJECTS}
    for episode, goal in zip(states, goals):
        slots, _ = encode(model, processor, render_push_t(episode, goal_pose=goal))
        labels = decode_masks(model, slots).argmax(1)
        true = segments(episode, np.broadcast_to(goal, (length, 3)), labels.shape[-1])
        for label, name in enumerate(OBJECTS, 1):
            both = [((labels == k) & (true == label)).sum((1, 2)) for k in range(model.config.num_slots)]
            either = [((labels == k) | (true == label)).sum((1, 2)) for k in range(model.config.num_slots)]
            seen = (true == label).sum((1, 2)) > 0
            slot = (np.array(both) / np.array(either).clip(1)).argmax(0)[seen]
            switches += int((slot != slot[0]).sum()) if len(slot) else 0
            np.add.at(used[name], slot, 1)
        position, content = model.split_slots(slots)
        change = [(position * model.config.position_scale).diff(dim=0), (content * model.content_scale).diff(dim=0)]
        moves.append([c.square().sum(-1).mean(0).numpy() for c in change])
    moves = np.sqrt(np.mean(moves, axis=0))
    names = ("background", *OBJECTS)
    return (
        {"switches": switches, "frames": episodes * length, "slots": {k: v.tolist() for k, v in used.items()}},
        {
            "position_rms": dict(zip(names, moves[0].tolist())),
            "content_rms": dict(zip(names, moves[1].tolist())),
        },
    )


def agent_content(model, slots, states):
    position, content = model.split_slots(slots)
    position, content = position * model.config.position_scale, content * model.content_scale
    near = np.linalg.norm(states[:, :2] - (block_vertices(states[:, 2:5]).mean((1, 2))), axis=1) < 100
    total = lambda x: float(x.var(0).sum())  # noqa: E731
    return {
        "agent_near": total(content[near, 1]),
        "agent_away": total(content[~near, 1]),
        "by_slot": [total(content[:, k]) for k in range(slots.shape[1])],
        "position_by_slot": [total(position[:, k]) for k in range(slots.shape[1])],
    }


def write_overlays(path, model, frames, slots, attention):
    """One row per frame: the frame, attention, decoder segments, reconstruction, and each object with only the
    background."""
    rows = []
    drawn = model.decode(slots)
    for i, frame in enumerate(frames):
        tiles = [frame]
        for masks in (attention[i], drawn.masks[i]):
            color = PALETTE[masks.argmax(0).numpy()].astype(np.uint8)
            tiles.append(cv2.resize(color, frame.shape[:2], interpolation=cv2.INTER_NEAREST))
        tiles.append(drawn.reconstruction[i])
        for k in range(1, model.config.num_slots):
            tiles.append(model.decode(slots[i, [0, k]], slot_indices=[0, k]).reconstruction)
        tiles = [
            t if isinstance(t, np.ndarray) else (t.permute(1, 2, 0).numpy() * 255).astype(np.uint8) for t in tiles
        ]
        tiles = [cv2.resize(t, (160, 160), interpolation=cv2.INTER_NEAREST) for t in tiles]
        rows.append(np.concatenate([np.pad(t, ((2, 2), (2, 2), (0, 0))) for t in tiles], axis=1))
    temporary = Path(path).with_suffix(f".{os.getpid()}.png")
    cv2.imwrite(str(temporary), np.concatenate(rows)[..., ::-1])
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
