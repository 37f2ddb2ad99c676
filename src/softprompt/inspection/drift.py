"""How a soft prompt moved in its training, from the history that its run folder keeps (``tuning/history.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from softprompt.errors import StoreError
from softprompt.files import StrPath
from softprompt.inspection.statistics import plain
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tuning import history

LOOKED_UP = 1000
"""The most virtual tokens, over all points, whose nearest tokens are looked up: they cost what the null costs."""

Way = Mapping[int, torch.Tensor]
"""Optimizer steps of the run → the soft prompt then, float32 ``[P, H]``; first what it started from."""


@dataclass(frozen=True)
class Point:
    """The soft prompt at a validation.

    Attributes:
        step: optimizer steps of the run that were done.
        drift: of each virtual token, the RMS of the difference from its start, in RMS of the embedding table.
        mean_drift, largest_drift: of these.
        norm: mean norm of the virtual tokens.
        cosine: mean cosine with the start.
        random_cosine: the mean cosine that steps of the same lengths in random directions would leave.
        as_at_start: how many virtual tokens have the nearest token, by cosine, that they started with.
        as_kept: how many have the one that they have in the soft prompt that was kept.
        kept: whether this is the soft prompt that was kept.
    """

    step: int
    drift: tuple[float, ...]
    mean_drift: float
    largest_drift: float
    norm: float
    cosine: float
    random_cosine: float
    as_at_start: int
    as_kept: int
    kept: bool


@dataclass(frozen=True)
class Drift:
    """The way of a soft prompt from its start.

    Attributes:
        points: the start, then validations.
        left_out: how many validations of the history are not among them.
    """

    points: tuple[Point, ...]
    left_out: int

    @property
    def kept(self) -> Point:
        """Where the soft prompt was kept."""
        return next(point for point in self.points if point.kept)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(plain(self))


def way_of(soft_prompt: SoftPrompt, folder: StrPath) -> Way:
    """The way of the start that a soft prompt came from.

    Args:
        soft_prompt: of vectors ``[P, H]``.
        folder: the run folder of its training.

    Raises:
        StoreError: no history is there, it is damaged, or it is of another training: the soft prompt is nowhere in it.
    """
    entries = history.load(folder)
    found = {start for (start, _), vectors in entries.items() if torch.equal(vectors, soft_prompt.vectors)}
    if not found:
        raise StoreError(
            f"The history in {folder} is of another training: the vectors of {soft_prompt.name!r} are nowhere in it."
        )
    number = soft_prompt.training.get("start")
    chosen = number if number in found else min(found)
    return {step: vectors for (start, step), vectors in sorted(entries.items()) if start == chosen}


def drift(way: Way, soft_prompt: SoftPrompt, vocabulary: Vocabulary) -> Drift:
    """Norms, the way from the start, and when the nearest tokens became what they are.

    Args:
        way: of ``way_of``.
        soft_prompt: the one that was kept.
        vocabulary: of the base model.
    """
    steps = list(way)
    kept = next(step for step in steps if torch.equal(way[step], soft_prompt.vectors))
    chosen = _evenly(steps, max(3, LOOKED_UP // soft_prompt.num_virtual_tokens), kept)
    start = way[steps[0]]
    tokens = vocabulary.nearest(torch.cat([way[step] for step in chosen]), 1, ("cosine",))["cosine"][1]
    nearest = dict(zip(chosen, tokens.view(len(chosen), -1), strict=True))
    unit = float(vocabulary.norms().square().mean().sqrt())
    points = []
    for step in chosen:
        vectors = way[step]
        distance, lengths = (vectors - start).norm(dim=1), start.norm(dim=1)
        points.append(
            Point(
                step=step,
                drift=tuple((distance / unit).tolist()),
                mean_drift=float(distance.mean()) / unit,
                largest_drift=float(distance.max()) / unit,
                norm=float(vectors.norm(dim=1).mean()),
                cosine=float(torch.nn.functional.cosine_similarity(vectors, start, dim=1).mean()),
                random_cosine=float((lengths / torch.hypot(lengths, distance).clamp_min(1e-12)).mean()),
                as_at_start=int((nearest[step] == nearest[steps[0]]).sum()),
                as_kept=int((nearest[step] == nearest[kept]).sum()),
                kept=step == kept,
            )
        )
    return Drift(tuple(points), len(steps) - len(chosen))


def _evenly(steps: list[int], most: int, needed: int) -> list[int]:
    """At most ``most`` of the steps, at least 3: the first, the last, the one needed, others evenly between."""
    if len(steps) <= most:
        return steps
    among = {steps[round(i * (len(steps) - 1) / (most - 2))] for i in range(most - 1)}
    return sorted(among | {needed})
