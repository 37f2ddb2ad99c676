"""What a terminal cannot show is told apart all the same, and never ends a command. What takes long tells how long."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from softprompt.cli.main import main
from softprompt.drawing.words import duration, roughly, short
from softprompt.terminal import console as terminal_module
from softprompt.terminal.console import notices, rows_bar
from softprompt.terminal.training import watch
from softprompt.tuning.step import Step
from softprompt.tuning.training import Training
from tests.conftest import QUICK, tiny, toy, toy_task, train_settings, write_labels

LABELS = ("sehr schön 😍", "sehr schön 😡")


class Terminal(io.TextIOWrapper):
    """A stream of an encoding that writes strictly, as Python's own do."""

    def __init__(self, encoding: str, terminal: bool) -> None:
        self.bytes = io.BytesIO()
        self._terminal = terminal
        super().__init__(self.bytes, encoding=encoding, errors="strict")

    def isatty(self) -> bool:
        return self._terminal

    def read_all(self) -> str:
        self.flush()
        return self.bytes.getvalue().decode(self.encoding)


@pytest.fixture
def shown(home: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a soft prompt whose labels differ in what few encodings have."""
    write_labels(home.parent / "train.jsonl", 40, LABELS)
    words = ("--name", "t", "--labels", f"{LABELS[0]}=good,{LABELS[1]}=bad", "--base", base)
    assert main(["train", "train.jsonl", *words, *QUICK]) == 0
    return "t"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("terminal", [False, True])
def test_labels_are_told_apart(
    encoding: str, terminal: bool, shown: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*words: str) -> tuple[str, str]:
        out, err = Terminal(encoding, terminal), Terminal(encoding, terminal)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            code = main(words)
            found = out.read_all(), err.read_all()
        assert code == 0, found
        return found

    first, second = (label[-1].encode(encoding, "backslashreplace").decode(encoding) for label in LABELS)
    if encoding != "utf-8":
        assert (first, second) == ("\\U0001f60d", "\\U0001f621")
    answer = said("predict", shown, "a film", "--dtype", "fp32")[0]
    assert answer.index(first) != answer.index(second)
    keys = [line.split("  ")[0] for line in said("show", shown)[0].splitlines()]
    assert len({key for key in keys if key.startswith("verbalizer.")}) == 2
    assert shown in said("list")[0]
    assert "accuracy" in said("evaluate", shown, "train.jsonl", "--dtype", "fp32")[0]
    document = json.loads(said("predict", shown, "a film", "--dtype", "fp32", "--json")[0])
    assert sorted(document["predictions"][0]["probabilities"]) == sorted(LABELS)
    words = ("--labels", f"{LABELS[0]}=good,{LABELS[1]}=bad", "--base", base, *QUICK, "--overwrite")
    assert "step" in said("train", "train.jsonl", "--name", shown, *words)[1]
    assert "Usage" in said("--help")[0]


def test_a_sentence_about_such_a_label_is_one_sentence(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bad.jsonl").write_text('{"input": "a film", "target": "😎"}\n', encoding="utf-8")
    err = Terminal("ascii", False)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["evaluate", shown, "bad.jsonl"]) == 2
    assert "\\U0001f60e" in err.read_all()


# --- how long it takes --------------------------------------------------------------------------------


@dataclass
class Clock:
    """Stands still until it is told otherwise."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class Slow(Training):
    """Each step takes 10 s of ``clock``, the first 40; each validation 25."""

    clock: Clock

    def __iter__(self) -> Iterator[Step]:
        for step in super().__iter__():
            seconds = 40.0 if step.number == 1 else 10.0
            self.clock.now += seconds + (25 if step.validation else 0)
            yield replace(step, seconds=seconds)


def slow(clock: Clock, **options: Any) -> Slow:
    lm, data = tiny("llama"), toy(20, 1)
    training = Slow(toy_task(lm, data), data, toy(8, 2), train_settings(**options))
    training.clock = clock
    return training


def test_a_training_says_what_is_planned_and_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """After step 3 at 60 s, 17 steps of 10 s are left, and 4 validations that are guessed by their tokens."""
    clock = Clock()
    training = slow(clock, steps=20, eval_every=6)
    watch(training, clock)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == ("plan: 20 steps of 4 rows; 6 virtual tokens; a validation every 6 steps on 8 rows, 4 in all")
    found = re.fullmatch(r"about (4 min [0-9]0 s): 20 steps of 10 s, 4 validations of about (\d\.\d) s", lines[1])
    assert found, lines[1]
    assert 3 < float(found[2]) < 10
    assert found[1] == roughly(60 + 17 * 10 + 4 * float(found[2]))


def test_a_training_that_may_end_early_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    watch(slow(clock, steps=10, eval_every=2, patience=3), clock)
    watch(slow(clock, steps=10, eval_every=5, patience=3), clock)
    first, second = (line for line in capsys.readouterr().err.splitlines() if line.startswith("about"))
    # after step 3 at 85 s, of which 25 were a validation: 7 steps of 10 s and 4 more validations of 25 s
    assert first == (
        "about 4 min 20 s at most: 10 steps of 10 s, 5 validations of 25 s; "
        "it ends early once 3 validations in a row fall behind the best"
    )
    assert second.startswith("about 2 min 20 s: 10 steps of 10 s, 2 validations of about ")  # there are not 3


def test_without_a_terminal_a_training_says_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """By the clock, steps end at 40, 50, 60, … 130 s and 25 s later after the validation of step 10."""
    clock = Clock()
    watch(slow(clock, steps=20, eval_every=10), clock)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" left")]
    assert [line.split(",")[0] for line in lines] == ["step 3/20", "step 9/20", "step 13/20", "step 19/20"]
    assert re.fullmatch(r"step 3/20, loss \d\.\d{3}, (2 min 50 s|3 min) left", lines[0])
    # 7 steps of 10 s, and the validation that has been seen to take 25
    assert re.fullmatch(r"step 13/20, loss \d\.\d{3}, 1 min 40 s left", lines[2])


def test_a_short_training_says_no_line_but_those_of_its_validations(capsys: pytest.CaptureFixture[str]) -> None:
    lm, data = tiny("llama"), toy(20, 1)
    watch(Training(toy_task(lm, data), data, toy(8, 2), train_settings()), Clock())
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["plan:", "about", "step", "step"] or (
        [line.split()[0] for line in lines] == ["plan:", "step", "about", "step"]
    )


def test_a_training_that_goes_on_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 16 steps 4 are done, and 12 of 10 s are left; the validation of step 4 is over."""
    lm, data, clock = tiny("llama"), toy(20, 1), Clock()
    settings = train_settings(steps=16, eval_every=4)
    first = Training(toy_task(lm, data), data, toy(8, 2), settings, folder=tmp_path)
    for step in first:
        if step.number == 5:
            break
    del first, step
    training = Slow(toy_task(lm, data), data, toy(8, 2), settings, folder=tmp_path, resume=True)
    training.clock = clock
    watch(training, clock)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("plan: 16 steps of 4 rows, of which 4 are done; 6 virtual tokens; ")
    found = re.fullmatch(r"about (.*): 12 steps of 10 s, 3 validations of about (\d\.\d) s", lines[1])
    assert found, lines[1]
    assert found[1] == roughly(12 * 10 + 3 * float(found[2]))


def test_a_plan_names_several_lengths_and_starts(capsys: pytest.CaptureFixture[str]) -> None:
    lm, data = tiny("llama"), toy(20, 1)
    options = {"steps": 1, "num_virtual_tokens": 1, "batch_size": 1, "eval_every": None}
    watch(Training(toy_task(lm, data, 1), data, toy(8, 2), train_settings(**options)), Clock())
    assert capsys.readouterr().err.splitlines()[0] == (
        "plan: 1 step of 1 row; 1 virtual token; one validation on 8 rows at the end"
    )
    watch(Training(toy_task(lm, data, 8), data, toy(8, 2), train_settings(steps=10, lengths=(3, 8))), Clock())
    assert capsys.readouterr().err.splitlines()[0] == (
        "plan: 12 steps of 4 rows; 6 or 3 or 8 virtual tokens; a validation every 5 steps on 8 rows, 5 in all; "
        "3 starts, of which the best goes on"
    )
    watch(Training(toy_task(lm, data), data, toy(8, 2), train_settings(steps=3, eval_every=1)), Clock())
    assert "; a validation after every step on 8 rows, 3 in all" in capsys.readouterr().err


def test_one_answer_to_nearly_all_rows_is_said_during_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """At the second such validation in a row, and once: a random base model that is hardly trained."""
    lm, data = tiny("llama"), toy(20, 1)
    same = [replace(example, fields={"input": "a film"}) for example in toy(40, 2).examples]
    options = {"steps": 4, "eval_every": 1, "lr": 1e-6}
    watch(Training(toy_task(lm, data), data, replace(toy(40, 2), examples=tuple(same)), train_settings(**options)))
    lines = capsys.readouterr().err.splitlines()
    said = [place for place, line in enumerate(lines) if line.startswith("warning: the soft prompt answers")]
    assert len(said) == 1
    assert "on 100.0 % of the rows; " in lines[said[0]]
    assert lines[said[0] - 1].startswith("step     2/4")


def test_a_terminal_shows_the_time_left_with_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, err = Clock(), Terminal("utf-8", True)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(terminal_module.stderr, "is_interactive", True)  # it asked when it was made
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    watch(slow(clock, steps=20, eval_every=10), clock)
    shown = err.read_all()
    assert "35 s left" in shown  # a step of 10 s and a validation of 25, in the bar's last state
    assert "step 13/20, loss" not in shown


def test_rows_say_a_line_a_minute_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with rows_bar("predicting", clock) as report:
        for done in range(1, 11):
            clock.now += 25
            report(done * 128, 1280)
    # at 75, 150 and 225 s, at 25 s for 128 rows; the last rows need no line
    assert capsys.readouterr().err.splitlines() == [
        "predicting: 384 of 1,280, about 3 min left",
        "predicting: 768 of 1,280, about 1 min 40 s left",
        "predicting: 1,152 of 1,280, about 25 s left",
    ]


def test_notices_are_a_line_a_minute_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with notices(clock) as show:
        for text, seconds in (("a", 0), ("b", 59), ("c", 1), ("d", 59.5), ("e", 0.5), ("f", 500), ("g", 0)):
            clock.now += seconds
            show(text)
    assert capsys.readouterr().err.splitlines() == ["c", "e", "f"]


@pytest.mark.parametrize(
    ("seconds", "exact", "rough"),
    [
        (0.2, "0.2 s", "1 s"),
        (12.34, "12.3 s", "12 s"),
        (59.7, "1 min", "1 min"),
        (312, "5 min 12 s", "5 min 10 s"),
        (600, "10 min", "10 min"),
        (2290, "38 min 10 s", "38 min"),
        (3599.6, "1 h", "1 h"),
        (4349, "1 h 12 min", "1 h 12 min"),
        (7200, "2 h", "2 h"),
        (90_000, "25 h", "25 h"),
    ],
)
def test_durations(seconds: float, exact: str, rough: str) -> None:
    assert (duration(seconds), roughly(seconds)) == (exact, rough)


def test_short_times_keep_two_digits() -> None:
    assert [short(seconds) for seconds in (0.0131, 1.34, 9.96, 14.4, 125)] == [
        "0.013 s",
        "1.3 s",
        "10 s",
        "14 s",
        "2 min",
    ]
