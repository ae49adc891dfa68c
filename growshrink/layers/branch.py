"""What a branch is: something trainable beside or behind a layer, linear once its activations have vanished."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from growshrink.algebra.convmap import ConvMap
from growshrink.errors import GrowError


class Branch(nn.Module, ABC):
    """Something trainable beside or behind a convolution, linear once its activations have vanished.

    A subclass takes `(conv, ratio)` and implements `forward` and `as_convmap`. It ends in a batch norm called `norm`,
    or names in `outermost` the factor it ends in instead. One that does not fit every convolution also implements
    `reason_against`. `kind=""` makes a base of other branches, which `grow` does not know. A kind that is defined again
    (a notebook cell run twice) replaces the one before, with a warning; a kind of growshrink's own cannot be replaced.
    """

    kinds: ClassVar[dict[str, type[Branch]]] = {}
    #: What `BranchSpec(published=True)` builds in place of a kind, or beside it.
    published: ClassVar[dict[str, type[Branch]]] = {}
    kind: ClassVar[str]
    was_grown = True  # the net is; see growshrink.set_lambda
    #: The branch reads the input of its convolution. The kernel's gradient is then what the merged kernel's would be,
    #: so an optimizer may keep the kernel's state when the branch is fused.
    parallel: ClassVar[bool] = True
    #: Merging it gives the convolution a bias, which must have somewhere to go.
    biased: ClassVar[bool] = True
    #: The parameter that is zero in a silent branch (with the bias beside it), by name: the last factor of every path.
    outermost: ClassVar[str] = "norm.weight"
    #: It convolves with a kernel for each image, `kernels(x)`, which is summed with the layer's own before that runs.
    per_image: ClassVar[bool] = False
    #: It acts on single channels: `grow` attaches it to the batch norm behind the layer, where there is one.
    behind_norm: ClassVar[bool] = False

    def __init_subclass__(cls, kind: str, published: bool = False, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind
        if published:
            Branch.published[kind] = cls
            return
        if kind in Branch.kinds:
            old = Branch.kinds[kind].__module__
            if old.startswith("growshrink.") and old != cls.__module__:
                raise GrowError(f"kind={kind!r}: a branch of growshrink ({old}) has it; give {cls.__name__} another.")
            warnings.warn(f"branch kind {kind!r} of {old} is replaced by that of {cls.__module__}.", stacklevel=3)
        if kind:
            Branch.kinds[kind] = cls

    def __init__(self, conv: nn.Conv2d, ratio: float) -> None:
        super().__init__()
        self.linear = False  # in what it trains; see make_linear_
        self.skipped = False  # width 0: the convolution runs without this branch; see growshrink.set_width
        self.spec: object = None  # what it was built from; see growshrink.save_grown
        self.joined = False  # its kernels are part of its convolution's; see growshrink.layers.swaps.attach
        self.merged = False  # it runs as part of its convolution's kernel; see growshrink.collapse_online

    @classmethod
    def reason_against(cls, conv: nn.Conv2d) -> str:
        """Why `conv` cannot carry this branch, exactly or at all; empty where it can."""
        return ""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What the branch adds, `(N, O, H', W')`, to its convolution's output.

        Args:
            x: Input of the convolution, `(N, I, H, W)`.
            y: Its output so far, earlier branches included, `(N, O, H', W')`.
        """

    @abstractmethod
    def as_convmap(self, kernel: ConvMap) -> ConvMap:
        """What the branch adds, as an affine map of x, differentiable in its parameters.

        `kernel` is the map of the convolution so far (x to y), its dtype the one to compute in.
        """

    def as_chains(self, kernel: ConvMap) -> list[list[ConvMap]]:
        """The same map as a sum of maps in a row, of which `collapse_online` multiplies out what is cheaper so."""
        return [[self.as_convmap(kernel)]]

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernels `(N, O, I // groups, kh, kw)` and biases `(N, O)` of a branch that is `per_image`."""
        raise NotImplementedError

    def make_linear_(self, scale: float, trained: str) -> None:
        """Take the branch's norms and activations away and freeze factors, until what it adds is linear in its weights.

        Constants, among them the factor `scale` on every output channel, are buffers, which nothing trains. `trained`
        is which convolution of several in a row is trained, the "first" or the "last".
        """
        raise GrowError(f"branch={self.kind!r} has no form without norms.")

    def silence_(self) -> None:
        """Make the branch add exactly 0, in train and eval mode, while every weight but this one can learn."""
        if self.linear:  # every weight can, whatever their values
            for parameter in self.parameters():
                nn.init.zeros_(parameter)
            return
        owner, _, key = self.outermost.rpartition(".")
        module = self.get_submodule(owner)
        nn.init.zeros_(getattr(module, key))
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def middle_width(out_channels: int, groups: int, ratio: float) -> int:
    """`ratio` times the output channels, to the nearest multiple of the groups, at least one per group."""
    return max(1, round(ratio * out_channels / groups)) * groups
