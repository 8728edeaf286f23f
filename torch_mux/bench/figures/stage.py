"""What the figures share: options, models that are built and warmed once, servers, closed-loop maxima."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch

import torch_mux
from torch_mux import state
from torch_mux.bench.load import Client, Outcome, Server, Traffic, Window, drive, search
from torch_mux.bench.servers import PEERS, MuxServer
from torch_mux.bench.workloads import WORKLOADS, Tenants, batched, batched_name, build

__all__ = ["Crowd", "Options", "Stage"]

#: Requests that each closed-loop client has under way where the most is looked for, besides so many that
#: there are two of the largest bundles: with one, host and device take turns.
_DEPTHS: Final = (1, 4)
#: Seconds of load at a time before a kind of traffic is measured, and for how long at most.
_SETTLING: Final = 0.25
_PATIENCE: Final = 6.0
#: Rounds of load more for mixes of programs.
_MIXES: Final = 4
#: Architectures that are served at the same time.
Crowd = tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        models: workloads: the first is served by all tenants, all four where architectures compete.
        tenants: models of one workload, at most.
        servers: peers in the figures that compare, the one to beat first.
        process: of arrivals.
        bound: seconds that p99 may take, and the deadline of requests that have one.
        seconds: length of one run.
        steps: runs of the search for the highest rate.
        rate: requests a second of the latency tenant.
        samples: of each request where shares of a saturated device are measured: so many that the device is
            what everybody waits for, and not the host.
    """

    models: tuple[str, ...]
    tenants: int
    device: torch.device
    dtype: torch.dtype
    servers: tuple[str, ...]
    process: str
    bound: float
    seconds: float
    steps: int
    rate: float
    seed: int
    samples: int = 1

    def data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"device": str(self.device), "dtype": str(self.dtype)}


class Stage:
    """Models and servers that figures take turns with; each is made when it is first asked for.

    Attributes:
        settling: how each kind of traffic was warmed up before it was measured.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.mux = MuxServer()
        self._tenants: dict[str, Tenants] = {}
        self._peers: dict[tuple[str, Crowd], Server] = {}
        self._most: dict[tuple[str, Crowd], float] = {}
        self._sustained: dict[tuple[str, Crowd], tuple[float, list[Outcome]]] = {}
        self._settled: set[Hashable] = set()
        self.settling: list[dict[str, Any]] = []

    @property
    def main(self) -> str:
        """The workload that all tenants serve."""
        return self.options.models[0]

    @property
    def alone(self) -> Crowd:
        """The one architecture that all tenants serve."""
        return (self.main,)

    @property
    def each(self) -> int:
        """Tenants of one architecture where all compete, so that they are as many in sum."""
        return max(1, self.options.tenants // len(self.options.models))

    def tenants(self, workload: str) -> Tenants:
        """The models of an architecture and their requests; a :meth:`heavy` one has the same models."""
        found = self._tenants.get(workload)
        if found is None:
            options = self.options
            name, _, samples = workload.partition("@")
            if samples:
                found = batched(self.tenants(name), int(samples))
            else:
                found = build(WORKLOADS[name], options.tenants, options.device, options.dtype)
            self._tenants[workload] = found
        return found

    def heavy(self, workload: str) -> str:
        """The architecture with as many samples a request as it takes to saturate the device."""
        return batched_name(workload, self.options.samples)

    def clients(
        self, workload: str, count: int, prefix: str, first: int = 0, mux: bool = True, **quota: Any
    ) -> list[Client]:
        """Clients of models of their own, as far as there are any, and ready to be served.

        Args:
            prefix: of the tenants' names.
            first: number of the first one's model.
            mux: whether mux will serve them.
            quota: of each of them.
        """
        tenants = self.tenants(workload)
        models = len(tenants.models)
        if mux:
            self.mux.admit(tenants, min(models, first + count))
        indices = [(first + number) % models for number in range(count)]
        return [
            Client(
                workload,
                index,
                [row[index] for row in tenants.requests],
                {"tenant": f"{prefix}/{number}", **quota},
            )
            for number, index in enumerate(indices)
        ]

    def server(self, name: str, crowd: Crowd) -> Server:
        """Mux, or a peer that serves the models of a crowd."""
        if name == self.mux.name:
            return self.mux
        found = self._peers.get((name, crowd))
        if found is None:
            groups = [self.tenants(workload).first(self.count(crowd)) for workload in crowd]
            found = self._peers[name, crowd] = PEERS[name](groups)
        return found

    def count(self, crowd: Crowd) -> int:
        """Models of each architecture of a crowd."""
        return self.options.tenants if len(crowd) == 1 else self.each

    def drive(
        self,
        traffics: Sequence[Traffic],
        seconds: float | None = None,
        lead: float | None = None,
        server: str = MuxServer.name,
        process: str | None = None,
        probe: Callable[[], Any] = lambda: None,
    ) -> Outcome:
        """One run of settled traffic; as long as the options say, a fifth of it before anything counts.

        Where a graph was captured meanwhile, it is measured once more when all of that is done: a server that
        is measured has been running for long. The record tells both.

        While a peer is measured nothing is collected: mux collects when it has nothing to do itself.
        """
        self.settle(traffics, server)
        length = self.options.seconds if seconds is None else seconds
        window = Window(length, length / 5 if lead is None else lead)

        def run() -> Outcome:
            before, graphs = _jobs(), _graphs()
            with contextlib.nullcontext() if server == self.mux.name else _uncollected():
                found = drive(
                    self.server(server, crowd_of(traffics)),
                    traffics,
                    window,
                    process=process or self.options.process,
                    seed=self.options.seed,
                    probe=probe,
                )
            jobs = _jobs() - before
            return replace(found, jobs=jobs, captured=tuple(sorted(_graphs() - graphs)) if jobs else ())

        first = run()
        if not first.captured:
            return first
        _quiesce()
        again = run()
        return replace(again, disturbed=first.jobs, captured=first.captured + again.captured)

    def settle(self, traffics: Sequence[Traffic], server: str = MuxServer.name) -> None:
        """Loads a server with this kind of traffic until it compiles and captures nothing more for it.

        What there is by then is no garbage: the collector, which would stop every thread to look through the
        objects of all compiles, leaves it alone from then on, as a server is advised to do. Peers are treated
        alike.
        """
        settings = state.settings()
        kinds = {(one.client.workload, bool(one.client.quota.get("reserve"))) for one in traffics}
        key = (server, frozenset(kinds), settings)
        if key in self._settled:
            return
        self._settled.add(key)
        begun, first, graphs = time.perf_counter(), _jobs(), _graphs()
        one, load = self.server(server, crowd_of(traffics)), [replace(one, start=0.0) for one in traffics]
        # Mixes of programs are made only when they have come for a while; beside a reserve there are none.
        mixed = len(kinds) > 1 and not any(reserve for _, reserve in kinds)
        seconds = _SETTLING + (settings.pack_after if mixed else 0.0)
        # Each mix is captured, measured both ways and written down; others may come only then.
        patience = _PATIENCE + (_MIXES * seconds if mixed else 0.0)
        quiet = False
        while not quiet and time.perf_counter() - begun < patience:
            before = _jobs()
            drive(one, load, Window(seconds, 0.0), process=self.options.process, seed=self.options.seed)
            _quiesce()
            quiet = _jobs() == before
        gc.collect()
        gc.freeze()
        self.settling.append(
            {
                "server": server,
                "workloads": sorted({name for name, _ in kinds}),
                "reserve": any(reserve for _, reserve in kinds),
                "max_bundle": settings.max_bundle,
                "seconds": time.perf_counter() - begun,
                "jobs": _jobs() - first,
                "captured": sorted(_graphs() - graphs),
                "quiet": quiet,
            }
        )

    def rivals(self, server: str, crowd: Crowd | None = None) -> list[Client]:
        """A client of every model of a crowd; of the first workload by default."""
        crowd, ours = self.alone if crowd is None else crowd, server == self.mux.name
        return [
            client
            for workload in crowd
            for client in self.clients(workload, self.count(crowd), f"all/{workload}", mux=ours)
        ]

    def most(self, server: str = MuxServer.name, crowd: Crowd | None = None) -> float:
        """Requests a second of a server over a crowd in closed loop: the most it serves."""
        key = server, self.alone if crowd is None else crowd
        found = self._most.get(key)
        if found is None:
            clients = self.rivals(*key)
            two = math.ceil(2 * state.settings().max_bundle / len(clients))
            runs = [
                self.drive([Traffic(one, depth=depth) for one in clients], server=server)
                for depth in sorted({*_DEPTHS, two})
            ]
            errors = [name for run in runs for name in run.errors]
            if errors:
                raise RuntimeError(f"requests of {server} failed: {', '.join(sorted(set(errors)))}")
            found = self._most[key] = max(run.throughput() for run in runs)
        return found

    def sustained(
        self, server: str = MuxServer.name, crowd: Crowd | None = None
    ) -> tuple[float, list[Outcome]]:
        """The highest rate of arrivals over a crowd whose p99 is within its bound: the capacity.

        Returns:
            (requests a second, 0 where no rate was; the runs of the search).
        """
        key = server, self.alone if crowd is None else crowd
        if key not in self._sustained:
            clients = self.rivals(*key)

            def run(rate: float) -> Outcome:
                return self.drive([Traffic(one, rate=rate / len(clients)) for one in clients], server=server)

            limits = self.bound(key[1]), self.options.steps
            self._sustained[key] = search(run, 1.1 * self.most(*key), *limits)
        return self._sustained[key]

    def bound(self, crowd: Crowd) -> float:
        """Seconds that p99 may take; twice as long where architectures wait for each other."""
        return self.options.bound * (1 if len(crowd) == 1 else 2)

    def capacity(self) -> float:
        """What mux sustains.

        Raises:
            RuntimeError: nothing within the bound.
        """
        rate, _ = self.sustained()
        if not rate:
            raise RuntimeError(f"no rate has its p99 within {self.options.bound * 1e3:g} ms: nothing to load")
        return rate

    def close(self) -> None:
        """Gives everything back."""
        for server in self._peers.values():
            server.release()
        self.mux.release()
        gc.unfreeze()
        self._peers, self._tenants = {}, {}


def crowd_of(traffics: Sequence[Traffic]) -> Crowd:
    """The architectures that they ask."""
    return tuple(dict.fromkeys(one.client.workload for one in traffics))


def _jobs() -> int:
    """Compiles and captures of the runtime that have ended."""
    engine = state.peek()
    return 0 if engine is None else engine.compile_thread.finished


def _graphs() -> set[str]:
    """What the runtime has captured."""
    engine = state.peek()
    if engine is None:
        return set()
    mixes = {f"mix of {mix.members}" for mix in engine.mixes() if mix.words}
    return mixes | {
        f"{plan.name}, {slots} slots, lane {lane}"
        for plan in engine.plans()
        for lane, sizes in enumerate(plan.captured)
        for slots in sizes
    }


def _quiesce() -> None:
    """Waits until all that was asked for is compiled and captured."""
    engine = state.peek()
    if engine is not None:
        engine.quiesce(_PATIENCE)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Python's collector is off for a while."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def configured(**settings: Any) -> Iterator[None]:
    """``torch_mux.configure`` for a while."""
    before = state.settings()
    torch_mux.configure(**settings)
    try:
        yield
    finally:
        torch_mux.configure(**{name: getattr(before, name) for name in settings})
