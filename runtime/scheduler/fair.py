"""Weighted fair order by device seconds: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["Account", "Charge", "VirtualTime"]

_KEPT = 64


class Account:
    """What one tenant was served, in virtual time: device seconds over weight.

    Attributes:
        tag: start tag of its next request; it never decreases.
        credit: what it was charged too much, taken off its next charge.
    """

    __slots__ = ("credit", "tag")

    def __init__(self, tag: float) -> None:
        self.tag = tag
        self.credit = 0.0

    def charge(self, amount: float) -> None:
        """It was served ``amount`` of virtual time, or so much less if negative."""
        amount -= self.credit
        if amount >= 0.0:
            self.tag += amount
            self.credit = 0.0
        else:
            self.credit = -amount


@dataclass
class Charge:
    """What the tenants of a bundle under way were charged before its time was known.

    Attributes:
        each: device seconds of a slot.
        units: slots over weight by account.
    """

    each: float
    units: dict[Account, float]


class VirtualTime:
    """Start tags of the tenants of one priority class.

    The tenant with the least tag is served next, and its tag grows by the device seconds it is charged over
    its weight. Virtual time is the least tag of those who waited at the last decision, or were expected back.
    Who was idle starts at virtual time again: nothing was saved up, and what is owed stays owed. When nobody
    waits or is expected any more the busy period is over, and with it everybody's credit and debt.

    Attributes:
        now: virtual time, never decreasing.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._accounts: dict[str, Account] = {}
        self._prune_at = _KEPT

    def __len__(self) -> int:
        return len(self._accounts)

    def account(self, tenant: str) -> Account:
        """The account of a tenant, at virtual time where there is none."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(self.now)
        return account

    def known(self, tenant: str) -> Account | None:
        """The account of a tenant, if it has one."""
        return self._accounts.get(tenant)

    def arrived(self, tenant: str) -> Account:
        """The account of a tenant who had nothing pending before."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(self.now)
        elif account.tag < self.now:
            account.tag = self.now
            account.credit = 0.0
        return account

    def lead(self, tenant: str) -> float:
        """By how much a tenant is ahead of virtual time."""
        account = self._accounts.get(tenant)
        return 0.0 if account is None else max(0.0, account.tag - self.now)

    def advance(self, start: float) -> None:
        """A decision was taken, with ``start`` as the least tag of those who waited."""
        if start > self.now:
            self.now = start

    @property
    def crowded(self) -> bool:
        """Whether it is time to :meth:`prune`."""
        return len(self._accounts) > self._prune_at

    def prune(self, waiting: Collection[str]) -> None:
        """Forgets who owes nothing and is not among ``waiting``."""
        self._accounts = {
            tenant: account
            for tenant, account in self._accounts.items()
            if account.tag > self.now or tenant in waiting
        }
        self._prune_at = max(_KEPT, 2 * len(self._accounts))

    def rest(self) -> None:
        """Nobody waits: the busy period is over."""
        self._accounts.clear()
