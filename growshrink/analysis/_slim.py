"""slim and cut: a net whose deployed channels and blocks have widths, and the dense nets it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from growshrink.algebra.dataflow import FROZEN_NORMS, Flow, trace
from growshrink.algebra.inputs import Arguments, ExampleInputs, InputLike, given_inputs, output_leaves
from growshrink.analysis.channels import ChannelSpace
from growshrink.base.copying import copy_net, ties
from growshrink.base.limits import Share, SomeOrAll, checked
from growshrink.base.reading import reason
from growshrink.errors import WidthError, check_model
from growshrink.layers.grown import grown_modules
from growshrink.layers.slim import ChannelGroup, Entries, OwnStatistics, SkippableBlock, SlimAxes, SlimAxis, is_slim
from growshrink.layers.swaps import keep_statistics, make_dense, make_skippable, make_slim
from growshrink.layers.widths import Slots, Width, active_width, width_space
from growshrink.proofs.probes import randomize_norms_
from growshrink.supernet.files import MAKERS
from growshrink.transforms._fuse import check_unchanged

Axes = Mapping[tuple[str, bool], Mapping[str, Entries]]
"""As of `ChannelSpace.axes`."""


@checked(WidthError, levels=Sequence[SomeOrAll])
def slim(
    model: nn.Module,
    levels: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    *,
    blocks: bool = False,
    own_statistics: bool = False,
    inplace: bool = False,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
) -> nn.Module:
    """Make a net run at any width of its deployed channels: a supernet whose subnets are prefixes of its weights.

    Channels that depend on each other (a residual stream, a depthwise convolution and what feeds it) are one group with
    one width. `growshrink.width_space`, `set_width`, `active_width` and `NetAugTask` work as on a grown net. At any
    width it computes in eval mode, bit for bit, what the net cut there does; keys stay. A width that was not trained
    alone needs `growshrink.calibrate_bn`.

    Args:
        model: Any convolutional net without branches that Torch-Pruning (the extra `prune`) can trace.
        levels: Rising shares of each group's channels that are choices; the last is 1.
        blocks: Residual blocks (what gives its input back once its parameters are 0) become slots too, 1 or 0 (off).
            At each level of the space all of them are on.
        own_statistics: Batch norms have statistics of their own for each level (set by `calibrate_bn` there).
        inplace: Work on `model` itself; otherwise on a deep copy.
        input_size: `(C, H, W)`; None takes the model's own.
        example_inputs: In place of a size, a batch; see `growshrink.grow`.

    Groups in a grouped convolution, a group norm or a bare parameter stay whole: `growshrink.analysis.left_alone`.

    Raises:
        AnalysisError: Torch-Pruning is not there, cannot trace the net, or finds no channels.
        WidthError: The net is grown or slim already, or would compute something else than the nets cut out of it.

    Source: Yu et al., Slimmable Neural Networks (arXiv:1812.08928); Yu and Huang, Universally Slimmable Networks
    (arXiv:1903.05134); statistics by level: Li et al., Dynamic Slimmable Network (arXiv:2103.13258).

    >>> net = gs.slim(net, levels=(0.5, 1.0))
    >>> gs.width_space(net).choices["stem.conv"]
    (2, 4)
    """
    check_model(model, scripted=False)
    if not levels or list(levels) != sorted(set(levels)) or levels[-1] != 1.0:
        raise WidthError(f"{levels=}: must be rising shares of the channels above 0, the last of them 1.")
    if name := next((name for name in grown_modules(model)), None):
        raise WidthError(f"{name} carries branches: growshrink.fuse comes before growshrink.slim.")
    if is_slim(model):
        raise WidthError("the model is slim already: growshrink.cut makes a plain net of it.")
    if name := next((name for name, norm in model.named_modules() if isinstance(norm, FROZEN_NORMS)), None):
        raise WidthError(f"{name} is frozen, and cannot be cut: freeze the norms of a net that growshrink.cut made.")
    space = ChannelSpace(model, given_inputs(input_size, example_inputs))
    axes = space.axes()
    _check_layers(model, {name for name, _ in axes})
    widths = {name: [max(1, round(level * all_[-1])) for level in levels] for name, all_ in space.choices.items()}
    batch = space.inputs.batch(2)
    found = _residual_blocks(model, batch) if blocks else []
    commit = partial(_commit, axes=axes, levels=widths, blocks=found, left_alone=dict(space.left_alone))
    _prove(model, space, batch, commit)
    model = model if inplace else copy_net(model)
    commit(model)
    if own_statistics:
        keep_statistics(model, width_space(model).all_levels)
    return model


MAKERS["slim"] = slim, "levels, blocks and own_statistics"


def left_alone(model: nn.Module) -> dict[str, str]:
    """Groups of channels that a slim net always runs whole, by their first layer, with the reason.

    >>> gs.analysis.left_alone(gs.slim(net))
    {}
    """
    return dict(vars(model).get("slim_left_alone", {}))


@checked(WidthError, survival=Mapping[str, Share] | None)
def cut(
    model: nn.Module,
    width: Width | None = None,
    *,
    survival: Mapping[str, float] | None = None,
    inplace: bool = False,
    input_size: InputLike = None,
    example_inputs: ExampleInputs | None = None,
) -> nn.Module:
    """The dense plain net that a slim net is at one width: smaller tensors, blocks that are off are identities.

    It computes, bit for bit, what the slim net does in eval mode (checked on a random input), and loads strictly into
    the net made with that width where the architecture has an argument for it.

    Args:
        model: A slim net.
        width: A width of it; None is the active one.
        survival: Factors of what blocks add, by name, folded into the last layer of each: the shares of updates in
            which they ran in stochastic depth.
        inplace: Work on `model` itself; otherwise on a deep copy.
        input_size: `(C, H, W)` for the check; None takes the model's own.
        example_inputs: In place of a size, a batch; see `growshrink.grow`.

    Raises:
        WidthError: The model is not slim, has no such width, or a block ends in no layer that takes a factor.
        FuseError: The cut net would differ; the model is then as it was.

    >>> net = gs.slim(net, levels=(0.5, 1.0))
    >>> plain = timm.create_model("reducenet20", width=0.125, depths=(1, 1, 1), num_classes=10)
    >>> plain.load_state_dict(gs.cut(net, gs.width_space(net).base).state_dict())
    <All keys matched successfully>
    """
    if not is_slim(model):
        raise WidthError("the model is not slim, so there is nothing to cut: growshrink.slim comes first.")
    model = model if inplace else copy_net(model)
    if width is not None:
        with active_width(model, width):
            return cut(model, survival=survival, inplace=True, input_size=input_size, example_inputs=example_inputs)
    flow = trace(model, given_inputs(input_size, example_inputs))
    ends = _last_layers(model, flow, survival or {})
    _check_ends(model, ends, flow)
    factors = {layer: (survival or {})[name] for name, layer in ends.items()}
    commit = partial(_commit_cut, factors=factors)
    check_unchanged(model, commit, flow.inputs, prepare=partial(_scale_outputs, factors=factors))
    commit(model)
    return model


def _check_layers(model: nn.Module, names: set[str]) -> None:
    for name in sorted(names):
        if "weight" not in model.get_submodule(name)._parameters:
            raise WidthError(f"{name}: its weight is computed by a hook or parametrization, and cannot be cut.")
    for owners in ties(model):
        if len({owner for owner, _ in owners}) > 1 and (tied := {owner for owner, _ in owners} & names):
            raise WidthError(f"{tied.pop()} shares a parameter with another layer, which would be cut differently.")


def _commit(
    model: nn.Module,
    axes: Axes,
    levels: Mapping[str, Sequence[int]],
    blocks: Sequence[str],
    left_alone: dict[str, str],
) -> None:
    groups = {name: ChannelGroup(name, tuple(own), own[-1]) for name, own in levels.items()}
    shared = OwnStatistics()
    for name, layer in list(model.named_modules()):
        sides = [axes.get((name, outputs)) for outputs in (True, False)]
        if any(sides):
            found, tensors = [], [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
            for dim, side in enumerate(sides):
                parts = [(groups[group], entries) for group, entries in (side or {}).items()]
                length = next((t.shape[dim] for t in tensors if t.ndim > dim), getattr(layer, "num_features", 0))
                found.append(SlimAxis(length, parts) if parts else None)
            make_slim(layer, SlimAxes(found[0], found[1], shared))
    for name in blocks:
        make_skippable(model.get_submodule(name))
    vars(model).update(slim_left_alone=left_alone, slim_layers=tuple({name for name, _ in axes}))


@torch.no_grad()
def _prove(model: nn.Module, space: ChannelSpace, batch: Arguments, commit: Any) -> None:
    """WidthError unless the slim net computes at two widths what Torch-Pruning's cut computes."""
    plain = copy_net(model).eval().to(memory_format=torch.contiguous_format)  # another layout rounds in another way
    randomize_norms_(plain)
    net, like = copy_net(plain), next(model.parameters())
    commit(net)
    slots, widths = Slots(net), width_space(net)
    for width in (widths.base, widths.sample(0, 0)):
        width = {name: width[name] if name in space.choices else 1 for name in width}  # blocks on
        slots.set(width)
        kept = {name: np.arange(width[name]) for name in space.choices}
        nets = (space.cut(kept, plain), net)
        try:
            expected, found = (output_leaves(batch.to(like.device, like.dtype).run(one)) for one in nets)
        except Exception as error:  # whatever a forward may raise
            raise WidthError(f"{type(model).__name__}: does not run on fewer channels ({reason(error)}).") from error
        if not all(torch.equal(leaf, found[path]) for path, leaf in expected.items()):
            raise WidthError(f"{type(model).__name__}: with fewer channels active it is not the net that has fewer.")


@torch.no_grad()
def _residual_blocks(model: nn.Module, batch: Arguments) -> list[str]:
    """Innermost modules that give their input back once their parameters are 0."""
    replica = copy_net(model).eval()
    randomize_norms_(replica)
    found: list[str] = []

    def observe(module: nn.Module, args: tuple[Any, ...], name: str) -> None:
        if len(args) != 1 or not isinstance(args[0], Tensor):
            return
        trial = copy_net(module)
        for part in trial.modules():
            part._forward_pre_hooks.clear()
        for parameter in trial.parameters():
            parameter.zero_()
        output = trial(args[0].clone())
        if isinstance(output, Tensor) and torch.equal(output, args[0]):
            found.append(name)

    for name, module in replica.named_modules():
        if name and any(True for _ in module.children()) and any(True for _ in module.parameters()):
            module.register_forward_pre_hook(partial(observe, name=name))
    like = next(model.parameters())
    batch.to(like.device, like.dtype).run(replica)
    if not found:
        raise WidthError(f"{type(model).__name__}: blocks=True, but none of its modules is a residual block.")
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def _last_layers(model: nn.Module, flow: Flow, survival: Mapping[str, float]) -> dict[str, str]:
    """The layer that alone ends what a block adds, by name of the block."""
    ends: dict[str, str] = {}
    for name, share in survival.items():
        if not isinstance(block := dict(model.named_modules()).get(name), SkippableBlock):
            raise WidthError(f"survival: {name} is no block of this model that can be off.")
        last = [
            key
            for key, module in model.named_modules()
            if key.startswith(f"{name}.") and len(module._parameters) and flow.calls.get(key) == 1
            and (ops := [reader.op for reader in flow.readers.get(key, ())]) and (ops == ["add"] or ops[0] == "add_")
        ]  # fmt: skip
        if block.skipped or share == 1.0:
            continue
        if len(last) != 1:
            raise WidthError(f"{name}: what it adds ends in {len(last)} layers, so it takes no factor.")
        ends[name] = last[0]
    return ends


@torch.no_grad()
def _check_ends(model: nn.Module, ends: Mapping[str, str], flow: Flow) -> None:
    """WidthError unless each block gives its input back once the layer that ends it gives 0."""
    replica, like = copy_net(model).eval(), next(model.parameters())

    def observe(block: nn.Module, args: tuple[Any, ...], output: Tensor, name: str) -> None:
        if not torch.equal(output, args[0]):
            raise WidthError(f"{name}: what it adds is not 0 where {ends[name]} gives 0, so it takes no factor.")

    for name, layer in ends.items():
        replica.get_submodule(layer).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        replica.get_submodule(name).register_forward_hook(partial(observe, name=name))
    if ends:
        flow.inputs.batch(2).to(like.device, like.dtype).run(replica)


def _scale_outputs(model: nn.Module, factors: Mapping[str, float]) -> None:
    for name, factor in factors.items():
        model.get_submodule(name).register_forward_hook(lambda module, args, out, factor=factor: out * factor)


@torch.no_grad()
def _commit_cut(model: nn.Module, factors: Mapping[str, float]) -> None:
    find: Any = getattr(model, "get_classifier", lambda: None)
    classifier = find()
    before = getattr(classifier, "in_features", None)
    make_dense(model)
    for name, factor in factors.items():
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.mul_(factor)
    for key in ("num_features", "head_hidden_size"):  # what timm makes another classifier with
        if before is not None and vars(model).get(key) == before:
            setattr(model, key, classifier.in_features)
