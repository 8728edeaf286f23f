"""A retired plan: the model runs on Inductor's code for it alone, explain() says why, and it comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torch_mux
from torch_mux import state
from torch_mux.types import FallbackKind


def test_a_model_whose_plan_keeps_raising_is_served_by_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    served, x = torch.compile(model, backend="mux"), torch.randn(3, 8)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(served(x), expected)
        (program,) = state.engine()._served.values()
        plan = program.plan
        assert plan is not None and plan.coalesced

        def broken(*_: object) -> object:
            raise RuntimeError("a kernel went wrong")

        monkeypatch.setattr(plan, "run", broken)
        for _ in range(8):
            with pytest.raises(torch_mux.ExecutionFailed, match="a kernel went wrong"):
                served(x)
        assert state.engine().quiesce(120)
        torch.testing.assert_close(served(x), expected)
        first, second = torch_mux.gather((served, x), (served, 2 * x))
        torch.testing.assert_close(first, expected)
        torch.testing.assert_close(second, model(2 * x))
    text = str(torch_mux.explain())
    assert FallbackKind.RETIRED.value in text and "8 times in a row" in text


@pytest.mark.parametrize("value", [-1, 1.5, True, "often", float("inf")])
def test_the_setting_is_checked(value: object) -> None:
    with pytest.raises(torch_mux.InvalidSetting, match="straggler"):
        torch_mux.configure(straggler=value)


def test_the_setting_is_taken_over_by_what_runs() -> None:
    served, x = torch.compile(nn.Linear(4, 4).eval(), backend="mux"), torch.ones(1, 4)
    with torch.inference_mode():
        served(x)
    torch_mux.configure(straggler=0)
    (dispatcher,) = state.engine()._dispatchers.values()
    assert dispatcher._runner.retirement.factor == 0
