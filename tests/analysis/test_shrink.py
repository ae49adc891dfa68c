import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import supernets as small

import growshrink as gs
from growshrink.analysis._angle import angle
from growshrink.errors import AnalysisError, PlanError
from growshrink.training import TrainConfig
from program import module_of

module = module_of(Path(__file__).parents[2] / "recipes" / "shrinking.py")
ShrinkPlan, shrink = module.ShrinkPlan, module.shrink
balanced_sample, choice_scores, drop_lowest = module.balanced_sample, module.choice_scores, module.drop_lowest

CHOICES = {"a": (1, 2, 3), "b": (4, 5), "c": (6,)}


def test_samples_are_balanced_and_layers_are_independent():
    subnets = balanced_sample(CHOICES, 40, seed=0)
    counts = Counter(item for subnet in subnets for item in subnet.items())
    assert len(subnets) == 120 and counts["a", 1] == counts["a", 3] == 40 and counts["b", 4] == 60
    together = sum(s["a"] == 1 and s["b"] == 4 for s in subnets)
    assert 10 < together < 30
    assert subnets == balanced_sample(CHOICES, 40, seed=0) != balanced_sample(CHOICES, 40, seed=1)


def test_choices_get_the_mean_of_the_subnets_that_contain_them():
    subnets = [{"a": 1, "b": 4}, {"a": 1, "b": 5}, {"a": 2, "b": 5}]
    found = choice_scores(subnets, np.array([1.0, 3.0, np.nan]))
    assert found == {("a", 1): 2.0, ("b", 4): 1.0, ("b", 5): 3.0}


def test_the_lowest_go_and_every_layer_keeps_one():
    scores = {("a", 1): 5, ("a", 2): 0, ("a", 3): 1, ("b", 4): 2, ("b", 5): 9, ("c", 6): -1}
    assert drop_lowest(CHOICES, scores, 2) == [("a", 2), ("a", 3)]
    assert drop_lowest(CHOICES, scores, 9) == [("a", 2), ("a", 3), ("b", 4)]


@pytest.fixture(scope="module")
def stage():
    feed = small.digits()
    init, model, space = small.supernet(feed, epochs=0.2)
    return feed, init, model, space


PLAN = ShrinkPlan(first_epochs=0.2, later_epochs=0.1, samples=3, drop=2, stop_size=2**5, rebase_after=None)


@pytest.mark.parametrize("driver", ["angle", "null", "random", "supernet_accuracy"])
def test_loop_drops_until_the_space_is_small(stage, driver):
    feed, init, model, space = stage
    trained = copy.deepcopy(model)
    found = shrink(init, trained, space, feed, driver=driver, plan=PLAN, config=TrainConfig(lr=0.1))
    assert found.space.size == 2**5 and [step["size"] for step in found.steps] == [2**7, 2**5]
    assert found.updates == 5 * round(0.1 * feed.train.updates_per_epoch) and found.rebased_at is None
    assert all(len(step["dropped"]) == 2 for step in found.steps)
    found.space.check(trained)
    if driver == "random":
        again = shrink(init, copy.deepcopy(model), space, feed, driver=driver, plan=PLAN, config=TrainConfig(lr=0.1))
        assert again.space == found.space


def test_the_first_drop_by_angle_is_that_of_the_angles(stage):
    feed, init, model, space = stage
    subnets = balanced_sample({n: tuple(v) for n, v in space.choices.items()}, 3, 0)
    angles = angle(init, model, space, subnets, input_size=feed.input_size).angle
    expected = drop_lowest(space.choices, choice_scores(subnets, angles), 2)
    found = shrink(init, copy.deepcopy(model), space, feed, driver="angle", plan=PLAN, config=TrainConfig(lr=0.1))
    assert found.steps[0]["dropped"] == [f"{name}: {width}" for name, width in expected]


def test_initial_weights_are_replaced_once(stage, monkeypatch):
    feed, init, model, space = stage
    bases = []
    table = module.supernet_table
    monkeypatch.setattr(module, "supernet_table", lambda base, *a, **k: bases.append(base) or table(base, *a, **k))
    plan = ShrinkPlan(first_epochs=0.2, later_epochs=0.1, samples=3, drop=2, stop_size=1, rebase_after=3)
    found = shrink(init, copy.deepcopy(model), space, feed, driver="angle", plan=plan, config=TrainConfig(lr=0.1))
    assert found.rebased_at == 1 and found.space.size == 1 and len(found.steps) == 5  # 4 are gone by then
    assert bases[:2] == [init, init] and len({id(base) for base in bases[2:]}) == 1 and bases[2] is not init


def test_wrong_plans(stage):
    feed, init, model, space = stage
    with pytest.raises(AnalysisError, match="angel: no such score to shrink by; did you mean angle"):
        shrink(init, model, space, feed, driver="angel", plan=PLAN, config=TrainConfig())
    with pytest.raises(PlanError, match="drop=0"):
        ShrinkPlan(drop=0)
    found = shrink(
        init, copy.deepcopy(model), space, feed, driver="random", config=TrainConfig(),
        plan=ShrinkPlan(stop_size=1, max_iterations=0),
    )  # fmt: skip
    assert found.space.size == gs.layers.WidthSpace.from_json(space.to_json()).size and found.updates == 0
