import re

import pytest
import torch
from torch import nn

import growshrink as gs
from growshrink.branches import Branch, BranchSpec, Guided, middle_width
from growshrink.branches.guide import EMBEDDING, RunGuide
from growshrink.errors import GrowError
from growshrink.layers.grown import GrownConv2d
from growshrink.layers.mapping import convmap_of
from nets import images, randomized, rel

OWN = "tests-own-3x3-and-norm"


class Own(Branch, kind=OWN):
    """The least a branch can be: a second kernel."""

    def __init__(self, conv, ratio):
        super().__init__(conv, ratio)
        self.conv = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=False,
            padding_mode=conv.padding_mode,
        )
        self.norm = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x, y):
        return self.norm(self.conv(x))

    def as_convmap(self, kernel):
        return convmap_of(self.conv, "conv").then(convmap_of(self.norm, "norm"))


#: Not those of other tests, which may have been imported before.
KINDS = (*(kind for kind, cls in Branch.kinds.items() if cls.__module__.startswith("growshrink.")), OWN)
ANY = {"kernel_size": 5, "padding": 2}  # a convolution that every kind fits
OPTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": 5, "padding": 2, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 8},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (3, 1), "padding": (2, 0), "dilation": 2},
    {"kernel_size": (2, 4), "padding": 1, "stride": (1, 2)},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    {"kernel_size": 5, "padding": 1, "stride": 2, "dilation": 2},
    {"kernel_size": (3, 5), "padding": (0, 3), "padding_mode": "reflect"},
]


def conv_of(options, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Conv2d(8, 8, dtype=dtype, **options)


def build(kind, conv, init="paper", ratio=2.0, seed=0):
    branch = BranchSpec(kind=kind).build(conv, ratio=ratio, init=init, generator_seed=seed)
    if isinstance(branch, Guided):  # whose model gives it what its guide says
        branch.guide = RunGuide(images(EMBEDDING).to(conv.weight.device, conv.weight.dtype))
    return branch


def test_own_kind_is_a_preset():
    assert {"bottleneck", "insert", "nest", OWN} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_map_and_forward_agree(kind, options):
    conv = conv_of(options)
    if reason := Branch.kinds[kind].reason_against(conv):  # which and why: tests/test_presets.py
        with pytest.raises(GrowError, match=re.escape(f"branch={kind!r} does not fit this convolution: {reason}.")):
            build(kind, conv)
        return
    branch = randomized(build(kind, conv)).eval()
    gs.set_lambda(branch, 0.0)
    x = images(8, 11, 12, dtype=torch.float64)
    y = conv(x).detach()
    added = branch(x, y).detach()
    assert added.shape == y.shape
    plain = gs.algebra.ConvMap.from_conv2d(conv)
    total = branch.as_convmap(plain)
    assert rel(total(x).detach(), added) < 1e-12
    assert rel((plain + total).fit(conv)(x).detach(), y + added) < 1e-12
    if branch.parallel:  # it does not look at y, and its map not at the kernel
        assert torch.equal(branch(x, torch.full_like(y, torch.nan)), branch(x, y))
        assert torch.equal(branch.as_convmap(plain.scale(torch.tensor(5.0))).kernel, total.kernel)
    else:
        assert not torch.equal(branch(x, y * 2), branch(x, y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("train", [False, True])
def test_silent_branches_add_exactly_0(kind, lam, train):
    conv = conv_of(ANY, torch.float32)
    branch = build(kind, conv, init="silent").train(train)
    gs.set_lambda(branch, lam)
    x = images(8, 6, 6)
    assert bool((branch(x, conv(x)) == 0).all())
    loud = build(kind, conv, init="paper").train(train)
    assert bool((loud(x, conv(x)) != 0).any()) == (kind != "lora")  # whose paper starts it silent
    # one factor, the outermost, is what silences; no inner one is 0
    zero = [n for n, p in branch.named_parameters() if not n.endswith("bias") and bool((p == 0).all())]
    routes = ["router.weight"] if kind == "moe" else []  # by which experts start alike, in the paper
    assert zero == [branch.outermost, *routes]


def test_weights_depend_on_the_seed_alone():
    conv = conv_of(OPTIONS[0])
    torch.manual_seed(1)
    a = build("nest", conv, seed=5).state_dict()
    torch.manual_seed(2)
    rng = torch.get_rng_state()
    b, c = build("nest", conv, seed=5).state_dict(), build("nest", conv, seed=6).state_dict()
    assert torch.equal(torch.get_rng_state(), rng)
    for key in a:
        assert torch.equal(a[key], b[key])
    assert not torch.equal(a["body.pointwise.weight"], c["body.pointwise.weight"])


def test_weights_are_not_equal_within_a_branch():
    branch = build("nest", conv_of(OPTIONS[0]))
    assert not torch.equal(branch.body.conv.weight, branch.body.conv.branches[0].body.conv.weight[:16])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_branch_inherits(kind):
    conv = conv_of(ANY, torch.bfloat16).to(memory_format=torch.channels_last).eval()
    conv.weight.requires_grad_(False)
    branch = build(kind, conv)
    assert {p.dtype for p in branch.parameters()} == {torch.bfloat16}
    assert all(v.dtype == torch.float32 for n, v in branch.named_buffers() if n.endswith("lam"))
    assert not any(p.requires_grad for p in branch.parameters())
    assert not any(m.training for m in branch.modules())
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in branch.parameters() if p.dim() == 4)
    on_meta = build(kind, nn.Conv2d(8, 8, 5, device="meta"))
    assert all(t.is_meta for t in on_meta.state_dict().values())


@pytest.mark.parametrize(
    ("ratio", "groups", "width"),
    [(2.0, 1, 16), (0.25, 1, 2), (1e-9, 1, 1), (1e-9, 4, 4), (1.3, 4, 12), (0.5, 8, 8), (8, 8, 64)],
)
def test_middle_width(ratio, groups, width):
    conv = nn.Conv2d(8, 8, 3, groups=groups)
    assert middle_width(conv.out_channels, conv.groups, ratio) == width
    assert build("bottleneck", conv, ratio=ratio).body.conv.out_channels == width


def test_the_ratio_of_a_spec_wins():
    conv = conv_of(OPTIONS[0])
    branch = BranchSpec(kind="nest", ratio=3).build(conv, ratio=1, init="paper", generator_seed=0)
    assert branch.body.conv.out_channels == 24
    assert branch.body.conv.branches[0].body.conv.out_channels == 72
    assert isinstance(branch.body.conv, GrownConv2d)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BranchSpec(kind="botleneck"), "'botleneck': no such branch; did you mean bottleneck?"),
        (lambda: BranchSpec(kind="zzz"), "no such branch; there are .*bottleneck"),
        (lambda: BranchSpec(kind="nest", ratio=0), "above 0"),
        (lambda: BranchSpec(kind="nest", ratio=-1.0), "above 0"),
        (lambda: BranchSpec(kind="nest", ratio=float("nan")), "finite number"),
        (lambda: BranchSpec(kind="nest", ratio=float("inf")), "finite number"),
    ],
)
def test_bad_specs(call, message):
    with pytest.raises(GrowError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_branch_can_be_silenced(kind):
    conv = conv_of(ANY, torch.float32)
    branch = randomized(build(kind, conv))
    x = images(8, 6, 6)
    assert bool((branch(x, conv(x)) != 0).any())
    branch.silence_()
    assert bool((branch(x, conv(x)) == 0).all())


def test_a_kind_defined_again_replaces_the_one_before_with_a_warning():
    old = Branch.kinds[OWN]
    try:
        with pytest.warns(UserWarning, match=rf"'{OWN}' of {__name__} is replaced by that of {__name__}") as caught:

            class Own(old, kind=OWN):
                pass

        assert caught[0].filename == __file__ and Branch.kinds[OWN] is Own
        conv = nn.Conv2d(4, 4, 3, padding=1)
        assert type(BranchSpec(kind=OWN).build(conv, ratio=1.0, init="silent", generator_seed=0)) is Own
    finally:
        Branch.kinds[OWN] = old


def test_a_kind_of_growshrinks_own_cannot_be_replaced():
    with pytest.raises(GrowError, match=r"'nest': a branch of growshrink \(growshrink.branches.bottleneck\)"):

        class Mine(Own, kind="nest"):
            pass

    assert Branch.kinds["nest"].__module__ == "growshrink.branches.bottleneck"
