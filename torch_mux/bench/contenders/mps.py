"""NVIDIA's multi-process service, started for one measurement and stopped after it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from torch_mux.bench.contenders.base import NotApplicable

__all__ = ["Service", "service"]

_CONTROL: Final = "nvidia-cuda-mps-control"
_PATIENCE: Final = 30.0


class Service:
    """A control daemon with a folder of its own, so that nobody else's is touched.

    Attributes:
        environment: what makes a process that starts with it a client.
    """

    def __init__(self, control: str, folder: Path) -> None:
        self._control = control
        self.environment = {
            "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(folder / "log"),
        }
        for path in self.environment.values():
            Path(path).mkdir()
        self._said = folder / "said"

    def start(self) -> None:
        """Starts the daemon.

        Raises:
            NotApplicable: it did not start; the message has its words.
        """
        with self._said.open("w") as said:  # a pipe would stay open as long as the daemon lives
            done = subprocess.run(
                [self._control, "-d"],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                timeout=_PATIENCE,
                check=False,
            )
        if done.returncode:
            raise NotApplicable(f"{_CONTROL} -d failed: {self._said.read_text().strip()[-300:]}")

    def ask(self, command: str) -> str:
        """What the daemon answers."""
        done = subprocess.run(
            [self._control],
            input=f"{command}\n",
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
        )
        return done.stdout.strip()

    def verify(self) -> None:
        """Makes sure that processes are served.

        Raises:
            NotApplicable: none is a client, so what is measured would be something else.
        """
        servers = [line for line in self.ask("get_server_list").splitlines() if line.strip().isdigit()]
        if not servers:
            raise NotApplicable("the processes run, but none of them as a client of MPS")

    def stop(self) -> None:
        """Ends the daemon and its servers."""
        self.ask("quit")


@contextmanager
def service() -> Iterator[Service]:
    """A daemon that runs meanwhile.

    Raises:
        NotApplicable: it is not installed, or does not start.
    """
    control = shutil.which(_CONTROL)
    if control is None:
        raise NotApplicable(f"{_CONTROL} is not installed here")
    # Its socket's path has to be short.
    with tempfile.TemporaryDirectory(prefix="mps-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        found = Service(control, Path(folder))
        found.start()
        try:
            yield found
        finally:
            found.stop()
