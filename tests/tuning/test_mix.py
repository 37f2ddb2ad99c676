"""One soft prompt on the rows of several tasks: mixing rates and gradients by arithmetic."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.data.example import Dataset
from softprompt.errors import ConfigError
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning.gradients import Gradients, Work
from softprompt.tuning.job import Job
from softprompt.tuning.many import train_together
from softprompt.tuning.mix import MixOrder, Mixture
from softprompt.tuning.rows import RowOrder
from softprompt.tuning.training import Training
from tests.conftest import TOY_LABELS, TOY_TEMPLATE, tiny, toy, train_settings

OTHER = Template("{soft_prompt}Text: {input}\nKind: {target}")
OTHER_LABELS = Verbalizer({"negative": ("bad",), "positive": ("fine", "good")})


def free(rows: int, seed: int) -> Dataset:
    data = toy(rows, seed)
    texts = [replace(one, target=f"it was {one.target} number {n}") for n, one in enumerate(data.examples)]
    return replace(data, examples=tuple(texts), fingerprint=f"free {seed}")


def jobs(**options: Any) -> tuple[Job, ...]:
    config = train_settings(**{"steps": 6, "num_virtual_tokens": 5, "batch_size": 6, **options})
    made = [
        ("films", toy(40, 1), TOY_LABELS, TOY_TEMPLATE),
        ("other", toy(20, 2), OTHER_LABELS, OTHER),
        ("texts", free(12, 3), None, Template("Read. {soft_prompt}{input} => {target}")),
    ]
    return tuple(
        Job(name=name, rows=rows, validation=None, verbalizer=words, template=form, config=config)
        for name, rows, words, form in made
    )


def mixture(cap: int = 2000, **options: Any) -> Mixture:
    found = jobs(**options)
    return Mixture(name="source", jobs=found, config=found[0].config, cap=cap)


def trained(lm: FrozenLM, mixed: Mixture, **options: Any) -> Training:
    return mixed.on(lm).training(lm, **options)


@pytest.mark.parametrize(("cap", "counts"), [(100, (40, 20, 12)), (15, (15, 15, 12)), (1, (1, 1, 1))])
def test_an_epoch_has_each_tasks_rows_up_to_the_cap(cap: int, counts: tuple[int, ...]) -> None:
    sizes, first = (40, 20, 12), (0, 40, 60)
    order = MixOrder([RowOrder([None] * size) for size in sizes], cap)
    total = sum(counts)
    assert order.rows == total
    seen: list[Counter[int]] = [Counter() for _ in sizes]
    epochs = 120 // cap + 4
    for epoch in range(epochs):
        rows = order.batch(7, epoch, total)
        assert order.batch(7, 2 * epoch, total // 2) == rows[: total // 2] or total % 2
        of = [[row for row in rows if begin <= row < begin + size] for begin, size in zip(first, sizes, strict=True)]
        assert tuple(map(len, of)) == counts
        for counter, own in zip(seen, of, strict=True):
            counter.update(own)
        half = rows[: total // 2]  # spread evenly: half of an epoch has half of each
        for begin, size, count in zip(first, sizes, counts, strict=True):
            assert abs(sum(begin <= row < begin + size for row in half) - count / 2) <= 1
    for counter, size in zip(seen, sizes, strict=True):  # and over epochs, every row comes about as often as another
        assert len(counter) == size
        assert max(counter.values()) - min(counter.values()) <= 1


@pytest.mark.parametrize("layout", [None, "two stages"])
def test_the_gradient_is_the_sum_of_the_tasks_gradients(
    layout: Any, monkeypatch: pytest.MonkeyPatch, llama: FrozenLM
) -> None:
    """The mean loss of a target token over all rows of the step, from each row by itself."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Any]]] = []
    add = Gradients.add

    def spied(gradients: Gradients, work: Work, vectors: Any) -> torch.Tensor:
        losses = add(gradients, work, vectors)
        requests = [request for share in work.whole for request in share.requests]
        assert vectors[0].grad is not None
        seen.append((vectors[0].detach().clone(), vectors[0].grad.clone(), losses.sum(), requests))
        return losses

    made = Gradients.__init__

    def laid(gradients: Gradients, *given: Any, **options: Any) -> None:
        made(gradients, *given, **{**options, "layout": layout})

    monkeypatch.setattr(Gradients, "__init__", laid)
    monkeypatch.setattr(Gradients, "add", spied)
    training = trained(llama, mixture(steps=2))
    steps = list(training)
    monkeypatch.undo()
    for step, (vectors, gradient, loss, requests) in zip(steps, seen, strict=True):
        assert len(requests) == 6
        assert len({request.ids[: request.shared] for request in requests}) > 1
        leaf = vectors.clone().requires_grad_()
        total = sum(llama.score_concatenated([request], [leaf])[0, 0] for request in requests)
        tokens = sum(len(request.words[0]) for request in requests)
        assert isinstance(total, torch.Tensor)
        (expected,) = torch.autograd.grad(-total / tokens, leaf)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        assert float(loss) == pytest.approx(step.loss)
        assert step.loss == pytest.approx(-float(total.detach()) / tokens, rel=1e-4)


def test_a_mix_of_one_task_in_two_files_is_the_training_on_both(llama: FrozenLM) -> None:
    """The same rows, order by order: what a plain training on them learns from the same batches."""
    config = train_settings(steps=4, num_virtual_tokens=5, batch_size=8, validation_rows=2)
    parts = [toy(8, 1), toy(8, 2)]
    both = [
        Job(name=n, rows=rows, validation=toy(6, 9), verbalizer=TOY_LABELS, template=TOY_TEMPLATE, config=config)
        for n, rows in zip("ab", parts, strict=True)
    ]
    mixed = trained(llama, Mixture(name="source", jobs=tuple(both), config=config))
    plain = replace(parts[0], examples=(*parts[0].examples, *parts[1].examples))
    task = Task(llama, TOY_TEMPLATE, TOY_LABELS, 5, llama.window)
    order = MixOrder([RowOrder.of(part.examples, labelled=True) for part in parts], 100)
    alone = Training(task, plain, toy(6, 9), replace(config, init="vocab"), order=order)
    assert [step.loss for step in mixed] == pytest.approx([step.loss for step in alone], rel=1e-4)


def test_what_is_stored_is_a_source_for_others(llama: FrozenLM, tmp_path: Path) -> None:
    training = trained(llama, mixture(cap=15, steps=4))
    list(training)
    found = training.result()
    shares = [15 / 42, 15 / 42, 12 / 42]
    described = found.data["mix"]
    assert [one["rows_in_an_epoch"] for one in described] == [15, 15, 11]  # one of twelve is held back
    assert sum(one["share"] for one in described) == pytest.approx(1)
    assert [one["share"] for one in described] == pytest.approx(shares, abs=0.02)
    assert found.training["init"] == "vocab"
    assert Task.of(llama, found).labels == TOY_LABELS.labels
    found.save(tmp_path / "source.safetensors")
    source = SoftPrompt.load(tmp_path / "source.safetensors")
    assert source.data["mix"] == described
    target = replace(jobs(steps=2)[1], start=source).on(llama)
    assert target.config.num_virtual_tokens == 5
    going_on = target.training(llama)
    torch.testing.assert_close(going_on.vectors, found.vectors)
    training.watch.require_same_answers(tmp_path / "source.safetensors", found)


def test_a_mix_goes_on_after_a_kill_to_the_same_bits_and_in_company(llama: FrozenLM, tmp_path: Path) -> None:
    whole = trained(llama, mixture(cap=10, eval_every=2))
    list(whole)
    killed = trained(llama, mixture(cap=10, eval_every=2), folder=tmp_path)
    for step in killed:
        if step.number == 3:
            break
    del killed
    resumed = trained(llama, mixture(cap=10, eval_every=2), folder=tmp_path, resume=True)
    assert resumed.step == 2
    list(resumed)
    assert torch.equal(resumed.vectors, whole.vectors)
    together = [trained(llama, mixture(cap=10, eval_every=2)), trained(llama, mixture(cap=10, eval_every=2, seed=3))]
    for _ in train_together(together):
        pass
    torch.testing.assert_close(together[0].vectors, whole.vectors, rtol=2e-4, atol=2e-4)
    other = trained(llama, mixture(cap=10, eval_every=2), folder=tmp_path / "other")
    next(iter(other))
    other.save()
    del other
    with pytest.raises(ConfigError, match="training data"):
        trained(llama, mixture(cap=11, eval_every=2), folder=tmp_path / "other", resume=True)


def test_mistakes(llama: FrozenLM) -> None:
    found = jobs()
    with pytest.raises(ConfigError, match="at least 2"):
        Mixture(name="source", jobs=found[:1], config=found[0].config)
    with pytest.raises(ConfigError, match="--cap"):
        mixture(cap=0)
    with pytest.raises(ConfigError, match="loss"):
        mixture(loss="labels")
    with pytest.raises(ConfigError, match=r"\{soft_prompt\} first"):
        trained(llama, mixture(parametrisation="prefix"))


def test_where_no_prefix_is_shared_a_mix_is_concatenated() -> None:
    lm = tiny("stablelm")
    steps = list(trained(lm, mixture(steps=2)))
    assert [step.number for step in steps] == [1, 2]
