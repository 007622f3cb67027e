"""Parts of every benchmark's report: processor and commit, which its figures depend on, and tables."""

import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from xlfa.environment import describe_threads, versions


def describe_processor() -> str:
    """Its name and number of cores."""
    names = _cpuinfo("model name")
    return f"{(names or ['unknown processor'])[0]}, {os.cpu_count()} cores"


def bfloat16_instructions() -> list[str]:
    """The processor's instruction sets for bfloat16, of x86 and of ARM."""
    flags = {flag for values in _cpuinfo("flags", "Features") for flag in values.split()}
    return sorted(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def describe_commit() -> str:
    """The commit of this checkout, marked where files were changed."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or "not a git checkout"


def header(script: str, argv: list[str], device: str) -> list[str]:
    """What the figures of a benchmark depend on, apart from its own settings.

    Args:
        script: its path in the repository.
        argv: its command line.
        device: what it ran on.
    """
    machine = describe_processor()
    if torch.cuda.is_available():
        machine += f"; {torch.cuda.get_device_name()}, bfloat16: {torch.cuda.is_bf16_supported()}"
    return [
        f"date: {datetime.now(UTC).isoformat(timespec='seconds')}",
        f"machine: {machine}; bfloat16 in the processor: {', '.join(bfloat16_instructions()) or 'none'}",
        f"threads: {describe_threads()}; device: {device}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()),
        f"commit: {describe_commit()}",
        f"command: {shlex.join([Path(sys.executable).name, script, *argv])}",
    ]


def table(lines: list[list[str]]) -> list[str]:
    """The lines, headings first, as a Markdown table, aligned."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in ruled]


def _cpuinfo(*fields: str) -> list[str]:
    """The values of these fields, those of every core; none on a system that has no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split(":")[1].strip() for line in lines if line.startswith(fields)]
