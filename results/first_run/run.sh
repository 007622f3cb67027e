#!/usr/bin/env bash
# The first run: four models a task with the same data, steps and seed, then their scores in every language.
# Usage: results/first_run/run.sh DATA_ROOT [TASK …]   Finished models and scores are kept, so it can be started again.
set -euo pipefail
cd "$(dirname "$0")/../.."
data_root=$1
shift
launch=(accelerate launch --config_file configs/accelerate/cpu.yaml --num_cpu_threads_per_process "$(nproc)")
declare -A variants=(
  [plain]="--fusion none"
  [dlfa]="--fusion dlfa"
  [ot]="--fusion none --ot_weight 0.1 --ot_epsilon 0.1"
  [dlfa_ot]="--fusion dlfa --ot_weight 0.1 --ot_epsilon 0.1"
)
tasks=("$@")
[ ${#tasks[@]} -gt 0 ] || tasks=(xnli xquad)
for task in "${tasks[@]}"; do
  for variant in plain dlfa ot dlfa_ot; do
    run=runs/first_run/$task/$variant
    if [ ! -f "$run/run.json" ]; then
      rm -rf "$run"
      # shellcheck disable=SC2086
      "${launch[@]}" train_xlfa.py "configs/first_run/$task.yaml" --data_root "$data_root" ${variants[$variant]} \
        --seed 0 --output_dir "$run"
    fi
    if [ ! -f "results/first_run/$task/$variant/scores.json" ]; then
      "${launch[@]}" eval_xlfa.py --model "$run" --task "$task" --data_root "$data_root" --max_examples 310 --bf16 true \
        --output_dir "results/first_run/$task/$variant"
    fi
  done
done
