"""Training in two processes gives the loss curve and the weights of one process at the same global batch.

torchrun runs this file as a script, once for all cases: importing what trains takes longer than training them.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import REPOSITORY
from datasets import ClassLabel, Dataset, Features, List, Value
from safetensors.torch import load_file
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from transformers import AutoModelForSequenceClassification

from xlfa import training
from xlfa.tasks import get_task
from xlfa.training import main

PROCESSES, GLOBAL_BATCH = 2, 4
NO_DROPOUT = '{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}'
# Without convergence: the sweep at which the last pair of a batch has converged depends on the other pairs.
TRANSPORT = (
    "--ot_weight 0.5 --ot_epsilon 0.5 --ot_tol 1e-30 --ot_max_iter 20 "
    "--parallel_dataset local/parallel --parallel_languages de fr --parallel_pairs_per_language 20"
)


@dataclass
class Case:
    """Examples beyond two global batches are an uneven last one."""

    task: str
    examples: int
    flags: str
    accumulation: int = 1

    def train(self, encoder, output, processes):
        common = f"--task {self.task} --max_length 64 --max_train_examples {self.examples} --max_eval_examples 4"
        recipe = "--num_train_epochs 2 --learning_rate 1e-3 --logging_steps 1 --save_strategy no --eval_strategy no"
        # In bfloat16 accelerate would turn the weights that FSDP shards into float32.
        batch = f"--per_device_train_batch_size {GLOBAL_BATCH // processes} --bf16 false"
        accumulation = f"--gradient_accumulation_steps {self.accumulation} --classifier_dropout 0"
        flags = [*common.split(), *recipe.split(), *batch.split(), *accumulation.split(), *self.flags.split()]
        main(["--model", encoder, "--output_dir", str(output), "--encoder_config", NO_DROPOUT, *flags])


CASES = {
    "none_1": Case("xnli", 5, f"--fusion_norm none --data_root sample {TRANSPORT}"),
    "layer_3": Case("xnli", 7, f"--fusion_norm layer --data_root sample {TRANSPORT}"),
    "batch_1": Case("xnli", 5, f"--fusion_norm batch --data_root sample {TRANSPORT}"),
    "accumulated": Case("xnli", 11, f"--fusion_norm layer --data_root sample {TRANSPORT}", accumulation=2),
    "accumulated_batch": Case("xnli", 11, f"--fusion_norm batch --data_root sample {TRANSPORT}", accumulation=2),
    "parts": Case("xnli", 7, f"--fusion_norm layer --data_root sample --max_tokens_per_batch 128 {TRANSPORT}"),
    "tokens_accumulated": Case("wikiann", 11, "--fusion_norm batch --data_root tags", accumulation=2),
    "stored_trunk": Case(
        "xnli", 7, f"--fusion_norm layer --data_root sample --freeze_layers 2 --cache_trunk true {TRANSPORT}"
    ),
    "answers": Case("xquad", 3, f"--fusion_norm batch --data_root sample --max_length 384 {TRANSPORT}"),
    # Nine windows: the second process has no example of the last batch.
    "answers_1": Case("xquad", 6, f"--fusion_norm batch --data_root sample --max_length 512 {TRANSPORT}"),
}


def train_all(encoder, folder, processes, names=tuple(CASES)):
    """Train cases in float64."""
    build = training.build_model

    def build_double(*args):
        model, tokenizer = build(*args)
        return model.double(), tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        patch.setattr("xlfa.data.HF_DATASETS_CACHE", folder.parent / "cache")
        # Its own, in several files: what is stored by one process is not there for two.
        patch.setenv("XLFA_CACHE", str(folder / "cache"))
        patch.setattr("xlfa.trunk.FILE_SIZE", 2**14)
        patch.setattr(training, "build_model", build_double)
        for name in names:
            CASES[name].train(encoder, folder / name, processes)


def write_tags(folder):
    """A data set of sentences of one to twelve words: their shares of the labels differ much."""
    names = list(get_task("wikiann").label_names)
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    lengths = [1, 12, 2, 9, 1, 4, 7, 3, 11, 5, 2]
    rows = [
        {"tokens": [f"w{place}" for place in range(length)], "ner_tags": [place % 7 for place in range(length)]}
        for length in lengths
    ]
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        Dataset.from_list(rows, features).to_parquet(folder / f"{split}.parquet")
    splits = "".join(f"\n  - split: {split}\n    path: {split}.parquet" for split in ("train", "validation"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: en\n  data_files:{splits}\n---\n")


@pytest.fixture(scope="module")
def folders(tiny_encoder, tmp_path_factory):
    """Run folders of one process and of two, by number of processes."""
    root = tmp_path_factory.mktemp("runs")
    write_tags(root / "tags" / "unimelb-nlp" / "wikiann")
    train_all(tiny_encoder, root / "1", processes=1)
    launch(
        ["torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"], tiny_encoder, root / str(PROCESSES)
    )
    return {processes: root / str(processes) for processes in (1, PROCESSES)}


def launch(launcher, encoder, folder, *names):
    """Run this file as a script in every process of a launch."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher, __file__, encoder, str(folder), *names],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-8000:]


def log_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(folders, name):
    one, two = (log_of(folders[processes] / name) for processes in (1, PROCESSES))
    assert len(one) == len(two) >= 4
    for expected, found in zip(one, two):
        # Losses are summed in float32.
        for part in ("loss", "task_loss", "ot_loss", "grad_norm"):
            if part in expected:
                assert found[part] == pytest.approx(expected[part], rel=1e-6), (part, expected["step"])
    expected, found = (load_file(folders[processes] / name / "model.safetensors") for processes in (1, PROCESSES))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def allow_fsdp_on_cpu():
    """accelerate (seen with 1.15) trains with DDP where FSDP is asked for and there is no accelerator."""
    start, gather = AcceleratorState.__init__, Accelerator.get_state_dict

    def start_with_fsdp(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.distributed_type = DistributedType.FSDP
        if kwargs.get("fsdp_plugin") is not None:
            self.fsdp_plugin = kwargs["fsdp_plugin"]

    def gather_and_wait(*args, **kwargs):
        # On a GPU the copy to the CPU waits.
        weights = gather(*args, **kwargs)
        return {name: w.wait() if isinstance(w, AsyncCollectiveTensor) else w for name, w in weights.items()}

    AcceleratorState.__init__, Accelerator.get_state_dict = start_with_fsdp, gather_and_wait


@pytest.mark.full
@pytest.mark.parametrize("name", ["layer_3", "batch_1"])
def test_fsdp2_trains_as_one_process_and_saves_a_whole_model(tiny_encoder, folders, tmp_path, name):
    config = str(REPOSITORY / "configs" / "accelerate" / "fsdp2.yaml")
    launcher = ["accelerate.commands.launch", "--config_file", config, "--num_processes", str(PROCESSES)]
    launch(launcher, tiny_encoder, tmp_path / "fsdp", name)
    one, sharded = folders[1] / name, tmp_path / "fsdp" / name
    for expected, found in zip(log_of(one), log_of(sharded), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    torch.testing.assert_close(
        load_file(sharded / "model.safetensors"), load_file(one / "model.safetensors"), rtol=1e-9, atol=1e-9
    )
    assert {path.name for path in sharded.iterdir()} == {path.name for path in one.iterdir()}
    AutoModelForSequenceClassification.from_pretrained(sharded, trust_remote_code=True)


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    train_all(sys.argv[1], Path(sys.argv[2]), PROCESSES, sys.argv[3:] or tuple(CASES))
