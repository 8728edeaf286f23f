"""The list scheduler: words chosen one after another, with a few alternatives kept open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from torch_mux.lowering.kernels.operation import Operation
from torch_mux.lowering.pack.schedule import Schedule, Strand, Word
from torch_mux.lowering.pack.words import FEW, Candidate, Positions, Problem
from torch_mux.types import CostModel

__all__ = ["BEAM", "pack"]

#: Alternatives kept open at each number of launches done, for few members and for many.
BEAM: Final = (16, 6)
#: Strands of words that a search looks at, about: a core looks at some 400,000 a second.
EFFORT: Final = 600_000


class _State(NamedTuple):
    elapsed: float
    word: Candidate | None
    before: _State | None


class _Outlook:
    """What is left to do, as a number to compare alternatives by: no bound, but near what can be reached.

    It is the longest chain, or the device time of all launches less what matches still to come may save.
    """

    def __init__(self, problem: Problem) -> None:
        members = range(len(problem.lengths))
        least = max(1, problem.units // max(1, len(problem.lengths)))
        self._chains: list[list[float]] = []
        self._areas: list[list[float]] = []
        for member in members:
            steps = [((member, index),) for index in range(problem.lengths[member])]
            self._chains.append(_suffixes([problem.seconds(step, problem.units) for step in steps]))
            self._areas.append(_suffixes([problem.area(step, least) for step in steps]))
        self._savings = {(a, b): _savings(problem, a, b, least) for a in members for b in members if a < b}

    def of(self, at: Positions) -> float:
        """Seconds that are left when so many launches of each member are done."""
        chain = max(own[index] for own, index in zip(self._chains, at, strict=True))
        area = sum(own[index] for own, index in zip(self._areas, at, strict=True))
        best = [0.0] * len(at)
        for (a, b), table in self._savings.items():
            saved = table[at[a]][at[b]]
            best[a], best[b] = max(best[a], saved), max(best[b], saved)
        return max(chain, area - sum(best) / 2)


def _suffixes(values: Sequence[float]) -> list[float]:
    sums = [0.0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def _savings(problem: Problem, a: int, b: int, least: int) -> list[list[float]]:
    """Device time that the best matches of two members save, from each pair of positions on."""
    rows, columns = problem.lengths[a], problem.lengths[b]
    table = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    known: dict[tuple[int, int], float] = {}
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            best = max(table[i + 1][j], table[i][j + 1])
            one, other = (a, i), (b, j)
            if problem.matching(one, other):
                key = problem.identity(one), problem.identity(other)
                if key not in known:
                    parts = problem.area((one,), least) + problem.area((other,), least)
                    known[key] = parts - problem.area((one, other), least)
                best = max(best, table[i + 1][j + 1] + known[key])
            table[i][j] = best
    return table


class _Pace:
    """How many alternatives may be kept open, so that a search ends when it should.

    Counted is work, not time: the same launches have the same schedule on every machine.
    """

    def __init__(self, beam: int, effort: int) -> None:
        self._beam, self._effort = beam, effort
        self.alternatives = self.strands = 0

    def width(self, levels: int) -> int:
        """For the next of so many levels that are left."""
        each = self.strands / max(1, self.alternatives)
        left = self._effort - self.strands
        return max(1, min(self._beam, int(left / max(1.0, each * levels))))


def pack(
    members: Sequence[Sequence[Operation]],
    cost: CostModel,
    sms: int,
    *,
    units: int = 8,
    match: bool = True,
    beam: int | None = None,
    effort: int = EFFORT,
    pause: Callable[[], object] = lambda: None,
) -> Schedule:
    """The schedule of several members' launches, each member's in its own order.

    A launch waits for its match where that shortens the whole by ``cost``. Lower bounds and the widths of
    beam search are those of list scheduling with a look-ahead (Ow and Morton, "Filtered beam search in
    scheduling", 1988).

    Args:
        members: what each launches, in order.
        cost: of launches, alone or as one, under a cap.
        sms: multiprocessors of the device.
        units: equal parts of the device that caps are made of; no more strands run beside each other.
        match: whether launches may be made one.
        beam: alternatives kept open, instead of :data:`BEAM`; more find better schedules and take longer.
        effort: strands of words to look at, about: the beam narrows to keep to it, down to one alternative.
        pause: called between alternatives, so that others may compute.

    Raises:
        ValueError: no members.
    """
    if not members:
        raise ValueError("a schedule needs at least one member")
    problem = Problem(members, cost, sms, units, match)
    outlook = _Outlook(problem)
    beam = BEAM[len(members) > FEW] if beam is None else beam
    start: Positions = (0,) * len(members)
    levels: list[dict[Positions, _State]] = [{} for _ in range(sum(problem.lengths) + 1)]
    levels[0][start] = _State(0.0, None, None)
    pace = _Pace(beam, effort)
    for done, level in enumerate(levels[:-1]):
        ranked = sorted(level.items(), key=lambda item: (item[1].elapsed + outlook.of(item[0]), item[0]))
        for at, state in ranked[: pace.width(len(levels) - 1 - done)]:
            pause()
            pace.alternatives += 1
            for word in problem.next_words(at):
                pace.strands += len(word.strands)
                _reach(levels, at, state, word)
    final = levels[-1][problem.lengths]
    serial = sum(
        problem.seconds(((member, index),), units)
        for member, length in enumerate(problem.lengths)
        for index in range(length)
    )
    return Schedule(tuple(map(tuple, members)), tuple(_words(problem, final)), serial)


def _reach(levels: list[dict[Positions, _State]], at: Positions, state: _State, word: Candidate) -> None:
    """Notes what ``word`` leads to, unless that is known to be reached sooner."""
    after = list(at)
    for run in word.strands:
        for member, index in run.first:
            after[member] = index + run.more + 1
    reached = tuple(after)
    elapsed = state.elapsed + word.seconds
    level = levels[sum(reached)]
    known = level.get(reached)
    if known is None or elapsed < known.elapsed:
        level[reached] = _State(elapsed, word, state)


def _words(problem: Problem, final: _State) -> list[Word]:
    words: list[Word] = []
    state: _State | None = final
    while state is not None and state.word is not None:
        found = state.word
        strands = [
            Strand(run.steps, problem.cap(share))
            for run, share in zip(found.strands, found.shares, strict=True)
        ]
        words.append(Word(tuple(strands), found.seconds))
        state = state.before
    return words[::-1]
