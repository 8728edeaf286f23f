"""Make the virtual environment of ``make test`` or ``make demo``: ``python3 .ci/bootstrap.py .venv [EXTRA]``.

Where the interpreter that runs this already has a torch that sees a GPU, the environment borrows its
packages and downloads only what is missing. Everywhere else the versions of constraints.txt are installed.
Standard library only; Python 3.10 or newer.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE = "import sys, torch, triton; sys.exit(0 if torch.cuda.is_available() else 3)"
DEMO = {
    "setuptools": "setuptools>=64",
    "numpy": "numpy",
    "sympy": "sympy",
    "sklearn": "scikit-learn",
    "typer": "typer",
    "rich": "rich",
}
#: Modules that an extra needs of a borrowed environment, and what brings them.
NEEDED = {
    "demo": DEMO,
    "test": {**DEMO, "pytest": "pytest>=8", "expecttest": "expecttest", "hypothesis": "hypothesis"},
}


def say(text: str) -> None:
    print(f"[bootstrap] {text}", flush=True)


def gpu_torch_here() -> bool:
    """Whether this interpreter imports torch and triton and sees a CUDA device."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("triton") is None:
        return False
    return subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=False).returncode == 0


def create(target: Path, borrowing: bool) -> Path:
    """An empty environment at ``target``; its Python."""
    # A borrowed pip serves as well; the setuptools that comes along with a fresh one may be too old.
    have_pip = borrowing and importlib.util.find_spec("pip") is not None
    with_pip = not have_pip and importlib.util.find_spec("ensurepip") is not None
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=with_pip).create(target)
    return target / "bin" / "python"


def purelib(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([str(python), "-c", code], text=True).strip())


def borrow(python: Path) -> None:
    """Put this interpreter's packages behind the environment's own."""
    # --system-site-packages would lead to the base interpreter, not to a virtual environment that
    # this script may itself be running in.
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    lines = [f"import site; site.addsitedir({folder!r})" for folder in folders if os.path.isdir(folder)]
    (purelib(python) / "borrowed-packages.pth").write_text("\n".join(lines) + "\n")


def missing(python: Path, extra: str) -> list[str]:
    names = sorted(NEEDED[extra])
    code = f"import importlib.util as u; print(*[n for n in {names!r} if u.find_spec(n) is None])"
    found = subprocess.check_output([str(python), "-c", code], text=True, cwd=tempfile.gettempdir())
    return [NEEDED[extra][name] for name in found.split()]


def pip(python: Path, *arguments: str) -> bool:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", *arguments]
    say(" ".join(command[1:]))
    return subprocess.run(command, check=False, cwd=ROOT).returncode == 0


def without_triton(target: Path) -> str:
    """constraints.txt without triton: a build of torch from an index pins its own."""
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("triton")]
    path = target / "constraints.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def install_pinned(python: Path, target: Path, extra: str) -> None:
    """The versions of constraints.txt and the packages of ``extra``, then the project, editable."""
    exact = [line for line in CONSTRAINTS.read_text().splitlines() if re.match(r"(torch|triton)==", line)]
    torch_alone = [line for line in exact if line.startswith("torch")]
    loose = without_triton(target)
    if shutil.which("nvidia-smi") is not None:
        attempts = [(loose, torch_alone)]
    else:
        attempts = [
            (str(CONSTRAINTS), exact),
            (loose, [f"{torch_alone[0]}+cpu", "triton", "--retries", "1", "--extra-index-url", CPU_INDEX]),
            (loose, torch_alone),
        ]
    for pinned, packages in attempts:
        if pip(python, "-c", pinned, *packages, "setuptools>=64", "wheel"):
            break
    else:
        sys.exit("[bootstrap] pip could not install torch; see its messages above")
    if not pip(python, "-c", pinned, "--no-build-isolation", "-e", f".[{extra}]"):
        sys.exit(f"[bootstrap] pip could not install the packages of the extra `{extra}`; see above")


def install_borrowed(python: Path, extra: str) -> None:
    """What the borrowed packages lack, then the project, editable, without pip where there is none."""
    borrow(python)
    lacking = missing(python, extra)
    if (
        lacking
        and not pip(python, "-c", str(CONSTRAINTS), "--no-deps", *lacking)
        and not pip(python, *lacking)
    ):
        sys.exit(
            f"[bootstrap] {sys.executable} has a torch with a GPU but lacks: {', '.join(lacking)}. "
            "They could not be downloaded; install them there, or name their folder in PYTHONPATH."
        )
    if not pip(python, "--no-build-isolation", "--no-deps", "-e", "."):
        say("no usable pip: unpacking the editable wheel instead")
        unpack_editable(python)


def unpack_editable(python: Path) -> None:
    """What ``pip install -e`` does for a pure Python project, with setuptools alone."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"from setuptools.build_meta import build_editable as b; b({folder!r})"
        subprocess.run([str(python), "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        for wheel in Path(folder).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(purelib(python))
    script = python.parent / "torch-mux"
    script.write_text(f"#!{python}\nfrom torch_mux.cli import app\n\napp()\n")
    script.chmod(0o755)


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit("[bootstrap] Python 3.10 or newer is needed: make PYTHON=python3.12 ...")
    target, extra = Path(sys.argv[1]).absolute(), sys.argv[2] if len(sys.argv) > 2 else "test"
    on_gpu = gpu_torch_here()
    python = create(target, on_gpu)
    if on_gpu:
        say(f"using the torch with a GPU of {sys.executable}")
        install_borrowed(python, extra)
    else:
        say("downloading PyTorch and what else is needed: some minutes the first time")
        install_pinned(python, target, extra)
    code = "import torch, triton, torch_mux; print('torch', torch.__version__, 'triton', triton.__version__)"
    subprocess.run([str(python), "-c", code], check=True, cwd=tempfile.gettempdir())


if __name__ == "__main__":
    main()
