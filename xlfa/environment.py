"""What a result depends on beside its settings: threads and versions."""

import platform
from importlib import metadata
from importlib.util import find_spec

import torch

import xlfa

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "evaluate", "tokenizers", "huggingface_hub", "scipy")
# Installed or not, by the user's choice of extras.
OPTIONAL_PACKAGES = ("numba", "triton")


def describe_threads() -> str:
    """One line: how many threads torch computes with."""
    return f"{torch.get_num_threads()} threads on {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    """Versions of python, xlfa and the packages that results depend on."""
    installed = [name for name in OPTIONAL_PACKAGES if find_spec(name) is not None]
    return {
        "python": platform.python_version(),
        "xlfa": xlfa.__version__,
        **{name: metadata.version(name) for name in (*PACKAGES, *installed)},
    }
