"""What a benchmark's figures depend on beside its settings: the processor and the commit."""

import os
import subprocess
from pathlib import Path


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


def _cpuinfo(*fields: str) -> list[str]:
    """The values of these fields, those of every core; none on a system that has no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split(":")[1].strip() for line in lines if line.startswith(fields)]
