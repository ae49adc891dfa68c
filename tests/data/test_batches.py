from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growshrink.data.batches import NO_AUGMENT, Augment, Order, TrainBatches, eval_batches, fill_colour
from growshrink.data.datasets import Split
from growshrink.errors import DataError

MEANS, STDS = (0.49, 0.482, 0.4466), (0.247, 0.2435, 0.2616)


def random_split(count: int, height: int, width: int, channels: int) -> Split:
    random = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, height, width, channels), dtype=torch.uint8, generator=random)
    return Split(images, torch.randint(1000, (count,), generator=random))


def normalised(image: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    scale = (1 / (255 * np.array(std))).astype(np.float32)
    shift = (-np.array(mean) / np.array(std)).astype(np.float32)
    return image.astype(np.float32) * scale + shift


def slow_twin(batches: TrainBatches, split: Split, update: int, mean: tuple[float, ...], std: tuple[float, ...]):
    """The batch, image by image and in the obvious way."""
    _, height, width, _ = split.images.shape
    crop, side = batches.augment.crop, batches.augment.cutout
    fill = np.round(255 * np.array(mean)).astype(np.uint8)
    images, labels = [], []
    for index, top, left, flip, cut_y, cut_x in zip(*(d.tolist() for d in batches.draws(update)), strict=True):
        image = split.images[index].numpy()
        padded = np.stack([np.pad(c, crop, constant_values=f) for c, f in zip(image.T, fill, strict=True)]).T
        image = padded[top : top + height, left : left + width].copy()
        if flip and batches.augment.flip:
            image = image[:, ::-1].copy()
        for y in range(cut_y - side // 2, cut_y - side // 2 + side):
            for x in range(cut_x - side // 2, cut_x - side // 2 + side):
                if 0 <= y < height and 0 <= x < width:
                    image[y, x] = fill
        images.append(torch.from_numpy(normalised(image, mean, std)).permute(2, 0, 1))
        labels.append(split.labels[index])
    return torch.stack(images), torch.stack(labels)


@pytest.mark.parametrize(
    "augment",
    [
        NO_AUGMENT,
        Augment(),
        Augment(crop=0),
        Augment(flip=False),
        Augment(crop=1, cutout=1),
        Augment(crop=0, flip=False, cutout=4),
        Augment(crop=12, flip=True, cutout=5),
        Augment(crop=2, cutout=50),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(9, 8, 8, 1), (11, 7, 10, 3), (8, 1, 1, 2)], ids=str)
def test_batch_equals_its_slow_twin(augment: Augment, shape: tuple[int, int, int, int]) -> None:
    mean, std = (MEANS[: shape[-1]], STDS[: shape[-1]])
    split = random_split(*shape)
    batches = TrainBatches(split, batch_size=4, mean=mean, std=std, augment=augment, seed=3)
    for update in (0, 1, 2, 1001):
        images, labels = batches.batch(update)
        expected_images, expected_labels = slow_twin(batches, split, update, mean, std)
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64


def test_batch_does_not_depend_on_what_was_asked_before_nor_on_global_randomness() -> None:
    split = random_split(20, 6, 6, 3)
    options = {"batch_size": 3, "mean": MEANS, "std": STDS, "augment": Augment(crop=2, cutout=2), "seed": 5}
    straight = TrainBatches(split, **options)
    expected = [straight.batch(update) for update in range(20)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for update in (19, 3, 3, 0, 12):
        images, labels = TrainBatches(split, **options).batch(update)
        again = straight.batch(update)
        assert torch.equal(images, expected[update][0]) and torch.equal(labels, expected[update][1])
        assert torch.equal(again[0], images)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(TrainBatches(split, **{**options, "seed": 6}).batch(0)[0], expected[0][0])


def test_switching_one_augmentation_off_keeps_the_draws_of_the_others() -> None:
    split = random_split(10, 6, 6, 3)
    options = {"batch_size": 8, "mean": MEANS, "std": STDS}
    full = TrainBatches(split, augment=Augment(cutout=2), **options).draws(4)
    plain = TrainBatches(split, augment=Augment(flip=False), **options).draws(4)
    assert all(torch.equal(a, b) for a, b in zip(full, plain, strict=True))


def test_the_split_is_left_as_it_was() -> None:
    split = random_split(6, 5, 5, 1)
    before = split.images.clone()
    TrainBatches(split, batch_size=6, mean=(0.5,), std=(0.5,), augment=Augment(crop=0, cutout=3)).batch(0)
    assert torch.equal(split.images, before)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_epoch_shows_each_image_at_most_once_and_ranks_share_the_single_ranks_batches(data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, 6))
    world_size = data.draw(st.integers(1, 4))
    count = data.draw(st.integers(batch_size * world_size, 60))
    seed = data.draw(st.integers(0, 2**40))
    epoch = data.draw(st.integers(0, 1000))
    single = Order(count, batch_size=batch_size * world_size, seed=seed)
    ranks = [
        Order(count, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert {r.updates_per_epoch for r in ranks} == {single.updates_per_epoch} == {count // (batch_size * world_size)}
    seen = []
    for update in range(epoch * single.updates_per_epoch, (epoch + 1) * single.updates_per_epoch):
        indices = single.indices(update)
        assert torch.equal(torch.cat([r.indices(update) for r in ranks]), indices)
        (draws,) = single.draw(update, (9,))
        assert torch.equal(torch.cat([r.draw(update, (9,))[0] for r in ranks]), draws)
        seen += indices.tolist()
    assert len(set(seen)) == len(seen) == single.updates_per_epoch * batch_size * world_size
    assert set(seen) <= set(range(count))


def test_ranks_together_make_the_single_ranks_images() -> None:
    split = random_split(17, 6, 6, 3)
    options = {"mean": MEANS, "std": STDS, "augment": Augment(crop=2, cutout=2)}
    whole, _ = TrainBatches(split, batch_size=8, **options).batch(5)
    parts = [TrainBatches(split, batch_size=4, rank=r, world_size=2, **options).batch(5)[0] for r in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)


def test_draws_are_uniform_and_epochs_differ() -> None:
    batches = TrainBatches(random_split(4000, 2, 3, 1), batch_size=2000, mean=(0.5,), std=(0.5,), augment=Augment(1))
    draws = [batches.draws(update) for update in range(4)]
    for name, limit in (("top", 3), ("left", 3), ("flip", 2), ("cut_y", 2), ("cut_x", 3)):
        counts = torch.bincount(torch.cat([getattr(d, name) for d in draws]), minlength=limit)
        assert len(counts) == limit
        assert (counts / 8000 - 1 / limit).abs().max() < 0.03, name  # 5 standard deviations
    for name in draws[0]._fields:
        assert not torch.equal(getattr(draws[0], name), getattr(draws[2], name)), name


def test_padding_is_nearly_zero_once_normalised() -> None:
    split = Split(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    images, _ = TrainBatches(split, batch_size=4, mean=MEANS, std=STDS, augment=Augment(crop=8)).batch(0)
    black = -torch.tensor(MEANS) / torch.tensor(STDS)
    padding = (images - black.view(3, 1, 1)).abs() > 0.1
    assert padding.any() and not padding.all()
    assert images[padding].abs().max() < 0.01
    assert fill_colour((-0.1, 1.2)).tolist() == [0, 255]


@pytest.mark.parametrize(("count", "batch_size", "sizes"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 9, [2]), (0, 4, [])])
def test_eval_batches_show_everything_in_order(count: int, batch_size: int, sizes: list[int]) -> None:
    split = random_split(count, 5, 4, 3)
    batches = list(eval_batches(split, batch_size=batch_size, mean=MEANS, std=STDS))
    assert [len(labels) for _, labels in batches] == sizes
    start = 0
    for images, labels in batches:
        expected = normalised(split.images[start : start + len(labels)].numpy(), MEANS, STDS)
        assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(expected))
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels, split.labels[start : start + len(labels)])
        start += len(labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 11}, "10 training images: too few"),
        ({"batch_size": 6, "world_size": 2}, "too few"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"rank": 1}, "rank < world_size"),
        ({"rank": -1}, "rank < world_size"),
        ({"mean": (0.5,)}, "3 channels"),
        ({"std": (0.5, 0.5, 0.0)}, "std > 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TrainBatches(random_split(10, 4, 4, 3), **{"batch_size": 2, "mean": MEANS, "std": STDS, **options})


def test_other_refusals() -> None:
    for bad in ({"crop": -1}, {"cutout": -1}):
        with pytest.raises(DataError, match="must be at least 0"):
            Augment(**bad)
    split = random_split(4, 4, 4, 3)
    with pytest.raises(DataError, match="from 0"):
        TrainBatches(split, batch_size=2, mean=MEANS, std=STDS).batch(-1)
    with pytest.raises(DataError, match="batch_size >= 1"):
        eval_batches(split, batch_size=0, mean=MEANS, std=STDS)
