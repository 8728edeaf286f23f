"""A bundle of a size that is not captured is served by graphs of other sizes, one after another."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux.runtime.executors.parts import enqueue_natively, filled
from torch_mux.runtime.lanes import Executable, Lane
from torch_mux.runtime.ring import Layouts, TableLayout, TableRing
from torch_mux.runtime.scheduler.base import LaneKind
from torch_mux.types import TensorSpec

_FLOATS = 4


@dataclass
class Device:
    """Graphs that double what the lane's table names, written down in order."""

    table: Tensor
    layouts: Layouts
    graphs: dict[int, int] = field(default_factory=dict)
    replays: list[tuple[int, int, int, list[int]]] = field(default_factory=list)
    log: list[tuple[str, Any]] = field(default_factory=list)

    def executable(self, slots: int) -> Executable:
        address = 100 + slots
        self.graphs[address] = slots
        graph: Any = SimpleNamespace(address=address, replay=lambda stream: self.replay(slots))
        return Executable(graph, slots, None)

    def replay(self, slots: int) -> None:
        layout = self.layouts.of(slots)
        active, cap = layout.control(self.table).tolist()
        self.replays.append((slots, active, cap, layout.rows(self.table)[:active].tolist()))
        for slot in range(active):
            read, write = (int(where(self.table, 0)[slot]) for where in (layout.input, layout.output))
            one = (ctypes.c_float * _FLOATS).from_address(read)
            (ctypes.c_float * _FLOATS).from_address(write)[:] = [2.0 * value for value in one]

    def enqueue(
        self,
        stream: int,
        marks: list[int],
        start: int,
        table: int,
        host: int,
        size: int,
        graph: int,
        end: int,
        watched: Any,
    ) -> bool:
        self.log += [("wait", mark) for mark in marks]
        self.log.append(("record", start))
        assert table == self.table.data_ptr()
        ctypes.memmove(table, host, size)
        self.replay(self.graphs[graph])
        self.log += [("replay", self.graphs[graph]), ("record", end), ("watched", list(watched))]
        return bool(watched)


class World:
    """A lane without a stream, and a flight of so many requests."""

    def __init__(self, count: int) -> None:
        spec = TensorSpec.of(torch.zeros(_FLOATS))
        program: Any = SimpleNamespace(inputs=(spec,), outputs=(spec,))
        lane: Any = Lane.__new__(Lane)
        lane.kind, lane.context, lane.address = LaneKind.COMMON, None, 7
        lane.ring = TableRing(2, 512, torch.device("cpu"))
        self.lane: Lane = lane
        layouts = Layouts(program)
        self.device = Device(lane.ring.table, layouts)
        self.requests = [
            SimpleNamespace(inputs=(torch.full((_FLOATS,), float(n)),), outputs=[torch.zeros(_FLOATS)])
            for n in range(count)
        ]
        bundle = SimpleNamespace(served=SimpleNamespace(layouts=layouts), requests=self.requests, limit=0.5)
        mark = lambda address: SimpleNamespace(address=address, wait=lambda: None)  # noqa: E731
        self.flight: Any = SimpleNamespace(bundle=bundle, start=mark(1), end=mark(2), way=())
        self.marks: Any = [mark(11), mark(12)]

    def fill(self, *sizes: int) -> tuple[Any, Any]:
        rows = [10 + number for number in range(len(self.requests))]
        return filled(self.lane, self.flight, rows, [self.device.executable(size) for size in sizes], 132)

    def check(self) -> None:
        for number, request in enumerate(self.requests):
            assert request.outputs[0].tolist() == [2.0 * number] * _FLOATS


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("count", "sizes"), [(3, (3,)), (3, (4,)), (7, (4, 2, 1)), (6, (4, 4))])
def test_every_request_gets_its_own_answer(native: bool, count: int, sizes: tuple[int, ...]) -> None:
    world = World(count)
    entry, parts = world.fill(*sizes)
    if native:
        enqueue_natively(world.device, world.lane, world.flight, world.marks, entry, parts, [])
    else:
        for part in parts:
            world.lane.ring.send(entry, part.layout.words, part.start)
            part.executable.graph.replay(None)
    world.check()
    replays = world.device.replays
    assert [size for size, _, _, _ in replays] == list(sizes)
    assert [row for _, _, _, rows in replays for row in rows] == list(range(10, 10 + count))
    assert {cap for _, _, cap, _ in replays} == {66}
    assert world.flight.way == (LaneKind.COMMON, 66, sizes)


def test_who_waits_for_it_waits_for_all_of_it() -> None:
    """It begins once, behind what it waits for; the end is its last word, and weights are looked at then."""
    world = World(3)
    entry, parts = world.fill(2, 1)
    watched: Any = ["weights"]
    assert enqueue_natively(world.device, world.lane, world.flight, world.marks, entry, parts, watched)
    start, end = 1, 2
    assert world.device.log == [
        ("wait", 11),
        ("wait", 12),
        ("record", start),
        ("replay", 2),
        ("record", end),
        ("watched", []),
        ("record", end),
        ("replay", 1),
        ("record", end),
        ("watched", watched),
    ]


def test_without_graphs_there_is_one_table_of_all_slots() -> None:
    world = World(5)
    _, (part,) = world.fill()
    assert part.executable is None and part.start == 0
    assert part.layout == TableLayout(5, 1, 1)
    assert world.flight.way == (LaneKind.COMMON, 66, ())
