"""The ``torch-mux`` command: the demo, the benchmarks, and what this machine offers."""

from __future__ import annotations

import importlib
import sys
from typing import Final

__all__ = ["app"]

_EXTRAS: Final = {
    "typer": "cli",
    "rich": "cli",
    "prometheus_client": "metrics",
    "sklearn": "demo",
    "mlperf_loadgen": "bench",
    "timm": "bench",
    "torchvision": "bench",
    "transformers": "bench",
}


def app() -> None:
    """Entry point; says which extra is missing instead of showing a traceback."""
    try:
        importlib.import_module("torch_mux.commands").commands()
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".", 1)[0])
        if extra is None:
            raise
        sys.exit(f"torch-mux: {error.name} is not installed; run: pip install 'torch-mux[{extra}]'")


if __name__ == "__main__":
    app()
