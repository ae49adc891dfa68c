import copy
import itertools

import pytest
import torch
from torch import nn

import growshrink as gs
from growshrink.errors import FuseError, MergeError
from growshrink.layers.activations import VanishingReLU
from nets import images, net, randomized, rel, untouched


def chain(strides, kernels, channels=4, pad="front", bias=True, groups=1):
    """Convolutions and batch norms in a row, all padding in the first convolution, between two real activations."""
    total, reach = 0, 1
    for stride, kernel in zip(strides, kernels, strict=True):
        total, reach = total + reach * (kernel // 2), reach * stride
    layers = nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU())
    for index, (stride, kernel) in enumerate(zip(strides, kernels, strict=True)):
        padding = kernel // 2 if pad == "each" else 0 if index else total
        layers.append(nn.Conv2d(channels, channels, kernel, stride, padding, groups=groups, bias=bias))
        layers.append(nn.BatchNorm2d(channels))
    return layers.extend([nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)])


def ready(model, size):
    model.eval()(torch.zeros(1, *size))
    return randomized(model).double().eval()


def convs(model):
    return [(m.kernel_size[0], m.stride[0], m.padding[0]) for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize(
    ("strides", "size"),
    [
        (s, (3, 9, 8) if s[-1] == 2 else (3, 2, 11))
        for n in (2, 3, 4, 5)
        for s in itertools.product((1, 2), repeat=n)
        if sum(s) < n + 3  # with three strides of 2 the kernel is far larger than the image
    ],
)
def test_chains_are_exact_borders_included(strides, size):
    kernels = (3, 3, 1, 5, 3)[: len(strides)]
    model = ready(chain(strides, kernels), size)
    merged = gs.depth.merge_runs(model, if_costlier="allow", input_size=size)
    x = images(*size, n=3, dtype=torch.float64)
    assert rel(merged(x), model(x)) < 1e-10
    assert len(convs(merged)) == 2  # the pointwise in front has its activation behind it


def test_kernel_stride_and_padding_of_the_merged():
    model = ready(chain((2, 1, 2), (3, 3, 3)), (3, 16, 16))
    assert convs(gs.depth.merge_runs(model, if_costlier="allow", input_size=(3, 16, 16)))[1] == (11, 4, 5)
    model = ready(chain((1, 1), (3, 3)), (3, 16, 16))
    assert convs(gs.depth.merge_runs(model, if_costlier="allow", input_size=(3, 16, 16)))[1] == (5, 1, 2)


def test_padding_in_between_ends_the_run():
    model = ready(chain((1, 1), (3, 3), pad="each"), (3, 8, 8))
    with untouched(model), pytest.raises(MergeError, match="4: the second map pads.*put all padding into the first"):
        gs.depth.merge_runs(model, if_costlier="allow", input_size=(3, 8, 8))
    with pytest.raises(MergeError, match="^4: the second map pads"):
        gs.depth.merge_runs(model, [["2", "4"]], if_costlier="allow", input_size=(3, 8, 8))


def pointwise_net():
    return ready(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 3), nn.Conv2d(2, 6, 1)
        ),
        (3, 8, 8),
    )  # fmt: skip


def test_pointwise_merges_into_anything_and_macs_are_those_of_the_profiler():
    model = pointwise_net()
    report = gs.depth.merge_report(model, if_costlier="allow", input_size=(3, 8, 8))
    assert [run.names for run in report.runs] == [("0", "2", "3", "4")]
    merged = gs.depth.merge_runs(model, if_costlier="allow", input_size=(3, 8, 8))
    assert rel(merged(images(3, 8, 8, dtype=torch.float64)), model(images(3, 8, 8, dtype=torch.float64))) < 1e-12
    assert report.macs_before == gs.profile(model, (3, 8, 8)).macs == report.runs[0].macs_before
    assert report.macs_after == gs.profile(merged, (3, 8, 8)).macs == report.runs[0].macs_after
    assert "0 + 2 + 3 + 4 -> 5x5" in str(report)


def test_the_cheapest_way_to_cut_is_the_default():
    model = pointwise_net()
    report = gs.depth.merge_report(model, input_size=(3, 8, 8))
    # by hand: 0, 2, 3, 4 cost 27*4*64, 16*64, 8*9*36, 12*36; 0+2+3 is a 5x5 from 3 to 2 channels, with 4 from 3 to 6
    assert [run.names for run in report.runs] == [("0", "2", "3")]
    assert report.macs_after == (25 * 3 * 2 + 12) * 36 < report.macs_before
    assert report.ends["4"] == "it would cost more MACs"
    assert gs.profile(gs.depth.merge_runs(model, input_size=(3, 8, 8)), (3, 8, 8)).macs == report.macs_after


def test_a_costlier_merge_is_refused_warned_of_or_allowed():
    model, size = ready(chain((1, 1), (3, 3), channels=8), (3, 16, 16)), (3, 16, 16)
    with (
        untouched(model),
        pytest.raises(MergeError, match=r"increase the cost of .*2 \.\. 4 \(.* MACs\).*if_costlier='warn'"),
    ):
        gs.depth.merge_runs(model, ["2", "4"], input_size=size)
    with pytest.raises(MergeError, match="no two convolutions to merge: 4: it would cost more MACs"):
        gs.depth.merge_runs(model, input_size=size)
    with pytest.warns(UserWarning, match=r"merging increases the cost of 2 \.\. 4"):
        warned = gs.depth.merge_runs(model, if_costlier="warn", input_size=size)
    assert convs(warned) == convs(gs.depth.merge_runs(model, [("2", "4")], if_costlier="allow", input_size=size))
    with pytest.raises(MergeError, match="if_costlier='alow'.*did you mean allow"):
        gs.depth.merge_runs(model, if_costlier="alow")


def reducenet(**kwargs):
    return randomized(net("reducenet20", dtype=torch.float64, **kwargs)).eval()


@pytest.mark.parametrize("size", [(3, 16, 16), (3, 9, 7), (3, 3, 3)])
def test_reducenets_padded_in_front_merge_stage_by_stage(size):
    model = reducenet(pad="front", linear=True)
    merged = gs.depth.merge_runs(model, if_costlier="allow", input_size=size)
    assert convs(merged) == [(3, 1, 1), (7, 1, 3), (11, 2, 5), (11, 2, 5)]
    x = images(*size, dtype=torch.float64)
    assert rel(merged(x), model(x)) < 1e-10
    assert rel(gs.collapse(merged, size)(x), model(x)) < 1e-10
    assert type(merged.stages[0][0]) is nn.Identity  # an emptied block costs no calls


def test_only_vanished_activations_are_crossed():
    model = reducenet(pad="front")
    for block in model.stages[1][:2]:
        block.act = VanishingReLU(0.0)
    model.stages[1][1].act.lam.fill_(1e-9)
    merged = gs.depth.merge_runs(model, if_costlier="allow")
    x = images(dtype=torch.float64)
    assert rel(merged(x), model(x)) < 1e-10
    assert [type(block) is nn.Identity for block in merged.stages[1]] == [True, False, False]
    with pytest.raises(MergeError, match=r"stages\.1\.2\.conv does not follow stages\.1\.1\.conv directly"):
        gs.depth.merge_runs(model, [["stages.1.0.conv", "stages.1.1.conv", "stages.1.2.conv"]], if_costlier="allow")


@pytest.mark.parametrize(
    ("where", "merged"),
    [
        (r"stages\.0", [(7, 1, 3)]),
        (lambda name, module: module.kernel_size == (3, 3) and name.startswith("stages.0"), [(7, 1, 3)]),
        (["stages.0.1.conv", "stages.0.2.conv"], [(3, 1, 3), (5, 1, 0)]),
        ([("stages.0.0.conv", "stages.0.1.conv")], [(5, 1, 3), (3, 1, 0)]),
    ],
)
def test_where(where, merged):
    model = reducenet(pad="front", linear=True)
    result = gs.depth.merge_runs(model, where, if_costlier="allow")
    assert convs(result.stages[0]) == merged and len(convs(result.stages[1:])) == 6
    x = images(dtype=torch.float64)
    assert rel(result(x), model(x)) < 1e-10


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["stages.0.1.conv", "stages.2.2.conv"], r"stages\.0\.1\.conv cannot merge"),
        (["stages.0.1.cnv"], "'stages.0.1.cnv' is no convolution.*did you mean stages.0.1.conv"),
        ([["stages.0.0.conv"]], "at least two"),
        ([["stages.0.0.conv", "stages.0.2.conv"]], r"stages\.0\.2\.conv does not follow stages\.0\.0\.conv"),
        ([["stages.0.2.conv", "stages.1.0.conv"]], r"stages\.1\.0\.conv: the second map pads"),
        (["stages.0.0.conv", ["stages.0.1.conv"]], "names and runs"),
        (["stages.0.0.conv"] * 2, r"stages\.0\.0\.conv more than once"),
        ("nothing", "no two convolutions"),
    ],
)
def test_what_cannot_be_merged_is_refused(where, message):
    model = reducenet(pad="front", linear=True)
    with untouched(model), pytest.raises(MergeError, match=message):
        gs.depth.merge_runs(model, where, if_costlier="allow", inplace=True)


class Branching(nn.Module):
    """conv1's output is read by conv2, and by the sum or (in place) by what comes in between."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv1(x)
        if self.inplace:
            torch.relu_(y)
            return self.conv2(y)
        return y + self.conv2(y)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_reader_ends_the_run(inplace):
    with pytest.raises(MergeError, match=rf"conv2: {'relu_' if inplace else 'add'} reads or changes .* conv1 too"):
        gs.depth.merge_runs(Branching(inplace), if_costlier="allow", input_size=(3, 8, 8))


class Twice(nn.Module):
    """One convolution that runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(self.conv(self.first(x)).relu())


def test_shared_and_repeated_convolutions_are_left_alone():
    conv, size = nn.Conv2d(3, 3, 1), (3, 8, 8)
    tied = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    tied[3].weight = tied[1].weight
    for model in (nn.Sequential(nn.Conv2d(3, 3, 3), conv, nn.ReLU(), conv), tied):
        with untouched(model), pytest.raises(MergeError, match="none follows another"):
            gs.depth.merge_runs(model, if_costlier="allow", inplace=True, input_size=size)
    with pytest.raises(MergeError, match="conv: a module that runs more than once is not merged"):
        gs.depth.merge_runs(Twice(), if_costlier="allow", input_size=size)


@pytest.mark.parametrize("at", ["0", "1"])
@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_convolution_with_a_hook_is_left_alone(at, hook):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    getattr(model.get_submodule(at), hook)(lambda *args: None)
    with untouched(model), pytest.raises(MergeError, match=f"1: {at} has a hook, which merging would lose"):
        gs.depth.merge_runs(model, if_costlier="allow", inplace=True, input_size=(3, 8, 8))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_lopsided_padding_ends_a_run_and_stays():
    size = (3, 7, 6)
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 4, padding="same"), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)), size)
    x = images(*size, dtype=torch.float64)
    for choice in ("refuse", "allow"):
        report = gs.depth.merge_report(model, if_costlier=choice, input_size=size)
        assert [run.names for run in report.runs] == [("1", "2")] and "pads both sides alike" in report.ends["1"]
        assert rel(gs.depth.merge_runs(model, if_costlier=choice, input_size=size)(x), model(x)) < 1e-12


def test_what_is_0_in_the_models_dtype_only_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)).eval()
    model[1].running_mean.fill_(1e-44)
    model[1].weight.data.fill_(1e-9)  # the bias, 1e-53, is no float32
    with untouched(model), pytest.raises(MergeError, match="wrong at the border"):
        gs.depth.merge_runs(model, if_costlier="allow", inplace=True, input_size=(3, 8, 8))


def test_grouped_and_depthwise():
    model = ready(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, groups=3, padding=2),
            nn.Conv2d(6, 6, 3, groups=6, bias=False),
            nn.Conv2d(6, 4, 1, groups=2),
        ),
        (3, 7, 7),
    )
    merged = gs.depth.merge_runs(model, if_costlier="allow", input_size=(3, 7, 7))
    x = images(3, 7, 7, dtype=torch.float64)
    assert rel(merged(x), model(x)) < 1e-12 and len(convs(merged)) == 1


def test_a_net_without_parameters_has_nothing_to_merge():
    with pytest.raises(MergeError, match="no two convolutions"):
        gs.depth.merge_runs(nn.ReLU(), input_size=(3, 8, 8))


def test_grown_nets_are_refused():
    model = gs.grow(reducenet(pad="front", linear=True))
    with pytest.raises(FuseError, match="fuse comes before"):
        gs.depth.merge_runs(model)


def test_copy_dtype_mode_and_memory_format():
    model = reducenet(pad="front", linear=True).float().to(memory_format=torch.channels_last).train()
    model.requires_grad_(False)
    with untouched(model):
        merged = gs.depth.merge_runs(model, if_costlier="allow")
    conv = merged.stages[1][2].conv
    assert conv.weight.dtype == torch.float32 and conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(module.training for module in merged.modules()) and not conv.weight.requires_grad
    assert rel(merged.eval()(images()), model.eval()(images())) < 1e-5
    assert not any(module.training for module in gs.depth.merge_runs(model.eval(), if_costlier="allow").modules())
    again = gs.depth.merge_runs(model, if_costlier="allow", inplace=True)
    assert again is model and convs(again) == convs(merged)


def test_merged_nets_have_nothing_left_to_merge():
    merged = gs.depth.merge_runs(reducenet(pad="front", linear=True), if_costlier="allow")
    with pytest.raises(MergeError):
        gs.depth.merge_runs(copy.deepcopy(merged), if_costlier="allow")
