"""The compile caches' source hashes are made once, beside the first trace, also across a fork."""

from __future__ import annotations

import subprocess
import sys
import textwrap

PROGRAM = """
import os, threading
import torch
from torch_mux import compat
from torch._inductor import codecache

made = []
build = codecache.build_code_hash

def counted(roots, prefix, hasher):
    if prefix == "":
        made.append(threading.current_thread().name)
    build(roots, prefix, hasher)

codecache.build_code_hash = counted
compat.source_keys.begin()
waiting = [threading.Thread(target=compat.source_keys.ready) for _ in range(4)]
for thread in waiting:
    thread.start()
child = os.fork()
if child == 0:
    compat.source_keys.ready()
    os._exit(0 if codecache.torch_key() else 1)
for thread in waiting:
    thread.join()
assert os.waitpid(child, 0)[1] == 0
compat.source_keys.ready()
assert codecache.torch_key()
assert made == ["torch_mux-source-keys"], made
"""


def test_they_are_made_once_however_many_wait() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
