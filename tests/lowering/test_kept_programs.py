"""Programs on disk: found again as they were, by nothing but the same graph under the same circumstances."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_files import DAMAGES, Small
from torch import Tensor, nn

import torch_mux
from torch_mux import backend, compat
from torch_mux.lowering import kept_programs
from torch_mux.lowering.fingerprint import fingerprint
from torch_mux.lowering.program import Program
from torch_mux.types import TensorSpec


class Seen:
    """What happened to graphs: their names, what AOTAutograd traced, and what became of them."""

    def __init__(self) -> None:
        self.names: list[str | None] = []
        self.traced = 0
        self.programs: list[Program] = []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs are kept in this test."""
    monkeypatch.setenv("TORCH_MUX_KEEP_PLANS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr("torch_mux.compat.cache_folder", lambda name: tmp_path / name)
    torch_mux.reset()
    return tmp_path / "programs"


@pytest.fixture
def seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    name_of, trace, entry = kept_programs.name_of, compat.aot_inference, backend.Entry

    def named(*args: Any) -> str | None:
        found.names.append(name_of(*args))
        return found.names[-1]

    def traced(*args: Any) -> Any:
        found.traced += 1
        return trace(*args)

    def entered(program: Program, *args: Any) -> Any:
        found.programs.append(program)
        return entry(program, *args)

    monkeypatch.setattr(kept_programs, "name_of", named)
    monkeypatch.setattr(compat, "aot_inference", traced)
    monkeypatch.setattr(backend, "Entry", entered)
    return found


_alive: list[object] = []


def serve(make: Callable[[], Any], *inputs: Tensor) -> Any:
    """The answer of a fresh model in a fresh engine; compared with that of eager PyTorch."""
    torch_mux.reset()
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make()
    model = model.eval() if isinstance(model, nn.Module) else model
    with torch.inference_mode():
        expected = copy.deepcopy(model)(*inputs)
        compiled = torch.compile(model, backend="mux", dynamic=False)
        _alive[:] = [compiled]  # so that explain() counts its instance
        (answer,) = torch_mux.gather((compiled, *inputs))
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)
    return answer


X = torch.randn(1, 3, 6, 6)


def test_a_program_is_found_again_as_it_was(seen: Seen) -> None:
    first = serve(Small, X)
    second = serve(Small, X)
    assert seen.traced == 1 and torch.equal(first, second)
    assert seen.names[0] is not None and seen.names[0] == seen.names[1]
    captured, found = seen.programs
    assert captured is not found
    for field in dataclasses.fields(Program):
        if field.name != "graph":
            assert getattr(captured, field.name) == getattr(found, field.name), field.name
    assert captured.graph.code == found.graph.code
    assert fingerprint(found.graph) == fingerprint(captured.graph) == captured.fingerprint
    for one, other in zip(captured.graph.graph.nodes, found.graph.graph.nodes, strict=True):
        assert (one.op, one.name, one.target, str(one.args)) == (
            other.op,
            other.name,
            other.target,
            str(other.args),
        )
        assert one.meta.keys() == other.meta.keys()
        values = [node.meta.get("val") for node in (one, other)]
        if isinstance(values[0], Tensor):
            assert TensorSpec.of(values[0]) == TensorSpec.of(values[1])
            assert all(map(compat.is_fake, values))


def test_a_graph_that_is_found_lowers_to_the_same_plan(seen: Seen, folder: Path) -> None:
    first = serve(Small, X)
    said = str(torch_mux.explain())
    for plan in (folder.parent / "plans").iterdir():
        plan.unlink()
    second = serve(Small, X)
    assert seen.traced == 1 and torch.equal(first, second)
    assert str(torch_mux.explain()) == said


def test_settings_say_that_nothing_is_kept(seen: Seen, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_mux.configure(keep_plans=False)
    model: Any = torch.compile(Small().eval(), backend="mux", dynamic=False)
    with torch.inference_mode():
        model(X)
    assert seen.names == [] and seen.traced == 1 and not folder.exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_captured_again(
    seen: Seen, folder: Path, damage: Callable[[Path], object]
) -> None:
    first = serve(Small, X)
    (file,) = folder.iterdir()
    sound = file.read_bytes()
    damage(file)
    second = serve(Small, X)
    assert seen.traced == 2 and torch.equal(first, second) and file.read_bytes() == sound
    serve(Small, X)
    assert seen.traced == 2


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x + self.count


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(6).to(x.dtype) * torch.tensor([1.0, 2, 3, 4, 5, 6])


UNKEPT: dict[str, Callable[[], Any]] = {
    "a buffer is written": Counted,
    "the result is a view": lambda: lambda x: x.transpose(2, 3),
    "two results share memory": lambda: lambda x: (lambda y: (y, y[0]))(x + 1),
    "a tensor of its own": Whole,
}


@pytest.mark.parametrize("what", UNKEPT)
def test_what_is_more_than_its_graph_is_captured_every_time(seen: Seen, folder: Path, what: str) -> None:
    for _ in range(2):
        serve(UNKEPT[what], X.clone())
    assert seen.traced == 2 and not (folder.exists() and list(folder.iterdir()))


def test_autocast_and_modes_reach_into_the_trace(seen: Seen, folder: Path) -> None:
    torch_mux.reset()
    model: Any = torch.compile(Small().eval(), backend="mux", dynamic=False)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(X)
    assert seen.names == [None] and not folder.exists()


def test_with_grad_enabled_it_answers_as_when_it_was_captured(seen: Seen) -> None:
    x = torch.randn(1, 3, 6, 6)
    answers = []
    for _ in range(2):
        torch_mux.reset()
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Small().eval().requires_grad_(False)
        compiled: Any = torch.compile(model, backend="mux", dynamic=False)
        answers.append(compiled(x))
        torch.testing.assert_close(answers[-1], model(x), rtol=1e-4, atol=1e-4)
    first, second = answers
    assert seen.traced == 1 and torch.equal(first, second)
    assert (first.requires_grad, first.is_inference()) == (second.requires_grad, second.is_inference())


def test_the_plan_is_under_way_before_dynamo_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(Small, X)
    torch_mux.reset()
    torch._dynamo.reset()
    known: list[int] = []
    started = backend._started

    def watching(entry: Any) -> Any:
        result = started(entry)
        known.append(len(torch_mux.explain().programs))
        return result

    monkeypatch.setattr(backend, "_started", watching)
    serve(Small, X)
    assert known == [1]


def test_a_closed_engine_says_so_to_the_caller_alone(folder: Path) -> None:
    serve(Small, X)
    torch._dynamo.reset()
    torch_mux.close()
    model: Any = torch.compile(Small().eval(), backend="mux", dynamic=False)
    with torch.inference_mode(), pytest.raises(torch_mux.ClosedError):
        model(X)


def test_sixteen_threads_find_their_programs_at_once(seen: Seen) -> None:
    widths = range(4, 20)
    x = torch.randn(2, 8)

    def net(width: int) -> nn.Module:
        torch.manual_seed(width)
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4)).eval()

    def run() -> dict[int, Tensor]:
        torch_mux.reset()
        torch._dynamo.reset()
        answers: dict[int, Tensor] = {}
        nets = {width: net(width) for width in widths}

        def call(width: int) -> None:
            model: Any = torch.compile(nets[width], backend="mux", dynamic=False)
            with torch.inference_mode():
                answers[width] = model(x)

        threads = [threading.Thread(target=call, args=(width,)) for width in widths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        return answers

    first, second = run(), run()
    assert seen.traced == len(widths)
    assert sorted(first) == sorted(second) == list(widths)
    assert all(torch.equal(first[width], second[width]) for width in widths)
