"""Requests that are sent off without being waited for: one, or several at less host time each."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from torch_mux import carry, state
from torch_mux.calls import Prepared, prepare, prepare_all
from torch_mux.errors import DeadlineUnattainable, InvalidRequest, MuxError
from torch_mux.futures import ENDED, Future, kept
from torch_mux.quotas import QuotaScope, current_quota
from torch_mux.routes import Here
from torch_mux.types import Quota

__all__ = ["checked", "queue", "submit", "submit_all"]

log = logging.getLogger(__name__)


def submit(model: Any, *args: Any, **kwargs: Any) -> Future:
    """Sends one request off and returns at once.

    The quota, grad, inference and autocast mode and the CUDA stream are the caller's.

    Raises:
        NotCompiled: ``model`` was not compiled with mux. All other errors come out of the future.
    """
    call = prepare(model, args, kwargs)
    quota = current_quota()
    if call.route is None or not call.route.holds():
        return _guarded(call, None)
    try:
        request = call.submit(quota, kick=True)
    except MuxError as error:
        return _refused(error, quota)
    return Future(request, quota.tenant, call.settle)


def submit_all(*requests: tuple[Any, ...]) -> tuple[Future, ...]:
    """Sends several requests off, pending together, and returns their futures in order, at once.

    For who has several at hand, as a server that empties its queue: what all have in common is looked at
    once, so that each costs about half the host time of a :func:`submit` of its own.

    Args:
        requests: ``(model, *args)`` each, or ``(quota, model, *args)`` with what :func:`torch_mux.quota`
            returned, as if it were submitted inside.

    Raises:
        NotCompiled: a model was not compiled with mux; nothing was sent off then.
        InvalidRequest: an item that is not a tuple, or has no model; nothing was sent off then.
        InvalidQuota: quotas that contradict each other; nothing was sent off then. All other errors come out
            of the futures.
    """
    outer = current_quota()
    items: list[tuple[Any, ...]] = []
    quotas: list[Quota] = []
    scopes: list[QuotaScope | None] = []
    for index, item in enumerate(requests):
        scope: QuotaScope | None = None
        if isinstance(item, tuple) and item and isinstance(item[0], QuotaScope):
            scope, item = item[0], item[1:]
        items.append(checked(index, item))
        quotas.append(outer if scope is None else scope.here())
        scopes.append(scope)
    calls = prepare_all(items, Here())
    learned = [index for index, call in enumerate(calls) if call.route is not None and call.route.holds()]
    sent = queue([calls[index] for index in learned], [quotas[index] for index in learned], kick=True)
    found = dict(zip(learned, sent, strict=True))
    futures = []
    for index, (call, quota) in enumerate(zip(calls, quotas, strict=True)):
        request = found.get(index)
        if request is None:
            futures.append(_guarded(call, scopes[index]))
        elif isinstance(request, Exception):
            futures.append(_refused(request, quota))
        else:
            futures.append(Future(request, quota.tenant, call.settle))
    return tuple(futures)


def checked(index: int, item: object) -> tuple[Any, ...]:
    """``item`` if it is ``(model, *args)``.

    Raises:
        InvalidRequest: it is not.
    """
    if not isinstance(item, tuple) or not item:
        raise InvalidRequest(index=index, got=f"a {type(item).__name__}" if item != () else "empty")
    return item


def queue(calls: Sequence[Prepared], quotas: Sequence[Quota], kick: bool = False) -> Sequence[Any]:
    """Queues calls with a route together; the request of each, or its error.

    Args:
        kick: nobody will wait for them.
    """
    if not calls:
        return ()
    refused: dict[int, DeadlineUnattainable] = {}
    try:
        made = [call.request(quota) for call, quota in zip(calls, quotas, strict=True)]
        # A route's check of its tensors covers where they are.
        requests = state.engine().submit_all(made, kick, True, refused)
        if not refused:
            return requests
        accepted = iter(requests)
        return [refused.get(index) or next(accepted) for index in range(len(calls))]
    except MuxError:
        log.debug("one of several requests was refused; each is submitted on its own")
    found: list[Any] = []
    for call, quota in zip(calls, quotas, strict=True):
        try:
            found.append(call.submit(quota, kick))
        except Exception as error:
            found.append(kept(error))
    return found


def _guarded(call: Prepared, scope: QuotaScope | None) -> Future:
    """On a pool thread, through Dynamo's guards."""
    call.route = None
    with scope if scope is not None else contextlib.nullcontext():
        return Future(carry.run(call.call), current_quota().tenant, lambda source: source.result())


def _refused(error: Exception, quota: Quota) -> Future:
    return Future(ENDED, quota.tenant, lambda source: None, kept(error))
