"""stats() and explain(): data first, text second."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux.report import Explanation, Note, ProgramExplanation, Stats
from torch_mux.runtime.accounting import TenantStats
from torch_mux.settings import Settings
from torch_mux.types import FallbackKind, FallbackReason


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()


class Counting(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


def test_nothing_happened_yet() -> None:
    torch_mux.reset()
    assert torch_mux.stats() == Stats()
    assert "0 requests" in str(torch_mux.stats())
    assert "no program" in str(torch_mux.explain())


def test_stats_text() -> None:
    tenant = TenantStats(
        "alice", 9, 3, 1, 1, 1, 0.001, 0.0025, 0.5, 0.1, 0.75, 3 << 20, 2, 1, 4, reserve=0.25
    )
    text = str(Stats({"alice": tenant}, bundles=2, requests=4, device_seconds=0.5, sizes={2: 2}))
    assert "4 requests in 2 bundles" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("alice"))
    assert row == "alice 9 3 2 1 1 1 1 4 1.00 2.50 0.500 100.0% 25% 75% 3.0".split()


def test_program_text() -> None:
    reason = FallbackReason(FallbackKind.NO_RULE, "aten.sort")
    program = ProgramExplanation(
        "Net",
        "0123456789abcdef",
        "ready",
        None,
        True,
        3,
        2**20,
        {"linear": 2},
        4,
        5,
        1,
        (reason,),
        {1: 7, 3: 2},
        ((1, 4),),
    )
    text = str(program)
    assert "Net 0123456789ab: ready, coalesced; 3 instances, 1.0 MiB" in text
    assert "2 linear" in text and "4 fused, 5 in the batched graph, 1 per instance" in text
    assert "7 of 1, 2 of 3" in text and "captured for: 1, 4" in text and "aten.sort: no batching rule" in text


def test_explanation_text() -> None:
    note = Note(FallbackReason(FallbackKind.NOT_REACHED, "LSTM"), 2)
    text = str(Explanation("the CPU", Settings(enabled=False), (), (note,)))
    assert re.search(
        r"1 lane( of 4 branches)? for everybody, one of high priority for tenants with a reserve", text
    )
    assert "disabled" in text and "LSTM: no graph of the model reached the backend, 2 times" in text


def test_served_models_show() -> None:
    model = torch.compile(Net().eval(), backend="mux")
    with torch.inference_mode(), torch_mux.quota("dora"):
        for _ in range(3):
            torch_mux.gather((model, torch.randn(2, 4)))
    got = torch_mux.stats().tenants["dora"]
    assert (got.accepted, got.ok, got.errors, got.pending) == (3, 3, 0, 0)
    (program,) = torch_mux.explain().programs
    assert program.name == "Net" and program.status == "ready" and program.instances == 1
    assert sum(program.bundles.values()) == 3


def test_a_guarded_model_is_noted_with_the_reason() -> None:
    model = torch.compile(Counting().eval(), backend="mux")
    with torch.inference_mode():
        torch_mux.gather((model, torch.randn(2, 4)))
    (note,) = torch_mux.explain().notes
    assert note.reason.kind is FallbackKind.GUARDED and "side effect" in note.reason.detail


def test_a_model_that_never_reaches_the_backend() -> None:
    model = torch.compile(nn.LSTM(4, 4).eval(), backend="mux")
    with torch.inference_mode(), pytest.warns(UserWarning, match="LSTM: no graph of the model reached"):
        torch_mux.gather((model, torch.randn(3, 1, 4)))
    assert any(note.reason.kind is FallbackKind.NOT_REACHED for note in torch_mux.explain().notes)


def test_an_eval_call_with_grad_enabled() -> None:
    model = torch.compile(Net().eval(), backend="mux")
    with pytest.warns(UserWarning, match="grad is enabled"):
        torch_mux.gather((model, torch.randn(2, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_mux.gather((model, torch.randn(2, 4)))
    assert [note.reason.kind for note in torch_mux.explain().notes] == [FallbackKind.TRAINING]


def test_segments_are_a_setting_and_explained() -> None:
    assert "segments" not in str(torch_mux.explain())
    assert torch_mux.configure(segment="2ms").segment == 2e-3
    assert "long plans are cut into segments of 2.00 ms" in str(torch_mux.explain())
    for value in (0, "-1ms", 0.0):
        with pytest.raises(torch_mux.MuxError):
            torch_mux.configure(segment=value)
    assert torch_mux.configure(segment=None).segment is None
    assert "segments" not in str(torch_mux.explain())
    one = ProgramExplanation("Net", "f" * 40, "ready", None, True, 1, 0, {}, 0, 0, 0, (), {}, ((1, 4),))
    assert "captured for: 1, 4\n" in f"{one}\n"
    assert "captured for: 1, 4 (in up to 5 segments)" in str(replace(one, segments=5))
