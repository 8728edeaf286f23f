"""Files of the cache: bounded by bytes and by age, those used longest ago gone first."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from torch_mux import compat
from torch_mux.lowering import kept

DAY = 24 * 3600.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compat, "cache_folder", lambda name: tmp_path / name)
    return tmp_path / "plans"


def used(path: Path, ago: float) -> None:
    then = time.time() - ago
    os.utime(path, (then, then))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_used_longest_ago_makes_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_MOST_BYTES", 5000)
    for number in range(4):
        kept.write("plans", f"p{number}", b"x" * 1000)
        used(folder / f"p{number}", 100.0 - number)
    assert kept.read("plans", "p0") == b"x" * 1000, "from now on it is the one used last"
    kept.write("plans", "p4", b"x" * 1000)
    assert names(folder) == {"p0", "p2", "p3", "p4"}
    kept.write("plans", "p5", b"x" * 3500)
    assert names(folder) == {"p4", "p5"}
    kept.write("plans", "large", b"x" * 9000)
    assert names(folder) == {"large"}, "what was just written stays, whatever its size"
    assert kept.read("plans", "large") == b"x" * 9000


def test_what_nobody_used_for_long_goes(folder: Path) -> None:
    for name in ("old", "read", "young"):
        kept.write("plans", name, b"x")
    used(folder / "old", kept.MOST_AGE + DAY)
    used(folder / "read", kept.MOST_AGE + DAY)
    used(folder / "young", kept.MOST_AGE - DAY)
    assert kept.read("plans", "read") == b"x"
    kept.write("plans", "new", b"x")
    assert names(folder) == {"read", "young", "new"}
    assert kept.read("plans", "old") is None


def test_what_a_killed_writer_left_goes_and_what_one_is_writing_stays(folder: Path) -> None:
    kept.write("plans", "first", b"x")
    left, fresh = folder / ".new-left", folder / ".new-fresh"
    left.write_bytes(b"half")
    fresh.write_bytes(b"half")
    used(left, 2 * 3600.0)
    kept.write("plans", "second", b"x")
    assert names(folder) == {"first", "second", ".new-fresh"}


def test_a_clock_that_went_back_takes_nothing_that_was_just_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_MOST_BYTES", 2500)
    for number in range(2):
        kept.write("plans", f"p{number}", b"x" * 1000)
        used(folder / f"p{number}", -10 * DAY)
    kept.write("plans", "now", b"x" * 1000)
    assert "now" in names(folder) and len(names(folder)) == 2


def test_a_folder_that_cannot_be_touched_is_read_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.write("plans", "p", b"x")

    def refuses(*_: object, **named: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "utime", refuses)
    assert kept.read("plans", "p") == b"x"


def _worker(folder: str, number: int) -> None:
    os.environ["TORCH_MUX_CACHE_DIR"] = folder
    kept._MOST_BYTES = 20_000  # type: ignore[misc]
    for turn in range(60):
        name = f"p{(number * 7 + turn) % 40}"
        payload = name.encode() * 300
        kept.write("plans", name, payload)
        for other in range(40):
            found = kept.read("plans", f"p{other}")
            assert found is None or found == f"p{other}".encode() * 300


def test_processes_that_write_read_and_prune_at_once_see_whole_files_or_none(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(str(tmp_path), number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    sizes = [path.stat().st_size for path in (tmp_path / "plans").iterdir()]
    assert sizes and sum(sizes) <= 20_000 + max(sizes)


def test_a_file_that_cannot_be_read_is_said_and_counts_as_absent(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert kept.read("plans", "never-written") is None
    assert not caplog.records
    (folder / "a-folder").mkdir(parents=True)
    assert kept.read("plans", "a-folder") is None
    assert "a-folder cannot be read" in caplog.text
