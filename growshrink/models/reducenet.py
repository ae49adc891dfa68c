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

`pad` says where the zeros go. Two padded 3x3 convs are not one 5x5 conv: at the border the second one pads with zeros
what the first would fill. With all padding in front of the first they are, so nets whose layers are to merge are built,
and trained, with `pad="front"` (Kim et al., arXiv:2301.12187, move the padding of merged layers likewise). Keys and
shapes stay the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs

from growshrink.models.block import Block, front_padding
from growshrink.models.staged import StagedNet, check_options, cifar_cfg, conv_norm_act, photo_cfg, register_variants

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
        linear: No activation in the stem and at the end of the blocks. What is left once `lam` is 0 is an affine map of
            the pixels, that is a *linear classifier*, and `gs.collapse` makes it a single layer. It is worth that
            much: the best linear classifier of raw CIFAR-10 pixels reaches about 40 %, and through the average
            pooling of this head less (33 to 35 % in a short run, where the net with its ReLUs reached 76 %).
        pad: Where the padding is. `"each"`: a pixel in every conv. `"front"`: all of a stage in its first conv, so that
            the convs of a stage can be merged into one, exactly; skips are padded or cropped to fit. Or the
            lengths of runs of blocks per stage, each run padded in front: `((3,), (1, 2), (3,))`.
        in_chans: Channels of the images.
        device: Where the tensors are made.
        dtype: Type of the parameters; `lam` is float32 always.
        head: `num_classes`, `global_pool` and `drop_rate` of a `StagedNet`.

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
        pad: str | Runs = "each",
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **head: Any,
    ) -> None:
        check_options(width, expansion)
        channels = tuple(max(1, round(c * width)) for c in channels)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        stem = conv_norm_act(in_chans, channels[0], stem_stride, linear, **factory)
        stages = []
        in_channels = channels[0]
        for out_channels, stride, lengths in zip(channels, strides, _runs(pad, depths), strict=True):
            blocks: list[Block] = []
            for length in lengths:
                padding = front_padding(1 if blocks else stride, length)  # only the first block of a stage strides
                for position in range(length):
                    block_stride = 1 if blocks else stride
                    block_padding = 0 if position else padding
                    blocks.append(
                        Block(in_channels, out_channels, block_stride, expansion, linear, block_padding, **factory)
                    )
                    in_channels = out_channels
            stages.append(blocks)
        super().__init__(stem, stages, channels, (stem_stride, *strides), in_chans=in_chans, **factory, **head)


def _runs(pad: str | Runs, depths: Sequence[int]) -> Runs:
    """Lengths of the runs of blocks that are padded in front, stage by stage."""
    if isinstance(pad, str):
        if pad not in ("each", "front"):
            raise ValueError(
                f"{pad=}: must be 'each', 'front', or the lengths of runs per stage: ((3,), (1, 2), (3,))."
            )
        return [[depth] if pad == "front" else [1] * depth for depth in depths]
    if [sum(lengths) for lengths in pad] != list(depths) or any(length < 1 for lengths in pad for length in lengths):
        raise ValueError(f"{pad=}: the runs of a stage must add up to its blocks, {list(depths)}.")
    return pad


def _variants() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """`{name: (arguments of ReduceNet, pretrained cfg)}` of every model of the family."""
    variants = {}

    def add(name: str, expansions: tuple[int, ...], cfg: dict[str, Any], **arch: Any) -> None:
        for expansion in expansions:
            variants[f"{name}_x{expansion}" if expansion else name] = ({**arch, "expansion": expansion}, cfg)

    for depth in (20, 32, 44, 56, 110):
        blocks = (depth - 2) // 6  # three stages, two training layers a block; stem and classifier are the 2
        add(f"reducenet{depth}", (0, 1, 2, 4, 8), cifar_cfg(origin_url=ORIGIN), depths=(blocks,) * 3)
    # ResNet max-pools after its stem; here the first conv of the first stage strides instead.
    photo = {"channels": (64, 128, 256, 512), "stem_stride": 2, "strides": (2, 2, 2, 2)}
    add("reducenet18", (0, 1, 2, 4), photo_cfg(origin_url=ORIGIN), depths=(2, 2, 2, 2), **photo)
    add("reducenet34", (0, 1, 2, 4), photo_cfg(origin_url=ORIGIN), depths=(3, 4, 6, 3), **photo)
    return variants


_VARIANTS = _variants()

default_cfgs = generate_default_cfgs({f"{name}.untrained": cfg for name, (_, cfg) in _VARIANTS.items()})


def _describe(name: str) -> str:
    arch, _ = _VARIANTS[name]
    expansion = arch["expansion"]
    form = f"grown at birth, expansion {expansion}; fuses into `{name.split('_')[0]}`" if expansion else "the plain net"
    return f"ReduceNet with {list(arch['depths'])} blocks: {form}."


register_variants(__name__, ReduceNet, {name: arch for name, (arch, _) in _VARIANTS.items()}, _describe)
