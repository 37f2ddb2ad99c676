"""Which rows are learned from, and in which order."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch

from softprompt.data.example import Dataset, Example
from softprompt.errors import DataError
from softprompt.tuning.config import TrainConfig


class Order(Protocol):
    """Which rows each step learns from.

    Attributes:
        rows: how many rows an epoch has.
    """

    rows: int

    def batch(self, seed: int, step: int, size: int) -> list[int]:
        """Indices of the rows of a step, a function of the arguments alone.

        Args:
            seed: seeds the order.
            step: from 0; consecutive steps take consecutive parts of each epoch.
            size: how many rows a step has.
        """


class RowOrder:
    """Every row once an epoch, in random order, but with each kind of row spread evenly over the epoch.

    An epoch is cut into as many equal parts as a label has rows, and each part gets one of them, at a random place in
    it. So a batch holds the labels nearly as often as the whole data does, and a step's gradient is not that of a
    chance mix of them: stratified batches (after Zhao and Zhang 2014, arXiv:1405.3080, who make strata by clustering
    and also choose how many rows to draw of each; ours are the labels, in proportion to their size). Where all rows
    are of one kind, the order is random.

    The answers of a conversation follow each other, so that a step can share what they begin with. The order is then
    one of conversations. A conversation that reaches beyond the end of a step goes on in the next one.

    Attributes:
        rows: how many rows an epoch has.
    """

    def __init__(self, kinds: Sequence[Hashable], conversations: Sequence[str] | None = None) -> None:
        """
        Args:
            kinds: what kind each row is, its label for instance; at least one row.
            conversations: which conversation each row is an answer of, empty for none; None where there are none. One
                is of the kind of its first row.
        """
        together: dict[str | int, list[int]] = {}
        for row in range(len(kinds)):
            together.setdefault((conversations[row] if conversations else "") or row, []).append(row)
        self._together = list(together.values())
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        self._kinds = torch.tensor([numbers[kinds[rows[0]]] for rows in self._together])
        self.rows = len(kinds)
        self._kept: tuple[tuple[int, int], list[int]] | None = None

    @classmethod
    def of(cls, examples: Sequence[Example], *, labelled: bool) -> RowOrder:
        """The order of examples; of each label, if they have labels, about as many in each batch."""
        return cls(
            [example.target if labelled else None for example in examples],
            ["" if example.conversation is None else example.conversation.origin for example in examples],
        )

    def batch(self, seed: int, step: int, size: int) -> list[int]:
        """As :meth:`Order.batch`."""
        chosen: list[int] = []
        while len(chosen) < size:
            epoch, offset = divmod(step * size + len(chosen), self.rows)
            chosen += self._epoch(seed, epoch)[offset : offset + size - len(chosen)]
        return chosen

    def _epoch(self, seed: int, epoch: int) -> list[int]:
        """All rows in the order of that epoch, counted from 0; the last one is kept."""
        if self._kept is None or self._kept[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            shuffled = torch.randperm(len(self._kinds), generator=generator)
            kinds = self._kinds[shuffled]
            sizes = kinds.bincount()
            grouped = kinds.argsort(stable=True)
            rank = torch.empty_like(kinds)  # of a row among those of its kind
            rank[grouped] = torch.arange(len(kinds)) - (sizes.cumsum(0) - sizes)[kinds[grouped]]
            chance = torch.rand(len(kinds), generator=generator, dtype=torch.float64)
            places = (rank + chance) / sizes[kinds]
            order = shuffled[places.argsort(stable=True)].tolist()
            self._kept = (seed, epoch), [row for number in order for row in self._together[number]]
        return self._kept[1]


def split_rows(
    train: Dataset, validation: Dataset | None, config: TrainConfig
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Training and validation examples; without validation data, a seeded tenth of the training data is held back, and
    all answers of a conversation together."""
    generator = torch.Generator().manual_seed(config.seed)
    pool = train.examples if validation is None else validation.examples
    order = torch.randperm(len(pool), generator=generator).tolist()
    if validation is not None:
        return train.examples, [pool[i] for i in sorted(order[: config.validation_rows])]
    if len(pool) < 2:
        raise DataError(
            f"{train.source} has {len(pool)} row, but training needs at least 2 when no validation data is given; "
            "add rows or give --validation"
        )
    held = set(held_rows(pool, order, min(config.validation_rows, max(1, len(pool) // 10))))
    if len(held) == len(pool):
        raise DataError(
            f"{train.source} has one conversation, but training needs at least 2 when no validation data is given; "
            "add some or give --validation"
        )
    return [e for i, e in enumerate(pool) if i not in held], [pool[i] for i in sorted(held)]


def held_rows(pool: Sequence[Example], order: Sequence[int], number: int) -> list[int]:
    """The first ``number`` rows of an order; of conversations, all answers of the first, until they are so many."""
    of_conversation: dict[str, list[int]] = {}
    for index in order:
        conversation = pool[index].conversation
        of_conversation.setdefault(str(index) if conversation is None else conversation.origin, []).append(index)
    held: list[int] = []
    for several in of_conversation.values():
        if len(held) >= number:
            break
        held += several
    return held


def describe_rows(train: Dataset, validation: Dataset | None, rows: int, held_out: int) -> dict[str, Any]:
    """What a soft prompt remembers of its data: where they came from, what they were, how many were used."""
    return {
        "train": {
            "source": train.source,
            "fingerprint": train.fingerprint,
            "rows": rows,
            **({"chat": True} if train.is_chat else {}),
        },
        **({"label_names": dict(train.label_names)} if train.label_names else {}),
        "validation": {
            "source": f"held out of {train.source}" if validation is None else validation.source,
            "fingerprint": (validation or train).fingerprint,
            "rows": held_out,
        },
    }
