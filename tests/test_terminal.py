"""What a terminal cannot show is told apart all the same, and never ends a command."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from conftest import QUICK, write_labels
from softprompt.cli import main

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
