"""Inductor's code for a graph, named by its key in Inductor's own cache and found again without the graph.

Deriving that key takes the traced graph, and tracing takes longer than everything else in a warm start.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.codecache import FxGraphCache
from torch._inductor.output_code import CompiledFxGraphConstants
from torch._inductor.utils import BoxedBool
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from . import source_keys

__all__ = ["inductor_key", "inductor_load", "surroundings"]


def _told(value: Any) -> object:
    """A setting in words; a pass of the user's own by what it says of itself, or else as nobody else's."""
    uuid = getattr(value, "uuid", None)
    return repr(uuid()) if callable(uuid) else repr(value)


def surroundings() -> str:
    """Digest of all that decides about Inductor's code beside the graph: versions, device, configuration."""
    parts = (
        source_keys.installed(),
        platform.python_version(),
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        torch.version.cuda,
        repr(sorted(config.save_config_portable(ignore_private_configs=False).items())),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch._C._get_deterministic_fill_uninitialized_memory(),
        torch.get_num_threads(),
        [_told(getattr(config, name)) for name in sorted(config.get_config_copy()) if "custom" in name],
        torch.get_default_dtype(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def inductor_key(artifact: object) -> str | None:
    """Under which name Inductor's cache holds what ``inductor_compile`` returned; None where it does not."""
    key = getattr(artifact, "_fx_graph_cache_key", None)
    return key if isinstance(key, str) and config.fx_graph_cache and not config.force_disable_caches else None


def inductor_load(key: str, fakes: Sequence[Any], mode: FakeTensorMode) -> Callable[[list[Any]], Any] | None:
    """The code of that name for arguments like ``fakes``, or None where the cache has lost it."""
    if not config.fx_graph_cache or config.force_disable_caches:
        return None
    constants = CompiledFxGraphConstants()
    with torch.no_grad(), tracing(TracingContext(mode)), V.set_fake_mode(mode):
        code, _ = FxGraphCache.load_with_key(
            key, [], list(fakes), local=True, remote_cache=None, is_backward=False, constants=constants
        )
        if code is None:
            return None
        code._fx_graph_cache_key = key
        kwargs: Any = {"cudagraphs": BoxedBool(config.triton.cudagraphs), "is_backward": False}
        code.post_compile(list(fakes), constants, kwargs)
    return cast("Callable[[list[Any]], Any]", code)
