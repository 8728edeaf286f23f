"""Triton kernels of the user's own, which a graph names by numbers of this process."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

__all__ = ["user_kernel"]


def user_kernel(node: Node) -> str:
    """What the kernel called by ``node`` does: its source and what it uses, constants, configurations.

    Empty where the node calls no such kernel.
    """
    if not node.kwargs or "kernel_idx" not in node.kwargs:
        return ""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    index: Any = node.kwargs["kernel_idx"]
    constants: Any = node.kwargs.get("constant_args_idx")
    kernel: Any = kernel_side_table.get_kernel(index)
    found = []
    while kernel is not None:  # an autotuner around heuristics around the function
        found.append(f"{type(kernel).__name__} {list(map(str, getattr(kernel, 'configs', ())))}")
        found.append(str(getattr(kernel, "cache_key", getattr(kernel, "src", ""))))
        inner = getattr(kernel, "fn", None)
        kernel = inner if hasattr(inner, "fn") or hasattr(inner, "src") else None
    if constants is not None:
        found.append(repr(kernel_side_table.get_constant_args(constants)))
    return "\n".join(found)
