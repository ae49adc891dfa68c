"""Grown batch norms: what acts on single channels acts behind the norm, as in the papers, and folds into it."""

from typing import ClassVar

from timm.layers import BatchNormAct2d, register_notrace_module
from torch import Tensor, nn

from growshrink.algebra.convmap import ConvMap
from growshrink.errors import GrowError
from growshrink.layers.grown import Grown


class NormBranches(nn.ModuleList):
    """Branches of a norm; refuses to move into another module, as where torch converts the norm under them."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As `nn.Module.add_module`; GrowError where there is a branch of that name."""
        if name in self._modules:
            raise GrowError(
                "a batch norm that carries branches would lose them in convert_sync_batchnorm, which has converted "
                "some of the net: make it again, convert the plain net, then grow it."
            )
        super().add_module(name, module)


@register_notrace_module
class GrownNorm2d(Grown, nn.BatchNorm2d):  # type: ignore[misc]
    """A batch norm with branches: `y = bn(x); for each branch: y = y + branch(x, y)`.

    A row that is 0 in front of a norm comes out as `beta - gamma * mean / std`, behind it as 0. At lam = 0 the factors
    go into gamma and beta. Never constructed: an `nn.BatchNorm2d` becomes one in place; see `GrownConv2d`.
    """

    plain_class: ClassVar[type[nn.Module]] = nn.BatchNorm2d
    container = NormBranches

    def on_images(self, x: Tensor) -> Tensor:
        return self.with_branches(x, nn.BatchNorm2d.forward(self, x))

    forward = on_images  # type: ignore[assignment]

    def values_of(self, total: ConvMap) -> tuple[Tensor, Tensor]:
        """See `Grown.values_of`: gamma and beta, with the statistics as they are."""
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None
        scale_C = total.kernel.flatten()
        return scale_C * (var.to(scale_C) + self.eps).sqrt(), total.bias + mean.to(scale_C) * scale_C


@register_notrace_module
class GrownNormAct2d(GrownNorm2d, BatchNormAct2d):  # type: ignore[misc]
    """timm's `BatchNormAct2d`, grown: the branches act between the norm and the activation."""

    plain_class = BatchNormAct2d

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` -> the same shape."""
        return self.act(self.drop(self.on_images(x)))
