"""What comes back is what eager returns: values, strides, storages, inference flags, objects around them."""

from __future__ import annotations

import collections
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torch_mux

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
ENTRIES = ("call", "gather", "submit")


@dataclass
class Record:
    logits: Tensor
    hidden: Tensor | None = None


class Named(NamedTuple):
    logits: Tensor
    hidden: Tensor


class ModelOutput(collections.OrderedDict[str, Any]):
    """An ordered dict with attributes, known to pytree, as the outputs of transformers are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """Has pytree know ``ModelOutput``."""
    pytree.register_pytree_node(
        ModelOutput,
        lambda output: (list(output.values()), list(output.keys())),
        lambda values, names: ModelOutput(zip(names, values)),
        serialized_type_name="tests.ModelOutput",
    )
    yield
    pytree._deregister_pytree_node(ModelOutput)


class Answering(nn.Module):
    """Returns what ``form`` says, made of one linear and a few operations."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.line = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.line(x)
        if self.form == "tensor":
            return y
        if self.form == "tuple with None":
            return y, None, 3, y.relu()
        if self.form == "dict":
            return {"logits": y, "deep": [y.relu(), {"scale": 0.5}]}
        if self.form == "named tuple":
            return Named(y, y.relu())
        if self.form == "dataclass":
            return Record(y, y.relu())
        if self.form == "model output":
            return ModelOutput(logits=y, hidden=y.relu())
        if self.form == "transposed":
            return y.t(), y.relu().view(-1, 2, 4).permute(2, 0, 1)
        if self.form == "pieces":
            return y.chunk(2, 1)
        if self.form == "whole and piece":
            return y, y.chunk(2, 1)[0]
        if self.form == "pieces that overlap":
            return y.chunk(2, 1)[1].t(), y.split(3, 1)[1]
        if self.form == "the same tensor twice":
            return y, y
        if self.form == "an input":
            return y, x
        if self.form == "views of what is not returned":
            z = y.relu()
            return z.t(), z[1:], z.view(-1)
        if self.form == "views of an input":
            return y, x[1:], x.t()
        if self.form == "a parameter":
            return y, self.line.weight, self.line.weight.t()
        if self.form == "what depends on parameters only":
            return y, self.line.weight * 2, self.line.bias.relu()
        if self.form == "a constant":
            return y, torch.tensor([1.0, 2.0], device=x.device), torch.arange(3, device=x.device)
        if self.form == "types":
            return y.argmax(1), y > 0, y.half(), y.sum()
        raise ValueError(self.form)


FORMS = (
    "tensor",
    "tuple with None",
    "dict",
    "named tuple",
    "dataclass",
    "model output",
    "transposed",
    "pieces",
    "whole and piece",
    "pieces that overlap",
    "the same tensor twice",
    "an input",
    "views of what is not returned",
    "views of an input",
    "a parameter",
    "what depends on parameters only",
    "a constant",
    "types",
)


def ask(entry: str, model: Any, x: Tensor) -> Any:
    if entry == "gather":
        return torch_mux.gather((model, x))[0]
    if entry == "submit":
        return torch_mux.submit(model, x).result(timeout=120)
    return model(x)


def leaves(answer: Any) -> list[Any]:
    if isinstance(answer, Record):
        answer = [answer.logits, answer.hidden]
    return pytree.tree_leaves(answer)


def _shared(values: list[Any]) -> list[list[bool]]:
    """Which of the tensors share storage with which."""
    storages = [value.untyped_storage().data_ptr() for value in values if isinstance(value, Tensor)]
    return [[one == other for other in storages] for one in storages]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_answers_are_those_of_eager(device: str, form: str) -> None:
    module = Answering(form).eval().to(device)
    model: Any = torch.compile(module, backend="mux", dynamic=False)
    x = torch.randn(4, 6, device=device)
    for inference in (True, False):
        with torch.inference_mode(inference), torch.no_grad():
            want = module(x)
            for entry in (*ENTRIES, *ENTRIES):
                got = ask(entry, model, x)
                assert type(got) is type(want)
                pairs = list(zip(leaves(got), leaves(want), strict=True))
                for one, other in pairs:
                    if not isinstance(other, Tensor):
                        assert one == other and type(one) is type(other)
                        continue
                    assert type(one) is type(other)
                    assert one.stride() == other.stride() and one.dtype is other.dtype
                    assert (
                        one.is_inference() == other.is_inference()
                        and one.requires_grad == other.requires_grad
                    )
                    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
                assert [one is x for one, _ in pairs] == [other is x for _, other in pairs]
                held = [x, *module.parameters()]
                assert _shared([*leaves(got), *held]) == _shared([*leaves(want), *held])
    programs = torch_mux.explain().programs
    assert all(program.coalesced for program in programs), str(torch_mux.explain())


@pytest.mark.parametrize("device", DEVICES)
def test_every_output_has_a_storage_of_its_own(device: str) -> None:
    module = Answering("tuple with None").eval().to(device)
    models: list[Any] = [torch.compile(module, backend="mux", dynamic=False) for _ in range(3)]
    inputs = [torch.randn(4, 6, device=device) for _ in models]
    with torch.inference_mode():
        for _ in range(2):
            answers = torch_mux.gather(*zip(models, inputs, strict=True))
    tensors = [leaf for answer in answers for leaf in answer if isinstance(leaf, Tensor)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 6
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        file = io.BytesIO()
        torch.save(tensor, file)
        assert file.tell() < tensor.nbytes + 4096


@pytest.mark.parametrize("device", DEVICES)
def test_an_answer_stays_as_it_is(device: str) -> None:
    module = Answering("tensor").eval().to(device)
    model: Any = torch.compile(module, backend="mux", dynamic=False)
    with torch.no_grad():
        first = torch_mux.gather((model, torch.randn(4, 6, device=device)))[0]
        kept = first.clone()
        for _ in range(20):
            torch_mux.gather(*[(model, torch.randn(4, 6, device=device))] * 3)
        assert torch.equal(first, kept)
        first.add_(1)
        assert not torch.equal(first, kept)


def test_an_answer_may_be_used_for_training() -> None:
    module = Answering("tensor").eval()
    model: Any = torch.compile(module, backend="mux", dynamic=False)
    with torch.no_grad():
        (features,) = torch_mux.gather((model, torch.randn(4, 6)))
    head = nn.Linear(8, 2)
    head(features).sum().backward()
    assert head.weight.grad is not None
