"""A process that finds the caches of an earlier one generates and compiles nothing again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters
import torch_mux

kinds = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)),
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()),
}
shapes = {"mlp": (2, 8), "conv": (1, 3, 6, 6)}
for name in sys.argv[1:]:
    torch.manual_seed(0)
    models = [torch.compile(kinds[name]().eval(), backend="mux", dynamic=False) for _ in range(2)]
    x = torch.ones(shapes[name])
    with torch.inference_mode():
        for model, y in zip(models, torch_mux.gather(*((model, x) for model in models))):
            torch.testing.assert_close(y, model._orig_mod(x))
found = counters["inductor"]
print(json.dumps([found["fxgraph_cache_hit"], found["fxgraph_cache_miss"], found["fxgraph_cache_bypass"]]))
"""


def _run(folder: Path, *names: str) -> list[int]:
    """Inductor's cache hits, misses and bypasses of a process that serves these models."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    counts: list[int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def test_generated_code_is_found_whatever_the_order_of_the_models(tmp_path: Path) -> None:
    assert _run(tmp_path, "mlp", "conv") == [0, 2, 0]
    assert _run(tmp_path, "conv", "mlp") == [2, 0, 0]
