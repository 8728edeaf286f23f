"""Ways to serve requests that arrive one by one: ours, and CUDA graphs on streams or one after another."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

import torch_mux
from torch_mux import state
from torch_mux.bench.contenders import inductor_callables
from torch_mux.bench.workloads import Tenants

__all__ = ["SERVERS", "Finished", "Server", "default_servers"]

#: Called once a request has its answer: (its number, the moment, what went wrong or None).
Finished = Callable[[int, float, BaseException | None], None]
_SIZES: Final = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Server(Protocol):
    """Answers requests that one thread submits.

    Attributes:
        name: on the command line and in the record.
    """

    name: str

    def prepare(self, tenants: Tenants) -> None:
        """Compiles and captures all that serving will need."""
        ...

    def submit(self, number: int, tenant: int, arguments: tuple[Tensor, ...], finished: Finished) -> None:
        """Starts on a request without waiting for it."""
        ...

    def poll(self) -> None:
        """Reports what has finished, where nobody else does."""
        ...

    def release(self) -> None:
        """Gives back what was prepared."""
        ...


class MuxServer:
    """``torch_mux.submit``, each tenant under its own name."""

    name = "mux"

    def __init__(self) -> None:
        self._models: list[Any] = []
        self._quotas: list[str] = []

    def prepare(self, tenants: Tenants) -> None:
        served = tenants.models if tenants.workload.returns_tensor else tenants.tensor_only()
        self._models = [torch.compile(model, backend="mux") for model in served]
        self._quotas = [f"tenant-{index}" for index in range(len(self._models))]
        most = state.settings().max_bundle
        for model, arguments in zip(self._models, tenants.requests[0], strict=True):
            torch_mux.warmup(model, *arguments, sizes=[size for size in _SIZES if size <= most])
        if not state.engine().quiesce(300.0, ahead=True):
            raise TimeoutError("still compiling ahead after 300 s")

    def submit(self, number: int, tenant: int, arguments: tuple[Tensor, ...], finished: Finished) -> None:
        def done(future: Any) -> None:
            now = time.perf_counter()
            finished(number, now, future.exception())

        with torch_mux.quota(self._quotas[tenant]):
            torch_mux.submit(self._models[tenant], *arguments).add_done_callback(done)

    def poll(self) -> None:
        """Callbacks come from the runtime's threads."""

    def release(self) -> None:
        for model in self._models:
            torch_mux.remove(model)
        self._models = []


class GraphServer:
    """Inductor's code of each tenant in a CUDA graph; on a stream a tenant, or all on one."""

    def __init__(self, name: str, streams: bool) -> None:
        self.name = name
        self._own = streams
        self._graphs: list[tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = []
        self._streams: list[torch.cuda.Stream] = []
        self._under_way: dict[int, deque[tuple[int, torch.cuda.Event, Tensor, Finished]]] = {}

    def prepare(self, tenants: Tenants) -> None:
        callables = inductor_callables(tenants)
        one = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for call, arguments in zip(callables, tenants.requests[0], strict=True):
            graph, held = torch.cuda.CUDAGraph(), tuple(x.clone() for x in arguments)
            # A pool a graph: they replay at the same time.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = call(*held)
            self._graphs.append((graph, held, output))
            self._streams.append(torch.cuda.Stream() if self._own else one)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()

    def submit(self, number: int, tenant: int, arguments: tuple[Tensor, ...], finished: Finished) -> None:
        graph, held, output = self._graphs[tenant]
        stream = self._streams[tenant]
        with torch.cuda.stream(stream):
            torch._foreach_copy_(list(held), list(arguments))
            graph.replay()
            answer = output.clone()
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        waiting = self._under_way.setdefault(tenant if self._own else 0, deque())
        waiting.append((number, event, answer, finished))

    def poll(self) -> None:
        for waiting in self._under_way.values():
            while waiting and waiting[0][1].query():  # type: ignore[no-untyped-call]
                number, _, _, finished = waiting.popleft()
                finished(number, time.perf_counter(), None)

    def release(self) -> None:
        self._graphs, self._streams, self._under_way = [], [], {}


class InductorServer:
    """Inductor's code, one request after another on a thread of its own; for machines without a GPU."""

    name = "inductor"

    def __init__(self) -> None:
        self._callables: Sequence[Callable[..., Tensor]] = ()
        self._queue: queue.SimpleQueue[tuple[int, int, tuple[Tensor, ...], Finished] | None]
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def prepare(self, tenants: Tenants) -> None:
        self._callables = inductor_callables(tenants)
        self._thread.start()

    def _work(self) -> None:
        with torch.inference_mode():
            while (item := self._queue.get()) is not None:
                number, tenant, arguments, finished = item
                error: BaseException | None = None
                try:
                    self._callables[tenant](*arguments)
                except Exception as raised:
                    error = raised
                finished(number, time.perf_counter(), error)

    def submit(self, number: int, tenant: int, arguments: tuple[Tensor, ...], finished: Finished) -> None:
        self._queue.put((number, tenant, arguments, finished))

    def poll(self) -> None:
        """The worker reports."""

    def release(self) -> None:
        self._queue.put(None)
        self._thread.join()


SERVERS: dict[str, Callable[[], Server]] = {
    "mux": MuxServer,
    "streams": lambda: GraphServer("streams", streams=True),
    "sliced": lambda: GraphServer("sliced", streams=False),
    "inductor": InductorServer,
}


def default_servers(device: torch.device) -> list[str]:
    """Ours and the peers that make sense on a device."""
    return ["mux", "streams", "sliced"] if device.type == "cuda" else ["mux", "inductor"]
