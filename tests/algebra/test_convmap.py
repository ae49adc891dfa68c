import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from growshrink.algebra.convmap import ConvMap, compose
from growshrink.algebra.taps import NO_PADDING
from growshrink.errors import AlgebraError

quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
MODES = ("zeros", "reflect", "replicate", "circular")


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_equal(a, b):
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    assert float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)) <= 1e-12


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
sides = st.tuples(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.tuples(st.integers(0, 3), st.integers(0, 3)))


@st.composite
def maps(draw, in_channels=None, modes=("zeros",), padded=True, pointwise=False, largest=5, biased=None):
    """Random ConvMaps: rectangular and even kernels, lopsided padding, groups, strides, dilations."""
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if in_channels is None or in_channels % g == 0]))
    in_channels = in_channels or groups * draw(st.integers(1, 2))
    out_channels = groups * draw(st.integers(1, 3))
    kernel = (1, 1) if pointwise else (draw(st.integers(1, largest)), draw(st.integers(1, largest)))
    seed = draw(st.integers(0, 10**6))
    biased = draw(st.booleans()) if biased is None else biased
    bias = randn(out_channels, seed=seed + 1) if biased else torch.zeros(out_channels, dtype=torch.float64)
    padding = draw(sides) if padded and not pointwise else NO_PADDING
    return ConvMap(
        randn(out_channels, in_channels // groups, *kernel, seed=seed),
        bias,
        (1, 1) if pointwise else draw(pairs),
        padding,
        (1, 1) if pointwise else draw(pairs),
        groups,
        draw(st.sampled_from(modes)) if padding != NO_PADDING else "zeros",
    )


def inputs_for(*chain, sizes=3):
    """Images of several sizes in a row, so that every phase of a stride is met, large enough for the whole chain."""
    least = [1, 1]
    for m in reversed(chain):
        for axis in (0, 1):
            least[axis] = max(4, (least[axis] - 1) * m.stride[axis] + m.extent[axis])
    for extra in range(sizes):
        yield randn(2, chain[0].in_channels, least[0] + extra, least[1] + extra + 1, seed=extra)


# --- where maps come from ---


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@quick
@given(data=st.data())
def test_from_conv2d_is_the_module(data):
    kernel = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)))
    padding = data.draw(st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"])))
    groups = data.draw(st.sampled_from([1, 2, 4]))
    conv = nn.Conv2d(
        4,
        8,
        kernel,
        stride=1 if padding == "same" else data.draw(pairs),
        padding=padding,
        dilation=data.draw(pairs),
        groups=groups,
        bias=data.draw(st.booleans()),
        padding_mode=data.draw(st.sampled_from(MODES)),
        dtype=torch.float64,
    )
    x = randn(2, 4, 15, 17)
    assert_equal(ConvMap.from_conv2d(conv)(x), conv(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_maps_are_float64_unless_told(dtype):
    conv, bn = nn.Conv2d(2, 2, 1, dtype=dtype), nn.BatchNorm2d(2, dtype=dtype)
    assert ConvMap.from_conv2d(conv).then(ConvMap.from_bn(bn)).kernel.dtype == torch.float64
    assert ConvMap.from_conv2d(conv, dtype).kernel.dtype == dtype


@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"eps": 1e-12}, {"affine": False}, {"momentum": None}], ids=str)
def test_from_bn_is_the_module_in_eval_mode(options):
    bn = nn.BatchNorm2d(5, dtype=torch.float64, **options)
    bn.running_mean.copy_(randn(5))
    bn.running_var.copy_(randn(5, seed=1) ** 2 + 1e-3)
    if bn.affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    x = randn(2, 5, 3, 4)
    assert_equal(ConvMap.from_bn(bn.train())(x), bn.eval()(x))


def test_bn_of_the_batch_is_refused():
    with pytest.raises(AlgebraError, match="without running statistics"):
        ConvMap.from_bn(nn.BatchNorm2d(3, track_running_stats=False))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel_size": 2}, None),
        ({"kernel_size": (3, 2), "stride": 1}, None),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, None),
        ({"kernel_size": 3, "count_include_pad": False}, None),
        ({"kernel_size": 3, "divisor_override": 5}, None),
        ({"kernel_size": 3, "padding": 1, "count_include_pad": False, "divisor_override": 2}, None),
        ({"kernel_size": 3, "padding": 1, "count_include_pad": False}, "depends on position"),
        ({"kernel_size": 2, "ceil_mode": True}, "ceil_mode"),
    ],
    ids=str,
)
def test_from_avg_pool(options, reason):
    pool = nn.AvgPool2d(**options)
    if reason:
        with pytest.raises(AlgebraError, match=reason):
            ConvMap.from_avg_pool(pool, 3)
    else:
        x = randn(2, 3, 9, 10)
        assert_equal(ConvMap.from_avg_pool(pool, 3)(x), pool(x))


def test_identity():
    x = randn(2, 3, 4, 5)
    assert torch.equal(ConvMap.identity(3)(x), x)


# --- composition ---


def compose_by_loops(first, second):
    """Kernel of second after first, dense, tap by tap on the grid of single pixels."""
    first, second = first.regroup(1), second.regroup(1)
    (s, t), (eh, ew), (fh, fw) = first.stride, first.extent, second.extent
    kernel = torch.zeros(
        second.out_channels, first.in_channels, eh + s * (fh - 1), ew + t * (fw - 1), dtype=torch.float64
    )
    for u in range(first.kernel.shape[2]):
        for v in range(first.kernel.shape[3]):
            for p in range(second.kernel.shape[2]):
                for q in range(second.kernel.shape[3]):
                    row = first.dilation[0] * u + s * second.dilation[0] * p
                    column = first.dilation[1] * v + t * second.dilation[1] * q
                    kernel[:, :, row, column] += second.kernel[:, :, p, q] @ first.kernel[:, :, u, v]
    return kernel


def on_single_pixels(m):
    """The dense kernel of a map with its dilation written out as zeros."""
    m = m.regroup(1)
    wide = torch.zeros(*m.kernel.shape[:2], *m.extent, dtype=torch.float64)
    wide[:, :, :: m.dilation[0], :: m.dilation[1]] = m.kernel
    return wide


@quick
@given(data=st.data())
def test_composition_against_a_slow_twin(data):
    first = data.draw(maps(largest=3))
    second = data.draw(maps(in_channels=first.out_channels, padded=False, largest=3))
    both = first.then(second)
    torch.testing.assert_close(on_single_pixels(both), compose_by_loops(first, second), rtol=1e-12, atol=1e-12)


@quick
@given(data=st.data())
def test_composition_behind_anything_when_the_second_does_not_pad(data):
    first = data.draw(maps(modes=MODES))
    second = data.draw(maps(in_channels=first.out_channels, padded=False))
    both = first.then(second)
    for x in inputs_for(first, second):
        assert_equal(both(x), second(first(x)))


@quick
@given(data=st.data())
def test_composition_is_exact_or_refused_and_refused_only_where_it_is_wrong(data):
    """The padded second map, whose borders are the difficulty."""
    first = data.draw(maps(largest=4))
    second = replace(data.draw(maps(in_channels=first.out_channels, largest=4)), stride=(1, 1))
    chain = list(inputs_for(first, second, sizes=first.stride[0] * first.stride[1] + 1))
    try:
        both = first.then(second)
    except AlgebraError as error:
        assert "pads" in str(error)
        # what it would have been: the same operator with the padding of both
        both = first.then(replace(second, padding=NO_PADDING))
        total = tuple(
            (a + s * c, b + s * d)
            for (a, b), (c, d), s in zip(first.padding, second.padding, first.stride, strict=True)
        )
        both = replace(both, padding=total)
        assert any(float((both(x) - second(first(x))).abs().max()) > 1e-9 for x in chain), "a lazy refusal"
    else:
        for x in chain:
            assert_equal(both(x), second(first(x)))


@quick
@given(data=st.data(), mode=st.sampled_from(MODES[1:]))
def test_a_pointwise_map_goes_before_any_padding_mode(data, mode):
    first = data.draw(maps(pointwise=True, biased=mode != "zeros"))
    second = data.draw(maps(in_channels=first.out_channels, modes=(mode,)))
    both = first.then(second)
    for x in inputs_for(first, second):
        assert_equal(both(x), second(first(x)))


KNOWN_EXACT = {
    "3x3 pad 1 -> 1x1": ({"kernel_size": 3, "padding": 1}, {"kernel_size": 1}),
    "3x3 pad 2 -> 3x3 (all padding in front)": ({"kernel_size": 3, "padding": 2}, {"kernel_size": 3}),
    "3x3 stride 2 pad 3 -> 3x3": ({"kernel_size": 3, "padding": 3, "stride": 2}, {"kernel_size": 3}),
    "1x1 no bias -> 3x3 pad 1": ({"kernel_size": 1, "bias": False}, {"kernel_size": 3, "padding": 1}),
    "1x1 stride 2 no bias -> 3x3 pad 1": (
        {"kernel_size": 1, "bias": False, "stride": 2},
        {"kernel_size": 3, "padding": 1},
    ),
    "3x1 no bias -> 1x3 pad (0, 1)": (
        {"kernel_size": (3, 1), "padding": (1, 0), "bias": False},
        {"kernel_size": (1, 3), "padding": (0, 1)},
    ),
    "3x3 full padding no bias -> 3x3 pad 1": (
        {"kernel_size": 3, "padding": 2, "bias": False},
        {"kernel_size": 3, "padding": 1},
    ),
    "reflect 3x3 -> 1x1": ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, {"kernel_size": 1}),
    "1x1 with bias -> reflect 3x3": ({"kernel_size": 1}, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "depthwise -> pointwise": ({"kernel_size": 5, "padding": 2, "groups": 4}, {"kernel_size": 1}),
    "even 4x2 pad (2, 1) -> 2x2": ({"kernel_size": (4, 2), "padding": (2, 1)}, {"kernel_size": 2}),
    "dilated -> dilated": ({"kernel_size": 3, "dilation": 2, "padding": 2}, {"kernel_size": 3, "dilation": 3}),
}
KNOWN_WRONG = {
    "1x1 with bias -> 3x3 pad 1": ({"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, "give its bias"),
    "3x3 pad 1 -> 3x3 pad 1": (
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 3, "padding": 1},
        "put all padding into the first",
    ),
    "reflect 3x3 -> zeros 3x3": (
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "bias": False},
        {"kernel_size": 3, "padding": 1},
        "reflect padding followed by zero padding",
    ),
    "3x3 -> reflect 3x3": (
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        "only a pointwise map",
    ),
    "channels": ({"kernel_size": 1}, {"kernel_size": 1, "in_channels": 6}, "4 channels come out, 6 go in"),
}


def conv(options, seed):
    options = {"in_channels": 4, "out_channels": 4, **options}
    torch.manual_seed(seed)
    return nn.Conv2d(dtype=torch.float64, **options)


@pytest.mark.parametrize("name", KNOWN_EXACT)
@pytest.mark.parametrize("size", [(9, 12), (10, 9), (8, 8)], ids=str)
def test_known_to_be_exact(name, size):
    first, second = (conv(options, seed) for seed, options in enumerate(KNOWN_EXACT[name]))
    both = ConvMap.from_conv2d(first).then(ConvMap.from_conv2d(second))
    x = randn(2, 4, *size)
    assert_equal(both(x), second(first(x)))


@pytest.mark.parametrize("name", KNOWN_WRONG)
def test_known_to_be_wrong_at_the_border(name):
    *options, message = KNOWN_WRONG[name]
    first, second = (ConvMap.from_conv2d(conv(o, seed)) for seed, o in enumerate(options))
    with pytest.raises(AlgebraError, match=message):
        first.then(second)


@pytest.mark.parametrize("height", range(1, 8))
@pytest.mark.parametrize("options", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 5, "padding": 2, "stride": 2}])
def test_the_block_of_reducenet_on_maps_smaller_than_the_kernel(options, height):
    parts = [conv(options, 0), nn.BatchNorm2d(4, dtype=torch.float64), conv({"kernel_size": 1}, 1)]
    parts[1].running_mean.copy_(randn(4))
    parts[1].eval()
    total = ConvMap.from_conv2d(parts[0]).then(ConvMap.from_bn(parts[1])).then(ConvMap.from_conv2d(parts[2]))
    x = randn(2, 4, height, 9 - height)
    assert_equal(total(x), nn.Sequential(*parts)(x))


def test_composition_is_associative_and_has_an_identity():
    a, b, c = (ConvMap(randn(4, 4, 3, 3, seed=s), randn(4, seed=s + 9)) for s in range(3))
    assert_equal(a.then(b).then(c).kernel, a.then(b.then(c)).kernel)
    assert_equal(a.then(b).then(c).bias, a.then(b.then(c)).bias)
    one = ConvMap.identity(4)
    for same in (a.then(one), one.then(a)):
        assert torch.equal(same.kernel, a.kernel) and torch.equal(same.bias, a.bias)


@quick
@given(data=st.data())
def test_a_chain_multiplied_out_in_whatever_order(data):
    chain = [data.draw(maps())]
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["pointwise", "scale", "depthwise", "any"]))
        channels = chain[-1].out_channels
        if kind in ("scale", "depthwise"):
            taps = (1, 1) if kind == "scale" else (2, 3)
            seed = data.draw(st.integers(0, 9))
            kernel = randn(channels, 1, *taps, seed=seed)
            chain.append(ConvMap(kernel, randn(channels, seed=seed + 1), data.draw(pairs), groups=channels))
        else:
            chain.append(data.draw(maps(in_channels=channels, padded=False, pointwise=kind == "pointwise", largest=2)))
    total = compose(chain)
    for x in inputs_for(*chain, sizes=2):
        expected = x
        for m in chain:
            expected = m(expected)
        assert_equal(total(x), expected)


def test_a_map_that_promises_no_bias_keeps_it_through_all_operations():
    conv, bn = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
    free, other = ConvMap.from_conv2d(conv), ConvMap.from_conv2d(nn.Conv2d(4, 4, 1, bias=False))
    norm = ConvMap.from_bn(bn)
    pool, one = ConvMap.from_avg_pool(nn.AvgPool2d(2), 4), ConvMap.identity(4)
    unbiased = [free, pool, one, free.then(other), free + free, free.scale(torch.tensor(2.0)), free.then(pool)]
    for m in unbiased:
        assert not m.biased and not m.bias.any()
    biased = [norm, ConvMap.from_conv2d(nn.Conv2d(4, 4, 1)), free.then(norm), norm.then(free), free + free.then(norm)]
    assert all(m.biased for m in biased)
    assert torch.equal((free + free.then(norm)).bias, free.then(norm).bias)


# --- sums ---


@quick
@given(data=st.data())
def test_addition(data):
    a = data.draw(maps(modes=MODES))
    b = data.draw(maps(in_channels=a.in_channels))
    # make the outputs of one size: stride of a, and as much padding as b's extent asks for
    paddings = []
    for axis in (0, 1):
        total = b.extent[axis] - (a.extent[axis] - sum(a.padding[axis]))
        assume(total >= 0)
        before = data.draw(st.integers(0, total))
        paddings.append((before, total - before))
    b = ConvMap(
        randn(a.out_channels, a.in_channels, *b.kernel.shape[2:], seed=3),
        randn(a.out_channels, seed=4),
        a.stride,
        tuple(paddings),
        b.dilation,
        padding_mode=a.padding_mode,
    )
    for x in inputs_for(a, replace(b, stride=(1, 1)), sizes=2):
        if a.padding_mode != "zeros":  # torch reflects no more pixels than there are
            x = F.pad(x, (0, 30, 0, 30))
        assert_equal((a + b)(x), a(x) + b(x))
        assert_equal((b + a)(x), a(x) + b(x))


def map_of(**options):
    return ConvMap.from_conv2d(conv(options, 0))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (map_of(kernel_size=1), map_of(kernel_size=1, out_channels=6), "channels"),
        (map_of(kernel_size=1), map_of(kernel_size=1, stride=2), "strides"),
        (map_of(kernel_size=3), map_of(kernel_size=1), "differ in size"),
        (map_of(kernel_size=3, padding=1), map_of(kernel_size=2, padding=1), "differ in size"),
        (map_of(kernel_size=3, padding=1), map_of(kernel_size=3, padding=1, padding_mode="circular"), "padding modes"),
    ],
)
def test_sums_that_are_refused(a, b, message):
    with pytest.raises(AlgebraError, match=message):
        a + b


def test_the_sum_of_dilated_kernels_stays_on_their_grid():
    a, b = map_of(kernel_size=3, dilation=4, padding=4), map_of(kernel_size=(3, 1), dilation=2, padding=(2, 0))
    total = a + b
    assert total.dilation == (2, 4) and total.kernel.shape[2:] == (5, 3)


# --- forms ---


@quick
@given(m=maps())
def test_regroup_keeps_the_map(m):
    for groups in range(1, 7):
        if m.groups % groups:
            with pytest.raises(AlgebraError, match="does not divide"):
                m.regroup(groups)
        else:
            for x in inputs_for(m, sizes=1):
                assert_equal(m.regroup(groups)(x), m(x))
    assert m.regroup(1).groups == 1


@given(m=maps())
@quick
def test_scale(m):
    factor = randn(m.out_channels)
    for x in inputs_for(m, sizes=1):
        assert_equal(m.scale(factor)(x), m(x) * factor.reshape(-1, 1, 1))
        assert_equal(m.scale(torch.tensor(-2.0))(x), m(x) * -2)


@quick
@given(m=maps(modes=MODES))
def test_to_conv2d_computes_the_map_or_refuses(m):
    lopsided = any(a != b for a, b in m.padding)
    rng = torch.get_rng_state()
    for bias in (True, False):
        if lopsided or (not bias and bool((m.bias != 0).any())):
            with pytest.raises(AlgebraError, match="both sides alike|bias=False"):
                m.to_conv2d(bias=bias)
        else:
            module = m.to_conv2d(bias=bias)
            assert (module.bias is not None) == bias
            for x in inputs_for(m, sizes=1):
                assert_equal(module(x), m(x))
    assert torch.equal(torch.get_rng_state(), rng)


def test_to_conv2d_casts_at_the_end():
    assert map_of(kernel_size=3).to_conv2d(dtype=torch.float16).weight.dtype == torch.float16


FITS = {
    "itself": ({"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 1}),
    "1x1 in 3x3": ({"kernel_size": 1}, {"kernel_size": 3, "padding": 1}),
    "3x1 in 5x5": ({"kernel_size": (3, 1), "padding": (1, 0)}, {"kernel_size": 5, "padding": 2}),
    "depthwise in dense": ({"kernel_size": 3, "groups": 4}, {"kernel_size": 3}),
    "dilated in fine": ({"kernel_size": 3, "dilation": 2, "padding": 2}, {"kernel_size": 5, "padding": 2}),
    "one tap of any dilation": ({"kernel_size": 1}, {"kernel_size": 1, "dilation": 2}),
    "rectangular and dilated": (
        {"kernel_size": (1, 1), "stride": (2, 3)},
        {"kernel_size": (3, 1), "dilation": 2, "padding": (2, 0), "stride": (2, 3)},
    ),
    "strided": ({"kernel_size": 1, "stride": 2}, {"kernel_size": 3, "padding": 1, "stride": 2}),
}
MISFITS = {
    "too large": ({"kernel_size": 5, "padding": 2}, {"kernel_size": 3, "padding": 1}),
    "too wide": ({"kernel_size": (1, 3), "padding": (0, 1)}, {"kernel_size": (3, 1), "padding": (1, 0)}),
    "dense in depthwise": ({"kernel_size": 3}, {"kernel_size": 3, "groups": 2}),
    "fine in dilated": ({"kernel_size": 5, "padding": 2}, {"kernel_size": 3, "dilation": 2, "padding": 2}),
    "other stride": ({"kernel_size": 1, "stride": 2}, {"kernel_size": 1}),
    "other size": ({"kernel_size": 3}, {"kernel_size": 3, "padding": 1}),
}


@pytest.mark.parametrize("name", FITS)
def test_fit(name):
    source, target = (conv(options, seed) for seed, options in enumerate(FITS[name]))
    fitted = ConvMap.from_conv2d(source).fit(target)
    assert fitted.kernel.shape == target.weight.shape
    with torch.no_grad():
        target.weight.copy_(fitted.kernel)
        target.bias.copy_(fitted.bias)
    x = randn(2, 4, 11, 12)
    assert_equal(target(x), source(x))


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_refused(name):
    source, target = (conv(options, seed) for seed, options in enumerate(MISFITS[name]))
    with pytest.raises(AlgebraError):
        ConvMap.from_conv2d(source).fit(target)


def test_what_a_map_says_of_itself():
    m = map_of(kernel_size=(3, 2), dilation=(2, 5), groups=2)
    assert (m.in_channels, m.out_channels, m.extent) == (4, 4, (5, 6))
    assert math.prod(m.kernel.shape) == 4 * 2 * 3 * 2


def test_maps_carry_gradients():
    first, second = conv({"kernel_size": 3}, 0), conv({"kernel_size": 1}, 1)
    ConvMap.from_conv2d(first).then(ConvMap.from_conv2d(second)).kernel.sum().backward()
    assert first.weight.grad is not None and second.weight.grad is not None
