"""ReduceNet: a plain stack of 3x3 convolutions that can be grown for its training.

Every name exists in two forms with one deployed architecture:

* `reducenet20` is the **plain net**: each block is one 3x3 conv -> BN (+ identity) -> ReLU.
* `reducenet20_x4` is the same net **built grown**: the conv of every block is a `PureBottleneck`, 3x3 -> BN ->
  vanishing ReLU -> 1x1, with a middle 4 times as wide as the block. Once `lam` is exactly 0, `gs.fuse(model)` turns the
  net into `reducenet20`: the same state_dict keys and shapes, the same function.

Two sizes of input: `reducenet{20,32,44,56,110}` (and `_x1, _x2, _x4, _x8`) for 32x32 images, three stages of
16/32/64 channels; `reducenet{18,34}` (and `_x1, _x2, _x4`) for 224x224, four stages of 64 to 512. The number counts
the layers of the grown net, stem and classifier included; the plain net of `reducenet20` has 11.

Source: https://github.com/ohmydroid/reducenet (May 2023), whose block, 3x3 -> BN -> activation -> 1x1 -> BN, this is.
At the commit with its table of accuracies (f16c096) an in-place ReLU kept the net from ever becoming linear, so those
are not results of a net that fuses. The activation that vanishes is VanillaNet's deep training (arXiv:2305.12972).
Unlike the source, a block here ends in a ReLU that stays; `linear=True` builds the form without it.

Two padded 3x3 convs are not one 5x5 conv: at the border the second one pads with zeros what the first would fill. With
all padding in front of the first they are, so nets whose layers are to merge are trained with `pad="front"` (Kim et
al., arXiv:2301.12187, move the padding of merged layers likewise). Keys and shapes stay the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs

from growshrink.models.staged import (
    Block,
    StagedNet,
    check_options,
    cifar_cfg,
    conv_norm_act,
    front_padding,
    photo_cfg,
    register_variants,
)

__all__ = ["ReduceNet"]

ORIGIN = "https://github.com/ohmydroid/reducenet"

# No `from __future__ import annotations` here: torch.jit.script reads the annotations as objects.

Runs = Sequence[Sequence[int]]


class ReduceNet(StagedNet):
    """Stem, stages of `Block`, pooled linear classifier. See the module's docstring for what the family is.

    Args:
        depths: Blocks per stage.
        channels: Channels of each stage at `width` 1; the stem has those of the first stage.
        stem_stride: Stride of the stem's conv.
        strides: Stride of the first block of each stage.
        width: Multiplier of all channels, fractions too; a layer keeps at least one channel.
        expansion: Middle channels of every block's bottleneck, in multiples of the block's channels; 0 builds the plain
            net. Overrides what the name says: `create_model("reducenet20", expansion=3)`.
        linear: No activation in the stem and at the end of the blocks. Once `lam` is 0 the net is then a *linear
            classifier*, which `gs.collapse` makes a single layer: about 40 % at best on raw CIFAR-10 pixels, less
            through the average pooling of this head.
        pad: `"each"`: a pixel in every conv. `"front"`: all padding of a stage in its first conv, so that the convs of
            a stage can be merged into one, exactly; skips are padded or cropped to fit. Or the lengths of runs of
            blocks per stage, each run padded in front: `((3,), (1, 2), (3,))`.
        skip: Identities beside the convs; without them the net is a plain chain, of as many MACs.
        in_chans: Channels of the images.
        device: Where the tensors are made.
        dtype: Type of the parameters; `lam` is float32 always.
        head: `num_classes`, `global_pool` and `drop_rate` of a `StagedNet`.

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
        pad: str | Runs = "each",
        skip: bool = True,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **head: Any,
    ) -> None:
        check_options(width, expansion, linear=linear, skip=skip)
        channels = tuple(max(1, round(c * width)) for c in channels)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        stem = conv_norm_act(in_chans, channels[0], stem_stride, linear, **factory)
        stages = []
        in_channels = channels[0]
        for out_channels, stride, lengths in zip(channels, strides, _runs(pad, depths), strict=True):
            blocks: list[Block] = []
            for length in lengths:
                for position in range(length):
                    step = 1 if blocks else stride  # only the first block of a stage strides
                    padding = 0 if position else front_padding(step, length)
                    blocks.append(Block(in_channels, out_channels, step, expansion, linear, padding, skip, **factory))
                    in_channels = out_channels
            stages.append(blocks)
        super().__init__(stem, stages, channels, (stem_stride, *strides), in_chans=in_chans, **factory, **head)


def _runs(pad: str | Runs, depths: Sequence[int]) -> Runs:
    """Lengths of the runs of blocks that are padded in front, stage by stage."""
    if isinstance(pad, str):
        ways = {"each": [[1] * depth for depth in depths], "front": [[depth] for depth in depths]}
        if pad not in ways:
            raise ValueError(f"{pad=}: must be 'each', 'front', or lengths of runs per stage: ((3,), (1, 2), (3,)).")
        return ways[pad]
    if [sum(lengths) for lengths in pad] != list(depths) or any(length < 1 for lengths in pad for length in lengths):
        raise ValueError(f"{pad=}: the runs of a stage must add up to its blocks, {list(depths)}.")
    return pad


# ResNet max-pools after its stem; here the first conv of the first stage strides instead.
_PHOTO: dict[str, Any] = {"channels": (64, 128, 256, 512), "stem_stride": 2, "strides": (2, 2, 2, 2)}
#: Arguments of the plain nets. Three stages, two training layers a block; stem and classifier are the 2.
_PLAIN: dict[str, dict[str, Any]] = {
    **{f"reducenet{depth}": {"depths": ((depth - 2) // 6,) * 3} for depth in (20, 32, 44, 56, 110)},
    "reducenet18": {"depths": (2, 2, 2, 2), **_PHOTO},
    "reducenet34": {"depths": (3, 4, 6, 3), **_PHOTO},
}
_VARIANTS = {
    f"{name}_x{expansion}" if expansion else name: {**arch, "expansion": expansion}
    for name, arch in _PLAIN.items()
    for expansion in ((0, 1, 2, 4) if "channels" in arch else (0, 1, 2, 4, 8))
}
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": (photo_cfg if "channels" in arch else cifar_cfg)(origin_url=ORIGIN)
        for name, arch in _VARIANTS.items()
    }
)


def _describe(name: str) -> str:
    expansion, plain = _VARIANTS[name]["expansion"], name.split("_")[0]
    form = f"built grown, expansion {expansion}; fuses into `{plain}`" if expansion else "the plain net"
    return f"ReduceNet with {list(_VARIANTS[name]['depths'])} blocks: {form}."


register_variants(__name__, ReduceNet, _VARIANTS, _describe)
