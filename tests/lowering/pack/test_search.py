"""The list scheduler: complete schedules, near the best there is by exhaustive search."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_mux.lowering.kernels.operation import Operation
from torch_mux.lowering.pack.costs import smallest_grid
from torch_mux.lowering.pack.schedule import Place, Schedule
from torch_mux.lowering.pack.search import pack
from torch_mux.lowering.pack.words import BESIDE

UNITS, SMS = 4, 8


class Waves:
    """A launch takes 2, and 1 a wave of its tiles over the multiprocessors, each as long as its work."""

    def seconds(self, operations: Sequence[Operation], sms: int) -> float:
        tiles = sum(operation.sizes[0][0] for operation in operations)
        longest = max(operation.sizes[0][2] for operation in operations)
        return 2.0 + -(-tiles // sms) * longest


def operation(form: str, tiles: int, work: int) -> Operation:
    return Operation("linear", ((tiles, 1, work),), torch.float16, form=form or None)


Graphs = Sequence[Sequence[Operation]]
Group = tuple[Place, ...]


def groupings(heads: Sequence[Place], graphs: Graphs) -> Iterator[list[Group]]:
    """Every way to divide the heads into launches."""
    if not heads:
        yield []
        return
    first, *rest = heads
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            group = (first, *others)
            one = graphs[first[0]][first[1]]
            if all(one.matches(graphs[member][index]) for member, index in others):
                for more in groupings([head for head in rest if head not in others], graphs):
                    yield [group, *more]


def shares(count: int, units: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (units,)
        return
    for first in range(1, units - count + 2):
        for rest in shares(count - 1, units - first):
            yield (first, *rest)


def exhaustive(graphs: Graphs) -> float:
    """The least time of all sequences of words: every grouping, every delay, every cap, every filling."""
    cost, lengths = Waves(), tuple(map(len, graphs))

    def take(group: Group, share: int, beside: bool) -> float:
        found = cost.seconds([graphs[member][index] for member, index in group], SMS * share // UNITS)
        return found * BESIDE if beside else found

    @functools.cache
    def best(at: tuple[int, ...]) -> float:
        if at == lengths:
            return 0.0
        heads = [(member, index) for member, index in enumerate(at) if index < lengths[member]]
        least = float("inf")
        for count in range(1, len(heads) + 1):
            for chosen in itertools.combinations(heads, count):
                for groups in groupings(chosen, graphs):
                    for caps in shares(len(groups), UNITS):
                        least = min(least, *words(at, groups, caps))
        return least

    def words(at: tuple[int, ...], groups: list[Group], caps: tuple[int, ...]) -> Iterator[float]:
        beside = len(groups) > 1
        options = []
        for group, cap in zip(groups, caps):
            member, index = group[0]
            used = take(group, cap, beside)
            runs = [(used, 1)]
            if len(group) == 1 and beside:
                for more in range(index + 1, lengths[member]):
                    used += take(((member, more),), cap, beside)
                    runs.append((used, more - index + 1))
            options.append(runs)
        for picked in itertools.product(*options):
            after = list(at)
            for group, (_, count) in zip(groups, picked):
                for member, index in group:
                    after[member] = index + count
            yield max(seconds for seconds, _ in picked) + best(tuple(after))

    return best((0,) * len(graphs))


operations = st.builds(operation, st.sampled_from(["", "a", "b"]), st.integers(1, 12), st.integers(1, 6))
graphs_of = st.lists(st.lists(operations, max_size=4), min_size=1, max_size=3)


def check_complete(schedule: Schedule) -> None:
    """Every launch once and in order, matches that match, caps within the device, times that add up."""
    cost = Waves()
    done = [0] * len(schedule.members)
    for word in schedule.words:
        assert sum(strand.sms for strand in word.strands) <= SMS
        beside = BESIDE if len(word.strands) > 1 else 1.0
        times = []
        for strand in word.strands:
            used = 0.0
            for step in strand.steps:
                found = [schedule.operation(place) for place in step]
                assert all(found[0].matches(other) for other in found[1:])
                assert len({member for member, _ in step}) == len(step) <= 4
                for member, index in step:
                    assert done[member] == index
                    done[member] += 1
                used += beside * cost.seconds(found, strand.sms)
            times.append(used)
        assert word.seconds == pytest.approx(max(times))
    assert done == [len(member) for member in schedule.members]


@settings(max_examples=60, deadline=None)
@given(graphs_of)
@example([[operation("", 1, 1), operation("", 7, 3)], [operation("", 1, n) for n in (4, 1, 1)]])
@example(
    [
        [operation("", 1, 1), operation("", 7, 3), operation("", 7, 3)],
        [operation("", 1, n) for n in (3, 6, 4)],
    ]
)
@example([[operation("", 7, 4)], [operation("", 5, 3), operation("", 1, 1), operation("", 9, 5)]])
def test_within_a_tenth_of_exhaustive_search(graphs: list[list[Operation]]) -> None:
    schedule = pack(graphs, Waves(), SMS, units=UNITS)
    check_complete(schedule)
    assert schedule.seconds <= 1.1 * exhaustive(graphs) + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(operations, max_size=12), min_size=1, max_size=6))
def test_larger_schedules_are_complete_and_no_worse_than_serial(graphs: list[list[Operation]]) -> None:
    schedule = pack(graphs, Waves(), SMS, units=8)
    check_complete(schedule)
    assert schedule.seconds <= schedule.serial + 1e-9


def test_a_launch_waits_for_its_match_where_that_pays() -> None:
    long = [operation("a", 4, 6), operation("b", 4, 6)]
    late = [operation("", 8, 1), operation("a", 4, 6), operation("b", 4, 6)]
    schedule = pack([long, late], Waves(), SMS, units=UNITS)
    assert [strand.steps for strand in schedule.words[0].strands] == [(((1, 0),),)]
    assert schedule.matched == 2
    assert pack([long, late], Waves(), SMS, units=UNITS, match=False).matched == 0


def test_what_does_not_pay_is_not_matched() -> None:
    """Two launches that fill the device are as good one after another as one, if not better."""
    short, heavy = operation("a", 80, 1), operation("a", 8, 60)
    schedule = pack([[short], [heavy]], Waves(), SMS, units=UNITS)
    assert schedule.matched == 0


def test_a_search_pauses_often() -> None:
    graphs = [[operation(f"{member}", 30, 10) for _ in range(12)] for member in range(3)]
    pauses: list[int] = []
    paused = pack(graphs, Waves(), SMS, pause=lambda: pauses.append(1))
    assert paused == pack(graphs, Waves(), SMS)
    assert len(pauses) >= 36


def test_a_search_keeps_to_its_effort() -> None:
    """Of many launches the beam narrows: what is looked at does not grow with their product."""
    graphs = [[operation("ab"[at % 2], 20 + at, 10) for at in range(30)] for _ in range(3)]
    pauses: list[int] = []

    def alternatives(effort: int) -> int:
        pauses.clear()
        schedule = pack(graphs, Waves(), SMS, effort=effort, pause=lambda: pauses.append(1))
        check_complete(schedule)
        assert schedule.seconds <= schedule.serial + 1e-9
        return len(pauses)

    few, some, all_of_them = map(alternatives, (1, 150_000, 1 << 40))
    assert few <= 90  # one at each number of launches done
    assert few < some < all_of_them


def test_more_members_than_units_run_beside_each_other() -> None:
    graphs = [[operation(f"{member}", 2, 8) for _ in range(3)] for member in range(UNITS + 2)]
    schedule = pack(graphs, Waves(), SMS, units=UNITS)
    check_complete(schedule)
    assert max(len(word.strands) for word in schedule.words) == UNITS
    assert schedule.seconds < 0.5 * schedule.serial


def test_no_members_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one member"):
        pack([], Waves(), SMS)


@given(st.integers(0, 2000), st.integers(1, 600))
def test_the_smallest_grid_has_as_many_waves(tiles: int, programs: int) -> None:
    grid = smallest_grid(tiles, programs)
    waves = -(-tiles // programs)
    assert grid <= programs
    assert tiles <= grid * waves
    assert tiles == 0 or tiles > (grid - 1) * waves
