"""NetAugTask: one training step of a net inside the family of wider nets that share its weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from growshrink.algebra.dataflow import InputSize
from growshrink.base.limits import Count, NotNegative, OneOf, Positive, Share, checked
from growshrink.branches import Modulated, penalties
from growshrink.errors import PlanError, WidthError
from growshrink.layers.activations import set_lambda
from growshrink.layers.online import no_autocast
from growshrink.layers.regions import compile_regions
from growshrink.layers.slim import SkippableBlock
from growshrink.layers.widths import Slots, WidthSpace, width_space
from growshrink.schedules.functions import Schedule
from growshrink.supernet.chain import UnitChain
from growshrink.supernet.keeper import FrozenSlices
from growshrink.supernet.passes import EVERY, INPLACE_DISTIL, MODES, NUM_AUGMENTED, Passes, default_alpha
from growshrink.supernet.step import AnyForward, StepRun, Supernet, at_least_float32
from growshrink.supernet.teacher import OuterTeacher
from growshrink.training.distil import distillation_loss

Scaler = Any  # torch.amp.GradScaler, or anything with its `scale`


class NetAugTask(ClassificationTask):
    r"""Train a grown or slim net at its base width, and wider nets of its family beside it.

    .. math:: loss = L(base) + \alpha \cdot L(augmented)

    Every update draws its own augmented net from the width space. The base net is what is evaluated, averaged and
    deployed; the augmented passes leave its batch norm statistics bit for bit as they are (wider nets need
    `calibrate_bn`). Between steps the model is at base width. In any loop (as timm's train.py) the task returns one
    differentiable loss; attached to the optimizer (below) it runs pass by pass: half the memory, equal gradients.

    The update decides which widths are drawn: `set_step` tells it, or `update_ema` (which timm's train.py calls after
    every update), or the optimizer, once attached.

    Modes (`mode=`), and what an average step of reducenet20, grown 4 times, costs in plain ones (`tools/step_cost.py`):

    ``lazy`` (1.4)
        netaug in every 8th update only: with 8 times the weight it is the same gradient on average (see alpha).
    ``suffix`` (2.8)
        netaug, but only the blocks from a random one on are widened: what comes before is computed once for both.
    ``single`` (3.2)
        one random net in place of the base, which then needs `calibrate_bn`.
    ``netaug`` (4.2)
        base and one random net in every update (Cai et al., arXiv:2110.08890).
    ``sandwich`` (9.5)
        full net, a random one, base; the latter two learn from the full net (Yu and Huang, arXiv:1903.05134).
    ``levels``
        sandwich, but the random one is a level of the space: of a slim net, all its widths the same share.

    Args:
        model: A grown net, or one of `growshrink.slim`; it is set to base width.
        criterion: Loss of (logits, target); None makes timm's, from `criterion_kwargs`.
        criterion_kwargs, device, dtype, verbose: Those of timm's `ClassificationTask`.
        space: Widths to draw from; None is `width_space(model)`.
        every: Augmented passes in every `every`-th update only, weighted up by as much; None is 8 in `lazy`, else 1.
        alpha: Weight of an augmented pass, on average over updates, or a schedule of it by update (that of lam, say);
            where it is 0 the base net is trained alone. None is 1 / every: NetAug's own 1, and where passes are rarer
            no more weight for the one there is (weighted up, it drowns the base's).
        reduction: "sum", or "mean": divided by 1 + alpha times the number of augmented passes.
        inplace_distil: Share of a pass's loss that comes from the logits of this update's first augmented net instead
            of the labels; for every pass but that one. None is 1 in `sandwich` and `levels`, 0.5 in `lazy`, else 0.
        inplace_temperature: Temperature of both softmaxes there.
        teacher: What `OuterTeacher` takes: a finished net that every pass learns from as well.
        teacher_weight: Share of the loss on labels that the teacher gets.
        teacher_temperature: Temperature of both softmaxes there.
        lambda_schedule: lam by update; None leaves lam alone.
        seed: Seed of the widths.
        input_size: `(C, H, W)`, for `suffix`; None takes the model's own.

    Raises:
        WidthError: The model is plain, the space is another model's, or `suffix` does not fit the model.
        PlanError: An option is out of range.

    >>> task = gs.NetAugTask(gs.grow(net))
    >>> detach = task.attach(torch.optim.SGD(task.parameters(), lr=0.1))
    >>> task.set_step(0)  # the number of the update
    >>> losses = task.backward(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    """

    @checked(
        PlanError,
        **dict.fromkeys(("inplace_distil", "teacher_weight"), Share | None),
        **dict.fromkeys(("inplace_temperature", "teacher_temperature"), Positive),
        every=Count | None,
        device=torch.device | str | None,
        alpha=NotNegative | Schedule | None,
        mode=Annotated[str, OneOf("no such mode", MODES)],
        reduction=Literal["sum", "mean"],
    )
    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        *,
        space: WidthSpace | None = None,
        mode: str = "lazy",
        every: int | None = None,
        alpha: float | Schedule | None = None,
        reduction: str = "sum",
        inplace_distil: float | None = None,
        inplace_temperature: float = 1.0,
        teacher: nn.Module | str | None = None,
        teacher_weight: float = 0.5,
        teacher_temperature: float = 3.0,
        lambda_schedule: Schedule | None = None,
        seed: int = 0,
        input_size: InputSize | None = None,
    ) -> None:
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        every = EVERY.get(mode, 1) if every is None else every
        inplace_distil = INPLACE_DISTIL.get(mode, 0.0) if inplace_distil is None else inplace_distil
        self.space = width_space(model) if space is None else space
        self.space.check(model)
        slots = Slots(model)
        for name, slot in slots if mode == "levels" else ():
            if isinstance(slot.branch, SkippableBlock) and len(self.space.choices[name]) > 1:
                raise WidthError(f"{name}: no level says whether a block runs; mode='sandwich' and 'single' draw it.")
        self.mode, self.every, self.reduction = mode, every, reduction
        self.alpha = default_alpha(mode, every) if alpha is None else alpha
        self.inplace_distil, self.inplace_temperature = inplace_distil, inplace_temperature
        self.teacher: OuterTeacher | None = None
        if teacher is not None:
            self.teacher = OuterTeacher(teacher, model, device=self.device, dtype=self.dtype)
        self.teacher_weight, self.teacher_temperature = teacher_weight, teacher_temperature
        self.lambda_schedule, self.seed, self.update = lambda_schedule, seed, 0
        self.chain = UnitChain(model, input_size) if mode == "suffix" else None
        self._net = Supernet(model, slots, self.chain)
        self._gated = any(isinstance(module, Modulated) for module in model.modules())
        self._keeper: FrozenSlices | None = None
        self._ddp: list[DistributedDataParallel] = []  # in a list: not a submodule, or the model would be there twice
        self._lam: float | None = None
        self._warned = False
        self._alpha_at(0)
        slots.set(self.space.base)
        self.set_step(0)

    # ---- the step

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compute a single differentiable loss of images `(N, C, H, W)` and targets as the criterion takes them.

        Returns:
            `loss`: base + alpha * augmented, 0-dim; in eval mode and under no_grad the base's alone.
            `output`: logits of the base net `(N, num_classes)`.
            `base_loss`, `augmented_loss`: the two parts, detached, the latter weighted.
        """
        if not (torch.is_grad_enabled() and self.trainable_module.training):
            output = self.trainable_module(input)
            loss = self.criterion(output, target)
            return {"loss": loss, "output": output, "base_loss": loss.detach(), "augmented_loss": loss.new_zeros(())}
        if getattr(self.trainable_module, "grad_checkpointing", False):
            raise WidthError("grad checkpointing would recompute the augmented pass at base width: use task.backward.")
        self._begin()
        with self._net.at(self.passes().width, self.space.base):
            return self._synced(self._one_loss, input, target)

    def backward(
        self, input: Tensor, target: Tensor, scaler: Scaler | None = None, accumulation: int = 1
    ) -> dict[str, Tensor]:
        """Add the gradient of the loss of `forward` to `.grad`, pass by pass: each graph is freed before the next.

        Call it under autocast if you use that; the backward passes leave it. With several ranks there is
        one all-reduce, in the last pass; none under `no_sync()`.

        `scaler` is a `torch.amp.GradScaler`: unscale, step and update it once, as ever. The loss is divided by
        `accumulation`, the number of micro-batches of this update; all of them are trained at the same widths.

        Returns:
            What `forward` returns, all of it detached.
        """
        self._begin()

        def differentiate(loss: Tensor, shared: Tensor | None = None, gradient: Tensor | None = None) -> None:
            loss = loss / accumulation
            loss = loss if scaler is None else scaler.scale(loss)
            with no_autocast(loss.device.type):
                if shared is None or gradient is None:
                    loss.backward()
                else:  # the beginning that passes share is gone through once, with the gradients of all of them
                    torch.autograd.backward([loss, shared], [None, gradient])

        def base(run: StepRun) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
            logits, loss, shared, gradient = run.run_base()
            return logits, loss + self._touch(run.passes), shared, gradient

        with torch.enable_grad(), self._net.at(self.passes().width, self.space.base):
            run = self._start(input, target, differentiate)
            logits, loss, shared, gradient = self._synced(base, run)
            differentiate(loss, shared, gradient)
        result = self._result(run, loss.detach(), logits.detach(), loss)
        return {**result, "loss": result["base_loss"] + result["augmented_loss"]}

    def set_step(self, update: int) -> None:
        """Say which optimizer update comes next (the first is 0): it decides widths, alpha and lam."""
        if update != self.update and self._keeper is not None:
            self._keeper.forget()  # a step the scaler left out
        self.update = update
        if self.lambda_schedule is not None:
            lam = self.lambda_schedule(update)
            if lam != self._lam:
                set_lambda(self.trainable_module, lam)
                self._lam = lam

    def passes(self, update: int | None = None) -> Passes:
        """What an update runs (None: the next one)."""
        update = self.update if update is None else update
        if self._alpha_at(update) == 0.0 or update % self.every:
            return Passes(self.space.base)
        return MODES[self.mode](self.space, self.seed, update, self.chain)

    def attach(self, optimizer: torch.optim.Optimizer) -> NetAugTask:
        """Keep what an update did not train from moving in it, and count the optimizer's updates.

        A gradient of zero does not hold a weight still: weight decay and momentum still move it. Attached, rows of
        channels that were not drawn, and their state in the optimizer, are after `optimizer.step()` what they were
        before, bit for bit; branches that were skipped are passed over altogether. Nothing waits for the device.
        (Counts of steps are per tensor: Adam's correction of its start is that of the rows that were always drawn.)

        Raises:
            WidthError: The optimizer keeps state that belongs to no single weight (Adafactor, Kron), or calls no hooks.
        """
        self.detach()
        self._keeper = FrozenSlices(self._net.slots, optimizer, after_step=lambda: self.set_step(self.update + 1))
        return self

    def detach(self) -> None:
        """Undo `attach`."""
        if self._keeper is not None:
            self._keeper.detach()
        self._keeper = None

    # ---- timm's hooks

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> NetAugTask:
        """Average gradients over the ranks of the default process group, by torch's `DistributedDataParallel`.

        Widths need no communication: every rank draws the same. For SyncBatchNorm convert the model first.
        """
        if device_ids is not None and next(self.trainable_module.parameters()).device.type == "cpu":
            device_ids = None  # timm's train.py names the CPU, which DDP does not take
        # Not base.ranks: the loop is timm's, so gradients can be averaged by hooks in the backward pass only.
        self._ddp = [DistributedDataParallel(AnyForward(self.trainable_module), device_ids=device_ids, **ddp_kwargs)]
        return self

    def no_sync(self) -> AbstractContextManager[None]:
        """No all-reduce inside: for all but the last micro-batch of an update."""
        return self._ddp[0].no_sync() if self._ddp else nullcontext()

    def compile(  # type: ignore[override]  # nn.Module's is another thing; timm's it is
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the model block by block, in place: at most one graph per block and width, none per value of lam."""
        compile_regions(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module

    def update_ema(self, step: int | None = None) -> None:
        """Average the model, copy lam into the average (it is never averaged), and count update number `step`."""
        super().update_ema(step)
        if self.has_ema() and self._lam is not None:
            set_lambda(self.trainable_module_ema, self._lam)
        if step is not None:
            self.set_step(step)
        elif self._keeper is None:  # which counts updates
            self.set_step(self.update + 1)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The update: everything else follows from it."""
        return {"update": self.update}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """The inverse of `get_task_state`."""
        if state is not None and not ema:
            self._lam = None  # the model's own may have been loaded too
            self.set_step(int(state["update"]))

    # ---- details

    def _begin(self) -> None:
        if self._keeper is None and not self._warned:
            self._warned = True
            warnings.warn(
                "NetAugTask: weights that an update does not train move all the same, by weight decay and momentum; "
                "task.attach(optimizer) keeps them where they are.",
                stacklevel=3,
            )

    def _start(self, x: Tensor, target: Tensor, backward: Callable[[Tensor], None] | None) -> StepRun:
        passes = self.passes()
        if self._keeper is not None:
            for width in (passes.width, *passes.augmented):
                self._keeper.ran(width)
        alpha = self._alpha_at(self.update)
        share = 1.0 / (1.0 + alpha * NUM_AUGMENTED[self.mode]) if self.reduction == "mean" else 1.0
        outside = None if self.teacher is None else self.teacher(x)

        def loss_of(logits: Tensor, inplace_teacher: Tensor | None) -> Tensor:
            logits = at_least_float32(logits)
            loss = self.criterion(logits, target)
            for other, weight, temperature in (
                (outside, self.teacher_weight, self.teacher_temperature),
                (inplace_teacher, self.inplace_distil, self.inplace_temperature),
            ):
                if other is not None and weight:
                    learnt = distillation_loss(logits, at_least_float32(other), temperature)
                    loss = torch.lerp(loss, learnt, weight)
            return loss + penalties(self.trainable_module, target, logits) if self._gated else loss

        run = StepRun(self._net, passes, x, loss_of, alpha * self.every * share, share, backward)
        if self.inplace_distil:
            run.ask()
        if passes.start is None:
            run.run_augmented(lambda: self.trainable_module(x))
        return run

    def _one_loss(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        run = self._start(x, target, None)
        logits, base, _, _ = run.run_base()
        loss = torch.stack([base, *run.augmented]).sum() + self._touch(run.passes)
        return self._result(run, loss, logits, base)

    def _result(self, run: StepRun, loss: Tensor, logits: Tensor, base: Tensor) -> dict[str, Tensor]:
        augmented = torch.stack(run.augmented).sum() if run.augmented else torch.zeros_like(base)
        return {"loss": loss, "output": logits, "base_loss": base.detach(), "augmented_loss": augmented.detach()}

    def _synced(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`; the gradients of what it returns are averaged over the ranks, if there are several."""
        return self._ddp[0](function, *args) if self._ddp else function(*args)

    def _touch(self, passes: Passes) -> Tensor | float:
        return self._net.touch_untrained(passes.width) if self._ddp else 0.0

    def _alpha_at(self, update: int) -> float:
        alpha = self.alpha(update) if callable(self.alpha) else self.alpha
        if not 0.0 <= alpha < math.inf:
            raise PlanError(f"alpha={alpha!r} at update {update}: must not be negative.")
        return float(alpha)
