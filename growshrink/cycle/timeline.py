"""A plan in optimizer updates: its phases, and the schedules of learning rate and lam that follow from them.

Both are values: the timeline, the learning rate and lam at any update follow from the plan and the number of updates
per epoch alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, partial

from growshrink.cycle.plan import SLACK, CyclePlan
from growshrink.errors import PlanError
from growshrink.schedules.functions import Schedule, constant, cosine, hold_then_vanish, join, rewarm

#: Updates at lam == 0 before a fuse: the running statistics (momentum 0.1) have then forgotten all but 0.5 %.
LEAST_SETTLE = 50
#: Share of a hold, at its end, over which the learning rate is annealed where the peak is to be a teacher.
PEAK_ANNEAL = 0.5
MOST_UPDATES = 10**12


@dataclass(frozen=True)
class Segment:
    """Updates `start` to `stop` (exclusive) of one phase; `round` counts from 1, 0 is the time before the first."""

    round: int
    phase: str  # "base", "hold", "vanish", "settle" or "tail"
    start: int
    stop: int

    @property
    def grown(self) -> bool:
        """Whether the net carries branches in this phase."""
        return self.phase in ("hold", "vanish", "settle")


@dataclass(frozen=True)
class Timeline:
    """A plan in optimizer updates.

    Attributes:
        plan: The plan.
        updates_per_epoch: Of the data.
        built_grown: The net is grown before the first round already; its activations are then alive in the base.
    """

    plan: CyclePlan
    updates_per_epoch: int
    built_grown: bool = False

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """All phases in order, none empty; they cover [0, total)."""
        found = [Segment(0, "base", 0, self._updates(self.plan.base_epochs))]
        for number, plan in enumerate(self.plan.rounds, start=1):
            start, total = found[-1].stop, self._updates(plan.epochs)
            # Sums are rounded, and down: three shares rounded up one by one may exceed the round.
            hold, alive, grown = (
                math.floor(share * total + SLACK)
                for share in (plan.hold, plan.hold + plan.vanish, plan.hold + plan.vanish + plan.settle)
            )
            merged = plan.exit not in ("drop", "teach")  # else no need to be linear, or to settle
            vanish, settle = alive - hold, max(LEAST_SETTLE if merged else 0, grown - alive)
            tail = total - hold - vanish - settle
            if hold < 1 or (vanish < 1 and (merged or plan.control == "closed_loop")) or tail < (plan.exit == "teach"):
                raise PlanError(
                    f"round {number} has {total} updates: too few for hold {hold}, vanish {vanish}, settle {settle}. "
                    "Give it more epochs or a smaller batch size."
                )
            for phase, length in (("hold", hold), ("vanish", vanish), ("settle", settle), ("tail", tail)):
                found.append(Segment(number, phase, start, start + length))
                start += length
        if found[-1].stop == 0:
            raise PlanError(f"base_epochs={self.plan.base_epochs!r}: less than one update.")
        return tuple(segment for segment in found if segment.stop > segment.start)

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.segments[-1].stop

    def grown_span(self, number: int) -> tuple[int, int]:
        """The updates, from and to (exclusive), in which the net of a round carries branches."""
        own = [s for s in self.segments if s.round == number and s.grown]
        return own[0].start, own[-1].stop

    def last_grown(self, segment: Segment) -> bool:
        """Whether the branches go at the end of this phase."""
        return segment.grown and segment.stop == self.grown_span(segment.round)[1]

    def segment_at(self, update: int) -> Segment:
        """The phase that update number `update` (the first is 0) belongs to."""
        return self.segments[bisect_right([s.start for s in self.segments], update) - 1]

    def questions(self, number: int) -> tuple[int, int]:
        """The update from which a round has a teacher, and in how many updates from there on it is asked."""
        own = [s for s in self.segments if s.round == number]
        start, stop = own[0].stop, own[-1].stop  # a hold comes first
        asked = max(round(self.plan.rounds[number - 1].distil_asked * (stop - start)), self.updates_per_epoch)
        return start, min(asked, stop - start)

    def asked(self, segment: Segment, start: int, stop: int) -> int:
        """In how many of the updates from `start` to `stop` of a phase its round's teacher, if any, is asked."""
        first, number = self.questions(segment.round)
        return max(0, min(stop, first + number) - max(start, first))

    def tail_share(self, number: int) -> float:
        """t: the share of a round's updates that train the plain net."""
        own = [s for s in self.segments if s.round == number]
        return sum(s.stop - s.start for s in own if s.phase == "tail") / sum(s.stop - s.start for s in own)

    @cached_property
    def lam(self) -> Schedule:
        """Lam by update; 0 where nothing is grown."""
        starts = {s.start: s for s in self.segments if s.phase == "hold"}
        lengths = {s.round: s.stop - s.start for s in self.segments if s.phase == "vanish"}
        rounds = {
            s.round: constant(0.0)
            if self.plan.rounds[s.round - 1].linear
            else hold_then_vanish(s.stop - s.start, lengths.get(s.round, 0))
            for s in starts.values()
        }
        begins = {s.round: start for start, s in starts.items()}

        def schedule(update: int) -> float:
            number = self.segment_at(update).round
            return rounds[number](update - begins[number]) if number else float(self.built_grown)

        return schedule

    @cached_property
    def learning_rate(self) -> Schedule:
        """Learning rate over its peak by update: a cosine over the whole run, jagged at every change of structure.

        A net that is only to teach (exit "teach") has a cosine of its own, and that of the plain net stands still.
        """
        changes = [s.start for s in self.segments if s.phase in ("base", "hold", "tail")]
        changes += [self._updates(at) for at in self.plan.restarts]
        anneals: list[tuple[int, int, Schedule]] = []
        lessons = [s for s in self.segments if s.phase == "hold" and self.plan.rounds[s.round - 1].exit == "teach"]
        for segment in self.segments:
            if not segment.round:
                continue
            plan = self.plan.rounds[segment.round - 1]
            if segment.phase == "hold" and plan.distil == "peak" and plan.exit != "teach":
                length = round(PEAK_ANNEAL * (segment.stop - segment.start))
                anneals.append((segment.stop - length, segment.stop, cosine(1.0, 0.0, steps=length)))
                changes.append(segment.stop)
        own = cosine(1.0, 0.0, steps=self.total - sum(s.stop - s.start for s in lessons))

        def later(done: int, step: int) -> float:
            return own(done + step)

        lives, cuts, taught = [own], list[int](), 0
        for lesson in lessons:
            length = lesson.stop - lesson.start
            taught += length
            lives += [cosine(1.0, 0.0, steps=length), partial(later, lesson.stop - taught)]
            cuts += [lesson.start, lesson.stop]
        envelope = rewarm(join(lives, cuts), changes, self.plan.rewarm)
        flat = constant(1.0)

        def schedule(update: int) -> float:
            start, _, anneal = next((a for a in anneals if a[0] <= update < a[1]), (0, 0, flat))
            return envelope(update) * anneal(update - start)

        return schedule

    def _updates(self, epochs: float) -> int:
        updates = epochs * self.updates_per_epoch
        if updates > MOST_UPDATES:
            raise PlanError(f"{epochs:g} epochs of {self.updates_per_epoch} updates: nobody will see the end of it.")
        return round(updates)
