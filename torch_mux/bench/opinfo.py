"""``python -m torch_mux.bench.opinfo --json …``: every operation of PyTorch's operator database, on the CPU.

Each sample is one small model: it is called alone and, as two tenants, in one ``gather``; answers are
compared with eager's. What mux gets wrong, Inductor is asked too: a failure counts where eager and Inductor
have none.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import torch_mux
from torch_mux import compat
from torch_mux.bench import measure

__all__ = ["Outcome", "interpreted", "main", "operations", "sweep"]

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
#: Their results are not a function of their inputs.
_UNDEFINED = ("empty", "empty_like", "new_empty", "new_empty_strided", "empty_permuted", "empty_strided")


@dataclass
class Outcome:
    """What became of the samples of one operation in one dtype.

    Attributes:
        right: samples with eager's answers, alone and together.
        skipped: samples that eager or the comparison cannot take.
        shared: samples that mux fails and Inductor too.
        coalesced, mixed, alone: programs that coalesce, that do with per-instance parts, and that run per
            instance as a whole; a sample whose call never reached the backend has none.
        failures: what mux alone got wrong, a text each.
        reasons: why something ran per instance, and how often.
    """

    right: int = 0
    skipped: int = 0
    shared: int = 0
    coalesced: int = 0
    mixed: int = 0
    alone: int = 0
    failures: list[str] = field(default_factory=list)
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)


class _Sample(nn.Module):
    """One call of an operation; its tensors are the request, everything else is fixed."""

    def __init__(self, operation: Callable[..., Any], values: Any) -> None:
        super().__init__()
        leaves, self.spec = pytree.tree_flatten(values)
        self.operation = operation
        self.fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> Any:
        leaves = list(self.fixed)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.operation(*args, **kwargs)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs every graph that mux would compile with Inductor operation by operation, which starts sooner."""

    def as_it_is(graph: GraphModule, fakes: Sequence[Any], mode: Any) -> Callable[[list[Any]], Any]:
        return lambda arguments: graph(*arguments)

    compiled, compat.inductor_compile = compat.inductor_compile, as_it_is
    try:
        yield
    finally:
        compat.inductor_compile = compiled


def operations(names: Sequence[str], shard: tuple[int, int]) -> list[Any]:
    """The operations of PyTorch's database by name, all if none is named; every ``shard[1]``-th of them."""
    from torch.testing._internal.common_methods_invocations import op_db

    found = [op for op in op_db if not names or op.name in names or op.full_name in names]
    return found[shard[0] :: shard[1]]


def sweep(found: Sequence[Any], dtypes: Sequence[torch.dtype], samples: int) -> dict[str, Outcome]:
    """Runs the first ``samples`` samples of each operation in each dtype that it has on the CPU."""
    outcomes: dict[str, Outcome] = {}
    for op in found:
        for dtype in dtypes:
            if dtype not in op.supported_dtypes("cpu"):
                continue
            outcome = outcomes[f"{op.full_name} {str(dtype).removeprefix('torch.')}"] = Outcome()
            try:
                inputs = list(_first(op.sample_inputs("cpu", dtype, requires_grad=False), samples))
            except Exception as error:
                outcome.skipped += 1
                outcome.reasons[f"no samples: {_line(error)}"] += 1
                continue
            for sample in inputs:
                _try(op, (sample.input, sample.args, sample.kwargs), outcome)
    return outcomes


def _first(values: Any, count: int) -> Iterator[Any]:
    for _, value in zip(range(count), values, strict=False):
        yield value


def _try(op: Any, given: tuple[Any, tuple[Any, ...], dict[str, Any]], outcome: Outcome) -> None:
    value, args, kwargs = given
    model = _Sample(op.op, ((value, *args), kwargs))
    tensors = [leaf for leaf in pytree.tree_leaves(((value, *args), kwargs)) if isinstance(leaf, Tensor)]
    if (
        not tensors
        or op.name in _UNDEFINED
        or any(type(t) is not Tensor or t.layout != torch.strided for t in tensors)
    ):
        outcome.skipped += 1
        return
    try:
        want = _called(model, tensors)
        if not _equal(_called(model, tensors), want):
            raise ValueError("eager gives another answer each time")
    except Exception as error:
        outcome.skipped += 1
        outcome.reasons[f"eager: {_line(error)}"] += 1
        return
    problem = _problem(model, tensors, want)
    _count(outcome)
    torch_mux.reset()
    torch.compiler.reset()
    if problem is None:
        outcome.right += 1
    elif _inductor_fails(model, tensors, want):
        outcome.shared += 1
    else:
        outcome.failures.append(problem)
    torch.compiler.reset()


def _called(model: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        return model(*[tensor.clone(memory_format=torch.preserve_format) for tensor in tensors])


def _problem(model: _Sample, tensors: Sequence[Tensor], want: Any) -> str | None:
    try:
        first, second = (torch.compile(each, backend="mux", dynamic=False) for each in (model, _twin(model)))
        alone = _called(first, tensors)
        if not _equal(alone, want):
            return "another answer than eager"
        copies = [tensor.clone(memory_format=torch.preserve_format) for tensor in tensors]
        with torch.inference_mode():
            together = torch_mux.gather((first, *copies), (second, *[copy.clone() for copy in copies]))
        if not all(_equal(answer, want) for answer in together):
            return "another answer in a bundle of two"
    except Exception as error:
        return _line(error)
    return None


def _twin(model: _Sample) -> _Sample:
    twin = _Sample.__new__(_Sample)
    nn.Module.__init__(twin)
    twin.operation, twin.spec, twin.fixed, twin.places = (
        model.operation,
        model.spec,
        model.fixed,
        model.places,
    )
    return twin


def _inductor_fails(model: _Sample, tensors: Sequence[Tensor], want: Any) -> bool:
    try:
        return not _equal(_called(torch.compile(model, dynamic=False), tensors), want)
    except Exception as error:
        logging.getLogger(__name__).debug("inductor: %s", error)
        return True


def _equal(got: Any, want: Any) -> bool:
    ours, theirs = pytree.tree_leaves(got), pytree.tree_leaves(want)
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))


def _same(one: Any, other: Any) -> bool:
    if not isinstance(other, Tensor):
        return bool(one == other) and type(one) is type(other)
    tolerance = _TOLERANCE.get(other.dtype, 1e-3 if other.dtype.is_complex else 0.0)
    try:
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    except AssertionError:
        return False
    return True


def _count(outcome: Outcome) -> None:
    for program in torch_mux.explain().programs:
        outcome.coalesced += bool(program.coalesced) and not program.reasons
        outcome.mixed += bool(program.coalesced) and bool(program.reasons)
        outcome.alone += not program.coalesced
        outcome.reasons.update(str(reason) for reason in program.reasons)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"[:160]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 where mux alone failed a sample."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--ops", nargs="*", default=[], help="names of operations (all)")
    parser.add_argument("--shard", nargs=2, type=int, default=(0, 1), metavar=("NUMBER", "OF"))
    parser.add_argument("--dtypes", nargs="*", default=["float32"])
    parser.add_argument("--samples", type=int, default=3, help="samples of an operation and dtype")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--interpret", action="store_true", help="run batched graphs without Inductor")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    started, outcomes, left = time.monotonic(), dict[str, Outcome](), 0
    with interpreted() if options.interpret else contextlib.nullcontext():
        for op in operations(options.ops, tuple(options.shard)):
            if time.monotonic() - started > options.seconds:
                left += 1
                continue
            found = sweep([op], [getattr(torch, name) for name in options.dtypes], options.samples)
            outcomes.update(found)
            for name, outcome in found.items():
                for failure in outcome.failures:
                    print(f"{name}: {failure}", flush=True)
    record = _record(outcomes, options.interpret, left)
    print(json.dumps(record["totals"]))
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(outcome.failures for outcome in outcomes.values()))


def _record(outcomes: dict[str, Outcome], interpret: bool, left: int) -> dict[str, Any]:
    numbers = ("right", "skipped", "shared", "coalesced", "mixed", "alone")
    totals = {name: sum(getattr(outcome, name) for outcome in outcomes.values()) for name in numbers}
    totals["failures"] = sum(len(outcome.failures) for outcome in outcomes.values())
    return {
        "environment": measure.environment(torch.device("cpu")),
        "interpreted": interpret,
        "operations": len(outcomes),
        "operations not reached": left,
        "totals": totals,
        "by operation": {
            name: {key: value for key, value in vars(outcome).items() if value}
            for name, outcome in outcomes.items()
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
