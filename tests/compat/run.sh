#!/usr/bin/env bash
# Checks what ships to the Hub under three versions of transformers and writes tests/compat/output.txt. Called by
# `make test-compat`, which has built .venv: its transformers, the newest that the project runs on, saves the models.
#
# Each version has an environment in .compat. torch and pytest, a gigabyte that does not depend on transformers, stand
# there once; a .pth file puts them on every environment's path.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
work=$root/.compat
python=${PYTHON:-python3}
# "5" is the newest 5.x that the package index has today.
versions=(4.57 5.0 5)

# Tiny models on one thread: more would wait for each other longer than they compute.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1

install_torch() {
    if ! cmp --silent constraints.txt "$work/torch/constraints.txt"; then
        rm -rf "$work"
        "$python" -m pip install --quiet --constraint constraints.txt --target "$work/torch" torch numpy pytest
        cp constraints.txt "$work/torch/"
    fi
}

install_transformers() {
    local environment=$work/$1
    if [ ! -x "$environment/bin/python" ]; then
        "$python" -m venv "$environment"
        echo "$work/torch" >"$("$environment/bin/python" -c "import site; print(site.getsitepackages()[0])")/torch.pth"
    fi
    "$environment/bin/python" -m pip install --quiet --upgrade "transformers==$1.*"
}

describe() {
    "$1" -c "
import huggingface_hub, tokenizers, torch, transformers
print('transformers', transformers.__version__, '· huggingface_hub', huggingface_hub.__version__, end=' · ')
print('tokenizers', tokenizers.__version__, '· torch', torch.__version__)"
}

check() {
    local version failed=0 home
    echo "commit $(git describe --always --dirty)"
    echo "saved by $(describe .venv/bin/python)"
    for version in "${versions[@]}"; do
        echo
        echo "loaded by $(describe "$work/$version/bin/python")"
        home=$(mktemp -d)
        (cd tests/compat && HF_HOME=$home "$work/$version/bin/python" -m pytest) || failed=1
        rm -rf "$home"
    done
    return $failed
}

install_torch
for version in "${versions[@]}"; do
    install_transformers "$version"
done
PYTHONPATH=tests .venv/bin/python tests/compat/save_models.py "$work/saved"
failed=0
check 2>&1 | tee "$work/output.txt" || failed=1
mv "$work/output.txt" tests/compat/output.txt
exit $failed
