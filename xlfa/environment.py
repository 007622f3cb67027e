"""What a result depends on beside its settings: machine, threads, versions and the state of the code."""

import os
import platform
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.utils import is_torch_bf16_gpu_available

import xlfa

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "evaluate", "tokenizers", "huggingface_hub", "scipy")
# Installed or not, by the user's choice of extras.
OPTIONAL_PACKAGES = ("numba", "triton")
# By name, so that no token is among them.
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES"),
    *("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE"),
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
)


def describe_threads() -> str:
    """One line: how many threads torch computes with."""
    return f"{torch.get_num_threads()} threads on {torch.backends.cpu.get_cpu_capability()}"


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "cuda" and is_torch_bf16_gpu_available()


def versions() -> dict[str, str]:
    """Versions of python, xlfa and the packages that results depend on."""
    installed = [name for name in OPTIONAL_PACKAGES if find_spec(name) is not None]
    return {
        "python": platform.python_version(),
        "xlfa": xlfa.__version__,
        **{name: metadata.version(name) for name in (*PACKAGES, *installed)},
    }


def describe_environment() -> dict[str, Any]:
    """Machine, processes, threads, versions and the environment variables of `VARIABLES`; no token and no user name."""
    launch = PartialState()
    return {
        "platform": platform.platform(),
        "processor": processor_name(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "distributed_type": launch.distributed_type.value,
        "processes": launch.num_processes,
        "versions": versions(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def processor_name() -> str:
    """The processor as Linux names it; elsewhere what Python knows of it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def code_state() -> dict[str, Any] | None:
    """Commit of the repository that this package's code is in, and whether the code differs from it.

    None for an installed package, and for a checkout without git.
    """
    package = Path(xlfa.__file__).parent
    code = [str(package), str(package.with_name("modeling_xlfa"))]
    # A virtual environment may lie in somebody's repository without being part of it.
    if _git(package, "ls-files", "--error-unmatch", xlfa.__file__) is None:
        return None
    return {
        "commit": _git(package, "rev-parse", "HEAD"),
        "dirty": bool(_git(package, "status", "--porcelain", "--", *code)),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command prints; None if it fails or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
