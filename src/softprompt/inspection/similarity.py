"""How alike soft prompts of one base model are: which task is near which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softprompt.errors import missing_library
from softprompt.inspection.statistics import LEVEL, SEED, adjusted, plain
from softprompt.inspection.vocabulary import Vocabulary

PAIR_DRAWS = 200
"""Random pairs that each pair is compared with."""

MEASURES = ("average_cosine", "token_cosine", "alignment")


@dataclass(frozen=True)
class Pair:
    """How alike two soft prompts are, by three measures.

    ``average_cosine`` is the cosine between the means of their virtual tokens, ``token_cosine`` the mean cosine over
    all pairs of virtual tokens (both from SPoT, Vu et al. 2022), ``alignment`` the mean over virtual tokens of the
    cosine with the other's nearest one, averaged over both directions.

    Attributes:
        first, second: their names.
        values: measure → its value, in [-1, 1].
        random: measure → what the share ``level`` of random pairs reaches: each virtual token drawn anew with its norm
            and profile (``Vocabulary.random_like``).
        q: measure → the share of random pairs as alike, adjusted for all pairs.
    """

    first: str
    second: str
    values: Mapping[str, float]
    random: Mapping[str, float]
    q: Mapping[str, float]


@dataclass(frozen=True)
class Merge:
    """A branch of the tree.

    Attributes:
        left, right: the names that are joined.
        height: mean distance between them, 1 − ``average_cosine``.
    """

    left: tuple[str, ...]
    right: tuple[str, ...]
    height: float


@dataclass(frozen=True)
class Similarity:
    """How alike several soft prompts are.

    Attributes:
        names: of the soft prompts.
        pairs: every two of them.
        tree: average linkage over 1 − ``average_cosine``, the nearest first.
        draws, seed, level: of the null.
    """

    names: tuple[str, ...]
    pairs: tuple[Pair, ...]
    tree: tuple[Merge, ...]
    draws: int
    seed: int
    level: float

    def matrix(self, measure: str) -> NDArray[np.float64]:
        """A measure as a symmetric matrix, float64 ``[K, K]``, 1 on the diagonal."""
        return _matrix(self.names, self.pairs, measure)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(plain(self))


def measures(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """``average_cosine``, ``token_cosine``, ``alignment`` (see ``Pair``) of float32 ``[P_a, H]`` and ``[P_b, H]``."""
    units = [torch.nn.functional.normalize(each, dim=1) for each in (a, b)]
    cosines = units[0] @ units[1].T
    return {
        "average_cosine": float(torch.nn.functional.cosine_similarity(a.mean(dim=0), b.mean(dim=0), dim=0)),
        "token_cosine": float(cosines.mean()),
        "alignment": float((cosines.amax(dim=1).mean() + cosines.amax(dim=0).mean()) / 2),
    }


def similarity(
    soft_prompts: Mapping[str, torch.Tensor],
    vocabulary: Vocabulary,
    *,
    draws: int = PAIR_DRAWS,
    seed: int = SEED,
    level: float = LEVEL,
) -> Similarity:
    """Compares every two soft prompts.

    Soft prompts that were trained from the same start are alike for that alone: compare what training added to it, too.

    Args:
        soft_prompts: name → float32 ``[P, H]``, two or more of one base model; P may differ.
        vocabulary: of the base model.
        draws: random pairs.
        seed: seeds them.
        level: false discovery rate.
    """
    names = tuple(soft_prompts)
    places = list(combinations(names, 2))
    values = {place: measures(*(soft_prompts[name] for name in place)) for place in places}
    null: dict[tuple[str, str], list[dict[str, float]]] = {place: [] for place in places}
    drawn = {
        name: vocabulary.random_like(of, draws * len(of), seed + i) for i, (name, of) in enumerate(soft_prompts.items())
    }
    for draw in range(draws):
        random = {name: drawn[name][draw * len(of) : (draw + 1) * len(of)] for name, of in soft_prompts.items()}
        for place in places:
            null[place].append(measures(*(random[name] for name in place)))
    q: dict[str, list[float]] = {}
    for measure in MEASURES:
        reached = [sum(each[measure] >= values[place][measure] for each in null[place]) for place in places]
        q[measure] = adjusted([(1 + times) / (draws + 1) for times in reached])
    pairs = tuple(
        Pair(
            *place,
            values=values[place],
            random={m: float(np.quantile([each[m] for each in null[place]], 1 - level)) for m in MEASURES},
            q={m: q[m][i] for m in MEASURES},
        )
        for i, place in enumerate(places)
    )
    return Similarity(names, pairs, _tree(names, pairs), draws, seed, level)


def _matrix(names: tuple[str, ...], pairs: tuple[Pair, ...], measure: str) -> NDArray[np.float64]:
    found = np.eye(len(names))
    for pair in pairs:
        i, j = names.index(pair.first), names.index(pair.second)
        found[i, j] = found[j, i] = pair.values[measure]
    return found


def linkage(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """SciPy's average linkage of a symmetric matrix ``[K, K]``: float64 ``[K - 1, 4]``.

    Raises:
        ConfigError: SciPy is not installed.
    """
    try:
        from scipy.cluster import hierarchy
        from scipy.spatial.distance import squareform
    except ImportError as error:
        raise missing_library("Comparing soft prompts", "scipy", "softprompt[compare]") from error
    found: NDArray[np.float64] = hierarchy.linkage(squareform(distances, checks=False), "average")
    return found


def _tree(names: tuple[str, ...], pairs: tuple[Pair, ...]) -> tuple[Merge, ...]:
    groups: list[tuple[str, ...]] = [(name,) for name in names]
    merges = []
    for left, right, height, _ in linkage(1 - _matrix(names, pairs, "average_cosine")):
        merges.append(Merge(groups[int(left)], groups[int(right)], float(height)))
        groups.append((*groups[int(left)], *groups[int(right)]))
    return tuple(merges)
