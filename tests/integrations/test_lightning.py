"""LightningGrowth in the real Trainer (extra lightning)."""

import copy
import warnings

import pytest
import torch
from torch import nn

import growshrink as gs
from growshrink.layers.grown import grown_modules
from nets import ConvNet, images

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    L = pytest.importorskip("lightning")
    from growshrink.integrations.lightning import LightningGrowth

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = (3, 16, 16)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.lams, self.params = ConvNet(), [], []

    def training_step(self, batch, index):
        self.lams.append([round(lam, 4) for lam in set(gs.get_lambda(self.net).values())])
        self.params.append(sum(len(g["params"]) for o in self.trainer.optimizers for g in o.param_groups))
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def fit(folder, epochs, callbacks, module=None, **kwargs):
    data = torch.utils.data.TensorDataset(images(*SIZE, n=8), torch.arange(8))
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=callbacks, enable_checkpointing=False, deterministic=True,
    )  # fmt: skip
    module = module or Module()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4), **kwargs)
    return trainer, module


def growth(**kwargs):
    lam = gs.schedules.hold_then_vanish(hold=1, vanish=2)
    return LightningGrowth("bottleneck", schedule=lam, epoch=1, net="net", input_size=SIZE, **kwargs)


def test_grow_vanish_fuse_and_resume(tmp_path):
    trainer, module = fit(tmp_path, 4, [growth()])
    assert module.lams == [[], [], [1.0], [1.0], [0.5], [0.0], [0.0], [0.0]]
    assert module.params == [6, 6] + [12] * 6  # the branches train
    assert not grown_modules(module.net) and len(trainer.optimizers[0].param_groups[0]["params"]) == 6
    ConvNet().load_state_dict(module.net.state_dict(), strict=True)

    half, grown = fit(tmp_path, 2, [growth(fuse_at_end=False)])
    assert grown_modules(grown.net)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(tmp_path, 4, [growth()], ckpt_path=tmp_path / "half.ckpt")
    assert resumed.lams == module.lams[4:]
    for key, value in module.net.state_dict().items():
        assert torch.allclose(resumed.net.state_dict()[key], value, atol=1e-5), key


def test_an_average_grows_with_the_net_and_has_its_lam(tmp_path):
    module, seen = Module(), []
    ema = copy.deepcopy(module.net)

    class Average(L.Callback):
        def on_train_batch_end(self, *_):
            with torch.no_grad():
                for mine, other in zip(ema.state_dict().values(), module.net.state_dict().values(), strict=True):
                    mine.lerp_(other, 0.5) if mine.is_floating_point() else mine.copy_(other)

    class Look(L.Callback):
        def on_train_batch_end(self, *_):
            seen.append(gs.get_lambda(ema) == gs.get_lambda(module.net))

    fit(tmp_path, 4, [Average(), growth(ema=lambda: ema), Look()], module)
    assert all(seen) and len(seen) == 8 and not grown_modules(ema)
    ConvNet().load_state_dict(ema.state_dict(), strict=True)
