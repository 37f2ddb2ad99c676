"""What turns token ids into what a base model reads: its tokenizer and embedding table, and all that tells it from
others. It computes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from softprompt.errors import ConfigError, DataError
from softprompt.text.tokens import SOFT, Tokens

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What the types that models compute in are called."""


@dataclass(eq=False, repr=False)
class Embedder:
    """The part of a base model before its layers.

    Attributes:
        name: the id it was loaded by.
        tokenizer: transformers' own.
        embedding: the vector that each token feeds into the model, ``[V, H]``.
        window: the most tokens in one sequence.
        fingerprint, tokenizer_fingerprint: hex digests that a soft prompt remembers.
        settings: the settings of its configuration that change what it computes (``model_settings``).
        generation_config: transformers' own; says which tokens end a text. None where the model has none.
        quantized: what its linear layers are quantised to; empty: they are not.
        decoder_start: of an encoder–decoder, the tokens that its decoder begins with; empty for a causal language
            model.
    """

    name: str
    tokenizer: Any
    embedding: torch.Tensor
    window: int
    fingerprint: str
    tokenizer_fingerprint: str
    settings: Mapping[str, Any]
    generation_config: Any
    decoder_start: Tokens = ()
    quantized: str = ""

    @classmethod
    def of(cls, model: Embedder, *, own_table: bool = False) -> Embedder:
        """That of a base model, with a tokenizer of its own, since one is not made for several threads.

        Args:
            model: a base model.
            own_table: copy the embedding table, so that nothing of the model needs to stay: its table may be a view
                into the whole file.
        """
        parts = {name: getattr(model, name) for name in cls.__dataclass_fields__}
        found = cls(**parts | {"tokenizer": copy.deepcopy(model.tokenizer)})
        return replace(found, embedding=found.embedding.detach().clone()) if own_table else found

    @property
    def hidden_size(self) -> int:
        """``H``, the width of a token embedding."""
        return int(self.embedding.shape[1])

    @cached_property
    def embedding_rms(self) -> float:
        """Root mean square of the table's elements, the unit of learning rates and random initialisations."""
        return float(self.embedding.float().square().mean().sqrt())

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.embedding.dtype

    @property
    def precision(self) -> str:
        """What the model's linear layers are stored in: ``nf4``, ``int8`` …, or its dtype, such as ``bf16``."""
        return self.quantized or DTYPE_NAMES[self.dtype]

    @property
    def encoder_decoder(self) -> bool:
        """Whether an encoder reads the input, and a decoder writes the target."""
        return bool(self.decoder_start)

    @property
    def reads_parts(self) -> bool:
        """Whether layers get more of a token than its embedding, see ``per_layer``."""
        return bool(self.settings.get("hidden_size_per_layer_input"))

    @property
    def end_tokens(self) -> frozenset[int]:
        """The end-of-sequence tokens, of the tokenizer and of what the model says about generation."""
        said = getattr(self.generation_config, "eos_token_id", None)
        ends = said if isinstance(said, list) else [said]
        return frozenset(token for token in (*ends, self.tokenizer.eos_token_id) if token is not None)

    def require_embeddings(self, ids: Sequence[int], where: str = "") -> None:
        """Raises a ``DataError`` at a token that the tokenizer knows and the embedding table has no row for."""
        rows, token = len(self.embedding), max(ids, default=0)
        if token >= rows:
            raise DataError(
                f"{f'{where}: e' if where else 'E'}xpected tokens that the base model {self.name} knows, found "
                f"{self.tokenizer.convert_ids_to_tokens(token)!r}, number {token} of its tokenizer, but its embedding "
                f"table has {rows} rows; leave it out, or resize the table (model.resize_token_embeddings), save the "
                "model and give that."
            )

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """What tokens feed into the model: ``[…, H]`` of int64 ids ``[…]``."""
        return nn.functional.embedding(ids, self.embedding)

    def embed(self, ids: Sequence[int], vectors: torch.Tensor | None) -> torch.Tensor:
        """Embeddings ``[T, H]`` of ``ids`` in the model's dtype, with ``vectors`` in the place of ``SOFT``."""
        return self._placed(ids, vectors, self.look_up)

    def _placed(
        self,
        ids: Sequence[int],
        vectors: torch.Tensor | None,
        of_tokens: Callable[[torch.Tensor], torch.Tensor],
        of_vectors: Callable[[torch.Tensor], torch.Tensor] = lambda vectors: vectors,
    ) -> torch.Tensor:
        """What is made of tokens, and of vectors in the place of ``SOFT``, one after the other."""
        device, pieces, start = self.embedding.device, [], 0
        for place in [i for i, token in enumerate(ids) if token == SOFT] + [len(ids)]:
            pieces.append(of_tokens(torch.tensor(ids[start:place], dtype=torch.long, device=device)))
            if place < len(ids):
                assert vectors is not None, "a request with a soft prompt's place names its soft prompt"
                if vectors.dim() != 2:
                    raise ConfigError(
                        "A trained prefix must stand before all input, the input must not be empty, and the base model "
                        "must compute a prefix once; use a plain soft prompt."
                    )
                pieces.append(of_vectors(vectors.to(device, self.dtype)))
            start = place + 1
        return torch.cat(pieces)


def tokens_of(lm: Embedder, text: str) -> list[int]:
    """The text's token ids, without special tokens around them.

    Raises:
        DataError: the embedding table has no row for one.
    """
    ids: list[int] = lm.tokenizer(text, add_special_tokens=False).input_ids
    lm.require_embeddings(ids)
    return ids
