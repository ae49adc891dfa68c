"""Class swaps: a layer becomes its grown class, that one its online class, and back, in place.

A swap leaves the object what it is to everybody who holds it: parameters, buffers, their names, hooks and the state
that an optimizer keeps. No other file assigns `__class__`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from growshrink.base.copying import copy_net
from growshrink.errors import GrowError, check_model
from growshrink.layers.activations import vanishing
from growshrink.layers.bottleneck import PureBottleneck
from growshrink.layers.branch import Branch
from growshrink.layers.grown import Grown, GrownConv2d, GrownConv2dSame
from growshrink.layers.grown_linear import GrownConv1d, GrownConvTranspose2d, GrownLinear, GrownNorm2d, GrownNormAct2d
from growshrink.layers.online import OnlineBottleneck, OnlineConv2d, OnlineConv2dSame, OnlineLinear, OnlineModule
from growshrink.layers.slim import SkippableBlock, SlimAxes, SlimLayer, SlimNorm, add_statistics, write_active
from growshrink.layers.widths import Slots, Width, active_width


class Swap(NamedTuple):
    """The classes that one object goes through."""

    plain: type[nn.Module] | None  # None: it is grown from birth
    grown: type[Grown] | type[PureBottleneck]
    online: type[OnlineModule] | None  # None: it has no merged form


#: What a subclass inherits from `plain` if it computes the same; one that has its own of any is left alone.
_COMPUTE = ("forward", "_conv_forward", "_output_padding", "__call__", "_call_impl", "__getattr__")
TABLE = (
    Swap(nn.Conv2d, GrownConv2d, OnlineConv2d),
    Swap(Conv2dSame, GrownConv2dSame, OnlineConv2dSame),
    Swap(nn.Linear, GrownLinear, OnlineLinear),
    Swap(nn.Conv1d, GrownConv1d, None),
    Swap(nn.ConvTranspose2d, GrownConvTranspose2d, None),
    Swap(nn.BatchNorm2d, GrownNorm2d, None),
    Swap(BatchNormAct2d, GrownNormAct2d, None),
    Swap(None, PureBottleneck, OnlineBottleneck),
)
GROWN_CLASSES = {row.plain: row.grown for row in TABLE if row.plain}
ONLINE_CLASSES = {row.grown: row.online for row in TABLE if row.online}
_EXPANDED_CLASSES = {online: grown for grown, online in ONLINE_CLASSES.items()}


def class_in_table(layer: nn.Module) -> type[nn.Module] | None:
    """The class in `GROWN_CLASSES` that `layer` computes what its class says: its own, or the one it inherits from."""
    for plain in GROWN_CLASSES:
        same = (getattr(type(layer), name, None) is getattr(plain, name, None) for name in _COMPUTE)
        if isinstance(layer, plain) and all(same):
            return plain
    return None


_MADE: dict[tuple[Any, Any], Any] = {}


def base_class(module: nn.Module) -> Any:
    """The class of a grown module, where it was made over a subclass of its plain class the one in the table."""
    return vars(type(module)).get("base_class", type(module))


def _over(plain: Any, base: Any) -> Any:
    """`base` with whatever a subclass `plain` of its own plain class adds to that (methods, hooks of state_dicts)."""
    if plain is None or plain is getattr(base, "plain_class", None):
        return base

    def reduced(self: nn.Module, protocol: int) -> tuple[Any, ...]:  # a pickle cannot look this class up by name
        return _bare, (plain, base), *object.__reduce_ex__(self, max(2, protocol))[2:]

    body = {"plain_class": plain, "base_class": base, "__reduce_ex__": reduced}
    return _MADE.setdefault((plain, base), type(f"{base.__name__}Over{plain.__name__}", (base, plain), body))


def _bare(plain: Any, base: Any) -> Any:
    return object.__new__(_over(plain, base))


def attach(layer: nn.Module, branches: Iterable[Branch]) -> Grown:
    """Attach branches to a layer of a class in `GROWN_CLASSES`, or already grown; returns the same object.

    >>> conv = nn.Conv2d(3, 4, 3)
    >>> isinstance(gs.layers.attach(conv, [gs.Branch.kinds["lora"](conv, 0.5)]), gs.layers.GrownConv2d)
    True
    """
    if isinstance(layer, Grown):
        layer.branches.extend(branches)
    else:
        plain = class_in_table(layer)
        if plain is None:
            known = ", ".join(cls.__name__ for cls in GROWN_CLASSES)
            raise GrowError(f"a {type(layer).__name__} cannot carry branches, only {known}.")
        layer.__class__ = _over(type(layer), GROWN_CLASSES[plain])
        assert isinstance(layer, Grown)
        layer.branches = nn.ModuleList(branches).train(layer.training)
    join = isinstance(layer, GrownConv2d)
    for branch in layer.branches:
        join &= branch.parallel  # one that reads the output finds in it what came before, and nothing else
        branch.joined = join and branch.per_image
    return layer


def to_plain(layer: Grown) -> nn.Module:
    """Remove the branches of a grown layer, which becomes the class it came from; returns the same object.

    >>> type(gs.layers.to_plain(gs.grow(net).stages[0][0].conv)) is nn.Conv2d
    True
    """
    expand_online(layer, inplace=True)
    mark_left(layer.branches)
    del layer.branches
    layer.__class__ = layer.plain_class  # type: ignore[assignment]
    return layer


def make_slim(layer: nn.Module, axes: SlimAxes) -> None:
    """Make any layer one that runs at the active width of its channels."""
    layer.__class__ = _over(type(layer), SlimNorm if isinstance(layer, _BatchNorm) else SlimLayer)
    layer.slim = axes  # type: ignore[assignment]


def make_skippable(block: nn.Module) -> None:
    """Make a residual block one that can be off."""
    block.__class__ = _over(type(block), SkippableBlock)


def make_dense(model: nn.Module) -> None:
    """Undo both, in place, at the active width: what does not run is gone; blocks that are off are identities."""
    for module in list(model.modules()):
        for key in ("slim_left_alone", "slim_layers"):
            vars(module).pop(key, None)
        if isinstance(module, SlimLayer):
            write_active(module)
            del module.slim
            module.__class__ = module.plain_class  # type: ignore[assignment]
        for name, child in list(module.named_children()):
            if isinstance(child, SkippableBlock):
                if child.skipped:
                    setattr(module, name, nn.Identity().train(child.training))
                vars(child).pop("skipped", None)
                child.__class__ = child.plain_class  # type: ignore[assignment]


def keep_statistics(
    model: nn.Module, widths: Sequence[Width], within: Callable[[list[str]], bool] = lambda names: True
) -> None:
    """Give the batch norms of a slim net, those `within`, statistics of their own at each of these widths, in place.

    A width may leave out slots that these norms have nothing to do with.
    """
    shared = next(module.slim.statistics for module in model.modules() if isinstance(module, SlimLayer))
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, SlimLayer):
            make_slim(module, SlimAxes(None, None, shared))
    before = Slots(model).get()
    for width in widths:
        with active_width(model, {**before, **width}):
            for name, module in model.named_modules():
                if isinstance(module, SlimLayer) and within([name]):
                    add_statistics(module, len(shared.widths))
        shared.widths.append(dict(width))
    shared.choose(before)


def mark_left(module: nn.Module) -> None:
    """Mark the parameters of a module that leaves its net, for optimizers that hold them (see `left_net`)."""
    for parameter in module.parameters():
        vars(parameter)["left_net"] = True


def left_net(parameter: nn.Parameter) -> bool:
    """Whether it belonged to a branch that has been merged or dropped."""
    return getattr(parameter, "left_net", False)


def go_online(module: nn.Module) -> None:
    """Change the class of a grown module whose linear branches are marked (`branch.merged`), and hold its parts."""
    module.__class__ = _over(getattr(module, "plain_class", None), ONLINE_CLASSES[base_class(module)])
    assert isinstance(module, OnlineModule)
    for part in module.held_parts():
        for _, act in vanishing(part):
            act.held = True
    module.train(module.training)


def expand_online(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Undo `collapse_online`: the branches run one by one again, their norms learn statistics, lam may rise.

    A net that is not collapsed comes back as it is; a copy unless `inplace`.

    >>> net = gs.expand_online(gs.collapse_online(gs.grow(net, "repvgg"), choose="always"))
    """
    check_model(model)
    model = model if inplace else copy_net(model)
    for module in list(model.modules()):
        if isinstance(module, OnlineModule):
            for part in module.held_parts():
                part.train(module.training)
                for _, act in vanishing(part):
                    act.held = False
            for branch in getattr(module, "branches", ()):
                branch.merged = False
            for key in ("collapsed", "timing", "pixels"):
                module.__dict__.pop(key, None)
            module.__class__ = _over(getattr(module, "plain_class", None), _EXPANDED_CLASSES[base_class(module)])
    return model
