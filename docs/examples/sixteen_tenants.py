"""Sixteen tenants with four architectures, and a timeline of who was served when: sixteen.json.

python docs/examples/sixteen_tenants.py [sixteen.json]
"""

from __future__ import annotations

import sys
import threading

import torch
from torch import Tensor, nn

import torch_mux
from torch_mux.demo.models import ResidualCNN, SmallTransformer

REQUESTS = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


class WideCnn(ResidualCNN):
    def __init__(self) -> None:
        super().__init__(width=24)


def client(name: str, model: nn.Module, images: Tensor, priority: int) -> None:
    """Asks again as soon as it has an answer."""
    with torch.inference_mode(), torch_mux.quota(name, priority=priority):
        for _ in range(REQUESTS):
            torch_mux.submit(model, images).result().argmax(1).tolist()


def main() -> None:
    torch.manual_seed(0)
    kinds = (ResidualCNN, WideCnn, SmallTransformer, Mlp)
    models = {
        f"{kind.__name__} {number}": torch.compile(kind().eval().to(DEVICE), backend="mux", dynamic=False)
        for kind in kinds
        for number in range(4)
    }
    images = torch.randn(8, 1, 8, 8, device=DEVICE)
    torch_mux.configure(pack=8, pack_after=0)

    def serve() -> None:
        threads = [
            threading.Thread(target=client, args=(name, model, images, int(name == "Mlp 3")))
            for name, model in models.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    for _ in range(8):  # compiled, and the mixes that come again
        serve()
        with torch.inference_mode():
            for model in models.values():
                torch_mux.warmup(model, images, sizes=(1, 4))
    with torch_mux.trace(sys.argv[1] if len(sys.argv) > 1 else "sixteen.json"):
        serve()
    print(torch_mux.explain())


if __name__ == "__main__":
    main()
