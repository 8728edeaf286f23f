"""Captured sizes that serve a bundle together."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_mux.runtime.executors.cover import cover, worth_waiting


@pytest.mark.parametrize(
    ("slots", "sizes", "expected"),
    [
        (3, (), ()),
        (3, (1, 3, 8), (3,)),
        (5, (1, 8), (8,)),
        (1, (8,), (8,)),
        (3, (1, 2, 64), (2, 1)),
        (12, (1, 64), (64,)),
        (12, (1,), (1,) * 12),
        (40, (1,), ()),  # so many replays would cost the host more than they are worth
        (33, (1, 32, 64), (32, 1)),
    ],
)
def test_the_cheapest_graphs_that_hold_all_slots(
    slots: int, sizes: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert cover(slots, frozenset(sizes)) == expected


def cost(found: tuple[int, ...]) -> int:
    return sum(8 + size for size in found)


@given(st.integers(1, 12), st.frozensets(st.integers(1, 16), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_no_other_graphs_are_cheaper(slots: int, sizes: frozenset[int]) -> None:
    found = cover(slots, sizes)
    assert set(found) <= sizes and sum(found) >= slots
    # All of them are needed: each has a slot of the bundle.
    assert sum(found[:-1]) < slots
    if slots in sizes:
        assert found == (slots,)
        return
    others = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(sorted(sizes), count) for count in range(1, 5)
    )
    assert cost(found) <= min((cost(one) for one in others if sum(one) >= slots), default=cost(found))


def test_a_size_that_others_serve_badly_is_not_waited_with() -> None:
    assert worth_waiting(5, (8,)) and worth_waiting(2, (1, 1))
    assert not worth_waiting(1, (64,)) and not worth_waiting(12, (1,) * 12)
    assert not worth_waiting(3, ())
