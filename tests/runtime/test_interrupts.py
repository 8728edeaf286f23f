"""Who could begin at once does not wait until what is under way has ended."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from clocks import Told
from slow_device import slow

from torch_mux.compat import captures
from torch_mux.errors import MuxError
from torch_mux.runtime.interrupt import Interrupt
from torch_mux.runtime.steppers import ENDED, Stepper
from torch_mux.types import Quota


def served(lab: Any, names: str, **settings: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Programs with a branch each, on a device whose time stands still."""
    engine, device = slow(lab, Told(), branches=4, **settings)
    models = {name: lab.Affine(float(index + 2)) for index, name in enumerate(names)}
    for name in names:
        engine.register(lab.program(name))
    assert engine.quiesce(10)
    return engine, device, models


def waits(monkeypatch: pytest.MonkeyPatch, device: Any) -> threading.Event:
    """Set when somebody waits for the end of a bundle."""
    found, await_end = threading.Event(), device.await_end

    def waiting(interrupt: Interrupt | None = None) -> None:
        found.set()
        await_end(interrupt)

    monkeypatch.setattr(device, "await_end", waiting)
    return found


def watched(lab: Any, engine: Any, request: Any, waiting: threading.Event) -> None:
    """The dispatcher's thread waits, without the role, for the end of a request's bundle."""
    request.add_done_callback(lambda _: None)
    engine.kick()
    lab.until(lambda: request.out)
    assert waiting.wait(10)


@pytest.mark.parametrize("kicked", [True, False])
def test_an_idle_program_goes_out_while_another_ones_branch_is_full(
    lab: Any, monkeypatch: pytest.MonkeyPatch, kicked: bool
) -> None:
    engine, device, models = served(lab, "ab", max_bundle=1, in_flight=1)
    waiting = waits(monkeypatch, device)
    first = [lab.submit(engine, lab.program("a"), models["a"], 1.0, quota=Quota("a")) for _ in range(2)]
    threading.Thread(target=engine.wait, args=(first,), daemon=True).start()
    assert waiting.wait(10)
    assert [one.out for one in first] == [True, False]
    other = lab.submit(engine, lab.program("b"), models["b"], 1.0, quota=Quota("b"))
    if kicked:
        engine.kick()
    else:
        threading.Thread(target=engine.wait, args=([other],), daemon=True).start()
    lab.until(lambda: other.out)  # no time passes: nothing ends before
    device.clock.now += 1.0


def test_nobody_who_dispatches_for_himself_takes_an_interrupt_with_him(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, device, models = served(lab, "abc")
    waiting, launch, late = waits(monkeypatch, device), device.launch, []
    watched(lab, engine, lab.submit(engine, lab.program("a"), models["a"], quota=Quota("a")), waiting)

    def launching(bundle: Any) -> Any:
        flight = launch(bundle)
        if bundle.served.program.name == "b" and not late:
            late.append(lab.submit(engine, lab.program("c"), models["c"], quota=Quota("c")))
            engine.kick()
        return flight

    monkeypatch.setattr(device, "launch", launching)
    engine.wait([lab.submit(engine, lab.program("b"), models["b"], quota=Quota("b"))])
    lab.until(lambda: late[0].out)


def test_a_program_goes_out_when_its_plan_comes(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, device, models = served(lab, "a")
    lab.slow["z"] = threading.Event()
    engine.register(lab.program("z"))
    waiting = waits(monkeypatch, device)
    watched(lab, engine, lab.submit(engine, lab.program("a"), models["a"], quota=Quota("a")), waiting)
    new = lab.submit(engine, lab.program("z"), lab.Affine(), quota=Quota("z"))
    engine.kick()
    lab.slow["z"].set()
    assert engine.quiesce(10)
    lab.until(lambda: new.out)


@pytest.mark.parametrize("settings", [{"lanes": 2}, {"segment": 0.001}])
def test_one_of_the_same_program_begins_on_another_lane(
    lab: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    engine, device = slow(lab, Told(), branches=1, linger=0.0, **settings)
    model = lab.Affine()
    warm = lab.submit(engine, lab.program(), model)
    warm.result()
    device.clock.now += 1.0
    lab.until(lambda: (engine.stats(), warm.done())[1])
    waiting = waits(monkeypatch, device)
    watched(lab, engine, lab.submit(engine, lab.program(), model, quota=Quota("low")), waiting)
    other = lab.submit(engine, lab.program(), model, quota=Quota("high", priority=1))
    engine.kick()
    lab.until(lambda: other.out)
    assert other.flight.bundle.lane != 0


def test_who_would_only_wait_behind_his_own_bundle_interrupts_nobody(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, device = slow(lab, Told())
    model, latent, counted = lab.Affine(), Quota("latent", reserve=0.25), []
    waiting = waits(monkeypatch, device)
    watched(lab, engine, lab.submit(engine, lab.program(), model, quota=Quota("others")), waiting)
    monkeypatch.setattr(Interrupt, "set", lambda self, real=Interrupt.set: (counted.append(1), real(self)))
    first = lab.submit(engine, lab.program(), model, quota=latent)
    engine.kick()
    lab.until(lambda: first.out)  # others of its program are under way, but nothing on its lane
    assert counted == [1]
    for quota in (latent, Quota("others")):
        lab.submit(engine, lab.program(), model, quota=quota)
        engine.kick()
    assert counted == [1]


@pytest.mark.parametrize("when", ["launching", "launched"])
def test_a_deadline_that_cannot_be_kept_is_refused_while_a_bundle_is_launched(lab: Any, when: str) -> None:
    clock = Told()
    engine, device = slow(lab, clock, max_bundle=1)
    device.seconds = 1.0
    model = lab.Affine()
    for _ in range(4):
        one = lab.submit(engine, lab.program(), model)
        one.result()
        clock.now += 1.0
        engine.stats()
        assert one.done()
    seen: list[Any] = []

    def late() -> None:
        try:
            seen.append(lab.submit(engine, lab.program(), model, quota=Quota("late", deadline=1.5)))
        except MuxError as error:
            seen.append(error)

    launch = device.launch

    def launching(bundle: Any) -> Any:
        if when == "launching" and not seen:
            late()
        return launch(bundle)

    device.launch = launching
    lab.submit(engine, lab.program(), model).result()
    if when == "launched":
        late()
    assert isinstance(seen[0], MuxError), "it was let in, and will be late"


def test_cuda_that_refuses_to_leave_captures_alone_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*args: object) -> None:
        raise RuntimeError("CUDA error: refused")

    monkeypatch.setattr(captures, "_local", threading.local())
    monkeypatch.setattr(captures, "call", refused)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    done: list[int] = []
    stepper = Stepper("test")
    stepper.begin(lambda hand: done.append(1))
    assert stepper.step() is ENDED and done == [1]
    stepper.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_who_could_begin_at_once_does_not_wait_for_the_callbacks_of_others(lab: Any) -> None:
    engine, device, models = served(lab, "ab")
    crowd = [lab.submit(engine, lab.program("a"), models["a"], float(n), quota=Quota("a")) for n in range(8)]
    late: list[Any] = []
    called: list[tuple[int, bool]] = []

    def calling(number: int) -> None:
        if not late:
            late.append(lab.submit(engine, lab.program("b"), models["b"], 1.0, quota=Quota("b")))
            engine.kick()
        called.append((number, late[0].out))

    for number, request in enumerate(crowd):
        request.add_done_callback(lambda _, number=number: calling(number))
    engine.kick()
    lab.until(lambda: all(request.out for request in crowd))
    device.clock.now += 1.0
    lab.until(lambda: len(called) == 8)
    assert called == [(0, False), *((number, True) for number in range(1, 8))]
    device.clock.now += 1.0
    lab.until(late[0].done)


def test_callbacks_that_give_way_make_progress_and_none_is_lost(lab: Any) -> None:
    """Somebody may come again and again: each look makes one, and who dispatches makes all in the end."""
    engine, _, _ = served(lab, "a")
    (dispatcher,) = engine._dispatchers.values()
    runner, called = dispatcher._runner, list[int]()
    runner._calls.extend([(called.append, number) for number in range(4)])
    runner.interrupt.set()
    assert not runner.land(gives_way=True) and called == [0]
    assert not runner.land(gives_way=True) and called == [0, 1]
    assert runner.land() and called == [0, 1, 2, 3]
