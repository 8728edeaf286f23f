"""Tenants whose requests keep raising are held off, for longer and longer, and nobody else is."""

from __future__ import annotations

import pytest
import torch
from clocks import Punctual
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_mux
from torch_mux import state
from torch_mux.runtime.quarantine import Quarantine

A = ("a", "Net")


def test_it_opens_after_the_limit_and_doubles() -> None:
    quarantine = Quarantine(lambda: 3)
    cause = ValueError("bad")
    for now in (0.0, 1.0):
        quarantine.failed(A, now, cause)
        assert quarantine.held(A, now) is None
    quarantine.failed(A, 2.0, cause)
    assert quarantine.held(A, 2.0) == (pytest.approx(0.1), 3, "bad")
    assert quarantine.held(A, 2.11) is None and quarantine.held(("b", "Net"), 2.0) is None
    quarantine.failed(A, 3.0, cause)
    held = quarantine.held(A, 3.0)
    assert held is not None and held[0] == pytest.approx(0.2)
    assert quarantine.tenants(3.0) == {A: pytest.approx(0.2)}
    quarantine.succeeded(A)
    assert quarantine.held(A, 3.0) is None and not quarantine.watching


@given(st.integers(1, 5), st.lists(st.booleans(), max_size=60))
def test_only_a_run_of_failures_holds_anybody(limit: int, outcomes: list[bool]) -> None:
    quarantine = Quarantine(lambda: limit)
    run, now = 0, 0.0
    for well in outcomes:
        now += 100.0
        if well:
            quarantine.succeeded(A)
        else:
            quarantine.failed(A, now, None)
        run = 0 if well else run + 1
        held = quarantine.held(A, now)
        assert (held is not None) == (run >= limit)
        assert held is None or 0.0999 <= held[0] <= 30.0001


def test_zero_is_never() -> None:
    quarantine = Quarantine(lambda: 0)
    for now in range(100):
        quarantine.failed(A, float(now), None)
    assert quarantine.held(A, 99.0) is None


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)


def test_the_engine_refuses_the_tenant_and_serves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Punctual()
    torch_mux.configure(quarantine=3)
    engine = state.engine()
    monkeypatch.setattr(engine, "clock", clock)
    engine.reset()
    model = torch.compile(Table().eval(), backend="mux")
    other = torch.compile(nn.Sequential(nn.Linear(4, 4)).eval(), backend="mux")
    good, bad = torch.tensor([1]), torch.tensor([9])
    with torch.inference_mode():
        torch_mux.gather((model, good), (other, torch.ones(1, 4)))
        with torch_mux.quota("mallory"):
            for _ in range(3):
                with pytest.raises(torch_mux.ExecutionFailed):
                    torch_mux.gather((model, bad))
            with pytest.raises(torch_mux.Quarantined, match=r"mallory.*last 3 requests") as caught:
                torch_mux.gather((model, good))
            torch_mux.gather((other, torch.ones(1, 4)))
            assert isinstance(caught.value, torch_mux.Refused)
        with torch_mux.quota("alice"):
            torch_mux.gather((model, good))
        health = torch_mux.health()
        assert health.status == "degraded" and list(health.quarantined) == [("mallory", "Table")]
        assert "mallory" in str(health)
        clock.skips(0.2)
        with torch_mux.quota("mallory"):
            torch_mux.gather((model, good))
    assert torch_mux.health().status == "ok"
    got = torch_mux.stats().tenants["mallory"]
    assert (got.errors, got.refused, got.ok) == (3, 1, 2)
    assert got.accepted == got.ok + got.errors and got.pending == 0


@pytest.mark.parametrize("value", [-1, True, 1.5, "often"])
def test_the_setting_is_checked(value: object) -> None:
    with pytest.raises(torch_mux.InvalidSetting, match="quarantine"):
        torch_mux.configure(quarantine=value)


def test_records_are_bounded_and_who_is_held_off_stays_so() -> None:
    quarantine = Quarantine(lambda: 2)
    for _ in range(3):
        quarantine.failed(A, 0.0, ValueError("bad"))
    for number in range(5000):
        quarantine.failed((f"t{number}", "Net"), 0.1, ValueError("once"))
    assert len(quarantine._records) <= 1024
    assert quarantine.held(A, 0.15) is not None
