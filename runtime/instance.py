"""Instances: one module with its own weights, recognised by the identity of its parameters and buffers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_mux.errors import RefreshNeeded
from torch_mux.types import TensorSpec

if TYPE_CHECKING:
    from torch_mux.runtime.served import ServedProgram

__all__ = ["Instance", "InstanceTable"]

_Key = tuple[int, ...]


def _aliases(parameters: Sequence[Tensor]) -> list[Tensor]:
    # Outside inference mode, or the aliases would not share the version counters of their sources.
    with torch.inference_mode(False), torch.no_grad():
        return [parameter.detach() for parameter in parameters]


class Instance:
    """One module's weights under one program.

    Holds weak references to the caller's tensors and detached aliases of them: the model can be collected,
    and yet a pointer that is still in a table never points at freed memory.

    Attributes:
        served: the program it belongs to.
        row: its row in the tables, or None while it has none.
        renew: its row must be written again before the next run.
        alive: False once one of its parameters was collected.
        removed: ``torch_mux.remove`` was called for it.
        dropped: the engine was reset or its weights took another form since; it must be looked up again.
        uses: requests that are queued or under way.
        tenants: who has used it; changed by the memory ledger only.
    """

    __slots__ = (
        "__weakref__",
        "_held",
        "_references",
        "alive",
        "dropped",
        "key",
        "removed",
        "renew",
        "row",
        "served",
        "tenants",
        "uses",
    )

    def __init__(
        self, served: ServedProgram, parameters: Sequence[Tensor], died: Callable[[Instance], object]
    ) -> None:
        self.served = served
        self.key = _key(parameters)
        self.row: int | None = None
        self.renew = False
        self.alive = True
        self.removed = False
        self.dropped = False
        self.uses = 0
        self.tenants: frozenset[str] = frozenset()
        self._held = _aliases(parameters)
        me = weakref.ref(self)

        def collected(_: object) -> None:
            # Runs in any thread at any time, also while locks are held: it may only note what happened.
            instance = me()
            if instance is not None and instance.alive:
                instance.alive = False
                died(instance)

        self._references = [weakref.ref(parameter, collected) for parameter in parameters]

    def matches(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are, one by one, the very tensors of this instance."""
        if not self.alive or len(parameters) != len(self._references):
            return False
        return all(map(is_, [reference() for reference in self._references], parameters))

    def current(self) -> Sequence[Tensor]:
        """The caller's tensors, or their last aliases when the model has been collected."""
        found = [reference() for reference in self._references]
        tensors = [tensor for tensor in found if tensor is not None]
        return tensors if len(tensors) == len(found) else self._held

    @property
    def held(self) -> list[Tensor]:
        """The aliases that keep addresses in the tables valid; a new list whenever they change."""
        return self._held

    @property
    def fits(self) -> bool:
        """Whether its tensors still have the form that the program was made for."""
        specs = self.served.program.parameters
        return all(TensorSpec.of(tensor) == spec for tensor, spec in zip(self.current(), specs, strict=True))

    def uses_any(self, identities: frozenset[int]) -> bool:
        """Whether one of its live tensors has one of these ``id`` values."""
        return any(id(reference()) in identities for reference in self._references)

    def uses_only(self, identities: frozenset[int]) -> bool:
        """Whether it has tensors and all of them are live and have one of these ``id`` values."""
        return bool(self._references) and all(id(reference()) in identities for reference in self._references)

    def bind(self) -> int:
        """Takes and writes a row, on the current stream; returns it."""
        storage = self.served.storage
        parameters = self._checked()
        with torch.inference_mode(False), torch.no_grad():
            self.row = storage.bind(parameters)
        self.renew = False
        self.served.memory_changed(self)
        return self.row

    def rewrite(self, row: int) -> None:
        """Prepares again from the tensors as they are now and rewrites the row, on the current stream."""
        self.renew = False
        parameters = self._checked()
        with torch.inference_mode(False), torch.no_grad():
            self.served.storage.refresh(row, parameters)
        self._held = _aliases(parameters)

    def free(self) -> None:
        """Gives the row back and lets go of the weights; nothing may be under way."""
        row, self.row = self.row, None
        self._held = []
        self.served.memory_changed()
        if row is not None:
            self.served.storage.release(row)

    def _checked(self) -> Sequence[Tensor]:
        parameters = self.current()
        for index, (parameter, spec) in enumerate(
            zip(parameters, self.served.program.parameters, strict=True)
        ):
            now = TensorSpec.of(parameter)
            if now != spec:
                raise RefreshNeeded(
                    model=self.served.program.name,
                    detail=f"parameter or buffer {index} became {_text(now)} and was {_text(spec)}",
                )
        return parameters


def _text(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)} with strides {list(spec.strides)} on {spec.device}"


def _key(parameters: Sequence[Tensor]) -> _Key:
    return (len(parameters), id(parameters[0]), id(parameters[-1])) if parameters else ()


class InstanceTable:
    """The instances of one program. Look-ups take no lock; changes are made under the dispatcher's mutex.

    The identities in the key only narrow the search: every candidate is compared with ``is``, because an
    ``id`` is used again once its tensor is gone.
    """

    def __init__(self) -> None:
        self._found: dict[_Key, tuple[Instance, ...]] = {}

    def find(self, parameters: Sequence[Tensor]) -> Instance | None:
        """The instance of exactly these tensors, or None."""
        for instance in self._found.get(_key(parameters), ()):
            if instance.matches(parameters):
                return instance
        return None

    def add(self, instance: Instance) -> None:
        """Enters an instance."""
        self._found[instance.key] = (*self._found.get(instance.key, ()), instance)

    def discard(self, instance: Instance) -> None:
        """Takes an instance out; one that is not there changes nothing."""
        rest = tuple(other for other in self._found.get(instance.key, ()) if other is not instance)
        if rest:
            self._found[instance.key] = rest
        else:
            self._found.pop(instance.key, None)

    def __iter__(self) -> Iterator[Instance]:
        return iter([instance for group in list(self._found.values()) for instance in group])

    def __len__(self) -> int:
        return sum(map(len, list(self._found.values())))
