"""What is measured of ours beside rounds, at small sizes on a CPU; and the floor, against what is known."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import torch_mux
from torch_mux.bench import floor
from torch_mux.bench.contenders import Mux
from torch_mux.bench.layers import LAYERS, Layer
from torch_mux.bench.measures import MEASURES, Stage
from torch_mux.bench.measures.caps import CAPS
from torch_mux.bench.measures.launches import rounds_of
from torch_mux.bench.measures.stage import newcomers
from torch_mux.bench.models_table import _flat
from torch_mux.bench.workloads import WORKLOADS, build

CPU = torch.device("cpu")


@pytest.fixture(params=["tiny-cnn", "tiny-encoder"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    tenants = build(WORKLOADS[request.param], 3, CPU, torch.float32)
    with torch.inference_mode():
        mux = Mux()
        mux.prepare(tenants, (3, 1))
        yield Stage(mux, tenants, (3, 1), 10)
        mux.release()


def test_a_further_tenant_is_ready_without_a_trace_and_right(stage: Stage) -> None:
    found = MEASURES["tenant"](stage)
    assert (found["traces"], found["new_programs"]) == (0, 0)
    assert found["worst_error"] < 1e-5
    assert len(found["ready_ms"]) == 4 and min(found["ready_ms"]) > 0
    gc.collect()
    instances = {program.instances for program in torch_mux.explain().programs}
    assert instances == {3}, "the newcomers are gone"


def test_adopted_newcomers_answer_the_same(stage: Stage) -> None:
    for adopted in (False, True):
        assert all(each.error < 1e-5 for each in newcomers(stage, 2, adopted))


def test_sizes_that_were_not_seen_are_asked_for_once_cold_and_once_warm(stage: Stage) -> None:
    found = MEASURES["size"](stage)["sizes"]
    assert list(found) == [5, 7, 9]
    for entry in found.values():
        assert entry["first_round_ms"] > 0 and entry["later_round_ms"] > 0
        assert entry["captured"] is False  # there are no CUDA graphs on a CPU


def test_clients_in_threads_are_compared_with_gather(stage: Stage) -> None:
    before = torch_mux.stats().tenants
    found = MEASURES["clients"](stage)
    assert found["clients"] == 3
    rates = found["requests_per_second"]
    assert set(rates) == {"gather", "submit", "call"} and all(len(each) == 3 for each in rates.values())
    assert all(share > 0 for share in found["share_of_gather"].values())
    after = torch_mux.stats().tenants
    for index in range(3):  # 1 + 3 timed turns of two ways, and a request ahead of each
        name = f"bench-client-{index}"
        asked = after[name].ok - (before[name].ok if name in before else 0)
        assert asked == 2 * (4 + 1 + 3 * 10)


def test_a_client_that_fails_is_the_measures_error(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise ZeroDivisionError("a client")

    monkeypatch.setattr(torch_mux, "submit", fails)
    with pytest.raises(ZeroDivisionError, match="a client"):
        MEASURES["clients"](stage)


def test_latency_against_caps_says_where_they_are_not_enforced(stage: Stage) -> None:
    found = MEASURES["caps"](stage)
    assert found["enforced"] is False
    assert list(found["latency_us"]) == [3, 1]
    assert all(tuple(each) == CAPS for each in found["latency_us"].values())
    assert torch_mux.stats().tenants["bench-capped-0.25"].ok > 0


def test_device_memory_is_not_made_up_on_a_cpu(stage: Stage) -> None:
    found = MEASURES["memory"](stage)
    assert found == {"counted": False, "weights": stage.tenants.weight_bytes()}


def device_events(rounds: int, slower: float = 0.0) -> list[dict[str, Any]]:
    """Rounds of a copy, a kernel 1 us behind it and one 2 us behind that, 20 us apart."""
    found = []
    for turn in range(rounds):
        longer = slower if turn == rounds - 1 else 0.0
        for name, start, length in (("copy", 0.0, 1.0), ("first", 2.0, 3.0 + longer), ("second", 7.0, 4.0)):
            event = {"name": name, "ts": 20.0 * turn + start, "dur": length, "args": {"grid": [8, 1, 1]}}
            found.append(event)
    return found


def test_launches_are_medians_over_equal_rounds() -> None:
    found = rounds_of(list(reversed(device_events(7, slower=1.0))), 7)
    assert [(one["name"], one["us"], one["idle_us"]) for one in found["launches"]] == [
        ("copy", 1.0, 0.0),
        ("first", 3.0, 1.0),
        ("second", 4.0, 2.0),
    ]
    assert (found["total_us"], found["idle_us"]) == (8.0, 3.0)
    assert _flat(found) == "launches 3, total_us 8, idle_us 3"


def test_launches_that_make_no_equal_rounds_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="20 launches are not 7 equal rounds"):
        rounds_of(device_events(7)[:-1], 7)
    other = device_events(7)
    other[-1]["name"] = "another"
    with pytest.raises(RuntimeError, match="equal rounds"):
        rounds_of(other, 7)


def test_launches_are_not_made_up_on_a_cpu(stage: Stage) -> None:
    assert MEASURES["launches"](stage) == {"profiled": False}


def test_floors_are_of_every_number_of_tenants(stage: Stage) -> None:
    found = MEASURES["floor"](stage)["floors"]
    assert found[3]["flops"] == 3 * found[1]["flops"] and found[3]["levels"] == found[1]["levels"]


def test_the_floor_of_layers_of_nothing_but_weights() -> None:
    tenants = build(WORKLOADS["mlp"], 1, CPU, torch.float16, variants=1)
    found = floor.round_floor(tenants, 64, floor.H100)
    assert found.levels == 3
    assert found.flops == 64 * 3 * 2 * 1024**2
    assert found.nbytes == 64 * 3 * (1024**2 + 1024) * 2
    assert found.seconds == pytest.approx(found.nbytes / 3.0e12 + 3e-6)
    faster = floor.round_floor(tenants, 64, "NVIDIA H200")
    assert faster.seconds == pytest.approx(found.nbytes / 4.3e12 + 3e-6)
    assert faster.data()["device"] == "NVIDIA H200"
    assert floor.round_floor(tenants, 64, "another GPU").data()["device"] == floor.H100


def test_the_floor_counts_every_weight_once_and_levels_along_the_longest_way() -> None:
    tenants = build(WORKLOADS["tiny-encoder"], 1, CPU, torch.float32, variants=1)
    found = floor.round_floor(tenants, 1, floor.H100)
    layers = [*tenants.models[0].get_submodule("qkv").parameters()]
    layers += [*tenants.models[0].get_submodule("out").parameters()]
    assert found.nbytes == sum(each.nbytes for each in layers)
    assert found.levels in (6, 8)  # two blocks: a product, attention as one operation or two, a product
    assert found.flops > 2 * 12 * sum(each.numel() for each in layers if each.dim() == 2)


def test_the_floor_of_a_layer_is_its_traffic_or_its_arithmetic() -> None:
    layers = {layer.name: layer for layer in LAYERS}
    traffic = 2 * 16 * 3136 * (64 + 2 * 256) + 2 * 16 * 64 * 256
    expected = traffic / 3.0e12 + 1e-6
    assert floor.layer_floor(layers["1x1 64-256 @56 add"], 16, "an unknown GPU") == pytest.approx(expected)
    wide = Layer("own", "wide", 4096, 4096, 4096, 1)
    assert floor.layer_floor(wide, 1, floor.H100) == pytest.approx(2 * 4096**3 / 800e12 + 1e-6)


@pytest.mark.gpu
def test_every_measure_on_a_gpu() -> None:
    tenants = build(WORKLOADS["tiny-cnn"], 4, torch.device("cuda"), torch.float16)
    with torch.inference_mode():
        mux = Mux()
        mux.prepare(tenants, (4, 1))
        stage = Stage(mux, tenants, (4, 1), 20)
        found = {name: run(stage) for name, run in MEASURES.items()}
        mux.release()
    assert all(entry["captured"] for entry in found["size"]["sizes"].values())
    assert (found["tenant"]["traces"], found["tenant"]["new_programs"]) == (0, 0)
    assert found["caps"]["enforced"] is True
    rounds = found["launches"]["rounds"]
    assert set(rounds) == {4, 1} and all(each["total_us"] > 0 for each in rounds.values())
    assert len(rounds[4]["launches"]) == len(rounds[1]["launches"]) > 3
    memory = found["memory"]
    assert set(range(1, 17)) <= set(memory["sizes_1_to_16"]["captured"])
    assert memory["adopted"]["times_its_weights"] <= memory["plain"]["times_its_weights"]
    assert found["clients"]["share_of_gather"]["submit"] > 0
