"""Augmentation of photographs: each image its own, a pure function of (seed, update), mixtures as by hand."""

import numpy as np
import pytest
import torch

from growshrink.data.batches import Augment, PhotoAugment, TrainBatches
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
