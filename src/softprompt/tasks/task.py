"""A task: template and verbalizer bound to a base model. It turns examples into requests, and scores into labels."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from softprompt.data.example import Dataset, Example, check_targets, infer_labels
from softprompt.errors import ConfigError, DataError, SoftPromptWarning, TemplateError
from softprompt.model.embedder import Embedder
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.soft_prompts.metadata import AHEAD, MAIN, library_versions
from softprompt.soft_prompts.soft_prompt import SoftPrompt, check_base
from softprompt.tasks.length import default_num_virtual_tokens
from softprompt.tasks.scores import label_scores
from softprompt.text.chat import Turn, turn_of
from softprompt.text.encoder import Encoder
from softprompt.text.template import Template, escaped
from softprompt.text.tokens import SOFT, Tokens, overlap
from softprompt.text.verbalizer import Verbalizer

MOST_TURNS = 256
"""How many forms of conversations are kept, each with its encoder."""


@dataclass(frozen=True)
class Task:
    """What a soft prompt is tuned for and used with.

    Attributes:
        lm: the base model, or what stands before its layers: its tokenizer, table, names and window are all that is
            asked of it here.
        template: where soft prompt, fields and target stand.
        verbalizer: label → words; None for free-text targets.
        num_virtual_tokens: P; 0 for a template without a soft prompt.
        max_length: the most tokens in a sequence, soft prompt and target included.
        decoder_virtual_tokens: how many more stand before the decoder's input, of an encoder–decoder.
        word_end: whether words have an end where one is the start of another, and always for an encoder–decoder, whose
            targets end so. Soft prompts of earlier releases were tuned without.
        hard_text: what stands at the start of conversations, where the template has no soft prompt.
        spellings: per label, its words' token ids without an end.
        ends: where one label's tokens are the start of another's ("1", "10"), and for an encoder–decoder, what may
            stand behind a word, as token ids (``Encoder.ends``); else nothing.
        words: the token ids that are scored, of all labels in order: the spellings, or each once with each of the ends,
            so that every label can be the most probable one.
        label_of_word: the label's index for each of ``words``.
    """

    lm: Embedder
    template: Template
    verbalizer: Verbalizer | None
    num_virtual_tokens: int
    max_length: int
    word_end: bool = True
    hard_text: str = ""
    decoder_virtual_tokens: int = 0
    encoder: Encoder = field(init=False, repr=False)
    words: tuple[Tokens, ...] = field(init=False, repr=False)
    label_of_word: tuple[int, ...] = field(init=False, repr=False)
    spellings: tuple[tuple[Tokens, ...], ...] = field(init=False, repr=False)
    ends: tuple[Tokens, ...] = field(init=False, repr=False)
    _turns: dict[tuple[str, str | None], Turn] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_length > self.lm.window:
            raise ConfigError(
                f"The sequences may be at most {self.lm.window} tokens long, the window of {self.lm.name}, "
                f"but max_length is {self.max_length}; give a smaller one."
            )
        if self.decoder_virtual_tokens and isinstance(self.lm, FrozenLM):
            self.lm.require_ahead()
        encoder = Encoder(self.template, self.lm.tokenizer, encoder_decoder=self.lm.encoder_decoder)
        spellings = () if self.verbalizer is None else self.verbalizer.token_ids(encoder)
        self.lm.require_embeddings([token for words in spellings for word in words for token in word])
        object.__setattr__(self, "encoder", encoder)
        object.__setattr__(self, "spellings", spellings)
        scored, ends = spellings, tuple[Tokens, ...]()
        known = tuple(end for end in encoder.ends if max(end) < len(self.lm.embedding))
        if self.word_end and (self.overlapping or (self.lm.encoder_decoder and spellings and known)):
            ends = known
            scored = tuple(tuple(word + end for word in words for end in ends) for words in spellings)
            if not ends or overlap(word for words in scored for word in words):
                raise TemplateError(
                    f"Expected labels of which none begins with another, found {_pairs(self.labels, spellings)}, and "
                    f"{self.lm.name} has no token that ends a label; rename one of them."
                )
        object.__setattr__(self, "ends", ends)
        object.__setattr__(self, "words", tuple(word for words in scored for word in words))
        owners = tuple(label for label, words in enumerate(scored) for _ in words)
        object.__setattr__(self, "label_of_word", owners)

    @classmethod
    def for_data(
        cls,
        lm: Embedder,
        train: Dataset,
        template: Template,
        *,
        verbalizer: Verbalizer | None = None,
        num_virtual_tokens: int | None = None,
        max_length: int | None = None,
    ) -> Task:
        """The task of a data set; without a verbalizer, targets that look like labels become one (``infer_labels``),
        and without a number of virtual tokens it is ``default_num_virtual_tokens``.

        Raises:
            DataError: a target that is not in the label set.
            TemplateError: template and base model do not fit.
            ConfigError: ``max_length`` is beyond the model's window.
        """
        if verbalizer is None:
            labels = infer_labels(train)
            verbalizer = None if labels is None else Verbalizer.from_labels(labels)
        else:
            check_targets(train, verbalizer.labels)
        if num_virtual_tokens is None:
            num_virtual_tokens = default_num_virtual_tokens(lm, () if verbalizer is None else verbalizer.labels)
        return cls(lm, template, verbalizer, num_virtual_tokens, max_length or lm.window)

    @classmethod
    def of(cls, lm: Embedder, soft_prompt: SoftPrompt) -> Task:
        """The task that a soft prompt was tuned for; where its base model had another precision then, with a
        ``PrecisionWarning``.

        Raises:
            BaseModelError: it was tuned on another base model.
        """
        check_base(
            soft_prompt,
            base=lm.name,
            base_fingerprint=lm.fingerprint,
            tokenizer_fingerprint=lm.tokenizer_fingerprint,
            hidden_size=lm.hidden_size,
            base_settings=lm.settings,
            quantized=lm.quantized,
        )
        verbalizer = None if soft_prompt.verbalizer is None else Verbalizer(dict(soft_prompt.verbalizer))
        length = soft_prompt.training.get("max_length") or lm.window
        template, word_end = Template(soft_prompt.template), soft_prompt.word_end
        if soft_prompt.kind == "trained state" and isinstance(lm, FrozenLM):
            lm.trained.require(soft_prompt.name, soft_prompt.parts, soft_prompt.num_virtual_tokens)
        counts = soft_prompt.num_virtual_tokens, soft_prompt.decoder_virtual_tokens
        task = cls(lm, template, verbalizer, counts[0], length, word_end, decoder_virtual_tokens=counts[1])
        if not word_end and task.overlapping:
            warnings.warn(
                f"The labels of '{soft_prompt.name}' hold {_pairs(task.labels, task.spellings)}, and it was tuned by a "
                f"release in which the longer one of such a pair can never be predicted; train it again",
                SoftPromptWarning,
                stacklevel=2,
            )
        return task

    def soft_prompt(
        self,
        vectors: torch.Tensor,
        *,
        name: str,
        parametrisation: str,
        training: Mapping[str, Any],
        data: Mapping[str, Any],
        metrics: Sequence[Mapping[str, Any]] = (),
    ) -> SoftPrompt:
        """What was made for this task now, to be stored; :meth:`of` is the way back.

        Args:
            vectors: float32 ``[P, H]``, or of a KV prefix ``[P, L, 2, H_kv, D]``, or of a trained state ``[N]``, on the
                CPU.
            name, parametrisation, training, data, metrics: as ``SoftPrompt`` has them.
        """
        lm = self.lm
        return SoftPrompt(
            vectors=vectors,
            name=name,
            base=lm.name,
            base_fingerprint=lm.fingerprint,
            tokenizer_fingerprint=lm.tokenizer_fingerprint,
            template=self.template.text,
            verbalizer=None if self.verbalizer is None else dict(self.verbalizer.words),
            word_end=bool(self.ends),
            parametrisation=parametrisation,
            training=training,
            data=data,
            metrics=tuple(metrics),
            versions=library_versions(),
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            base_settings=lm.settings,
            quantized=lm.quantized,
            parts=self._parts(vectors),
        )

    def _parts(self, vectors: torch.Tensor) -> Mapping[str, tuple[int, ...]]:
        if vectors.dim() == 1:
            return self.model.trained.shapes(self.num_virtual_tokens)
        if not self.decoder_virtual_tokens:
            return {}
        return {
            MAIN: (self.num_virtual_tokens, vectors.shape[1]),
            AHEAD: (self.decoder_virtual_tokens, vectors.shape[1]),
        }

    def without_soft_prompt(self, hard_text: str = "") -> Task:
        """The same task with readable text, or nothing, in the soft prompt's place."""
        template = self.template.replace_soft_prompt(hard_text)
        return Task(self.lm, template, self.verbalizer, 0, self.max_length, self.word_end, hard_text)

    def remember(self) -> None:
        """From now on keeps the tokens of each text, for other trainings on the same rows."""
        self.encoder.known = self.encoder.known or {}

    def of_length(self, num_virtual_tokens: int) -> Task:
        """The same task with another number of virtual tokens; what it remembers serves both."""
        if num_virtual_tokens == self.num_virtual_tokens:
            return self
        other = copy(self)
        object.__setattr__(other, "num_virtual_tokens", num_virtual_tokens)
        return other

    @property
    def model(self) -> FrozenLM:
        """The base model, where the task is bound to a whole one."""
        assert isinstance(self.lm, FrozenLM), "this task is bound to an embedding table only"
        return self.lm

    def asks(self, example: Example) -> bool:
        """Whether the task that is stored is the example's."""
        return True

    @property
    def labels(self) -> tuple[str, ...]:
        """The label set; empty for free-text targets."""
        return () if self.verbalizer is None else self.verbalizer.labels

    @property
    def label_words(self) -> tuple[Tokens, ...]:
        """The token ids of each label's first word, without an end."""
        return tuple(words[0] for words in self.spellings)

    @property
    def overlapping(self) -> bool:
        """Whether one label's tokens are the start of another's."""
        return overlap(word for words in self.spellings for word in words)

    # --- examples → requests ----------------------------------------------------------------------

    def label_request(self, example: Example, prompt: int | None = 0) -> Request:
        """A request whose words are all words of the verbalizer."""
        reserve = max(len(word) for word in self.words)
        return self._request(example, None, reserve, prompt, self.words)

    def target_request(self, example: Example, prompt: int | None = 0) -> Request:
        """A request whose only word is the target: a label's first word, with its end where labels have one, or free
        text with an end token."""
        if example.target is None:
            raise DataError(f"{example.where}: expected a target, found none; add one.")
        if example.conversation is not None:
            answer = self._turn(example).target_ids(example.target, self.lm.end_tokens)
            return self._request(example, answer, 0, prompt, None)
        if self.verbalizer is None:
            return self._request(example, example.target, 0, prompt, None)
        word = self.spellings[self.labels.index(example.target)][0]
        if self.ends:
            word += self.ends[0]
        return self._request(example, None, len(word), prompt, (word,))

    def open_request(self, example: Example, max_new_tokens: int, prompt: int | None = 0) -> Request:
        """A request to be continued by up to ``max_new_tokens`` tokens."""
        return self._request(example, None, max_new_tokens, prompt, ())

    def _request(
        self,
        example: Example,
        target: str | Tokens | None,
        reserve: int,
        prompt: int | None,
        words: tuple[Tokens, ...] | None,
    ) -> Request:
        encoder = self.encoder if example.conversation is None else self._turn(example).encoder
        encoded = encoder.encode(
            example,
            num_virtual_tokens=self.num_virtual_tokens,
            max_length=self.max_length,
            target=target,
            append_eos=target is not None,
            reserve=reserve,
            ahead=self.decoder_virtual_tokens,
        )
        self.lm.require_embeddings((*encoded.ids, *encoded.target_ids), example.where)
        chosen = (encoded.target_ids,) if words is None else words
        place = prompt if self.template.has_soft_prompt else None
        shared, origin = encoded.shared, ""
        if example.conversation is not None:  # what follows differs from one conversation to the next
            origin = example.conversation.origin
            shared = encoded.ids.index(SOFT) + 1 if self.template.has_soft_prompt else 0
        ahead = 0 if place is None else self.decoder_virtual_tokens
        return Request(encoded.ids, shared, chosen, place, encoded.truncated, origin, ahead)

    def _turn(self, example: Example) -> Turn:
        """What stands around the fields of an answer in a conversation."""
        assert example.conversation is not None
        given = example.conversation
        found = self._turns.get((given.before, given.answer))
        if found is None:
            opening = "{soft_prompt}" if self.template.has_soft_prompt else escaped(self.hard_text)
            try:
                found = turn_of(
                    self.lm.tokenizer, given.before, given.answer, opening, encoder_decoder=self.lm.encoder_decoder
                )
            except TemplateError as error:
                raise DataError(f"{example.where}: {str(error)[:1].lower()}{str(error)[1:]}") from error
            found.encoder.known = self.encoder.known
            if len(self._turns) >= MOST_TURNS:
                self._turns.clear()
            self._turns[given.before, given.answer] = found
        return found

    # --- scores → labels --------------------------------------------------------------------------

    def label_logprobs(self, scores: torch.Tensor, *, normalise: bool = False) -> torch.Tensor:
        """Log-probability of each label, given that it is one of the labels.

        Args:
            scores: float32 ``[N, W]``, log-probabilities of the verbalizer's words; the words of a label add up.
            normalise: divide each word's log-probability by its number of tokens first, so that long labels are not
                at a disadvantage.

        Returns:
            float32 ``[N, labels]``; each row's exponentials sum to 1.
        """
        if normalise:
            scores = scores / torch.tensor([len(word) for word in self.words], device=scores.device)
        return label_scores(scores, self.label_of_word).log_softmax(dim=1)


def _pairs(labels: Sequence[str], spellings: Sequence[Sequence[Tokens]]) -> str:
    """The labels whose tokens are the start of another's, for people: the first pair, and how many more."""
    words = sorted((word, label) for label, several in zip(labels, spellings, strict=True) for word in several)
    found = [
        f"{longer!r}, which begins with {label!r}"
        for place, (word, label) in enumerate(words)
        for other, longer in words[place + 1 :]
        if other[: len(word)] == word
    ]
    return found[0] + (f" (and {len(found) - 1} more such)" if found[1:] else "")
