"""A schedule of several programs' launches, as frozen data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_mux.lowering.kernels.operation import Operation

__all__ = ["Place", "Schedule", "Strand", "Word"]

#: (member, number of the launch in that member's order).
Place = tuple[int, int]


@dataclass(frozen=True)
class Strand:
    """What one part of the device does during a word, one after another.

    Attributes:
        steps: each the places of one launch; of several members where it is a matched one.
        sms: multiprocessors it may take.
    """

    steps: tuple[tuple[Place, ...], ...]
    sms: int


@dataclass(frozen=True)
class Word:
    """Strands that run beside each other.

    Attributes:
        seconds: of the longest, as the cost model has it.
    """

    strands: tuple[Strand, ...]
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """Every launch of every member once, each member's in its own order.

    Attributes:
        members: the launches of each member.
        words: in the order in which they are issued.
        serial: seconds of all launches alone, one after another, as the cost model has it.
    """

    members: tuple[tuple[Operation, ...], ...]
    words: tuple[Word, ...]
    serial: float

    @property
    def seconds(self) -> float:
        """Of all words, as the cost model has it."""
        return sum(word.seconds for word in self.words)

    @property
    def matched(self) -> int:
        """Launches that do the work of several members."""
        return sum(len(step) > 1 for word in self.words for strand in word.strands for step in strand.steps)

    @property
    def complete(self) -> bool:
        """Whether it has every launch of every member once, each member's in order."""
        done = [0] * len(self.members)
        for word in self.words:
            for strand in word.strands:
                for step in strand.steps:
                    for member, index in step:
                        if not 0 <= member < len(done) or done[member] != index:
                            return False
                        done[member] += 1
        return done == [len(member) for member in self.members]

    def operation(self, place: Place) -> Operation:
        """What is launched there."""
        member, index = place
        return self.members[member][index]

    def text(self, names: Sequence[str]) -> str:
        """The words, one a line, with the members' names; equal words that follow each other once."""
        lines: list[tuple[str, int]] = []
        for word in self.words:
            line = " | ".join(self._strand(strand, names) for strand in word.strands)
            if lines and lines[-1][0] == line:
                lines[-1] = (line, lines[-1][1] + 1)
            else:
                lines.append((line, 1))
        return "\n".join(line if count == 1 else f"{line}   ({count} times)" for line, count in lines)

    def _strand(self, strand: Strand, names: Sequence[str]) -> str:
        return f"[{strand.sms}] " + "; ".join(self._step(step, names) for step in strand.steps)

    def _step(self, step: tuple[Place, ...], names: Sequence[str]) -> str:
        parts = [f"{names[member]}: {self.members[member][index]}" for member, index in step]
        return " + ".join(parts) if len(parts) == 1 else f"({' + '.join(parts)})"
