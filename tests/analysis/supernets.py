"""A small supernet on digits, and its bench."""

import copy
from pathlib import Path

import torch

import growshrink as gs
import nets
from growshrink.analysis._angle import supernet_table
from growshrink.analysis.scores import Bench
from growshrink.data.batches import NO_AUGMENT
from growshrink.data.datasets import load_data
from growshrink.data.feed import MemoryFeed
from growshrink.training import TrainConfig
from program import beside

train_supernet = beside(Path(__file__).parents[2] / "recipes" / "trained.py").train_supernet


def digits(batch_size=64):
    return MemoryFeed.of(load_data("digits", progress=False), batch_size=batch_size, augment=NO_AUGMENT)


def supernet(feed, epochs=2.0, seed=0, **kwargs):
    """Before and after training."""
    init = nets.net("reducenet20_x4", seed=seed, in_chans=1)
    trained = copy.deepcopy(init)
    space = gs.width_space(init, diversity=1)
    train_supernet(trained, feed, epochs=epochs, config=TrainConfig(lr=0.1), space=space, seed=seed, **kwargs)
    return init, trained, space


def bench(feed, epochs=2.0):
    init, trained, space = supernet(feed, epochs)
    return Bench(
        init, trained, supernet_table(init, trained, space, input_size=feed.input_size), feed, num_calibration=4
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)
