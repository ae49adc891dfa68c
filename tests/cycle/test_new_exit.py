"""An exit of a round is one class statement: this file defines one, and nothing else knows of it."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small import CONFIG, SIZE, Feed, Interrupt, shorten_settle, small

import growshrink as gs
from growshrink.cycle import CyclePlan, Exit, NetAug, Round, Teacher, lay_out
from growshrink.cycle.costs import Costs
from growshrink.cycle.exits import Fuse
from growshrink.cycle.records import Fused
from growshrink.cycle.surgery import fuse_nets
from growshrink.errors import PlanError
from growshrink.layers.activations import set_lambda

PACKAGE = Path(gs.__file__).parent


@dataclass(frozen=True, kw_only=True)
class Shrunk(Exit, kind="shrunk in a test"):
    """Fuse, then pull every weight of the plain net towards 0, at the price of so many forward passes an image.

    Attributes:
        factor: On the weights.
        passes: Forward passes of the plain net.
    """

    factor: float = 0.5
    passes: int = 3
    linear = False

    def leave(self, run):
        for net in run.trainer.nets:
            set_lambda(net, 0.0)
        merged = fuse_nets(run.trainer, run.top1, run.size)
        run.record.take(merged)
        run.changed(Fused(update=run.trainer.update, round=run.record.number, max_rel=merged.max_rel))
        for net in run.trainer.nets:
            for parameter in net.parameters():
                parameter.data.mul_(self.factor)

    def macs(self, forward, train):
        return self.passes * forward


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    shorten_settle(monkeypatch)
    monkeypatch.setattr("growshrink.cycle.report.draw_curves", lambda result: False)


def plan_of(**values):
    shares = {"epochs": 4, "hold": 0.3, "vanish": 0.2, "settle": 0.0}
    return CyclePlan(rounds=(Round(**{**shares, "exit": Shrunk(factor=0.9), **values}), Round(epochs=4)), base_epochs=1)


def run(path, plan, fail_at=None, **kwargs):
    feed = Feed.make()
    feed.train.fail_at = fail_at
    torch.manual_seed(5)
    return gs.run_cycle(small(outputs=4), feed, plan, out_dir=path, config=CONFIG, **kwargs)


def test_a_new_exit_runs_resumes_and_costs_what_it_says(tmp_path):
    plan = plan_of(teacher=Teacher("peak"))
    whole = run(tmp_path / "whole", plan)
    assert [change.kind for change in whole.growth_log] == ["grow", "fuse", "grow", "fuse"]
    assert [phase.name for phase in lay_out(plan, 4).all] == [
        *("base", "hold", "vanish", "tail"),
        *("hold", "vanish", "settle", "tail"),
    ]
    costs = Costs(small(outputs=4), plan, Feed.make().train, SIZE)
    assert lay_out(plan, 4).macs(costs) == whole.training_macs
    free = plan_of(teacher=Teacher("peak"), exit=Shrunk(factor=0.9, passes=0))
    assert whole.training_macs - lay_out(free, 4).macs(costs) == 8 * 3 * costs.plain.forward
    assert whole.rounds[0].training_macs > whole.rounds[1].training_macs - 8 * 3 * costs.plain.forward

    for number, update in enumerate((6, 11, 13, 30)):
        with pytest.raises(Interrupt):
            run(tmp_path / "killed", plan, fail_at=update, resume=number > 0)
    again = run(tmp_path / "killed", plan, resume=True)
    assert again.training_macs == whole.training_macs
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


def test_its_options_go_through_json_and_are_checked():
    plan = plan_of()
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["rounds"][0]["exit"] == {"kind": "shrunk in a test", "factor": 0.9, "passes": 3}
    assert CyclePlan.from_dict(values) == plan
    with pytest.raises(PlanError, match="factor='x': must be a finite number"):
        Shrunk(factor="x")


def test_no_exit_and_no_phase_is_compared_by_name():
    """Outside of the class statements the kinds of exits and the names of phases stand in no comparison."""
    import ast

    from growshrink.cycle import phases

    names = {*Exit.kinds, *(phase.name for phase in phases.Phase.__subclasses__() if hasattr(phase, "name"))}
    names |= {"prepare", "hold", "vanish", "settle", "tail", "base"}
    found = []
    for path in (PACKAGE / "cycle").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                parts = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
                found += [
                    f"{path.name}:{node.lineno}"
                    for part in parts
                    if isinstance(part, ast.Constant) and part.value in names
                ]
    assert found == []


@pytest.mark.exhaustive
def test_a_plan_passes_few_functions(tmp_path):
    """Counted in a run of two rounds: functions that are handed the plan, or a part of it, and their files."""
    parts = (CyclePlan, Round, Exit, Teacher, NetAug)
    seen = set()

    def look(frame, event, arg):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
            if any(isinstance(value, parts) for value in given):
                seen.add((code.co_filename, code.co_qualname if hasattr(code, "co_qualname") else code.co_name))

    rounds = (
        Round(epochs=4, teacher=Teacher("peak"), exit=Fuse(accept_within=50.0)),
        Round(epochs=4, widths=NetAug("lazy"), exit=gs.cycle.Choose()),
    )
    plan = CyclePlan(rounds=rounds, base_epochs=1)
    sys.setprofile(look)
    try:
        run(tmp_path / "run", plan)
    finally:
        sys.setprofile(None)
    files = {name for name, _ in seen}
    assert 5 < len(seen) <= 50 and 3 < len(files) <= 12, (len(seen), sorted(files))
