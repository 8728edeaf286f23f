"""A small model whose program is kept on disk, and what may happen to a file there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DAMAGES", "Small"]


class Small(nn.Module):
    """A convolution, batch norm, writes to intermediate values, and a product."""

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm(self.conv(x)), self.slope, inplace=True)
        y += 1
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flipped(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(bytes(whole))


def _foreign(path: Path) -> None:
    payload = b"cno_such_module\nname\n."
    path.write_bytes(hashlib.sha256(payload).digest() + payload)


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: tuple[Callable[[Path], object], ...] = (_truncated, _flipped, _foreign, _emptied)
