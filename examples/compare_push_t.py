"""The paper's comparison and its ablations on our Push-T, on equal terms: `cjepa-hf evaluate --suite NAME` runs the same code.

    # baselines: patch tokens (DINO-WM), slots with the autoregressive predictor (OC-DINO-WM), OC-JEPA, C-JEPA
    python examples/compare_push_t.py --episodes runs/push_t/episodes --encoder runs/push_t/encoder --output-dir runs/compare

    # ablations; they need slots alone
    python examples/compare_push_t.py --suite masking --slots runs/push_t/slots --encoder runs/push_t/encoder --output-dir runs/compare
    python examples/compare_push_t.py --suite auxiliary ...
    python examples/compare_push_t.py --suite flags ...

    python examples/compare_push_t.py --suite masking --output-dir runs/compare --table      # what is there so far

Every model of a suite sees the same episodes, steps, batches, optimizer, tasks of `pusht-25` and planner, with 3 seeds; wall
time, CPU time and memory are recorded. A cell (a variant and a seed) is done when its json in OUTPUT_DIR/SUITE exists: the same
command goes on with what is missing, and a training that was interrupted continues. `--only c-jepa` or `--only "*seed0"` picks
cells, so that several processes or machines can share a suite (let one of them extract the data first). Every call prints the
table and writes it as json, csv and png to OUTPUT_DIR. Nothing is mixed: other steps, tasks or data need another OUTPUT_DIR.

Budgets. CPU time of one core (2 of them at most 2 times faster, in two processes with `OMP_NUM_THREADS=1` and different `--only`), from
step rates measured while the machine was busy: rough, rather too high. `--size small` is the default, 16,000 steps and 200 tasks:

    cell                   step      training    planning 200 tasks    a plan by the paper's CEM
    slots                  0.12 s    32 min      4 min                 13 s (autoregressive: 10 s)
    slots, suite masking   0.16 s    42 min      6 min (3 frames)
    64 patches             1.9 s     8.5 h       40 min                160 s

and with the paper's layers, heads, widths and batch of 256 (`--size paper`): slots 2.1 to 2.8 s a step (9 to 13 h) and 80 to 100 s
a plan by the paper's CEM, 64 patches 86 s a step (16 days) and 37 min a plan: for a GPU.

About 3 core-hours each (A is `python examples/compare_push_t.py --output-dir runs/compare_3h --encoder runs/push_t/encoder`):

    A --episodes runs/push_t/episodes --num-frames 100000 --max-steps 1000 --num-tasks 100
    A --suite masking   --slots runs/push_t/slots --max-steps 2000 --num-tasks 100
    A --suite auxiliary --slots runs/push_t/slots --max-steps 5000
    A --suite flags     --slots runs/push_t/slots --max-steps 2500 --num-tasks 100

About 10 core-hours each (the same with another `--output-dir`; the first writes 13 GB of patch tokens, its cache included):

    A --episodes runs/push_t/episodes --num-frames 300000 --max-steps 4000
    A --suite masking   --slots runs/push_t/slots --max-steps 7000
    A --suite auxiliary --slots runs/push_t/slots                       # 8 hours: everything
    A --suite flags     --slots runs/push_t/slots --max-steps 9000
    A --size paper --slots runs/push_t/slots --only c-jepa oc --max-steps 1000 --num-tasks 50

The whole: `push-t` 33 h (31 GB of patch tokens), `masking` 19 h, `auxiliary` 8 h, `flags` 16 h.
"""

from cjepa_hf.evaluation.comparison import main

if __name__ == "__main__":
    main(suite="push-t")
