"""Symbolic sizes, tracing with them, AOTAutograd and Inductor on a plain graph, precision flags.

Inductor's compiler is imported where something is compiled: a warm start compiles nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor import config as _config
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

__all__ = [
    "SymbolicWorld",
    "aot_inference",
    "compile_whole",
    "has_effect_tokens",
    "hinted",
    "inductor_compile",
    "is_symbolic",
    "plain_tracing",
    "precision_state",
    "static_input_positions",
    "static_placeholders",
    "symbolic_world",
    "tf32_allowed",
    "trace_graph",
    "unset_fake_temporarily",
]


@dataclass(frozen=True)
class SymbolicWorld:
    """A shape environment with its fake mode; its symbols are free: no guard, no replacement may appear."""

    environment: ShapeEnv
    mode: FakeTensorMode

    def symbol(self, name: str, hint: int) -> Any:
        """A backed ``SymInt``; a ``hint`` of 1 would be taken for the constant 1."""
        expression = self.environment.create_symbol(
            hint, source=ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        return self.environment.create_symintnode(expression, hint=hint, source=ConstantSource(name))

    def knowledge(self) -> str:
        """What has been assumed about the symbols so far, as text; empty when they are free."""
        guards = [str(guard.expr) for guard in self.environment.guards]
        replaced = [f"{symbol}={value}" for symbol, value in self.environment.replacements.items()]
        return "; ".join(guards + replaced)

    def limit(self, symbol: Any, most: int) -> int:
        """The largest n ≤ ``most`` such that 1…n as ``symbol`` all satisfy what was assumed; 0 if none.

        What is assumed in practice are upper bounds that keep 32-bit indices valid.
        """
        variable = symbol.node.expr
        if self.environment.replacements:
            return 0
        limit = most
        for guard in self.environment.guards:
            free = guard.expr.free_symbols
            if variable not in free:
                continue
            if len(free) > 1:
                return 0
            low, high = 0, limit
            if not bool(guard.expr.subs(variable, 1)):
                return 0
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if bool(guard.expr.subs(variable, middle)) else (low, middle - 1)
            limit = low
        return limit

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Operations inside run on fake tensors of this world."""
        with self.mode, enable_python_dispatcher(), torch.no_grad():
            yield


@contextlib.contextmanager
def plain_tracing() -> Iterator[None]:
    """Operations inside are traced as they are, whatever modes and autocast the caller is in."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C._DisableAutocast())
        stack.enter_context(enable_python_dispatcher())
        yield


def symbolic_world() -> SymbolicWorld:
    """A fresh world with no symbols."""
    environment = ShapeEnv()
    return SymbolicWorld(environment, FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True))


def trace_graph(function: Callable[..., Any], fakes: Sequence[Tensor]) -> GraphModule:
    """``function`` over ``fakes``, whose mode must be active, as an ATen graph decomposed for Inductor."""
    import torch._inductor.compile_fx  # noqa: F401  decompositions count on it
    from torch._inductor.decomposition import select_decomp_table

    return make_fx(function, decomposition_table=select_decomp_table())(*fakes)


def _plain_launches() -> contextlib.AbstractContextManager[object]:
    """Inductor's own programmatic dependent launches switched off, where it has them.

    A kernel of it that does not read what the one before it wrote would not wait for it, and so could end
    first; super-kernels count on all that came before their predecessor having ended with it.
    """
    if not hasattr(_config.triton, "enable_pdl"):
        return contextlib.nullcontext()
    return cast(Any, _config).patch({"triton.enable_pdl": False})  # type: ignore[no-any-return]


def inductor_compile(
    graph: GraphModule, fakes: Sequence[Any], mode: FakeTensorMode
) -> Callable[[list[Any]], Any]:
    """Inductor's code for an inference graph; it takes its arguments as one list, which it empties."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.fx_passes.replace_random import replace_random_passes

    with torch.no_grad(), tracing(TracingContext(mode)), _plain_launches():
        with V.set_fake_mode(mode):
            replace_random_passes(graph)  # the inner compile has no code for random operations as they are
        return cast("Callable[[list[Any]], Any]", compile_fx_inner(graph, list(fakes), is_inference=True))


def tf32_allowed() -> tuple[bool, bool]:
    """Whether torch's settings let float32 (GEMM, convolution) use TF32 on CUDA."""
    return bool(torch.backends.cuda.matmul.allow_tf32), bool(torch.backends.cudnn.allow_tf32)


def precision_state() -> str:
    """The global precision settings that change what a graph computes, for fingerprints."""
    matmul = torch.backends.cuda.matmul
    reduced = (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction)
    return f"tf32={tf32_allowed()} reduced={reduced}"


def compile_whole(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor on the whole Dynamo graph, training included."""
    from torch._inductor.compile_fx import compile_fx

    return cast("Callable[..., Any]", compile_fx(gm, list(example_inputs)))


def aot_inference(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    compiler: Callable[[GraphModule, Sequence[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """AOTAutograd without decompositions around ``compiler``, which gets the functional ATen graph."""
    from torch._dynamo.backends.common import aot_autograd

    wrapped: Callable[..., Callable[..., Any]] = aot_autograd(
        fw_compiler=compiler,
        inference_compiler=compiler,
        keep_inference_input_mutations=True,
        decompositions={},
    )
    return wrapped(gm, list(example_inputs))


def static_input_positions() -> tuple[int, ...]:
    """Positions of parameters and buffers among the arguments of the graph that AOTAutograd is compiling."""
    metadata = TracingContext.get().fw_metadata
    if metadata is None:
        raise RuntimeError("AOTAutograd left no metadata for the graph being compiled")
    return tuple(metadata.static_input_indices)


def has_effect_tokens() -> bool:
    """Whether the graph that AOTAutograd compiles passes tokens on, which order operations with effects."""
    metadata = TracingContext.get().fw_metadata
    return bool(getattr(metadata, "tokens", None))


def static_placeholders(gm: GraphModule) -> tuple[int, ...]:
    """Positions of parameters and buffers among the inputs of a Dynamo graph."""
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return tuple(
        position
        for position, node in enumerate(nodes)
        if node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None
    )


def hinted(value: Any) -> Any:
    """``value`` with the sizes that it was traced with in place of symbols; a tensor as a fake one."""
    if isinstance(value, Tensor):
        shape, strides = map(hinted, value.shape), map(hinted, value.stride())
        with unset_fake_temporarily(), FakeTensorMode():
            return torch.empty_strided(tuple(shape), tuple(strides), dtype=value.dtype, device=value.device)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value


def is_symbolic(example_inputs: Sequence[Any]) -> bool:
    """Whether an input is a symbolic number or has a symbolic size or stride."""

    def symbolic(value: Any) -> bool:
        if isinstance(value, Tensor):
            return any(isinstance(size, torch.SymInt) for size in (*value.shape, *value.stride()))
        return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))

    return any(symbolic(value) for value in example_inputs)
