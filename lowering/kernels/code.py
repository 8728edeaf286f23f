"""Machine code of a kernel, named by all that Triton specialises it on; plain data that later processes read.

Imports no Triton, so that it can be read where there is none.
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

__all__ = ["Buildable", "Code"]


class Buildable(Protocol):
    """Something whose kernel can be made ready: a launch, or its code alone."""

    @property
    def kernel(self) -> Any:
        """The Triton function."""
        ...

    @property
    def grid(self) -> int:
        """How many programs it is launched with; nothing is made for none."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        ...

    @property
    def variant(self) -> Hashable:
        """Equal for those that run the same machine code."""
        ...

    def build(self) -> None:
        """Compiles the kernel, or finds it in Triton's cache, and loads it on the current device."""
        ...


@dataclass(frozen=True)
class Code:
    """One variant of a kernel.

    Attributes:
        kernel: the Triton function.
        types: its arguments in order, of tensors their dtypes, which Triton takes as aligned to 16 bytes.
        options: what Triton is told besides, by name.
    """

    kernel: Any
    types: tuple[Any, ...]
    grid: int
    device: torch.device
    options: tuple[tuple[str, Any], ...]

    @property
    def variant(self) -> Hashable:
        """Equal for those that run the same machine code."""
        kinds = [
            argument
            if parameter.is_constexpr or not parameter.do_not_specialize or argument is None
            else -(2**31) <= argument < 2**31
            for parameter, argument in zip(self.kernel.params, self.types, strict=True)
        ]
        return (id(self.kernel), self.device, *kinds, *self.options)

    def build(self) -> None:
        """Compiles the kernel, or finds it in Triton's cache, and loads it on the current device."""
        compiled = self.kernel.warmup(*self.types, grid=(self.grid,), **dict(self.options))
        _ = compiled.run  # loads the code and compiles the launcher

    @property
    def named(self) -> bool:
        """Whether its kernel is found again by its name."""
        try:
            return _kernel(*_name(self.kernel)) is self.kernel
        except (ImportError, AttributeError):
            return False

    def __reduce__(self) -> tuple[Any, ...]:
        return _code, (*_name(self.kernel), self.types, self.grid, self.device, self.options)


def _name(kernel: Any) -> tuple[str, str]:
    return kernel.fn.__module__, kernel.fn.__qualname__


def _kernel(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _code(module: str, name: str, *rest: Any) -> Code:
    return Code(_kernel(module, name), *rest)
