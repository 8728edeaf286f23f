"""Where files are kept between processes."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(name: str) -> Path:
    """``name`` in ``TORCH_MUX_CACHE_DIR``, or in the user's cache folder; it may not exist yet."""
    base = os.environ.get("TORCH_MUX_CACHE_DIR") or Path(os.path.expanduser("~")) / ".cache" / "torch-mux"
    return Path(base) / name
