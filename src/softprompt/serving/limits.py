"""What the server may use. The command line shows these numbers, so nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from softprompt.errors import ConfigError

if TYPE_CHECKING:
    from softprompt.model.embedder import Embedder


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine may use.

    Attributes:
        rows: the most continuations in one forward pass.
        tokens: the most tokens that the rows have keys and values for, each row counted as long as the longest may
            become; also the most tokens of one request. It bounds memory, and what padding costs.
        waiting: the most requests that wait; more are refused.
        seconds: what a request may take, waiting included.
        prefix_bytes: the most bytes of prefixes to keep.
    """

    rows: int = 32
    tokens: int = 32_768  # generation.decoder.KV_TOKENS, which needs torch
    waiting: int = 256
    seconds: float = 120.0
    prefix_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("rows", "tokens", "waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"The server's limit on {name} must be at least 1, not {getattr(self, name)}.")
        if not self.seconds > 0:
            raise ConfigError(f"The server's limit on seconds must be above 0, not {self.seconds}.")
        if self.prefix_bytes < 0:
            raise ConfigError(f"The server's limit on prefix_bytes must be 0 or more, not {self.prefix_bytes}.")

    def window(self, lm: Embedder) -> int:
        """The most tokens of one request, input and output."""
        return min(lm.window, self.tokens)
