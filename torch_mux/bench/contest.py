"""All contenders over one architecture: prepared, verified against float64, timed in turns."""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torch_mux.bench import measure
from torch_mux.bench.contenders import CONTENDERS, Contender, Mux, SelfTimed, default_contenders
from torch_mux.bench.host import gather_parts
from torch_mux.bench.limits import OverLimit, within
from torch_mux.bench.measures import MEASURES, ROUNDS, Stage
from torch_mux.bench.right import allowed, verify
from torch_mux.bench.workloads import WORKLOADS, Tenants, build

__all__ = ["Contest", "Options"]


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        models: names in ``WORKLOADS``.
        tenants: numbers of tenants a round.
        counts: models with numbers of tenants of their own.
        contenders: names in ``CONTENDERS``; empty for the device's usual ones.
        measures: "rounds" and names in ``MEASURES``.
        device, dtype: where and in what precision the models run.
        repetitions: most interleaved repetitions of each measurement.
        rounds: rounds of one pipelined repetition; a quarter of them when synchronised.
        channels_last: weights and images of every contender in channels-last order.
        budget: seconds in all; repetitions beyond the first of a model are shed to keep it. None: no limit.
        limit: seconds that one contender may take to be prepared, and one measure. None: no limit.
        preparing: seconds that all contenders of a model in this process may take to be prepared together;
            whose turn comes later says so. None: no limit.
    """

    models: tuple[str, ...] = ("resnet50", "bert", "vit")
    tenants: tuple[int, ...] = (16,)
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    contenders: tuple[str, ...] = ()
    measures: tuple[str, ...] = (ROUNDS,)
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    dtype: torch.dtype = torch.float16
    repetitions: int = 5
    rounds: int = 200
    channels_last: bool = False
    budget: float | None = None
    limit: float | None = None
    preparing: float | None = None

    def counts_of(self, model: str) -> tuple[int, ...]:
        """Numbers of tenants for one model."""
        return self.counts.get(model, self.tenants)

    def names(self) -> tuple[str, ...]:
        """Names of the contenders."""
        return self.contenders or tuple(default_contenders(self.device))


Record = dict[str, Any]
Saved = Callable[[Sequence[Record], Sequence[Record]], None]


class Contest:
    """All contenders over one architecture.

    Args:
        name: of the workload.
        deadline: on ``time.monotonic``, after which no further repetition starts.
        saved: gets the records of rounds and of measures as they are, again and again.

    Attributes:
        records: of rounds, by contender and number of tenants.
        measured: of what is measured of ours besides.
    """

    def __init__(self, name: str, options: Options, deadline: float | None, saved: Saved) -> None:
        self.name, self.options, self.deadline, self._saved = name, options, deadline, saved
        self.counts = options.counts_of(name)
        self.contenders: dict[str, Contender] = {key: CONTENDERS[key]() for key in options.names()}
        self.records: dict[tuple[str, int], Record] = {
            (key, count): {"model": name, "contender": contender.name, "key": key, "tenants": count}
            for key, contender in self.contenders.items()
            for count in self.counts
        }
        self.measured: list[Record] = []
        self._spent = 0.0

    def run(self) -> None:
        """The contenders of this process together, taking turns; then those of other processes one by one.

        Whatever ends it, also the user, all contenders are released.
        """
        try:
            self._run()
        finally:
            with contextlib.ExitStack() as stack:
                for contender in self.contenders.values():
                    stack.callback(contender.release)

    def _run(self) -> None:
        options = self.options
        with torch.no_grad():
            tenants = build(
                WORKLOADS[self.name],
                max(self.counts),
                options.device,
                options.dtype,
                channels_last=options.channels_last,
            )
            self.exact = {shared: measure.references(tenants, shared) for shared in self._references()}
            self.bound = allowed(tenants, self.exact[False], max(self.counts), options.dtype)
        with torch.inference_mode():
            together = [key for key, one in self.contenders.items() if not isinstance(one, SelfTimed)]
            for key in together:
                self._attempt(key, functools.partial(self._prepare, key, tenants))
            self._time(together, tenants)
            self._measure(tenants)
            for key in together:
                self._attempt(key, functools.partial(self._release, key))
            for key in [key for key in self.contenders if key not in together]:
                self._attempt(key, functools.partial(self._prepare, key, tenants))
                self._time([key], tenants)
                self._attempt(key, functools.partial(self._release, key))

    def save(self) -> None:
        """Hands out what there is."""
        self._saved(list(self.records.values()), self.measured)

    def _references(self) -> set[bool]:
        return {False} | {contender.shared_weights for contender in self.contenders.values()}

    def _attempt(self, key: str, step: Callable[[], object]) -> None:
        """One step of one contender; an error takes it out of the contest and into the record."""
        if key not in self.contenders:
            return
        try:
            step()
        except Exception as error:
            self._failed(key, error)
        self.save()

    def _failed(self, key: str, error: Exception) -> None:
        traceback.print_exception(error)
        for count in self.counts:
            self.records[key, count]["failed"] = _words(error)
        contender = self.contenders.pop(key)
        try:
            contender.release()
        except Exception as more:
            traceback.print_exception(more)
            for count in self.counts:
                self.records[key, count]["not released"] = _words(more)

    def _release(self, key: str) -> None:
        contender = self.contenders[key]
        for count in self.counts:
            self.records[key, count]["notes"] = contender.notes()
        contender.release()
        del self.contenders[key]

    def _prepare(self, key: str, tenants: Tenants) -> None:
        contender = self.contenders[key]
        counts = tuple(sorted(self.counts, reverse=True))
        start = time.perf_counter()
        prepare = functools.partial(contender.prepare, tenants, counts)
        try:
            with within(self._limit(contender), f"preparing {key} for {self.name}"):
                extra = measure.memory_of(prepare, self.options.device)
        finally:
            seconds = time.perf_counter() - start
            self._spent += seconds
            for count in self.counts:
                self.records[key, count]["prepare_seconds"] = round(seconds, 2)
        for count in self.counts:
            record = self.records[key, count]
            record["notes"] = contender.notes()
            record["memory"] = {
                "weights": tenants.weight_bytes(),
                "tenants": len(tenants.models),
                "extra": extra,
            }
            exact = self.exact[contender.shared_weights]
            record["error"] = found = measure.errors(contender, tenants, exact, count)
            verify(found, count, self.bound)
            record["launches"] = measure.launches(contender, tenants, count)
            if isinstance(contender, Mux):
                record["host_us"] = gather_parts(contender, tenants, count)

    def _limit(self, contender: Contender) -> float | None:
        """Seconds that it may take to be prepared.

        Raises:
            OverLimit: the others have taken them all.
        """
        limit, together = self.options.limit, self.options.preparing
        if together is None or isinstance(contender, SelfTimed):
            return limit
        if self._spent >= together:
            raise OverLimit(
                f"preparing other contenders has taken the {together:g} s that there were for all"
            )
        rest = together - self._spent
        return rest if limit is None else min(limit, rest)

    def _time(self, keys: Sequence[str], tenants: Tenants) -> None:
        """Fill in the times, the contenders taking turns; a short first turn warms up and is dropped."""
        options = self.options
        if ROUNDS not in options.measures:
            return
        places = [place for place in self.records if place[0] in keys]
        piped: dict[tuple[str, int], list[float]] = {place: [] for place in places}
        waited: dict[tuple[str, int], list[float]] = {place: [] for place in places}

        def turn(place: tuple[str, int], rounds: int) -> None:
            contender, (_, count) = self.contenders[place[0]], place
            piped[place].append(measure.pipelined(contender, tenants, count, rounds))
            waited[place].append(measure.synchronised(contender, tenants, count, max(1, rounds // 4)))

        for repetition in range(options.repetitions + 1):
            late = self.deadline is not None and time.monotonic() > self.deadline
            if late and repetition > 1:
                break
            for place in places:
                rounds = options.rounds if repetition else max(1, options.rounds // 20)
                self._attempt(place[0], functools.partial(turn, place, rounds))
                if not repetition:
                    piped[place].clear()
                    waited[place].clear()
                elif place[0] in self.contenders:
                    record = self.records[place]
                    record["pipelined_us"] = measure.Spread.of(piped[place]).data()
                    record["synchronised_us"] = measure.Spread.of(waited[place]).data()
                    record["repetitions"] = repetition

    def _measure(self, tenants: Tenants) -> None:
        """What is wanted besides; a measure that fails has its error in its entry."""
        wanted = [name for name in MEASURES if name in self.options.measures]
        ours = next((one for one in self.contenders.values() if isinstance(one, Mux)), None)
        for name in wanted:
            entry: Record = {"model": self.name, "measure": name, "tenants": len(tenants.models)}
            self.measured.append(entry)
            try:
                if ours is None:
                    raise RuntimeError("torch-mux was not prepared, so nothing of it can be measured")
                stage = Stage(ours, tenants, self.counts, self.options.rounds)
                with within(self.options.limit, f"measuring {name} of {self.name}"):
                    entry |= MEASURES[name](stage)
            except Exception as error:
                traceback.print_exception(error)
                entry["failed"] = _words(error)
            self.save()


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"[:500]
