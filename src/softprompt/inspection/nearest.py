"""What lies near a soft prompt's vectors in the embedding table, each figure beside its null.

Nothing here needs a forward pass. What the base model does with a soft prompt is in ``ablation.py`` and
``behaviour.py``, the comparison of several in ``similarity.py``; ``vocabulary.py`` says what the null is.

A soft prompt that lies near a text does not say that text: prompts of equal score can be pulled to lie near any text
(Khashabi et al. 2022, "Prompt Waywardness"). What lies near is a description, not an explanation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from softprompt.inspection.statistics import LEVEL, SEED, adjusted, plain, tail
from softprompt.inspection.vocabulary import Vocabulary

DRAWS = 1000
"""Random vectors that p-values are taken from; the smallest p-value is 1 / (DRAWS + 1)."""

SAME = 0.9999
"""The cosine from which on two directions are one: a training starts from embeddings, but not at their length."""

TIGHTNESS_DRAWS = 100
"""Of these, how many the tightness of random vectors' neighbours is taken from."""

NEAREST = 5
"""Neighbours that are listed (Lester et al. 2021, §7)."""

WAYWARD = (
    "What lies near is no translation: a soft prompt can be trained to lie near any text at all and score within 2 % "
    "of the best (Khashabi et al. 2022, Prompt Waywardness)."
)


# --- nearest tokens ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Near:
    """A token of the vocabulary, and how near it is.

    Attributes:
        token: its id.
        text: what it writes.
        value: cosine, distance, dot product or excess, whichever was asked for.
    """

    token: int
    text: str
    value: float


@dataclass(frozen=True)
class Reading:
    """What one vector lies near to.

    Attributes:
        cosine, euclidean, dot: its nearest tokens by each measure, nearest first.
        random: measure → the nearest token's value for random vectors of its norm and profile (median of its draws).
        tightness: mean cosine between its nearest tokens by cosine.
        stands_out: the token with the largest excess (``Vocabulary.excess``), which is what is tested.
        p: share of random vectors with an excess as large, at least 1 / (draws + 1).
        q: p adjusted for all vectors of the set (``adjusted``).
        significant: whether q is at most the level.
    """

    cosine: tuple[Near, ...]
    euclidean: tuple[Near, ...]
    dot: tuple[Near, ...]
    random: Mapping[str, float]
    tightness: float
    stands_out: Near
    p: float
    q: float
    significant: bool


@dataclass(frozen=True)
class Neighbours:
    """The nearest tokens of a set of vectors.

    Attributes:
        readings: one a vector.
        groups: vectors that have at least ``shared`` of their nearest tokens by cosine in common, directly or through
            others; only groups of two or more, by their indices.
        draws, tightness_draws, seed, level: of the null.
        random_excess: the excess that the share ``level`` of the random vectors reaches.
        random_cosine: the same for the nearest token's cosine.
        random_tightness: the same for the tightness.
    """

    readings: tuple[Reading, ...]
    groups: tuple[tuple[int, ...], ...]
    shared: int
    draws: int
    tightness_draws: int
    seed: int
    level: float
    random_excess: float
    random_cosine: float
    random_tightness: float

    @property
    def significant(self) -> int:
        """How many vectors lie nearer to a token than chance explains."""
        return sum(reading.significant for reading in self.readings)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**plain(self), "significant": self.significant}


def neighbours(
    vocabulary: Vocabulary,
    *sets: torch.Tensor,
    k: int = NEAREST,
    draws: int = DRAWS,
    seed: int = SEED,
    level: float = LEVEL,
) -> tuple[Neighbours, ...]:
    """The nearest tokens of each vector, beside those of random vectors of its norm and profile.

    Args:
        vocabulary: of the base model.
        sets: float32 ``[N, H]`` each: virtual tokens, what training added to their start …; each set's p-values are
            adjusted on their own.
        k: neighbours a vector, at least 2.
        draws: random vectors that all p-values are taken from, in turn of each vector's profile. The largest excess
            hardly depends on the profile, so they are pooled.
        seed: seeds them.
        level: false discovery rate.

    Returns:
        One a set.
    """
    vectors = torch.cat(sets)
    random = vocabulary.random_like(vectors, draws, seed)
    null = vocabulary.best(random)
    loose = _tightness(vocabulary.nearest(random[:TIGHTNESS_DRAWS], k, ("cosine",))["cosine"][1], vocabulary)
    found = vocabulary.nearest(vectors, k)
    tight = _tightness(found["cosine"][1], vocabulary).tolist()
    beaten = (null["excess"][None] >= found["excess"][0][:, :1]).sum(dim=1)
    p = [(1 + times) / (draws + 1) for times in beaten.tolist()]
    median = {
        name: [float(values[i :: len(vectors)].median()) for i in range(len(vectors))] for name, values in null.items()
    }
    shared = k // 2 + 1

    def listed(measure: str, row: int) -> tuple[Near, ...]:
        values, tokens = found[measure]
        pairs = zip(tokens[row].tolist(), values[row].tolist(), strict=True)
        return tuple(Near(token, vocabulary.text(token), value) for token, value in pairs)

    def of(rows: range) -> Neighbours:
        q = adjusted([p[i] for i in rows])
        readings = tuple(
            Reading(
                cosine=listed("cosine", i),
                euclidean=listed("euclidean", i),
                dot=listed("dot", i),
                random={name: values[i] for name, values in median.items()},
                tightness=tight[i],
                stands_out=listed("excess", i)[0],
                p=p[i],
                q=q_of_row,
                significant=q_of_row <= level,
            )
            for i, q_of_row in zip(rows, q, strict=True)
        )
        return Neighbours(
            readings=readings,
            groups=_groups([{near.token for near in reading.cosine} for reading in readings], shared),
            shared=shared,
            draws=draws,
            tightness_draws=len(loose),
            seed=seed,
            level=level,
            random_excess=float(null["excess"].quantile(1 - level)),
            random_cosine=float(null["cosine"].quantile(1 - level)),
            random_tightness=float(loose.quantile(1 - level)),
        )

    ends = [sum(len(each) for each in sets[: i + 1]) for i in range(len(sets))]
    return tuple(of(range(end - len(each), end)) for end, each in zip(ends, sets, strict=True))


def _tightness(tokens: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Mean cosine between the tokens ``[N, k]`` of each row, float32 ``[N]``."""
    count, k = tokens.shape
    units = torch.nn.functional.normalize(vocabulary[tokens.flatten().tolist()], dim=1).view(count, k, -1)
    return ((units @ units.transpose(1, 2)).sum(dim=(1, 2)) - k) / (k * (k - 1))


def _groups(sets: Sequence[set[int]], shared: int) -> tuple[tuple[int, ...], ...]:
    """Connected components of two or more sets, where those with ``shared`` elements in common are connected."""
    left, groups = list(range(len(sets))), []
    while left:
        group, new = [], [left.pop(0)]
        while new:
            group += new
            new = [i for i in left if any(len(sets[i] & sets[j]) >= shared for j in new)]
            left = [i for i in left if i not in new]
        groups.append(tuple(sorted(group)))
    return tuple(group for group in groups if len(group) > 1)


# --- words ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """Where a word, such as a class label, is found in a soft prompt.

    Attributes:
        text: the word.
        virtual_token: index of the vector in which it stands out most.
        cosine: with that vector.
        rank: how near it is there among all tokens by cosine; 1 is the nearest.
        excess: see ``Vocabulary.excess``.
        p: chance that a word picked beforehand has such an excess in any of P random vectors.
        q: p adjusted for all words.
        significant: whether q is at most the level.
        at_start: whether that vector started as this word, of whatever length; None if the start is not known.
    """

    text: str
    virtual_token: int
    cosine: float
    rank: int
    excess: float
    p: float
    q: float
    significant: bool
    at_start: bool | None

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(plain(self))


def words(
    vectors: torch.Tensor,
    vocabulary: Vocabulary,
    wanted: Mapping[str, Sequence[int]],
    *,
    start: torch.Tensor | None = None,
    level: float = LEVEL,
) -> tuple[Word, ...]:
    """Looks for words that were named beforehand, such as the verbalizer's (Lester et al. 2021, §7).

    The p-value takes a word's excess in a random vector as standard normal and the vectors as independent (Šidák).

    Args:
        vectors: float32 ``[P, H]``.
        vocabulary: of the base model.
        wanted: word → its token ids; several tokens stand for the mean of their embeddings, as in class-label init.
        start: float32 ``[P, H]``, what training started from, if known.
        level: false discovery rate.
    """
    if not wanted:
        return ()
    targets = torch.stack([vocabulary[ids].mean(dim=0) for ids in wanted.values()])
    excess = vocabulary.excess(vectors, targets)
    where = excess.argmax(dim=0)
    largest = excess.amax(dim=0).tolist()
    p = [-math.expm1(len(vectors) * math.log1p(-tail(value))) for value in largest]
    q = adjusted(p)
    holders = vectors[where]
    cosine = torch.nn.functional.cosine_similarity(holders, targets, dim=1).tolist()
    rank = vocabulary.rank(holders, targets).tolist()
    places = where.tolist()
    begun = None if start is None else torch.nn.functional.cosine_similarity(start[where], targets, dim=1) > SAME
    return tuple(
        Word(
            text=text,
            virtual_token=places[i],
            cosine=cosine[i],
            rank=rank[i],
            excess=largest[i],
            p=p[i],
            q=q[i],
            significant=q[i] <= level,
            at_start=None if begun is None else bool(begun[i]),
        )
        for i, text in enumerate(wanted)
    )
