"""run_cycle with a loss of the caller's: an autoencoder with two outputs, grown, undone, killed and resumed."""

import json

import pytest
import torch
from small import CONFIG, Feed, Interrupt, shorten_settle, small, two_rounds
from torch import nn

import growshrink as gs
from growshrink.cycle import Fuse, NetAug, Teacher
from growshrink.errors import PlanError
from growshrink.training import TrainConfig, evaluate


class Coder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        code = self.bn(self.conv(x)).relu()
        return {"image": self.out(code), "code": code}


def reconstruction(model, batch):
    found = model(batch[0])
    return (found["image"] - batch[0]).square().mean() + 1e-3 * found["code"].abs().mean()


def run(path, plan, **kwargs):
    feed = Feed.make()
    feed.train.fail_at = kwargs.pop("fail_at", None)
    return gs.run_cycle(Coder(), feed, plan, out_dir=path, config=CONFIG, loss=reconstruction, **kwargs)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    shorten_settle(monkeypatch)


def test_a_net_that_is_no_classifier(tmp_path, monkeypatch):
    plan = two_rounds((("bottleneck",),), exit=Fuse(accept_within=0.0))
    result = run(tmp_path / "whole", plan)
    assert result.final.loss == -result.final.top1 == evaluate(result.model, Feed.make().test, reconstruction).loss
    with torch.no_grad():
        by_hand = [(float(reconstruction(result.model.eval(), batch)), len(batch[0])) for batch in Feed.make().test]
    assert result.final.loss == pytest.approx(sum(a * n for a, n in by_hand) / sum(n for _, n in by_hand))
    assert -result.history[-1].val_top1 == result.history[-1].val_loss < 0.8 * result.history[0].val_loss
    for entry in result.rounds:
        assert entry.max_rel < 1e-10 and entry.undone == (entry.top1.fused < entry.top1.before)
    page = (tmp_path / "whole" / "report.md").read_text()
    assert f"**Test loss {result.final.loss:.6g}**" in page and "Minus the loss" in page and "Top-1" not in page
    Coder().load_state_dict(result.model.state_dict(), strict=True)
    monkeypatch.setattr("growshrink.cycle.report.draw_curves", lambda result: False)
    with pytest.raises(Interrupt):
        run(tmp_path / "again", plan, fail_at=20)
    again = run(tmp_path / "again", plan, resume=True)
    for key, value in result.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    assert json.loads((tmp_path / "again" / "run.json").read_text())["loss"] == "reconstruction"


@pytest.mark.parametrize(
    ("plan", "config", "words"),
    [
        ({"teacher": Teacher("peak")}, {}, "teacher: not with loss="),
        ({"widths": NetAug("netaug")}, {}, "widths: not with loss="),
        ({}, {"label_smoothing": 0.1}, "label_smoothing: not with loss="),
        ({}, {"metric": "macro_f1"}, "metric: not with loss="),
    ],
)
def test_what_has_a_loss_of_its_own_is_refused(tmp_path, plan, config, words):
    with pytest.raises(PlanError, match=words):
        gs.run_cycle(
            small(outputs=4), Feed.make(), two_rounds(**plan), out_dir=tmp_path, config=TrainConfig(**config),
            loss=lambda model, batch: model(batch[0]).mean(),
        )  # fmt: skip
