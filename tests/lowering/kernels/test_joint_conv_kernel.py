"""Convolutions of several programs in one launch, in Triton's interpreter: the bits of a launch each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from joint_layers import convolutions_of

from torch_mux.lowering.kernels.joint_launches import joint_launch

pytestmark = pytest.mark.interpreter
HALF, FULL = torch.float16, torch.float32

#: (slots, active, size, channels out) of each program.
LAYERS = {
    "two": [(2, 2, 6, 20), (1, 1, 5, 32)],
    "three": [(2, 1, 6, 24), (1, 1, 7, 16), (3, 2, 5, 33)],
    "four": [(1, 1, 6, 16), (2, 0, 5, 8), (1, 1, 5, 40), (1, 1, 8, 16)],
}


def check(tools: Any, name: str, dtype: torch.dtype, **geometry: Any) -> None:
    kept: list[Any] = []
    members, together = convolutions_of(tools, LAYERS[name], dtype, kept, **geometry)
    joint = joint_launch(members)
    joint.run()
    separate, alone = convolutions_of(tools, LAYERS[name], dtype, kept, tile=joint.tile, **geometry)
    for launch in separate:
        launch.run()
    for (_, active, _, _), one, other in zip(LAYERS[name], alone, together, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(other[active:], torch.full_like(other[active:], 7.0))


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("name", list(LAYERS))
def test_one_launch_gives_the_bits_of_a_launch_each(tools: Any, name: str, dtype: torch.dtype) -> None:
    check(tools, name, dtype)


@pytest.mark.parametrize("options", [
    {"kernel": (1, 1), "stride": (2, 2), "padding": (0, 0)},
    {"kernel": (3, 3), "stride": (2, 1), "dilation": (1, 2), "residual": True},
    {"channels": 64, "vectors": ("shift",), "activation": "silu"},
    {"kernel": (1, 3), "padding": (0, 1), "vectors": ()},
])  # fmt: skip
def test_kernels_and_epilogues(tools: Any, options: dict[str, Any]) -> None:
    check(tools, "two", HALF, **options)


def test_other_kernels_and_channels_do_not_match(tools: Any) -> None:
    kept: list[Any] = []
    (one, _), _ = convolutions_of(tools, LAYERS["two"], HALF, kept)
    for other in ({"stride": (2, 2)}, {"channels": 16}, {"activation": "none"}, {"residual": True}):
        (_, two), _ = convolutions_of(tools, LAYERS["two"], HALF, kept, **other)
        assert not one.operation.matches(two.operation)
        with pytest.raises(ValueError, match="do not match"):
            joint_launch([one, two])
