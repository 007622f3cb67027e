#!/usr/bin/env bash
# Trains and scores the models of results/tasks. Usage: results/tasks/run.sh DATA_ROOT [train|score|pawsx|retrieval|rankc …]
# Finished models and scores are kept, so it can be started again.
set -euo pipefail
cd "$(dirname "$0")/../.."
data_root=$(realpath "$1")
shift
launch=(accelerate launch --config_file configs/accelerate/cpu.yaml --num_cpu_threads_per_process "$(nproc)")
encoder=packaged:multilingual-e5-small

train() { # run folder, configuration, flags
  if [ ! -f "$1/run.json" ]; then
    resume=()
    if compgen -G "$1/checkpoint-*/trainer_state.json" > /dev/null; then resume=(--resume_from_checkpoint true); fi
    "${launch[@]}" train_xlfa.py "configs/tasks/$2.yaml" --seed 0 --output_dir "$1" "${resume[@]}" "${@:3}"
  fi
}

train_taggers() {
  for task in udpos wikiann; do
    for fusion in none dlfa; do
      train "runs/tasks/$task/$fusion" "$task" --data_root "$data_root" --fusion "$fusion"
    done
  done
}

train_alignment() {
  for weight in 0 0.1; do
    train "runs/tasks/alignment/ot_weight-$weight" alignment --data_root "$data_root" --ot_weight "$weight"
  done
}

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(train)
for part in "${parts[@]}"; do
  case $part in
    train)
      train_taggers
      train_alignment
      ;;
  esac
done
