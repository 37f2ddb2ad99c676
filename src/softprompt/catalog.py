"""What a server serves: the base model and soft prompts by name, each with what turns a client's input into a job."""

from __future__ import annotations

import copy
import hashlib
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from softprompt import artifact
from softprompt.data import Example
from softprompt.engine import Job
from softprompt.errors import SoftPromptError, StoreError, TemplateError
from softprompt.evaluate import default_sampling
from softprompt.frozen import FrozenLM, Request, Sampling
from softprompt.openai_api import ApiError, Message
from softprompt.prompt import SoftPrompt
from softprompt.store import Store
from softprompt.task import Task
from softprompt.template import SOFT, Template

USUAL_TOKENS = 128
"""The most tokens to write where neither the client nor a soft prompt's template says."""

HELD_BYTES = 32 << 20
"""How much of the soft prompts is held in memory, those asked last; the others are read from their files when they are
asked again."""
BESIDE_VECTORS = 8 << 10
"""Bytes that a soft prompt takes beside its vectors, about: template, labels, what is said of it."""

Fields = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How a client wants a text to be continued; None where it does not say.

    Attributes:
        max_tokens: the most tokens to write.
        temperature, top_p, stop, seed: as for ``Sampling``.
        top_logprobs: how many alternatives to tell beside each token; None: tell no probabilities.
        stream: tell each piece as it comes.
        truncate: cut the end of an input text that does not fit, instead of refusing it.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] | None = None
    seed: int | None = None
    top_logprobs: int | None = None
    stream: bool = False
    truncate: bool = False


@dataclass(frozen=True)
class Order:
    """A job for the engine.

    Attributes:
        job: the job.
        truncated: whether the end of the input text was cut to fit.
    """

    job: Job
    truncated: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Entry:
    """The base model, or a soft prompt on it, in the list of what is served: what is known without its vectors.

    Attributes:
        name: what requests call it.
        card: what ``/v1/models`` says of it.
        content: hex digest of all that its answers depend on, the base model apart; empty for the base model.
        path: the file it was read from; None for the base model.
    """

    name: str
    card: Mapping[str, Any]
    content: str = ""
    path: Path | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Model(Entry):
    """The base model, or a soft prompt on it, ready to be asked.

    Nothing in it changes: a soft prompt that is loaded again is another ``Model`` of the same name, and requests that
    have begun go on with the old one.

    Attributes:
        lm: the base model, with a tokenizer of the catalog's own.
        window: the most tokens of one request.
        task: its own template, labels and length; None for the base model.
        vectors: the soft prompt on the CPU in the base model's dtype; None for the base model.
    """

    lm: FrozenLM
    window: int
    task: Task | None = None
    vectors: torch.Tensor | None = None

    @property
    def entry(self) -> Entry:
        """What of it stays in memory always."""
        return Entry(name=self.name, card=self.card, content=self.content, path=self.path)

    @cached_property
    def raw(self) -> Task:
        """The soft prompt, if any, and behind it the client's text as it is."""
        if self.task is None:
            return Task(self.lm, Template("{input}{target}"), None, 0, self.window)
        return Task(self.lm, Template("{soft_prompt}{input}{target}"), None, self.task.num_virtual_tokens, self.window)

    @cached_property
    def bare(self) -> Task | None:
        """Its own template without the soft prompt."""
        return None if self.task is None else self.task.without_soft_prompt()

    def fields_of(self, text: str | None, fields: Fields | None, *, param: str) -> Fields:
        """The fields of its template, from one text or by name.

        Args:
            text: the input text; of a template with several fields, a JSON object with their texts.
            fields: the texts by name, in the place of ``text``.
            param: what the request calls ``text``.

        Raises:
            ApiError: 400, neither or both are given, a field is missing or not of the template, or all are blank.
        """
        assert self.task is not None
        names = self.task.template.fields
        if (text is None) == (fields is None):
            found = "neither" if text is None else "both"
            raise ApiError(400, f"Expected either {param} or fields, found {found}; give one of them.", param=param)
        if text is not None:
            fields = {names[0]: text} if len(names) == 1 else _object(text)
        if fields is None or set(fields) != set(names):
            found = "one text" if fields is None else ", ".join(fields) or "none"
            raise ApiError(
                400,
                f"Expected the fields {', '.join(names)} of the template of {self.name!r}, found {found}; "
                f"give an object with a text for each as fields.",
                param="fields",
            )
        if not any(value.strip() for value in fields.values()):  # some may be blank, as in training
            wanted = ", ".join(f"{{{name}}}" for name in names)
            raise ApiError(400, f"Expected text for {wanted}, found only blanks; write some.", param=param)
        return fields

    def write(self, fields: Fields, wish: Wish, *, base_only: bool = False) -> Order:
        """Continues its template with ``fields`` in it.

        Raises:
            ApiError: 400, the input does not fit.
        """
        task = self.bare if base_only else self.task
        assert task is not None
        return self.continuing(task, fields, wish, default_sampling(task))

    def write_raw(self, prompt: str | Sequence[int], wish: Wish) -> Order:
        """Continues the soft prompt, if any, and behind it a text or tokens as they are.

        A text is plain text even where it spells a special token; tokens are taken as they are, and if they begin
        with a beginning-of-sequence token, the soft prompt stands behind that.

        Raises:
            ApiError: 400, there is nothing to continue, it does not fit, or a token is not in the vocabulary.
        """
        usual = Sampling(max_new_tokens=USUAL_TOKENS)
        if isinstance(prompt, str):
            if not prompt:
                raise ApiError(400, "Expected a text to continue, found none; write some.", param="prompt")
            return self.continuing(self.raw, {"input": prompt}, wish, usual)
        vocabulary = len(self.lm.embedding)
        if not prompt or not all(0 <= token < vocabulary for token in prompt):
            raise ApiError(
                400,
                f"Expected token ids from 0 to {vocabulary - 1}, found others or none; correct them.",
                param="prompt",
            )
        room = self.raw.max_length - self.raw.num_virtual_tokens - 1
        if len(prompt) > room:
            raise _too_long(room)
        before = tuple(token for token in self._start if token != SOFT)
        start = self._start if tuple(prompt[: len(before)]) == before else self._start[len(before) :]
        ids = (*start, *prompt[sum(token != SOFT for token in start) :])
        return Order(self._finished(self.raw, Request(ids, len(start)), wish, usual), False)

    def label(self, fields: Fields, *, truncate: bool, base_only: bool = False) -> Order:
        """Scores the words of its labels.

        Raises:
            ApiError: 400, there are no labels, or the input does not fit.
        """
        task = self.bare if base_only else self.task
        if task is None or task.verbalizer is None:
            raise ApiError(
                400,
                f"Expected a soft prompt with labels, found {self.name!r}, which has none; use /v1/completions.",
                param="model",
            )
        reserve = max(map(len, task.words))
        request = _encoded(lambda: task.label_request(Example(fields, None)), task, reserve, truncate)
        return Order(self._job(task, request), request.truncated)

    def continuing(self, task: Task, fields: Fields, wish: Wish, usual: Sampling) -> Order:
        """Continues a template.

        Args:
            task: the template.
            fields: the texts in it.
            wish: what the client says.
            usual: what counts where it says nothing.

        Raises:
            ApiError: 400, the input does not fit.
        """
        # An input that may be cut makes room for the answer, up to half of what there is; any other is kept whole.
        room = task.max_length - task.num_virtual_tokens - task.encoder.num_fixed
        reserve = max(1, min(wish.max_tokens or usual.max_new_tokens, room // 2)) if wish.truncate else 1
        request = _encoded(lambda: task.open_request(Example(fields, None), reserve), task, reserve, wish.truncate)
        return Order(self._finished(task, request, wish, usual), request.truncated)

    @cached_property
    def _start(self) -> tuple[int, ...]:
        """What stands before raw text: the beginning-of-sequence token and the soft prompt, if there are any."""
        request = self.raw.open_request(Example({"input": "a"}, None), 1)
        return request.ids[: request.shared]

    def _finished(self, task: Task, request: Request, wish: Wish, usual: Sampling) -> Job:
        job = self._job(task, request)
        sampling = Sampling(
            max_new_tokens=min(wish.max_tokens or usual.max_new_tokens, task.max_length - job.prompt_tokens),
            temperature=wish.temperature or 0.0,
            top_p=1.0 if wish.top_p is None else wish.top_p,
            stop=usual.stop if wish.stop is None else wish.stop,
            seed=secrets.randbits(32) if wish.seed is None else wish.seed % 2**32,
        )
        lead = " " if task.template.text.endswith(" {target}") else ""  # the template's own space, not the answer's
        return replace(job, sampling=sampling, lead=lead, top_logprobs=wish.top_logprobs, stream=wish.stream)

    def _job(self, task: Task, request: Request) -> Job:
        soft = SOFT in request.ids
        return Job(
            request=request,
            task=self.name,
            prompt_tokens=len(request.ids) + (task.num_virtual_tokens - 1 if soft else 0),
            vectors=self.vectors if soft else None,
            content=self.content if soft else "",
        )


class Catalog:
    """The base model and the soft prompts that are served now.

    A list of them is in memory, and of the soft prompts themselves those asked last, up to ``HELD_BYTES``.

    A tokenizer is not made for several threads: the tasks here share a copy of the base model's, and are to be used
    from one thread at a time, which need not be the engine's.

    Attributes:
        base: the base model.
        store: where soft prompts are found by name.
    """

    def __init__(
        self, lm: FrozenLM, store: Store, window: int, *, check: Callable[[Model], None] | None = None
    ) -> None:
        """Serves the base model alone.

        Args:
            lm: the base model.
            store: where soft prompts are found by name.
            window: the most tokens of one request.
            check: sees each soft prompt before it is served, and raises ``ConfigError`` where it cannot be.
        """
        self.store = store
        self._window = window
        self._check = check
        self._lm = copy.copy(lm)
        self._lm.tokenizer = copy.deepcopy(lm.tokenizer)
        self._listed: dict[str, Entry] = {}
        self._held: OrderedDict[str, Model] = OrderedDict()  # the one asked last is last
        self._seen: dict[str, tuple[int, ...]] = {}
        name = Path(lm.name).name if Path(lm.name).is_absolute() else lm.name
        card = {**_card(name, int(time.time()), name, window), "chat_template": bool(lm.tokenizer.chat_template)}
        self.base = Model(name=name, card=card, lm=self._lm, window=window)
        self._conversation = lru_cache(maxsize=64)(self._conversation_of)

    def entries(self) -> list[Entry]:
        """The base model, and the soft prompts by name."""
        return [self.base, *(entry for _, entry in sorted(self._listed.items()))]

    def entry(self, name: str) -> Entry:
        """What the list says of a name.

        Raises:
            ApiError: 404.
        """
        found = self.base if name == self.base.name else self._listed.get(name)
        if found is None:
            raise ApiError(
                404, f"There is no model {name[:100]!r} here; see /v1/models.", param="model", code="model_not_found"
            )
        return found

    def get(self, name: str) -> Model:
        """A model by name, read from its file if it is not in memory. If something else is in the file by now, that
        is loaded, as ``sync`` would have done.

        Raises:
            ApiError: 404; 503, the file cannot be served any more.
        """
        entry = self.entry(name)
        if entry.path is None:
            return self.base
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        try:
            return self.load(name, entry.path)
        except SoftPromptError as error:
            raise ApiError(503, f"{name!r} cannot be read again: {error}", code="not_readable") from error

    def load(self, name: str, path: Path) -> Model:
        """Serves a soft prompt under a name, in the place of what had that name before.

        Raises:
            StoreError: it is the base model's name.
            ArtifactError: the file is not a sound soft prompt.
            BaseModelError: it was tuned on another base model.
            TemplateError: its template does not fit the base model.
            ConfigError: what computes here cannot serve it.
        """
        if name == self.base.name:
            raise StoreError(f"The name '{name}' is the base model's; serve the soft prompt under another name.")
        self._seen[name] = stamp = _stamp(path)
        soft_prompt = artifact.load(path)
        task = Task.of(self._lm, soft_prompt)
        if task.max_length > self._window:
            task = replace(task, max_length=self._window)
        content = content_of(soft_prompt, task.max_length)
        card = {
            **_card(name, _created(soft_prompt), self.base.name, task.max_length),
            "parent": self.base.name,
            "template": soft_prompt.template,
            "fields": list(task.template.fields),
            "labels": None if task.verbalizer is None else list(task.labels),
            "num_virtual_tokens": task.num_virtual_tokens,
            "parametrisation": soft_prompt.parametrisation,
            "bytes": stamp[1] if stamp else 0,
            "metrics": [dict(metric) for metric in soft_prompt.metrics],
            "content_hash": content,
        }
        vectors = soft_prompt.vectors.to(self._lm.dtype)
        model = Model(
            name=name,
            card=card,
            content=content,
            path=path,
            lm=self._lm,
            window=self._window,
            task=task,
            vectors=vectors,
        )
        known = self._listed.get(name)
        if self._check is not None and (known is None or known.content != content):
            self._check(model)
        self._listed[name] = model.entry
        self._hold(model)
        return model

    def _hold(self, model: Model) -> None:
        self._held[model.name] = model
        self._held.move_to_end(model.name)
        while len(self._held) > 1 and sum(map(_bytes_of, self._held.values())) > HELD_BYTES:
            self._held.popitem(last=False)

    def unload(self, name: str) -> None:
        """Stops serving a soft prompt; requests that have begun are finished.

        Raises:
            ApiError: 404; or 400 for the base model.
        """
        if self.entry(name) is self.base:
            raise ApiError(400, "The base model cannot be unloaded; name a soft prompt.", param="name")
        del self._listed[name]
        self._held.pop(name, None)

    def sync(self, only: Collection[str] | None = None) -> list[tuple[str, SoftPromptError | None]]:
        """Follows the store: loads what is new there or has changed, drops what has gone.

        Args:
            only: the names to look at; None: all.

        Returns:
            A sentence, or a name and why it could not be loaded, for each soft prompt that is not as it was.
        """
        done: list[tuple[str, SoftPromptError | None]] = []
        there = {name: self.store.path(name) for name in self.store.names() if only is None or name in only}
        for name, path in there.items():
            stamp = _stamp(path)
            if self._seen.get(name) == stamp or not stamp:
                continue
            known = name in self._listed
            try:
                self.load(name, path)
                done.append((f"{'reloaded' if known else 'loaded'} {name}", None))
            except SoftPromptError as error:
                done.append((name, error))
        for name, entry in list(self._listed.items()):
            if entry.path is not None and not entry.path.exists():
                self.unload(name)
                self._seen.pop(name, None)
                done.append((f"unloaded {name}, whose file has gone", None))
        return done

    def converse(self, messages: Sequence[Message], wish: Wish) -> Order:
        """Continues a conversation with the base model, by its own chat template.

        Special tokens that a message spells are plain text.

        Raises:
            ApiError: 400, there is no chat template, it does not take these messages, or they do not fit.
        """
        roles = tuple("system" if message.role == "developer" else message.role for message in messages)
        task = self._conversation(roles)
        fields = {f"message {number}": message.text for number, message in enumerate(messages)}
        return self.base.continuing(task, fields, wish, Sampling(max_new_tokens=USUAL_TOKENS))

    def _conversation_of(self, roles: tuple[str, ...]) -> Task:
        tokenizer = self._lm.tokenizer
        if not tokenizer.chat_template:
            raise ApiError(
                400,
                f"The base model {self.base.name!r} has no chat template; use /v1/completions or a soft prompt.",
                param="model",
            )
        places = [f"{{message {number}}}" for number in range(len(roles))]
        messages = [{"role": role, "content": place} for role, place in zip(roles, places, strict=True)]
        try:
            rest = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # Jinja code of the model: whatever it raises
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ApiError(
                400, f"The base model's chat template does not take these messages: {reason}.", param="messages"
            ) from error
        text = ""
        for place in places:
            before, found, rest = rest.partition(place)
            if not found:
                raise ApiError(
                    400,
                    "The base model's chat template does not repeat every message; use /v1/completions.",
                    param="messages",
                )
            text += _escaped(before) + place
        return Task(self._lm, Template(f"{text}{_escaped(rest)}{{target}}"), None, 0, self._window)


def _encoded(make: Callable[[], Request], task: Task, reserve: int, truncate: bool) -> Request:
    try:
        request = make()
    except TemplateError:  # not even an empty input fits
        raise _too_long(0) from None
    if request.truncated and not truncate:
        raise _too_long(task.max_length - task.num_virtual_tokens - task.encoder.num_fixed - reserve)
    return request


def _too_long(room: int) -> ApiError:
    return ApiError(
        400,
        f"Expected an input of at most {max(room, 0):,} tokens beside template, soft prompt and answer, found a longer "
        f"one; shorten it, or have its end cut with truncate.",
        code="context_length_exceeded",
    )


def _object(text: str) -> dict[str, str] | None:
    """A JSON object of texts, if ``text`` is one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        return None
    return found


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _bytes_of(model: Model) -> int:
    """What a soft prompt takes in memory, about."""
    vectors = 0 if model.vectors is None else model.vectors.nbytes
    return vectors + BESIDE_VECTORS


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes with a file; empty if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _created(soft_prompt: SoftPrompt) -> int:
    """Seconds since 1970; 0 where the soft prompt does not say."""
    try:
        return int(datetime.fromisoformat(soft_prompt.created).timestamp())
    except ValueError:
        return 0


def content_of(soft_prompt: SoftPrompt, max_length: int) -> str:
    """Hex digest of all that a soft prompt's answers depend on, the base model apart."""
    verbalizer = soft_prompt.verbalizer
    words = None if verbalizer is None else [[label, list(words)] for label, words in verbalizer.items()]
    digest = hashlib.sha256(json.dumps([soft_prompt.template, words, max_length]).encode())
    digest.update(soft_prompt.vectors.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _card(name: str, created: int, root: str, window: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "softprompt",
        "root": root,
        "parent": None,
        "max_model_len": window,
    }
