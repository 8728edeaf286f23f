"""Words of a packing problem: what may run beside each other next, under which caps, for how long."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import permutations, product
from typing import Final, NamedTuple

from torch_mux.lowering.kernels.operation import Operation
from torch_mux.lowering.pack.schedule import Place
from torch_mux.types import CostModel

__all__ = ["BESIDE", "FEW", "MOST_MATCHED", "Candidate", "Positions", "Problem"]

#: Members whose operations one launch takes.
MOST_MATCHED: Final = 4
#: How much longer words of several strands take than the caps alone say. Strands do not wait for each other
#: at the end of a word, which makes up for most of what they take from each other: of two mixes that an H100
#: ran by their words, 1.06 fits one (2397 us) and 0.91 the other (1856 us); see :data:`costs.JOINED`.
BESIDE: Final = 1.06

#: How often a word is made longer for the sake of one strand.
MORE: Final = 4

#: Members of which every word is considered.
FEW: Final = 3

Step = tuple[Place, ...]
Run = tuple[Step, ...]
Positions = tuple[int, ...]
#: A run by the numbers of its operations.
Launches = tuple[tuple[int, ...], ...]


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
        self._seconds: dict[tuple[tuple[int, ...], int], float] = {}
        self._shared: dict[Hashable, tuple[tuple[int, ...], tuple[float, ...]]] = {}

    def identity(self, place: Place) -> int:
        """Equal for equal operations."""
        return self._ids[place[0]][place[1]]

    def matching(self, one: Place, other: Place) -> bool:
        """Whether one launch can do both."""
        return (self.identity(one), self.identity(other)) in self._pairs

    def cap(self, share: int) -> int:
        """Multiprocessors of so many units of the device."""
        return max(1, self.sms * share // self.units)

    def seconds(self, step: Step, share: int) -> float:
        """Of one launch within so many units of the device."""
        return self._of(tuple(map(self.identity, step)), share)

    def _of(self, ids: tuple[int, ...], share: int) -> float:
        found = self._seconds.get((ids, share))
        if found is None:
            operations = [self._operations[each] for each in ids]
            found = self._seconds[ids, share] = self._cost.seconds(operations, self.cap(share))
        return found

    def area(self, step: Step, least: int) -> float:
        """The least seconds of the whole device that a launch takes away, with ``least`` units or more."""
        ids = tuple(map(self.identity, step))
        return min(self._of(ids, share) * share for share in range(least, self.units + 1)) / self.units

    def balanced(self, strands: tuple[Run, ...]) -> Candidate:
        """These strands under shares with which they end together as nearly as can be."""
        key = tuple(tuple(tuple(map(self.identity, step)) for step in run) for run in strands)
        found = self._shared.get(key)
        if found is None:
            shares = self._best(key) if len(key) <= FEW else self._greedy(key)
            slower = BESIDE if len(key) > 1 else 1.0
            times = tuple(slower * self._run(run, share) for run, share in zip(key, shares, strict=True))
            found = self._shared[key] = tuple(shares), times
        return Candidate(strands, *found)

    def _best(self, runs: Sequence[Launches]) -> list[int]:
        """Of all shares those with which the last run ends first, and among these the others soonest."""
        whole = range(1, self.units - len(runs) + 2)
        divided: list[tuple[int, ...]] = [
            shares for shares in product(whole, repeat=len(runs)) if sum(shares) == self.units
        ]

        def rank(shares: tuple[int, ...]) -> tuple[float, float, tuple[int, ...]]:
            times = list(map(self._run, runs, shares))
            return max(times), sum(times), shares

        best = min(divided, key=rank)
        return list(best)

    def _greedy(self, runs: Sequence[Launches]) -> list[int]:
        """Shares of many runs: each unit goes to the slowest."""
        shares = [1] * len(runs)
        for _ in range(self.units - len(runs)):
            slowest = max(range(len(runs)), key=lambda index: self._run(runs[index], shares[index]))
            shares[slowest] += 1
        return shares

    def _run(self, run: Launches, share: int) -> float:
        return sum(self._of(ids, share) for ids in run)

    def next_words(self, at: Positions) -> Iterator[Candidate]:
        """The words worth considering when so many launches of each member are done.

        Of up to three members all; of more, everything that can go, matched where it can be or not;
        everything but one member, who waits for his match; and each launch by itself. Beside its longest
        launch a word is filled up with what follows.
        """
        heads = [(member, index) for member, index in enumerate(at) if index < self.lengths[member]]
        few = len(self.lengths) <= FEW
        for steps in self._every(heads) if few else self._some(heads):
            if 0 < len(steps) <= self.units:
                for word in self._extended(self.balanced(tuple((step,) for step in steps))):
                    yield word
                    if few:
                        yield from map(self._filled, self._shifted(word))

    def _shifted(self, word: Candidate) -> Iterator[Candidate]:
        """The word with one unit of the device moved from one strand to another."""
        for giver, taker in permutations(range(len(word.shares)), 2):
            if word.shares[giver] > 1:
                shares = list(word.shares)
                shares[giver] -= 1
                shares[taker] += 1
                times = tuple(
                    BESIDE * sum(self.seconds(step, share) for step in run)
                    for run, share in zip(word.strands, shares, strict=True)
                )
                yield Candidate(word.strands, tuple(shares), times)

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
        for index in range(len(word.strands)):
            longer = full
            # Once for the strand, then for whichever ends first: each may let the others go on.
            for step in range(MORE):
                place = longer.times.index(min(longer.times)) if step else index
                following = self._following(longer.strands[place])
                if following is None:
                    break
                strands = list(longer.strands)
                strands[place] = (*strands[place], following)
                over = self.balanced(tuple(strands))
                yield over
                longer = self._filled(over)
                yield longer

    def _filled(self, word: Candidate) -> Candidate:
        """The word with more launches in the strands that would wait for the longest."""
        strands, times = list(word.strands), list(word.times)
        for index, share in enumerate(word.shares):
            while (following := self._following(strands[index])) is not None:
                used = times[index] + BESIDE * self.seconds(following, share)
                if used > word.seconds:
                    break
                strands[index], times[index] = (*strands[index], following), used
        if times == list(word.times):
            return word
        return Candidate(tuple(strands), word.shares, tuple(times))

    def _following(self, run: Run) -> Step | None:
        """What could come after a strand's last launch, if that is one member's."""
        if len(run[-1]) > 1:
            return None
        member, index = run[-1][0]
        return ((member, index + 1),) if index + 1 < self.lengths[member] else None
