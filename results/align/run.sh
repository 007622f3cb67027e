#!/usr/bin/env bash
# The table of alignment scores: layers, epsilons, balanced and unbalanced plans, and ways to extract links.
# Usage: results/align/run.sh DATA_ROOT
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
xlfa align-score --dataset local/word-alignment --data_root "$1" --model packaged:multilingual-e5-small \
  --layers 6 8 10 --epsilons 0.01 0.03 0.1 0.3 1 --unbalanced none 0.5 2 --choose --output_dir results/align
