"""Which way a mix runs: nothing is built in a burst, both ways are measured, the faster one stays."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_mux import compat
from torch_mux.lowering import kept
from torch_mux.report import _mix_lines
from torch_mux.runtime import verdicts
from torch_mux.runtime.mixes import Mix, MixBook, MixState
from torch_mux.runtime.verdicts import AGAIN, ENOUGH, MixRun, Verdict

KEY = (("a", 1), ("b", 2))


def decided(own: float, joint: float, noise: float = 0.0, bundles: int = 40) -> Verdict:
    found, draw = Verdict(), random.Random(0)
    for _ in range(bundles):
        way = found.next()
        found.observe(way, (joint if way else own) * draw.uniform(1.0 - noise, 1.0 + noise))
    return found


@given(own=st.floats(1e-4, 1e-2), ratio=st.floats(0.3, 3.0))
def test_the_faster_way_stays(own: float, ratio: float) -> None:
    found = decided(own, own * ratio)
    if not 0.96 < ratio < 0.98:
        assert found.joint is (ratio < 0.97)
    assert found.seconds(False) == pytest.approx(own) and found.seconds(True) == pytest.approx(own * ratio)


def test_both_take_turns_first_and_the_loser_is_measured_again_rarely() -> None:
    found, ways = Verdict(), []
    for _ in range(4 * ENOUGH):
        ways.append(found.next())
        found.observe(ways[-1], 2e-3 if ways[-1] else 1e-3)
    assert ways[: 2 * ENOUGH : 2] == [True] * ENOUGH and ways[1 : 2 * ENOUGH : 2] == [False] * ENOUGH
    assert "own plans beside each other 1000 us, one plan 2000 us; own plans are used" in found.text
    ways = []
    for _ in range(2 * AGAIN):
        ways.append(found.next())
        found.observe(ways[-1], 2e-3 if ways[-1] else 1e-3)
    assert ways.count(True) == 2


def test_a_small_advantage_changes_nothing() -> None:
    found = Verdict.known(own=1e-3, joint=0.9e-3)
    assert found.joint is True
    for _ in range(20):
        found.observe(True, 1.01e-3)
    assert found.joint is True, "hysteresis"
    for _ in range(20):
        found.observe(True, 1.1e-3)
    assert found.joint is False
    for _ in range(20):
        found.observe(True, 0.99e-3)
    assert found.joint is False


def test_what_was_measured_before_the_joint_plan_was_there_does_not_count() -> None:
    found = Verdict()
    for _ in range(9):
        found.observe(False, 5e-3)
    assert found.seconds(False) == 5e-3 and found.joint is None
    for _ in range(3 * ENOUGH):
        way = found.next()
        found.observe(way, 2e-3 if way else 1e-3)
    assert found.joint is False and found.seconds(False) == 1e-3


def test_a_run_is_the_sum_of_its_members_and_one_that_failed_is_none() -> None:
    seen: list[tuple[bool, float]] = []
    run = MixRun(True, 3, lambda joint, seconds: seen.append((joint, seconds)))
    for seconds in (1.0, 2.0, 4.0):
        assert seen == []
        run.landed(seconds, failed=False)
    assert seen == [(True, 7.0)]
    broken = MixRun(False, 2, lambda joint, seconds: seen.append((joint, seconds)))
    broken.landed(1.0, failed=True)
    broken.landed(1.0, failed=False)
    assert len(seen) == 1


def test_a_burst_builds_nothing_and_a_mix_that_goes_on_does() -> None:
    book = MixBook()
    book.after = 1.0
    for number in range(1000):
        mix = book.see(KEY, ["A", "B"], number * 0.9e-3)
    assert not mix.worthwhile, "a thousand within 0.9 s"
    for number in range(10):
        mix = book.see(KEY, ["A", "B"], 10.0 + number * 0.5)
    assert not mix.worthwhile, "twice a second"
    for number in range(40):
        mix = book.see(KEY, ["A", "B"], 20.0 + number * 0.03)
    assert mix.worthwhile
    book.after = 0.0
    other = book.see((("a", 2), ("b", 2)), ["A", "B"], 30.0)
    assert not other.worthwhile
    assert book.see((("a", 2), ("b", 2)), ["A", "B"], 3000.0).worthwhile


def test_a_mix_says_which_way_it_runs_and_why() -> None:
    mix = Mix(KEY, ("A", "B"), state=MixState.READY)
    for _ in range(3 * ENOUGH):
        way = mix.verdict.next()
        mix.measured(way, 2e-3 if way else 1e-3)
    text = "\n".join(_mix_lines(mix.report()))
    assert "runs as its programs' own plans, which are faster" in text
    assert "own plans beside each other 1000 us, one plan 2000 us; own plans are used" in text
    for _ in range(20):
        mix.measured(True, 0.5e-3)
    assert mix.state is MixState.READY and mix.report().joint_seconds == 0.5e-3


def test_later_processes_know_and_damaged_files_are_measured_again(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "cache_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(kept, "compat", SimpleNamespace(cache_folder=compat.cache_folder))
    assert verdicts.read("name") is None
    verdicts.write("name", Verdict())
    assert verdicts.read("name") is None, "nothing was measured"
    verdicts.write("name", decided(1e-3, 2e-3))
    found = verdicts.read("name")
    assert found is not None and found.joint is False
    assert (found.seconds(False), found.seconds(True)) == (pytest.approx(1e-3), pytest.approx(2e-3))
    (tmp_path / "mixes" / "name").write_bytes(b"x" * 40)
    assert verdicts.read("name") is None
