"""What a validation costs; what it says is held against arithmetic in ``test_evaluate.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from softprompt.evaluation.validation import validator
from softprompt.model import memory
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from tests.conftest import tiny, toy, toy_task


@pytest.mark.parametrize("labels", [True, False])
def test_the_prefix_is_computed_once_for_all_rows_and_anew_for_other_vectors(
    labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, data, computed = FrozenLM(tiny("llama").model, tiny("llama").tokenizer, name="tiny", dtype="fp32"), toy(9, 0), 0
    monkeypatch.setattr(memory, "MAX_TOKENS", 20)  # a few rows in each pass
    whole, score_batch, passes = FrozenLM.prefix_kv, FrozenLM.score_batch, 0

    def counted(lm: FrozenLM, ids: Sequence[int], vectors: torch.Tensor | None, before: Any = None) -> Any:
        nonlocal computed
        computed += 1
        return whole(lm, ids, vectors, before)

    def passed(*arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        return score_batch(*arguments)

    monkeypatch.setattr(FrozenLM, "prefix_kv", counted)
    monkeypatch.setattr(FrozenLM, "score_batch", passed)
    task = toy_task(lm, data) if labels else Task(lm, Template("{soft_prompt}{input} {target}"), None, 6, 128)
    validate, vectors = validator(task, data.examples), torch.zeros(6, 32)
    first = validate(vectors)
    assert computed == 1
    assert passes >= 3
    vectors += 0.3
    second = validate(vectors)
    assert computed == 2
    assert second["loss"] != first["loss"]
