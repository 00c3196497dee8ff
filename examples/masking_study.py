"""Where does hiding objects in training pay? Trains world models on slots of collision scenes and compares their rollouts.

    python examples/masking_study.py --dataset runs/collisions/slots --output-dir runs/masking            # all cells, cheap ones first
    python examples/masking_study.py --dataset runs/collisions/slots --output-dir runs/masking --only 1x  # cells whose name has "1x"
    python examples/masking_study.py --output-dir runs/masking --table                                    # what is there so far

A cell is a variant, a budget (1x is --steps) and a seed. It is trained (an interrupted training continues), evaluated on the
frozen protocol cf-rollout, also with one object's history hidden, and leaves `results.json` in its folder: the same command
goes on with what is missing. The table is made from these files alone and names the cells that are missing. Those measured so
far are in `benchmarks/results/masking`.

Cells named "learned-..." are trained on the same scenes seen by an encoder (--learned-dataset, --slot-encoder), those named
"few-..." on few scenes (--few-dataset; measured on 200: `cjepa-hf extract SCENES --encoder state --num-frames 25600`). They run
where these data are given.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parent / "collisions" / "world_model.yaml"
# What differs from the recipe, which hides objects after 2 frames in half of the samples.
ONE_TO_THREE = ["--num_masked_slots", "1,3"]
VARIANTS = {
    "oc": ["--num_masked_slots", "0"],
    "prefix2-p0.5": ONE_TO_THREE,
    "prefix1-p1": [*ONE_TO_THREE, "--visible_prefix", "1", "--mask_probability", "1"],
    "prefix1-p0.5": [*ONE_TO_THREE, "--visible_prefix", "1"],
    "hide1": ["--num_masked_slots", "1"],
    "hide2": ["--num_masked_slots", "2"],
    "hide3": ["--num_masked_slots", "3"],
}
PAIR = ("oc", "hide1")  # nothing hidden, and the best of those that hide objects: these two also elsewhere
ELSEWHERE = ("learned-", "few-")
BUDGETS = {"1x": 1, "3x": 3, "10x": 10}
SEEDS = (0, 1, 2)
# 95 % of Student's t on n - 1 degrees of freedom, for n seeds
T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
COLUMNS = {
    "F1 as it is": lambda r: r["factual"][-1]["f1"]["value"],
    "error +32": lambda r: _row(r)["position_error"]["32"]["value"],
    "error +64": lambda r: _row(r)["position_error"]["64"]["value"],
    "four cells": lambda r: _row(r)["cell_mean"]["value"],
    "third object": lambda r: _rate(_row(r)["third_object"]),
    "informative": lambda r: _rate(_row(r)["informative"]),
    "hidden +16": lambda r: _hidden(r, "hidden"),
    "filled in +16": lambda r: _hidden(r, "filled in at constant velocity"),
}


def cells() -> list[tuple[str, str, int]]:
    """(variant, budget, seed) of every cell, cheap ones first."""
    variants = [*VARIANTS, *(where + variant for where in ELSEWHERE for variant in PAIR)]
    found = [(variant, "1x", seed) for variant in variants for seed in SEEDS]
    return found + [(variant, budget, seed) for budget in ("3x", "10x") for variant in PAIR for seed in SEEDS]


def dataset_of(cell: tuple[str, str, int], args: argparse.Namespace) -> Path | None:
    """What a cell is trained on; None if it was not given."""
    where = next((where for where in ELSEWHERE if cell[0].startswith(where)), "")
    return {"": args.dataset, "learned-": args.learned_dataset, "few-": args.few_dataset}[where]


def name_of(cell: tuple[str, str, int]) -> str:
    return f"{cell[0]}_{cell[1]}_seed{cell[2]}"


def run_cell(cell: tuple[str, str, int], args: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates a cell in its folder."""
    from cjepa_hf.evaluation.counterfactual import evaluate_cf_rollout
    from cjepa_hf.training.cjepa import main as train
    from cjepa_hf.training.trainer import write_text

    variant, budget, seed = cell
    folder = args.output_dir / name_of(cell)
    learned = variant.startswith("learned-")
    words = [str(RECIPE), "--dataset", str(dataset_of(cell, args))]
    words += ["--output_dir", str(folder), "--seed", str(seed), "--max_steps", str(BUDGETS[budget] * args.steps)]
    words += VARIANTS[variant if variant in VARIANTS else variant.partition("-")[2]]
    if learned:
        words += ["--contact_share", "0", "--turn_share", "0.5"]  # videos do not tell where contacts begin
    train([*words, *args.more])
    results = evaluate_cf_rollout(
        [str(folder)],
        dataset=str(args.dataset),
        slot_encoder=args.slot_encoder if learned else None,
        num_tasks=args.num_tasks,
        starts=("B",),
        occluded=True,
        true_videos=False,
    )
    write_text(folder / "results.json", json.dumps({"cell": cell, **results}, indent=1))
    return results


def _row(results, name=None):
    (label,) = results["models"]
    (row,) = [row for row in results["rows"] if row["name"] == (name or label) and row["start"] == "B"]
    return row


def _rate(score):
    return None if score is None else score["rate"]


def _hidden(results, how):
    (label,) = results["models"]
    rows = [row for row in results.get("occluded", ()) if row["name"] == f"{label}, {how}"]
    return rows[0]["position_error"]["16"]["value"] if rows else None


def summarize(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean over seeds with its 95 % interval (none from one seed)."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "n": 0}
    result = {"mean": statistics.fmean(known), "n": len(known)}
    if len(known) > 1:
        half = T_QUANTILE[len(known)] * statistics.stdev(known) / math.sqrt(len(known))
        result |= {"low": result["mean"] - half, "high": result["mean"] + half}
    return result


def tabulate(folder: Path, wanted: Iterable[tuple[str, str, int]]) -> dict[str, Any]:
    """{"rows": one per variant and budget, "differences": of the pair, seed by seed, "controls", "missing"} from the result files."""
    found, missing = {}, []
    for cell in wanted:
        path = folder / name_of(cell) / "results.json"
        if path.is_file():
            results = json.loads(path.read_text(encoding="utf-8"))
            found.setdefault(cell[:2], {})[cell[2]] = results
        else:
            missing.append(name_of(cell))
    rows = [
        {
            "variant": variant,
            "budget": budget,
            **{c: summarize([read(r) for r in runs.values()]) for c, read in COLUMNS.items()},
        }
        for (variant, budget), runs in found.items()
    ]
    differences = []
    for (variant, budget), runs in found.items():
        others = found.get((variant.removesuffix(PAIR[1]) + PAIR[0], budget), {})
        both = sorted(runs.keys() & others.keys())
        if variant.endswith(PAIR[1]) and both:
            pairs = {c: [(read(runs[seed]), read(others[seed])) for seed in both] for c, read in COLUMNS.items()}
            gaps = {c: summarize([a - b for a, b in values if None not in (a, b)]) for c, values in pairs.items()}
            differences.append({"variant": f"{variant} - {PAIR[0]}", "budget": budget, **gaps})
    controls = []
    if found:
        run = next(iter(next(iter(found.values())).values()))
        for name in ("copy the video", "constant velocity", "true positions"):
            row = _row(run, name)
            controls.append({"name": name, "error +32": row["position_error"]["32"]["value"],
                             "error +64": row["position_error"]["64"]["value"], "four cells": row["cell_mean"]["value"],
                             "third object": _rate(row["third_object"]), "informative": _rate(row["informative"])})  # fmt: skip
    return {"rows": rows, "differences": differences, "controls": controls, "missing": missing}


def print_table(table: dict[str, Any]) -> None:
    print(f"{'':<26}" + "".join(f"{name:<28}" for name in COLUMNS))
    for row in [*table["rows"], *table["differences"]]:
        line = f"{row['variant'] + ' ' + row['budget']:<26}"
        for name in COLUMNS:
            value = row[name]
            text = "-" if value["mean"] is None else f"{value['mean']:.3f}"
            text += f" [{value['low']:.3f}, {value['high']:.3f}]" if "low" in value else ""
            line += f"{text + ' n=' + str(value['n']):<28}"
        print(line)
    for row in table["controls"]:
        cells = (f"{row[name]:.3f}" if row.get(name) is not None else "-" for name in COLUMNS)
        print(f"{row['name']:<26}" + "".join(f"{cell:<28}" for cell in cells))
    if table["missing"]:
        print(f"\nmissing cells ({len(table['missing'])}): {', '.join(table['missing'])}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, help="state slots with the splits train and validation")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--learned-dataset", type=Path, help="the same scenes' slots by --slot-encoder")
    parser.add_argument("--slot-encoder", help="folder or Hub id")
    parser.add_argument("--few-dataset", type=Path, help="state slots of few scenes, with the same splits")
    parser.add_argument("--steps", type=int, default=6500, help="of the budget 1x (default: %(default)s)")
    parser.add_argument("--num-tasks", type=int, help="scenes of the protocol (default: all)")
    parser.add_argument("--only", nargs="+", default=[""], help="cells whose name contains one of these")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further arguments of every training")
    args = parser.parse_args(argv)
    if args.learned_dataset is not None and args.slot_encoder is None:
        parser.error("--learned-dataset needs the --slot-encoder that made it")
    if not args.table and args.dataset is None:
        parser.error("--dataset is needed to train")
    wanted = cells()
    chosen = [cell for cell in wanted if any(part in name_of(cell) for part in args.only)]
    if not chosen:
        parser.error(f"no cell is named like {args.only}; there are {', '.join(map(name_of, wanted))}")
    for cell in [] if args.table else chosen:
        if (args.output_dir / name_of(cell) / "results.json").is_file() or dataset_of(cell, args) is None:
            continue
        print(f"== {name_of(cell)}", flush=True)
        run_cell(cell, args)
    table = tabulate(args.output_dir, wanted)
    print_table(table)
    if args.output_dir.is_dir():
        (args.output_dir / "table.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    return table


if __name__ == "__main__":
    main()
