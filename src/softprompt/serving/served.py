"""What a server can be asked for: the base model, or a soft prompt on it, and how a client's input becomes a job."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from softprompt.data.example import Example
from softprompt.errors import DataError, TemplateError
from softprompt.generation.writer import TokenLogprob, draw
from softprompt.model.embedder import Embedder
from softprompt.model.request import Request, Sampling
from softprompt.serving.jobs import Job, Piece, Scores
from softprompt.serving.openai_api import ApiError
from softprompt.tasks.ensemble import mean_logprobs
from softprompt.tasks.predict import default_sampling
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT

USUAL_TOKENS = 128
"""The most tokens to write where neither the client nor a soft prompt's template says."""

LEAST_LOGPROB = -9999.0
"""Told in the place of minus infinity, which JSON does not have; OpenAI's API and vLLM tell the same."""

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

    def sampling(self, usual: Sampling) -> Sampling:
        """How to choose, with what is usual where the client does not say; drawn at random where it gives no seed."""
        return replace(
            usual,
            max_new_tokens=self.max_tokens or usual.max_new_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=usual.stop if self.stop is None else self.stop,
            seed=secrets.randbits(32) if self.seed is None else self.seed % 2**32,
        )


@dataclass(frozen=True)
class LabelText:
    """Writes a label: what becomes of the scores of a task's words where a client wants text.

    The most probable label, or at a temperature above 0 one drawn from the labels' probabilities to the power of
    1 / temperature, with the nucleus over labels.

    Attributes:
        task: the task, with labels.
        sampling: temperature, nucleus and seed; nothing else of it is looked at.
        top_logprobs: how many of the most probable labels to tell beside it; None: tell nothing.
        logprobs_of: scores → log-probability of each label.
    """

    task: Task
    sampling: Sampling
    top_logprobs: int | None
    logprobs_of: Callable[[Scores], Mapping[str, float]]

    def __call__(self, scores: Scores) -> Piece:
        """The label as a whole text, which counts as many tokens as its first word has.

        Its only token is the label, with its log-probability given that it is one of the labels.
        """
        found = torch.tensor(list(self.logprobs_of(scores).values()))
        logprobs = [max(value, LEAST_LOGPROB) for value in found.tolist()]
        order = sorted(range(len(logprobs)), key=lambda label: -logprobs[label])
        chosen = order[0]
        if self.sampling.temperature > 0:
            chosen = draw(found, self.sampling, torch.Generator().manual_seed(self.sampling.seed))
        labels = self.task.labels
        tokens: tuple[TokenLogprob, ...] = ()
        if self.top_logprobs is not None:
            top = tuple((labels[label], logprobs[label]) for label in order[: self.top_logprobs])
            tokens = (TokenLogprob(labels[chosen], logprobs[chosen], top),)
        count = len(self.task.words[self.task.label_of_word.index(chosen)])
        return Piece(labels[chosen], tokens, count, "stop")


@dataclass(frozen=True)
class Order:
    """A job for the engine.

    Attributes:
        job: the job.
        truncated: whether the end of the input text was cut to fit.
        label: writes the label where labels are scored to be text.
    """

    job: Job
    truncated: bool
    label: LabelText | None = None

    def choice(self, number: int) -> Job:
        """The job for choice ``number`` of a request: it draws with ``seed + number``."""
        if self.label is not None:
            return replace(self.job, answer=replace(self.label, sampling=_later(self.label.sampling, number)))
        assert self.job.sampling is not None
        return replace(self.job, sampling=_later(self.job.sampling, number))


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
        lm: what embeds for the base model, with a tokenizer of the catalog's own.
        window: the most tokens of one request.
        task: its own template, labels and length; None for the base model.
        vectors: the soft prompt on the CPU in the base model's dtype; None for the base model.
        chats: whether it continues whole conversations: the base model, or a soft prompt that was tuned on such.
        members: of an ensemble its members, all of one label set; its task and vectors are those of the first.
        vote: how an ensemble votes (``tasks.votes``).
    """

    lm: Embedder
    window: int
    task: Task | None = None
    vectors: torch.Tensor | None = None
    chats: bool = False
    members: tuple[Model, ...] = ()
    vote: str = "mean"

    @property
    def entry(self) -> Entry:
        """What of it stays in memory always."""
        return Entry(name=self.name, card=self.card, content=self.content, path=self.path)

    @cached_property
    def raw(self) -> Task:
        """The soft prompt, if any, and behind it the client's text as it is."""
        if self.task is None:
            return Task(self.lm, Template("{input}{target}"), None, 0, self.window)
        return Task(
            self.lm,
            Template("{soft_prompt}{input}{target}"),
            None,
            self.task.num_virtual_tokens,
            self.window,
            decoder_virtual_tokens=self.task.decoder_virtual_tokens,
        )

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
        """Continues its template with ``fields`` in it; where it has labels, with one of them.

        Raises:
            ApiError: 400, the input does not fit.
        """
        task = self.bare if base_only else self.task
        assert task is not None
        if task.verbalizer is not None:
            order = self.label(fields, truncate=wish.truncate, base_only=base_only)
            text = LabelText(task, wish.sampling(Sampling()), wish.top_logprobs, self.label_logprobs)
            return replace(order, label=text)
        return self.continuing(task, fields, wish, default_sampling(task))

    def write_raw(self, prompt: str | Sequence[int], wish: Wish) -> Order:
        """Continues the soft prompt, if any, and behind it a text or tokens as they are.

        A text is plain text even where it spells a special token; tokens are taken as they are, and if they begin
        with a beginning-of-sequence token, the soft prompt stands behind that.

        Raises:
            ApiError: 400, there is nothing to continue, it does not fit, or a token is not in the vocabulary.
        """
        if self.members:
            raise self._not_of_several("raw")
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
        if self.members:
            return self._joint(fields, truncate, base_only)
        request = _encoded(lambda: task.label_request(Example(fields, None)), task, reserve, truncate)
        return Order(self._job(task, request), request.truncated)

    def _joint(self, fields: Fields, truncate: bool, base_only: bool) -> Order:
        """The labels' words scored by each member."""
        if base_only:
            raise self._not_of_several("base_only")
        orders = [one.label(fields, truncate=truncate) for one in self.members]
        first, *others = [replace(order.job, task=self.name) for order in orders]
        return Order(replace(first, others=tuple(others)), any(order.truncated for order in orders))

    def label_logprobs(self, scores: Scores, *, normalise: bool = False) -> dict[str, float]:
        """Log-probability of each label, given that it is one of the labels; of an ensemble the joint one.

        Args:
            scores: of the words of its labels, or of each member's.
            normalise: divide a word's log-probability by its number of tokens.
        """
        found = []
        for model, of_words in zip(self.members or (self,), (scores.logprobs, *scores.others), strict=True):
            assert model.task is not None
            values = model.task.label_logprobs(torch.tensor([of_words]), normalise=normalise)[0]
            found.append(dict(zip(model.task.labels, values.tolist(), strict=True)))
        return mean_logprobs(found, self.vote) if self.members else found[0]

    def _not_of_several(self, field: str) -> ApiError:
        sentence = f"Expected no {field} for {self.name!r}, an ensemble; leave it out, or name one of its members."
        return ApiError(400, sentence, param=field)

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
        job = self._finished(task, request, wish, usual)
        if job.vectors is not None and not request.truncated:
            job = replace(job, template=task.template, fields=fields)
        return Order(job, request.truncated)

    @cached_property
    def _start(self) -> tuple[int, ...]:
        """What stands before raw text: the beginning-of-sequence token and the soft prompt, if there are any."""
        request = self.raw.open_request(Example({"input": "a"}, None), 1)
        return request.ids[: request.shared]

    def _finished(self, task: Task, request: Request, wish: Wish, usual: Sampling) -> Job:
        job = self._job(task, request)
        sampling = wish.sampling(usual)
        # the decoder of an encoder-decoder has places of its own
        room = task.max_length - (len(self.lm.decoder_start) if self.lm.encoder_decoder else job.prompt_tokens)
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
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


def _later(sampling: Sampling, number: int) -> Sampling:
    return replace(sampling, seed=sampling.seed + number)


def _encoded(make: Callable[[], Request], task: Task, reserve: int, truncate: bool) -> Request:
    try:
        request = make()
    except TemplateError:  # not even an empty input fits
        raise _too_long(0) from None
    except DataError as error:  # a token that the base model does not know
        raise ApiError(400, str(error)) from error
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
