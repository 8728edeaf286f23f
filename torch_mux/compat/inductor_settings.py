"""Inductor with other settings than its defaults, for what it is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch._dynamo.config as _dynamo_config
from torch._dynamo.utils import counters
from torch._inductor import config as _config

__all__ = ["compile_counter", "inductor_settings"]


@contextlib.contextmanager
def inductor_settings(recompile_limit: int = 1024, **settings: Any) -> Iterator[None]:
    """What this thread compiles inside is compiled with these settings of ``torch._inductor.config``.

    ``freezing`` has to be set around Dynamo's trace, too, which takes parameters for constants then: options
    of ``torch.compile`` come into force only after it. One graph a set of weights is more than Dynamo's usual
    limit, beyond which it would run in eager PyTorch without a word.

    Args:
        recompile_limit: most graphs of one code object; one more raises.
    """
    limits = {
        "recompile_limit": recompile_limit,
        "accumulated_recompile_limit": 8 * recompile_limit,
        "fail_on_recompile_limit_hit": True,
    }
    with cast(Any, _dynamo_config).patch(limits), cast(Any, _config).patch(settings):
        yield


def compile_counter(group: str, name: str) -> int:
    """How often Dynamo ("stats", "unique_graphs") or a pass of Inductor did something in this process."""
    return int(counters[group][name])
