"""The training loop: one model, one optimizer, one average of the weights, any number of changes of structure."""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from timm import optim
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.base.config import check_fields
from growshrink.base.limits import NoOption, NotAll, NotNegative, OneOf, Positive, Regex, SomeOrAll
from growshrink.base.ranks import average_update_
from growshrink.branches import Modulated, penalties
from growshrink.data.batches import Batch
from growshrink.data.feed import UpdateBatches
from growshrink.errors import PlanError, RunError
from growshrink.layers.activations import follow_lambda
from growshrink.layers.recompute import recompute
from growshrink.layers.regions import called, compiled_regions
from growshrink.schedules.functions import Schedule
from growshrink.training._evaluate import Loss
from growshrink.training.calibrate import calibrate_bn
from growshrink.training.distil import TeacherNet, distillation_loss
from growshrink.training.gradient_maps import GradientMaps
from growshrink.training.graphed import GraphedBackward
from growshrink.training.sync import NOT_PER_PARAMETER, sync_optimizer

OptimizerName = Annotated[str, OneOf("timm knows no such optimizer", optim.list_optimizers)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train, whatever the structure.

    Attributes:
        optimizer: Any optimizer of timm's that keeps its state parameter by parameter (not lamb, adan, kron,
            adahessian). Of Muon's family (muon, nmuon, ...; decoupled decay, a good rate is a tenth of SGD's) the first
            and the last layer get the fallback, AdamW or NAdamW, as vectors do and as its author advises (Jordan et
            al., https://kellerjordan.github.io/posts/muon/).
        lr: Peak learning rate.
        weight_decay: Not applied to norms, biases and lam (timm's rule).
        momentum: Momentum of SGD (timm's "sgd" is Nesterov's; for none at all, optimizer "momentum" and 0).
        mixup: Alpha of the Beta distribution that mixes each image and its label with another's (Zhang et al.,
            arXiv:1710.09412); one share a batch, drawn by the update. 0 for none; needs updates without a teacher. It
            is for comparisons: photographs are mixed one by one where they are read (`growshrink.data.batches`).
        label_smoothing: Share of the labels that is spread over all classes, in [0, 1).
        ema_decay: Decay of the averaged weights, which are what is judged and deployed; 0 for none.
        clip_grad: Largest norm of the gradient; None does not clip.
        layer_decay: Factor on the learning rate from each layer to the one before it, the head having the whole rate
            (timm's rule); 1 trains all alike.
        freeze: Regular expression; parameters whose dotted names begin with it are not trained (running statistics
            of norms are).
        class_weights: Weight of each class in the loss, in the order of the labels; none for equal ones.
        metric: What rounds are judged by, a field of `Score`.
        amp: bfloat16 autocast in training: about twice as fast where the machine has bfloat16 instructions, slower
            elsewhere. Scores are always taken in float32.
        recompute: Keep of each grown layer only its input for the backward pass, and run it once more then: less memory
            for more time, the same results (see `growshrink.layers.recompute`). Not together with `compile`.
        compile: `torch.compile` for the updates, part by part, again after a change of structure; not for lam or
            widths. Results are equal up to rounding.
        graphs: Launch the forward and backward pass of an update at once, as a CUDA graph: several times as fast where
            the net is small, with the same bits (see `growshrink.training.graphed`). Other devices have none; updates
            with sampled widths, mixup, numbers from data or a loss of the caller's are done as ever. Not together with
            `compile` or `recompute`.
    """

    optimizer: OptimizerName = "sgd"
    lr: Positive = 0.1
    weight_decay: NotNegative = 5e-4
    momentum: NotAll = 0.9
    label_smoothing: NotAll = 0.0
    mixup: Annotated[NotNegative, NoOption()] = 0.0
    ema_decay: NotAll = 0.998
    clip_grad: Positive | None = None
    layer_decay: SomeOrAll = 1.0
    freeze: Regex | None = None
    recompute: bool = False
    class_weights: Annotated[tuple[NotNegative, ...], NoOption()] = ()
    metric: Annotated[Literal["top1", "balanced", "macro_f1"], NoOption()] = "top1"
    amp: Annotated[bool, NoOption()] = False
    compile: Annotated[bool, NoOption()] = False
    graphs: Annotated[bool, NoOption()] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.optimizer in ("sgd", "nesterov") and not self.momentum:
            raise PlanError(f"momentum=0: optimizer {self.optimizer!r} is Nesterov's; without any, take 'momentum'.")
        if len(several := [key for key in ("recompute", "compile", "graphs") if getattr(self, key)]) > 1:
            raise PlanError(
                f"{several[0]}: not together with {several[1]}, which needs the updates as they are; take one."
            )


class Task(Protocol):
    """What computes the loss of an update, and its gradients."""

    def set_step(self, update: int) -> None:
        """Update number `update` comes next."""
        ...

    def backward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Add to the gradients; returns the detached "loss", and whatever else."""
        ...


class Trainer:
    """A model in training; a change of structure happens in place, between two calls of `train`.

    Attributes:
        ema: The averaged net, in eval mode, or None. Its lam is copied, never averaged.
        optimizer: Made by timm's factory; follows a change of structure, see `structure_changed`.
        gradient_maps: Applied in every update, or None; see `map_gradients`.
        graphed: What records and launches CUDA graphs, or None.
        loss: The caller's own, in place of the cross-entropy; None for that.
        update: Optimizer updates done so far.
        cut_short: Where `train` was stopped early, the update it began with and the sum of its losses, which the next
            call adds to; else None.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, batches: UpdateBatches, loss: Loss | None = None) -> None:
        self.model, self.loss = model.train(), loss
        self.config = config
        weights = config.class_weights
        self._class_weights = torch.tensor(weights, device=next(model.parameters()).device) if weights else None
        self.batches = batches
        self.update = 0
        self.cut_short: tuple[int, Tensor] | None = None
        self.averager = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.optimizer = self._make_optimizer()
        self.gradient_maps: GradientMaps | None = None
        self._detach_maps: Callable[[], None] | None = None
        self._gated = any(isinstance(module, Modulated) for module in model.modules())
        self._lam: float | None = None
        self._ema_has_lam = True  # or may have: looking for it in every update costs a small net 5 % of its time
        self._compiled = compiled_regions(model) if config.compile else {}
        on_cuda = next(model.parameters()).is_cuda
        self.graphed = GraphedBackward(model) if config.graphs and on_cuda else None

    @property
    def ema(self) -> nn.Module | None:
        """The averaged net."""
        return self.averager.module if self.averager is not None else None

    @property
    def nets(self) -> list[nn.Module]:
        """The model, and its average where there is one."""
        return [self.model] if self.ema is None else [self.model, self.ema]

    @property
    def best(self) -> nn.Module:
        """The net to judge and to deploy: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema

    def train(
        self,
        stop: int,
        *,
        learning_rate: Schedule,
        lam: Schedule,
        teacher: TeacherNet | None = None,
        task: Task | None = None,
        on_loss: Callable[[Tensor], None] | None = None,
        after_update: Callable[[], None] | None = None,
        stop_early: Callable[[], bool] | None = None,
    ) -> Tensor:
        """Do updates until `stop` of them are done in all; returns the mean training loss, 0-dim, on the device.

        There is no host sync inside. On several ranks every one is to call this, with batches of its own; see
        `growshrink.base.ranks`. A call that completes one that was stopped early returns the mean over both.

        Args:
            stop: Updates done at the end.
            learning_rate: Factor on the config's `lr` by update.
            lam: lam by update.
            teacher: Distil from it.
            task: Computes loss and gradients in place of the trainer (a `NetAugTask` on the same model, with a teacher
                of its own if it is to have one).
            on_loss: Called with the training loss of each update without a task, 0-dim, detached, on its device
                (`ClosedLoop.observe`).
            after_update: Called after each update (a progress bar).
            stop_early: Called after each update; where it returns True, `train` returns early.
        """
        if self.config.mixup and (teacher is not None or task is not None or self._gated):
            what = "not with a teacher, with sampled widths or with branches whose numbers come from data"
            raise PlanError(f"mixup={self.config.mixup!r}: {what}; set it to 0.")
        if task is not None and self.config.class_weights:
            raise PlanError("class_weights: not with sampled widths, whose losses are computed elsewhere.")
        first, total = self.cut_short or (self.update, torch.zeros((), device=next(self.model.parameters()).device))
        self.cut_short = None
        if self.graphed is not None:
            self.graphed.use(partial(self._loss, teacher), teacher and (teacher.weight, teacher.temperature))
        with called(self._compiled), recompute(self.config.recompute):  # scores, surgery and proofs run as ever
            while self.update < stop:
                question = teacher.question(self.update) if teacher is not None and task is None else self.update
                batch = self.batches.batch(question)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.config.lr * learning_rate(self.update) * group.get("lr_scale", 1.0)
                self._set_lambda(lam(self.update))
                self.optimizer.zero_grad(set_to_none=True)
                loss = self._backward(batch, teacher, question, task, on_loss).detach().clone()
                average_update_(self.model, loss)
                if self.config.clip_grad is not None:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
                self.optimizer.step()
                self.update += 1
                if self.averager is not None:
                    self.averager.update(self.model, step=self.update)
                    self._set_lambda(lam(self.update - 1), of_ema=True)
                total += loss
                if after_update is not None:
                    after_update()
                if stop_early is not None and stop_early() and self.update < stop:
                    self.cut_short = first, total.clone()
                    break
        return total / max(1, self.update - first)

    def calibrate_average(self, num_batches: int = 50) -> None:
        """Recalibrate the batch norms of the averaged net on the last batches it was trained on.

        Its averaged statistics are those of other weights, and reach back to before lam was 0. Statistics that are
        frozen in training (see `collapse_online`) are what the weights were trained with: it takes them from the model.
        """
        if self.ema is None or not self.update:
            return
        frozen = []
        for name, norm in self.model.named_modules():
            if isinstance(norm, _BatchNorm) and not norm.training and self.model.training:
                frozen.append(self.ema.get_submodule(name))
                for own, value in zip(frozen[-1].buffers(), norm.buffers(), strict=True):
                    own.copy_(value)
        calibrate_bn(self.ema, self.recent_images(num_batches), leave=frozen)

    def recent_images(self, num_batches: int) -> Iterator[Tensor]:
        """The images `(N, C, H, W)` of the last updates; with a teacher that repeats itself, others of their kind."""
        return (self.batches.batch(u)[0] for u in range(max(0, self.update - num_batches), self.update))

    def map_gradients(self, maps: GradientMaps | None) -> None:
        """Apply `maps` in every update from now on, after gradients are averaged over the ranks; None ends that.

        PlanError where gradients are clipped, GradientError where optimizer or net do not fit the maps.
        """
        if maps is not None and self.config.clip_grad is not None:
            raise PlanError(f"clip_grad={self.config.clip_grad!r}: clipping is not linear; map_gradients needs None.")
        if self._detach_maps is not None:
            self._detach_maps()
        self._detach_maps = None if maps is None else maps.attach(self.model, self.optimizer)
        self.gradient_maps = maps

    def structure_changed(self, reset: Collection[str] = ()) -> None:
        """Let the optimizer follow after the model grew or fused (see `sync_optimizer`); `reset` loses its state.

        New parameters start empty, step count included (a kept count would make Adam's first steps too long).
        """
        self._freeze()
        sync_optimizer(self.optimizer, self.model)
        for name, parameter in self.model.named_parameters():
            if name in reset:
                self.optimizer.state.pop(parameter, None)
        self._lam, self._ema_has_lam = None, True
        self._gated = any(isinstance(module, Modulated) for module in self.model.modules())
        self._compiled = compiled_regions(self.model) if self.config.compile else {}
        self.map_gradients(self.gradient_maps)

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """State of the optimizer by parameter name."""
        named = dict(self.model.named_parameters())
        return {name: dict(self.optimizer.state[p]) for name, p in named.items() if self.optimizer.state.get(p)}

    def load_optimizer_state(self, state: dict[str, dict[str, Any]]) -> None:
        """The inverse of `optimizer_state`."""
        named = dict(self.model.named_parameters())
        if missing := set(state) - set(named):
            raise RunError(f"the optimizer state is of another structure: it knows {sorted(missing)[0]}.")
        for name, values in state.items():
            parameter = named[name]
            self.optimizer.state[parameter] = {key: _beside(parameter, value) for key, value in values.items()}

    def _backward(
        self,
        batch: Batch,
        teacher: TeacherNet | None,
        question: int,
        task: Task | None,
        on_loss: Callable[[Tensor], None] | None,
    ) -> Tensor:
        """Add the gradients of the update that is next; returns its loss."""
        images_NCHW, labels_N = batch
        if task is not None:
            task.set_step(self.update)
            with self._autocast(images_NCHW):
                return task.backward(images_NCHW, labels_N)["loss"]
        answers: tuple[Tensor, ...] = ()
        if teacher is not None and self.loss is None:
            with self._autocast(images_NCHW):
                answers = (teacher.answer(question, images_NCHW),)
        if self.graphed is not None and self.loss is None and not self.config.mixup and not self._gated:
            loss = self.graphed(images_NCHW, labels_N, *answers)
        else:
            loss = self._loss(teacher, images_NCHW, labels_N, *answers)
            loss.backward()
        if on_loss is not None:
            on_loss(loss.detach())
        return loss

    def _loss(
        self, teacher: TeacherNet | None, images_NCHW: Tensor, labels_N: Tensor, answers_NK: Tensor | None = None
    ) -> Tensor:
        if self.loss is not None:
            with self._autocast(images_NCHW):
                return self.loss(self.model, (images_NCHW, labels_N))
        others_N, share = labels_N, 1.0
        if self.config.mixup and labels_N.is_floating_point():
            raise PlanError(f"mixup={self.config.mixup!r}: the batches are mixed already; set one of the two to 0.")
        if self.config.mixup:  # labels may be those of several nets side by side, in turn
            share = float(np.random.default_rng(self.update).beta(self.config.mixup, self.config.mixup))
            others_N = labels_N.unflatten(0, (len(images_NCHW), -1)).flip(0).flatten()
            images_NCHW = share * images_NCHW + (1 - share) * images_NCHW.flip(0)
        with self._autocast(images_NCHW):
            logits = self.model(images_NCHW)
        score = partial(F.cross_entropy, weight=self._class_weights, label_smoothing=self.config.label_smoothing)
        loss = score(logits.float(), labels_N)
        if share < 1:
            loss = share * loss + (1 - share) * score(logits.float(), others_N)
        if teacher is not None and answers_NK is not None:
            learnt = distillation_loss(logits.float(), answers_NK.float(), teacher.temperature)
            loss = (1 - teacher.weight) * loss + teacher.weight * learnt
        return loss + penalties(self.model, labels_N, logits) if self._gated else loss

    def _autocast(self, images_NCHW: Tensor) -> AbstractContextManager[None]:
        return torch.autocast(images_NCHW.device.type, dtype=torch.bfloat16, enabled=self.config.amp)

    def _set_lambda(self, value: float, of_ema: bool = False) -> None:
        if of_ema:
            assert self.ema is not None
            if self._ema_has_lam:  # every time: the average has just pulled it towards the model's
                self._ema_has_lam = follow_lambda(self.ema, value) > 0
        elif value != self._lam:
            follow_lambda(self.model, value)
            self._lam = value

    def _freeze(self) -> None:
        for name, parameter in self.model.named_parameters() if self.config.freeze is not None else ():
            if re.match(str(self.config.freeze), name):
                parameter.requires_grad_(False)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        self._freeze()
        try:
            kind = optim.get_optimizer_class(config.optimizer, bind_defaults=False)
            if isinstance(kind, type) and issubclass(kind, NOT_PER_PARAMETER):
                raise PlanError(
                    f"optimizer={config.optimizer!r}: keeps state that does not belong to single parameters, and "
                    "cannot follow a change of structure. Take sgd, adamw, nadamw, lion, muon, ..."
                )
            values: dict[str, Any] = {key: getattr(config, key) for key in ("lr", "weight_decay", "momentum")}
            if config.layer_decay < 1:
                values["layer_decay"] = config.layer_decay
            if isinstance(kind, type) and issubclass(kind, optim.Muon):
                if config.layer_decay < 1:
                    raise PlanError(f"layer_decay={config.layer_decay!r}: not with {config.optimizer}; set it to 1.")
                values["param_group_fn"] = partial(_muon_groups, weight_decay=config.weight_decay)
            return optim.create_optimizer_v2(self.model, opt=config.optimizer, **values)
        except PlanError:
            raise
        except (ValueError, RuntimeError, AssertionError) as error:
            raise PlanError(f"optimizer={config.optimizer!r}: {error}") from error


def _beside(parameter: nn.Parameter, value: Any) -> Any:
    """A value of an optimizer's state where and how the optimizer made it; it comes from a checkpoint, on the CPU."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value  # counts live on the CPU
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)  # with its memory format
    return value.to(parameter.device)


def _muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of timm, those of the first and the last layer apart."""
    layers = list[str]()
    for name, module in model.named_modules():
        within = layers and name.startswith(f"{layers[-1]}.")  # a layer's branches belong to it
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not within:
            layers.append(name)
    ends = {id(p) for name in {*layers[:1], *layers[-1:]} for p in model.get_submodule(name).parameters()}
    found = []
    for group in optim.param_groups_weight_decay(model, weight_decay):
        for fallback in (False, True):
            if chosen := [p for p in group["params"] if (id(p) in ends) == fallback]:
                found.append({**group, "params": chosen, **({"use_fallback": True} if fallback else {})})
    return found
