"""The loss of a batch, by hand; its gradient is held against transformers' own in test_frozen.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.model.state.prefix import PrefixState
from softprompt.text.tokens import SOFT
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.objective import Objective


def test_the_loss_over_words_by_hand() -> None:
    scores = torch.tensor([[0.2, 0.5], [0.1, 0.4]]).log()
    found = Objective().loss(scores, torch.tensor([0, 1]))
    assert float(found) == pytest.approx(-math.log(0.2) - math.log(0.4), rel=1e-6)


def test_the_loss_over_labels_by_hand() -> None:
    """Label 0 has words 0 and 2: P(0) = (0.1 + 0.3) / (0.1 + 0.2 + 0.3 + 0.1)."""
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.1], [0.05, 0.05, 0.05, 0.15]]).log()
    found = Objective((0, 1, 0, 2)).loss(scores, torch.tensor([0, 2]))
    assert float(found) == pytest.approx(-math.log(0.4 / 0.7) - math.log(0.15 / 0.3), rel=1e-6)


def test_the_mean_is_over_target_tokens_or_over_examples() -> None:
    requests = [Request((3, 60), 1, ((70, 71, 72), (70,))), Request((3, 61), 1, ((70,),))]
    assert Objective().weight(requests) == 4
    assert Objective((0, 1)).weight(requests) == 2


@pytest.mark.parametrize("kind", ["vectors", "KV prefix"])
def test_text_before_the_soft_prompt_is_computed_in_the_first_step_only(
    llama: FrozenLM, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later step has the gradient of an objective that knows nothing yet."""
    shape = (5, llama.hidden_size) if kind == "vectors" else (5, *llama.trained.kv_shape)
    assert not llama.trained.why_no_kv  # which runs a prefix of its own when it is first asked for
    run_prefix, ran = FrozenLM._run_prefix, []

    def spied(lm: FrozenLM, ids: Sequence[int], *rest: Any) -> PrefixState:
        ran.append(tuple(ids))
        return run_prefix(lm, ids, *rest)

    monkeypatch.setattr(FrozenLM, "_run_prefix", spied)
    requests = [Request((3, 4, SOFT, 5, 60), 4, ((70, 71),), 0), Request((3, 4, SOFT, 5, 61), 4, ((72,),), 0)]
    gradients, generator = Gradients(llama, layout="two stages"), torch.Generator().manual_seed(0)
    for step in range(3):
        start = torch.randn(shape, generator=generator) / 4
        found, again = start.clone().requires_grad_(), start.clone().requires_grad_()
        ran.clear()
        loss, tokens = gradients.backward(Objective(), requests, [0, 0], found)
        behind = (SOFT, 5) if kind == "vectors" else (5,)
        assert ran == ([(3, 4), behind] if step == 0 else [behind])
        assert (loss, tokens) == Gradients(llama, layout="two stages").backward(Objective(), requests, [0, 0], again)
        assert found.grad is not None
        assert again.grad is not None
        torch.testing.assert_close(found.grad, again.grad, rtol=0, atol=0)
