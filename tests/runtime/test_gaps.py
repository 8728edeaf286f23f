"""Python's garbage is collected where nobody waits, and little by little where somebody always does."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from clocks import Told
from counted_collector import CountedCollector
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torch_mux
from torch_mux.compat import SERVING, Rest
from torch_mux.runtime.gaps import Gaps

#: Seconds without a request before each generation is collected.
IDLE = (200e-6, 10e-3, 1.0)
BEFORE = (700, 10, 10)


class World:
    """One device, the thread that has nothing else to do in gaps, and a collector that counts."""

    def __init__(self) -> None:
        self.clock = Told()
        self.collector = CountedCollector(self.clock)
        self.rest = Rest(clock=self.clock, collector=self.collector)
        self.since: float | None = None
        self.gaps = Gaps(self.idle, self.rest, self.clock)
        #: (Generation, seconds that the gap had lasted) of each collection of ours.
        self.ours: list[tuple[int, float]] = []

    def idle(self) -> float:
        return -1.0 if self.since is None else self.clock.now - self.since

    def gap(self, seconds: float) -> None:
        """Nothing comes for so long, or for as long as a collection takes that began before."""
        self.since = self.clock.now
        while (pause := self.gaps.wait()) <= self.since + seconds - self.clock.now:
            self.clock.now += max(pause, 1e-9)
            lasted, before = self.idle(), len(self.collector.done)
            self.gaps.tend()
            self.ours += [(generation, lasted) for generation, _, _ in self.collector.done[before:]]
        self.clock.now = max(self.clock.now, self.since + seconds)
        self.since = None

    def fulls(self) -> int:
        return sum(generation == 2 for generation, _, _ in self.collector.done)


STEPS = st.lists(
    st.tuples(
        st.integers(0, 6_000),
        st.floats(0.0, 1.0),
        st.one_of(st.floats(0.0, 1e-3), st.floats(0.0, 0.1), st.floats(0.0, 3.0)),
    ),
    max_size=40,
)


@given(STEPS)
def test_each_generation_waits_for_its_gap_and_nothing_is_left(steps: list[tuple[int, float, float]]) -> None:
    world = World()
    world.gaps.follow(True)
    for count, share, gap in steps:
        world.collector.make(count, int(share * count))
        assert world.collector.get_count()[0] <= SERVING[0]
        world.gap(gap)
    assert all(lasted >= IDLE[generation] for generation, lasted in world.ours)
    assert not any(automatic and generation == 2 for generation, automatic, _ in world.collector.done)
    done = len(world.collector.done)
    world.gap(1000.0)
    assert sum(world.collector.garbage) == 0
    assert len(world.collector.done) <= done + 3  # nothing new: nothing to look for


@given(st.integers(500, 1_900), st.floats(0.0, 1e-3))
def test_a_short_gap_is_overrun_by_less_than_it_has_lasted(count: int, gap: float) -> None:
    world = World()
    world.gaps.follow(True)
    world.collector.make(count)
    begun = world.clock.now
    world.gap(gap)
    assert world.clock.now - begun <= 2 * gap
    assert [generation for generation, _ in world.ours] in ([], [0])


def test_without_any_gap_memory_is_bounded_and_nothing_is_looked_through_whole() -> None:
    world = World()
    world.gaps.follow(True)
    young, middle, _ = SERVING
    most = 0
    for _ in range(1_500):
        world.collector.make(1_000, 300)
        assert world.gaps.wait() > 0.0
        world.gaps.tend()
        most = max(most, sum(world.collector.garbage))
    assert not world.ours and world.fulls() == 0  # a million and a half new objects
    assert most <= (young + 1) * (middle + 2)
    world.collector.make(30_000_000)
    assert world.fulls() >= 1


def test_full_collections_take_a_hundredth_of_the_time_at_most() -> None:
    world = World()
    world.collector.make(2_000_000)
    world.gaps.follow(True)
    begun, before = world.clock.now, len(world.collector.done)
    for _ in range(100):
        world.collector.make(1_000)
        world.gap(20.0)
    full = sum(generation == 2 for generation, _, _ in world.collector.done[before:])
    assert full >= 2 and (full - 1) * 2_000_000 * 200e-9 <= 0.01 * (world.clock.now - begun)


def test_thresholds_come_back_and_what_a_user_sets_stays() -> None:
    world = World()
    collector = world.collector
    world.gaps.follow(True)
    assert collector.get_threshold() == SERVING
    assert not world.gaps.follow(True)
    world.gaps.follow(False)
    assert collector.get_threshold() == BEFORE
    assert world.gaps.wait() == float("inf")

    world.gaps.follow(True)
    collector.set_threshold(5_000, 20, 20)
    collector.make(4_000)
    world.gap(100.0)
    assert not world.ours  # he has taken it back
    world.gaps.follow(False)
    assert collector.get_threshold() == (5_000, 20, 20)

    world.gaps.follow(True)
    assert collector.get_threshold() == (5_000, SERVING[1], SERVING[2])
    collector.enabled = False
    world.gap(100.0)
    assert not world.ours
    collector.enabled = True
    world.gap(100.0)
    assert world.ours
    world.gaps.follow(False)

    collector.set_threshold(0, 10, 10)
    world.gaps.follow(True)
    assert collector.get_threshold() == (0, 10, 10)
    assert world.gaps.wait() < float("inf")
    world.ours.clear()
    collector.make(4_000)
    world.gap(100.0)
    assert not world.ours  # there was no automatic collection to take over
    world.gaps.follow(False)
    assert collector.get_threshold() == (0, 10, 10)


def test_nobody_collects_while_somebody_traces_and_what_is_left_goes_in_a_gap() -> None:
    world = World()
    world.gaps.follow(True)
    with world.rest.paused():
        world.collector.make(400_000)
        world.gap(10.0)
    assert not world.collector.done and world.collector.get_threshold()[0] == 0
    world.gap(0.5)
    assert not world.ours  # a quiet moment first
    world.clock.now += 1.0
    world.gap(2.0)
    assert world.ours
    deadline = time.monotonic() + 10
    while world.collector.get_threshold() != SERVING and time.monotonic() < deadline:
        time.sleep(0.01)
    assert world.collector.get_threshold() == SERVING
    world.gaps.follow(False)
    assert world.collector.get_threshold() == BEFORE


class Node:
    """Part of a cycle."""

    def __init__(self) -> None:
        self.other: Any = self


def _goes_on() -> None:
    deadline = time.monotonic() + 10
    while not gc.get_threshold()[0] and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.fixture
def served() -> Iterator[Any]:
    """A warm model; who collected objects that only the collector ends, by thread."""
    gc.collect()
    _goes_on()  # since a trace of another test
    found = gc.get_threshold()
    model: Any = torch.compile(nn.Linear(4, 4).eval(), backend="mux", dynamic=False)
    with torch.inference_mode():
        torch_mux.warmup(model, torch.randn(1, 4))
    _goes_on()
    assert gc.get_threshold() == found
    yield model
    torch_mux.reset()
    assert gc.get_threshold() == found


def test_a_users_garbage_goes_in_an_idle_moment_on_the_dispatchers_thread(served: Any) -> None:
    before = gc.get_threshold()
    assert torch_mux.configure(collector="idle").collector == "idle"
    assert gc.get_threshold()[0] == max(before[0], SERVING[0])
    threads: set[str] = set()
    with torch.inference_mode():
        torch_mux.gather((served, torch.randn(1, 4)))
    node = Node()
    gone = weakref.ref(node, lambda _: threads.add(threading.current_thread().name))
    del node
    deadline = time.monotonic() + 20
    while not threads and time.monotonic() < deadline:
        if gc.get_count()[0] < 1000:  # what older tests leave and others end now is taken off
            rubbish = [Node() for _ in range(600)]
            del rubbish
        time.sleep(0.05)
    assert gone() is None
    assert threads == {"torch_mux-dispatch"}
    torch_mux.configure(collector="python")
    assert gc.get_threshold() == before


def test_the_end_of_an_engine_gives_the_collector_back(served: Any) -> None:
    before = gc.get_threshold()
    torch_mux.configure(collector="idle")
    assert gc.get_threshold() != before
    torch_mux.close()
    assert gc.get_threshold() == before
    torch_mux.reset()
    assert torch_mux.configure().collector == "python"


def test_there_are_two_ways(served: Any) -> None:
    with pytest.raises(torch_mux.InvalidSetting, match="one of python, idle"):
        torch_mux.configure(collector="never")
