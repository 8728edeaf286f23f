"""What a launch compiles to, without a device: registers, spills, shared memory, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torch_mux.lowering.kernels.common import Launch

__all__ = ["Compiled", "compile_launch"]

_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class Compiled:
    """Resources of one compiled kernel.

    Attributes:
        registers: of a thread.
        stack: bytes a thread spills.
        shared: bytes of shared memory of a program.
        wgmma, mma, cp_async: how many such instructions its PTX has.
        cp_async_bytes: the narrowest asynchronous copy in bytes, 0 where there is none.
        programs_per_sm: programs that fit one H100 multiprocessor at once.
        ptx: its PTX.
    """

    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    cp_async: int
    cp_async_bytes: int
    programs_per_sm: int
    ptx: str


def _signature(
    launch: Launch,
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[list[object]]]]:
    """Signature, constants and divisibility of every argument, as the just-in-time path would find them."""
    named = launch.named
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{_NAMES[value.dtype]}"
            if not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return signature, constants, attributes


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump said nothing of registers:\n{text}")
    return int(registers.group(1)), int(stack.group(1))


def compile_launch(launch: Launch, capability: int = 90) -> Compiled:
    """Compiles ``launch`` for compute capability ``capability`` (90 is the H100) on any machine.

    Pointers are taken to be 16-byte aligned.

    Raises:
        RuntimeError: the disassembler's answer could not be read.
    """
    signature, constants, attributes = _signature(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    ptx = kernel.asm["ptx"]
    registers, stack = _resources(kernel.asm["cubin"])
    widths = [
        int(width, 16) for width in re.findall(r"cp\.async\.c[ag]\.shared\.global[^\n]*?, 0x(\w+)", ptx)
    ]
    threads = 32 * launch.tile.warps
    fit = min(
        65536 // (-(-registers // 8) * 8 * threads),
        2048 // threads,
        233472 // (kernel.metadata.shared + 1024),
    )
    return Compiled(
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma=len(re.findall(r"(?<!wg)mma\.sync", ptx)),
        cp_async=len(re.findall(r"cp\.async\.c[ag]\.shared\.global", ptx)),
        cp_async_bytes=min(widths, default=0),
        programs_per_sm=fit,
        ptx=ptx,
    )
