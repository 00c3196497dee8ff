#!/usr/bin/env bash
# From nothing to counterfactual rollouts and answers in the collision world: collect scenes, turn them into slots, train
# C-JEPA and OC-JEPA, train ALOE with and without slots, evaluate the world models on the frozen protocol and ALOE on its
# questions. First on slots that are true states (the ceiling of every encoder), then from pixels (steps that start with
# pixel_), with a slot encoder trained on videos. Every step can be run alone, and each continues where it was interrupted:
# run the script again.
#
#     examples/reproduce_clevrer.sh [folder] [step ...]
#     SEED=1 STEPS=20000 examples/reproduce_clevrer.sh runs/collisions_seed_1 world_model oc_jepa evaluate
#
# A world model is trained in two parts, STEPS and then ROLLOUT_STEPS (with a loss on rollouts).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/collisions}
shift || true
steps=${*:-collect slots world_model probe oc_jepa questions aloe aloe_text_only evaluate answers pixel_collect \
  pixel_encoder pixel_slots pixel_world_model pixel_probe pixel_oc_jepa pixel_questions pixel_aloe pixel_evaluate \
  pixel_answers}
seed=${SEED:-0}
mkdir -p "$out"

for step in $steps; do
  started=$SECONDS
  echo "== $step"
  slots=slots
  pixels=()
  if [[ $step == pixel_* ]]; then
    slots=pixel_slots
    # videos do not tell where contacts begin
    pixels=(--slot_encoder "$out/pixel_encoder" --contact_share 0 --turn_share 0.5)
  fi
  case $step in
    collect)
      cjepa-hf collect collisions --output-dir "$out/scenes" --episodes 8000 --validation-episodes 500 \
        --test-episodes 500 --seed 0
      ;;
    pixel_collect)
      cjepa-hf collect collisions --output-dir "$out/videos" --episodes 1000 --validation-episodes 40 --frames 64 --seed 1
      ;;
    pixel_encoder) python "$here/train_crop_slots.py" --dataset "$out/videos" --output_dir "$out/pixel_encoder" ;;
    slots) cjepa-hf extract "$out/scenes" --encoder state --output-dir "$out/slots" ;;
    pixel_slots)  # frames are drawn from the states of the same scenes
      cjepa-hf extract "$out/scenes" --encoder "$out/pixel_encoder" --output-dir "$out/pixel_slots"
      ;;
    *probe)  # with it, the objects that questions name are found
      encoder=state
      if [ "$step" = pixel_probe ]; then encoder=$out/pixel_encoder; fi
      cjepa-hf probe "$out/$slots" --encoder "$encoder" --output-dir "$out/${step%probe}world_model"
      ;;
    *questions)  # the videos that predictive and counterfactual questions are answered from
      cjepa-hf imagine "$out/$slots" --questions "$out/scenes" --model "$out/${step%questions}world_model" \
        --output-dir "$out/${step%questions}question_videos"
      ;;
    *world_model | *oc_jepa)
      masks=()
      if [[ $step == *oc_jepa ]]; then masks=(--num_masked_slots 0); fi
      python "$here/train.py" "$here/collisions/world_model.yaml" --dataset "$out/$slots" "${pixels[@]}" "${masks[@]}" \
        --output_dir "$out/${step}_start" --max_steps "${STEPS:-26000}" --seed "$seed"
      python "$here/train.py" "$here/collisions/world_model_rollout.yaml" --dataset "$out/$slots" "${pixels[@]}" "${masks[@]}" \
        --init_model "$out/${step}_start" --output_dir "$out/$step" --max_steps "${ROLLOUT_STEPS:-4000}" --seed "$seed"
      ;;
    *evaluate)
      text_only=()
      if [ -f "$out/aloe_text_only/model.safetensors" ]; then text_only=(--text-only "$out/aloe_text_only"); fi
      cjepa-hf evaluate --protocol cf-rollout --model "$out/${step%evaluate}world_model" "$out/${step%evaluate}oc_jepa" \
        --dataset "$out/slots" --operator empty drop --occluded "${text_only[@]}" \
        --output "$out/${step%evaluate}cf_rollout.json"
      ;;
    aloe_text_only)  # without slots one frame of zeros says as much as 25, in a fraction of the time
      python "$here/train_aloe.py" "$here/aloe/small.yaml" --text_only true --num_frames 1 --dataset "$out/slots" \
        --questions "$out/scenes/questions/train.json" \
        --validation_questions "$out/scenes/questions/validation.json" --output_dir "$out/$step" --seed "$seed"
      ;;
    *aloe)  # first contacts, then which pairs collide, then questions
      seen=(--annotations "$out/scenes" --slot_probe "$out/${step%aloe}world_model" --seed "$seed")
      python "$here/train_aloe.py" "$here/aloe/contacts.yaml" "${seen[@]}" --dataset "$out/$slots" \
        --output_dir "$out/${step}_contacts"
      python "$here/train_aloe.py" "$here/aloe/statements.yaml" "${seen[@]}" --dataset "$out/$slots" \
        --init_model "$out/${step}_contacts" --output_dir "$out/${step}_statements"
      python "$here/train_aloe.py" "$here/aloe/small.yaml" "${seen[@]}" --statements true \
        --init_model "$out/${step}_statements" --dataset "$out/${step%aloe}question_videos" \
        --questions "$out/scenes/questions/train.json" \
        --validation_questions "$out/scenes/questions/validation.json" --output_dir "$out/$step"
      ;;
    *answers)
      python -m cjepa_hf.evaluation.clevrer "$out/${step%answers}aloe" --text_only "$out/aloe_text_only" \
        --dataset "$out/${step%answers}question_videos" --split test --questions "$out/scenes/questions/test.json" \
        --training_questions "$out/scenes/questions/train.json" --output "$out/$step.json"
      # what it answers where nothing is imagined
      python -m cjepa_hf.evaluation.clevrer "$out/${step%answers}aloe" --dataset "$out/$slots" --split test \
        --questions "$out/scenes/questions/test.json" --output "$out/${step}_observed.json"
      encoder=()  # and from what really happens, as a perfect world model would imagine it
      if [[ $step == pixel_* ]]; then encoder=(--encoder "$out/pixel_encoder"); fi
      cjepa-hf imagine "$out/$slots" --questions "$out/scenes" --model simulator "${encoder[@]}" --splits test \
        --output-dir "$out/${step}_true_videos"
      python -m cjepa_hf.evaluation.clevrer "$out/${step%answers}aloe" --dataset "$out/${step}_true_videos" --split test \
        --questions "$out/scenes/questions/test.json" --output "$out/${step}_true.json"
      ;;
    *) echo "unknown step $step" >&2; exit 2 ;;
  esac
  echo "== $step took $((SECONDS - started)) s"
done
