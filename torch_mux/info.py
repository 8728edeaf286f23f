"""What torch-mux finds on this machine."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from torch_mux import compat
from torch_mux.state import settings

__all__ = ["info"]


def info() -> dict[str, str]:
    """Versions, device, executor and settings, by name."""
    cuda = torch.cuda.is_available()
    compat.native.build()
    return {
        "torch-mux": _version("torch-mux"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({torch.get_num_threads()} threads)",
        "executor": "captured CUDA graphs" if cuda else "CPU (sms is recorded, not enforced)",
        "weight checks": compat.native.status(),
        "settings": str(settings()),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
