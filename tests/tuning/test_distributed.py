"""Several processes learn what one does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.model.distributed import ALONE, Shard, World
from softprompt.model.frozen import FrozenLM
from softprompt.tuning.gradients import Gradients, Layout, Share
from softprompt.tuning.objective import Objective
from softprompt.tuning.training import Training
from tests.conftest import make_model, make_tokenizer, toy, toy_task, train_settings
from tests.processes import together

CASES: tuple[tuple[str, int, bool, Layout | None], ...] = (
    ("llama", 9, False, None),
    ("llama", 9, True, "two stages"),
    ("llama", 3, True, None),
    ("qwen3", 7, False, "two stages"),
    ("gemma3_text-sliding", 7, True, None),
    ("stablelm", 5, False, None),
)
"""Architecture, rows in the step, loss over labels, layout; three rows are fewer than four processes."""


@cache
def base(kind: str, shard: Shard | None) -> FrozenLM:
    """A tiny model with as many key/value heads as query heads, so that four processes divide them; alone if None."""
    model = make_model(kind, num_key_value_heads=4)
    world = ALONE if shard is None else World.join(shard)
    return FrozenLM(model, make_tokenizer(), name=f"tiny-{kind}", dtype="fp32", device="cpu", world=world)


def gradient(lm: FrozenLM, shares: int, rows: int, labels: bool, layout: Layout | None) -> list[torch.Tensor]:
    """Mean losses, then the gradient of each share."""
    given, vectors = [], []
    for number in range(shares):
        data, length = toy(rows + number, number), 3 + 2 * number
        task = toy_task(lm, data, length)
        objective = Objective(task.label_of_word if labels else None)
        rows_of = data.examples
        requests = [task.label_request(e) if labels else task.target_request(e) for e in rows_of]
        gold = [task.labels.index(str(e.target)) if labels else 0 for e in rows_of]
        given.append(Share(objective, requests, gold, (length, lm.hidden_size)))
        draw = torch.Generator().manual_seed(number)
        vectors.append(torch.randn(length, lm.hidden_size, generator=draw).requires_grad_())
    gradients = Gradients(lm, layout=layout, max_tokens=40 if layout == "two stages" else None)
    losses = gradients.add(gradients.prepare(given), vectors)
    return [losses, *(own.grad for own in vectors if own.grad is not None)]


def found(shard: Shard | None, shares: tuple[int, ...], kinds: tuple[str, ...]) -> list[list[torch.Tensor]]:
    return [
        gradient(base(kind, shard), count, rows, labels, layout)
        for kind, rows, labels, layout in CASES
        if kind in kinds
        for count in shares
    ]


EVERY = tuple(dict.fromkeys(case[0] for case in CASES))
WITH_PLAN = ("llama", "qwen3", "gemma3_text-sliding")
"""Those that transformers has a plan for."""


def all_ways() -> dict[str, list[list[torch.Tensor]]]:
    return {
        "none": found("none", (1, 2), EVERY),
        "fsdp": found("fsdp", (1,), EVERY),
        "tp": found("tp", (1, 2), WITH_PLAN),
    }


@pytest.mark.parametrize("size", [2, 4])
def test_the_gradient_is_that_of_one_process(spawn: Callable[..., Any], tmp_path: Path, size: int) -> None:
    ways = together(spawn, size, tmp_path, all_ways)
    expected = {
        "none": found(None, (1, 2), EVERY),
        "fsdp": found(None, (1,), EVERY),
        "tp": found(None, (1, 2), WITH_PLAN),
    }
    for rank, process in enumerate(ways):
        for way, steps in process.items():
            for case, (ours, theirs) in enumerate(zip(steps, expected[way], strict=True)):
                for one, other in zip(ours, theirs, strict=True):
                    error = float((one - other).norm() / other.norm())
                    assert error < 1e-5, f"process {rank}, {way}, case {case}: {error}"
                for one, same in zip(ours, ways[0][way][case], strict=True):
                    assert torch.equal(one, same)  # the same bits, or processes would drift apart
