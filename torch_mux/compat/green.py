"""Green contexts: streams whose work runs on multiprocessors of their own.

Through the driver, whose interface has been the same since CUDA 12.5. ``torch.cuda.green_contexts`` changed
from torch 2.10 to 2.15 (a current context to set, then streams, then partitions), and before the last it cuts
every context out of the same first multiprocessors, so that two of them overlap.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch

__all__ = ["GreenContext", "Halves", "Unavailable", "check", "fitting", "split"]

#: Multiprocessors come in groups of this many.
GROUP = 8
_BYTES = 1024  # a resource takes 144
_COUNT_AT = 96
_SM_RESOURCE = 1
_DEFAULT_STREAM = 1
_NON_BLOCKING = 1
_NEEDED = (
    "cuDeviceGetDevResource",
    "cuDevSmResourceSplitByCount",
    "cuDevResourceGenerateDesc",
    "cuGreenCtxCreate",
    "cuGreenCtxStreamCreate",
)

_making = threading.Lock()
_made: dict[tuple[int, int], Halves] = {}


class Unavailable(RuntimeError):
    """No green contexts here; the reason is the text."""


class GreenContext(NamedTuple):
    """A part of a device.

    It lives as long as the process: torch's allocator keeps the streams of what it lends.

    Attributes:
        handle: its ``CUgreenCtx``.
        device: of which it is a part.
        sms: its multiprocessors.
    """

    handle: int
    device: torch.device
    sms: int

    def stream(self, priority: int) -> torch.cuda.Stream:
        """A new stream that runs on it; a lower ``priority`` number goes first.

        Raises:
            Unavailable: the driver refuses.
        """
        found = ctypes.c_void_p()
        handle = ctypes.c_void_p(self.handle)
        _call("cuGreenCtxStreamCreate", ctypes.byref(found), handle, _NON_BLOCKING, priority)
        external = cast(Callable[..., torch.cuda.Stream], torch.cuda.ExternalStream)
        return external(found.value, device=self.device)


class Halves(NamedTuple):
    """Two parts of one device that have no multiprocessor in common."""

    own: GreenContext
    rest: GreenContext


def check(device: torch.device) -> None:
    """Cuts the device once, to see whether it can be.

    Raises:
        Unavailable: it cannot, with the reason.
    """
    split(device, fitting(device, 0.0))


def fitting(device: torch.device, part: float) -> int:
    """Multiprocessors for at least ``part`` of the device, a group at least, that leave a group for others.

    Raises:
        Unavailable: it is no CUDA device.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise Unavailable("there is no CUDA device")
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    groups = -int(-part * sms // GROUP)
    return max(1, min(groups, sms // GROUP - 1)) * GROUP


def split(device: torch.device, sms: int) -> Halves:
    """A context with ``sms`` multiprocessors and one with all others, each made once in the process.

    Raises:
        Unavailable: driver or device cannot do that.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with _making:
        found = _made.get((index, sms))
        if found is None:
            found = _made[index, sms] = _cut(torch.device("cuda", index), sms)
        return found


def _cut(device: torch.device, sms: int) -> Halves:
    torch.empty(1, device=device)  # now the device's primary context is there
    number = ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(number), device.index)
    whole, own, rest = (ctypes.create_string_buffer(_BYTES) for _ in range(3))
    _call("cuDeviceGetDevResource", number, whole, _SM_RESOURCE)
    groups = ctypes.c_uint(1)
    _call("cuDevSmResourceSplitByCount", own, ctypes.byref(groups), whole, rest, 0, ctypes.c_uint(sms))
    if groups.value != 1 or not _count(rest):
        raise Unavailable(f"{sms} multiprocessors cannot be cut off {device}")
    return Halves(_context(number, device, own), _context(number, device, rest))


def _context(number: ctypes.c_int, device: torch.device, resource: Any) -> GreenContext:
    described, made = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuDevResourceGenerateDesc", ctypes.byref(described), resource, 1)
    _call("cuGreenCtxCreate", ctypes.byref(made), described, number, _DEFAULT_STREAM)
    assert made.value is not None
    return GreenContext(made.value, device, _count(resource))


def _count(resource: Any) -> int:
    return ctypes.c_uint.from_buffer(resource, _COUNT_AT).value


@functools.cache
def _driver() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unavailable(f"the CUDA driver cannot be loaded: {error}") from error
    missing = [name for name in _NEEDED if not hasattr(driver, name)]
    if missing:
        raise Unavailable(f"the CUDA driver has no {missing[0]}: CUDA 12.5 or newer is needed")
    return driver


def _call(name: str, *arguments: Any) -> None:
    driver = _driver()
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise Unavailable(f"{name}: {(text.value or str(code).encode()).decode()}")
