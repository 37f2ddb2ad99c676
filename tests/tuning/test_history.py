"""The way of a soft prompt over its training: what its file keeps, and the drift that is read off it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from softprompt.drawing import style
from softprompt.errors import StoreError
from softprompt.inspection import figures
from softprompt.inspection.answers import answers, document
from softprompt.inspection.drift import Way, drift, way_of
from softprompt.inspection.report import inspect_vectors
from softprompt.inspection.tables import drift_table
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tuning import history
from softprompt.tuning.history import History
from softprompt.tuning.training import Training
from tests.conftest import tiny, toy, toy_task, train_settings
from tests.inspection.test_vocabulary import H, make_table, make_vectors


def a_soft_prompt(vectors: torch.Tensor, **training: Any) -> SoftPrompt:
    return SoftPrompt(
        vectors=vectors,
        name="s",
        base="b",
        base_fingerprint="",
        tokenizer_fingerprint="",
        template="{soft_prompt}{input}{target}",
        training=training,
    )


# --- the file ------------------------------------------------------------------------------------


class Simulated:
    """A training of one number a validation: what it writes, and how it goes on from a checkpoint."""

    def __init__(self, folder: Path, values: Sequence[float], upto: int = 0) -> None:
        """Resumes after ``upto`` validations."""
        self.values, self.history = values, History(folder)
        self.history.add(0, 0, torch.zeros(1, 1))
        self.validations: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        for _ in range(upto):
            self.advance()
        if upto:
            self.history.resume(10 * upto)
            assert self.best is not None
            self.history.add(0, self.best["step"], torch.tensor([[self.values[self.best["step"] // 10 - 1]]]))
            self.history.write(self.validations, self.best)

    def advance(self) -> None:
        found = {"start": 0, "step": 10 * len(self.validations) + 10, "value": self.values[len(self.validations)]}
        self.validations.append(found)
        if self.best is None or found["value"] > self.best["value"]:
            self.best = found

    def validate(self) -> None:
        self.advance()
        found = self.validations[-1]
        self.history.add(0, found["step"], torch.tensor([[found["value"]]]))
        self.history.write(self.validations, self.best)


def steps_in(folder: Path) -> list[int]:
    entries = history.load(folder)
    assert all(start == 0 for start, _ in entries)
    return sorted(step for _, step in entries)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.integers(0, 99).map(float), min_size=1, max_size=30),
    kills=st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=3),
)
def test_however_often_it_is_killed_the_history_is_the_uninterrupted_one(
    values: list[float], kills: list[tuple[int, bool]], tmp_path: Path
) -> None:
    """Killed before or after the checkpoint of a validation is in its place; few enough are kept that most thin."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(history, "MOST", 4)
        uninterrupted, run = Simulated(whole, values), Simulated(killed, values)
        for count in range(1, len(values) + 1):
            uninterrupted.validate()
            run.validate()
            for at, saved in kills:
                if at == count:
                    run = Simulated(killed, values, count if saved else count - 1)
                    if not saved:
                        run.validate()
            assert (killed / history.FILE).read_bytes() == (whole / history.FILE).read_bytes()
            kept = steps_in(whole)
            assert {0, 10 * count, 10 * (1 + values[:count].index(max(values[:count])))} <= set(kept)
            assert len(kept) <= 4 + 3
            every = 1
            while count > 4 * every:
                every *= 2
            assert set(range(10 * every, 10 * count + 1, 10 * every)) <= set(kept)


def test_all_of_few_validations_are_kept_and_every_second_of_more(tmp_path: Path) -> None:
    run = Simulated(tmp_path, [1.0, *[0.0] * 99])
    for _ in range(32):
        run.validate()
    assert steps_in(tmp_path) == list(range(0, 330, 10))
    run.validate()
    assert steps_in(tmp_path) == [0, 10, *range(20, 330, 20), 330]
    for _ in range(67):
        run.validate()
    assert steps_in(tmp_path) == [0, 10, *range(40, 1001, 40)]
    assert float(history.load(tmp_path)[0, 10]) == 1.0


def test_a_kv_prefix_and_numbers_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    kept = History(tmp_path)
    kept.add(0, 0, torch.zeros(2, 3, 2, 2, 4))
    kept.add(0, 5, torch.tensor([[1.0, math.nan]]))
    kept.write([{"start": 0, "step": 5}], None)
    assert list(tmp_path.iterdir()) == []
    History(None).write([], None)


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"step.5": torch.zeros(1, 2)}, "it holds 'step.5', float32"),
        ({"start.0.step.5": torch.zeros(1, 2).half()}, "it holds 'start.0.step.5', float16"),
        ({"start.0.step.5": torch.zeros(2)}, "it holds 'start.0.step.5', float32"),
        ({"start.0.step.5": torch.full((1, 2), math.inf)}, "start.0.step.5 is not finite"),
        (
            {"start.0.step.5": torch.zeros(1, 2), "start.0.step.6": torch.zeros(2, 2)},
            "its vectors have not all one shape",
        ),
        ({}, "its vectors have not all one shape"),
    ],
)
def test_a_foreign_file_is_named(tensors: dict[str, torch.Tensor], fault: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / history.FILE)
    with pytest.raises(StoreError) as error:
        history.load(tmp_path)
    path = tmp_path / history.FILE
    assert str(error.value) == f"The training's history {path} is damaged ({fault}); move it away to go on without."


def test_a_damaged_history_stops_a_resume_and_a_missing_one_does_not(tmp_path: Path) -> None:
    data, config = toy(15, 0), train_settings(checkpoint_every=1)

    def made() -> Training:
        return Training(toy_task(tiny("llama"), data), data, toy(5, 1), config, folder=tmp_path, resume=True)

    for step in made():
        if step.number == 7:
            break
    path = tmp_path / history.FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError) as error:
        made()
    assert str(error.value).startswith(f"The training's history {path} is damaged (")
    assert str(error.value).endswith("); move it away to go on without.")
    path.unlink()
    again = made()
    assert again.step == 7
    list(again)
    assert {(0, 0), (0, 10)} <= set(history.load(tmp_path))


# --- the way of a soft prompt --------------------------------------------------------------------


def test_the_way_is_that_of_the_start_that_the_vectors_came_from(tmp_path: Path) -> None:
    kept = History(tmp_path)
    vectors = {(start, step): make_vectors(2, 7 * start + step) for start, step in ((0, 0), (0, 3), (1, 3), (1, 6))}
    for (start, step), each in vectors.items():
        kept.add(start, step, each)
    kept.write([{"start": 0, "step": 3}, {"start": 1, "step": 6}], None)
    for start, steps in ((0, [0, 3]), (1, [3, 6])):
        way = way_of(a_soft_prompt(vectors[start, steps[1]], start=1), tmp_path)  # a wrong record does not mislead
        assert list(way) == steps
        assert all(torch.equal(way[step], vectors[start, step]) for step in steps)
    with pytest.raises(StoreError) as error:
        way_of(a_soft_prompt(vectors[0, 3] + 1e-6), tmp_path)
    assert str(error.value) == (
        f"The history in {tmp_path} is of another training: the vectors of 's' are nowhere in it."
    )
    with pytest.raises(StoreError) as error:
        way_of(a_soft_prompt(vectors[0, 3]), tmp_path / "none")
    assert str(error.value) == (
        f"There is no training's history in {tmp_path / 'none'}; expected the file history.safetensors of a run folder "
        "there."
    )


def test_drift_is_plain_arithmetic() -> None:
    """numpy in double precision, element by element."""
    table = make_table()
    vocabulary = Vocabulary(table, str)
    start = vocabulary[[5, 6, 7]]
    way = {
        0: start,
        10: start + 0.05 * make_vectors(3, 1),
        20: torch.cat([start[:1], 2 * vocabulary[[8]], start[2:] + make_vectors(1, 2)]),
        30: torch.cat([vocabulary[[9, 8]], start[2:] + 3 * make_vectors(1, 3)]),
    }
    found = drift(way, a_soft_prompt(way[20]), vocabulary)
    assert ([point.step for point in found.points], found.left_out) == ([0, 10, 20, 30], 0)
    assert [point.kept for point in found.points] == [False, False, True, False]
    assert found.kept is found.points[2]
    rms = math.sqrt(np.mean(table.double().numpy() ** 2))
    unit_table = table.double().numpy() / np.linalg.norm(table.double().numpy(), axis=1, keepdims=True)
    begun = start.double().numpy()
    nearest = {step: (vectors.double().numpy() @ unit_table.T).argmax(axis=1) for step, vectors in way.items()}
    assert list(nearest[0]) == [5, 6, 7]
    for point in found.points:
        now = way[point.step].double().numpy()
        moved = [math.sqrt(np.mean((a - b) ** 2)) / rms for a, b in zip(now, begun, strict=True)]
        assert list(point.drift) == pytest.approx(moved, abs=1e-6)
        assert point.mean_drift == pytest.approx(np.mean(moved), abs=1e-6)
        assert point.largest_drift == pytest.approx(max(moved), abs=1e-6)
        lengths, before = np.linalg.norm(now, axis=1), np.linalg.norm(begun, axis=1)
        assert point.norm == pytest.approx(lengths.mean(), rel=1e-5)
        assert point.cosine == pytest.approx(np.mean((now * begun).sum(axis=1) / lengths / before), abs=1e-5)
        straight = before / np.sqrt(before**2 + ((now - begun) ** 2).sum(axis=1))
        assert point.random_cosine == pytest.approx(straight.mean(), abs=1e-5)
        assert point.as_at_start == (nearest[point.step] == nearest[0]).sum()
        assert point.as_kept == (nearest[point.step] == nearest[20]).sum()
    assert [point.as_at_start for point in found.points][:2] == [3, 3]
    assert found.points[3].as_kept < 3
    assert set(found.as_dict()["points"][0]) >= {"step", "drift", "mean_drift", "as_kept"}


@pytest.mark.parametrize("length", [1, 100, 900])
def test_of_many_validations_some_are_shown(length: int) -> None:
    start = make_vectors(1, 0).expand(length, H)
    way: Way = {step: start + step / 100 for step in range(0, 340, 10)}
    found = drift(way, a_soft_prompt(way[70]), Vocabulary(make_table(), str))
    steps = [point.step for point in found.points]
    assert {0, 70, 330} <= set(steps)
    assert steps == sorted(steps)
    assert len(steps) == {1: 34, 100: 10, 900: 3}[length]
    assert found.left_out == 34 - len(steps)


def test_a_training_is_told_from_its_start_to_what_was_kept(tmp_path: Path) -> None:
    """Its start is given, which no record can make again: the run folder has it."""
    lm, data = tiny("llama"), toy(40, 0)
    start = lm.embedding[[70, 71, 72, 73, 74, 75]].detach().clone()
    config = train_settings(steps=12, eval_every=3, lr=0.2)
    training = Training(toy_task(lm, data), data, toy(10, 1), config, start=start, folder=tmp_path)
    list(training)
    made, vocabulary = training.result(), Vocabulary.of(lm)
    way = way_of(made, tmp_path)
    assert list(way) == [0, 3, 6, 9, 12]
    torch.testing.assert_close(way[0], start, rtol=1e-5, atol=1e-6)
    assert torch.equal(way[made.training["best_step"]], made.vectors)
    report = inspect_vectors(made, training.task, vocabulary, way)
    assert report.norms.start == "as the run folder of its training has it"
    assert report.start is not None
    assert report.drift is not None
    kept = report.drift.kept
    assert kept.step == made.training["best_step"]
    distances = [moved.distance for moved in report.norms.moved]
    rms = float(lm.embedding.square().mean().sqrt())
    assert kept.mean_drift == pytest.approx(np.mean(distances) / math.sqrt(lm.hidden_size) / rms, rel=1e-3)
    answer = dict(answers(report))["How did it get there?"]
    assert f"after step {kept.step}, are on average {kept.mean_drift:.2f} RMS of the embedding table" in answer
    columns, rows = drift_table(report.drift)
    assert {len(row) for row in rows} == {len(columns)}
    assert [row[0] for row in rows] == ["0", "3", "6", "9", "12"]
    assert rows[0][-1] == "start"
    assert style.svg(figures.drift(report.drift)).startswith(b"<?xml")

    alone = inspect_vectors(made, training.task, vocabulary, None, "nobody has it")
    assert (alone.start, alone.drift, document(alone)["drift"]) == (None, None, None)
    assert dict(answers(alone))["How did it get there?"] == "Not known: nobody has it."
    assert "How did it get there?" not in dict(answers(inspect_vectors(made, training.task, vocabulary)))
