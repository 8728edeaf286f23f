"""First come, first served where nobody competes: nothing lost, oldest first, sizes, caps, waits."""

from __future__ import annotations

from itertools import count, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import IDLE, Queue, Ticket

from torch_mux.runtime.bundle import cap_of
from torch_mux.runtime.scheduler.base import Busy, Issue, LaneLoad, Later, View
from torch_mux.runtime.scheduler.policy import FairPolicy
from torch_mux.settings import Settings
from torch_mux.types import Quota


def one(queue: Queue, now: float, policy: FairPolicy | None = None, **settings: float) -> object:
    return (policy or FairPolicy()).form(View([queue], IDLE), now, Settings(**settings))  # type: ignore[arg-type]


def test_the_oldest_program_goes_out_whole_and_at_once() -> None:
    old = Queue("old", [Ticket(1.0, 1), Ticket(3.0, 2)])
    new = Queue("new", [Ticket(2.0, 3)])
    decision = FairPolicy().form(View([old, new], IDLE), 3.0, Settings())
    assert isinstance(decision, Issue)
    assert (decision.key, list(decision.requests), decision.lane) == ("old", list(old.requests), 0)


def test_max_bundle_and_the_plans_own_limit_hold() -> None:
    tickets = [Ticket(0.0, client) for client in range(10)]
    for slots, most, expected in ((1 << 20, 4, 4), (3, 64, 3), (1, 64, 1)):
        decision = one(Queue("a", tickets, slots=slots), 0.0, max_bundle=most)
        assert isinstance(decision, Issue)
        assert list(decision.requests) == tickets[:expected]


def test_what_is_not_compiled_blocks_nobody() -> None:
    waiting = Queue("slow", [Ticket(0.0, 1)], ready=False)
    ready = Queue("fast", [Ticket(1.0, 2)])
    decision = FairPolicy().form(View([waiting, ready], IDLE), 1.0, Settings())
    assert isinstance(decision, Issue)
    assert decision.key == "fast"
    assert FairPolicy().form(View([waiting], IDLE), 1.0, Settings()) is None


def test_max_wait_holds_until_the_time_or_a_full_bundle() -> None:
    queue = Queue("a", [Ticket(1.0, 1)])
    assert one(queue, 1.0, max_wait=0.5, max_bundle=3) == Later(1.5, {("a", False): 3})
    assert isinstance(one(queue, 1.5, max_wait=0.5, max_bundle=3), Issue)
    queue.add(Ticket(1.1, 1), Ticket(1.1, 1))
    assert isinstance(one(queue, 1.1, max_wait=0.5, max_bundle=3), Issue)


def test_nothing_coalesces_so_nothing_waits() -> None:
    assert isinstance(one(Queue("a", [Ticket(1.0, 1)], slots=1), 1.0, max_wait=9.0), Issue)


def cohort(clients: list[int], ended: float = 10.0, seconds: float = 1.0) -> FairPolicy:
    policy = FairPolicy()
    issue = Issue("a", [Ticket(8.0, client) for client in clients], 1.0)
    policy.issued(issue, 9.0)
    policy.completed(issue, ended, seconds)
    return policy


def test_a_client_alone_is_never_held() -> None:
    assert isinstance(one(Queue("a", [Ticket(10.0, 1)]), 10.0, cohort([1]), linger=5.0), Issue)
    assert isinstance(one(Queue("a", [Ticket(10.0, 2)]), 10.0, cohort([1]), linger=5.0), Issue)
    assert isinstance(one(Queue("a", [Ticket(10.0, 2)]), 10.0, cohort([1] * 16), linger=5.0), Issue)


def test_the_last_bundles_clients_are_awaited() -> None:
    policy = cohort([1, 2, 3])
    queue = Queue("a", [Ticket(10.1, 1)])
    assert one(queue, 10.1, policy, linger=0.2) == Later(10.2, {("a", False): 3})
    queue.add(Ticket(10.1, 3), Ticket(10.1, 2))
    assert isinstance(one(queue, 10.1, policy, linger=0.2), Issue)


def test_the_linger_ends_and_is_no_longer_than_the_bundle() -> None:
    queue = Queue("a", [Ticket(10.0, 1)])
    assert isinstance(one(queue, 10.2, cohort([1, 2]), linger=0.2), Issue)
    assert one(queue, 10.0, cohort([1, 2], seconds=0.05), linger=0.2) == Later(10.05, {("a", False): 2})
    assert isinstance(one(queue, 10.0, cohort([1, 2]), linger=0.0), Issue)


def test_another_program_goes_out_while_a_cohort_is_awaited() -> None:
    policy = cohort([1, 2])
    queues = [Queue("a", [Ticket(10.0, 1)]), Queue("b", [Ticket(10.1, 3)])]
    decision = policy.form(View(queues, IDLE), 10.1, Settings(linger=1.0))
    assert isinstance(decision, Issue)
    assert decision.key == "b"


def test_clients_who_stop_coming_are_awaited_less_often() -> None:
    policy, held = FairPolicy(), 0
    for turn in range(64):
        now = float(turn)
        queue = Queue("a", [Ticket(now, 1), *([Ticket(now, 100 + turn)] if turn % 2 else [])])
        held += isinstance(one(queue, now, policy, linger=0.5), Later)
        issue = Issue("a", tuple(queue.requests), 1.0)
        policy.issued(issue, now)
        policy.completed(issue, now + 0.9, 0.9)
    assert 0 < held < 20


def test_a_busy_device_holds_what_its_cohort_will_join() -> None:
    policy = FairPolicy()
    policy.issued(Issue("a", [Ticket(0.0, 1), Ticket(0.0, 2)], 1.0), 0.0)
    view = View([Queue("a", [Ticket(0.5, 1)])], (LaneLoad(1),))
    assert policy.form(view, 0.5, Settings()) == Busy({("a", False): 2})


def test_lanes_fill_up_to_in_flight_and_order_is_kept_on_the_first() -> None:
    settings = Settings(in_flight=2)
    queue = Queue("a", [Ticket(0.0, 1)])
    decision = FairPolicy().form(View([queue], (LaneLoad(2), LaneLoad(1))), 0.0, settings)
    assert isinstance(decision, Issue)
    assert decision.lane == 1
    assert FairPolicy().form(View([queue], (LaneLoad(2), LaneLoad(2))), 0.0, settings) == Busy()
    queue.ordered = True
    assert FairPolicy().form(View([queue], (LaneLoad(2), LaneLoad(0))), 0.0, settings) == Busy()


@pytest.mark.parametrize(
    ("share", "sms", "cap"), [(1.0, 132, 132), (0.5, 132, 66), (0.01, 132, 2), (0.001, 132, 1), (0.3, 1, 1)]
)
def test_caps_round_up_to_whole_multiprocessors(share: float, sms: int, cap: int) -> None:
    assert cap_of(share, sms) == cap


arrivals = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(0, 4),
        st.floats(0.0, 0.01),
        st.sampled_from([0.1, 0.25, 0.5, 1.0]),
    ),
    max_size=60,
)


def expected_share(taken: Any) -> float:
    tenants = {ticket.quota.tenant for ticket in taken}
    most = [max(t.quota.sms for t in taken if t.quota.tenant == tenant) for tenant in tenants]
    return min(1.0, sum(most))


@given(
    arrivals=arrivals,
    most=st.integers(1, 8),
    wait=st.sampled_from([0.0, 0.003]),
    linger=st.sampled_from([0.0, 0.002]),
    lanes=st.integers(1, 3),
    body=st.floats(1e-4, 0.01),
    alone=st.booleans(),
)
def test_no_request_is_lost_and_order_sizes_and_caps_hold(
    arrivals: list[tuple[str, int, float, float]],
    most: int,
    wait: float,
    linger: float,
    lanes: int,
    body: float,
    alone: bool,
) -> None:
    """Simulates the dispatcher: each goes out once, within the limits, in order a program and tenant."""
    settings = Settings(max_bundle=most, max_wait=wait, linger=linger, in_flight=2)
    policy, numbers = FairPolicy(), count()
    now = 0.0
    coming: list[tuple[str, Ticket]] = []
    for key, client, gap, sms in arrivals:
        now += gap
        coming.append(
            (key, Ticket(now, client, Quota("all" if alone else f"t{client}", sms=sms), next(numbers)))
        )
    queues: dict[str, list[Ticket]] = {}
    flying: list[list[tuple[float, Issue]]] = [[] for _ in range(lanes)]
    out: list[tuple[str, Ticket]] = []
    now = 0.0
    for _ in range(20 * len(arrivals) + 20):
        while coming and coming[0][1].arrival <= now:
            key, ticket = coming.pop(0)
            queues.setdefault(key, []).append(ticket)
        for lane in flying:
            while lane and lane[0][0] <= now:
                _, issue = lane.pop(0)
                policy.completed(issue, now, body)
        pending = [Queue(key, tickets) for key, tickets in queues.items() if tickets]
        pending.sort(key=lambda queue: queue.requests.oldest.seq)
        decision = policy.form(View(pending, [LaneLoad(len(lane)) for lane in flying]), now, settings)
        events = [lane[0][0] for lane in flying if lane] + [ticket.arrival for _, ticket in coming[:1]]
        if isinstance(decision, Issue):
            taken = list(decision.requests)
            assert 1 <= len(taken) <= most
            assert not alone or taken == queues[decision.key][: len(taken)]
            assert decision.share == pytest.approx(expected_share(taken))
            policy.issued(decision, now)
            queues[decision.key] = [one for one in queues[decision.key] if one not in taken]
            lane = flying[decision.lane]
            assert len(lane) < 2
            lane.append((max([now, *(end for end, _ in lane)]) + body, decision))
            out += [(decision.key, ticket) for ticket in taken if isinstance(ticket, Ticket)]
        elif isinstance(decision, Later):
            assert now < decision.until <= now + max(wait, linger) + 1e-9
            now = min([decision.until, *events])
        elif events:
            assert decision is not None or not pending
            now = max(now, min(events))
        else:
            assert not pending, "pending requests and nothing will ever happen"
            break
    assert len(out) == len(arrivals)
    assert len({id(ticket) for _, ticket in out}) == len(arrivals)
    for key, client in product("abc", range(5)):
        mine = [ticket.seq for other, ticket in out if other == key and (alone or ticket.client == client)]
        assert mine == sorted(mine)
