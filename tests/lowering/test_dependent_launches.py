"""What is compiled around super-kernels does not start before the kernel before it has ended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor import compile_fx, config

from torch_mux import compat


@pytest.mark.skipif(not hasattr(config.triton, "enable_pdl"), reason="this Inductor has none")
def test_inductor_launches_plainly_whatever_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    compile_inner = compile_fx.compile_fx_inner

    def noting(*args: Any, **named: Any) -> Any:
        seen.append(config.triton.enable_pdl)
        return compile_inner(*args, **named)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", noting)
    world = compat.symbolic_world()
    with world.mode:
        fakes = [torch.empty(4, 4)]
    x = torch.randn(4, 4)
    with config.patch({"triton.enable_pdl": True}):
        with compat.plain_tracing(), world.mode:
            graph = compat.trace_graph(lambda x: [x.sin()], fakes)
        compiled = compat.inductor_compile(graph, fakes, world.mode)
        assert config.triton.enable_pdl
    assert seen == [False]
    torch.testing.assert_close(compiled([x])[0], x.sin())
