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

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that must be saved, besides the optimizer's memory."""
        return self.form.tensors | ({} if self.average is None else {"average": self.average})
