"""What a server serves: the base model and soft prompts by name, read from files and followed there."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from softprompt.errors import ConfigError, SoftPromptError, StoreError, TemplateError
from softprompt.model.embedder import Embedder
from softprompt.model.request import Sampling
from softprompt.serving.openai_api import ApiError, Message
from softprompt.serving.served import USUAL_TOKENS, Entry, Model, Order, Wish
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.ensemble import require_ensemble
from softprompt.tasks.predict import default_sampling
from softprompt.tasks.task import Task
from softprompt.text.chat import SOFT_PROMPT, conversation_template

HELD_BYTES = 32 << 20
"""How much of the soft prompts is held in memory, those asked last; the others are read from their files when they are
asked again."""
BESIDE_VECTORS = 8 << 10
"""Bytes that a soft prompt takes beside its vectors, about: template, labels, what is said of it."""


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
        self, lm: Embedder, store: Store, window: int, *, check: Callable[[Model], None] | None = None
    ) -> None:
        """Serves the base model alone.

        Args:
            lm: the base model, or what embeds for it; its tokenizer is copied.
            store: where soft prompts are found by name.
            window: the most tokens of one request.
            check: sees each soft prompt before it is served, and raises ``ConfigError`` where it cannot be.
        """
        self.store = store
        self._window = window
        self._check = check
        self._lm = Embedder.of(lm)
        self._listed: dict[str, Entry] = {}
        self._ensembles: dict[str, tuple[tuple[str, ...], str]] = {}  # the members' names, and the vote
        self._held: OrderedDict[str, Model] = OrderedDict()  # the one asked last is last
        self._seen: dict[tuple[str, Path], tuple[int, ...]] = {}  # what each file was like when it was last tried
        name = Path(lm.name).name if Path(lm.name).is_absolute() else lm.name
        card = {**_card(name, int(time.time()), name, window), "chat_template": bool(lm.tokenizer.chat_template)}
        self.base = Model(name=name, card=card, lm=self._lm, window=window, chats=True)
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
        if name in self._ensembles:
            model = self._together(name)
            self._listed[name] = model.entry
            return model
        if entry.path is None:
            return self.base
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        try:
            return self.load(name, entry.path)
        except SoftPromptError as error:
            raise ApiError(503, f"{name!r} cannot be read again: {error}", code="not_readable") from error

    def join(self, name: str, members: Sequence[str], vote: str | None = None) -> Model:
        """Serves soft prompts that are served already also as one model, which they answer together.

        Args:
            name: what requests call it.
            members: the names of at least two soft prompts of one label set.
            vote: how they vote (``tasks.votes``); None: by the mean.

        Raises:
            StoreError: the name is taken, or none.
            ConfigError: they cannot answer together, or answer with free text.
            ApiError: 404, one of them is not served.
        """
        self.store.path(name)  # refuses what is no name
        if name == self.base.name or name in self._listed:
            raise StoreError(f"The name '{name}' is served already; give the ensemble another one.")
        found = [self.get(one) for one in members]
        for one in found:
            if one.task is None or one.task.verbalizer is None or one.members:
                raise ConfigError(
                    f"Expected soft prompts with labels in the ensemble {name!r}, found {one.name!r}, which is none; "
                    f"leave it out."
                )
        chosen = require_ensemble([SoftPrompt.load(one.path) for one in found if one.path], vote)
        self._ensembles[name] = (tuple(members), chosen)
        model = self._together(name)
        self._listed[name] = model.entry
        return model

    def _together(self, name: str) -> Model:
        """An ensemble, with its members as they are now.

        Raises:
            ApiError: 404 or 503, as for :meth:`get`, for one of the members; 503, they have other labels by now.
        """
        names, vote = self._ensembles[name]
        members = [self.get(one) for one in names]
        first = members[0]
        assert first.task is not None
        label_sets = {frozenset(one.task.labels) if one.task else None for one in members}
        if len(label_sets) > 1 or len({frozenset(one.card["fields"]) for one in members}) > 1:
            raise ApiError(503, f"The members of {name!r} are not of one task any more; see /v1/models.")
        content = hashlib.sha256(json.dumps([vote, *(one.content for one in members)]).encode()).hexdigest()
        window = min(one.task.max_length for one in members if one.task is not None)
        card = {
            **_card(name, max(one.card["created"] for one in members), self.base.name, window),
            **{key: first.card[key] for key in ("parent", "template", "fields", "labels")},
            "num_virtual_tokens": sum(one.card["num_virtual_tokens"] for one in members),
            "parametrisation": first.card["parametrisation"],
            "bytes": sum(one.card["bytes"] for one in members),
            "metrics": [],
            "ensemble": list(names),
            "vote": vote,
            "content_hash": content,
        }
        return replace(first, name=name, card=card, content=content, path=None, members=tuple(members), vote=vote)

    def load(self, name: str, path: Path) -> Model:
        """Serves a soft prompt under a name, in the place of what had that name before.

        Raises:
            StoreError: it is the base model's name.
            ArtifactError: the file is not a sound soft prompt.
            BaseModelError: it was tuned on another base model.
            TemplateError: its template does not fit the base model.
            ConfigError: what computes here cannot serve it.
        """
        path = path.absolute()
        self._seen[name, path] = stamp = _stamp(path)
        if name in self._ensembles:
            raise StoreError(f"The name '{name}' is an ensemble's; load the soft prompt under another name.")
        if name == self.base.name:
            raise StoreError(
                f"The name '{name}' is the base model's; rename the soft prompt's file, or load it under another name."
            )
        soft_prompt = SoftPrompt.load(path)
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
            **({"decoder_virtual_tokens": task.decoder_virtual_tokens} if task.decoder_virtual_tokens else {}),
            "parametrisation": soft_prompt.parametrisation,
            "bytes": stamp[1] if stamp else 0,
            "metrics": [dict(metric) for metric in soft_prompt.metrics],
            "content_hash": content,
        }
        # a layer's state may be kept in more bits than the model computes in
        vectors = soft_prompt.vectors if soft_prompt.parts else soft_prompt.vectors.to(self._lm.dtype)
        model = Model(
            name=name,
            card=card,
            content=content,
            path=path,
            lm=self._lm,
            window=self._window,
            task=task,
            vectors=vectors,
            chats=soft_prompt.is_chat,
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
        """Stops serving a soft prompt; requests that have begun are finished. ``sync`` loads it again only if its file
        changes after that.

        Raises:
            ApiError: 404; or 400 for the base model.
        """
        if self.entry(name) is self.base:
            raise ApiError(400, "The base model cannot be unloaded; name a soft prompt.", param="name")
        for known, path in self._seen:
            if known == name:
                self._seen[name, path] = _stamp(path)
        del self._listed[name]
        self._ensembles.pop(name, None)
        self._held.pop(name, None)

    def sync(self, files: Mapping[str, Path] | None = None) -> list[tuple[str, SoftPromptError | None]]:
        """Follows files: loads what is new or has changed, drops what has gone. What is served follows the file that
        it was read from, and no other of its name.

        Args:
            files: what to serve from which files, where they are there; None: all of the store.

        Returns:
            A sentence, or a name and why it could not be loaded, for each soft prompt that is not as it was.
        """
        done: list[tuple[str, SoftPromptError | None]] = []
        if files is None:
            files = {name: self.store.path(name) for name in self.store.names()}
        wanted = {name: path.absolute() for name, path in files.items()}
        for name, path in self._files().items():
            other, wanted[name] = wanted.get(name, path), path
            if other != path and self._is_news(name, other) and _stamp(other) != _stamp(path):
                sentence = f"Expected one soft prompt named '{name}', found {other} beside {path}, which is served"
                done.append((name, StoreError(f"{sentence}; rename the file, or load it with load_inplace.")))
        for name, path in wanted.items():
            if not self._is_news(name, path):
                continue
            known = name in self._listed
            try:
                self.load(name, path)
                done.append((f"{'reloaded' if known else 'loaded'} {name}", None))
            except SoftPromptError as error:
                done.append((name, error))
        for name, path in self._files().items():
            if not path.exists():
                self.unload(name)
                self._seen.pop((name, path), None)
                done.append((f"unloaded {name}, whose file has gone", None))
        return done

    def _is_news(self, name: str, path: Path) -> bool:
        """Whether a file is there that is not as it was when this was last asked, or when it was last loaded."""
        before, now = self._seen.get((name, path)), _stamp(path)
        if now:
            self._seen[name, path] = now
        return now not in ((), before)

    def _files(self) -> dict[str, Path]:
        """What each soft prompt that is served was read from."""
        return {name: entry.path for name, entry in self._listed.items() if entry.path is not None}

    def converse(self, model: Model, messages: Sequence[Message], wish: Wish, *, base_only: bool = False) -> Order:
        """Continues a conversation by the base model's own chat template, behind a soft prompt if the model is one.

        Special tokens that a message spells are plain text.

        Raises:
            ApiError: 400, there is no chat template, it does not take these messages, or they do not fit.
        """
        roles = tuple("system" if message.role == "developer" else message.role for message in messages)
        own = model.bare if base_only else model.task
        length = own.num_virtual_tokens if own is not None and own.template.has_soft_prompt else None
        window = self._window if own is None else own.max_length
        ahead = 0 if length is None or own is None else own.decoder_virtual_tokens
        task = self._conversation(roles, length, ahead, window)
        fields = {f"message {number}": message.text for number, message in enumerate(messages, start=1)}
        usual = Sampling(max_new_tokens=USUAL_TOKENS) if own is None else default_sampling(own)
        return model.continuing(task, fields, wish, usual)

    def _conversation_of(
        self, roles: tuple[str, ...], num_virtual_tokens: int | None, decoder_virtual_tokens: int, window: int
    ) -> Task:
        """``num_virtual_tokens`` is None without a soft prompt."""
        messages = [{"role": role, "content": f"{{message {number}}}"} for number, role in enumerate(roles, start=1)]
        tokenizer = self._lm.tokenizer
        if not tokenizer.chat_template:
            raise ApiError(
                400,
                f"The base model {self.base.name!r} has no chat template; use /v1/completions or a soft prompt.",
                param="model",
            )
        try:
            opening = "" if num_virtual_tokens is None else SOFT_PROMPT
            template = conversation_template(tokenizer, messages, opening=opening)
        except TemplateError as error:
            raise ApiError(400, str(error), param="messages") from error
        count = num_virtual_tokens or 0
        return Task(self._lm, template, None, count, window, decoder_virtual_tokens=decoder_virtual_tokens)


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
    content = [soft_prompt.template, words, max_length, *([True] if soft_prompt.word_end else [])]
    content += [soft_prompt.decoder_virtual_tokens] if soft_prompt.decoder_virtual_tokens else []
    digest = hashlib.sha256(json.dumps(content).encode())
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
