"""What slim nets cost in time: a net routed at half of the MACs over the full net, beside masks; a training step.

    python tools/slim_speed.py                              reducenet20 on 32x32 images, some minutes on one core
    python tools/slim_speed.py --batches 128 --turns 10

All variants take turns (growshrink.base.timing); the time is the one in which the thread had a core. The gate is run,
and then overruled, so that the images of a batch take the narrowest and the widest choice in the shares that make the
mean MACs, gate included, a half. Masks: every image runs the full width, and is multiplied by 0 beyond its own.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.algebra.dataflow import inputs_for
from growshrink.base.copying import copy_net
from growshrink.base.timing import interleaved_timings, machine
from growshrink.cli.forms import pick
from growshrink.cli.options import ModelOptions, TimingOptions
from growshrink.cli.program import run_program
from growshrink.errors import PlanError
from inputs import BatchSizes

MACS = 0.5


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of slim_speed."""

    after: str = "stages.0"
    """Where the gate is."""
    model: ModelOptions = ModelOptions(model="reducenet20")
    sizes: BatchSizes = BatchSizes()
    timing: TimingOptions = pick(TimingOptions(turns=30), "turns")


class Overruled(nn.Module):
    """A gate that is run, and whose answer is replaced: the widest for the first `share` of a batch."""

    def __init__(self, gate: nn.Module, share: float) -> None:
        super().__init__()
        self.gate, self.share = gate, share

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the choices."""
        logits = self.gate(x)
        wide = torch.arange(len(x)) < round(self.share * len(x))
        return F.one_hot(wide * (logits.shape[1] - 1), logits.shape[1]) + 0.0 * logits


def main(args: Args) -> None:
    """Measure and print."""
    if not args.timing.turns:
        raise PlanError("--turns 0: must be at least 1.")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plain, _ = args.model.create(num_classes=10)
    size = inputs_for(plain).size
    assert size is not None
    slim = gs.slim(plain, input_size=size)
    routed = gs.route(slim, gs.width_space(slim), after=args.after, input_size=size).eval()
    narrow, wide = routed.costs[0][0] + routed.fixed, routed.costs[0][-1] + routed.fixed
    share = min(1.0, max(0.0, (MACS - narrow) / (wide - narrow)))
    routed.gates[0] = Overruled(routed.gates[0], share)
    about = machine()
    print(
        f"{args.model.name} after {args.after}: {share:.2f} of the images at full width, others at {narrow:.3f} of its"
    )
    print(f"MACs: {narrow + share * (wide - narrow):.3f} in the mean. {about['processor']}, one thread.")
    print(f"{'batch':>5s} {'full ms':>9s} {'routed':>7s} {'masks':>7s} {'slim at full width':>19s}")
    for batch in args.sizes.batches:
        x = torch.randn(batch, *size)
        nets = {"full": plain.eval(), "routed": routed, "masks": masked(plain, share, args.after), "slim": slim.eval()}
        calls = {name: partial(net, x) for name, net in nets.items()}
        with torch.no_grad():
            times = interleaved_timings(calls, rounds=args.timing.turns, own_thread=True)
        full = times["full"]
        print(f"{batch:5d} {full:9.2f} " + " ".join(f"{times[n] / full:{w}.3f}" for n, w in
                                                   (("routed", 7), ("masks", 7), ("slim", 19))))  # fmt: skip
    x, target = torch.randn(64, *size), torch.randint(10, (64,))
    steps = {name: partial(step, net.train(), x, target) for name, net in (("plain", plain), ("slim", slim))}
    times = interleaved_timings(steps, rounds=args.timing.turns, own_thread=True)
    print(f"training step at full width, batch 64: {times['slim'] / times['plain']:.3f} of the plain net's")


def masked(plain: nn.Module, share: float, after: str) -> nn.Module:
    """A copy of the full net whose norms behind the gate's place are followed by a mask for each image."""
    net = copy_net(plain).eval()

    def mask(module: nn.Module, args: object, out: Tensor) -> Tensor:
        keep = torch.ones(len(out), out.shape[1], 1, 1)
        keep[round(share * len(out)) :, out.shape[1] // 4 :] = 0.0
        return out * keep

    names = [name for name, _ in net.named_modules()]
    last = max(number for number, name in enumerate(names) if f"{name}.".startswith(f"{after}."))
    for name in names[last + 1 :]:
        if isinstance(module := net.get_submodule(name), nn.BatchNorm2d):
            module.register_forward_hook(mask)
    return net


def step(net: nn.Module, x: Tensor, target: Tensor) -> None:
    """Forward and backward."""
    net.zero_grad()
    F.cross_entropy(net(x), target).backward()


if __name__ == "__main__":
    run_program(main, Args, __doc__)
