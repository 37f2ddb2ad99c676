"""Training: what it learns, which rows it sees when, what it keeps, and when it ends."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from softprompt.data.example import Dataset, Example
from softprompt.errors import ConfigError, DataError, SoftPromptWarning, TrainingError
from softprompt.evaluation.validation import validator
from softprompt.inspection.start import starting_vectors
from softprompt.model.fast.layers import LayerModes
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.tasks.length import default_num_virtual_tokens, label_list
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning import compilation
from softprompt.tuning.config import DEFAULT_STEPS, TrainConfig
from softprompt.tuning.gradients import Gradients, Work
from softprompt.tuning.start import initial_vectors
from softprompt.tuning.training import Training
from tests.conftest import ALL, TOY_TEMPLATE, scripted, tiny, toy, toy_task, train_settings


def run(config: TrainConfig, *, kind: str = "llama", rows: int = 30, **options: Any) -> Training:
    """A finished training on toy data."""
    data = toy(rows, 0)
    training = Training(toy_task(tiny(kind), data, config.longest), data, toy(20, 1), config, **options)
    for _ in training:
        pass
    return training


# --- learning ------------------------------------------------------------------------------------------------


def test_it_learns_and_changes_no_weight() -> None:
    """Chance is 0.5: of 200 rows, guessing gets 160 right with a probability below 1e-16."""
    lm = tiny("llama")
    before = lm.weights_digest()
    data, validation = toy(300, 0), toy(200, 1)
    config = train_settings(num_virtual_tokens=8, batch_size=16, steps=80, eval_every=10, lr=0.3, loss="labels")
    training = Training(toy_task(lm, data, 8), data, validation, config, name="toy")
    steps = list(training)
    assert sum(step.loss for step in steps[-10:]) / 10 < 0.5 * steps[0].loss
    best = training.result()
    assert best.metrics[0]["split"] == "validation"
    assert best.metrics[0]["metric"] == "accuracy"
    assert best.metrics[0]["n"] == 200
    assert best.metrics[0]["value"] >= 0.8
    kept = steps[best.training["best_step"] - 1].validation
    assert kept is not None
    assert best.metrics[0]["value"] == kept["value"]
    task = Task.of(lm, best)
    scores = task.label_logprobs(lm.score([task.label_request(e) for e in validation.examples], [best.vectors]))
    predicted = [task.labels[i] for i in scores.argmax(dim=1).tolist()]
    right = sum(p == e.target for p, e in zip(predicted, validation.examples, strict=True))
    assert right / 200 == best.metrics[0]["value"]
    assert lm.weights_digest() == before


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("loss", ["lm", "labels"])
def test_every_architecture_trains_and_stays_frozen(kind: str, loss: str) -> None:
    lm = tiny(kind)
    before, embedding = lm.weights_digest(), lm.embedding.clone()
    training = run(train_settings(init="labels", loss=loss, lr=0.3), kind=kind)
    assert lm.weights_digest() == before
    assert torch.equal(lm.embedding, embedding)
    start = initial_vectors(lm, 6, init="labels", seed=0, label_words=training.task.label_words)
    assert not torch.equal(training.result().vectors, start)


def test_free_text_targets_are_learned_by_their_tokens() -> None:
    data = Dataset(tuple(Example({"input": f"{i} film"}, "great") for i in range(12)), "free.jsonl", "f")
    task = Task.for_data(tiny("llama"), data, TOY_TEMPLATE, num_virtual_tokens=6)
    assert task.verbalizer is None
    training = Training(task, data, data, train_settings(steps=40, lr=0.5))
    steps = list(training)
    assert steps[-1].loss < 0.7 * steps[0].loss  # three random layers cannot be steered all the way
    best = training.result()
    assert best.training["loss"] == "lm"
    assert best.verbalizer is None
    assert best.metrics[0]["metric"] == "perplexity"
    losses = [step.validation["loss"] for step in steps if step.validation]
    assert best.metrics[0]["value"] == pytest.approx(math.exp(min(losses)))


def test_the_result_says_what_was_done() -> None:
    training = run(train_settings(steps=7, seed=3), name="mine")
    made = training.result()
    lm = tiny("llama")
    assert (made.name, made.base) == ("mine", "tiny-llama")
    assert (made.base_fingerprint, made.tokenizer_fingerprint) == (lm.fingerprint, lm.tokenizer_fingerprint)
    assert made.template == TOY_TEMPLATE.text
    assert made.verbalizer == {"negative": ("negative",), "positive": ("positive",)}
    assert made.vectors.shape == (6, 32)
    assert made.vectors.dtype == torch.float32
    assert made.training["steps_done"] == 7
    assert made.training["stopped"] == "steps"
    assert made.training["best_step"] in (5, 7)
    assert made.training["seed"] == 3
    assert made.training["dtype"] == "float32"
    assert made.training["tokens"] == training.tokens > 0
    assert made.data == {
        "train": {"source": "toy.jsonl", "fingerprint": "toy-30-0", "rows": 30},
        "validation": {"source": "toy.jsonl", "fingerprint": "toy-20-1", "rows": 20},
    }
    json.dumps([made.training, made.data, made.metrics])
    time.strptime(made.created, "%Y-%m-%dT%H:%M:%S%z")


def test_a_start_of_ones_own(llama: FrozenLM) -> None:
    data = toy(10, 0)
    start = torch.full((6, 32), 0.01)
    training = Training(toy_task(llama, data), data, data, train_settings(), start=start)
    torch.testing.assert_close(training.vectors, start)
    next(iter(training))
    assert training.result().training["stopped"] == "interrupted"
    assert training.result().training["init"] == "given"
    assert starting_vectors(training.task, training.result()) == (
        None,
        "its record names the start 'given', which is no rule",
    )
    named = Training(toy_task(llama, data), data, data, train_settings(init="sst2"), start=start)
    next(iter(named))
    assert named.result().training["init"] == "sst2"
    with pytest.raises(ConfigError) as error:
        Training(toy_task(llama, data), data, data, train_settings(), start=torch.zeros(5, 32))
    assert str(error.value) == (
        "the soft prompt to start from has shape [5, 32], but [6, 32] is needed; "
        "set num_virtual_tokens to its length and use it with a base model of its width"
    )


def test_a_run_from_one_start_is_not_resumed_from_another(llama: FrozenLM, tmp_path: Path) -> None:
    data = toy(10, 0)

    def made(value: float | None) -> Training:
        start = None if value is None else torch.full((6, 32), value)
        task, config = toy_task(llama, data), train_settings(checkpoint_every=1)
        return Training(task, data, data, config, start=start, folder=tmp_path, resume=True)

    next(iter(made(0.01)))
    assert made(0.01).step == 1
    for other in (0.02, None):
        with pytest.raises(ConfigError) as error:
            made(other)
        assert "with other start" in str(error.value) or "with other init" in str(error.value)
        assert "--overwrite" in str(error.value)


@pytest.mark.parametrize(("labels", "held_out", "steps", "interval"), [(2, 8, 45, 5), (2, 8, 15, 3), (40, 80, 20, 4)])
def test_validations_are_fewer_where_they_are_dear(
    labels: int, held_out: int, steps: int, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 5 steps here; where rows have many labels to score so seldom that all steps between two validations, each
    run forward and backward, are three times a validation; but five times in a run at least."""
    monkeypatch.setattr("softprompt.tuning.training_time.EVAL_EVERY", 5)
    names = [f"{'abcdefgh'[i % 8]}{i} {'xyz'[i % 3]} label" for i in range(labels)]
    rows = tuple(Example({"input": f"row {i}"}, names[i % labels]) for i in range(80))
    data = Dataset(rows, "rows.jsonl", "0" * 64)
    task = Task.for_data(
        tiny("llama"), data, TOY_TEMPLATE, verbalizer=Verbalizer.from_labels(names), num_virtual_tokens=6
    )
    config = train_settings(steps=steps, eval_every=None, loss="lm")
    training = Training(task, data, replace(data, examples=rows[:held_out]), config)
    every = [step.number for step in training if step.validation is not None]

    def length(request: Request) -> int:
        inner = {word[:n] for word in request.words for n in range(1, len(word))}
        return len(request.ids) - request.shared + len(inner)

    dear = sum(length(task.label_request(example)) for example in rows[:held_out])
    mean = sum(length(task.target_request(example)) for example in rows) / len(rows)
    wanted = math.ceil(3 * dear / (2 * 4 * mean))
    assert (wanted > 90) == (labels == 40)
    assert interval == min(max(5, wanted), steps // 5)
    assert every == sorted({*range(interval, steps + 1, interval), steps})


# --- which rows when -----------------------------------------------------------------------------------------


class Spy:
    """Records the examples of every step and of the validation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[list[tuple[int, ...]]] = []
        self.held_out: list[Example] = []
        add, make = Gradients.add, validator

        def spied(gradients: Gradients, work: Work, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
            self.steps.append([request.ids for request in work.shares[0].requests])
            return add(gradients, work, vectors)

        def spied_validator(task: Task, examples: Sequence[Example]) -> Any:
            self.held_out = list(examples)
            return make(task, examples)

        monkeypatch.setattr(Gradients, "add", spied)
        monkeypatch.setattr("softprompt.tuning.training.validator", spied_validator)


@pytest.mark.parametrize(("rows", "batch"), [(11, 4), (12, 4), (3, 7), (5, 5)])
def test_every_epoch_has_each_example_once(rows: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    training = run(train_settings(batch_size=batch, epochs=3.0, steps=None, eval_every=100), rows=rows)
    assert training.total == math.ceil(3 * rows / batch)
    assert all(len(step) == batch for step in spy.steps)
    drawn = [ids for step in spy.steps for ids in step]
    everything = sorted(training.task.label_request(e).ids for e in toy(rows, 0).examples)
    epochs = [drawn[i * rows : (i + 1) * rows] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == everything
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_seed_decides_order_and_start(monkeypatch: pytest.MonkeyPatch) -> None:
    orders, results = [], []
    for seed in (1, 1, 2):
        spy = Spy(monkeypatch)
        results.append(run(train_settings(seed=seed)).result().vectors)
        orders.append(spy.steps)
        monkeypatch.undo()
    assert orders[0] == orders[1] != orders[2]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_rows_held_out_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    for seed in (0, 0, 1):
        spy = Spy(monkeypatch)
        data = toy(57, 0)
        task = toy_task(tiny("llama"), data)
        training = Training(task, data, None, train_settings(epochs=2.0, steps=None, seed=seed))
        list(training)
        assert len(spy.held_out) == 5  # a tenth
        places = [example.where for example in spy.held_out]
        trained = {ids for step in spy.steps for ids in step}
        assert len(trained) == 52
        assert trained.isdisjoint({task.label_request(example).ids for example in spy.held_out})
        held.append(places)
        assert training.result().data == {
            "train": {"source": "toy.jsonl", "fingerprint": "toy-57-0", "rows": 52},
            "validation": {"source": "held out of toy.jsonl", "fingerprint": "toy-57-0", "rows": 5},
        }
        monkeypatch.undo()
    assert held[0] == held[1] != held[2]


def test_validation_rows_bound_both_kinds_of_validation_data(monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy(60, 0)
    for validation, rows, expected in ((None, 3, 3), (toy(20, 1), 3, 3), (toy(20, 1), 500, 20)):
        spy = Spy(monkeypatch)
        Training(toy_task(tiny("llama"), data), data, validation, train_settings(validation_rows=rows))
        assert len({example.where for example in spy.held_out}) == expected
        monkeypatch.undo()


def test_one_row_needs_validation_data(llama: FrozenLM) -> None:
    data = toy(1, 0)
    task = toy_task(llama, data)
    with pytest.raises(DataError) as error:
        Training(task, data, None, train_settings())
    assert str(error.value) == (
        "toy.jsonl has 1 row, but training needs at least 2 when no validation data is given; "
        "add rows or give --validation"
    )
    assert len(list(Training(task, data, toy(4, 1), train_settings()))) == 10


def test_a_validation_target_outside_the_labels_is_named(llama: FrozenLM) -> None:
    data = toy(20, 0)
    wrong = Dataset((Example({"input": "film"}, "meh", where="dev.jsonl:7"),), "dev.jsonl", "d")
    with pytest.raises(DataError) as error:
        Training(toy_task(llama, data), data, wrong, train_settings())
    assert str(error.value) == (
        'dev.jsonl:7: expected one of the labels "negative", "positive", found "meh"; '
        "correct this row, or give all labels with --labels."
    )


# --- which vectors are kept, and when it ends ----------------------------------------------------------------


def test_the_best_vectors_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest mean score of three in a row: 0.5, 0.6, 0.7, 0.65, 0.53; the loss has no say."""
    seen = scripted(monkeypatch, [(0.5, 1.0), (0.7, 0.9), (0.9, 0.9), (0.35, 0.1), (0.35, 0.1)])
    data = toy(20, 0)
    training = Training(toy_task(tiny("llama"), data), data, data, train_settings(eval_every=2))
    steps = list(training)
    assert [step.number for step in steps if step.validation] == [2, 4, 6, 8, 10]
    assert [step.number for step in steps if step.improved] == [2, 4, 6]
    made = training.result()
    assert torch.equal(made.vectors, seen[2])
    assert not torch.equal(made.vectors, seen[4])
    assert made.training["best_step"] == 6
    assert made.metrics == ({"split": "validation", "metric": "scripted", "value": 0.9},)
    assert training.stopped == "steps"


@pytest.mark.parametrize(
    ("patience", "last", "stopped"), [(2, 10, "early"), (3, 12, "early"), (4, 14, "steps"), (0, 14, "steps")]
)
def test_it_stops_early_when_patience_is_spent(
    patience: int, last: int, stopped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scripted(monkeypatch, [(0.5, 1.0), (0.6, 1.0), (0.6, 1.0), (0.1, 0.5), (0.2, 1.0), (0.59, 1.0), (0.6, 1.0)])
    data = toy(20, 0)
    config = train_settings(eval_every=2, patience=patience, steps=14)
    training = Training(toy_task(tiny("llama"), data), data, data, config)
    steps = list(training)
    assert (steps[-1].number, training.stopped) == (last, stopped)
    assert torch.equal(training.result().vectors, seen[2])
    assert list(training) == []  # it is over


def test_validation_comes_at_the_last_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [(0.5, 1.0), (0.5, 1.0)])
    data = toy(20, 0)
    training = Training(toy_task(tiny("llama"), data), data, data, train_settings(eval_every=4, steps=7))
    assert [step.number for step in training if step.validation] == [4, 7]


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_it_and_the_last_good_vectors_stay(
    validated: bool, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[torch.Tensor] = []
    add = Gradients.add

    def poisoned(gradients: Gradients, work: Work, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        used.append(vectors[0].detach().clone())
        losses = add(gradients, work, vectors)
        return torch.full_like(losses, bad) if len(used) == 4 else losses

    monkeypatch.setattr(Gradients, "add", poisoned)
    training = run(train_settings(eval_every=2 if validated else 5))
    assert training.stopped == "not finite"
    assert training.step == 3
    made = training.result()
    assert made.training["stopped"] == "not finite"
    if validated:
        assert made.training["best_step"] == 2
    else:  # the loss of the third step's vectors was finite; what came of that step has the bad one
        torch.testing.assert_close(made.vectors, used[2])
    assert not torch.allclose(made.vectors, used[3])


def test_a_gradient_that_is_not_finite_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    add = Gradients.add

    def poisoned(gradients: Gradients, work: Work, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        losses = add(gradients, work, vectors)
        assert vectors[0].grad is not None
        vectors[0].grad[0, 0] = math.inf
        return losses

    monkeypatch.setattr(Gradients, "add", poisoned)
    training = run(train_settings())
    assert (training.stopped, training.step) == ("not finite", 0)
    with pytest.raises(TrainingError, match="not finite at the very first step"):
        training.result()


def test_a_validation_that_is_not_finite_is_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scripted(monkeypatch, [(0.9, math.nan), (0.5, 1.0), (0.9, math.inf)])
    data = toy(20, 0)
    training = Training(toy_task(tiny("llama"), data), data, data, train_settings(eval_every=2, steps=6))
    assert [step.improved for step in training if step.validation] == [False, True, False]
    assert torch.equal(training.result().vectors, seen[1])


def test_an_interrupted_run_gives_its_best_so_far() -> None:
    data = toy(20, 0)
    training = Training(toy_task(tiny("llama"), data), data, data, train_settings(eval_every=3))
    for step in training:
        if step.number == 4:
            break
    made = training.result()
    assert made.training["stopped"] == "interrupted"
    assert (made.training["steps_done"], made.training["best_step"]) == (4, 3)
    assert [step.number for step in training] == [5, 6, 7, 8, 9, 10]  # and it can go on


def test_steps_come_from_steps_epochs_or_the_default() -> None:
    data = toy(10, 0)
    task = toy_task(tiny("llama"), data)

    def planned(**options: Any) -> int:
        return Training(task, data, data, train_settings(**options)).total

    assert planned(steps=7) == 7
    assert planned(steps=None, epochs=1.5, batch_size=4) == 4
    assert planned(steps=None, epochs=0.01) == 1
    assert planned(steps=None) == DEFAULT_STEPS


def test_truncated_inputs_are_counted(llama: FrozenLM) -> None:
    data = Dataset(tuple(Example({"input": "film " * n}, t) for n, t in ((2, "a"), (80, "b"), (90, "a"))), "long", "l")
    task = Task(llama, TOY_TEMPLATE, Verbalizer.from_labels(["a", "b"]), 6, 40)
    assert Training(task, data, data, train_settings()).truncated == 2


# --- compiling -----------------------------------------------------------------------------------------------


def decision(kind: str = "llama", **options: Any) -> bool:
    data = toy(10, 0)
    return Training(toy_task(tiny(kind), data), data, data, train_settings(**options)).compiled


def test_long_runs_are_compiled_and_short_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++")
    assert not decision(steps=1000)
    assert decision(steps=10**9)
    assert decision(compile="on")
    assert not decision(compile="off", steps=10**9)
    assert not decision(kind="stablelm", compile="on")  # the concatenation path is never compiled
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not decision(steps=10**9)  # without a C++ compiler


def test_a_gpu_compiles_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++")
    lm = cast(Any, SimpleNamespace(compiles=True, device=torch.device("cuda")))
    for spec in (None, "found"):
        monkeypatch.setattr(compilation, "find_spec", lambda name, spec=spec: spec)
        assert compilation.can_compile(lm) == (spec is not None)


def test_layers_are_compiled_only_while_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(LayerModes, "set", lambda modes, *, compiled, recomputed: calls.append(compiled))
    data = toy(10, 0)
    training = Training(toy_task(tiny("llama"), data), data, data, train_settings(compile="on"))
    assert calls == []
    for _ in training:
        assert calls == [True]
        break
    assert calls == [True, False]


def test_a_compiler_that_does_not_work_costs_no_training(broken_compiler: list[str]) -> None:
    with pytest.warns(SoftPromptWarning, match="could not be compiled"):
        found = run(train_settings(compile="on", steps=3)).result()
    expected = run(train_settings(compile="off", steps=3)).result()
    assert torch.equal(found.vectors, expected.vectors)
    assert found.training["compiled"] is False


@pytest.mark.parametrize("template", ["{soft_prompt}{input} {target}", "{input} {target}"])
def test_a_task_with_other_virtual_tokens_is_refused(llama: FrozenLM, template: str) -> None:
    data = toy(40, 0)
    task = Task.for_data(llama, data, Template(template), num_virtual_tokens=3)
    found = 3 if "soft" in template else 0
    with pytest.raises(ConfigError) as error:
        Training(task, data, config=TrainConfig(num_virtual_tokens=4))
    assert str(error.value) == (
        f"the task's template holds {found} virtual tokens, but 4 are to be learned; "
        "give Task and TrainConfig the same num_virtual_tokens, and the template a {soft_prompt}"
    )


@pytest.mark.parametrize(
    ("labels", "window", "grows"), [(3, 8192, False), (40, 8192, True), (40, 400, False), (900, 99_999, False)]
)
def test_many_labels_get_as_many_virtual_tokens_as_spell_them_out(
    llama: FrozenLM, labels: int, window: int, grows: bool
) -> None:
    """The line has no commas if it is longer than the 64 virtual tokens that there are anyway."""
    names = [f"label {i}" for i in range(labels)]
    line = llama.tokenizer(f"Options: {' '.join(names)}.\n").input_ids
    assert (64 < len(line) <= min(1024, window / 4)) == grows
    known = SimpleNamespace(tokenizer=llama.tokenizer, window=window, require_embeddings=llama.require_embeddings)
    lm = cast(FrozenLM, known)
    found = default_num_virtual_tokens(lm, names)
    if grows:
        assert found % 16 == 0
        assert found - 16 < len(line) <= found
    else:
        assert found == 64


def test_many_labels_are_started_from_without_commas(llama: FrozenLM) -> None:
    few = [f"card {i}" for i in range(3)]
    assert label_list(llama, few) == "Options: card 0, card 1, card 2.\n"
    many = [*few, *(f"card payment {i}" for i in range(10, 14))]
    line = f"Options: card 0 card 1 card 2 {' '.join(many[3:])}.\n"
    assert label_list(llama, many) == line
    data = Dataset(tuple(Example({"input": "a text"}, name) for name in many), "here", "0" * 64)
    ids = llama.tokenizer(line).input_ids
    template, verbalizer = Template("{soft_prompt}{input} {target}"), Verbalizer.from_labels(many)
    task = Task(llama, template, verbalizer, len(ids) + 3, llama.window)
    start = Training(task, data, data, TrainConfig(init_scale=1.0)).vectors
    torch.testing.assert_close(start, llama.embedding[ids[-3:] + ids])


def test_without_a_number_of_virtual_tokens_it_is_the_tasks(llama: FrozenLM) -> None:
    data = toy(40, 0)
    task = Task.for_data(llama, data, Template("{soft_prompt}{input} {target}"), num_virtual_tokens=5)
    training = Training(task, data, config=TrainConfig(steps=1))
    list(training)
    made = training.result()
    assert made.num_virtual_tokens == made.training["num_virtual_tokens"] == 5


def test_the_loss_over_labels_needs_labels(llama: FrozenLM) -> None:
    data = toy(40, 0)
    task = Task(llama, Template("{soft_prompt}{input} {target}"), None, 5, llama.window)
    with pytest.raises(ConfigError) as error:
        Training(task, data, config=TrainConfig(loss="labels"))
    assert str(error.value) == (
        "The loss 'labels' needs class labels, but the targets are free text; give --labels or use lm."
    )


@pytest.mark.parametrize("init", ["random", "vocab", "text", "labels"])
def test_all_but_the_first_start_as_long_as_what_the_first_layer_gives(init: str, llama: FrozenLM) -> None:
    data = toy(40, 0)
    task = toy_task(llama, data)
    settings: dict[str, Any] = {"init": init, "init_text": "good or bad ?" if init == "text" else None}

    def start(**options: Any) -> torch.Tensor:
        config = train_settings(**settings | options)
        return Training(task, data, config=config).vectors

    embeddings, gain = start(), llama.first_layer_gain
    assert gain > 1.01  # or it would show nothing
    for scale, vectors in ((gain, start(init_scale=None)), (3.0, start(init_scale=3.0))):
        torch.testing.assert_close(vectors[0], embeddings[0])
        torch.testing.assert_close(vectors[1:], scale * embeddings[1:])
    prefix = {"parametrisation": "prefix"}
    assert torch.equal(start(**prefix, init_scale=None), start(**prefix))
    training = Training(task, data, config=train_settings(**settings | prefix, init_scale=None))
    next(iter(training))
    assert training.result().training["init_scale"] == 1.0


def test_training_goes_on_from_a_soft_prompt_as_it_is(llama: FrozenLM) -> None:
    data = toy(40, 0)
    given = initial_vectors(llama, 6, init="random", seed=1) * torch.tensor([[1], [1], [2], [5], [9], [30]])
    training = Training(toy_task(llama, data), data, config=train_settings(init_scale=9.0), start=given)
    torch.testing.assert_close(training.vectors, given)


def test_labels_that_fit_are_the_text_that_auto_starts_from(llama: FrozenLM) -> None:
    """Lester et al. 2021 start from the labels; as a readable line of them it is the hard prompt to be improved on."""
    data = toy(40, 0)
    line = llama.tokenizer("Options: " + ", ".join(sorted({str(e.target) for e in data.examples})) + ".\n").input_ids
    for size, expected in ((len(line), llama.embedding[line]), (len(line) - 1, None)):
        task = Task.for_data(llama, data, Template("{soft_prompt}{input} {target}"), num_virtual_tokens=size)
        config = TrainConfig(num_virtual_tokens=size, init_scale=1.0)
        start = Training(task, data, config=config).vectors
        words = initial_vectors(llama, size, init="labels", seed=0, label_words=task.label_words)
        torch.testing.assert_close(start, words if expected is None else expected, rtol=1e-6, atol=1e-7)
