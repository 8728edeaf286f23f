"""A model is its parameters and buffers: every entry point answers with what they are now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torch_mux
from subjects import (
    DEVICES,
    ENTRIES,
    Net,
    Tied,
    ask,
    close,
    eventually,
    expected,
    instances,
    observed,
    picture,
    scaled,
    taught,
)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """In place of the common one: the programs of this file stay compiled from test to test."""
    yield
    torch_mux.configure(max_wait=0.0, max_bundle=64)


@pytest.fixture(autouse=True, scope="module")
def reset_at_the_end() -> Iterator[None]:
    """Nothing of this file is left to another one."""
    yield
    torch_mux.reset()
    torch._dynamo.reset()


# In-place updates.


def _load(model: Any) -> None:
    model._orig_mod.load_state_dict(Net().to(next(model.parameters()).device).state_dict())


def _load_assigned(model: Any) -> None:
    model._orig_mod.load_state_dict(Net().to(next(model.parameters()).device).state_dict(), assign=True)


def _in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        for tensor in (*model.parameters(), model.bn.running_mean, model.bn.running_var):
            tensor.mul_(1.3)


def _narrowed(model: Any) -> None:
    model.bfloat16().float()


def _norms_narrowed(model: Any) -> None:
    model.norm.to(torch.bfloat16).float()


def _bias_narrowed(model: Any) -> None:
    model.down.bias.data = model.down.bias.data + 1  # the whole tensor is replaced, as .to() does
    model.down.weight.data = model.down.weight.data * 1.5


def _replaced(model: Any) -> None:
    model._orig_mod.down = nn.Linear(16, 5).to(next(model.parameters()).device)


def _rebound(model: Any) -> None:
    model._orig_mod.conv.bias = nn.Parameter(torch.ones_like(model.conv.bias))


CHANGES = {
    **{
        path: scaled(path)
        for path in (
            "conv.weight conv.bias bn.weight bn.bias bn.running_mean bn.running_var norm.weight norm.bias "
            "up.weight up.bias"
        ).split()
    },
    "load_state_dict": _load,
    "load_state_dict(assign=True)": _load_assigned,
    "in inference mode": _in_inference_mode,
    ".bfloat16().float()": _narrowed,
    "norm.bfloat16().float()": _norms_narrowed,
    "data of one layer": _bias_narrowed,
    "submodule replaced": _replaced,
    "parameter rebound": _rebound,
}


@pytest.mark.parametrize("device", DEVICES)
def test_every_change_is_seen_by_every_entry_point(device: str) -> None:
    x = picture(device)
    for entry in ENTRIES:
        for name, change in CHANGES.items():
            model, other = taught(Net, device, x), taught(Net, device, x)
            before, untouched = expected(model, x), ask(entry, other, x)
            change(model)
            now = expected(model, x)
            assert (now - before).abs().max() > 2e-4, name
            error = (ask(entry, model, x) - now).abs().max()
            assert error < 1e-4, (name, entry)
            assert torch.equal(ask(entry, other, x), untouched), (name, entry)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_data_writes_are_seen_after_refresh(device: str, entry: str) -> None:
    x = picture(device)
    model = taught(Net, device, x)
    model.conv.weight.data.mul_(1.5)
    model.norm.bias.data.add_(1)
    model.bn.running_var.data.mul_(2)
    torch_mux.refresh(model)
    close(ask(entry, model, x), expected(model, x))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_steps_are_seen(device: str, name: str) -> None:
    x = picture(device)
    model = taught(Net, device, x)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for entry in ENTRIES:
        before = expected(model, x)
        optimizer.zero_grad()
        model._orig_mod(x).square().sum().backward()
        optimizer.step()
        assert (expected(model, x) - before).abs().max() > 2e-4
        close(ask(entry, model, x), expected(model, x))


# Other forms of the weights.


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_moved_to_another_type_and_layout_and_back(device: str) -> None:
    x = picture(device)
    model = taught(Net, device, x)
    moves: list[tuple[Callable[[], object], torch.dtype]] = [
        (lambda: model.to(memory_format=torch.channels_last), torch.float32),
        (lambda: model.to(torch.float64, memory_format=torch.contiguous_format), torch.float64),
        (lambda: model.to(torch.float32), torch.float32),
    ]
    for move, dtype in moves:
        move()
        for entry in (*ENTRIES, *ENTRIES):
            answer = ask(entry, model, x.to(dtype))
            assert answer.dtype is dtype
            close(answer, expected(model, x.to(dtype)))


@pytest.mark.gpu
def test_a_model_that_visits_the_other_device() -> None:
    x = picture("cuda")
    model = taught(Net, "cuda", x)
    first = ask("gather", model, x)
    model.cpu()
    for entry in (*ENTRIES, *ENTRIES):
        close(ask(entry, model, x.cpu()), first.cpu())
    model.cuda()
    for entry in (*ENTRIES, *ENTRIES):
        assert torch.equal(ask(entry, model, x), first)


@pytest.mark.parametrize("kind", [Net, Tied])
def test_memory_of_a_former_type_is_given_back(kind: Callable[[], nn.Module]) -> None:
    x, y = picture("cpu"), picture("cpu").double()
    if kind is Tied:
        x = y = torch.randint(0, 11, (2, 4))
    model: Any = torch.compile(kind().eval(), backend="mux", dynamic=False)
    arrays = observed(model._orig_mod)
    for entry in ENTRIES:
        close(ask(entry, model, x), expected(model, x))
    model.to(torch.float64)
    for entry in ENTRIES:
        close(ask(entry, model, y), expected(model, y))
    assert eventually(lambda: all(array() is None for array in arrays))
    assert len(instances(model)) == 1


@pytest.mark.parametrize("how", ["assign", "rebound", "to"])
def test_memory_of_replaced_weights_is_given_back(how: str) -> None:
    x = picture("cpu")
    model: Any = torch.compile(Net().eval(), backend="mux", dynamic=False)
    arrays = observed(model._orig_mod)
    for entry in ENTRIES:
        close(ask(entry, model, x), expected(model, x))
    if how == "assign":
        model._orig_mod.load_state_dict(Net().state_dict(), assign=True)
    elif how == "to":
        model.double().float()
    else:
        for layer in model.modules():
            for name in dict(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(getattr(layer, name).detach().clone()))
    for entry in ENTRIES:
        close(ask(entry, model, x), expected(model, x))
    assert eventually(lambda: all(array() is None for array in arrays))
    assert len(instances(model)) == 1
