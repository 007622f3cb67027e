"""The files in configs/accelerate and configs/slurm: accelerate reads them, and their command lines parse."""

import os
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from conftest import ENCODER_CONFIGS, REPOSITORY

from modeling_xlfa import XLFAConfig, XLFAForQuestionAnswering

FOLDER = REPOSITORY / "configs" / "accelerate"
SLURM_SCRIPT = REPOSITORY / "configs" / "slurm" / "train.sbatch"
KINDS = {
    "cpu": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "multi_node": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}


def launch_arguments(command):
    """What `accelerate launch` makes of the words after it."""
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


def test_every_file_has_a_kind():
    assert {path.stem for path in FOLDER.glob("*")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    # Half precision is a flag of the script: with two places to say it they could disagree.
    assert config.mixed_precision == "no"
    assert config.num_machines == (2 if name == "multi_node" else 1)
    assert config.num_processes % config.num_machines == 0


@pytest.mark.parametrize("name", KINDS)
def test_the_command_in_the_file_parses(name):
    lines = (line.lstrip("# ") for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#"))
    text = " ".join(lines).replace("\\ ", "")
    command = text[text.index("accelerate launch") : text.index("…")].split()
    assert command[:4] == ["accelerate", "launch", "--config_file", f"configs/accelerate/{name}.yaml"]
    arguments = launch_arguments([*command[2:], "--task", "xnli"])
    assert arguments.training_script == "train_xlfa.py"
    assert arguments.training_script_args == ["--task", "xnli"]


def test_sharding_reaches_accelerate():
    arguments = launch_arguments(["--config_file", str(FOLDER / "fsdp2.yaml"), "train_xlfa.py"])
    assert arguments.use_fsdp and int(arguments.fsdp_version) == 2
    assert arguments.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
    assert arguments.fsdp_state_dict_type == "FULL_STATE_DICT"
    arguments = launch_arguments(["--config_file", str(FOLDER / "deepspeed_zero2.yaml"), "train_xlfa.py"])
    assert arguments.use_deepspeed and int(arguments.zero_stage) == 2


@pytest.mark.parametrize("fusion", ["dlfa", "aff", "scalar_mix", "none"])
@pytest.mark.parametrize("family", ENCODER_CONFIGS)
def test_a_model_names_only_classes_that_it_contains(family, fusion):
    """FSDP's TRANSFORMER_BASED_WRAP refuses others."""
    model = XLFAForQuestionAnswering(XLFAConfig(text_config=ENCODER_CONFIGS[family](), fusion=fusion))
    contained = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules and set(model._no_split_modules) <= contained
    layers = [name for name in model._no_split_modules if name.endswith(("Layer", "Block"))]
    assert len(layers) == 1


@pytest.fixture
def slurm_command(tmp_path):
    """The command that the Slurm script runs on the second of two machines, with Slurm's own commands stood in for."""
    stand_ins = {
        "scontrol": 'printf "node7\\nnode9\\n"',
        # srun's own option; then the program and its arguments, as the second machine runs it.
        "srun": 'shift; SLURM_NODEID=1 "$@"',
        "accelerate": f'printf "%s\\n" "$@" > {tmp_path}/command',
    }
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')
    for name, body in stand_ins.items():
        (binaries / name).write_text(f"#!/bin/bash\n{body}\n")
        (binaries / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "61234", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node[7,9]"}
    subprocess.run(
        ["bash", str(SLURM_SCRIPT), "--task", "xnli", "--output_dir", "runs/a b"],
        cwd=tmp_path,
        env=os.environ | job,
        check=True,
        timeout=30,
    )
    return (tmp_path / "command").read_text().splitlines()


def test_the_slurm_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(SLURM_SCRIPT)], check=True, timeout=30)


def test_the_slurm_script_launches_each_machine_with_its_rank(slurm_command):
    assert slurm_command[0] == "launch"
    arguments = launch_arguments(slurm_command[1:])
    assert (arguments.machine_rank, arguments.num_machines, arguments.num_processes) == (1, 2, 16)
    assert (arguments.main_process_ip, arguments.main_process_port) == ("node7", 21234)
    assert arguments.multi_gpu and arguments.training_script == "train_xlfa.py"
    assert arguments.training_script_args == ["--task", "xnli", "--output_dir", "runs/a b"]
