"""Importing torchvision beside a torch that it was not built for."""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch

__all__ = ["import_torchvision"]

#: Operations that torchvision registers a shape function for whether or not its own library could be loaded.
_DECLARED = ("nms", "qnms")
_libraries: list[torch.library.Library] = []


def import_torchvision() -> Any:
    """The package ``torchvision``.

    PyPI's wheel is built for PyPI's torch, which is a CUDA build; beside the CPU build its compiled
    operations do not load and the import fails, though no architecture needs them. Then they are declared,
    without an implementation, and the import is tried again.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _libraries or not re.search(r"operator torchvision::\w+ does not exist", str(error)):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _DECLARED:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)  # a library that is collected takes its operations back
    return importlib.import_module("torchvision")
