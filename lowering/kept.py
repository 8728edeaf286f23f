"""Files that later processes read: whole, as they were written, or not at all.

A file is a SHA-256 digest and its payload. It is written beside its place and renamed, so readers never see a
part of it, and of two processes that write one name the last wins; what does not match its digest counts as
absent.

A folder is pruned when something is written: what nobody read or wrote for 60 days goes, and beyond 512 MiB
what was used longest ago. Other processes may read, write and prune meanwhile: who has opened a file keeps
it, and a file that is gone counts as absent.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Final

import torch

from torch_mux import compat

__all__ = ["MOST_AGE", "Damaged", "digest_of", "model_of", "read", "sources", "write"]

log = logging.getLogger(__name__)

_DIGEST: Final = hashlib.sha256().digest_size
#: Seconds after which a file that nobody used goes.
MOST_AGE: Final = 60 * 24 * 3600.0
_MOST_BYTES: Final = 512 << 20
#: What a file is called while it is written, and after how many seconds its writer is taken to be dead.
_UNFINISHED: Final = ".new-"
_DEAD: Final = 3600.0
_SOURCES: Final = ("*.py", "*.json", "*.cpp", "*.h")


class Damaged(Exception):
    """A file is not what was written."""


@functools.cache
def sources() -> str:
    """Digest of lowering's own sources and of ``torch_mux.compat``."""
    found = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(compat.__file__).parent):
        for path in sorted(path for pattern in _SOURCES for path in folder.rglob(pattern)):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def digest_of(*parts: object) -> str:
    """A name for what these, by their texts, and lowering's sources decide."""
    return hashlib.sha256(repr((*parts, sources())).encode()).hexdigest()


def model_of(device: torch.device) -> tuple[object, ...]:
    """A device and what kind of GPU it is."""
    if device.type != "cuda":
        return (str(device),)
    found = torch.cuda.get_device_properties(device)
    return (str(device), found.name, found.major, found.minor, found.multi_processor_count)


def write(folder: str, name: str, payload: bytes) -> None:
    """Keeps ``payload`` in a folder of the cache, and prunes the folder.

    Raises:
        OSError: a full disk, or a folder of somebody else.
    """
    place = compat.cache_folder(folder)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place, prefix=_UNFINISHED, delete=False) as file:
        file.write(hashlib.sha256(payload).digest() + payload)
    os.replace(file.name, place / name)
    _prune(place, name)


def _prune(place: Path, newest: str) -> None:
    """Removes what is too old or too much, but not ``newest``."""
    now = time.time()
    found: list[tuple[float, int, Path]] = []
    for path in place.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:
            log.debug("%s went meanwhile: another process pruned it, or has finished writing it", path.name)
            continue
        found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in found)
    for used, size, path in sorted(found):
        if path.name.startswith(_UNFINISHED):
            spent = now - used > _DEAD
        else:
            spent = path.name != newest and (now - used > MOST_AGE or total > _MOST_BYTES)
        if spent:
            path.unlink(missing_ok=True)
            total -= size


def read(folder: str, name: str) -> bytes | None:
    """What was kept under that name, or None; a file that is there and cannot be read is logged.

    Raises:
        Damaged: it is not what was written.
    """
    path = compat.cache_folder(folder) / name
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        log.warning("%s cannot be read and is made anew", path, exc_info=True)
        return None
    with contextlib.suppress(OSError):  # of a cache that may only be read, nothing is pruned from here
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    digest, payload = whole[:_DIGEST], whole[_DIGEST:]
    if hashlib.sha256(payload).digest() != digest:
        raise Damaged(f"{name} in {folder} is damaged")
    return payload
