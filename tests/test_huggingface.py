"""Models of transformers as they come: learned by ``gather`` and ``submit``, and out in one bundle."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from subjects import bundle_sizes
from torch_mux.calls import prepare

try:
    importlib.import_module("torchvision")
except (ImportError, RuntimeError):  # a torchvision made for another torch: transformers does without it
    sys.modules["torchvision"] = None  # type: ignore[assignment]
hf = pytest.importorskip("transformers")

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
COUNT = 8
SMALL: dict[str, Any] = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
}
TEXT: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 16}


class Pooled(nn.Module):
    """A model of one's own around one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.bert, self.head = bert(), nn.Linear(32, 4)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert(tokens, attention_mask=mask).last_hidden_state
        return self.head(hidden.mean(1))  # type: ignore[no-any-return]


def bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**SMALL, **TEXT), add_pooling_layer=False)  # type: ignore[no-any-return]


def vit() -> nn.Module:
    config = hf.ViTConfig(**SMALL, image_size=16, patch_size=8)
    return hf.ViTModel(config, add_pooling_layer=False)  # type: ignore[no-any-return]


def distilbert() -> nn.Module:
    config = hf.DistilBertConfig(dim=32, hidden_dim=64, n_layers=1, n_heads=2, **TEXT)
    return hf.DistilBertModel(config)  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=64, use_cache=False)
    config.bos_token_id = config.eos_token_id = 0
    return hf.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def t5() -> nn.Module:
    config = hf.T5Config(d_model=32, d_kv=16, num_layers=1, num_heads=2, d_ff=64, vocab_size=64)
    return hf.T5EncoderModel(config)  # type: ignore[no-any-return]


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(64, (1, 8)),)


def masked() -> tuple[Tensor, ...]:
    return (*tokens(), torch.ones(1, 8, dtype=torch.long))


def pictures() -> tuple[Tensor, ...]:
    return (torch.randn(1, 3, 16, 16),)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "bert": (bert, masked),
    "vit": (vit, pictures),
    "distilbert": (distilbert, tokens),
    "gpt2": (gpt2, tokens),
    "t5 encoder": (t5, tokens),
    "a module around one": (Pooled, masked),
}


def assert_same(got: Any, want: Any) -> None:
    """The same type, keys, attributes and, within rounding, the same numbers."""
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        return
    assert list(got.keys()) == list(want.keys()) and vars(got).keys() == vars(want).keys()
    for name, value in vars(want).items():
        other = getattr(got, name)
        assert (value is None) == (other is None)
        if value is not None:
            assert other is got[name] or isinstance(value, tuple)
            torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.to_tuple(), want.to_tuple(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_eight_models_go_out_together_on_the_learned_path(device: str, name: str) -> None:
    make, draw = MODELS[name]
    models = [make().eval().to(device) for _ in range(COUNT)]
    inputs = [tuple(x.to(device) for x in draw()) for _ in models]
    compiled = [torch.compile(model, backend="mux", dynamic=False) for model in models]
    requests = [(model, *x) for model, x in zip(compiled, inputs)]
    with torch.inference_mode():
        expected = [model(*x) for model, x in zip(models, inputs)]
        torch_mux.gather(*requests)
        assert all(prepare(model, x, {}).route is not None for model, x in zip(compiled, inputs))
        before = bundle_sizes()
        for got, want in zip(torch_mux.gather(*requests), expected):
            assert_same(got, want)
        keywords = torch_mux.submit(compiled[0], *inputs[0]).result(timeout=60)
        assert_same(keywords, expected[0])
    assert not torch_mux.explain().notes, torch_mux.explain()
    after = bundle_sizes()
    assert after[COUNT] == before.get(COUNT, 0) + 1
    asked = [sum(size * number for size, number in sizes.items()) for sizes in (before, after)]
    assert asked[1] - asked[0] == COUNT + 1
    (program,) = torch_mux.explain().programs
    assert program.coalesced and program.instances == COUNT


def test_collected_outputs_are_given_on_the_guarded_path() -> None:
    """Hooks that stay on the modules and write down what they see: state of the call's own."""
    model, (x, mask) = bert().eval(), masked()
    compiled = torch.compile(model, backend="mux", dynamic=False)
    with torch.inference_mode():
        for _ in range(2):
            future = torch_mux.submit(compiled, x, attention_mask=mask, output_hidden_states=True)
            got = future.result(timeout=120)
            want = model(x, attention_mask=mask, output_hidden_states=True)
            assert len(got.hidden_states) == 2
            assert_same(got, want)
    assert "BertModel: calls stay on the guarded path" in str(torch_mux.explain())


def test_a_cache_that_the_call_fills_stays_on_the_guarded_path() -> None:
    model, (x,) = gpt2().eval(), tokens()
    compiled = torch.compile(model, backend="mux", dynamic=False)
    with torch.inference_mode():
        want = model(x, use_cache=True)
        for _ in range(2):
            got = torch_mux.submit(compiled, x, use_cache=True).result(timeout=120)
            torch.testing.assert_close(got.logits, want.logits, rtol=1e-3, atol=1e-4)
            assert got.past_key_values.get_seq_length() == 8
    assert "GPT2LMHeadModel: calls stay on the guarded path" in str(torch_mux.explain())


def test_a_collector_that_someone_sets_between_calls_is_noticed() -> None:
    """What a frame writes back is watched: a learned call must not hide that it is otherwise now."""
    from transformers.utils.output_capturing import _active_collector

    model, x = bert().eval(), tokens()
    compiled = torch.compile(model, backend="mux", dynamic=False)
    with torch.inference_mode():
        torch_mux.gather((compiled, *x))
        assert prepare(compiled, x, {}).route is not None
        _active_collector.compiling = True
        torch_mux.gather((compiled, *x))
    assert _active_collector.compiling is False
