"""What can be read off a soft prompt's vectors with the embedding table alone, each figure beside its null.

Nothing here needs a forward pass. What the base model does with a soft prompt is in ``ablation.py`` and
``behaviour.py``, the comparison of several in ``similarity.py``; ``vocabulary.py`` says what the null is.

A soft prompt that lies near a text does not say that text: prompts of equal score can be pulled to lie near any text
(Khashabi et al. 2022, "Prompt Waywardness"). What lies near is a description, not an explanation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softprompt.config import INITS, TrainConfig
from softprompt.errors import ConfigError
from softprompt.prompt import SoftPrompt
from softprompt.task import Task
from softprompt.train import first_vectors
from softprompt.vocabulary import Vocabulary

LEVEL = 0.05
"""False discovery rate of everything that is called significant."""
DRAWS = 1000
"""Random vectors that p-values are taken from; the smallest p-value is 1 / (DRAWS + 1)."""
SAME = 0.9999
"""The cosine from which on two directions are one: a training starts from embeddings, but not at their length."""
TIGHTNESS_DRAWS = 100
"""Of these, how many the tightness of random vectors' neighbours is taken from."""
SEED = 0
NEAREST = 5
"""Neighbours that are listed (Lester et al. 2021, §7)."""

WAYWARD = (
    "What lies near is no translation: a soft prompt can be trained to lie near any text at all and score within 2 % "
    "of the best (Khashabi et al. 2022, Prompt Waywardness)."
)


def tail(deviations: float) -> float:
    """Chance that a standard normal number is larger."""
    return math.erfc(deviations / math.sqrt(2)) / 2


def adjusted(p: Sequence[float]) -> list[float]:
    """Each p-value as the smallest false discovery rate at which it counts (Benjamini and Hochberg 1995).

    Calling those at most ``q`` significant keeps the expected share of false ones among them at most ``q``; where
    nothing is true, the chance of any at all.
    """
    values: NDArray[np.float64] = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)[::-1]
    ranks = np.arange(len(values), 0, -1)
    q = np.empty(len(values))
    q[order] = np.minimum.accumulate(values[order] * len(values) / ranks)
    return [float(value) for value in np.minimum(q, 1.0)]


def plain(value: Any) -> Any:
    """Dataclasses, sequences and numbers as JSON values; None for a number that is not finite."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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


# --- the start, norms and drift ------------------------------------------------------------------


def starting_vectors(task: Task, soft_prompt: SoftPrompt) -> tuple[torch.Tensor | None, str]:
    """What the training started from, made again from its record.

    Returns:
        float32 ``[P, H]`` and what they are; or None and why they are not known.
    """
    record = soft_prompt.training
    if record.get("init") not in INITS:
        init = record.get("init")
        return None, f"its record names the start {init!r}, which is no rule" if init else "its record does not say"
    names = ("num_virtual_tokens", "init", "init_text", "seed")
    if not all(name in record for name in names) or ("start" not in record and record.get("starts", 1) != 1):
        return None, f"its record of the start {record['init']!r} is incomplete"
    number = record.get("start", 0)
    try:
        kept = {name: record[name] for name in names} | {"init_scale": record.get("init_scale", 1.0)}
        config = TrainConfig(**kept, lengths=record.get("lengths", ()))
        vectors = first_vectors(task, config, number)
    except (ConfigError, TypeError) as error:
        return None, f"its record of the start {record['init']!r} cannot be followed ({error})"
    described = f"init {config.init}, seed {config.seed + config.start(number)[1]}"
    return vectors, f"made again from the training record: {described}"


@dataclass(frozen=True)
class Moved:
    """How far a virtual token went from where it started.

    Attributes:
        start: the token that it started as; None if it was none.
        start_norm: norm of the start.
        distance: from the start.
        cosine: with the start.
        random_cosine: the cosine that a step of that length in a random direction leaves.
        rank: how near the start is among all tokens by cosine; 1 if no token is nearer.
        excess: of the start in the virtual token (``Vocabulary.excess``).
        p: chance of that excess in a random vector.
        q: p adjusted for all virtual tokens.
        kept: whether q is at most the level: the start can still be told from the vector.
    """

    start: Near | None
    start_norm: float
    distance: float
    cosine: float
    random_cosine: float
    rank: int
    excess: float
    p: float
    q: float
    kept: bool


@dataclass(frozen=True)
class Norms:
    """Norms beside the embedding table's, and how far each vector went.

    Attributes:
        norms: of each virtual token.
        shares: the share of embeddings with a smaller norm, for each virtual token, in [0, 1].
        table: quantile → norm of the embedding table (0, 0.05, 0.5, 0.95, 1).
        moved: one a virtual token; empty if the start is not known.
        start: what the start is, or why it is not known.
        level: false discovery rate.
    """

    norms: tuple[float, ...]
    shares: tuple[float, ...]
    table: Mapping[float, float]
    moved: tuple[Moved, ...]
    start: str
    level: float

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(plain(self))


def norms(
    vectors: torch.Tensor,
    vocabulary: Vocabulary,
    start: torch.Tensor | None = None,
    *,
    about_start: str = "",
    level: float = LEVEL,
) -> Norms:
    """Norms of the virtual tokens, and what is left of their start.

    Args:
        vectors: float32 ``[P, H]``.
        vocabulary: of the base model.
        start: float32 ``[P, H]``, if known.
        about_start: what the start is, or why it is not known.
        level: false discovery rate.
    """
    table = vocabulary.norms().sort().values
    lengths = vectors.norm(dim=1)
    return Norms(
        norms=tuple(lengths.tolist()),
        shares=tuple((torch.searchsorted(table, lengths) / len(table)).tolist()),
        table={q: float(table[round(q * (len(table) - 1))]) for q in (0.0, 0.05, 0.5, 0.95, 1.0)},
        moved=() if start is None else _moved(vectors, start, vocabulary, level),
        start=about_start,
        level=level,
    )


def _moved(vectors: torch.Tensor, start: torch.Tensor, vocabulary: Vocabulary, level: float) -> tuple[Moved, ...]:
    values, tokens = vocabulary.nearest(start, 1, ("cosine",))["cosine"]
    excess = vocabulary.excess(vectors, start).diagonal().tolist()
    p = [tail(value) for value in excess]
    q = adjusted(p)
    rank = vocabulary.rank(vectors, start).tolist()
    start_norm, distance = start.norm(dim=1), (vectors - start).norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(vectors, start, dim=1).tolist()
    random_cosine = (start_norm / torch.hypot(start_norm, distance).clamp_min(1e-12)).tolist()
    return tuple(
        Moved(
            start=Near(int(tokens[i, 0]), vocabulary.text(int(tokens[i, 0])), 1.0) if values[i, 0] > SAME else None,
            start_norm=float(start_norm[i]),
            distance=float(distance[i]),
            cosine=cosine[i],
            random_cosine=random_cosine[i],
            rank=rank[i],
            excess=excess[i],
            p=p[i],
            q=q[i],
            kept=q[i] <= level,
        )
        for i in range(len(vectors))
    )


# --- the map -------------------------------------------------------------------------------------


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
