"""Data as people have it: completions, Alpaca, conversations, numbered labels, folders of ``save_to_disk``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from softprompt.data.checks import reading
from softprompt.data.example import Dataset
from softprompt.data.reading import read_dataset
from softprompt.errors import ConfigError, DataError
from tests.reading import write

ALPACA = [
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Translate to French.", "input": "Good day", "output": "Bonjour"},
]
SHAREGPT = {
    "id": "x_0",
    "conversations": [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "Who wrote Emma?"},
        {"from": "gpt", "value": "Jane Austen."},
        {"from": "human", "value": "When?"},
        {"from": "gpt", "value": "In 1815."},
        {"from": "human", "value": "Thanks"},
    ],
}
MESSAGES = {
    "messages": [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "and 3?"},
        {"role": "assistant", "content": "7"},
    ]
}


def read(source: Any, format: str | None = None, **options: Any) -> Dataset:
    return read_dataset(source, **{"fields": None, "format": format, **options})


def line(dataset: Dataset) -> str:
    return str(reading(dataset, labels=None))


def said(*arguments: Any, **options: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as error:
        read(*arguments, **options)
    return str(error.value)


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_prompts_and_completions(tmp_path: Path, answer: str) -> None:
    rows = [{"prompt": f"say {n}", answer: f"word {n}"} for n in range(3)]
    found = read(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert [(dict(e.fields), e.target) for e in found.examples] == [
        ({"input": f"say {n}"}, f"word {n}") for n in range(3)
    ]
    assert "format completion" in line(found)
    assert "--format none" in line(found)
    assert f'input from "prompt", target from "{answer}"' in line(found)


def test_alpaca_with_and_without_an_input(tmp_path: Path) -> None:
    found = read(write(tmp_path, "a.json", json.dumps(ALPACA)))
    assert [(dict(e.fields), e.target) for e in found.examples] == [
        ({"instruction": "Name a colour.", "input": ""}, "Red."),
        ({"instruction": "Translate to French.", "input": "Good day"}, "Bonjour"),
    ]
    assert "format alpaca" in line(found)
    assert 'input from "input" (blank in 1 row)' in line(found)
    short = read([{"instruction": "Name a colour.", "output": "Red."}])
    assert dict(short.examples[0].fields) == {"input": "Name a colour."}
    some = read([ALPACA[1], {"instruction": "Name one.", "output": "Blue."}])
    assert some.examples[1].fields["input"] == ""
    dolly = read([{"instruction": "Who?", "context": "Ann did it.", "response": "Ann"}])
    assert dict(dolly.examples[0].fields) == {"instruction": "Who?", "input": "Ann did it."}


def test_own_columns_and_what_the_user_names_come_first() -> None:
    own = [{"input": "a", "target": "b", "prompt": "c", "completion": "d", "messages": []}]
    assert (read(own).format, read(own).examples[0].target) == ("none", "b")
    assert read(own, "completion").examples[0].target == "d"
    assert "taken for" not in line(read(own, "completion"))
    named = read(ALPACA[1:], input_field="instruction", target_field="output")
    assert (named.format, dict(named.examples[0].fields)) == ("none", {"input": "Translate to French."})
    chosen = read([{"q": "a", "prompt": "b", "a": "c", "completion": "d"}], "completion", input_field="q")
    assert (chosen.examples[0].fields["input"], chosen.examples[0].target) == ("a", "d")


def test_a_format_that_the_columns_do_not_have_is_refused() -> None:
    assert '"messages"' in said(ALPACA, "messages")
    assert '"target"' in said(ALPACA, "none")
    assert "sharegpt" in said(ALPACA, "parquet")
    assert '"messages"' in said([{"messages": "no list"}])  # a column of that name alone is no conversation


def test_each_answer_of_a_conversation_is_an_example(tmp_path: Path) -> None:
    found = read(write(tmp_path, "chat.json", json.dumps([SHAREGPT, SHAREGPT])))
    first, second = found.examples[:2]
    assert len(found.examples) == 4
    assert found.is_chat
    assert (first.target, list(first.fields.values())) == ("Jane Austen.", ["Be short.", "Who wrote Emma?"])
    assert (second.target, list(second.fields.values())) == (
        "In 1815.",
        ["Be short.", "Who wrote Emma?", "Jane Austen.", "When?"],
    )
    assert second.where == "chat.json:1, message 5"
    assert line(found).startswith("data: 4 answers of 2 conversations, taken for the format sharegpt")
    assert "--labels" not in line(found)
    openai = read([MESSAGES])
    assert (openai.format, [e.target for e in openai.examples]) == ("messages", ["4", "7"])
    assert list(openai.examples[1].fields.values()) == ["2 + 2?", "4", "and 3?"]
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    in_parts = read([{"messages": [{"role": "user", "content": parts}, MESSAGES["messages"][1]]}])
    assert list(in_parts.examples[0].fields.values()) == ["2 + 2?"]


def test_to_predict_a_conversation_asks_for_one_answer() -> None:
    to_come = read([SHAREGPT], require_target=False).examples
    assert [(e.target, len(e.fields)) for e in to_come] == [(None, 6)]
    again = read([MESSAGES], require_target=False).examples
    assert [(e.target, len(e.fields)) for e in again] == [("7", 3)]


def test_a_conversation_in_csv_and_in_two_columns(tmp_path: Path) -> None:
    cell = json.dumps(MESSAGES["messages"]).replace('"', '""')
    in_csv = read(write(tmp_path, "a.csv", f'id,messages\n1,"{cell}"\n'))
    assert [e.target for e in in_csv.examples] == ["4", "7"]
    turns = MESSAGES["messages"]
    in_two = read([{"prompt": turns[:3], "completion": turns[3:]}])
    assert [e.target for e in in_two.examples] == ["7"]


def test_what_a_row_holds_counts_for_the_fingerprint() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert read([MESSAGES]).fingerprint != read([{**MESSAGES, "tools": tools}]).fingerprint
    assert read([MESSAGES]).fingerprint == read([{**MESSAGES, "tools": []}]).fingerprint


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty list"),
        ([{"role": "user", "content": "a"}], "answer of the assistant"),
        ([{"role": "assistant", "content": "a"}], "behind another message"),
        ([{"role": "narrator", "content": "a"}], '"narrator"'),
        ([{"content": "a"}], "who speaks"),
        (["a"], "object as message 1"),
        ([{"role": "user", "content": 3}], "text in message 1"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "message 2, of the assistant"),
        ([{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}], "before message 2"),
        ([{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}], "surrogate"),
        ("text", "list of messages"),
    ],
)
def test_a_bad_conversation_is_refused_with_its_place(messages: Any, words: str) -> None:
    sentence = said([MESSAGES, {"messages": messages}])
    assert sentence.startswith("rows:2: expected ")
    assert words in sentence
    assert "correct or remove this row" in sentence


def test_bad_tools_are_refused() -> None:
    assert '"tools"' in said([{**MESSAGES, "tools": 3}])


@pytest.mark.parametrize("format", [None, "none"])
def test_several_targets_in_a_row_are_refused(format: str | None) -> None:
    rows = [{"input": "a", "target": "x"}, {"input": "b", "target": ["x", "y"]}, {"input": "b", "target": ["x"]}]
    sentence = said(rows, format)
    assert sentence.startswith("rows:2: expected one target")
    assert "a row for each" in sentence
    assert "join" in sentence
    assert "1 more bad row" in sentence


def test_several_references_are_read() -> None:
    found = read([{"input": "a", "target": "x", "references": ["x", "y"]}])
    assert found.examples[0].references == ("x", "y")


def test_names_take_the_place_of_numbers() -> None:
    names = {"0": "World", "1": "Sports"}
    rows = [{"input": "a", "target": 0}, {"input": "b", "target": 1.0}, {"input": "c", "target": "Sports"}]
    found = read(rows, labels=("World", "Sports"), label_names=names)
    assert [e.target for e in found.examples] == ["World", "Sports", "Sports"]
    assert "0 is World, 1 is Sports" in str(reading(found, labels=("World", "Sports")))
    sentence = said([{"input": "a", "target": 2}], labels=("World", "Sports"), label_names=names)
    assert '"2"' in sentence
    assert '"World", "Sports"' in sentence


def test_folders_of_save_to_disk_go_by_their_path(tmp_path: Path) -> None:
    features = datasets.Features(
        {"input": datasets.Value("string"), "target": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = datasets.Dataset.from_dict({"input": ["a", "b"], "target": [1, 0]}, features=features)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    for source in (tmp_path / "one", tmp_path / "two", str(tmp_path / "two"), f"hf:{tmp_path}/two"):
        assert [e.target for e in read(source).examples] == ["yes", "no"]
    assert [e.target for e in read(f"{tmp_path}/two:test").examples] == ["no"]
    assert 'no split "dev"' in said(f"{tmp_path}/two:dev")
    (tmp_path / "other").mkdir()
    assert "found a folder" in said(tmp_path / "other")


def test_messages_of_a_table_of_datasets(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "add"}}]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    rows = datasets.Dataset.from_list([MESSAGES, {"messages": [{"role": "user", "content": "2 + 2?"}, answer]}])
    found = read(rows)
    assert [e.target for e in found.examples] == ["4", "7", ""]
    assert found.examples[0].conversation == read([MESSAGES]).examples[0].conversation  # without Arrow's nulls
