"""Convolutions of sequences, transposed ones, and subclasses, grown: against torch's own operators in float64."""

import copy
import pickle

import pytest
import torch
from torch import nn

import growshrink as gs
from growshrink.branches import Branch, BranchSpec
from growshrink.branches.guide import Guided
from growshrink.errors import GradientError
from growshrink.layers.as_conv import as_conv, write_kernel_
from growshrink.layers.grown import grown_modules
from growshrink.layers.swaps import attach, to_plain
from mlperf_tiny import NETS
from nets import images, randomized, rel, untouched
from sampled import exhaustive, sampled

KINDS = [
    kind
    for kind, cls in Branch.kinds.items()
    if cls.__module__.startswith("growshrink.") and not issubclass(cls, Guided)  # which are fed by their model
]
LAYERS = {
    "sequence": (lambda: nn.Conv1d(8, 8, 3, padding=1), (8, 15)),
    "sequence, strided": (
        lambda: nn.Conv1d(8, 12, 5, 2, 3, dilation=2, groups=4, padding_mode="reflect"),
        (8, 21),
    ),
    "sequence, same": (lambda: nn.Conv1d(8, 8, 4, padding="same", bias=False), (8, 13)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1), (8, 5, 7)),
    "transposed, even": (lambda: nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2), (8, 5, 7)),
    "transposed, cropped": (
        lambda: nn.ConvTranspose2d(8, 8, (3, 2), (1, 3), (4, 0), dilation=(2, 1), groups=4, bias=False),
        (8, 7, 6),
    ),
    "transposed, depthwise": (lambda: nn.ConvTranspose2d(8, 8, 3, groups=8), (8, 7, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_every_branch_merges_into_every_layer(name):
    make, size = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    x = images(*size, dtype=torch.float64)
    fitting = [kind for kind in KINDS if not Branch.kinds[kind].reason_against(as_conv(layer))]
    assert {"bottleneck", "insert", "expandnet", "lora"} <= set(fitting)
    for kind in fitting:
        grown = copy.deepcopy(layer)
        weight = grown.weight
        silent = BranchSpec(kind=kind).build(as_conv(grown), ratio=1.5, init="silent", generator_seed=0)
        assert torch.equal(attach(grown, [silent])(x), layer(x)) and grown.weight is weight
        branch = BranchSpec(kind=kind).build(as_conv(grown), ratio=1.5, init="paper", generator_seed=0)
        attach(grown, [branch])
        randomized(grown).eval()
        gs.set_lambda(grown, 0.0)
        out, fused = grown(input=x).detach(), grown.fuse()
        assert rel(layer(x), out) > 1e-3 and rel(fused(x), out) < 1e-12, kind
        assert type(to_plain(grown)) is type(layer) is type(fused)


def test_an_output_size_that_only_the_call_names():
    grown = attach(nn.ConvTranspose2d(4, 4, 3, 2, 1).double(), [])
    conv = as_conv(grown)
    attach(grown, [BranchSpec(kind="expandnet").build(conv, ratio=2.0, init="paper", generator_seed=0)])
    x = images(4, 5, 6, dtype=torch.float64)
    for size in ([9, 11], [10, 12]):
        assert rel(grown.fuse()(x, output_size=size), grown(x, output_size=size)) < 1e-12


def test_expandnet_beside_a_transposed_convolution_is_a_chain_of_torchs_own():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, bias=False).double()
    branch = BranchSpec(kind="expandnet").build(as_conv(layer), ratio=2.0, init="paper", generator_seed=0)
    middle = nn.ConvTranspose2d(8, 12, 3, 2, 1, 1, groups=2, bias=False).double()
    write_kernel_(middle, branch.path.conv.weight)
    x = images(4, 5, 7, dtype=torch.float64)
    expected = layer(x) + branch.path.last(middle(branch.path.first(x)))
    assert rel(attach(layer, [branch])(x), expected) < 1e-12


def test_a_sequence_without_a_batch_axis():
    grown = attach(nn.Conv1d(3, 4, 3, padding=1), [])
    attach(grown, [BranchSpec(kind="lora").build(as_conv(grown), ratio=1.0, init="paper", generator_seed=0)])
    x = images(3, 9, n=1)
    assert torch.equal(grown(x)[0], grown(x[0]))


class Named(nn.Conv2d):
    def hello(self):
        return "hello"


def test_a_subclass_that_computes_nothing_else_stays_what_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Named(4, 4, 3, bias=False), nn.BatchNorm2d(4))
    grown = gs.grow(model, ["bottleneck", "copy"], init="paper", input_size=(3, 9, 9)).eval()
    gs.set_lambda(grown, 0.0)
    x = images(3, 9, 9)
    online = gs.collapse_online(grown, choose="always", input_size=(3, 9, 9))
    for net in (grown, copy.deepcopy(grown), pickle.loads(pickle.dumps(grown)), online, gs.expand_online(online)):
        assert isinstance(net[1], Named) and net[1].hello() == "hello"
        assert rel(net(x), grown(x)) < 1e-5
    assert type(gs.fuse(online, input_size=(3, 9, 9))[1]) is type(gs.drop(grown)[1]) is type(grown[1].fuse()) is Named
    assert gs.verify(grown, input_size=(3, 9, 9)).ok


def test_what_cannot_carry_branches_is_in_the_report():
    class Volumes(nn.Module):
        def __init__(self):
            super().__init__()
            self.volume, self.line = nn.Conv3d(1, 3, 1), nn.ConvTranspose1d(12, 4, 3)

        def forward(self, x):
            return self.line(self.volume(x[:, None]).flatten(1, 3))

    report = gs.growth_report(Volumes(), input_size=(2, 2, 7))
    rows = {row.name: (row.shape, row.reason) for row in report.rows}
    assert rows["volume"] == ("1->3 1x1x1", "the stem is left alone")
    assert rows["line"] == ("12->4 3 transposed", "it is a ConvTranspose1d, which cannot carry branches")


def test_maps_on_the_gradient_are_refused_for_transposed_kernels():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2))
    grown = gs.grow(model, "lora", input_size=(3, 5, 5))
    with untouched(grown), pytest.raises(GradientError, match="^1: the kernel of a transposed convolution"):
        gs.compile_gradients(grown, input_size=(3, 5, 5))


# --- whole nets ---


class Line(nn.Module):
    """Keyword spotting on raw sequences, and back to an image: every new layer in one net."""

    def __init__(self):
        super().__init__()
        self.front = nn.Conv1d(6, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv1d(8, 8, 5, 2, 2, bias=False), nn.BatchNorm1d(8), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.out = nn.ConvTranspose2d(4, 1, 3, padding=1)

    def forward(self, x):
        return self.out(self.up(self.body(self.front(x)).unflatten(2, (2, -1))))


CASES = {**{name: (make, size) for name, (make, size, _) in NETS.items()}, "line": (Line, (6, 16))}


@pytest.mark.parametrize("name", NETS)
def test_the_nets_of_mlperf_tiny_have_their_published_size(name):
    make, _, expected = NETS[name]
    state = make().state_dict()
    assert sum(t.numel() for key, t in state.items() if not key.endswith("num_batches_tracked")) == expected


@pytest.mark.parametrize(
    ("name", "branch"),
    sampled(
        [(name, branch) for name in CASES for branch in ("bottleneck", "insert", "expandnet", "lora")],
        [("line", "insert"), ("line", "bottleneck"), ("ds_cnn", "lora")],
    ),
)
def test_grown_trained_fused(name, branch):
    make, size = CASES[name]
    torch.manual_seed(0)
    plain = make().double()
    x = images(*size, n=4, dtype=torch.float64)
    grown = gs.grow(plain, branch, ratio=0.5, example_inputs=x)
    assert len(grown_modules(grown)) >= 3 and torch.equal(grown(x), plain(x))
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.01)
    for step in range(3):
        gs.set_lambda(grown, 1 - step / 2)
        optimizer.zero_grad()
        grown(x).square().mean().backward()
        optimizer.step()
    fused = gs.fuse(grown, example_inputs=x)
    make().double().load_state_dict(fused.state_dict())
    assert rel(fused.eval()(x), grown.eval()(x)) < 1e-10
    assert gs.verify(grown, example_inputs=x).ok
    folded = gs.fold(fused, example_inputs=x)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert rel(folded(x), fused(x)) < 1e-10


@pytest.mark.parametrize("name", [exhaustive(name) if name != "autoencoder" else name for name in NETS])
def test_exported(name):
    make, size, _ = NETS[name]
    x = images(*size, n=2)
    folded = gs.fold(randomized(make()).eval(), example_inputs=x)
    program = torch.export.export(folded, (x,))
    assert rel(program.module()(x), folded(x)) < 1e-5
