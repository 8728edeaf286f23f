"""Ways to serve requests that arrive one by one: ours, and CUDA graphs on streams or one after another."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

import torch_mux
from torch_mux import compat, state
from torch_mux.bench.contenders import inductor_callables
from torch_mux.bench.load import Client, Finished, Server, Shot
from torch_mux.bench.workloads import Tenants

__all__ = ["PEERS", "MuxServer", "default_peers"]


_DENSE: Final = 16
#: (workload, number) of a model.
Model = tuple[str, int]


class MuxServer:
    """``torch_mux.submit_all`` over models of several architectures, each client under its own quota."""

    name = "mux"
    polled = False

    def __init__(self) -> None:
        self._served: dict[str, list[nn.Module]] = {}
        self._models: dict[str, list[Any]] = {}
        self._known: dict[Client, tuple[Any, Any]] = {}

    def admit(self, tenants: Tenants, count: int) -> None:
        """Compiles and captures all that serving the first ``count`` models of a workload will need.

        Raises:
            TimeoutError: it was still compiling after 300 s.
        """
        name = tenants.workload.name
        if name not in self._served:
            own = tenants.workload.returns_tensor
            self._served[name] = tenants.models if own else tenants.tensor_only()
        models = self._models.setdefault(name, [])
        most = state.settings().max_bundle
        with torch.inference_mode():
            for index in range(len(models), count):
                # Not one graph of symbolic sizes where a model is asked with several numbers of samples.
                model = torch.compile(self._served[name][index], backend="mux", dynamic=False)
                # Bundle sizes are a program's, not a model's: those of the first are everybody's.
                sizes = (1,) if index else warmed(most, every=len(self._models) == 1)
                torch_mux.warmup(model, *tenants.requests[0][index], sizes=sizes)
                models.append(model)
        if not state.engine().quiesce(300.0, ahead=True):
            raise TimeoutError("still compiling ahead after 300 s")

    def submit(self, batch: Sequence[Shot], finished: Finished) -> None:
        requests = []
        for _, client, inputs in batch:
            known = self._known.get(client)
            if known is None:
                model = self._models[client.workload][client.index]
                known = self._known[client] = torch_mux.quota(**client.quota), model
            requests.append((*known, *inputs))
        for shot, future in zip(batch, torch_mux.submit_all(*requests), strict=True):
            future.add_done_callback(partial(_tell, shot.number, finished))

    def poll(self) -> None:
        """Callbacks come from the runtime's threads."""

    def release(self) -> None:
        for models in self._models.values():
            for model in models:
                torch_mux.remove(model)
        self._models, self._served, self._known = {}, {}, {}


def warmed(most: int, every: bool) -> Sequence[int]:
    """Bundle sizes to capture, the largest first: it serves those that are to come.

    Args:
        every: all up to ``most``, as for the architecture of most figures; of the others, only some above 16.
    """
    return [size for size in range(most, 0, -1) if every or size <= _DENSE or size % 4 == 0 or size == most]


def _tell(number: int, finished: Finished, future: Any) -> None:
    finished(number, time.perf_counter(), future.exception())


class GraphServer:
    """Inductor's code of each tenant in a CUDA graph; on a stream a tenant, or all on one."""

    polled = True

    def __init__(self, name: str, streams: bool, groups: Sequence[Tenants]) -> None:
        self.name = name
        self._graphs: dict[Model, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        self._streams: dict[Model, torch.cuda.Stream] = {}
        self._under_way: dict[int, deque[tuple[int, torch.cuda.Event, Tensor, Finished]]] = {}
        one = None if streams else torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            for tenants in groups:
                self._capture(tenants, one)

    def _capture(self, tenants: Tenants, one: torch.cuda.Stream | None) -> None:
        pairs = zip(inductor_callables(tenants), tenants.requests[0], strict=True)
        for index, (call, arguments) in enumerate(pairs):
            graph, held = torch.cuda.CUDAGraph(), tuple(x.clone() for x in arguments)
            # A pool a graph: they replay at the same time.
            with compat.capturing(), torch.cuda.graph(graph, capture_error_mode="relaxed"):
                output = call(*held)
            model = tenants.workload.name, index
            self._graphs[model] = graph, held, output
            self._streams[model] = torch.cuda.Stream() if one is None else one  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()

    def submit(self, batch: Sequence[Shot], finished: Finished) -> None:
        for number, client, inputs in batch:
            model = client.workload, client.index
            graph, held, output = self._graphs[model]
            stream = self._streams[model]
            with torch.cuda.stream(stream):
                torch._foreach_copy_(list(held), list(inputs))
                graph.replay()
                answer = output.clone()
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
            waiting = self._under_way.setdefault(stream.stream_id, deque())
            waiting.append((number, event, answer, finished))

    def poll(self) -> None:
        for waiting in self._under_way.values():
            while waiting and waiting[0][1].query():  # type: ignore[no-untyped-call]
                number, _, _, finished = waiting.popleft()
                finished(number, time.perf_counter(), None)

    def release(self) -> None:
        self._graphs, self._streams, self._under_way = {}, {}, {}


class InductorServer:
    """Inductor's code, one request after another on a thread of its own; for machines without a GPU."""

    name = "inductor"
    polled = False

    def __init__(self, groups: Sequence[Tenants]) -> None:
        self._queue: queue.SimpleQueue[tuple[Shot, Finished] | None] = queue.SimpleQueue()
        with torch.inference_mode():
            self._callables: dict[Model, Callable[..., Tensor]] = {
                (tenants.workload.name, index): call
                for tenants in groups
                for index, call in enumerate(inductor_callables(tenants))
            }
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        with torch.inference_mode():
            while (item := self._queue.get()) is not None:
                shot, finished = item
                error: BaseException | None = None
                try:
                    self._callables[shot.client.workload, shot.client.index](*shot.inputs)
                except Exception as raised:
                    error = raised
                finished(shot.number, time.perf_counter(), error)

    def submit(self, batch: Sequence[Shot], finished: Finished) -> None:
        for shot in batch:
            self._queue.put((shot, finished))

    def poll(self) -> None:
        """The worker reports."""

    def release(self) -> None:
        self._queue.put(None)
        self._thread.join()


#: Made of the tenants of each architecture that they serve.
PEERS: dict[str, Callable[[Sequence[Tenants]], Server]] = {
    "streams": partial(GraphServer, "streams", True),
    "sliced": partial(GraphServer, "sliced", False),
    "inductor": InductorServer,
}


def default_peers(device: torch.device) -> tuple[str, ...]:
    """The peers that make sense on a device, the one to beat first."""
    return ("streams", "sliced") if device.type == "cuda" else ("inductor",)
