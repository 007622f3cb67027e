#!/usr/bin/env bash
# Augments an encoder with Greek and with Turkish pieces and measures what that does to text and to retrieval.
# Usage: results/vocabulary/run.sh DATA_ROOT
# Finished encoders and scores are kept, so it can be started again.
set -euo pipefail
cd "$(dirname "$0")/../.."
data_root=$(realpath "$1")
encoder=packaged:multilingual-e5-small
results=results/vocabulary
work=runs/vocabulary

retrieve() { # encoder, folder of the scores
  [ -f "$2/retrieval.json" ] ||
    xlfa retrieval --model "$1" --languages el bg de --max_examples 400 --data_root "$data_root" --output_dir "$2"
}

mkdir -p "$work"
for language in el tr; do
  text=$work/$language.txt
  [ -f "$text" ] ||
    python "$results/measure.py" text --language "$language" --data_root "$data_root" --output "$text"
  [ -d "$work/$language" ] ||
    xlfa vocab augment --model "$encoder" --texts "$text" --pieces 1000 --output_dir "$work/$language"
  [ -f "$results/pieces-$language.json" ] ||
    python "$results/measure.py" pieces --language "$language" --data_root "$data_root" --before "$encoder" \
      --after "$work/$language" --output "$results/pieces-$language.json"
done
retrieve "$encoder" "$results/before"
retrieve "$work/el" "$results/el"
python "$results/measure.py" tables
