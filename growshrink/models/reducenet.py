"""ReduceNet: a plain stack of 3x3 convolutions that can be grown for its training.

Every name exists in two forms with one deployed architecture:

* `reducenet20` is the **plain net**: each block is one 3x3 conv -> BN (+ identity) -> ReLU.
* `reducenet20_x4` is the same net **grown at birth**: the conv of every block is a `PureBottleneck`, 3x3 -> BN ->
  vanishing ReLU -> 1x1, with a middle 4 times as wide as the block. Once `lam` has fallen to exactly 0 the bottleneck
  is linear, and `gs.fuse(model)` turns the net into `reducenet20`: the same state_dict keys and shapes, the same
  function. The deployed cost does not depend on the 4.

Two sizes of input: `reducenet{20,32,44,56,110}` (and `_x1, _x2, _x4, _x8`) for 32x32 images, three stages of
16/32/64 channels; `reducenet{18,34}` (and `_x1, _x2, _x4`) for 224x224, four stages of 64 to 512. The number counts
the layers of the grown net, stem and classifier included; the plain net of `reducenet20` has 11.

Source: https://github.com/ohmydroid/reducenet (May 2023), whose block, 3x3 -> BN -> activation -> 1x1 -> BN, this is.
That repository has no code to fuse, and at the commit with its table of accuracies (f16c096) an in-place ReLU kept
the net from ever becoming linear, so those accuracies are not results of a net that fuses. The activation that
vanishes is VanillaNet's deep training (arXiv:2305.12972). Unlike the source, a block here ends in a ReLU that stays;
`linear=True` builds the form without it.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from growshrink.activations import VanishingReLU
from growshrink.grown import PureBottleneck

__all__ = ["ReduceNet"]

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.


class Block(nn.Module):
    """`conv` -> `bn` (+ identity where the shape allows) -> ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the 3x3 conv.
        expansion: 0 makes `conv` an `nn.Conv2d`; E > 0 a `PureBottleneck` with E * `out_channels` middle channels.
        linear: No ReLU at the end.
        device: Where the tensors are made.
        dtype: What the parameters are.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expansion: int = 0,
        linear: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv: nn.Module
        if expansion:
            mid_channels = expansion * out_channels
            self.conv = PureBottleneck(
                in_channels, mid_channels, out_channels, 3, stride=stride, padding=1, device=device, dtype=dtype
            )
        else:
            self.conv = nn.Conv2d(
                in_channels, out_channels, 3, stride=stride, padding=1, bias=False, device=device, dtype=dtype
            )
        self.bn = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        self.skip = stride == 1 and in_channels == out_channels
        self.act = nn.Identity() if linear else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        y = self.bn(self.conv(x))
        if self.skip:
            y = y + x
        return self.act(y)

    def fold_skip(self) -> bool:
        r"""Add the identity skip to the kernel, in place: :math:`K * x + b + x = (K + \delta) * x + b`.

        Exact in real arithmetic. Only done where the conv is all that the skip spans: an `nn.Conv2d` with a bias,
        followed by the `nn.Identity` that folding leaves of a BN.

        Returns:
            Whether there was a skip that could be folded; if not, nothing has changed.
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

    def extra_repr(self) -> str:
        """`skip=...` in the printed model: the skip is no module of its own."""
        return f"skip={self.skip}"


class ReduceNet(nn.Module):
    """Stem, stages of `Block`, pooled linear classifier. See the module's docstring for what the family is.

    Args:
        depths: Blocks per stage.
        channels: Channels of each stage at `width` 1; the stem has those of the first stage.
        stem_stride: Stride of the stem's conv.
        strides: Stride of the first block of each stage.
        width: Multiplier of all channels, fractions too; a layer keeps at least one channel.
        expansion: Middle channels of every block's bottleneck, in multiples of the block's channels; 0 builds the plain
            net. Overrides what the name says: `create_model("reducenet20", expansion=3)`.
        linear: No activation in the stem and at the end of the blocks. What is left once `lam` is 0 is an affine map of
            the pixels, that is a *linear classifier*, and `gs.collapse` makes it a single layer. It is worth that
            much: the best linear classifier of raw CIFAR-10 pixels reaches about 40 %, and through the average
            pooling of this head less (33 to 35 % in a short run, where the net with its ReLUs reached 76 %).
        num_classes: Outputs of the classifier; 0 for none (pooled features).
        in_chans: Channels of the images.
        global_pool: `"avg"`, `"max"`, `"avgmax"`, `"catavgmax"`, or `""` for unpooled features (then `num_classes=0`).
        drop_rate: Dropout before the classifier.
        device: Where the tensors are made.
        dtype: What the parameters are; `lam` is float32 always.

    >>> import timm
    >>> plain = timm.create_model("reducenet20", width=0.25)
    >>> plain(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 3, 3),
        channels: tuple[int, ...] = (16, 32, 64),
        stem_stride: int = 1,
        strides: tuple[int, ...] = (1, 2, 2),
        *,
        width: float = 1.0,
        expansion: int = 0,
        linear: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_options(width, expansion)
        channels = tuple(max(1, round(c * width)) for c in channels)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.stem = nn.Sequential()
        self.stem.add_module(
            "conv",
            nn.Conv2d(in_chans, channels[0], 3, stride=stem_stride, padding=1, bias=False, device=device, dtype=dtype),
        )
        self.stem.add_module("bn", nn.BatchNorm2d(channels[0], device=device, dtype=dtype))
        self.stem.add_module("act", nn.Identity() if linear else nn.ReLU(inplace=True))

        self.stages = nn.Sequential()
        feature_info: list[dict[str, Any]] = []
        in_channels, reduction = channels[0], stem_stride
        for index, (depth, out_channels, stride) in enumerate(zip(depths, channels, strides, strict=True)):
            blocks = []
            for block_stride in (stride, *[1] * (depth - 1)):
                blocks.append(Block(in_channels, out_channels, block_stride, expansion, linear, device, dtype))
                in_channels = out_channels
            self.stages.append(nn.Sequential(*blocks))
            reduction *= stride
            feature_info.append({"num_chs": out_channels, "reduction": reduction, "module": f"stages.{index}"})

        self.feature_info = feature_info
        self.num_features = in_channels
        self.head = ClassifierHead(in_channels, num_classes, global_pool, drop_rate, device=device, dtype=dtype)
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Every parameter and buffer back to the start of training; makes a net whole again after `to_empty()`.

        He's normal initialisation over the fan out for the convs (arXiv:1502.01852), ones and zeros for every BN: the
        last gamma of a residual block is *not* zero, a block starts as a block. (So branches that `gs.grow` attached
        are initialised too, but not silenced again.)
        """

        def init(module: nn.Module) -> None:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (PureBottleneck, nn.BatchNorm2d, nn.Linear, VanishingReLU)):
                module.reset_parameters()
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
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None)],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier.

        Args:
            num_classes: Its outputs; 0 for none.
            global_pool: New pooling; None keeps the one there is.
        """
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
        """The outputs of stages on the way.

        Args:
            x: Images (N, C, H, W).
            indices: The last n stages if an int, all if None, else these.
            norm: For timm's interface; there is no final norm.
            stop_early: Do not compute what follows the last index.
            output_fmt: "NCHW" is the only one.
            intermediates_only: Leave out the final features.

        Returns:
            The final features and the outputs of the stages asked for, or those outputs alone.
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
        """Cut off the stages after the last one that is asked for, in place.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: For timm's interface; there is no final norm.
            prune_head: Remove the classifier and its pooling too; they always go with the last stage.

        Returns:
            The absolute indices.
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


def _check_options(width: float, expansion: int) -> None:
    if isinstance(width, bool) or not isinstance(width, numbers.Real) or not 0 < width < math.inf:
        raise ValueError(f"{width=}: must be a number > 0, the multiplier of all channels.")
    if isinstance(expansion, bool) or not isinstance(expansion, numbers.Integral) or expansion < 0:
        raise ValueError(f"{expansion=}: must be an integer >= 0 (0 = the plain net).")


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "origin_url": "https://github.com/ohmydroid/reducenet",
        **kwargs,
    }


def _cifar_cfg() -> dict[str, Any]:
    return _cfg(
        num_classes=10,
        input_size=(3, 32, 32),
        pool_size=(8, 8),
        crop_pct=1.0,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )


def _variants() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """`{name: (arguments of ReduceNet, pretrained cfg)}` of every model of the family."""
    variants = {}

    def add(name: str, expansions: tuple[int, ...], cfg: dict[str, Any], **arch: Any) -> None:
        for expansion in expansions:
            variants[f"{name}_x{expansion}" if expansion else name] = ({**arch, "expansion": expansion}, cfg)

    for depth in (20, 32, 44, 56, 110):
        blocks = (depth - 2) // 6  # three stages, two training layers a block; stem and classifier are the 2
        add(f"reducenet{depth}", (0, 1, 2, 4, 8), _cifar_cfg(), depths=(blocks,) * 3)
    # ResNet max-pools after its stem; here the first conv of the first stage strides instead.
    photo = {"channels": (64, 128, 256, 512), "stem_stride": 2, "strides": (2, 2, 2, 2)}
    add("reducenet18", (0, 1, 2, 4), _cfg(), depths=(2, 2, 2, 2), **photo)
    add("reducenet34", (0, 1, 2, 4), _cfg(), depths=(3, 4, 6, 3), **photo)
    return variants


_VARIANTS = _variants()

default_cfgs = generate_default_cfgs({f"{name}.untrained": cfg for name, (_, cfg) in _VARIANTS.items()})


def _entrypoint(name: str, arch: dict[str, Any]) -> Callable[..., ReduceNet]:
    def create(pretrained: bool = False, **kwargs: Any) -> ReduceNet:
        args = {**arch, **kwargs}
        stages = tuple(range(len(args["depths"])))
        feature_cfg = {"out_indices": stages, "flatten_sequential": True}
        return build_model_with_cfg(ReduceNet, name, pretrained, feature_cfg=feature_cfg, **args)

    create.__name__ = create.__qualname__ = name
    depths, expansion = arch["depths"], arch["expansion"]
    form = f"grown at birth, expansion {expansion}; fuses into `{name.split('_')[0]}`" if expansion else "the plain net"
    create.__doc__ = f"ReduceNet with {list(depths)} blocks: {form}."
    return register_model(create)


# One function per name, as timm wants it; the names are a product of depth and expansion, so a loop writes them.
for _name, (_arch, _) in _VARIANTS.items():
    globals()[_name] = _entrypoint(_name, _arch)
