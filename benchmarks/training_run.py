"""What a training run lowered its losses to, as json: from the files that every training writes into its folder.

python benchmarks/training_run.py runs/savi_small --output benchmarks/results/savi_push_t_small.json
"""

import argparse
import json
from pathlib import Path

from common import write_result

# where a run lives says nothing about it
PLACES = ("output_dir", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_private")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished training")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = [json.loads(line) for line in (args.run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line for line in lines if "loss" in line]
    if not losses:
        raise SystemExit(f"{args.run}/log.jsonl logs no loss")
    arguments = json.loads((args.run / "training_args.json").read_text(encoding="utf-8"))
    for name in ("dataset", "slot_encoder", "init_model"):
        if isinstance(arguments.get(name), str):
            arguments[name] = Path(arguments[name]).name
    results = json.loads((args.run / "training_results.json").read_text(encoding="utf-8"))
    write_result(
        {
            "benchmark": "training_run",
            "run": args.run.name,
            **results,
            "first_logged": losses[0],
            "last_logged": losses[-1],
            "arguments": {name: value for name, value in arguments.items() if name not in PLACES},
        },
        args.output,
    )


if __name__ == "__main__":
    main()
