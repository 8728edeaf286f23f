"""Generated code is loaded without what it imports and does not use."""

from __future__ import annotations

import re

import pytest

from torch_mux.compat.saved_code import lean

TOP = """# AOT ID: ['0_inference']
import torch
from torch._inductor.hooks import run_intermediate_hooks
from torch._inductor.codegen.memory_planning import _align as align
from torch import device, empty_strided
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels

aten = torch.ops.aten
async_compile = AsyncCompile()
"""
BODY = """
kernel = async_compile.triton('kernel', '''
from torch._inductor.runtime import triton_helpers
from torch._inductor.select_algorithm import unused_here
''')

def call(args):
    return torch.ops.mux.linear.default(*args)
"""


def test_what_is_not_used_is_left_out_and_lines_stay() -> None:
    found = lean(TOP + BODY)
    assert "run_intermediate_hooks" not in found and "_align" not in found and "extern_kernels" not in found
    assert "import AsyncCompile" in found and "from torch import device" in found
    assert found.count("\n") == (TOP + BODY).count("\n")
    assert found.endswith(BODY)


def test_what_is_used_stays() -> None:
    body = BODY + "\ndef more(x):\n    extern_kernels.mm(x, align(x))\n"
    found = lean(TOP + body)
    assert "import extern_kernels" in found and "_align as align" in found


@pytest.mark.parametrize("body", ["torch.ops.prims.inductor_random(x)", "torch.ops.mine.op.default(x)"])
def test_code_with_operators_that_somebody_has_to_register_stays(body: str) -> None:
    assert lean(TOP + body) == TOP + body


def test_code_of_another_form_stays() -> None:
    other = re.sub("async_compile = .*\n", "", TOP) + BODY
    assert lean(other) == other
