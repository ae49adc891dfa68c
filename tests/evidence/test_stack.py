"""Nets side by side are trained as each would be alone."""

import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import growshrink as gs
from growshrink.data.batches import Augment
from growshrink.data.datasets import load_data
from growshrink.data.feed import MemoryFeed
from growshrink.layers.grown import grown_modules
from growshrink.training import TrainConfig, Trainer
from growshrink.training._evaluate import evaluate
from nets import ConvNet, net, randomized
from program import beside

stack = beside(Path(__file__).parents[2] / "recipes" / "side_by_side.py")
StackedFeed, StackError = stack.StackedFeed, stack.StackError
stack_nets, unstack_net = stack.stack_nets, stack.unstack_net
SIZE, SEEDS = (3, 16, 16), 3
NETS = {
    "plain": lambda seed: net(seed=seed),
    "built grown": lambda seed: net("reducenet20_x2", seed=seed),
    "grown": lambda seed: gs.grow(net(seed=seed), "bottleneck", ratio=2, seed=seed, input_size=SIZE),
    "dbb, as in the paper": lambda seed: gs.grow(net(seed=seed), "dbb", init="paper", seed=seed, input_size=SIZE),
    "squeeze and excite, depthwise": lambda seed: net("mobilenetv3_small_050", seed=seed),
}


def step_(model, images, labels):
    """Gradients of a mean loss, in train mode."""
    nn.functional.cross_entropy(model.train()(images), labels).backward()


@pytest.mark.parametrize("kind", NETS)
def test_gradients_statistics_and_outputs_are_each_nets_own(kind):
    nets = [randomized(NETS[kind](seed), seed).double() for seed in range(SEEDS)]
    images = [
        torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(SEEDS)
    ]
    labels = [torch.arange(6) % 10 + s for s in range(SEEDS)]
    labels = [label % 10 for label in labels]
    stack = stack_nets(nets, SIZE)
    torch.manual_seed(0)
    for module in [*stack.modules(), *(m for one in nets for m in one.modules())]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    step_(stack, torch.cat(images, 1), torch.stack(labels, 1).flatten())
    gradients = {name: p.grad for name, p in stack.named_parameters()}
    for index, (one, x, y) in enumerate(zip(nets, images, labels, strict=True)):
        step_(one, x, y)
        for name, parameter in one.named_parameters():
            if parameter.grad is None:
                assert gradients[name] is None
                continue
            own = gradients[name].chunk(SEEDS)[index]
            assert torch.allclose(own, parameter.grad, rtol=1e-7, atol=1e-11 * float(parameter.grad.abs().max() + 1))
        for name, buffer in one.named_buffers():
            if buffer.ndim:
                assert torch.allclose(stack.get_buffer(name).chunk(SEEDS)[index], buffer, rtol=1e-9)


@pytest.mark.parametrize("kind", ["plain", "dbb, as in the paper", "squeeze and excite, depthwise"])
def test_dense_kernels_in_place_of_groups_compute_the_same(kind):
    nets = [randomized(NETS[kind](seed), seed).double() for seed in range(SEEDS)]
    images = torch.randn(6, SEEDS * 3, *SIZE[1:], dtype=torch.float64)
    found = []
    for device in ("cuda", "cpu"):  # there are no convolutions on the first
        many = stack_nets(nets, SIZE).eval()
        with (
            stack.DenseGroups(SEEDS, device),
            mock.patch.object(stack, "block_diagonal", wraps=stack.block_diagonal) as made,
        ):
            out = many(images)
            out.square().mean().backward()
        assert made.called == (device == "cpu")
        found.append([out, *(p.grad for p in many.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12 * float(a.detach().abs().max() + 1))


def test_a_block_diagonal_kernel_has_the_gradient_of_its_blocks():
    weight = torch.randn(6, 2, 3, 1, dtype=torch.float64, requires_grad=True)
    for groups in (1, 2, 3):
        blocks = [torch.block_diag(*weight[:, :, i, 0].chunk(groups)) for i in range(3)]
        assert torch.equal(stack.block_diagonal(weight, groups)[..., 0], torch.stack(blocks, 2))
        assert torch.autograd.gradcheck(lambda kernel, g=groups: stack.block_diagonal(kernel, g), weight)


@pytest.mark.parametrize("augment", [Augment(crop=1), Augment(crop=0, flip=False)])
def test_batches_made_together_are_those_made_one_by_one(augment):
    feeds = [
        MemoryFeed.of(load_data("digits", seed=seed, progress=False), batch_size=32, augment=augment, seed=seed)
        for seed in range(SEEDS)
    ]
    together = StackedFeed(feeds)
    parts = [feed.train for feed in feeds]
    assert stack._JoinedBatches.can_join(parts)
    joined = stack._JoinedBatches(parts, together.mean, together.std)
    for update in (0, 3, 100):
        for made, expected in zip(joined.batch(update), together.train.batch(update), strict=True):
            assert torch.equal(made, expected) and made.stride() == expected.stride()
    others = [MemoryFeed.of(feeds[0].data, batch_size=32, augment=Augment(cutout=2)).train, parts[0]]
    assert not stack._JoinedBatches.can_join(others) and not stack._JoinedBatches.can_join(others[:1])


def test_a_stack_that_was_grown_fuses_into_the_nets_it_is_made_of():
    plain = [randomized(net(seed=seed), seed) for seed in range(SEEDS)]
    stack = stack_nets(plain, SIZE)
    size = (SEEDS * 3, 16, 16)
    grown = gs.grow(stack, ["bottleneck", "insert"], ratio=2, input_size=size)
    assert len(grown_modules(grown)) == len(grown_modules(gs.grow(plain[0], input_size=SIZE)))
    gs.set_lambda(grown, 0.0)
    nets = unstack_net(gs.fuse(grown, input_size=size), plain[0], SEEDS)
    for one, other in zip(nets, plain, strict=True):  # silent branches: the same nets again
        assert gs.compare(one, other, input_size=SIZE).max_rel < 1e-12
    assert gs.verify(grown, input_size=size).ok


def test_branches_start_as_those_of_a_single_net_do():
    """He's fan out is that of a group: a grouped kernel does not start smaller."""
    single = gs.grow(net(width=1.0), "bottleneck", ratio=2, input_size=SIZE)
    stack = stack_nets([net(seed=s, width=1.0) for s in range(4)], SIZE)
    stack = gs.grow(stack, "bottleneck", ratio=2, input_size=(12, 16, 16))
    for (name, a), (other, b) in zip(grown_modules(single).items(), grown_modules(stack).items(), strict=True):
        assert name == other
        ours, theirs = (m.branches[0].body.conv.weight.detach() for m in (b, a))
        assert ours.shape == (4 * theirs.shape[0], *theirs.shape[1:])
        assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.1)


def test_training_side_by_side_ends_near_where_each_ends_alone():
    feeds = [
        MemoryFeed.of(load_data("digits", seed=s), batch_size=32, augment=Augment(crop=1, flip=False), seed=s)
        for s in range(2)
    ]
    nets = [net(seed=s, in_chans=1) for s in range(2)]
    config = TrainConfig(lr=0.01, ema_decay=0.9)
    together = Trainer(stack_nets(nets, (1, 8, 8)), config, StackedFeed(feeds).train)
    together.train(10, learning_rate=lambda step: 1.0, lam=lambda step: 1.0)
    found = unstack_net(together.best, nets[0], 2)
    for index, (one, feed) in enumerate(zip(nets, feeds, strict=True)):
        alone = Trainer(copy.deepcopy(one), config, feed.train)
        alone.train(10, learning_rate=lambda step: 1.0, lam=lambda step: 1.0)
        assert gs.compare(found[index], alone.best, input_size=(1, 8, 8)).max_rel < 1e-3
    scores = [evaluate(one, feed.val) for one, feed in zip(found, feeds, strict=True)]
    score = evaluate(together.best, StackedFeed(feeds).val)
    assert score.top1 == pytest.approx(sum(s.top1 for s in scores) / 2)
    assert score.loss == pytest.approx(sum(s.loss for s in scores) / 2, rel=1e-5)


@pytest.mark.exhaustive
def test_a_stack_goes_through_rounds_like_any_net(tmp_path):
    feeds = [
        MemoryFeed.of(load_data("digits", seed=s), batch_size=64, augment=Augment(crop=0, flip=False), seed=s)
        for s in (0, 1)
    ]
    nets = [net(seed=s, in_chans=1) for s in (0, 1)]
    feed = StackedFeed(feeds)
    plan = gs.CyclePlan(rounds=(gs.Round(epochs=4, hold=0.1, vanish=0.1, settle=0.6, ratio=1.0),))
    result = gs.run_cycle(stack_nets(nets, (1, 8, 8)), feed, plan, out_dir=tmp_path / "run")
    ends = [evaluate(one, f.test).top1 for one, f in zip(unstack_net(result.model, nets[0], 2), feeds, strict=True)]
    assert result.final.top1 == pytest.approx(sum(ends) / 2)
    alone = gs.run_cycle(nets[0], feeds[0], plan, out_dir=tmp_path / "alone")
    assert result.training_macs == 2 * alone.training_macs


class _Shuffles(ConvNet):
    def forward_features(self, x):
        return super().forward_features(x).flip(1)


class _Scales(ConvNet):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("nets", "words"),
    [
        (lambda: [], "no net"),
        (lambda: [ConvNet(), net()], "not in all of the nets|in the first net only"),
        (lambda: [_Shuffles(), _Shuffles()], "mix channels"),
        (lambda: [_Scales(), _Scales()], "a parameter of its own"),
    ],
)
def test_what_cannot_stand_side_by_side_is_refused(nets, words):
    with pytest.raises(StackError, match=words):
        stack_nets(nets(), SIZE)
