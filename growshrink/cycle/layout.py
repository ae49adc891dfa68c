"""A plan in optimizer updates: its phases, and the schedules of learning rate and lam that follow from them.

All follow from the plan and the number of updates per epoch alone.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from growshrink.cycle.costs import Costs
from growshrink.cycle.phases import Base, Hold, Phase, Prepare, PrepareGrown, Settle, Tail, Vanish
from growshrink.cycle.plan import SLACK, CyclePlan, Round
from growshrink.cycle.spans import RoundSpan
from growshrink.cycle.teaching import Lessons
from growshrink.errors import PlanError
from growshrink.schedules import Schedule, constant, cosine, rewarm
from growshrink.schedules.closed_loop import ClosedLoop, LamControl, LoopSpan

#: Updates at lam == 0 before a fuse: the running statistics (momentum 0.1) have then forgotten all but 0.5 %.
LEAST_SETTLE = 50
MOST_UPDATES = 10**12
#: Looks that a closed loop takes at the loss while lam falls, at least; every 10 updates at the most.
LEAST_LOOKS = 20


@dataclass(frozen=True)
class Phases:
    """The phases of a run, in order.

    Attributes:
        all: None is empty; they cover [0, total).
        rewarm: Updates over which the learning rate comes back, also at the updates `restarts`.
        built_grown: The net is grown before the first round already; its activations are then alive in the base.
    """

    all: tuple[Phase, ...]
    rewarm: int
    restarts: tuple[int, ...]
    built_grown: bool

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.all[-1].stop

    @cached_property
    def spans(self) -> tuple[RoundSpan, ...]:
        """The rounds."""
        return tuple({phase.round: phase.span for phase in self.all if phase.span is not None}.values())

    def at(self, update: int) -> Phase:
        """The phase that update number `update` (the first is 0) belongs to."""
        return self.all[bisect_right(self.all, update, key=lambda phase: phase.start) - 1]

    def macs(self, costs: Costs) -> int:
        """Exactly what `run_cycle` reports as `training_macs` of such a run on one rank afterwards."""
        return costs.batch_size * sum(phase.macs(costs) for phase in self.all)

    def lam(self, update: int) -> float:
        """Lam by the plan's schedules; 0 where nothing is grown."""
        span = self.at(update).span
        return float(self.built_grown) if span is None else span.lam(update)

    def lam_control(self) -> LamControl:
        """Lam, in a closed loop where a round asks for it."""
        return LamControl(self.lam, {span.number: _closed_loop(span) for span in self.spans if span.plan.controlled})

    @cached_property
    def learning_rate(self) -> Schedule:
        """Learning rate over its peak by update: a cosine over the whole run, jagged at every change of structure.

        A phase with a rate of its own has a cosine of its own, and that of the plain net stands still.
        """
        changes = [update for phase in self.all for update in phase.warmups] + list(self.restarts)
        apart = [phase for phase in self.all if phase.own_rate]
        own = cosine(1.0, 0.0, steps=self.total - sum(phase.stop - phase.start for phase in apart))

        def cosines(update: int) -> float:
            phase = self.at(update)
            if phase.own_rate:
                return cosine(1.0, 0.0, steps=phase.stop - phase.start)(update - phase.start)
            return own(update - sum(each.stop - each.start for each in apart if each.stop <= update))

        envelope = rewarm(cosines, changes, self.rewarm)

        def schedule(update: int) -> float:
            begin, factor = self.at(update).anneal or (update, constant(1.0))
            return envelope(update) * (factor(update - begin) if update >= begin else 1.0)

        return schedule


def lay_out(plan: CyclePlan, updates_per_epoch: int, *, built_grown: bool = False) -> Phases:
    """Lay a plan out in updates; PlanError where a round, or the whole plan, has too few.

    With `built_grown` the net is grown before the first round already.

    >>> plan = gs.CyclePlan(base_epochs=2, rounds=(gs.Round(epochs=10, hold=0.5, vanish=0.2, settle=0.1),))
    >>> [phase.stop for phase in gs.cycle.lay_out(plan, updates_per_epoch=100).all]
    [200, 700, 900, 1000, 1200]
    """
    stop = _updates(plan.base_epochs, updates_per_epoch)
    phases: list[Phase] = [Base(0, stop, gradients=plan.gradients, seed=plan.seed)]
    for number, entry in enumerate(plan.rounds, start=1):
        span = _span(entry, number, plan.seed, stop, updates_per_epoch)
        phases += [
            Prepare(span.begin, span.start, span),
            (PrepareGrown if entry.exit.rewinds else Hold)(span.start, span.hold_stop, span),
            Vanish(span.hold_stop, span.vanish_stop, span),
            Settle(span.vanish_stop, span.grown_stop, span),
            Tail(span.grown_stop, span.stop, span),
        ]
        stop = span.stop
    if stop == 0:
        raise PlanError(f"base_epochs={plan.base_epochs!r}: less than one update.")
    restarts = tuple(_updates(at, updates_per_epoch) for at in plan.restarts)
    return Phases(tuple(phase for phase in phases if phase.stop > phase.start), plan.rewarm, restarts, built_grown)


def _span(entry: Round, number: int, seed: int, begin: int, updates_per_epoch: int) -> RoundSpan:
    total = _updates(entry.epochs, updates_per_epoch)
    prepare = max(1, round(entry.teacher.share * total)) if entry.teacher is not None and entry.teacher.share else 0
    start, stop = begin + prepare, begin + total
    hold, vanish, settle = _grown_updates(entry, number, total - prepare)
    hold_stop, lessons = start + hold, None
    if entry.teacher is not None:
        first = start if entry.teacher.is_net else hold_stop
        asked = max(round(entry.teacher.asked * (stop - first)), updates_per_epoch)
        lessons = Lessons(first, min(asked, stop - first), entry.teacher)
    grown_stop = hold_stop + vanish + settle
    return RoundSpan(number, entry, seed, begin, start, hold_stop, hold_stop + vanish, grown_stop, stop, lessons)


def _grown_updates(entry: Round, number: int, total: int) -> tuple[int, int, int]:
    """Updates of hold, vanish and settle, of `total` with the tail."""
    if not entry.branch and total > 0:
        return 0, 0, 0
    # Sums are rounded, and down: three shares rounded up one by one may exceed the round.
    hold, alive, grown = (
        math.floor(share * total + SLACK)
        for share in (entry.hold, entry.hold + entry.vanish, entry.hold + entry.vanish + entry.settle)
    )
    merged = entry.exit.linear  # else no need to be linear, or to settle
    vanish, settle = alive - hold, max(LEAST_SETTLE if merged else 0, grown - alive)
    tail = total - hold - vanish - settle
    if hold < 1 or (vanish < 1 and (merged or entry.controlled)) or tail < entry.exit.rewinds:
        raise PlanError(
            f"round {number} has {total} updates: too few for hold {hold}, vanish {vanish}, settle {settle}. "
            "Give it more epochs or a smaller batch size."
        )
    return hold, vanish, settle


def _closed_loop(span: RoundSpan) -> LoopSpan:
    every = min(10, max(1, (span.vanish_stop - span.hold_stop) // LEAST_LOOKS))
    loop = ClosedLoop(span.vanish_stop - span.start, hold=span.hold_stop - span.start, every=every)
    observes_from = span.start if span.lessons is None else span.lessons.start
    return LoopSpan(range(span.start, span.stop), observes_from, loop)


def _updates(epochs: float, updates_per_epoch: int) -> int:
    updates = epochs * updates_per_epoch
    if updates > MOST_UPDATES:
        limit = f"exceeds the limit of {MOST_UPDATES:.0e} updates"
        raise PlanError(f"{epochs:g} epochs of {updates_per_epoch} updates: {limit}.")
    return round(updates)
