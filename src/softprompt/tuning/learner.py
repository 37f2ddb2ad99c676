"""What one start of a training learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from softprompt.tuning.parametrisation import Parametrisation


@dataclass(eq=False)
class Learner:
    """What one start learns.

    Attributes:
        number: 0 for the first start.
        form: what is learned.
        optimizer: of its tensors.
        average: float32, the moving average of the soft prompt's numbers; None where none is asked for.
        found: the validation after its short run; None before, and where there is only one start.
    """

    number: int
    form: Parametrisation
    optimizer: torch.optim.Optimizer
    average: torch.Tensor | None
    found: dict[str, Any] | None = None

    @torch.no_grad()
    def numbers(self) -> torch.Tensor:
        """The soft prompt as it is now, float32."""
        return self.form.fold() * self.form.unit

    def gradient(self, folded: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Takes the gradient at the soft prompt's numbers back to what is learned.

        Args:
            folded: ``form.fold()``.
            numbers: the leaf that was computed with, ``folded`` in the base model's units, with its gradient.

        Returns:
            The norm of the gradient over all tensors, float32 ``[]`` on the device.
        """
        assert numbers.grad is not None
        self.optimizer.zero_grad()
        torch.autograd.backward(folded, numbers.grad * self.form.unit)
        norms = [tensor.grad.norm() for tensor in self.form.tensors.values() if tensor.grad is not None]
        norm: torch.Tensor = torch.stack(norms).norm()
        return norm

    def descend(self, lr: float, clip: float, decay: float) -> None:
        """One step of the optimizer, with the gradient clipped to the norm ``clip`` unless that is 0, and of the
        average, if there is one."""
        if clip:
            torch.nn.utils.clip_grad_norm_(self.form.tensors.values(), clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.average is not None:
            self.average.lerp_(self.numbers(), 1 - decay)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that must be saved, besides the optimizer's memory."""
        return self.form.tensors | ({} if self.average is None else {"average": self.average})
