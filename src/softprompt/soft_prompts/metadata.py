"""What one must know to use a soft prompt, without its numbers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What one must know to use a soft prompt.

    Attributes:
        name: what the user calls it.
        base: id of the base model it was tuned on (``smollm2-135m``, a hub id or a path).
        base_fingerprint: hex digest of that model's type and weights (``FrozenLM.fingerprint``).
        tokenizer_fingerprint: hex digest of its tokenizer (``FrozenLM.tokenizer_fingerprint``).
        template: text of the ``Template`` it was tuned with.
        verbalizer: label → words, or None for free-text targets.
        word_end: whether it was tuned with an end behind each label's word, as labels need of which one begins with
            another; False for free text and other labels, and in files of releases that had no ends.
        parametrisation: what it was folded from; ``"plain"`` for free vectors, ``"prefix"`` for a trained KV prefix
            or a trained state.
        training: the training configuration and what came of it (steps, seconds, tokens), JSON values only.
        data: fingerprints and row counts of the training and validation data, JSON values only.
        metrics: one dict a metric: ``{"split", "metric", "value", "stderr", "n"}``.
        versions: library → version at creation.
        created: time of creation, ISO 8601 with zone.
        base_settings: the settings of the base model's configuration that change what it computes, JSON values by name
            (``FrozenLM.settings``); empty in files of earlier releases.
        parts: where the numbers are of several tensors, the shape of each by name, in the order of the numbers: those
            of a trained state; or ``soft_prompt`` ``(P, H)`` and ``decoder_soft_prompt`` ``(N, H)``, which stands
            before the decoder's input of an encoder–decoder. Empty for all other soft prompts.
        quantized: what that model's linear layers were quantised to, such as ``nf4``; empty: they were not, or the file
            is of an earlier release.
    """

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
    quantized: str = ""
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What its numbers are, in words: ``soft prompt``, ``soft prompt of encoder and decoder``, ``trained KV
        prefix`` or ``trained state``."""
        if self.parametrisation != "prefix":
            return "soft prompt of encoder and decoder" if self.parts else "soft prompt"
        return "trained state" if self.parts else "trained KV prefix"

    @property
    def decoder_virtual_tokens(self) -> int:
        """How many virtual tokens stand before the decoder's input of an encoder–decoder."""
        return self.parts.get(AHEAD, (0,))[0]


@dataclass(frozen=True, kw_only=True)
class Header(Metadata):
    """What a soft prompt's file says, except its numbers.

    Attributes:
        sizes: as :attr:`SoftPrompt.sizes`.
    """

    sizes: Mapping[str, int]

    @property
    def num_virtual_tokens(self) -> int:
        """``P``."""
        return self.sizes["num_virtual_tokens"]


def size_names(parametrisation: str) -> tuple[str, ...]:
    """What the sizes of a soft prompt's numbers are called; the 2 for keys and values goes without a name."""
    if parametrisation == "prefix":
        return ("num_virtual_tokens", "num_layers", "num_kv_heads", "head_dim")
    return ("num_virtual_tokens", "hidden_size")


def sizes_of(soft_prompt: Metadata, shape: Sequence[int]) -> dict[str, int]:
    """The sizes of a soft prompt's numbers of that shape, by name."""
    if soft_prompt.parts:
        width = {} if soft_prompt.parametrisation == "prefix" else {"hidden_size": shape[1]}
        return {"num_virtual_tokens": virtual_tokens(soft_prompt.parts)} | width
    return dict(zip(size_names(soft_prompt.parametrisation), (*shape[:2], *shape[3:]), strict=True))


def virtual_tokens(parts: Mapping[str, Sequence[int]]) -> int:
    """How many places its tensors take in a sequence, those before a decoder's input apart; a state without keys and
    values takes none."""
    return next((shape[0] for name, shape in parts.items() if name.endswith((".keys", ".values")) or name == MAIN), 0)


MAIN, AHEAD = "soft_prompt", "decoder_soft_prompt"
"""What the vectors of an encoder–decoder's encoder and decoder are called in a file."""


def start_length(one: Metadata, num_virtual_tokens: int) -> int:
    """How many virtual tokens a training has that goes on from a soft prompt of so many: as many, or where a state
    takes no place in a sequence, as many as it began from."""
    return num_virtual_tokens or int(one.training.get("num_virtual_tokens") or 1)


def library_versions() -> dict[str, str]:
    """Versions of what a training's numbers depend on."""
    return {name: importlib.metadata.version(name) for name in ("softprompt", "torch", "transformers")}
