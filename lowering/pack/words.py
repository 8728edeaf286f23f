"""Words of a packing problem: what may run beside each other next, under which caps, for how long."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate, permutations, product
from typing import Final, NamedTuple

from torch_mux.lowering.kernels.operation import Operation
from torch_mux.lowering.pack.schedule import Place
from torch_mux.types import CostModel

__all__ = ["BESIDE", "FEW", "MOST_MATCHED", "Candidate", "Positions", "Problem", "Run"]

#: Members whose operations one launch takes.
MOST_MATCHED: Final = 4
#: How much longer words of several strands take than the caps alone say. Strands do not wait for each other
#: at the end of a word, which makes up for most of what they take from each other: of two mixes that an H100
#: ran by their words, 1.06 fits one (2397 us) and 0.91 the other (1856 us); see :data:`costs.JOINED`.
BESIDE: Final = 1.06

#: How often a word is made longer for the sake of one strand; and for the sakes of all of many.
MORE: Final = 4
MORE_IN_ALL: Final = 16

#: Members of which every word is considered.
FEW: Final = 3

Step = tuple[Place, ...]
Positions = tuple[int, ...]
#: Seconds of something within 1, 2, … units of the device.
Times = tuple[float, ...]


class Run(NamedTuple):
    """What a strand does: one launch, then so many more of its member's that follow it.

    A launch of several members has none behind it: it is ``first`` alone.
    """

    first: Step
    more: int = 0

    @property
    def last(self) -> Place:
        """Its last launch; of a matched one, any member's."""
        member, index = self.first[0]
        return member, index + self.more

    @property
    def steps(self) -> tuple[Step, ...]:
        """All launches, one after another."""
        member, index = self.first[0]
        return (self.first, *(((member, index + more),) for more in range(1, self.more + 1)))


class Candidate(NamedTuple):
    """A word that could be next: its strands with their shares of the device and how long each takes."""

    strands: tuple[Run, ...]
    shares: tuple[int, ...]
    times: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Of the longest strand."""
        return max(self.times)


class Problem:
    """The members' launches and what any of them cost, together and under any cap.

    Args:
        members: the launches of each member, in its order.
        cost: of launches.
        sms: multiprocessors of the device.
        units: equal parts of the device that caps are made of.
        match: whether launches may be made one.
    """

    def __init__(
        self,
        members: Sequence[Sequence[Operation]],
        cost: CostModel,
        sms: int,
        units: int = 8,
        match: bool = True,
    ) -> None:
        self.lengths: Positions = tuple(map(len, members))
        self.units = units
        self.sms = sms
        self._cost = cost
        numbers: dict[Operation, int] = {}
        self._ids = [[numbers.setdefault(each, len(numbers)) for each in member] for member in members]
        self._operations = list(numbers)
        self._pairs = {
            (a, b)
            for a, one in enumerate(self._operations)
            for b, other in enumerate(self._operations)
            if match and one.matches(other)
        }
        self._launches: dict[tuple[int, ...], Times] = {}
        self._steps: dict[Step, Times] = {}
        self._shared: dict[tuple[Run, ...], tuple[tuple[int, ...], tuple[float, ...]]] = {}
        #: By member and units of the device: seconds of its first launches, by their number.
        self._sums = [
            [
                list(accumulate((self._of((each,))[share] for each in member), initial=0.0))
                for share in range(units)
            ]
            for member in self._ids
        ]

    def identity(self, place: Place) -> int:
        """Equal for equal operations."""
        return self._ids[place[0]][place[1]]

    def matching(self, one: Place, other: Place) -> bool:
        """Whether one launch can do both."""
        return (self.identity(one), self.identity(other)) in self._pairs

    def cap(self, share: int) -> int:
        """Multiprocessors of so many units of the device."""
        return max(1, self.sms * share // self.units)

    def times(self, step: Step) -> Times:
        """Of one launch, by units of the device."""
        found = self._steps.get(step)
        if found is None:
            found = self._steps[step] = self._of(tuple(map(self.identity, step)))
        return found

    def _of(self, ids: tuple[int, ...]) -> Times:
        found = self._launches.get(ids)
        if found is None:
            operations = [self._operations[each] for each in ids]
            caps = map(self.cap, range(1, self.units + 1))
            found = self._launches[ids] = tuple(self._cost.seconds(operations, cap) for cap in caps)
        return found

    def seconds(self, step: Step, share: int) -> float:
        """Of one launch within so many units of the device."""
        return self.times(step)[share - 1]

    def area(self, step: Step, least: int) -> float:
        """The least seconds of the whole device that a launch takes away, with ``least`` units or more."""
        times = self.times(step)
        return min(times[share - 1] * share for share in range(least, self.units + 1)) / self.units

    def _table(self, strands: Sequence[Run]) -> list[Times]:
        """Of each strand of a word, by as many units of the device as the others may leave it."""
        most = self.units - len(strands) + 1
        return [self._run(run, most) for run in strands]

    def _run(self, run: Run, most: int) -> Times:
        times = self.times(run.first)[:most]
        if not run.more:
            return times
        member, index = run.first[0]
        begin, end = index + 1, index + 1 + run.more
        pairs = zip(times, self._sums[member], strict=False)  # as many as may be needed
        return tuple([own + sums[end] - sums[begin] for own, sums in pairs])

    def balanced(self, strands: tuple[Run, ...]) -> Candidate:
        """These strands under shares with which they end together as nearly as can be."""
        found = self._shared.get(strands)
        if found is None:
            table = self._table(strands)
            shares = self._best(table) if len(table) <= FEW else self._greedy(table)
            found = self._shared[strands] = shares, _under(table, shares)
        return Candidate(strands, *found)

    def _best(self, table: Sequence[Times]) -> tuple[int, ...]:
        """Of all shares those with which the last run ends first, and among these the others soonest."""

        def rank(shares: tuple[int, ...]) -> tuple[float, float, tuple[int, ...]]:
            times = [own[share - 1] for own, share in zip(table, shares, strict=True)]
            return max(times), sum(times), shares

        return min(_divisions(self.units, len(table)), key=rank)

    def _greedy(self, table: Sequence[Times]) -> tuple[int, ...]:
        """Shares of many runs: each unit goes to the slowest."""
        shares, times = [1] * len(table), [own[0] for own in table]
        for _ in range(self.units - len(table)):
            slowest = times.index(max(times))
            times[slowest] = table[slowest][shares[slowest]]
            shares[slowest] += 1
        return tuple(shares)

    def next_words(self, at: Positions) -> Iterator[Candidate]:
        """The words worth considering when so many launches of each member are done.

        Of up to three members all; of more, everything that can go, matched where it can be or not;
        everything but one member, who waits for his match; and each launch by itself. Beside its longest
        launch a word is filled up with what follows.
        """
        heads = [(member, index) for member, index in enumerate(at) if index < self.lengths[member]]
        few = len(self.lengths) <= FEW
        for steps in self._every(heads) if few else self._some(heads):
            if steps:
                for word in self._extended(self.balanced(tuple(map(Run, self._fitting(steps))))):
                    yield word
                    if few:
                        yield from map(self._filled, self._shifted(word))

    def _fitting(self, steps: Sequence[Step]) -> Sequence[Step]:
        """As many as there are units of the device: those of the members that have most left to do."""
        if len(steps) <= self.units:
            return steps

        def left(step: Step) -> float:
            sums = ((self._sums[member][-1], index) for member, index in step)
            return max(own[-1] - own[index] for own, index in sums)

        return sorted(steps, key=left, reverse=True)[: self.units]

    def _shifted(self, word: Candidate) -> Iterator[Candidate]:
        """The word with one unit of the device moved from one strand to another."""
        table = self._table(word.strands)
        for giver, taker in permutations(range(len(table)), 2):
            if word.shares[giver] > 1:
                moved = list(word.shares)
                moved[giver] -= 1
                moved[taker] += 1
                shares = tuple(moved)
                yield Candidate(word.strands, shares, _under(table, shares))

    def _some(self, heads: Sequence[Place]) -> Iterable[tuple[Step, ...]]:
        whole = self._matched(heads)
        choices: list[list[Step]] = [whole, [(head,) for head in heads]]
        for head in heads:
            choices.append(self._matched([other for other in heads if other != head]))
        choices += [[step] for step in whole]
        return dict.fromkeys(tuple(steps) for steps in choices)

    def _every(self, heads: Sequence[Place]) -> Iterator[tuple[Step, ...]]:
        """Each way to let some of these go, and to make launches of them."""
        if not heads:
            yield ()
            return
        head, *rest = heads
        for steps in self._every(rest):
            yield steps
            yield ((head,), *steps)
            for index, step in enumerate(steps):
                if len(step) < MOST_MATCHED and self.matching(step[0], head):
                    yield (*steps[:index], (head, *step), *steps[index + 1 :])

    def _matched(self, heads: Sequence[Place]) -> list[Step]:
        steps: list[Step] = []
        for head in heads:
            for index, step in enumerate(steps):
                if len(step) < MOST_MATCHED and self.matching(step[0], head):
                    steps[index] = (*step, head)
                    break
            else:
                steps.append((head,))
        return steps

    def _extended(self, word: Candidate) -> Iterator[Candidate]:
        """The word, and others with more launches in the strands of single members."""
        yield word
        if len(word.strands) == 1:
            return
        full = self._filled(word)
        if full is not word:
            yield full
        most = max(1, min(MORE, MORE_IN_ALL // len(word.strands)))
        for index in range(len(word.strands)):
            longer = full
            # Once for the strand, then for whichever ends first: each may let the others go on.
            for step in range(most):
                going = [place for place, run in enumerate(longer.strands) if self._left(run)]
                place = min(going, key=longer.times.__getitem__, default=index) if step else index
                if place not in going:
                    break
                strands, run = list(longer.strands), longer.strands[place]
                strands[place] = Run(run.first, run.more + 1)
                over = self.balanced(tuple(strands))
                yield over
                longer = self._filled(over)
                yield longer

    def _filled(self, word: Candidate) -> Candidate:
        """The word with more launches in the strands that would wait for the longest."""
        strands, times, whole = list(word.strands), list(word.times), word.seconds
        for index, share in enumerate(word.shares):
            run, used = strands[index], times[index]
            if used < whole and self._left(run):
                member, last = run.last
                sums = self._sums[member][share - 1]
                done = sums[last + 1]
                more = bisect_right(sums, done + (whole - used) / BESIDE) - 2 - last
                if more > 0:
                    strands[index] = Run(run.first, run.more + more)
                    times[index] = used + BESIDE * (sums[last + 1 + more] - done)
        if strands == list(word.strands):
            return word
        return Candidate(tuple(strands), word.shares, tuple(times))

    def _left(self, run: Run) -> bool:
        """Whether a strand's last launch is one member's, who has another behind it."""
        member, index = run.last
        return len(run.first) == 1 and index + 1 < self.lengths[member]


def _under(table: Sequence[Times], shares: Sequence[int]) -> tuple[float, ...]:
    """Seconds of a word's strands under these shares."""
    slower = BESIDE if len(table) > 1 else 1.0
    return tuple(slower * own[share - 1] for own, share in zip(table, shares, strict=True))


@cache
def _divisions(units: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """Every way to give each part one unit or more, and all of them."""
    whole = range(1, units - parts + 2)
    return tuple(shares for shares in product(whole, repeat=parts) if sum(shares) == units)
