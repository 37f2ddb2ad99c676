"""Virtual tokens among the vocabulary, in a plane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from softprompt.inspection.statistics import SEED, plain
from softprompt.inspection.vocabulary import Vocabulary


@dataclass(frozen=True)
class Map:
    """Points of a plane.

    Attributes:
        tokens: ids of the sampled tokens.
        vocabulary: a point for each of them.
        virtual: a point for each virtual token.
        start: a point for each virtual token's start; empty if not known.
        random: a point for each of P random vectors of the same norms and profiles.
        shown: the share of the virtual tokens' spread that the plane shows, in [0, 1].
        shown_vocabulary: the same for the sampled tokens.
    """

    tokens: tuple[int, ...]
    vocabulary: tuple[tuple[float, float], ...]
    virtual: tuple[tuple[float, float], ...]
    start: tuple[tuple[float, float], ...]
    random: tuple[tuple[float, float], ...]
    shown: float
    shown_vocabulary: float

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(plain(self))


def plane(
    vectors: torch.Tensor,
    vocabulary: Vocabulary,
    start: torch.Tensor | None = None,
    *,
    sample: int = 1500,
    seed: int = SEED,
) -> Map:
    """Virtual tokens among the vocabulary in the plane of the two strongest principal axes.

    All vectors are scaled to length 1 first, since virtual tokens are often several times as long as embeddings; the
    axes are those of the virtual tokens and of the sampled tokens, both groups with the same weight.

    Args:
        vectors: float32 ``[P, H]``.
        vocabulary: of the base model.
        start: float32 ``[P, H]``, if known.
        sample: tokens of the vocabulary to show, a seeded choice.
        seed: seeds the choice and the random vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(vocabulary.size, generator=generator)[:sample].sort().values.tolist()
    sets = {
        "vocabulary": vocabulary[tokens],
        "virtual": vectors,
        "random": vocabulary.random_like(vectors, len(vectors), seed),
        "start": vectors[:0] if start is None else start,
    }
    units = {name: torch.nn.functional.normalize(of_set, dim=1) for name, of_set in sets.items()}
    middle = (units["vocabulary"].mean(dim=0) + units["virtual"].mean(dim=0)) / 2
    spread = sum((units[name] - middle).T @ (units[name] - middle) / len(units[name]) for name in list(units)[:2])
    axes = torch.linalg.eigh(torch.as_tensor(spread)).eigenvectors.T.flip(0)[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()  # the same picture on every machine

    def points(name: str) -> tuple[tuple[float, float], ...]:
        return tuple((float(x), float(y)) for x, y in ((units[name] - middle) @ axes.T).tolist())

    def shown(name: str) -> float:
        centred = units[name] - units[name].mean(dim=0)
        return float((centred @ axes.T).square().sum() / centred.square().sum().clamp_min(1e-12))

    return Map(
        tokens=tuple(tokens),
        vocabulary=points("vocabulary"),
        virtual=points("virtual"),
        start=points("start"),
        random=points("random"),
        shown=shown("virtual"),
        shown_vocabulary=shown("vocabulary"),
    )
