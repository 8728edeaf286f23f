"""The benchmark of mixes: its rows, its record and its table, on small models."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_mux
from torch_mux.bench import mix, mix_contenders, mix_table, plot_mix, plot_trace
from torch_mux.bench.ahead import Wanted, compile_ahead
from torch_mux.bench.mix_contenders import MuxMix, name_of
from torch_mux.bench.mix_rows import ROWS, Pool, longest_of, workload_of
from torch_mux.bench.plot import BEGIN, END
from torch_mux.bench.vision import import_torchvision
from torch_mux.bench.workloads import Encoder


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch_mux.reset()
    yield
    torch_mux.reset()


def test_own_plans_and_packed_on_small_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mix.json"
    flags = ["--rows", "tiny", "--contenders", "serial,packed", "--repetitions", "1", "--rounds", "4"]
    assert mix.main([*flags, "--json", str(path), "--device", "cpu", "--dtype", "float32"]) == 0
    report = json.loads(path.read_text())
    serial, packed = report["results"]
    assert [record["tenants"] for record in (serial, packed)] == [5, 5]
    for record in (serial, packed):
        assert record["error"]["worst"] < 1e-4
        assert record["pipelined_us"]["median"] > 0
    assert serial["notes"]["mixes"] == []
    (built,) = packed["notes"]["mixes"]
    assert built["state"] == "runs as one" and built["joint"] > 0
    assert sorted(slots for _, slots in built["members"]) == [1, 2, 2]
    text = capsys.readouterr().out
    assert "torch-mux, packed" in text and "vs own" in text


def test_lengths_on_branches_and_packed(tmp_path: Path) -> None:
    path = tmp_path / "mix.json"
    flags = ["--rows", "tiny-lengths", "--contenders", "branches,auto,packed", "--repetitions", "1"]
    assert (
        mix.main(
            [*flags, "--rounds", "4", "--json", str(path), "--device", "cpu", "--dtype", "float32"],
        )
        == 0
    )
    branches, auto, packed = json.loads(path.read_text())["results"]
    for record in (branches, auto, packed):
        assert record["tenants"] == 6 and record["error"]["worst"] < 1e-4
    (built,) = packed["notes"]["mixes"]
    assert [slots for _, slots in built["members"]].count(2) == 2, "odd lengths twice"
    assert built["seconds"] > 0 and mix_table.predicted(packed) == f"{built['seconds'] * 1e6:.0f}"
    assert mix_table.predicted(branches) == "-"


def test_a_contender_that_fails_is_a_row_with_its_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(MuxMix):
        def prepare(self, tenants: object, counts: object) -> None:
            raise ValueError("no such thing")

    monkeypatch.setitem(mix.CONTENDERS, "packed", lambda: Broken("broken"))
    flags = ["--rows", "tiny", "--contenders", "packed,serial", "--repetitions", "1", "--rounds", "2"]
    assert mix.main([*flags, "--device", "cpu", "--dtype", "float32"]) == 1
    text = capsys.readouterr().out
    assert "tiny: broken failed: ValueError: no such thing" in text
    assert "own plans, one after another" in text


@pytest.mark.parametrize("wrong", [["--rows", "none"], ["--contenders", "none"], ["--rounds", "0"]])
def test_wrong_words_are_told(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        mix.main(["--device", "cpu", *wrong])
    assert ended.value.code == 2
    assert "none" in capsys.readouterr().err or wrong[0] == "--rounds"


def test_rows_are_those_of_the_table() -> None:
    assert {name: row.tenants for name, row in ROWS.items()} == {
        "four": 16, "encoders": 16, "lengths": 16, "cnns": 12, "tiny": 5, "tiny-lengths": 6,
    }  # fmt: skip
    assert all(count > 0 for row in ROWS.values() for _, count in row.members)
    assert workload_of("bert-48").name == "bert-48"


CPU = ["--device", "cpu", "--dtype", "float32", "--repetitions", "1", "--rounds", "2"]


def test_padding_answers_rightly_as_one_program(tmp_path: Path) -> None:
    path = tmp_path / "mix.json"
    flags = ["--rows", "tiny-lengths,tiny", "--contenders", "padded,branches"]
    assert mix.main([*CPU, *flags, "--json", str(path)]) == 0
    padded, _, skipped, _ = json.loads(path.read_text())["results"]
    assert padded["error"]["worst"] < 1e-5 and padded["pipelined_us"]["median"] > 0
    assert padded["notes"]["coalesced share at 6"] == 1.0, "six lengths in one bundle"
    assert skipped["skipped"] == "only models of token sequences can be padded"


def test_a_bert_behind_a_mask_answers_as_without_padding() -> None:
    with contextlib.suppress(ModuleNotFoundError):
        import_torchvision()  # transformers imports it where it is installed
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes), add_pooling_layer=False)
    model = Encoder(bert.eval()).eval()
    tokens = torch.randint(50, (1, 7))
    padded = torch.cat([tokens, torch.zeros((1, 5), dtype=torch.int64)], 1)
    mask = mix_contenders.mask_of(7, 12, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        torch.testing.assert_close(model(padded, mask)[:, :7], model(tokens))


def test_wrong_answers_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(MuxMix):
        def round(self, requests: Any) -> Any:
            return [answer + 0.01 for answer in super().round(requests)]

    settings = {"pack": 1, "pack_after": 0.0}
    monkeypatch.setitem(mix.CONTENDERS, "packed", lambda: Wrong("wrong", **settings))
    assert mix.main([*CPU, "--rows", "tiny", "--contenders", "packed"]) == 1
    text = capsys.readouterr().out
    assert "tiny: wrong failed: WrongAnswers: relative l2 error" in text


def test_what_takes_too_long_to_prepare_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(MuxMix):
        def prepare(self, tenants: object, counts: object) -> None:
            time.sleep(60.0)

    monkeypatch.setitem(mix.CONTENDERS, "packed", lambda: Slow("slow"))
    assert mix.main([*CPU, "--rows", "tiny", "--contenders", "packed,inductor", "--limit", "0.5"]) == 1
    said = capsys.readouterr()
    assert "slow failed: OverLimit: preparing packed for tiny took longer than 0.5 s" in said.out
    assert "tiny: slow is prepared" in said.err, "what is happening is told"


def test_contenders_that_the_budget_does_not_reach_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert mix.main([*CPU, "--rows", "tiny", "--contenders", "inductor", "--budget", "1e-3"]) == 0
    assert "skipped: the budget of 0.001 s was spent before it was prepared" in capsys.readouterr().out


def test_models_of_one_architecture_have_weights_of_their_own() -> None:
    row = ROWS["tiny-lengths"]
    models = Pool([row], torch.device("cpu"), torch.float32).tenants(row).models
    weights = [next(model.parameters()) for model in models]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
    assert longest_of(row) == "tiny-encoder-12" and longest_of(ROWS["four"]) is None


_WARM = """
import torch, torch_mux
from torch_mux.bench.mix_rows import workload_of
from torch_mux.bench.workloads import batched, build
tenants = build(workload_of("tiny-encoder-9"), 2, torch.device("cpu"), torch.float32, variants=1)
one = build(workload_of("tiny-mlp"), 2, torch.device("cpu"), torch.float32, variants=1)
with torch.inference_mode():
    for asked in (one, batched(one, 3)):  # the same models, first with one sample a request
        models = [torch.compile(model, backend="mux", dynamic=False) for model in asked.models]
        torch_mux.gather(*[(model, *args) for model, args in zip(models, asked.requests[0])])
    models = [torch.compile(model, backend="mux") for model in tenants.models]
    torch_mux.gather(*[(model, *args) for model, args in zip(models, tenants.requests[0])])
    print([program.from_disk for program in torch_mux.explain().programs])
"""


def test_later_processes_find_what_was_compiled_ahead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_MUX_KEEP_PLANS", "1")
    monkeypatch.setenv("TORCH_MUX_CACHE_DIR", str(tmp_path))
    wanted = [Wanted("tiny-encoder-9", 2, 16), Wanted("no-such-model", 1, 16)]
    wanted.append(Wanted("tiny-mlp", 2, 16, samples=3))
    said: list[str] = []
    flags = ["--device=cpu", "--dtype=float32", "--mux"]
    found = compile_ahead(wanted, 2, 120.0, flags, said.append)
    assert found["tiny-encoder-9"].endswith(" s") and len(said) == 3
    assert found["no-such-model"].startswith("exit code 1: ") and "no-such-model" in found["no-such-model"]
    done = subprocess.run([sys.executable, "-c", _WARM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[False, True, True]"


def test_compiling_ahead_ends_in_time() -> None:
    begun = time.monotonic()
    wanted = [Wanted("tiny-cnn", 1, 16), Wanted("tiny-mlp", 1, 16)]
    found = compile_ahead(wanted, 1, 0.5, ["--device=cpu", "--dtype=float32", "--mux"])
    assert found == {"tiny-cnn": "ended after 0.5 s", "tiny-mlp": "not begun within 0.5 s"}
    assert time.monotonic() - begun < 10.0


def test_targets_are_of_the_better_peer_and_the_best_of_ours() -> None:
    def record(row: str, key: str, micro: float) -> dict[str, Any]:
        return {"row": row, "contender": name_of(key), "pipelined_us": {"median": micro}}

    results = [
        *(record("lengths", key, micro) for key, micro in (("forked", 900.0), ("padded", 600.0))),
        *(record("lengths", key, micro) for key, micro in (("branches", 300.0), ("packed", 450.0))),
        *(record("cnns", key, micro) for key, micro in (("branches", 110.0), ("packed", 100.0))),
    ]
    lengths, cnns = mix_table.verdicts(results)
    assert lengths.startswith(
        "lengths: torch-mux, own plans on branches is 2.00 times as fast as torch-mux, padded"
    )
    assert lengths.endswith("(>= 1.5: pass)")
    assert "1.10 times as fast as torch-mux, own plans on branches (>= 1.15: MISS)" in cnns


def test_a_trace_shows_each_model_and_the_explanation_what_was_matched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, traces = tmp_path / "mix.json", tmp_path / "traces"
    flags = ["--rows", "tiny-lengths", "--contenders", "inductor,padded,packed"]
    assert mix.main([*CPU, *flags, "--trace", str(traces), "--json", str(record)]) == 0
    assert sorted(path.name for path in traces.iterdir()) == [
        "tiny-lengths-packed.json", "tiny-lengths-packed.txt",
    ]  # fmt: skip
    shown = plot_trace.slices(json.loads((traces / "tiny-lengths-packed.json").read_text()))
    assert {one.row for one in shown if not one.lane} == {
        f"tiny-encoder-{length} {number}" for length in (5, 8, 9, 12) for number in range(1 + length % 2)
    }
    assert any(one.lane and one.name.count(" + ") == 3 for one in shown), "four programs in one bundle"
    told = (traces / "tiny-lengths-packed.txt").read_text()
    assert "runs as one" in told
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    assert plot_mix.main([str(record), "--row", "tiny-lengths", "--page", str(page)]) == 0
    (built,) = json.loads(record.read_text())["results"][2]["notes"]["mixes"]
    assert plot_mix.matched(built["words"]).total() == built["matched"]
    assert f"{built['matched']} of them joint" in page.read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        plot_mix.main([str(record), "--row", "four"])
    assert "no mix of four ran as one" in capsys.readouterr().err


def test_joint_launches_of_a_schedule_are_counted() -> None:
    words = (
        "[132] (a: linear 4x(1x2x3) + b: conv 3x3 4x(4x5x6) relu)   (3 times)\n"
        "[66] a: linear 4x(1x2x3); a: linear 4x(7x8x9) | [66] (b: linear 1x(1x1x1) + c: linear 1x(1x1x1))"
    )
    found = plot_mix.matched(words)
    assert found == {
        "a: linear 4x(1x2x3) + b: conv 3x3 4x(4x5x6) relu": 3,
        "b: linear 1x(1x1x1) + c: linear 1x(1x1x1)": 1,
    }


def test_the_guide_shows_what_its_record_says() -> None:
    root = Path(__file__).resolve().parents[2] / "docs"
    report = json.loads((root / "benchmarks" / "mix-h100.json").read_text())
    mix_of_four = plot_mix.largest(report, "four", name_of("packed"))
    assert mix_of_four is not None and plot_mix.text(report, mix_of_four) in (root / "guide.md").read_text()
