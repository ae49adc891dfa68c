"""TrainerGrowth in transformers' real Trainer, and a loop of Accelerate's (extra transformers)."""

import warnings

import pytest
import torch
from torch import nn

import growshrink as gs
from growshrink.layers.grown import grown_modules
from nets import ConvNet, images

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    from growshrink.integrations.huggingface import TrainerGrowth

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = (3, 16, 16)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.lams = ConvNet(), []

    def forward(self, pixels, labels):
        self.lams.append([round(lam, 4) for lam in set(gs.get_lambda(self.net).values())])
        logits = self.net(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"pixels": images(*SIZE, n=8)[index], "labels": torch.arange(8)[index]}


def fit(folder, epoch, stop=None, resume=None, **kwargs):
    lam = gs.schedules.hold_then_vanish(hold=1, vanish=2)
    growth = TrainerGrowth("bottleneck", schedule=lam, epoch=epoch, net="net", input_size=SIZE, **kwargs)

    class Stop(transformers.TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            control.should_save = True
            control.should_training_stop = state.epoch == stop

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=4, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="epoch", logging_strategy="no", lr_scheduler_type="constant",
        learning_rate=0.01,
    )  # fmt: skip
    trainer = transformers.Trainer(model=Model(), args=arguments, train_dataset=Rows(), callbacks=[growth, Stop()])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("epoch", [0, 1])
def test_grow_vanish_and_fuse(tmp_path, epoch):
    whole = fit(tmp_path / "whole", epoch)
    assert whole.model.lams == ([[]] * 2 * epoch + [[1.0], [1.0], [0.5], *[[0.0]] * 8])[:8]
    assert not grown_modules(whole.model.net)
    assert sum(len(g["params"]) for g in whole.optimizer.param_groups) == 6
    ConvNet().load_state_dict(whole.model.net.state_dict(), strict=True)


def test_resume(tmp_path):
    whole, half = fit(tmp_path / "whole", 0), fit(tmp_path / "half", 0, stop=1, fuse_at_end=False)
    assert grown_modules(half.model.net) and half.model.lams == [[1.0], [1.0]]
    resumed = fit(tmp_path / "half", 0, resume=str(tmp_path / "half" / "checkpoint-2"))
    assert resumed.model.lams == whole.model.lams[2:]
    for key, value in whole.model.net.state_dict().items():
        assert torch.allclose(resumed.model.net.state_dict()[key], value, atol=1e-4), key


def test_a_loop_of_accelerates():
    accelerator, net = accelerate.Accelerator(cpu=True), ConvNet()
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.01))
    gs.grow(net, inplace=True, input_size=SIZE)
    assert len(gs.sync_optimizer(optimizer, net).added) == 6
    scheduler = gs.LambdaScheduler(net, gs.schedules.hold_then_vanish(hold=1, vanish=2))
    before = [p.detach().clone() for p in gs.branch_parameters(net)]
    for _ in range(4):
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(net(images(*SIZE, n=8)), torch.arange(8)))
        optimizer.step()
        scheduler.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, gs.branch_parameters(net), strict=True))
    gs.fuse(net, inplace=True, input_size=SIZE)
    assert gs.sync_optimizer(optimizer, net).removed == 6
