"""A net, data and plans so small that a whole run of several rounds takes a second."""

import torch
from torch import nn

import growshrink as gs
from growshrink.cycle import layout as layout_module
from growshrink.data.batches import NO_AUGMENT
from growshrink.data.datasets import DataSet, Split
from growshrink.data.feed import MemoryFeed
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.training import TrainConfig

SIZE = (3, 8, 8)
CLASSES = tuple("abcd")
BATCH = 8
PER_EPOCH = 4
CONFIG = TrainConfig(lr=0.05, ema_decay=0.9)


class Small(nn.Module):
    """stem -> 2 x (conv -> BN -> ReLU), the second with a skip -> pooled classifier."""

    def __init__(self, bias=False, norm=True, dropout=0.0, built_grown=False, outputs=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        make = (lambda: PureBottleneck(4, 8, 4)) if built_grown else lambda: nn.Conv2d(4, 4, 3, padding=1, bias=bias)
        self.conv1, self.conv2 = make(), make()
        self.bn1, self.bn2 = (nn.BatchNorm2d(4) if norm else nn.Identity() for _ in range(2))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(4, outputs)

    def forward(self, x):
        x = self.bn1(self.conv1(self.stem(x))).relu()
        x = (x + self.bn2(self.conv2(x))).relu()
        return self.head(self.drop(x).mean((2, 3)))


def small(**kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small(**kwargs)


#: MACs of an image through the parts of a Small: stem, each conv, head; and of a bottleneck branch of ratio 1.
STEM, CONV, HEAD = 64 * 27 * 4, 64 * 36 * 4, 4 * len(CLASSES)
BOTTLENECK = CONV + 64 * 16


def split(count, seed):
    """Noise whose brightness tells the class."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)
    images = torch.randint(120, (count, 8, 8, 3), generator=random) + 40 * labels[:, None, None, None]
    return Split(images.to(torch.uint8), labels)


def data():
    return DataSet(
        "noise", split(PER_EPOCH * BATCH, 0), split(12, 1), split(12, 2), CLASSES, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    )


class Feed(MemoryFeed):
    """The feed of `data()`, which can be told to fail at an update and counts how often the test split is read."""

    @staticmethod
    def make(augment=NO_AUGMENT, seed=0):
        plain = MemoryFeed.of(data(), batch_size=BATCH, augment=augment, seed=seed)
        feed = Feed(plain.data, _Train(plain.train), plain.val, _Counted(plain.test))
        return feed


class Interrupt(BaseException):
    """Like a signal, not like an error: nothing may take it for one."""


class _Train:
    def __init__(self, batches):
        self.batches, self.fail_at = batches, None
        self.batch_size, self.updates_per_epoch = batches.batch_size, batches.updates_per_epoch

    def batch(self, update):
        if update == self.fail_at:
            raise Interrupt(f"before update {update}")
        return self.batches.batch(update)


class _Counted:
    def __init__(self, batches):
        self.batches, self.reads = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.reads += 1
        return iter(self.batches)


def two_rounds(branches=(("bottleneck",), ("insert",)), **kwargs):
    """base 3 updates; 24 updates a round: hold 6, vanish 4, settle 4, tail 10 (with a shortened settle)."""
    kwargs = {"epochs": 6, "ratio": 1.0, "hold": 0.25, "vanish": 1 / 6, "settle": 1 / 6, **kwargs}
    return gs.CyclePlan(
        base_epochs=0.75, rounds=tuple(gs.Round(branch=kinds, **kwargs) for kinds in branches), rewarm=2
    )


def shorten_settle(monkeypatch):
    monkeypatch.setattr(layout_module, "LEAST_SETTLE", 2)
