"""Command lines out of nested dataclasses: components, compact forms, limits, help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
import tyro

from growshrink.base.config import Variant, check_fields
from growshrink.base.limits import Count, NotNegative, OneOf, Positive, Share
from growshrink.cli.forms import parts_of, pick, plain_options, read_pairs, shown
from growshrink.cli.options import ModelOptions
from growshrink.cli.program import read_options
from growshrink.errors import GrowShrinkError, PlanError, RunError


@dataclass(frozen=True, kw_only=True)
class Way(Variant):
    """How to leave."""

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Door(Way, kind="door"):
    """By the door.

    Attributes:
        slam: How loudly.
        keys: Of which locks.
    """

    slam: NotNegative | None = None
    keys: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Window(Way, kind="window"):
    """By the window."""


@dataclass(frozen=True)
class Guide:
    """Who leads.

    Attributes:
        who: The name.
        pay: A share.
    """

    who: Annotated[str, OneOf("no such guide", ("ann", "bob"))] = "ann"
    pay: Share = 0.5

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Travel:
    """Where to.

    Attributes:
        speed_limit: In m/s.
        stops: How many.
        way: The way out.
        guide: Who leads, if any.
    """

    speed_limit: Positive = 1.5
    stops: Count | None = 3
    way: Way = Door()
    guide: Guide | None = None

    def __post_init__(self):
        check_fields(self)
        if self.guide is not None and self.stops == 1:
            raise PlanError(f"stops={self.stops}: a guide wants more.")


@dataclass(frozen=True, kw_only=True)
class Bags:
    """What is taken along."""

    group: ClassVar[str] = "travel"

    bags: Count = 1
    """Number of bags."""
    weight: Positive = 20.0
    """In kg."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of a program."""

    ticket: Annotated[Path | None, tyro.conf.Positional] = None
    """The ticket."""
    loud: bool = False
    """Sing."""
    travel: Travel = Travel(speed_limit=2.0)
    luggage: Bags = pick(Bags(bags=2), "bags")


def read(*words, args=Args):
    return read_options(args, "A journey.", words)


def test_defaults_come_from_the_instance():
    assert read() == Args() and read().travel.speed_limit == 2.0 and read().luggage == Bags(bags=2)


def test_fields_of_components_are_options():
    args = read("t.pdf", "--loud", "--speed-limit", "3", "--bags", "4", "--stops", "5")
    assert args == Args(ticket=Path("t.pdf"), loud=True, travel=Travel(speed_limit=3.0, stops=5), luggage=Bags(bags=4))
    assert list(parts_of(Args)["luggage"][1]) == ["bags"]
    with pytest.raises(RunError, match="Unrecognized options: --weight"):
        read("--weight", "3")


@pytest.mark.parametrize(
    ("words", "way", "guide"),
    [
        (["--way", "window"], Window(), None),
        (["--way", "door,slam=2,keys=(1,2)"], Door(slam=2, keys=(1, 2)), None),
        (["--way", "kind=door,slam=None"], Door(), None),
        (["--guide", "bob"], Door(), Guide("bob")),
        (["--guide", "ann,pay=0.25"], Door(), Guide("ann", 0.25)),
        (["--guide", "pay=1"], Door(), Guide(pay=1)),
        (["--guide", "none"], Door(), None),
    ],
)
def test_a_dataclass_in_a_component_is_one_option(words, way, guide):
    travel = read(*words).travel
    assert (travel.way, travel.guide) == (way, guide)
    assert read("--way", shown(way)).travel.way == way
    assert guide is None or read("--guide", shown(guide)).travel.guide == guide


def test_a_new_kind_needs_nothing_else(monkeypatch):
    monkeypatch.setattr(Way, "kinds", dict(Way.kinds))

    @dataclass(frozen=True, kw_only=True)
    class Tunnel(Way, kind="tunnel"):
        depth: Positive = 1.0

    assert read("--way", "tunnel,depth=3").travel.way == Tunnel(depth=3)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--speed-limit", "0"], "--speed-limit 0: must be above 0 and at most 1,000,000,000."),
        (["--stops", "0"], "--stops 0: must be at least 1 and at most 1,000,000,000."),
        (["--stops", "1", "--guide", "bob"], "--stops 1: a guide wants more."),
        (["--way", "chimney"], "--way chimney: no such way 'chimney'; there are door, window."),
        (["--way", "none"], "--way none: no such way 'none'; there are door, window."),
        (["--way", "door,slam=-1"], "--way door,slam=-1: slam=-1: must be at least 0 and at most 1,000,000,000."),
        (["--way", "door,slma=1"], "--way door,slma=1: 'slma' is not an option of Door; did you mean slam?"),
        (["--way", "door,slam"], "--way door,slam: 'slam' must be KEY=VALUE."),
        (["--way", "slam=1"], "--way slam=1: must be one of door, window, got {'slam': 1}."),
        (["--guide", "bop"], "--guide bop: who='bop': no such guide; did you mean bob?"),
    ],
)
def test_what_is_wrong_is_said_of_the_option_as_it_is_typed(words, line):
    with pytest.raises(GrowShrinkError) as refused:
        read(*words)
    assert str(refused.value) == line


def test_what_has_a_default_cannot_be_none():
    with pytest.raises(RunError, match="--stops"):
        read("--stops", "None")


def test_options_as_json():
    args = read("t.pdf", "--way", "door,slam=2", "--guide", "bob")
    assert plain_options(args) == {
        "ticket": "t.pdf",
        "loud": False,
        "speed_limit": 2.0,
        "stops": 3,
        "way": {"kind": "door", "slam": 2, "keys": []},
        "guide": {"who": "bob", "pay": 0.5},
        "bags": 2,
    }


def test_help_has_groups_docs_and_what_there_is(capsys):
    with pytest.raises(SystemExit) as end:
        read("--help")
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert not end.value.code and "A journey." in words
    assert words.count("travel options") == 1 and "Where to." in words and "--bags INT Number of bags." in words
    assert "In m/s. (default: 2.0)" in words and "--stops INT" in words
    assert "door[,slam=None][,keys=()] | window (default: door)" in words
    assert "ann|bob[,pay=0.5] | none (default: none)" in words


@dataclass(frozen=True, kw_only=True)
class Home:
    """Stay."""

    bed: bool = True
    """A bed is there."""


def test_a_union_is_a_program_with_subcommands():
    assert read("home", "--no-bed", args=Home | Args) == Home(bed=False)
    assert read("args", "--bags", "3", args=Home | Args).luggage.bags == 3


def test_pairs_are_literals_and_words_for_them():
    pairs = ("a=False", "b=false", "c=TRUE", "d=none", "e=0.5", "f=(1,2)", "g=relu", "i=nOne_")
    expected = {
        "a": False,
        "b": False,
        "c": True,
        "d": None,
        "e": 0.5,
        "f": (1, 2),
        "g": "relu",
        "i": "nOne_",
    }
    assert read_pairs(pairs, "--x") == expected
    net, _ = ModelOptions(model_kwargs=("skip=false", "width=0.25", "depths=(1,1,1)")).create()
    assert not net.stages[0][0].skip
    with pytest.raises(RunError, match="skip='off': must be True or False"):
        ModelOptions(model_kwargs=("skip=off",)).create()
