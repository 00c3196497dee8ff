"""Compares models on the same tasks, from the files that `cjepa-hf evaluate --output` wrote, as json.

    python benchmarks/compare_results.py --first cjepa_s0.json cjepa_s1.json --second ocjepa_s0.json ocjepa_s1.json

Files of one side are seeds of one recipe; the k-th files of both sides are compared task by task, then all pairs together.
"""

import argparse
import json
from pathlib import Path

from common import write_result

from cjepa_hf.evaluation.metrics import paired_difference, success_rate


def successes(path: str, row_name: str, seed: int | None) -> tuple[str, list[bool]]:
    """Protocol and success per task (of one planner seed, or all of them in a row) of one evaluation file."""
    results = json.loads(Path(path).read_text())
    rows = [row for row in results["rows"] if row["name"] == row_name and seed in (None, row["seed"])]
    if not rows:
        names = sorted({(row["name"], row["seed"]) for row in results["rows"]})
        raise SystemExit(f"{path} has no row {row_name!r} of planner seed {seed}; it has {names}")
    rows = [row["success"] for row in rows]
    return results["protocol"]["name"], [value for row in rows for value in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", nargs="+", required=True)
    parser.add_argument("--second", nargs="+", required=True)
    parser.add_argument("--row", default="default", help="which planner's rows (default: %(default)s)")
    parser.add_argument("--second_row", help="of the second files, where it has another name")
    parser.add_argument("--planner_seed", type=int, help="only this seed of the planner (all without)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    second_row = args.second_row or args.row
    if len(args.first) != len(args.second):
        parser.error(f"{len(args.first)} files against {len(args.second)}: give the same seeds of both")
    pairs, first, second = [], [], []
    for a, b in zip(args.first, args.second):
        protocol, x = successes(a, args.row, args.planner_seed)
        other, y = successes(b, second_row, args.planner_seed)
        if protocol != other:
            parser.error(f"{a} is of {protocol}, {b} of {other}")
        pairs.append({"first": a, "second": b, "rates": [success_rate(x), success_rate(y)], **paired_difference(x, y)})
        first, second = first + x, second + y
    together = {"rates": [success_rate(first), success_rate(second)], **paired_difference(first, second)}
    rows = {"row": args.row} if second_row == args.row else {"row": args.row, "second_row": second_row}
    rows |= {"planner_seed": args.planner_seed}
    write_result({"protocol": protocol, **rows, "pairs": pairs, "together": together}, args.output)


if __name__ == "__main__":
    main()
