"""timm's reparameterize_model on grown nets, whose blocks may have merging hooks of their own."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models import reparameterize_model, save_for_hf
from timm.models.byobnet import MobileOneBlock, RepVggBlock
from torch import nn

import growshrink as gs
from growshrink.errors import AlgebraError, FuseError
from growshrink.layers.grown import GrownConv2d, grown_modules
from growshrink.layers.swaps import to_plain
from growshrink.transforms._deploy import HOOKS, MergeFirst, guard_hooks
from nets import images, net, randomized, rel, untouched
from sampled import sampled

SIZE = (3, 9, 9)


class Blocks(nn.Module):
    """Blocks of timm's that merge themselves, one inside a module that merges too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = MobileOneBlock(8, 8, 3, num_conv_branches=2)
        self.outer = Outer(RepVggBlock(8, 8, 3))
        self.conv, self.bn = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(self.outer(self.one(self.stem(x)))))


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)

    def fuse(self):
        self.inner.reparameterize()
        return self.inner


def grown_blocks(seed=0):
    torch.manual_seed(seed)
    model = randomized(gs.grow(Blocks(), ["bottleneck", "insert"], input_size=SIZE), seed).double().eval()
    gs.set_lambda(model, 0.0)
    assert len(grown_modules(model)) >= 6
    return model


def guards(model):
    return [m for m in model.modules() for v in vars(m).values() if isinstance(v, MergeFirst)]


def nothing_of_ours(model):
    ours = [*model.modules(), *(value for m in model.modules() for value in vars(m).values())]
    return not any(type(thing).__module__.startswith("growshrink") for thing in ours)


@torch.no_grad()
def test_branches_inside_blocks_that_merge_themselves_are_merged_with_them():
    model = grown_blocks()
    x = images(*SIZE, dtype=torch.float64)
    expected = model(x)
    merged = reparameterize_model(model)
    assert rel(merged(x), expected) < 1e-12 and nothing_of_ours(merged)
    assert rel(reparameterize_model(gs.drop(model))(x), expected) > 0.01  # what losing the branches would give
    assert isinstance(merged.one.reparam_conv, nn.Conv2d) and isinstance(merged.outer, RepVggBlock)
    assert guards(model) and torch.equal(model(x), expected)  # it worked on a copy
    assert rel(reparameterize_model(model, inplace=True)(x), expected) < 1e-12


@torch.no_grad()
def test_fused_nets_pass_through(tmp_path):
    model = grown_blocks()
    x = images(*SIZE, dtype=torch.float64)
    for way in (gs.fuse(model, input_size=SIZE), gs.fuse(copy.deepcopy(model), inplace=True, input_size=SIZE)):
        assert nothing_of_ours(way)
        assert rel(reparameterize_model(way)(x), model(x)) < 1e-12
    assert nothing_of_ours(gs.drop(model))


def test_a_copy_merges_itself_alone_and_the_guards_can_be_pickled():
    model = grown_blocks()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    copied.one.reparameterize()
    assert len(grown_modules(copied)) < len(grown_modules(model))
    x = images(*SIZE, dtype=torch.float64)
    with torch.no_grad():
        assert rel(copied(x), model(x)) < 1e-12


def norms_replaced(model):
    """Every norm by a deep copy of itself."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and "branches" not in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, copy.deepcopy(module))
    return model


def synced(model):
    """Every norm behind a convolution by a SyncBatchNorm; identity branches stay, timm's hook asserts their class."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "bn", None), nn.BatchNorm2d):
            module.bn = nn.SyncBatchNorm.convert_sync_batchnorm(module.bn)
    return model


def conv_replaced(model):
    """A grown convolution inside a block by a plain one, with a bias of its own even."""
    one = next(m for m in model.one.modules() if isinstance(m, MobileOneBlock))
    kernel = one.conv_kxk[0].conv
    one.conv_kxk[0].conv = nn.Conv2d(8, 8, 3, padding=1, bias=False, dtype=torch.float64)
    assert type(kernel) is GrownConv2d
    return model


#: What users do to a grown net before they deploy it. The net and its blocks' hooks must agree afterwards.
CHANGES = {
    "nothing": lambda m: m,
    "norms replaced": norms_replaced,
    "to SyncBatchNorm": synced,
    "to SyncBatchNorm, cast": lambda m: synced(m).float().double(),
    "cast there and back": lambda m: m.float().double(),
    "a convolution replaced": conv_replaced,
    "a state_dict assigned": lambda m: (m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True), m)[1],
    "copied, moved into another net": lambda m: nn.Sequential(copy.deepcopy(m)),
    "branches dropped in a part": lambda m: (to_plain(m.one.conv_scale.conv), m)[1],
}


@torch.no_grad()
@pytest.mark.parametrize(
    "change", sampled(CHANGES, ["norms replaced", "to SyncBatchNorm, cast", "a convolution replaced"])
)
@pytest.mark.parametrize("way", sampled(["timm's", "hook by hook"], ["timm's"]))
def test_hooks_find_layers_and_norms_by_name_when_they_are_called(change, way):
    model = CHANGES[change](grown_blocks()).eval()
    x = images(*SIZE, dtype=torch.float64)
    expected = model(x)
    if way == "timm's":
        merged = reparameterize_model(model)
    else:
        merged = copy.deepcopy(model)
        for guard in guards(merged):
            getattr(guard, "reparameterize", getattr(guard, "fuse", None))()
    assert rel(merged(x), expected) < 1e-12
    assert rel(gs.fuse(model, input_size=SIZE)(x), expected) < 1e-12
    assert rel(gs.drop(model)(x), expected) > 0.01


class Half(nn.Module):
    """A block that merges itself, whose last norm is outside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, bias=False)

    def forward(self, x):
        return self.conv(torch.tanh(self.norm(self.first(x))))

    def fuse(self):
        return self


@torch.no_grad()
def test_a_norm_outside_of_the_block_or_gone_from_it_is_refused_and_nothing_changes():
    grown = gs.grow(nn.Sequential(nn.Conv2d(3, 3, 1), Half(), nn.BatchNorm2d(8)), input_size=SIZE)
    model = randomized(grown, seed=3).double().eval()
    gs.set_lambda(model, 0.0)
    with untouched(model), pytest.raises(FuseError, match="conv has no bias, and no batch norm in this block"):
        model[1].fuse()
    x = images(*SIZE, dtype=torch.float64)
    assert rel(gs.fuse(model, input_size=SIZE)(x), model(x)) < 1e-12
    blocks = grown_blocks()
    blocks.one.conv_kxk[1].bn = nn.GroupNorm(2, 8).double()
    with untouched(blocks), pytest.raises(FuseError, match="no batch norm in this block takes that of its"):
        blocks.one.reparameterize()


@torch.no_grad()
def test_a_layer_that_was_tied_since_is_refused():
    model = grown_blocks()
    model.one.conv_kxk[0].conv.weight = nn.Parameter(model.one.conv_kxk[1].conv.weight.data)
    with untouched(model), pytest.raises(FuseError, match="shares memory with another module"):
        model.one.reparameterize()


def test_growing_again_replaces_the_guards():
    model = grown_blocks()
    before = len(guards(model))
    again = randomized(gs.grow(model, "bottleneck", input_size=SIZE), seed=3)
    gs.set_lambda(again, 0.0)
    assert len(guards(again)) == before == 3
    x = images(*SIZE, dtype=torch.float64)
    with torch.no_grad():
        assert rel(reparameterize_model(again)(x), again(x)) < 1e-12


def test_a_living_branch_is_refused():
    model = grown_blocks()
    gs.set_lambda(model, 0.5)
    with pytest.raises(AlgebraError, match="the activation is still alive"):
        reparameterize_model(model)


def test_guards_are_where_timms_hooks_are_and_nowhere_else():
    assert not guards(gs.grow(net("test_resnet"), input_size=(3, 32, 32)))
    model = grown_blocks()
    assert guards(model) == [model.one, model.outer, model.outer.inner]
    assert set(HOOKS) == {"fuse", "reparameterize", "switch_to_deploy"}
    assert guard_hooks.__doc__ and not guards(timm.create_model("test_resnet"))


@pytest.mark.parametrize("classes", [10, 4])  # for others than its own, timm takes a file that has more than the net
def test_timm_does_not_take_the_saved_weights_of_a_grown_net_for_the_plain_nets(tmp_path, classes):
    model = net("test_resnet")
    grown = gs.grow(model, input_size=(3, 32, 32))
    plain = gs.drop(grown)
    assert plain.pretrained_cfg == model.pretrained_cfg != grown.pretrained_cfg
    again = gs.drop(gs.grow(grown, "lora", input_size=(3, 32, 32)))
    assert again.pretrained_cfg == model.pretrained_cfg
    for name, each in (("grown", grown), ("plain", plain)):
        save_for_hf(each, tmp_path / name, model_args={"num_classes": 10})
    with pytest.raises(RuntimeError, match="a net that growshrink grew"):
        timm.create_model(f"local-dir:{tmp_path / 'grown'}", pretrained=True, num_classes=classes)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True, num_classes=classes)
    assert torch.equal(next(loaded.parameters()), next(plain.parameters()))
