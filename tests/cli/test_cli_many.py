"""Several data files, or a plan, in one command: each soft prompt as its own command would have made it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tuning import checkpoint
from softprompt.tuning.gradients import Gradients, Work
from softprompt.tuning.training import Training
from tests.conftest import Run, write_labels, write_texts

SMALL = ("--num-virtual-tokens", "4")


def plan(folder: Path, document: Any, name: str = "plan.json") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    text = document if isinstance(document, str) else json.dumps(document)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def vectors(home: Path, name: str) -> torch.Tensor:
    return SoftPrompt.load(home / f"{name}.safetensors").vectors


@pytest.fixture
def files(home: Path) -> Path:
    """The folder with two files of rows with labels and one of free text."""
    write_labels(home.parent / "films.jsonl", 30)
    write_texts(home.parent / "stars.jsonl", 20)
    return home.parent


def test_several_files_give_what_each_gives_alone(train: Run, home: Path, files: Path) -> None:
    together = train("films.jsonl", "stars.jsonl", *SMALL, "--json").json
    assert [each["name"] for each in together["soft_prompts"]] == ["films", "stars"]
    assert [each["steps"] for each in together["soft_prompts"]] == [8, 8]
    for name in ("films", "stars"):
        alone = train(f"{name}.jsonl", *SMALL, "--name", f"{name}-alone", "--json").json
        [ours] = [each for each in together["soft_prompts"] if each["name"] == name]
        assert ours["tokens"] == alone["tokens"]
        both = [[metric["value"] for metric in found["metrics"]] for found in (ours, alone)]
        assert both[0] == pytest.approx(both[1], rel=1e-4)
        torch.testing.assert_close(vectors(home, name), vectors(home, f"{name}-alone"), rtol=2e-4, atol=2e-4)
        assert not (home / ".runs" / name / checkpoint.FILE).exists()


@pytest.mark.usefixtures("faulty_disk")
def test_each_is_read_again_and_must_answer_as_it_was_trained(train: Run, files: Path) -> None:
    ran = train("films.jsonl", "stars.jsonl", *SMALL)
    assert ran.code == 2
    for name in ("films", "stars"):
        assert f"job '{name}': The soft prompt that was stored in " in ran.err
    assert ran.err.count("other answers") == 2


def test_alarms_are_said_with_the_name(train: Run, files: Path) -> None:
    ran = train("films.jsonl", "stars.jsonl", *SMALL, "--lr", "1e-5", "--json")
    assert ran.code == 0
    for found in ran.json["soft_prompts"]:
        assert "unmoved" in {alarm["kind"] for alarm in found["alarms"]}
        for alarm in found["alarms"]:
            assert ran.err.count(f"warning: {found['name']}: {alarm['sentence']}") == 1


@pytest.mark.parametrize(
    ("given", "names"),
    [(("{file}-v2",), ["films-v2", "stars-v2"]), (("a", "b"), ["a", "b"])],
)
def test_names_by_pattern_or_one_by_one(given: tuple[str, ...], names: list[str], train: Run, files: Path) -> None:
    ran = train("films.jsonl", "stars.jsonl", "--name", *given, *SMALL)
    assert ran.code == 0
    assert [line.split()[0] for line in ran.out.splitlines()[1:3]] == names
    assert f"{names[0]}: data: 30 rows" in ran.err


PLAN = """
base: {base}
dtype: fp32
device: cpu
defaults:
  steps: 6
  eval_every: 3
  num_virtual_tokens: 4
  compile: off
jobs:
  - name: quick
    train: ../films.jsonl
    lr: 1e-1
    seed: 2
    labels: [negative, positive]
  - train: ../stars.jsonl
    steps: 4
    validation: ../stars.jsonl
    parametrisation: residual
"""


def test_a_plan_gives_what_single_commands_give(run: Run, home: Path, files: Path, base: str) -> None:
    document = run("train", plan(files / "plans", PLAN.format(base=base), "plan.yaml"), "--json").json
    assert [(each["name"], each["steps"]) for each in document["soft_prompts"]] == [("quick", 6), ("stars", 4)]
    common = ("--base", base, "--dtype", "fp32", "--device", "cpu", *SMALL, "--eval-every", "3", "--compile", "off")
    labels = ("--labels", "negative,positive")
    run("train", "films.jsonl", "--name", "one", "--steps", "6", "--lr", "0.1", "--seed", "2", *labels, *common)
    other = ("--validation", "stars.jsonl", "--parametrisation", "residual")
    run("train", "stars.jsonl", "--name", "two", "--steps", "4", *other, *common)
    for ours, alone in (("quick", "one"), ("stars", "two")):
        torch.testing.assert_close(vectors(home, ours), vectors(home, alone), rtol=2e-4, atol=2e-4)


def test_options_count_for_more_than_a_plan(run: Run, files: Path, base: str) -> None:
    source = plan(files, PLAN.format(base="/nowhere").replace("../", ""), "plan.yaml")
    document = run("train", source, "--base", base, "--steps", "2", "--json").json
    assert [each["steps"] for each in document["soft_prompts"]] == [2, 2]
    assert document["base"] == base


def test_a_mix_is_one_soft_prompt_that_others_start_from(train: Run, run: Run, home: Path, files: Path) -> None:
    ran = train("films.jsonl", "stars.jsonl", "--mix", "--cap", "18", "--name", "source", *SMALL, "--json")
    assert ran.code == 0, ran.err
    assert [(one["name"], one["rows"]) for one in ran.json["data"]["mix"]] == [("films", 30), ("stars", 20)]
    assert [line.split() for line in ran.err.splitlines() if "50.0 %" in line] == [
        ["films", "18", "50.0", "%"],
        ["stars", "18", "50.0", "%"],
    ]
    assert SoftPrompt.load(home / "source.safetensors").num_virtual_tokens == 4
    assert run("predict", "source", "a stirring film", "--json", "--dtype", "fp32").code == 0
    given = train("films.jsonl", "--name", "given", "--init", "source", "--lr", "1e-9")
    assert given.code == 0, given.err
    torch.testing.assert_close(vectors(home, "given"), vectors(home, "source"), rtol=1e-4, atol=1e-4)


def test_each_job_of_a_mix_has_a_template_and_labels_of_its_own(train: Run, home: Path, files: Path) -> None:
    own = {
        "train": "films.jsonl",
        "template": "{soft_prompt}{input} is {target}",
        "labels": {"negative": "bad", "positive": "good"},
    }
    source = plan(files, {"defaults": {"num_virtual_tokens": 4}, "jobs": [own, {"train": "stars.jsonl"}]})
    ran = train(source, "--mix", "--name", "source")
    assert ran.code == 0, ran.err
    stored = SoftPrompt.load(home / "source.safetensors")
    assert stored.template == own["template"]
    assert stored.verbalizer == {"negative": ("bad",), "positive": ("good",)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("films.jsonl", "--mix"), "at least 2 data files"),
        (("films.jsonl", "stars.jsonl", "--cap", "5"), "add --mix"),
        (("films.jsonl", "films.jsonl", "--mix"), "'films'"),
        (("films.jsonl", "stars.jsonl", "--mix", "--validation", "films.jsonl"), "a tenth of each file"),
        (("films.jsonl", "stars.jsonl", "--mix", "--labels", "a,b"), "its own"),
        (("films.jsonl", "stars.jsonl", "--mix", "--loss", "labels"), "--loss"),
        (("jobs.json", "--mix"), "other settings"),
    ],
)
def test_mistakes_of_a_mix(options: tuple[str, ...], said: str, run: Run, files: Path) -> None:
    plan(files, {"jobs": [{"train": "films.jsonl"}, {"train": "stars.jsonl", "lr": 0.1}]}, "jobs.json")
    ran = run("train", *options, "--name", "source")
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err.replace("\n", " ")


JOB = {"name": "a", "train": "films.jsonl"}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"job": [JOB], "jobs": [JOB]}, ("There is no key 'job'", "did you mean 'jobs'")),
        ({"jobs": []}, ("at least one job",)),
        ({"jobs": [JOB], "defaults": {"stpes": 3}}, ("There is no setting 'stpes'", "did you mean 'steps'")),
        ({"jobs": [JOB], "defaults": {"name": "x"}}, ("There is no setting 'name'",)),
        ({"jobs": [JOB | {"learning_rate": 3}]}, ("job 'a'", "There is no setting 'learning_rate'")),
        ({"jobs": [{"name": "a"}]}, ("job 'a'", "expected data to train on")),
        ({"jobs": [JOB | {"steps": "many"}]}, ("job 'a'", "a whole number as steps", '"many"')),
        ({"jobs": [JOB | {"steps": 2.5}]}, ("job 'a'", "a whole number as steps")),
        ({"jobs": [JOB | {"steps": True}]}, ("job 'a'", "a whole number as steps", "a boolean")),
        ({"jobs": [JOB | {"name": 7}]}, ("job '7'", "text as name", "in quotes")),
        ({"jobs": [JOB | {"labels": ["yes", True]}]}, ("job 'a'", "labels", "in quotes")),
        ({"jobs": [JOB | {"lr": 0}]}, ("job 'a'", "lr must be above 0")),
        ({"jobs": [JOB | {"train": "none.jsonl"}]}, ("job 'a'", "none.jsonl", "check the path")),
        ({"jobs": [JOB, JOB]}, ("job 'a'", "the same name")),
        ({"jobs": [JOB | {"name": "a/b"}]}, ("job 'a/b'", "choose another name")),
        ({"jobs": ["films.jsonl"]}, ("job '1'", "expected an object")),
        ('{"jobs": [], "jobs": [1]}', ("'jobs' stands twice",)),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_a_mistake_in_a_plan_names_the_job(document: Any, said: Sequence[str], run: Run, files: Path) -> None:
    ran = run("train", plan(files, document))
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
    assert [part for part in said if part not in ran.err] == []


@pytest.mark.usefixtures("no_model")
def test_each_mistake_is_a_line(run: Run, files: Path) -> None:
    jobs = [JOB | {"lr": 0}, JOB | {"name": "b", "train": "none.jsonl"}, JOB | {"name": "c"}]
    ran = run("train", plan(files, {"jobs": jobs}))
    assert ["job 'a'" in line or "job 'b'" in line for line in ran.err.splitlines()] == [True, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jobs: [", ("line", "not YAML")),
        ("jobs:\n- {name: a, name: b}\n", ("'name' stands twice",)),
        ("1: x\njobs: []\n", ("a name before each colon",)),
        ("- name: a\n", ("an object with jobs",)),
        ("", ("an object with jobs",)),
        ("jobs: !!python/object/apply:os.system [echo]\n", ("not YAML",)),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_what_is_no_plan_is_refused(text: str, said: Sequence[str], run: Run, files: Path) -> None:
    ran = run("train", plan(files, text, "plan.yaml"))
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, "", 1)
    assert [part for part in said if part not in ran.err] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("films.jsonl", "stars.jsonl", "--name", "a"), "a name for each of 2 data files"),
        (("films.jsonl", "stars.jsonl", "--out", "x.safetensors"), "--out is for one"),
        (("films.jsonl", "stars.jsonl", "--track", "mlflow"), "--track is for one"),
        (("films.jsonl", "films.jsonl"), "the same name"),
        (("films.jsonl", "--name", "a", "b"), "one --name for one data file"),
        (("plan.json", "films.jsonl"), "the plan plan.json alone"),
        (("plan.json", "--name", "x"), "leave --name out"),
        (("none.yaml",), "cannot be read"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_options_that_do_not_go_with_several(arguments: tuple[str, ...], said: str, run: Run, files: Path) -> None:
    plan(files, {"jobs": [JOB]})
    ran = run("train", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err


def test_ctrl_c_keeps_the_best_of_each_and_can_be_resumed(
    run: Run, home: Path, files: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jobs(suffix: str) -> str:
        own: tuple[dict[str, Any], ...] = (
            {"train": "films.jsonl", "steps": 3},
            {"train": "stars.jsonl"},
            {"train": "films.jsonl", "seed": 1},
        )
        named = [{"name": f"{name}{suffix}", **each} for name, each in zip("abc", own, strict=True)]
        settings = {"steps": 8, "eval_every": 2, "num_virtual_tokens": 4, "checkpoint_every": 2}
        top = {"base": base, "dtype": "fp32", "device": "cpu", "defaults": settings}
        return plan(files, {**top, "jobs": named}, f"plan{suffix}.json")

    assert run("train", jobs("-whole")).code == 0
    begin = Training.begin_step

    def dies(self: Training) -> Any:
        if self.step == 5 and self.name.startswith("c"):
            raise KeyboardInterrupt
        return begin(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "begin_step", dies)
        ran = run("train", jobs(""), "--json")
    assert ran.code == 130
    assert [each["stopped"] for each in ran.json["soft_prompts"]] == ["steps", "interrupted", "interrupted"]
    assert run("predict", "b", "film 1", "--dtype", "fp32").code == 0
    refused = run("train", jobs(""))
    assert (refused.code, len(refused.err.splitlines())) == (2, 3)
    assert "add --resume" in refused.err
    stamp = (home / "a.safetensors").stat().st_mtime_ns
    document = run("train", jobs(""), "--resume", "--json").json
    assert [each["steps"] for each in document["soft_prompts"]] == [3, 8, 8]
    assert (home / "a.safetensors").stat().st_mtime_ns == stamp
    for name in "abc":
        assert torch.equal(vectors(home, name), vectors(home, f"{name}-whole"))
    again = run("train", jobs(""), "--resume")
    assert (again.code, again.err.count("has ended already")) == (0, 3)
    other = run("train", jobs(""), "--resume", "--lr", "0.2")
    assert (other.code, other.err.count("of a training with other lr")) == (2, 3)


def test_one_that_fails_leaves_the_others(train: Run, home: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Gradients.add

    def spoilt(gradients: Gradients, work: Work, numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        losses = add(gradients, work, numbers).clone()
        if len(numbers) == 2:  # the first round, after which one is left
            losses[0] = math.nan
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(Gradients, "add", spoilt)
        ran = train("films.jsonl", "train.jsonl", "--name", "a", "b", *SMALL, "--json")
    assert ran.code == 2
    assert [each["steps"] if each["path"] else None for each in ran.json["soft_prompts"]] == [None, 8]
    assert ran.err.splitlines()[-1].startswith("error: job 'a': the loss is not finite at the very first step")
    assert not (home / "a.safetensors").exists()
    assert (home / "b.safetensors").exists()
