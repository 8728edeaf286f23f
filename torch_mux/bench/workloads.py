"""Models of the peer comparison: random weights, different for every tenant."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_mux.bench.vision import import_torchvision

__all__ = [
    "CPU_TABLE",
    "DTYPES",
    "TABLE",
    "WORKLOADS",
    "Tenants",
    "TensorOnly",
    "Workload",
    "as_is",
    "batched",
    "batched_name",
    "build",
    "images",
    "more",
    "origin_of",
    "tokens",
    "varied",
]

#: By the names of the command line.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Workload:
    """One architecture served at batch 1.

    Attributes:
        name: as on the command line.
        model: makes a float32 CPU module in eval mode, with the weights of the current seed.
        inputs: makes one request's arguments on the CPU: floating-point ones as float32.
        tensor: the tensor that answers are compared by, from what the model returns.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]
    tensor: Callable[[Any], Tensor]

    @property
    def returns_tensor(self) -> bool:
        """Whether the model returns the compared tensor and nothing else."""
        return self.tensor is as_is


class TensorOnly(nn.Module):
    """A model that returns the compared tensor alone, which a captured graph can hand out."""

    def __init__(self, model: nn.Module, tensor: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.tensor = tensor

    def forward(self, *args: Tensor) -> Tensor:
        return self.tensor(self.model(*args))


def as_is(output: Any) -> Tensor:
    """The output of a model that returns one tensor."""
    assert isinstance(output, Tensor)
    return output


def _last_hidden_state(output: Any) -> Tensor:
    hidden = output.last_hidden_state
    assert isinstance(hidden, Tensor)
    return hidden


def images(size: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """One image of ``size`` by ``size`` pixels, [1, 3, size, size]."""
    return lambda generator: (torch.randn(1, 3, size, size, generator=generator),)


def tokens(length: int, vocabulary: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Token numbers, int64 [1, length]."""
    return lambda generator: (torch.randint(vocabulary, (1, length), generator=generator),)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = import_torchvision().models.get_model(name, weights=None)
        return varied(model.eval())

    return make


def varied(model: nn.Module) -> nn.Module:
    """Batch-norm statistics and zero-initialised heads drawn at random: fresh ones are the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, 0, module.in_features**-0.5)
    return model


class Encoder(nn.Module):
    """Embeddings and layers of a transformers ``BertModel``: tokens to the last hidden state.

    The layers alone, without what ``BertModel.forward`` does around them in Python; ``mask`` is added to
    attention's scores.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.embeddings = bert.get_submodule("embeddings")
        self.encoder = bert.get_submodule("encoder")

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        embedded = self.embeddings(input_ids=tokens)
        hidden: Tensor = self.encoder(embedded, attention_mask=mask).last_hidden_state
        return hidden


def _bert() -> nn.Module:
    with contextlib.suppress(ModuleNotFoundError):
        import_torchvision()  # transformers imports it where it is installed
    from transformers import BertConfig, BertModel

    make: Callable[..., nn.Module] = BertModel
    return make(BertConfig(), add_pooling_layer=False).eval()


def _mlp(width: int = 1024, layers: int = 3) -> nn.Module:
    """Linear layers of equal width with ReLU between them: nothing but weights to read."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts[:-1]).eval()


class TinyCNN(nn.Module):
    """A residual CNN of a few thousand weights: the harness's logic without a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.block = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.block(x)).relu()
        head: Tensor = self.head(x.mean((2, 3)))
        return head


@dataclass
class Encoded:
    """What ``TinyEncoder`` returns, in the manner of a transformers model."""

    last_hidden_state: Tensor


class TinyEncoder(nn.Module):
    """Two layers of attention and MLP over token numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Encoded:
        x = self.embedding(tokens)
        for qkv, out, norm in zip(self.qkv, self.out, self.norm, strict=True):
            q, k, v = qkv(norm(x)).view(*tokens.shape, 3, 4, 8).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask)
            x = x + out(mixed.transpose(1, 2).reshape(x.shape))
        return Encoded(x)


class TinyMLP(nn.Module):
    """Linear layers with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
        return x


class TinyMixer(nn.Module):
    """Gated linear layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.value, self.gate, self.out = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        mixed: Tensor = self.out(self.value(normed) * self.gate(normed).sigmoid())
        return mixed


def features(*shape: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Floating-point features of one shape."""
    return lambda generator: (torch.randn(*shape, generator=generator),)


WORKLOADS: dict[str, Workload] = {
    "resnet50": Workload("resnet50", _torchvision("resnet50"), images(224), as_is),
    "mobilenet": Workload("mobilenet", _torchvision("mobilenet_v3_large"), images(224), as_is),
    "vit": Workload("vit", _torchvision("vit_b_16"), images(224), as_is),
    "bert": Workload("bert", lambda: Encoder(_bert()).eval(), tokens(128, 30522), as_is),
    "bert-hf": Workload("bert-hf", _bert, tokens(128, 30522), _last_hidden_state),
    "mlp": Workload("mlp", _mlp, features(1, 1024), as_is),
    "tiny-cnn": Workload("tiny-cnn", lambda: varied(TinyCNN().eval()), images(16), as_is),
    "tiny-encoder": Workload(
        "tiny-encoder", lambda: TinyEncoder().eval(), tokens(12, 50), _last_hidden_state
    ),
    "tiny-mlp": Workload("tiny-mlp", lambda: TinyMLP().eval(), features(1, 32), as_is),
    "tiny-mixer": Workload("tiny-mixer", lambda: TinyMixer().eval(), features(1, 8, 24), as_is),
}

#: Models and numbers of tenants that the record of an H100 is made of; and those for a CPU.
TABLE: dict[str, tuple[int, ...]] = {
    "resnet50": (1, 4, 16),
    "mobilenet": (16,),
    "vit": (16,),
    "bert": (16,),
    "mlp": (64,),
}
CPU_TABLE: dict[str, tuple[int, ...]] = {"tiny-cnn": (1, 4), "tiny-encoder": (4,), "tiny-mlp": (4,)}


@dataclass(frozen=True)
class Tenants:
    """The models of one workload and the requests that they take in turn.

    Attributes:
        models: one a tenant, on the device, in eval mode.
        requests: ``requests[variant][tenant]``, the arguments of one request.
        compiled: the models under Inductor once a peer has compiled them, by its options: peers share them.
        channels_last: weights and images are in that order.
    """

    workload: Workload
    models: list[nn.Module]
    requests: list[list[tuple[Tensor, ...]]]
    compiled: dict[str, list[Callable[..., Tensor]]] = field(default_factory=dict)
    channels_last: bool = False

    @property
    def device(self) -> torch.device:
        """Of models and requests."""
        return self.requests[0][0][0].device

    def tensor_only(self) -> list[nn.Module]:
        """The models, each wrapped to return the compared tensor."""
        return [TensorOnly(model, self.workload.tensor).eval() for model in self.models]

    def first(self, count: int) -> Tenants:
        """The first ``count`` of them, who share what peers have compiled."""
        requests = [row[:count] for row in self.requests]
        return replace(self, models=self.models[:count], requests=requests)

    def weight_bytes(self) -> int:
        """Bytes of one tenant's parameters and buffers."""
        model = self.models[0]
        return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def batched(tenants: Tenants, samples: int) -> Tenants:
    """The same models, asked with ``samples`` of their requests as one: every input is that much longer."""
    variants = len(tenants.requests)

    def joined(variant: int, tenant: int) -> tuple[Tensor, ...]:
        rows = [tenants.requests[(variant + number) % variants][tenant] for number in range(samples)]
        return tuple(torch.cat(column) for column in zip(*rows, strict=True))

    workload = replace(tenants.workload, name=batched_name(tenants.workload.name, samples))
    requests = [[joined(v, t) for t in range(len(tenants.models))] for v in range(variants)]
    return Tenants(workload, tenants.models, requests, channels_last=tenants.channels_last)


def batched_name(name: str, samples: int) -> str:
    """Of a workload whose requests have so many samples."""
    return name if samples == 1 else f"{name}@{samples}"


def origin_of(workload: Workload, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Number 0 of a workload's models."""
    torch.manual_seed(0)
    return workload.model().to(device=device, dtype=dtype)


def build(
    workload: Workload,
    count: int,
    device: torch.device,
    dtype: torch.dtype,
    variants: int = 4,
    channels_last: bool = False,
    first: int = 0,
    origin: nn.Module | None = None,
) -> Tenants:
    """``count`` tenants with weights and requests of their own, reproducible from their numbers.

    Number 0 is made by the workload; the others have its weights in orders of their own, which takes the
    device milliseconds where drawing them again would take seconds.

    Args:
        first: the number of the first of them.
        origin: number 0, where it has been made before; on the device.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if origin is None:
        origin = origin_of(workload, device, dtype)
    numbers = range(first, first + count)
    models = [_rotated(copy.deepcopy(origin), 997 * number) if number else origin for number in numbers]
    if channels_last:
        models = [model.to(memory_format=torch.channels_last) for model in models]  # type: ignore[call-overload]
    requests = []
    for variant in range(variants):
        row = []
        for number in numbers:
            generator = torch.Generator().manual_seed(1000 * variant + number)
            row.append(tuple(_place(x, device, dtype, layout) for x in workload.inputs(generator)))
        requests.append(row)
    return Tenants(workload, models, requests, channels_last=channels_last)


def more(tenants: Tenants, count: int) -> Tenants:
    """``count`` tenants after those, of the same architecture, dtype and layout."""
    first = len(tenants.models)
    models = [_rotated(copy.deepcopy(tenants.models[0]), 997 * (first + index)) for index in range(count)]
    requests = [[row[index % first] for index in range(count)] for row in tenants.requests]
    return Tenants(tenants.workload, models, requests, channels_last=tenants.channels_last)


def _rotated(model: nn.Module, places: int) -> nn.Module:
    """``model`` with the elements of parameters and of batch norm's statistics moved on in their order."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    statistics = [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]
    with torch.no_grad():
        for tensor in [*model.parameters(), *statistics]:
            tensor.copy_(tensor.flatten().roll(places).view_as(tensor))
    return model


def _place(x: Tensor, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    if not x.is_floating_point():
        return x.to(device)
    return x.to(device=device, dtype=dtype, memory_format=layout if x.dim() == 4 else torch.preserve_format)
