"""Runs tests marked ``interpreter`` in one subprocess a module under Triton's interpreter.

TRITON_INTERPRET must be set before Triton is imported, and must not be set for the tests that compile. Each
of these processes keeps one core busy and the other tests hardly more: they run one after another beside
those, from the beginning on, and are asked for what they found at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor


class _Ahead:
    """What the modules' processes found, made in the order in which their tests come."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="interpreter")
        self._found: dict[Path, Future[dict[str, str]]] = {}

    def begin(self, items: Sequence[pytest.Item]) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        modules: dict[Path, list[pytest.Item]] = {}
        for item in items:
            modules.setdefault(item.path, []).append(item)
        for path, own in modules.items():
            if any(item.get_closest_marker("interpreter") for item in own):
                directory = own[0].config._tmp_path_factory.mktemp("interpreter")  # type: ignore[attr-defined]
                self._found[path] = self._pool.submit(_run, own, directory, environment)

    def of(self, path: Path) -> dict[str, str]:
        return self._found[path].result()

    def end(self) -> None:
        self._pool.shutdown(cancel_futures=True)


AHEAD = _Ahead()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: runs in a subprocess under Triton's interpreter")


def _run(items: Sequence[pytest.Item], directory: Path, environment: dict[str, str]) -> dict[str, str]:
    """What failed, by test name; "" for what passed."""
    report = directory / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [*command, *(item.nodeid for item in items)],
        cwd=items[0].config.rootpath,
        env=environment,
        capture_output=True,
        text=True,
    )
    if not report.exists():
        raise RuntimeError(f"pytest under the interpreter did not run:\n{done.stdout}\n{done.stderr}")
    found = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        bad = [child.text or child.get("message", "") for child in case if child.tag != "properties"]
        found[case.get("name", "")] = "\n".join(bad)
    return found


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        items.sort(key=lambda item: item.get_closest_marker("interpreter") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1" and not session.config.option.collectonly:
        AHEAD.begin(session.items)


def pytest_sessionfinish() -> None:
    AHEAD.end()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.get_closest_marker("interpreter") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    outcome = AHEAD.of(pyfuncitem.path).get(pyfuncitem.name, "not among the results of the interpreter's run")
    if outcome:
        pytest.fail(outcome, pytrace=False)
    return True


@dataclass
class Tools:
    """Builders that tests of every kernel share."""

    device: torch.device

    def guarded(self, tensor: Tensor) -> Tensor:
        """``tensor`` with NaN on either side of its memory, so that a stray read shows."""
        pad = 64
        flat = torch.full((tensor.numel() + 2 * pad,), float("nan"), dtype=tensor.dtype, device=self.device)
        inner = flat[pad : pad + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        return inner

    def table(self, weights: Sequence[Tensor]) -> Tensor:
        """A pointer table whose column 1 holds the weights' addresses."""
        return torch.tensor([[0, weight.data_ptr(), 0] for weight in weights], device=self.device)

    def control(self, active: int, cap: int) -> Tensor:
        return torch.tensor([active, cap], dtype=torch.int32, device=self.device)

    def pack(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[int]]:
        """One flat buffer with NaN in its gaps, and where each tensor starts."""
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end)
            end += (tensor.numel() + 31) // 16 * 16
        flat = torch.full((end,), float("nan"), dtype=dtype, device=self.device)
        for offset, tensor in zip(offsets, tensors, strict=True):
            flat[offset : offset + tensor.numel()] = tensor.flatten().to(self.device)
        return flat, offsets

    def unpack(self, flat: Tensor, offsets: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
        return [flat[at : at + each.numel()].view(each.shape) for at, each in zip(offsets, like, strict=True)]

    def close(self, got: Tensor, want: Tensor, dtype: torch.dtype, tf32: bool = False) -> None:
        """Asserts that ``got`` is ``want`` (float64) but for one rounding to ``dtype``."""
        epsilon = 2e-3 if tf32 else {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(got.double(), want.double(), rtol=epsilon, atol=4 * epsilon)


@pytest.fixture
def tools() -> Tools:
    torch.manual_seed(0)
    return Tools(torch.device("cpu"))


@pytest.fixture
def gpu_tools() -> Tools:
    torch.manual_seed(0)
    return Tools(torch.device("cuda"))


@pytest.fixture
def filled() -> Callable[..., Tensor]:
    """An output whose every element is 7: what is not written stays so."""
    return lambda *shape, dtype, device="cpu": torch.full(shape, 7.0, dtype=dtype, device=device)
