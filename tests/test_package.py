"""The package as it is shipped: the wheel against the tree, the direction of imports, the size of files."""

from __future__ import annotations

import ast
import configparser
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"torch_mux": "torch_mux", "lowering": "torch_mux/lowering", "runtime": "torch_mux/runtime"}
LEAVES = frozenset({"errors", "settings", "types", "compat"})
ORDER = {"leaf": 0, "lowering": 1, "runtime": 2, "face": 3}
CORE_PACKAGES = frozenset({"torch", "triton", "sympy", "torch_mux"})
# Parts of the face that have an extra of their own in pyproject.toml.
OPTIONAL = {"commands": {"typer", "rich"}, "demo": {"typer", "rich", "sklearn", "numpy"}}
# Names without a public spelling that are where they were in every supported version of torch.
STABLE = frozenset(
    {"torch._ops", "torch._foreach_copy_", "torch._subclasses.fake_tensor", "torch.utils._pytree"}
)
OPTIONAL |= {"bench": {"torchvision", "transformers", "typer", "rich"}}
OPTIONAL |= {"metrics": {"prometheus_client"}, "observe": {"prometheus_client", "rich"}}


def files() -> list[tuple[Path, str]]:
    """Every file of the package, data too, with its place in the wheel."""
    found = []
    for folder, place in NAMES.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                found.append((path, f"{place}/{path.relative_to(ROOT / folder).as_posix()}"))
    return found


FILES = files()
SOURCES = [(path, place) for path, place in FILES if path.suffix == ".py"]
IDS = [place for _, place in SOURCES]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from a copy: a build in the tree would pick up what an earlier one left there."""
    copy = tmp_path_factory.mktemp("copy")
    for name in NAMES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("dist")
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_every_file_of_the_tree_and_no_other(wheel: zipfile.ZipFile) -> None:
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == {place for _, place in FILES}
    assert "torch_mux/lowering/kernels/measured.json" in shipped
    for path, place in FILES:
        assert wheel.read(place) == path.read_bytes()


def test_the_wheel_holds_the_data_files(wheel: zipfile.ZipFile) -> None:
    data = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in NAMES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data <= set(wheel.namelist())
    assert "torch_mux/py.typed" in data


def test_the_wheel_is_typed_and_licensed(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "torch_mux/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_entry_points(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(name).decode())
    assert dict(parser["torch_dynamo_backends"]) == {"mux": "torch_mux.backend:mux"}
    assert dict(parser["console_scripts"]) == {"torch-mux": "torch_mux.cli:app"}


def test_the_version_is_one(wheel: zipfile.ZipFile) -> None:
    import torch_mux

    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    assert f"\nVersion: {torch_mux.__version__}\n" in wheel.read(name).decode()


def imported(path: Path, place: str) -> list[str]:
    """Dotted names of the modules that a file imports, anywhere in it."""
    names = []
    package = place.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from torch_mux import compat` names the module torch_mux.compat.
            names += [f"{module}.{a.name}" for a in node.names] if module == "torch_mux" else [module]
    return names


def layer(module: str) -> str:
    """Which layer a dotted name below torch_mux belongs to."""
    first = module.split(".")[1] if "." in module else ""
    if first in ("lowering", "runtime"):
        return first
    return "leaf" if first in LEAVES else "face"


@pytest.mark.parametrize(("path", "place"), SOURCES, ids=IDS)
def test_imports_run_one_way(path: Path, place: str) -> None:
    own = layer(place.removesuffix(".py").replace("/", "."))
    for name in imported(path, place):
        assert name.split(".")[0] not in ("lowering", "runtime"), f"{place} imports {name}: a second module"
        if name.split(".")[0] == "torch_mux":
            other = layer(name)
            # Leaves know nothing of each other, but for the files that wrap torch.
            allowed = ORDER[other] <= ORDER[own] if own != "leaf" else name.startswith("torch_mux.compat")
            assert allowed, f"{place} ({own}) imports {name} ({other})"


@pytest.mark.parametrize(("path", "place"), SOURCES, ids=IDS)
def test_the_core_needs_torch_triton_and_sympy_alone(path: Path, place: str) -> None:
    part = place.split("/")[1].removesuffix(".py")
    allowed = CORE_PACKAGES | OPTIONAL.get(part, set())
    for name in imported(path, place):
        first = name.split(".")[0]
        assert first in allowed or first in sys.stdlib_module_names, f"{place} imports {name}"


@pytest.mark.parametrize(("path", "place"), SOURCES, ids=IDS)
def test_functions_stay_within_60_lines(path: Path, place: str) -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: size for name, size in sizes.items() if size > 60} == {}


def test_files_stay_below_400_lines() -> None:
    paths = [path for path, _ in SOURCES] + sorted((ROOT / "tests").rglob("*.py"))
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {name: size for name, size in sizes.items() if size >= 400} == {}


def test_private_torch_is_named_in_the_compat_files_alone() -> None:
    found = []
    for path, place in SOURCES:
        if not place.startswith("torch_mux/compat"):
            tree = ast.parse(path.read_text())
            found += [f"{place}: {name}" for name in dotted(tree) if is_private(name)]
    database = "torch.testing._internal.common_methods_invocations.op_db"
    assert found == [f"torch_mux/bench/opinfo.py: {database}"]


def dotted(tree: ast.AST) -> Iterator[str]:
    """Every ``torch....`` attribute chain and import in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            parts = [node.attr]
            inner = node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield ".".join([inner.id, *reversed(parts)])


def is_private(name: str) -> bool:
    parts = name.split(".")
    if parts[0] != "torch" or parts[1:2] == ["ops"] or name in STABLE or name.rpartition(".")[0] in STABLE:
        return False
    return any(part.startswith("_") and not part.startswith("__") for part in parts[1:])


def test_import_loads_neither_torch_nor_the_runtime() -> None:
    code = "import sys, torch_mux; print('torch' in sys.modules, 'torch_mux.runtime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_every_public_name_can_be_loaded() -> None:
    import torch_mux

    assert [name for name in torch_mux.__all__ if getattr(torch_mux, name, None) is None] == []
    with pytest.raises(AttributeError, match="no attribute 'gahter'"):
        torch_mux.gahter  # noqa: B018


def test_every_error_is_public() -> None:
    import torch_mux
    from torch_mux import errors

    assert set(errors.__all__) <= set(torch_mux.__all__)
    assert all(issubclass(getattr(torch_mux, name), torch_mux.MuxError) for name in errors.__all__)
