"""What the families of nets here share: blocks, stem, stages, head, and everything timm asks of a first-class model."""

import math
import numbers
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from growshrink.layers.bottleneck import PureBottleneck

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.


class StagedNet(nn.Module):
    """Stem, stages of blocks, pooled linear classifier; a family builds the first two.

    `widths` are the output channels of each stage, `strides` those of the stem, then of each stage. `num_classes` of 0
    makes no classifier; `global_pool` is one of timm's: `"avg"`, `"max"`, `"avgmax"`, `"catavgmax"`, or `""` for
    unpooled features (then `num_classes=0`); `drop_rate` is that of a dropout before the classifier.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        stages: Sequence[Sequence[nn.Module]],
        widths: Sequence[int],
        strides: Sequence[int],
        *,
        num_classes: int = 10,
        in_chans: int,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.stem = stem
        self.stages = nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages))
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": math.prod(strides[: index + 2]), "module": f"stages.{index}"}
            for index, width in enumerate(widths)
        ]
        self.num_features = widths[-1]
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, device=device, dtype=dtype)
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Reset every parameter and buffer, also after `to_empty()`.

        He's normal initialisation over the fan out for the convs (arXiv:1502.01852), ones and zeros for every BN, the
        last gamma of a residual block too. Branches that `gs.grow` attached are not silenced again.
        """

        def init(module: nn.Module) -> None:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()
                return  # a bottleneck has reset its children
            for child in module.children():
                init(child)

        init(self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """No parameter needs an exemption beyond the usual one for biases and BN."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates: stem, then stages (`coarse`) or blocks, then the head."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None)]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a fresh classifier, none for 0 classes; a `global_pool` of None keeps the one there is."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final features of images (N, C, H, W) and the outputs of stages, or with `intermediates_only` those alone.

        `indices` are the last n stages if an int, all if None, else these; `stop_early` leaves out what follows them.
        `norm` is for timm's interface: there is no final norm. The only `output_fmt` is "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt}: must be NCHW.")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates: list[Tensor] = []

        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice modules
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        for index, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if index in take_indices:
                intermediates.append(x)

        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut off the stages after the last of `indices` (see `forward_intermediates`), in place; return all of these.

        `prune_head` removes the classifier and its pooling too, which always go with the last stage.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_end:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, num_features, H / reduction, W / reduction), rounded up."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x, flatten=True)
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> (N, num_classes), or (N, head_hidden_size) with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def check_options(width: float, expansion: int, **flags: bool) -> None:
    """ValueError unless the multiplier of all channels and that of the bottlenecks make sense, and flags are such."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name}={flag!r}: must be True or False.")
    if not isinstance(width, numbers.Real) or isinstance(width, bool) or not 0 < width < math.inf:
        raise ValueError(f"{width=}: must be a number > 0, the multiplier of all channels.")
    if isinstance(expansion, bool) or not isinstance(expansion, numbers.Integral) or expansion < 0:
        raise ValueError(f"{expansion=}: must be an integer >= 0 (0 = the plain net).")


def conv_norm_act(
    in_channels: int, out_channels: int, stride: int, linear: bool = False, **factory: Any
) -> nn.Sequential:
    """A stem: padded 3x3 conv, BN, and a ReLU unless `linear`."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False, **factory)
    act = nn.Identity() if linear else nn.ReLU(inplace=True)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels, **factory), act=act))


def photo_cfg(**kwargs: Any) -> dict[str, Any]:
    """The pretrained cfg of a net for 224x224 photographs; `kwargs` go over it."""
    photo = {"num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875}
    colours = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    layers = {"first_conv": "stem.conv", "classifier": "head.fc"}
    return {**photo, **colours, **layers, "interpolation": "bicubic", **kwargs}


def cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    """The pretrained cfg of a net for 32x32 images (mean and deviation of CIFAR-10); `kwargs` go over it."""
    cifar = {"num_classes": 10, "input_size": (3, 32, 32), "pool_size": (8, 8), "crop_pct": 1.0}
    colours = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
    return photo_cfg(**{**cifar, **colours, **kwargs})


def register_variants(
    module: str, net: type[StagedNet], variants: Mapping[str, Mapping[str, Any]], describe: Callable[[str], str]
) -> None:
    """Register an entrypoint for every variant with timm, in the module of this name, its docstring by `describe`."""

    def entrypoint(name: str, arch: Mapping[str, Any]) -> Callable[..., StagedNet]:
        def create(pretrained: bool = False, **kwargs: Any) -> StagedNet:
            args = {**arch, **kwargs}
            feature_cfg = {"out_indices": tuple(range(len(args["depths"]))), "flatten_sequential": True}
            return build_model_with_cfg(net, name, pretrained, feature_cfg=feature_cfg, **args)

        create.__name__ = create.__qualname__ = name
        create.__module__ = module
        create.__doc__ = describe(name)
        return register_model(create)

    # One function per name, as timm wants it; the names are a product of depth and expansion, so a loop writes them.
    for name, arch in variants.items():
        setattr(sys.modules[module], name, entrypoint(name, arch))


def plain_form(name: str, kwargs: Mapping[str, Any], *, grown: bool) -> tuple[str, dict[str, Any]]:
    """Name and arguments for `timm.create_model` of the plain net that a model, `grown` or not, fuses into."""
    other = ("expansion", "pretrained", "checkpoint_path")
    plain_kwargs = {key: value for key, value in kwargs.items() if key not in other}
    return name.split("_x")[0] if grown else name, plain_kwargs


def front_padding(stride: int, length: int) -> int:
    """Padding of the first of `length` 3x3 convs in a row, of which it alone strides and it alone pads.

    One conv of `2 * front_padding(...) + 1` pixels can then take the place of all of them.

    >>> front_padding(stride=1, length=3), front_padding(stride=2, length=3)
    (3, 5)
    """
    return 1 + stride * (length - 1)


def block_conv(
    channels: tuple[int, int, int], kernel_size: int, stride: int = 1, padding: int = 0, **factory: Any
) -> nn.Module:
    """Make the conv of a block: a `PureBottleneck` of (in, middle, out) channels, an `nn.Conv2d` where middle is 0."""
    if channels[1]:
        return PureBottleneck(*channels, kernel_size, stride=stride, padding=padding, **factory)
    return nn.Conv2d(channels[0], channels[2], kernel_size, stride, padding, bias=False, **factory)


class Block(nn.Module):
    """`conv` (3x3) -> `bn` (+ identity where the shape allows, unless `skip` is false) -> ReLU unless `linear`.

    An `expansion` of 0 makes `conv` an `nn.Conv2d`, E > 0 a `PureBottleneck` with E * `out_channels` middle channels.
    Where `padding` is not 1, the map grows or shrinks by `2 * (padding - 1)` pixels (before the stride), and the
    identity is padded or cropped to fit. `factory` are `device` and `dtype` of the tensors.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expansion: int = 0,
        linear: bool = False,
        padding: int = 1,
        skip: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        channels = in_channels, expansion * out_channels, out_channels
        self.conv = block_conv(channels, 3, stride, padding, **factory)
        self.bn = nn.BatchNorm2d(out_channels, **factory)
        self.skip = skip and stride == 1 and in_channels == out_channels
        self.margin = padding - 1
        self.act = nn.Identity() if linear else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(h / stride), ...) with h = H + 2 * (padding - 1)."""
        y = self.bn(self.conv(x))
        if self.skip:
            m = self.margin
            y = y + (x if m == 0 else F.pad(x, [m, m, m, m]))  # a negative margin crops
        return self.act(y)

    def fold_skip(self) -> bool:
        r"""Add the identity skip to the kernel, in place: :math:`K * x + b + x = (K + \delta) * x + b`.

        Whether it was: only where the conv is all that the skip spans, an `nn.Conv2d` with a bias, followed by the
        `nn.Identity` that folding leaves of a BN.
        """
        conv = self.conv
        # A subclass of Conv2d may compute more than its weight says (a grown conv has branches).
        if not self.skip or type(conv) is not nn.Conv2d or conv.bias is None or not isinstance(self.bn, nn.Identity):
            return False
        weight = conv.weight.detach()
        dirac = nn.init.dirac_(torch.empty_like(weight, dtype=torch.float64), groups=conv.groups)
        with torch.no_grad():
            conv.weight.copy_(weight.double() + dirac)
        self.skip = False
        return True

    @torch.jit.ignore
    def is_identity(self) -> bool:
        """Whether merging has left nothing here but the identity."""
        return not self.skip and all(type(part) is nn.Identity for part in (self.conv, self.bn, self.act))

    def extra_repr(self) -> str:
        """`skip=...` in the printed model: the skip is no module of its own."""
        return f"skip={self.skip}"
