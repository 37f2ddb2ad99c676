"""How many virtual tokens a soft prompt has where nobody says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from softprompt.model.embedder import tokens_of

if TYPE_CHECKING:
    from softprompt.model.embedder import Embedder


VIRTUAL_TOKENS = 64
"""P by default: four of the blocks of 16 tokens that servers cache."""

LONGEST_LIST = 1024
"""The longest list of labels, in tokens, that P grows to."""


def label_list(lm: Embedder, labels: Sequence[str]) -> str:
    """The line of text that names all labels; without commas where it would take more than ``VIRTUAL_TOKENS`` with
    them, since every virtual token costs time in each step."""
    line = f"Options: {', '.join(labels)}.\n"
    return line if len(tokens_of(lm, line)) <= VIRTUAL_TOKENS else f"Options: {' '.join(labels)}.\n"


def default_num_virtual_tokens(lm: Embedder, labels: Sequence[str]) -> int:
    """P where nobody says: ``VIRTUAL_TOKENS``, or in whole blocks of 16 as many as spell out the labels, to start from
    them: a soft prompt learns many labels in far fewer steps if it names them all. A list of more than
    ``LONGEST_LIST`` tokens or a quarter of the model's window is too dear and not spelled out."""
    needed = len(tokens_of(lm, label_list(lm, labels)))
    if needed > min(LONGEST_LIST, lm.window // 4):
        return VIRTUAL_TOKENS
    return max(VIRTUAL_TOKENS, 16 * math.ceil(needed / 16))
