"""torch_mux.quota: nesting, contexts, updates and bad input."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import torch_mux
from torch_mux import InvalidQuota, MuxError, UnknownOption, UnparsableQuantity, current_quota, quota
from torch_mux.quantities import BYTES, SECONDS, parse_duration, parse_size
from torch_mux.types import Quota


def test_the_default() -> None:
    assert current_quota() == Quota("default", 1.0, 0.0, 1.0, None, None)


def test_every_field() -> None:
    with torch_mux.quota("alice", sms=0.5, reserve=0.25, weight=2, slo="20ms", memory="4GiB"):
        assert current_quota() == Quota("alice", 0.5, 0.25, 2.0, 0.02, 4 * 1024**3)
    assert current_quota() == Quota()
    with torch_mux.quota(
        "alice", priority=1, deadline="1s", rate=50, burst=5, excess="refuse", max_pending=9
    ):
        limits = {"deadline": 1.0, "rate": 50.0, "burst": 5, "excess": "refuse", "max_pending": 9}
        assert current_quota() == Quota("alice", priority=1, **limits)  # type: ignore[arg-type]
    assert current_quota() == Quota()


def test_inner_inherits_what_it_does_not_give() -> None:
    with quota("alice", sms=0.5, slo="20ms"):
        with quota(weight=3):
            assert current_quota() == Quota("alice", 0.5, weight=3.0, slo=0.02)
            with quota("bob", slo=None):
                assert current_quota() == Quota("bob", 0.5, weight=3.0, slo=None)
            assert current_quota().tenant == "alice"
        assert current_quota() == Quota("alice", 0.5, slo=0.02)


def test_one_scope_nested_in_itself_and_reused() -> None:
    scope = quota("alice")
    for _ in range(2):
        with scope:
            with scope:
                assert current_quota().tenant == "alice"
            assert current_quota().tenant == "alice"
        assert current_quota().tenant == "default"


def test_left_after_an_exception() -> None:
    def fail() -> None:
        with quota("alice"):
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert current_quota() == Quota()


def test_threads_start_without_and_get_it_with_a_copied_context() -> None:
    seen: dict[str, str] = {}

    def client(name: str) -> None:
        seen[name] = current_quota().tenant

    with quota("alice"):
        context = contextvars.copy_context()
        threads = [
            threading.Thread(target=client, args=("bare",)),
            threading.Thread(target=context.run, args=(client, "copied")),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {"bare": "default", "copied": "alice"}


def test_one_scope_in_many_threads() -> None:
    scope = quota("alice", weight=2)
    gate = threading.Barrier(8)

    def client(index: int) -> list[str]:
        gate.wait()
        names = []
        for _ in range(200):
            with quota(f"t{index}"), scope, quota(sms=0.5):
                names.append(current_quota().tenant)
            names.append(current_quota().tenant)
        return names

    with ThreadPoolExecutor(8) as pool:
        for names in pool.map(client, range(8)):
            assert names == ["alice", "default"] * 200


def test_asyncio_tasks_inherit_and_do_not_mix() -> None:
    async def client(name: str) -> tuple[str, str]:
        before = current_quota().tenant
        with quota(name):
            await asyncio.sleep(0.001)
            return before, current_quota().tenant

    async def main() -> list[tuple[str, str]]:
        with quota("outer"):
            return await asyncio.gather(*(client(f"t{index}") for index in range(8)))

    assert asyncio.run(main()) == [("outer", f"t{index}") for index in range(8)]


def test_decorator_of_a_function_keeps_name_and_result() -> None:
    @quota("alice", sms=0.25)
    def serve(a: int, b: int = 2) -> tuple[int, Quota]:
        """Serves."""
        return a + b, current_quota()

    assert serve(1, b=3) == (4, Quota("alice", 0.25))
    assert (serve.__name__, serve.__doc__) == ("serve", "Serves.")
    assert current_quota() == Quota()


def test_decorator_of_a_coroutine_function() -> None:
    @quota("alice")
    async def serve() -> str:
        await asyncio.sleep(0)
        return current_quota().tenant

    assert asyncio.iscoroutinefunction(serve)
    assert asyncio.run(serve()) == "alice"


def test_decorator_of_a_generator_is_refused() -> None:
    def serve() -> Iterator[int]:
        yield 1

    with pytest.raises(InvalidQuota, match="generator"):
        quota("alice")(serve)


def test_update_holds_from_now_on_in_every_thread() -> None:
    scope = quota("alice", weight=1, slo="20ms")
    updated, entered = threading.Event(), threading.Event()
    seen: list[Quota] = []

    def client() -> None:
        with scope, quota(sms=0.5):
            seen.append(current_quota())
            entered.set()
            assert updated.wait(10)
            seen.append(current_quota())

    thread = threading.Thread(target=client)
    thread.start()
    assert entered.wait(10)
    scope.update(weight=4, slo=None)
    updated.set()
    thread.join()
    assert seen == [Quota("alice", 0.5, weight=1.0, slo=0.02), Quota("alice", 0.5, weight=4.0)]


def test_a_refused_update_changes_nothing() -> None:
    scope = quota("alice", sms=0.5, reserve=0.25)
    with scope:
        for bad in ({"sms": 0.1}, {"weight": -1}, {"slo": "soon"}, {"sm": 0.5}):
            with pytest.raises(MuxError):
                scope.update(**bad)  # type: ignore[arg-type]
        assert current_quota() == Quota("alice", 0.5, 0.25)


def test_an_update_that_contradicts_the_enclosing_quota_is_named() -> None:
    inner = quota(sms=0.5)
    with quota("alice", reserve=0.25), inner:
        inner.update(sms=0.1)
        with pytest.raises(InvalidQuota, match="reserve"):
            current_quota()
        inner.update(sms=0.3)
        assert current_quota().sms == 0.3


def test_an_inherited_reserve_above_the_limit_is_refused_on_entry() -> None:
    with quota("alice", reserve=0.5):
        with pytest.raises(InvalidQuota, match="raise sms or lower reserve"):
            quota(sms=0.25).__enter__()
        assert current_quota() == Quota("alice", reserve=0.5)


BAD = [
    (lambda: quota(sms=0), InvalidQuota, "sms=0"),
    (lambda: quota(sms=1.5), InvalidQuota, "sms=1.5"),
    (lambda: quota(sms=math.nan), InvalidQuota, "sms"),
    (lambda: quota(sms="half"), InvalidQuota, "sms='half'"),  # type: ignore[arg-type]
    (lambda: quota(sms=True), InvalidQuota, "sms=True"),
    (lambda: quota(reserve=-0.1), InvalidQuota, "reserve"),
    (lambda: quota(sms=0.25, reserve=0.5), InvalidQuota, "reserve=0.5"),
    (lambda: quota(weight=1e-20), InvalidQuota, "weight=1e-20"),
    (lambda: quota(weight=1e7), InvalidQuota, "from 1e-6 to 1e6"),
    (lambda: quota(weight=0), InvalidQuota, "weight=0"),
    (lambda: quota(weight=-2), InvalidQuota, "weight=-2"),
    (lambda: quota(weight=math.inf), InvalidQuota, "weight=inf"),
    (lambda: quota(slo=0), InvalidQuota, "slo=0"),
    (lambda: quota(deadline=0), InvalidQuota, "deadline=0"),
    (lambda: quota(deadline=-1), UnparsableQuantity, "duration"),
    (lambda: quota(rate=0), InvalidQuota, "rate=0"),
    (lambda: quota(rate=math.inf), InvalidQuota, "rate=inf"),
    (lambda: quota(burst=0), InvalidQuota, "burst=0"),
    (lambda: quota(excess="drop"), InvalidQuota, "excess='drop'"),
    (lambda: quota(max_pending=0), InvalidQuota, "max_pending=0"),
    (lambda: quota(max_pending=True), InvalidQuota, "max_pending=True"),
    (lambda: quota(memory=0), InvalidQuota, "memory=0"),
    (lambda: quota(""), InvalidQuota, "tenant"),
    (lambda: quota(7), InvalidQuota, "tenant=7"),  # type: ignore[arg-type]
    (lambda: quota(slo="20"), UnparsableQuantity, "'20ms'"),
    (lambda: quota(slo="fast"), UnparsableQuantity, "'fast'"),
    (lambda: quota(memory="4G"), UnparsableQuantity, "4GiB"),
    (lambda: quota(memory=1.5), UnparsableQuantity, "size"),  # type: ignore[arg-type]
    (lambda: quota(wieght=2), UnknownOption, "did you mean 'weight'"),
    (lambda: quota(priority=1.5), InvalidQuota, "priority=1.5"),  # type: ignore[arg-type]
    (lambda: quota(gpu=2), UnknownOption, "tenant, sms, reserve, weight, slo, memory, priority, deadline"),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD)
def test_bad_input(make: Callable[[], object], error: type[MuxError], text: str) -> None:
    with pytest.raises(error, match=text.replace(".", r"\.")):
        make()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("20ms", 0.02),
        (" 1.5 s ", 1.5),
        ("200us", 2e-4),
        ("200µs", 2e-4),
        ("2min", 120.0),
        ("1e-3s", 1e-3),
        (timedelta(milliseconds=5), 0.005),
        (0.25, 0.25),
        (3, 3.0),
        (0, 0.0),
    ],
)
def test_durations(value: str | float | timedelta, seconds: float) -> None:
    assert parse_duration(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "ms", "20", "-1s", "1 2s", "nan s", "5 parsecs", "1e999s"])
def test_bad_durations(value: str) -> None:
    with pytest.raises(UnparsableQuantity, match="duration"):
        parse_duration(value)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan, True, None, timedelta(seconds=-1)])
def test_bad_duration_values(value: float) -> None:
    with pytest.raises(UnparsableQuantity):
        parse_duration(value)


@pytest.mark.parametrize(
    ("value", "size"),
    [("4GiB", 4 << 30), ("512MB", 512_000_000), ("1.5 KiB", 1536), ("10b", 10), ("2tib", 2 << 40), (77, 77)],
)
def test_sizes(value: str | int, size: int) -> None:
    assert parse_size(value) == size


@given(st.integers(0, 10**6), st.sampled_from(sorted(SECONDS)), st.sampled_from(["", " ", "  "]))
def test_written_durations_come_back(number: int, unit: str, space: str) -> None:
    assert parse_duration(f"{number}{space}{unit}") == float(number * SECONDS[unit])


@given(st.integers(0, 10**6), st.sampled_from(sorted(BYTES)))
def test_written_sizes_come_back(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit.upper()}") == number * BYTES[unit]


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused_by_name(text: str) -> None:
    for parse in (parse_duration, parse_size):
        try:
            value = parse(text)
        except UnparsableQuantity as error:
            refused = str(error)
            value = 0.0 if repr(text) in refused else math.nan
        assert value >= 0
        assert math.isfinite(value)


@pytest.mark.parametrize("field", [{"burst": 3}, {"excess": "refuse"}])
def test_what_a_rate_needs_says_nothing_alone(field: dict[str, Any]) -> None:
    with pytest.raises(InvalidQuota, match="give rate too"), quota("alice", **field):
        pass
    with quota("alice", rate=5), quota(**field):
        assert current_quota().rate == 5


def test_a_scope_that_was_used_once_needs_no_collector() -> None:
    scope = quota("alice")
    with quota("outer"), scope:
        assert current_quota().tenant == "alice"
    gone = weakref.ref(scope)
    gc.disable()
    try:
        del scope
        assert gone() is None
    finally:
        gc.enable()
