"""NetAugTask as an object: its options, timm's hooks, copies of it."""

import copy
import math

import pytest
import timm.task
import torch
from timm.task import DistillationTeacher
from torch import nn

import growshrink as gs
from growshrink.errors import PlanError
from growshrink.schedules.functions import constant
from nets import Batches, net, randomized

SIZE = (3, 8, 8)
pytestmark = pytest.mark.filterwarnings("ignore:NetAugTask. weights")


def task_of(model=None, **options):
    model = net("reducenet20_x4") if model is None else model
    return gs.NetAugTask(model, **{"verbose": False, "input_size": SIZE, "mode": "netaug", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "netaugh"}, "mode='netaugh' .*no such mode; did you mean netaug"),
        ({"mode": None}, "mode=None .*must be text"),
        ({"reduction": "max"}, "reduction='max' .*no such choice; did you mean mean"),
        ({"every": 0}, "every=0 .*must be at least 1"),
        ({"every": 2.0}, "every=2.0"),
        ({"every": True}, "every=True"),
        ({"alpha": -0.1}, "alpha=-0.1 .*must be at least 0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"alpha": math.inf}, "alpha=inf"),
        ({"alpha": constant(-1.0)}, r"alpha=-1.0 at update 0"),
        ({"inplace_distil": 1.5}, r"inplace_distil=1.5 .*at least 0 and at most 1"),
        ({"inplace_distil": -1}, "inplace_distil=-1"),
        ({"inplace_temperature": 0}, "inplace_temperature=0 .*must be above 0"),
        ({"teacher_weight": math.nan}, r"teacher_weight=nan .*must be a finite number"),
        ({"teacher_temperature": -1.0}, "teacher_temperature=-1.0"),
    ],
)
def test_options_out_of_range(options, message):
    model = net("reducenet20_x4")
    width = gs.layers.get_width(model)
    with pytest.raises(PlanError, match=message):
        task_of(model, **options)
    assert gs.layers.get_width(model) == width  # it is as it was


def test_an_alpha_that_turns_negative_is_named_with_its_update():
    task = task_of(alpha=lambda update: 1.0 - update)
    task.set_step(2)
    with pytest.raises(PlanError, match="alpha=-1.0 at update 2"):
        task.backward(*Batches().batch(0))


def test_models_and_spaces_that_do_not_fit():
    with pytest.raises(gs.errors.WidthError, match=r"growshrink\.grow .*comes first"):
        task_of(net())
    other = gs.width_space(net("reducenet32_x4"))
    with pytest.raises(gs.errors.WidthError, match="another model"):
        task_of(space=other)


def test_it_is_a_task_of_timms():
    task = task_of(criterion_kwargs={"smoothing": 0.1})
    assert isinstance(task, timm.task.ClassificationTask) and task.mode == "netaug"
    assert task.get_trainable_module() is task.trainable_module is task.get_eval_model()
    assert not task.has_ema() and task.get_trainable_module(ema=True) is None
    assert len(list(task.get_clip_parameters())) == len(list(task.trainable_module.parameters()))
    assert isinstance(task.no_sync().__enter__(), type(None))
    names = [name for name, _ in task.named_parameters()]
    assert len(names) == len(set(names)) == len(list(task.trainable_module.parameters()))


def test_lam_of_the_average_is_copied():
    task = task_of(lambda_schedule=gs.schedules.linear(1.0, 0.0, steps=4))
    ema = task.setup_ema(decay=0.5).module
    for update in range(6):
        task.update_ema(step=update + 1)  # of the update that is done
        assert set(gs.get_lambda(ema).values()) == {max(0.0, 1 - update / 4)}
        assert set(gs.get_lambda(task.trainable_module).values()) == {max(0.0, 1 - (update + 1) / 4)}
    assert set(gs.get_lambda(ema).values()) == {0.0} and task.update == 6
    assert gs.layers.get_width(ema) == task.space.base


@pytest.mark.parametrize("mode", ["netaug", "suffix"])
def test_saved_and_loaded_it_goes_on_where_it_was(mode):
    def fresh():
        torch.manual_seed(0)
        model = randomized(net("reducenet20_x4")).double().train()
        task = task_of(
            model,
            mode=mode,
            lambda_schedule=gs.schedules.linear(1.0, 0.0, steps=6),
            space=gs.width_space(model, divisor=1),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return task.attach(optimizer), optimizer

    def train(task, optimizer, updates):
        for update in updates:
            optimizer.zero_grad()
            x, target = Batches().batch(update)
            task.backward(x.double(), target)
            optimizer.step()

    (whole, its), (first, stopped), (second, resumed) = fresh(), fresh(), fresh()
    train(whole, its, range(5))
    train(first, stopped, range(3))
    saved = copy.deepcopy((first.get_checkpoint_state(), stopped.state_dict()))
    assert saved[0]["task_state"] == {"update": 3}
    second.load_checkpoint_state(saved[0]["state_dict"], saved[0]["task_state"])
    resumed.load_state_dict(saved[1])
    assert second.update == 3 and second.passes() == first.passes() == whole.passes(3)
    train(second, resumed, range(3, 5))
    for a, b in zip(
        whole.trainable_module.state_dict().values(), second.trainable_module.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["netaug", "suffix"])
@pytest.mark.parametrize("attached", [False, True])
def test_a_copy_is_a_task_of_its_own(mode, attached):
    task = task_of(mode=mode)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    if attached:
        task.attach(optimizer)
    before = copy.deepcopy(task.trainable_module.state_dict())
    twin = copy.deepcopy(task)
    assert twin.passes(3) == task.passes(3)
    own = torch.optim.SGD(twin.trainable_module.parameters(), lr=0.1)
    twin.attach(own)
    x, target = Batches().batch(0)
    twin.backward(x, target)
    own.step()
    assert (twin.update, task.update) == (1, 0)
    for name, value in task.trainable_module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert any(not torch.equal(value, before[name]) for name, value in twin.trainable_module.state_dict().items())
    with pytest.warns(UserWarning, match="task.attach") if attached else pytest.warns():
        copied = copy.deepcopy(task)  # of an attached one: the optimizer stays with the original
        copied.backward(x, target)
    assert all(p.grad is None for p in task.trainable_module.parameters())


def test_train_leaves_the_teacher_in_eval_mode():
    teacher = net(seed=1)
    task = task_of(teacher=teacher).train()
    assert task.trainable_module.training and not teacher.training and not task.eval().trainable_module.training
    assert [n for n, _ in task.named_parameters() if n.startswith("teacher")]


def test_a_teacher_by_name(monkeypatch):
    asked = {}

    class Pretrained(DistillationTeacher):
        def __init__(self, name, **kwargs):
            asked.update(kwargs, name=name)
            super().__init__(net(seed=2))

    monkeypatch.setattr("growshrink.supernet.teacher.DistillationTeacher", Pretrained)
    task = task_of(teacher="resnet18", dtype=torch.float32)
    assert asked == {
        "name": "resnet18",
        "num_classes": 10,
        "in_chans": 3,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    assert torch.equal(task.teacher.mean.flatten(), torch.tensor(task.trainable_module.pretrained_cfg["mean"]))
    assert not any(name.startswith("_") for name in task.state_dict())


def test_channels_last_images_and_weights():
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = randomized(net("reducenet20_x4")).double().train().to(memory_format=memory_format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        task = task_of(model, space=gs.width_space(model, divisor=1)).attach(optimizer)
        for update in range(2):
            optimizer.zero_grad()
            x, target = Batches().batch(update)
            task.backward(x.double().contiguous(memory_format=memory_format), target)
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


class Loud(nn.Module):
    """A criterion with parameters and a soft target."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits, target):
        return -(target * logits.log_softmax(1)).sum(1).mean() * self.scale


def test_any_criterion():
    task = task_of(criterion=Loud()).train()
    x, _ = Batches().batch(0)
    target = torch.softmax(torch.randn(6, 10), 1)
    assert task.backward(x, target)["loss"].isfinite() and task.criterion.scale.grad is not None
