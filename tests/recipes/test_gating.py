"""How recipes/slim.py trains gates: by their formulas, image by image; and what it says of luck."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import growshrink as gs
from nets import images, net, randomized
from program import module_of

SIZE = (3, 8, 8)
gating = module_of(Path(__file__).parents[2] / "recipes" / "gating.py")


@pytest.fixture(scope="module")
def routed():
    """Three choices, between which the gate is undecided."""
    plain = randomized(net("reducenet20", width=0.125, depths=(1, 1, 1))).double()
    model = gs.slim(plain, (0.25, 0.5, 1.0), input_size=SIZE)
    made = gs.route(model, gs.width_space(model), after="stages.0", hidden=4, input_size=SIZE)
    made.calibrate([images(*SIZE, n=16, dtype=torch.float64)])
    made.model.eval()
    return made


def gradients(routed, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(routed.gates.parameters()))])


def test_reinforce_is_the_expectation_in_the_mean(routed):
    """SkipNet's and RNP's estimate, each image drawn 400 times, five times."""
    x, y = images(*SIZE, n=3, dtype=torch.float64), torch.arange(3)
    expected = gradients(routed, gating.exact(routed, x, y, 0.5))
    torch.manual_seed(0)
    many = x.repeat(400, 1, 1, 1), y.repeat(400)
    drawn = torch.stack([gradients(routed, gating.reinforce(routed, *many, 0.5)) for _ in range(5)])
    assert F.cosine_similarity(drawn.mean(0), expected, 0) > 0.95
    assert float(drawn.mean(0).norm() / expected.norm()) == pytest.approx(1, abs=0.25)
    assert not any(isinstance(gate, gating.Choosing) for gate in routed.gates)


def test_labels_are_those_of_ds_net(routed):
    """Zero where the narrowest net is right, else the widest choice: an image at a time."""
    x = images(*SIZE, n=6, dtype=torch.float64)
    with torch.no_grad():
        narrow = torch.cat([routed.always(0)(image) for image in x.split(1)]).argmax(1)
    y = torch.where(torch.arange(6) < 3, narrow, (narrow + 1) % 10)
    torch.manual_seed(1)
    found = gating.labelled(routed, x, y, 0.2)
    torch.manual_seed(1)
    rest = found - gating.gumbel(routed, x, y, 0.2)
    feature = routed._prefix(x)
    wanted = [-routed.gates[0](f).log_softmax(1)[0, 0 if i < 3 else 2] for i, f in enumerate(feature.split(1))]
    torch.testing.assert_close(rest, sum(wanted) / 6, rtol=1e-9, atol=1e-12)


def test_judged_is_what_runs(routed):
    """The answers, confidence and cost of each image, and those of nets that choose alike for all."""
    x, y = images(*SIZE, n=9, dtype=torch.float64, seed=3), torch.arange(9)
    routed.eval().counts(0).zero_()
    right, sure, spent = gating.judge(routed, [(x[:5], y[:5]), (x[5:], y[5:])])
    with torch.no_grad():
        logits = torch.cat([routed(image) for image in x.split(1)])
    assert np.array_equal(right, (logits.argmax(1) == y).numpy())
    np.testing.assert_allclose(sure, logits.softmax(1).amax(1))
    assert spent.mean() == pytest.approx(routed.macs)
    table, _, macs = gating.static_nets(routed, [(x, y)])
    assert table.shape == (9, 3) and list(macs) == pytest.approx([routed.fixed + cost for cost in routed.costs[0]])
    with torch.no_grad():
        assert np.array_equal(table[:, 1], (routed.always(1)(x).argmax(1) == y).numpy())
    before = [p.clone() for p in routed.model.parameters()]
    cost = {}
    for price in (9.0, -9.0):
        gating.train_gates(routed, gating.exact, (x, y), price=price, updates=30, size=9, seed=0)
        cost[price] = gating.judge(routed, [(x, y)])[2].mean()
    assert cost[9.0] < cost[-9.0] - 0.05
    assert all(torch.equal(p, q) for p, q in zip(routed.model.parameters(), before, strict=True))


def test_luck_is_told_from_what_images_need():
    """Tables by a rule of the image, and by chance: another seed's oracle keeps the first alone."""
    random = np.random.default_rng(0)
    need = random.integers(3, size=1000)
    by_need = [np.arange(3) >= need[:, None]] * 3
    by_chance = [random.random((1000, 3)) < (0.6, 0.7, 0.8) for _ in range(3)]
    found = []
    for rights in (by_need, by_chance):
        tables = [
            {"right": ["".join(map(str, row.astype(int))) for row in r.T], "macs": [1.0, 2.0, 4.0]} for r in rights
        ]
        found.append(gating.luck(tables))
    need_, chance = ({name: np.mean([p["over_mix"][0] for p in own]) for name, own in each.items()} for each in found)
    assert need_["oracle of another seed"] > 15 > 3 > abs(chance["oracle of another seed"])
    assert chance["oracle of seeds of the widest"] > 15
    assert gating.luck(tables[:1]) == {}
