"""``softprompt sweep``: the best under its name, a table, a plot, results, and how much of the gain is selection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tuning import checkpoint, history
from softprompt.tuning.training import Training
from tests.conftest import Ran, Run, write_labels

FAST = ("--dtype", "fp32", "--device", "cpu", "--steps", "18", "--eval-every", "2", "--patience", "0")
ASKED = ("--lrs", "0.05,0.3,1", "--lengths", "3,4", "--num-virtual-tokens", "4", "--batch-size", "4")


@pytest.fixture
def sweep(run: Run, base: str, home: Path) -> Run:
    write_labels(home.parent / "dev.jsonl", 20)
    return lambda *more: run("sweep", "train.jsonl", "--validation", "dev.jsonl", "--base", base, *FAST, *ASKED, *more)


def test_the_whole_way(sweep: Run, run: Run, home: Path) -> None:
    ran = sweep("--name", "films", "--out", "report")
    assert ran.code == 0
    assert "rung 1 of 3: 6 settings to step 2" in ran.err
    lines = ran.out.splitlines()
    assert lines[0].split() == ["setting", "steps", "score", "accuracy", "state"]
    assert lines[1].rstrip().endswith("chosen")
    assert sum("dropped at" in line for line in lines) in (3, 4)
    assert "best of 6: accuracy " in ran.out
    assert "on the 10 rows used to choose it" in ran.out
    assert "selection" in ran.out or "nothing is gained" in ran.out
    report = home.parent / "report"
    assert (report / "sweep.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((report / "results.json").read_text())
    assert [one["default"] for one in found["candidates"]] == [True, *[False] * 5]
    [chosen] = [one for one in found["candidates"] if one["chosen"]]
    stored = SoftPrompt.load(home / "films.safetensors")
    assert stored.name == "films"
    assert stored.vectors.shape[0] == chosen["num_virtual_tokens"]
    assert stored.training["lr"] == chosen["lr"]
    folder = home / ".runs" / "films"
    assert {path.name for path in folder.iterdir()} == {checkpoint.LOG, history.FILE, "stored.json"}
    assert run("inspect", "films", "--json").code == 0
    assert "is taken" in sweep("--name", "films").err


@pytest.mark.usefixtures("faulty_disk")
def test_the_chosen_is_read_again_and_must_answer_as_it_was_trained(sweep: Run) -> None:
    ran = sweep("--name", "films", "--keep", "1/3")
    assert ran.code == 2
    assert "other answers" in ran.err
    assert "--overwrite" in ran.err


def interrupted(monkeypatch: pytest.MonkeyPatch, sweep: Run, at: int) -> Ran:
    begin = Training.begin_step

    def dies(self: Training) -> Any:
        if self.step == at:
            raise KeyboardInterrupt
        return begin(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "begin_step", dies)
        return sweep("--name", "films")


def test_ctrl_c_keeps_the_best_so_far_and_can_be_resumed(
    sweep: Run, run: Run, home: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = sweep("--name", "whole", "--json").json
    ran = interrupted(monkeypatch, sweep, 9)
    assert (ran.code, ran.out) == (130, "")
    assert "the best so far" in ran.err.splitlines()[-1]
    assert SoftPrompt.load(home / "films.safetensors").name == "films"
    refused = sweep("--name", "films")
    assert (refused.code, "A sweep of 'films' was stopped" in refused.err) == (2, True)
    other = run("train", "train.jsonl", "--name", "films", "--base", base, *FAST)
    assert (other.code, "A sweep of 'films' was stopped" in other.err) == (2, True)
    assert "other settings" in sweep("--name", "films", "--resume", "--seed", "4").err
    resumed = sweep("--name", "films", "--resume", "--json").json
    assert resumed["candidates"] == document["candidates"]
    assert resumed["selection"] == document["selection"]
    ours, theirs = (SoftPrompt.load(home / f"{name}.safetensors").vectors for name in ("films", "whole"))
    assert torch.equal(ours, theirs)


def test_ctrl_c_before_a_validation_stores_nothing(sweep: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = interrupted(monkeypatch, sweep, 1)
    assert (ran.code, ran.out) == (130, "")
    assert "nothing was stored" in ran.err
    assert not (home / "films.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--lrs", "0.1,fast"), "--lrs must be values with commas"),
        (("--lrs", "0"), "lr must be above 0"),
        (("--lengths", "2.5"), "--lengths must be values"),
        (("--inits", "best"), "--inits must be some of"),
        (("--parametrisations", "plain,other"), "parametrisation must be one of"),
        (("--seeds", "0"), "--seeds must be at least 1"),
        (("--keep", "a third"), "--keep must be a share"),
        (("--keep", "0"), "--keep must be above 0"),
        (("--keep", "3/2"), "--keep must be above 0 and at most 1"),
        (("--validation", "none.jsonl"), "none.jsonl"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_mistakes_are_told_before_a_model_is_loaded(options: tuple[str, ...], said: str, sweep: Run) -> None:
    ran = sweep("--name", "films", *options)
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
    assert said in ran.err
