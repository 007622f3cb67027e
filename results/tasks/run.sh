#!/usr/bin/env bash
# Trains and scores the models of results/tasks.
# Usage: results/tasks/run.sh DATA_ROOT [train|taggers|xnli|xquad|pawsx|retrieval|rankc …]
# (by default all of them, in this order)
# Finished models and scores are kept, so it can be started again.
set -euo pipefail
cd "$(dirname "$0")/../.."
data_root=$(realpath "$1")
shift
launch=(accelerate launch --config_file configs/accelerate/cpu.yaml --num_cpu_threads_per_process "$(nproc)")
encoder=packaged:multilingual-e5-small
results=results/tasks

train() { # run folder, configuration, data root, flags
  if [ ! -f "$1/run.json" ]; then
    resume=()
    if compgen -G "$1/checkpoint-*/trainer_state.json" > /dev/null; then resume=(--resume_from_checkpoint true); fi
    "${launch[@]}" train_xlfa.py "configs/tasks/$2.yaml" --seed 0 --output_dir "$1" --data_root "$3" "${resume[@]}" \
      "${@:4}"
  fi
}

score() { # run folder, task, data root, folder of the scores, flags
  if [ ! -f "$4/scores.json" ]; then
    "${launch[@]}" eval_xlfa.py --model "$1" --task "$2" --data_root "$3" --output_dir "$4" "${@:5}"
  fi
}

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(train taggers xnli xquad pawsx retrieval rankc)
for part in "${parts[@]}"; do
  case $part in
    train)
      for task in udpos wikiann; do
        for fusion in none dlfa; do
          train "runs/tasks/$task/$fusion" "$task" "$data_root" --fusion "$fusion"
        done
      done
      for weight in 0 0.1; do
        train "runs/tasks/alignment/ot_weight-$weight" alignment "$data_root" --ot_weight "$weight"
      done
      # Made for benchmarks/scoring.py.
      train runs/tasks/xquad xquad "$data_root"
      ;;
    taggers)
      for task in udpos wikiann; do
        for fusion in none dlfa; do
          score "runs/tasks/$task/$fusion" "$task" "$data_root" "$results/$task/$fusion" --max_examples 1000
        done
        accelerate launch --config_file configs/accelerate/cpu.yaml eval_xlfa.py --task "$task" \
          --compare "$results/$task/none" "$results/$task/dlfa" --output_dir "$results/$task"
      done
      ;;
    xnli)
      for weight in 0 0.1; do
        score "runs/tasks/alignment/ot_weight-$weight" xnli "$data_root" "$results/xnli/ot_weight-$weight" \
          --max_examples 620
      done
      accelerate launch --config_file configs/accelerate/cpu.yaml eval_xlfa.py --task xnli \
        --compare "$results/xnli/ot_weight-0" "$results/xnli/ot_weight-0.1" --output_dir "$results/xnli"
      ;;
    xquad)
      score runs/tasks/xquad xquad "$data_root" "$results/xquad" --max_examples 120
      ;;
    pawsx)
      [ -d runs/tasks/pawsx_root ] || python results/tasks/split_pawsx.py "$data_root" runs/tasks/pawsx_root
      train runs/tasks/pawsx pawsx runs/tasks/pawsx_root
      score runs/tasks/pawsx pawsx runs/tasks/pawsx_root "$results/pawsx"
      ;;
    retrieval | rankc)
      flags=()
      [ "$part" = retrieval ] || flags=(--dataset local/bmlama17 --max_examples 1000)
      for model in "$encoder" runs/tasks/alignment/ot_weight-0 runs/tasks/alignment/ot_weight-0.1; do
        folder=$results/$part/before
        [ "$model" = "$encoder" ] || folder=$results/$part/$(basename "$model")
        [ -f "$folder/$part.json" ] || xlfa "$part" --model "$model" --data_root "$data_root" --output_dir "$folder" \
          "${flags[@]}"
      done
      ;;
  esac
done
