"""A sweep: what goes on is the run that it would be alone, and half of the rows tell what the chosen is worth."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softprompt.data.example import Dataset
from softprompt.errors import ConfigError, DataError, StoreError, TrainingError
from softprompt.tasks.predict import Query, predict
from softprompt.tuning.gradients import Gradients, Work
from softprompt.tuning.job import Job
from softprompt.tuning.sweep import Sweep, cross
from softprompt.tuning.training import Training
from tests.conftest import TOY_LABELS, TOY_TEMPLATE, tiny, toy, toy_task, train_settings
from tests.tuning.test_many import killed_at_checkpoint

AXES: dict[str, Sequence[Any]] = {"lr": (0.05, 0.3, 1.0), "num_virtual_tokens": (4, 6), "seed": (0, 1)}
"""Twelve settings, the default of ``job`` among them."""


def job(rows: int = 24, validation: Dataset | None = None, **options: Any) -> Job:
    settings = {"steps": 18, "eval_every": 2, "num_virtual_tokens": 6, "lr": 0.3, **options}
    return Job(
        name="toy",
        rows=toy(rows, 1),
        validation=toy(16, 2) if validation is None else validation,
        verbalizer=TOY_LABELS,
        template=TOY_TEMPLATE,
        config=train_settings(**settings),
    )


SIX: dict[str, Sequence[Any]] = {"lr": (0.05, 0.3, 1.0), "seed": (0, 1)}


def swept(folder: Path, **options: Any) -> Sweep:
    return Sweep(tiny("llama"), job(), SIX, folder, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Of twelve settings."""
    sweep = Sweep(tiny("llama"), job(), AXES, tmp_path_factory.mktemp("sweep"))
    sweep.run()
    return sweep


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Of six."""
    sweep = swept(tmp_path_factory.mktemp("sweep"))
    sweep.run()
    return sweep


def test_the_cross_product_begins_with_the_default() -> None:
    config = train_settings(lr=0.2)
    made = cross(config, {"lr": (0.1, 0.2), "seed": (0, 1), "init": ("vocab",)})
    assert made[0] == config
    assert {(one.lr, one.seed, one.init) for one in made[1:]} == {
        (lr, seed, "vocab") for lr in (0.1, 0.2) for seed in (0, 1)
    }
    assert len(cross(config, {"lr": (0.2, 0.1, 0.2)})) == 2
    with pytest.raises(ConfigError, match="lr must be"):
        cross(config, {"lr": (0.1, 0.0)})


def test_a_third_goes_on_at_each_rung_and_the_default_always(done: Sweep) -> None:
    sweep = done
    assert sweep.rungs == [2, 6, 18]
    steps = sorted(found["steps"] for found in sweep.found.values())
    assert steps.count(2) in (7, 8)  # four go on, and the default if it is none of them
    assert len(steps) == 12
    assert sweep.found[0]["steps"] == 18
    at_first = {number: {step: score for step, score, _ in found["curve"]}[2] for number, found in sweep.found.items()}
    kept = {number for number, found in sweep.found.items() if found["dropped_at"] != 2}
    assert kept == {0, *sorted(at_first, key=lambda number: -at_first[number])[:4]}
    ends = {number: found["score"] for number, found in sweep.found.items() if found["dropped_at"] is None}
    assert sweep.best == max(ends, key=ends.__getitem__)
    assert len(ends) in (2, 3)


def test_a_row_is_tokenized_once_whatever_the_number_of_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, made = tiny("llama"), job(30)
    texts: Counter[str] = Counter()
    tokenize = type(lm.tokenizer).__call__

    def counted(tokenizer: Any, text: Any, *given: Any, **options: Any) -> Any:
        texts.update([text] if isinstance(text, str) else text)
        return tokenize(tokenizer, text, *given, **options)

    monkeypatch.setattr(type(lm.tokenizer), "__call__", counted)
    Sweep(lm, made, AXES, tmp_path)
    assert made.validation is not None
    chosen = {one.fields["input"] for one in made.rows.examples}
    assert len(chosen) > 20
    for value in chosen:
        assert sum(count for text, count in texts.items() if text.strip() == value.strip()) == 1


def test_the_best_is_what_a_training_with_its_settings_is(done: Sweep) -> None:
    sweep = done
    best = sweep.training(sweep.best)
    config = sweep.configs[sweep.best]
    rows = toy(16, 2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    choosing = replace(rows, examples=tuple(rows.examples[i] for i in sorted(order[:8])))
    alone = Training(toy_task(tiny("llama"), rows, config.longest), toy(24, 1), choosing, config)
    steps = list(alone)
    assert steps[-1].number == best.step == 18
    torch.testing.assert_close(best.result().vectors, alone.result().vectors, rtol=2e-4, atol=2e-4)
    assert best.result().training["best_step"] == alone.result().training["best_step"]


def test_what_is_said_of_the_gain_is_arithmetic_on_either_half(done: Sweep) -> None:
    sweep = done
    found = sweep.selection()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    assert found.rows == (8, 8)
    for half, chosen, default, gain in zip(
        (order[:8], order[8:]), found.chosen, found.default, found.gain, strict=True
    ):
        correct = []
        for number in (sweep.best, 0):
            training = sweep.training(number)
            examples = [toy(16, 2).examples[i] for i in half]
            vectors = training.result().vectors
            answers = predict([Query(training.task, example, vectors) for example in examples])
            correct.append(np.array([a.text == e.target for a, e in zip(answers, examples, strict=True)], float))
        assert (chosen.value, default.value) == pytest.approx([each.mean() for each in correct])
        lost = correct[0] - correct[1]
        assert gain.value == pytest.approx(lost.mean())
        assert gain.stderr == pytest.approx(lost.std(ddof=1) / math.sqrt(8))
    luck = found.selection
    assert luck.value == pytest.approx(found.gain[0].value - found.gain[1].value)
    assert luck.stderr == pytest.approx(math.hypot(found.gain[0].stderr, found.gain[1].stderr))


@pytest.mark.parametrize("at", [4, 9, 15, 21])
def test_a_sweep_that_was_killed_goes_on_to_the_same_bits(at: int, whole: Sweep, tmp_path: Path) -> None:
    killed = swept(tmp_path)
    with killed_at_checkpoint(at):
        killed.run()
    del killed
    resumed = swept(tmp_path, resume=True)
    resumed.run()
    assert (resumed.best, resumed.left) == (whole.best, whole.left)
    assert resumed.found == whole.found
    ours, theirs = (sweep.training(sweep.best).result().vectors for sweep in (resumed, whole))
    assert torch.equal(ours, theirs)
    resumed.close()
    assert list(tmp_path.iterdir()) == []


def test_another_sweep_is_not_gone_on_with(tmp_path: Path) -> None:
    swept(tmp_path)
    with pytest.raises(ConfigError, match="other keep"):
        swept(tmp_path, resume=True, keep=Fraction(1, 2))
    with pytest.raises(ConfigError, match="other settings"):
        Sweep(tiny("llama"), job(), {"lr": (0.1,)}, tmp_path, resume=True)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        swept(tmp_path, resume=True)


def test_one_that_is_not_finite_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Gradients.add

    def spoilt(gradients: Gradients, work: Work, numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        return add(gradients, work, numbers) * torch.tensor([1.0, *(math.nan for _ in numbers[1:])])

    monkeypatch.setattr(Gradients, "add", spoilt)
    sweep = Sweep(tiny("llama"), job(), {"lr": (0.1, 0.3)}, tmp_path)
    sweep.run()
    assert (sweep.best, sweep.found[1]["stopped"], sweep.found[1]["steps"]) == (0, "not finite", 0)
    monkeypatch.setattr(Gradients, "add", lambda *given: add(*given) * math.nan)
    with pytest.raises(TrainingError, match="No setting"):
        Sweep(tiny("llama"), job(), {"lr": (0.1, 0.3)}, tmp_path / "all").run()


def test_short_runs_have_fewer_rungs_and_all_may_go_on(tmp_path: Path) -> None:
    assert Sweep(tiny("llama"), job(eval_every=9), {}, tmp_path / "a").rungs == [9, 18]
    assert Sweep(tiny("llama"), job(eval_every=18), {}, tmp_path / "b").rungs == [18]
    assert Sweep(tiny("llama"), job(), {}, tmp_path / "c", keep=Fraction(1)).rungs == [18]


def test_without_validation_rows_a_tenth_is_held_back_and_halved(tmp_path: Path) -> None:
    from softprompt.tuning.sweep import halves

    chooses, telling = halves(replace(job(60), validation=None), 3)
    assert chooses.validation is not None
    parts = [{e.where for e in rows.examples} for rows in (chooses.rows, chooses.validation, telling)]
    assert [len(part) for part in parts] == [54, 3, 3]
    assert set.union(*parts) == {e.where for e in toy(60, 1).examples}


@pytest.mark.parametrize(
    ("made", "kind", "said"),
    [
        (lambda: (job(starts=2), Fraction(1, 3)), ConfigError, "leave --starts out"),
        (lambda: (job(), Fraction(0)), ConfigError, "--keep must be above 0"),
        (lambda: (job(validation=toy(1, 5)), Fraction(1, 3)), DataError, "add rows"),
    ],
)
def test_mistakes(made: Any, kind: Any, said: str, tmp_path: Path) -> None:
    asked, keep = made()
    with pytest.raises(kind, match=said):
        Sweep(tiny("llama"), asked, {}, tmp_path, keep=keep)
