"""CUDA graphs with static buffers, and streams: the parts that the peers are put together from.

Everything about CUDA is in a recorder, so that the rest of a peer runs without a GPU, over :class:`Rerun`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from torch_mux import compat
from torch_mux.bench.contenders.base import Arguments, NotApplicable

__all__ = ["Body", "Captured", "Recorder", "Recording", "Rerun", "captured", "recorder", "run"]

#: Enqueues work and returns its outputs.
Body = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Recording:
    """Work that writes the same outputs whenever it is replayed."""

    replay: Callable[[], None]
    outputs: list[Tensor]


class Recorder(Protocol):
    """Records work for one device, and spreads it over streams."""

    def record(self, bodies: Sequence[Body], beside: int | None = None) -> Recording:
        """The bodies as one recording: several are branches that do not wait for each other.

        Args:
            beside: the lane of a recording that runs at the same time as others; it shares no memory.
        """
        ...

    def lanes(self, count: int) -> None:
        """Has so many streams ready."""
        ...

    def start(self) -> None:
        """What lanes do from here on comes after what the caller has enqueued so far."""
        ...

    def lane(self, index: int) -> AbstractContextManager[object]:
        """What is enqueued inside is enqueued on that stream."""
        ...

    def finish(self, count: int) -> None:
        """What the caller enqueues from here on comes after what those lanes do."""
        ...


class Graphs:
    """CUDA graphs on the current device."""

    def __init__(self) -> None:
        self._pool = compat.Pool(torch.device("cuda"))  # outlives the graphs of a while ago
        self._streams: list[torch.cuda.Stream] = []
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self, bodies: Sequence[Body], beside: int | None = None) -> Recording:
        """One graph. What cuBLAS works in belongs to the stream that is captured, so lanes capture theirs.

        Raises:
            Exception: what a body raised; further graphs can be recorded after it.
        """
        graph = torch.cuda.CUDAGraph()
        outputs: list[Tensor] = []
        self.lanes(len(bodies))
        stream = None if beside is None else self._streams[beside]
        pool: Any = self._pool if beside is None else compat.Pool(torch.device("cuda"))
        current, own = torch.cuda.current_stream(), None
        try:
            # Relaxed: what else happens on this thread, garbage collection too, does not end the capture.
            with (
                compat.capturing(),
                torch.cuda.graph(graph, pool=pool.key, stream=stream, capture_error_mode="relaxed"),
            ):
                try:
                    self._run(bodies, outputs)
                except Exception as error:
                    own = error
                    raise
        except Exception as error:
            self._pool = compat.Pool(torch.device("cuda"))
            torch.cuda.set_stream(current)
            compat.end_lost_capture(pool)
            raise (own or error) from None  # the body's, which lost the capture
        return Recording(graph.replay, outputs)

    def _run(self, bodies: Sequence[Body], outputs: list[Tensor]) -> None:
        """One body, or several on branches."""
        if len(bodies) == 1:
            outputs += bodies[0]()
            return
        self.start()
        for index, body in enumerate(bodies):
            with self.lane(index):
                outputs += body()
        self.finish(len(bodies))

    def lanes(self, count: int) -> None:
        """Makes those that are missing."""
        missing = range(len(self._streams), count)
        self._streams += [torch.cuda.Stream() for _ in missing]  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """Each lane waits when it is entered next."""
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    @contextmanager
    def lane(self, index: int) -> Iterator[None]:
        """A stream of its own."""
        stream = self._streams[index]
        stream.wait_event(self._event)
        with torch.cuda.stream(stream):
            yield

    def finish(self, count: int) -> None:
        """The caller's stream waits."""
        trunk = torch.cuda.current_stream()
        for stream in self._streams[:count]:
            trunk.wait_stream(stream)


class Rerun:
    """The same meaning without a GPU: a replay runs the bodies again and copies what they return."""

    def record(self, bodies: Sequence[Body], beside: int | None = None) -> Recording:
        """Runs the bodies once for the outputs."""
        outputs = [output.clone() for body in bodies for output in body()]

        def replay() -> None:
            fresh = [output for body in bodies for output in body()]
            torch._foreach_copy_(outputs, fresh)

        return Recording(replay, outputs)

    def lanes(self, count: int) -> None:
        """There are none."""

    def start(self) -> None:
        """Everything runs in order."""

    def lane(self, index: int) -> AbstractContextManager[object]:
        """Everything runs in order."""
        return nullcontext()

    def finish(self, count: int) -> None:
        """Everything runs in order."""


def recorder(device: torch.device) -> Recorder:
    """Of a device.

    Raises:
        NotApplicable: it is no GPU.
    """
    if device.type != "cuda":
        raise NotApplicable("CUDA graphs need a GPU")
    return Graphs()


class Captured:
    """A recording over static inputs.

    Args:
        inputs: where each request's arguments go.
        recording: what reads them.
        outputs: each request's answer; those of the recording if not given.
    """

    def __init__(
        self,
        inputs: Sequence[tuple[Tensor, ...]],
        recording: Recording,
        outputs: Sequence[Tensor] | None = None,
    ) -> None:
        self.inputs = [x for args in inputs for x in args]
        self.replay = recording.replay
        self.outputs = list(recording.outputs if outputs is None else outputs)

    def run(self, requests: Arguments) -> Sequence[Tensor]:
        """One round."""
        return run([self], requests, self.replay)


def run(graphs: Sequence[Captured], requests: Arguments, replay: Callable[[], object]) -> list[Tensor]:
    """One round of several graphs: all arguments are copied with one launch, all answers with another.

    Args:
        replay: runs the graphs.

    Returns:
        Tensors that are the caller's.
    """
    torch._foreach_copy_(
        [x for graph in graphs for x in graph.inputs], [x for args in requests for x in args]
    )
    replay()
    outputs = [output for graph in graphs for output in graph.outputs]
    answers = [torch.empty_like(output) for output in outputs]
    torch._foreach_copy_(answers, outputs)
    return answers


def captured(
    record: Recorder,
    calls: Sequence[Callable[..., Tensor]],
    requests: Arguments,
    beside: int | None = None,
) -> Captured:
    """One recording of a call for each request, over copies of the arguments."""
    inputs = [tuple(x.clone() for x in args) for args in requests]

    def body(call: Callable[..., Tensor], args: tuple[Tensor, ...]) -> Body:
        return lambda: [call(*args)]

    bodies = [body(call, args) for call, args in zip(calls, inputs, strict=True)]
    return Captured(inputs, record.record(bodies, beside))
