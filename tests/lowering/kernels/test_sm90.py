"""What the kernels compile to for an H100: nothing spills, loads stay asynchronous and wide."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from torch_mux.lowering.kernels import choose, common
from torch_mux.lowering.kernels.attention import attention_launch
from torch_mux.lowering.kernels.common import Launch
from torch_mux.lowering.kernels.conv import conv_launch, conv_problems
from torch_mux.lowering.kernels.data import BitClass, Family, Part, Tile, Vector
from torch_mux.lowering.kernels.depthwise import depthwise_launch
from torch_mux.lowering.kernels.embedding import embedding_launch
from torch_mux.lowering.kernels.gates import Gate
from torch_mux.lowering.kernels.inspection import compile_launch
from torch_mux.lowering.kernels.joint_conv import joint_conv_launch
from torch_mux.lowering.kernels.joint_linear import joint_linear_launch
from torch_mux.lowering.kernels.linear import linear_launch, linear_problems
from torch_mux.lowering.kernels.transport import gather_launch, scatter_launch

CPU = torch.device("cpu")
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
TABLE = torch.zeros(16, 4, dtype=torch.int64)
ROWS = torch.zeros(16, dtype=torch.int64)
CONTROL = torch.zeros(2, dtype=torch.int32)
ARENA = torch.zeros(16, 8192)
BIG = Tile(128, 128, 64, 4, 3, 2)
EIGHT, TWO = Tile(128, 128, 64, 8, 3, 2), Tile(128, 64, 64, 4, 4, 2, second_n=32)
DEEP = Tile(64, 128, 64, 4, 8, 1)
FEW, FEW64 = Tile(32, 64, 128, 4, 4, 2, swap=True), Tile(32, 64, 64, 4, 4, 4, swap=True)
SCALED = {"scale": Vector(ARENA, 4096), "activation": "relu"}
BIAS = {"residual": None, "activation": "none"}


def linear_of(slots: int, m: int, n: int, k: int, dtype: torch.dtype, **named: Any) -> Launch:
    x, out = torch.empty(slots, m, k, dtype=dtype), torch.empty(slots, m, n, dtype=dtype)
    named = {"activation": "gelu", "residual": out, "shift": Vector(ARENA, 0), "sms": 132, **named}
    return linear_launch(x, TABLE, 1, ROWS, CONTROL, out, n=n, k=k, **named)


def conv_of(
    slots: int, c: int, size: int, o: int, kernel: int, stride: int, dtype: torch.dtype, **named: Any
) -> Launch:
    """Grouped with ``groups`` among ``named``."""
    out_size = (size - 1) // stride + 1
    x = torch.empty(slots, 1, size, size, c, dtype=dtype)
    out = torch.empty(slots, 1, out_size, out_size, o, dtype=dtype)
    named = {
        "activation": "relu",
        "scale": Vector(ARENA, 0),
        "shift": Vector(ARENA, 4096),
        "sms": 132,
        **named,
    }
    return conv_launch(
        x, TABLE, 1, ROWS, CONTROL, out, kernel=(kernel, kernel), stride=(stride, stride),
        padding=(kernel // 2, kernel // 2), **named,
    )  # fmt: skip


def ragged_linear(tile: Tile = BIG) -> Launch:
    flat = torch.empty(1 << 20, dtype=HALF)
    problems = linear_problems([(197, 768, 768), (100, 512, 64)], [0, 1 << 18], [0, 1 << 18], CPU)
    return linear_launch(
        flat, TABLE, 1, ROWS, CONTROL, flat, n=768, k=768, shift=Vector(ARENA, 0), activation="gelu",
        problems=problems, tile=tile, sms=132,
    )  # fmt: skip


def ragged_conv(tile: Tile = BIG) -> Launch:
    flat = torch.empty(1 << 20, dtype=HALF)
    geometry: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1)}
    shapes = [(1, 56, 56, 64, 64), (1, 28, 28, 128, 64)]
    problems = conv_problems(shapes, [0, 1 << 18], [0, 1 << 18], CPU, **geometry)
    return conv_launch(
        flat, TABLE, 1, ROWS, CONTROL, flat, shift=Vector(ARENA, 0), activation="relu", problems=problems,
        tile=tile, sms=132, **geometry,
    )  # fmt: skip


def joint(*layers: Launch, tile: Tile | None = None) -> Launch:
    make = joint_linear_launch if layers[0].operation.kind == "linear" else joint_conv_launch
    return make(layers, tile=tile, sms=132)


THREE = [Part(column, 768, 768) for column in range(3)]
WGMMA = {
    "linears of two programs": lambda: joint(
        linear_of(8, 197, 3072, 768, HALF), linear_of(8, 128, 3072, 768, HALF)
    ),
    "linears of four programs": lambda: joint(
        *(linear_of(4, m, 768, 3072, HALF) for m in (197, 128, 128, 49)),
    ),
    "convs 3x3 of two programs": lambda: joint(
        conv_of(4, 64, 56, 64, 3, 1, HALF), conv_of(4, 64, 28, 128, 3, 1, HALF)
    ),
    "convs 3x3 of 16 channels, of three programs": lambda: joint(
        *(conv_of(4, 16, size, 32, 3, 1, HALF) for size in (32, 28, 14))
    ),
    "joined linears beside a single one": lambda: joint(
        linear_of(8, 197, 2304, 768, HALF), linear_of(8, 128, 2304, 768, HALF, parts=THREE)
    ),
    "linear 197x768x768, largest tile": lambda: linear_of(16, 197, 768, 768, HALF, tile=BIG),
    "linear 197x768x768, chosen": lambda: linear_of(16, 197, 768, 768, HALF),
    "eight warps, gelu": lambda: linear_of(16, 197, 3072, 768, HALF, tile=EIGHT, residual=None),
    "eight warps, bias": lambda: linear_of(16, 197, 768, 768, HALF, tile=EIGHT, **BIAS),
    "eight warps, gelu and residual": lambda: linear_of(16, 197, 768, 768, BRAIN, tile=EIGHT),
    "eight warps, scale and residual": lambda: linear_of(16, 197, 768, 768, HALF, tile=EIGHT, **SCALED),
    "eight warps, no whole tiles": lambda: linear_of(16, 197, 776, 776, HALF, tile=EIGHT),
    "eight warps, three linears": lambda: linear_of(
        16, 197, 768 * 3, 768, HALF, parts=THREE, tile=EIGHT, **BIAS
    ),
    "two widths, gelu": lambda: linear_of(16, 197, 3072, 768, HALF, tile=TWO, residual=None),
    "two widths, bias": lambda: linear_of(16, 197, 768, 3072, HALF, tile=TWO, **BIAS),
    "two widths, tanh and residual": lambda: linear_of(
        16, 197, 768, 768, BRAIN, tile=TWO, activation="gelu_tanh"
    ),
    "two widths, scale and residual": lambda: linear_of(16, 197, 768, 768, HALF, tile=TWO, **SCALED),
    "two widths, no whole tiles": lambda: linear_of(16, 197, 776, 776, HALF, tile=TWO),
    "two widths, three linears": lambda: linear_of(16, 197, 768 * 3, 768, HALF, parts=THREE, tile=TWO),
    "two widths, ragged": lambda: ragged_linear(TWO),
    "two widths, of two programs": lambda: joint(
        linear_of(8, 197, 2304, 768, HALF), linear_of(8, 128, 2304, 768, HALF, parts=THREE), tile=TWO
    ),
    "eight warps, of four programs": lambda: joint(
        *(linear_of(4, m, 3072, 768, HALF, residual=None) for m in (197, 128, 128, 49)), tile=EIGHT
    ),
    "rows on the N side, bias": lambda: linear_of(1, 197, 768, 3072, HALF, tile=FEW, **BIAS),
    "rows on the N side, gelu": lambda: linear_of(1, 197, 3072, 768, HALF, tile=FEW64, residual=None),
    "rows on the N side, scale and residual": lambda: linear_of(
        4, 197, 776, 776, BRAIN, tile=FEW64, **SCALED
    ),
    "rows on the N side, three linears": lambda: linear_of(
        1, 197, 768 * 3, 768, HALF, parts=THREE, tile=FEW, **BIAS
    ),
    "rows on the N side, of two programs": lambda: joint(
        linear_of(1, 197, 2304, 768, HALF), linear_of(1, 128, 2304, 768, HALF, parts=THREE), tile=FEW
    ),
    "addmm bf16": lambda: linear_of(16, 197, 768, 768, BRAIN, weight_strides=(1, 768), tile=BIG),
    "linear tf32": lambda: linear_of(4, 197, 768, 768, FULL, allow_tf32=True),
    "linear, ragged": ragged_linear,
    "three linears of one input": lambda: linear_of(
        16, 197, 768 * 3, 768, HALF, parts=[Part(column, 768, 768) for column in range(3)], tile=BIG
    ),
    "two linears of one input, unequal": lambda: linear_of(
        16, 197, 768 + 256, 768, BRAIN, parts=[Part(0, 768, 768), Part(2, 256, 768)]
    ),
    "conv 3x3 64 @56": lambda: conv_of(16, 64, 56, 64, 3, 1, HALF),
    "conv 3x3 128 @28, largest tile": lambda: conv_of(16, 128, 28, 128, 3, 1, BRAIN, tile=BIG),
    "conv 3x3 96 @28": lambda: conv_of(4, 96, 28, 96, 3, 1, HALF),
    "conv 3x3 256 @14, eight buffers": lambda: conv_of(16, 256, 14, 256, 3, 1, HALF, tile=DEEP),
    "conv 3x3 256 @14, six buffers, eight warps": lambda: conv_of(
        16,
        256,
        14,
        256,
        3,
        1,
        BRAIN,
        tile=Tile(128, 128, 64, 8, 6, 1),
        residual=torch.empty(16, 1, 14, 14, 256, dtype=BRAIN),
    ),
    "conv 3x3 128 @28, eight warps": lambda: conv_of(16, 128, 28, 128, 3, 1, HALF, tile=EIGHT),
    "convs 3x3 of two programs, eight warps": lambda: joint(
        conv_of(4, 128, 28, 128, 3, 1, HALF), conv_of(4, 128, 14, 256, 3, 1, HALF), tile=EIGHT
    ),
    "convs 3x3 of two programs, eight buffers": lambda: joint(
        conv_of(4, 256, 14, 256, 3, 1, HALF), conv_of(4, 256, 7, 512, 3, 1, HALF), tile=DEEP
    ),
    "conv 5x5, of 25 taps": lambda: conv_of(16, 64, 28, 64, 5, 1, HALF),
    "conv 7x7, of 49 taps": lambda: conv_of(16, 64, 28, 64, 7, 1, HALF),
    "conv 1x1 strided": lambda: conv_of(16, 256, 56, 512, 1, 2, HALF),
    "conv 3x3 of 16 channels": lambda: conv_of(16, 16, 32, 32, 3, 1, HALF),
    "conv, ragged": ragged_conv,
    "conv 3x3, 32 groups of 8": lambda: conv_of(16, 256, 28, 256, 3, 1, HALF, groups=32),
    "conv 3x3, 7 groups of 24": lambda: conv_of(4, 168, 28, 168, 3, 2, BRAIN, groups=7),
    "conv 3x3, 2 groups of 64": lambda: conv_of(16, 128, 28, 128, 3, 1, HALF, groups=2),
}


@pytest.mark.parametrize("name", list(WGMMA))
def test_tensor_cores_fed_asynchronously(name: str) -> None:
    launch = WGMMA[name]()
    found = compile_launch(launch)
    assert found.stack == 0
    assert found.registers <= 255
    assert found.wgmma > 0
    assert found.cp_async >= 2 * launch.tile.stages
    narrowest = launch.tile.block_k * min(launch.tile.block_m, launch.tile.block_n)
    itemsize = launch.operation.dtype.itemsize
    assert found.cp_async_bytes == min(16, narrowest * itemsize // (32 * launch.tile.warps))
    assert found.programs_per_sm >= launch.tile.programs_per_sm


@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("residual", [False, True])
def test_the_sum_does_not_start_at_what_is_added_to_it(block_k: int, residual: bool) -> None:
    """A reduction of one step is no loop, and Triton would fold what is added into its accumulator."""
    tile = Tile(64, 64, block_k, 4, 3, 2)
    named = {"residual": torch.empty(4, 1, 14, 14, 256, dtype=HALF), "shift": None} if residual else {}
    launch = conv_of(4, 128, 28, 256, 1, 2, HALF, tile=tile, scale=None, activation="none", **named)
    added = len(re.findall(r"add(?:\.rn)?(?:\.ftz)?\.f32", compile_launch(launch).ptx))
    assert added == tile.block_m * tile.block_n // (32 * tile.warps)


CROWDED = {
    "linear, ragged, three": lambda: ragged_linear(Tile(64, 128, 64, 4, 3, 3)),
    "addmm, three": lambda: linear_of(
        16, 197, 768, 768, HALF, weight_strides=(1, 768), tile=Tile(64, 64, 64, 4, 4, 3)
    ),
    "conv, ragged, three": lambda: ragged_conv(Tile(64, 64, 64, 4, 4, 3)),
    "linear, ragged, four": lambda: ragged_linear(Tile(64, 64, 64, 4, 3, 4)),
    "conv 3x3 256 @14, a warp's instructions": lambda: conv_of(
        1, 256, 14, 256, 3, 1, HALF, tile=Tile(16, 32, 256, 4, 3, 3)
    ),
    "conv 7x7 of 3 channels, a warp's instructions": lambda: conv_of(
        1, 3, 224, 64, 7, 2, HALF, tile=Tile(16, 16, 256, 4, 4, 3)
    ),
    "linear of four-byte loads": lambda: linear_of(16, 197, 770, 770, HALF),
    "conv of four-byte loads": lambda: conv_of(4, 66, 28, 66, 3, 1, HALF),
}


@pytest.mark.parametrize("name", list(CROWDED))
def test_as_many_programs_fit_as_the_tile_says(name: str) -> None:
    launch = CROWDED[name]()
    found = compile_launch(launch)
    assert found.stack == 0
    assert found.programs_per_sm >= launch.tile.programs_per_sm


@pytest.mark.parametrize(("channels", "width"), [(3, 0), (4, 8)])
def test_stem(channels: int, width: int) -> None:
    launch = conv_of(16, channels, 224, 64, 7, 2, HALF)
    found = compile_launch(launch)
    assert found.stack == 0
    assert found.wgmma > 0
    assert found.cp_async_bytes == width
    assert found.programs_per_sm >= launch.tile.programs_per_sm


def test_stem_of_folded_columns() -> None:
    x, out = torch.empty(16, 1, 230, 115, 8, dtype=HALF), torch.empty(16, 1, 112, 112, 64, dtype=HALF)
    launch = conv_launch(
        x, TABLE, 1, ROWS, CONTROL, out, kernel=(7, 4), stride=(2, 1), shift=Vector(ARENA, 0),
        activation="relu", sms=132,
    )  # fmt: skip
    found = compile_launch(launch)
    assert (found.stack, found.cp_async_bytes) == (0, 16)
    assert found.wgmma > 0
    assert found.programs_per_sm >= launch.tile.programs_per_sm


def depthwise_of(c: int, kernel: int, dtype: torch.dtype, multiplier: int = 1, **named: Any) -> Launch:
    x = torch.empty(16, 1, 28, 28, c, dtype=dtype)
    out = torch.empty(16, 1, 28, 28, c * multiplier, dtype=dtype)
    return depthwise_launch(
        x, TABLE, 1, ROWS, CONTROL, out, kernel=(kernel, kernel), padding=(kernel // 2, kernel // 2),
        scale=Vector(ARENA, 0), shift=Vector(ARENA, 4096), residual=out, sms=132,
        **{"activation": "gelu_tanh", **named},
    )  # fmt: skip


WIDE, SMALL = choose.depthwise_candidates()[0], choose.depthwise_candidates()[3]
DEPTHWISE = {
    "3x3": lambda: depthwise_of(96, 3, HALF, tile=WIDE),
    "7x7": lambda: depthwise_of(96, 7, BRAIN, tile=WIDE, activation="gelu"),
    "7x7, small tile": lambda: depthwise_of(96, 7, HALF, tile=SMALL),
    "31x31, small tile": lambda: depthwise_of(96, 31, HALF, tile=SMALL),
    "fp32": lambda: depthwise_of(96, 5, FULL, tile=WIDE),
    "fp32, small tile": lambda: depthwise_of(96, 5, FULL, tile=SMALL),
}


@pytest.mark.parametrize("name", list(DEPTHWISE))
def test_depthwise_loads_whole_words_and_exchanges_nothing(name: str) -> None:
    launch = DEPTHWISE[name]()
    found = compile_launch(launch)
    assert (found.stack, found.shared, found.mma, found.wgmma) == (0, 0, 0, 0)
    assert found.ptx.count("bar.sync") == 0
    assert "ld.global.v4" in found.ptx and "st.global.v4" in found.ptx
    assert found.programs_per_sm >= launch.tile.programs_per_sm


@pytest.mark.parametrize(("channels", "multiplier"), [(98, 1), (99, 1), (96, 2)])
def test_depthwise_of_narrow_loads_fits(channels: int, multiplier: int) -> None:
    launch = depthwise_of(channels, 3, HALF, multiplier)
    found = compile_launch(launch)
    assert found.stack == 0
    assert found.programs_per_sm >= launch.tile.programs_per_sm == 4


def test_few_rows_use_the_tensor_cores_of_a_warp() -> None:
    launch = linear_of(4, 1, 4096, 4096, HALF)
    found = compile_launch(launch)
    assert (found.stack, found.wgmma, found.cp_async_bytes) == (0, 0, 16)
    assert found.mma > 0
    assert found.programs_per_sm >= launch.tile.programs_per_sm


SPLIT = [(False, 197, family) for family in Family] + [(True, 28, Family.WGMMA), (True, 4, Family.MMA)]


@pytest.mark.parametrize(("convolution", "size", "family"), SPLIT)
def test_true_fp32_adds_every_step_outside_the_tensor_cores(
    convolution: bool, size: int, family: Family
) -> None:
    step = 32 if family is Family.WGMMA else 64
    bit_class = BitClass(family, precision="tf32x3", step=step)
    for tile in choose.candidates(bit_class, FULL, lean=not convolution):
        named: dict[str, Any] = {"tile": tile, "bit_class": bit_class}
        if convolution:
            launch = conv_of(16, 128, size, 128, 3, 1, FULL, **named)
        else:
            launch = linear_of(16, size, 768, 768, FULL, **named)
        found = compile_launch(launch)
        assert (found.stack, found.cp_async_bytes) == (0, 16), tile
        assert (found.wgmma if family is Family.WGMMA else found.mma) % 3 == 0
        assert (found.wgmma > 0) == (family is Family.WGMMA)
        added = len(re.findall(r"add(?:\.rn)?(?:\.ftz)?\.f32", found.ptx))
        assert added >= tile.block_m * tile.block_n // (32 * tile.warps), tile
        assert found.programs_per_sm >= tile.programs_per_sm, tile


def attention_of() -> Launch:
    heads, out = torch.empty(16, 1, 12, 128, 64, dtype=HALF), torch.empty(16, 1, 128, 12, 64, dtype=HALF)
    mask = torch.empty(16, 1, 1, 1, 128, dtype=HALF)
    return attention_launch(heads, heads, heads, CONTROL, out, mask=mask, sms=132)


def embedding_of() -> Launch:
    indices, out = torch.zeros(4, 128, dtype=torch.int64), torch.empty(4, 128, 768, dtype=HALF)
    return embedding_launch(indices, TABLE, 1, ROWS, CONTROL, out, 30522, sms=132)


EVERY = {
    "linear": lambda: linear_of(16, 128, 768, 768, HALF),
    "conv": lambda: conv_of(16, 64, 56, 64, 3, 1, HALF),
    "conv, ragged": ragged_conv,
    "depthwise": DEPTHWISE["3x3"],
    "embedding": embedding_of,
    "attention": attention_of,
    "gather": lambda: gather_launch(ROWS, torch.empty(4, 224, 224), CONTROL, (224, 1)),
    "scatter, strided": lambda: scatter_launch(torch.empty(4, 224, 224), ROWS, CONTROL, (1, 224)),
}


@pytest.mark.parametrize("name", list(EVERY))
def test_a_dependent_launch_waits_once_before_it_touches_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = EVERY[name]()
    assert "launch_pdl" not in launch.options
    assert "griddepcontrol" not in compile_launch(launch).ptx
    monkeypatch.setattr(common, "dependent", lambda device: True)
    assert launch.options["launch_pdl"]
    before, *after = compile_launch(launch).ptx.split("griddepcontrol.wait")
    assert len(after) == 1
    touches = re.compile(r"(ld|st|red|atom)\.(\w+\.)*global|cp\.async|\bbra\b|\bret\b")
    assert touches.search(before) is None and touches.search(after[0]) is not None


def test_copies_are_wide() -> None:
    found = compile_launch(embedding_of())
    assert "ld.global.v4" in found.ptx or "ld.global.v8" in found.ptx
    batched = torch.empty(4, 3, 224, 224, dtype=HALF)
    strides = batched.stride()[1:]
    for launch in (
        gather_launch(ROWS, batched, CONTROL, strides),
        scatter_launch(batched, ROWS, CONTROL, strides),
    ):
        assert "ld.global.v4" in compile_launch(launch).ptx


@pytest.mark.parametrize("ends", [False, True])
def test_gates_read_past_the_cache_again_and_again_and_count_atomically(ends: bool) -> None:
    gate = Gate(torch.device("cpu"))
    stop = compile_launch(gate.stop(CONTROL, CONTROL))
    assert len(re.findall(r"ld\.volatile\.global|ld\.relaxed\.sys\.global", stop.ptx)) == 5
    assert stop.registers <= 32 and stop.stack == 0 and stop.shared == 0
    count = compile_launch(gate.overtake(ends))
    assert re.search(r"atom\.global\S*\.add|red\.\S*add", count.ptx)
    claim = compile_launch(gate.claim(CONTROL, ends))
    assert "st.global" in claim.ptx and ("ld.global" in claim.ptx) is not ends
