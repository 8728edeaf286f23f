"""The peer harness: its logic, on small models and without a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_mux import api
from torch_mux.bench import measure, models
from torch_mux.bench.contenders import CONTENDERS, Eager, Mux, default_contenders
from torch_mux.bench.host import PARTS, gather_parts
from torch_mux.bench.measures import MEASURES, Stage
from torch_mux.bench.workloads import CPU_TABLE, TABLE, WORKLOADS, Encoded, Tenants, build

CPU = torch.device("cpu")


@pytest.fixture(params=["tiny-cnn", "tiny-encoder"])
def tenants(request: pytest.FixtureRequest) -> Tenants:
    return build(WORKLOADS[request.param], 3, CPU, torch.float32)


def test_tenants_have_weights_and_requests_of_their_own(tenants: Tenants) -> None:
    first, second = (list(model.parameters()) for model in tenants.models[:2])
    assert any(not torch.equal(a, b) for a, b in zip(first, second))
    texts = {str([x.tolist() for x in args]) for row in tenants.requests for args in row}
    assert len(texts) == 12
    again = build(tenants.workload, 3, CPU, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, again.models[0].parameters()))
    assert tenants.weight_bytes() == sum(t.nbytes for t in tenants.models[0].state_dict().values())


def test_channels_last_reaches_weights_and_images() -> None:
    tenants = build(WORKLOADS["tiny-cnn"], 1, CPU, torch.float32, channels_last=True)
    image = tenants.requests[0][0][0]
    assert image.is_contiguous(memory_format=torch.channels_last)
    weight = tenants.models[0].get_parameter("block.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_errors_are_small_for_a_right_contender(tenants: Tenants) -> None:
    with torch.no_grad():
        exact = measure.references(tenants)
        eager = Eager()
        eager.prepare(tenants, (3,))
        found = measure.errors(eager, tenants, exact, 3)
    assert exact[0][0].dtype == torch.float64
    assert 0 < found["mean"] <= found["worst"] < 1e-5
    assert found["answers"] == 12


class Reusing(Eager):
    """Wrong: every round writes its answers where the last one's are."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: list[Tensor] = []

    def round(self, requests: Sequence[tuple[Tensor, ...]]) -> Sequence[Any]:
        answers = super().round(requests)
        if not self.slots:
            self.slots = [answer.clone() for answer in answers]
        for slot, answer in zip(self.slots, answers):
            slot.copy_(answer)
        return self.slots


class Swapped(Eager):
    """Wrong: tenants get each other's answers."""

    def round(self, requests: Sequence[tuple[Tensor, ...]]) -> Sequence[Any]:
        return list(reversed(super().round(requests)))


@pytest.mark.parametrize("wrong", [Reusing, Swapped])
def test_errors_show_a_wrong_contender(tenants: Tenants, wrong: type[Eager]) -> None:
    with torch.no_grad():
        contender = wrong()
        contender.prepare(tenants, (3,))
        found = measure.errors(contender, tenants, measure.references(tenants), 3)
    assert found["worst"] > 1e-2


def test_mux_answers_and_goes_out_coalesced(tenants: Tenants) -> None:
    with torch.no_grad():
        exact = measure.references(tenants)
    with torch.inference_mode():
        mux = Mux()
        mux.prepare(tenants, (3, 1))
        assert measure.errors(mux, tenants, exact, 3)["worst"] < 1e-5
        assert measure.errors(mux, tenants, exact, 1)["worst"] < 1e-5
    assert mux.notes()["coalesced share at 3"] == 1.0
    mux.release()


def test_mux_answers_with_the_models_own_output() -> None:
    tenants = build(WORKLOADS["tiny-encoder"], 2, CPU, torch.float32)
    with torch.no_grad():
        exact = measure.references(tenants)
    with torch.inference_mode():
        raw = CONTENDERS["mux-raw"]()
        raw.prepare(tenants, (2,))
        assert measure.errors(raw, tenants, exact, 2)["worst"] < 1e-5
        assert all(isinstance(answer, Encoded) for answer in raw.round(tenants.requests[0]))
    raw.release()


def test_the_spread_of_times() -> None:
    spread = measure.Spread.of([3e-6, 1e-6, 2e-6])
    assert spread.data() == pytest.approx({"median": 2.0, "low": 1.0, "high": 3.0})


def test_the_command_line_writes_a_record_and_prints_the_table_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_MUX_COMMIT", "abc123")
    path = tmp_path / "records" / "out.json"
    flags = "--tiny --device cpu --models tiny-cnn --tenants 1,2 --rounds 4 --repetitions 2"
    models.main([*flags.split(), "--contenders", "eager,mux", "--json", str(path)])
    record = json.loads(path.read_text())
    facts = record["environment"]
    assert facts["commit"] == "abc123"
    assert facts["torch"] == torch.__version__
    places = [(entry["contender"], entry["tenants"]) for entry in record["results"]]
    assert places == [(CONTENDERS[key]().name, count) for key in ("eager", "mux") for count in (1, 2)]
    for entry in record["results"]:
        for kind in ("pipelined_us", "synchronised_us"):
            assert 0 < entry[kind]["low"] <= entry[kind]["median"] <= entry[kind]["high"]
        assert entry["error"]["worst"] < 1e-5
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) == 2 + len(places)
    assert record["measures"] == []
    assert "abc123" in printed[0]
    assert printed[1].split()[:3] == ["model", "tenants", "contender"]


def test_unknown_names_are_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        ("--models resnet51", "unknown model resnet51; choose from resnet50"),
        ("--models bert@4/x", "is not a list of whole numbers such as 1,4,16 and bert@1/4/16"),
        ("--models bert@0", "must be at least 1"),
        ("--contenders eagre", "unknown contender eagre; choose from eager, inductor, graphs"),
        ("--measures speed", "unknown measure speed; choose from rounds, floor, launches"),
        ("--measures rounds,clients --contenders eager", "add mux to --contenders"),
        ("--limit 0", "--limit must be more than 0 seconds"),
        ("--preparing -1", "--preparing must be more than 0 seconds"),
    ):
        with pytest.raises(SystemExit):
            models.main(["--device", "cpu", *flags.split()])
        assert words in capsys.readouterr().err


def test_what_the_command_line_selects() -> None:
    def options(flags: str) -> models.Options:
        return models.options_from(models.parser().parse_args(flags.split()))

    plain = options("--device cuda")
    assert plain.measures == ("rounds",) and plain.contenders == ()
    assert [plain.counts_of(name) for name in plain.models] == [(16,)] * 3
    every = options("--device cuda --models table --contenders all --measures all")
    assert {name: every.counts_of(name) for name in every.models} == TABLE
    assert every.contenders == tuple(CONTENDERS) and every.measures == ("rounds", *MEASURES)
    own = options("--device cuda --models bert@1/4,mlp --tenants 64")
    assert own.counts_of("bert") == (1, 4) and own.counts_of("mlp") == (64,)
    small = options("--device cpu --models table")
    assert {name: small.counts_of(name) for name in small.models} == CPU_TABLE
    assert all(name in WORKLOADS for name in {**TABLE, **CPU_TABLE})


def test_measures_beside_rounds_are_in_the_record_and_one_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(stage: Stage) -> dict[str, Any]:
        raise ValueError("nobody counts")

    monkeypatch.setitem(MEASURES, "memory", fails)
    path = tmp_path / "out.json"
    flags = "--device cpu --models tiny-mlp@1/3 --rounds 4 --repetitions 1 --contenders mux"
    assert models.main([*flags.split(), "--measures", "size,floor,memory", "--json", str(path)]) == 1
    record = json.loads(path.read_text())
    assert all("pipelined_us" not in entry for entry in record["results"])
    floors, sizes, memory = record["measures"]
    assert (floors["measure"], sizes["measure"], memory["measure"]) == ("floor", "size", "memory")
    assert floors["floors"]["3"]["levels"] == 3
    assert memory["failed"] == "ValueError: nobody counts"
    assert {entry["model"] for entry in record["measures"]} == {"tiny-mlp"}
    words = models.table(record).splitlines()
    assert words[-1] == "tiny-mlp, memory: failed: ValueError: nobody counts"


def test_the_record_is_saved_after_every_contender_and_the_budget_sheds_repetitions() -> None:
    saved: list[dict[str, Any]] = []
    options = models.Options(
        models=("tiny-cnn",), tenants=(2,), contenders=("eager", "inductor"), device=CPU,
        dtype=torch.float32, repetitions=50, rounds=4, budget=0.0,
    )  # fmt: skip
    report = models.run(options, lambda found: saved.append(json.loads(json.dumps(found, default=str))))
    assert [record["repetitions"] for record in report["results"]] == [1, 1]
    done = [[("error" in record) for record in found["results"]] for found in saved]
    assert done[0] == [True, False] and done[1] == [True, True]
    assert saved[-1]["results"] == report["results"]


def test_peers_share_what_inductor_compiled(tenants: Tenants) -> None:
    first, second = CONTENDERS["inductor"](), CONTENDERS["inductor"]()
    with torch.no_grad():
        for peer in (first, second):
            peer.prepare(tenants, (3,))
    calls, again = first.callables, second.callables  # type: ignore[attr-defined]
    assert calls and all(one is other for one, other in zip(calls, again, strict=True))


def test_the_host_time_of_a_gather_by_part(tenants: Tenants) -> None:
    with torch.inference_mode():
        mux = Mux()
        mux.prepare(tenants, (3,))
        parts = gather_parts(mux, tenants, 3, rounds=5)
        before = api.prepare
        gather_parts(mux, tenants, 1, rounds=1)
    assert api.prepare is before
    assert list(parts) == [*PARTS, "other", "total"]
    assert all(parts[part] > 0 for part in PARTS)
    assert sum(parts[part] for part in [*PARTS, "other"]) == pytest.approx(parts["total"], rel=0.5)
    mux.release()


@pytest.mark.parametrize(
    ("listed", "used", "words"),
    [
        ("GPU:0\nprocess    4242 uses    900.000 MB GPU memory", 1, "process    4242 uses"),
        ("pynvml module not found, please install pynvml", 5, "4.5 GiB of this GPU's memory"),
        ("GPU:0\nno processes are running", 1, None),
    ],
)
def test_a_gpu_that_somebody_else_uses(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    listed: str,
    used: int,
    words: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda device: listed)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((80 - used) << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 << 29)
    measure.announce(torch.device("cuda"))
    shown = capsys.readouterr().err
    assert (shown == "") if words is None else (words in shown and shown.startswith("warning: "))
    assert measure.neighbours(CPU) is None


def test_the_peers_of_a_device() -> None:
    assert default_contenders(torch.device("cuda")) == ["graphs", "forked", "mux"]
    assert default_contenders(CPU) == ["eager", "inductor", "mux"]


@pytest.mark.gpu
def test_graph_peers_answer_and_count_launches() -> None:
    device = torch.device("cuda")
    for name in ("tiny-cnn", "tiny-encoder"):
        tenants = build(WORKLOADS[name], 4, device, torch.float16)
        with torch.no_grad():
            exact = measure.references(tenants)
        with torch.inference_mode():
            for key in ("graphs", "forked", "mux"):
                contender = CONTENDERS[key]()
                contender.prepare(tenants, (4, 1))
                assert measure.errors(contender, tenants, exact, 4)["worst"] < 1e-2
                one, four = (measure.launches(contender, tenants, count) for count in (1, 4))
                assert one is not None
                assert four is not None
                if key == "mux":
                    assert four["kernels"] <= one["kernels"] + 4
                else:
                    assert four["kernels"] >= 3 * one["kernels"]


def test_a_record_names_its_command_and_no_folders() -> None:
    argv = ["/somewhere/torch_mux/bench/models.py", "--json", "/out/models.json", "--models", "vit"]
    assert measure.command(argv) == "python -m torch_mux.bench.models --json models.json --models vit"
    assert measure.command(["/venv/bin/torch-mux", "bench", "zoo"]) == "torch-mux bench zoo"
