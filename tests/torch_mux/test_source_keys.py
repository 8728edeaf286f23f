"""What identifies the installed torch and Triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from torch_mux.compat import source_keys

PROGRAM = """
import os, threading
import torch
from triton.runtime import cache
from torch_mux.compat import source_keys

torch.cuda.is_available = lambda: True
source_keys.begin()
waiting = [threading.Thread(target=source_keys.ready) for _ in range(4)]
for thread in waiting:
    thread.start()
child = os.fork()
if child == 0:
    source_keys.ready()
    os._exit(0 if cache.triton_key() else 1)
for thread in waiting:
    thread.join()
assert os.waitpid(child, 0)[1] == 0
source_keys.ready()
assert cache.triton_key()
assert cache.triton_key.cache_info().misses == 1, cache.triton_key.cache_info()
"""


def test_tritons_hash_is_made_once_however_many_wait() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_changed_file_is_another_installation(tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "inner").mkdir()
    for name in ("a.py", "inner/b.py"):
        (folder / name).write_text("x = 1")
    before = source_keys._stamps(folder)
    assert source_keys._stamps(folder) == before
    (folder / "inner/b.py").write_text("x = 10")
    changed = source_keys._stamps(folder)
    (folder / "c.py").write_text("")
    assert len({before, changed, source_keys._stamps(folder)}) == 3
