"""One request of a compiled model: by its learned route if it has one, else by the guarded path."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_mux import compat, state
from torch_mux.errors import ClosedError, DeviceMismatch, MuxError, NotCompiled, RefreshNeeded
from torch_mux.learned import learn, name_of
from torch_mux.routes import ATTRIBUTE, Arranged, Here, Route, RouteTable, arrange, table_of
from torch_mux.types import FallbackKind, FallbackReason, Quota

__all__ = ["Prepared", "is_mux", "prepare", "prepare_all", "require_mux"]

log = logging.getLogger(__name__)

_learning = threading.RLock()
_NOTHING: dict[str, Any] = {}


def is_mux(backend: object) -> bool:
    """Whether ``backend`` is the one that ``torch.compile(model, backend="mux")`` uses."""
    return (
        getattr(backend, "__module__", None) == "torch_mux.backend"
        and getattr(backend, "__name__", None) == "mux"
    )


def require_mux(model: Any) -> None:
    """Checks that ``model`` was compiled with mux.

    Raises:
        NotCompiled: it was not.
    """
    if not is_mux(compat.compiled_backend(model)):
        raise NotCompiled(model=name_of(model))


@dataclass(eq=False, slots=True)
class Prepared:
    """One call that was not made yet.

    Attributes:
        model, args, kwargs: what to call with what.
        leaves, spec, key: the arguments, flattened; see :class:`Arranged`.
        table: what was learned about the model.
        route: the learned route of this signature, or None.
    """

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: Sequence[Any]
    spec: Any
    key: tuple[object, ...] | None
    table: RouteTable
    route: Route | None

    @property
    def arranged(self) -> Arranged:
        """The arguments, flattened."""
        return Arranged(self.leaves, self.spec, self.key)

    @property
    def learnable(self) -> bool:
        """Whether nothing is known yet about this signature."""
        return self.route is None and self.key is not None and self.key not in self.table.refusals

    def look_again(self) -> None:
        """Finds a route that was learned since, where there was none."""
        self.route = self.table.find(self.arranged)

    def request(self, quota: Quota) -> tuple[Any, Sequence[object], Quota]:
        """What to give to ``Engine.submit_all`` for a learned signature."""
        assert self.route is not None
        return self.route.instance, self.route.fill(self.leaves), quota

    def submit(self, quota: Quota, kick: bool = False) -> Any:
        """Queues the request of a learned signature; never waits.

        Args:
            kick: nobody will wait for it.
        """
        route = self.route
        assert route is not None
        inputs = route.fill(self.leaves)
        try:
            return route.engine.submit(route.instance, inputs, quota, kick)
        except ClosedError:
            if not state.replaced(route.engine):
                raise
        return state.engine().submit(route.instance, inputs, quota, kick)

    def finish(self, request: Any) -> Any:
        """The model's result from its request; made again on the guarded path if the model has changed.

        The check comes after the request on purpose: on a device it overlaps the work. A learned graph writes
        nothing but its own outputs, so an answer from a model that has changed is simply dropped.
        """
        route = self.route
        assert route is not None
        if not route.unchanged():
            return self._relearn()
        return self.settle(request)

    def finish_waited(self, request: Any) -> Any:
        """:meth:`finish` for a request that the engine has waited for on the caller's stream."""
        route = self.route
        assert route is not None
        if not route.unchanged():
            return self._relearn()
        if request.error is None:
            return route.finish(request.outputs, self.leaves)
        try:
            return route.finish(request.outcome(), self.leaves)
        except (ClosedError, RefreshNeeded) as error:
            return self._again(error)

    def settle(self, request: Any) -> Any:
        """The model's result from a request whose route was checked before it was submitted."""
        route = self.route
        assert route is not None
        try:
            return route.finish(request.result(), self.leaves)
        except (ClosedError, RefreshNeeded) as error:
            return self._again(error)

    def _again(self, error: MuxError) -> Any:
        """Another call, where the model has changed or a reset let go of the request before it went out."""
        assert self.route is not None
        if isinstance(error, ClosedError) and not state.replaced(self.route.engine):
            raise error
        return self._relearn()

    def _relearn(self) -> Any:
        assert self.route is not None and self.key is not None
        log.info("%s changed since its call was learned; it is learned again", name_of(self.model))
        # A weight that changed its form in place is still the same object: the route itself cannot tell.
        self.table.forget(self.route)
        self.table.prune()
        self.route = None
        grad, inference = self.key[:2]
        with torch.inference_mode(bool(inference)), torch.set_grad_enabled(bool(grad)):
            return self.call()

    def call(self) -> Any:
        """The guarded call, on this thread; the first one of a signature teaches the learned path."""
        if not self.learnable:
            _note_argument(self)
            return self._guarded()
        with _learning:  # Dynamo is not thread-safe while it compiles
            self.look_again()
            if self.route is None:
                return self._guarded(teach=True)
        return self.finish(self.submit(_quota()))

    def _guarded(self, teach: bool = False) -> Any:
        try:
            if not teach:
                return self.model(*self.args, **self.kwargs)
            with compat.paused_collector():
                lesson = learn(self.model, self.args, self.kwargs, self.arranged)
        except MuxError:
            raise
        except Exception as error:
            mismatch = _device_mismatch(self.model, self.leaves)
            if mismatch is not None:
                raise mismatch from error
            raise
        assert self.key is not None
        self.table.prune()
        if lesson.route is not None:
            self.table.add(self.key, lesson.route)
        if lesson.refusal is not None:
            self.table.refuse(self.key, lesson.refusal)
            _report(lesson.refusal)
        return lesson.result


def prepare(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], here: Here | None = None) -> Prepared:
    """Looks the call's signature up; a few microseconds for a learned one.

    Args:
        here: the modes of this thread where they have been looked at.

    Raises:
        NotCompiled: ``model`` was not compiled with mux.
    """
    known = getattr(model, "__dict__", None)
    if known is None:
        raise NotCompiled(model=name_of(model))
    if ATTRIBUTE not in known:
        require_mux(model)
    here = here or Here()
    table = table_of(model, state.epoch())
    last = table.last
    if last is not None and not kwargs and last.fits(args, here):
        return Prepared(model, args, kwargs, args, None, last.key, table, last.route)
    arranged = arrange(args, kwargs, here)
    route = table.find(arranged, here)
    return Prepared(model, args, kwargs, arranged.leaves, arranged.spec, arranged.key, table, route)


def prepare_all(items: Sequence[tuple[Any, ...]], here: Here) -> list[Prepared]:
    """:func:`prepare` of ``(model, *args)`` each.

    Args:
        here: the modes of this thread.

    Raises:
        NotCompiled: a model was not compiled with mux.
    """
    found: list[Prepared] = []
    epoch = state.epoch()
    for item in items:
        model, args = item[0], item[1:]
        known = getattr(model, "__dict__", _NOTHING)
        table: RouteTable | None = known.get(ATTRIBUTE)
        if table is not None and table.epoch == epoch:
            last = table.last
            if last is not None and last.fits(args, here):
                found.append(Prepared(model, args, _NOTHING, args, None, last.key, table, last.route))
                continue
        found.append(prepare(model, args, {}, here))
    return found


def _quota() -> Quota:
    from torch_mux.quotas import current_quota

    return current_quota()


def _report(reason: FallbackReason) -> None:
    if reason.kind is not FallbackKind.TRAINING:  # the backend notes those and warns
        state.note(reason)
    if reason.kind is FallbackKind.NOT_REACHED:
        warnings.warn(f"torch_mux: {reason}; nothing of it is coalesced", stacklevel=6)


def _note_argument(prepared: Prepared) -> None:
    if prepared.key is None:
        kinds = {type(leaf).__name__ for leaf in prepared.leaves if not isinstance(leaf, torch.Tensor)}
        detail = f"an argument is of type {', '.join(sorted(kinds)) or 'a tensor subclass'}"
        state.note(FallbackReason(FallbackKind.GUARDED, name_of(prepared.model), detail))


def _device_mismatch(model: Any, leaves: Sequence[Any]) -> DeviceMismatch | None:
    """The error to raise when a call failed and an input is elsewhere than every weight."""
    module = compat.original_module(model)
    devices = (
        {tensor.device for tensor in (*module.parameters(), *module.buffers())}
        if module is not None
        else set()
    )
    if len(devices) != 1:
        return None
    want = devices.pop()
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and leaf.device != want:
            return DeviceMismatch(index=index, model=name_of(model), got=str(leaf.device), want=str(want))
    return None
