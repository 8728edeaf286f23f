"""Measured bundle times on disk, so that a later process can tell from its first request on."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torch_mux.runtime.scheduler.predictor import Predictor, Samples

__all__ = ["Forecasts"]

log = logging.getLogger(__name__)

_FORMAT = 1
_PROGRAMS = 64
_SAMPLES = 8


class Forecasts:
    """The predictors of one engine, one a device, read from and written to a folder.

    What is kept of a size is at most eight of its measurements, evenly over their order; of programs, the 64
    that were used last. A file that cannot be read or written is logged and done without.

    Args:
        folder: one file a device model and version of torch; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._predictors: dict[torch.device, Predictor] = {}

    def predictor(self, device: torch.device) -> Predictor:
        """A new predictor of a device, with what earlier processes measured on such a device."""
        path = self._path(device)
        found = self._predictors[device] = Predictor(None if path is None else _read(path))
        return found

    def close(self) -> None:
        """Saves and forgets."""
        self.save()
        self._predictors = {}

    def save(self) -> None:
        """Writes what was measured, beside what other processes wrote meanwhile."""
        for device, predictor in self._predictors.items():
            path, fresh = self._path(device), predictor.fresh()
            if path is not None and fresh:
                try:
                    kept = {key: value for key, value in _read(path).items() if key not in fresh}
                    _write(path, {**kept, **fresh})
                except OSError as error:
                    log.warning("measured bundle times were not kept: %s", error)

    def _path(self, device: torch.device) -> Path | None:
        if self._folder is None:
            return None
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return self._folder / f"{re.sub('[^A-Za-z0-9.]+', '-', f'{name} torch {torch.__version__}')}.json"


def _read(path: Path) -> Samples:
    try:
        data = json.loads(path.read_text())
        return _parsed(data["programs"]) if data["format"] == _FORMAT else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is not used: %s: %s", path, type(error).__name__, error)
        return {}


def _parsed(programs: Mapping[str, Any]) -> Samples:
    found: dict[str, dict[tuple[int, int], dict[int, list[float]]]] = {}
    for key, contexts in programs.items():
        for where, sizes in contexts.items():
            cap, neighbours = map(int, where.split(","))
            for slots, samples in sizes.items():
                seconds = [float(sample) for sample in samples]
                if int(slots) < 1 or not seconds or not all(0.0 < one < float("inf") for one in seconds):
                    raise ValueError(f"{slots} slots in {samples}")
                found.setdefault(key, {}).setdefault((cap, neighbours), {})[int(slots)] = seconds
    return found


def _write(path: Path, programs: Samples) -> None:
    kept = list(programs.items())[-_PROGRAMS:]
    data = {
        "format": _FORMAT,
        "programs": {
            key: {
                f"{cap},{neighbours}": {str(slots): _spread(samples) for slots, samples in sizes.items()}
                for (cap, neighbours), sizes in contexts.items()
            }
            for key, contexts in kept
        },
    }
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Under another name first: nobody reads half a file.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        made.write_text(json.dumps(data))
        os.replace(made, path)


def _spread(samples: Any) -> list[float]:
    """At most eight of them that are distributed like all."""
    ordered = sorted(samples)
    count = min(_SAMPLES, len(ordered))
    return [float(f"{ordered[(2 * n + 1) * len(ordered) // (2 * count)]:.4g}") for n in range(count)]
