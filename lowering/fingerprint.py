"""The identity of a program: a digest of everything that decides what its graph computes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torch_mux import compat

from .graphs import ROLE

__all__ = ["fingerprint"]


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{tuple(value.stride())}{value.device}"
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(_value(item) for item in value) + ")"
    return repr(value)


def _constant(module: GraphModule, target: str) -> str:
    value: Any = module
    for name in target.split("."):
        value = getattr(value, name)
    if isinstance(value, GraphModule):  # a branch or a loop's body: its repr says nothing of its operations
        return fingerprint(value)
    if not isinstance(value, Tensor):
        return repr(value)
    with compat.unset_fake_temporarily(), torch.no_grad():
        raw = value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return f"{_value(value)}{hashlib.sha256(raw).hexdigest()}"


def fingerprint(module: GraphModule) -> str:
    """SHA-256 of operations, attributes, shapes, dtypes, strides, roles, constants and precision settings.

    Names of nodes do not count. Aliasing counts through the graph itself: a tied weight is one placeholder,
    two untied weights are two. A kernel of the user's own counts by its source, since the number that the
    graph has for it is given anew after Dynamo's reset.
    """
    numbers: dict[Node, int] = {}
    lines = [compat.precision_state()]
    for node in module.graph.nodes:
        numbers[node] = len(numbers)
        arguments = torch.fx.map_arg((node.args, node.kwargs), lambda source: f"%{numbers[source]}")
        target = node.target if node.op == "call_function" else node.op
        constant = _constant(module, str(node.target)) if node.op == "get_attr" else compat.user_kernel(node)
        lines.append(
            f"{target}{arguments!r}{node.meta.get(ROLE, '')}{_value(node.meta.get('val'))}{constant}"
        )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
