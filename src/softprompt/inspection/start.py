"""What a training started from, and how far the vectors went from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from softprompt.errors import ConfigError
from softprompt.inspection.nearest import SAME, Near
from softprompt.inspection.statistics import LEVEL, adjusted, plain, tail
from softprompt.inspection.vocabulary import Vocabulary
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.tuning.config import INITS, TrainConfig
from softprompt.tuning.start import first_vectors


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
