"""The measured table is made of the benchmark's numbers, and the model's constants follow them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from torch_mux.bench import table
from torch_mux.bench.layers import LAYERS
from torch_mux.bench.table import Measurement, merged
from torch_mux.lowering.kernels import choose, measured
from torch_mux.lowering.kernels.data import Family, Tile
from torch_mux.lowering.kernels.estimate import RATES

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
NUMBERS = [
    FOLDER / name
    for name in (
        "kernels-h100.json",
        "kernels-split-h100.json",
        "kernels-families-h100.json",
        "kernels-epilogue-h100.json",
        "kernels-conv-h100.json",
        "kernels-rows-h100.json",
    )
]


def invented(factor: dict[str, float]) -> list[Measurement]:
    """Linear layers on a device whose constants are other ones by ``factor``."""
    other = {name: getattr(RATES["wgmma"], name) * by for name, by in factor.items()}
    rates = replace(RATES["wgmma"], **other)
    found = []
    for layer in LAYERS:
        own = table.own_class(layer)
        if layer.channels is None:
            wide = choose.candidates(replace(own, family=Family.WGMMA), table.HALF)
            for slots in (1, 16):
                each = Measurement(layer, slots, dict.fromkeys(wide, 1.0))
                took = {tile: each.expected(tile, rates, 132) for tile in each.microseconds}
                found.append(replace(each, microseconds=took))
    return found


def test_a_fit_finds_the_constants_of_another_device() -> None:
    factor = {"latency": 1.7, "load": 0.6, "memory": 1.3}
    found = table.fit(invented(factor), "wgmma", RATES["wgmma"], 132)
    for name in table.FITTED["wgmma"]:
        expected = getattr(RATES["wgmma"], name) * factor.get(name, 1.0)
        assert getattr(found, name) == pytest.approx(expected, rel=0.05), name
    assert found.flops == RATES["wgmma"].flops


def test_layers_of_one_shape_are_averaged() -> None:
    tile = {"block_m": 64, "block_n": 64, "block_k": 64, "warps": 4, "stages": 4, "programs_per_sm": 3}
    kind = {"family": "wgmma", "swap": False, "gather": False, "precision": "ieee"}
    layer = next(each for each in LAYERS if each.name == "1x1 64-256 @56")

    def result(name: str, micro: float) -> dict[str, object]:
        rows = [
            {"tile": tile, "class": kind, "microseconds": micro},
            {"tile": tile, "class": {**kind, "swap": True}, "microseconds": 1.0},
            {"tile": {**tile, "warps": 8}, "class": kind, "microseconds": 1.0},
        ]
        return {"layer": {**vars(layer), "name": name}, "slots": 16, "candidates": rows}

    content = {"environment": {"multiprocessors": 132}, "results": [result("a", 2.0), result("b", 8.0)]}
    (entry,) = table.table_of(content).entries
    assert (entry.size, entry.channels, entry.slots) == ((3136, 256, 64), None, 16)
    assert entry.seconds == {Tile(64, 64, 64, 4, 4, 3): pytest.approx(4e-6)}


def test_later_records_add_tiles_or_take_the_place_of_those_of_an_older_kernel() -> None:
    layer, other = vars(LAYERS[2]), vars(LAYERS[3])

    def record(layers: list[dict[str, object]], stages: int, **more: object) -> dict[str, object]:
        rows = [
            {"tile": {**vars(Tile(64, 64, 64, 4, each, 2))}, "class": {}, "microseconds": 1.0, **flag}
            for each, flag in ((stages, {}), (9, {"in_tree": False}), (8, {"class": {"split": 3}}))
        ]
        found = [{"layer": each, "slots": 16, "candidates": rows} for each in layers]
        return {"environment": {}, "results": found, **more}

    def stages(*records: dict[str, object]) -> list[list[int]]:
        first = record([layer], 3)
        del first["results"][0]["candidates"][1:]  # type: ignore[index]
        return [
            [row["tile"]["stages"] for row in result["candidates"]]
            for result in merged([first, *records])["results"]
        ]

    assert stages(record([{**layer, "count": 7}], 4)) == [[3, 4]]
    assert stages(record([layer, other], 4)) == [[3, 4]]
    assert stages(record([layer, other], 4, replaces=True)) == [[4], [4]]
    assert stages(record([layer], 3)) == [[3]]


def test_totals_weigh_layers_by_how_often_a_model_has_them() -> None:
    fast, slow = Tile(64, 64, 64, 4, 4, 3), Tile(64, 64, 64, 4, 3, 4)
    once, thrice = (replace(LAYERS[2], count=count) for count in (1, 3))
    found = [Measurement(once, 1, {fast: 1.0, slow: 2.0}), Measurement(thrice, 1, {fast: 2.0, slow: 3.0})]
    assert table.totals(found, lambda each: slow) == {("resnet50", 1): pytest.approx(11 / 7)}
    assert table.totals(found, lambda each: fast) == {("resnet50", 1): 1.0}


def test_the_command_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = merged([json.loads(path.read_text()) for path in NUMBERS])
    some = tmp_path / "numbers.json"
    kept = [each for each in content["results"] if each["layer"]["m"] in (1, 197, 12544, 196)]
    some.write_text(json.dumps({**content, "results": kept}))
    assert table.main([str(some), "--out", str(tmp_path / "table.json")]) == 0
    written = measured.parse((tmp_path / "table.json").read_text())
    assert written.nearest(table.own_class(LAYERS[-1]), (1, 4096, 4096), None, 16, 132) is not None
    words = capsys.readouterr().out
    assert words.count("Rates(") == len(table.FITTED)
    assert "table" in words
    assert "vit T16 1.0" in words
