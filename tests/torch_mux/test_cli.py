"""The command line."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from torch_mux import cli
from torch_mux.commands import commands
from torch_mux.info import info


def invoke(*args: str) -> Any:
    return CliRunner().invoke(commands, args)


def test_info_tells_versions_and_device() -> None:
    assert invoke("info").exit_code == 0
    shown = invoke("info").output
    for key, value in info().items():
        assert key in shown and value in shown
    assert info()["torch"] == torch.__version__


BENCHES = ("models", "kernels", "table", "paper", "together", "opinfo", "serve", "zoo")


@pytest.mark.parametrize(
    "command", [(), ("demo",), ("bench",), ("info",), *(("bench", name) for name in BENCHES)], ids=str
)
def test_help(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0 and "usage" in result.output.lower()


def test_every_benchmark_is_listed() -> None:
    listed = invoke("bench", "--help").output
    assert all(f" {name} " in listed for name in BENCHES)


@pytest.mark.parametrize(("right", "code"), [(True, 0), (False, 1)])
def test_demo_fails_when_an_answer_is_wrong(monkeypatch: pytest.MonkeyPatch, right: bool, code: int) -> None:
    seen: list[tuple[Any, ...]] = []
    module = ModuleType("run")
    module.run_demo = lambda *args: seen.append(args) or SimpleNamespace(right=right)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_mux.demo.run", module)
    assert invoke("demo", "--cnns", "2", "--transformers", "1", "--epochs", "3").exit_code == code
    assert seen == [(2, 1, 3, 2)]


def test_demo_needs_a_tenant() -> None:
    result = invoke("demo", "--cnns", "0", "--transformers", "0")
    assert result.exit_code == 2 and "at least one tenant" in result.output


@pytest.mark.parametrize("name", BENCHES)
def test_bench_passes_its_arguments_and_its_exit_code_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: list[list[str]] = []
    module = SimpleNamespace(main=lambda argv: seen.append(argv) or 3)
    monkeypatch.setitem(sys.modules, f"torch_mux.bench.{name}", module)
    assert invoke("bench", name, "--tenants", "4", "x").exit_code == 3
    assert seen == [["--tenants", "4", "x"]]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("models --device cpu --models resnet51", "unknown model resnet51; choose from resnet50"),
        ("models --device cpu --contenders tvm", "unknown contender tvm; choose from eager"),
        ("models --device cpu --tenants many", "is not a list of whole numbers"),
        ("models --device cpu --tenants 0", "must be at least 1"),
        ("models --device tpu0", "unknown device 'tpu0'; choose cuda or cpu"),
        ("zoo resnet19", "unknown entry resnet19; choose from resnet18"),
        ("zoo mlp --jobs 0", "--jobs and --limit must be positive"),
        ("zoo --show nowhere.json", "there is no record nowhere.json"),
        ("table nowhere.json", "there is no record nowhere.json"),
        ("kernels --only nothing", "no layer contains 'nothing'"),
    ],
)
def test_bench_refuses_what_it_does_not_know(command: str, words: str) -> None:
    result = invoke("bench", *command.split())
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["models", "zoo"])
def test_a_gpu_that_is_not_there(name: str) -> None:
    result = invoke("bench", name, "--device", "cuda")
    assert result.exit_code == 2 and "PyTorch sees no GPU here; --device cpu" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_need_a_gpu() -> None:
    result = invoke("bench", "kernels")
    assert result.exit_code == 2 and "PyTorch sees no GPU here" in result.output


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("typer", "cli"),
        ("sklearn", "demo"),
        ("transformers", "bench"),
        ("timm", "bench"),
        ("mlperf_loadgen", "bench"),
    ],
)
def test_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch, package: str, extra: str) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {package!r}", name=f"{package}.datasets")

    monkeypatch.setattr(cli.importlib, "import_module", missing)  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match=rf"pip install 'torch-mux\[{extra}\]'"):
        cli.app()


def test_another_missing_module_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'oops'", name="oops")

    monkeypatch.setattr(cli.importlib, "import_module", missing)  # type: ignore[attr-defined]
    with pytest.raises(ModuleNotFoundError, match="oops"):
        cli.app()


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch_mux.cli", "info"], capture_output=True, text=True, check=True
    )
    assert "torch-mux" in done.stdout
