"""Options with several words behind them, and where a positional argument is one of the words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from softprompt.cli.arguments import spread
from softprompt.cli.main import command_line
from softprompt.cli.options import seconds
from softprompt.errors import ConfigError

GROUP: Any = get_command(command_line())


def parsed(*arguments: str) -> dict[str, Any]:
    """What click makes of them."""
    command, *words = spread(GROUP, arguments)
    found: dict[str, Any] = GROUP.commands[command].make_context(command, words).params
    return found


COMPARE = ("--validation", "dev.jsonl", "--test", "test.jsonl", "--out", "report")


@pytest.mark.parametrize(
    "words",
    [
        ("compare", "train.jsonl", *COMPARE, "--methods", "lora", "prefix"),
        ("compare", "--methods", "lora", "prefix", "train.jsonl", *COMPARE),
        ("compare", *COMPARE, "--methods", "lora", "prefix", "train.jsonl"),
        ("compare", *COMPARE, "--methods", "lora", "prefix", "--", "train.jsonl"),
        ("compare", "--methods", "lora", "--methods", "prefix", "train.jsonl", *COMPARE),
        ("compare", "--methods", "lora", "prefix", "--seeds", "1", "train.jsonl", *COMPARE),
        ("compare", "--methods", "lora", "prefix", "--json", "train.jsonl", *COMPARE),
    ],
    ids=str,
)
def test_methods_and_the_file(words: Sequence[str]) -> None:
    found = parsed(*words)
    assert (list(found["methods"]), found["train"]) == (["lora", "prefix"], "train.jsonl")


def test_every_option_that_may_be_repeated_may_have_several_words() -> None:
    found = parsed("compare", "train.jsonl", *COMPARE, "--instruction", "Good?", "Bad?", "--bases", "a", "b", "c")
    assert (list(found["instruction"]), list(found["bases"])) == (["Good?", "Bad?"], ["a", "b", "c"])
    found = parsed("evaluate", "sst2", "test.jsonl", "--metric", "mcc", "accuracy", "--stop", "a", "b")
    assert (list(found["metric"]), list(found["stop"])) == (["mcc", "accuracy"], ["a", "b"])
    found = parsed("evaluate", "--metric", "mcc", "accuracy", "sst2", "test.jsonl")
    assert (list(found["metric"]), found["name"], found["test"]) == (["mcc", "accuracy"], "sst2", "test.jsonl")
    found = parsed("evaluate", "sst2", "--metric", "mcc", "accuracy", "test.jsonl")
    assert (list(found["metric"]), found["name"], found["test"]) == (["mcc", "accuracy"], "sst2", "test.jsonl")
    found = parsed("inspect", "sst2", "--text", "a film", "a plot")
    assert (list(found["text"]), list(found["names"])) == (["a film", "a plot"], ["sst2"])
    found = parsed("predict", "sst2", "a film", "--stop", ".", "!")
    assert (list(found["stop"]), list(found["text"])) == ([".", "!"], ["a film"])
    found = parsed("serve", "--prompts", "a", "b", "--upstream", "http://x", "http://y")
    assert (list(found["prompts"]), list(found["upstream"])) == (["a", "b"], ["http://x", "http://y"])


SEVERAL = [
    (name, command, option.opts[0])
    for name, command in GROUP.commands.items()
    for option in command.params
    if option.param_type_name == "option" and option.multiple
]


@pytest.mark.parametrize(("name", "command", "option"), SEVERAL, ids=lambda each: each if isinstance(each, str) else "")
def test_each_of_them_takes_its_words_and_no_positional_argument(name: str, command: Any, option: str) -> None:
    places = [param for param in command.params if param.param_type_name == "argument"]
    positional = [f"place-{number}" for number in range(sum(abs(param.nargs) for param in places))]
    several = [option, "a", option, "b"]
    assert spread(GROUP, [name, *positional, option, "a", "b"]) == [name, *positional, *several]
    ahead = [option, "a", "b", "--dtype", "fp32", *positional]
    assert spread(GROUP, [name, *ahead]) == [name, *several, "--dtype", "fp32", *positional]


def test_texts_behind_an_option_stay_texts() -> None:
    """Where a command takes any number of them and none stands elsewhere."""
    found = parsed("predict", "sst2", "--stop", ".", "a film", "a plot")
    assert (list(found["stop"]), list(found["text"])) == (["."], ["a film", "a plot"])
    found = parsed("predict", "--stop", ".", "sst2", "a film")
    assert (list(found["stop"]), found["name"], list(found["text"])) == (["."], "sst2", ["a film"])
    found = parsed("predict", "sst2", "--stop", ".", "-")
    assert (list(found["stop"]), list(found["text"])) == (["."], ["-"])
    found = parsed("predict", "sst2", "--stop", ".", "!", "--", "a film", "-1 stars")
    assert (list(found["stop"]), list(found["text"])) == ([".", "!"], ["a film", "-1 stars"])
    found = parsed("inspect", "--text", "a film", "sst2")
    assert (list(found["text"]), list(found["names"])) == (["a film"], ["sst2"])


def test_a_value_that_looks_like_an_option_is_a_value() -> None:
    found = parsed("predict", "sst2", "a film", "--stop", "--", "--stop", "-x", "--json")
    assert (list(found["stop"]), found["as_json"]) == (["--", "-x"], True)


WORDS = st.sampled_from(["train.jsonl", "a", "b", "10m"])
FLAGS = st.sampled_from(["--json", "--budget", "--seeds=2"])


@given(WORDS, st.lists(WORDS, min_size=1, max_size=4), FLAGS, WORDS)
def test_several_values_after_an_option(first: str, values: list[str], flag: str, last: str) -> None:
    repeated = [part for value in values for part in ("--bases", value)]
    words = ["compare", first, "--bases", *values, flag, last]
    assert spread(GROUP, words) == ["compare", first, *repeated, flag, last]


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["no-such-command", "--bases", "a", "b"], ["compare", "--methods"], ["list", "--json"]]
)
def test_the_rest_is_left_to_the_parser(words: list[str]) -> None:
    assert spread(GROUP, words) == words


@pytest.mark.parametrize(
    ("text", "value"), [("90", 90), ("90s", 90), (" 1.5 m ", 90), ("10m", 600), ("2h", 7200), ("0.5h", 1800)]
)
def test_times(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "m", "-3", "1d", "1m30s", "ten", "1e3"])
def test_no_times(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        seconds(text)
    assert str(caught.value) == f"Expected a time such as 90s, 10m or 1h for --budget, found {text!r}; write one."
