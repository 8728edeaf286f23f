"""Kernels compiled ahead: each variant once, several at once, and found by the launches that follow."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from torch_mux import compat
from torch_mux.lowering.kernels.ahead import Builder
from torch_mux.lowering.kernels.code import Code
from torch_mux.lowering.kernels.common import Launch
from torch_mux.lowering.kernels.data import Part
from torch_mux.lowering.kernels.interception import recording
from torch_mux.lowering.kernels.linear import linear_launch, part_records
from torch_mux.lowering.kernels.transport import gather, scatter

HALF = torch.float16


def linear(slots: int, n: int = 64, active: int = 0) -> Launch:
    x, out = torch.empty(slots, 32, 64, dtype=HALF), torch.empty(slots, 32, n, dtype=HALF)
    table, rows = torch.zeros(8, 4, dtype=torch.int64), torch.zeros(slots, dtype=torch.int64)
    control = torch.tensor([active, 1], dtype=torch.int32)
    return linear_launch(x, table, 1, rows, control, out, n=n, k=64, sms=132)


class FakeDriver:
    """A GPU of compute capability 9 that compiles for real and launches nothing."""

    launches = 0

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (object(), 1, 64, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*args: Any) -> None:
            self.launches += 1

        return launch


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    made = FakeDriver()
    monkeypatch.setattr(triton.runtime.driver, "_active", made)
    linear(1).kernel.device_caches.clear()
    yield made
    linear(1).kernel.device_caches.clear()


def test_launches_find_what_was_built_ahead(driver: FakeDriver) -> None:
    builder = Builder(Launch.build)
    with torch._subclasses.FakeTensorMode():
        expected = [linear(slots, n) for slots in (1, 2, 16) for n in (64, 128)]
    builder.finish(expected)
    compiled: list[str] = []
    triton.knobs.runtime.jit_cache_hook = lambda **found: compiled.append(found["repr"])
    try:
        for slots in (1, 2, 16):
            for n in (64, 128):
                linear(slots, n).run()
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    assert compiled == []
    assert driver.launches == 6


def test_a_variant_is_built_once() -> None:
    built: list[Launch] = []
    builder = Builder(built.append)
    same = [linear(slots) for slots in (2, 2, 3)]
    assert len({launch.variant for launch in same}) == 1
    other = linear(2, n=24)
    builder.finish([*same, other, *same])
    builder.finish(same)
    assert {launch.variant for launch in built} == {same[0].variant, other.variant}
    assert len(built) == 2


def test_code_is_named_as_its_launch_in_later_processes() -> None:
    for launch in (linear(2), linear(16, n=24)):
        again = pickle.loads(pickle.dumps(launch.code))
        assert again == launch.code and again.named
        assert again.variant == launch.variant and again.kernel is launch.kernel


def test_the_kernel_of_a_function_is_found_by_no_name() -> None:
    @triton.jit
    def local(x) -> None:  # type: ignore[no-untyped-def]
        pass

    assert not Code(local, (HALF,), 1, torch.device("cpu"), ()).named


def test_launches_find_what_was_built_by_name(driver: FakeDriver) -> None:
    codes = pickle.loads(pickle.dumps([linear(slots).code for slots in (1, 2, 16)]))
    Builder(lambda code: code.build()).finish(codes)
    compiled: list[str] = []
    triton.knobs.runtime.jit_cache_hook = lambda **found: compiled.append(found["repr"])
    try:
        for slots in (1, 2, 16):
            linear(slots).run()
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    assert compiled == [] and driver.launches == 3


def test_several_are_built_at_once() -> None:
    together = threading.Barrier(3)
    builder = Builder(lambda launch: together.wait(10), threads=3)
    builder.finish([linear(1, n) for n in (8, 64, 2048)])
    assert not together.broken


def test_what_does_not_compile_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    built: list[int] = []

    def build(launch: Launch) -> None:
        if launch.arguments["n"] == 24:
            raise ValueError("out of registers")
        built.append(launch.arguments["n"])

    Builder(build, threads=1).finish([linear(1, 24), linear(1, 64)])
    assert built == [64]
    assert "out of registers" in caplog.text


def test_closing_drops_what_is_queued_and_the_builder_serves_again() -> None:
    entered, gate = threading.Event(), threading.Event()
    built: list[int] = []

    def build(launch: Launch) -> None:
        entered.set()
        assert gate.wait(10)
        built.append(launch.arguments["n"])

    builder = Builder(build, threads=1)
    first, second = builder.begin([linear(1, 64), linear(1, 24)])
    assert entered.wait(10)
    builder.close(0.0)
    second.result(10)
    gate.set()
    first.result(10)
    assert built == [64]
    builder.finish([linear(1, 24)])
    assert built == [64, 24]
    builder.close(10.0)
    assert not [thread for thread in threading.enumerate() if thread.name == "torch_mux-kernels"]


def test_recorded_launches_do_not_run() -> None:
    batched, pointers = torch.full((2, 8), 7.0), torch.zeros(2, dtype=torch.int64)
    control = torch.tensor([2, 1], dtype=torch.int32)
    with recording() as found:
        gather(pointers, batched, control, (1,))
        with recording() as inner:
            scatter(batched, pointers, control, (1,))
    assert [len(found), len(inner)] == [1, 1]
    assert bool((batched == 7.0).all())


def test_records_of_fake_tensors_are_not_kept() -> None:
    parts = (Part(0, 32, 16), Part(1, 48, 16))
    with compat.fake_tensors():
        assert compat.is_fake(part_records(parts, torch.empty(1)))
    real = part_records(parts, torch.empty(1))
    assert not compat.is_fake(real)
    assert real[:, 0].tolist() == [32, 48, 0, 0]
