"""Trains one run undisturbed and others that are killed by SIGKILL and resumed until they are finished.

`kill_runs.py ENCODER FOLDER RUNS KILLS` writes FOLDER/unbroken and FOLDER/killed-0, killed-1, …, each with the order of
its data in inputs/, a file a sitting, and prints a line for each kill.

A sitting is a fork of this process, which imports what trains once; `ENVIRONMENT` of `test_kill.py` keeps it without
threads. Moments of the kills are drawn from the run's
number as a seed: an optimizer step and how far into it, or into the writing of the next checkpoint.
"""

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import xlfa.compiled_sinkhorn  # noqa: F401
from xlfa.checkpoints import checkpoints_in, is_complete, newest_complete
from xlfa.trainer import XLFATrainer
from xlfa.training import run

# 3 optimizer steps an epoch, and a checkpoint every 2.
EPOCHS, STEPS = 8, 24
FLAGS = (
    "--task xnli --data_root sample --max_train_examples 24 --max_eval_examples 6 --seed 3 --logging_steps 5 "
    f"--num_train_epochs {EPOCHS} --per_device_train_batch_size 4 --gradient_accumulation_steps 2 "
    "--learning_rate 1e-3 --train_sampling_strategy group_by_length --save_strategy steps --save_steps 2 "
    "--save_total_limit 1 --fusion dlfa --ot_weight 0.5 --parallel_dataset local/parallel --parallel_languages de fr"
).split()
SECONDS_A_WRITE = 0.06
POLL_SECONDS = 0.003


def main(encoder: str, folder: Path, runs: int, kills: int) -> None:
    started = time.monotonic()
    finish(begin_sitting(encoder, folder / "unbroken", 0))
    seconds_a_step = (time.monotonic() - started) / STEPS
    print(f"unbroken: {STEPS} optimizer steps in {EPOCHS} epochs", flush=True)
    for number in range(runs):
        target = folder / f"killed-{number}"
        draw = random.Random(number)
        for sitting, step in enumerate(sorted(draw.sample(range(1, STEPS), kills))):
            # Every second one while a checkpoint is written.
            writing, fraction = sitting % 2 == 1, draw.random()
            child = begin_sitting(encoder, target, sitting)
            wait = wait_for_writing if writing else wait_for_step
            wait(child, target, sitting, step)
            time.sleep(fraction * (SECONDS_A_WRITE if writing else seconds_a_step))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            print(f"killed-{number}: {describe_kill(target, sitting)}", flush=True)
        finish(begin_sitting(encoder, target, kills))
        print(f"killed-{number}: finished in sitting {kills}", flush=True)


def begin_sitting(encoder: str, output: Path, sitting: int) -> int:
    """A process that trains, from the newest complete checkpoint if there is one; its process id."""
    inputs = output.parent / "inputs" / output.name / str(sitting)
    inputs.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    resume = ["--resume_from_checkpoint", "true"] if newest_complete(output) else []
    sys.argv = ["train", "--model", encoder, "--output_dir", str(output), *FLAGS, *resume]
    status = 1
    try:
        log = os.open(inputs.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        record_inputs(inputs)
        run()
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def record_inputs(path: Path) -> None:
    """From now on each batch that is trained on adds a line: optimizer step and digest of the inputs."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    plain_step = XLFATrainer.training_step

    def training_step(trainer, model, inputs, *arguments):
        digest = hashlib.sha256()
        for name, values in sorted(inputs.items()):
            if isinstance(values, torch.Tensor):
                digest.update(name.encode() + values.numpy().tobytes())
        os.write(file, f"{trainer.state.global_step:4d} {digest.hexdigest()}\n".encode())
        return plain_step(trainer, model, inputs, *arguments)

    XLFATrainer.training_step = training_step


def finish(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status != 0:
        sys.exit(f"a sitting ended with {status}: see the logs beside its inputs")


def check_alive(child: int) -> None:
    """A sitting that ended before it could be killed is an error of this script or of the training."""
    if os.waitpid(child, os.WNOHANG) != (0, 0):
        sys.exit("a sitting ended before its kill: see the logs beside its inputs")
    time.sleep(POLL_SECONDS)


def wait_for_step(child: int, output: Path, sitting: int, step: int) -> None:
    """Until the sitting trains on the first batch of that optimizer step, or of a later one."""
    while last_step(output, sitting) < step:
        check_alive(child)


def wait_for_writing(child: int, output: Path, sitting: int, step: int) -> None:
    """Until the sitting writes a checkpoint after that optimizer step."""
    wait_for_step(child, output, sitting, step - step % 2)
    before = checkpoints_in(output)[:1]
    while checkpoints_in(output)[:1] == before:
        check_alive(child)


def last_step(output: Path, sitting: int) -> int:
    """The optimizer step that the sitting is in, by what it recorded; -1 before the first."""
    path = output.parent / "inputs" / output.name / str(sitting)
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[-1].split()[0]) if lines else -1


def describe_kill(output: Path, sitting: int) -> str:
    """Where the sitting was, and which checkpoints there are now."""
    found = [f"{path.name}{'' if is_complete(path) else ' (not complete)'}" for path in checkpoints_in(output)]
    left = ", ".join(found) or "no checkpoint"
    return f"sitting {sitting} killed in step {last_step(output, sitting)}; it leaves {left}"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
