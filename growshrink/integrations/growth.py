"""What callbacks have in common: grow at an epoch, lam by the update, fuse at the end."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from growshrink.layers.grown import grown_modules
from growshrink.schedules.functions import Schedule
from growshrink.training import LambdaScheduler, sync_optimizer
from growshrink.transforms import fuse, grow


class Growth:
    """A net that grows, vanishes and is fused while another library's loop trains it, in place.

    Args:
        branch: As for `growshrink.grow`.
        schedule: lam by the updates since the growth; it must end at 0 before training does, for the fuse.
        epoch: Grow before this epoch; the first is 0.
        net: Dotted name of the net in what the loop trains; "" is all of it.
        ema: Returns the average of the net's weights, which grows and is fused too and has its lam; this callback then
            comes behind the one that averages. None: there is no average.
        fuse_at_end: Fuse when training ends; otherwise branches stay.
        options: More arguments of `growshrink.grow`.
    """

    def __init__(
        self,
        branch: Any = "bottleneck",
        *,
        schedule: Schedule,
        epoch: int = 0,
        net: str = "",
        ema: Callable[[], nn.Module] | None = None,
        fuse_at_end: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.branch, self.schedule, self.epoch, self.net, self.ema = branch, schedule, epoch, net, ema
        self.fuse_at_end, self.options = fuse_at_end, options
        self.start: int | None = None  # updates before the growth
        self.scheduler: LambdaScheduler | None = None

    def watch(self, module: nn.Module) -> None:
        """Grow, too, when the weights of a grown net are loaded: a run is resumed."""

        def before_load(net: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
            branches = [key.removeprefix(prefix).split(".branches.")[0] for key in state if ".branches." in key]
            if branches and not grown_modules(net):
                grow(net, self.branch, **{**self.options, "where": list(dict.fromkeys(branches))}, inplace=True)

        module.get_submodule(self.net).register_load_state_dict_pre_hook(before_load)

    def begin_epoch(self, epoch: int, updates: int, module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Grow if it is time, and set lam."""
        if epoch < self.epoch or self.scheduler is not None:
            return
        net, average = module.get_submodule(self.net), None if self.ema is None else self.ema()
        self.start = updates if self.start is None else self.start
        for one in (net, average):
            if one is not None and not grown_modules(one):
                grow(one, self.branch, **self.options, inplace=True)
        for optimizer in optimizers:
            sync_optimizer(optimizer, net)
        self.scheduler = LambdaScheduler(net, self.schedule, ema=average)
        self.end_update(updates)

    def end_update(self, updates: int) -> None:
        """Set lam for the next update."""
        if self.scheduler is not None and self.start is not None:
            self.scheduler.step(updates - self.start)

    def end(self, optimizers: Iterable[Optimizer]) -> None:
        """Fuse the net, and its average."""
        if self.scheduler is None or not self.fuse_at_end:
            return
        for net in self.scheduler.nets:
            fuse(net, inplace=True, input_size=self.options.get("input_size"))
        for optimizer in optimizers:
            sync_optimizer(optimizer, self.scheduler.nets[0])
