"""Schedules on disk: a later process with the same launches, sources and multiprocessors makes none."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch_mux.lowering import kept
from torch_mux.lowering.kernels.operation import Operation
from torch_mux.lowering.pack.costs import KernelCosts
from torch_mux.lowering.pack.schedule import Schedule, Strand, Word
from torch_mux.lowering.pack.search import pack

__all__ = ["schedule_of"]

log = logging.getLogger(__name__)

_FOLDER = "schedules"


def schedule_of(
    members: Sequence[Sequence[Operation]],
    sms: int,
    *,
    match: bool = True,
    keep: bool = True,
    pause: Callable[[], object] = lambda: None,
) -> Schedule:
    """The schedule of several members' launches by :class:`KernelCosts`; see :func:`pack`.

    Args:
        keep: reads it from disk where it is there, and leaves it there where it is not.
        pause: see :func:`pack`.
    """
    name = kept.digest_of(members, sms, match)
    found = _read(name, members) if keep else None
    if found is None:
        found = pack(members, KernelCosts(sms), sms, match=match, pause=pause)
        if keep:
            _write(name, found)
    return found


def _write(name: str, schedule: Schedule) -> None:
    words = [
        {"seconds": word.seconds, "strands": [[strand.sms, strand.steps] for strand in word.strands]}
        for word in schedule.words
    ]
    try:
        kept.write(_FOLDER, name, json.dumps({"words": words, "serial": schedule.serial}).encode())
    except OSError as error:
        log.info("the schedule was not kept on disk: %s", error)


def _read(name: str, members: Sequence[Sequence[Operation]]) -> Schedule | None:
    try:
        payload = kept.read(_FOLDER, name)
        found = None if payload is None else _parsed(json.loads(payload), members)
    except (kept.Damaged, ValueError, KeyError, TypeError) as error:
        log.info("a schedule on disk cannot be read and is made again: %s", error)
        return None
    return found


def _parsed(data: Any, members: Sequence[Sequence[Operation]]) -> Schedule:
    """The schedule that was written.

    Raises:
        KeyError, TypeError: it is no schedule.
        ValueError: it is not one of these members.
    """
    words = tuple(
        Word(
            tuple(
                Strand(tuple(tuple((int(m), int(index)) for m, index in step) for step in steps), int(sms))
                for sms, steps in word["strands"]
            ),
            float(word["seconds"]),
        )
        for word in data["words"]
    )
    schedule = Schedule(tuple(map(tuple, members)), words, float(data["serial"]))
    if not schedule.complete:
        raise ValueError("it does not have every launch once and in order")
    return schedule
