"""The arms of the experiment: what is compared, as plans whose epochs are shares of a run.

A new arm is one entry in `ARMS`, or one in a plan file (see `Arm.from_dict`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from growshrink.base.config import check_fields, from_dict
from growshrink.base.limits import Positive, Share, Whole
from growshrink.branches import Branch, Modulated
from growshrink.cycle import CyclePlan, Drop, FromBranches, FromPixels, MapSource, NetAug, Rewind, Round, Teacher
from growshrink.errors import PlanError
from growshrink.training.trainer import TrainConfig

GIVEN = "given"
_LINEAR = {"hold": 0.10, "vanish": 0.05, "settle": 0.85}  # grown to the end; the shares say nothing where lam is 0
_PURE = {"hold": 0.50, "vanish": 0.20, "settle": 0.30}  # grown to the end, linear towards it
_HALF = {"hold": 0.40, "vanish": 0.25, "settle": 0.05}
_NETAUG = {"hold": 0.85, "vanish": 0.15, "settle": 0.0, "exit": Drop()}  # augmented to the end, fading out
_REWIND = {"exit": Rewind(), "vanish": 0.0, "settle": 0.0}
_STRICT: dict[str, Any] = {"weight": 0.9, "asked": 0.15}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to arrive at the plain net.

    Attributes:
        about: Line that describes it, with its source.
        base: Share of the epochs before the first round.
        rounds: `epochs` of each is its share of the epochs; they and `base` sum to 1.
        restarts: Shares of the run at which the learning rate is led back up without a change of structure.
        model_kwargs: Arguments of its net over the experiment's; they are not to change what the net costs.
        init: "FOLDER/ARM", where it starts from another experiment's plain net, the classifier excepted: the
            experiment's folder, beside this one's, and the arm (see `load_start_`); "" for fresh weights.
        expansion: Expansion of a ReduceNet that is built grown; 0 for the plain net.
        gradients: Maps on the gradients, for an arm without rounds.
        config: What it trains with in place of the experiment's `TrainConfig`, by name.
        lr: Factor on the experiment's learning rates, for an optimizer that wants others; all have the same trials.
        shrinks: False for a net that is never made plain: an upper bound, judged at its peak on the val split.
    """

    about: str = ""
    base: Share = 0.0
    rounds: tuple[Round, ...] = ()
    restarts: tuple[Share, ...] = ()
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    init: str = ""
    expansion: Whole = 0
    shrinks: bool = True
    gradients: MapSource | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    lr: Positive = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if "lr" in self.config:
            raise PlanError(f"{self.about!r}: config.lr: the learning rate is the experiment's, times `lr`.")
        from_dict(TrainConfig, self.config, f"{self.about!r}: config")
        total = self.base + sum(entry.epochs for entry in self.rounds)
        if abs(total - 1.0) > 1e-6:
            raise PlanError(f"{self.about!r}: base and rounds are shares of a run, and sum to {total:g}, not 1.")

    @property
    def needs_given(self) -> bool:
        """Whether it is taught by a net that the experiment has to name."""
        return any(entry.teacher is not None and entry.teacher.of == GIVEN for entry in self.rounds)

    def plan(self, epochs: float, seed: int, given: str | None = None) -> CyclePlan:
        """Plan of a run of so many epochs; `given` is where the teacher "given" is found, with {seed} for the seed."""
        path = (given or GIVEN).replace("{seed}", str(seed))
        teachers = (entry.teacher for entry in self.rounds)
        taught = [of and replace(of, of=path if of.of == GIVEN else of.of) for of in teachers]
        rounds = zip(self.rounds, taught, strict=True)
        return CyclePlan(
            base_epochs=self.base * epochs,
            rounds=tuple(replace(entry, epochs=entry.epochs * epochs, teacher=who) for entry, who in rounds),
            restarts=tuple(share * epochs for share in self.restarts),
            seed=seed,
            gradients=self.gradients,
        )

    def trained(self, config: TrainConfig, lr: float) -> TrainConfig:
        """How it is trained, where the experiment's arms are trained by `config` and a learning rate of `lr`."""
        return replace(config, **{**self.config, "lr": lr * self.lr})

    def model(self, plain: str) -> str:
        """Name of the model it starts with."""
        return f"{plain}_x{self.expansion}" if self.expansion else plain

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Arm:
        """Read from a plan file; PlanError for unknown keys and values that cannot be."""
        return from_dict(Arm, values, "an arm of the plan")

    @property
    def mixes(self) -> bool:
        """Whether its numbers from data would be taken over the channels of all seeds side by side."""
        kinds = {kind for entry in self.rounds for kind in entry.branch} & Branch.kinds.keys()
        return any(issubclass(Branch.kinds[kind], Modulated) for kind in kinds)


def _round(about: str, *branch: str, **values: Any) -> Arm:
    """Define an arm of one round; `values` are fields of the round, and of the arm where it has no such field."""
    own = {key: values.pop(key) for key in ("base", "expansion", "shrinks") if key in values}
    kinds = {"branch": branch} if branch else {}
    return Arm(about=about, rounds=(Round(**{"epochs": 1.0, "ratio": 2.0, **kinds, **values}),), **own)


def _linear(about: str, branch: str, init: str = "paper", **values: Any) -> Arm:
    return _round(about, branch, linear=True, init=init, **_LINEAR, **values)


def _cycles(number: int, about: str, **values: Any) -> Arm:
    branches = (("bottleneck",), ("insert", "bottleneck"), ("insert", "bottleneck"))
    rounds = tuple(Round(epochs=0.9 / number, branch=branches[n], ratio=2.0, **values) for n in range(number))
    return Arm(about=about, base=0.1, rounds=rounds)


def _faded(about: str, *branch: str, **values: Any) -> Arm:
    return _round(about, *branch, ratio=4.0, init="paper", hold=0.55, vanish=0.3, settle=0.1, **values)


def _netaug(about: str, mode: str = "netaug", inplace_distil: float | None = None, **values: Any) -> Arm:
    return _round(about, ratio=4.0, widths=NetAug(mode, inplace_distil=inplace_distil), **_NETAUG, **values)


PLAIN = "plain"
ARMS: Mapping[str, Arm] = {
    PLAIN: Arm(about="the plain net, one long run", base=1.0),
    "plain-restarts": Arm(
        about="plain, the learning rate led back up wherever cycles-2 changes its structure",
        base=1.0,
        restarts=(0.1, 0.29, 0.55, 0.74),
    ),
    "plain-muon": Arm(
        about="plain, trained by Muon, stem and classifier by NAdamW (https://kellerjordan.github.io/posts/muon/)",
        base=1.0,
        config={"optimizer": "nmuon", "momentum": 0.95, "weight_decay": 0.05},
        lr=0.1,
    ),
    "gradmult-fixed": Arm(
        about="plain, its gradients mapped as 1x1 and identity beside each 3x3 would (arXiv:2205.15242)",
        base=1.0,
        gradients=FromBranches(),
    ),
    "gradmult-search": Arm(
        about="gradmult-fixed with scales per channel, found in 5 % of the updates",
        base=1.0,
        gradients=FromBranches(search=0.05),
    ),
    "gradmult-pixels": Arm(
        about="plain, its gradients scaled by how neighbouring pixels depend on each other (arXiv:2303.02733)",
        base=1.0,
        gradients=FromPixels(),
    ),
    "distil": _round(
        "plain, from scratch, taught by a grown net that is trained first and thrown away",
        **{"hold": 0.25, "teacher": Teacher("peak"), **_REWIND},
    ),
    "distil-wide": _round(
        "plain, from scratch, taught by the net twice as wide, which a quarter of the compute trains first",
        **{"branch": (), "teacher": Teacher("wider", share=0.093, **_STRICT)},
    ),
    "distil-given": _round(
        "distil-wide by a net that is trained already: only its answers are paid for",
        **{"branch": (), "teacher": Teacher(GIVEN, **_STRICT)},
    ),
    "return": _round(
        "plain, then grown to be its own teacher; the plain net continues where it was, by answers that are kept",
        **{"base": 0.4, "epochs": 0.6, "hold": 1 / 3, "teacher": Teacher("peak", asked=0.3), **_REWIND},
    ),
    "return-strict": _round(
        "return, learning little from the labels (weight 0.9, temperature 4)",
        teacher=Teacher("peak", weight=0.9, asked=0.3, temperature=4.0),
        **{"base": 0.4, "epochs": 0.6, "hold": 1 / 3, **_REWIND},
    ),
    "repvgg": _linear("1x1 and identity beside each 3x3, fused once (arXiv:2101.03697)", "repvgg"),
    "acnet": _linear("3x1 and 1x3 beside each 3x3, fused once (arXiv:1908.03930)", "acnet"),
    "dbb": _linear("diverse branches, fused once (arXiv:2103.13425)", "dbb"),
    "dbb-online": _linear(
        "dbb, trained as one kernel to afford more epochs (after OREPA, arXiv:2204.00826)", "dbb", online=True
    ),
    "dbb-online-silent": _linear(
        "dbb-online that starts as the plain net: its branches add nothing at first", "dbb", init="silent", online=True
    ),
    "orepa-online": _linear(
        "paths with a scale instead of norms, trained as one kernel (OREPA, arXiv:2204.00826)", "orepa", online=True
    ),
    "distil-wide-orepa": _linear(
        "distil-wide, the net that is taught trained as orepa-online's",
        "orepa",
        online=True,
        teacher=Teacher("wider", share=0.093, **_STRICT),
    ),
    "small": _linear(
        "for few images: silent orepa branches, trained as one kernel, which cost next to nothing and change nothing "
        "at first",
        "orepa",
        init="silent",
        online=True,
    ),
    "long": _linear(
        "for long runs: orepa-online, so far the best of those that grow after 60 epochs", "orepa", online=True
    ),
    "expandnet": _linear("1x1, 3x3, 1x1 beside each 3x3, fused once (arXiv:1811.10495)", "expandnet"),
    "one-round": _round("bottlenecks grown at once, vanished, fused (as NetBooster, arXiv:2306.13586)", **_HALF),
    "nest": _round(
        "one-round with a bottleneck in each bottleneck: a block, not a layer, beside each kernel", "nest", **_HALF
    ),
    "reducenet-x2": _round("no kernel but the bottleneck's, twice as wide inside", expansion=2, **_PURE),
    "reducenet-x4": _round("reducenet-x2, but 4 times as wide", expansion=4, **_PURE),
    "reducenet-x8": _round("reducenet-x2, but 8 times as wide", expansion=8, **_PURE),
    "netaug": _netaug("widths sampled in every update, then dropped (arXiv:2110.08890)"),
    "netaug-taught": _netaug(
        "netaug, the plain net taught by distil-wide's teacher, which is asked in every update",
        teacher=Teacher("wider", weight=0.9, share=0.32),
    ),
    "netaug-distil": _netaug("netaug, the plain net learning from the wider one in the same update", "netaug", 0.5),
    "lazy-distil": _netaug("netaug-distil in every 8th update only: our cheap mode", "lazy", 0.5),
    "cycles-2": _cycles(2, "two rounds of grow, vanish, fuse"),
    "cycles-3": _cycles(3, "three rounds"),
    "cycles-2-peak": _cycles(2, "two rounds, each taught by its own peak", teacher=Teacher("peak")),
    "cycles-2-linear": _cycles(2, "two rounds without any activation in the branches", linear=True),
    "drop-layers": _round(
        "bottlenecks that keep their activations and are cut off halfway, instead of vanishing",
        **{"hold": 0.50, "vanish": 0.0, "settle": 0.0, "exit": Drop()},
    ),
    "never-shrunk": _round(
        "the grown net itself on the same budget: what there is to be kept, on the val split",
        **{"hold": 0.98, "teacher": Teacher("peak"), "shrinks": False, **_REWIND},
    ),
    "implicit": _round(
        "one-round, the middle of each bottleneck at equilibrium, from norm 0.5 (after DEQ, arXiv:1909.01377)",
        "implicit",
        **_HALF,
    ),
    "asr": _linear(
        "channel attention fed with a learnt vector: the control that never sees data (arXiv:2304.06345)", "asr"
    ),
    "se-fade": _faded("squeeze and excitation, fading to its mean (after arXiv:1709.01507)", "se"),
    "condconv-fade": _faded(
        "4 kernels mixed by image, fading to their mean mixture (after arXiv:1904.04971)", "condconv"
    ),
    "dynamic-conv-fade": _faded(
        "4 kernels mixed by attention, lam rising in place of a temperature (after arXiv:1912.03458)",
        "dynamic_conv",
        rise=0.1,
    ),
    "weightnet-fade": _faded("slices of rows scaled by image, fading (after arXiv:2007.11823)", "weightnet"),
    "detach": _faded(
        "a large net feeds scales and kernels of every layer, and is taken off (DetachNet)",
        "guided",
        "guided_kernel",
        guide="reducenet56",
    ),
    "deepmoe-fade": _faded(
        "a shallow net gates every channel, sparsely, and is taken off (after arXiv:1806.01531)", "guided"
    ),
}
