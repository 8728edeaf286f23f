"""Which build of the package it is, and what records say of the host."""

from __future__ import annotations

import torch

from torch_mux.bench.measure import call_seconds, environment
from torch_mux.compat.build import compiled
from torch_mux.info import info
from torch_mux.runtime.scheduler import policy


def test_everybody_says_the_same_of_the_build() -> None:
    assert compiled() is not policy.__file__.endswith(".py")
    name = "compiled" if compiled() else "interpreted"
    assert info()["runtime"] == name
    assert environment(torch.device("cpu"))["runtime"] == name


def test_the_speed_of_the_host_is_that_of_a_call() -> None:
    facts = environment(torch.device("cpu"))
    assert 1.0 < facts["python_call_ns"] < 10_000.0
    assert call_seconds(calls=100) > 0.0
