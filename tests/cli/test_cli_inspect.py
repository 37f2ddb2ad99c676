"""``inspect`` and ``harden`` in process: what is printed, what is written, and the mistakes, told before a model is
loaded."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.cli.main import main
from softprompt.data.example import Dataset, Example
from softprompt.inspection.nearest import WAYWARD
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.task import Task
from softprompt.text.template import default_template
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.training import Training
from tests.conftest import Ran, Run, is_refused, write_labels, write_texts

LABELS = Verbalizer.from_labels(["negative", "positive"])
TEXT = "<b>film</b> & $x$"
FP32 = ("--dtype", "fp32", "--device", "cpu")


@pytest.fixture(scope="module")
def trained(base: str) -> tuple[SoftPrompt, ...]:
    """Two soft prompts with labels, from other starts, and one for free text."""
    lm = FrozenLM.load(base, dtype="fp32", device="cpu")
    made: list[SoftPrompt] = []
    for name, init in (("one", "auto"), ("two", "vocab"), ("free", "vocab")):
        targets = ["very good", "rather dull"] if name == "free" else ["positive", "negative"]
        rows = tuple(Example({"input": f"film {i}"}, targets[i % 2], where=f"t:{i}") for i in range(12))
        task = Task(lm, default_template(name != "free"), None if name == "free" else LABELS, 4, lm.window)
        config = TrainConfig(num_virtual_tokens=4, init=init, steps=2, eval_every=2, batch_size=4, seed=len(made))
        training = Training(task, Dataset(rows, "t", "t"), None, config, name=name)
        list(training)
        made.append(training.result())
    return tuple(made)


@pytest.fixture
def tuned(run: Run, trained: tuple[SoftPrompt, ...]) -> Run:
    """``run``, with the soft prompts ``one`` and ``two`` in the store."""
    for soft_prompt in trained[:2]:
        Store().save(soft_prompt)
    return run


@dataclass(frozen=True)
class Whole:
    """One inspection with everything, which takes its time."""

    shown: Ran
    json: Any
    folder: Path


@pytest.fixture(scope="module")
def whole(trained: tuple[SoftPrompt, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    home = tmp_path_factory.mktemp("whole")
    write_labels(home / "test.jsonl", 12)
    options = ["inspect", "one", "--data", str(home / "test.jsonl"), "--rows", "6", "--text", TEXT, *FP32]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTPROMPT_HOME", str(home / "store"))
        Store().save(trained[0])
        outputs = []
        for last in (["--out", str(home / "report")], ["--json"]):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main([*options, *last])
            outputs.append(Ran(code, out.getvalue(), err.getvalue()))
        yield Whole(outputs[0], outputs[1].json, home / "report")


def lines_of(ran: Ran) -> list[str]:
    assert ran.code == 0, ran.err
    return ran.out.splitlines()


class _Tags(HTMLParser):
    """Counts tags, and fails at one that is closed in another order than it was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# --- inspect one ---------------------------------------------------------------------------------


def test_without_data_the_views_of_the_vectors_are_shown(tuned: Run) -> None:
    lines = lines_of(tuned("inspect", "one", *FP32))
    assert lines[0].startswith("one: 4 virtual tokens for ")
    assert " ".join(lines[1:3]) == f"Note: {WAYWARD}"
    assert "Do the label words persist?" in lines
    assert "Which virtual tokens matter most?" not in lines
    assert [line for line in lines if len(line) > 100] == []


def test_with_data_and_a_text_everything_is_shown_in_100_columns(whole: Whole) -> None:
    lines = lines_of(whole.shown)
    for question in (
        "Does it lie near words?",
        "Do the label words persist?",
        "What is left of the start, and what did training add?",
        "Which virtual tokens matter most?",
        "How many of them are needed?",
        "What is lost when it is read as text?",
        "What does it change?",
        "Read as text",
    ):
        assert question in lines
    assert any(line.startswith("After '<b>film</b>") for line in lines)
    assert [line for line in lines if len(line) > 100] == []


def test_json_is_one_object_with_the_answers(whole: Whole, tuned: Run) -> None:
    found = whole.json
    assert found["warning"] == WAYWARD
    assert found["num_virtual_tokens"] == len(found["nearest"]["readings"]) == 4
    assert found["matters"]["n"] == found["labels"]["n"] == 6
    assert len(found["matters"]["top"]) == 4
    assert {reading["name"] for reading in found["readings"]} >= {"soft prompt", "no soft prompt"}
    assert [word["text"] for word in found["words"]] == ["negative", "positive"]
    assert found["continuations"][0]["text"] == TEXT
    assert len(found["attention"]["by_layer"]) == 3
    assert found["attention"]["texts"] == 7
    assert len(found["norms"]["moved"]) == 4
    assert found["answers"][0]["question"] == "Does it lie near words?"
    alone = tuned("inspect", "one", "--json", *FP32).json
    assert alone["matters"] is alone["labels"] is alone["attention"] is alone["source"] is None
    assert alone["nearest"] == found["nearest"]


def test_the_report_is_one_page_with_its_pictures_and_a_card(whole: Whole) -> None:
    folder = whole.folder
    names = {path.name for path in folder.iterdir()}
    pictures = {"near", "norms", "matters", "cuts", "readings", "labels", "attention", "map"}
    assert names == {"report.html", "card.md", "report.json", *(f"{name}.png" for name in pictures)}
    html = (folder / "report.html").read_text("utf-8")
    tags = _Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.count["img"] == len(pictures)
    assert "script" not in tags.count
    assert "b" not in tags.count
    assert all(source.startswith("data:image/svg+xml;base64,") for source in tags.sources)
    assert html.count("Khashabi et al. 2022") >= 2
    for name in pictures:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "card.md").read_text("utf-8")
    assert card.startswith("## What is known of the soft prompt one\n")
    assert f"> {WAYWARD}" in card
    tables = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {5, 8}
    assert json.loads((folder / "report.json").read_text("utf-8")) == whole.json


def test_a_start_that_is_not_known_is_said_to_be(tuned: Run) -> None:
    store = Store()
    store.save(replace(store.load("one"), name="foreign", training={}))
    ran = tuned("inspect", "foreign", "--out", "report", *FP32)
    assert "  Not known: its record does not say." in lines_of(ran)


def test_free_text_is_measured_by_its_loss(run: Run, trained: tuple[SoftPrompt, ...], home: Path) -> None:
    Store().save(trained[2])
    write_texts(home.parent / "texts.jsonl", 3)
    ran = run("inspect", "free", "--data", "texts.jsonl", "--out", "report", *FP32)
    lines = lines_of(ran)
    assert "Do the label words persist?" not in lines
    assert "What does it change?" not in lines
    assert "What is lost when it is read as text?" in lines
    assert [line for line in lines if len(line) > 100] == []
    found = json.loads((home.parent / "report" / "report.json").read_text("utf-8"))
    assert found["matters"]["full"]["score"] is None
    assert found["words"] == []


def test_the_way_over_the_training_is_found_in_its_run_folder(run: Run, train: Run, home: Path) -> None:
    assert train("train.jsonl", "--name", "films", "--num-virtual-tokens", "4").code == 0
    lines = lines_of(run("inspect", "films", "--out", "report", *FP32))
    assert "How did it get there?" in lines
    (head,) = (i for i, line in enumerate(lines) if line.split()[:3] == ["step", "drift", "largest"])
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["0", "4", "8"]
    assert sum(line.rstrip().endswith("kept") for line in lines[head + 1 : head + 4]) == 1
    assert [line for line in lines if len(line) > 100] == []
    folder = home.parent / "report"
    assert (folder / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert "How did it get there?" in (folder / "report.html").read_text("utf-8")
    assert "| step | drift | largest |" in (folder / "card.md").read_text("utf-8")
    found = run("inspect", "films", "--json", *FP32).json
    assert [point["step"] for point in found["drift"]["points"]] == [0, 4, 8]
    by_path = run("inspect", str(home / "films.safetensors"), "--json", *FP32).json
    assert by_path["drift"] == found["drift"]

    runs = home / ".runs"
    (runs / "films").rename(home.parent / "kept")
    missing = run("inspect", "films", "--json", *FP32)
    assert (missing.json["drift"], missing.err) == (None, "")
    answer = {each["question"]: each["answer"] for each in missing.json["answers"]}["How did it get there?"]
    assert answer == (
        "Not known: the run folder of its training was not found, which keeps the vectors of each validation; where "
        "there is one, name it with --run."
    )
    assert run("inspect", "films", "--run", "kept", "--json", *FP32).json["drift"] == found["drift"]


def test_the_history_of_another_training_is_not_taken(
    run: Run, train: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("train.jsonl", "--out", "a.safetensors", "--num-virtual-tokens", "4").code == 0
    assert run("inspect", "a.safetensors", "--json", *FP32).json["drift"] is not None
    soft_prompt = SoftPrompt.load(home.parent / "a.safetensors")
    replace(soft_prompt, vectors=2 * soft_prompt.vectors).save(home.parent / "a.safetensors")
    ran = run("inspect", "a.safetensors", "--json", *FP32)
    sentence = "The history in a.safetensors.run is of another training: the vectors of 'a' are nowhere in it."
    assert (ran.json["drift"], ran.err) == (None, f"warning: {sentence}\n")
    monkeypatch.setattr(FrozenLM, "load", None)  # told before a model is loaded
    is_refused(run("inspect", "a.safetensors", "--run", "a.safetensors.run"), sentence)
    is_refused(
        run("inspect", "a.safetensors", "--run", "nowhere"),
        "There is no training's history in nowhere; expected the file history.safetensors of a run folder there.",
    )


# --- several, and the store ----------------------------------------------------------------------


def test_several_are_compared(tuned: Run, home: Path) -> None:
    ran = tuned("inspect", "one", "two", "--out", "both", *FP32)
    lines = lines_of(ran)
    assert lines[0] == "How alike the soft prompts are"
    assert "How alike is what training added to their starts" in lines
    assert any(re.match(r"at distance \d\.\d\d: one with two", line) for line in lines)
    assert [line for line in lines if len(line) > 100] == []
    folder = home.parent / "both"
    assert {path.suffix for path in folder.iterdir()} == {".html", ".json", ".png"}
    found = tuned("inspect", "--all", "--json", *FP32).json
    assert found["similarity"]["names"] == ["one", "two"]
    assert found["added"]["names"] == ["one", "two"]
    (pair,) = found["similarity"]["pairs"]
    a, b = (Store().load(name).vectors.mean(dim=0) for name in ("one", "two"))
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    assert pair["values"]["average_cosine"] == pytest.approx(cosine, abs=1e-5)


def test_all_leaves_out_what_cannot_be_compared(tuned: Run, home: Path) -> None:
    store = Store()
    store.save(replace(store.load("one"), name="stranger", base_fingerprint="other", base="elsewhere"))
    (home / "broken.safetensors").write_bytes(b"nothing")
    ran = tuned("inspect", "--all", "--json", *FP32)
    assert ran.json["similarity"]["names"] == ["one", "two"]
    assert "left out: stranger, of another base model (elsewhere)" in ran.err
    assert "broken.safetensors" in ran.err


def test_the_store_is_listed_without_a_model(tuned: Run, home: Path, no_model: None) -> None:
    lines = lines_of(tuned("inspect"))
    assert lines[0].split()[:2] == ["name", "base"]
    assert [line.split()[0] for line in lines[1:3]] == ["one", "two"]
    assert [line for line in lines if len(line) > 100] == []
    found = tuned("inspect", "--json").json
    norms = Store().load("one").vectors.norm(dim=1)
    assert found["soft_prompts"][0]["norm"]["mean"] == pytest.approx(float(norms.mean()))
    assert found["home"] == str(home)


def test_an_empty_store_is_no_error(run: Run, home: Path) -> None:
    ran = run("inspect")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == f"the store {home} holds nothing to inspect; see `softprompt train --help`\n"


# --- harden --------------------------------------------------------------------------------------


def test_harden_prints_a_text_and_what_is_lost(tuned: Run) -> None:
    ran = tuned("harden", "one", "--validation", "train.jsonl", "--budget", "0.2", *FP32)
    lines = lines_of(ran)
    assert [line.split("  ")[0] for line in lines[1:5]] == [
        "soft prompt",
        "no soft prompt",
        "nearest tokens as text",
        "hardened text",
    ]
    assert lines[-2] == "The hard prompt, as a Python string"
    found = tuned("harden", "one", "--validation", "train.jsonl", "--budget", "0", "--json", *FP32).json
    assert found["name"] == "one"
    assert found["stopped"] == "budget"
    assert [reading["name"] for reading in found["readings"]][-1] == "hardened text"


# --- mistakes ------------------------------------------------------------------------------------


def test_mistakes_are_one_sentence_before_the_model_is_loaded(tuned: Run, home: Path, no_model: None) -> None:
    is_refused(
        tuned("inspect", "one", "--all"), "Either names or --all can be given to inspect, not both; leave one out."
    )
    is_refused(
        tuned("inspect", "one", "two", "--data", "test.jsonl"),
        "--data, --text and --run go with a single soft prompt; name one, or leave them out.",
    )
    write_labels(home.parent / "other.jsonl", 6, ("good", "bad"))
    is_refused(
        tuned("inspect", "one", "--data", "other.jsonl"),
        'other.jsonl:1: expected one of the labels "negative", "positive", found "good"; '
        "correct this row and 5 more bad rows, or give all labels with --labels.",
    )
    write_labels(home.parent / "single.jsonl", 1)
    is_refused(
        tuned("inspect", "one", "--data", "single.jsonl"),
        "Expected at least 2 rows to score with in single.jsonl, found 1; give more.",
    )
    is_refused(
        tuned("harden", "one", "--validation", "test.jsonl", "--budget", "soon"),
        "Expected a time such as 90s, 10m or 1h for --budget, found 'soon'; write one.",
    )
    store = Store()
    store.save(replace(store.load("one"), name="stranger", base_fingerprint="other", base="elsewhere"))
    base = store.load("one").base
    is_refused(
        tuned("inspect", "one", "stranger"),
        f"Soft prompts can be compared that were tuned on one base model, but 'one' is for {base} and 'stranger' for "
        f"elsewhere; name some of the same.",
    )


def test_all_of_an_empty_store_is_refused(run: Run, home: Path) -> None:
    is_refused(run("inspect", "--all"), f"There is no soft prompt in {home} to inspect; see `softprompt train --help`.")


def test_a_kv_prefix_is_refused(tuned: Run, monkeypatch: pytest.MonkeyPatch, no_model: None) -> None:
    prefix = replace(Store().load("one"), vectors=torch.ones(2, 3, 2, 2, 8), parametrisation="prefix")
    monkeypatch.setattr(Store, "load", lambda *_: prefix)
    sentence = (
        "Reading a soft prompt needs vectors of the embedding width, but 'one' is a trained KV prefix, which has none; "
        "inspect one of another parametrisation."
    )
    is_refused(tuned("inspect", "one"), sentence)
    is_refused(tuned("harden", "one", "--validation", "test.jsonl"), sentence)


def test_a_missing_matplotlib_is_one_sentence(tuned: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    is_refused(
        tuned("inspect", "one", "--out", "report", *FP32),
        'Drawing figures needs the library matplotlib, which is not installed; pip install "softprompt[compare]".',
    )


def test_a_text_for_several_fields_is_refused(tuned: Run, home: Path) -> None:
    path = home / "pair.safetensors"
    one = Store().load("one")
    replace(one, name="pair", template="{soft_prompt}{a} {b} {target}").save(path)
    is_refused(
        tuned("inspect", str(path), "--text", "x", *FP32),
        "A text can be given for a template with one field, but this one has a, b; give rows with --data instead.",
    )


def test_the_wrong_base_model_is_refused(tuned: Run, home: Path) -> None:
    store = Store()
    store.save(replace(store.load("one"), name="stranger", base_fingerprint="other"))
    ran: Any = tuned("inspect", "stranger", *FP32)
    assert (ran.code, ran.out) == (2, "")
    assert "was tuned on the base model" in ran.err
