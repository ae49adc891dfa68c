import copy
import json
import math

import angle_twins as twins
import numpy as np
import pytest
import torch
from torch import nn

import growshrink as gs
import nets
from growshrink.analysis._angle import AngleTable, angle, supernet_table
from growshrink.analysis.layers import Layer, Side, read_width_table, supernet_layers
from growshrink.errors import AnalysisError, WidthError

SIZE = (3, 16, 16)
RNG = np.random.default_rng


def pair(name="reducenet20_x4", size=0.3, **kwargs):
    init = nets.randomized(nets.net(name, **kwargs))
    return init, twins.moved(init, size)


def grown(branch="bottleneck", **kwargs):
    plain = nets.ConvNet(channels=8, out_channels=16, **kwargs)
    net = nets.randomized(gs.grow(plain, branch, ratio=2, where=["conv"], input_size=SIZE))
    return net, twins.moved(net, 0.3)


def as_tensors(**arrays):
    return {name: torch.as_tensor(np.asarray(a)) for name, a in arrays.items()}


@pytest.mark.parametrize("make", [pair, grown, lambda: grown(groups=4), lambda: grown(["bottleneck", "insert"])])
def test_table_is_the_twin_on_random_subnets(make):
    init, trained = make()
    space = gs.width_space(init, divisor=4)
    widths = [space.base, space.full, *(space.sample(0, step) for step in range(12))]
    scores = angle(init, trained, space, widths, input_size=SIZE)
    for row, width in enumerate(widths):
        assert scores.angle[row] == pytest.approx(twins.subnet_angle(init, trained, width), abs=1e-12, rel=0)
        assert scores.params[row] == twins.subnet_params(init, width)
        assert scores.macs[row] == twins.subnet_macs(init, width, SIZE)
    assert scores.angle.min() > 1e-3 and scores.num_undefined == 0


def test_nested_branches_have_two_widths():
    init, trained = grown("nest")
    space = gs.width_space(init, divisor=4)
    outer, inner = space.choices
    assert inner.startswith(outer)
    table = supernet_table(init, trained, space, input_size=SIZE)
    plain = sum(p.numel() for n, p in init.named_parameters() if "branches" not in n)
    wide, deep = space.choices[outer][1], space.choices[inner][2]
    for width in ({outer: wide, inner: deep}, {outer: 0, inner: deep}, {outer: wide, inner: 0}):
        found = table.score(table.index([width])).params[0] - plain
        kernel, pointwise = 9 * 8 * width[outer], 16 * width[outer]
        expected = 0 if not width[outer] else kernel + 2 * width[outer] + pointwise + 2 * 16
        if width[outer] and width[inner]:
            expected += 9 * 8 * width[inner] + 2 * width[inner] + width[outer] * width[inner] + 2 * width[outer]
        assert found == expected, width


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-5, 1e-7])
def test_small_angles_keep_their_digits(size):
    """float64 weights, so that the change is as small as it says."""
    init = nets.net("reducenet20_x4").double()
    trained = twins.moved(init, size)
    space = gs.width_space(init)
    widths = [space.sample(0, step) for step in range(8)]
    found = angle(init, trained, space, widths, input_size=SIZE).angle
    expected = np.array([twins.subnet_angle(init, trained, width) for width in widths])
    assert np.abs(found - expected).max() <= min(1e-12, 1e-9 * size)


def test_hand_made_angles():
    layers = [Layer("w", rows=Side("a"))]
    scores = AngleTable(layers, {"a": [1, 2]}, as_tensors(w=[[1.0], [0.0]]), as_tensors(w=[[1.0], [1.0]])).score(
        np.array([[0], [1]])
    )
    assert scores.angle == pytest.approx([0.0, math.pi / 4], abs=1e-15)
    opposite = AngleTable(layers, {"a": [2]}, as_tensors(w=[[3.0], [4.0]]), as_tensors(w=[[-3.0], [-4.0]]))
    assert opposite.score(np.array([[0]])).angle[0] == math.pi
    longer = AngleTable(layers, {"a": [2]}, as_tensors(w=[[3.0], [4.0]]), as_tensors(w=[[6.0], [8.0]]))
    assert longer.score(np.array([[0]])).angle[0] == pytest.approx(0.0, abs=1e-7)


def test_zero_norm_is_undefined_and_counted():
    before, after = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [1.0]])
    for init, trained in ((before, after), (after, before)):
        scores = AngleTable([Layer("w", Side("a"))], {"a": [0, 1, 2]}, {"w": init}, {"w": trained}).score(
            np.array([[0], [1], [2]])
        )
        assert np.isnan(scores.angle).tolist() == [True, True, False] and scores.num_undefined == 2
        assert np.isnan(scores.null).tolist() == [True, True, False]


def test_chain_with_residual_concatenation_and_depthwise_layers():
    """A slimmable net: widths are shared by layers, and one layer reads two of them side by side."""
    random = np.random.default_rng(0)
    shapes = {
        "first": (8, 3, 9),
        "same": (8, 8, 9),
        "deep": (8, 1, 9),
        "next": (6, 8, 1),
        "a": (4, 8, 1),
        "b": (4, 6, 1),
    }
    init = {name: torch.from_numpy(random.normal(size=shape)) for name, shape in shapes.items()}
    trained = {name: w + 0.2 * torch.from_numpy(random.normal(size=w.shape)) for name, w in init.items()}
    x, y = Side("x"), Side("y")
    layers = [
        Layer("first", x, None, 4),
        Layer("same", x, x, 4),
        Layer("deep", x, None, 4),
        Layer("next", y, x, 1),
        Layer("a", None, x, 1),
        Layer("b", None, y, 1),
    ]
    table = AngleTable(layers, {"x": [2, 5, 8], "y": [1, 6]}, init, trained)
    scores = table.score(table.all())
    for row, (x, y) in enumerate([(x, y) for x in (2, 5, 8) for y in (1, 6)]):
        slices = [(x, 3), (x, x), (x, 1), (y, x), (4, x), (4, y)]
        parts = [
            [state[name][:o, :i].flatten() for name, (o, i) in zip(shapes, slices, strict=True)]
            for state in (init, trained)
        ]
        a, b = (torch.cat(p).numpy() for p in parts)
        assert scores.angle[row] == pytest.approx(twins.angle_between(a, b), abs=1e-13)
        assert scores.params[row] == len(a)
        assert scores.macs[row] == sum(4 * len(p) for p in parts[0][:3]) + sum(len(p) for p in parts[0][3:])


def test_null_is_the_angle_where_every_layer_turns_alike():
    """Every kernel turned by the same angle: nothing is left of the angle but structure."""
    random = np.random.default_rng(0)
    init, trained = {}, {}
    for name, cosine in (("u", 0.9), ("v", 0.2)):
        w = random.normal(size=(8, 4, 9))
        n = random.normal(size=w.shape)
        n -= w * (n * w).sum(-1, keepdims=True) / (w * w).sum(-1, keepdims=True)
        n *= np.linalg.norm(w, axis=-1, keepdims=True) / np.linalg.norm(n, axis=-1, keepdims=True)
        init[name] = torch.from_numpy(w)
        trained[name] = torch.from_numpy(1.3 * (cosine * w + math.sqrt(1 - cosine**2) * n))
    layers = [Layer("u", Side("a")), Layer("v", Side("b"), Side("a"))]
    table = AngleTable(layers, {"a": [2, 4], "b": [3, 8]}, init, trained)
    scores = table.score(table.all())
    assert np.ptp(scores.angle) > 0.01
    assert np.abs(scores.excess).max() < 1e-12
    trained["v"][:3] += 0.5
    scores = AngleTable(layers, {"a": [2, 4], "b": [3, 8]}, init, trained).score(table.all())
    assert np.ptp(scores.excess) > 1e-3


def test_an_order_of_channels_is_a_table_of_channels_in_that_order():
    init, trained = pair()
    layers, space = supernet_layers(init, SIZE), gs.width_space(init)
    random = np.random.default_rng(0)
    order = {name: random.permutation(choices[-1]) for name, choices in space.choices.items()}

    def permuted(net):
        state = dict(net.named_parameters())
        for layer in layers:
            for axis, side in enumerate((layer.rows, layer.columns)):
                if side is not None and not side.switch:
                    state[layer.name] = state[layer.name].index_select(axis, torch.tensor(order[side.variable]))
        return state

    table = supernet_table(init, trained, space, input_size=SIZE, order=order)
    index = table.sample(20)
    found = table.score(index)
    expected = AngleTable(layers, space.choices, permuted(init), permuted(trained)).score(index)
    assert np.abs(found.angle - expected.angle).max() < 1e-12
    assert (found.params == expected.params).all() and (found.macs == expected.macs).all()
    prefixes = supernet_table(init, trained, space, input_size=SIZE).score(index)
    assert np.abs(prefixes.angle - found.angle).max() > 1e-4


def test_trajectory_has_the_angle_of_every_checkpoint():
    init, first = pair(size=0.1)
    second = twins.moved(first, 0.2, seed=1)
    space = gs.width_space(init)
    table = supernet_table(init, [first, second], space, input_size=SIZE)
    index = table.sample(30)
    found = table.trajectory(index)
    for row, trained in zip(found, (first, second), strict=True):
        assert np.array_equal(row, supernet_table(init, trained, space, input_size=SIZE).score(index).angle)
    assert (found[1] > found[0]).all()


def test_index_and_widths_are_inverse_and_all_is_all():
    init, trained = pair()
    table = supernet_table(init, trained, gs.width_space(init), input_size=SIZE)
    index = table.sample(9)
    assert np.array_equal(table.index([table.width(row) for row in index]), index)
    assert len(np.unique(table.all(), axis=0)) == table.size == gs.width_space(init).size


def test_as_many_different_subnets_are_drawn_as_were_asked_for():
    sides = {f"v{i}": [1, 2, 3, 4] for i in range(4)}
    states = [as_tensors(**{name: RNG((i, j)).normal(size=(4, 3)) for i, name in enumerate(sides)}) for j in range(2)]
    table = AngleTable([Layer(name, Side(name)) for name in sides], sides, *states)
    found = table.sample_distinct(200, seed=1)
    assert len(np.unique(found, axis=0)) == 200 and np.array_equal(found, table.sample_distinct(200, seed=1))
    counts = sum((table.sample_distinct(64, seed)[:, :, None] == np.arange(4)).sum(0) for seed in range(40))
    assert np.abs(counts / 40 - 16).max() < 2  # each choice in a quarter; sd of a mean 0.5
    with pytest.raises(AnalysisError, match="257 different subnets of a space of 256"):
        table.sample_distinct(257)


def test_subnets_in_narrow_integers_are_the_same():
    layers = [Layer(f"w{i}", Side(f"v{i}")) for i in range(4)]
    states = [as_tensors(**{f"w{i}": RNG((i, j)).normal(size=(5, 3)) for i in range(4)}) for j in range(2)]
    table = AngleTable(layers, {f"v{i}": [1, 2, 3, 4, 5] for i in range(4)}, *states)
    expected = table.score(table.all())
    for dtype in (np.int8, np.uint8, np.int16):
        found = table.score(table.all().astype(dtype))
        assert np.array_equal(found.angle, expected.angle) and np.array_equal(found.params, expected.params), dtype


def test_what_does_not_fit_is_refused_by_name():
    init, trained = pair()
    space = gs.width_space(init)
    table = supernet_table(init, trained, space, input_size=SIZE)
    with pytest.raises(AnalysisError, match="not a choice, for 17"):
        table.index([{**space.base, "stages.0.0.conv": 17}])
    with pytest.raises(AnalysisError, match="beyond the choices"):
        table.score(table.sample(3) + 4)
    with pytest.raises(AnalysisError, match=r"needs whole numbers, 9 for each"):
        table.score(np.zeros((3, 9)))
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other.head.fc.weight[0, 0] = math.nan
    with pytest.raises(AnalysisError, match=r"head\.fc\.weight: has values that are not finite in the trained"):
        supernet_table(init, other, space, input_size=SIZE)
    other.head.fc = nn.Linear(16, 7)
    with pytest.raises(AnalysisError, match=r"head\.fc\.weight: \(10, 16\) in the initial weights, \(7, 16\)"):
        supernet_table(init, other, space, input_size=SIZE)
    with pytest.raises(AnalysisError, match=r"stem\.conv\.weight: missing in the trained"):
        supernet_table(init, nn.Linear(1, 1), space, input_size=SIZE)
    with pytest.raises(WidthError):
        supernet_table(nets.net("reducenet20"), trained, space, input_size=SIZE)


# --- supernets of others ---


class Cell(nn.Module):
    """Two widths, and one of three operators between them: 3x3, 1x1, or none."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.ops = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)])

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + sum(op(x) for op in self.ops)).mean((2, 3))


VARIABLES = {"width": (2, 4, 8), "op": (0, 1, 2)}
LAYERS = [
    Layer("stem.weight", rows=Side("width")),
    Layer("ops.0.weight", Side("width"), Side("op", chosen=1)),
    Layer("ops.1.weight", Side("width"), Side("op", chosen=2)),
    Layer("head.weight", columns=Side("width")),
]
TABLE = {
    "variables": {"width": [8, 2, 4], "op": [0, 1, 2]},
    "layers": [
        {"name": "stem.weight", "rows": "width", "positions": 49},
        {"name": "ops.0.weight", "rows": "width", "columns": {"variable": "op", "chosen": 1}, "positions": 49},
        {"name": "ops.1.weight", "rows": "width", "columns": {"variable": "op", "chosen": 2}, "positions": 49},
        {"name": "head.weight", "columns": "width", "positions": 49},
    ],
}


def by_hand(nets, width, op):
    """Angle, parameters and MACs of one subnet, its kernels cut and put in a row."""
    vectors = []
    for net in nets:
        parts = [net.stem.weight[:width], net.head.weight[:, :width]]
        if op:
            parts.append(net.ops[op - 1].weight[:width])
        vectors.append(torch.cat([part.detach().double().flatten() for part in parts]))
    cosine = torch.nn.functional.cosine_similarity(*vectors, dim=0)
    return math.acos(float(cosine)), len(vectors[0]), 49 * len(vectors[0])


def test_a_supernet_of_somebody_else_with_choices_of_operators(tmp_path):
    torch.manual_seed(0)
    init, trained = Cell(), Cell()
    widths = [{"width": width, "op": op} for width in VARIABLES["width"] for op in VARIABLES["op"]]
    scores = angle(init, trained, VARIABLES, layers=LAYERS, input_size=(3, 7, 7))
    expected = [by_hand((init, trained), **width) for width in widths]
    assert np.allclose(scores.angle, [row[0] for row in expected], rtol=1e-9)
    assert scores.params.tolist() == [row[1] for row in expected] and scores.macs.tolist() == [r[2] for r in expected]
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    variables, layers = read_width_table(path)
    assert variables == VARIABLES
    from_file = angle(init.state_dict(), trained.state_dict(), variables, widths, layers=layers)
    assert np.array_equal(from_file.angle, scores.angle) and np.array_equal(from_file.macs, scores.macs)


DAMAGE = {
    "no layers": {"variables": {}},
    "a width of text": {"variables": {"a": ["8"]}, "layers": []},
    "no width": {"variables": {"a": []}, "layers": []},
    "an unknown option": {"variables": {}, "layers": [{"name": "x", "shape": 3}]},
    "a list": {"variables": {}, "layers": [{"name": "x", "rows": [1]}]},
    "a divisor below 0": {"variables": {}, "layers": [{"name": "x", "rows": {"variable": "a", "divisor": -1}}]},
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_table_is_one_line(tmp_path, name):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(DAMAGE[name]))
    with pytest.raises(AnalysisError, match="table.json: not a table of widths") as caught:
        read_width_table(path)
    assert "\n" not in str(caught.value)
