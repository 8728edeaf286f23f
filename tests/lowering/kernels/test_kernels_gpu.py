"""The super-kernels on the device: accuracy against float64, and the same bits in every bundle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux.lowering.kernels import choose, reference
from torch_mux.lowering.kernels.conv import conv, conv_launch, conv_problems
from torch_mux.lowering.kernels.data import Activation, BitClass, Family, Vector
from torch_mux.lowering.kernels.embedding import embedding
from torch_mux.lowering.kernels.linear import linear, linear_launch, linear_problems
from torch_mux.lowering.kernels.transport import gather, scatter

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32

LINEAR = [(1, 256, 1024), (8, 70, 72), (17, 48, 64), (197, 768, 768), (128, 3072, 100), (130, 33, 256)]
# channels in, height and width, channels out, kernel, stride, padding, dilation, groups (1 if not given)
CONV = [(3, 40, 64, 7, 2, 3, 1), (4, 40, 64, 7, 2, 3, 1), (16, 14, 24, 3, 1, 1, 1), (64, 14, 64, 3, 1, 1, 1),
        (96, 14, 96, 3, 2, 1, 1), (64, 15, 40, 3, 1, 2, 2), (128, 14, 256, 1, 2, 0, 1),
        (64, 4, 128, 3, 1, 1, 1), (20, 9, 10, 5, 1, 2, 1), (256, 14, 256, 3, 1, 1, 1, 32),
        (48, 15, 72, 3, 2, 1, 1, 3), (128, 9, 192, 3, 1, 2, 2, 2), (15, 9, 6, 3, 1, 1, 1, 3),
        (64, 9, 32, 1, 1, 0, 1, 4), (64, 12, 32, 7, 2, 3, 1), (64, 12, 32, 5, 1, 4, 2),
        (8, 20, 64, 5, 2, 0, 1), (12, 15, 24, 3, 1, 0, 2)]  # fmt: skip
DEPTHWISE = [
    (96, 28, 96, 3, 1, 1, 1, 96),
    (144, 15, 144, 5, 2, 2, 1, 144),
    (70, 9, 70, 7, 1, 3, 1, 70),
    (33, 12, 33, 3, 1, 2, 2, 33),
    (24, 9, 72, 3, 1, 1, 1, 24),
    (16, 20, 16, 11, 1, 5, 1, 16),
]
PRECISIONS = [(HALF, False), (BRAIN, False), (FULL, False), (FULL, True)]
BUNDLED = [(HALF, False), (FULL, True)]
LINEAR_TILES = [((8, 70, 72), HALF, False), ((197, 768, 768), HALF, False), ((130, 33, 256), BRAIN, False),
                ((8, 70, 72), FULL, False), ((197, 768, 768), FULL, True)]  # fmt: skip
CONV_TILES = [(CONV[0], HALF, False), (CONV[2], HALF, False), (CONV[3], HALF, False), (CONV[4], BRAIN, False),
              (CONV[6], HALF, False), (CONV[7], HALF, False), (CONV[3], FULL, False), (CONV[3], FULL, True),
              (CONV[9], HALF, False), (CONV[11], HALF, False), (CONV[14], HALF, False),
              (CONV[15], BRAIN, False), (CONV[16], HALF, False), (CONV[17], HALF, False)]  # fmt: skip


def linear_case(tools: Any, slots: int, size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    m, n, k = size
    x = tools.guarded(torch.randn(slots, m, k).to(dtype))
    weights = [tools.guarded((torch.randn(n, k) / k**0.5).to(dtype)) for _ in range(slots)]
    arena = torch.randn(slots, 2 * n, device=CUDA)
    residual = torch.randn(slots, m, n, device=CUDA).to(dtype)
    return {"x": x, "weights": weights, "arena": arena, "residual": residual, "n": n, "k": k}


def run_linear(
    tools: Any, case: dict[str, Any], slots: list[int], active: int, cap: int, **named: Any
) -> Tensor:
    """The outputs of these slots of a case, launched together; what is not written stays 7."""
    n = case["n"]
    rows = torch.tensor(slots, device=CUDA)
    residual = case["residual"][rows].contiguous()
    out = torch.full_like(residual, 7.0)
    vectors = {"scale": Vector(case["arena"], 0), "shift": Vector(case["arena"], n)}
    linear(
        case["x"][rows].contiguous(), tools.table(case["weights"]), 1, rows, tools.control(active, cap), out,
        n=n, k=case["k"], **{"activation": "gelu", "residual": residual, **vectors, **named},
    )  # fmt: skip
    return out


def conv_case(tools: Any, slots: int, layer: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    c, size, o, kernel, stride, padding, dilation, groups = (*layer, 1)[:8]
    x = tools.guarded(torch.randn(slots, 1, size, size, c).to(dtype))
    fan = c // groups * kernel**2
    shape = (kernel, kernel, o, 1) if 1 < groups == c else (o, kernel, kernel, c // groups)
    weights = [tools.guarded((torch.randn(shape) / fan**0.5).to(dtype)) for _ in range(slots)]
    if 1 < groups == c:
        weights = [weight.permute(2, 0, 1, 3) for weight in weights]
    geometry = {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (dilation,) * 2}
    return {
        "x": x,
        "weights": weights,
        "arena": torch.randn(slots, o, device=CUDA),
        "geometry": geometry | {"groups": groups},
    }


def run_conv(
    tools: Any, case: dict[str, Any], slots: list[int], active: int, cap: int, **named: Any
) -> Tensor:
    rows = torch.tensor(slots, device=CUDA)
    x, weight = case["x"][rows].contiguous(), case["weights"][0]
    shape = reference.conv([x[0]], [weight], **case["geometry"])[0].shape
    out = torch.full((len(slots), *shape), 7.0, dtype=x.dtype, device=CUDA)
    conv(
        x, tools.table(case["weights"]), 1, rows, tools.control(active, cap), out,
        kernel=tuple(weight.shape[1:3]), shift=Vector(case["arena"], 0), activation="relu",
        **case["geometry"], **named,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(("dtype", "tf32"), PRECISIONS)
@pytest.mark.parametrize("size", LINEAR)
def test_linear_matches_float64(
    gpu_tools: Any, size: tuple[int, int, int], dtype: torch.dtype, tf32: bool
) -> None:
    case, n = linear_case(gpu_tools, 3, size, dtype), size[1]
    out = run_linear(gpu_tools, case, [0, 1, 2], 3, 132, allow_tf32=tf32)
    want = reference.linear(
        list(case["x"]), case["weights"], list(case["arena"][:, :n]), list(case["arena"][:, n:]),
        list(case["residual"]), "gelu",
    )  # fmt: skip
    gpu_tools.close(out, torch.stack(want), dtype, tf32)


@pytest.mark.parametrize(("dtype", "tf32"), PRECISIONS)
@pytest.mark.parametrize("layer", CONV + DEPTHWISE)
def test_conv_matches_float64(gpu_tools: Any, layer: tuple[int, ...], dtype: torch.dtype, tf32: bool) -> None:
    case = conv_case(gpu_tools, 3, layer, dtype)
    out = run_conv(gpu_tools, case, [0, 1, 2], 3, 132, allow_tf32=tf32)
    want = reference.conv(
        list(case["x"]), case["weights"], shifts=list(case["arena"]), activation="relu", **case["geometry"]
    )
    gpu_tools.close(out, torch.stack(want), dtype, tf32)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_activations(gpu_tools: Any, activation: Activation, dtype: torch.dtype) -> None:
    x = torch.linspace(-9.0, 9.0, 64 * 64, device=CUDA).view(1, 64, 64).to(dtype)
    weight, out = torch.eye(64, device=CUDA, dtype=dtype), torch.empty(1, 64, 64, device=CUDA, dtype=dtype)
    rows = torch.zeros(1, dtype=torch.int64, device=CUDA)
    linear(
        x, gpu_tools.table([weight]), 1, rows, gpu_tools.control(1, 1), out, n=64, k=64, activation=activation
    )
    gpu_tools.close(out, reference.activate(x.double(), activation), dtype)


@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_transposed_weight(gpu_tools: Any, dtype: torch.dtype) -> None:
    x = torch.randn(2, 128, 200, device=CUDA).to(dtype)
    weights = [gpu_tools.guarded(torch.randn(200, 136).to(dtype)) for _ in range(2)]
    out = torch.empty(2, 128, 136, device=CUDA, dtype=dtype)
    linear(
        x, gpu_tools.table(weights), 1, torch.arange(2, device=CUDA), gpu_tools.control(2, 132), out,
        n=136, k=200, weight_strides=(1, 136),
    )  # fmt: skip
    want = torch.stack(reference.linear(list(x), [weight.T for weight in weights]))
    gpu_tools.close(out / 200**0.5, want / 200**0.5, dtype)


def check_bundles(run: Any, slots: int) -> None:
    """The bits of a slot depend neither on T, slot, cap nor on how many slots are active."""
    whole = run(list(range(slots)), slots, 132)
    for slot in range(slots):
        assert torch.equal(run([slot], 1, 132)[0], whole[slot])
    order = [(5 * slot + 2) % slots for slot in range(slots)]
    for active in (slots, slots // 2, 1, 0):
        for cap in (1, 7, 132):
            out = run(order, active, cap)
            assert torch.equal(out[:active], whole[order][:active])
            assert bool((out[active:] == 7.0).all())


@pytest.mark.parametrize(("dtype", "tf32"), BUNDLED)
@pytest.mark.parametrize("size", LINEAR)
def test_linear_bits_do_not_depend_on_bundle(
    gpu_tools: Any, size: tuple[int, int, int], dtype: torch.dtype, tf32: bool
) -> None:
    case = linear_case(gpu_tools, 16, size, dtype)
    check_bundles(
        lambda rows, active, cap: run_linear(gpu_tools, case, rows, active, cap, allow_tf32=tf32), 16
    )


@pytest.mark.parametrize(("dtype", "tf32"), BUNDLED)
@pytest.mark.parametrize("layer", CONV + DEPTHWISE)
def test_conv_bits_do_not_depend_on_bundle(
    gpu_tools: Any, layer: tuple[int, ...], dtype: torch.dtype, tf32: bool
) -> None:
    case = conv_case(gpu_tools, 16, layer, dtype)
    check_bundles(lambda rows, active, cap: run_conv(gpu_tools, case, rows, active, cap, allow_tf32=tf32), 16)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(("size", "dtype", "tf32"), LINEAR_TILES)
def test_linear_bits_do_not_depend_on_tile(
    gpu_tools: Any, size: tuple[int, int, int], dtype: torch.dtype, tf32: bool, bare: bool
) -> None:
    case = linear_case(gpu_tools, 3, size, dtype)
    tiles = choose.candidates(choose.linear_class([size], dtype, tf32), dtype)
    named: dict[str, Any] = {"allow_tf32": tf32, **({"scale": None, "residual": None} if bare else {})}
    first = run_linear(gpu_tools, case, [0, 1, 2], 3, 132, tile=tiles[0], **named)
    for tile in tiles[1:]:
        assert torch.equal(run_linear(gpu_tools, case, [0, 1, 2], 3, 132, tile=tile, **named), first), tile


@pytest.mark.parametrize(("layer", "dtype", "tf32"), CONV_TILES)
def test_conv_bits_do_not_depend_on_tile(
    gpu_tools: Any, layer: tuple[int, ...], dtype: torch.dtype, tf32: bool
) -> None:
    case = conv_case(gpu_tools, 3, layer, dtype)
    groups = case["geometry"]["groups"]
    c, o, kernel = layer[0] // groups, layer[2] // groups, layer[3]
    shape = run_conv(gpu_tools, case, [0], 1, 1, allow_tf32=tf32).shape
    sizes = [(shape[1] * shape[2] * shape[3], o, kernel**2 * c)]
    bit_class = choose.conv_class(sizes, [c], kernel**2, dtype, tf32)
    tiles = choose.candidates(bit_class, dtype, narrow=bit_class.gather and c % 4 != 0, lean=False)
    first = run_conv(gpu_tools, case, [0, 1, 2], 3, 132, allow_tf32=tf32, tile=tiles[0])
    for tile in tiles[1:]:
        assert torch.equal(run_conv(gpu_tools, case, [0, 1, 2], 3, 132, allow_tf32=tf32, tile=tile), first), (
            tile
        )


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("layer", DEPTHWISE)
def test_depthwise_bits_do_not_depend_on_tile(
    gpu_tools: Any, layer: tuple[int, ...], dtype: torch.dtype
) -> None:
    case = conv_case(gpu_tools, 3, layer, dtype)
    first = run_conv(gpu_tools, case, [0, 1, 2], 3, 132)
    for tile in choose.depthwise_candidates():
        assert torch.equal(run_conv(gpu_tools, case, [0, 1, 2], 3, 132, tile=tile), first), tile


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_ragged_linear_gives_the_bits_of_each_slot_alone(gpu_tools: Any, dtype: torch.dtype) -> None:
    sizes = [(197, 768, 256), (20, 40, 72), (130, 33, 100), (64, 512, 64)]
    xs = [torch.randn(m, k).to(dtype) for m, _, k in sizes]
    weights = [gpu_tools.guarded((torch.randn(n, k) / k**0.5).to(dtype)) for _, n, k in sizes]
    x, x_offsets = gpu_tools.pack(xs, dtype)
    like = [torch.full((m, n), 7.0) for m, n, _ in sizes]
    table, rows = gpu_tools.table(weights), torch.arange(4, device=CUDA)
    arena = torch.randn(4, 768, device=CUDA)
    for active, cap in [(4, 132), (4, 1), (2, 3)]:
        out, out_offsets = gpu_tools.pack(like, dtype)
        problems = linear_problems(sizes, x_offsets, out_offsets, CUDA)
        linear(
            x, table, 1, rows, gpu_tools.control(active, cap), out, n=768, k=256, shift=Vector(arena, 0),
            activation="silu", problems=problems,
        )  # fmt: skip
        for slot, got in enumerate(gpu_tools.unpack(out, out_offsets, like)):
            m, n, k = sizes[slot]
            alone = torch.full((1, m, n), 7.0, dtype=dtype, device=CUDA)
            linear(
                xs[slot][None].to(CUDA), table, 1, rows[slot : slot + 1],
                gpu_tools.control(int(slot < active), 132), alone, n=n, k=k, shift=Vector(arena, 0),
                activation="silu",
            )  # fmt: skip
            assert torch.equal(got, alone[0])


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("groups", [1, 4])
def test_ragged_conv_gives_the_bits_of_each_slot_alone(
    gpu_tools: Any, dtype: torch.dtype, groups: int
) -> None:
    shapes = [(1, 14, 14, 64 * groups, 64), (2, 7, 9, 128 * groups, 40), (1, 28, 20, 96 * groups, 128)]
    geometry: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1), "groups": groups}
    xs = [torch.randn(n, h, w, c).to(dtype) for n, h, w, c, _ in shapes]
    weights = [
        gpu_tools.guarded((torch.randn(o, 3, 3, c // groups) / (9 * c / groups) ** 0.5).to(dtype))
        for *_, c, o in shapes
    ]
    x, x_offsets = gpu_tools.pack(xs, dtype)
    like = [torch.full((n, h, w, o), 7.0) for n, h, w, _, o in shapes]
    out, out_offsets = gpu_tools.pack(like, dtype)
    table, rows = gpu_tools.table(weights), torch.arange(3, device=CUDA)
    problems = conv_problems(shapes, x_offsets, out_offsets, CUDA, **geometry)
    conv(x, table, 1, rows, gpu_tools.control(3, 5), out, problems=problems, **geometry)
    for slot, got in enumerate(gpu_tools.unpack(out, out_offsets, like)):
        alone = torch.empty(1, *like[slot].shape, dtype=dtype, device=CUDA)
        conv(
            xs[slot][None].to(CUDA),
            table,
            1,
            rows[slot : slot + 1],
            gpu_tools.control(1, 132),
            alone,
            **geometry,
        )
        assert torch.equal(got, alone[0])


def test_weights_on_the_m_side(gpu_tools: Any) -> None:
    case = linear_case(gpu_tools, 3, (9, 70, 72), HALF)
    swapped = BitClass(Family.WGMMA, swap=True)
    tile = choose.candidates(swapped, HALF)[3]
    out = run_linear(gpu_tools, case, [0, 1, 2], 3, 132, bit_class=swapped, tile=tile)
    want = reference.linear(
        list(case["x"]), case["weights"], list(case["arena"][:, :70]), list(case["arena"][:, 70:]),
        list(case["residual"]), "gelu",
    )  # fmt: skip
    gpu_tools.close(out, torch.stack(want), HALF)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("size", [(8, 136, 200), (33, 768, 768), (197, 768, 3072)])
def test_rows_on_the_n_side_leave_the_bits(
    gpu_tools: Any, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    case = linear_case(gpu_tools, 2, size, dtype)
    tiles = choose.candidates(choose.linear_class([size], dtype), dtype)
    plain = next(tile for tile in tiles if not tile.swap)
    bias: dict[str, Any] = {"scale": None, "residual": None}
    for named in ({}, bias, {**bias, "activation": "none"}):
        want = run_linear(gpu_tools, case, [0, 1], 2, 132, tile=plain, **named)
        for tile in tiles:
            if tile.swap:
                got = run_linear(gpu_tools, case, [1, 0], 2, 132, tile=tile, **named)
                assert torch.equal(got.flip(0), want), (tile, named)


def test_embedding(gpu_tools: Any) -> None:
    weights = [gpu_tools.guarded(torch.randn(50, 768).half()) for _ in range(4)]
    rows = torch.tensor([2, 0, 3, 1], device=CUDA)
    indices = torch.randint(0, 50, (4, 1, 128), device=CUDA)
    out = torch.full((4, 1, 128, 768), 7.0, dtype=HALF, device=CUDA)
    embedding(indices, gpu_tools.table(weights), 1, rows, gpu_tools.control(3, 2), out, 50)
    want = reference.embedding(list(indices), [weights[row] for row in rows.tolist()])
    assert torch.equal(out[:3], torch.stack(want)[:3])
    assert bool((out[3] == 7.0).all())


@pytest.mark.parametrize("dtype", [HALF, FULL, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("shift", [0, 1])
def test_copies_to_and_from_slots(
    gpu_tools: Any, dtype: torch.dtype, order: tuple[int, ...], shift: int
) -> None:
    def make() -> Tensor:
        storage = torch.randint(0, 2, (3 * 41 * 37 + shift,), device=CUDA).to(dtype)
        return storage[shift:].view(3, 41, 37).permute(order)

    sources, targets = [make() for _ in range(4)], [make() for _ in range(4)]
    kept = targets[3].clone()
    batched = torch.zeros(4, *sources[0].shape, dtype=dtype, device=CUDA)
    control, strides = gpu_tools.control(3, 2), sources[0].stride()
    gather(torch.tensor([source.data_ptr() for source in sources], device=CUDA), batched, control, strides)
    scatter(batched, torch.tensor([target.data_ptr() for target in targets], device=CUDA), control, strides)
    assert torch.equal(batched[:3], torch.stack(sources)[:3])
    assert not batched[3].any()
    assert all(torch.equal(targets[slot], sources[slot]) for slot in range(3))
    assert torch.equal(targets[3], kept)


def test_launches_do_not_exceed_the_grid_of_the_cap() -> None:
    x, out = (
        torch.empty(16, 197, 768, device=CUDA, dtype=HALF),
        torch.empty(16, 197, 768, device=CUDA, dtype=HALF),
    )
    table = torch.zeros(16, 1, dtype=torch.int64, device=CUDA)
    rows, control = torch.arange(16, device=CUDA), torch.zeros(2, dtype=torch.int32, device=CUDA)
    launch = linear_launch(x, table, 0, rows, control, out, n=768, k=768)
    sms = torch.cuda.get_device_properties(CUDA).multi_processor_count
    assert 0 < launch.grid <= sms * launch.tile.programs_per_sm
    image = torch.empty(1, 1, 14, 14, 64, device=CUDA, dtype=HALF)
    small = conv_launch(
        image, table, 0, rows[:1], control, torch.empty_like(image), kernel=(3, 3), padding=(1, 1)
    )
    assert small.grid == choose.tiles_of([(196, 64, 576)], small.tile)
