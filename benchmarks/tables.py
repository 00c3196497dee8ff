"""Prints the tables of docs/results.md and README.md from the files in benchmarks/results/.

    python benchmarks/tables.py             # all of them, as Markdown
    python benchmarks/tables.py --check     # which of them the pages do not have as printed (exit status 1 if any)

A row of a page is text and numbers; the numbers are looked up here, so that nothing on a page was typed.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "examples"))


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def head(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |".replace("|  |", "| |"), "|" + "---|" * len(cells)]


def within(score: dict, key: str = "rate") -> str:
    return f"{score[key]:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def one(rows: list[dict], **wanted) -> dict:
    (found,) = [r for r in rows if all(r.get(name) == value for name, value in wanted.items())]
    return found


# --- Push-T --------------------------------------------------------------------------------------------------------

PUSH_T = [  # text, file, name of the row there
    ("**C-JEPA from pixels and current proprioception** (ships: seed 0, then 4,000 steps with a loss on rollouts)", "cjepa_shipped", "default"),
    ("the shipped model, `--planner sampling`", "cjepa_shipped_sampling", "sampling"),
    ("C-JEPA, training seed 0, `--planner sampling`", "cjepa_seed0", "sampling"),
    ("C-JEPA, training seed 1, the same", "cjepa_seed1", "sampling"),
    ("C-JEPA, training seed 2, the same", "cjepa_seed2", "sampling"),
    ("OC-JEPA (nothing masked), same data, steps and planner, seed 0", "ocjepa_seed0", "sampling"),
    ("OC-JEPA, seed 1", "ocjepa_seed1", "sampling"),
    ("OC-JEPA, seed 2", "ocjepa_seed2", "sampling"),
    ("the shipped model, the paper's planner (`--planner paper`)", "cjepa_shipped_paper_planner", "paper"),
    ("the shipped model on frames drawn without anti-aliasing, as the peers' (`--style aliased`)", "cjepa_shipped_aliased_frames", "default"),
    ("the shipped model from pixels alone (`--no-proprio`)", "cjepa_shipped_no_proprio", "default, no proprioception"),
    ("the true simulator as the model, `sampling`, cost on true positions (`--simulator 200`)", "true_simulator", "true simulator, sampling"),
    ("replayed demonstration", "cjepa_shipped", "replay"),
    ("random actions", "cjepa_shipped", "random"),
    ("no-op", "cjepa_shipped", "no-op"),
]  # fmt: skip


def push_t() -> list[str]:
    lines = head("on 200 tasks", "success", "95 % interval", "block moves < 75 px", ">= 75 px")
    for text, file, name in PUSH_T:
        result = one(read(f"pusht-25_{file}.json")["rows"], name=name, seed=0)
        near, far = (result["bins"][place] for place in ("near", "far"))
        numbers = f"{result['rate']:.3f}", f"{result['low']:.3f} - {result['high']:.3f}"
        lines.append(row(text, *numbers, f"{near['rate']:.2f}", f"{far['rate']:.2f}"))
    return lines


def push_t_short() -> list[str]:
    timed = {
        r["name"]: r["plans_per_task"] * r["seconds_per_plan"]
        for r in read("pusht-25_planning_time_20_tasks.json")["rows"]
    }
    shipped = read("pusht-25_cjepa_shipped.json")
    paper = one(read("pusht-25_cjepa_shipped_paper_planner.json")["rows"], name="paper")
    simulator = one(read("pusht-25_true_simulator.json")["rows"], name="true simulator, sampling")
    lines = head("", "tasks solved", "s per task, two CPU cores")
    lines += [
        row("**C-JEPA from pixels and current proprioception** (ships), three planner seeds",
            within(shipped["pooled"]["default"]), f"{timed['default']:.2f}"),
        row("the same model with the paper's planner", within(paper), f"{timed['paper']:.1f}"),
        f"| the true simulator in the model's place | {within(simulator)} | |",
        f"| replayed demonstration | {within(one(shipped['rows'], name='replay'))} | |",
        f"| random actions | {within(one(shipped['rows'], name='random'))} | |",
    ]  # fmt: skip
    return lines


# --- cf-rollout ----------------------------------------------------------------------------------------------------

COLLISIONS = [  # text, file, name of the row, name of the row of the video as it goes on (or None)
    ("copy what happened", "states", "copy the video", None),
    ("constant velocity, true states", "states", "constant velocity", "constant velocity"),
    ("**C-JEPA on true states**", "states", "world_model, empty", "world_model"),
    ("OC-JEPA (nothing masked), same data and steps, true states", "states", "oc_jepa, empty", "oc_jepa"),
    ("C-JEPA on true states, nothing removed", "states", "world_model, no removal", None),
    ("C-JEPA on true states, a wrong object removed", "states", "world_model, wrong object", None),
    ("the true counterfactual (reads contacts)", "states", "true positions", "true video"),
    ("constant velocity, from pixels", "pixels", "constant velocity", "constant velocity"),
    ("**C-JEPA from pixels** (ships)", "pixels", "pixel_world_model, empty", "pixel_world_model"),
    ("OC-JEPA (nothing masked), same data and steps, from pixels", "pixels", "pixel_oc_jepa, empty", "pixel_oc_jepa"),
    ("the true counterfactual video through the encoder", "pixels", "true counterfactual video", "true video"),
]
COLLISIONS_SHORT = [
    ("copy what happened", "states", "copy the video"),
    ("constant velocity, from pixels", "pixels", "constant velocity"),
    ("**C-JEPA from pixels** (ships)", "pixels", "pixel_world_model, empty"),
    ("C-JEPA on true states", "states", "world_model, empty"),
    ("the true video, through the same encoder", "pixels", "true counterfactual video"),
]


def collisions() -> list[str]:
    ahead = ("16", "32", "48", "64")
    lines = head("from the first contact on", *(f"+{h}" for h in ahead), "four cells", "third object", "F1 as it is")
    for text, file, name, factual in COLLISIONS:
        results = read(f"cf-rollout_{file}.json")
        result = one(results["rows"], name=name, start="B")
        errors = (f"{result['position_error'][h]['value']:.3f}" for h in ahead)
        f1 = "-" if factual is None else within(one(results["factual"], name=factual)["f1"], "value")
        third = f"{result['third_object']['rate']:.3f}"
        lines.append(row(text, *errors, within(result["cell_mean"], "value"), third, f1))
    return lines


def collisions_short() -> list[str]:
    lines = head("", "error +64", "accuracy")
    for text, file, name in COLLISIONS_SHORT:
        result = one(read(f"cf-rollout_{file}.json")["rows"], name=name, start="B")
        lines.append(row(text, f"{result['position_error']['64']['value']:.3f}", within(result["cell_mean"], "value")))
    return lines


# --- masking study -------------------------------------------------------------------------------------------------

HIDDEN = {
    "oc": "nothing (OC-JEPA)",
    "hide1": "1 object, after 2 frames, in half of the samples",
    "hide2": "2 objects, after 2 frames, in half of the samples",
    "hide3": "3 objects, after 2 frames, in half of the samples",
    "prefix2-p0.5": "1 to 3 objects, after 2 frames, in half of the samples",
    "prefix1-p0.5": "1 to 3, after 1 frame, in half of the samples",
    "prefix1-p1": "1 to 3, after 1 frame, in every sample (as published)",
}
MASKING = ("F1 as it is", "error +64", "four cells", "third object", "hidden +16", "filled in +16")


def masking(budget: str, where: str = "") -> list[str]:
    """One table: the cells of a budget with all their seeds; `where` is "learned-", "few-" or nothing."""
    import masking_study

    table = masking_study.tabulate(RESULTS / "masking", masking_study.cells())
    lines = head(
        "hidden in training", "F1 as it is", "error +64", "four cells", "third object", "hidden object, +16",
        "the same, filled in at constant velocity",
    )  # fmt: skip
    for variant, text in HIDDEN.items():
        for found in table["rows"]:
            whole = found["four cells"]["n"] == len(masking_study.SEEDS)
            if (found["variant"], found["budget"]) == (where + variant, budget) and whole:
                cells = (found[name] for name in MASKING)
                lines.append(row(text, *(within(cell, "mean") for cell in cells)))
    return lines


# --- answers -------------------------------------------------------------------------------------------------------

ANSWERS = [  # text, file, kind of row
    ("**ALOE, from pixels** (ships)", "answers_pixels.json", "model"),
    ("the same, shown what really happens", "answers_pixels_true.json", "model"),
    ("the same, nothing imagined", "answers_pixels_observed.json", "model"),
    ("an ALOE that reads the words alone", "answers_pixels.json", "text-only"),
    ("the most frequent answer", "answers_pixels.json", "majority"),
]
TYPES = ("descriptive", "explanatory", "predictive", "counterfactual")


def answers() -> list[str]:
    lines = head("", *TYPES)
    for part in ("questions", "options"):
        first = one(read(ANSWERS[0][1])["rows"], kind="model")[part]
        counts = (f" n = {first[kind]['n']:,} " if kind in first else " " for kind in TYPES)
        lines.append(f"| *{part} right* |{'|'.join(counts)}|")
        for text, file, kind in ANSWERS:
            scores = one(read(file)["rows"], kind=kind)[part]
            cells = (f" {within(scores[name])} " if name in scores else " " for name in TYPES)
            lines.append(f"| {text} |{'|'.join(cells)}|")
    return lines


def answers_short() -> list[str]:
    lines = head("", *TYPES)
    for text, file, kind in ANSWERS[:4]:
        scores = one(read(file)["rows"], kind=kind)["questions"]
        text = text.replace("ALOE, from pixels", "a small ALOE")
        lines.append(row(text, *(within(scores[name]) for name in TYPES)))
    return lines


# --- influence -----------------------------------------------------------------------------------------------------


ALONE = ["leave_one_out"]
PUSH_T_INFLUENCE = [  # text, kind of model, measures
    ("constant velocity (no model)", "C-JEPA", ["constant_velocity"]),
    ("C-JEPA, leaving the entity out", "C-JEPA", ALONE),
    ("OC-JEPA, leaving the entity out", "OC-JEPA", ALONE),
    ("C-JEPA, gradient x input", "C-JEPA", ["gradient_x_input"]),
    ("C-JEPA, attention (best of four layers; rolled out)", "C-JEPA", ["attention_3", "attention_rollout"]),
]
COLLISION_INFLUENCE = [
    ("constant velocity (no model)", "C-JEPA", ["constant_velocity"]),
    ("C-JEPA, leaving the other object out", "C-JEPA", ALONE),
    ("OC-JEPA, leaving the other object out", "OC-JEPA", ALONE),
    ("C-JEPA, gradient x input", "C-JEPA", ["gradient_x_input"]),
    ("C-JEPA, attention (last layer; rolled out)", "C-JEPA", ["attention_3", "attention_rollout"]),
]


def influence(file: str, target: str, rows: list[tuple[str, str, list[str]]]) -> list[str]:
    """AUROC of whom the simulator saw touch, on pairs matched by distance; no intervals where a cell holds several measures."""
    lines = head(
        "on pairs matched by distance", f"{target} hidden in the history", f"{target} visible, its future asked"
    )
    touching = [mean for mean in read(file)["means"] if mean["truth"] == "touches"]
    for text, kind, measures in rows:
        cells = []
        for setting in ("masked", "future"):
            found = [one(touching, setting=setting, kind=kind, measure=m)["matched_auroc"] for m in measures]
            several = "; ".join(f"{score['value']:.3f}" for score in found)
            cells.append(several if len(found) > 1 else within(found[0], "value"))
        lines.append(row(text, *cells))
    return lines


def tables() -> list[tuple[str, str, list[str]]]:
    """(page, what it is, its lines) of every table."""
    return [
        ("docs/results.md", "Push-T", push_t()),
        ("README.md", "Push-T", push_t_short()),
        ("docs/results.md", "collisions", collisions()),
        ("README.md", "collisions", collisions_short()),
        ("docs/results.md", "masking, 1x", masking("1x")),
        ("docs/results.md", "masking, 3x", masking("3x")),
        ("docs/results.md", "masking, slots from pixels", masking("1x", "learned-")),
        ("docs/results.md", "masking, few scenes", masking("1x", "few-")),
        ("docs/results.md", "answers", answers()),
        ("README.md", "answers", answers_short()),
        ("docs/results.md", "influence, Push-T", influence("influence_push_t.json", "block", PUSH_T_INFLUENCE)),
        (
            "docs/results.md",
            "influence, collisions",
            influence("influence_collisions.json", "object", COLLISION_INFLUENCE),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the pages instead of printing")
    args = parser.parse_args()
    missing = 0
    for page, name, lines in tables():
        text = (ROOT / page).read_text(encoding="utf-8")
        if not args.check:
            print(f"{page}: {name}\n\n" + "\n".join(lines) + "\n")
        elif "\n".join(lines) not in text:
            missing += 1
            print(f"{page}: {name} is not as the files say; these lines are not on the page:")
            print("\n".join(line for line in lines if line not in text))
    if missing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
