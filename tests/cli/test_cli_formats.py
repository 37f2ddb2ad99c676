"""Known formats and numbered labels from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softprompt.soft_prompts.soft_prompt import SoftPrompt
from tests.conftest import Run


def numbered(path: Path) -> None:
    path.write_text("input,target\n" + "".join(f"a {('bad', 'great')[n % 2]} film {n},{n % 2}\n" for n in range(24)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.txt", "negative\npositive\n"),
        ("names.json", '["negative", "positive"]'),
        ("names.json", '{"negative": 0, "positive": 1}'),
    ],
)
def test_numbered_labels_go_by_their_names(train: Run, run: Run, home: Path, name: str, content: str) -> None:
    numbered(Path("rows.csv"))
    Path(name).write_text(content)
    done = train("rows.csv", "--name", "films", "--labels", name, "--json")
    assert done.code == 0, done.err
    assert done.json["data"]["labels"] == {"negative": 12, "positive": 12}
    assert "0 is negative, 1 is positive" in done.err
    assert SoftPrompt.load(home / "films.safetensors").verbalizer == {
        "negative": ("negative",),
        "positive": ("positive",),
    }
    measured = run("evaluate", "films", "rows.csv", "--metric", "accuracy", "--json")
    assert measured.json["n"] == 24
    answered = run("predict", "films", "a great film", "--json").json["predictions"][0]["probabilities"]
    assert list(answered) == ["negative", "positive"]


def test_a_word_for_a_number_leaves_the_number_the_label(train: Run, home: Path) -> None:
    numbered(Path("rows.csv"))
    Path("labels.json").write_text('{"0": "negative", "1": "positive"}')
    done = train("rows.csv", "--name", "films", "--labels", "labels.json", "--json")
    assert done.json["data"]["labels"] == {"0": 12, "1": 12}
    assert SoftPrompt.load(home / "films.safetensors").verbalizer == {"0": ("negative",), "1": ("positive",)}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("names.txt", "negative\npositive\n", '"2"'),
        ("names.json", '["negative", 3]', "names"),
        ("names.json", '{"negative": 0, "positive": 0}', "0 twice"),
        ("missing.txt", None, "missing.txt"),
    ],
)
def test_names_that_do_not_fit_are_refused(run: Run, name: str, content: str | None, words: str) -> None:
    Path("rows.csv").write_text("input,target\na,0\nb,2\n")
    if content is not None:
        Path(name).write_text(content)
    done = run("train", "rows.csv", "--name", "x", "--labels", name)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def test_alpaca_rows_are_trained_measured_and_answered(train: Run, run: Run, home: Path) -> None:
    rows = [
        {"instruction": f"Name {n}.", "input": "" if n % 2 else f"film {n}", "output": f"film {n} it is"}
        for n in range(12)
    ]
    Path("alpaca.json").write_text(json.dumps(rows))
    done = train("alpaca.json", "--name", "alpaca", "--json")
    assert done.code == 0, done.err
    assert "format alpaca" in done.err
    assert done.json["data"]["format"] == "alpaca"
    template = SoftPrompt.load(home / "alpaca.safetensors").template
    assert template == "{soft_prompt}Instruction: {instruction}\n{input}\nOutput: {target}"
    measured = run("evaluate", "alpaca", "alpaca.json", "--metric", "perplexity", "--json")
    assert measured.json["n"] == 12
    assert "format alpaca" in measured.err
    assert (
        len(run("predict", "alpaca", "--file", "alpaca.json", "--max-new-tokens", "1", "--json").json["predictions"])
        == 12
    )


@pytest.mark.usefixtures("no_model")
def test_who_writes_a_template_names_the_columns(run: Run) -> None:
    Path("a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    done = run("train", "a.jsonl", "--name", "x", "--template", "{soft_prompt}{prompt}{target}")
    assert done.code == 2
    assert "--target-field" in done.err
    done = run("train", "a.jsonl", "--name", "x", "--format", "parquet")
    assert done.code == 2
    assert "completion, alpaca, sharegpt, messages" in done.err


def test_a_base_model_without_a_chat_template_is_refused(train: Run) -> None:
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    Path("chat.jsonl").write_text("".join(json.dumps({"conversations": talk}) + "\n" for _ in range(4)))
    done = train("chat.jsonl", "--name", "x")
    assert (done.code, done.out) == (2, "")
    assert "chat template" in done.err
    assert "--format none" in done.err


@pytest.mark.usefixtures("no_model")
def test_comparisons_need_rows(run: Run) -> None:
    talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    Path("chat.jsonl").write_text(json.dumps({"conversations": talk}))
    options = ("--validation", "chat.jsonl", "--test", "chat.jsonl", "--out", "report")
    done = run("compare", "chat.jsonl", *options)
    assert done.code == 2
    assert "conversations in chat.jsonl" in done.err
