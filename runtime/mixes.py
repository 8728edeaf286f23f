"""Mixes of programs that went out together: what is known of each, bounded in number."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from torch_mux.runtime.verdicts import Verdict

if TYPE_CHECKING:
    from torch_mux.lowering.pack.schedule import Schedule
    from torch_mux.runtime.bundle import Bundle

__all__ = ["MOST_MIXES", "Mix", "MixBook", "MixKey", "MixReport", "MixState", "label_of", "rounded"]

#: Mixes that are remembered, and so their captured graphs; of more, those used longest ago are forgotten.
MOST_MIXES: Final = 32
#: A mix that came once may never come again: it is built when it has come so often,
WORTHWHILE: Final = 2
#: and so often a second, for :attr:`MixBook.after` seconds.
RATE: Final = 20.0

#: (program, slots) of each member, by program.
MixKey = tuple[tuple[str, int], ...]


class MixState(Enum):
    """How far a mix is from being run as one."""

    NEW = "runs as its programs' own plans"
    BUILDING = "is being built"
    READY = "runs as one"
    SLOWER = "runs as its programs' own plans, which are faster"
    FAILED = "could not be built"


def rounded(slots: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, …: the sizes that mixes are built for.

    With these at most a third of the slots is empty, and ``most`` slots are of about 2 log2(most) sizes.
    """
    power = 1
    while power < slots:
        power *= 2
    between = power // 4 * 3
    return between if slots <= between else power


def label_of(bundles: Sequence[Bundle]) -> str:
    """A mix for people: its programs with their slots."""
    return " + ".join(f"{bundle.served.program.name} x{len(bundle.requests)}" for bundle in bundles)


@dataclass(eq=False)
class Mix:
    """One mix.

    Attributes:
        key: its members.
        names: of their models, in the order of ``key``.
        seen: bundles of it that went out.
        joint: those that went out as one.
        often: it came often enough to be built.
        state: see :class:`MixState`.
        reason: why it could not be built, or "".
        schedule: what it runs by, once there is one.
        executables: what an executor captured of it, by lane.
        verdict: the measured times of both ways to run it, and which is used.
    """

    key: MixKey
    names: tuple[str, ...]
    seen: int = 0
    joint: int = 0
    often: bool = False
    state: MixState = MixState.NEW
    reason: str = ""
    schedule: Schedule | None = None
    executables: WeakKeyDictionary[Any, Any] = field(default_factory=WeakKeyDictionary)
    verdict: Verdict = field(default_factory=Verdict)
    _began: float = 0.0
    _last: float = float("-inf")
    _streak: int = 0

    def came(self, now: float, after: float) -> None:
        """It went out once more; a pause as long as it has to last ends what came before."""
        if self._last == float("-inf") or not (after <= 0.0 or 0.0 <= now - self._last <= after):
            self._began, self._streak = now, 0
        self.seen += 1
        self._streak += 1
        self._last = now
        often = self._streak >= max(WORTHWHILE, RATE * after) and now - self._began >= after
        self.often = self.often or often

    @property
    def worthwhile(self) -> bool:
        """Whether it is to be built where it is not."""
        return self.often and self.state in (MixState.NEW, MixState.READY)

    def measured(self, joint: bool, seconds: float) -> bool:
        """It took so many seconds of the device, one way or the other; whether that decided something."""
        decided = self.verdict.observe(joint, seconds)
        if decided and self.state in (MixState.READY, MixState.SLOWER):
            self.state = MixState.READY if self.verdict.joint else MixState.SLOWER
        return decided

    def failed(self, error: BaseException) -> None:
        """It goes out as its programs' own plans from now on."""
        self.state, self.reason = MixState.FAILED, f"{type(error).__name__}: {error}"

    def report(self) -> MixReport:
        """As it is now."""
        schedule = self.schedule
        return MixReport(
            members=tuple((name, slots) for name, (_, slots) in zip(self.names, self.key, strict=True)),
            state=self.state.value,
            reason=self.reason,
            seen=self.seen,
            joint=self.joint,
            launches=0 if schedule is None else sum(map(len, schedule.members)),
            matched=0 if schedule is None else schedule.matched,
            seconds=0.0 if schedule is None else schedule.seconds,
            serial=0.0 if schedule is None else schedule.serial,
            own_seconds=self.verdict.seconds(False),
            joint_seconds=self.verdict.seconds(True),
            measured=self.verdict.text,
            words="" if schedule is None else schedule.text(self.names),
        )


@dataclass(frozen=True)
class MixReport:
    """One mix of programs, for ``explain()``.

    Attributes:
        members: (model, slots) of each.
        state: how it runs, in words.
        reason: why it could not be built, or "".
        seen: bundles of it that went out.
        joint: those that went out as one.
        launches: super-kernel launches of its members, each counted by itself.
        matched: launches that do the work of several members.
        seconds, serial: of its schedule, and of the same launches one after another, by the cost model.
        own_seconds, joint_seconds: seconds that it took as its programs' own plans and as one, or None.
        measured: the same in words, and which of the two is used.
        words: the schedule as text, "" where there is none yet.
    """

    members: tuple[tuple[str, int], ...]
    state: str
    reason: str
    seen: int
    joint: int
    launches: int
    matched: int
    seconds: float
    serial: float
    own_seconds: float | None
    joint_seconds: float | None
    measured: str
    words: str


class MixBook:
    """The mixes of one device, those used longest ago forgotten first; safe from any thread.

    Attributes:
        after: seconds for which a mix has to come again and again before it is built. With 0 it is built the
            second time and used whether it is faster or not.
    """

    def __init__(self, most: int = MOST_MIXES) -> None:
        self.after = 0.0
        self._most = most
        self._lock = threading.Lock()
        self._mixes: OrderedDict[MixKey, Mix] = OrderedDict()

    def see(self, key: MixKey, names: Sequence[str], now: float) -> Mix:
        """The mix that is about to go out, at ``now`` seconds on a clock."""
        with self._lock:
            mix = self._mixes.get(key)
            if mix is None:
                mix = self._mixes[key] = Mix(key, tuple(names))
                while len(self._mixes) > self._most:
                    self._mixes.popitem(last=False)
            self._mixes.move_to_end(key)
            mix.came(now, self.after)
            return mix

    def knows(self, mix: Mix) -> bool:
        """Whether ``mix`` is still remembered."""
        with self._lock:
            return self._mixes.get(mix.key) is mix

    def forget(self, program: str) -> None:
        """Drops every mix with that program."""
        with self._lock:
            for key in [key for key in self._mixes if any(member == program for member, _ in key)]:
                del self._mixes[key]

    def clear(self) -> None:
        """Forgets all mixes."""
        with self._lock:
            self._mixes.clear()

    def reports(self) -> tuple[MixReport, ...]:
        """Of every mix that is remembered, the one used last behind all others."""
        with self._lock:
            mixes = list(self._mixes.values())
        return tuple(mix.report() for mix in mixes)
