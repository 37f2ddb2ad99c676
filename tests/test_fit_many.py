"""``fit_many``: several jobs on one model, each as ``train`` would do it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import softprompt as sp
from softprompt.errors import ConfigError, DataError, SoftPromptWarning
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.training import Training
from tests.conftest import tiny, toy, toy_task, train_settings
from tests.test_api import refused, rows

SETTINGS: dict[str, Any] = {"steps": 6, "eval_every": 3, "batch_size": 4, "num_virtual_tokens": 5}
TEXTS = [{"question": f"film {i}", "target": f"it has {i} stars of nine"} for i in range(20)]
JOBS: list[dict[str, Any]] = [
    {"name": "films", "data": rows(40), "validation": rows(12, 40)},
    {"name": "qa", "data": TEXTS, "template": "{soft_prompt}{question} {target}", "labels": "none", "steps": 4},
    {"name": "slow", "data": rows(40), "lr": 0.05, "config": train_settings(seed=3), "num_virtual_tokens": 3},
]


def alone(job: dict[str, Any]) -> sp.SoftPrompt:
    return sp.train(tiny("llama"), **{**SETTINGS, **job}, progress=False)


def test_each_job_comes_out_as_train_would_do_it(capsys: pytest.CaptureFixture[str]) -> None:
    lm = tiny("llama")
    data = toy(24, 1)
    given = Training(toy_task(lm, data), data, toy(12, 2), train_settings(), name="given")
    found = sp.fit_many(lm, [*JOBS, given], **SETTINGS)
    out, err = capsys.readouterr()
    assert out == ""
    assert "films: data: 40 rows and 12 for validation" in err
    assert "4 soft prompts in shared passes" in err
    expected = [*map(alone, JOBS)]
    own = Training(toy_task(lm, data), data, toy(12, 2), train_settings(), name="given")
    list(own)
    for ours, theirs in zip(found, [*expected, own.result()], strict=True):
        assert ours is not None
        assert (ours.name, ours.template, ours.verbalizer) == (theirs.name, theirs.template, theirs.verbalizer)
        torch.testing.assert_close(ours.vectors, theirs.vectors, rtol=2e-4, atol=2e-4)
        assert [each["value"] for each in ours.metrics] == pytest.approx([each["value"] for each in theirs.metrics])
        assert ours.training["stopped"] == "steps"


def test_what_does_not_learn_is_warned_of_by_name(tmp_path: Path) -> None:
    """And each is, read from its file, what it was trained to be."""
    lm = tiny("llama")
    with pytest.warns(SoftPromptWarning) as caught:
        found = sp.fit_many(lm, [JOBS[0], {**JOBS[0], "name": "still", "lr": 1e-5}], **SETTINGS, progress=False)
    said = [str(warning.message) for warning in caught]
    assert [text for text in said if text.startswith("still: the soft prompt has moved by ")]
    assert not [text for text in said if text.startswith("films: the soft prompt has moved by ")]
    for made in found:
        assert made is not None
        made.save(tmp_path / "a.safetensors")
        again = sp.SoftPrompt.load(tmp_path / "a.safetensors")
        assert torch.equal(again.vectors, made.vectors)
        texts = [row["input"] for row in rows(4, 90)]
        answers = [[one.logprobs for one in sp.predict(lm, each, texts)] for each in (made, again)]
        assert answers[0] == answers[1]


def test_what_was_stopped_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, options = tiny("llama"), {**SETTINGS, "checkpoint_every": 2, "progress": False}
    jobs = [JOBS[0], {**JOBS[0], "name": "other", "seed": 5}]
    whole = sp.fit_many(lm, jobs, **options)
    begin = Training.begin_step

    def dies(self: Training) -> Any:
        if self.step == 5:
            raise KeyboardInterrupt
        return begin(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "begin_step", dies)
        with pytest.raises(KeyboardInterrupt):
            sp.fit_many(lm, jobs, folder=tmp_path, **options)
    resumed = sp.fit_many(lm, jobs, folder=tmp_path, resume=True, **options)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours.vectors, theirs.vectors)


def test_one_that_learns_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    add = Gradients.add
    poison = torch.tensor([math.nan, 1.0])
    monkeypatch.setattr(
        Gradients, "add", lambda *given: add(*given) * (poison if len(given[2]) == 2 else torch.ones(1))
    )
    with pytest.warns(SoftPromptWarning, match="films: the loss is not finite at the very first step"):
        found = sp.fit_many(tiny("llama"), [JOBS[0], JOBS[2]], **SETTINGS, progress=False)
    assert found[0] is None
    assert found[1] is not None


@pytest.mark.parametrize(
    ("jobs", "options", "kind", "said"),
    [
        ([], {}, ConfigError, ("at least one job",)),
        ([{"name": "a"}], {}, ConfigError, ("job 'a'", "data")),
        ([{"name": "a", "data": rows(9), "learnin_rate": 1}], {}, ConfigError, ("job 'a'", "learnin_rate")),
        ([{"name": "a", "data": rows(9), "stepps": 1}], {}, ConfigError, ("job 'a'", "did you mean 'steps'")),
        ([{"name": "a", "data": rows(9), "track": "mlflow"}], {}, ConfigError, ("job 'a'", "track")),
        ([{"name": "a", "data": "none.jsonl"}], {}, DataError, ("job 'a'", "none.jsonl")),
        ([{"data": rows(9), "lr": 0}], {}, ConfigError, ("job 'soft-prompt-1'", "lr must be")),
        ([{"name": "a", "data": rows(9)}] * 2, {"folder": "runs"}, ConfigError, ("Two jobs are called 'a'",)),
        ([{"name": "../a", "data": rows(9)}], {"folder": "runs"}, ConfigError, ("job '../a'", "choose another")),
    ],
)
def test_mistakes_name_the_job(
    jobs: Any, options: Any, kind: Any, said: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(kind, lambda: sp.fit_many(tiny("llama"), jobs, **options, progress=False), *said)
