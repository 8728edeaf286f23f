"""Where a captured graph stops for another: what the kernels do, in Triton's interpreter."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from torch_mux.lowering.kernels.gates import Gate

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")


def control(cap: int) -> torch.Tensor:
    return torch.tensor([3, cap], dtype=torch.int32)


def made(sms: int) -> Gate:
    gate = Gate(CPU)
    gate._sms = sms
    gate.words[2] = sms
    return gate


def test_a_stop_is_passed_while_nobody_overtakes() -> None:
    gate, cap = made(132), control(7)
    gate.stop(cap, control(100)).run()
    assert cap.tolist() == [3, 100], "the cap is the bundle's own again"
    for _ in range(3):
        gate.overtake(ends=False).run()
        gate.overtake(ends=True).run()
    gate.stop(cap, control(100)).run()
    assert gate.words.tolist() == [3, 3, 132]


def test_a_stop_waits_until_all_that_began_have_ended() -> None:
    gate = made(132)
    for _ in range(2):
        gate.overtake(ends=False).run()
    passed = threading.Event()

    def stop() -> None:
        gate.stop(control(1), control(1)).run()
        passed.set()

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    for _ in range(2):
        time.sleep(0.2)
        assert not passed.is_set()
        gate.words[1] += 1  # the interpreter runs one kernel at a time
    assert passed.wait(30)
    thread.join(10)


def test_a_stop_takes_over_what_a_claim_leaves_and_gives_it_back() -> None:
    gate, mine, cap = made(132), control(33), control(132)
    gate.claim(mine, ends=False).run()
    gate.stop(cap, control(132)).run()
    assert cap.tolist() == [3, 99]
    gate.stop(cap, control(50)).run()
    assert cap.tolist() == [3, 50], "less than what is left stays as it is"
    gate.claim(mine, ends=True).run()
    gate.stop(cap, control(132)).run()
    assert cap.tolist() == [3, 132]


def test_who_has_the_whole_device_claims_nothing() -> None:
    """He was alone when he went out; those who came meanwhile are capped by the policy."""
    gate, cap = made(132), control(132)
    gate.claim(control(132), ends=False).run()
    gate.stop(cap, control(132)).run()
    assert cap.tolist() == [3, 132]
