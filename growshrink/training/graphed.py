"""The forward and backward pass of an update as a CUDA graph, which a small net's kernels are too short to do without.

Launching a kernel takes the processor some 5 microseconds; many kernels of a small net are done sooner. A graph is
launched once for all of them (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from growshrink.base.reading import reason

#: Passes before the one that is recorded: in the first ones libraries choose algorithms and set up their memory, and in
#: the last of them it is seen whether anything waits for the device.
FIRST = 3
#: How torch's warning of an operation that waits for the device begins.
WAITS = "called a synchronizing CUDA operation"


class GraphedBackward:
    """Loss and gradients of a function of CUDA tensors and the parameters of `model`, by a graph once it can be.

    The kernels and so the bits are those of calling it. What the function reads on the host (Python's random numbers,
    the branches it takes) is recorded once and for all; buffers, such as lam, and torch's random numbers are not. A
    function that waits for the device cannot be recorded: it is called every time, and `refused` says why.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.refused: str | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs, self._gradients = list[Tensor](), list[tuple[nn.Parameter, Tensor]]()
        self._reads, self._kind, self._calls = list[object](), list[object](), 0
        self._stream: torch.cuda.Stream  # of the first calls and of the recording, which may not be on the default one

    def use(self, loss: Callable[..., Tensor], constants: object = None) -> None:
        """Compute `loss` from now on; recorded again if the net has changed otherwise than in place, or `constants`."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        reads: list[object] = [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]
        reads.append(constants)
        for module in self.model.modules():  # the switches of a forward pass; `pixels` is what one has noted
            numbers = {key: value for key, value in vars(module).items() if isinstance(value, (int, float))}
            reads.append((type(module), {**numbers, "pixels": None}))
        if reads != self._reads:
            self._reads, self.refused = reads, None
            self._forget()
        self._loss = loss

    @property
    def recorded(self) -> bool:
        """Whether there is a graph."""
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss, detached; parameters must have no gradients before, and have those of this loss after it."""
        kind: list[object] = [(x.shape, x.dtype, x.stride(), x.device) for x in inputs]
        if kind != self._kind:  # a graph is of one shape
            self._forget()
            self._kind, self._stream = kind, torch.cuda.Stream(inputs[0].device)
        if self._graph is None and self._calls >= FIRST and self.refused is None:
            self._record(inputs)
        if self._graph is None:
            self._calls += 1
            watch = self._calls == FIRST and self.refused is None
            return self._watched(inputs) if watch else self._eagerly(inputs)
        for own, value in zip(self._inputs, inputs, strict=True):
            own.copy_(value)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._result.clone()

    def _forget(self) -> None:
        self._graph, self._inputs, self._gradients = None, [], []
        self._kind, self._calls = [], 0

    def _eagerly(self, inputs: Sequence[Tensor]) -> Tensor:
        current = torch.cuda.current_stream(inputs[0].device)  # which need not be the current device
        stream = self._stream if self.refused is None else current
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            loss = self._loss(*inputs)
            loss.backward()
        current.wait_stream(stream)
        return loss.detach()

    def _watched(self, inputs: Sequence[Tensor]) -> Tensor:
        """`_eagerly`, with a look at what waits for the device, as a recording that fails for it leaves a mess."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                loss = self._eagerly(inputs)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        texts = [str(warning.message).splitlines()[0] for warning in found]
        self.refused = next((text for text in texts if text.startswith(WAITS)), None)
        return loss

    def _record(self, inputs: Sequence[Tensor]) -> None:
        gc.collect()  # torch does it no longer: a graph that is freed while another is recorded spoils that
        graph, self._inputs = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        device = inputs[0].device
        random = torch.cuda.default_generators[device.index]
        before = random.clone_state()
        how: Any = {"stream": self._stream, "capture_error_mode": "thread_local"}  # threads that read data may go on
        try:
            with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph, **how):
                loss = self._loss(*self._inputs)  # the first of the two: a failure would leave the graph's stream
                loss.backward()
        except RuntimeError as error:
            self.model.zero_grad(set_to_none=True)
            random.graphsafe_set_state(before)  # it would take itself for recorded still
            self.refused, self._inputs = _cause(error), []
            return
        self._gradients = [(own, own.grad) for own in self.model.parameters() if own.grad is not None]
        self._graph, self._result = graph, loss.detach()


def _cause(error: BaseException) -> str:
    # a function of its own: a frame of the traceback that held an error would keep all of the pass that failed
    while error.__context__ is not None:  # that of the end of a recording says that there was another
        error = error.__context__
    return reason(error)
