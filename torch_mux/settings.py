"""Process-wide settings with environment defaults."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

__all__ = ["Settings"]


def _flag(name: str, default: bool) -> bool:
    value = os.environ.get(name)
    return default if value is None else value.strip().lower() not in ("", "0", "false", "no", "off")


def _count(name: str) -> int | None:
    value = os.environ.get(name, "").strip()
    return int(value) if value.isdigit() and int(value) > 0 else None


@dataclass(frozen=True)
class Settings:
    """What ``torch_mux.configure`` changes.

    Attributes:
        enabled: False sends every new graph to Inductor whole (``TORCH_MUX_ENABLED``).
        max_wait: seconds a request may wait for companions while the device is idle.
        max_bundle: most slots in one bundle.
        lanes: CUDA streams that bundles of tenants without a reserve are spread over.
        isolation: how a ``reserve`` is kept free: "off": not at all; "priority": such tenants have a stream
            whose work goes first; "caps": and the others keep to the multiprocessors that are left while one
            of them is at work; "green": and both run on multiprocessors of their own.
        in_flight: most bundles enqueued on one lane.
        segment: seconds after which a captured plan lets a more urgent bundle go first, on a lane that is
            made for it; None: a bundle that is under way is waited for. Not with isolation "green".
        linger: longest adaptive wait, in seconds, for closed-loop clients of the last bundle.
        capture: replay captured CUDA graphs (``TORCH_MUX_CAPTURE``); off launches directly.
        quarantine: requests in a row that raise while they run after which their tenant is refused, for 0.1 s
            and up to 30 s if it goes on; 0: never.
        straggler: how many times its usual device time a bundle takes that is slow; after eight in a row its
            program runs per instance for a while. 0: never.
        pack: most programs whose bundles go out as one (``TORCH_MUX_PACK``); 1: every program by itself;
            None: 8 on a GPU, and 1 on the CPU, where it saves nothing.
        branches: programs whose bundles may run beside each other on a lane, each on its own stream
            (``TORCH_MUX_BRANCHES``); 1: one after another; None: 4 on a GPU, and 1 on the CPU.
        beside: what bundles beside each other may use together, in devices, each in proportion to the time
            that it needs; None: each may use the whole device.
        pack_after: seconds for which a mix of programs has to come again and again before one plan is made
            for it.
        match: launches of programs that go out as one are made one where they match; off: they only run
            beside each other (``TORCH_MUX_MATCH``).
        switch_interval: seconds for which a compile or capture keeps the interpreter while others want it,
            in place of Python's 5 ms, which is restored after each such job; 0: Python's.
        collector: who collects Python's cyclic garbage while models are served: "python": Python, as it is
            set; "idle": the runtime, in moments in which nothing is pending or under way, and Python small
            parts of it where there is no such moment for long.
        keep_plans: keep programs and plans on disk for later processes (``TORCH_MUX_KEEP_PLANS``).
    """

    enabled: bool = field(default_factory=lambda: _flag("TORCH_MUX_ENABLED", True))
    max_wait: float = 0.0
    max_bundle: int = 64
    lanes: int = 1
    isolation: str = "caps"
    in_flight: int = 2
    segment: float | None = None
    linger: float = 200e-6
    capture: bool = field(default_factory=lambda: _flag("TORCH_MUX_CAPTURE", True))
    quarantine: int = 16
    straggler: float = 8.0
    pack: int | None = field(default_factory=lambda: _count("TORCH_MUX_PACK"))
    branches: int | None = field(default_factory=lambda: _count("TORCH_MUX_BRANCHES"))
    beside: float | None = None
    pack_after: float = 1.0
    match: bool = field(default_factory=lambda: _flag("TORCH_MUX_MATCH", True))
    switch_interval: float = 100e-6
    collector: str = "python"
    keep_plans: bool = field(default_factory=lambda: _flag("TORCH_MUX_KEEP_PLANS", True))
