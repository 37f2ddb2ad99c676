"""What the layers of some models get of a token besides its embedding: rows of a second table, one part for each layer
(Gemma 3n, Gemma 4 E2B and E4B).

Transformers looks them up by the token's id, which a virtual token does not have. It gets what these models give an
image's or a sound's token, which has none either: the part of the padding token, number 0 in all of them.

What is read of a token lies in one row, the embedding before the parts, so that rows are joined, padded and repeated as
those of any other model.
"""

from __future__ import annotations

from typing import Any

import torch

from softprompt.model.architecture import core_of, feed


def has_parts(model: Any) -> bool:
    """Whether layers of the model get a part of their own of each token."""
    config = model.config.get_text_config()
    return bool(getattr(config, "hidden_size_per_layer_input", None)) and hasattr(
        core_of(model), "get_per_layer_inputs"
    )


def read(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """All that is read of tokens: ``[…, H]`` of int64 ids ``[…]``, or ``[…, H + E]`` where layers get parts."""
    embedded = feed(model, ids)
    if not has_parts(model):
        return embedded
    return torch.cat([embedded, core_of(model).get_per_layer_inputs(ids).flatten(-2).to(embedded.dtype)], dim=-1)


def read_virtual(model: Any, vectors: torch.Tensor) -> torch.Tensor:
    """The same of virtual tokens with these vectors ``[P, H]``, differentiable in them."""
    if not has_parts(model):
        return vectors
    padding = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    ids = torch.tensor([padding], device=vectors.device)
    parts = core_of(model).get_per_layer_inputs(ids).flatten(-2).to(vectors.dtype)
    return torch.cat([vectors, parts.expand(len(vectors), -1)], dim=-1)


def arguments(model: Any, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model's forward takes for rows ``[B, T, …]`` of what is read."""
    if not has_parts(model):
        return {"inputs_embeds": rows}
    config = model.config.get_text_config()
    width = model.get_input_embeddings().weight.shape[1]
    shape = (*rows.shape[:-1], config.num_hidden_layers, config.hidden_size_per_layer_input)
    return {"inputs_embeds": rows[..., :width], "per_layer_inputs": rows[..., width:].reshape(shape)}
