"""The command line, in process, with a tiny model on disk: the whole way, and what is kept."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.text.template import default_template
from softprompt.tuning import checkpoint
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.training import Training
from tests.conftest import Ran, Run, is_refused, write_labels, write_texts

# --- the whole way -------------------------------------------------------------------------------


def test_the_whole_way(run: Run, train: Run, home: Path, base: str) -> None:
    trained = train(
        "train.jsonl", "--validation", "test.jsonl", "--name", "films", "--num-virtual-tokens", "4", "--json"
    )
    assert trained.code == 0
    plan = "plan: 8 steps of 16 rows; 4 virtual tokens; a validation every 4 steps on 12 rows, 2 in all"
    assert plan in trained.err.splitlines()
    assert re.search(r"^about \d.* s: 8 steps of [\d.]+ s, 2 validations of [\d.]+ s$", trained.err, re.MULTILINE)
    assert "step     8/8" in trained.err
    path = home / "films.safetensors"
    document = trained.json
    assert document["path"] == str(path)
    assert document["bytes"] == path.stat().st_size
    assert document["base"] == base
    assert document["base_unchanged"] is True
    assert (document["steps"], document["stopped"], document["num_virtual_tokens"]) == (8, "steps", 4)
    assert document["metrics"][0]["metric"] == "accuracy"
    assert not (home / ".runs" / "films" / checkpoint.FILE).exists()
    assert len((home / ".runs" / "films" / checkpoint.LOG).read_text().splitlines()) == 8

    listed = run("list", "--json").json
    assert listed["home"] == str(home)
    assert [(one["name"], one["labels"]) for one in listed["soft_prompts"]] == [("films", ["negative", "positive"])]
    shown = run("show", "films", "--json").json
    assert shown["training"]["steps_done"] == 8
    assert shown["template"] == default_template(labelled=True).text
    assert shown["verbalizer"] == {"negative": ["negative"], "positive": ["positive"]}
    assert shown == run("show", str(path), "--json").json
    plain = run("show", "films").out
    assert "training.lr" in plain
    assert "metrics.validation" in plain
    assert "films" in run("list").out

    evaluated = run("evaluate", "films", "test.jsonl", "--dtype", "fp32", "--json").json
    predicted = run("predict", "films", "--file", "test.jsonl", "--dtype", "fp32", "--json").json
    gold = [json.loads(line)["target"] for line in Path("test.jsonl").read_text().splitlines()]
    answers = [prediction["text"] for prediction in predicted["predictions"]]
    assert evaluated["metric"] == "accuracy"
    assert evaluated["n"] == len(gold) == 12
    assert evaluated["value"] == sum(map(str.__eq__, answers, gold)) / len(gold)
    assert evaluated["value"] == document["metrics"][0]["value"]
    assert evaluated["low"] <= evaluated["value"] <= evaluated["high"]
    names = ["accuracy", "macro_f1", "mcc", "log_loss", "calibration_error"]
    assert [metric["metric"] for metric in evaluated["metrics"]] == names
    for prediction in predicted["predictions"]:
        probabilities = prediction["probabilities"]
        assert sum(probabilities.values()) == pytest.approx(1)
        assert prediction["text"] == max(probabilities, key=probabilities.get)

    bare = run("evaluate", "films", "test.jsonl", "--base-only", "--dtype", "fp32", "--json").json
    assert (bare["base_only"], bare["num_virtual_tokens"]) == (True, 0)
    assert bare["metrics"] != evaluated["metrics"]
    table = run("evaluate", "films", "test.jsonl", "--metric", "mcc", "--metric", "accuracy").out.splitlines()
    assert table[0] == f"films on {base}, test.jsonl"
    assert [line.split()[0] for line in table[1:]] == ["metric", "mcc", "accuracy"]

    said = run("predict", "films", "a stirring film", "a dull mess")
    assert said.code == 0
    assert len(said.out.splitlines()) == 2
    assert {line.split()[0] for line in said.out.splitlines()} <= {"positive", "negative"}

    removed = run("rm", "films")
    assert removed == Ran(0, "removed films\n", "")
    assert not path.exists()
    assert not (home / ".runs" / "films").exists()
    assert run("list", "--json").json["soft_prompts"] == []


def test_the_best_of_several_prompt_lengths_is_stored(run: Run, train: Run) -> None:
    document = train("train.jsonl", "--name", "films", "--lengths", "3,30", "--json").json
    assert document["num_virtual_tokens"] in (20, 3, 30)
    assert document["steps"] == 10  # one of each length, and seven more of the best
    shown = run("show", "films", "--json").json
    assert shown["num_virtual_tokens"] == document["num_virtual_tokens"]
    assert shown["training"]["lengths"] == [3, 30]


def test_people_read_a_summary(train: Run, home: Path, base: str) -> None:
    ran = train("train.jsonl", "--name", "films")
    path = home / "films.safetensors"
    lines = ran.out.splitlines()
    assert lines[:3] == [
        "soft prompt  films, 64 virtual tokens",
        f"file         {path} ({path.stat().st_size:,} bytes)",
        f"base model   {base}, unchanged, bit for bit",
    ]
    for line, metric in zip(lines[3:6], ("accuracy", "macro_f1", "mcc"), strict=True):
        assert line.startswith(f"validation   {metric} ")
    assert lines[6].startswith("steps        8, the best of them ")
    assert lines[7].startswith("time         ")


def test_what_a_run_goes_on_without_is_told(train: Run, broken_compiler: list[str]) -> None:
    ran = train("train.jsonl", "--name", "films", "--compile", "on")
    assert ran.code == 0
    assert ran.err.count("Note: the layers could not be compiled (x.cpp:1: fatal error: Python.h: no file); ") == 1


def test_labels_of_several_tokens_and_several_words(run: Run, train: Run, home: Path) -> None:
    write_labels(home.parent / "long.jsonl", 40, ("very good indeed", "not so good"))
    ran = train("long.jsonl", "--name", "long", "--labels", "very good indeed=great|very good,not so good=awful|a mess")
    assert ran.code == 0
    for option in ((), ("--normalise-length",)):
        found = run("predict", "long", "a film", "--json", "--dtype", "fp32", *option).json["predictions"][0]
        assert list(found["probabilities"]) == ["very good indeed", "not so good"]
        assert found["finish"] is None
    assert run("show", "long", "--json").json["verbalizer"] == {
        "very good indeed": ["great", "very good"],
        "not so good": ["awful", "a mess"],
    }


def test_free_text(run: Run, train: Run, home: Path) -> None:
    write_texts(home.parent / "texts.jsonl", 12)
    assert train("texts.jsonl", "--name", "texts", "--max-length", "104").code == 0
    assert run("show", "texts", "--json").json["template"] == default_template(labelled=False).text
    found = run("evaluate", "texts", "texts.jsonl", "--max-new-tokens", "4", "--dtype", "fp32", "--json").json
    assert [metric["metric"] for metric in found["metrics"]] == [
        "bleu",
        "rouge_l",
        "exact_match",
        "token_f1",
        "perplexity",
    ]
    greedy = run("predict", "texts", "film 3", "--max-new-tokens", "4", "--dtype", "fp32", "--json").json
    assert greedy["predictions"][0]["probabilities"] is None
    assert greedy["predictions"][0]["finish"] in ("stop", "length")
    drawn = ("predict", "texts", "film 3", "--temperature", "2", "--top-p", "0.9", "--json", "--dtype", "fp32")
    assert run(*drawn, "--seed", "1").out == run(*drawn, "--seed", "1").out
    assert run(*drawn, "--seed", "1").out != run(*drawn, "--seed", "2").out
    text = greedy["predictions"][0]["text"]
    cut = run("predict", "texts", "film 3", "--max-new-tokens", "4", "--stop", text[-1], "--dtype", "fp32").out
    assert cut.strip() == text[: text.index(text[-1])].strip()


def test_labels_can_be_taken_for_free_text(run: Run, train: Run) -> None:
    assert train("train.jsonl", "--name", "films", "--labels", "none", "--json").json["loss"] == "lm"
    assert run("show", "films", "--json").json["verbalizer"] is None


def test_a_template_of_several_fields(run: Run, train: Run, home: Path) -> None:
    rows = "".join(f"film {i},{1990 + i % 3},{('old', 'new')[i % 2]}\n" for i in range(20))
    (home.parent / "two.csv").write_text("film,year,target\n" + rows)
    template = "{soft_prompt}{film} of {year}\\nAge: {target}"
    assert train("two.csv", "--name", "two", "--template", template).code == 0
    assert run("show", "two", "--json").json["template"] == "{soft_prompt}{film} of {year}\nAge: {target}"
    found = run("predict", "two", '{"film": "Alien", "year": "1979"}', "--json").json["predictions"][0]
    assert found["fields"] == {"film": "Alien", "year": "1979"}
    is_refused(
        run("predict", "two", "Alien, 1979"),
        "text 1: expected a JSON object with texts for film, year, found 'Alien, 1979'; write one, "
        "or give rows with --file.",
    )


def test_texts_come_from_standard_input(run: Run, train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    train("train.jsonl", "--name", "films")

    def pipe(text: bytes, *options: str) -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="ascii"))
        return run("predict", "films", "-", *options)

    lines = "a stirring film\n\nune sœur d’été\n"
    for piped, options in (
        (lines.encode(), ()),
        (lines.replace("\n", "\r\n").encode("utf-8-sig"), ()),
        (lines.replace("\n", "\r").encode("utf-16"), ()),
        (lines.encode("cp1252"), ("--encoding", "cp1252")),
    ):
        found = pipe(piped, *options, "--json").json["predictions"]
        assert [one["fields"]["input"] for one in found] == ["a stirring film", "une sœur d’été"]
    is_refused(pipe(b"\n"), "Expected a text a line on standard input, found none; pipe some in.")
    refused = pipe(lines.encode("cp1252"))
    assert refused.code == 2
    assert refused.err.startswith("error: stdin:3: expected UTF-8, found the byte 0x9c; ")
    assert "--encoding" in refused.err


def test_a_text_may_begin_with_a_dash(run: Run, train: Run) -> None:
    train("train.jsonl", "--name", "films")
    for text in ("-5 stars", "--bad", "- well", "-hello"):
        told = run("predict", "films", text)
        assert told.code == 2
        assert "; put -- before a text that begins with a dash" in " ".join(told.err.replace("│", " ").split())
        found = run("predict", "films", "--json", "--", text).json["predictions"]
        assert [one["fields"]["input"] for one in found] == [text]


def test_one_of_several_fields_may_be_blank(run: Run, train: Run, home: Path) -> None:
    rows = [{"instruction": f"do {i}", "input": "", "target": ("a", "b")[i % 2]} for i in range(20)]
    (home.parent / "alpaca.json").write_text(json.dumps(rows))
    ran = train("alpaca.json", "--name", "do", "--template", "{soft_prompt}{instruction} {input}\\n{target}")
    assert (ran.code, 'input from "input" (blank in 20 rows)' in ran.err) == (0, True)
    assert run("predict", "do", '{"instruction": "do it", "input": ""}').code == 0
    is_refused(
        run("predict", "do", '{"instruction": " ", "input": ""}'),
        "text 1: expected text for {instruction}, {input}, found only blanks; write some.",
    )


def test_out_writes_beside_the_store(run: Run, train: Run, home: Path) -> None:
    ran = train("train.jsonl", "--out", "kept/films.safetensors", "--json")
    assert ran.json["path"] == "kept/films.safetensors"
    assert ran.json["name"] == "films"
    assert sorted(path.name for path in Path("kept").iterdir()) == ["films.safetensors", "films.safetensors.run"]
    assert run("list", "--json").json["soft_prompts"] == []
    assert run("evaluate", "kept/films.safetensors", "test.jsonl", "--json").code == 0
    is_refused(
        train("train.jsonl", "--out", "kept/films.safetensors"),
        "The file kept/films.safetensors exists; choose another --out, or add --overwrite to replace it.",
    )
    assert train("train.jsonl", "--out", "kept/films.safetensors", "--overwrite").code == 0


def test_a_soft_prompt_to_start_from(run: Run, train: Run, home: Path) -> None:
    train("train.jsonl", "--name", "first", "--num-virtual-tokens", "3")
    second = train("train.jsonl", "--name", "second", "--init", "first", "--lr", "1e-9", "--json")
    assert second.json["num_virtual_tokens"] == 3
    first, started = (SoftPrompt.load(home / f"{name}.safetensors").vectors for name in ("first", "second"))
    torch.testing.assert_close(started, first, atol=1e-6, rtol=0)
    by_path = train(
        "train.jsonl", "--name", "third", "--init", str(home / "first.safetensors"), "--num-virtual-tokens", "3"
    )
    assert by_path.code == 0
    is_refused(
        train("train.jsonl", "--name", "fourth", "--init", "first", "--num-virtual-tokens", "5"),
        "--num-virtual-tokens is 5, but the soft prompt 'first' to start from has 3; leave the option out.",
    )


def test_the_preset_with_a_change(run: Run, train: Run) -> None:
    train("train.jsonl", "--name", "films", "--preset", "lester2021", "--num-virtual-tokens", "5")
    settings = run("show", "films", "--json").json["training"]
    assert (settings["optimizer"], settings["schedule"], settings["steps_done"]) == ("adafactor", "constant", 8)
    assert settings["num_virtual_tokens"] == 5


def test_truncated_inputs_are_told(run: Run, train: Run, home: Path) -> None:
    long = "dull " * 300
    rows = [{"input": long if i < 2 else "a film", "target": ("old", "new")[i % 2]} for i in range(12)]
    (home.parent / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("long.jsonl", "--validation", "long.jsonl", "--name", "long", "--num-virtual-tokens", "4")
    warning = (
        "warning: 2 inputs did not fit into 128 tokens, template and target included; the end of the input was cut\n"
    )
    assert warning in train(*args).err
    assert run("evaluate", "long", "long.jsonl", "--json").err.startswith(warning)
    one = run("predict", "long", long, "--json")
    assert one.err == warning.replace("2 inputs did", "1 input did")
    assert one.json["predictions"][0]["truncated"] is True


def test_one_answer_to_all_rows_is_told(run: Run, train: Run) -> None:
    """The same input on every row can only have the same answer."""
    train("train.jsonl", "--name", "films")
    for file, labels in (("same.jsonl", ("negative", "positive")), ("only.jsonl", ("positive",))):
        rows = [{"input": "a film", "target": labels[i % len(labels)]} for i in range(12)]
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = run("predict", "films", "a film", "--json").json["predictions"][0]["text"]
    wanted = f"answers {answer!r} on 100.0 % of the rows; 50.0 % of the rows are\n"
    found = run("evaluate", "films", "same.jsonl", "--json")
    assert found.err.startswith("warning: films on ")
    assert found.err.endswith(wanted)
    assert found.json["most_frequent_answer"] == {"label": answer, "share": 1.0, "gold_share": 0.5, "one_answer": True}
    plain = run("evaluate", "films", "same.jsonl", "--base-only")
    assert "without a soft prompt answers '" in plain.err
    assert "warning" not in plain.out
    only = run("evaluate", "films", "only.jsonl", "--json")
    assert ("warning" in only.err) == only.json["most_frequent_answer"]["one_answer"] == (answer != "positive")


# --- nothing that was stored is lost -------------------------------------------------------------


def test_an_unwritable_store(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch, no_model: None) -> None:
    home.write_text("a file")
    is_refused(
        run("train", "train.jsonl", "--name", "films"),
        f"The store {home} cannot be written: File exists; set SOFTPROMPT_HOME to a folder that can.",
    )


def test_a_full_disk_keeps_what_was_stored_and_the_training(
    train: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home / "films.safetensors"
    train("train.jsonl", "--name", "films")
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real_save = SoftPrompt.save

    def save(soft_prompt: SoftPrompt, target: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            real_save(soft_prompt, target)

    monkeypatch.setattr(SoftPrompt, "save", save)
    ran = train("train.jsonl", "--name", "films", "--overwrite", "--seed", "1")
    assert (ran.code, ran.out) == (2, "")
    assert re.sub(r"free [\d,]+ bytes", "free N bytes", ran.err.splitlines()[-1]) == (
        f"error: The soft prompt 'films' cannot be written to {path}: No space left on device; free N bytes there, or "
        f"choose another folder; the training is not lost: give the same command with --resume."
    )
    assert path.read_bytes() == before
    assert [file.name for file in home.iterdir() if file.suffix == ".tmp"] == []

    monkeypatch.setattr(SoftPrompt, "save", real_save)
    resumed = train("train.jsonl", "--name", "films", "--seed", "1", "--resume", "--json")
    assert resumed.json["steps"] == 8
    assert not re.search("^(plan|step)", resumed.err, re.MULTILINE)  # nothing was left to do but to write
    assert SoftPrompt.load(path).training["seed"] == 1


def test_a_disk_that_is_full_for_checkpoints(train: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("train.jsonl", "--name", "films")
    before = (home / "films.safetensors").read_bytes()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    ran = train("train.jsonl", "--name", "films", "--overwrite")
    assert (ran.code, ran.out) == (2, "")
    assert f"{home / '.runs' / 'films'} cannot be written: No space left on device; free some space there" in ran.err
    assert (home / "films.safetensors").read_bytes() == before


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C in the step after the one whose number is put in."""
    at: list[int] = []
    real = Training.begin_step

    def advance(self: Training) -> Any:
        if at and self.step == at[0]:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Training, "begin_step", advance)
    return at


def test_ctrl_c_keeps_the_best_so_far_and_can_be_resumed(
    run: Run, train: Run, home: Path, interrupted_at: list[int]
) -> None:
    whole = train("train.jsonl", "--name", "whole", "--json").json
    interrupted_at.append(5)
    ran = train("train.jsonl", "--name", "films", "--json")
    assert ran.code == 130
    assert (ran.json["steps"], ran.json["best_step"], ran.json["stopped"]) == (5, 4, "interrupted")
    assert ran.err.splitlines()[-1] == (
        "interrupted after step 5 of 8; the best so far is stored; to go on, give the same command with --resume"
    )
    assert run("predict", "films", "a film").code == 0
    folder = home / ".runs" / "films"
    is_refused(
        train("train.jsonl", "--name", "films"),
        f"A training of 'films' was stopped before its end, see {folder}; add --resume to go on with it, "
        f"or --overwrite to start anew.",
    )
    interrupted_at.clear()
    is_refused(
        train("train.jsonl", "--name", "films", "--resume", "--lr", "0.2"),
        f"the checkpoint in {folder} is of a run with other lr ({TrainConfig().lr} there, 0.2 here); resume with the "
        f"same settings and data, or start anew with --overwrite instead of --resume",
    )
    resumed = train("train.jsonl", "--name", "films", "--resume", "--json").json
    assert (resumed["steps"], resumed["metrics"]) == (8, whole["metrics"])
    left, right = (SoftPrompt.load(home / f"{name}.safetensors").vectors for name in ("whole", "films"))
    assert torch.equal(left, right)
    is_refused(
        train("train.jsonl", "--name", "films", "--resume"),
        f"The name 'films' is taken by the soft prompt {home / 'films.safetensors'}; choose another name, "
        f"or remove that one first with `softprompt rm films`.",
    )


def test_ctrl_c_is_heard_where_its_exception_is_lost(train: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Gradients.add

    def deaf(*arguments: Any) -> Any:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return add(*arguments)

    monkeypatch.setattr(Gradients, "add", deaf)
    ran = train("train.jsonl", "--name", "films")
    assert ran.code == 130
    assert "interrupted after step 1 of 8; the best so far is stored" in ran.err
    assert (home / "films.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_the_first_step_stores_nothing(
    run: Run, train: Run, home: Path, interrupted_at: list[int]
) -> None:
    interrupted_at.append(0)
    ran = train("train.jsonl", "--name", "films")
    assert (ran.code, ran.out) == (130, "")
    assert ran.err.splitlines()[-1] == "interrupted before the first step; nothing was stored"
    assert run("list", "--json").json["soft_prompts"] == []


def test_ctrl_c_elsewhere(run: Run, stored: SoftPrompt, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FrozenLM, "load", load)
    assert run("evaluate", "films", "test.jsonl").code == 130


@pytest.mark.parametrize("at", [0, 5])
def test_a_loss_that_is_not_finite(at: int, run: Run, train: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from softprompt.tuning.gradients import Gradients

    real = Gradients.add
    calls: list[int] = []

    def add(*args: Any) -> torch.Tensor:
        losses = real(*args)
        calls.append(1)
        return losses * float("nan") if len(calls) > at else losses

    monkeypatch.setattr(Gradients, "add", add)
    ran = train("train.jsonl", "--name", "films", "--json")
    assert ran.code == 2
    if at == 0:
        assert ran.out == ""
        assert ran.err.splitlines()[-1] == (
            "error: The loss is not finite at the very first step, so nothing was learned; try --dtype fp32."
        )
        assert run("list", "--json").json["soft_prompts"] == []
        return
    path = home / "films.safetensors"
    assert ran.json["stopped"] == "not finite"
    assert ran.err.splitlines()[-1] == (
        f"error: The loss is not finite any more after step 5 of 8; the last good soft prompt is in {path}; "
        f"train again with an --lr below {TrainConfig().lr}, or with --dtype fp32."
    )
    assert torch.isfinite(SoftPrompt.load(path).vectors).all()


def test_rm_takes_what_a_stopped_run_left_behind(run: Run, home: Path) -> None:
    folder = home / ".runs" / "films"
    folder.mkdir(parents=True)
    (folder / checkpoint.FILE).write_text("")
    assert run("rm", "films") == Ran(0, "removed films\n", "")
    assert not folder.exists()


def test_a_disk_that_fails_elsewhere_is_one_sentence(
    run: Run, stored: SoftPrompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/some/file")

    monkeypatch.setattr("softprompt.cli.demo.shutil.rmtree", broken)
    (Path(os.environ["SOFTPROMPT_HOME"]) / ".runs" / "films").mkdir(parents=True)
    is_refused(
        run("rm", "films"),
        "/some/file cannot be read or written: Input/output error; check the disk and permissions",
    )


# --- as a program --------------------------------------------------------------------------------


def softprompt(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "softprompt", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def test_help_and_version() -> None:
    programs = [softprompt("--help"), softprompt("--version")]
    (help, _), (version, _) = (program.communicate(timeout=60) for program in programs)
    assert "Usage: softprompt [OPTIONS] COMMAND" in help
    for command in ("train", "evaluate", "predict", "list", "show", "rm", "demo"):
        assert command in help
    assert version.startswith("softprompt ")


def test_a_reader_that_goes_away_is_no_error(home: Path, stored: SoftPrompt) -> None:
    program = softprompt("show", "films")
    assert program.stdout is not None
    program.stdout.close()
    _, err = program.communicate(timeout=60)
    assert err == ""


def test_ctrl_c_by_signal(home: Path, base: str) -> None:
    endless = ("--steps", "100000", "--eval-every", "5", "--patience", "0")
    program = softprompt("train", "train.jsonl", "--name", "films", "--base", base, *endless, "--dtype", "fp32")
    assert program.stderr is not None
    assert program.stderr.readline().startswith("data: 40 rows, 2 labels")
    lines = iter(program.stderr.readline, "")
    assert "4 validation rows" in next(lines)
    assert next(lines).startswith("plan: 100,000 steps")
    assert any(line.startswith("step     5/100,000") for line in lines)
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=60)
    assert program.returncode == 130
    assert "to go on, give the same command with --resume" in err
    assert "Traceback" not in err
    assert out.startswith("soft prompt  films, 64 virtual tokens\n")
    assert (home / "films.safetensors").exists()
