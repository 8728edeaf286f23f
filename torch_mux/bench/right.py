"""Whether a contender's answers are those of the models: by the error that eager PyTorch itself makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from torch_mux.bench import measure
from torch_mux.bench.contenders import Eager
from torch_mux.bench.workloads import Tenants

__all__ = ["WrongAnswers", "allowed", "verify"]

#: A contender's worst error may be this many times the eager models', and so many roundings at least.
_SLACK: Final = 8.0
_ROUNDINGS: Final = 8.0


class WrongAnswers(RuntimeError):
    """A contender's answers are not those of the models."""


def allowed(tenants: Tenants, exact: Sequence[Sequence[Tensor]], count: int, dtype: torch.dtype) -> float:
    """The relative l2 error beyond which answers are wrong: eager PyTorch's own, with some slack.

    Args:
        exact: as :func:`measure.references` gives them.
        count: of the tenants.
        dtype: of the models.
    """
    eager = Eager()
    eager.prepare(tenants, (count,))
    own = measure.errors(eager, tenants, exact, count)["worst"]
    return max(_SLACK * own, _ROUNDINGS * torch.finfo(dtype).eps)


def verify(errors: Mapping[str, float], count: int, bound: float) -> None:
    """Looks at what :func:`measure.errors` found of so many tenants.

    Raises:
        WrongAnswers: answers are further from float64 than rounding explains, so times would mean nothing.
    """
    if not errors["worst"] <= bound:
        raise WrongAnswers(
            f"relative l2 error {errors['worst']:.1e} at {count} tenants, where eager PyTorch leaves room "
            f"for {bound:.1e}"
        )
