"""Do the equilibria of a net converge, how fast, and what do K explicit steps lose?

    python tools/equilibria.py reducenet20_deq
    python tools/equilibria.py reducenet20_deq --weights runs/NAME/plain.safetensors --picture equilibria.png
    python tools/equilibria.py reducenet20 --branches implicit --steps 1 4 8

A line for each layer at equilibrium, on random images or with trained weights: the bound of its operator norm, the
spectral radius of its derivative at the equilibrium (the rate of plain iteration in the end), evaluations to the
solver's tolerance, the worst residual of a sample, and the relative error after K plain steps, worst sample, beside
what the bound allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growshrink as gs
from growshrink.algebra import Solver, operator_bound
from growshrink.base.limits import Count, InFile
from growshrink.base.reading import read_tensors
from growshrink.base.writing import check_unwritten, save_picture
from growshrink.cli.forms import pick
from growshrink.cli.options import GrowOptions, ModelOptions
from growshrink.cli.program import run_program
from growshrink.errors import EquilibriumError, RunError
from growshrink.layers import ConvEquilibrium, ImplicitReLU
from growshrink.proofs.probes import random_images
from inputs import NetOptions, PictureOptions


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options of equilibria."""

    weights: InFile | None = None
    """A state_dict (.safetensors); without it the net is fresh."""
    steps: tuple[Count, ...] = (1, 2, 4, 8)
    """The K of explicit steps."""
    drawn: PictureOptions = PictureOptions()
    net: NetOptions = NetOptions(models=("reducenet20_deq",), batch_size=16)
    model: ModelOptions = pick(ModelOptions(), "model_kwargs")
    rounds: GrowOptions = pick(GrowOptions(branches=("none",)), "branches")


@dataclass(frozen=True)
class Row:
    """What is said of a layer; `errors` are the actual ones after each K, and what the bound allows."""

    name: str
    bound: float
    radius: float
    evaluations: int
    residual: float
    errors: tuple[tuple[float, float], ...]
    residuals: dict[str, tuple[float, ...]]  # by method


def main(args: Args) -> None:
    """Measure and print."""
    check_unwritten("--picture", args.drawn.picture)
    if len(args.net.models) != 1:
        raise RunError(f"{' '.join(args.net.models)}: one model at a time.")
    model, _ = replace(args.model, model=args.net.models[0]).create(num_classes=10)
    size = (3, args.net.pixels, args.net.pixels)
    if branches := [kind for kind in "+".join(args.rounds.branches).split("+") if kind != "none"]:
        model = gs.grow(model, branches, input_size=size)
    if args.weights:
        model.load_state_dict(read_tensors(args.weights))
    rows = measure(model.eval(), random_images(size, args.net.batch_size, torch.float32, 0), args.steps)
    titles = "".join(f"  after {k:2d} (allowed)   " for k in args.steps)
    print(f"{'layer':44s} {'bound':>6s} {'radius':>6s} {'evals':>5s} {'residual':>8s}{titles}")
    for row in rows:
        errors = "".join(f"  {found:8.1e} ({allowed:7.1e})" for found, allowed in row.errors)
        print(f"{row.name:44s} {row.bound:6.3f} {row.radius:6.3f} {row.evaluations:5d} {row.residual:8.1e}{errors}")
    if args.drawn.picture:
        draw(args.drawn.picture, rows)


def measure(model: nn.Module, images: Tensor, steps: tuple[int, ...]) -> list[Row]:
    """A row for each layer that solves an equilibrium; EquilibriumError if there is none."""
    seen: dict[str, Tensor | list[Tensor]] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "solver", None), Solver)}
    if not layers:
        raise EquilibriumError("the model has no layer at equilibrium; with --branches implicit it is grown with some.")

    def note(name: str, module: nn.Module, args: tuple[Tensor | list[Tensor]]) -> None:
        seen[name] = args[0]

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return [_row(name, layers[name], inputs, steps) for name, inputs in seen.items()]


def system(layer: nn.Module, inputs: Tensor | list[Tensor]) -> tuple[Callable[[Tensor], Tensor], Tensor, float]:
    """The function that is solved for these inputs, its start, and the bound of its operator norm."""
    if isinstance(layer, ConvEquilibrium):
        assert isinstance(inputs, list)
        sizes, packed = [list(u.shape[2:]) for u in inputs], torch.cat([u.flatten(1) for u in inputs], 1)
        kernel = layer.kernels(packed)[0].detach()
        bound = float(operator_bound(kernel.flatten(0, 1), len(kernel)).max())
        return partial(layer.step, u=packed, kernel=kernel, sizes=sizes), F.relu(packed), bound
    assert isinstance(layer, ImplicitReLU) and isinstance(inputs, Tensor)
    kernel = layer.kernel(inputs.shape[1], inputs.dtype).detach()
    return (
        partial(layer.step, u=inputs, kernel=kernel),
        inputs,
        float(operator_bound(kernel, layer.recurrence.groups).max()),
    )


def _row(name: str, layer: nn.Module, inputs: Tensor | list[Tensor], steps: tuple[int, ...]) -> Row:
    func, start, bound = system(layer, inputs)
    solver = layer.solver
    assert isinstance(solver, Solver)
    exact = replace(solver, tol=1e-6, max_steps=500)
    found = {"anderson": replace(exact, method="anderson"), "plain": replace(exact, method="plain")}
    residuals = {method: one.solve(func, start, name).residuals for method, one in found.items()}
    value = exact.solve(func, start, name).value
    own = solver.solve(func, start, name)
    z, errors, count = start, [], 0
    size_N, first_N = (t.flatten(1).norm(dim=1) for t in (value, func(start) - start))
    for k in sorted(steps):
        for _ in range(k - count):
            z = func(z)
        count = k
        allowed = bound**k / (1 - bound) * first_N / size_N
        errors.append((float(((z - value).flatten(1).norm(dim=1) / size_N).max()), float(allowed.max())))
    radius = spectral_radius(func, value)
    return Row(name, bound, radius, len(own.residuals), own.residuals[-1], tuple(errors), residuals)


def spectral_radius(func: Callable[[Tensor], Tensor], value: Tensor, iterations: int = 60, last: int = 20) -> float:
    """Spectral radius of the derivative of `func` at `value`, largest sample, by the last of the power iterations."""
    point = value.detach().requires_grad_()
    with torch.enable_grad():
        out = func(point)
    vector = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    growth = torch.zeros(len(value))
    for iteration in range(iterations):
        (vector,) = torch.autograd.grad(out, point, vector, retain_graph=True)
        norm = vector.flatten(1).norm(dim=1).clamp_min(torch.finfo(vector.dtype).tiny)
        vector = vector / norm.view(-1, *[1] * (vector.dim() - 1))
        if iteration >= iterations - last:
            growth += norm.log() / last
    return float(growth.exp().max())


def draw(path: Path, rows: list[Row]) -> None:
    """Residuals by evaluation, a panel for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    for axis, method in zip(panels, ("plain", "anderson"), strict=True):
        for row in rows:
            values = row.residuals[method]
            axis.semilogy(range(1, len(values) + 1), values, marker=".", label=f"{row.name} (radius {row.radius:.2f})")
        axis.set(title=method, xlabel="evaluations")
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("worst residual of a sample")
    if len(rows) <= 6:
        panels[1].legend(fontsize=7)
    save_picture(figure, path, dpi=120)


if __name__ == "__main__":
    run_program(main, Args, __doc__)
