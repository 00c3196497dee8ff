#!/usr/bin/env bash
# From nothing to counterfactual rollouts and answers in the collision world, on slots that are true states (the ceiling of
# every encoder): collect scenes, turn them into slots, train C-JEPA and OC-JEPA, train ALOE with and without slots, evaluate
# the world models on the frozen protocol and ALOE on its questions. Every step can be run alone, and each continues where it
# was interrupted: run the script again.
#
#     examples/reproduce_clevrer.sh [folder] [step ...]
#     SEED=1 STEPS=20000 examples/reproduce_clevrer.sh runs/collisions_seed_1 world_model oc_jepa evaluate
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/collisions}
shift || true
steps=${*:-collect slots world_model oc_jepa aloe aloe_text_only evaluate answers}
seed=${SEED:-0}
train=(--max_steps "${STEPS:-20000}" --seed "$seed")
mkdir -p "$out"

for step in $steps; do
  echo "== $step"
  case $step in
    collect)
      cjepa-hf collect collisions --output-dir "$out/scenes" --episodes 8000 --validation-episodes 500 \
        --test-episodes 500 --seed 0
      ;;
    slots) cjepa-hf extract "$out/scenes" --encoder state --output-dir "$out/slots" ;;
    world_model)
      python "$here/train.py" "$here/collisions/world_model.yaml" --dataset "$out/slots" \
        --output_dir "$out/world_model" "${train[@]}"
      ;;
    oc_jepa)
      python "$here/train.py" "$here/collisions/world_model.yaml" --dataset "$out/slots" \
        --output_dir "$out/oc_jepa" --num_masked_slots 0 "${train[@]}"
      ;;
    evaluate)
      text_only=()
      if [ -f "$out/aloe_text_only/model.safetensors" ]; then text_only=(--text-only "$out/aloe_text_only"); fi
      cjepa-hf evaluate --protocol cf-rollout --model "$out/world_model" "$out/oc_jepa" --dataset "$out/slots" \
        --operator empty drop --occluded "${text_only[@]}" --output "$out/cf_rollout.json"
      ;;
    aloe | aloe_text_only)
      zeros=()
      if [ "$step" = aloe_text_only ]; then zeros=(--text_only true); fi
      python "$here/train_aloe.py" "$here/aloe/small.yaml" --dataset "$out/slots" \
        --questions "$out/scenes/questions/train.json" \
        --validation_questions "$out/scenes/questions/validation.json" --output_dir "$out/$step" --seed "$seed" "${zeros[@]}"
      ;;
    answers)
      python -m cjepa_hf.evaluation.clevrer "$out/aloe" --text_only "$out/aloe_text_only" --dataset "$out/slots" \
        --split test --questions "$out/scenes/questions/test.json" \
        --training_questions "$out/scenes/questions/train.json" --output "$out/answers.json"
      ;;
    *) echo "unknown step $step" >&2; exit 2 ;;
  esac
done
