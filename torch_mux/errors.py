"""Every error torch-mux raises: one class an error, its remedy in the message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

__all__ = [
    "CancelledRequest",
    "ClosedError",
    "DeadlineExceeded",
    "DeadlineUnattainable",
    "DeviceFailed",
    "DeviceMismatch",
    "DispatchFailed",
    "ExecutionFailed",
    "InvalidQuota",
    "InvalidRequest",
    "InvalidSetting",
    "IsolationUnavailable",
    "MemoryQuotaExceeded",
    "ModelRemoved",
    "MuxError",
    "NotCompiled",
    "Overloaded",
    "Quarantined",
    "RateExceeded",
    "RefreshNeeded",
    "Refused",
    "StreamCaptured",
    "TooManyInstances",
    "UnknownOption",
    "UnparsableQuantity",
]

Own = TypeVar("Own", bound="MuxError")


class MuxError(RuntimeError):
    """Base class of every error of torch-mux."""

    message = "{detail}"

    def __init__(self, detail: str = "", **fields: object) -> None:
        super().__init__(self.message.format(detail=detail, **fields))
        self.fields = fields

    def again(self: Own) -> Own:
        """Another error like this one, to raise in place of one that is kept.

        The frames that an error comes through hold whom it was asked of, and he the one that he keeps. And
        what several threads raise at once would get the frames of all.
        """
        other = type(self).__new__(type(self), *self.args)
        other.__dict__.update(self.__dict__)
        other.__cause__, other.__context__ = self.__cause__, self.__context__
        other.__suppress_context__ = self.__suppress_context__
        return other


class TooManyInstances(MuxError):
    """More models of one architecture than its tables can address."""

    message = (
        "at most {limit} models of one architecture can be served; torch_mux.remove() those no longer needed"
    )


class UnknownOption(MuxError):
    """An option, setting or quota field that does not exist."""

    message = "unknown {where} {name!r}; valid are: {valid}"

    @classmethod
    def near(cls, where: str, name: str, valid: Iterable[str]) -> UnknownOption:
        """The error for ``name``, with the valid names and the one that was probably meant."""
        names = list(valid)
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return cls(where=where, name=name, valid=", ".join(names) + hint)


class InvalidQuota(MuxError):
    """A quota value outside its range."""

    message = "quota {field}={value!r} is invalid: {detail}"


class InvalidRequest(MuxError):
    """Something that is not ``(model, *args)`` given to ``gather`` or ``submit_all``."""

    message = (
        "request {index} is {got}; give (model, *args) for each: torch_mux.gather((model, *args), ...), and "
        "in submit_all also (quota, model, *args)"
    )


class InvalidSetting(MuxError):
    """A setting outside its range."""

    message = "setting {name}={value!r} is invalid: {detail}"


class IsolationUnavailable(MuxError):
    """Tenants with a reserve cannot have multiprocessors of their own here."""

    message = (
        'isolation="green" does not work here: {detail}; torch_mux.configure(isolation="caps") needs no more '
        "than streams"
    )


class UnparsableQuantity(MuxError):
    """A duration or size that cannot be read."""

    message = "cannot read {value!r} as a {kind}; write for example {example}"


class NotCompiled(MuxError):
    """A model that was not compiled with ``backend="mux"``."""

    message = '{model} is not compiled with mux: pass torch.compile(model, backend="mux") instead'


class DeviceMismatch(MuxError):
    """Inputs and weights of one request on different devices."""

    message = "input {index} of {model} is on {got} but its weights are on {want}; move it with .to({want!r})"


class ModelRemoved(MuxError):
    """A request after ``torch_mux.remove(model)``."""

    message = "{model} was removed with torch_mux.remove(); torch_mux.refresh(model) brings it back"


class ClosedError(MuxError):
    """A request after ``torch_mux.close()``."""

    message = "torch_mux is closed; call torch_mux.reset() to start again"


class CancelledRequest(MuxError):
    """The result of a request that was cancelled."""

    message = "the request of tenant {tenant!r} was cancelled before it went out"


class MemoryQuotaExceeded(MuxError):
    """A request that would take a tenant above the ``memory`` of its quota."""

    message = (
        "tenant {tenant!r} holds {held} bytes of {device} and {model} needs {asked} more, above its quota of "
        "memory={limit}: raise it, torch_mux.remove() models, or have fewer requests under way"
    )


class Refused(MuxError):
    """Base class of the errors of requests that were refused before they cost anything."""


class Overloaded(Refused):
    """A tenant has as many requests pending as its quota allows."""

    message = (
        "tenant {tenant!r} has {pending} requests pending, and its quota allows max_pending={limit}: "
        "wait for some of them, or raise it"
    )


class RateExceeded(Refused):
    """A tenant sends more requests than its quota allows."""

    message = (
        "tenant {tenant!r} sends more than rate={rate:g} requests a second with burst={burst}: "
        'try again in {wait:.3g} s, raise them, or have requests wait with excess="hold"'
    )


class Quarantined(Refused):
    """A tenant is held off for a while from a model whose last requests all raised."""

    message = (
        "tenant {tenant!r} is held off from {model} for another {wait:.3g} s, because its last {failures} "
        "requests all raised: mend that first ({cause}), or raise torch_mux.configure(quarantine=...)"
    )


class DeadlineUnattainable(Refused):
    """A request that could not meet the deadline of its quota."""

    message = (
        "a request of tenant {tenant!r} cannot meet its deadline of {deadline:g} s: {detail}; "
        "give it more time, or use slo instead of deadline to be served late"
    )


class DeadlineExceeded(MuxError):
    """A request whose deadline passed before it went out."""

    message = (
        "a request of tenant {tenant!r} was dropped: it had not gone out within its deadline of "
        "{deadline:g} s; send less, give it more time, or use slo instead of deadline to be served late"
    )


class DispatchFailed(MuxError):
    """The runtime itself failed while the request was queued or under way; the cause is chained."""

    message = "the runtime stopped serving this request: {detail}; if it happens again call torch_mux.reset()"


class DeviceFailed(MuxError):
    """A device reported an error that stays: it serves nothing more in this process; the cause is chained."""

    message = "{device} serves nothing more in this process: {fault}; start a new process"


class StreamCaptured(MuxError):
    """A request was made while the calling thread's CUDA stream is being captured into a graph."""

    message = "a request cannot be part of a CUDA graph: submit it outside of the capture of this stream"


class ExecutionFailed(MuxError):
    """A plan raised while it ran; the cause is chained."""

    message = "{model} failed while it ran: {detail}"


class RefreshNeeded(MuxError):
    """Weights changed in a way that needs ``torch_mux.refresh(model)``."""

    message = "{model}: {detail}; call torch_mux.refresh(model)"
