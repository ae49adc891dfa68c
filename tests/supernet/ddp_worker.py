"""One rank of tests/supernet/test_ddp.py: python ddp_worker.py OUT CASE,CASE,... FIRST_UPDATE STOP."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import growshrink as gs
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.grown import GrownConv2d
from nets import ConvNet, net, randomized

SIZE = (3, 8, 8)
BATCH = 4
CASES = {
    "x4": {"net": "x4", "mode": "netaug", "how": "backward"},
    "suffix": {"net": "grown", "mode": "suffix", "how": "backward", "micro": 2},
    "suffix-forward": {"net": "x4", "mode": "suffix", "how": "forward"},
    "sandwich": {"net": "grown", "mode": "sandwich", "how": "backward"},
    "skipped": {"net": "grown", "mode": "lazy", "how": "forward", "every": 2},
    "accumulated": {"net": "nest", "mode": "netaug", "how": "forward", "micro": 3},
    "single": {"net": "nest", "mode": "single", "how": "backward"},
    "joint": {"net": "x4", "mode": "netaug", "how": "backward", "frozen": True, "micro": 2},
}


def model_of(case):
    """In float64; the same on every rank."""
    torch.manual_seed(0)
    if case["net"] == "x4":
        model = randomized(net("reducenet20_x4"))
    elif case["net"] == "grown":  # base width 0: skipped branches
        model = randomized(
            gs.grow(net(), ["bottleneck", "insert"], where=r"stages\.\d\.1", init="paper", input_size=SIZE)
        )
    else:
        model = gs.grow(ConvNet(), "nest", init="paper", input_size=SIZE)
    if case.get("frozen"):  # norms of the running statistics: the batch is then the sum of its images
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda m, args: setattr(m, "training", False))
    assert any(isinstance(m, (GrownConv2d, PureBottleneck)) for m in model.modules())
    return model.double().train()


def task_of(model, case):
    return gs.NetAugTask(
        model,
        verbose=False,
        space=gs.width_space(model, divisor=1),
        mode=case["mode"],
        every=case.get("every"),
        input_size=SIZE,
        seed=7,
        lambda_schedule=gs.schedules.linear(1.0, 0.0, steps=4),
    )


def images_of(update, micro, rank):
    random = torch.Generator().manual_seed(1000 * update + 10 * micro + rank)
    return torch.randn(BATCH, *SIZE, generator=random, dtype=torch.float64), torch.randint(
        10, (BATCH,), generator=random
    )


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def train(task, optimizer, case, update, rank, log):
    optimizer.zero_grad()
    task.set_step(update)
    micro = case.get("micro", 1)
    passes = task.passes()
    log["widths"].append([list(w.values()) for w in (passes.width, *passes.augmented)] + [passes.start])
    for index in range(micro):
        x, target = images_of(update, index, rank)
        with task.no_sync() if index < micro - 1 else nullcontext():
            if case["how"] == "backward":
                task.backward(x, target, accumulation=micro)
            else:
                (task(x, target)["loss"] / micro).backward()
    log["grads"].append({n: p.grad.clone() for n, p in task.trainable_module.named_parameters() if p.grad is not None})
    optimizer.step()


def main():
    out, first, stop = Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])
    rank = int(os.environ["RANK"])  # as torchrun sets it
    dist.init_process_group("gloo", init_method=f"file://{out}/meet-{first}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name in sys.argv[2].split(","):
        case = CASES[name]
        model = model_of(case)
        optimizer = optimizer_of(model)
        task = task_of(model, case).attach(optimizer).prepare_distributed(device_ids=[torch.device("cpu")])
        if first:
            state = torch.load(out / f"{name}-{first}.pt")
            task.load_checkpoint_state(state["state_dict"], state["task_state"])
            optimizer.load_state_dict(state["optimizer"])
            assert task.update == first
        log = {"widths": [], "grads": []}
        for update in range(first, stop):
            train(task, optimizer, case, update, rank, log)
            if rank == 0 and update == stop - 2:
                state = {**task.get_checkpoint_state(), "optimizer": optimizer.state_dict()}
                torch.save(state, out / f"{name}-{stop - 1}.pt")
        torch.save({**log, "parameters": dict(model.named_parameters())}, out / f"{name}-from-{first}-rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
