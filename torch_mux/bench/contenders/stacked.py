"""One call for all tenants: ``vmap`` over stacked weights, one shared model, one graph of all models."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from torch_mux import compat
from torch_mux.bench.contenders import recording
from torch_mux.bench.contenders.base import Arguments, NotApplicable, Peer
from torch_mux.bench.contenders.recording import Captured
from torch_mux.bench.workloads import Tenants

__all__ = ["BatchLinear", "Shared", "Vmapped"]

_FUSION: Final = "batch_linear_post_grad"
#: The pass looks for equal layers above a node that needs them all: the output, then the inputs of what it
#: has joined. By default it looks five operations far: not from one layer of a network to the one before.
_SEARCH: Final = {"min_fuse_set_size": 2, "max_fuse_search_depth": 64}


class _OneGraph(Peer, ABC):
    """One compiled call and one CUDA graph for each number of tenants."""

    def __init__(self) -> None:
        self.graphs: dict[int, Captured] = {}

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        record = recording.recorder(tenants.device)
        for count in counts:
            self.graphs[count] = self.graph(record, tenants, count)

    @abstractmethod
    def graph(self, record: recording.Recorder, tenants: Tenants, count: int) -> Captured:
        """Of so many tenants."""

    def round(self, requests: Arguments) -> Sequence[Any]:
        return self.graphs[len(requests)].run(requests)

    def release(self) -> None:
        self.graphs = {}


def _over_one_tensor(
    record: recording.Recorder,
    call: Callable[..., Tensor],
    requests: Arguments,
    join: Callable[[list[Tensor]], Tensor],
    part: Callable[[Tensor, int], Tensor],
    settings: dict[str, Any] | None = None,
) -> Captured:
    """A call that takes all requests as one tensor an argument, and returns one with all answers.

    Args:
        join: makes that tensor.
        part: the view of it that belongs to a request.
    """
    count = len(requests)
    joined = [join([args[place] for args in requests]) for place in range(len(requests[0]))]
    with compat.inductor_settings(**(settings or {})):
        call(*joined)
    recorded = record.record([lambda: [call(*joined)]])
    inputs = [tuple(part(x, index) for x in joined) for index in range(count)]
    outputs = [part(recorded.outputs[0], index) for index in range(count)]
    return Captured(inputs, recorded, outputs)


class Vmapped(_OneGraph):
    """``torch.func.vmap`` of one model's call over the weights of all, stacked, under Inductor.

    The stack is a second copy of the weights.
    """

    name = "vmap over stacked weights, inductor, one CUDA graph"

    def __init__(self) -> None:
        super().__init__()
        self.stacks: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def prepare(self, tenants: Tenants, counts: Sequence[int]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            parameters, buffers = torch.func.stack_module_state(tenants.tensor_only()[: max(counts)])
            self.stacks = ({name: value.detach() for name, value in parameters.items()}, buffers)
        super().prepare(tenants, counts)

    def graph(self, record: recording.Recorder, tenants: Tenants, count: int) -> Captured:
        base = copy.deepcopy(tenants.tensor_only()[0]).to("meta")
        state = tuple({name: value[:count] for name, value in stack.items()} for stack in self.stacks)

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], *args: Tensor) -> Tensor:
            answer: Tensor = torch.func.functional_call(base, (parameters, buffers), args)
            return answer

        every: Callable[..., Tensor] = torch.compile(torch.vmap(one, randomness="error"), dynamic=False)
        return _over_one_tensor(
            record,
            lambda *args: every(*state, *args),
            tenants.requests[0][:count],
            join=torch.stack,
            part=lambda x, index: x[index],
        )

    def release(self) -> None:
        super().release()
        self.stacks = ({}, {})


class Shared(_OneGraph):
    """The first tenant's model, its batch being one request of each: what shared weights would cost."""

    name = "for reference: one shared model at batch N, inductor, one CUDA graph"
    shared_weights = True

    def graph(self, record: recording.Recorder, tenants: Tenants, count: int) -> Captured:
        return _over_one_tensor(
            record,
            torch.compile(tenants.tensor_only()[0], dynamic=False),
            tenants.requests[0][:count],
            join=torch.cat,
            part=lambda x, index: x[index : index + 1],
        )


class _Every(nn.Module):
    """All models, each over its own request: one graph of independent parts."""

    def __init__(self, models: Sequence[nn.Module], arguments: int) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.arguments = arguments

    def forward(self, *flat: Tensor) -> list[Tensor]:
        width = self.arguments
        return [model(*flat[width * i : width * (i + 1)]) for i, model in enumerate(self.models)]


class BatchLinear(_OneGraph):
    """All models as one graph in which Inductor's ``batch_linear_post_grad`` joins equal linear layers.

    Raises:
        NotApplicable: it found nothing to join.
    """

    name = "inductor with batch_linear_post_grad, one CUDA graph of all models"

    def __init__(self) -> None:
        super().__init__()
        self.recorded: dict[str, object] = {}

    def graph(self, record: recording.Recorder, tenants: Tenants, count: int) -> Captured:
        requests = tenants.requests[0][:count]
        inputs = [tuple(x.clone() for x in args) for args in requests]
        flat = [x for args in inputs for x in args]
        every = _Every(tenants.tensor_only()[:count], len(requests[0]))
        options: dict[str, Any] = {"post_grad_fusion_options": {_FUSION: _SEARCH}}
        call = torch.compile(every, dynamic=False, options=options)
        before = compat.compile_counter("inductor", _FUSION)
        with compat.inductor_settings():
            call(*flat)
        joined = compat.compile_counter("inductor", _FUSION) - before
        if not joined:
            raise NotApplicable(f"{_FUSION} found no linear layers of {count} tenants to join")
        self.recorded[f"groups of linear layers at {count}"] = joined
        return Captured(inputs, record.record([lambda: call(*flat)]))

    def notes(self) -> dict[str, object]:
        return self.recorded
