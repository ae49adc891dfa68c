"""Another net as the teacher: what it costs, what it is asked, and that it stays out of what is trained."""

import copy
import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from small import BATCH, CONFIG, SIZE, Feed, Interrupt, shorten_settle, small
from torch import nn

import growshrink as gs
from growshrink.cycle import Drop, NetAug, Teacher, lay_out
from growshrink.cycle.costs import Costs, teacher_nets
from growshrink.cycle.running import Run
from growshrink.data.batches import Augment
from growshrink.errors import PlanError, RunError
from growshrink.proofs import profile
from growshrink.schedules.functions import cosine
from growshrink.training import distil
from growshrink.training.distil import TeacherNet
from sampled import sampled

TAUGHT = {"branch": (), "teacher": Teacher("given", asked=0.3, weight=0.9)}
TRAINED = {"branch": (), "teacher": Teacher("given", asked=0.3, share=0.25)}
ROUNDS = {
    "given": [TAUGHT],
    "trained": [TRAINED],
    "by name": [{"branch": (), "teacher": Teacher("reducenet20", share=0.25, kwargs={"width": 0.125})}],
    "at equilibrium": [{"branch": (), "teacher": Teacher("reducenet20_deq", share=0.25, kwargs={"width": 0.125})}],
    "two, one of the run's": [{**TRAINED, "epochs": 5}, {"teacher": Teacher("peak")}, {**TAUGHT, "epochs": 5}],
    "grown": [{"teacher": Teacher("given", asked=0.3, share=0.25)}],
    "grown, linear": [{**TRAINED, "branch": ("orepa",), "linear": True, "online": True, "init": "paper"}],
    "closed loop": [{"teacher": Teacher("given", share=0.25), "control": "closed_loop", "vanish": 0.5}],
    "netaug": [{"widths": NetAug("netaug"), "exit": Drop(), "teacher": Teacher("given", share=0.25)}],
}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    shorten_settle(monkeypatch)
    monkeypatch.setattr("growshrink.cycle.report.draw_curves", lambda result: False)


def plan_of(name, base=1.0):
    rounds = tuple(gs.Round(**{"epochs": 6, **entry}) for entry in ROUNDS[name])
    return gs.CyclePlan(rounds=rounds, base_epochs=base, seed=3)


class Wise(nn.Module):
    """Twice as wide as a Small, and with dropout, which eval mode is without."""

    def __init__(self, outputs=4, channels=3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


def wise(**kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Wise(**kwargs)


def given_to(plan):
    return {n: wise() for n, entry in enumerate(plan.rounds, 1) if entry.teacher.of == "given"}


def run(path, plan, feed=None, teachers=None, **kwargs):
    torch.manual_seed(5)
    teachers = given_to(plan) if teachers is None else teachers
    feed = feed or Feed.make(augment=Augment(crop=1))
    model = small(outputs=4, dropout=0.3)
    return gs.run_cycle(model, feed, plan, out_dir=path, config=CONFIG, teachers=teachers, **kwargs)


@pytest.mark.parametrize("name", sampled(ROUNDS, ("trained",)))
def test_the_cost_is_known_before(tmp_path, name):
    plan, feed = plan_of(name), Feed.make()
    result = run(tmp_path / "run", plan, feed)
    nets = teacher_nets(plan, feed, {}, given_to(plan))
    costs = Costs(small(outputs=4), plan, feed.train, SIZE, nets)
    assert lay_out(plan, 4).macs(costs) == result.training_macs
    assert gs.CyclePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert list(result.model.state_dict()) == list(small(outputs=4).state_dict())
    assert {number for number, entry in enumerate(plan.rounds, 1) if entry.teacher.is_net} == set(costs.teachers)
    for record, entry, span in zip(result.rounds, plan.rounds, result.phases.spans, strict=True):
        if entry.teacher.is_net:
            net = nets[record.number]
            assert record.teacher_macs == BATCH * (span.start - span.begin) * costs.teachers[record.number].train
            assert record.answers_macs == BATCH * span.lessons.number * profile(net, SIZE).macs
            assert record.training_macs >= record.teacher_macs + record.answers_macs and record.teacher_top1 is not None


def test_teacher_and_net_have_learning_rates_of_their_own():
    plan = replace(plan_of("trained"), rewarm=0)
    phases = lay_out(plan, 4)
    assert [(p.name, p.start, p.stop) for p in phases.all] == [("base", 0, 4), ("prepare", 4, 10), ("tail", 10, 28)]
    net, teacher = cosine(1.0, 0.0, steps=22), cosine(1.0, 0.0, steps=6)
    assert [phases.learning_rate(u) for u in range(28)] == pytest.approx(
        [*map(net, range(4)), *map(teacher, range(6)), *map(net, range(4, 22))]
    )
    span = phases.spans[0]
    assert (span.lessons.start, span.lessons.number) == (10, 5)  # 0.3 of 18, whatever the epoch of 4
    grown = lay_out(plan_of("grown"), 4)
    assert [(p.name, p.lessons is not None) for p in grown.all[1:3]] == [("prepare", False), ("hold", True)]
    assert [grown.lam(update) for update in (4, 10, 27)] == [1.0, 1.0, 0.0]


KILLED = ("trained", "given", "grown", "closed loop", "grown, linear", "netaug")


@pytest.mark.parametrize("name", sampled(KILLED, ("trained",)))
def test_killed_and_resumed_it_ends_the_same_bit_for_bit(tmp_path, monkeypatch, name):
    """Before the teacher's first update and amid its training, before the net's first, when answers come again."""
    plan, real = plan_of(name), Run.train_until
    whole = run(tmp_path / "whole", plan)
    assert {4, 10} <= {phase.start for phase in lay_out(plan, 4).all} or name == "given"
    for index, point in enumerate((4, 6, 10, 20)):

        def die(self, *args, point=point):
            if self.trainer.update == point:
                raise Interrupt
            return real(self, *args)

        with monkeypatch.context() as patch, pytest.raises(Interrupt):
            patch.setattr(Run, "train_until", die)
            run(tmp_path / "killed", plan, resume=index > 0, save_every=2)
    again = run(tmp_path / "killed", plan, resume=True)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    assert again.rounds == whole.rounds and again.training_macs == whole.training_macs
    rows = [[(row.update, row.train_loss, row.val_top1) for row in each.history] for each in (whole, again)]
    assert rows[0] == rows[1]


def test_a_given_net_is_asked_in_eval_mode_and_left_alone(tmp_path):
    plan, seen = plan_of("given"), []
    net = wise().train()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    net.register_forward_pre_hook(
        lambda module, args: seen.append((module.training, args[0].device.type, len(args[0])))
    )
    result = run(tmp_path / "run", plan, teachers={1: net})
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert [module.training for module in net.modules()] == modes and all(p.requires_grad for p in net.parameters())
    asked = [mode for mode, device, number in seen if device == "cpu" and number == BATCH]
    assert asked == [False] * result.phases.spans[0].lessons.number == [False] * 7
    assert list(result.model.state_dict()) == list(small(outputs=4).state_dict())


def test_a_run_goes_on_with_the_same_given_net_only(tmp_path):
    feed = Feed.make()
    feed.train.fail_at = 9
    with pytest.raises(Interrupt):
        run(tmp_path, plan_of("given"), feed)
    other = wise()
    other.head.bias.data += 1e-3
    with pytest.raises(RunError, match="teachers"):
        run(tmp_path, plan_of("given"), Feed.make(), teachers={1: other}, resume=True)


@pytest.mark.parametrize("most", [1 << 30, 0], ids=["in memory", "in a file"])
def test_answers_that_are_used_again_are_those_to_the_same_views(tmp_path, monkeypatch, most):
    """An independent way: each view made again, and the net run on it again."""
    monkeypatch.setattr(distil, "MOST_IN_MEMORY", most)
    net, batches, asked = wise().eval(), Feed.make(augment=Augment(crop=1)).train, []
    teacher = TeacherNet(copy.deepcopy(net), 0.5, 3.0, repeat=(2, 5), path=tmp_path / "answers.bin")
    teacher.model.register_forward_pre_hook(lambda *_: asked.append(1))
    for update in range(2, 17):
        question = teacher.question(update)
        assert question == 2 + (update - 2) % 5
        with torch.no_grad():
            expected = net(batches.batch(question)[0])
        assert torch.equal(teacher.answer(question, batches.batch(question)[0]), expected)
    assert len(asked) == 5 and not list(tmp_path.iterdir())
    tables = {answer.untyped_storage().nbytes() for answer in teacher._answers.values()}
    assert tables == ({BATCH * 4 * 4} if most else {5 * BATCH * 4 * 4})


def test_a_disk_that_is_too_full_for_the_answers_is_told_of_before(tmp_path, monkeypatch):
    monkeypatch.setattr(distil, "MOST_IN_MEMORY", 0)
    teacher = TeacherNet(wise().eval(), 0.5, 3.0, repeat=(0, 1 << 50), path=tmp_path / "answers.bin")
    with pytest.raises(RunError, match="bytes are needed for the teacher's answers"):
        teacher.answer(0, torch.zeros(2, *SIZE))


NAMED = {"plain_name": "reducenet20", "plain_kwargs": {"width": 0.25, "num_classes": 4, "depths": (1, 1, 1)}}


def test_wider_is_the_runs_net_at_another_width():
    own = timm.create_model(NAMED["plain_name"], **NAMED["plain_kwargs"])
    for kwargs, times in (({}, 2), ({"width": 3}, 3)):
        plan = gs.CyclePlan(rounds=(gs.Round(epochs=9, branch=(), teacher=Teacher("wider", share=0.1, kwargs=kwargs)),))
        state = torch.get_rng_state()
        net = teacher_nets(plan, Feed.make(), NAMED)[1]
        assert torch.equal(torch.get_rng_state(), state)
        again = teacher_nets(plan, Feed.make(), NAMED)[1]
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
        shapes = zip(own.parameters(), net.parameters(), strict=True)
        assert all(len(b) == len(a) * times for a, b in list(shapes)[:-2])


def test_weights_from_a_file_see_images_as_they_were_trained_on(tmp_path):
    """A timm checkpoint without metadata expects its model's own normalisation; the feed's is another."""
    net, feed = timm.create_model("reducenet20", width=0.125, num_classes=4).eval(), Feed.make()
    save_file(net.state_dict(), tmp_path / "x.safetensors")
    teacher = Teacher("reducenet20", kwargs={"width": 0.125, "checkpoint_path": str(tmp_path / "x.safetensors")})
    plan = gs.CyclePlan(rounds=(gs.Round(epochs=9, branch=(), teacher=teacher),))
    adapted = teacher_nets(plan, feed, {})[1].eval()
    raw = torch.rand(3, *SIZE)
    ours, own = (
        (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for mean, std in ((feed.mean, feed.std), (net.pretrained_cfg["mean"], net.pretrained_cfg["std"]))
    )
    assert not torch.allclose(ours, own)
    torch.testing.assert_close(adapted(ours), net(own))


def test_a_run_teaches_by_its_folder_and_its_classes_have_to_be_the_same(tmp_path):
    plain = gs.CyclePlan(rounds=(), base_epochs=1)
    net = timm.create_model("reducenet20", **NAMED["plain_kwargs"])
    about = {"model": {"name": NAMED["plain_name"], "kwargs": NAMED["plain_kwargs"], **NAMED}}
    result = gs.run_cycle(net, Feed.make(), plain, out_dir=tmp_path / "run", config=CONFIG, about=about)
    plan = gs.CyclePlan(rounds=(gs.Round(epochs=9, branch=(), teacher=Teacher(str(tmp_path / "run"))),))
    found = teacher_nets(plan, Feed.make(), {})[1].eval()
    images = torch.randn(5, *SIZE)
    assert torch.equal(found(images), result.model.eval()(images))
    feed = Feed.make()
    object.__setattr__(feed, "classes", tuple("wxyz"))
    with pytest.raises(PlanError, match="the teacher of round 1, .*: was trained on other classes"):
        teacher_nets(plan, feed, {})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"of": "peaks"}, "of='peaks': no such teacher; did you mean peak"),
        ({"of": "peak", "share": 0.1}, "share=0.1.*teacher 'peak' has none"),
        ({"of": "previous", "kwargs": {"width": 2}}, "teacher 'previous' has none"),
        ({"of": "reducenet20"}, "share=0: teacher 'reducenet20' would not be trained"),
        ({"of": "wider"}, "share=0: teacher 'wider'"),
        ({"of": "given", "share": 1.0}, "share=1.0"),
    ],
    ids=str,
)
def test_teachers_that_cannot_be_are_refused(values, words):
    with pytest.raises(PlanError, match=words):
        Teacher(**values)


@pytest.mark.parametrize(
    ("teacher", "nets", "words"),
    [
        (Teacher("given"), {1: lambda: wise(outputs=5)}, "the teacher of round 1, given: .*has 4 classes"),
        (Teacher("given"), {1: lambda: wise(channels=1)}, "the teacher of round 1, given: .*1 channels"),
        (Teacher("given"), {}, "no net was handed to run_cycle"),
        (Teacher("given"), {2: wise}, "no other net teaches in round 2"),
        (Teacher("wider", share=0.1), {}, "not known how to make the run's net"),
        (Teacher("reducenet20", share=0.1, kwargs={"widht": 2}), {}, "reducenet20 with .*widht"),
        (Teacher("reducenet20", share=0.1, kwargs={"num_classes": 9}), {}, "has 4 classes"),
    ],
    ids=range(7),
)
def test_a_net_that_cannot_teach_is_refused_in_one_line(tmp_path, teacher, nets, words):
    plan = gs.CyclePlan(rounds=(gs.Round(epochs=6, branch=(), teacher=teacher),))
    with pytest.raises(PlanError, match=words) as refused:
        run(tmp_path / "run", plan, teachers={number: make() for number, make in nets.items()})
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("teacher", [None, Teacher("peak"), Teacher("previous")])
def test_a_round_without_branches_needs_another_net(teacher):
    with pytest.raises(PlanError, match=r"branch=\(\): must be"):
        gs.Round(epochs=1, branch=(), teacher=teacher)
    with pytest.raises(PlanError, match=r"branch=\(\) in round 1: a net that is built grown"):
        gs.cycle.run.rehearse(small(built_grown=True, outputs=4), plan_of("given"), SIZE)
