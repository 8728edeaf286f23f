"""Plans on disk: found again as they were, and never believed when damaged, old or from elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kept_files import DAMAGES
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import torch_mux
from torch_mux.compat import source_keys
from torch_mux.lowering import kept_plans, plan
from torch_mux.lowering.recipe import PlanRecipe

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


class Mixed(nn.Module):
    """Convolution, batch norm, products, a constant, and between them an operation that runs per instance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.first, self.second = nn.Linear(128, 16), nn.Linear(16, 4)
        self.register_buffer("steps", torch.arange(16.0))
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.norm(self.conv(x)).relu().flatten(1))
        y = torch.linalg.matrix_exp(torch.outer(y[0], self.steps) / 1e3)[0]
        return self.second((y + torch.arange(16, device=x.device) / 2)[None])  # type: ignore[no-any-return]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where plans and Inductor's code are kept in this test."""
    monkeypatch.setenv("TORCH_MUX_KEEP_PLANS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr("torch_mux.compat.cache_folder", lambda name: tmp_path)
    return tmp_path


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The names under which programs were lowered, one entry each time."""
    names: list[str | None] = []
    real = plan._lowered

    def spy(program: Any, settings: Any, name: str | None) -> Any:
        names.append(name)
        return real(program, settings, name)

    monkeypatch.setattr(plan, "_lowered", spy)
    return names


def _serve(make: Callable[[], nn.Module], device: str = "cpu") -> tuple[list[Tensor], str]:
    """Answers of three models together, and what ``explain`` says, from a fresh engine."""
    torch_mux.reset()
    torch._dynamo.reset()
    torch.manual_seed(0)
    models = [make().eval().to(device) for _ in range(3)]
    inputs = [torch.randn(1, 3, 6, 6, device=device) for _ in models]
    compiled = [torch.compile(model, backend="mux", dynamic=False) for model in models]
    with torch.inference_mode():
        answers = torch_mux.gather(*zip(compiled, inputs, strict=True))
        for model, x, answer in zip(models, inputs, answers, strict=True):
            torch.testing.assert_close(answer, model(x), rtol=1e-4, atol=1e-4)
        said = str(torch_mux.explain())
    return list(answers), said


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


@pytest.mark.parametrize("device", DEVICES)
def test_a_plan_is_found_again_with_the_same_bits(folder: Path, lowered: list[str], device: str) -> None:
    first, said = _serve(Mixed, device)
    assert len(lowered) == 1 and len(_files(folder)) == 1
    second, again = _serve(Mixed, device)
    assert len(lowered) == 1
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert again == said and "per instance" in said


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_made_again(
    folder: Path, lowered: list[str], damage: Callable[[Path], object]
) -> None:
    first, _ = _serve(Mixed)
    (file,) = _files(folder)
    sound = file.read_bytes()
    damage(file)
    second, _ = _serve(Mixed)
    assert len(lowered) == 2
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert len(file.read_bytes()) == len(sound)
    _serve(Mixed)
    assert len(lowered) == 2


def test_without_inductors_code_it_is_made_again(
    folder: Path, lowered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _serve(Mixed)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "another"))
    _serve(Mixed)
    assert len(lowered) == 2


def _program(operator: Any) -> Any:
    graph = torch.fx.Graph()
    graph.output(graph.call_function(operator, (graph.placeholder("x"),)))
    module = torch.fx.GraphModule({}, graph)
    return SimpleNamespace(fingerprint="f", device=torch.device("cpu"), graph=module)


def test_what_calls_by_a_number_of_this_process_is_not_kept() -> None:
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional

    assert kept_plans.name_of(_program(torch.ops.aten.relu.default)) is not None
    assert kept_plans.name_of(_program(triton_kernel_wrapper_functional)) is None
    assert kept_plans.name_of(_program(torch.ops.higher_order.cond)) is None


@pytest.mark.parametrize("changed", ["torch", "lowering", "device", "precision", "threads", "pass"])
def test_another_version_or_device_has_another_name(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program: Any = _program(torch.ops.aten.relu.default)
    before = kept_plans.name_of(program)
    assert kept_plans.name_of(program) == before
    if changed == "torch":
        monkeypatch.setattr(source_keys, "installed", lambda: "another torch")
    elif changed == "lowering":
        monkeypatch.setattr(kept_plans.kept, "sources", lambda: "another torch_mux")
    elif changed == "threads":
        threads = torch.get_num_threads()
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    elif changed == "pass":
        with inductor_config.patch(post_grad_custom_pre_pass=lambda graph: None):
            assert kept_plans.name_of(program) != before
        return
    elif changed == "device":
        program.device = torch.device("meta")
    else:
        monkeypatch.setattr("torch_mux.compat.tf32_allowed", lambda: (True, True))
    assert kept_plans.name_of(program) != before


def test_many_writers_and_readers_see_whole_plans(folder: Path) -> None:
    _serve(Mixed)
    (file,) = _files(folder)
    found = kept_plans.load(file.name)
    assert found is not None
    recipe, keys = found
    seen: list[object] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(kept_plans.load(file.name))

    readers = [threading.Thread(target=read) for _ in range(3)]
    writers = [
        threading.Thread(target=lambda: [kept_plans.save(file.name, recipe, keys) for _ in range(10)])
        for _ in range(3)
    ]
    plain = nn.Linear(4, 4)
    call = nn.Module.__call__
    for thread in (*readers, *writers):
        thread.start()
    while any(thread.is_alive() for thread in writers):
        # Other threads call modules meanwhile, which a trace of torch.fx would take part in.
        assert plain(torch.ones(1, 4)).shape == (1, 4)
    stop.set()
    for thread in readers:
        thread.join()
    assert seen and all(isinstance(one, tuple) and isinstance(one[0], PlanRecipe) for one in seen)
    assert _files(folder) == [file]
    assert nn.Module.__call__ is call


def test_a_folder_that_cannot_be_made_only_costs_time(
    tmp_path: Path, lowered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_MUX_KEEP_PLANS", "1")
    compiler = torch_mux.compat.native.build  # built before its folder is taken away
    compiler()
    monkeypatch.setenv("TORCH_MUX_CACHE_DIR", str(tmp_path / "file"))
    _serve(Mixed)
    _serve(Mixed)
    assert len(lowered) == 2


def test_it_can_be_switched_off(folder: Path, lowered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_MUX_KEEP_PLANS", "0")
    _serve(Mixed)
    assert lowered == [None] and not _files(folder)
