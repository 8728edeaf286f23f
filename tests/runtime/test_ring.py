"""The table of a bundle: layout, padding and alignment."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torch_mux.compat import native
from torch_mux.runtime.ring import RingEntry, TableLayout, TableRing


@pytest.fixture(params=["Python", "C++"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are written by one form or the other."""
    built = native.build()
    monkeypatch.setitem(native._state, "checks", built if request.param == "C++" else native.PythonChecks())


@pytest.mark.parametrize("slots", [1, 2, 3, 16, 33])
def test_every_section_is_written_where_the_views_read(slots: int) -> None:
    layout = TableLayout(slots, inputs=2, outputs=1)
    entry = RingEntry(layout.words, pinned=False)
    columns = [[torch.zeros(3) for _ in range(slots)] for _ in range(3)]
    entry.fill(layout, list(range(10, 10 + slots)), 66, columns[:2], columns[2:])
    table = entry.host
    assert layout.control(table).tolist() == [slots, 66]
    assert layout.control_of_all(table).tolist() == [slots, 66]
    assert layout.rows(table).tolist() == list(range(10, 10 + slots))
    assert layout.input(table, 1).tolist() == [tensor.data_ptr() for tensor in columns[1]]
    assert layout.output(table, 0).tolist() == [tensor.data_ptr() for tensor in columns[2]]


def test_padding_repeats_the_first_request() -> None:
    layout = TableLayout(5, inputs=1, outputs=1)
    entry = RingEntry(layout.words, pinned=False)
    inputs, outputs = [torch.zeros(1) for _ in range(3)], [torch.zeros(1) for _ in range(3)]
    entry.fill(layout, [7, 8, 9], 132, [inputs], [outputs])
    table = entry.host
    assert layout.control(table).tolist() == [3, 132]
    assert layout.control_of_all(table).tolist() == [5, 132]
    assert layout.rows(table).tolist() == [7, 8, 9, 7, 7]
    assert layout.input(table, 0)[3:].tolist() == [inputs[0].data_ptr()] * 2
    assert layout.output(table, 0)[3:].tolist() == [outputs[0].data_ptr()] * 2
    entry.deactivate()
    assert layout.control(table).tolist() == [0, 132]


def test_tables_behind_others_leave_them_as_they_are() -> None:
    """Those of the programs of a mix."""
    layout = TableLayout(3, inputs=1, outputs=0)
    entry = RingEntry(3 * layout.words, pinned=False)
    tensors = [torch.zeros(2) for _ in range(3)]
    entry.host.fill_(-7)
    entry.fill(layout, [4, 5, 6], 9, [tensors], [], start=layout.words)
    before, own, after = entry.host.split(layout.words)
    assert before.eq(-7).all() and after.eq(-7).all()
    assert layout.rows(own).tolist() == [4, 5, 6]
    assert layout.input(own, 0).tolist() == [tensor.data_ptr() for tensor in tensors]
    with pytest.raises(ValueError, match="does not fit"):
        entry.fill(layout, [4], 9, [tensors[:1]], [], start=2 * layout.words + 2)


def test_views_are_addressed_where_they_begin() -> None:
    layout = TableLayout(1, inputs=1, outputs=1)
    entry = RingEntry(layout.words, pinned=False)
    view, nothing = torch.zeros(4, 4)[1:, 2:], torch.empty(0)
    entry.fill(layout, [1], 2, [[view]], [[nothing]])
    assert layout.input(entry.host, 0).tolist() == [view.data_ptr()]
    assert layout.output(entry.host, 0).tolist() == [nothing.data_ptr()]


@pytest.mark.parametrize("slots", range(1, 9))
def test_sections_start_on_sixteen_bytes(slots: int) -> None:
    layout = TableLayout(slots, inputs=3, outputs=2)
    starts = [layout.section(number).start for number in range(6)]
    assert all(start % 2 == 0 for start in starts)
    assert layout.section(5).stop <= layout.words


def test_entries_take_turns() -> None:
    ring = TableRing(3, 8, torch.device("cpu"))
    taken: list[Any] = [ring.take(None) for _ in range(6)]
    assert taken[:3] == taken[3:]
    assert len(set(map(id, taken))) == 3
