"""Linear layers of several programs in one launch, in Triton's interpreter: the bits of a launch each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joint_layers import BERT, GROUPS, VIT, Layer, launches_of

from torch_mux.lowering.kernels.data import Tile
from torch_mux.lowering.kernels.joint_linear import joint_linear_launch

pytestmark = pytest.mark.interpreter
HALF, FULL = torch.float16, torch.float32
SMALL = Tile(16, 32, 64, 4, 3, 2)


def check(tools: Any, layers: Sequence[Layer], dtype: torch.dtype, **options: Any) -> None:
    kept: list[Any] = []
    members, together = launches_of(tools, layers, dtype, kept, **options)
    joint = joint_linear_launch(members, tile=options.get("tile"), sms=options.get("sms", 2))
    assert joint.grid <= 2 * joint.tile.programs_per_sm
    joint.run()
    # numpy's products, unlike the device's, depend on the tile
    separate, alone = launches_of(tools, layers, dtype, kept, **{**options, "tile": joint.tile})
    for launch in separate:
        launch.run()
    for layer, one, other in zip(layers, alone, together, strict=True):
        assert torch.equal(one, other)
        assert layer.active == 0 or not torch.equal(other[0], torch.full_like(other[0], 7.0))
        assert torch.equal(other[layer.active :], torch.full_like(other[layer.active :], 7.0))


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("name", list(GROUPS))
def test_one_launch_gives_the_bits_of_a_launch_each(tools: Any, name: str, dtype: torch.dtype) -> None:
    check(tools, GROUPS[name], dtype)


@pytest.mark.parametrize("options", [
    {"residual": True, "activation": "relu"},
    {"vectors": ("scale", "shift"), "activation": "hardswish"},
    {"vectors": (), "activation": "none"},
    {"cap": 1},
    {"tile": SMALL},
    {"tile": Tile(16, 32, 64, 4, 3, 2, second_n=16)},
    {"tile": Tile(16, 64, 64, 4, 3, 2, swap=True)},
])  # fmt: skip
def test_epilogues_caps_and_tiles(tools: Any, options: dict[str, Any]) -> None:
    check(tools, [VIT, BERT], HALF, **options)
    check(tools, GROUPS["parts beside a single weight"], HALF, **options)


layers = st.builds(
    lambda slots, less, m, n, k: Layer(slots, max(0, slots - less), m, (n,), k),
    st.integers(1, 3), st.integers(0, 1), st.integers(1, 40), st.integers(1, 40), st.integers(1, 70),
)  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(layers, min_size=2, max_size=4))
def test_any_sizes(tools: Any, members: list[Layer]) -> None:
    check(tools, members, HALF)


def test_what_does_not_match_is_refused(tools: Any) -> None:
    kept: list[Any] = []
    (one,), _ = launches_of(tools, [VIT], HALF, kept)
    (other,), _ = launches_of(tools, [BERT], HALF, kept, activation="relu")
    with pytest.raises(ValueError, match="do not match"):
        joint_linear_launch([one, other])
    with pytest.raises(ValueError, match="2 to 4"):
        joint_linear_launch([one])


def test_true_fp32_of_few_rows_is_another_class(tools: Any) -> None:
    launches, _ = launches_of(tools, [VIT, Layer(1, 1, 5, (40,), 24)], FULL, [])
    with pytest.raises(ValueError, match="do not match"):
        joint_linear_launch(launches)
