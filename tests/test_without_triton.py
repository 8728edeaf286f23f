"""Where Triton cannot be imported."""

from __future__ import annotations

import subprocess
import sys
import textwrap

WITHOUT_TRITON = """
    import sys

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Hidden())
    import torch
    from torch import nn

    model = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), backend="mux")
    x = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), model._orig_mod(x))
    import torch_mux

    (program,) = torch_mux.explain().programs
    assert program.coalesced and program.name == "Sequential", str(program)
"""


def test_without_triton_the_cpu_serves_all_the_same() -> None:
    script = textwrap.dedent(WITHOUT_TRITON)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr


WITHOUT_TRITON_ON_A_GPU = (
    WITHOUT_TRITON.partition("model = ")[0]
    + """
    import dataclasses
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch_mux.lowering.capture import capture
    from torch_mux.lowering.plan import compile_plan
    from torch_mux.runtime.executors import make
    from torch_mux.settings import Settings
    from torch_mux.types import FallbackKind

    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    with torch.no_grad():
        graph = make_fx(lambda x, w: (torch.relu(x @ w.t()),), tracing_mode="fake")(x, weight)
    program = dataclasses.replace(capture(graph, [1], "Net"), device=torch.device("cuda:0"))
    plan = compile_plan(program, Settings())
    (reason,) = plan.reasons
    assert not plan.coalesced and not plan.capturable
    assert reason.kind is FallbackKind.NO_TRITON and "No module named 'triton'" in str(reason)
    torch.testing.assert_close(plan.run_alone([weight], [x])[0], torch.relu(x @ weight.t()))
    gather, scatter = make._moves()
    try:
        gather()
    except RuntimeError as error:
        assert "needs Triton" in str(error)
    else:
        raise AssertionError("it was called")
"""
)


def test_without_triton_a_gpu_runs_per_instance_and_says_why() -> None:
    script = textwrap.dedent(WITHOUT_TRITON_ON_A_GPU)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "without super-kernels" in ended.stderr
