"""Use the installed wheel as a new user would: ``python smoke.py PREFIX``, outside the repository."""

from __future__ import annotations

import sys

import torch


def main() -> None:
    model = torch.nn.Linear(4, 4).eval()
    fast = torch.compile(model, backend="mux")
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))

    import torch_mux
    import torch_mux.backend
    import torch_mux.lowering.program
    import torch_mux.runtime.scheduler

    for module in (torch_mux, torch_mux.lowering.program, torch_mux.runtime.scheduler):
        assert module.__file__ is not None
        assert module.__file__.startswith(sys.argv[1]), module.__file__
    torch_mux.close()
    print("torch", torch.__version__, "torch_mux", torch_mux.__version__, "from", torch_mux.__file__)


if __name__ == "__main__":
    main()
