"""Instances: identity, weights that change, models that are collected, removal."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from torch_mux.errors import ModelRemoved, RefreshNeeded
from torch_mux.types import Quota


def test_the_same_tensors_are_the_same_instance(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()
    model, other = lab.Affine(), lab.Affine()
    assert engine.instance(program, model.tensors()) is engine.instance(program, model.tensors())
    assert engine.instance(program, model.tensors()) is not engine.instance(program, other.tensors())
    mixed = [model.weight, other.bias]
    assert engine.instance(program, mixed) is not engine.instance(program, model.tensors())


def test_only_the_middle_differs(lab: Any) -> None:
    engine, program = lab.engine(), lab.program("wide", parameters=3)
    first, last, a, b = (nn.Parameter(torch.ones(4)) for _ in range(4))
    one, two = engine.instance(program, [first, a, last]), engine.instance(program, [first, b, last])
    assert one is not two
    assert engine.instance(program, [first, a, last]) is one
    assert engine.instance(program, [first, b, last]) is two


def test_tied_weights_are_fine(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()
    weight = nn.Parameter(torch.full((4,), 2.0))
    answer = engine.call(program, [weight, weight, lab.x(3.0)], Quota())[0]
    assert answer[0].item() == 8.0
    assert engine.instance(program, [weight, weight]) is engine.instance(program, [weight, weight])


def test_a_reused_id_is_another_instance(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()
    seen: set[tuple[int, int]] = set()
    reused = 0
    for step in range(200):
        model = lab.Affine(float(step))
        ids = (id(model.weight), id(model.bias))
        reused += ids in seen
        seen.add(ids)
        assert lab.call(engine, program, model, 2.0)[0].item() == 2.0 * step
        del model
    assert reused > 0


def test_a_collected_model_frees_its_weights_and_its_row(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()
    kept, model = lab.Affine(), lab.Affine(5.0)
    lab.call(engine, program, kept)
    lab.call(engine, program, model)
    storage = lab.plans["affine"].storage
    watched = weakref.ref(model.weight)
    instance = weakref.ref(engine.instance(program, model.tensors()))
    assert storage.bound == 2
    del model
    assert watched() is None
    lab.until(lambda: storage.bound == 1)
    lab.until(lambda: instance() is None)
    assert engine.plans()[0].instances == 1


def test_a_model_collected_while_its_request_is_queued_is_still_served(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()
    lab.slow["affine"] = threading.Event()
    model = lab.Affine(5.0)
    request = lab.submit(engine, program, model, 2.0)
    del model
    gc.collect()
    lab.slow["affine"].set()
    assert request.result()[0][0].item() == 10.0
    lab.until(lambda: lab.plans["affine"].storage.bound == 0)


def test_collection_while_a_lock_is_held_does_not_deadlock(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()
    model = lab.Affine()
    request = lab.submit(engine, program, model)
    request.result()
    with request.dispatcher._mutex, engine._lock:
        del model
    lab.until(lambda: lab.plans["affine"].storage.bound == 0)


@pytest.mark.parametrize("alone", [False, True])
def test_weights_that_change_are_seen(lab: Any, alone: bool) -> None:
    if alone:
        lab.alone.add("affine")
    engine, program, model = lab.engine(), lab.program(), lab.Affine(1.0)
    assert lab.call(engine, program, model, 2.0)[0].item() == 2.0
    with torch.no_grad():
        model.weight.mul_(3.0)
    assert lab.call(engine, program, model, 2.0)[0].item() == 6.0
    model.weight.data = torch.full((4,), 5.0)
    assert lab.call(engine, program, model, 2.0)[0].item() == 10.0
    fresh = {"weight": torch.full((4,), 7.0), "bias": torch.ones(4)}
    model.load_state_dict(fresh, assign=True)
    assert lab.call(engine, program, model, 2.0)[0].item() == 15.0


def test_refresh_sees_writes_that_bump_no_version(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(1.0)
    lab.call(engine, program, model)
    model.weight.data.fill_(4.0)
    assert lab.call(engine, program, model, 2.0)[0].item() == 2.0
    engine.refresh(model.tensors())
    assert lab.call(engine, program, model, 2.0)[0].item() == 8.0
    assert lab.plans["affine"].storage.refreshes == 1


def test_weights_of_another_shape_need_a_refresh(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine(1.0)
    instance = engine.instance(program, model.tensors())
    engine.submit(instance, [lab.x()], Quota()).result()
    model.weight.data = model.weight.data.double()
    with pytest.raises(RefreshNeeded, match=r"parameter or buffer 0 became torch.float64"):
        engine.submit(instance, [lab.x()], Quota()).result()


def test_parameters_made_in_inference_mode_and_calls_in_it(lab: Any) -> None:
    engine, program = lab.engine(), lab.program("affine", parameters=2)
    lab.alone.add("affine")
    with torch.inference_mode():
        model = lab.Affine(2.0)
    assert model.weight.is_inference()
    assert lab.call(engine, program, model, 2.0)[0].item() == 4.0
    plain = lab.Affine(3.0)
    with torch.inference_mode():
        instance = engine.instance(program, plain.tensors())
    with torch.no_grad():
        plain.weight.mul_(2.0)
    assert instance.held[0]._version == plain.weight._version


def test_a_removed_model_is_refused_and_can_be_restored(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()
    model, other = lab.Affine(2.0), lab.Affine(3.0)
    early = lab.submit(engine, program, model, 2.0)
    lab.call(engine, program, other)
    instance = engine.instance(program, model.tensors())
    late = lab.submit(engine, program, model, 5.0)
    engine.remove([*model.tensors(), torch.zeros(1)])
    assert early.result()[0][0].item() == 4.0
    assert late.result()[0][0].item() == 10.0
    lab.until(lambda: lab.plans["affine"].storage.bound == 1)
    with pytest.raises(ModelRemoved, match="affine was removed"):
        lab.call(engine, program, model)
    with pytest.raises(ModelRemoved):
        engine.submit(instance, [lab.x()], Quota())
    assert lab.call(engine, program, other, 2.0)[0].item() == 6.0
    engine.restore(model.tensors())
    assert lab.call(engine, program, model, 4.0)[0].item() == 8.0


def test_removal_leaves_a_model_alone_that_shares_a_weight(lab: Any) -> None:
    engine, program = lab.engine(), lab.program()
    model, other = lab.Affine(2.0), lab.Affine(3.0)
    other.weight = model.weight
    lab.call(engine, program, model)
    lab.call(engine, program, other)
    engine.remove(model.tensors())
    assert lab.call(engine, program, other, 2.0)[0].item() == 4.0
    with pytest.raises(ModelRemoved):
        lab.call(engine, program, model)


def test_a_removed_model_is_forgotten_when_collected(lab: Any) -> None:
    engine, program, model = lab.engine(), lab.program(), lab.Affine()
    lab.call(engine, program, model)
    engine.remove(model.tensors())
    del model
    lab.until(lambda: engine.plans()[0].instances == 0)
