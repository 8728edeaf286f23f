"""Which executor serves a device."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import torch

from torch_mux.lowering.kernels.ahead import builder
from torch_mux.runtime.executors.base import Executor
from torch_mux.runtime.mixes import MixBook

if TYPE_CHECKING:
    from torch_mux.runtime.engine import Engine
    from torch_mux.runtime.executors.capture import Move

__all__ = ["make_executor"]

logger = logging.getLogger(__name__)

_told: set[str] = set()


def make_executor(engine: Engine, device: torch.device) -> Executor:
    """The executor of ``device`` for an engine: CUDA's, or the CPU's for every other kind of device."""
    from torch_mux.lowering.plan import stack_buffer

    if device.type != "cuda":
        from torch_mux.runtime.executors.cpu import CpuExecutor

        _tell_once(device)
        return CpuExecutor(device, stack_buffer, engine.compile_thread.submit)
    from torch_mux.runtime.executors.capture import Capturer, Steps
    from torch_mux.runtime.executors.cuda import CudaExecutor
    from torch_mux.runtime.executors.joint import JointLauncher
    from torch_mux.runtime.executors.joint_capture import JointCapturer
    from torch_mux.runtime.executors.segmenter import Segmenter

    steps = Steps(stack_buffer, *_moves())
    segmenter = Segmenter(device, torch.cuda.get_device_properties(device).multi_processor_count)
    capturer = Capturer(engine.compile_thread, steps, engine.compile_lock, builder, segmenter)
    book = MixBook()
    joint = JointCapturer(engine.compile_thread, steps, engine.compile_lock, builder, book, segmenter)
    launcher = partial(JointLauncher, joint, book)
    return CudaExecutor(device, steps, capturer, launcher, engine.clock)


def _moves() -> tuple[Move, Move]:
    """The transport kernels; without Triton, where every plan runs per instance, nothing calls them."""
    try:
        from torch_mux.lowering.kernels.transport import gather, scatter
    except ImportError as error:
        reason = str(error)
        logger.warning("models on the GPU run one by one, without super-kernels: %s", reason)

        def missing(*_: object) -> None:
            raise RuntimeError(f"a coalesced bundle needs Triton: {reason}")

        return missing, missing
    return gather, scatter


def _tell_once(device: torch.device) -> None:
    """One line a process and kind of device for those who expected a GPU."""
    if device.type not in _told:
        _told.add(device.type)
        why = "the models are there" if torch.cuda.is_available() else "no GPU was found"
        logger.info(
            "the CPU executor serves requests on %s (%s): sms is recorded, not enforced", device.type, why
        )
