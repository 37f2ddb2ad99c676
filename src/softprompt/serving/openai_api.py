"""The bodies of requests and responses, as OpenAI's API has them, with what is ours beside it.

A field that we do not know, or know and do not offer, is refused where it could change the answer, and ignored where it
could not; in parts of a body, such as messages, as in the body itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from softprompt.generation.writer import TokenLogprob

MAX_STOPS = 16
MAX_STOP_LETTERS = 256


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: the HTTP status.
        message: one sentence: expected, found, what to do.
        param: the field that is wrong, or None.
        code: what a program can tell it by, or None.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The response's body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# --- requests ----------------------------------------------------------------------------------------------------


class _Body(BaseModel):
    """A body, or a part of one.

    Attributes:
        parts: the fields that hold a part of their own, or a list of them.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    parts: ClassVar[Mapping[str, type[_Body]]] = {}


def _whole(value: object) -> object:
    """JSON has one kind of number: 1.0 is 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Whole = Annotated[int, BeforeValidator(_whole)]
_Stop = Annotated[str, Field(max_length=MAX_STOP_LETTERS)]


class StreamOptions(_Body):
    """What else a stream tells."""

    include_usage: bool = False


class _Generation(_Body):
    """What continuing a text takes, whatever the endpoint."""

    parts = {"stream_options": StreamOptions}

    model: str
    max_tokens: _Whole | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    n: _Whole | None = Field(None, ge=1, le=128)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: _Whole | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # ours
    fields: dict[str, str] | None = None
    truncate: bool = False
    base_only: bool = False

    @property
    def stops(self) -> tuple[str, ...] | None:
        """The stop strings, or None if there is no such field."""
        return (self.stop,) if isinstance(self.stop, str) else None if self.stop is None else tuple(self.stop)


class CompletionRequest(_Generation):
    """``POST /v1/completions``; ``prompt`` is the input text, ``fields`` takes its place where there are several."""

    prompt: str | list[str] | list[int] | list[list[int]] | None = None
    logprobs: _Whole | None = Field(None, ge=0, le=20)
    add_special_tokens: Literal[True] = True
    raw: bool = False


class TextPart(_Body):
    """One of the parts of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One message of a conversation."""

    parts = {"content": TextPart}

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Generation):
    """``POST /v1/chat/completions``."""

    parts = {**_Generation.parts, "messages": Message}

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: _Whole | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: _Whole | None = Field(None, ge=0, le=20)
    add_special_tokens: Literal[False] = False


class ClassifyRequest(_Body):
    """``POST /v1/classify``: each input by each model."""

    model: str | list[str]
    input: str | list[str] | None = None
    fields: dict[str, str] | list[dict[str, str]] | None = None
    normalise_length: bool = False
    truncate: bool = False
    base_only: bool = False

    @property
    def models(self) -> list[str]:
        """The models' names."""
        return [self.model] if isinstance(self.model, str) else self.model


class LoadRequest(_Body):
    """``POST /v1/load_soft_prompt``."""

    name: str
    path: str | None = None
    load_inplace: bool = False


class UnloadRequest(_Body):
    """``POST /v1/unload_soft_prompt``."""

    name: str


# Fields of other APIs that change no answer here, wherever they stand: what a client notes for itself, what OpenAI's
# API and vLLM keep beside an answer, and what clients send back of earlier answers.
_HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "moderation", "priority"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "cache_control", "cache_salt"),
        *("id", "request_id", "index", "status", "created", "created_at", "timestamp", "weight"),
        *("parallel_tool_calls", "include_obfuscation", "continuous_usage_stats"),
        *("annotations", "reasoning_content", "reasoning_details", "thinking_blocks"),
        *("provider_options", "providerOptions", "provider_specific_fields"),
    }
)
# Fields that we do not offer, and the values with which they say nothing; ``str``: any text. Of all that is not here,
# what is empty says nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "detokenize": (True,),
    "do_sample": (),
    "enable_thinking": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "include_reasoning": (True, False),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"], []),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "presence_penalty": (0,),
    "prompt_embeds": (),
    "reasoning": (str,),
    "reasoning_effort": ("none", "medium"),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"}, {}),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "tool_choice": ("none", "auto"),
    "top_k": (0, -1),
    "type": ("text", "message"),
    "typical_p": (1,),
    "verbosity": ("medium",),
}
_EMPTY: tuple[object, ...] = (False, "", [], {})

_Request = TypeVar("_Request", bound=_Body)


def parse(model: type[_Request], document: object) -> _Request:
    """A request's JSON document as ``model``.

    Raises:
        ApiError: 400, with a sentence about the first thing that is wrong.
    """
    if not isinstance(document, dict):
        raise ApiError(400, f"Expected a JSON object as body, found {type(document).__name__}; send one.")
    known = _known(model, document, "")
    try:
        return model.model_validate(known)
    except ValidationError as error:
        # of a union's alternatives, the one that came furthest
        first = min(error.errors(), key=lambda fault: (fault["type"].endswith("_type"), -len(fault["loc"])))
        place = _place(known, first["loc"])
        if first["type"] == "missing":
            place = ".".join(filter(None, (place, str(first["loc"][-1]))))
            raise ApiError(400, f"Expected the field {place}, found none; give it.", param=place) from None
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise ApiError(
            400, f"Field {place}: {reason}, found {_short(first['input'])}; correct it.", param=place
        ) from None


def _known(body: type[_Body], document: dict[str, Any], place: str) -> dict[str, Any]:
    """What a body, or a part of one at ``place``, says in the fields that it has, at every level.

    Raises:
        ApiError: 400, it says something in another field.
    """
    known = {}
    for key, value in document.items():
        here = f"{place}{key[:64]}"
        if key not in body.model_fields:
            _require_nothing(key, value, here)
        elif value is not None:
            known[key] = _known_parts(body.parts[key], value, here) if key in body.parts else value
    return known


def _known_parts(part: type[_Body], value: object, place: str) -> object:
    if isinstance(value, dict):
        return _known(part, value, f"{place}.")
    if isinstance(value, list):
        return [_known_parts(part, one, f"{place}.{number}") for number, one in enumerate(value)]
    return value


def _require_nothing(key: str, value: object, place: str) -> None:
    """Refuses a field that we do not offer if it could change the answer."""
    neutral = _NEUTRAL.get(key, _EMPTY)
    if key in _HARMLESS or value is None or any(_same(value, one) for one in neutral):
        return
    reason = (
        "Embeddings of a client's own are never run; send text"
        if key == "prompt_embeds"
        else "It is not supported here and could change the answer; leave it out"
    )
    raise ApiError(400, f"Found the field {_short(place)}. {reason}.", param=place, code="unsupported_field")


def _place(document: object, steps: Sequence[str | int]) -> str:
    """The steps of a fault's place that lead through the document; others name types."""
    found = []
    for step in steps:
        in_list = isinstance(document, list) and isinstance(step, int) and step < len(document)
        if in_list or (isinstance(document, dict) and step in document):
            document = document[step]  # type: ignore[index]
            found.append(str(step)[:64])
    return ".".join(found)


def _same(value: object, neutral: object) -> bool:
    """Equal as JSON, where ``False`` is not 0; or any text, if ``neutral`` is ``str``."""
    if neutral is str:
        return isinstance(value, str)
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


# --- responses ---------------------------------------------------------------------------------------------------


def envelope(kind: str, id: str, model: str, **more: object) -> dict[str, Any]:
    """What every answer, and every chunk of a stream, begins with."""
    return {"id": id, "object": kind, "created": int(time.time()), "model": model, **more}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """How many tokens were read, virtual ones included, how many of these came from the cache, and how many were
    written, end-of-sequence tokens included."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


@dataclass(frozen=True)
class Form:
    """What tells the answers of the two endpoints that write apart.

    Attributes:
        prefix: how an answer's id begins.
        kind, chunk_kind: ``object`` of an answer, and of a chunk of a stream.
        choice: index, text, tokens if they were asked for, reason to finish → a choice of an answer.
        delta: index, text, tokens, reason or None, letters of the tokens before (-1 for the first chunk) → a choice of
            a chunk.
    """

    prefix: str
    kind: str
    chunk_kind: str
    choice: Callable[[int, str, Tokens, str], dict[str, Any]]
    delta: Callable[[int, str, Tokens, str | None, int], dict[str, Any]]


Tokens = Sequence[TokenLogprob] | None


def _completion_choice(index: int, text: str, tokens: Tokens, finish: str) -> dict[str, Any]:
    return _completion_delta(index, text, tokens, finish, 0)


def _completion_delta(index: int, text: str, tokens: Tokens, finish: str | None, letters: int) -> dict[str, Any]:
    logprobs = None if tokens is None else _completion_logprobs(tokens, max(letters, 0))
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _completion_logprobs(tokens: Sequence[TokenLogprob], letters: int) -> dict[str, Any]:
    offsets, likeliest = [], []
    for token in tokens:
        offsets.append(letters)
        letters += len(token.text)
        listed: dict[str, float] = {}
        for text, logprob in (*token.top, (token.text, token.logprob)):
            listed.setdefault(text, logprob)  # parts of characters look alike: the likeliest of them
        likeliest.append(listed)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": likeliest,
        "text_offset": offsets,
    }


def _chat_choice(index: int, text: str, tokens: Tokens, finish: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": _chat_logprobs(tokens), "finish_reason": finish}


def _chat_delta(index: int, text: str, tokens: Tokens, finish: str | None, letters: int) -> dict[str, Any]:
    delta = {"role": "assistant", "content": text} if letters < 0 else {"content": text}
    return {"index": index, "delta": delta, "logprobs": _chat_logprobs(tokens), "finish_reason": finish}


def _chat_logprobs(tokens: Tokens) -> dict[str, Any] | None:
    def entry(text: str, logprob: float) -> dict[str, Any]:
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # a token may be a part of a character
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    if tokens is None:
        return None
    content = [
        {**entry(token.text, token.logprob), "top_logprobs": [entry(*other) for other in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


COMPLETION = Form("cmpl-", "text_completion", "text_completion", _completion_choice, _completion_delta)
CHAT = Form("chatcmpl-", "chat.completion", "chat.completion.chunk", _chat_choice, _chat_delta)


def model_list(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``GET /v1/models``."""
    return {"object": "list", "data": list(cards)}
