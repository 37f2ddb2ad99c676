"""A soft prompt: ``P`` vectors of the base model's embedding width, or a trained KV prefix, and what one must know to
use it."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from softprompt.errors import ConfigError

if TYPE_CHECKING:
    from softprompt.frozen import FrozenLM


VIRTUAL_TOKENS = 64
"""P by default: four of the blocks of 16 tokens that servers cache."""

LONGEST_LIST = 1024
"""The longest list of labels, in tokens, that P grows to."""


@dataclass(frozen=True, kw_only=True)
class SoftPrompt:
    """``P`` virtual tokens and their papers (Lester et al. 2021, §2; for a KV prefix Li and Liang 2021, §4).

    Attributes:
        vectors: float32 ``[P, H]`` on the CPU, finite; row ``i`` is virtual token ``i``. Of a trained KV prefix
            ``[P, L, 2, H_kv, D]``: for each virtual token the keys (after any rotary embedding) and values of every
            layer.
        name: what the user calls it.
        base: id of the base model it was tuned on (``smollm2-135m``, a hub id or a path).
        base_fingerprint: hex digest of that model's type and weights (``FrozenLM.fingerprint``).
        tokenizer_fingerprint: hex digest of its tokenizer (``FrozenLM.tokenizer_fingerprint``).
        template: text of the ``Template`` it was tuned with.
        verbalizer: label → words, or None for free-text targets.
        word_end: whether it was tuned with an end behind each label's word, as labels need of which one begins with
            another; False for free text and other labels, and in files of releases that had no ends.
        parametrisation: what it was folded from; ``"plain"`` for free vectors, ``"prefix"`` for a trained KV prefix.
        training: the training configuration and what came of it (steps, seconds, tokens), JSON values only.
        data: fingerprints and row counts of the training and validation data, JSON values only.
        metrics: one dict a metric: ``{"split", "metric", "value", "stderr", "n"}``.
        versions: library → version at creation.
        created: time of creation, ISO 8601 with zone.
        base_settings: the settings of the base model's configuration that change what it computes, JSON values by name
            (``FrozenLM.settings``); empty in files of earlier releases.
    """

    vectors: torch.Tensor
    name: str
    base: str
    base_fingerprint: str
    tokenizer_fingerprint: str
    template: str
    verbalizer: Mapping[str, tuple[str, ...]] | None = None
    word_end: bool = False
    parametrisation: str = "plain"
    training: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    base_settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_virtual_tokens(self) -> int:
        """``P``."""
        return int(self.vectors.shape[0])

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of ``vectors`` by name."""
        shape = self.vectors.shape
        return dict(zip(size_names(self.parametrisation), (*shape[:2], *shape[3:]), strict=True))


def size_names(parametrisation: str) -> tuple[str, ...]:
    """What the sizes of a soft prompt's numbers are called; the 2 for keys and values goes without a name."""
    if parametrisation == "prefix":
        return ("num_virtual_tokens", "num_layers", "num_kv_heads", "head_dim")
    return ("num_virtual_tokens", "hidden_size")


FREQUENT_TOKENS = 5000
"""How many of the vocabulary's first tokens count as frequent (Lester et al. 2021, §3.2): merges are learned most
frequent first."""


def initial_vectors(
    lm: FrozenLM,
    num_virtual_tokens: int,
    *,
    init: str,
    seed: int,
    text: str | None = None,
    label_words: Sequence[Sequence[int]] = (),
) -> torch.Tensor:
    """The vectors that a training starts from, as long as embeddings (Lester et al. 2021, §3.2).

    Args:
        lm: gives the embedding table.
        num_virtual_tokens: P.
        init: ``random``: normal with the embedding table's RMS as deviation. ``vocab``: the embeddings of P tokens
            drawn without replacement from the first ``FREQUENT_TOKENS``. ``text``: the embeddings of ``text``; a
            longer one is cut to its first P tokens, a shorter one repeated from the end backwards, so that what the
            rows follow is whole. ``labels``: one vector for each of ``label_words``, the mean of its tokens'
            embeddings, then ``vocab`` for the rest.
        seed: seeds the draws.
        text: for ``text``.
        label_words: token ids of each label's word, for ``labels``.

    Returns:
        float32 ``[P, H]`` on the CPU.

    Raises:
        ConfigError: an unknown ``init``, ``labels`` without labels, or ``text`` that is empty.
    """
    table = lm.embedding.detach()
    if init == "random":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_virtual_tokens, lm.hidden_size, generator=generator)
        return noise * lm.embedding_rms
    if init == "text":
        tokens = tokens_of(lm, text or "")
        if not tokens:
            raise ConfigError("init text needs an init_text of at least one token; give a longer one")
        while len(tokens) < num_virtual_tokens:
            tokens = (tokens + tokens)[-num_virtual_tokens:]
        return table[tokens[:num_virtual_tokens]].float().cpu()
    if init not in ("vocab", "labels"):
        raise ConfigError(f"init must be random, vocab, text or labels, not {init!r}")
    drawn = frequent_tokens(lm, seed)
    vectors = table[[drawn[i % len(drawn)] for i in range(num_virtual_tokens)]].float().cpu()
    if init == "labels":
        if not label_words:
            raise ConfigError("init labels needs class labels; give --labels, or another init")
        for row, word in zip(range(num_virtual_tokens), label_words, strict=False):
            vectors[row] = table[list(word)].float().mean(dim=0).cpu()
    return vectors


def tokens_of(lm: FrozenLM, text: str) -> list[int]:
    """The text's token ids, without special tokens around them.

    Raises:
        DataError: the embedding table has no row for one.
    """
    ids: list[int] = lm.tokenizer(text, add_special_tokens=False).input_ids
    lm.require_embeddings(ids)
    return ids


def label_list(lm: FrozenLM, labels: Sequence[str]) -> str:
    """The line of text that names all labels; without commas where it would take more than ``VIRTUAL_TOKENS`` with
    them, since every virtual token costs time in each step."""
    line = f"Options: {', '.join(labels)}.\n"
    return line if len(tokens_of(lm, line)) <= VIRTUAL_TOKENS else f"Options: {' '.join(labels)}.\n"


def default_num_virtual_tokens(lm: FrozenLM, labels: Sequence[str]) -> int:
    """P where nobody says: ``VIRTUAL_TOKENS``, or in whole blocks of 16 as many as spell out the labels, to start from
    them: a soft prompt learns many labels in far fewer steps if it names them all. A list of more than
    ``LONGEST_LIST`` tokens or a quarter of the model's window is too dear and not spelled out."""
    needed = len(tokens_of(lm, label_list(lm, labels)))
    if needed > min(LONGEST_LIST, lm.window // 4):
        return VIRTUAL_TOKENS
    return max(VIRTUAL_TOKENS, 16 * math.ceil(needed / 16))


def frequent_tokens(lm: FrozenLM, seed: int) -> list[int]:
    """The first ``FREQUENT_TOKENS`` of the vocabulary that are not special, in a seeded random order."""
    special = set(lm.tokenizer.all_special_ids)
    frequent = [t for t in range(min(len(lm.embedding), FREQUENT_TOKENS + len(special))) if t not in special]
    order = torch.randperm(len(frequent), generator=torch.Generator().manual_seed(seed)).tolist()
    return [frequent[i] for i in order]


def library_versions() -> dict[str, str]:
    """Versions of what a training's numbers depend on."""
    return {name: importlib.metadata.version(name) for name in ("softprompt", "torch", "transformers")}
