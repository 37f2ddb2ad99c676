"""The loss of a batch, by hand; its gradient is held against transformers' own in test_frozen.py."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import tiny
from softprompt.frozen import Request
from softprompt.objective import Objective


def test_the_loss_over_words_by_hand() -> None:
    scores = torch.tensor([[0.2, 0.5], [0.1, 0.4]]).log()
    found = Objective(tiny("llama")).loss(scores, [0, 1])
    assert float(found) == pytest.approx(-math.log(0.2) - math.log(0.4), rel=1e-6)


def test_the_loss_over_labels_by_hand() -> None:
    """Label 0 has words 0 and 2: P(0) = (0.1 + 0.3) / (0.1 + 0.2 + 0.3 + 0.1)."""
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.1], [0.05, 0.05, 0.05, 0.15]]).log()
    found = Objective(tiny("llama"), torch.tensor([0, 1, 0, 2])).loss(scores, [0, 2])
    assert float(found) == pytest.approx(-math.log(0.4 / 0.7) - math.log(0.15 / 0.3), rel=1e-6)


def test_the_mean_is_over_target_tokens_or_over_examples() -> None:
    requests = [Request((3, 60), 1, ((70, 71, 72), (70,))), Request((3, 61), 1, ((70,),))]
    assert Objective(tiny("llama")).weight(requests) == 4
    assert Objective(tiny("llama"), torch.tensor([0, 1])).weight(requests) == 2
