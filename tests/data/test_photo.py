"""Augmentation of photographs: each image its own, a pure function of (seed, update), mixtures as by hand."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from growshrink.base.seeding import own_randomness
from growshrink.data.batches import DRAWS, Augment, PhotoAugment, TrainBatches, _drawn_operations, _randaugment
from growshrink.data.datasets import Split
from growshrink.errors import DataError

STATS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
KINDS = {
    "crop": PhotoAugment(resized_crop=0.3),
    "jitter": PhotoAugment(jitter=0.4),
    "rand": PhotoAugment(randaugment=9),
    "mixup": PhotoAugment(mixup=0.4),
    "cutmix": PhotoAugment(cutmix=1.0),
    "all": PhotoAugment(0.5, 0.2, 5, 0.2, 1.0),
}


def split(count=12, same=False):
    random = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 10, 12, 3), dtype=torch.uint8, generator=random)
    return Split(images[:1].expand_as(images).clone() if same else images, torch.arange(count) % 4)


def batches(photo, *, same=False, **options):
    augment = Augment(crop=0, flip=False, photo=photo)
    return TrainBatches(split(same=same), **{"batch_size": 6, "augment": augment, "seed": 3, **STATS, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_pure_function_of_seed_and_update(kind):
    state = torch.get_rng_state()
    ours = batches(KINDS[kind])
    expected = [ours.batch(update) for update in range(4)]
    for update in (3, 0):
        images, labels = batches(KINDS[kind]).batch(update)
        assert torch.equal(images, expected[update][0]) and torch.equal(labels, expected[update][1])
        assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    plain = batches(PhotoAugment()).batch(0)
    assert not torch.equal(expected[0][0], plain[0])
    if not KINDS[kind].mixes:
        assert torch.equal(expected[0][1], plain[1])
        ranks = [batches(KINDS[kind], batch_size=3, rank=rank, world_size=2).batch(2)[0] for rank in (0, 1)]
        assert torch.equal(torch.cat(ranks), expected[2][0])


@pytest.mark.parametrize("kind", ["crop", "jitter", "rand"])
def test_each_image_has_parameters_of_its_own(kind):
    images = batches(KINDS[kind], same=True).batch(0)[0]
    assert len(images.unique(dim=0)) >= 4


def test_a_crop_is_torchvisions_and_one_of_all_is_none():
    images = split().images[:2]
    draws = torch.zeros(2, DRAWS)
    draws[:, 1] = 0.5  # as the image is
    draws[0, :4] = torch.tensor([0.0, 0.5, 1.0, 0.0])  # a quarter, at the upper right
    draws[1, 0] = 1.0  # all of it
    found = PhotoAugment(resized_crop=0.25).change(images, draws).permute(0, 3, 1, 2)
    image = images[0].permute(2, 0, 1).double()
    expected = v2.functional.resized_crop(image, 0, 6, 5, 6, [10, 12], antialias=False)
    inner = (slice(None), slice(1, -1), slice(1, -1))  # at the window's edge the crop sees its neighbours
    assert (found[0][inner] - expected[inner]).abs().max() <= 0.51
    assert torch.equal(found[1], images[1].permute(2, 0, 1))


def test_jitter_is_torchvisions_one_change_at_a_time():
    images = split().images[:1] // 2 + 64  # nothing is clamped
    image = images[0].permute(2, 0, 1)
    half = torch.full((1, DRAWS), 0.5)
    for place, twin in enumerate(("brightness", "contrast", "saturation"), start=4):
        draws = half.clone()
        draws[:, place] = 0.8
        found = PhotoAugment(jitter=0.5).change(images, draws)[0].permute(2, 0, 1)
        expected = getattr(v2.functional, f"adjust_{twin}")(image.double() / 255, 1.3) * 255
        assert (found - expected).abs().max() <= 0.51, twin
    draws = half.clone()
    draws[:, 7] = 1.0
    red = torch.tensor([[[[200, 10, 10]]]], dtype=torch.uint8)
    found = PhotoAugment(jitter=1.0).change(red, draws).flatten()  # a quarter of a turn, towards green
    assert found[1] > found[0] > found[2] and torch.equal(PhotoAugment(jitter=0.5).change(images, half), images)


@pytest.mark.parametrize(("magnitude", "channels"), [(9, 3), (30, 1)])
def test_randaugment_is_torchvisions_on_each_image_alone(magnitude, channels):
    random = torch.Generator().manual_seed(magnitude)
    images = torch.randint(256, (90, 10, 12, channels), dtype=torch.uint8, generator=random).permute(0, 3, 1, 2)
    seeds = torch.randint(2**24, (90,), generator=random).tolist()
    assert len({operation for seed in seeds for operation in _drawn_operations(seed)}) == 9 * 2 + 5
    before, transform = images.clone(), v2.RandAugment(magnitude=magnitude)
    found = _randaugment(images, seeds, magnitude)
    for image, seed, ours in zip(images, seeds, found, strict=True):
        with own_randomness(seed):
            assert torch.equal(transform(image), ours), _drawn_operations(seed)
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_the_shares_of_the_pixels(kind):
    plain, labels = batches(PhotoAugment()).batch(1)
    mixed, target = batches(KINDS[kind]).batch(1)
    assert target.shape == (6, 4) and torch.allclose(target.sum(1), torch.ones(6))
    seen = set()
    for index in range(6):
        other = 5 - index  # timm's pairs
        share = float(target[index, labels[index]])
        if labels[index] == labels[other]:
            continue
        seen.add(round(share, 3))
        if kind == "mixup":
            expected = share * plain[index].double() + (1 - share) * plain[other].double()
            assert torch.allclose(mixed[index].double(), expected, atol=1e-5)
        else:
            own = (mixed[index] == plain[index]).all(0)
            assert bool((own | (mixed[index] == plain[other]).all(0)).all())
            assert abs(float(own.double().mean()) - share) < 1e-6
            rows, columns = np.nonzero((~own).numpy())
            assert not len(rows) or len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # a box
    assert len(seen) >= 2


def test_limits():
    for wrong in ({"randaugment": 31}, {"jitter": 1.5}, {"mixup": -1.0}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            PhotoAugment(**wrong)
