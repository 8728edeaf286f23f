"""CPU time of this process by thread, those of libraries included."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path
from typing import Final

__all__ = ["thread_seconds"]

_TASKS: Final = Path("/proc/self/task")
_COUNTERS: Final = "schedstat"
_NUMBER: Final = re.compile(r"[-_: (]*\d+\)?$")


def thread_seconds() -> dict[tuple[str, int], float]:
    """Seconds that each other thread than the caller's has had of a processor so far, by name and number.

    Python's threads have the names that Python knows, without the number at their end, and all others the
    system's. Empty where the system does not tell it: anything but Linux, or a kernel without such counters.
    """
    own = threading.get_native_id()
    if not (_TASKS / str(own) / _COUNTERS).is_file():
        return {}
    names = {one.native_id: one.name for one in threading.enumerate()}
    found: dict[tuple[str, int], float] = {}
    for task in os.listdir(_TASKS):
        number = int(task)
        if number == own:
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            spent = int((_TASKS / task / _COUNTERS).read_text().split()[0]) * 1e-9
            name = names.get(number) or (_TASKS / task / "comm").read_text().strip()
            found[_NUMBER.sub("", name) or name, number] = spent
    return found
