"""A training that is stopped and continued is the same, bit for bit."""

import copy
import os
import signal
from pathlib import Path

import pytest
import supernets as small
import torch

from growshrink.base.stopping import Stopped, handled
from growshrink.runs.checkpoints import find_checkpoints
from growshrink.schedules import ClosedLoop
from growshrink.training import TrainConfig
from nets import Batches, net
from program import beside

keeping = beside(Path(__file__).parents[2] / "recipes" / "keeping.py")
Results = beside(Path(__file__).parents[2] / "recipes" / "results.py").Results
trained = beside(Path(__file__).parents[2] / "recipes" / "trained.py")
fit, train_supernet = trained.fit, trained.train_supernet
CONFIG = TrainConfig(lr=0.01, ema_decay=0.5)


def by_fit(train, after):
    """A grown net whose lam depends on the losses so far, averaged; its lam, and its weights."""
    torch.manual_seed(1)
    loop = Listened(8, after)
    model = net("reducenet20_x1", width=0.1)
    found = fit(model, Batches(), CONFIG, updates=10, lam=loop, train=train)
    return {**found.state_dict(), "lam": torch.tensor(loop.state_dict()["lam"])}


class Listened(ClosedLoop):
    """A closed loop that looks often, and calls `after` with the number of the loss."""

    def __init__(self, deadline, after):
        super().__init__(deadline, every=1, tolerance=0.0)
        self.count, self.after = 0, after

    def observe(self, signal):
        super().observe(signal)
        self.count += 1
        self.after(self.count)


@pytest.fixture(scope="module")
def supernet():
    feed = small.digits()
    return feed, small.supernet(feed, epochs=0.0)[0]


def by_train_supernet(train, after, supernet):
    feed, init = supernet
    model, count = copy.deepcopy(init), iter(range(1, 100))
    train_supernet(
        model, feed, epochs=0.5, config=CONFIG, train=train, after_update=lambda *ns: ns or after(next(count))
    )
    return model.state_dict()


@pytest.mark.parametrize("how", [by_fit, by_train_supernet])
def test_stopped_killed_and_continued(tmp_path, monkeypatch, request, how):
    more = [request.getfixturevalue("supernet")] if how is by_train_supernet else []
    expected = how(keeping.Trainer.train, lambda number: None, *more)
    with Results(tmp_path / "run", {"what": "test"}) as results:
        kept, folder = results.kept("net"), results.path / "net.training"
        with handled(), pytest.raises(Stopped):
            how(kept, lambda number: number == 3 and os.kill(os.getpid(), signal.SIGTERM), *more)
        assert len(find_checkpoints(folder)) == 1
        monkeypatch.setattr(keeping, "CHECKPOINT_EVERY", -1.0)  # a checkpoint after every update

        def die(number):
            if number == 3:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            how(kept, die, *more)
        found = how(kept, lambda number: None, *more)
        assert not folder.exists()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
