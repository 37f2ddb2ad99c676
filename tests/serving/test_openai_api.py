"""Which fields of other APIs are ignored, and which are refused by name: the same at every level of a body."""

from __future__ import annotations

from typing import Any

import pytest

from softprompt.serving.openai_api import ApiError, ChatRequest, CompletionRequest, parse

MESSAGE = {"role": "user", "content": "a good film"}
PART = {"type": "text", "text": "a good film"}

IGNORED: list[dict[str, Any]] = [
    {"id": "msg-1"},
    {"cache_control": {"type": "ephemeral"}},
    {"annotations": [{"type": "url_citation"}]},
    {"reasoning_content": "first this, then that"},
    {"reasoning": "first this, then that"},
    {"audio": None, "tool_calls": [], "refusal": "", "function_call": None, "logit_bias": {}, "unheard_of": False},
    {"include_obfuscation": True, "continuous_usage_stats": True},
]
REFUSED: list[dict[str, Any]] = [
    {"tool_calls": [{"id": "1"}]},
    {"unheard_of": 1},
    {"prefix": True},
    {"reasoning": {"effort": "high"}},
    {"image_url": {"url": "data:"}},
    {"prompt_embeds": "AAAA"},
    {"skip_special_tokens": False},
]
LEVELS: dict[str, Any] = {
    "": lambda more: {"messages": [MESSAGE], **more},
    "messages.1.": lambda more: {"messages": [MESSAGE, {**MESSAGE, **more}]},
    "messages.0.content.1.": lambda more: {"messages": [{**MESSAGE, "content": [PART, {**PART, **more}]}]},
    "stream_options.": lambda more: {"messages": [MESSAGE], "stream_options": {"include_usage": True, **more}},
}


@pytest.mark.parametrize("place", LEVELS)
@pytest.mark.parametrize("more", IGNORED)
def test_what_changes_no_answer_is_ignored_at_every_level(place: str, more: dict[str, Any]) -> None:
    body = {"model": "m", **LEVELS[place](more)}
    assert parse(ChatRequest, body) == parse(ChatRequest, {"model": "m", **LEVELS[place]({})})


@pytest.mark.parametrize("place", LEVELS)
@pytest.mark.parametrize("more", REFUSED)
def test_what_could_change_it_is_refused_by_its_own_name(place: str, more: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        parse(ChatRequest, {"model": "m", **LEVELS[place](more)})
    (name,) = more
    assert (refused.value.status, refused.value.param) == (400, f"{place}{name}")
    assert repr(f"{place}{name}") in refused.value.message
    assert refused.value.code == "unsupported_field"


NEUTRAL: dict[str, list[Any]] = {
    "best_of": [1, 1.0],
    "detokenize": [True],
    "early_stopping": [False],
    "echo": [False],
    "guided_json": [None, {}],
    "guided_regex": [None, ""],
    "ignore_eos": [False],
    "include_stop_str_in_output": [False],
    "length_penalty": [1, 1.0],
    "min_p": [0, 0.0],
    "min_tokens": [0, 0.0],
    "prompt_logprobs": [None],
    "reasoning_effort": [None, "none", "medium"],
    "repetition_penalty": [1, 1.0],
    "response_format": [{"type": "text"}],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "stop_token_ids": [None, []],
    "top_k": [-1, 0],
    "use_beam_search": [False],
    "verbosity": [None, "medium"],
}
TELLING: dict[str, list[Any]] = {
    "best_of": [2, True],
    "detokenize": [False],
    "echo": [True],
    "guided_json": [{"type": "object"}],
    "ignore_eos": [True],
    "length_penalty": [0.8, True],
    "min_tokens": [1, False],
    "prompt_logprobs": [0, 1],
    "reasoning_effort": ["high"],
    "response_format": [{"type": "json_object"}],
    "skip_special_tokens": [False, 1],
    "spaces_between_special_tokens": [False],
    "stop_token_ids": [[2]],
    "top_k": [5],
    "use_beam_search": [True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NEUTRAL.items() for value in values])
def test_vllms_defaults_say_nothing(name: str, value: object) -> None:
    body = {"model": "m", "prompt": "a good film"}
    assert parse(CompletionRequest, {**body, name: value}) == parse(CompletionRequest, body)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in TELLING.items() for value in values])
def test_other_values_are_refused(name: str, value: object) -> None:
    with pytest.raises(ApiError) as refused:
        parse(CompletionRequest, {"model": "m", "prompt": "a good film", name: value})
    assert refused.value.param == name


def test_special_tokens_are_added_as_the_endpoint_adds_them() -> None:
    """vLLM's defaults: a chat template has its own, a plain text gets the tokenizer's."""
    chat, completion = {"model": "m", "messages": [MESSAGE]}, {"model": "m", "prompt": "a good film"}
    assert parse(ChatRequest, {**chat, "add_generation_prompt": True, "add_special_tokens": False})
    assert parse(CompletionRequest, {**completion, "add_special_tokens": True})
    with pytest.raises(ApiError, match="add_special_tokens"):
        parse(ChatRequest, {**chat, "add_special_tokens": True})
    with pytest.raises(ApiError, match="add_special_tokens"):
        parse(CompletionRequest, {**completion, "add_special_tokens": False})
    with pytest.raises(ApiError, match="add_generation_prompt"):
        parse(ChatRequest, {**chat, "add_generation_prompt": False})


def test_a_whole_number_may_have_a_point() -> None:
    found = parse(CompletionRequest, {"model": "m", "prompt": "x", "n": 2.0, "max_tokens": 5.0, "logprobs": 1.0})
    assert (found.n, found.max_tokens, found.logprobs) == (2, 5, 1)
    with pytest.raises(ApiError) as refused:
        parse(CompletionRequest, {"model": "m", "prompt": "x", "n": 1.5})
    assert refused.value.param == "n"


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"messages": [MESSAGE, {"role": "user"}]}, "messages.1.content"),
        ({"messages": [{"role": None, "content": "x"}]}, "messages.0.role"),
        ({"messages": [{**MESSAGE, "content": [PART, {"type": "text"}]}]}, "messages.0.content.1.text"),
        ({"messages": [{**MESSAGE, "content": [{**PART, "text": 3}]}]}, "messages.0.content.0.text"),
        ({"messages": [{**MESSAGE, "name": 3}]}, "messages.0.name"),
        ({"messages": [MESSAGE], "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"messages": [MESSAGE], "fields": {"input": 3}}, "fields.input"),
        ({"messages": "hi"}, "messages"),
    ],
)
def test_a_fault_in_a_part_is_named_by_its_whole_place(body: dict[str, Any], place: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(ChatRequest, {"model": "m", **body})
    assert refused.value.param == place
    assert place in refused.value.message
