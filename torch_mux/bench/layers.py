"""The layer shapes of the benchmarked models, as the lowering leaves them.

An image has four channels (three are measured to show why), and patches are gathered for a linear layer. The
stem stands here as it was before the lowering folded its strided columns into channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_mux.lowering.kernels.conv import out_size

__all__ = ["DISTINCT", "LAYERS", "Layer"]


@dataclass(frozen=True)
class Layer:
    """One layer shape and how often a model has it.

    Attributes:
        model, name: what it is called in the table.
        m, n, k: rows, output channels and reduction of the matrix product.
        count: layers of this shape in one inference of the model.
        conv: (channels in, height and width, kernel, stride, padding), or None for a linear layer.
        activation, residual: the epilogue.
    """

    model: str
    name: str
    m: int
    n: int
    k: int
    count: int
    conv: tuple[int, int, int, int, int] | None = None
    activation: str = "none"
    residual: bool = False

    @property
    def channels(self) -> int | None:
        """Input channels of a convolution; None for a matrix product, which pixel by pixel ones are, too."""
        return None if self.conv is None or self.conv[2:] == (1, 1, 0) else self.conv[0]

    @property
    def depthwise(self) -> bool:
        """Whether each channel has a filter of its own: then n are the channels, and k its taps."""
        return self.conv is not None and self.conv[0] > 1 and self.k == self.conv[2] ** 2

    @property
    def flops(self) -> int:
        """Of one instance."""
        return 2 * self.m * self.n * self.k


def _conv(
    name: str, c: int, size: int, o: int, kernel: int, stride: int, count: int, tail: str = "relu"
) -> Layer:
    padding = kernel // 2
    side = out_size(size, kernel, stride, padding, 1)
    activation = "none" if tail == "none" else "relu"
    geometry = (c, size, kernel, stride, padding)
    return Layer("resnet50", name, side**2, o, kernel**2 * c, count, geometry, activation, tail == "add")


LAYERS = (
    _conv("stem C=3", 3, 224, 64, 7, 2, 0),
    _conv("stem C=4", 4, 224, 64, 7, 2, 1),
    _conv("1x1 64-64 @56", 64, 56, 64, 1, 1, 1),
    _conv("3x3 64 @56", 64, 56, 64, 3, 1, 3),
    _conv("1x1 64-256 @56 add", 64, 56, 256, 1, 1, 3, "add"),
    _conv("1x1 64-256 @56", 64, 56, 256, 1, 1, 1, "none"),
    _conv("1x1 256-64 @56", 256, 56, 64, 1, 1, 2),
    _conv("1x1 256-128 @56", 256, 56, 128, 1, 1, 1),
    _conv("3x3 128 s2 @56", 128, 56, 128, 3, 2, 1),
    _conv("1x1 128-512 @28 add", 128, 28, 512, 1, 1, 4, "add"),
    _conv("1x1 256-512 s2 @56", 256, 56, 512, 1, 2, 1, "none"),
    _conv("1x1 512-128 @28", 512, 28, 128, 1, 1, 3),
    _conv("3x3 128 @28", 128, 28, 128, 3, 1, 3),
    _conv("1x1 512-256 @28", 512, 28, 256, 1, 1, 1),
    _conv("3x3 256 s2 @28", 256, 28, 256, 3, 2, 1),
    _conv("1x1 256-1024 @14 add", 256, 14, 1024, 1, 1, 6, "add"),
    _conv("1x1 512-1024 s2 @28", 512, 28, 1024, 1, 2, 1, "none"),
    _conv("1x1 1024-256 @14", 1024, 14, 256, 1, 1, 5),
    _conv("3x3 256 @14", 256, 14, 256, 3, 1, 5),
    _conv("1x1 1024-512 @14", 1024, 14, 512, 1, 1, 1),
    _conv("3x3 512 s2 @14", 512, 14, 512, 3, 2, 1),
    _conv("1x1 512-2048 @7 add", 512, 7, 2048, 1, 1, 3, "add"),
    _conv("1x1 1024-2048 s2 @14", 1024, 14, 2048, 1, 2, 1, "none"),
    _conv("1x1 2048-512 @7", 2048, 7, 512, 1, 1, 2),
    _conv("3x3 512 @7", 512, 7, 512, 3, 1, 2),
    Layer("resnet50", "fc", 1, 1000, 2048, 1),
    Layer("bert", "768-768", 128, 768, 768, 48),
    Layer("bert", "768-3072 gelu", 128, 3072, 768, 12, None, "gelu"),
    Layer("bert", "3072-768", 128, 768, 3072, 12),
    Layer("bert", "pooler", 1, 768, 768, 1, None, "tanh"),
    Layer("vit", "patches", 196, 768, 768, 1),
    Layer("vit", "768-2304", 197, 2304, 768, 12),
    Layer("vit", "768-768", 197, 768, 768, 12),
    Layer("vit", "768-3072 gelu", 197, 3072, 768, 12, None, "gelu"),
    Layer("vit", "3072-768", 197, 768, 3072, 12),
    Layer("gemv", "1x4096x4096", 1, 4096, 4096, 1),
)


def _point(c: int, size: int, o: int, count: int, tail: str = "none") -> Layer:
    """A 1x1 convolution of MobileNetV3-L; of one pixel, a linear layer of its squeeze and excitation."""
    if size == 1:
        return Layer("mobilenet", f"squeeze {c}-{o}", 1, o, c, count, None, tail)
    return Layer("mobilenet", f"1x1 {c}-{o} @{size}", size**2, o, c, count, (c, size, 1, 1, 0), tail)


def _depthwise(c: int, size: int, kernel: int, stride: int, count: int, tail: str = "relu") -> Layer:
    side = out_size(size, kernel, stride, kernel // 2, 1)
    step = "" if stride == 1 else f" s{stride}"
    name, geometry = f"{kernel}x{kernel} each of {c}{step} @{size}", (c, size, kernel, stride, kernel // 2)
    return Layer("mobilenet", name, side**2, c, kernel**2, count, geometry, tail)


#: Without residuals and hard sigmoids: what is added or multiplied afterwards is no part of a layer here.
_MOBILENET = (
    Layer("mobilenet", "stem C=4", 112**2, 16, 36, 1, (4, 224, 3, 2, 1), "hardswish"),
    _depthwise(16, 112, 3, 1, 1),
    _point(16, 112, 16, 1),
    _point(16, 112, 64, 1, "relu"),
    _depthwise(64, 112, 3, 2, 1),
    _point(64, 56, 24, 1),
    _point(24, 56, 72, 2, "relu"),
    _depthwise(72, 56, 3, 1, 1),
    _point(72, 56, 24, 1),
    _depthwise(72, 56, 5, 2, 1),
    _point(72, 1, 24, 1, "relu"),
    _point(24, 1, 72, 1),
    _point(72, 28, 40, 1),
    _point(40, 28, 120, 2, "relu"),
    _depthwise(120, 28, 5, 1, 2),
    _point(120, 1, 32, 2, "relu"),
    _point(32, 1, 120, 2),
    _point(120, 28, 40, 2),
    _point(40, 28, 240, 1, "hardswish"),
    _depthwise(240, 28, 3, 2, 1, "hardswish"),
    _point(240, 14, 80, 1),
    _point(80, 14, 200, 1, "hardswish"),
    _depthwise(200, 14, 3, 1, 1, "hardswish"),
    _point(200, 14, 80, 1),
    _point(80, 14, 184, 2, "hardswish"),
    _depthwise(184, 14, 3, 1, 2, "hardswish"),
    _point(184, 14, 80, 2),
    _point(80, 14, 480, 1, "hardswish"),
    _depthwise(480, 14, 3, 1, 1, "hardswish"),
    _point(480, 1, 120, 1, "relu"),
    _point(120, 1, 480, 1),
    _point(480, 14, 112, 1),
    _point(112, 14, 672, 2, "hardswish"),
    _depthwise(672, 14, 3, 1, 1, "hardswish"),
    _point(672, 1, 168, 2, "relu"),
    _point(168, 1, 672, 2),
    _point(672, 14, 112, 1),
    _depthwise(672, 14, 5, 2, 1, "hardswish"),
    _point(672, 7, 160, 1),
    _point(160, 7, 960, 3, "hardswish"),
    _depthwise(960, 7, 5, 1, 2, "hardswish"),
    _point(960, 1, 240, 2, "relu"),
    _point(240, 1, 960, 2),
    _point(960, 7, 160, 2),
    Layer("mobilenet", "head", 1, 1280, 960, 1, None, "hardswish"),
    Layer("mobilenet", "classes", 1, 1000, 1280, 1),
)

#: Every distinct convolution and matrix product of ResNet-50, ViT-B/16, BERT-base and MobileNetV3-L.
DISTINCT = (
    *(layer for layer in LAYERS if layer.count and layer.model != "gemv" and layer.name != "pooler"),
    Layer("vit", "classes", 1, 1000, 768, 1),
    *_MOBILENET,
)
