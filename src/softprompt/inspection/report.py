"""A soft prompt looked at from every side, and what that says, as questions and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from softprompt.data.example import Dataset
from softprompt.drawing.words import share, shown
from softprompt.errors import ConfigError
from softprompt.inspection import ablation, behaviour
from softprompt.inspection.ablation import AsText, Cut, WhatMatters
from softprompt.inspection.behaviour import Attention, Continuation, Labels
from softprompt.inspection.drift import Drift, Way, drift
from softprompt.inspection.nearest import WAYWARD, Neighbours, Word, neighbours, words
from softprompt.inspection.plane import Map, plane
from softprompt.inspection.start import Norms, norms, starting_vectors
from softprompt.inspection.statistics import plain
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.inspection.words import chance, lost, nats, percent, points, value
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

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.soft_prompt.name,
            "base": self.soft_prompt.base,
            "num_virtual_tokens": self.num_virtual_tokens,
            "warning": WAYWARD,
            "answers": [{"question": question, "answer": answer} for question, answer in answers(self)],
            "nearest": self.near.as_dict(),
            "added": None if self.added is None else self.added.as_dict(),
            "words": plain(self.words),
            "norms": self.norms.as_dict(),
            "map": self.map.as_dict(),
            "drift": None if self.drift is None else self.drift.as_dict(),
            "source": self.source,
            "matters": None if self.matters is None else self.matters.as_dict(),
            "cuts": plain(self.cuts),
            "readings": plain(self.readings),
            "labels": plain(self.labels),
            "attention": plain(self.attention),
            "continuations": plain(self.continuations),
        }


def require_vectors(soft_prompt: SoftPrompt) -> None:
    """Refuses a trained KV prefix, which has no embeddings to be read.

    Raises:
        ConfigError: it is one.
    """
    if soft_prompt.vectors.dim() != 2:
        raise ConfigError(
            f"Reading a soft prompt needs vectors of the embedding width, but '{soft_prompt.name}' is a trained KV "
            f"prefix, which has none; inspect one of another parametrisation."
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
        ConfigError: it is a KV prefix.
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
        ConfigError: it is a KV prefix, or texts are given for a template with several fields.
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


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


# --- the answers ---------------------------------------------------------------------------------


def answers(report: Report) -> list[tuple[str, str]]:
    """What the inspection says, as questions and answers with numbers, intervals and nulls."""
    found = [
        ("Does it lie near words?", _near_words(report)),
        ("Do the label words persist?", _label_words_persist(report)),
        ("What is left of the start, and what did training add?", _since_start(report)),
        ("How did it get there?", _way(report)),
        ("Which virtual tokens matter most?", _most_important(report)),
        ("How many of them are needed?", _needed(report)),
        ("What is lost when it is read as text?", _lost_as_text(report)),
        ("What does it change?", _changes(report)),
    ]
    return [(question, answer) for question, answer in found if answer]


def _near_words(report: Report) -> str:
    near = report.near
    answer = (
        f"{near.significant} of {report.num_virtual_tokens} virtual tokens lie nearer to a token of the vocabulary "
        f"than random vectors of the same norm and profile do (false discovery rate {share(near.level)}, "
        f"{near.draws:,} draws)."
    )
    if near.groups:
        groups = "; ".join(
            f"{', '.join(map(str, group))} around {shown(report.names[group[0]])}" for group in near.groups
        )
        answer += f" Those that share most of their neighbours: {groups}."
    return answer


def _label_words_persist(report: Report) -> str:
    if not report.words:
        return ""
    there = [word for word in report.words if word.significant]
    answer = f"{len(there)} of {len(report.words)} label words stand out in a virtual token above the null"
    if there:
        best = sorted(there, key=lambda word: -word.excess)[:6]
        parts = [
            f"{shown(word.text)} in virtual token {word.virtual_token} (neighbour no. {word.rank:,} of "
            f"{report.vocabulary_size:,}, excess {word.excess:.1f} σ, {chance(word.q)})"
            for word in best
        ]
        answer += f": {_and(parts)}" + (", to name the strongest." if len(there) > len(best) else ".")
    else:
        answer += "."
    begun = [word for word in there if word.at_start]
    if any(word.at_start is not None for word in there):
        answer += (
            f" Of these, {len(begun)} stand where training started from the same word: it was kept, not found."
            if begun
            else " None stands where training started from it."
        )
    return answer


def _since_start(report: Report) -> str:
    moved, added = report.norms.moved, report.added
    if added is None:
        return f"Not known: {report.norms.start}."
    kept = sum(each.kept for each in moved)
    first = sum(each.rank == 1 for each in moved)
    mean = sum(each.cosine for each in moved) / len(moved)
    random = sum(each.random_cosine for each in moved) / len(moved)
    answer = (
        f"The start can still be told from {kept} of {len(moved)} virtual tokens, and is the nearest token of {first}. "
        f"Their mean cosine with it is {mean:.2f}; steps of the same lengths in random directions would leave "
        f"{random:.2f}."
    )
    towards = [reading.stands_out.text for reading in added.readings if reading.significant]
    answer += f" What training added lies near a token in {len(towards)} of {len(moved)}"
    return answer + (f": {', '.join(map(shown, dict.fromkeys(towards)))}." if towards else ".")


def _way(report: Report) -> str:
    if report.drift is None:
        return f"Not known: {report.about_drift}." if report.about_drift else ""
    points, kept, count = report.drift.points, report.drift.kept, report.num_virtual_tokens
    until = points[: points.index(kept) + 1]
    half = next(point.step for point in until if point.mean_drift >= kept.mean_drift / 2)
    changing = [i for i, point in enumerate(until) if point.as_kept < count]
    settled = until[changing[-1] + 1 if changing else 0].step
    return (
        f"The vectors that were kept, those after step {kept.step:,}, are on average {kept.mean_drift:.2f} RMS of the "
        f"embedding table from their start, the farthest {kept.largest_drift:.2f}; half of that was reached by step "
        f"{half:,}. The nearest token is that of the start for {kept.as_at_start} of {count}; from step {settled:,} "
        f"to there it did not change any more."
    )


def _most_important(report: Report) -> str:
    matters = report.matters
    if matters is None:
        return ""
    parts = [
        f"{i} near {shown(report.names[i])} ({nats(matters.tokens[i].left_out.loss_change)}; replaced by the mean "
        f"{nats(matters.tokens[i].replaced.loss_change)}; among the first {ablation.TOP} in "
        f"{share(matters.tokens[i].top_share)} of resamples)"
        for i in matters.top
    ]
    count = sum(token.significant for token in matters.tokens)
    return (
        f"By the loss without them: {_and(parts)}. On {matters.n} rows the loss changes significantly without {count} "
        f"of {report.num_virtual_tokens} (false discovery rate {share(matters.level)})."
    )


def _needed(report: Report) -> str:
    if report.matters is None or not report.cuts:
        return ""
    parts = [f"{cut.k}: {value(cut.best)} and {value(cut.first)}" for cut in report.cuts]
    return (
        f"With only the k that matter most, and with only the first k, it reaches: for k = {'; '.join(parts)}; "
        f"with all {report.num_virtual_tokens}: {value(report.matters.full)}."
    )


def _lost_as_text(report: Report) -> str:
    if not report.readings:
        return ""
    of_name = {reading.name: reading.change for reading in report.readings}
    typed = next(reading for reading in report.readings if reading.name.endswith("typed as text"))
    random = [reading.change for reading in report.readings if reading.name.startswith("random")]
    bare = of_name["no soft prompt"]
    return (
        f"The soft prompt reaches {value(of_name['soft prompt'])}; its nearest tokens typed as text reach "
        f"{value(typed.change)}, a change of {lost(typed.change)}. For comparison: no soft prompt {value(bare)}; "
        f"random tokens {'; '.join(value(change) for change in random)}. The text is {shown(typed.text, 300)}."
    )


def _changes(report: Report) -> str:
    labels = report.labels
    if labels is None:
        return ""
    largest = max(labels.with_it, key=lambda label: abs(labels.with_it[label] - labels.without[label]))
    return (
        f"Accuracy goes from {percent(labels.accuracy_without)} to {percent(labels.accuracy_with)}, "
        f"{points(labels.gained)}: {labels.changed} of {labels.n} answers change, {labels.mended} are mended and "
        f"{labels.broken} broken. The mean probability of {shown(largest)} goes from {labels.without[largest]:.2f} to "
        f"{labels.with_it[largest]:.2f}; its true share is {labels.gold[largest]:.2f}."
    )
