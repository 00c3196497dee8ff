#!/usr/bin/env bash
# From nothing to the shipped Push-T checkpoint: collect, train the slot encoder, extract slots, train the world model, go on
# with a loss on its rollouts, evaluate. Every step can be run alone, and each continues where it was interrupted: run the
# script again.
#
#     examples/reproduce_pusht.sh [folder] [step ...]   # steps: collect encoder extract world_model rollout evaluate
#     SEED=1 examples/reproduce_pusht.sh runs/push_t_seed_1
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/push_t}
shift || true
steps=${*:-collect encoder extract world_model rollout evaluate}
seed=${SEED:-0}
mkdir -p "$out"

for step in $steps; do
  echo "== $step"
  started=$SECONDS
  case $step in
    collect) cjepa-hf collect push_t --output-dir "$out/episodes" --episodes 10000 --validation-episodes 500 --seed 0 ;;
    encoder) python "$here/train_slot_encoder.py" --output_dir "$out/encoder" --max_steps 4000 --eval_every 1000 --seed "$seed" ;;
    extract) cjepa-hf extract "$out/episodes" --encoder "$out/encoder" --output-dir "$out/slots" ;;
    world_model)
      python "$here/train.py" "$here/push_t/world_model.yaml" --dataset "$out/slots" --slot_encoder "$out/encoder" \
        --output_dir "$out/world_model" --seed "$seed"
      ;;
    rollout)
      python "$here/train.py" "$here/push_t/world_model_rollout.yaml" --dataset "$out/slots" \
        --slot_encoder "$out/encoder" --init_model "$out/world_model" --output_dir "$out/world_model_rollout" --seed "$seed"
      ;;
    evaluate)
      cjepa-hf evaluate --model "$out/world_model_rollout" --planner default --seeds 0 1 2 --controls \
        --output "$out/evaluation.json"
      ;;
    *) echo "unknown step $step" >&2; exit 2 ;;
  esac
  echo "== $step took $((SECONDS - started)) s"
done
