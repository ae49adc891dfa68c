"""Rounds whose middle widths are sampled."""

import json
import re

import pytest
import torch
from small import BATCH, CONFIG, SIZE, Feed, Interrupt, shorten_settle, small, two_rounds

import growshrink as gs
from growshrink.cycle import Choose, Drop, Fuse, NetAug, Round, Teacher, lay_out
from growshrink.data.batches import Augment
from growshrink.errors import PlanError
from growshrink.supernet import load_supernet
from growshrink.training.calibrate import calibrate_bn
from sampled import sampled

ALIVE = {"hold": 0.9, "vanish": 0.0, "settle": 0.0}
CASES = {
    "drop": ({"widths": NetAug("netaug"), "exit": Drop(), **ALIVE}, {}),
    "drop, annealed": ({"widths": NetAug("lazy", inplace_distil=0.5), "exit": Drop()}, {}),
    "fuse": ({"widths": NetAug("netaug"), "exit": Fuse()}, {}),
    "choose": ({"widths": NetAug("single"), "exit": Choose()}, {}),
    "choose, built grown": ({"widths": NetAug("sandwich"), "exit": Choose()}, {"built_grown": True}),
    "peak": ({"widths": NetAug("netaug"), "exit": Choose(), "teacher": Teacher("peak")}, {"dropout": 0.3}),
}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    shorten_settle(monkeypatch)
    monkeypatch.setattr("growshrink.cycle.report.draw_curves", lambda result: False)


def plan_of(case, branches=(("bottleneck",), ("insert", "bottleneck"))):
    return two_rounds(branches, **CASES[case][0])


def run(path, case, *, fail_at=None, resume=False, plan=None):
    feed = Feed.make(augment=Augment(crop=1))
    feed.train.fail_at = fail_at
    torch.manual_seed(5)
    return gs.run_cycle(
        small(**CASES[case][1], outputs=4),
        feed,
        plan_of(case) if plan is None else plan,
        out_dir=path,
        config=CONFIG,
        resume=resume,
        save_every=None if fail_at is None and not resume else 3,
    )


@pytest.mark.parametrize("case", sampled(CASES, ("drop, annealed",)))
def test_a_run_ends_plain_and_a_resumed_one_ends_alike(tmp_path, case):
    whole = run(tmp_path / "whole", case)
    assert list(whole.model.state_dict()) == list(small(outputs=4).state_dict())
    for record in whole.rounds:
        left = record.left_by
        assert left.exit == CASES[case][0]["exit"].kind and left.step_macs > 0
        assert record.max_rel <= 1e-10
        if left.exit == "drop":
            assert left.width == "base" and record.top1.fused == record.top1.base
            assert record.effect == 0.0
        if left.exit == "fuse":
            assert left.width == "full" and record.effect > 1e-3
        if left.exit == "choose":
            scores = [tried.top1 for tried in left.candidates]
            assert scores == sorted(scores, reverse=True) and len(scores) >= 2
            assert record.top1.fused == scores[0] and left.width == left.candidates[0].width
            base = next(tried for tried in left.candidates if tried.width == "base")
            assert base.top1 == record.top1.base
    text = (tmp_path / "whole" / "report.md").read_text()
    assert "## Sampled widths" in text and f"mode {CASES[case][0]['widths'].mode}" in text

    segments = lay_out(plan_of(case), 4, built_grown="built" in case).all
    points = [segments[1].start + 3, segments[-2].start + 1]  # in the first hold, in the second round
    for fail_at in points if case in ("peak", "choose, built grown") else points[:1]:
        path = tmp_path / str(fail_at)
        with pytest.raises(Interrupt):
            run(path, case, fail_at=fail_at)
        resumed = run(path, case, resume=True)
        assert resumed.final == whole.final and resumed.training_macs == whole.training_macs
        for key, value in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[key], value), key


def test_the_dropped_net_is_the_base_net_of_the_run_bit_for_bit(tmp_path):
    """Against the same updates made by hand: plain loss plus that of the augmented net, then the branches off."""
    plan = gs.CyclePlan(
        rounds=(gs.Round(epochs=2, ratio=2.0, widths=NetAug("netaug"), exit=Drop(), hold=1.0, vanish=0.0, settle=0.0),),
        seed=3,
    )
    result = run(tmp_path / "run", "drop", plan=plan)

    feed = Feed.make(augment=Augment(crop=1))
    model = gs.grow(small(outputs=4), ratio=2.0, seed=3 + 1000, input_size=SIZE).to(memory_format=torch.channels_last)
    from growshrink.training import Trainer

    trainer = Trainer(model, CONFIG, feed.train)
    task = gs.NetAugTask(model, mode="netaug", seed=3 + 1, verbose=False).attach(trainer.optimizer)
    gs.set_width(trainer.ema, task.space.base)
    phases = lay_out(plan, 4)
    trainer.train(8, learning_rate=phases.learning_rate, lam=gs.schedules.constant(1.0), task=task)
    trainer.calibrate_average()
    dropped = gs.drop(trainer.ema)
    for key, value in dropped.state_dict().items():
        assert torch.equal(result.model.state_dict()[key], value), key
    # forward and backward of both passes
    assert result.training_macs == BATCH * sum(
        gs.supernet.cost.StepCost(task, SIZE).of_update(update) for update in range(8)
    )


def test_supernets_are_kept_for_the_tools(tmp_path):
    plan = two_rounds((("bottleneck",),), **CASES["drop"][0])
    feed = Feed.make()
    import timm

    kwargs = {"width": 0.25, "num_classes": 4, "depths": (1, 1, 1)}
    gs.run_cycle(
        timm.create_model("reducenet20", **kwargs),
        feed,
        plan,
        out_dir=tmp_path / "run",
        config=CONFIG,
        about={
            "model": {
                "name": "reducenet20",
                "kwargs": kwargs,
                "plain_name": "reducenet20",
                "plain_kwargs": kwargs,
            }
        },
    )
    before, space, about = load_supernet(tmp_path / "run" / "init.safetensors")
    after, again, _ = load_supernet(tmp_path / "run" / "supernet.safetensors")
    assert space == again and about["input_size"] == [3, 8, 8]
    moved = [name for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if (a != b).any()]
    assert any(".branches." in name for name in moved) and "stem.conv.weight" in moved
    # the base net of the supernet is the net that was deployed before the tail: the same keys, and it runs
    gs.drop(after)(torch.zeros(1, 3, 8, 8))


BAD = {
    "mode": (NetAug, {"mode": "netog"}, "mode='netog': no such mode; did you mean netaug"),
    "exit without widths": (Round, {"exit": Choose()}, "exit='choose': only a round with sampled widths"),
    "alpha": (NetAug, {"mode": "lazy", "alpha": -1.0}, "alpha=-1.0: must be at least 0"),
    "distil": (NetAug, {"mode": "lazy", "inplace_distil": 2.0}, "inplace_distil=2.0: must be at least 0 and at most 1"),
    "vanish": (Round, {"widths": NetAug("lazy"), "exit": Choose(), "vanish": 0.0}, "vanish=0.0: must be above 0"),
    "hold": (Round, {"widths": NetAug("lazy"), "exit": Drop(), "hold": 0.0}, "hold=0.0: must be above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_plans_that_cannot_be(case):
    part, options, words = BAD[case]
    with pytest.raises(PlanError, match=re.escape(words)):
        part(**({"epochs": 1} if part is Round else {}), **options)


def test_a_net_grown_at_birth_cannot_be_dropped(tmp_path):
    with pytest.raises(PlanError, match="no kernels that would remain"):
        run(tmp_path / "run", "choose, built grown", plan=plan_of("drop"))
    assert not (tmp_path / "run").exists()


def test_the_plan_survives_json():
    plan = plan_of("drop, annealed")
    assert gs.CyclePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_base_that_no_update_runs_is_scored_with_statistics_of_its_own(tmp_path):
    """In mode `single` the base's own would be those of whatever was drawn."""
    plan = two_rounds((("bottleneck",),), widths=NetAug("single"), exit=Choose())
    result = run(tmp_path / "run", "choose", plan=plan)
    left = next(r for r in result.history if r.phase == "settle" and r.update == 17)  # the fuse comes after it
    assert left.val_top1 == result.rounds[0].top1.base


def test_the_widest_net_is_judged_with_statistics_of_its_own(tmp_path, monkeypatch):
    calls = []
    for module in ("augmented", "exits"):
        monkeypatch.setattr(
            f"growshrink.cycle.{module}.calibrate_bn",
            lambda model, batches: calls.append(gs.layers.get_width(model)) or calibrate_bn(model, batches),
        )
    run(tmp_path / "run", "fuse", plan=two_rounds((("bottleneck",),), **CASES["fuse"][0]))
    assert len(calls) == 3 and all(set(width.values()) == {4} for width in calls)  # peak; then net and average
