"""Tenants whose requests are under way, or have just ended: closed-loop clients, who will be back at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch_mux.runtime.scheduler.base import Issue, Ticket
from torch_mux.runtime.scheduler.fair import Account, VirtualTime
from torch_mux.runtime.scheduler.pending import Flow
from torch_mux.types import Quota

__all__ = ["Absent", "Bar"]

_MOST_MISSES = 6
_KEPT = 64
_NEVER = float("inf")


@dataclass(eq=False)
class _Flight:
    """A bundle whose tenants are expected back; ``flows`` are sorted out when somebody asks for them."""

    key: str
    quotas: list[Quota]
    begun: float
    due: float
    ended: float | None = None
    seconds: float = 0.0
    flows: tuple[Flow, ...] | None = None
    accounts: dict[int, list[Account]] | None = None


@dataclass(frozen=True)
class Bar:
    """The tenant of a class who was served least of those that are expected back.

    Attributes:
        tag: its start tag.
        until: when it is expected no longer; None: while its bundle is under way.
        due: when its bundle should have ended.
        level: the class.
        flight: its bundle.
    """

    tag: float
    until: float | None
    due: float
    level: int
    flight: _Flight = field(repr=False)


class Absent:
    """Who is expected back: while his bundle is under way, and then for ``linger`` or as long as it took.

    A bundle that takes longer than forecast, by more than the linger, is not waited for: another lane could
    work meanwhile.

    Who was awaited and came too late is not awaited for the next time, then three, seven, up to 63 times.
    """

    def __init__(self) -> None:
        self._flights: dict[Issue, _Flight] = {}
        self._ended: list[_Flight] = []
        self._awaited: dict[tuple[str, Flow], _Flight] = {}
        self._misses: dict[tuple[str, Flow], list[int]] = {}

    def issued(self, issue: Issue, now: float, due: float, linger: float) -> None:
        """Its tenants are away, until ``due``; learns whether those who were awaited have come in time."""
        if self._awaited:
            for request in issue.requests:
                self._returned((issue.key, (request.quota.priority, request.quota.tenant)), request, linger)
        self._flights[issue] = _Flight(issue.key, [request.quota for request in issue.requests], now, due)

    def _returned(self, who: tuple[str, Flow], request: Ticket, linger: float) -> None:
        flight = self._awaited.pop(who, None)
        if flight is None:
            return
        if flight.ended is None or request.arrival <= flight.ended + min(linger, flight.seconds):
            self._misses.pop(who, None)
        else:
            if len(self._misses) >= _KEPT * _KEPT:
                self._misses.clear()
            misses = min(_MOST_MISSES, self._misses.get(who, (0,))[0] + 1)
            self._misses[who] = [misses, (1 << misses) - 1]

    def charged(self, issue: Issue, level: int, accounts: list[Account]) -> None:
        """These are the accounts of a bundle's tenants, all of one class."""
        if not self._misses:
            self._flights[issue].accounts = {level: accounts}

    def completed(self, issue: Issue, now: float, seconds: float, due: float) -> None:
        """Its tenants may be back any moment, and what is left on its lane should have ended at ``due``.

        A bundle that did not run is over.
        """
        flight = self._flights.pop(issue, None)
        for other, left in self._flights.items():
            if other.lane == issue.lane:
                left.due = due
        if flight is not None and seconds > 0.0:
            flight.ended, flight.seconds = now, seconds
            self._ended.append(flight)

    def put_off(self, due: Callable[[int], float]) -> None:
        """Bundles under way end later, when their lanes will be free.

        Args:
            due: when a lane will be free.
        """
        for issue, flight in self._flights.items():
            flight.due = max(flight.due, due(issue.lane))

    def _expected(self, now: float, linger: float) -> Iterator[tuple[_Flight, float | None]]:
        """The bundles whose tenants are expected, and until when."""
        for flight in self._flights.values():
            if flight.begun <= now < flight.due + linger:
                yield flight, None
        yield from self._lately(now, linger)

    def _lately(self, now: float, linger: float) -> list[tuple[_Flight, float]]:
        """The bundles that have ended and whose tenants are expected still, and until when."""
        found: list[tuple[_Flight, float]] = []
        for flight in self._ended:
            ended = now if flight.ended is None else flight.ended
            until = ended + min(linger, flight.seconds)
            if ended <= now < until:  # a clock that was put back ends the wait
                found.append((flight, until))
        if len(found) < len(self._ended):
            self._ended = [flight for flight, _ in found]
        return found

    def anybody(self, now: float, linger: float, but: str | None = None) -> bool:
        """Whether somebody is expected back, of another program than ``but``."""
        for flight in self._flights.values():
            if flight.key != but:
                return True
        return bool(self._ended) and any(flight.key != but for flight, _ in self._lately(now, linger))

    def bars(
        self, key: str, now: float, linger: float, times: Callable[[int], VirtualTime]
    ) -> tuple[dict[int, Bar], dict[int, float]]:
        """By class, who was served least of those expected back to other programs than ``key``; and the least
        start tag of all that are expected.
        """
        bars: dict[int, Bar] = {}
        least: dict[int, float] = {}
        if not self._flights and not self._ended:
            return bars, least
        for flight, until in self._expected(now, linger):
            accounts = flight.accounts or self._accounts(flight, times)
            for level, served in accounts.items():
                tag = min([account.tag for account in served])
                if tag < least.get(level, _NEVER):
                    least[level] = tag
                if flight.key != key:
                    bar = bars.get(level)
                    if bar is None or tag < bar.tag:
                        bars[level] = Bar(tag, until, flight.due, level, flight)
        return bars, least

    def _accounts(self, flight: _Flight, times: Callable[[int], VirtualTime]) -> dict[int, list[Account]]:
        """By class, the accounts of a bundle's tenants; those of whom nothing is counted have none."""
        found: dict[int, list[Account]] = {}
        for level, tenant in self._flows(flight):
            account = times(level).known(tenant)
            if account is not None:
                found.setdefault(level, []).append(account)
        if sum(map(len, found.values())) == len(self._flows(flight)):
            flight.accounts = found
        return found

    def rest(self) -> None:
        """Accounts are closed."""
        for flight in [*self._flights.values(), *self._ended]:
            flight.accounts = None

    def members(self, level: int) -> set[str]:
        """Tenants of a class that may be expected back."""
        flights = [*self._flights.values(), *self._ended]
        return {name for one in flights for priority, name in self._flows(one) if priority == level}

    def _flows(self, flight: _Flight) -> tuple[Flow, ...]:
        if flight.flows is None:
            flows = {(quota.priority, quota.tenant) for quota in flight.quotas}
            flight.flows = tuple([flow for flow in flows if not self._passed((flight.key, flow))])
        return flight.flows

    def _passed(self, who: tuple[str, Flow]) -> bool:
        """Whether it is not awaited this time."""
        misses = self._misses.get(who)
        if misses is None or misses[1] == 0:
            return False
        misses[1] -= 1
        return True

    def awaited(self, bar: Bar, times: Callable[[int], VirtualTime]) -> None:
        """Somebody is held back for it."""
        if len(self._awaited) >= _KEPT:
            self._awaited = {who: one for who, one in self._awaited.items() if one in self._ended}
        for flow in self._flows(bar.flight):
            account = times(flow[0]).known(flow[1]) if flow[0] == bar.level else None
            if account is not None and account.tag == bar.tag:
                self._awaited[bar.flight.key, flow] = bar.flight

    def forget(self, key: str) -> None:
        """Drops what is known of a program's tenants; those of bundles under way are not expected."""
        self._ended = [flight for flight in self._ended if flight.key != key]
        self._flights = {issue: flight for issue, flight in self._flights.items() if flight.key != key}
        self._awaited = {who: flight for who, flight in self._awaited.items() if who[0] != key}
        self._misses = {who: misses for who, misses in self._misses.items() if who[0] != key}
