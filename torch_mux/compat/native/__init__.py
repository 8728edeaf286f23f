"""Checks of many tensors, and the calls of one bundle, in one step: C++ where a compiler builds it.

Whether the weights of 16 models are what they were is some 10,000 version counters, addresses and dict
entries a round. At 50 to 100 ns each in Python that is as long as the device takes; in C++ it is a few ns
each. A bundle's waits, events, copy and graph launch are one call in place of five through torch, each of
which allocates, counts references or asks for the current device. The module is built once a machine and
version of torch, as Triton builds its launchers, and kept on disk; Python does the same where no compiler is.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from torch_mux.compat.caches import cache_folder

__all__ = ["Checks", "Enqueue", "PythonChecks", "Stillness", "build", "checks", "enqueue", "status"]

log = logging.getLogger(__name__)

_SOURCES = [Path(__file__).with_name(name) for name in ("checks.cpp", "enqueue.cpp", "tables.cpp")]
_HEADERS = [Path(__file__).with_name(name) for name in ("enqueue.h", "tables.h", "weights.h")]
_TORCH = Path(torch.__file__).parent
_NAME = "torch_mux_checks"
_TIMEOUT = 300.0
_version = attrgetter("_version")
_cdata = attrgetter("_cdata")
_address = Tensor.data_ptr


class Checks(Protocol):
    """What both forms offer.

    Attributes:
        free: :class:`Enqueue` can compare what ``weights`` remembers, without the interpreter's lock.
    """

    free: bool

    def weights(self, counted: Sequence[Tensor], placed: Sequence[Tensor]) -> Any:
        """Remembers the version counters of ``counted`` and the addresses of ``placed``.

        Args:
            counted: tensors with a version counter; only the counter is kept.
            placed: tensors that are held weakly.
        """
        ...

    def changed(self, known: Any) -> bool:
        """Whether a counter or an address is another one now; a collected tensor answers no."""
        ...

    def same(
        self,
        tables: tuple[dict[Any, Any], ...],
        values: list[Any],
        empty: tuple[dict[Any, Any], ...],
        flags: tuple[dict[str, Any], ...],
        key: str,
        wanted: list[Any],
    ) -> bool:
        """Whether dicts hold what they held.

        Args:
            tables: their values, one dict after another, must be the very objects of ``values``.
            empty: must be empty.
            flags: their entry ``key`` must be the very object in ``wanted``.
        """
        ...

    def watch(self, dicts: tuple[dict[Any, Any], ...]) -> bool:
        """Has writes to these dicts counted from now on; False where nothing counts them."""
        ...

    def count(self) -> int:
        """Writes to watched dicts so far; a write is counted before it is made, under the GIL."""
        ...

    def fill(
        self, address: int, slots: int, cap: int, rows: list[int], columns: list[list[Tensor]], /
    ) -> None:
        """Writes the table of a bundle, two words and a section each for ``rows`` and ``columns``.

        See :class:`torch_mux.runtime.ring.TableLayout`; a section of fewer than ``slots`` is padded with its
        first.

        Args:
            address: of so many 64-bit words on the host.
            columns: tensors whose addresses are written, as many as rows.
        """
        ...


class Enqueue(Protocol):
    """Puts a captured bundle on a stream; everything is given by address."""

    def record(self, event: int, stream: int) -> None:
        """Records an event that exists.

        Raises:
            RuntimeError: what CUDA says.
        """
        ...

    def enqueue(
        self,
        stream: int,
        marks: list[int],
        start: int,
        table: int,
        host: int,
        nbytes: int,
        graph: int,
        end: int,
        watched: list[Any],
        /,
    ) -> bool:
        """Waits for ``marks``, records ``start``, copies ``nbytes`` to ``table``, launches, records ``end``.

        Returns:
            Whether one of ``watched``, which :meth:`Checks.weights` remembered, has changed.

        Raises:
            RuntimeError: what CUDA says.
        """
        ...

    def await_any(self, events: list[int], seconds: float, flag: int, /) -> bool:
        """Blocks, without the GIL, until one of the events was reached; False: none was in that time.

        It also ends when the int32 at the address ``flag`` is not 0; 0 is no address.

        What CUDA reports in place of an event ends the wait too; who asks for that event gets it.
        """
        ...


class PythonChecks:
    """The same in Python."""

    free = False

    def weights(self, counted: Sequence[Tensor], placed: Sequence[Tensor]) -> Any:
        """See :class:`Checks`."""
        held = list(counted)
        return held, list(map(_version, held)), [(ref(tensor), tensor.data_ptr()) for tensor in placed]

    def changed(self, known: Any) -> bool:
        """See :class:`Checks`."""
        counted, versions, placed = known
        if list(map(_version, counted)) != versions:
            return True
        moved = False
        for reference, address in placed:
            tensor = reference()
            if tensor is None:
                return False
            moved = moved or tensor.data_ptr() != address
        return moved

    def same(
        self,
        tables: tuple[dict[Any, Any], ...],
        values: list[Any],
        empty: tuple[dict[Any, Any], ...],
        flags: tuple[dict[str, Any], ...],
        key: str,
        wanted: list[Any],
    ) -> bool:
        """See :class:`Checks`."""
        now = [id(value) for table in tables for value in table.values()]
        return (
            now == list(map(id, values))
            and not any(empty)
            and list(map(id, map(itemgetter(key), flags))) == list(map(id, wanted))
        )

    def watch(self, dicts: tuple[dict[Any, Any], ...]) -> bool:
        """See :class:`Checks`."""
        return False

    def count(self) -> int:
        """See :class:`Checks`."""
        return 0

    def fill(
        self, address: int, slots: int, cap: int, rows: list[int], columns: list[list[Tensor]], /
    ) -> None:
        """See :class:`Checks`."""
        active, padding = len(rows), slots + slots % 2 - len(rows)
        if not 0 < active <= slots or any(len(column) != active for column in columns):
            raise ValueError(f"{active} rows, or as many tensors, do not fit {slots} slots")
        words = [active | cap << 32, slots | cap << 32, *rows, *rows[:1] * padding]
        for column in columns:
            addresses = list(map(_address, column))
            words += addresses + addresses[:1] * padding
        table = array("q", words)
        ctypes.memmove(address, table.buffer_info()[0], 8 * len(words))


class _NativeChecks:
    """The module built from ``checks.cpp``."""

    free = True

    def __init__(self, module: Any) -> None:
        self._weights = module.weights
        self.changed = module.changed
        self.same = module.same
        self.watch = module.watch
        self.count = module.count
        probe = torch.empty(1, device="cpu")
        fits = module.fits(torch._C.TensorBase, probe, _cdata(probe))
        self.fill = module.fill if fits else PythonChecks().fill

    def weights(self, counted: Sequence[Tensor], placed: Sequence[Tensor]) -> Any:
        """See :class:`Checks`."""
        return self._weights(list(map(_cdata, counted)), list(map(_cdata, placed)))


class Stillness:
    """Dicts whose entries need no second look until one of them is written.

    Python 3.12 counts writes (PEP 699's replacement of dict versions, ``PyDict_Watch``); before, and where no
    compiler is, nothing is ever still and the caller looks every time.

    Args:
        dicts: from now on; what they hold has to be looked at once after this.
    """

    __slots__ = ("_count", "_counted", "_seen")

    def __init__(self, dicts: Iterable[dict[Any, Any]]) -> None:
        form = checks()
        self._counted, self._count = form.watch(tuple(dicts)), form.count
        self._seen = -1

    def confirmed(self, look: Callable[[], bool]) -> bool:
        """``look()``, not asked again while no watched dict anywhere was written since it was true."""
        if not self._counted:
            return look()
        now = self._count()
        if now == self._seen:
            return True
        true = look()
        if true:
            self._seen = now  # counted before the look: what is written meanwhile makes it look again
        return true


_lock = threading.Lock()
_state: dict[str, Any] = {
    "checks": PythonChecks(),
    "enqueue": None,
    "status": "Python (not built yet)",
    "tried": False,
}


def checks() -> Checks:
    """The fastest form there is now. What one form remembers, only that form can compare."""
    found: Checks = _state["checks"]
    return found


def enqueue() -> Enqueue | None:
    """The C++ form, where it is built and torch has loaded a CUDA runtime."""
    found: Enqueue | None = _state["enqueue"]
    return found


def status() -> str:
    """Which form is in use and why, as a phrase."""
    return str(_state["status"])


def build() -> Checks:
    """Loads the C++ form, building it first where it was not built before: some seconds, once a machine.

    A machine without a C++ compiler, or ``TORCH_MUX_NATIVE=0``, keeps the Python form: answers are the same,
    a round of many models costs more host time. That is logged once and shown by ``torch-mux info``.
    """
    with _lock:
        if not _state["tried"]:
            _state["tried"] = True
            _attempt()
    return checks()


def _attempt() -> None:
    if os.environ.get("TORCH_MUX_NATIVE", "1") == "0":
        _state["status"] = "Python (TORCH_MUX_NATIVE=0)"
        return
    try:
        module = _load()
    except (OSError, ImportError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        _state["status"] = f"Python ({type(error).__name__}: {str(detail).strip().splitlines()[0]})"
        log.warning(
            "the checks of weights run in Python, at more host time a round: building them failed: %s", detail
        )
        return
    _state["checks"] = _NativeChecks(module)
    _state["enqueue"] = module if module.can_enqueue() else None
    _state["status"] = f"C++ ({module.__file__})"


def _load() -> Any:
    source = b"".join(path.read_bytes() for path in (*_SOURCES, *_HEADERS))
    command = _command()
    versions = f"{torch.__version__} {sys.version} {' '.join(command)}"
    digest = hashlib.sha256(source + versions.encode()).hexdigest()[:20]
    path = _folder() / f"{_NAME}-{digest}{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"
    if path.exists():
        try:
            return _imported(path)
        except ImportError as error:
            log.info("%s is damaged and is built again: %s", path, error)
    # Under another name first: a second process never loads half a file.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        subprocess.run(
            [*command, *map(str, _SOURCES), "-o", str(made), f"-L{_TORCH / 'lib'}", "-lc10", "-ldl"],
            check=True, capture_output=True, text=True, timeout=_TIMEOUT,
        )  # fmt: skip
        os.replace(made, path)
    return _imported(path)


def _imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(_NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _folder() -> Path:
    """Where it is kept: ``TORCH_MUX_CACHE_DIR``, or the user's cache folder; nobody else may write there."""
    folder = cache_folder("native")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _command() -> list[str]:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    includes = [_TORCH / "include", sysconfig.get_path("include")]
    return [*compiler, "-O2", "-std=c++20", "-shared", "-fPIC", *(f"-I{path}" for path in includes)]
