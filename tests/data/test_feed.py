import pytest
import torch
from torch import nn

from growshrink.data.batches import NO_AUGMENT
from growshrink.data.datasets import DataSet, Split
from growshrink.data.feed import MemoryFeed, check_model_fits
from growshrink.errors import DataError, RunError
from nets import net


def split(count, channels=3):
    random = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 8, 8, channels), dtype=torch.uint8, generator=random)
    return Split(images, torch.arange(count) % 10)


def data(train=40, val=10, test=10, channels=3):
    names = tuple("abcdefghij")
    statistics = ((0.5,) * channels, (0.25,) * channels)
    return DataSet("noise", split(train, channels), split(val, channels), split(test, channels), names, *statistics)


def feed(**kwargs):
    return MemoryFeed.of(data(**kwargs), batch_size=8)


def test_a_feed_says_what_its_data_are():
    found = MemoryFeed.of(data(), batch_size=8, augment=NO_AUGMENT, eval_batch_size=4)
    assert (found.name, found.input_size, found.classes) == ("noise", (3, 8, 8), tuple("abcdefghij"))
    assert (found.mean, found.std) == ((0.5,) * 3, (0.25,) * 3)
    assert (found.train.batch_size, found.train.updates_per_epoch) == (8, 5)
    for scoring, raw in ((found.val, found.data.val), (found.test, found.data.test)):
        assert len(scoring) == 10
        for _ in range(2):  # can be walked through again
            batches = list(scoring)
            assert [len(labels) for _, labels in batches] == [4, 4, 2]
            assert torch.equal(torch.cat([labels for _, labels in batches]), raw.labels)
            whole = torch.cat([images for images, _ in batches])
            expected = (raw.images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
            torch.testing.assert_close(whole, expected)
    with pytest.raises(DataError, match="too few"):
        MemoryFeed.of(data(), batch_size=64)


class Wrong(nn.Module):
    """Fails in its own way."""

    def forward(self, x):
        raise KeyError("no such\nthing")


@pytest.mark.parametrize(
    ("model", "kwargs", "words"),
    [
        (lambda: net(in_chans=1), {}, "takes 1 channels, the images of noise have 3.*in_chans=3"),
        (lambda: net(), {"channels": 1}, "takes 3 channels, the images of noise have 1"),
        (lambda: net("reducenet32", width=0.5).eval(), {"val": 0}, "the val split of noise is empty"),
        (lambda: net(), {"test": 0}, "the test split of noise is empty"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 9)), {}, r"outputs of shape \(9,\), noise has 10 classes"),
        (lambda: nn.Conv2d(3, 10, 1), {}, r"outputs of shape \(10, 8, 8\)"),
        (lambda: nn.Conv2d(3, 10, 11), {}, r"does not run on images of size \(3, 8, 8\)"),
        (Wrong, {}, "does not run on images"),
    ],
    ids=["in_chans", "grey", "val", "test", "classes", "map", "size", "crash"],
)
def test_a_model_that_does_not_fit_its_data_is_refused(model, kwargs, words):
    with pytest.raises(RunError, match=words):
        check_model_fits(model(), feed(**kwargs))


def test_the_check_leaves_the_model_alone():
    model = net().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_model_fits(model, feed())
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
