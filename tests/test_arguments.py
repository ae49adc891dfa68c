"""Every public name, given what it cannot take: a GrowShrinkError that says what is wrong, or for arguments that are
missing Python's own TypeError.

The table names each public name of growshrink; a test proves that it does.
"""

import copy
import inspect
import types
from traceback import extract_tb
from typing import get_type_hints

import pytest
import timm
import torch
from torch import nn
from torch.optim import LBFGS, SGD

import growshrink as gs
from growshrink.algebra import ConvMap
from growshrink.base.limits import fault
from growshrink.layers import get_width
from growshrink.schedules import ClosedLoop
from nets import images, net

NAN, INF = float("nan"), float("inf")
SIZE = (3, 16, 16)
NO_SIZES = (None, 3, (3, 16), (3, -1, 16), "3x16x16")
NO_NETS = (None, 3, "resnet18", [1])


PLAIN = net("reducenet20", depths=(1, 1, 1))
GROWN = gs.grow(PLAIN, input_size=SIZE)
SLIM = gs.slim(PLAIN, (0.5, 1.0), input_size=SIZE)
ROUTED = gs.route(SLIM, gs.width_space(SLIM), after="stages.0", input_size=SIZE)


def plain():
    return copy.deepcopy(PLAIN)


def grown():
    return copy.deepcopy(GROWN)


def linear():
    return gs.grow(plain(), "expandnet", input_size=SIZE)


def each(function, values, **options):
    """One call for each value of the first argument."""
    return [lambda value=value: function(value, **options) for value in values]


def option(function, name, values, *makers, **options):
    """One call for each value of an option, on fresh nets."""
    return [lambda v=value: function(*(make() for make in makers), **options, **{name: v}) for value in values]


BAD = {
    "VanishingReLU": each(gs.layers.VanishingReLU, (-0.1, 1.1, NAN, INF, None, "1", [])),
    "set_lambda": each(gs.set_lambda, NO_NETS, value=0.5)
    + each(lambda v: gs.set_lambda(grown(), v), (-0.1, 2, NAN, INF, None, "0", [])),
    "get_lambda": each(gs.get_lambda, NO_NETS),
    "ConvMap": [lambda: ConvMap(), lambda: ConvMap.identity(2).then(ConvMap.identity(3))],
    "AngleTable": [lambda: gs.analysis.AngleTable(), lambda: gs.analysis.AngleTable({}, {}, 3)],
    "angle": [
        lambda: gs.angle(plain(), plain(), None, [], input_size=SIZE),
        lambda: gs.angle(None, None, gs.width_space(grown()), [], input_size=SIZE),
        lambda: gs.angle(grown(), plain(), gs.width_space(grown()), [{}], input_size=SIZE),
        lambda: gs.angle(grown(), grown(), gs.width_space(grown()), [{"x": 1}], input_size=SIZE),
    ],
    "random_prune": option(gs.random_prune, "macs", (0, -1, NAN, INF, 2.0, None, "half"), plain, input_size=SIZE)
    + option(gs.random_prune, "criterion", ("l3", None, 3), plain, macs=0.5, input_size=SIZE)
    + option(gs.random_prune, "tolerance", (-1, NAN, "x"), plain, macs=0.5, input_size=SIZE),
    "rank": [
        lambda: gs.rank({}, []),
        lambda: gs.rank({"a": [1.0, 2.0]}, [1.0]),
        lambda: gs.rank({"a": [NAN, 1.0, 2.0]}, [1.0, 2.0, 3.0]),
        lambda: gs.rank({"a": [1.0, 2.0, 3.0]}, [1.0, NAN, 3.0]),
        lambda: gs.rank(None, None),
        lambda: gs.rank({"a": ["x", "y", "z"]}, [1.0, 2.0, 3.0]),
    ],
    "Branch": [lambda: gs.Branch(nn.Conv2d(1, 1, 1), 1.0)],
    "BranchSpec": each(lambda kind: gs.BranchSpec(kind=kind), ("bottlneck", "", None, 3, []))
    + each(lambda ratio: gs.BranchSpec(kind="lora", ratio=ratio), (0, -1, NAN, INF, "2", [])),
    "ClosedLoop": each(ClosedLoop, (0, -1, NAN, None, "9", 1.5))
    + [lambda k=k, v=v: ClosedLoop(9, **{k: v}) for k in ("hold", "fall", "tolerance", "smoothing", "final", "every")
       for v in (-1, NAN, "x", INF)],
    "assert_equivalent": [lambda: gs.assert_equivalent(plain(), None, input_size=SIZE)]
    + option(gs.assert_equivalent, "num_inputs", (0, -1, NAN, "2"), plain, plain, input_size=SIZE),
    "compare": each(lambda a: gs.compare(a, plain(), input_size=SIZE), NO_NETS)
    + option(gs.compare, "input_size", (*filter(None, NO_SIZES), (3, 0, 16), (3, NAN, 16)), plain, plain)
    + option(gs.compare, "num_inputs", (0, -1, NAN, "2"), plain, plain, input_size=SIZE),
    "profile": each(lambda m: gs.profile(m, SIZE), NO_NETS)
    + each(lambda size: gs.profile(plain(), size), (3, (3, 16), (3, -1, 16), "3x16x16")),
    "verify": each(lambda m: gs.verify(m, input_size=SIZE), NO_NETS)
    + option(gs.verify, "input_size", ((3, 16), (1, 16, 16)), grown)
    + [lambda: gs.verify(grown(), "fuse", input_size=SIZE)],
    "CyclePlan": each(lambda v: gs.CyclePlan(rounds=(), base_epochs=v), (0, -1, NAN, INF, None, "1"))
    + each(lambda v: gs.CyclePlan(rounds=(), base_epochs=1, rewarm=v), (-1, 0.5, NAN, None, "1"))
    + each(lambda v: gs.CyclePlan(rounds=v), (None, 3, "x", (3,), ({},), []))
    + each(gs.CyclePlan.from_dict, (None, 3, [], {}, {"round": []}, {"rounds": 3})),
    "CycleResult": [lambda: gs.cycle.CycleResult()],
    "Round": [lambda: gs.Round()]
    + [lambda k=k, v=v: gs.Round(**{"epochs": 5.0, k: v})
       for k in ("epochs", "ratio", "hold", "vanish", "settle", "distil_weight", "distil_asked", "temperature")
       for v in (-1, NAN, INF, None, "1", [])]
    + [lambda k=k, v=v: gs.Round(epochs=5.0, **{k: v})
       for k in ("branch", "control", "augment", "exit", "distil") for v in ("x", None, 3, [], ("x",))],
    "run_cycle": [
        lambda: gs.run_cycle(None, None, None, out_dir="never"),
        lambda: gs.run_cycle(plain(), None, gs.CyclePlan(rounds=(), base_epochs=1), out_dir="never"),
        lambda: gs.run_cycle(plain(), plain(), gs.CyclePlan(rounds=(), base_epochs=1), out_dir="never"),
    ],
    "MergeReport": [lambda: gs.depth.MergeReport()],
    "affinity_defect": each(gs.depth.affinity_defect, NO_NETS, input_size=SIZE)
    + each(lambda size: gs.depth.affinity_defect(plain(), input_size=size), ((3, 16), (1, 16, 16), "x")),
    "collapse": each(lambda m: gs.collapse(m, SIZE), NO_NETS)
    + each(lambda size: gs.collapse(net("reducenet20", linear=True), size), (3, (3, 16), (1, 16, 16), (3, -1, 3))),
    "merge_report": each(gs.depth.merge_report, NO_NETS)
    + each(lambda d: gs.depth.merge_report(plain(), if_costlier=d), ("maybe", None, 3)),
    "merge_runs": each(gs.depth.merge_runs, NO_NETS)
    + each(lambda d: gs.depth.merge_runs(plain(), if_costlier=d), ("maybe", None, 3))
    + each(lambda w: gs.depth.merge_runs(plain(), where=w), ("nothing", "(", [["x", "y"]], 3)),
    "nonaffine_modules": each(lambda m: gs.depth.nonaffine_modules(m, input_size=SIZE), NO_NETS),
    "attach": each(lambda layer: gs.layers.attach(layer, []), (*NO_NETS, nn.LayerNorm(1), nn.Conv3d(1, 1, 1))),
    "PureBottleneck": each(lambda v: gs.layers.PureBottleneck(4, v, 4), (-1, None, "4", NAN))
    + [lambda: gs.layers.PureBottleneck(4, 4, 4, groups=3)],
    "NetAugTask": each(gs.NetAugTask, (*NO_NETS, plain()), verbose=False)
    + [lambda k=k, v=v: gs.NetAugTask(grown(), verbose=False, **{k: v})
       for k, vs in {"mode": ("x", None, 3), "alpha": (-1, NAN, INF, "x"), "inplace_distil": (-1, 2, NAN, "x"),
                     "every": (0, -1, 0.5, "x")}.items() for v in vs],
    "choose_width": each(lambda m: gs.choose_width(m, [], lambda n: 0.0), NO_NETS),
    "sort_channels": each(gs.sort_channels, NO_NETS),
    "sync_optimizer": each(lambda m: gs.sync_optimizer(SGD(plain().parameters()), m), NO_NETS)
    + [lambda: gs.sync_optimizer(SGD(plain().parameters()), plain()),
       lambda: gs.sync_optimizer(LBFGS(PLAIN.parameters()), PLAIN)],
    "branch_parameters": each(gs.branch_parameters, NO_NETS),
    "LambdaScheduler": each(lambda m: gs.LambdaScheduler(m, lambda update: 1.0), (*NO_NETS, plain()))
    + each(lambda s: gs.LambdaScheduler(grown(), s), (None, 3, "cosine", lambda update: 2.0, lambda update: None)),
    "unroll": each(lambda m: gs.unroll(m, 2), NO_NETS)
    + each(lambda n: gs.unroll(timm.create_model("mdeq_tiny"), n), (0, -1, 1.5, None, "2"))
    + [lambda: gs.unroll(plain(), 2)],
    "penalties": each(lambda m: gs.penalties(m, images(1)), NO_NETS),
    "calibrate_bn": each(lambda m: gs.calibrate_bn(m, [images(*SIZE)]), NO_NETS)
    + each(lambda b: gs.calibrate_bn(plain(), b), ([], None, 3, ["x"], [None], "x")),
    "compile_gradients": each(gs.compile_gradients, NO_NETS) + [lambda: gs.compile_gradients(plain())],
    "drop": each(gs.drop, NO_NETS) + [lambda: gs.drop(net("reducenet20_x2"))],
    "collapse_online": each(gs.collapse_online, NO_NETS)
    + [lambda: gs.collapse_online(plain()), lambda: gs.collapse_online(linear(), choose="x")]
    + each(lambda b: gs.collapse_online(linear(), batch_size=b), (0, -1, NAN, None, "2"))
    + each(lambda r: gs.collapse_online(linear(), rounds=r), (0, -1, NAN, None))
    + each(lambda c: gs.collapse_online(linear(), choose=c), (["x"], 3, None)),
    "expand_online": each(gs.expand_online, NO_NETS),
    "collapse_report": each(gs.transforms.collapse_report, NO_NETS),
    "CollapseReport": [lambda: gs.transforms.CollapseReport()],
    "fold": each(gs.fold, NO_NETS) + [lambda: gs.fold(grown()), lambda: gs.fold(plain(), input_size=(1, 8, 8))],
    "fuse": each(gs.fuse, NO_NETS) + [lambda: gs.fuse(grown())]
    + each(lambda w: gs.fuse(grown(), width=w), ({}, {"x": 1}, 3, "base", [])),
    "grow": each(gs.grow, NO_NETS)
    + each(lambda b: gs.grow(plain(), b), ("bottlneck", "", [], None, 3, [3], ["lora", "x"]))
    + each(lambda r: gs.grow(plain(), ratio=r), (0, -1, NAN, INF, None, "2", [], 1e300))
    + each(lambda w: gs.grow(plain(), where=w), ("nothing", "(", [], ["x"], ["stem.conv"], 3, [3], lambda n, m: False))
    + each(lambda i: gs.grow(plain(), init=i), ("silence", None, 3))
    + each(lambda s: gs.grow(plain(), input_size=s), ((3, 16), (1, 16, 16), (3, -1, 16), "x", 3)),
    "save_grown": each(lambda m: gs.save_grown(m, "never"), (*NO_NETS, plain(), net("reducenet20_x2"))),
    "load_grown": [lambda: gs.load_grown(plain(), "never"), lambda: gs.load_grown(plain(), __file__)],
    "growth_report": each(gs.growth_report, NO_NETS)
    + each(lambda b: gs.growth_report(plain(), b), ("bottlneck", [], 3)),
    "WidthSpace": each(gs.layers.WidthSpace.from_json, ("", "{}", "[]", "null", None, 3, "[" * 10**5))
    + each(lambda s: gs.width_space(grown()).level(s), (-1, 2, NAN, None, "x"))
    + each(lambda m: gs.width_space(grown()).check(m), (*NO_NETS, plain())),
    "active_width": [lambda w=w: gs.active_width(grown(), w).__enter__() for w in ({}, {"x": 1}, None, 3, "base")],
    "get_width": each(get_width, (*NO_NETS, plain())),
    "allocate": each(lambda m: gs.allocate(m, gs.width_space(SLIM), macs=0.5, score=len), (*NO_NETS, plain()))
    + each(lambda share: gs.allocate(SLIM, gs.width_space(SLIM), macs=share, score=len, input_size=SIZE), (0, -1)),
    "route": each(lambda m: gs.route(m, gs.width_space(SLIM), after="stages.0"), (*NO_NETS, plain()))
    + each(lambda a: gs.route(SLIM, gs.width_space(SLIM), after=a, input_size=SIZE), ("x", "", [], ["x"], "stages.2"))
    + each(lambda v: ROUTED.loss(images(*SIZE), torch.zeros(1).long(), price=v), (None, "a", NAN, {}))
    + each(ROUTED.always, (None, "a", NAN, -1, 9)) + each(ROUTED.cascade, (None, "a", NAN, -1, 2))
    + each(ROUTED.calibrate, (None, 3, "a")),
    "slim": each(gs.slim, NO_NETS) + [lambda: gs.slim(grown())]
    + each(lambda levels: gs.slim(plain(), levels), ((), (1.0, 0.5), (0.5,), (0, 1.0), (NAN, 1.0), "x", None, 3)),
    "cut": each(gs.cut, (*NO_NETS, plain())) + each(lambda w: gs.cut(SLIM, w), ({}, {"x": 1}, 3, "base"))
    + each(lambda s: gs.cut(SLIM, survival=s), ({"x": 0.5}, {"stem.conv": 2}, {"x": None}, [], "x", 3)),
    "set_width": each(lambda w: gs.set_width(grown(), w), ({}, {"x": 1}, None, 3, "base"))
    + each(lambda v: gs.set_width(grown(), dict.fromkeys(get_width(grown()), v)), (-1, 10**9, NAN, 1.5, None, "8")),
    "width_space": each(gs.width_space, (*NO_NETS, plain()))
    + [lambda k=k, v=v: gs.width_space(grown(), **{k: v})
       for k in ("factor", "diversity", "divisor") for v in (0, -1, NAN, INF, "x", [])],
}  # fmt: skip
#: Where the other names of the table are.
ROOMS = ("algebra", "analysis", "cycle", "depth", "layers", "schedules", "transforms")


def public_names():
    return {
        name for name, value in vars(gs).items() if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def test_the_table_names_every_public_name():
    in_rooms = {name for room in ROOMS for name in vars(getattr(gs, room)) if name in BAD}
    assert public_names() <= BAD.keys() <= public_names() | in_rooms


def test_the_public_surface_stays_small():
    assert len(public_names() | {"schedules", "errors"}) <= 45


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_taken_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = []
    for number, call in enumerate(BAD[name]):
        try:
            call()
            wrong.append(f"{number}: accepted")
        except Exception as error:
            wrong += [f"{number}: {fault}" for fault in faults_of(error)]
    assert wrong == []
    assert list(tmp_path.iterdir()) == []


def faults_of(error):
    """What is wrong with an error that a user sees."""
    missing = type(error) is TypeError and extract_tb(error.__traceback__)[-1].filename == __file__
    if not missing and not isinstance(error, gs.errors.GrowShrinkError):
        return [f"{type(error).__name__}: {error}"[:300]]
    return [] if str(error) and "\n" not in str(error) else [f"says {error!r}"]


#: For each kind of argument one of it, in place of those that have no default.
VALID = (GROWN, gs.width_space(GROWN), images(*SIZE), 0.5, 1, SIZE, "silent", len, [], {}, SGD(PLAIN.parameters()))
WRONG = (None, "a", NAN, 3, -1, object(), [None], {"a": None})


def wrong_arguments():
    """Every public function, with one argument that its annotation excludes, as far as that matters."""
    for name in sorted(public_names()):
        function = getattr(gs, name)
        hints = get_type_hints(function) if inspect.isfunction(function) else {}
        needed = [p.name for p in inspect.signature(function).parameters.values() if hints and p.default is p.empty]
        base = {key: next((v for v in VALID if not fault(hints[key], v)), None) for key in needed}
        for key, hint in hints.items():
            if hint is not bool and key not in ("return", "input_size", "example_inputs"):
                yield from ((function, name, base, key, value) for value in WRONG if fault(hint, value))


def test_an_argument_of_another_kind_is_refused_by_every_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong, count = [], 0
    for function, name, base, key, value in wrong_arguments():
        count += 1
        try:
            context = function(**{**base, key: value})
            if hasattr(context, "__enter__"):
                context.__enter__()
            wrong.append(f"{name}({key}={value!r}): accepted")
        except Exception as error:
            wrong += [f"{name}({key}={value!r}): {fault}" for fault in faults_of(error)]
    assert wrong == []
    assert count > 500
