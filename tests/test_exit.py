"""The interpreter ends at once, and without a word, whatever is pending."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

COMMON = """
import threading, time, torch
from torch import nn
import torch_mux
from torch_mux import state

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

models = [torch.compile(Net().eval(), backend="mux", dynamic=False) for _ in range(3)]
x = torch.randn(2, 8)

def round_():
    with torch.inference_mode():
        return torch_mux.gather(*((model, x) for model in models))

def daemon(function):
    threading.Thread(target=function, daemon=True).start()
"""

PENDING = """
round_(), round_()
torch_mux.configure(max_wait="60s")
with torch.inference_mode():
    futures = [torch_mux.submit(model, x) for model in models]
daemon(futures[0].result)
daemon(round_)
time.sleep(0.1)
"""

COMPILING = """
from torch_mux.lowering import plan
entered = threading.Event()
compile_plan = plan.compile_plan

def slow(*args):
    entered.set()
    time.sleep(0.5)
    return compile_plan(*args)

plan.compile_plan = slow
def call():
    with torch.inference_mode():
        models[0](x)

daemon(call)
assert entered.wait(60)
"""

CALLING = """
round_(), round_()
def again():
    while True:
        round_()

def alone():
    with torch.inference_mode():
        while True:
            models[0](x)

for _ in range(3):
    daemon(again)
    daemon(alone)
time.sleep(0.3)
"""

CLOSED = """
round_()
torch_mux.close()
"""


SCRIPTS = {"pending": PENDING, "compiling": COMPILING, "calling": CALLING, "closed": CLOSED}


def _run(script: str) -> tuple[int, str, float]:
    """(exit code, standard error, seconds from the script's end to the process's)."""
    source = COMMON + script + "\nprint(time.time(), flush=True)\n"
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=240)
    return ended.returncode, ended.stderr, time.time() - float(ended.stdout or "nan")


@pytest.fixture(scope="module")
def ends() -> Iterator[dict[str, Future[tuple[int, str, float]]]]:
    """Two of them at a time: most of what they do is to import torch."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(_run, script) for name, script in SCRIPTS.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_interpreter_ends_in_silence(name: str, ends: dict[str, Future[tuple[int, str, float]]]) -> None:
    code, said, seconds = ends[name].result()
    assert (code, said) == (0, "")
    assert seconds < 20
