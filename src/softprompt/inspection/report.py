"""A soft prompt looked at from every side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from softprompt.data.example import Dataset
from softprompt.errors import ConfigError
from softprompt.inspection import ablation, behaviour
from softprompt.inspection.ablation import AsText, Cut, WhatMatters
from softprompt.inspection.behaviour import Attention, Continuation, Labels
from softprompt.inspection.drift import Drift, Way, drift
from softprompt.inspection.nearest import Neighbours, Word, neighbours, words
from softprompt.inspection.plane import Map, plane
from softprompt.inspection.start import Norms, norms, starting_vectors
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.predict import Progress
from softprompt.tasks.task import Task

ATTENTION_ROWS = 16
"""The most rows of the data that attention is averaged over, besides the texts that are given."""

Bar = Callable[[str], AbstractContextManager[Progress]]
"""Gives a progress bar of that name."""


@dataclass(frozen=True, eq=False)
class Report:
    """What is known of one soft prompt.

    Attributes:
        soft_prompt: it.
        vocabulary_size: V.
        near: its nearest tokens.
        added: the nearest tokens of what training added to its start; None if the start is not known.
        words: the verbalizer's words in it; empty for free text.
        norms: norms and drift.
        start: float32 ``[P, H]``, what training started from; None if it is not known.
        map: a plane.
        drift: the way from the start over the validations of the training; None if it is not known.
        about_drift: why it is not known; empty if it is, or was not looked for.
        source: where the rows come from; None without data, and then all that follows is None or empty.
        matters, cuts, readings: what each virtual token is worth, fewer of them, and it read as text.
        labels: the answers with and without it; None for free text.
        attention: that it is paid; None also if the model does not give it.
        continuations: of the texts that were given.
    """

    soft_prompt: SoftPrompt
    vocabulary_size: int
    near: Neighbours
    added: Neighbours | None
    words: tuple[Word, ...]
    norms: Norms
    map: Map
    start: torch.Tensor | None = None
    drift: Drift | None = None
    about_drift: str = ""
    source: str | None = None
    matters: WhatMatters | None = None
    cuts: tuple[Cut, ...] = ()
    readings: tuple[AsText, ...] = ()
    labels: Labels | None = None
    attention: Attention | None = None
    continuations: tuple[Continuation, ...] = ()

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return self.soft_prompt.num_virtual_tokens

    @property
    def names(self) -> list[str]:
        """What each virtual token is called by: its nearest token by cosine."""
        return [reading.cosine[0].text for reading in self.near.readings]


def require_vectors(soft_prompt: SoftPrompt) -> None:
    """Refuses a trained KV prefix or state, which has no embeddings to be read, and vectors of which some stand before
    a decoder's input.

    Raises:
        ConfigError: it is one.
    """
    if soft_prompt.decoder_virtual_tokens:
        raise ConfigError(
            f"Reading a soft prompt needs one whose vectors all stand in the input, but "
            f"{soft_prompt.decoder_virtual_tokens} of '{soft_prompt.name}' stand before the decoder's; inspect one "
            f"without decoder_virtual_tokens."
        )
    if soft_prompt.vectors.dim() != 2:
        raise ConfigError(
            f"Reading a soft prompt needs vectors of the embedding width, but '{soft_prompt.name}' is a "
            f"{soft_prompt.kind}, which has none; inspect one of another parametrisation."
        )


def inspect_vectors(
    soft_prompt: SoftPrompt, task: Task, vocabulary: Vocabulary, way: Way | None = None, about_way: str = ""
) -> Report:
    """Looks at a soft prompt with the embedding table alone.

    Args:
        soft_prompt: of vectors ``[P, H]``.
        task: its own.
        vocabulary: of its base model.
        way: its way over the training, if known.
        about_way: why it is not, if it was looked for.

    Raises:
        ConfigError: it is a KV prefix or a trained state.
    """
    require_vectors(soft_prompt)
    vectors = soft_prompt.vectors
    start, about_start = starting_vectors(task, soft_prompt)
    if way is not None:
        begun = next(iter(way.values()))
        if start is None or not torch.allclose(start, begun, rtol=1e-3, atol=1e-4):
            start, about_start = begun, "as the run folder of its training has it"
    near, *added = neighbours(vocabulary, vectors, *([] if start is None else [vectors - start]))
    return Report(
        soft_prompt=soft_prompt,
        vocabulary_size=vocabulary.size,
        near=near,
        added=added[0] if added else None,
        words=words(vectors, vocabulary, _label_words(task), start=start),
        norms=norms(vectors, vocabulary, start, about_start=about_start),
        map=plane(vectors, vocabulary, start),
        drift=None if way is None else drift(way, soft_prompt, vocabulary),
        about_drift=about_way if way is None else "",
        start=start,
    )


def inspect(
    soft_prompt: SoftPrompt,
    task: Task,
    dataset: Dataset | None,
    texts: Sequence[str],
    bar: Bar,
    way: Way | None = None,
    about_way: str = "",
) -> Report:
    """Looks at a soft prompt from every side.

    Args:
        soft_prompt: of vectors ``[P, H]``.
        task: its own.
        dataset: rows with targets to score with, at least 2; None for the views that need no forward pass.
        texts: input texts to go on from, and to measure attention on.
        bar: gives a progress bar.
        way, about_way: as for ``inspect_vectors``.

    Raises:
        ConfigError: it is a KV prefix or a trained state, or texts are given for a template with several fields.
    """
    require_vectors(soft_prompt)
    examples = behaviour.examples_of(task, texts) if texts else ()
    vectors, vocabulary = soft_prompt.vectors, Vocabulary.of(task.lm)
    report = inspect_vectors(soft_prompt, task, vocabulary, way, about_way)
    start, found = report.start, dict[str, Any]()
    if dataset is not None:
        with bar("reading as text") as progress:
            readings = ablation.as_text(task, vectors, vocabulary, dataset, start=start, progress=progress)
        with bar("leaving out") as progress:
            matters = ablation.what_matters(task, vectors, dataset, progress=progress)
        with bar("cutting") as progress:
            cuts = ablation.cuts(task, vectors, dataset, matters, progress=progress)
        found |= {"source": dataset.source, "readings": readings, "matters": matters, "cuts": cuts}
        if task.verbalizer is not None:
            with bar("with and without") as progress:
                found["labels"] = behaviour.label_shift(task, vectors, dataset, progress=progress)
    if examples or dataset is not None:
        looked_at = (*examples, *(() if dataset is None else dataset.examples[:ATTENTION_ROWS]))
        found["attention"] = behaviour.attention(task, vectors, looked_at, start=start)
        found["continuations"] = behaviour.next_tokens(task, vectors, examples)
    return replace(report, **found)


def _label_words(task: Task) -> dict[str, tuple[int, ...]]:
    """Every word of the verbalizer with its tokens as the template places them."""
    if task.verbalizer is None:
        return {}
    pairs = zip(task.verbalizer.words.values(), task.spellings, strict=True)
    return {word: ids for words, spellings in pairs for word, ids in zip(words, spellings, strict=True)}
