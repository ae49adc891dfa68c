"""What test_ranks starts by torchrun, on two ranks: a run left alone, and one whose ranks are asked to stop and die."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from small import CONFIG, data, small, two_rounds

import growshrink as gs
from growshrink.base.ranks import all_gather, joined, num_ranks, this_rank
from growshrink.base.reading import read_json
from growshrink.base.stopping import Stopped, handled
from growshrink.cycle import Fuse, Teacher, layout, report
from growshrink.data.batches import Augment
from growshrink.data.feed import MemoryFeed
from growshrink.runs import checkpoints
from growshrink.training import Trainer

layout.LEAST_SETTLE = 2
report.draw_curves = lambda result: False
FOLDER = Path(sys.argv[1])
LIFE = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
PLAN = two_rounds(teacher=Teacher("peak"), exit=Fuse(accept_within=0.0))


def feed(batch_size=4):
    return MemoryFeed.of(
        data(), batch_size=batch_size, augment=Augment(crop=1), rank=this_rank(), world_size=num_ranks()
    )


def run(name, batches, plan=PLAN, **kwargs):
    torch.manual_seed(5)
    net = small(dropout=0.3, outputs=4)
    return gs.run_cycle(net, batches, plan, out_dir=FOLDER / name, config=CONFIG, resume=True, **kwargs)


def at(update, do):
    """A feed that does something as soon as the batch of an update is asked for."""
    batches = feed()
    real = batches.train.batch

    def batch(asked):
        if asked == update:
            do()
        return real(asked)

    object.__setattr__(batches.train, "batch", batch)
    return batches


def state(net):
    return {key: value.tolist() for key, value in net.state_dict().items()}


def equals_one_process_with_all_the_images(maps=None):
    """Without norms and dropout, two ranks of 4 images are one of 8: how far they are apart after 6 updates."""
    config = gs.training.TrainConfig(lr=0.05, ema_decay=0.9, clip_grad=1.0 if maps is None else None)
    ours, whole = (small(norm=False, outputs=4) for _ in range(2))
    one = gs.schedules.constant(1.0)
    together = Trainer(ours, config, feed().train)
    together.map_gradients(maps)
    loss = together.train(6, learning_rate=one, lam=one)
    gs.training.trainer.average_update_, kept = lambda model, loss: None, gs.training.trainer.average_update_
    alone = Trainer(whole, config, MemoryFeed.of(data(), batch_size=8, augment=Augment(crop=1)).train)
    alone.map_gradients(maps)
    expected = alone.train(6, learning_rate=one, lam=one)
    gs.training.trainer.average_update_ = kept
    pairs = zip(together.best.parameters(), alone.best.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs), float((loss - expected).abs())


with joined("cpu"):
    if LIFE == 0:
        found = {"distance": equals_one_process_with_all_the_images(), "undisturbed": []}
        grown = gs.grow(small(outputs=4), gs.BranchSpec(kind="dbb", norm=None), init="paper", input_size=(3, 8, 8))
        maps = gs.compile_gradients(grown, input_size=(3, 8, 8))[1]
        found["distance, mapped"] = equals_one_process_with_all_the_images(maps)
        for source in (gs.cycle.FromBranches(search=0.25), gs.cycle.FromPixels(every=0.25)):
            mapped = run(source.kind, feed(), gs.CyclePlan(rounds=(), base_epochs=1, gradients=source))
            found[source.kind] = all_gather(state(mapped.model))
        result = run("undisturbed", feed(), save_every=3)
        found["undisturbed"] = all_gather(state(result.model))
        found["random"] = all_gather(torch.rand(3).tolist())
        try:  # one rank is asked to stop
            with handled():
                run("killed", at(5, lambda: this_rank() == 1 and os.kill(os.getpid(), signal.SIGTERM)), save_every=3)
        except Stopped as stopped:
            found["stopped"] = all_gather([stopped.exit_code, str(stopped).split(",")[0]])
        if this_rank() == 0:
            (FOLDER / "found.json").write_text(json.dumps(found))
        run("killed", at(19, lambda: this_rank() == 1 and os.kill(os.getpid(), signal.SIGKILL)), save_every=3)
    if LIFE == 1:
        real, writes = os.replace, []

        def replace(*args):
            writes.append(args)
            if len(writes) == 4:  # log.jsonl, and three checkpoints
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        checkpoints.os.replace = replace
    result = run("killed", feed(), save_every=3)
    if this_rank() == 0:
        found = read_json(FOLDER / "found.json")
        found |= {"killed": state(result.model), "lives": LIFE + 1, "random after": torch.rand(3).tolist()}
        (FOLDER / "found.json").write_text(json.dumps(found))
