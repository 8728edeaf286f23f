"""What a figure finds: rows with a target each, and the data behind them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch_mux.bench.load import Outcome

__all__ = ["Finding", "Row", "cells", "lateness", "ratio"]

#: Seconds that a generator may be late before it has to be said.
_LATE: Final = 1e-3


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what was measured.
        measured: None where it could not be told.
        bound: the target, None where none is set.
        most: whether the target is the most it may be, or else the least.
        unit: of both.
        void: why the measurement does not count, if so: it misses its target then.
    """

    name: str
    measured: float | None
    bound: float | None
    most: bool = True
    unit: str = ""
    void: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.bound is None:
            return None
        if self.void or self.measured is None or not math.isfinite(self.measured):
            return False
        return self.measured <= self.bound if self.most else self.measured >= self.bound

    def data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        finite = self.measured is not None and math.isfinite(self.measured)
        return {
            "name": self.name,
            "measured": self.measured if finite else None,
            "bound": self.bound,
            "most": self.most,
            "unit": self.unit,
            "void": self.void,
            "passed": self.passed,
        }


@dataclass(frozen=True)
class Finding:
    """What one figure found.

    Attributes:
        rows: of the table.
        data: plain data for the record and its plots.
        errors: what failed in it without ending it, in words.
        notes: what a reader of the table should know.
    """

    rows: tuple[Row, ...]
    data: Mapping[str, Any]
    errors: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())


def lateness(runs: Iterable[Outcome]) -> tuple[str, ...]:
    """A note where the generator injected requests of these runs late: it, not the server, was the limit."""
    worst = max((run.lag for run in runs), default=0.0)
    if worst <= _LATE:
        return ()
    return (f"the generator was late, p99 {worst * 1e3:.1f} ms: so much of the latency may be its own",)


def ratio(value: float | None, base: float | None) -> float | None:
    """``value / base``; None where one of them is missing or infinite, or the base is 0."""
    if value is None or base is None or not base or not (math.isfinite(value) and math.isfinite(base)):
        return None
    return value / base


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return f"{shown} {unit}".strip()


def cells(figure: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the record as words: figure, what, target, measured, verdict."""
    target, verdict = "-", "-"
    if row["bound"] is not None:
        target = f"{'<=' if row['most'] else '>='} {_number(row['bound'], row['unit'])}"
        verdict = "pass" if row["passed"] else "MISS"
        if row.get("void"):
            verdict += f", {row['void']}"
    return figure, row["name"], target, _number(row["measured"], row["unit"]), verdict
