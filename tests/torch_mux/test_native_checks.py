"""Checks of many tensors at once: both forms see the same changes; the C++ form is built, or says why not."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torch_mux.compat import native


def _forms() -> list[Any]:
    return [native.PythonChecks(), native.build()]


@pytest.fixture(params=["Python", "C++"])
def checks(request: pytest.FixtureRequest) -> Any:
    found = _forms()[request.param == "C++"]
    if request.param == "C++":
        assert not isinstance(found, native.PythonChecks), native.status()
    return found


def test_nothing_changed(checks: Any) -> None:
    tensors = [torch.randn(3), torch.empty(0), torch.randn(4, 4)[1:, 1:]]
    assert not checks.changed(checks.weights(tensors, tensors))


@pytest.mark.parametrize("position", [0, 1])
def test_a_write_in_place_is_seen(checks: Any, position: int) -> None:
    tensors = [torch.randn(3), nn.Parameter(torch.randn(2, 2))]
    known = checks.weights([tensor.detach() for tensor in tensors], [])
    with torch.no_grad():
        tensors[position][0] = 1.0  # through a view
    assert checks.changed(known)


def test_a_moved_tensor_is_seen(checks: Any) -> None:
    first, second = torch.randn(3), torch.randn(8)
    known = checks.weights([], [first, second])
    second.data = second.data[1:]
    assert checks.changed(known)


def test_a_collected_tensor_is_no_change(checks: Any) -> None:
    first, second = torch.randn(3), torch.randn(3)
    known = checks.weights([first.detach()], [first, second])
    del first
    gc.collect()
    second.data = second.data.clone()
    assert not checks.changed(known)


def test_counters_outlive_their_tensors(checks: Any) -> None:
    tensor = torch.randn(3)
    view = tensor[1:]
    known = checks.weights([view], [])
    del view
    tensor.add_(1)
    assert checks.changed(known)


def test_inference_tensors_have_no_counter(checks: Any) -> None:
    with torch.inference_mode():
        tensor = torch.ones(2)
    with pytest.raises((ValueError, RuntimeError), match="version"):
        checks.weights([tensor], [])


@pytest.mark.parametrize(
    ("slots", "rows", "columns", "kind"),
    [
        (1, [0, 1], [], ValueError),
        (2, [], [], ValueError),
        (2, [0, 1], [[torch.zeros(1)]], ValueError),
        (1, [0], [["no tensor"]], TypeError),
        (1, ["no row"], [[torch.zeros(1)]], TypeError),
        (1, [0], [[torch.eye(2).to_sparse()]], RuntimeError),
    ],
)
def test_a_table_of_the_wrong_things_is_an_error(
    checks: Any, slots: int, rows: Any, columns: Any, kind: type[Exception]
) -> None:
    host = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(kind):
        checks.fill(host.data_ptr(), slots, 1, rows, columns)


def test_where_tensors_are_laid_out_otherwise_python_writes_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    built: Any = native.build()
    module, tensor = built.changed.__self__, torch.zeros(1)
    assert built.fill is module.fill
    assert module.fits(torch._C.TensorBase, tensor, tensor._cdata)
    assert not module.fits(torch._C.TensorBase, tensor, tensor._cdata + 8)
    assert not module.fits(torch._C.TensorBase, "no tensor", tensor._cdata)
    monkeypatch.setattr(module, "fits", lambda *_: False)
    other: Any = native._NativeChecks(module).fill
    assert isinstance(other.__self__, native.PythonChecks)


def _same(checks: Any, model: nn.Module) -> Any:
    modules = list(model.modules())
    tables = tuple(t for m in modules for t in (m._parameters, m._buffers, m._modules))
    values = [value for table in tables for value in table.values()]
    empty = tuple(m._forward_hooks for m in modules)
    flags = tuple(m.__dict__ for m in modules)
    wanted = [flag["training"] for flag in flags]
    return lambda: checks.same(tables, values, empty, flags, "training", wanted)


def _replace(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def _grow(model: nn.Sequential) -> None:
    model[1].register_buffer("extra", torch.ones(1))


def _shrink(model: nn.Sequential) -> None:
    model[0].bias = None  # an entry of another value
    del model[0].bias


def _retrain(model: nn.Sequential) -> None:
    model[1].train(not model[1].training)


def _hook(model: nn.Sequential) -> None:
    model[1].register_forward_hook(lambda *_: None)


def _equal_scalar(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())  # equal, and yet another tensor


@pytest.mark.parametrize("change", [_replace, _grow, _shrink, _retrain, _hook, _equal_scalar])
def test_structure_changes_are_seen(checks: Any, change: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.PReLU(1))
    same = _same(checks, model)
    assert same()
    change(model)
    assert not same()


def _item(model: nn.Sequential) -> None:
    vars(model[1])["training"] = not model[1].training


def _attribute(model: nn.Sequential) -> None:
    for _ in range(100):  # Python specialises a store that is made often
        model[1].training = not model[1].training


def _emptied(model: nn.Sequential) -> None:
    model[0]._parameters.clear()


@pytest.mark.parametrize("change", [_replace, _grow, _shrink, _retrain, _hook, _item, _attribute, _emptied])
def test_after_a_write_it_looks_again(change: Any) -> None:
    native.build()
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.PReLU(1))
    dicts = [
        table
        for m in model.modules()
        for table in (m._parameters, m._buffers, m._modules, m._forward_hooks, m.__dict__)
    ]
    still = native.Stillness(dicts)
    looks: list[int] = []

    def look() -> bool:
        looks.append(1)
        return True

    for _ in range(3):
        assert still.confirmed(look)
    counted = sys.version_info >= (3, 12) and sys.version_info[:3] != (3, 13, 0)
    assert len(looks) == (1 if counted else 3)
    change(model)
    assert still.confirmed(look)
    assert len(looks) == (2 if counted else 4)


def test_tables_that_are_no_dicts_are_looked_at_every_time() -> None:
    """Those of a scripted module."""
    native.build()
    still = native.Stillness([torch.jit.script(nn.Linear(2, 2))._modules])
    assert still.confirmed(lambda: True)
    assert not still.confirmed(lambda: False)


def test_what_was_not_true_is_looked_at_again() -> None:
    native.build()
    still = native.Stillness([{}])
    assert not still.confirmed(lambda: False)
    assert not still.confirmed(lambda: False)


def test_without_counting_it_looks_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native._state, "checks", native.PythonChecks())
    still = native.Stillness([{}])
    assert still.confirmed(lambda: True)
    assert not still.confirmed(lambda: False)


def test_arguments_of_the_wrong_kind_are_errors() -> None:
    module = native.build()
    with pytest.raises((TypeError, ValueError)):
        module.changed("no capsule")
    with pytest.raises(TypeError):
        module.same([], [], (), (), "training", [])  # type: ignore[arg-type]
    if sys.version_info >= (3, 12):
        with pytest.raises(TypeError):
            module.watch([])  # type: ignore[arg-type]


PROBE = """
import sys, torch_mux.compat.native as native
native.build()
print(native.status())
"""


def _probe(tmp_path: Path, **environment: str) -> tuple[str, str]:
    variables = {**os.environ, "TORCH_MUX_CACHE_DIR": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=variables, capture_output=True, text=True, check=True, timeout=240
    )
    return done.stdout.strip(), done.stderr


def test_it_is_built_once_and_survives_damage(tmp_path: Path) -> None:
    assert _probe(tmp_path)[0].startswith("C++")
    (built,) = (tmp_path / "native").glob("*.so")
    made = built.stat().st_mtime_ns
    assert _probe(tmp_path)[0].startswith("C++")
    assert built.stat().st_mtime_ns == made
    built.write_bytes(built.read_bytes()[:100])
    assert _probe(tmp_path)[0].startswith("C++")
    assert built.stat().st_size > 100


def test_without_a_compiler_python_does_it_and_says_so(tmp_path: Path) -> None:
    said, warned = _probe(tmp_path, CXX="no-such-compiler")
    assert said.startswith("Python (FileNotFoundError")
    assert "checks of weights run in Python" in warned
    assert _probe(tmp_path, TORCH_MUX_NATIVE="0")[0] == "Python (TORCH_MUX_NATIVE=0)"


RUNTIME = """
#include <stddef.h>
#include <stdio.h>
#include <sys/prctl.h>
int cudaStreamWaitEvent(void* s, void* e, unsigned f) {
  printf("wait %zu %zu\\n", (size_t)s, (size_t)e); return 0; }
int cudaEventRecord(void* e, void* s) {
  printf("record %zu %zu\\n", (size_t)e, (size_t)s); return 0; }
int cudaMemcpyAsync(void* t, const void* f, size_t n, int k, void* s) {
  printf("copy %zu %zu %zu %d %zu\\n", (size_t)t, (size_t)f, n, k, (size_t)s); return 0; }
int cudaGraphLaunch(void* g, void* s) {
  printf("launch %zu %zu\\n", (size_t)g, (size_t)s); fflush(stdout); return (size_t)g == 13 ? 700 : 0; }
int cudaEventQuery(void* e) {
  static int asked = 0;
  if ((size_t)e == 14) { printf("slack %d\\n", prctl(PR_GET_TIMERSLACK)); return 0; }
  if ((size_t)e == 13) return 700;
  return (size_t)e == 12 && ++asked > 3 ? 0 : 600; }
int cudaGetLastError(void) { printf("forget\\n"); fflush(stdout); return 0; }
const char* cudaGetErrorString(int e) { return e == 700 ? "an illegal access" : "?"; }
"""

ENQUEUE = """
import ctypes, sys, threading, torch
from torch_mux.runtime.interrupt import Interrupt
library = ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
import torch_mux.compat.native as native
native.build()
enqueue = native.enqueue()
enqueue.record(7, 1)
written, kept = torch.zeros(2), torch.zeros(2)
watched = [native.checks().weights([one], [one]) for one in (written, kept)]
written += 1
changed = [enqueue.enqueue(1, [2, 3], 4, 5, 6, 80, 9, 10, one) for one in (watched, watched[1:])]
library.fflush(None)
waits = [enqueue.await_any(*one, 0) for one in (([11], 1e-4), ([11, 12], 60.0), ([11, 13], 60.0))]
flag = Interrupt()
slack = library.prctl(30, 0, 0, 0, 0)
waits.append(enqueue.await_any([14], 60.0, 0))
waits.append(library.prctl(30, 0, 0, 0, 0) == slack > 1000)
begun = threading.Timer(0.05, flag.set)
begun.start()
waits.append(enqueue.await_any([11], 60.0, flag.address))  # which nobody reaches
print(*waits, *changed, flush=True)
try:
    enqueue.enqueue(1, [], 4, 5, 6, 80, 13, 10, watched[1:])
except RuntimeError as error:
    library.fflush(None)
    print(error, flush=True)
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch calls the CUDA runtime, too")
def test_a_bundle_is_enqueued_in_order_and_errors_are_said(tmp_path: Path) -> None:
    source, library = tmp_path / "runtime.c", tmp_path / "runtime.so"
    source.write_text(RUNTIME)
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True, timeout=120)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", ENQUEUE, str(library)], env=environment, capture_output=True, text=True,
        check=True, timeout=240,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "record 7 1",
        *("wait 1 2", "wait 1 3", "record 4 1", "copy 5 6 80 1 1", "launch 9 1", "record 10 1") * 2,
        *("forget", "forget", "forget"),
        *("slack 1000", "forget", "forget", "False True True True True False True False"),
        *("record 4 1", "copy 5 6 80 1 1", "launch 13 1", "forget"),
        "CUDA error: an illegal access",
    ]


@pytest.mark.skipif(torch.version.cuda is not None, reason="there is a CUDA runtime")
def test_without_a_cuda_runtime_nothing_is_enqueued() -> None:
    module: Any = native.build()
    assert native.enqueue() is None
    with pytest.raises(RuntimeError, match="no CUDA runtime"):
        native._imported(Path(native.status()[5:-1])).record(1, 2)
    assert module is not None
