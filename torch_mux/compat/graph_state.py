"""What decides, beside a graph of Dynamo's and its inputs, about the operations AOTAutograd makes of it."""

from __future__ import annotations

import hashlib
import operator
import os
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final

import torch
from torch import Tensor
from torch._functorch import config
from torch._functorch._aot_autograd.schemas import OutputType
from torch._guards import TracingContext
from torch.fx import Node

from .dynamo import active_modes
from .inductor import precision_state
from .saved_code import surroundings

__all__ = ["graph_state", "input_facts", "only_passes_on", "public_name"]

#: Switches by which composite operators choose among implementations.
_SWITCHES: Final = (
    *(f"_get_{kind}_sdp_enabled" for kind in "cudnn fa3 flash math mem_efficient overrideable".split()),
    "_get_math_sdp_allow_fp16_bf16_reduction",
    "_get_sdp_priority_order",
    *(f"_get_cudnn_{name}" for name in ("enabled", "benchmark", "deterministic")),
    *(f"_get_mkldnn_{name}" for name in ("enabled", "deterministic")),
    "_get_nnpack_enabled",
)


_FUNCTIONS: Final = (torch, torch.nn.functional, torch.functional, torch._C._nn, operator)
_TORCH: Final = str(torch.__path__[0]) + os.sep


def public_name(target: Any) -> str | None:
    """Where a function of PyTorch's or one of Python's operators is to be found; None for all others."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target) if target.namespace == "aten" else None
    name = getattr(target, "__name__", "")
    for module in _FUNCTIONS:
        if name and not name.startswith("_") and getattr(module, name, None) is target and _original(target):
            return f"{module.__name__}.{name}"
    return None


def _original(function: Any) -> bool:
    """Whether a function is PyTorch's own with all that it wraps, and not one that was put in its place."""
    if not isinstance(function, FunctionType):
        return isinstance(function, BuiltinFunctionType)
    inner = [cell.cell_contents for cell in function.__closure__ or ()]
    wrapped = [value for value in inner if isinstance(value, FunctionType)]
    return function.__code__.co_filename.startswith(_TORCH) and all(map(_original, wrapped))


def graph_state() -> str | None:
    """Digest of that state; None where modes or autocast are on, which reach into the trace."""
    if active_modes() or torch._C._is_any_autocast_enabled():
        return None
    switches = [(name, getattr(torch._C, name)()) for name in _SWITCHES if hasattr(torch._C, name)]
    registered: Any = torch.library._impls
    own = sorted(name for name in registered if name.startswith("aten/") and not name.endswith("/Meta"))
    configuration: dict[str, Any] = config.save_config_portable()
    parts = (
        surroundings(),
        precision_state(),
        sorted(configuration.items()),
        switches,
        own,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def input_facts(node: Node, value: object) -> tuple[object, ...] | None:
    """What a trace may ask of an input; None where it is no plain tensor of fixed sizes.

    Args:
        node: its placeholder in Dynamo's graph.
        value: the tensor with which Dynamo traces.
    """
    fake = node.meta.get("example_value")
    if not isinstance(fake, Tensor) or type(value) not in (Tensor, torch.nn.Parameter):
        return None
    assert isinstance(value, Tensor)
    sizes = (*fake.shape, *(fake.stride() if fake.layout is torch.strided else ()))
    if fake.layout is not torch.strided or any(isinstance(size, torch.SymInt) for size in sizes):
        return None
    if value.is_quantized or value.is_nested or fake.shape != value.shape or fake.stride() != value.stride():
        return None
    return (
        tuple(value.shape),
        value.stride(),
        value.storage_offset(),
        value.dtype,
        value.device,
        type(value) is torch.nn.Parameter,
        value.requires_grad,
        value.is_leaf,
        value.is_inference(),
        value._is_view(),
        value.is_conj(),
        value.is_neg(),
        node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"),
    )


def only_passes_on(count: int) -> bool:
    """Whether the wrapper that AOTAutograd puts around the graph being compiled changes nothing.

    So it is where arguments are not written, nothing that is returned is a view of something else, and no
    mode of autograd is left changed.

    Args:
        count: how many arguments Dynamo's graph has.
    """
    metadata: Any = TracingContext.get().fw_metadata
    if metadata is None or metadata.tokens or metadata.num_intermediate_bases:
        return False
    if len(metadata.input_info) != count:
        return False
    if metadata.grad_enabled_mutation is not None:
        return False
    written = any(one.mutates_data or one.mutates_metadata for one in metadata.input_info)
    return not written and all(one.output_type is OutputType.non_alias for one in metadata.output_info)
