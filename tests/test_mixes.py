"""Bundles of several programs: the bits of each alone in any mix; what goes wrong stays with its owner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_mux
from torch_mux import state
from torch_mux.calls import prepare
from torch_mux.lowering.pack import words
from torch_mux.types import Quota

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


class Wide(nn.Module):
    """A block of an encoder for sequences of one length."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        shape = (b, n, self.heads, width // self.heads)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))
        return x + self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class Small(nn.Module):
    """A convolutional net with a depthwise and a pointwise layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.each = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point = nn.Conv2d(width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.point(F.relu(self.each(F.relu(self.stem(x))))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Whole(nn.Module):
    """Runs per instance."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.volume(x))


@pytest.fixture(autouse=True)
def _packing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(words, "BESIDE", 4.0)  # so that matches pay
    torch_mux.reset()
    torch_mux.configure(pack=8, pack_after=0, keep_plans=False)
    yield
    torch_mux.reset()


def compiled(model: nn.Module, device: str) -> Any:
    dtype = torch.float16 if device == "cuda" else torch.float32
    return torch.compile(model.eval().to(device, dtype), backend="mux", dynamic=False)


def data(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float16 if device == "cuda" else torch.float32)


def alone(calls: list[tuple[Any, Tensor]]) -> list[Tensor]:
    with torch.inference_mode():
        return [torch_mux.gather(call)[0] for call in calls]


def together(calls: list[tuple[Any, Tensor]], rounds: int = 4) -> list[Tensor]:
    """The answers of the last of some rounds, between which everything that is built is waited for."""
    with torch.inference_mode():
        for _ in range(rounds):
            answers = torch_mux.gather(*calls)
            assert state.engine().quiesce(120)
    return answers


def mixes() -> Any:
    return torch_mux.explain().mixes


def calls_of(device: str) -> list[tuple[Any, Tensor]]:
    long, short, image = [compiled(Wide(), device) for _ in range(2)], compiled(Wide(), device), Small()
    return [
        (long[0], data(1, 40, 32, device=device)),
        (long[1], data(1, 40, 32, device=device)),
        (short, data(1, 24, 32, device=device)),
        (compiled(image, device), data(1, 3, 12, 12, device=device)),
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_the_bits_of_a_mix_are_those_of_each_alone(device: str) -> None:
    calls = calls_of(device)
    want = alone(calls)
    for answer, expected in zip(together(calls), want, strict=True):
        assert torch.equal(answer, expected)
    (mix,) = mixes()
    assert (mix.state, mix.reason) == ("runs as one", "")
    assert mix.joint >= 1 and mix.seen >= 3
    assert sorted(slots for _, slots in mix.members) == [1, 1, 2]
    text = str(torch_mux.explain())
    assert "launches for several programs" in text and "Wide: linear" in text


@pytest.mark.parametrize("device", DEVICES)
def test_smaller_and_other_mixes(device: str) -> None:
    calls = calls_of(device)
    want = alone(calls)
    for chosen in ([0, 2], [0, 1, 2], [3, 2], [1, 3], [0, 1, 2, 3]):
        answers = together([calls[index] for index in chosen])
        assert all(torch.equal(answer, want[index]) for answer, index in zip(answers, chosen, strict=True))
    assert all(mix.joint >= 1 for mix in mixes())
    assert all(mix.matched > 0 for mix in mixes() if all(name == "Wide" for name, _ in mix.members))


@pytest.mark.parametrize("device", DEVICES)
def test_random_bundles_alone_coalesced_on_branches_or_packed(device: str) -> None:
    calls = calls_of(device)
    want = alone(calls)
    draw = torch.Generator().manual_seed(0)
    for pack, branches in ((1, 1), (1, 3), (8, 1), (8, 3)):
        torch_mux.configure(pack=pack, branches=branches)
        for _ in range(4):
            chosen = torch.randint(len(calls), (5,), generator=draw).tolist()
            answers = together([calls[index] for index in chosen], rounds=2)
            for answer, index in zip(answers, chosen, strict=True):
                assert torch.equal(answer, want[index])


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_change_are_seen(device: str) -> None:
    calls = calls_of(device)
    together(calls)
    with torch.no_grad():
        calls[0][0].up.weight.mul_(1.5)
        calls[3][0].stem.bias.add_(1.0)
    answers = together(calls, rounds=1)
    assert all(torch.equal(answer, want) for answer, want in zip(answers, alone(calls), strict=True))
    assert mixes()[0].joint >= 2


@pytest.mark.parametrize("device", DEVICES)
def test_a_program_that_runs_per_instance_goes_by_itself(device: str) -> None:
    calls = [*calls_of(device), (compiled(Whole(), device), data(1, 3, 5, 5, 5, device=device))]
    want = alone(calls)
    answers = together(calls)
    assert all(torch.equal(answer, expected) for answer, expected in zip(answers, want, strict=True))
    assert all("Whole" not in name for mix in mixes() for name, _ in mix.members)


def test_capped_tenants_are_not_packed() -> None:
    calls = calls_of("cpu")
    with torch_mux.quota("alice", sms=0.5):
        together(calls)
    assert mixes() == ()


def test_one_program_a_bundle_where_packing_is_off() -> None:
    torch_mux.configure(pack=1)
    together(calls_of("cpu"))
    assert mixes() == ()


def test_a_member_that_raises_fails_alone() -> None:
    calls = calls_of("cpu")
    want = alone(calls)
    together(calls)
    (mix,) = mixes()
    plan = state.engine()._served[calls_program(calls[2])].compiled
    original = plan.run

    def broken(*args: Any) -> Any:
        raise ValueError("mine")

    plan.run = broken  # type: ignore[method-assign]
    with torch.inference_mode():
        made = [prepare(model, (x,), {}).request(Quota()) for model, x in calls]
        requests = state.engine().submit_all(made)
        state.engine().wait(requests)
    (again,) = mixes()
    assert (again.seen, again.joint) == (mix.seen + 1, mix.joint)
    for index, request in enumerate(requests):
        if index == 2:
            with pytest.raises(torch_mux.ExecutionFailed, match="mine"):
                request.result()
        else:
            assert torch.equal(cast(Tensor, request.result()[0]), want[index])
    plan.run = original  # type: ignore[method-assign]
    answers = together(calls, rounds=1)
    assert all(torch.equal(answer, expected) for answer, expected in zip(answers, want, strict=True))
    assert mixes()[0].joint == mix.joint + 1


def calls_program(call: tuple[Any, Tensor]) -> str:
    """The program that serves a call, found by its instance."""
    tensors = frozenset(map(id, (*call[0].parameters(), *call[0].buffers())))
    (found,) = [one for one in state.engine()._instances() if one.uses_only(tensors)]
    return str(found.served.key)


def test_device_time_is_divided_by_work() -> None:
    calls = calls_of("cpu")
    names = ["long", "long", "short", "image"]
    together(calls)
    (mix,) = mixes()
    with torch.inference_mode():
        made = [prepare(call[0], call[1:], {}).request(Quota(name)) for name, call in zip(names, calls)]
        requests = state.engine().submit_all(made)
        state.engine().wait(requests)
    assert mixes()[0].joint == mix.joint + 1
    work = Counter[str]()
    for name, request in zip(names, requests, strict=True):
        work[name] += request.work
    tenants = torch_mux.stats().tenants
    whole = sum(tenants[name].device_seconds for name in work)
    for name, own in work.items():
        assert tenants[name].device_seconds == pytest.approx(whole * own / work.total(), rel=1e-6)


def test_thirty_programs_at_once() -> None:
    widths = range(8, 8 + 30)
    calls = [(compiled(nn.Linear(width, 4), "cpu"), data(2, width, device="cpu")) for width in widths]
    want = alone(calls)
    answers = together(calls, rounds=3)
    assert all(torch.equal(answer, expected) for answer, expected in zip(answers, want, strict=True))
    assert all(len(mix.members) <= 8 for mix in mixes())
    assert len(mixes()) >= 30 // 8


@pytest.mark.gpu
def test_matched_launches_by_the_profiler() -> None:
    calls = calls_of("cuda")[:3]
    together(calls)
    (mix,) = mixes()
    assert mix.matched > 0
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler, torch.inference_mode():
        torch_mux.gather(*calls)
        torch.cuda.synchronize()
    names = [str(event.name) for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    assert sum("joint_linear_kernel" in name for name in names) == mix.matched
    # each matched launch of two programs replaces two
    kernels = [name for name in names if name in ("linear_kernel", "joint_linear_kernel")]
    assert len(kernels) == 8 - mix.matched
