"""CUDA graphs: the kernels of a whole pass, launched at once."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from softprompt.errors import SoftPromptWarning

Tensors = tuple[torch.Tensor, ...]

MOST_GRAPHS = 64
"""Shapes that are captured; further ones run kernel by kernel."""

NOTE = (
    "a step could not be captured as a CUDA graph ({reason}); training goes on without, and steps of a small base "
    "model take longer"
)
"""What is told of the steps of a training."""

WARM_UPS = 2
"""Runs before a capture, in which libraries make what they keep and compilers compile."""


@dataclass(frozen=True)
class Captured:
    """A graph, the tensors that it reads, and those that it writes.

    Attributes:
        graph: has ``replay()``.
        inputs, outputs: the tensors.
    """

    graph: Any
    inputs: Tensors
    outputs: Tensors


class Graphs:
    """Runs a function of tensors again and again, on CUDA as one captured graph for each shape of what it is given.

    The function must do the same for all inputs of a shape and wait for nothing. What it leaves behind besides what it
    returns must lie where it lay in its first run, and be the same however often it runs.

    Attributes:
        captured: how many graphs were captured.
        failed: why graphs cannot be captured here, in plain words; empty if they can. The first failure is told once,
            and everything runs kernel by kernel from then on.
    """

    def __init__(self, note: str = NOTE) -> None:
        """
        Args:
            note: the sentence that says that something runs without, with ``{reason}`` in it.
        """
        self.captured = 0
        self.failed = ""
        self._note = note
        self._held: dict[Hashable, Captured] = {}
        self._pool: Any = None
        self._told = False

    def forget(self) -> None:
        """Drops all graphs: what they write to is no longer in use."""
        self._held = {}

    def without(self, reason: str) -> None:
        """Says once, as a ``SoftPromptWarning``, that something runs kernel by kernel, and why."""
        if not self._told:
            self._told = True
            warnings.warn(self._note.format(reason=reason), SoftPromptWarning, stacklevel=3)

    def __call__(self, shape: Hashable, run: Callable[..., Tensors], *inputs: torch.Tensor) -> Tensors:
        """What ``run(*inputs)`` returns.

        Args:
            shape: what tells ``run`` and the shapes of its inputs from others.
            run: the function.
            inputs: on the device.
        """
        if self.failed or not self.on_gpu(inputs[0]):
            return run(*inputs)
        if shape not in self._held:
            if len(self._held) >= MOST_GRAPHS:
                self.without(f"there are {MOST_GRAPHS} of other shapes")
                return run(*inputs)
            try:
                self._held[shape] = self.capture(run, inputs)
                self.captured += 1
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                return self._go_without(error, run, inputs)
        held = self._held[shape]
        for own, new in zip(held.inputs, inputs, strict=True):
            own.copy_(new, non_blocking=True)
        held.graph.replay()
        return tuple(output.clone() for output in held.outputs)  # the next replay writes there

    @staticmethod
    def on_gpu(tensor: torch.Tensor) -> bool:
        """Whether it lies where graphs can be captured."""
        return tensor.device.type == "cuda"

    def capture(self, run: Callable[..., Tensors], inputs: Tensors) -> Captured:
        """The graph of ``run`` on copies of its inputs, after it has run ``WARM_UPS`` times."""
        own = tuple(tensor.detach().clone() for tensor in inputs)
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run(*own)
        torch.cuda.current_stream().wait_stream(side)
        gc.collect()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run(*own)
        self._pool = graph.pool()
        return Captured(graph, own, outputs)

    def _go_without(self, error: RuntimeError, run: Callable[..., Tensors], inputs: Tensors) -> Tensors:
        self.failed = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        torch.cuda.synchronize()
        self.without(self.failed)
        return run(*inputs)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device. A GPU gets it when it comes to it, and nothing waits for that."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
