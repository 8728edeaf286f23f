"""What the kernel benchmark times and how it prints it."""

from __future__ import annotations

import torch

from torch_mux.bench import kernels
from torch_mux.bench.layers import LAYERS, Layer
from torch_mux.lowering.kernels import choose
from torch_mux.lowering.kernels.data import BitClass, Family


def test_layers_add_up_to_the_models() -> None:
    convolutions = [layer for layer in LAYERS if layer.model == "resnet50" and layer.conv is not None]
    assert sum(layer.count for layer in convolutions) == 53
    flops = sum(
        2 * layer.m * layer.n * layer.k * layer.count for layer in LAYERS if layer.model == "resnet50"
    )
    assert 8.1e9 < flops < 8.3e9


def test_every_candidate_is_of_its_class_and_the_chosen_one_is_timed() -> None:
    for layer in LAYERS:
        chosen = [kernels.chosen_tile(layer, slots, 132) for slots in (1, 4, 16)]
        own, *others = kernels.classes(layer)
        assert set(chosen) <= set(kernels.candidates(layer, own, chosen))
        for bit_class in (own, *others):
            found = kernels.candidates(layer, bit_class, chosen)
            assert 1 <= len(found) <= 32
            for tile in found:
                choose.check(tile, bit_class)


def test_few_rows_are_timed_in_every_class() -> None:
    families = [(each.family, each.swap) for each in kernels.classes(Layer("m", "few rows", 8, 64, 64, 1))]
    assert families == [(None, False), (Family.WGMMA, True)]
    assert len(kernels.classes(Layer("m", "many rows", 197, 64, 64, 1))) == 1


def result(same: bool) -> dict[str, object]:
    layer = Layer("bert", "768-768", 128, 768, 768, 3)
    own = BitClass(Family.WGMMA)
    rows = [
        {
            "tile": kernels.asdict(tile),
            "class": kernels.asdict(own),
            "microseconds": 10.0 + index,
            "error": 1e-4,
            "same_bits": same or index != 1,
            "chosen": index == 2,
            "grid": 1,
        }
        for index, tile in enumerate(choose.candidates(own, torch.float16)[:3])
    ]
    return {"layer": kernels.asdict(layer), "slots": 4, "vendor_microseconds": 20.0, "candidates": rows}


def test_lines_name_best_chosen_and_what_is_wrong() -> None:
    good = kernels.line(result(True))
    assert "best    10.0 [128x128x64 w4 s3 p2 wg" in good
    assert "chosen    12.0 [64x64x64" in good
    assert "BITS DIFFER" not in good
    assert "BITS DIFFER: 64x128x64 w4 s4 p2 wg" in kernels.line(result(False))
    assert kernels.totals([result(True)] * 2) == [
        "bert     all layers T4   best       60 chosen       72 vendor      120"
    ]
