"""Paths as people write them, everywhere: texts, ``Path``s, and ``~`` for the home folder."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import softprompt
from softprompt.compare import report
from softprompt.compare.comparison import Comparison
from softprompt.compare.plan import Plan
from softprompt.files import cache_folder, local_path, strict_json
from softprompt.inspection.drift import way_of
from softprompt.model.loading import lasting
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning import checkpoint, history
from softprompt.tuning.training import Training
from tests.conftest import (
    TOY_LABELS,
    TOY_TEMPLATE,
    Run,
    make_model,
    make_tokenizer,
    tiny,
    toy,
    toy_task,
    train_settings,
)


class Own(os.PathLike[str]):
    """A path that is neither a text nor a ``Path``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


def test_only_a_tilde_at_the_start_that_means_somebody_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/a b") == Path("/home/me/a b")
    assert local_path("~") == Path("/home/me")
    for text in ("a/~/b", "~no-such-user/b", "~$open.csv", "a~"):
        assert local_path(text) == local_path(Path(text)) == Path(text)
    assert lasting("~no-such-user/model") == "~no-such-user/model"


def test_strict_json_has_null_for_what_json_has_not() -> None:
    value = {"a": [1.5, math.inf, (-math.inf,)], "b": {"c": math.nan}, "d": None, "e": "Infinity", "f": True}
    assert json.loads(strict_json(value)) == {
        "a": [1.5, None, [None]],
        "b": {"c": None},
        "d": None,
        "e": "Infinity",
        "f": True,
    }


# --- texts and paths -------------------------------------------------------------------------------

KINDS = [str, Path, Own]


@pytest.mark.parametrize("kind", KINDS)
def test_soft_prompts_and_stores(kind: Any, stored: SoftPrompt, tmp_path: Path) -> None:
    softprompt.save(stored, kind(tmp_path / "new" / "x.safetensors"))
    assert torch.equal(softprompt.load(kind(tmp_path / "new" / "x.safetensors")).vectors, stored.vectors)
    store = Store(kind(tmp_path / "new"))
    assert store.names() == ("x",)
    assert store.find(kind(tmp_path / "new" / "x.safetensors")) == tmp_path / "new" / "x.safetensors"
    assert store.load(kind(tmp_path / "new" / "x.safetensors")).name == "films"
    assert store.name_of(kind(tmp_path / "new" / ".." / "new" / "x.safetensors")) == "x"
    assert store.name_of(kind(tmp_path / "x.safetensors")) is None


@pytest.mark.parametrize("kind", KINDS)
def test_data_and_labels(kind: Any, home: Path) -> None:
    path = home.parent / "labels.json"
    path.write_text('{"negative": "bad", "positive": "good"}')
    assert Verbalizer.parse(kind(path)).labels == ("negative", "positive")
    found = softprompt.read_dataset(kind(home.parent / "train.jsonl"), fields=("input",))
    assert (len(found.examples), found.source) == (40, str(home.parent / "train.jsonl"))


@pytest.mark.parametrize("kind", KINDS)
def test_run_folders(kind: Any, tmp_path: Path) -> None:
    data = toy(12, 0)
    for _ in range(2):
        config, folder = train_settings(steps=2, eval_every=1, checkpoint_every=1), kind(tmp_path / "run")
        training = Training(toy_task(tiny("llama"), data), data, data, config, folder=folder, resume=True)
        list(training)
    assert training.folder == tmp_path / "run"
    assert checkpoint.load(kind(tmp_path / "run"))[2]["step"] == 2
    assert sorted(history.load(kind(tmp_path / "run"))) == [(0, 0), (0, 1), (0, 2)]
    assert list(way_of(training.result(), kind(tmp_path / "run"))) == [0, 1, 2]
    checkpoint.trim_log(kind(tmp_path / "run" / "log.jsonl"), 1)
    checkpoint.tidy(kind(tmp_path / "run"))
    checkpoint.save(kind(tmp_path / "run"), {}, {}, {})


@pytest.mark.parametrize("kind", KINDS)
def test_comparisons(kind: Any, tmp_path: Path) -> None:
    plan = Plan("toy", toy(20, 1), toy(10, 2), toy(10, 3), TOY_TEMPLATE, TOY_LABELS, ("tiny",), ("tf-idf",))
    comparison = Comparison(plan, kind(tmp_path / "out"), lambda _: tiny("llama"))
    comparison.run(comparison.todo()[0])
    assert Comparison(plan, kind(tmp_path / "out"), lambda _: tiny("llama")).todo() == []
    assert report.write(comparison.cells, kind(tmp_path / "out"))[0] == tmp_path / "out" / "report.html"


@pytest.mark.parametrize("kind", KINDS)
def test_base_models(kind: Any, base: str) -> None:
    assert softprompt.FrozenLM.load(kind(Path(base)), dtype="fp32", device="cpu").name == base


# --- the home folder -------------------------------------------------------------------------------


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own folder, which holds the data; the current one is another, and empty."""
    me = home.parent / "me"
    me.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (home.parent / name).rename(me / name)
    (home.parent / "work").mkdir()
    monkeypatch.chdir(home.parent / "work")
    monkeypatch.setenv("HOME", str(me))
    monkeypatch.setenv("SOFTPROMPT_HOME", "~/prompts")
    return me


def test_everything_that_names_a_path_may_begin_with_a_tilde(at_home: Path, train: Run, run: Run) -> None:
    make_model("llama").save_pretrained(at_home / "base")
    make_tokenizer().save_pretrained(at_home / "base")
    (at_home / "labels.json").write_text('{"negative": "bad", "positive": "good"}')
    (at_home / "instructions.txt").write_text("Good or bad?\n")
    data = ("~/train.jsonl", "--validation", "~/test.jsonl", "--labels", "~/labels.json")
    assert train(*data, "--name", "a", "--num-virtual-tokens", "3").code == 0
    assert (at_home / "prompts" / "a.safetensors").is_file()
    assert train(*data, "--out=~/b.safetensors", "--init", "~/prompts/a.safetensors").code == 0
    assert (at_home / "b.safetensors").is_file()
    assert (at_home / "b.safetensors.run").is_dir()
    assert train(*data, "--out", "~/prompts/a.safetensors").code == 2  # it is the a of the store
    assert run("show", "~/b.safetensors", "--json").json["path"] == str(at_home / "b.safetensors")
    assert run("evaluate", "~/b.safetensors", "~/test.jsonl", "--base", "~/base", "--json").json["n"] == 12
    assert len(run("predict", "~/b.safetensors", "--file", "~/test.jsonl", "--json").json["predictions"]) == 12
    inspected = run("inspect", "~/b.safetensors", "--run", "~/b.safetensors.run", "--out", "~/looked")
    assert inspected.code == 0
    assert (at_home / "looked" / "report.json").is_file()
    compared = run(
        *("compare", "~/train.jsonl", "--validation", "~/test.jsonl", "--test", "~/test.jsonl", "--out=~/compared"),
        *("--methods", "tf-idf", "--instructions", "~/instructions.txt", "--bases", "~/base", "--json"),
    )
    assert compared.code == 0
    assert compared.json["out"] == str(at_home / "compared")
    assert (at_home / "compared" / "report.html").is_file()
    assert list(Path.cwd().iterdir()) == []


def test_a_data_set_in_the_home_folder(at_home: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"input": "a", "target": "b"}]).save_to_disk(str(at_home / "set"))
    found = softprompt.read_dataset("hf:~/set", fields=("input",))
    assert [example.target for example in found.examples] == ["b"]


def test_the_cache_may_be_in_the_home_folder(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_CACHE", "~/cache")
    assert cache_folder() == at_home / "cache"
