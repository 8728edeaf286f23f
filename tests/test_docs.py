"""The examples of the README and of the guide run as they stand, and what they point to exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_mux
from torch_mux import errors
from torch_mux.settings import Settings
from torch_mux.types import FallbackKind, Quota

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDE = (ROOT / "docs" / "guide.md").read_text()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """An engine and settings of its own."""
    before = Settings()
    torch._dynamo.reset()
    torch_mux.reset()
    yield
    torch_mux.configure(max_wait=before.max_wait, max_bundle=before.max_bundle)
    torch_mux.reset()


@pytest.mark.parametrize("name", ["README.md", "docs/guide.md"])
def test_python_examples_run_in_order(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), scope)
    assert isinstance(scope["y"], torch.Tensor) and isinstance(scope["ya"], torch.Tensor)
    printed = capsys.readouterr().out
    assert "alice" in printed and "coalesced" in printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    folder = ROOT if page.parent == ROOT / "docs" else ROOT / page.stem
    folder = ROOT / "lowering" / "kernels" if page.stem == "kernels" else folder
    if page.parent.name == "design":
        for names in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE):
            for name in re.findall(r"`([\w/.]+)`", names):
                assert (folder / name).exists(), name


def test_every_error_and_every_setting_is_in_the_guide() -> None:
    raised = set(errors.__all__) - {"MuxError"}
    assert {name for name in raised if f"`{name}`" not in GUIDE} == set()
    assert {name for name in Settings.__dataclass_fields__ if f"`{name}`" not in GUIDE} == set()
    assert {name for name in Quota.__dataclass_fields__ if f"`{name}`" not in GUIDE} == set()


def test_every_error_has_an_entry_under_troubleshooting() -> None:
    section = GUIDE.partition("## Troubleshooting")[2].partition("\n## ")[0]
    entries = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", section, re.MULTILINE)
    assert sorted(entries) == sorted(set(errors.__all__) - {"MuxError"})


def test_every_reason_for_a_fall_back_is_in_the_guide() -> None:
    section = GUIDE.partition("## What coalesces")[2].partition("\n## ")[0]
    entries = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", section, re.MULTILINE)[1:]  # without the header
    assert sorted(entries) == sorted(kind.value for kind in FallbackKind)


def test_the_listed_passes_are_those_that_run_in_their_order() -> None:
    from torch_mux.lowering.passes import PASSES

    names = [step.__module__.rpartition(".")[2] for step in PASSES]
    page = (ROOT / "docs" / "design" / "lowering.md").read_text()
    assert re.sub(r"\s+", " ", page).count(", ".join(f"`{name}`" for name in names)) == 1
