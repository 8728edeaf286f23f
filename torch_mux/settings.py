"""Process-wide settings with environment defaults."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Settings", "cache_folder"]


def _flag(name: str, default: bool) -> bool:
    value = os.environ.get(name)
    return default if value is None else value.strip().lower() not in ("", "0", "false", "no", "off")


def cache_folder(name: str) -> Path:
    """Where things of that kind are kept on disk, made if it is not there; nobody else may write there.

    ``TORCH_MUX_CACHE_DIR`` names the folder of all kinds, by default the user's cache folder.

    Raises:
        OSError: it cannot be made.
    """
    base = os.environ.get("TORCH_MUX_CACHE_DIR") or Path(os.path.expanduser("~")) / ".cache" / "torch-mux"
    folder = Path(base) / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True)
class Settings:
    """What ``torch_mux.configure`` changes.

    Attributes:
        enabled: False sends every new graph to Inductor whole (``TORCH_MUX_ENABLED``).
        max_wait: seconds a request may wait for companions while the device is idle.
        max_bundle: most slots in one bundle.
        lanes: CUDA streams that bundles are spread over.
        in_flight: most bundles enqueued on one lane.
        linger: longest adaptive wait, in seconds, for closed-loop clients of the last bundle.
        capture: replay captured CUDA graphs (``TORCH_MUX_CAPTURE``); off launches directly.
        keep_plans: keep what lowering makes on disk for later processes (``TORCH_MUX_KEEP_PLANS``).
    """

    enabled: bool = field(default_factory=lambda: _flag("TORCH_MUX_ENABLED", True))
    max_wait: float = 0.0
    max_bundle: int = 64
    lanes: int = 1
    in_flight: int = 2
    linger: float = 200e-6
    capture: bool = field(default_factory=lambda: _flag("TORCH_MUX_CAPTURE", True))
    keep_plans: bool = field(default_factory=lambda: _flag("TORCH_MUX_KEEP_PLANS", True))
