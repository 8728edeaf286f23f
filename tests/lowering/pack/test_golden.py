# ruff: noqa: E501
"""Schedules of real layers as text: what is matched, what waits, what runs beside what, under which caps."""

from __future__ import annotations

from typing import Any

import torch
from expecttest import assert_expected_inline

from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.operation import Operation, linear_operation
from torch_mux.lowering.pack.costs import KernelCosts
from torch_mux.lowering.pack.schedule import Schedule
from torch_mux.lowering.pack.search import pack

HALF = torch.float16
SMS = 132


def linear(slots: int, m: int, n: int, k: int, activation: str = "none", parts: int = 1) -> Operation:
    sizes = ((m, n // parts, k),) * (slots * parts)
    bit_class = choose.linear_class(sizes, HALF)
    named: dict[str, Any] = {"scale": None, "shift": HALF, "residual": False, "parts": parts}
    return linear_operation(sizes, HALF, bit_class, k_major=True, activation=activation, **named)


def encoder(slots: int, tokens: int, layers: int, parts: int) -> list[Operation]:
    return [
        linear(slots, tokens, 2304, 768, parts=parts),
        linear(slots, tokens, 768, 768),
        linear(slots, tokens, 3072, 768, "gelu"),
        linear(slots, tokens, 768, 3072),
    ] * layers


def conv(slots: int, size: int, channels: int, out: int, kernel: int) -> Operation:
    sizes = ((size * size, out, kernel * kernel * channels),) * slots
    counts = (channels,) * slots
    bit_class = choose.conv_class(sizes, counts, kernel * kernel, HALF, False)
    return Operation("conv", sizes, HALF, bit_class, counts, (kernel, kernel), None, "relu")


def point(slots: int, size: int, channels: int, out: int) -> Operation:
    sizes = ((size * size, out, channels),) * slots
    named: dict[str, Any] = {"scale": torch.float32, "shift": torch.float32, "residual": False}
    bit_class = choose.linear_class(sizes, HALF)
    return linear_operation(sizes, HALF, bit_class, k_major=True, activation="relu", **named)


def depthwise(slots: int, size: int, channels: int) -> Operation:
    sizes = ((size * size, channels, 9 * channels),) * slots
    return Operation("depthwise", sizes, HALF, None, (channels,) * slots, (3, 3), None, "relu")


def told(schedule: Schedule, *names: str) -> str:
    assert schedule.complete
    times = f"{schedule.seconds * 1e6:.1f} of {schedule.serial * 1e6:.1f} us, {schedule.matched} matched"
    return f"{times}\n{schedule.text(names)}\n"


def test_a_layer_of_vit_and_one_of_bert() -> None:
    schedule = pack([encoder(8, 197, 1, 1), encoder(8, 128, 1, 3)], KernelCosts(SMS), SMS)
    assert_expected_inline(
        told(schedule, "vit", "bert"),
        """\
177.1 of 204.7 us, 0 matched
[82] vit: linear 8x(197x2304x768) | [49] bert: linear 24x(128x768x768); bert: linear 8x(128x768x768)
[99] vit: linear 8x(197x768x768); vit: linear 8x(197x3072x768) gelu; vit: linear 8x(197x768x3072) | [33] bert: linear 8x(128x3072x768) gelu; bert: linear 8x(128x768x3072)
""",
    )


def test_two_layers_at_one_slot() -> None:
    schedule = pack([encoder(1, 197, 2, 1), encoder(1, 128, 2, 3)], KernelCosts(SMS), SMS)
    assert_expected_inline(
        told(schedule, "vit", "bert"),
        """\
90.6 of 131.9 us, 8 matched
[132] (vit: linear 1x(197x2304x768) + bert: linear 3x(128x768x768))
[132] (vit: linear 1x(197x768x768) + bert: linear 1x(128x768x768))
[132] (vit: linear 1x(197x3072x768) gelu + bert: linear 1x(128x3072x768) gelu)
[132] (vit: linear 1x(197x768x3072) + bert: linear 1x(128x768x3072))
[132] (vit: linear 1x(197x2304x768) + bert: linear 3x(128x768x768))
[132] (vit: linear 1x(197x768x768) + bert: linear 1x(128x768x768))
[132] (vit: linear 1x(197x3072x768) gelu + bert: linear 1x(128x3072x768) gelu)
[132] (vit: linear 1x(197x768x3072) + bert: linear 1x(128x768x3072))
""",
    )


def test_a_bottleneck_and_an_inverted_residual() -> None:
    bottleneck = [point(2, 14, 1024, 256), conv(2, 14, 256, 256, 3), point(2, 14, 256, 1024)]
    inverted = [point(2, 14, 80, 240), depthwise(2, 14, 240), point(2, 14, 240, 80)]
    schedule = pack([bottleneck, inverted], KernelCosts(SMS), SMS)
    assert_expected_inline(
        told(schedule, "resnet", "mobilenet"),
        """\
18.6 of 27.6 us, 1 matched
[132] (resnet: linear 2x(196x256x1024) relu + mobilenet: linear 2x(196x240x80) relu)
[115] resnet: conv 3x3 2x(196x256x2304) relu | [16] mobilenet: depthwise 3x3 2x(196x240x2160) relu
[115] resnet: linear 2x(196x1024x256) relu | [16] mobilenet: linear 2x(196x80x240) relu
""",
    )


def test_without_matching() -> None:
    schedule = pack([encoder(8, 197, 1, 1), encoder(8, 128, 1, 3)], KernelCosts(SMS), SMS, match=False)
    assert_expected_inline(
        told(schedule, "vit", "bert"),
        """\
177.1 of 204.7 us, 0 matched
[82] vit: linear 8x(197x2304x768) | [49] bert: linear 24x(128x768x768); bert: linear 8x(128x768x768)
[99] vit: linear 8x(197x768x768); vit: linear 8x(197x3072x768) gelu; vit: linear 8x(197x768x3072) | [33] bert: linear 8x(128x3072x768) gelu; bert: linear 8x(128x768x3072)
""",
    )
