"""Shared fixtures: every test starts with an empty Dynamo and an empty runtime."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Every test lowers what it serves, in processes of its own too; those of the kept plans say otherwise.
os.environ["TORCH_MUX_KEEP_PLANS"] = "0"

# How fast a machine is decides no test, nor do dice that fall differently for a change that has nothing to do
# with them: other examples than these are drawn with --hypothesis-profile=explore.
unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("explore", **unhurried)  # type: ignore[arg-type]
settings.register_profile("same", derandomize=True, **unhurried)  # type: ignore[arg-type]
settings.load_profile("same")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Convolutions in true float32, as products are: answers are compared more closely than TF32 allows."""
    # By the setters themselves: torch.testing's internals freeze torch.backends once they are imported.
    allowed = torch._C._get_cudnn_allow_tf32()
    torch._C._set_cudnn_allow_tf32(False)
    yield
    torch._C._set_cudnn_allow_tf32(allowed)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """No compiled code, no instances and no settings are left over from another test."""
    yield
    if "torch_mux.runtime.engine" in sys.modules:
        import torch_mux

        torch_mux.reset()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
