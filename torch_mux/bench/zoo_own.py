"""Architectures of the zoo that no package brings: audio, an auto-encoder, a U-Net, a perceptron."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["AudioCNN", "AutoEncoder", "UNet", "mlp"]


class AudioCNN(nn.Module):
    """One-dimensional convolutions over a waveform, as keyword spotters have them (M5, arXiv 1610.00087)."""

    def __init__(self) -> None:
        super().__init__()
        widths, kernels = (1, 32, 32, 64, 128), (80, 3, 3, 3)
        self.layers = nn.Sequential()
        for index, kernel in enumerate(kernels):
            first = index == 0
            self.layers += nn.Sequential(
                nn.Conv1d(widths[index], widths[index + 1], kernel, stride=4 if first else 1),
                nn.BatchNorm1d(widths[index + 1]),
                nn.ReLU(),
                nn.MaxPool1d(4),
            )
        self.head = nn.Linear(widths[-1], 12)

    def forward(self, waveform: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layers(waveform).mean(-1))
        return scores.log_softmax(-1)


class AutoEncoder(nn.Module):
    """Convolutions down, transposed convolutions up."""

    def __init__(self) -> None:
        super().__init__()
        down, up = nn.Sequential(), nn.Sequential()
        for narrow, wide in ((3, 16), (16, 32), (32, 64)):
            down += nn.Sequential(nn.Conv2d(narrow, wide, 3, 2, 1), nn.BatchNorm2d(wide), nn.ReLU())
        for wide, narrow in ((64, 32), (32, 16)):
            up += nn.Sequential(nn.ConvTranspose2d(wide, narrow, 4, 2, 1), nn.BatchNorm2d(narrow), nn.ReLU())
        self.down, self.up = down, up
        self.last = nn.ConvTranspose2d(16, 3, 4, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        pixels: Tensor = self.last(self.up(self.down(image)))
        return pixels.sigmoid()


class UNet(nn.Module):
    """Two levels of a U-Net (arXiv 1505.04597): skips are concatenated, up by a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = self._twice(3, 16), self._twice(16, 32), self._twice(32, 64)
        self.up = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)])
        self.fourth, self.fifth = self._twice(64, 32), self._twice(32, 16)
        self.head = nn.Conv2d(16, 2, 1)

    @staticmethod
    def _twice(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inside, outside, 3, padding=1),
            nn.GroupNorm(4, outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, image: Tensor) -> Tensor:
        pool = nn.functional.max_pool2d
        first = self.first(image)
        second = self.second(pool(first, 2))
        third = self.third(pool(second, 2))
        fourth = self.fourth(torch.cat((second, self.up[0](third)), 1))
        scores: Tensor = self.head(self.fifth(torch.cat((first, self.up[1](fourth)), 1)))
        return scores


def mlp() -> nn.Module:
    """Four linear layers."""
    wide = [nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*wide, nn.Linear(256, 16)).eval()
