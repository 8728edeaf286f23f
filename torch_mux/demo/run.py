"""The demo as one function: train, serve three ways, compare, explain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import torch_mux
from torch_mux.demo.serve import Served, serve, together, turns
from torch_mux.demo.train import Digits, Tenant, digits, tenants, train

__all__ = ["Outcome", "run_demo"]

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the demo found.

    Attributes:
        eager, inductor, mux: the three ways of serving.
        different: predictions that are not eager's, by tenant.
        coalesced: share of the requests that shared their bundle, by tenant.
    """

    eager: Served
    inductor: Served
    mux: Served
    different: dict[str, int]
    coalesced: dict[str, float | None]

    @property
    def right(self) -> bool:
        """Whether every prediction of every tenant is eager's."""
        return not any(self.different.values())


def run_demo(
    cnns: int = 8,
    transformers: int = 4,
    epochs: int | None = None,
    rounds: int = 2,
    batches: Sequence[int] = (1, 8),
    console: Console | None = None,
) -> Outcome:
    """Trains small models on handwritten digits and serves them together.

    Args:
        cnns, transformers: tenants of each kind.
        epochs: how often each model sees its training images; by default what it needs.
        rounds: how often each client sends the held-out images.
        batches: images of a request, taken in turn.
        console: where to print; standard output by default.
    """
    console = console or Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    what = f"{cnns} residual CNNs, {transformers} transformers"
    console.print(f"[bold]torch-mux demo[/bold] on {_device_name(device)}: {what}")
    data, customers = digits(device), tenants(cnns, transformers, epochs)
    _train_all(customers, data, console)
    served = _serve_all(customers, data, rounds, batches, console)
    different = {
        name: int((served[2].predictions[name] != served[0].predictions[name]).sum())
        for name in served[0].predictions
    }
    found = torch_mux.stats().tenants
    shares = {tenant.name: found[tenant.name].coalesced_share for tenant in customers}
    outcome = Outcome(*served, different, shares)
    console.print(_tenant_table(customers, outcome), _way_table(outcome))
    console.print(str(torch_mux.explain()), markup=False, highlight=False, soft_wrap=True)
    _verdict(outcome, console)
    return outcome


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def _bar(console: Console) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small train faster without handing work to a second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train_all(customers: Sequence[Tenant], data: Digits, console: Console) -> None:
    with _bar(console) as progress, _one_thread():
        task = progress.add_task("training", total=len(customers))
        for index, tenant in enumerate(customers):
            progress.update(task, description=f"training {tenant.name}")
            train(tenant, data, lambda done, index=index: progress.update(task, completed=index + done))  # type: ignore[misc]
        progress.update(task, description=f"trained {len(customers)} models")


def _serve_all(
    customers: Sequence[Tenant], data: Digits, rounds: int, batches: Sequence[int], console: Console
) -> tuple[Served, Served, Served]:
    eager: dict[str, Model] = {tenant.name: tenant.model for tenant in customers}
    inductor: dict[str, Model] = {t.name: torch.compile(t.model, dynamic=False) for t in customers}
    mux: dict[str, Model] = {t.name: torch.compile(t.model, backend="mux", dynamic=False) for t in customers}
    examples = [data.held_images[:size] for size in sorted(set(batches))]
    with _bar(console) as progress, torch.inference_mode():
        task = progress.add_task("", total=2 * len(customers) * len(examples) + 3)
        for name, models in (("Inductor", inductor), ("torch-mux", mux)):
            for tenant in customers:
                progress.update(task, description=f"compiling {tenant.name} with {name}")
                for images in examples:
                    _warm(models[tenant.name], images, name == "torch-mux")
                    progress.advance(task)
        served = []
        for name, call in (
            ("eager, one after another", turns(eager)),
            ("Inductor, one after another", turns(inductor)),
            ("torch-mux, together", together(mux)),
        ):
            progress.update(task, description=f"serving: {name}")
            serve(name, customers, data, batches, 1, call)
            served.append(serve(name, customers, data, batches, rounds, call))
            progress.advance(task)
        progress.update(task, description="served")
    return served[0], served[1], served[2]


def _warm(model: Model, images: Tensor, mux: bool) -> None:
    if mux:
        torch_mux.warmup(model, images)
    for _ in range(2):
        model(images)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


# With their values these just fit a terminal of 80 columns.
_COLUMNS = ("correct", "as eager", "p50 ms", "p99 ms", "shared")


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for name in names:
        left = name in ("tenant", "quota", "served by")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table


def _tenant_table(customers: Sequence[Tenant], outcome: Outcome) -> Table:
    table = _table("what each tenant got from torch-mux", "tenant", "quota", *_COLUMNS)
    for tenant in customers:
        total = len(outcome.eager.predictions[tenant.name])
        table.add_row(
            tenant.name,
            " ".join(f"{key}={_short(value)}" for key, value in tenant.quota.items()),
            f"{tenant.accuracy:.1%}",
            f"{total - outcome.different[tenant.name]}/{total}",
            _ms(outcome.mux.latency(0.5, tenant.name)),
            _ms(outcome.mux.latency(0.99, tenant.name)),
            _share(outcome.coalesced[tenant.name]),
        )
    return table


def _way_table(outcome: Outcome) -> Table:
    columns = ("requests/s", "p50 ms", "p99 ms", "coalesced")
    table = _table("the same requests, three ways, in this run", "served by", *columns)
    shares = [share for share in outcome.coalesced.values() if share is not None]
    for way in (outcome.eager, outcome.inductor, outcome.mux):
        share = sum(shares) / len(shares) if shares and way is outcome.mux else None
        table.add_row(
            way.name, f"{way.rate:.0f}", _ms(way.latency(0.5)), _ms(way.latency(0.99)), _share(share)
        )
    return table


def _verdict(outcome: Outcome, console: Console) -> None:
    total = sum(map(len, outcome.eager.predictions.values()))
    wrong = sum(outcome.different.values())
    answers = (
        f"all {total} predictions are eager's"
        if outcome.right
        else f"{wrong} of {total} predictions DIFFER from eager's"
    )
    ratio = outcome.mux.rate / outcome.inductor.rate
    console.print(f"{answers}; {ratio:.2f} times the requests/s of Inductor", soft_wrap=True)
