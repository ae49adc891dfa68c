from pathlib import Path

import pytest
import torch
from torch import nn

from nets import ConvNet
from program import module_of

ranges = module_of(Path(__file__).parents[2] / "tools" / "ranges.py")
draw_ranges, range_verdict, weight_ranges = ranges.draw_ranges, ranges.range_verdict, ranges.weight_ranges


def test_ranges_and_errors_against_loops():
    torch.manual_seed(0)
    model = ConvNet(groups=2)
    for layer in weight_ranges(model):
        weight = model.get_submodule(layer.name).weight.detach().double()
        largest = [float(channel.abs().max()) for channel in weight]
        assert layer.largest == pytest.approx(max(largest))
        assert layer.channels == pytest.approx([value / max(largest) for value in largest])
        assert layer.ratio == pytest.approx(max(largest) / sorted(largest)[(len(largest) - 1) // 2])
        for error, scales in (
            (layer.error_per_tensor, [max(largest) / 127] * len(largest)),
            (layer.error_per_channel, [value / 127 for value in largest]),
        ):
            changed = sum(
                float((round(float(w) / scale) * scale - w) ** 2)
                for channel, scale in zip(weight, scales, strict=True)
                for w in channel.flatten()
            )
            assert error == pytest.approx((changed / float((weight**2).sum())) ** 0.5, rel=1e-9)
    assert {layer.name for layer in weight_ranges(model)} == {"stem", "conv", "head"}


def unequal(ratio, channels=9):
    """A layer whose largest channel is `ratio` times all others."""
    layer = nn.Linear(4, channels)
    with torch.no_grad():
        layer.weight.uniform_(-1, 1)
        layer.weight[:, 0] = 1
        layer.weight[0] *= ratio
    return layer


def test_the_worst_layer_comes_first_and_decides():
    model = nn.ModuleDict({"even": unequal(1), "odd": unequal(100), "less": unequal(10)})
    ranges = weight_ranges(model)
    assert [(layer.name, round(layer.ratio)) for layer in ranges] == [("odd", 100), ("less", 10), ("even", 1)]
    assert ranges[0].error_per_channel < 0.01  # of the largest channel's norm, nearly all of the layer's
    assert range_verdict(ranges) == (
        "Per-tensor int8 will likely hurt (1 of 3 layers): in odd, the worst layer, the largest channel is 100.0 times "
        "the median one, which is left 1 of 127 steps; quantise per channel."
    )
    assert range_verdict(ranges[1:]).startswith("Per-tensor int8 may hurt: in less,")
    assert range_verdict(ranges[2:]).startswith("Per-tensor int8 will likely not hurt: in even,")
    assert range_verdict([]) == "There is no layer to quantise."


@pytest.mark.parametrize("dead", [1, 9])
def test_dead_channels_are_left_out(tmp_path, dead):
    layer = unequal(1)
    with torch.no_grad():
        layer.weight[:dead] = 0
    (found,) = ranges = weight_ranges(nn.Sequential(layer))
    assert found.ratio == 1.0 and found.channels.count(0.0) == dead
    assert 0.0 <= found.error_per_channel <= found.error_per_tensor < 0.01
    draw_ranges(ranges, tmp_path / "ranges.png")
    assert (tmp_path / "ranges.png").stat().st_size > 1000
