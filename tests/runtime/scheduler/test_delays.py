"""Forecasts of a request's end: what is before it, how fast bundles go, by how much forecasts were wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import Ticket

from torch_mux.runtime.scheduler.delays import Delay
from torch_mux.runtime.scheduler.pace import Pace
from torch_mux.runtime.scheduler.pending import Pending, Standing
from torch_mux.types import Quota

QUOTAS = [
    Quota("a"),
    Quota("b", weight=2.0),
    Quota("c", weight=0.5),
    Quota("a", priority=1),
    Quota("d", priority=1, weight=3.0),
]


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=60), st.sampled_from(QUOTAS))
def test_what_a_request_finds_pending_is_what_is_there(steps: list[tuple[int, bool]], asker: Quota) -> None:
    pending: Pending[Ticket] = Pending()
    there: list[Ticket] = []
    for which, take in steps:
        if take and there:
            pending.take([there.pop(which % len(there))])
        else:
            there.append(Ticket(0.0, 1, QUOTAS[which]))
            pending.append(there[-1])
        pending.flows()
    found = pending.standing(asker)
    level = [one.quota for one in there if one.quota.priority == asker.priority]
    assert found.higher == sum(one.quota.priority > asker.priority for one in there)
    assert found.own == sum(one.tenant == asker.tenant for one in level)
    assert found.others == len(level) - found.own
    weights = {one.tenant: one.weight for one in level if one.tenant != asker.tenant}
    assert found.rivals == pytest.approx(sum(weights.values()) / asker.weight)


@given(st.integers(0, 50), st.integers(0, 200), st.integers(0, 50), st.floats(0.0, 20.0), st.floats(0.0, 1.0))
def test_nobody_has_more_before_him_than_his_weight_is_worth(
    own: int, others: int, higher: int, rivals: float, load: float
) -> None:
    found = Standing(own, others, higher, rivals)
    ahead = found.ahead(0, 0, load, rivals)
    assert higher + own <= ahead <= higher + own + math.ceil((own + 1) * rivals)
    assert found.ahead(0, 0, 0.0, math.inf) == higher + own + others
    assert found.ahead(1, 0, load, rivals) >= ahead <= found.ahead(0, 0, 1.0, rivals)


def paced(gap: float, service: float, slots: int = 8, bundles: int = 40) -> Pace:
    """A queue that was never empty."""
    pace = Pace()
    for turn in range(bundles):
        pace.issued(slots, 1, turn, turn * gap)
        pace.ended(slots, service)
    return pace


def test_nothing_is_forecast_from_a_first_run() -> None:
    pace = Pace()
    for turn, seconds in enumerate((60.0, 1e-3, 1e-3)):
        assert pace.seconds(0, 64, 0.0) is None
        pace.issued(1, 0, 10 * turn, 100.0 * turn)
        pace.ended(1, seconds)
    assert pace.seconds(0, 1, 1e6) == pytest.approx(1e-3)


def test_the_host_counts_where_it_is_slower_than_the_device() -> None:
    pace = paced(gap=3e-3, service=1e-3)
    now = 39 * 3e-3
    assert pace.seconds(0, 8, now) == pytest.approx(3e-3 + 1e-3, rel=0.01)
    assert pace.seconds(16, 8, now) == pytest.approx(3 * 3e-3 + 1e-3, rel=0.01)
    assert pace.seconds(0, 8, now + 1.0) == pytest.approx(1e-3, rel=0.2)
    assert pace.load(8) == pytest.approx(1.0, abs=0.01)


def test_gaps_in_which_there_was_nothing_to_do_are_no_cycle() -> None:
    pace = Pace()
    for turn in range(40):
        pace.issued(8, 0, 2 * turn, turn * 0.5)  # the dispatcher rested in between
        pace.ended(8, 1e-3)
    assert pace.seconds(0, 8, 39 * 0.5) == pytest.approx(1e-3, rel=0.2)
    assert pace.load(8) == 0.0


def test_a_bundle_that_others_keep_small_is_as_full_as_it_gets() -> None:
    pace = paced(gap=1e-3, service=1e-3, slots=4)
    assert pace.most(64) == 4
    pace.issued(30, 0, 40, 1.0)
    assert pace.most(64) == 30


@pytest.mark.parametrize("times", [5.0, 50.0, 0.02])
def test_a_pace_that_changes_is_found_within_a_few_bundles(times: float) -> None:
    pace = paced(gap=1e-3, service=1e-3)
    for _ in range(20):
        pace.ended(8, times * 1e-3)
    found = pace.seconds(0, 8, 1e6)
    assert found is not None and found == pytest.approx(times * 1e-3, rel=0.3)


def test_a_clock_that_jumps_is_forgotten_within_a_few_bundles() -> None:
    for jump in (3600.0, -3600.0):
        pace = paced(gap=1e-3, service=1e-3)
        for turn in range(40, 60):
            pace.issued(8, 1, turn, jump + turn * 1e-3)
            pace.ended(8, jump if turn == 40 else 1e-3)
        assert pace.seconds(0, 8, jump + 59e-3) == pytest.approx(2e-3, rel=0.2)


LIMIT = 10e-3


def ask(delay: Delay, seconds: float, now: float, load: float = 0.0) -> bool:
    return delay.late(seconds, LIMIT, load, now) is None


@given(st.lists(st.tuples(st.floats(-10.0, 1e5), st.floats(-1.0, 10.0), st.floats(0.0, 1.0)), max_size=50))
def test_whatever_was_learned_those_who_can_be_in_time_are_soon_let_in_again(history: Any) -> None:
    """Also when the clock has jumped, and everybody was refused."""
    delay, now = Delay(), 100.0
    for error, step, load in history:
        now += step
        if ask(delay, 1e-3, now, load):
            delay.ended([error], now)
    let_in = []
    for _ in range(400):
        now += 10e-3
        let_in.append(ask(delay, 1e-3, now))
        if let_in[-1]:
            delay.ended([0.0], now + 1e-3)
    assert any(let_in[:210])
    assert all(let_in[-50:])


def test_while_everybody_is_late_only_few_are_sent_to_see() -> None:
    delay, let_in = Delay(), 0
    delay.ended([1.0], 0.0)
    for turn in range(1, 10_000):
        now = turn * 1e-3
        if ask(delay, 1e-3, now):
            let_in += 1
            delay.ended([1.0], now)
    assert 5 <= let_in <= 25


def test_noise_keeps_no_more_free_than_half_of_the_time() -> None:
    delay = Delay()
    for turn in range(200):
        delay.ended([0.1 if turn % 50 == 0 else 0.0], turn * 1e-3)
    mean = delay.most(0.0, 1e9, 0.0) - 0.1
    assert delay.most(2e-3, LIMIT, 0.0) <= 2e-3 + LIMIT / 2 + max(0.0, mean) + 0.02
    quiet = Delay()
    assert quiet.most(2e-3, LIMIT, 0.5) == 2e-3
    assert quiet.most(2e-3, LIMIT, 1.0) == pytest.approx(2e-3 + LIMIT / 2)
