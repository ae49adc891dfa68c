"""The phases of a run: each knows what happens at its ends, how it trains, and what it costs."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from growshrink.base.copying import copy_net
from growshrink.base.ranks import broadcast_nets_
from growshrink.cycle.augmented import Augmentation, recalibrated
from growshrink.cycle.costs import Costs
from growshrink.cycle.gradients import MapSource
from growshrink.cycle.records import Grew, RoundRecord, Size, Top1, shapes_of
from growshrink.cycle.running import NetCost, Run
from growshrink.cycle.spans import RoundSpan
from growshrink.cycle.surgery import collapse_net, gradients, grow_nets
from growshrink.cycle.teaching import Lessons
from growshrink.layers.grown import grown_modules
from growshrink.proofs._profile import profile
from growshrink.schedules import Schedule, cosine
from growshrink.training.distil import TeacherNet
from growshrink.transforms import growth_report

#: Share of a hold, at its end, over which the learning rate is annealed where the peak is to be a teacher.
PEAK_ANNEAL = 0.5


@dataclass(frozen=True)
class Phase(ABC):
    """Updates `start` to `stop` (exclusive) of a run, in which the structure stays; `span` is None before a round."""

    name: ClassVar[str]
    #: What to try where training diverges in it.
    advice: ClassVar[str] = "a longer vanish, a lower lr, or clip_grad=1"
    #: Whether the net carries branches.
    grown: ClassVar[bool] = False
    #: Whether another net is trained than the run's.
    apart: ClassVar[bool] = False
    #: Whether the learning rate has a cosine of its own here, which the rest of the run does not count.
    own_rate: ClassVar[bool] = False
    #: Whether what is trained is new, or changed, at the start.
    rewarms: ClassVar[bool] = True

    start: int
    stop: int
    span: RoundSpan | None = None

    @property
    def round(self) -> int:
        """Number of the round; 0 before the first."""
        return 0 if self.span is None else self.span.number

    @property
    def warmups(self) -> tuple[int, ...]:
        """Updates from which on the learning rate is led back up."""
        return (self.start,) if self.rewarms else ()

    @property
    def anneal(self) -> tuple[int, Schedule] | None:
        """An update, and a factor on the learning rate from there on to the end of the phase."""
        return None

    @property
    def lessons(self) -> Lessons | None:
        """When a teacher is asked; None where it comes afterwards."""
        lessons = None if self.span is None else self.span.lessons
        return None if lessons is None or lessons.start > self.start else lessons

    @property
    def looks(self) -> tuple[int, ...]:
        """Updates after which training pauses, beside the ends of epochs."""
        return ()

    def enter(self, run: Run) -> None:  # noqa: B027 - nothing, in most phases
        """What happens before the first update."""

    def train(self, run: Run) -> None:
        """Do the updates, in pieces that end at every epoch, from wherever the run stands."""
        per_epoch = run.feed.train.updates_per_epoch
        run.journal.enter(f"round {self.round} {self.name}" if self.round else self.name)
        teacher = run.teaching.during(self.lessons)
        self.sample_widths(run, teacher)
        while (start := run.trainer.update) < self.stop:
            stops = (self.stop, (start // per_epoch + 1) * per_epoch, *self.looks)
            began = time.perf_counter()
            loss = run.train_until(min(stop for stop in stops if stop > start), teacher)
            seconds, done = time.perf_counter() - began, run.trainer.update
            run.check_finite(loss, f"round {self.round}, phase {self.name}", start, self.advice)
            run.state.seconds += seconds
            run.state.macs_spent += run.images_per_update * run.macs(self.lessons, start, done)
            self.look(run)
            if done % per_epoch == 0 or done == self.stop:
                run.add_row(self.round, self.name, start, loss, seconds)
            if done < self.stop and (done % per_epoch == 0 or run.saving.due(done)):
                run.checkpoint()

    def look(self, run: Run) -> None:  # noqa: B027
        """What happens in the pauses."""

    def sample_widths(self, run: Run, teacher: TeacherNet | None) -> None:
        """Make what samples the widths of a grown net, where the round asks for it."""
        span = self.span
        if span is None or not self.grown or span.plan.widths is None:
            return

        def make() -> Augmentation:
            task = span.sampling(run.trainer.model, run.lam, run.size, run.config.label_smoothing, teacher)
            return Augmentation(run.trainer, task, (span.start, span.grown_stop), run.size)

        run.augment((span.number, teacher is not None), make)

    def leave(self, run: Run) -> None:
        """What happens after the last update."""
        span = self.span
        if span is None:
            return
        if self.grown and self.stop == span.grown_stop:
            span.plan.exit.leave(run)
            run.state.macs_spent += run.images_per_update * span.plan.exit.macs(run.plain.forward, run.plain.train)
        if self.stop == span.stop:
            run.end_round()

    @abstractmethod
    def macs(self, costs: Costs) -> int:
        """Training MACs of an image: of all its updates, the teacher's forward, and the exit."""


@dataclass(frozen=True)
class Base(Phase):
    """Before the first round: the net as it came."""

    name = "base"
    advice = "a lower lr, or clip_grad=1"

    gradients: MapSource | None = None
    seed: int = 0

    @property
    def looks(self) -> tuple[int, ...]:
        return self.gradients.looks(self.stop) if self.gradients is not None else ()

    def enter(self, run: Run) -> None:
        """Map the gradients, where the plan asks for it."""
        if self.gradients is not None:
            model, batch_size = run.trainer.model, run.feed.train.batch_size
            macs = self.gradients.macs(model, run.size, batch_size, self.stop)
            self.gradients.renew(run, self.seed)
            run.state.macs_spent += run.images_per_update * macs

    def look(self, run: Run) -> None:
        """Map them by what the net is now."""
        if run.trainer.update in self.looks:
            self.enter(run)

    def macs(self, costs: Costs) -> int:
        training = (self.stop - self.start) * costs.first.train
        if self.gradients is None:
            return training
        maps = self.gradients.macs(costs.first.net, costs.input_size, costs.batch_size, self.stop)
        return training + (1 + len(self.looks)) * maps


@dataclass(frozen=True)
class _InRound(Phase):
    """Base of the phases of a round."""

    span: RoundSpan

    def answers(self, costs: Costs) -> int:
        """MACs of an image through the teacher, as often as it is queried."""
        teacher, lessons = self.teacher_cost(costs), self.lessons
        return 0 if teacher is None or lessons is None else lessons.asked(self.start, self.stop) * teacher.forward

    def teacher_cost(self, costs: Costs) -> NetCost | None:
        """The teacher's net, where there is one."""
        if self.lessons is None:
            return None
        if self.lessons.teacher.is_net:
            return costs.teachers[self.round]
        own = costs.first if self.round == 1 else costs.plain
        return costs.grown[self.round - 1] if self.lessons.teacher.is_peak else own


@dataclass(frozen=True)
class Prepare(_InRound):
    """A teacher is trained that is another net; the run's waits."""

    name = "prepare"
    advice = "a lower lr, or clip_grad=1"
    apart = own_rate = True

    def enter(self, run: Run) -> None:
        """Put the teacher in the place of the run's net, which is remembered."""
        run.remember()
        run.train_instead(run.teachers[self.round])

    def leave(self, run: Run) -> None:
        """Let it teach, and restore the run's net as it was."""
        broadcast_nets_(run.trainer.nets)
        run.set_teacher(run.trainer.best, of_the_run=False)
        run.go_back()

    def macs(self, costs: Costs) -> int:
        return (self.stop - self.start) * costs.teachers[self.round].train


@dataclass(frozen=True)
class _Grown(_InRound):
    """Base of the phases in which the net carries branches."""

    grown = True

    def macs(self, costs: Costs) -> int:
        plan, grown, updates = self.span.plan, costs.grown[self.round - 1], self.stop - self.start
        last = self.stop == self.span.grown_stop
        leaving = plan.exit.macs(costs.plain.forward, costs.plain.train) if last else 0
        if plan.online:
            return updates * costs.online(grown, self.span.lam(self.start)) + self.answers(costs) + leaving
        if plan.widths is not None:
            sampled = self.span.sampling_costs(costs, grown, self.teacher_cost(costs))
            return sampled.total(self.start, self.stop) + leaving
        return updates * grown.train + self.answers(costs) + leaving


@dataclass(frozen=True)
class Hold(_Grown):
    """The net grows, and trains with its branches' activations alive."""

    name = "hold"
    advice = "a lower lr, clip_grad=1, a smaller ratio, or more updates of rewarm after the growth"

    @property
    def warmups(self) -> tuple[int, ...]:
        return (self.start, self.stop) if self.anneal else (self.start,)

    @property
    def anneal(self) -> tuple[int, Schedule] | None:
        length = round(PEAK_ANNEAL * (self.stop - self.start))
        anneals = self.span.plan.teaches_peak and not self.own_rate
        return (self.stop - length, cosine(1.0, 0.0, steps=length)) if anneals else None

    @property
    def looks(self) -> tuple[int, ...]:
        """The second update: by then every new parameter must have a gradient."""
        return (self.start + 2,)

    def enter(self, run: Run) -> None:
        """Grow."""
        span, plan = self.span, self.span.plan
        before = run.top1()
        built_grown = bool(grown_modules(run.trainer.model))
        if plan.teacher is not None and plan.teacher.of == "previous":
            run.set_teacher(run.trainer.best)
        if plan.exit.may_go_back:
            run.remember()
        change = Grew(update=self.start, round=span.number, seed=span.seed + 1000 * span.number)
        if built_grown:
            change = replace(change, shapes=shapes_of(run.trainer.model))
        else:
            options = {name: getattr(plan, name) for name in ("ratio", "init", "guide")}
            change = replace(change, branches=list(plan.branch), **options)
            change = grow_nets(run.trainer, change, plan.where, run.size)
        broadcast_nets_(run.trainer.nets)
        run.changed(change)
        if plan.widths is not None:
            run.save_supernet("init")
        begin_record(run, span, before, built_grown=built_grown)
        if plan.online:
            merge_linear(run, self)

    def look(self, run: Run) -> None:
        """After the second update: do the new parameters learn?"""
        if run.trainer.update == self.looks[0] and run.augmentation is None:
            run.record.gradients_at_update_2 = gradients(run.trainer)

    def leave(self, run: Run) -> None:
        """Score the peak, which may become the teacher; where all is linear there is none, as nothing will be lost."""
        record, plan, widths = run.record, self.span.plan, run.augmentation
        peak = run.trainer.best if widths is None else recalibrated(run.trainer, widths.space.full)
        broadcast_nets_([peak])
        if plan.teaches_peak or not plan.linear:
            record.top1.peak = run.top1(peak)
        if run.augmentation is None:
            record.gradients_at_peak = gradients(run.trainer)
        if plan.teaches_peak:
            run.set_teacher(peak)
        super().leave(run)


@dataclass(frozen=True)
class PrepareGrown(Hold):
    """A teacher is trained: the grown net, which the plain net does not come out of."""

    name = "prepare"
    own_rate = True


@dataclass(frozen=True)
class Vanish(_Grown):
    """The branches' activations fade: lam falls to 0."""

    name = "vanish"
    rewarms = False


@dataclass(frozen=True)
class Settle(_Grown):
    """The branches are linear, and the statistics of norms catch up."""

    name = "settle"
    rewarms = False

    def enter(self, run: Run) -> None:
        """Merge the branches for training, where the round asks for it and it has not been done."""
        if self.span.plan.online and not self.span.plan.linear:
            merge_linear(run, self)


@dataclass(frozen=True)
class Tail(_InRound):
    """The plain net trains on."""

    name = "tail"
    advice = "a lower lr, clip_grad=1, or more updates of rewarm after the fuse"

    def enter(self, run: Run) -> None:
        """Begin the round, where nothing was grown in it."""
        if self.start == self.span.start:
            begin_record(run, self.span, run.top1())

    def macs(self, costs: Costs) -> int:
        return (self.stop - self.start) * costs.plain.train + self.answers(costs)


def merge_linear(run: Run, phase: Phase) -> None:
    """Merge the branches that are linear when a phase begins into their kernels, for training."""
    if change := collapse_net(run.trainer, run.lam(phase.start), phase.round):
        broadcast_nets_(run.trainer.nets)  # statistics were taken on images of each rank's own
        run.changed(change)


def begin_record(run: Run, span: RoundSpan, before: float, *, built_grown: bool = False) -> None:
    """Begin the record of a round after the growth, and its lessons; `before` is the top-1 it begins with."""
    plan, size, model = span.plan, run.size, run.trainer.model
    now = profile(model, size)
    then = now if built_grown else run.plain.size
    record = RoundRecord(
        number=span.number,
        branch=["built grown"] if built_grown else list(plan.branch),
        ratio=plan.ratio,
        widths=None if plan.widths is None else plan.widths.mode,
        teacher=None if plan.teacher is None else plan.teacher.of,
        num_grown=len(grown_modules(model)),
        num_skipped=len(growth_report(model, input_size=size).skipped) if plan.branch else 0,
        params=Size(plain=then.params, grown=now.params),
        macs=Size(plain=then.macs, grown=now.macs),
        plain_step_macs=run.plain.train,
        tail_share=span.tail_share,
        macs_before=run.state.macs_spent,
        top1=Top1(before=None if built_grown else before),
    )
    if (net := run.teachers.get(span.number)) is not None:
        assert span.lessons is not None
        if run.teaching.net is None:
            run.set_teacher(run.placed(copy_net(net)), of_the_run=False)
        record.teacher_updates = updates = span.start - span.begin
        cost = NetCost.of(net, size, run.feed.train.batch_size)
        record.teacher_macs = updates * run.images_per_update * cost.train
        record.macs_before -= record.teacher_macs
        record.answers_macs = span.lessons.number * run.images_per_update * cost.forward
        record.teacher_top1 = run.top1(run.teaching.net)
    run.state.rounds.append(record)
