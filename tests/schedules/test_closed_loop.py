import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed, multiprocessing

from growshrink.errors import PlanError
from growshrink.layers.activations import get_lambda
from growshrink.schedules.closed_loop import ClosedLoop
from growshrink.training import TrainConfig, Trainer
from nets import Batches, net


def follow(loop, signals, start=0):
    values = []
    for update, signal in enumerate(signals, start):
        values.append(loop(update))
        loop.observe(signal)
    return values


def test_a_quiet_signal_lets_it_fall_in_time():
    values = follow(ClosedLoop(100, hold=10, fall=20, every=1), [1.0] * 120)
    assert values[:11] == [1.0] * 11
    assert values[11] == pytest.approx(0.95) and values[20] == pytest.approx(0.5)
    assert max(values[31:]) == 0.0 or values[31] < 1e-12 and values[32] == 0.0


def test_it_waits_while_the_signal_is_too_high_and_goes_on_afterwards():
    loop = ClosedLoop(1000, fall=100, tolerance=0.1, smoothing=0.0, every=1)
    values = follow(loop, [1.0] * 20 + [1.2] * 30 + [1.05] * 20)
    assert values[20] == pytest.approx(0.8)
    assert len(set(values[20:51])) == 1
    assert values[51] < values[50] and values[69] == pytest.approx(0.61)


def test_the_smoothed_signal_counts_not_a_single_one():
    smooth = ClosedLoop(1000, fall=100, tolerance=0.1, smoothing=0.9, every=1)
    values = follow(smooth, [1.0, 1.5, *[1.0] * 8])
    assert values[2] == values[1] - 0.01  # 1.05 smoothed
    assert follow(ClosedLoop(1000, fall=100, tolerance=0.1, smoothing=0.0, every=1), [1.0, 1.5, 1.0])[2] == 0.99


def test_a_falling_signal_moves_the_reference_along():
    loop = ClosedLoop(1000, fall=100, tolerance=0.1, smoothing=0.0, every=1)
    values = follow(loop, [2.0, 1.0, 1.5, 1.5])
    assert values[2] == pytest.approx(0.98) and values[3] == values[2]


@given(
    signals=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=60),
    hold=st.integers(0, 10),
    length=st.integers(1, 60),
    fall=st.integers(1, 50),
    every=st.integers(1, 7),
)
def test_it_never_rises_and_is_0_at_the_deadline_whatever_it_hears(signals, hold, length, fall, every):
    deadline = hold + length
    loop = ClosedLoop(deadline, hold=hold, fall=fall, every=every)
    values = follow(loop, (signals * (deadline // len(signals) + 4))[: deadline + 3])
    assert values[: hold + 1] == [1.0] * (hold + 1)
    assert all(0.0 <= b <= a for a, b in zip(values, values[1:], strict=False))
    assert values[deadline:] == [0.0] * 3


def test_a_signal_that_only_objects_leaves_the_steep_line():
    values = follow(ClosedLoop(100, final=0.1, every=1, smoothing=0.0), [1.0 + i for i in range(110)])
    assert values[1] < 1.0 and values[90] == values[2]  # the first observation cannot be too high
    assert values[95] == pytest.approx(0.5) and values[100] == 0.0


def test_asking_again_changes_nothing():
    loop = ClosedLoop(10, fall=5, every=1)
    follow(loop, [1.0] * 4)
    assert [loop(3), loop(2), loop(3), loop(0)] == [loop(3)] * 4


@pytest.mark.parametrize("cut", [7, 20, 33])
def test_resumed_it_goes_on_as_if_nothing_had_been(cut):
    signals = [1 + 0.3 * math.sin(i / 3) for i in range(60)]
    uninterrupted = ClosedLoop(50, hold=5, every=4)
    whole = follow(uninterrupted, signals)
    first = ClosedLoop(50, hold=5, every=4)
    values = follow(first, signals[:cut])
    second = ClosedLoop(50, hold=5, every=4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert values + follow(second, signals[cut:], start=cut) == whole
    assert second.state_dict() == uninterrupted.state_dict()
    assert len(set(whole)) > 10


@pytest.mark.parametrize(
    "kwargs",
    [
        {"deadline": 0},
        {"deadline": 5, "hold": 5},
        {"deadline": 5, "hold": -1},
        {"deadline": 5, "fall": 0},
        {"deadline": 5, "every": 0},
        {"deadline": 5, "tolerance": -0.1},
        {"deadline": 5, "tolerance": math.nan},
        {"deadline": 5, "smoothing": 1.0},
        {"deadline": 5, "final": 0.0},
    ],
)
def test_bad_arguments(kwargs):
    with pytest.raises(PlanError):
        ClosedLoop(**kwargs)


def test_a_trainer_drives_it():
    model = net("reducenet20_x1", width=0.1)
    trainer = Trainer(model, TrainConfig(lr=0.01, ema_decay=0.5), Batches())
    loop = ClosedLoop(8, fall=4, every=2, tolerance=10.0)
    seen = []

    def on_loss(loss):
        seen.append(float(loss))
        loop.observe(loss)

    mean = trainer.train(3, learning_rate=lambda update: 1.0, lam=loop, on_loss=on_loss)
    assert len(seen) == 3 and float(mean) == pytest.approx(sum(seen) / 3)
    assert set(get_lambda(model).values()) == set(get_lambda(trainer.ema).values()) == {0.5}
    trainer.train(9, learning_rate=lambda update: 1.0, lam=loop, on_loss=on_loss)
    assert set(get_lambda(model).values()) == set(get_lambda(trainer.ema).values()) == {0.0}


def rank_of_two(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loop = ClosedLoop(100, fall=10, tolerance=0.1, smoothing=0.0, every=2)
    # Alone, rank 0 would never wait and rank 1 always; the mean rises by 0.5 at update 4 and comes back at update 8.
    own = [1.0] * 12 if rank == 0 else [1.0] * 4 + [2.0] * 4 + [1.0] * 4
    (folder / f"{rank}.json").write_text(json.dumps(follow(loop, map(torch.tensor, own))))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_ranks_agree(tmp_path):
    # Forked: to import torch and timm again in two processes takes longer than all other tests here together.
    multiprocessing.start_processes(rank_of_two, args=(tmp_path,), nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first[5] == first[9] < first[4] and first[11] < first[10] < first[9]
