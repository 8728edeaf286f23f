"""The demo, small: real training, real serving, real answers."""

from __future__ import annotations

import io
import threading

import pytest
import torch
from rich.console import Console
from torch import Tensor

from torch_mux.demo.run import Outcome, run_demo
from torch_mux.demo.serve import Served, quantile, serve, turns
from torch_mux.demo.train import digits, tenants, train
from torch_mux.types import FallbackKind


@pytest.fixture(scope="module")
def shown() -> tuple[Outcome, str]:
    out = io.StringIO()
    outcome = run_demo(2, 2, rounds=1, batches=(1, 8), console=Console(file=out, width=80))
    return outcome, out.getvalue()


def test_every_prediction_is_eagers(shown: tuple[Outcome, str]) -> None:
    outcome, _ = shown
    assert outcome.right and set(outcome.different.values()) == {0}
    for served in (outcome.eager, outcome.inductor, outcome.mux):
        assert served.requests == 4 * 80
        assert {name: len(found) for name, found in served.predictions.items()} == dict.fromkeys(
            outcome.different, 360
        )


def test_requests_were_coalesced(shown: tuple[Outcome, str]) -> None:
    shares = shown[0].coalesced
    assert set(shares) == {"cnn-1", "cnn-2", "transformer-1", "transformer-2"}
    assert all(share is not None and share > 0 for share in shares.values())


def test_it_shows_what_happened(shown: tuple[Outcome, str]) -> None:
    text = shown[1]
    for part in (
        "transformer-2",
        "360/360",
        "Inductor, one after another",
        "torch-mux, together",
        "requests/s",
        "p99",
    ):
        assert part in text
    assert "ResidualCNN" in text and "SmallTransformer" in text and "predictions are eager's" in text
    assert FallbackKind.COMPILE_FAILED.value not in text


def test_models_learn_their_own_subset() -> None:
    data = digits(torch.device("cpu"))
    assert len(data.images) + len(data.held_images) == 1797
    one, other = tenants(2, 0)
    seen: list[float] = []
    for tenant in (one, other):
        train(tenant, data, seen.append)
        assert tenant.accuracy > 0.9 and not tenant.model.training
    assert seen[-1] == 1.0 and max(seen) <= 1.0
    assert not torch.equal(one.model.head.weight, other.model.head.weight)


def test_an_error_of_a_client_is_raised() -> None:
    data = digits(torch.device("cpu"), held=8)

    def fails(tenant: object, images: Tensor) -> Tensor:
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        serve("failing", tenants(1, 1), data, (4,), 1, fails)


def test_turns_never_overlap() -> None:
    data = digits(torch.device("cpu"), held=12)
    customers = tenants(3, 0)
    inside = threading.Lock()

    def model(images: Tensor) -> Tensor:
        assert inside.acquire(blocking=False)
        answer = torch.zeros(len(images), 10)
        inside.release()
        return answer

    served = serve("turns", customers, data, (1, 4), 2, turns({tenant.name: model for tenant in customers}))
    assert isinstance(served, Served) and served.requests == 3 * 2 * 6
    assert served.latency(0.5) <= served.latency(0.99) and served.rate > 0


def test_quantile() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], q) for q in (0.0, 0.5, 0.99)] == [1.0, 3.0, 4.0]
