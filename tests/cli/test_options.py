"""Every option of every program, given what it cannot be: exit code 2, one line that says what is wrong, no work done.

The cases are generated from the programs' own dataclasses, so that a new option, or a new program, is among them.
"""

import itertools
import signal
import typing
from pathlib import Path

import pytest

from growshrink.cli.program import read_options
from program import args_of, run
from sampled import exhaustive

ROOT = Path(__file__).parents[2]
#: Modules beside the programs that are none, or take no options.
HELPERS = {
    "recipes/arm_table.py",
    "recipes/curve.py",
    "recipes/gating.py",
    "recipes/halving.py",
    "recipes/jobs.py",
    "recipes/keeping.py",
    "recipes/knob.py",
    "recipes/latency.py",
    "recipes/results.py",
    "recipes/retraining.py",
    "recipes/shrinking.py",
    "recipes/side_by_side.py",
    "recipes/starting.py",
    "recipes/telling.py",
    "recipes/trained.py",
    "tools/export_report.py",
    "tools/exporting.py",
    "tools/gpu_checks.py",
    "tools/zoo.py",
    "tools/gpu_speeds.py",
    "tools/gpu_witness.py",
    "tools/import_cost.py",
    "tools/inputs.py",
    "tools/loaders.py",
    "tools/paired.py",
    "tools/pictures.py",
    "tools/ranges.py",
    "tools/study.py",
    "tools/suite.py",
    "tools/truth.py",
}
#: What has to stand before the options; of fuzz, which of its two programs.
BEFORE = {
    "recipes/compare.py": ["PLAN"],
    "recipes/scan.py": ["PLAN"],
    "tools/export.py": ["CHECKPOINT"],
    "tools/predict.py": ["CHECKPOINT", "folder"],
    "tools/targets.py": ["CHECKPOINT"],
    "tools/why.py": ["folder"],
    "tools/fuzz.py architectures": ["architectures"],
    "tools/fuzz.py files": ["files"],
}
BEHIND = {"recipes/timm_train.py": ["timm-scripts/train.py"]}
CLASSES = {"tools/fuzz.py architectures": "Architectures", "tools/fuzz.py files": "Files"}
PROGRAMS = (
    *(f"recipes/{name}.py" for name in ("closed_loop", "compare", "fading", "grow_cycle", "implicit", "implicit_fpn")),
    *(f"recipes/{name}.py" for name in ("netaug", "one_layer")),
    *(f"recipes/{name}.py" for name in ("prune_retrain", "scan", "shrink_depth", "shrink_space", "slim", "timm_train")),
    *(f"tools/{name}.py" for name in ("angle_rank", "angle_speed", "benchmark", "claims", "coverage", "depth_latency")),
    "tools/draw_docs.py",
    *(
        f"tools/{name}.py"
        for name in (
            "equilibria",
            "exactness",
            "experiment_speed",
            "export",
            "gpu_check",
            "kills",
            "netaug_modes",
            "online_cost",
            "predict",
            "pruned_speed",
            "random_prune",
        )
    ),
    *(f"tools/{name}.py" for name in ("slim_speed", "soak", "speed_claims", "step_cost", "subset", "targets", "why")),
    *("tools/fuzz.py architectures", "tools/fuzz.py files"),
)
#: Options of one program that mean something else than another program's of the same name.
OTHER_MEANING = {
    "implicit.arms": "nets, not ways to prune",
    "implicit_fpn.images": "canvases an epoch, not images of an epoch's data",
    "timm_train.hold": "in updates: timm's script knows no rounds",
    "timm_train.vanish": "in updates",
    "angle_rank.widths": "a table of a net's widths, not how they are sampled",
    "speed_claims.only": "claims, not cases of the benchmark",
    "slim.after": "several places, or one",
    "slim.mode": "of nets with slim layers, which train in other modes",
    "slim.calibration": "batches for statistics, not images for int8",
    "draw_docs.only": "pictures, not cases of the benchmark",
    "draw_docs.out": "the pictures of the docs, which it replaces: not a run's new folder",
    "pruned_speed.images": "of a val split of noise",
    "pruned_speed.statistics": "batches of noise",
    "pruned_speed.subnets": "timed one by one, not placed among others",
    "gpu_check.plan": "an experiment's, not a run's",
    "gpu_check.only": "checks, not cases of the benchmark",
    "benchmark.authors": "with --suite, which hands it on to online_cost",
}
#: In the default run.
FEW = ("recipes/one_layer.py", "tools/fuzz.py files", "tools/step_cost.py")
NUMBERS = {int: ("0", "-1", "nan", "inf", "1000000000000"), float: ("0", "-1", "nan", "inf", "1e30")}
#: Values that an option can well have, by its name, and why; with a program's name only there.
FINE = {
    "seed": {"0": "the default", "1000000000000": "any number is a seed"},
    "data_dir": {"folder": "digits need none, so what is in it is not looked at"},
    "out": {"missing": "it is made", "folder": "an empty folder is free", "missing/below": "both are made"},
    "benchmark.file": {"missing": "it is made"},
    "netaug_modes.file": {"missing": "it is made", "missing/below": "both are made", "empty": "no results yet"},
    "timm_train.fused": {"missing": "it is made"},
    "equilibria.picture": {"missing": "it is made"},
    "speed_claims.picture": {"missing": "it is made", "missing/below": "both are made"},
    "speed_claims.file": {"missing": "it is made", "missing/below": "both are made"},
    **{f"timm_train.{name}": {"0": "the default"} for name in ("hold", "vanish")},
    "rise": {"0": "lam begins at 1"},
    "soak.file": {"missing": "it is made", "missing/below": "both are made"},
    "crop": {"0": "none"},
    "cutout": {"0": "none"},
    **{name: {"0": "off"} for name in ("resized_crop", "jitter", "randaugment", "mixup", "cutmix")},
    "pictures": {"folder": "searched for images"},
    "weight_decay": {"0": "none"},
    "label_smoothing": {"0": "none"},
    "ema_decay": {"0": "no average"},
    "fading.random": {"0": "nothing is pruned"},
    "grow_cycle.rounds": {"0": "the plain net, for comparison"},
    "export.turns": {"0": "not timed"},
    "netaug.turns": {"0": "not timed"},
    "base": {"0": "rounds from the start"},
    "settle": {"0": "50 updates anyway"},
    "rebase_after": {"0": "never"},
    "max_iterations": {"0": "nothing is dropped"},
    "null_draws": {"0": "none"},
    "prune_retrain.tuning_seeds": {"0": "each learning rate is run"},
    "alone": {"0": "judged with the supernet's weights"},
    "loss_tolerance": {"0": "no rise is tolerated"},
    "most_off": {"0": "no prediction is good enough"},
    **{f"{name}.val_fraction": {"0": "not used there"} for name in ("closed_loop", "one_layer", "shrink_depth")},
    "mean": {"0": "black"},
}
#: What is misspelt about words that are not names.
MISSPELT = {"where": "(", "freeze": "("}


def options_of(program):
    """The dataclass of a program's options, and the options by name."""
    return args_of(ROOT / program.split()[0], CLASSES.get(program, "Args"))


def kinds(hint):
    """The plain types in a type."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        return kinds(inner[0])
    if typing.get_origin(hint) is typing.Literal:
        return {str}
    return {kind for each in inner if each is not ... for kind in kinds(each)} - {type(None)} if inner else {hint}


def values_of(program):
    """Every option with every value that it is given: (name, words of the command line, value)."""
    for name, option in options_of(program)[1].items():
        (kind,) = (str,) if option.compact else kinds(option.hint)
        positional = not option.spell("x").startswith("--")
        values = {
            **NUMBERS,
            bool: ("maybe",),
            str: (MISSPELT.get(name, "misspelt"),),
            Path: ("missing", "missing/below", "folder", "text", "empty", "text/below"),
        }[kind]
        for value in values:
            before = [] if positional else BEFORE.get(program, [])
            words = [option.spell(value).replace(" ", "=", 1)]
            yield name, value, [*before, *words, *BEHIND.get(program, [])]


def reason(program, name, value):
    """Why an option can have a value; None if it cannot."""
    stem = Path(program.split()[0]).stem
    return FINE.get(f"{stem}.{name}", FINE.get(name, {})).get(value)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the words of the cases name."""
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "CHECKPOINT", "timm-scripts"):
        (tmp_path / folder).mkdir()
    (tmp_path / "timm-scripts" / "train.py").write_text("raise SystemExit('it was run')")
    (tmp_path / "PLAN").write_bytes((ROOT / "recipes" / "plans" / "digits.json").read_bytes())
    (tmp_path / "text").write_text("neither JSON nor weights nor a table")
    (tmp_path / "empty").touch()
    return tmp_path


class TooLong(BaseException):
    """It is still at work after 10 seconds; nothing in a program takes this for an error of its own."""


def too_long(number, frame):
    raise TooLong


def test_no_program_is_missing():
    found = {f"{folder}/{path.name}" for folder in ("recipes", "tools") for path in (ROOT / folder).glob("*.py")}
    assert {program.split()[0] for program in PROGRAMS} == found - HELPERS


@pytest.mark.parametrize(
    ("program", "step"), [*((program, 3) for program in FEW), *(exhaustive((program, 1)) for program in PROGRAMS)]
)
def test_what_an_option_cannot_be_is_refused_in_one_line(program, step, place, capsys):
    """Every so many of the values only, in the default run."""
    found = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    before, wrong, count = signal.signal(signal.SIGALRM, too_long), [], 0
    try:
        for name, value, words in [*values_of(program)][::step]:
            if reason(program, name, value):
                continue
            count += 1
            signal.alarm(10)
            try:
                code = run(ROOT / program.split()[0], *words)
            except (Exception, TooLong) as error:
                code = f"{type(error).__name__}: {error}"
            signal.alarm(0)
            err = capsys.readouterr().err
            if code != 2 or err.count("\n") != 1 or len(err) < 20:
                wrong.append(f"{' '.join(words)}: {code}, {err[-200:]!r}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert wrong == [] and count
    assert {path: path.read_bytes() for path in found} == found


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_fine_is_within_the_limits(program, place):
    """All options at once that have a first such value, all that have a second, ..."""
    args, options = options_of(program)
    fine, before = {}, BEFORE.get(program, [])[program in CLASSES :]
    for name, value, _ in values_of(program):
        if reason(program, name, value):
            fine.setdefault(name, []).append(options[name].spell(value))
    for spelt in itertools.zip_longest(*fine.values(), fillvalue=""):
        typed = sorted((each.replace(" ", "=", 1) for each in spelt if each), key=lambda each: each.startswith("--"))
        read_options(args, None, [*before, *typed] if typed[0].startswith("--") else typed)


def test_the_table_of_what_is_fine_names_options_only():
    names = {name for program in PROGRAMS for name, _, _ in values_of(program)}
    assert {key.split(".")[-1] for key in FINE} <= names


def test_every_option_is_declared_once():
    owners = {}
    for program in PROGRAMS:
        for name, option in options_of(program)[1].items():
            own = f"{Path(program.split()[0]).stem}.{name}"
            owners.setdefault(own if own in OTHER_MEANING else name, set()).add(
                (option.owner.__module__, option.owner.__qualname__)
            )
    assert len(owners) > 100 and owners.keys() >= OTHER_MEANING.keys()
    assert {name: found for name, found in owners.items() if len(found) > 1} == {}


def test_every_option_is_explained():
    for program in PROGRAMS:
        assert all(len(option.doc) >= 10 for option in options_of(program)[1].values()), program
