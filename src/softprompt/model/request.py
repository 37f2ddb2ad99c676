"""Requests to a base model, and how a continuation is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from softprompt.errors import ConfigError
from softprompt.text.tokens import SOFT, Tokens


@dataclass(frozen=True)
class Request:
    """One sequence to score or to continue.

    Attributes:
        ids: token ids; at most one ``SOFT`` stands for all vectors of the request's soft prompt.
        shared: how many leading entries do not depend on the example.
        words: continuations to score, as token ids.
        prompt: index of the request's soft prompt among those handed over with it; None for the bare base model.
        truncated: whether input text was cut to fit the window.
        ahead: how many of its soft prompt's vectors, the last ones, stand before the decoder's input of an
            encoder–decoder.
        conversation: which conversation it is an answer of, whose answers share what they begin with; empty for none.
    """

    ids: Tokens
    shared: int
    words: tuple[Tokens, ...] = ()
    prompt: int | None = None
    truncated: bool = False
    conversation: str = ""
    ahead: int = 0

    @property
    def shares_prefix(self) -> bool:
        """True if nothing behind the shared part is a soft prompt, so that the prefix can be computed once."""
        return SOFT not in self.ids[self.shared :] and len(self.ids) > self.shared


def can_share(lm: Any, request: Request, num_virtual_tokens: int) -> bool:
    """Whether the request's prefix can be computed once: where the angles of positions are others in long sequences,
    also all that stands behind it must be short enough.

    Args:
        lm: a ``FrozenLM``.
        request: with its words, or to be continued by one token.
        num_virtual_tokens: of its soft prompt.
    """
    longest = len(request.ids) + max(map(len, request.words), default=1) - 1
    longest += num_virtual_tokens - 1 if SOFT in request.ids else 0
    shares: bool = lm.shares_prefix and request.shares_prefix and longest <= lm.longest_steady
    return shares


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a continuation is chosen.

    Attributes:
        max_new_tokens: the most tokens to generate.
        temperature: 0 takes the most probable token; above, logits are divided by it and a token is drawn.
        top_p: draw from the smallest set of tokens that holds this probability, in (0, 1].
        stop: strings that end the text; they are cut off.
        skip_blank: leave out blanks and line ends at the beginning, so that no stop string is found there.
        seed: request ``i`` draws with a generator of its own, seeded with ``seed + i``, so that its text does not
            depend on its neighbours.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    skip_blank: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}")


def length_of(request: Request, soft_prompts: Sequence[torch.Tensor]) -> int:
    """How many virtual tokens the request has."""
    return 0 if request.prompt is None else len(soft_prompts[request.prompt])


def prompt_of(request: Request, soft_prompts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return None if request.prompt is None else soft_prompts[request.prompt]
