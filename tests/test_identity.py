"""A model is its parameters and buffers: whatever changes them, every entry point answers with what they are now."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_mux
from torch_mux import state

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
ENTRIES = ("call", "gather", "submit")


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


class Net(nn.Module):
    """A convolution with batch norm, a layer norm and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 5)
        with torch.no_grad():
            for parameter in (*self.bn.parameters(), *self.norm.parameters()):
                parameter.uniform_(0.5, 1.5)
            self.bn.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]
            self.bn.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.down(F.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """One matrix embeds the tokens and reads the result out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 11)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.relu(self.body(self.embed(tokens))))  # type: ignore[no-any-return]


class Normed(nn.Module):
    """All that it reads of its weights are copies."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.LayerNorm(6), nn.LayerNorm(6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.sin(self.one(x)))  # type: ignore[no-any-return]


class Counter(nn.Module):
    """Its forward writes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)  # type: ignore[operator]
        return self.line(x) + self.calls  # type: ignore[no-any-return]


def ask(entry: str, model: Any, *args: Tensor) -> Any:
    """One request of a compiled model by the given entry point."""
    with torch.inference_mode():
        if entry == "gather":
            return torch_mux.gather((model, *args))[0]
        if entry == "submit":
            return torch_mux.submit(model, *args).result(timeout=120)
        return model(*args)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def expected(model: Any, *args: Tensor) -> Tensor:
    """What the original module answers in eager mode."""
    with torch.inference_mode():
        return model._orig_mod(*args)  # type: ignore[no-any-return]


def taught(kind: Callable[[], nn.Module], device: str, *args: Tensor) -> Any:
    """A compiled model that all entry points have been used on."""
    model: Any = torch.compile(kind().eval().to(device), backend="mux", dynamic=False)
    for entry in (*ENTRIES, *ENTRIES):
        close(ask(entry, model, *args), expected(model, *args))
    return model


def picture(device: str) -> Tensor:
    return torch.randn(2, 3, 8, 8, device=device)


def instances(model: Any) -> list[Any]:
    """The engine's instances that use tensors of ``model`` alone."""
    tensors = frozenset(map(id, (*model.parameters(), *model.buffers())))
    return [found for found in state.engine()._instances() if found.uses_only(tensors)]


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether ``condition`` comes true while the runtime's threads clean up."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        gc.collect()
        time.sleep(0.01)
    return True


# In-place updates.


def _scaled(path: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        with torch.no_grad():
            tensor = model._orig_mod
            for name in path.split("."):
                tensor = getattr(tensor, name)
            tensor.mul_(1.7).add_(0.1)

    return change


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
        path: _scaled(path)
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
            torch.testing.assert_close(
                ask(entry, model, x), now, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}, {entry}: {text}"
            )
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
        (lambda: model.to(torch.float64), torch.float64),
        (lambda: model.to(memory_format=torch.channels_last), torch.float64),
        (lambda: model.to(torch.float32), torch.float32),
        (lambda: model.to(memory_format=torch.contiguous_format), torch.float32),
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


def _observed(model: nn.Module) -> list[weakref.ref[Any]]:
    """Replaces every parameter's memory by an array, whose end shows when the last storage over it is gone."""
    found = []
    for parameter in model.parameters():
        array = parameter.detach().numpy().copy()
        parameter.data = torch.from_numpy(array)
        found.append(weakref.ref(array))
    return found


def test_memory_of_a_former_type_or_layout_is_given_back() -> None:
    x = picture("cpu")
    model: Any = torch.compile(Net().eval(), backend="mux", dynamic=False)
    arrays = _observed(model._orig_mod)
    for entry in ENTRIES:
        close(ask(entry, model, x), expected(model, x))
    model.to(torch.float64)
    for entry in ENTRIES:
        close(ask(entry, model, x.double()), expected(model, x.double()))
    assert eventually(lambda: all(array() is None for array in arrays))
    assert len(instances(model)) == 1


@pytest.mark.parametrize("how", ["assign", "rebound", "to"])
def test_memory_of_replaced_weights_is_given_back(how: str) -> None:
    x = picture("cpu")
    model: Any = torch.compile(Net().eval(), backend="mux", dynamic=False)
    arrays = _observed(model._orig_mod)
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


# Shared weights.


@pytest.mark.parametrize("device", DEVICES)
def test_tied_weights(device: str) -> None:
    tokens = torch.randint(0, 11, (2, 4), device=device)
    model = taught(Tied, device, tokens)
    for entry in ENTRIES:
        _scaled("embed.weight")(model)
        close(ask(entry, model, tokens), expected(model, tokens))
    model._orig_mod.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    for entry in ENTRIES:
        _scaled("embed.weight")(model)
        close(ask(entry, model, tokens), expected(model, tokens))
        _scaled("head.weight")(model)
        close(ask(entry, model, tokens), expected(model, tokens))
    model._orig_mod.head.weight = model.embed.weight
    for entry in ENTRIES:
        _scaled("head.weight")(model)
        close(ask(entry, model, tokens), expected(model, tokens))


@pytest.mark.parametrize("device", DEVICES)
def test_two_models_that_share_one_parameter(device: str) -> None:
    x = picture(device)
    first, second = Net(), Net()
    second.up.weight, second.norm.bias = first.up.weight, first.norm.bias
    one, two = (taught(lambda net=net: net, device, x) for net in (first, second))  # type: ignore[misc]
    assert instances(one) and instances(two)
    for entry in ENTRIES:
        for path in ("up.weight", "norm.bias"):
            _scaled(path)(one)
            for model in (one, two):
                close(ask(entry, model, x), expected(model, x))
    torch_mux.remove(one)
    for entry in ENTRIES:
        close(ask(entry, two, x), expected(two, x))
        with pytest.raises(torch_mux.ModelRemoved):
            ask(entry, one, x)


@pytest.mark.parametrize("device", DEVICES)
def test_a_deep_copy_is_a_model_of_its_own(device: str) -> None:
    x = picture(device)
    model = taught(Net, device, x)
    twin = copy.deepcopy(model)
    for entry in ENTRIES:
        assert torch.equal(ask(entry, twin, x), ask(entry, model, x))
    before = ask("call", model, x)
    _scaled("conv.weight")(twin)
    _scaled("norm.weight")(twin)
    for entry in ENTRIES:
        close(ask(entry, twin, x), expected(twin, x))
        assert torch.equal(ask(entry, model, x), before)
    torch_mux.remove(model)
    close(ask("gather", twin, x), expected(twin, x))


@pytest.mark.parametrize("device", DEVICES)
def test_one_model_in_several_slots_of_one_bundle(device: str) -> None:
    inputs = [picture(device) for _ in range(5)]
    model, other = taught(Net, device, inputs[0]), taught(Net, device, inputs[0])
    asked = [(model if index != 2 else other, x) for index, x in enumerate(inputs)]
    alone = [ask("call", one, x) for one, x in asked]
    before = torch_mux.stats().sizes.get(5, 0)
    with torch.inference_mode():
        together = torch_mux.gather(*asked)
    assert torch_mux.stats().sizes[5] == before + 1
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("device", DEVICES)
def test_a_buffer_that_the_forward_writes(device: str) -> None:
    x = torch.randn(2, 6, device=device)
    models: list[Any] = [torch.compile(Counter().eval().to(device), backend="mux", dynamic=False) for _ in range(2)]
    for number, entry in enumerate((*ENTRIES, *ENTRIES), start=1):
        for model in models:
            answer = ask(entry, model, x)
            assert model.calls.item() == number
            with torch.inference_mode():
                close(answer, model.line(x) + number)
    with torch.inference_mode():
        answers = torch_mux.gather(*[(model, x) for model in models for _ in range(3)])
    assert [model.calls.item() for model in models] == [9, 9]
    for index, answer in enumerate(answers):
        close(answer.round(decimals=3) - models[index // 3].line(x), torch.full_like(answer, 7 + index % 3))
    (program,) = [program for program in torch_mux.explain().programs if program.name == "Counter"]
    assert not program.coalesced
    assert "mutates an input, parameter or buffer" in str(program)


# Collection.


@pytest.mark.parametrize("device", DEVICES)
def test_a_collected_model_gives_row_and_memory_back(device: str) -> None:
    x = picture(device)
    kept = taught(Net, device, x)
    before = ask("call", kept, x)
    served = instances(kept)[0].served
    assert eventually(lambda: all(found.alive for found in served.instances))
    rows, capacity = len(served.instances), served.storage.capacity
    for _ in range(2 * capacity):
        model: Any = torch.compile(Net().eval(), backend="mux", dynamic=False)
        arrays = _observed(model._orig_mod)
        model.to(device)
        for entry in ("call", "gather"):
            close(ask(entry, model, x), expected(model, x))
        del model
        if device == "cpu":
            assert eventually(lambda arrays=arrays: all(array() is None for array in arrays))  # type: ignore[misc]
    assert eventually(lambda: len(served.instances) == rows)
    assert served.storage.capacity == capacity
    for entry in ENTRIES:
        assert torch.equal(ask(entry, kept, x), before)


def test_collected_while_its_request_is_under_way() -> None:
    x = picture("cpu")
    model = taught(Net, "cpu", x)
    answer = expected(model, x)
    torch_mux.configure(max_wait="50ms")
    with torch.inference_mode():
        future = torch_mux.submit(model, x)
    del model
    gc.collect()
    close(future.result(timeout=60), answer)


# Inference tensors.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [Net, Normed])
def test_parameters_made_in_inference_mode(device: str, kind: Callable[[], nn.Module]) -> None:
    x = picture(device) if kind is Net else torch.randn(4, 6, device=device)
    with torch.inference_mode():
        model = taught(kind, device, x)
    assert all(parameter.is_inference() for parameter in model.parameters())
    for entry in (*ENTRIES, *ENTRIES):
        before = expected(model, x)
        with torch.inference_mode():
            for parameter in model.parameters():
                parameter.mul_(1.3)
        assert (expected(model, x) - before).abs().max() > 2e-4
        close(ask(entry, model, x), expected(model, x))


@pytest.mark.parametrize("device", DEVICES)
def test_norms_alone_follow_their_module(device: str) -> None:
    x = torch.randn(4, 6, device=device)
    model = taught(Normed, device, x)
    for entry in ENTRIES:
        for change in (_scaled("one.weight"), _scaled("other.bias"), lambda m: m.bfloat16().float()):
            change(model)
            close(ask(entry, model, x), expected(model, x))


# The layout of the kernels.


@pytest.mark.parametrize("device", DEVICES)
def test_adopt_keeps_values_and_leaves_no_copies(device: str) -> None:
    x = picture(device)
    model, twin = taught(Net, device, x), taught(Net, device, x)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    before = ask("call", model, x)
    held = sum(found.served.storage.nbytes(found.row) for found in instances(model))
    assert torch_mux.adopt(model) == 1
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])
    for entry in (*ENTRIES, *ENTRIES):
        assert torch.equal(ask(entry, model, x), before)
    (found,) = instances(model)
    assert found.served.storage._rows[found.row].copied == 0
    assert found.served.storage.nbytes(found.row) < held
    assert torch_mux.adopt(model) == 0
    with torch.inference_mode():
        mine, other = torch_mux.gather((model, x), (twin, x))
    assert torch.equal(mine, before)
    close(other, expected(twin, x))


def test_modes_of_calling_share_one_program() -> None:
    x = torch.randn(4, 6)
    model: Any = torch.compile(Normed().eval(), backend="mux", dynamic=False)
    names = [program.fingerprint for program in torch_mux.explain().programs if program.name == "Normed"]
    with torch.no_grad():
        plain = model(x)
        assert torch.equal(torch_mux.gather((model, x))[0], plain)
    assert not plain.is_inference() and not plain.requires_grad
    assert torch.equal(ask("call", model, x), plain)
    after = [program.fingerprint for program in torch_mux.explain().programs if program.name == "Normed"]
    assert len(after) == 1 and after == (names or after)
    assert len(instances(model)) == 1
