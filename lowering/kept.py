"""Files that later processes read: whole, as they were written, or not at all.

A file is a SHA-256 digest and its payload. It is written beside its place and renamed, so readers never see a
part of it, and of two processes that write one name the last wins; what does not match its digest counts as
absent.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Final

import torch

from torch_mux import compat

__all__ = ["Damaged", "digest_of", "model_of", "read", "sources", "write"]

_DIGEST: Final = hashlib.sha256().digest_size
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
    """Keeps ``payload`` in a folder of the cache.

    Raises:
        OSError: a full disk, or a folder of somebody else.
    """
    place = compat.cache_folder(folder)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place, delete=False) as file:
        file.write(hashlib.sha256(payload).digest() + payload)
    os.replace(file.name, place / name)


def read(folder: str, name: str) -> bytes | None:
    """What was kept under that name, or None.

    Raises:
        Damaged: it is not what was written.
    """
    try:
        whole = (compat.cache_folder(folder) / name).read_bytes()
    except OSError:
        return None
    digest, payload = whole[:_DIGEST], whole[_DIGEST:]
    if hashlib.sha256(payload).digest() != digest:
        raise Damaged(f"{name} in {folder} is damaged")
    return payload
