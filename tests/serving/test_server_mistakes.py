"""What a client may get wrong: one sentence each, and never a failure of the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt.serving.jobs import Limits
from tests.servers import Running, serving

TEXT = "a stirring , funny film"
USER = {"role": "user", "content": TEXT}
LONG = "the film " * 100


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("store"), limits=Limits(waiting=64)) as running:
        yield running


# What is sent beside a sound body; the whole sentence; the field it is about; the code.
Mistakes = list[tuple[dict[str, Any], str, str | None, str | None]]


def value(field: str, reason: str, found: str) -> tuple[str, str, None]:
    return f"Field {field}: {reason}, found {found}; correct it.", field, None


def unsupported(field: str) -> tuple[str, str, str]:
    reason = "It is not supported here and could change the answer; leave it out."
    return f"Found the field '{field}'. {reason}", field, "unsupported_field"


def elsewhere(field: str, model: str) -> tuple[str, str, None]:
    where = "where no soft prompt's template is used"
    return f"Expected no {field} {where}, found it for '{model}'; leave it out.", field, None


def fields_of_nli(found: str) -> tuple[str, str, None]:
    template = "Expected the fields premise, hypothesis of the template of 'nli'"
    return f"{template}, found {found}; give an object with a text for each as fields.", "fields", None


def too_long(room: int) -> tuple[str, None, str]:
    expected = f"Expected an input of at most {room} tokens beside template, soft prompt and answer"
    remedy = "shorten it, or have its end cut with truncate."
    return f"{expected}, found a longer one; {remedy}", None, "context_length_exceeded"


TOO_MANY = ("Expected at most 64 answers a request, found 65; send more requests.", None, None)
TOKENS = ("Expected token ids from 0 to 319, found others or none; correct them.", "prompt", None)
X16 = "['x', 'x', 'x', 'x', 'x', 'x', 'x', 'x', 'x', 'x', 'x', 'x'…"

COMPLETIONS: Mistakes = [
    ({"model": None}, "Expected the field model, found none; give it.", "model", None),
    ({"model": 3}, *value("model", "input should be a valid string", "3")),
    ({"prompt": None}, "Expected either prompt or fields, found neither; give one of them.", "prompt", None),
    ({"fields": {"input": "x"}}, "Expected either prompt or fields, found both; give one of them.", "prompt", None),
    ({"prompt": " \n"}, "Expected text for {input}, found only blanks; write some.", "prompt", None),
    ({"prompt": []}, "Expected at least one prompt, found an empty list; give one.", "prompt", None),
    (
        {"prompt": [5]},
        "Expected text for the template, found token ids; send text, or token ids with raw.",
        "prompt",
        None,
    ),
    ({"prompt": ["x", 3]}, *value("prompt.1", "input should be a valid string", "3")),
    ({"model": "tiny", "prompt": ""}, "Expected a text to continue, found none; write some.", "prompt", None),
    ({"model": "tiny", "prompt": None}, "Expected a prompt, found none; give one.", "prompt", None),
    ({"model": "tiny", "prompt": [5, -1]}, *TOKENS),
    ({"model": "tiny", "prompt": [[5], [320]]}, *TOKENS),
    ({"model": "tiny", "prompt": [60] * 128}, *too_long(127)),
    ({"prompt": [60] * 119, "raw": True}, *too_long(118)),
    ({"prompt": LONG}, *too_long(118)),
    ({"model": "tiny", "base_only": True}, *elsewhere("base_only", "tiny")),
    ({"raw": True, "fields": {"input": "x"}}, *elsewhere("fields", "write")),
    ({"model": "nli"}, *fields_of_nli("one text")),
    ({"model": "nli", "prompt": '{"premise": 3}'}, *fields_of_nli("one text")),
    ({"model": "nli", "prompt": None, "fields": {"premise": "x"}}, *fields_of_nli("premise")),
    ({"model": "nli", "prompt": None, "fields": {}}, *fields_of_nli("none")),
    ({"max_tokens": 0}, *value("max_tokens", "input should be greater than or equal to 1", "0")),
    ({"temperature": -1}, *value("temperature", "input should be greater than or equal to 0", "-1")),
    ({"top_p": 0}, *value("top_p", "input should be greater than 0", "0")),
    ({"n": 129}, *value("n", "input should be less than or equal to 128", "129")),
    ({"n": 65}, *TOO_MANY),
    ({"prompt": ["x"] * 65}, *TOO_MANY),
    ({"stop": ["x"] * 17}, *value("stop", "list should have at most 16 items after validation, not 17", X16)),
    ({"stop": "x" * 257}, *value("stop", "string should have at most 256 characters", f"'{'x' * 58}…")),
    ({"logprobs": 21}, *value("logprobs", "input should be less than or equal to 20", "21")),
    ({"seed": 1.5}, *value("seed", "input should be a valid integer", "1.5")),
    ({"stream_options": {"x": 1}}, *unsupported("stream_options.x")),
    ({"echo": True}, *unsupported("echo")),
    ({"best_of": 2}, *unsupported("best_of")),
    ({"best_of": True}, *unsupported("best_of")),
    ({"presence_penalty": 0.5}, *unsupported("presence_penalty")),
    ({"logit_bias": {"5": 1}}, *unsupported("logit_bias")),
    ({"suffix": "x"}, *unsupported("suffix")),
    ({"unheard_of": 1}, *unsupported("unheard_of")),
    (
        {"prompt_embeds": "AAAA"},
        "Found the field 'prompt_embeds'. Embeddings of a client's own are never run; send text.",
        "prompt_embeds",
        "unsupported_field",
    ),
]

ROLES = "input should be 'system', 'developer', 'user' or 'assistant'"
CHAT: Mistakes = [
    ({"messages": None}, "Expected the field messages, found none; give it.", "messages", None),
    ({"messages": []}, *value("messages", "list should have at least 1 item after validation, not 0", "[]")),
    (
        {"messages": [USER, {"role": "assistant", "content": "no"}]},
        "Expected a last message of the user, found one of the assistant; append one.",
        "messages",
        None,
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, *value("messages.0.role", ROLES, "'tool'")),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
        *value("messages.0.content.0.type", "input should be 'text'", "'image_url'"),
    ),
    ({"messages": [{**USER, "tool_calls": [1]}]}, *unsupported("messages.0.tool_calls")),
    ({"tools": [{"type": "function"}]}, *unsupported("tools")),
    (
        {"model": "tiny", "messages": [USER, {"role": "system", "content": "x"}, USER]},
        "Expected messages that the base model's chat template takes, found some that it does not take "
        "(the system speaks first); change their roles or order, or leave them out.",
        "messages",
        None,
    ),
    ({"model": "tiny", "messages": [{"role": "user", "content": LONG}]}, *too_long(110)),  # the template has 17
    ({"model": "tiny", "fields": {"input": "x"}}, *elsewhere("fields", "tiny")),
    ({"model": "nli"}, *fields_of_nli("one text")),
    ({"logprobs": 2}, *value("logprobs", "input should be a valid boolean", "2")),
]

CLASSIFY: Mistakes = [
    (
        {"model": "write"},
        "Expected a soft prompt with labels, found 'write', which has none; use /v1/completions.",
        "model",
        None,
    ),
    (
        {"model": ["sst2", "tiny"]},
        "Expected soft prompts, found the base model 'tiny', which has no labels; name a soft prompt, with base_only "
        "to leave its numbers out.",
        "model",
        None,
    ),
    ({"input": None}, "Expected either input or fields, found neither; give one of them.", "input", None),
    ({"fields": {"input": "x"}}, "Expected either input or fields, found both; give one of them.", "input", None),
    ({"model": []}, "Expected at least one model and one input, found an empty list; give one.", "input", None),
    ({"input": []}, "Expected at least one model and one input, found an empty list; give one.", "input", None),
    ({"input": ["x"] * 65}, *TOO_MANY),
    ({"input": LONG}, *too_long(113)),  # the template has 5, the longest label 3
]

SOUND: dict[str, tuple[dict[str, Any], Mistakes]] = {
    "completions": ({"model": "write", "prompt": TEXT, "max_tokens": 2}, COMPLETIONS),
    "chat/completions": ({"model": "write", "messages": [USER], "max_tokens": 2}, CHAT),
    "classify": ({"model": "sst2", "input": TEXT}, CLASSIFY),
}


def without_none(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if value is not None}


@pytest.mark.parametrize(
    ("path", "wrong", "message", "param", "code"),
    [(path, *mistake) for path, (_, mistakes) in SOUND.items() for mistake in mistakes],
)
def test_a_mistake_is_one_sentence(
    server: Running, path: str, wrong: dict[str, Any], message: str, param: str | None, code: str | None
) -> None:
    sound, _ = SOUND[path]
    expected = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    assert server.post(f"/v1/{path}", without_none(sound | wrong), 400) == {"error": expected}


@pytest.mark.parametrize("path", SOUND)
def test_without_the_mistake_there_is_an_answer(server: Running, path: str) -> None:
    server.post(f"/v1/{path}", SOUND[path][0])


@pytest.mark.parametrize("path", SOUND)
def test_an_unknown_model_is_not_found(server: Running, path: str) -> None:
    message = "There is no model 'none' here; see /v1/models."
    expected = {"message": message, "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    assert server.post(f"/v1/{path}", {**SOUND[path][0], "model": "none"}, 404) == {"error": expected}
    assert server.http.get("/v1/models/none").json() == {"error": expected}


@pytest.mark.parametrize("path", ["load_soft_prompt", "unload_soft_prompt"])
def test_loading_is_off_by_default(server: Running, path: str) -> None:
    message = "Loading and unloading are off; start the server with --allow-loading if you trust all its clients."
    expected = {"message": message, "type": "invalid_request_error", "param": None, "code": "loading_off"}
    assert server.post(f"/v1/{path}", {"name": "sst2"}, 403) == {"error": expected}


def test_other_addresses_and_methods_are_refused_in_the_same_form(server: Running) -> None:
    for method, path, status, reason in (
        ("POST", "/v1/embeddings", 404, "Not Found"),
        ("GET", "/v1/completions", 405, "Method Not Allowed"),
        ("GET", "/docs", 404, "Not Found"),
    ):
        answer = server.http.request(method, path)
        assert answer.status_code == status
        message = answer.json()["error"]["message"]
        assert f"found {method} {path} ({reason})" in message
        assert "POST /v1/chat/completions, POST /v1/classify" in message
        assert "GET /v1/models, GET /v1/models/NAME" in message


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "EOF while parsing a value at line 1 column 0"),
        (b"{", "EOF while parsing an object at line 1 column 1"),
        (b"\xff", "expected value at line 1 column 1"),
        (b'{"prompt": "\xff"}', "invalid unicode code point at line 1 column 13"),
        (b'{"prompt": "\\ud800"}', "unexpected end of hex escape at line 1 column 19"),
        (b'{"temperature": NaN}', "expected value at line 1 column 17"),
        (b"[" * 100_000, "recursion limit exceeded at line 1 column 202"),
    ],
)
def test_a_body_that_is_no_json_is_refused(server: Running, content: bytes, fault: str) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    answer = server.http.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    message = f"Expected a JSON document as body, found an error ({fault}); correct it."
    assert answer.json()["error"] == {"message": message, "type": "invalid_request_error", "param": None, "code": None}


def test_a_body_must_say_that_it_is_json(server: Running) -> None:
    """What a page of another origin may send without asking is refused."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"Content-Type": kind, "Origin": "http://elsewhere.example"}
        answer = server.http.post("/v1/completions", content=b'{"model": "write"}', headers=headers)
        assert answer.status_code == 400
        message = f"Expected the content type application/json, found {kind}; send JSON."
        assert answer.json()["error"]["message"] == message
        assert not [header for header in answer.headers if header.startswith("access-control")]


def test_a_list_is_no_body(server: Running) -> None:
    message = "Expected a JSON object as body, found list; send one."
    assert server.post("/v1/completions", [], 400)["error"]["message"] == message


def test_the_client_raises_its_own_errors(server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        server.openai.completions.create(model="none", prompt="x")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        server.openai.completions.create(model="write", prompt="x", echo=True)
    assert bad.value.body == {
        "message": "Found the field 'echo'. It is not supported here and could change the answer; leave it out.",
        "type": "invalid_request_error",
        "param": "echo",
        "code": "unsupported_field",
    }
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("none/of/these")


NAMES = st.sampled_from(
    ["model", "prompt", "messages", "input", "fields", "stop", "n", "seed", "stream", "logprobs", "raw", "top_p", "zz"]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["sst2", "tiny"]),
)
BODIES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=5)),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["completions", "chat/completions", "classify", "load_soft_prompt"]),
    body=st.one_of(BODIES, st.dictionaries(NAMES, BODIES, max_size=6)),
)
def test_no_body_makes_the_server_fail(server: Running, path: str, body: object) -> None:

    content = json.dumps(body).encode()
    answer = server.http.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
