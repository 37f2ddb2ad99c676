"""Several processes learn what one does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompt.errors import ConfigError
from softprompt.generation.decoder import Generated, generate
from softprompt.model.distributed import ALONE, Shard, World
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Sampling
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
    shares_of, vectors = list[Share](), list[torch.Tensor]()
    for number in range(shares):
        data, length = toy(rows + number, number), 3 + 2 * number
        task = toy_task(lm, data, length)
        objective = Objective(task.label_of_word if labels else None)
        rows_of = data.examples
        requests = [task.label_request(e) if labels else task.target_request(e) for e in rows_of]
        gold = [task.labels.index(str(e.target)) if labels else 0 for e in rows_of]
        shares_of.append(Share(objective, requests, gold, (length, lm.hidden_size)))
        draw = torch.Generator().manual_seed(number)
        vectors.append(torch.randn(length, lm.hidden_size, generator=draw).requires_grad_())
    gradients = Gradients(lm, layout=layout, max_tokens=40 if layout == "two stages" else None)
    losses = gradients.add(gradients.prepare(shares_of), vectors)
    return [losses, *(own.grad for own in vectors if own.grad is not None)]


def found(shard: Shard | None, shares: tuple[int, ...], kinds: tuple[str, ...]) -> list[list[torch.Tensor]]:
    return [
        gradient(base(kind, shard), count, rows, labels, layout)
        for kind, rows, labels, layout in CASES
        if kind in kinds
        for count in shares
    ]


EVERY = tuple(dict.fromkeys(case[0] for case in CASES))
WITH_PLAN = ("llama", "gemma3_text-sliding")
"""Some that transformers has a plan for."""
WAYS: dict[Shard, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "none": ((1, 2), EVERY),
    "fsdp": ((1,), EVERY),
    "tp": ((1, 2), WITH_PLAN),
}


def answers(shard: Shard | None) -> tuple[torch.Tensor, list[Generated]]:
    """Scores and sampled texts of rows, fewer of the texts than four processes."""
    lm = base("llama", shard)
    data = toy(11, 3)
    task = toy_task(lm, data, 4)
    vectors = torch.randn(4, lm.hidden_size, generator=torch.Generator().manual_seed(5))
    scores = lm.score([task.label_request(example) for example in data.examples], [vectors])
    opened = [task.open_request(example, 5) for example in data.examples[:3]]
    return scores, generate(lm, opened, [vectors], Sampling(max_new_tokens=5, temperature=1.0, seed=4))


def all_ways() -> dict[str, Any]:
    return {way: (found(way, *what), answers(way)) for way, what in WAYS.items()}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_scores_and_texts_are_those_of_one_process(
    spawn: Callable[..., Any], tmp_path: Path, size: int
) -> None:
    processes = together(spawn, size, tmp_path, all_ways)
    scores, texts = answers(None)
    for way, what in WAYS.items():
        expected = found(None, *what)
        first = processes[0][way]
        for steps, (own_scores, own_texts) in (process[way] for process in processes):
            for case, (ours, theirs) in enumerate(zip(steps, expected, strict=True)):
                for one, other in zip(ours, theirs, strict=True):
                    error = float((one - other).norm() / other.norm())
                    assert error < 1e-5, f"{way}, case {case}: {error}"
                for one, same in zip(ours, first[0][case], strict=True):
                    assert torch.equal(one, same)  # the same bits, or processes would drift apart
            torch.testing.assert_close(own_scores, scores, rtol=1e-5, atol=1e-5)
            assert own_texts == texts


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"loss": "labels", "starts": 2, "batch_size": 3, "average": 0.9},
    {"parametrisation": "prefix", "eval_every": 4, "optimizer": "adafactor"},
)


def training(number: int, lm: FrozenLM, **options: Any) -> Training:
    data = toy(30, number)
    config = train_settings(**SETTINGS[number])
    return Training(toy_task(lm, data, config.longest), data, toy(12, 60 + number), config, **options)


def trained(folder: str) -> list[Any]:
    """What each setting's training did: its steps, and the soft prompt."""
    done: list[Any] = []
    for number in range(len(SETTINGS)):
        own = Path(folder, f"{World.join().rank}-{number}")
        each = training(number, base("llama", "none"), folder=own)
        steps = [(step.number, step.loss, step.tokens, step.validation) for step in each]
        done.append((steps, each.result().vectors, own.exists()))
    return done


def test_a_training_is_that_of_one_process_and_one_writes(spawn: Callable[..., Any], tmp_path: Path) -> None:
    processes = together(spawn, 3, tmp_path / "told", trained, str(tmp_path))
    for number in range(len(SETTINGS)):
        alone = training(number, base("llama", None))
        expected = [(step.number, step.loss, step.tokens, step.validation) for step in alone]
        for rank, process in enumerate(processes):
            steps, vectors, wrote = process[number]
            assert wrote == (rank == 0)
            torch.testing.assert_close(vectors, alone.result().vectors, rtol=1e-4, atol=1e-4)
            assert torch.equal(vectors, processes[0][number][1])
            for (at, loss, tokens, found), (at_alone, loss_alone, tokens_alone, found_alone) in zip(
                steps, expected, strict=True
            ):
                assert (at, tokens, found is None) == (at_alone, tokens_alone, found_alone is None)
                assert loss == pytest.approx(loss_alone, rel=1e-4)
                if found is not None and found_alone is not None:
                    assert found["loss"] == pytest.approx(found_alone["loss"], rel=1e-4)
                    assert found["rows"]["correct"] == found_alone["rows"]["correct"]


def refused() -> list[str]:
    """What tensor parallel says of models that it does not divide."""
    said = []
    for kind, sizes in (("llama", {"num_key_value_heads": 1}), ("gpt2", {}), ("mixtral", {"num_local_experts": 2})):
        with pytest.raises(ConfigError) as error:
            FrozenLM(
                make_model(kind, **sizes),
                make_tokenizer(),
                name=kind,
                dtype="fp32",
                device="cpu",
                world=World.join("tp"),
            )
        said.append(str(error.value))
    with pytest.raises(ConfigError) as error:
        training(2, base("llama", "tp"))
    return [*said, str(error.value)]


def test_what_tensor_parallel_does_not_divide_is_refused(spawn: Callable[..., Any], tmp_path: Path) -> None:
    for heads, no_plan, experts, prefix in together(spawn, 2, tmp_path, refused):
        assert "1 key/value heads for 2 processes" in heads
        assert "no plan for dividing gpt2" in no_plan
        assert "plain linear layers" in experts
        assert "mixtral" in experts
        assert all("--shard fsdp" in one for one in (heads, no_plan, experts))
        assert "heads are divided" in prefix


def test_one_process_alone_has_nothing_to_divide() -> None:
    with pytest.raises(ConfigError) as error:
        World.join("fsdp")
    assert "torchrun" in str(error.value)
    assert World.join() == ALONE


@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 5))
def test_rows_are_dealt_evenly(lengths: list[int], size: int) -> None:
    dealt = World(0, size).deal(lengths)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(lengths)))
    counts, tokens = [len(rows) for rows in dealt], [sum(lengths[row] for row in rows) for rows in dealt]
    assert max(counts) - min(counts) <= 1
    assert max(tokens) - min(tokens) <= max(lengths, default=0)
