"""On the device: layers of several programs in one launch have the bits of a launch each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from joint_layers import GROUPS, Layer, convolutions_of, launches_of

from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.ahead import builder
from torch_mux.lowering.kernels.common import Launch
from torch_mux.lowering.kernels.joint_launches import joint_launch
from torch_mux.lowering.kernels.joint_linear import joint_linear_launch

pytestmark = pytest.mark.gpu
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
ENCODERS = {
    "vit + bert, up": [Layer(4, 4, 197, (3072,), 768), Layer(4, 3, 128, (3072,), 768)],
    "vit + bert, down": [Layer(4, 4, 197, (768,), 3072), Layer(4, 4, 128, (768,), 3072)],
    "vit + bert, joined": [Layer(2, 2, 197, (2304,), 768), Layer(4, 4, 128, (768, 768, 768), 768)],
    "four lengths": [Layer(2, 2, m, (768,), 768) for m in (33, 128, 197, 384)],
    "cnn, 1x1": [Layer(4, 4, 196, (256,), 1024), Layer(4, 2, 49, (160,), 960)],
}


def run(launches: Sequence[Launch]) -> None:
    """Compiles them side by side, then launches them one after another."""
    builder.finish(launches)
    for launch in launches:
        launch.run()
    torch.cuda.synchronize()


CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    *((name, HALF, {}) for name in ENCODERS),
    *((name, dtype, {}) for name in list(ENCODERS)[:2] for dtype in (BRAIN, FULL)),
    ("vit + bert, down", HALF, {"residual": True, "activation": "relu"}),
    ("vit + bert, joined", HALF, {"vectors": ("scale", "shift"), "activation": "none"}),
]


@pytest.mark.parametrize(("name", "dtype", "epilogue"), CASES)
def test_bits_of_a_launch_each(
    gpu_tools: Any, name: str, dtype: torch.dtype, epilogue: dict[str, Any]
) -> None:
    kept: list[Any] = []
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for cap in (sms, 7):
        options = {**epilogue, "cap": cap, "sms": sms}
        separate, alone = launches_of(gpu_tools, ENCODERS[name], dtype, kept, **options)
        members, together = launches_of(gpu_tools, ENCODERS[name], dtype, kept, **options)
        run([*separate, joint_linear_launch(members)])
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", ["vit + bert, joined", "four lengths"])
def test_every_tile_gives_these_bits(gpu_tools: Any, name: str) -> None:
    kept: list[Any] = []
    separate, alone = launches_of(gpu_tools, ENCODERS[name], HALF, kept, sms=132)
    bit_class = separate[0].operation.bit_class
    assert bit_class is not None
    joints, answers = [], []
    for tile in choose.candidates(bit_class, HALF):
        members, together = launches_of(gpu_tools, ENCODERS[name], HALF, kept, sms=132)
        joints.append(joint_linear_launch(members, tile=tile))
        answers.append(together)
    run([*separate, *joints])
    for joint, together in zip(joints, answers, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True)), joint.tile


@pytest.mark.parametrize("name", list(GROUPS))
def test_small_groups(gpu_tools: Any, name: str) -> None:
    kept: list[Any] = []
    separate, alone = launches_of(gpu_tools, GROUPS[name], HALF, kept)
    members, together = launches_of(gpu_tools, GROUPS[name], HALF, kept)
    run([*separate, joint_linear_launch(members)])
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


CONVOLUTIONS: list[tuple[dict[str, Any], torch.dtype]] = [
    ({"channels": 64}, HALF),
    ({"channels": 64}, FULL),
    ({"channels": 16, "activation": "silu"}, HALF),
    ({"channels": 128, "stride": (2, 2), "vectors": ("shift",), "residual": True}, BRAIN),
]


@pytest.mark.parametrize(("options", "dtype"), CONVOLUTIONS)
def test_convolutions_have_the_bits_of_a_launch_each(
    gpu_tools: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    layers = [(4, 4, 28, 128), (4, 3, 14, 256), (2, 2, 56, 64)]
    kept: list[Any] = []
    separate, alone = convolutions_of(gpu_tools, layers, dtype, kept, sms=132, **options)
    members, together = convolutions_of(gpu_tools, layers, dtype, kept, sms=132, **options)
    run([*separate, joint_launch(members)])
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
