"""A process that finds the caches of an earlier one generates and compiles nothing again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters
import torch_mux
from torch_mux import state
from torch_mux.runtime.compile_thread import Rank

device, compiled = sys.argv[1], []
if device == "cuda":
    import triton

    triton.knobs.compilation.listener = lambda cache_hit, **_: compiled.append(not cache_hit)

kinds = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)),
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()),
}
shapes = {"mlp": (2, 8), "conv": (1, 3, 6, 6)}
for name in sys.argv[2:]:
    torch.manual_seed(0)
    models = [torch.compile(kinds[name]().eval().to(device), backend="mux", dynamic=False) for _ in range(2)]
    x = torch.ones(shapes[name], device=device)
    with torch.inference_mode():
        for model, y in zip(models, torch_mux.gather(*((model, x) for model in models))):
            torch.testing.assert_close(y, model._orig_mod(x), rtol=1e-3, atol=1e-3)
assert state.engine().compile_thread.quiesce(300, Rank.AHEAD)
found = counters["inductor"]
names = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
loaded = "torch._inductor.select_algorithm" in sys.modules or "torch._inductor.graph" in sys.modules
print(json.dumps([*(found[name] for name in names), sum(compiled), loaded]))
"""


def _run(folder: Path, device: str, *names: str, plans: bool = False) -> list[int]:
    """Inductor's cache hits, misses and bypasses, and kernels compiled, of a process that serves these."""
    folders = {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCH_MUX_KEEP_PLANS": str(int(plans)),
        **({"TORCH_MUX_CACHE_DIR": str(folder / "mux")} if plans else {}),
    }
    command = [sys.executable, "-c", SCRIPT, device, *names]
    environment = {**os.environ, **folders}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    counts: list[int] = json.loads(done.stdout.splitlines()[-1])
    assert counts.pop() == (not plans or counts[1] > 0), "Inductor's compiler is there where it compiles"
    return counts


def _orders(folder: Path) -> list[list[int]]:
    return [_run(folder, "cpu", *names) for names in (("mlp", "conv"), ("conv", "mlp"))]


def _kept(folder: Path) -> list[object]:
    """Counts of three processes, and the file of the first one's plan before and after the second one."""
    found: list[object] = [_run(folder, "cpu", "mlp", plans=True)]
    (kept,) = (folder / "mux" / "plans").iterdir()
    files = [(kept.stat().st_ino, kept.stat().st_mtime_ns)]
    found.append(_run(folder, "cpu", "conv", "mlp", plans=True))
    files.append((kept.stat().st_ino, kept.stat().st_mtime_ns))
    return [*found, _run(folder, "cpu", "conv", "mlp", plans=True), *files]


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """Processes one after another, and those of the other test beside them."""
    with ThreadPoolExecutor(2) as pool:
        yield {run.__name__: pool.submit(run, tmp_path_factory.mktemp("warm")) for run in (_orders, _kept)}


def test_generated_code_is_found_whatever_the_order_of_the_models(chains: dict[str, Future[Any]]) -> None:
    assert chains["_orders"].result() == [[0, 2, 0, 0], [2, 0, 0, 0]]


def test_a_kept_plan_finds_its_code_without_lowering(chains: dict[str, Future[Any]]) -> None:
    first, second, third, before, after = chains["_kept"].result()
    assert [first, second, third] == [[0, 1, 0, 0], [1, 1, 0, 0], [2, 0, 0, 0]]
    assert before == after


@pytest.mark.gpu
def test_kernels_are_found_as_well(tmp_path: Path) -> None:
    *inductor, compiled = _run(tmp_path, "cuda", "mlp", "conv")
    assert inductor == [0, 2, 0] and compiled > 0
    assert _run(tmp_path, "cuda", "conv", "mlp") == [2, 0, 0, 0]


@pytest.mark.gpu
def test_a_kept_plan_on_a_gpu_compiles_nothing(tmp_path: Path) -> None:
    *inductor, compiled = _run(tmp_path, "cuda", "mlp", "conv", plans=True)
    assert inductor == [0, 2, 0] and compiled > 0
    assert _run(tmp_path, "cuda", "conv", "mlp", plans=True) == [2, 0, 0, 0]
