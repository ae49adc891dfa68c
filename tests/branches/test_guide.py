"""A net that feeds another, and is taken off."""

import copy
import pickle

import pytest
import torch
from torch import nn

import growshrink as gs
from growshrink.branches.guide import EMBEDDING, Guide, Guided, RunGuide
from growshrink.errors import GrowError, GrowShrinkError
from nets import ConvNet, images, randomized, rel, small, train_a_bit, untouched


class Big(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2)
        self.norm = nn.BatchNorm2d(12)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))


def test_any_net_guides_every_layer_and_is_taken_off():
    plain, big = small().eval(), Big().eval()
    x = images(3, 32, 32, n=3)
    with untouched(plain, big):
        grown = gs.grow(plain, ["guided", "guided_kernel"], guide=big)
        assert rel(grown.eval()(x), plain(x)) < 1e-5, "starts silent"
    assert sum(isinstance(m, Guide) for m in grown.modules()) == 1
    assert set(gs.growth_report(grown).grown) == set(gs.growth_report(gs.grow(plain)).grown)
    randomized(grown)
    with torch.no_grad():
        assert rel(grown(x), torch.cat([grown(image[None]) for image in x])) < 1e-5
        before = grown(x)
        grown.guide.net.conv.weight.mul_(2)
        assert rel(grown(x), before) > 1e-3, "the guide is at work"
    gs.set_lambda(grown, 0.0)
    for exit_ in (gs.fuse, gs.drop):
        left = exit_(grown)
        assert not hasattr(left, "guide") and not left._forward_pre_hooks and not left._forward_hooks
        plain.load_state_dict(left.state_dict(), strict=True)
    assert rel(gs.fuse(grown)(x), grown(x)) < 1e-5


def test_it_trains_with_the_net_and_without_an_argument_is_deepmoes():
    grown = train_a_bit(gs.grow(small(), "guided"), size=(3, 32, 32))
    assert [type(m) for m in grown.guide.net][:1] == [nn.Conv2d] and grown.guide.classify.out_features == 10
    assert all(bool(p.grad.any()) for p in grown.guide.net.parameters())
    again = gs.grow(grown, "guided_kernel")  # the guide that is there feeds these too
    assert sum(isinstance(m, Guide) for m in again.modules()) == 1
    (hook,) = again._forward_pre_hooks.values()
    guided = [module for module in again.modules() if isinstance(module, Guided)]
    assert {branch.kind for branch in guided if branch.guide is hook} == {"guided", "guided_kernel"}


def test_copies_have_a_guide_of_their_own():
    grown = randomized(gs.grow(ConvNet(), "guided", where=["conv"]))
    x = images(n=3)
    grown(x).sum().backward()  # there are tensors of a graph in it now
    for other in (copy.deepcopy(grown), pickle.loads(pickle.dumps(grown))):
        (hook,), (behind,) = other._forward_pre_hooks.values(), other._forward_hooks.values()
        assert isinstance(hook, RunGuide) and hook is behind is other.bn.branches[0].guide
        assert hook is not grown.bn.branches[0].guide
        assert rel(other.eval()(x), grown.eval()(x)) == 0
        grown.train()


def test_parts_of_the_model_have_no_guide():
    grown = gs.grow(ConvNet(), "guided", where=["conv"])
    grown(images(n=3))  # what it said of these is not used for others
    with pytest.raises(GrowShrinkError, match=r"'guided' has no embedding: .* not a part .* forward_features"):
        grown.forward_features(images())
    gs.set_lambda(grown, 0.0)
    grown.forward_features(images())
    assert images(EMBEDDING).shape == (2, EMBEDDING)


@pytest.mark.parametrize(
    ("branch", "guide", "message"),
    [
        ("se", Big(), "for branches of the kinds guided"),
        ("guided", nn.Conv2d(3, 4, 1), r"must map images \(N, C, H, W\) to vectors"),
        ("guided", nn.Linear(7, 3), "does not take images"),
        ("guided", "no_such_net", "does not take images"),
        (["guided"], "twice", "in a model without a guide"),
        (["guided"], "taken", "something of this name already"),
    ],
)
def test_what_is_refused(branch, guide, message):
    model = ConvNet()
    if guide == "twice":
        model, guide = gs.grow(model, "guided", where=["conv"]), Big()
    elif guide == "taken":
        model.guide, guide = nn.Identity(), None
    with untouched(model), pytest.raises(GrowError, match=message):
        gs.grow(model, branch, guide=guide, inplace=True)


def test_a_pass_that_fails_leaves_no_embedding_behind():
    grown = gs.grow(small().eval(), "guided", guide=Big())
    with pytest.raises(RuntimeError):
        grown(images(5, 32, 32))
    broken = next(m for m in grown.modules() if isinstance(m, nn.Linear))
    hook = broken.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grown(images(3, 32, 32))
    hook.remove()
    runs = [h for h in grown._forward_pre_hooks.values() if isinstance(h, RunGuide)]
    assert [run.embedding for run in runs] == [None]
    with pytest.raises(GrowShrinkError, match="first argument, by position"):
        grown(x=images(3, 32, 32))


def test_a_batch_without_images_leaves_the_mean_as_it_is():
    grown = gs.grow(small(), "se").train()
    before = {key: value.clone() for key, value in grown.named_buffers() if key.endswith("fade.mean")}
    grown(images(3, 32, 32)[:0])
    assert before and all(torch.equal(value, grown.get_buffer(key)) for key, value in before.items())
