"""A forked child starts with an empty engine of its own."""

from __future__ import annotations

import os

import torch

from subjects import ENTRIES, Normed, ask, taught


def test_a_forked_child_serves_on_its_own() -> None:
    x = torch.randn(4, 6)
    model = taught(Normed, "cpu", x)
    with torch.inference_mode():
        want = model._orig_mod(x)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            seen = "nothing"
            try:
                torch.set_num_threads(1)
                answers = [ask(entry, model, x) for entry in ENTRIES]
                seen = str([torch.allclose(answer, want, rtol=1e-3, atol=1e-4) for answer in answers])
            except BaseException as error:
                seen = repr(error)
            finally:
                os.write(writer, seen.encode())
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            assert pipe.read() == str([True] * len(ENTRIES))
        os.waitpid(child, 0)
        for entry in ENTRIES:
            torch.testing.assert_close(ask(entry, model, x), want)
