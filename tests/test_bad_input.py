"""Every mistake gets a named error that says what to do, and nobody else notices."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_mux
from torch_mux import errors
from torch_mux.runtime.executors import make
from torch_mux.types import FallbackKind

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.line(x).relu())  # type: ignore[no-any-return]


class Lookup(nn.Module):
    """Raises for tokens from 7 on."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens)).relu()  # type: ignore[no-any-return]


@torch.library.custom_op("torch_mux_tests::no_sevens", mutates_args=())
def no_sevens(tokens: Tensor) -> Tensor:
    """The tokens as they are; raises where one is 7 or more."""
    if bool((tokens >= 7).any()):
        raise ValueError("a token is not below seven")
    return tokens.clone()


@no_sevens.register_fake
def _(tokens: Tensor) -> Tensor:
    return torch.empty_like(tokens)


class Checked(Lookup):
    """An operation of its own does the raising, so a part of it runs per instance."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(no_sevens(tokens))


def compiled(kind: Callable[[], nn.Module] = Net, device: str = "cpu", **options: Any) -> Any:
    return torch.compile(kind().eval().to(device), backend="mux", dynamic=False, **options)


def by_call(model: Any, *args: Any) -> Any:
    return model(*args)


def by_gather(model: Any, *args: Any) -> Any:
    return torch_mux.gather((model, *args))[0]


def by_submit(model: Any, *args: Any) -> Any:
    return torch_mux.submit(model, *args).result(timeout=120)


def by_thread(model: Any, *args: Any) -> Any:
    def client() -> Any:
        with torch.inference_mode():
            return model(*args)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(client).result()


WAYS = [by_call, by_gather, by_submit, by_thread]


# torch.compile's own arguments.


@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_option_reaches_the_user_as_it_is(way: Callable[..., Any]) -> None:
    model = compiled(options={"max_wait": "1ms"})
    for _ in range(2):
        expected = pytest.raises(errors.UnknownOption, match=r"'max_wait'.*configure")
        with torch.inference_mode(), expected as caught:
            way(model, torch.randn(2, 6))
        assert type(caught.value).__name__ == "UnknownOption"
        assert not str(caught.value).startswith("backend='mux' raised")


@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_mode(way: Callable[..., Any]) -> None:
    model = compiled(mode="max-autotune")
    with torch.inference_mode(), pytest.raises(errors.UnknownOption, match="mode 'max-autotune'"):
        way(model, torch.randn(2, 6))


def test_the_default_mode_is_fine() -> None:
    model, x = compiled(mode="default"), torch.randn(2, 6)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), model._orig_mod(x))


# Quotas and settings.

QUOTAS: list[tuple[dict[str, Any], type[errors.MuxError], str]] = [
    ({"smz": 0.5}, errors.UnknownOption, "did you mean 'sms'"),
    ({"sms": 0}, errors.InvalidQuota, "sms=0"),
    ({"sms": -0.5}, errors.InvalidQuota, "sms=-0.5"),
    ({"sms": 1.01}, errors.InvalidQuota, "sms=1.01"),
    ({"weight": -1}, errors.InvalidQuota, "weight=-1"),
    ({"reserve": 1.5}, errors.InvalidQuota, "reserve=1.5"),
    ({"slo": "20 parsecs"}, errors.UnparsableQuantity, "'20 parsecs'.*20ms"),
    ({"slo": "-1ms"}, errors.UnparsableQuantity, "'-1ms'"),
    ({"memory": "much"}, errors.UnparsableQuantity, "'much'.*4GiB"),
]


@pytest.mark.parametrize(("fields", "error", "text"), QUOTAS)
def test_a_bad_quota(fields: dict[str, Any], error: type[errors.MuxError], text: str) -> None:
    before = torch_mux.current_quota()
    with pytest.raises(error, match=text), torch_mux.quota("alice", **fields):
        pass
    assert torch_mux.current_quota() == before


SETTINGS: list[tuple[dict[str, Any], type[errors.MuxError], str]] = [
    ({"max_waits": 1}, errors.UnknownOption, "did you mean 'max_wait'"),
    ({"max_wait": "soon"}, errors.UnparsableQuantity, "'soon'"),
    ({"max_bundle": 0}, errors.InvalidSetting, "max_bundle=0"),
    ({"max_bundle": 2.5}, errors.InvalidSetting, "max_bundle=2.5"),
    ({"enabled": "yes"}, errors.InvalidSetting, "enabled='yes'"),
]


@pytest.mark.parametrize(("fields", "error", "text"), SETTINGS)
def test_a_bad_setting_changes_nothing(
    fields: dict[str, Any], error: type[errors.MuxError], text: str
) -> None:
    before = torch_mux.configure()
    with pytest.raises(error, match=text):
        torch_mux.configure(max_bundle=fields.pop("max_bundle", 7), **fields)
    assert torch_mux.configure() == before


# Models and inputs.


def test_what_is_not_compiled_with_mux() -> None:
    x = torch.randn(2, 6)
    others = torch.compile(Net().eval(), backend="eager"), torch.compile(Net().eval())
    for model in (Net().eval(), *others, None):
        for way in (by_gather, by_submit):
            with pytest.raises(errors.NotCompiled, match=r'torch\.compile\(model, backend="mux"\)'):
                way(model, x)
        for function in (torch_mux.refresh, torch_mux.remove, torch_mux.warmup):
            with pytest.raises(errors.NotCompiled):
                function(model)
    with pytest.raises(errors.InvalidRequest, match=r"request 0.*gather\(\(model"):
        torch_mux.gather(Net())  # type: ignore[arg-type]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("way", [by_gather, by_submit])
def test_inputs_on_another_device(way: Callable[..., Any], known: bool) -> None:
    model, x = compiled(), torch.randn(2, 6)
    with torch.inference_mode():
        if known:
            way(model, x)
        with pytest.raises(errors.DeviceMismatch, match=r"input 0 of Net is on meta.*cpu.*\.to\('cpu'\)"):
            way(model, x.to("meta"))
        torch.testing.assert_close(way(model, x), model._orig_mod(x))


@pytest.mark.gpu
@pytest.mark.parametrize("way", [by_gather, by_submit])
def test_inputs_left_on_the_host(way: Callable[..., Any]) -> None:
    model, x = compiled(device="cuda"), torch.randn(2, 6)
    with torch.inference_mode():
        for _ in range(2):
            with pytest.raises(errors.DeviceMismatch, match=r"input 0 of Net is on cpu.*cuda:0"):
                way(model, x)
            way(model, x.cuda())


@pytest.mark.parametrize("device", DEVICES)
def test_a_request_after_remove_and_the_way_back(device: str) -> None:
    model, other, x = compiled(device=device), compiled(device=device), torch.randn(2, 6, device=device)
    with torch.inference_mode():
        for _ in range(2):
            for way in WAYS:
                way(model, x)
            by_gather(other, x)
            torch_mux.remove(model)
            for way in WAYS:
                with pytest.raises(errors.ModelRemoved, match=r"Net was removed.*refresh\(model\)"):
                    way(model, x)
            with pytest.raises(errors.ModelRemoved):
                torch_mux.gather((other, x), (model, x), (other, x))
            torch.testing.assert_close(by_gather(other, x), other._orig_mod(x), rtol=1e-3, atol=1e-4)
            torch_mux.refresh(model)
            for way in WAYS:
                torch.testing.assert_close(way(model, x), model._orig_mod(x), rtol=1e-3, atol=1e-4)


# Exceptions inside a model.


def _failing(device: str, kind: Callable[[], nn.Module]) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    """(models, good inputs, answers) of five tenants; the third one's input 9 raises."""
    models = [compiled(kind, device) for _ in range(5)]
    inputs = [torch.randint(0, 7, (2, 4), device=device) for _ in models]
    return models, inputs, [by_call(model, x) for model, x in zip(models, inputs)]


CASES = [
    pytest.param("cpu", Lookup, "IndexError|out of range|out of bounds", id="cpu-embedding"),
    pytest.param("cpu", Checked, "not below seven", id="cpu-operation"),
    pytest.param("cuda", Checked, "not below seven", id="cuda-operation", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("device", "kind", "text"), CASES)
def test_an_exception_reaches_its_own_caller_only(
    device: str, kind: Callable[[], nn.Module], text: str
) -> None:
    with torch.inference_mode():
        models, inputs, answers = _failing(device, kind)
        bad = torch.full((2, 4), 9, device=device)
        asked = [bad if index == 2 else x for index, x in enumerate(inputs)]
        for way in WAYS:
            with pytest.raises(errors.ExecutionFailed, match=f"{kind.__name__} failed.*({text})") as caught:
                way(models[2], bad)
            assert caught.value.__cause__ is not None
        for _ in range(2):
            with pytest.raises(errors.ExecutionFailed, match=text):
                torch_mux.gather(*zip(models, asked))
        torch_mux.configure(max_wait="20ms")
        futures = [torch_mux.submit(model, x) for model, x in zip(models, asked)]
        for index, future in enumerate(futures):
            if index == 2:
                assert isinstance(future.exception(timeout=120), errors.ExecutionFailed)
            else:
                assert torch.equal(future.result(timeout=120), answers[index])
    gate, seen = threading.Barrier(5), [None] * 5

    def client(index: int) -> Any:
        with torch.inference_mode(), torch_mux.quota(f"tenant {index}"):
            gate.wait()
            return models[index](asked[index])

    with ThreadPoolExecutor(5) as pool:
        seen = [pool.submit(client, index) for index in range(5)]
    for index, done in enumerate(seen):
        if index == 2:
            assert isinstance(done.exception(), errors.ExecutionFailed)
        else:
            assert torch.equal(done.result(), answers[index])
    tenants = torch_mux.stats().tenants
    assert [tenants[f"tenant {index}"].errors for index in range(5)] == [0, 0, 1, 0, 0]
    assert [tenants[f"tenant {index}"].ok for index in range(5)] == [1, 1, 0, 1, 1]


# Models that mux cannot serve.


@pytest.mark.parametrize("way", [by_gather, by_submit])
def test_a_model_that_never_reaches_the_backend(way: Callable[..., Any]) -> None:
    model, x = compiled(lambda: nn.LSTM(4, 4)), torch.randn(3, 1, 4)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="LSTM: no graph of the model reached the backend"):
            answer, _ = way(model, x)
        torch.testing.assert_close(answer, model._orig_mod(x)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            way(model, x)
    (note,) = torch_mux.explain().notes
    assert note.reason.kind is FallbackKind.NOT_REACHED and note.reason.target == "LSTM"
    assert "LSTM: no graph of the model reached the backend" in str(torch_mux.explain())


@pytest.mark.parametrize(
    "kind", [Net, lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU())], ids=["own", "builtin"]
)
@pytest.mark.parametrize("way", [by_call, by_gather, by_submit])
def test_an_eval_call_with_grad_enabled(way: Callable[..., Any], kind: Callable[[], nn.Module]) -> None:
    model, x = compiled(kind), torch.randn(2, 6)
    name = type(model._orig_mod).__name__
    with pytest.warns(UserWarning, match=f"{name} is in eval mode but grad is enabled.*inference_mode"):
        answer = way(model, x)
    torch.testing.assert_close(answer, model._orig_mod(x))
    assert answer.requires_grad
    (note,) = torch_mux.explain().notes
    assert note.reason.kind is FallbackKind.TRAINING and note.reason.target == name
    assert f"{name}: grad mode is enabled and a tensor requires grad" in str(torch_mux.explain())
    with torch.inference_mode():
        torch.testing.assert_close(way(model, x), model._orig_mod(x))
    (program,) = torch_mux.explain().programs
    assert program.name == name and program.coalesced


def test_training_is_no_mistake() -> None:
    model, x = torch.compile(Net().train(), backend="mux", dynamic=False), torch.randn(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(x).sum().backward()
    assert model._orig_mod.line.weight.grad is not None  # type: ignore[union-attr]


# No GPU.


def test_one_line_tells_that_the_cpu_serves(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "_told", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, logger="torch_mux"), torch.inference_mode():
        for width in (5, 6):
            by_gather(compiled(lambda width=width: nn.Linear(6, width)), torch.randn(2, 6))
            torch_mux.reset()
    lines = [record for record in caplog.records if "CPU executor" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].levelno == logging.INFO
    assert "no GPU was found" in lines[0].getMessage()
    assert "recorded, not enforced" in lines[0].getMessage()


# The end.


@pytest.mark.parametrize("device", DEVICES)
def test_after_close_everything_is_refused_until_reset(device: str) -> None:
    model, x = compiled(device=device), torch.randn(2, 6, device=device)
    with torch.inference_mode():
        for _ in range(2):
            for way in WAYS:
                way(model, x)
            torch_mux.close()
            for way in WAYS:
                with pytest.raises(errors.ClosedError, match="reset"):
                    way(model, x)
            fresh = compiled(lambda: nn.Linear(6, 3), device)
            with pytest.raises(errors.ClosedError):
                by_call(fresh, x)
            torch_mux.close()
            torch_mux.reset()
            for way in WAYS:
                torch.testing.assert_close(way(model, x), model._orig_mod(x), rtol=1e-3, atol=1e-4)
