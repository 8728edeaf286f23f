"""One launch for matching operations of several programs, of whatever kind."""

from __future__ import annotations

from collections.abc import Sequence

from torch_mux.lowering.kernels.common import Launch
from torch_mux.lowering.kernels.joint_conv import joint_conv_launch
from torch_mux.lowering.kernels.joint_linear import joint_linear_launch

__all__ = ["joint_launch"]

_KINDS = {"linear": joint_linear_launch, "conv": joint_conv_launch}


def joint_launch(launches: Sequence[Launch]) -> Launch:
    """One launch that does what all of ``launches`` would do, with the bits of each.

    Raises:
        ValueError: operations that do not match.
    """
    kind = launches[0].operation.kind
    if kind not in _KINDS:
        raise ValueError(f"no launch does several programs' {kind}")
    return _KINDS[kind](launches)
