import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import supernets as small
import torch
from torch import nn

import growshrink as gs
from growshrink.analysis import scores
from growshrink.data.batches import NO_AUGMENT
from growshrink.data.feed import MemoryFeed
from growshrink.layers.activations import VanishingReLU
from growshrink.training import TrainConfig, evaluate
from program import module_of

train_supernet = small.train_supernet
angle_rank = module_of(Path(__file__).parents[2] / "tools" / "angle_rank.py")
random_labels, with_random_labels = angle_rank.random_labels, angle_rank.with_random_labels


@pytest.fixture(scope="module")
def bench():
    return small.bench(small.digits())


def test_every_score_has_a_number_for_every_subnet_and_touches_nothing(bench):
    index = bench.table.sample(3)
    before = small.state(bench.init), small.state(bench.trained), gs.layers.get_width(bench.init)
    rng = torch.get_rng_state()
    for name, function in scores.SCORES.items():
        values = function(bench, index)
        assert values.shape == (3,) and np.isfinite(values).all(), name
        assert np.array_equal(values, function(bench, index)), name
    assert small.same(before[0], small.state(bench.init)) and small.same(before[1], small.state(bench.trained))
    assert gs.layers.get_width(bench.init) == before[2] and torch.equal(rng, torch.get_rng_state())


def test_a_new_score_is_one_function(bench, monkeypatch):
    monkeypatch.setattr(scores, "SCORES", {})

    @scores.score("mine")
    def mine(bench, index):
        return index.sum(1).astype(float)

    assert scores.SCORES["mine"](bench, np.ones((2, 9), int)).tolist() == [9.0, 9.0]
    with pytest.raises(AssertionError):
        scores.score("mine")(mine)


def test_naswot_is_the_determinant_of_the_patterns(bench):
    """Codes of all units of an image, one long vector, against hooks on the outputs."""
    row = bench.table.sample(1, seed=3)
    net = copy.deepcopy(bench.init).train()
    gs.set_width(net, bench.table.width(row[0]))
    codes = []
    for module in net.modules():
        if isinstance(module, (nn.ReLU, VanishingReLU)):
            module.register_forward_hook(lambda m, args, out: codes.append((out > 0).flatten(1).clone()))
    with torch.no_grad():
        net(bench.minibatch()[0])
    codes = torch.cat(codes, dim=1).numpy()
    kernel = (codes[:, None, :] == codes[None, :, :]).sum(-1).astype(float)
    assert scores.naswot(bench, row)[0] == pytest.approx(np.linalg.slogdet(kernel)[1], rel=1e-9)


def test_images_that_no_unit_tells_apart_have_no_naswot(bench, monkeypatch):
    images, labels = bench.minibatch()
    twice = images.clone()
    twice[1] = twice[0]
    monkeypatch.setattr(type(bench), "minibatch", lambda self: (twice, labels))
    value = scores.naswot(bench, bench.table.sample(1))[0]
    assert np.isnan(value) or value < scores.naswot(small.bench(bench.feed, 0.1), bench.table.sample(1))[0]


def test_jacob_cov_is_of_the_whole_jacobian(bench, monkeypatch):
    """Gradients of single outputs, one at a time, in float64, and numpy's eigenvalues."""
    images, labels = bench.minibatch()
    few = images[:12].double()
    exact = replace(bench, init=copy.deepcopy(bench.init).double())
    monkeypatch.setattr(type(bench), "minibatch", lambda self: (few, labels[:12]))
    row = bench.table.sample(1, seed=3)
    net = copy.deepcopy(exact.init).train()
    gs.set_width(net, bench.table.width(row[0]))
    jacobian = torch.autograd.functional.jacobian(net, few).sum((0, 1)).flatten(1).numpy()
    values = np.linalg.eigvals(np.corrcoef(jacobian)).real + 1e-5
    assert scores.jacob_cov(exact, row)[0] == pytest.approx(-(np.log(values) + 1 / values).sum(), rel=1e-6)


def test_early_loss_is_the_sum_over_the_first_updates_of_the_subnet_alone(bench):
    rows = bench.table.sample(2, seed=4)
    found = scores.early_loss(bench, rows)
    net = copy.deepcopy(bench.init).train()
    gs.set_width(net, bench.table.width(rows[1]))
    decayed = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    total = 0.0
    for update in range(scores.EARLY):
        images, labels = bench.feed.train.batch(update)
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
    assert found[1] == pytest.approx(-total, rel=1e-4) and found[0] != found[1]


def test_supernet_accuracy_is_of_the_recalibrated_subnet(bench):
    index = bench.table.sample(2, seed=1)
    for row, value in zip(index, scores.supernet_accuracy(bench, index), strict=True):
        net = copy.deepcopy(bench.trained)
        gs.set_width(net, bench.table.width(row))
        gs.calibrate_bn(net, bench.calibration())
        assert value == evaluate(net, bench.feed.val).top1
    assert scores.supernet_accuracy(bench, index).min() > 30


def test_gradient_norm_of_a_subnet_leaves_the_rest_out(bench):
    full = bench.table.index([{name: choices[-1] for name, choices in bench.table.choices.items()}])
    base = np.zeros_like(full)
    values = scores.grad_norm(bench, np.concatenate([base, full]))
    assert values[0] > 0 and values[0] != values[1]


def test_random_labels_are_drawn_once_uniformly_and_are_not_the_truth():
    feed = small.digits()
    drawn = random_labels(feed.data, seed=1)
    agree = float((drawn.train.labels == feed.data.train.labels).float().mean())
    assert abs(agree - 0.1) < 0.03
    assert torch.bincount(drawn.train.labels).min() > 80
    assert torch.equal(drawn.train.labels, random_labels(feed.data, seed=1).train.labels)
    assert not torch.equal(drawn.train.labels, random_labels(feed.data, seed=2).train.labels)
    assert torch.equal(drawn.val.labels, feed.data.val.labels)
    assert torch.equal(drawn.test.labels, feed.data.test.labels)


def test_a_feed_with_random_labels_is_otherwise_the_same():
    data = small.digits().data
    feed = with_random_labels(MemoryFeed.of(data, batch_size=32, augment=NO_AUGMENT, device="meta", eval_batch_size=9))
    assert feed.train.batch_size == 32 and feed.train.augment == NO_AUGMENT
    assert {str(split.device) for split in (feed.val, feed.test)} == {"meta"} and feed.val.batch_size == 9
    assert torch.equal(feed.data.train.labels, random_labels(data).train.labels)


def test_stages_of_a_supernet_draw_other_widths_and_stay_in_their_space():
    feed = small.digits()
    init, trained, space = small.supernet(feed, epochs=0.1)
    narrow = gs.layers.WidthSpace({name: (values[0],) for name, values in space.choices.items()}, None, 1, 8)
    before = small.state(trained)
    following = train_supernet(trained, feed, epochs=0.2, config=TrainConfig(lr=0.1), space=narrow, start=2, seed=0)
    assert following == 2 + round(0.2 * feed.train.updates_per_epoch)
    body = trained.stages[0][0].conv
    base = space.base["stages.0.0.conv"]
    assert torch.equal(body.conv.weight[base:], before["stages.0.0.conv.conv.weight"][base:])
    assert not torch.equal(body.conv.weight[:base], before["stages.0.0.conv.conv.weight"][:base])
