"""Two kernels of users' own are two programs, whatever number Dynamo gave them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from torch._higher_order_ops.triton_kernel_wrap import (  # noqa: E402
    kernel_side_table,
    triton_kernel_wrapper_functional,
)

from torch_mux.lowering.fingerprint import fingerprint  # noqa: E402

SOURCE = """
import triton
import triton.language as tl

@triton.jit
def kernel(x, out, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(x + index, index < n) OPERATION, index < n)
"""


def _kernel(folder: Any, operation: str) -> Any:
    import importlib.util

    path = folder / f"kernel_{abs(hash(operation))}.py"
    path.write_text(SOURCE.replace("OPERATION", operation))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.kernel


def _fingerprint(kernel: Any, constant: int = 64) -> str:
    kernel_side_table.reset_table()
    index = kernel_side_table.add_kernel(kernel)
    constants = kernel_side_table.add_constant_args({"BLOCK": constant})
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    kwargs = {"kernel_idx": index, "constant_args_idx": constants, "kwargs": {"x": x}}
    graph.output(graph.call_function(triton_kernel_wrapper_functional, (), kwargs))
    return fingerprint(torch.fx.GraphModule({}, graph))


def test_the_source_and_the_constants_count(tmp_path: Any) -> None:
    adds, multiplies = _kernel(tmp_path, "+ 1"), _kernel(tmp_path, "* 100")
    same = _fingerprint(adds)
    assert same == _fingerprint(adds)
    assert same != _fingerprint(multiplies)
    assert same != _fingerprint(adds, 128)
    tuned = triton.autotune([triton.Config({}, num_warps=2)], key=[])(adds)
    other = triton.autotune([triton.Config({}, num_warps=4)], key=[])(adds)
    assert len({same, _fingerprint(tuned), _fingerprint(other), _fingerprint(multiplies)}) == 4
    assert _fingerprint(tuned) != _fingerprint(triton.autotune(list(tuned.configs), key=[])(multiplies))
    kernel_side_table.reset_table()
