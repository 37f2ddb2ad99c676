"""Problems for methods that train, on tiny models, and a clock of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softprompt.data.example import Dataset, Example
from softprompt.evaluation.validation import validator
from softprompt.methods import fine_tuning, prompt_tuning
from softprompt.methods import peft as by_peft
from softprompt.methods import problem as given
from softprompt.methods.fine_tuning import Tuner
from softprompt.methods.problem import Problem
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.tasks.task import Task
from softprompt.text.verbalizer import Verbalizer
from tests.conftest import TOY_LABELS, TOY_TEMPLATE, make_model, make_tokenizer, tiny, toy

PATHS = ("llama", "gpt2", "qwen3", "stablelm")
"""Architectures of the shared-prefix path, and one that runs every word as a whole sequence."""
WORDS = Verbalizer({"negative": ("bad", "a dull mess"), "positive": ("good", "a dull but great film", "very good")})


def another(kind: str, dtype: str = "fp32") -> FrozenLM:
    """A copy of ``tiny(kind)`` that may be changed."""
    return FrozenLM(make_model(kind), make_tokenizer(), name=f"tiny-{kind}", dtype=dtype, device="cpu")


def problem(kind: str = "llama", *, dtype: str = "fp32", **options: Any) -> Problem:
    settings: dict[str, Any] = {
        "lm": tiny(kind),
        "fresh": lambda: another(kind, dtype),
        "template": TOY_TEMPLATE,
        "verbalizer": TOY_LABELS,
        "train": toy(16, 1),
        "validation": toy(20, 2),
        "seed": 0,
        "budget": 60.0,
    }
    return Problem(**settings | options)


def texts(count: int) -> Dataset:
    """Rows with free text as targets."""
    rows = [Example({"input": f"film {i}"}, f"it was {i} {'great ' * (i % 3)}", where=f"{i}") for i in range(count)]
    return Dataset(tuple(rows), "texts.jsonl", "texts")


def tuner(problem: Problem, lm: FrozenLM | None = None) -> Tuner:
    """Of all weights of ``lm``."""
    lm = lm or problem.fresh()
    return Tuner(problem, lm, list(lm.model.parameters()))


class Clock:
    """A clock that goes on when it is told to, so that every second of a test is known."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._patch = 1000.0, monkeypatch
        for module in (fine_tuning, by_peft, given, prompt_tuning):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def charge(self, owner: Any, name: str, seconds: Callable[[], float]) -> list[Any]:
        """Makes a call of ``owner.name`` take ``seconds()``; returns the list of its results."""
        charged, results = self._charged(getattr(owner, name), seconds)
        self._patch.setattr(owner, name, charged)
        return results

    def charge_validations(self, seconds: float) -> list[Any]:
        """Makes every validation take ``seconds``; returns the list of their results."""
        results = list[Any]()

        def charged(task: Task, examples: Sequence[Example]) -> Any:
            return self._charged(validator(task, examples), lambda: seconds, results)[0]

        self._patch.setattr("softprompt.tuning.training.validator", charged)
        self._patch.setattr("softprompt.methods.fine_tuning.validator", charged)
        return results

    def _charged(
        self, call: Any, seconds: Callable[[], float], results: list[Any] | None = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        found = list[Any]() if results is None else results

        def charged(*arguments: Any) -> Any:
            found.append(call(*arguments))
            self.now += seconds()
            return found[-1]

        return charged, found


def idle(monkeypatch: pytest.MonkeyPatch, clock: Clock, seconds: Callable[[], float] = lambda: 1.0) -> None:
    """Gradients take time by the clock, and are none."""
    monkeypatch.setattr(Tuner, "backward", lambda self, chosen: 0.1)
    clock.charge(Tuner, "backward", seconds)


def rates(monkeypatch: pytest.MonkeyPatch, module: Any = fine_tuning) -> list[float]:
    """The learning rates of all steps to come."""
    return spied(monkeypatch, module, "learning_rate")


def spied(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    call, results = getattr(owner, name), list[Any]()

    def spy(*arguments: Any) -> Any:
        results.append(call(*arguments))
        return results[-1]

    monkeypatch.setattr(owner, name, spy)
    return results


def plain_copy(kind: str) -> Any:
    """The oracle: transformers alone, its plainest attention, every weight trainable."""
    model = make_model(kind).eval()
    model.set_attn_implementation("eager")
    return model


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates for tiny models with random weights."""
    monkeypatch.setattr(fine_tuning, "FULL_RATES", (1e-4, 3e-3, 1e-2))
    monkeypatch.setattr(by_peft, "LORA_RATES", (1e-3, 1e-2, 3e-2))


def plain_loss(model: Any, requests: Sequence[Request], gold: Sequence[int], owners: Sequence[int] | None) -> Any:
    """The mean loss, every word of every row as a sequence of its own through the model's own forward."""
    total, count = torch.zeros(()), 0
    for request, right in zip(requests, gold, strict=True):
        scores = []
        for word in request.words:
            ids = torch.tensor([[*request.ids, *word]])
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            own = range(len(request.ids) - 1, ids.shape[1] - 1)
            scores.append(torch.stack([logprobs[i, ids[0, i + 1]] for i in own]).sum())
        if owners is None:
            total, count = total - scores[0], count + len(request.words[0])
        else:
            likelihood = torch.stack(scores).exp()
            labels = [likelihood[torch.tensor(owners) == label].sum() for label in range(max(owners) + 1)]
            total, count = total - (labels[right] / sum(labels)).log(), count + 1
    return total / count


def label_loss(model: Any, task: Any, rows: Dataset) -> Any:
    requests = [task.label_request(example) for example in rows.examples]
    gold = [task.labels.index(str(example.target)) for example in rows.examples]
    return plain_loss(model, requests, gold, task.label_of_word)
