"""A stand-in for the CUDA graphs of a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from softprompt.model.fast.graphs import Captured, Graphs, Tensors


class OnCPU(Graphs):
    """What was captured runs again, on the same tensors.

    Attributes:
        replays: how often one was run.
        record: run what PyTorch's tracer recorded, rather than the function. As a GPU, the tracer refuses what waits
            for a number, and what it records knows nothing of Python.
    """

    def __init__(self, *, record: bool) -> None:
        super().__init__("a pass could not be captured ({reason})")
        self.replays, self.record = 0, record

    @staticmethod
    def on_gpu(tensor: torch.Tensor) -> bool:
        return True

    def capture(self, run: Callable[..., Tensors], inputs: Tensors) -> Captured:
        own = tuple(tensor.clone() for tensor in inputs)
        outputs = tuple(output.clone() for output in run(*own))
        again: Callable[..., Tensors] = make_fx(run)(*own) if self.record else run

        def replay() -> None:
            self.replays += 1
            for output, new in zip(outputs, again(*own), strict=True):
                output.copy_(new)

        return Captured(SimpleNamespace(replay=replay), own, outputs)
