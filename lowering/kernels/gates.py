# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,unused-ignore"
"""Where a captured graph stops while another one overtakes it, decided on the device.

A graph that may be overtaken has a *stop* between two of its segments: a kernel of one program that waits
while some graph has begun to overtake and not ended. A graph that overtakes begins and ends with a kernel
that counts. All of it happens on the device, and a graph is launched whole: once its first kernel has run
nothing that the host does or does not do can keep it from ending, so a stop always opens again. A flag that
the host sets would not do: between setting it and launching what takes it back the host may wait for the
device, or what overtakes may itself wait for the graph that is stopped.

A stop also reads how many multiprocessors are left to its graph, so that those that were lent come back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_mux.lowering.kernels.common import Launch, multiprocessors
from torch_mux.lowering.kernels.data import Tile
from torch_mux.lowering.kernels.operation import Operation

__all__ = ["Gate"]

_BEGUN = tl.constexpr(0)
_ENDED = tl.constexpr(1)
_LEFT = tl.constexpr(2)


@triton.jit(do_not_specialize_on_alignment=["words", "control", "own"])
def stop_kernel(words, control, own, PDL: tl.constexpr):
    """Waits until whatever began has ended; then the cap is that of ``own``, or what is left, if less."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    ahead = tl.load(words + _BEGUN, volatile=True) - tl.load(words + _ENDED, volatile=True)
    while ahead != 0:
        ahead = tl.load(words + _BEGUN, volatile=True) - tl.load(words + _ENDED, volatile=True)
    left = tl.load(words + _LEFT, volatile=True)
    tl.store(control + 1, tl.minimum(tl.load(own + 1), left))


@triton.jit
def count_kernel(words, ENDS: tl.constexpr, PDL: tl.constexpr):
    """One more has begun, or ended."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    tl.atomic_add(words + ENDS, 1)


@triton.jit(do_not_specialize=["sms"], do_not_specialize_on_alignment=["words", "control"])
def claim_kernel(words, control, sms, ENDS: tl.constexpr, PDL: tl.constexpr):
    """What a cap below the whole device leaves is all that others have from their next stop on."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    left = sms
    if not ENDS:
        cap = tl.load(control + 1)
        left = tl.where(cap < sms, sms - cap, sms)
    tl.store(words + _LEFT, left)


class Gate:
    """The words of one device by which graphs stop and go on, and the launches that read and write them.

    Attributes:
        words: int32 [3] on the device: graphs that have begun to overtake, those of them that have ended, and
            the multiprocessors that are left to graphs with stops.
    """

    def __init__(self, device: torch.device) -> None:
        self._sms = multiprocessors(device)
        self.words = torch.tensor([0, 0, self._sms], dtype=torch.int32, device=device)

    def stop(self, control: Tensor, own: Tensor) -> Launch:
        """Between two segments.

        Args:
            control: int32 [2], active slots and cap, which the launches behind read.
            own: int32 [2], the cap that the bundle was given in its second place.
        """
        return self._launch(stop_kernel, {"words": self.words, "control": control, "own": own})

    def overtake(self, ends: bool) -> Launch:
        """The first launch, or the last, of a graph that goes before those that stop."""
        return self._launch(count_kernel, {"words": self.words, "ENDS": int(ends)})

    def claim(self, control: Tensor, ends: bool) -> Launch:
        """The first launch, or the last, of a graph whose cap is taken from those that stop."""
        arguments = {"words": self.words, "control": control, "sms": self._sms, "ENDS": int(ends)}
        return self._launch(claim_kernel, arguments)

    def _launch(self, kernel: object, arguments: dict[str, object]) -> Launch:
        operation = Operation("gate", ((1, 1, 1),), torch.int32)
        # Plain: in a graph of several streams it may follow more than the launch before it on its own.
        return Launch(kernel, 1, arguments, Tile(1, 1, 1, 1, 1, 1), self.words.device, operation, plain=True)
