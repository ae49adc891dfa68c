"""The four nets of MLPerf Tiny (Banbury et al., arXiv:2106.07597), from the tables of its reference implementation."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(
    in_ch: int, out_ch: int, kernel_size: Any = 3, stride: int = 1, padding: Any = None, groups: int = 1
) -> Any:
    padding = kernel_size // 2 if padding is None else padding
    conv = nn.Conv2d(in_ch, out_ch, kernel_size, stride, padding, groups=groups)
    return [conv, nn.BatchNorm2d(out_ch), nn.ReLU()]


def separable(in_ch: int, out_ch: int, stride: int = 1) -> list[nn.Module]:
    return [*conv_bn(in_ch, in_ch, 3, stride, groups=in_ch), *conv_bn(in_ch, out_ch, 1)]


def ds_cnn() -> nn.Module:
    """Keyword spotting: 49 frames of 10 coefficients, 12 words."""
    blocks = [layer for _ in range(4) for layer in separable(64, 64)]
    stem = conv_bn(1, 64, (10, 4), 2, (5, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 12))


def mobilenet_v1() -> nn.Module:
    """Visual wake words: MobileNetV1 at width 0.25, 96x96, a person or none."""
    table = [(16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *[(128, 1)] * 5, (256, 2), (256, 1)]
    layers, channels = conv_bn(3, 8, 3, 2), 8
    for out_ch, stride in table:
        layers += separable(channels, out_ch, stride)
        channels = out_ch
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2))


class Residual(nn.Module):
    def __init__(self, in_ch: int, out_ch: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(in_ch, out_ch, 3, stride), *conv_bn(out_ch, out_ch)[:2])
        self.skip = nn.Conv2d(in_ch, out_ch, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def resnet8() -> nn.Module:
    """Image classification: CIFAR-10, three residual blocks."""
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    return nn.Sequential(*conv_bn(3, 16), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def autoencoder() -> nn.Module:
    """Anomaly detection: 5 frames of 128 mel energies through 8 units and back."""
    widths = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128]
    layers: list[nn.Module] = []
    for in_ch, out_ch in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(in_ch, out_ch), nn.BatchNorm1d(out_ch), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 640))


#: Net, the shape of one input, and the reference's number of weights, statistics of the norms included.
NETS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "ds_cnn": (ds_cnn, (1, 49, 10), 24_908),
    "mobilenet_v1": (mobilenet_v1, (3, 96, 96), 221_794),
    "resnet8": (resnet8, (3, 32, 32), 78_666),
    "autoencoder": (autoencoder, (640,), 269_992),
}
