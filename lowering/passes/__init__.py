"""The rewriting of a program's graph as one explicit, ordered list of passes.

Each pass is one file with one function ``run(module, settings) -> module``; it may edit the module it is
given, which is the plan's own copy of the program's graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch.fx import GraphModule

from torch_mux.settings import Settings

from . import (
    canonicalise,
    channels_last,
    fold_batch_norm,
    fold_columns,
    fuse_blocks,
    fuse_epilogues,
    join_siblings,
    pad_channels,
    plain_convolutions,
    reshape_patches,
    select_attention,
    select_super_kernels,
    share_repeats,
)

__all__ = ["PASSES", "Pass", "run_passes"]

Pass = Callable[[GraphModule, Settings], GraphModule]

PASSES: Final[tuple[Pass, ...]] = (
    canonicalise.run,
    share_repeats.run,
    select_super_kernels.run,
    select_attention.run,
    fold_batch_norm.run,
    fuse_epilogues.run,
    plain_convolutions.run,
    reshape_patches.run,
    pad_channels.run,
    fold_columns.run,
    channels_last.run,
    fuse_blocks.run,
    join_siblings.run,
)


def run_passes(module: GraphModule, settings: Settings) -> GraphModule:
    """``module`` after every pass in order."""
    for step in PASSES:
        module = step(module, settings)
    return module
