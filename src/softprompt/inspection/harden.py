"""A readable hard prompt in the place of a soft one, and how much is lost by it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from softprompt.data.example import Dataset, Example
from softprompt.errors import DataError
from softprompt.inspection.ablation import AsText, Rows, Variant, change, score_variants
from softprompt.inspection.statistics import SEED, plain
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.model.embedder import tokens_of
from softprompt.tasks.task import Task
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.objective import Objective

SEARCH_ROWS = 64
"""The most rows that swaps are chosen by."""
SCREEN_ROWS = 16
"""Rows, drawn anew for each step, that its candidates are sorted by."""
CANDIDATES = 16
"""Changes that a step tries: half by the gradient, a quarter from the soft prompt's neighbours, the rest deletions."""
POOL = 10
"""Neighbours of each virtual token that a step draws from, and best tokens by the gradient at each place."""
FINALISTS = 2
"""Candidates of a step that are scored on all search rows."""
PATIENCE = 40
"""Steps in a row without a gain after which the search ends."""
REPORT_ROWS = 500
"""The most rows that the outcome is measured on."""


@dataclass(frozen=True)
class Hardened:
    """A hard prompt and what it is worth.

    Attributes:
        text: the hard prompt.
        tokens: how many it has.
        projected: the nearest tokens' text, from which the search started.
        steps, swaps: steps of the search, and those that changed the text.
        seconds: time that the search took.
        stopped: ``budget`` or ``no gain``.
        search_loss: mean loss on the search rows before and after.
        readings: soft prompt, no soft prompt, projected and hardened, measured on rows that the search did not see.
        search_rows, report_rows: how many rows.
        seed: of the split and the search.
    """

    text: str
    tokens: int
    projected: str
    steps: int
    swaps: int
    seconds: float
    stopped: str
    search_loss: tuple[float, float]
    readings: tuple[AsText, ...]
    search_rows: int
    report_rows: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(plain(self))


def harden(
    task: Task,
    vectors: torch.Tensor,
    vocabulary: Vocabulary,
    validation: Dataset,
    *,
    budget: float = 120.0,
    seed: int = SEED,
    progress: Callable[[float, str], None] | None = None,
) -> Hardened:
    """Searches a text that does what the soft prompt does.

    It starts from the nearest readable tokens (the projection of PEZ, Wen et al. 2023, §3.1) and goes on by greedy
    swaps. A step takes the gradient of the loss at the current text's embeddings and tries some changes of one token:
    to those that the gradient favours to first order (HotFlip, Ebrahimi et al. 2018; AutoPrompt, Shin et al. 2020,
    §2.2), to neighbours of the soft prompt, and deletions. The best on a few rows are scored on all search rows, and
    the best of these is taken if it lowers the loss there. Unlike those methods, every candidate is scored as the text
    that it is written as, tokenized anew, and must be printable: what is found can be typed.

    Half of the rows are searched with, the rest are for the report.

    Args:
        task: the soft prompt's own.
        vectors: float32 ``[P, H]``.
        vocabulary: of the base model.
        validation: rows with targets, at least 4.
        budget: seconds for the search.
        seed: seeds split and search.
        progress: is told the seconds gone and the text so far.

    Raises:
        DataError: fewer than 4 rows.
    """
    count = len(validation.examples)
    if count < 4:
        raise DataError(
            f"Expected at least 4 rows to search and report with in {validation.source}, found {count}; give more."
        )
    draw = random.Random(seed)
    order = draw.sample(range(count), count)
    half = min(SEARCH_ROWS, count // 2)
    searched, reported = (
        replace(validation, examples=tuple(validation.examples[i] for i in sorted(chosen)))
        for chosen in (order[:half], order[half : half + REPORT_ROWS])
    )
    search = _Search(task, vectors, vocabulary, searched, draw)
    before, projected, began = float(search.losses.mean()), search.text, time.perf_counter()
    steps = swaps = idle = 0
    while (gone := time.perf_counter() - began) < budget and idle < PATIENCE:
        if progress is not None:
            progress(gone, search.text)
        improved = search.step()
        steps, swaps, idle = steps + 1, swaps + improved, 0 if improved else idle + 1
    seconds = time.perf_counter() - began
    readings = [
        ("soft prompt", "", Variant(task, vectors)),
        ("no soft prompt", "", Variant(task.without_soft_prompt(), None)),
        ("nearest tokens as text", projected, Variant(task.without_soft_prompt(projected), None)),
        ("hardened text", search.text, Variant(task.without_soft_prompt(search.text), None)),
    ]
    full, *rest = score_variants([variant for _, _, variant in readings], reported)
    changes = [change(scored, full) for scored in (full, *rest)]
    return Hardened(
        text=search.text,
        tokens=len(search.ids),
        projected=projected,
        steps=steps,
        swaps=swaps,
        seconds=seconds,
        stopped="no gain" if idle >= PATIENCE else "budget",
        search_loss=(before, float(search.losses.mean())),
        readings=tuple(AsText(name, text, found) for (name, text, _), found in zip(readings, changes, strict=True)),
        search_rows=half,
        report_rows=len(reported.examples),
        seed=seed,
    )


class _Search:
    """The text so far, its tokens, and its loss on each search row."""

    def __init__(
        self, task: Task, vectors: torch.Tensor, vocabulary: Vocabulary, rows: Dataset, draw: random.Random
    ) -> None:
        self.task, self.vocabulary, self.rows, self.draw = task, vocabulary, rows, draw
        tokenizer = task.model.tokenizer
        self._special = set(tokenizer.all_special_ids) | {
            token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        }
        near = vocabulary.nearest(vectors, min(5 * POOL, vocabulary.size), ("cosine", "euclidean"))
        readable = {name: [self._readable(row)[:POOL] for row in tokens.tolist()] for name, (_, tokens) in near.items()}
        self.pool = sorted({token for row in readable["cosine"] for token in row})
        starts = [self._written([row[0] for row in rows_of if row]) for rows_of in readable.values()]
        found = self._losses(starts, rows)
        self.text, self.losses = min(zip(starts, found, strict=True), key=lambda pair: float(pair[1].mean()))
        self.ids = tokens_of(self.task.model, self.text)

    def step(self) -> bool:
        """Tries some changes of one token; returns whether one was made."""
        chosen = self.draw.sample(range(len(self.rows.examples)), min(SCREEN_ROWS, len(self.rows.examples)))
        texts = self._candidates([self.rows.examples[i] for i in chosen])
        if not texts:
            return False
        screened = self._losses(texts, replace(self.rows, examples=tuple(self.rows.examples[i] for i in chosen)))
        gains = [float(self.losses[chosen].mean() - losses.mean()) for losses in screened]
        best = sorted(range(len(texts)), key=lambda i: -gains[i])[:FINALISTS]
        finalists = [texts[i] for i in best if gains[i] > 0]
        if not finalists:
            return False
        found = self._losses(finalists, self.rows)
        text, losses = min(zip(finalists, found, strict=True), key=lambda pair: float(pair[1].mean()))
        if float(losses.mean()) >= float(self.losses.mean()):
            return False
        self.text, self.losses, self.ids = text, losses, tokens_of(self.task.model, text)
        return True

    def _candidates(self, examples: Sequence[Example]) -> list[str]:
        """Texts that differ from the current one in one token."""
        if not self.ids:
            return []
        gradient = self._gradient(examples)
        found: dict[str, None] = {}
        for number in range(CANDIDATES):
            place = self.draw.randrange(len(self.ids))
            if number < CANDIDATES // 2:
                tokens = self._favoured(gradient[place])
            elif number < CANDIDATES * 3 // 4:
                near = self.draw.sample(self.pool, min(POOL, len(self.pool)))
                tokens = [near[int((self.vocabulary[near] @ gradient[place]).argmin())]]
            else:
                tokens = []
            token = [self.draw.choice(tokens)] if tokens else []
            found[self._written([*self.ids[:place], *token, *self.ids[place + 1 :]])] = None
        found.pop(self.text, None)
        return list(found)

    def _favoured(self, gradient: torch.Tensor) -> list[int]:
        """Readable tokens whose embeddings lower the loss most to first order, by a gradient ``[H]``."""
        found = self.vocabulary.nearest(-gradient[None], min(5 * POOL, self.vocabulary.size), ("dot",))["dot"][1]
        return self._readable(found[0].tolist())[:POOL]

    def _gradient(self, examples: Sequence[Example]) -> torch.Tensor:
        """The loss's gradient in the current tokens' embeddings, float32 ``[len(ids), H]``."""
        task = replace(self.task, num_virtual_tokens=len(self.ids))
        embedded = self.vocabulary[self.ids].to(task.model.device).requires_grad_()
        if task.verbalizer is None:
            objective, gold = Objective(), [0] * len(examples)
            requests = [task.target_request(e) for e in examples]
        else:
            objective, gold = Objective(task.label_of_word), [task.labels.index(str(e.target)) for e in examples]
            requests = [task.label_request(e) for e in examples]
        Gradients(task.model).backward(objective, requests, gold, embedded)
        assert embedded.grad is not None
        return embedded.grad.float().cpu()

    def _losses(self, texts: Sequence[str], rows: Dataset) -> list[Rows]:
        """Each text's loss on each row."""
        variants = [Variant(self.task.without_soft_prompt(text), None) for text in texts]
        return [scored.loss for scored in score_variants(variants, rows)]

    def _readable(self, tokens: Sequence[int]) -> list[int]:
        """Those that can be typed."""

        def is_readable(token: int) -> bool:
            text = str(self.task.model.tokenizer.decode([token]))
            return (
                text != "" and "\ufffd" not in text and all(letter.isprintable() or letter in "\n\t" for letter in text)
            )

        return [token for token in tokens if token not in self._special and is_readable(token)]

    def _written(self, tokens: Sequence[int]) -> str:
        return str(self.task.model.tokenizer.decode(list(tokens)))
