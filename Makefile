# `make quickstart`, `make test` and the long `make test-full`. All need Python 3.11 to 3.13 and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THREADS := $(shell $(PYTHON) -c "import os; print(os.cpu_count())")
LAUNCH := $(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml --num_cpu_threads_per_process $(THREADS)

.PHONY: quickstart test test-full test-compat

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[offline,compiled,trackers,align,app,test]"
	touch $@

# Trains DLFA + OT on the embedded sample, scores every language, prints the tables and draws a figure; no network.
quickstart: $(VENV)/.installed
	rm -rf runs/quickstart
	HF_HUB_OFFLINE=1 $(LAUNCH) train_xlfa.py configs/quickstart.yaml
	HF_HUB_OFFLINE=1 $(LAUNCH) eval_xlfa.py --model runs/quickstart/xnli --task xnli --data_root sample
	HF_HUB_OFFLINE=1 $(LAUNCH) train_xlfa.py configs/quickstart_xquad.yaml
	HF_HUB_OFFLINE=1 $(LAUNCH) eval_xlfa.py --model runs/quickstart/xquad --task xquad --data_root sample

# A process a core, which takes whole files, so that fixtures of a module are made once; more would run out of memory.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

# What the default tests leave out, and the Triton kernel in Triton's interpreter (a package of a gigabyte).
test-full: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[offline,compiled,trackers,align,app,browser,triton,test]"
	$(BIN)/python -m pytest -m "full or not full"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m triton tests/test_sinkhorn_triton.py

# What ships to the Hub, loaded by transformers 4.57, 5.0 and the newest 5.x in environments of their own (2 GB in
# .compat); writes tests/compat/output.txt.
test-compat: $(VENV)/.installed
	PYTHON=$(PYTHON) tests/compat/run.sh
