"""The commands of ``torch-mux`` as a typer application; needs the extra ``cli``."""

from __future__ import annotations

import importlib
from typing import Any, Optional

import typer

from torch_mux.info import info

__all__ = ["commands"]

commands = typer.Typer(help="Many models, one GPU.", no_args_is_help=True, pretty_exceptions_enable=False)
bench = typer.Typer(help="Benchmarks against the peers.", no_args_is_help=True)
commands.add_typer(bench, name="bench")


@commands.command(name="info")
def show_info() -> None:
    """Versions, device and settings."""
    for key, value in info().items():
        typer.echo(f"{key:14} {value}")


@commands.command()
def demo(
    cnns: int = typer.Option(8, min=0, help="Tenants with a residual CNN."),
    transformers: int = typer.Option(4, min=0, help="Tenants with a small transformer."),
    epochs: Optional[int] = typer.Option(None, min=1, help="How often each model sees its training images."),  # noqa: UP045
    rounds: int = typer.Option(2, min=1, help="How often each client sends the held-out images."),
) -> None:
    """Train small models, serve them together, compare with eager and Inductor."""
    if cnns + transformers == 0:
        raise typer.BadParameter("give at least one tenant")
    from torch_mux.demo.run import run_demo

    outcome = run_demo(cnns, transformers, epochs, rounds)
    raise typer.Exit(0 if outcome.right else 1)


_SCRIPT = {"allow_extra_args": True, "ignore_unknown_options": True}


@commands.command(context_settings=_SCRIPT)
def trace(
    context: typer.Context,
    script: str = typer.Argument(..., help="A Python program; what follows are its arguments."),
    output: str = typer.Option("torch-mux-trace.json", "--output", "-o", help="Where the timeline goes."),
) -> None:
    """Run a program and write which tenant was served when, in which bundle, for ui.perfetto.dev."""
    from torch_mux.observe import run_script
    from torch_mux.timelines import trace as recorded

    with recorded(output) as timeline:
        run_script(script, context.args)
    spans = timeline.spans
    requests = sum(len(span.requests) for span in spans)
    typer.echo(
        f"{len(spans)} bundles with {requests} requests in {output}; open it at https://ui.perfetto.dev"
    )


@commands.command()
def top(
    url: str = typer.Argument("http://127.0.0.1:9400/metrics", help="Where torch_mux.metrics.serve answers."),
    every: float = typer.Option(1.0, min=0.05, help="Seconds between two readings."),
    times: int = typer.Option(0, min=0, help="Readings; 0: until it is interrupted."),
) -> None:
    """A live table of the tenants of a running process."""
    from torch_mux.observe import watch

    watch(url, every, times)


_BENCHES = {
    "models": "Whole models for several tenants next to their peers.",
    "mix": "Several architectures at once: own plans, packed, and the peers.",
    "kernels": "Every tile of every super-kernel layer shape, on a GPU.",
    "table": "The chooser's measured table, from what `kernels` measured.",
    "paper": "The papers' experiments: coalescing, blocks, constrained kernels together; on a GPU.",
    "together": "Constrained kernels side by side, and coalesced, on every layer of four models.",
    "opinfo": "Every operation of PyTorch's operator database through mux, compared with eager.",
    "serve": "What the runtime promises to requests that arrive one by one, a table of figures.",
    "start": "From the import of torch to the first coalesced answers, in fresh processes.",
    "zoo": "Many architectures: what runs, what coalesces of each, and why the rest does not.",
}


def _add(name: str, about: str) -> None:
    """``torch-mux bench NAME``: arguments and ``--help`` are those of ``torch_mux.bench.NAME``."""

    def command(context: typer.Context) -> None:
        harness: Any = importlib.import_module(f"torch_mux.bench.{name}")
        raise typer.Exit(harness.main(context.args) or 0)

    options = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    bench.command(name=name, help=about, context_settings=options)(command)


for _name, _about in _BENCHES.items():
    _add(_name, _about)
