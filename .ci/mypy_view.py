"""Type-check every file of the project: ``python .ci/mypy_view.py``.

``mypy -p torch_mux`` on an editable install follows the folder torch_mux/ only. Here the three folders are
copied into the nested layout of the wheel, checked there, and the number of checked files is asserted.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NESTED = {"torch_mux": "torch_mux", "lowering": "torch_mux/lowering", "runtime": "torch_mux/runtime"}


def build_view(view: Path) -> int:
    """Copy the folders into ``view`` under their import names; the number of Python files."""
    for folder, nested in NESTED.items():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, view / nested, ignore=ignore, dirs_exist_ok=True)
    return sum(1 for _ in view.rglob("*.py"))


def to_source(line: str) -> str:
    """A message of mypy with the path of the repository instead of the view's."""
    return re.sub(r"^torch_mux/(lowering|runtime)/", r"\1/", line)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        view = Path(folder)
        count = build_view(view)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        command += ["--cache-dir", str(ROOT / ".mypy_cache"), "--python-executable", sys.executable]
        result = subprocess.run(
            [*command, "-p", "torch_mux"], cwd=view, capture_output=True, text=True, check=False
        )
    print("\n".join(to_source(line) for line in result.stdout.splitlines()), file=sys.stdout)
    sys.stderr.write(result.stderr)
    if result.returncode:
        return result.returncode
    checked = re.search(r"no issues found in (\d+) source files?", result.stdout)
    if checked is None or int(checked.group(1)) != count:
        print(f"mypy checked {checked.group(1) if checked else 'no'} files, the tree has {count}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
