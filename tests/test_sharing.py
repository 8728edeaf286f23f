"""Weights that are shared, copied, collected or made in inference mode."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torch_mux
from subjects import (
    DEVICES,
    ENTRIES,
    Counter,
    Net,
    Normed,
    Tied,
    ask,
    bundle_sizes,
    close,
    eventually,
    expected,
    instances,
    observed,
    picture,
    quick_collections,
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


# Shared weights.


@pytest.mark.parametrize("device", DEVICES)
def test_tied_weights(device: str) -> None:
    tokens = torch.randint(0, 11, (2, 4), device=device)
    model = taught(Tied, device, tokens)
    for entry in ENTRIES:
        scaled("embed.weight")(model)
        close(ask(entry, model, tokens), expected(model, tokens))
    model._orig_mod.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    for entry in ENTRIES:
        scaled("embed.weight")(model)
        close(ask(entry, model, tokens), expected(model, tokens))
        scaled("head.weight")(model)
        close(ask(entry, model, tokens), expected(model, tokens))
    model._orig_mod.head.weight = model.embed.weight
    for entry in ENTRIES:
        scaled("head.weight")(model)
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
            scaled(path)(one)
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
    scaled("conv.weight")(twin)
    scaled("norm.weight")(twin)
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
    before = bundle_sizes().get(5, 0)
    with torch.inference_mode():
        together = torch_mux.gather(*asked)
    assert bundle_sizes()[5] == before + 1
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("device", DEVICES)
def test_a_buffer_that_the_forward_writes(device: str) -> None:
    x = torch.randn(2, 6, device=device)
    nets = [Counter().eval().to(device) for _ in range(2)]
    models: list[Any] = [torch.compile(net, backend="mux", dynamic=False) for net in nets]
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
        with torch.inference_mode():
            close(answer, models[index // 3].line(x) + 7 + index % 3)
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
    with quick_collections():
        for _ in range(capacity + 8):
            model: Any = torch.compile(Net().eval(), backend="mux", dynamic=False)
            arrays = observed(model._orig_mod)
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
def test_parameters_made_in_inference_mode(
    device: str, kind: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
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
    told = [record.message for record in caplog.records if "inference mode" in record.message]
    assert len(told) == 1 and "outside" in told[0]


@pytest.mark.parametrize("device", DEVICES)
def test_norms_alone_follow_their_module(device: str) -> None:
    x = torch.randn(4, 6, device=device)
    model = taught(Normed, device, x)
    for entry in ENTRIES:
        for change in (scaled("one.weight"), scaled("other.bias"), lambda m: m.bfloat16().float()):
            change(model)
            close(ask(entry, model, x), expected(model, x))


# The layout of the kernels.


class FourChannels(Net):
    """Three channels would be padded to four on a GPU, which takes a copy in any layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)


@pytest.mark.parametrize("device", DEVICES)
def test_adopt_keeps_values_and_leaves_no_copies(device: str) -> None:
    x = torch.randn(2, 4, 9, 9, device=device)
    model, twin = taught(FourChannels, device, x), taught(FourChannels, device, x)
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
