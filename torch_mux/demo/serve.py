"""One client thread a tenant, and how to serve them: eagerly, by Inductor, or together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import torch_mux
from torch_mux.demo.train import Digits, Tenant

__all__ = ["Served", "quantile", "serve", "together", "turns"]

Call = Callable[[Tenant, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Served:
    """What one way of serving did.

    Attributes:
        name: of the way.
        seconds: from the first request to the last answer.
        latencies: seconds of every request, by tenant.
        predictions: int64 [N] classes for the held-out images, by tenant.
    """

    name: str
    seconds: float
    latencies: dict[str, list[float]]
    predictions: dict[str, Tensor]

    @property
    def requests(self) -> int:
        """How many requests were answered."""
        return sum(map(len, self.latencies.values()))

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds

    def latency(self, q: float, tenant: str | None = None) -> float:
        """The ``q`` quantile in seconds, of one tenant or of all."""
        chosen = [self.latencies[tenant]] if tenant is not None else list(self.latencies.values())
        return quantile([value for values in chosen for value in values], q)


def quantile(values: Sequence[float], q: float) -> float:
    """The nearest-rank ``q`` quantile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def turns(models: dict[str, Callable[[Tensor], Tensor]]) -> Call:
    """Serving one after another: the models take turns on the device."""
    turn = threading.Lock()

    def call(tenant: Tenant, images: Tensor) -> Tensor:
        with turn:
            answer = models[tenant.name](images)
            _finished(answer)
            return answer

    return call


def together(models: dict[str, Callable[[Tensor], Tensor]]) -> Call:
    """Serving by torch-mux: whatever is pending goes out together, each request under its tenant's quota."""

    def call(tenant: Tenant, images: Tensor) -> Tensor:
        with torch_mux.quota(tenant.name, **tenant.quota):
            answer: Tensor = torch_mux.submit(models[tenant.name], images).result()
        _finished(answer)
        return answer

    return call


def _finished(answer: Tensor) -> None:
    if answer.is_cuda:
        torch.cuda.current_stream(answer.device).synchronize()


def serve(
    name: str, tenants: Sequence[Tenant], data: Digits, batches: Sequence[int], rounds: int, call: Call
) -> Served:
    """Every tenant's client sends the held-out images in batches, one request after the other.

    Args:
        name: of the way of serving.
        tenants: one client thread each, all started together.
        data: where the held-out images come from.
        batches: images of one request, taken in turn.
        rounds: how often every client sends all images.
        call: how one request is served.

    Raises:
        Exception: what a client's request raised.
    """
    clients = [_Client(tenant, data, batches, rounds, call) for tenant in tenants]
    gate = threading.Barrier(len(clients) + 1)
    threads = [
        threading.Thread(target=client.run, args=(gate,), name=client.tenant.name) for client in clients
    ]
    for thread in threads:
        thread.start()
    gate.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    for client in clients:
        if client.error is not None:
            raise client.error
    return Served(
        name,
        seconds,
        {client.tenant.name: client.latencies for client in clients},
        {client.tenant.name: torch.cat(client.predictions) for client in clients},
    )


class _Client:
    """One tenant's closed loop."""

    def __init__(self, tenant: Tenant, data: Digits, batches: Sequence[int], rounds: int, call: Call) -> None:
        self.tenant = tenant
        self.call = call
        self.rounds = rounds
        self.requests = _split(data.held_images, batches)
        self.latencies: list[float] = []
        self.predictions: list[Tensor] = []
        self.error: Exception | None = None

    def run(self, gate: threading.Barrier) -> None:
        gate.wait()
        try:
            with torch.inference_mode():
                for round_ in range(self.rounds):
                    for images in self.requests:
                        start = time.perf_counter()
                        answer = self.call(self.tenant, images)
                        self.latencies.append(time.perf_counter() - start)
                        if round_ == 0:
                            self.predictions.append(answer.argmax(1))
        except Exception as error:
            self.error = error


def _split(images: Tensor, batches: Sequence[int]) -> list[Tensor]:
    """Contiguous requests of the given sizes in turn, until the images are used up."""
    requests, start, turn = [], 0, 0
    while start < len(images):
        size = batches[turn % len(batches)]
        if start + size > len(images):
            size = max(small for small in batches if start + small <= len(images))
        requests.append(images[start : start + size])
        start, turn = start + size, turn + 1
    return requests
