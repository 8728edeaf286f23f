"""A process that finds the caches of an earlier one generates and compiles nothing again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
    }
    command = [sys.executable, "-c", SCRIPT, device, *names]
    environment = {**os.environ, **folders}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    counts: list[int] = json.loads(done.stdout.splitlines()[-1])
    assert counts.pop() == (not plans or counts[1] > 0), "Inductor's compiler is there where it compiles"
    return counts


def test_generated_code_is_found_whatever_the_order_of_the_models(tmp_path: Path) -> None:
    assert _run(tmp_path, "cpu", "mlp", "conv") == [0, 2, 0, 0]
    assert _run(tmp_path, "cpu", "conv", "mlp") == [2, 0, 0, 0]


def test_a_kept_plan_finds_its_code_without_lowering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_MUX_CACHE_DIR", str(tmp_path / "mux"))
    assert _run(tmp_path, "cpu", "mlp", plans=True) == [0, 1, 0, 0]
    (kept,) = (tmp_path / "mux" / "plans").iterdir()
    before = kept.stat()
    assert _run(tmp_path, "cpu", "conv", "mlp", plans=True) == [1, 1, 0, 0]
    after = kept.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert _run(tmp_path, "cpu", "conv", "mlp", plans=True) == [2, 0, 0, 0]


@pytest.mark.gpu
def test_kernels_are_found_as_well(tmp_path: Path) -> None:
    *inductor, compiled = _run(tmp_path, "cuda", "mlp", "conv")
    assert inductor == [0, 2, 0] and compiled > 0
    assert _run(tmp_path, "cuda", "conv", "mlp") == [2, 0, 0, 0]


@pytest.mark.gpu
def test_a_kept_plan_on_a_gpu_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_MUX_CACHE_DIR", str(tmp_path / "mux"))
    *inductor, compiled = _run(tmp_path, "cuda", "mlp", "conv", plans=True)
    assert inductor == [0, 2, 0] and compiled > 0
    assert _run(tmp_path, "cuda", "conv", "mlp", plans=True) == [2, 0, 0, 0]
