"""Batching rules: what an ATen operation becomes when every value gains a leading slot axis.

``rule_for`` finds the rule of an operation. A rule gets the :class:`~.base.Context`, the node (whose
``meta["val"]`` is the value of ONE slot) and the resolved arguments, and returns the value with the slot
axis. No rule means that the operation runs per instance.
"""

from __future__ import annotations

from . import attention, gather, kernels, norm, pointwise, pool, reduce, shape
from .base import Context, NoRule, Parameter, Slotted, rule_for

__all__ = ["Context", "NoRule", "Parameter", "Slotted", "rule_for"]

_FAMILIES = (attention, gather, kernels, norm, pointwise, pool, reduce, shape)
