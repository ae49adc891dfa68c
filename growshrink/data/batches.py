"""Batches that are a pure function of (seed, update).

A run can be resumed at any update, and several ranks take their shares without communication: every draw comes from a
generator named by the seed and the update (`seeding.generator`), on the CPU, so that it is the same on every machine.

The work is done on whole batches of uint8 (N, H, W, C) images, without waiting for a GPU: the images are padded once
and stay on the device; a crop copies whole pixel rows out of a strided view of them; flip and cutout choose between
bytes by bit masks, which vectorise where `torch.where` with a broadcast condition does not.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, NamedTuple

import torch
from timm.data import Mixup
from torch import Tensor
from torch.nn import functional as F

from growshrink.base.config import Checked
from growshrink.base.limits import Interval, NotNegative, Share, Whole
from growshrink.base.seeding import generator, own_randomness
from growshrink.data.datasets import Split
from growshrink.errors import DataError

#: Uniform numbers that decide about an image.
DRAWS = 9
Magnitude = Annotated[int, Interval(0, 30)]


@dataclass(frozen=True)
class PhotoAugment(Checked):
    """Random changes to photographs; each image has parameters of its own. All are off by default.

    Attributes:
        resized_crop: Least share of the area that a random crop keeps, which is then resized (arXiv:1409.4842).
        jitter: Largest relative change of brightness, contrast and saturation, and four times that of the hue.
        randaugment: Magnitude of two random operations of RandAugment's (arXiv:1909.13719).
        mixup: Alpha of the Beta distribution of the share of another image that is blended in (arXiv:1710.09412).
        cutmix: Likewise, of the area pasted from another image (arXiv:1905.04899); with mixup too, either at random.
    """

    error = DataError
    resized_crop: Share = 0.0
    jitter: Share = 0.0
    randaugment: Magnitude = 0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0

    @property
    def mixes(self) -> bool:
        """Whether labels become shares of classes."""
        return self.mixup > 0 or self.cutmix > 0

    def change(self, images_NHWC: Tensor, draws_ND: Tensor) -> Tensor:
        """Change uint8 images, each by its own `DRAWS` uniform numbers in [0, 1)."""
        images = images_NHWC.permute(0, 3, 1, 2)
        if self.resized_crop:
            images = _bytes(_crop(images.float(), draws_ND[:, :4], self.resized_crop))
        if self.randaugment:
            images = _randaugment(images, (draws_ND[:, 8] * 2**24).long().tolist(), self.randaugment)
        if self.jitter:
            images = _bytes(_jitter(images.float(), draws_ND[:, 4:8], self.jitter))
        return images.permute(0, 2, 3, 1).contiguous()

    def mix(self, images_NCHW: Tensor, labels_N: Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Mix each image with another of the batch, in place; labels become shares, float (N, num_classes)."""
        mixture = Mixup(self.mixup, self.cutmix, mode="elem", label_smoothing=0.0, num_classes=num_classes)
        with own_randomness(seed):
            images, labels = mixture(images_NCHW, labels_N)
        return images, labels.float()


def _bytes(images: Tensor) -> Tensor:
    return images.round_().clamp_(0, 255).to(torch.uint8)


def _crop(images_NCHW: Tensor, draws_N4: Tensor, least: float) -> Tensor:
    """Cut out a window of at least this share of the area, and resize it, which never shrinks it."""
    area, ratio, left, top = draws_N4.unbind(1)
    area, ratio = least + (1 - least) * area, (4 / 3) ** (2 * ratio - 1)
    width, height = ((area * factor).sqrt().clamp(max=1.0) for factor in (ratio, 1 / ratio))
    theta_N23 = draws_N4.new_zeros(len(draws_N4), 2, 3)
    for axis, (size, place) in enumerate(((width, left), (height, top))):
        theta_N23[:, axis, axis], theta_N23[:, axis, 2] = size, (1 - size) * (2 * place - 1)
    grid = F.affine_grid(theta_N23, list(images_NCHW.shape), align_corners=False)
    return F.grid_sample(images_NCHW, grid, padding_mode="border", align_corners=False)


def _jitter(images_NCHW: Tensor, draws_N4: Tensor, most: float) -> Tensor:
    """Change brightness, then contrast, saturation and hue, all of them linear; hue turns about the axis of greys."""
    change = most * (2 * draws_N4 - 1)
    brightness, contrast, saturation, _ = (1 + change)[:, :, None, None, None].unbind(1)
    colours = images_NCHW.shape[1] == 3
    grey_C = images_NCHW.new_tensor((0.299, 0.587, 0.114) if colours else (1.0,))
    images = images_NCHW * brightness
    mean = torch.einsum("nchw,c->n", images, grey_C)[:, None, None, None] / images[0, 0].numel()
    images = torch.lerp(mean, images, contrast)
    if not colours:
        return images
    turn = change[:, 3, None, None] * (math.pi / 2)
    axes = images.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    eye = torch.eye(3, device=images.device)
    rotation = turn.cos() * eye + (1 - turn.cos()) / 3 + turn.sin() * axes
    return torch.einsum("nij,njhw->nihw", rotation @ torch.lerp(grey_C.expand(3, 3), eye, saturation[..., 0]), images)


def _randaugment(images_NCHW: Tensor, seeds: Sequence[int], magnitude: int) -> Tensor:
    """Torchvision's for the seed of each image, each operation applied once to all images that drew it."""
    from torchvision.transforms import v2

    transform, drawn = v2.RandAugment(num_ops=1, magnitude=magnitude), list(map(_drawn_operations, seeds))
    images = images_NCHW.clone(memory_format=torch.contiguous_format)
    with own_randomness(0):
        for turn in range(2):
            for operation in sorted({operations[turn] for operations in drawn}):
                rows = [index for index, operations in enumerate(drawn) if operations[turn] == operation]
                torch.default_generator.manual_seed(_seed_of_operation()[operation])
                images[rows] = transform(images[rows])
    return images


def _drawn_operations(seed: int) -> list[tuple[int, bool]]:
    """The two of 14 operations that torchvision draws, by number, and whether their magnitudes are negative."""
    random, drawn = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        number = int(torch.randint(14, (), generator=random))
        drawn.append((number, 1 <= number <= 9 and float(torch.rand((), generator=random)) <= 0.5))
    return drawn


@cache
def _seed_of_operation() -> dict[tuple[int, bool], int]:
    """A seed with which each operation, of each sign, is the first to be drawn."""
    return {_drawn_operations(seed)[0]: seed for seed in range(512)}


Batch = tuple[Tensor, Tensor]
"""Normalised images, float32 (N, C, H, W) in channels_last memory format, and labels, int64 (N,); mixed ones are shares
of the classes, float32 (N, K)."""


@dataclass(frozen=True)
class Augment(Checked):
    """Random changes to training images.

    Pixels that are padded or cut out get the colour `round(255 * mean)`, the nearest to the mean that a byte can
    hold: after normalisation it is 0 up to `0.5 / (255 * std)`, less than 0.01 for natural images.

    Attributes:
        crop: Padding in pixels on each side, out of which a window of the image's size is cut; 0 is off.
        flip: Mirror left to right with probability 1/2.
        cutout: Side in pixels of a square that is blanked, its centre anywhere in the image; 0 is off. Cutout (DeVries
            and Taylor, arXiv:1708.04552).
        photo: What else is done to photographs, after these.
    """

    error = DataError
    crop: Whole = 4
    flip: bool = True
    cutout: Whole = 0
    photo: PhotoAugment = PhotoAugment()  # noqa: RUF009 - frozen


NO_AUGMENT = Augment(crop=0, flip=False, cutout=0)


class Draws(NamedTuple):
    """What is drawn for one batch; int64 (N,) each, on the CPU.

    The result is `padded[image]` from row `top` and column `left` on, mirrored if `flip` is 1; then the square of side
    `cutout` that begins `cutout // 2` above and to the left of (`cut_y`, `cut_x`) is blanked.
    """

    image: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor
    cut_y: Tensor
    cut_x: Tensor


class Order:
    """Which images make up which batch: a permutation per epoch, cut into batches, those cut into the ranks' shares.

    The ranks' batches of an update, one after another, are the batch that a single rank of `world_size` times the
    batch size would have had. Images left over at the end of an epoch are dropped.

    Raises:
        DataError: Fewer images than one update of all ranks needs, or a rank outside the world.
    """

    def __init__(self, num_images: int, *, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise DataError(f"{batch_size=}, {rank=}, {world_size=}: need batch_size >= 1 and 0 <= rank < world_size.")
        if num_images < (together := batch_size * world_size):
            raise DataError(f"{num_images} training images: too few for one update of {batch_size=} on {world_size=}.")
        self.batch_size, self.updates_per_epoch = batch_size, num_images // together
        self._num_images, self._seed, self._all = num_images, seed, together
        self._share = slice(rank * batch_size, (rank + 1) * batch_size)
        self._permutation: tuple[int, Tensor] | None = None

    def indices(self, update: int) -> Tensor:
        """The images of this rank's batch, int64 (batch_size,)."""
        if update < 0:
            raise DataError(f"Updates are counted from 0, got {update=}.")
        epoch, step = divmod(update, self.updates_per_epoch)
        if self._permutation is None or self._permutation[0] != epoch:
            random = generator("order", self._seed, epoch)
            self._permutation = epoch, torch.randperm(self._num_images, generator=random)
        return self._permutation[1][step * self._all : (step + 1) * self._all][self._share]

    def draw(self, update: int, limits: Sequence[int], what: str = "augment") -> list[Tensor]:
        """One int64 (batch_size,) of uniform draws from `range(limit)` for each limit; `what` names the stream."""
        random = generator(what, self._seed, update)
        return [torch.randint(limit, (self._all,), generator=random)[self._share] for limit in limits]


class TrainBatches:
    """Shuffled, augmented and normalised batches of a split.

    The batches are made on `device`, where one padded copy of the images is kept. All of them are full: `batch_size`
    images for each of `world_size` ranks. `mean` and `std` are per channel, 1.0 is the brightest value.

    >>> split = Split(torch.zeros(10, 8, 8, 1, dtype=torch.uint8), torch.arange(10))
    >>> batches = TrainBatches(split, batch_size=4, mean=(0.5,), std=(0.5,))
    >>> images, labels = batches.batch(update=7)
    >>> images.shape, batches.updates_per_epoch, torch.equal(labels, batches.batch(7)[1])
    (torch.Size([4, 1, 8, 8]), 2, True)
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment = Augment(),  # noqa: B008 - frozen
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._order = Order(len(split), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        self.batch_size = batch_size
        self.updates_per_epoch = self._order.updates_per_epoch
        self.augment = augment
        if augment.photo.mixes and batch_size % 2:
            raise DataError(f"mixup and cutmix need an even batch size, got {batch_size=}.")
        self.device = torch.device(device)
        count, height, width, channels = split.images.shape
        self._shape = height, width, channels
        self._normalise = _Normalise(self._shape, mean, std, self.device)
        self._labels = split.labels.to(self.device)
        self._num_classes = int(split.labels.max()) + 1

        fill = fill_colour(mean).to(self.device)
        padded = split.images.to(self.device).contiguous()
        self._padded_size = height + 2 * augment.crop, width + 2 * augment.crop
        if augment.crop:
            images, padded = padded, fill.repeat(count, *self._padded_size, 1)
            padded[:, augment.crop : augment.crop + height, augment.crop : augment.crop + width] = images
        self._fill = fill.repeat(height, width)
        self._padded = padded
        self._rows = torch.arange(height, device=self.device)
        self._columns = torch.arange(width, device=self.device).repeat_interleave(channels)

    def draws(self, update: int) -> Draws:
        """All that is random about a batch. Turning one augmentation off does not change the others' draws."""
        height, width, _ = self._shape
        window = 2 * self.augment.crop + 1
        return Draws(self._order.indices(update), *self._order.draw(update, (window, window, 2, height, width)))

    def _pixels(self, update: int) -> tuple[Tensor, Tensor]:
        """The images of an update, uint8 (N, H, W, C), cut out, mirrored and blanked, and their labels."""
        height, width, channels = self._shape
        draws = torch.stack(self.draws(update))
        if self.device.type == "cuda":
            draws = draws.pin_memory()  # else the copy would wait for the GPU
        image, top, left, flip, cut_y, cut_x = draws.to(self.device, non_blocking=True)

        padded_height, padded_width = self._padded_size
        first = (image * padded_height + top) * padded_width + left
        rows = (first[:, None] + self._rows * padded_width).flatten()
        # Element i is the `width` pixels from pixel i of all pixels on: any row of any crop is one element.
        starts = self._padded.numel() // channels - width + 1
        runs = self._padded.as_strided((starts, width * channels), (channels, 1))
        images = runs.index_select(0, rows).view(-1, height, width, channels)
        if self.augment.flip:
            difference = images.flip(2).bitwise_xor_(images)
            images ^= difference.bitwise_and_(_mask(flip)[:, None, None, None])
        if side := self.augment.cutout:
            axes = (self._rows, cut_y), (self._columns, cut_x)
            offsets = (i - cut[:, None] + side // 2 for i, cut in axes)
            rows, columns = (_mask((offset >= 0) & (offset < side)) for offset in offsets)
            flat = images.view(-1, height, width * channels)
            difference = flat.bitwise_xor(self._fill)
            flat ^= difference.bitwise_and_(rows[:, :, None] & columns[:, None, :])
        return images, self._labels.index_select(0, image)

    def batch(self, update: int) -> Batch:
        """The batch of an update, counted from 0 over all epochs: `batch_size` images and labels (see `Batch`)."""
        (images, labels), photo = self._pixels(update), self.augment.photo
        if photo == PhotoAugment():
            return self._normalise(images), labels
        drawn = torch.stack(self._order.draw(update, (2**24,) * DRAWS, "photo"), 1)
        images = self._normalise(photo.change(images, (drawn / 2**24).to(images.device)))
        return photo.mix(images, labels, self._num_classes, int(drawn[0, 0])) if photo.mixes else (images, labels)


def eval_batches(
    split: Split, *, batch_size: int, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """All images of a split in order, normalised and unchanged otherwise; the last `Batch` may be smaller."""
    if batch_size < 1:
        raise DataError(f"eval_batches needs batch_size >= 1, got {batch_size=}.")
    normalise = _Normalise(tuple(split.images.shape[1:]), mean, std, torch.device(device))
    return (
        (normalise(images.to(device).contiguous()), labels.to(device))
        for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True)
        if len(labels)  # an empty split is one empty chunk
    )


def fill_colour(mean: Sequence[float]) -> Tensor:
    """The colour of padded and cut out pixels, `round(255 * mean)`: uint8 (C,).

    >>> fill_colour((0.5, 0.0, 1.0)).tolist()
    [128, 0, 255]
    """
    return (torch.tensor(mean, dtype=torch.float64) * 255).round().clamp(0, 255).to(torch.uint8)


class _Normalise:
    """`byte * (1 / (255 std)) - mean / std` in float32, a multiplication and then an addition.

    Not `addcmul`, which rounds once or twice depending on the machine. The constants are repeated over a whole image:
    a broadcast over 3 channels would not vectorise.
    """

    def __init__(self, shape: Sequence[int], mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        height, width, channels = shape
        if not len(mean) == len(std) == channels or min(std) <= 0:
            raise DataError(f"Images of {channels} channels need as many means and std > 0, got {mean=}, {std=}.")
        means, stds = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
        self._scale = (1 / (255 * stds)).float().repeat(height * width).to(device)
        self._shift = (-means / stds).float().repeat(height * width).to(device)
        self._shape = height, width, channels

    def __call__(self, images: Tensor) -> Tensor:
        flat = images.flatten(1).float().mul_(self._scale).add_(self._shift)
        return flat.view(len(flat), *self._shape).permute(0, 3, 1, 2)


def _mask(condition: Tensor) -> Tensor:
    """The byte 255 where true or 1, else 0."""
    return condition.to(torch.uint8).neg_()
