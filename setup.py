"""The wheel: pure Python, or with ``TORCH_MUX_COMPILED=1`` with a request's path compiled by mypyc.

All else is in pyproject.toml. mypyc (https://mypyc.readthedocs.io) compiles typed modules as they are, so
both wheels are made of the same sources; ``docs/design/runtime.md`` tells what that gains and what it asks.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NESTED = {"torch_mux": "torch_mux", "lowering": "torch_mux/lowering", "runtime": "torch_mux/runtime"}
#: What a request goes through; ``*`` is every file of a folder. Classes that are referred to weakly, whose
#: objects users get, or that a simulated device inherits from, stay interpreted.
HOT = (
    "runtime/scheduler/*",
    "runtime/alarms",
    "runtime/accounting",
    "runtime/admission",
    "runtime/busy",
    "runtime/bundle",
    "runtime/companions",
    "runtime/dispatch",
    "runtime/driver",
    "runtime/forecasts",
    "runtime/holdings",
    "runtime/line",
    "runtime/memory",
    "runtime/queues",
    "runtime/rates",
    "runtime/request",
    "runtime/retirement",
    "runtime/ring",
    "runtime/runner",
    "runtime/shares",
    "runtime/submission",
    "runtime/tally",
    "runtime/verdicts",
    "runtime/executors/device_clock",
    "runtime/executors/lane_set",
)
_CONFIG = """[mypy]
follow_imports = silent
ignore_missing_imports = True
[mypy-torch.*,triton.*,sympy.*]
follow_imports = skip
"""


def extensions() -> list[Any]:
    """mypyc's extension modules."""
    from mypyc.build import mypycify

    view = ROOT / "build" / "compiled"
    shutil.rmtree(view, ignore_errors=True)
    for folder, nested in NESTED.items():
        shutil.copytree(ROOT / folder, view / nested, dirs_exist_ok=True)
    (view / "mypy.ini").write_text(_CONFIG)
    files = sorted(
        str(found.relative_to(view)) for name in HOT for found in view.glob(f"torch_mux/{name}.py")
    )
    here = Path.cwd()
    os.chdir(view)  # mypyc names modules by where they lie
    try:
        found: list[Any] = mypycify(["--config-file", "mypy.ini", *files], target_dir=str(view / "c"))
    finally:
        os.chdir(here)
    return found


class Compiled(Distribution):
    """Has extension modules, though which they are is known only once mypyc has run."""

    def has_ext_modules(self) -> bool:
        """For the wheel's name."""
        return True


class Build(build_ext):
    """Runs mypyc when extensions are built, not whenever somebody asks what the package needs."""

    def finalize_options(self) -> None:
        """See setuptools."""
        if not self.distribution.ext_modules:
            self.distribution.ext_modules = extensions()
        super().finalize_options()


if os.environ.get("TORCH_MUX_COMPILED") == "1":
    setup(distclass=Compiled, cmdclass={"build_ext": Build}, setup_requires=["mypy>=1.13"])
else:
    setup()
