"""The public functions: ``gather``, ``submit``, ``warmup``, ``configure``, ``adopt`` and the rest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_mux import carry, compat, state
from torch_mux.calls import Prepared, prepare, prepare_all, require_mux
from torch_mux.condition import Health, condition
from torch_mux.errors import InvalidSetting, IsolationUnavailable, NotCompiled
from torch_mux.futures import kept, raised
from torch_mux.learned import name_of
from torch_mux.quantities import parse_duration
from torch_mux.quotas import current_quota
from torch_mux.report import Explanation, Stats, explanation, statistics
from torch_mux.routes import ATTRIBUTE, Here
from torch_mux.sending import checked, queue
from torch_mux.settings import Settings
from torch_mux.together import Assembly

__all__ = [
    "Warmup",
    "adopt",
    "close",
    "configure",
    "explain",
    "gather",
    "health",
    "refresh",
    "remove",
    "reset",
    "stats",
    "warmup",
]

log = logging.getLogger(__name__)

_DURATIONS = ("max_wait", "linger", "pack_after", "segment", "switch_interval")
_COUNTS = ("max_bundle", "lanes", "in_flight", "pack", "branches")
_OR_NONE = ("pack", "branches", "beside", "segment")
_SWITCHES = ("enabled", "capture", "keep_plans", "match")
_CHOICES = {"isolation": ("off", "priority", "caps", "green"), "collector": ("python", "idle")}


def gather(*requests: tuple[Any, ...]) -> tuple[Any, ...]:
    """Runs one round of requests together and returns their results in order.

    Args:
        requests: ``(model, *args)`` each; every model compiled with ``backend="mux"``, one model as often as
            you like.

    Raises:
        NotCompiled: a model that was not compiled with mux.
        InvalidRequest: an item that is not a tuple.
        DeviceMismatch: inputs and weights on different devices.
        Exception: the first failed request's own error, after all others have been completed.
    """
    for index, item in enumerate(requests):
        if type(item) is not tuple or not item:
            checked(index, item)
    return _Round(prepare_all(requests, Here())).run().answer()


class _Round:
    """One ``gather``: what is learned now, what goes straight to the engine, what stays guarded."""

    def __init__(self, calls: Sequence[Prepared]) -> None:
        self.calls = calls
        self.answers: dict[int, Any] = {}
        self.errors: dict[int, Exception] = {}

    def run(self) -> _Round:
        """Has all of them end."""
        calls, answers, errors = self.calls, self.answers, self.errors
        learned: list[int] = []
        guarded: list[int] = []
        for index, call in enumerate(calls):
            if call.route is None:
                call.look_again()
            if call.route is not None:
                learned.append(index)
            elif call.learnable:
                self._keep(index, call.call)
            else:
                guarded.append(index)
        requests = self._submit(learned)
        if guarded:
            self._guarded(guarded)
        if requests:
            state.engine().wait(list(requests.values()))
        for index, request in requests.items():
            try:
                answers[index] = calls[index].finish_waited(request)
            except Exception as error:
                errors[index] = kept(error)
        return self

    def answer(self) -> tuple[Any, ...]:
        """Every answer in order, or the first error."""
        if not self.errors:
            return tuple([self.answers[index] for index in range(len(self.calls))])
        first = self.errors[min(self.errors)]
        try:
            raise raised(first)
        finally:
            del self, first  # the traceback holds this frame, which must not hold the traceback's error

    def _keep(self, index: int, function: Callable[..., Any], *args: Any) -> None:
        try:
            self.answers[index] = function(*args)
        except Exception as error:
            self.errors[index] = kept(error)

    def _submit(self, indices: Sequence[int]) -> dict[int, Any]:
        quotas = [current_quota()] * len(indices)
        requests = {}
        calls = [self.calls[index] for index in indices]
        for index, found in zip(indices, queue(calls, quotas), strict=True):
            if isinstance(found, Exception):
                self.errors[index] = found
            else:
                requests[index] = found
        return requests

    def _guarded(self, indices: Sequence[int]) -> None:
        """Guarded calls, a thread for each model, so that they are pending together; the last on this thread.

        Those of one model run in order: its answers may depend on it, and its Python runs in one thread.
        """
        if compat.active_modes():  # torch function and dispatch modes belong to this thread alone
            self._in_order(indices)
            return
        groups: dict[int, list[int]] = {}
        for index in indices:
            model = self.calls[index].model
            module = compat.original_module(model)
            groups.setdefault(id(model if module is None else module), []).append(index)
        *others, last = groups.values()
        assembly = Assembly(len(groups), carry.WORKERS + 1)
        with assembly.entered():
            futures = [carry.run(partial(self._member, group, assembly)) for group in others]
            self._member(last, assembly)
        for future in futures:
            future.result()

    def _member(self, indices: Sequence[int], assembly: Assembly) -> None:
        try:
            self._in_order(indices)
        finally:
            assembly.leave()

    def _in_order(self, indices: Sequence[int]) -> None:
        for index in indices:
            self._keep(index, self.calls[index].call)


@dataclass(frozen=True)
class Warmup:
    """What ``warmup`` did.

    Attributes:
        model: name of the model.
        sizes: bundle sizes that ran.
        seconds: how long it took.
        learned: whether ``gather`` and ``submit`` skip Dynamo for this signature from now on.
    """

    model: str
    sizes: tuple[int, ...]
    seconds: float
    learned: bool

    def __str__(self) -> str:
        path = "learned path" if self.learned else "guarded path"
        sizes = ", ".join(map(str, self.sizes))
        return f"{self.model} is ready for bundles of {sizes} ({self.seconds:.1f} s, {path})"


def warmup(model: Any, *inputs: Any, sizes: Sequence[int] = (1,)) -> Warmup:
    """Compiles, tunes and captures now what requests like this one will need.

    Args:
        model: compiled with ``backend="mux"``.
        inputs: as the requests will bring them: shapes, strides, dtypes and devices count, values do not.
        sizes: bundle sizes to make ready, from 1 to ``max_bundle``. Grad and inference mode are the caller's.

    Raises:
        NotCompiled, InvalidSetting: see the messages.
    """
    wrong = next((size for size in sizes if not isinstance(size, int) or size < 1), None)
    if wrong is not None:
        raise InvalidSetting(name="sizes", value=wrong, detail="bundle sizes are whole numbers from 1")
    most = state.settings().max_bundle
    if max(sizes, default=0) > most:
        detail = f"a bundle has at most max_bundle={most} requests; torch_mux.configure(max_bundle=...) first"
        raise InvalidSetting(name="sizes", value=max(sizes), detail=detail)
    start = time.perf_counter()
    gather((model, *inputs))
    engine = state.engine()
    for size in sizes:
        gather(*[(model, *inputs)] * size)
        engine.quiesce()
        gather(*[(model, *inputs)] * size)
    done = Warmup(
        name_of(model),
        tuple(sizes),
        time.perf_counter() - start,
        prepare(model, inputs, {}).route is not None,
    )
    log.info("%s", done)
    return done


def configure(**settings: Any) -> Settings:
    """Changes settings of this process while it runs; durations as ``"200us"`` or seconds.

    Args:
        settings: fields of ``torch_mux.settings.Settings``, for example ``max_wait="200us", max_bundle=16``.

    Returns:
        The settings now in force.

    Raises:
        UnknownOption: no such setting.
        UnparsableQuantity: a duration that cannot be read.
        InvalidSetting: a value outside its range.
        IsolationUnavailable: ``isolation="green"`` without a GPU and driver that can do that.
    """
    return state.configure({name: _setting(name, value) for name, value in settings.items()})


def _setting(name: str, value: Any) -> Any:
    if name in _OR_NONE and value is None:
        return value
    if name in _DURATIONS:
        seconds = parse_duration(value)
        if name == "segment" and seconds <= 0.0:
            raise InvalidSetting(name=name, value=value, detail="a duration above 0, or None for no segments")
        return seconds
    if name == "beside" and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
        raise InvalidSetting(name=name, value=value, detail="a number above 0, or None for no limit")
    if name in _COUNTS and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise InvalidSetting(name=name, value=value, detail="a whole number from 1")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise InvalidSetting(name=name, value=value, detail=f"one of {', '.join(_CHOICES[name])}")
    if name == "isolation" and value == "green":
        try:
            compat.green.check(torch.device("cuda"))
        except compat.green.Unavailable as error:
            raise IsolationUnavailable(str(error)) from error
    if name == "straggler" and (
        not isinstance(value, (int, float)) or isinstance(value, bool) or not (value == 0 or 2 <= value < 1e9)
    ):
        raise InvalidSetting(name=name, value=value, detail="a number from 2, or 0 for never")
    if name == "quarantine" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise InvalidSetting(name=name, value=value, detail="a whole number, or 0 for never")
    if name in _SWITCHES and not isinstance(value, bool):
        raise InvalidSetting(name=name, value=value, detail="True or False")
    return value


def adopt(model: Any) -> int:
    """Re-strides a model's convolution weights in place to channels-last, the layout of the kernels.

    Those of depthwise convolutions become taps by channels. Transposed convolutions read a weight of another
    shape, made once an instance, so theirs stay as they are, and a GPU reads three input channels as four.
    Values are unchanged and of all other weights no second copy stays: a further instance costs its weights
    and nothing more.

    Args:
        model: a module, compiled or not.

    Returns:
        How many weights were re-strided.

    Raises:
        NotCompiled: not a module.
    """
    module = compat.original_module(model)
    if module is None:
        raise NotCompiled(model=name_of(model))
    count = 0
    for layer in module.modules():
        if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            continue
        taps = tuple(range(2, layer.weight.dim()))
        order = (*taps, 0, 1) if layer.groups == layer.in_channels > 1 else (0, *taps, 1)
        moved = layer.weight.data.permute(order)
        if not moved.is_contiguous():
            back = [order.index(dim) for dim in range(len(order))]
            layer.weight.data = moved.contiguous().permute(back)
            count += 1
    if count:
        _forget(model)
    return count


def refresh(model: Any) -> None:
    """Has what was derived from ``model`` made again: prepared weights and learned calls; undoes ``remove``.

    Needed after writes that no version counter sees (``.data``, NumPy, DLPack) and after changing attributes
    of ``torch.nn`` modules inside a model that ``gather`` or ``submit`` have learned.

    Raises:
        NotCompiled: ``model`` was not compiled with mux.
    """
    require_mux(model)
    _forget(model)


def _forget(model: Any) -> None:
    table = vars(model).get(ATTRIBUTE)
    if table is not None:
        table.clear()
    engine = state.peek()
    if engine is not None:
        tensors = _tensors(model)
        engine.restore(tensors)
        engine.refresh(tensors)


def remove(model: Any) -> None:
    """Frees what torch-mux holds for ``model``; further requests of it raise ``ModelRemoved``.

    Raises:
        NotCompiled: ``model`` was not compiled with mux.
    """
    require_mux(model)
    tensors = _tensors(model)
    _forget(model)
    engine = state.peek()
    if engine is not None:
        engine.remove(tensors)


def _tensors(model: Any) -> list[Tensor]:
    """Parameters and buffers of a compiled model; of a function, those of the modules it was seen to use."""
    module = compat.original_module(model)
    if module is not None:
        return [*module.parameters(), *module.buffers()]
    table = vars(model).get(ATTRIBUTE)
    routes = [route for group in table.routes.values() for route in group] if table is not None else []
    found = {
        id(value): value for route in routes for value in route.structure.values if isinstance(value, Tensor)
    }
    return list(found.values())


def reset() -> None:
    """Forgets programs, weights, learned calls, counters and settings; opens again after ``close()``."""
    state.reset()


def close() -> None:
    """Finishes what is queued, stops every thread; requests then raise ``ClosedError`` until ``reset()``."""
    state.close()


def stats() -> Stats:
    """What each tenant got so far: outcomes, latencies, device time, coalesced share."""
    return statistics()


def health() -> Health:
    """Whether the runtime can serve, device by device; a fault that only a new process ends is named."""
    return condition()


def explain() -> Explanation:
    """What coalesced, what did not and why, program by program."""
    return explanation()
