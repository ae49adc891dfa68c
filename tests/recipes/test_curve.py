"""recipes/compare.py --curve: known curves are found again, from plan.json and runs.jsonl alone."""

import math
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from scipy import stats

from growshrink.cycle.records import RoundRecord
from growshrink.errors import RunError
from growshrink.evidence.arms import Arm
from growshrink.evidence.experiment import Experiment
from growshrink.evidence.record import Cost, Job, RunRecord, SeedScore, append_run
from program import module_of, run

TOP = Path(__file__).parents[2]
CURVE = module_of(TOP / "recipes" / "curve.py")
keep_plan = module_of(TOP / "recipes" / "jobs.py").keep_plan
SEEDS = (0, 1, 2)
#: Top-1 of the plain net by budget: doubling from 200 brings 0.2, so B* is 200.
PLAIN = {100: 60.0, 200: 62.0, 400: 62.2}
#: Behind by 1.0, then ahead by 1.0: the lines cross halfway between, at 100 * sqrt(2).
TAUGHT = {100: 59.0, 200: 63.0}
#: By seed: the same for every arm, so that paired differences have what `SPREAD` adds.
NOISE = dict(zip(SEEDS, (-0.5, 0.0, 0.5), strict=True))
SPREAD = dict(zip(SEEDS, (0.1, -0.2, 0.1), strict=True))
#: Share of an arm's MACs that its teacher takes.
TEACHER = 0.5


def int8_of(top1):
    return {"int8_tensor": top1 - 1.0, "int8_channel": top1}


def line(arm, budget, values, *, taught=(), kind="run", seeds=SEEDS):
    scores = tuple(
        SeedScore(seed=seed, val=1.0, test=values[seed], loss=1.0, **int8_of(values[seed])) for seed in seeds
    )
    cost = Cost(epochs=budget, macs=1e9 * budget, budget=1e9 * budget, images=1, seconds=36.0 * budget * len(seeds))
    job = Job(kind=kind, arm=arm, seeds=seeds, lr=0.1, budget=budget)
    about = {"about": "made up", "plan": {}, "config": {}, "data": {}, "updates": 1, "versions": {}}
    return RunRecord(job=job, scores=scores, cost=cost, rounds=taught, **about)


def experiment(folder, budget, width=0.25, less=0.0):
    """A folder with two arms and a third, "given", whose teacher the runs did not train."""
    arms = {"plain": PLAIN, "taught": TAUGHT, "given": TAUGHT}
    arms = {name: values for name, values in arms.items() if budget in values}
    plan = Experiment(
        data="cifar10",
        model_kwargs={"width": width},
        budget=budget,
        seeds=SEEDS,
        arms=tuple(arms),
        own_arms={name: Arm(base=1.0) for name in ("taught", "given")},
        predictions=("it pays from 141 on",),
        config=replace(Experiment(data="digits").config, lr=0.1),
    )
    out = folder / f"{width}-{budget}"
    keep_plan(plan, out)
    for name, values in arms.items():
        extra = {seed: 0.0 if name == "plain" else SPREAD[seed] - less for seed in SEEDS}
        taught = {
            "plain": (),
            "taught": ({"teacher_macs": len(SEEDS) * TEACHER * 1e9 * budget, "teacher_updates": 5, "answers_macs": 1},),
            "given": ({"teacher_macs": 0, "teacher_updates": 0, "answers_macs": 1},),
        }
        assert all(round.keys() <= set(get_type_hints(RoundRecord)) for rounds in taught.values() for round in rounds)
        append_run(
            out, line(name, budget, {s: values[budget] + NOISE[s] + extra[s] for s in SEEDS}, taught=taught[name])
        )
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("curve")
    return [experiment(top, budget) for budget in PLAIN] + [experiment(top, 200, width=2.0, less=1.5)]


@pytest.fixture(scope="module")
def curves(folders):
    return CURVE.curves_of(folders)


def test_the_difference_at_each_budget_is_that_of_the_pairs(curves):
    for point, expected in zip(curves[0].arms["taught"], (-1.0, 1.0), strict=True):
        gains = curves[0].gains(point, 1.0)
        assert gains == pytest.approx({seed: expected + SPREAD[seed] for seed in SEEDS})
        found, t = CURVE.estimate(gains), stats.ttest_1samp(list(gains.values()), 0.0)
        assert (found.value, found.low, found.high) == pytest.approx((expected, *t.confidence_interval()))


def test_a_teacher_is_charged_in_three_ways(curves):
    """At 200 the student without its teacher costs 100, with a tenth of it 110: plain has 60 and a little more."""
    one, two = curves[0].arms["taught"]
    for share, compute, plain in ((1.0, 200, 62.0), (0.1, 110, 60 + 2 * math.log2(1.1)), (0.0, 100, 60.0)):
        assert two.charged(share) == pytest.approx(compute)
        assert curves[0].gains(two, share)[1] == pytest.approx(63.0 + SPREAD[1] - plain)
    assert curves[0].gains(one, 0.0) == {}  # plain was not trained for as little
    given = curves[0].arms["given"][1]
    assert given.charged(1.0) is None and given.charged(0.0) == 200 and curves[0].gains(given, 0.1) == {}


def test_saturation_and_what_is_left_of_an_arm_there(curves):
    assert curves[0].saturation == 200
    gains, budget = curves[0].at_saturation("taught")
    assert budget == 400 and gains == pytest.approx({seed: 0.8 + SPREAD[seed] for seed in SEEDS})
    assert curves[1].saturation is None and curves[1].at_saturation("taught") is None


def test_the_crossing_and_its_interval_by_every_resample_there_is(curves):
    found = curves[0].crossing("taught")
    assert found.value == pytest.approx(100 * math.sqrt(2))
    means = [np.mean([SPREAD[a], SPREAD[b], SPREAD[c]]) for a in SEEDS for b in SEEDS for c in SEEDS]
    all_of_them = sorted(100 * 2 ** ((1 - mean) / 2) for mean in means)
    assert all_of_them[0] * 0.999 <= found.low < found.value < found.high <= all_of_them[-1] * 1.001
    assert CURVE.first_crossing([100, 200], [-1.0, -0.1]) == math.inf


def test_how_much_longer_plain_takes_to_be_as_good(curves):
    cheap, good = curves[0].arms["taught"]
    assert curves[0].multiplier(good) == "> 2" and curves[0].multiplier(cheap) == "< 1"
    level = replace(good, top1={0: 62.1})
    assert curves[0].multiplier(level) == f"{2**0.5:.2g}"


def test_the_interaction_is_the_difference_of_differences(curves):
    (row,) = [line for line in CURVE.interactions(curves) if line.startswith("| taught")]
    assert "| +1.00 (" in row and "| -0.50 (" in row and "| +1.50 (+1.50 .. +1.50)" in row


def test_the_page_is_the_same_every_time_and_says_what_was_found(folders, tmp_path):
    pages = []
    for name in ("once", "again"):
        assert run("recipes/compare.py", "--curve", *folders, "--out", tmp_path / name) == 0
        pages.append([(tmp_path / name / file).read_bytes() for file in ("curve.md", "curve.png")])
    assert pages[0] == pages[1]
    text = pages[0][0].decode()
    for words in (
        "ahead of plain: taught at 200.**",
        "B* = 200 epochs) above the best plain net: taught, given**",
        "it pays from",
        "| plain | 100 | 60.00 | 59.00 / 60.00 | 3 |",
    ):
        assert words in text


def test_what_makes_no_curve_is_refused(folders, tmp_path, capsys):
    with pytest.raises(RunError, match="two of the folders have the same budget"):
        CURVE.curves_of([folders[0], folders[0]])
    for args, words in (
        (("--curve", folders[0]), "--curve takes folders of results, --out OUT"),
        (("--curve", tmp_path, "--out", tmp_path / "x"), "holds no experiment"),
    ):
        assert run("recipes/compare.py", *args) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("page", sorted(TOP.glob("docs/**/curve.md")), ids=lambda page: page.parent.name)
def test_published_curves_are_made_from_their_records(page, tmp_path):
    names = page.read_text().split("--curve ")[1].split(" --out")[0].split()
    folders = [TOP / "docs" / "evidence" / name for name in names]
    assert run("recipes/compare.py", "--curve", *folders, "--out", tmp_path) == 0
    assert (tmp_path / "curve.md").read_text() == page.read_text()
