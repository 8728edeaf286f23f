"""Who a request belongs to and what its tenant is guaranteed: ``torch_mux.quota(...)``."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from types import MappingProxyType, TracebackType
from typing import Any, Final, ParamSpec, TypeVar, cast

from torch_mux import state
from torch_mux.errors import InvalidQuota, UnknownOption
from torch_mux.quantities import parse_duration, parse_size
from torch_mux.types import Quota

__all__ = ["QuotaScope", "current_quota", "quota"]

P = ParamSpec("P")
R = TypeVar("R")

FIELDS: Final = tuple(field.name for field in fields(Quota))


class _Unset:
    """The default of a field that is inherited from the enclosing quota."""

    def __repr__(self) -> str:
        return "inherited"


UNSET: Final = _Unset()


def _fraction(field: str, value: object, detail: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InvalidQuota(field=field, value=value, detail=detail)
    return float(value)


def _check_tenant(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidQuota(field="tenant", value=value, detail="give a name, a string that is not empty")
    return value


def _check_sms(value: object) -> float:
    detail = "give the largest share of the GPU's SMs, more than 0 and at most 1"
    share = _fraction("sms", value, detail)
    if share == 0:
        raise InvalidQuota(field="sms", value=value, detail=detail)
    return share


def _check_reserve(value: object) -> float:
    return _fraction("reserve", value, "give the guaranteed share of the GPU, from 0 to 1")


def _check_weight(value: object) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 1e-6 <= cast(float, value) <= 1e6:
        # Service is counted in device seconds over weight: beyond this, sums of it lose others' seconds.
        raise InvalidQuota(field="weight", value=value, detail="give a number from 1e-6 to 1e6")
    return float(cast(float, value))


def _check_duration(field: str, value: Any) -> float | None:
    seconds = None if value is None else parse_duration(value)
    if seconds == 0:
        raise InvalidQuota(field=field, value=value, detail="give a duration above 0, or None for none")
    return seconds


def _check_memory(value: Any) -> int | None:
    size = None if value is None else parse_size(value)
    if size == 0:
        raise InvalidQuota(field="memory", value=value, detail="give a size above 0, or None for no limit")
    return size


def _check_priority(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidQuota(field="priority", value=value, detail="give a whole number; higher goes first")
    return value


def _check_rate(value: object) -> float | None:
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < cast(float, value) < math.inf:
        detail = "give requests a second, a finite number above 0, or None for no limit"
        raise InvalidQuota(field="rate", value=value, detail=detail)
    return float(cast(float, value))


def _check_count(field: str, value: object) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise InvalidQuota(field=field, value=value, detail="give a whole number from 1, or None")
    return value


def _check_excess(value: object) -> str:
    if value not in ("hold", "refuse"):
        raise InvalidQuota(field="excess", value=value, detail='give "hold" or "refuse"')
    return value


CHECKS: Final[Mapping[str, Callable[[Any], object]]] = MappingProxyType(
    {
        "tenant": _check_tenant,
        "sms": _check_sms,
        "reserve": _check_reserve,
        "weight": _check_weight,
        "slo": functools.partial(_check_duration, "slo"),
        "memory": _check_memory,
        "priority": _check_priority,
        "deadline": functools.partial(_check_duration, "deadline"),
        "rate": _check_rate,
        "burst": functools.partial(_check_count, "burst"),
        "excess": _check_excess,
        "max_pending": functools.partial(_check_count, "max_pending"),
    }
)


def _checked(values: Mapping[str, object]) -> dict[str, Any]:
    """The fields that are set, each valid on its own."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if value is not UNSET:
            check = CHECKS.get(name)
            if check is None:
                raise UnknownOption.near("quota field", name, FIELDS)
            found[name] = check(value)
    return found


def _resolve(outer: Quota, changes: Mapping[str, Any]) -> Quota:
    """``outer`` with ``changes``; raises InvalidQuota where the two do not go together."""
    return _merged(outer, tuple(changes.items()))


# A ``with quota(...)`` around each request gives the same object: whoever counts asks whether it is the same.
@functools.lru_cache(maxsize=8192)
def _merged(outer: Quota, changes: tuple[tuple[str, Any], ...]) -> Quota:
    merged = replace(outer, **dict(changes))
    if merged.reserve > merged.sms:
        detail = f"it lies above the hard limit sms={merged.sms!r}: raise sms or lower reserve"
        raise InvalidQuota(field="reserve", value=merged.reserve, detail=detail)
    if merged.rate is None and (merged.burst is not None or merged.excess != "hold"):
        field, value = ("burst", merged.burst) if merged.burst is not None else ("excess", merged.excess)
        raise InvalidQuota(field=field, value=value, detail="it says nothing without a rate: give rate too")
    return merged


@dataclass(eq=False)
class _Terms:
    """The fields that one scope sets; apart from the scope, so that what it remembers is no cycle."""

    changes: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Active:
    """The scopes entered in one context, outermost first, and what they resolved to at an epoch.

    Attributes:
        outer: what was active when the last scope was entered, where that is known.
    """

    scopes: tuple[_Terms, ...]
    resolved: list[tuple[int, Quota]]
    outer: _Active | None = None


_active: ContextVar[_Active | None] = ContextVar("torch_mux_quota", default=None)
_lock = threading.Lock()
_epoch = 0
_DEFAULT = Quota()


def current_quota() -> Quota:
    """The quota that a request made here and now is attributed to.

    Raises:
        InvalidQuota: an ``update`` made the enclosing quotas contradict each other.
    """
    active = _active.get()
    if active is None:
        return _DEFAULT
    epoch, resolved = active.resolved[0]
    if epoch == _epoch:
        return resolved
    return _refresh(active)


def _refresh(active: _Active) -> Quota:
    epoch, resolved = _epoch, _DEFAULT
    for scope in active.scopes:
        resolved = _resolve(resolved, scope.changes)
    active.resolved[0] = (epoch, resolved)
    return resolved


class QuotaScope:
    """What ``quota(...)`` returns: a context manager, a decorator, and the handle to ``update`` it."""

    def __init__(self, changes: Mapping[str, object]) -> None:
        self._terms = _Terms(_checked(changes))
        if "sms" in self._terms.changes and "reserve" in self._terms.changes:
            _resolve(_DEFAULT, self._terms.changes)
        self._entered: _Active | None = None

    def __enter__(self) -> QuotaScope:
        _active.set(self._inside())
        return self

    def here(self) -> Quota:
        """The quota that a request inside would be attributed to, were this entered here and now.

        Raises:
            InvalidQuota: it and the enclosing quotas contradict each other.
        """
        return self._inside().resolved[0][1]

    def _inside(self) -> _Active:
        outer, mine = _active.get(), self._entered
        # A scope is entered around each request, in the same place again and again.
        if mine is None or mine.outer is not outer or mine.resolved[0][0] != _epoch:
            epoch, resolved = _epoch, _resolve(current_quota(), self._terms.changes)
            scopes = outer.scopes if outer is not None else ()
            mine = self._entered = _Active((*scopes, self._terms), [(epoch, resolved)], outer)
        return mine

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        active = _active.get()
        if active is not None and active.scopes[-1] is self._terms:
            outer = active.outer
            if len(active.scopes) == 1 + (0 if outer is None else len(outer.scopes)):
                _active.set(outer)
                return
        scopes = list(active.scopes) if active is not None else []
        if self._terms not in scopes:
            raise RuntimeError("this quota was left in another context than the one it was entered in")
        del scopes[len(scopes) - 1 - scopes[::-1].index(self._terms)]
        _active.set(_Active(tuple(scopes), [(-1, _DEFAULT)]) if scopes else None)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function or a coroutine function: its body runs under this quota."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            name = getattr(function, "__name__", repr(function))
            detail = "a generator runs in its caller's context; use `with quota(...)` inside it"
            raise InvalidQuota(field="decorated function", value=name, detail=detail)
        if asyncio.iscoroutinefunction(function):

            @functools.wraps(function)
            async def asynchronous(*args: P.args, **kwargs: P.kwargs) -> Any:
                with self:
                    return await function(*args, **kwargs)

            return cast(Callable[P, R], asynchronous)

        @functools.wraps(function)
        def synchronous(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return synchronous

    def update(
        self,
        tenant: str | _Unset = UNSET,
        *,
        sms: float | _Unset = UNSET,
        reserve: float | _Unset = UNSET,
        weight: float | _Unset = UNSET,
        slo: str | float | timedelta | _Unset | None = UNSET,
        memory: str | int | _Unset | None = UNSET,
        priority: int | _Unset = UNSET,
        deadline: str | float | timedelta | _Unset | None = UNSET,
        rate: float | _Unset | None = UNSET,
        burst: int | _Unset | None = UNSET,
        excess: str | _Unset = UNSET,
        max_pending: int | _Unset | None = UNSET,
        **unknown: object,
    ) -> None:
        """Change fields for every request made under this quota from now on, in every thread.

        Raises:
            UnknownOption, InvalidQuota, UnparsableQuantity: as ``quota``; nothing is changed then.
        """
        global _epoch
        shares = {"tenant": tenant, "sms": sms, "reserve": reserve, "weight": weight, "priority": priority}
        limits = {
            "memory": memory,
            "rate": rate,
            "burst": burst,
            "excess": excess,
            "max_pending": max_pending,
        }
        changes = _checked({**shares, **limits, "slo": slo, "deadline": deadline, **unknown})
        with _lock:
            merged = {**self._terms.changes, **changes}
            if "sms" in merged and "reserve" in merged:
                _resolve(_DEFAULT, merged)
            self._terms.changes = merged
            _epoch += 1
        engine = state.peek()
        if "reserve" in changes and "tenant" in merged and engine is not None:
            engine.lower_reserve(merged["tenant"], merged["reserve"])

    def __repr__(self) -> str:
        return f"quota({', '.join(f'{name}={value!r}' for name, value in self._terms.changes.items())})"


def quota(
    tenant: str | None = None,
    *,
    sms: float | _Unset = UNSET,
    reserve: float | _Unset = UNSET,
    weight: float | _Unset = UNSET,
    slo: str | float | timedelta | _Unset | None = UNSET,
    memory: str | int | _Unset | None = UNSET,
    priority: int | _Unset = UNSET,
    deadline: str | float | timedelta | _Unset | None = UNSET,
    rate: float | _Unset | None = UNSET,
    burst: int | _Unset | None = UNSET,
    excess: str | _Unset = UNSET,
    max_pending: int | _Unset | None = UNSET,
    **unknown: object,
) -> QuotaScope:
    """Attribute every request made inside to ``tenant``, under these limits and guarantees.

    A context manager and a decorator. Quotas nest: a field that is not given is the enclosing one's. It is
    carried by ``contextvars``: asyncio tasks inherit it, threads through ``contextvars.copy_context().run``.

    Args:
        tenant: name that the requests are attributed to; None keeps the enclosing one.
        sms: hard upper limit, a share of the GPU's SMs in (0, 1].
        reserve: guaranteed share in [0, 1], at most ``sms``; its idle part is lent.
        weight: share of what is left over relative to other tenants, above 0.
        slo: latency objective: ``"20ms"``, a ``timedelta`` or seconds; None for none. What cannot meet it is
            served all the same and counts as late.
        memory: limit of device memory: ``"4GiB"`` or bytes; None for none.
        priority: class, a whole number; requests of a higher one go out before all of a lower one.
        deadline: as ``slo``, but a request that cannot meet it is refused or dropped instead of served.
        rate: requests a second; None for no limit.
        burst: requests that may come at once under ``rate``; None for those of one second.
        excess: ``"hold"`` has requests above ``rate`` wait for their time, ``"refuse"`` refuses them.
        max_pending: most requests queued or under way; None for no limit.

    Raises:
        UnknownOption: a field that does not exist.
        InvalidQuota: a value outside its range.
        UnparsableQuantity: a duration or a size that cannot be read.
    """
    named: str | _Unset = UNSET if tenant is None else tenant
    shares = {"tenant": named, "sms": sms, "reserve": reserve, "weight": weight, "priority": priority}
    limits = {"memory": memory, "rate": rate, "burst": burst, "excess": excess, "max_pending": max_pending}
    return QuotaScope({**shares, **limits, "slo": slo, "deadline": deadline, **unknown})
