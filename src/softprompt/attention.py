"""Attention over a prefix that rows share: the one place where we stand inside a transformers model.

A row's tokens attend to the keys and values of their shared prefix and, causally, to each other. Transformers gives
every
architecture the same attention call (``AttentionInterface``) and hands extra keyword arguments of the model's
``forward`` down to
it, so one function serves all of them; a hook on each decoder layer picks that layer's part of the prefix. Without a
prefix the function
is transformers' own ``sdpa``.

Plain matrix products instead of ``scaled_dot_product_attention``: at the lengths of classification and short
generation the
backward of PyTorch's CPU flash attention takes about a quarter of a training step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NAME = "softprompt"


@dataclass(frozen=True)
class PrefixKV:
    """Keys and values of ``K`` shared prefixes in every layer.

    Attributes:
        keys: a tensor ``[K, H_kv, P, D]`` for each layer, in the model's dtype, after any rotary embedding; prefixes
            shorter than
            the longest are padded on the right.
        values: likewise.
        lengths: the length in tokens of each prefix, ``K`` of them.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        """Length in tokens of the longest prefix."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(t.nbytes for t in (*self.keys, *self.values))


def stack_prefixes(prefixes: list[PrefixKV]) -> PrefixKV:
    """Stands prefixes of any lengths beside each other, padded on the right to the longest."""
    if len(prefixes) == 1:
        return prefixes[0]
    width = max(p.width for p in prefixes)

    def stack(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([nn.functional.pad(t, (0, 0, 0, width - t.shape[2])) for t in parts])

    layers = range(len(prefixes[0].keys))
    return PrefixKV(
        keys=tuple(stack([p.keys[i] for p in prefixes]) for i in layers),
        values=tuple(stack([p.values[i] for p in prefixes]) for i in layers),
        lengths=tuple(n for p in prefixes for n in p.lengths),
    )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Softmax attention with grouped queries.

    Args:
        query: ``[B, H_q, T, D]``.
        key: ``[B, H_kv, S, D]``; ``H_q`` is a multiple of ``H_kv``.
        value: ``[B, H_kv, S, D]``.
        mask: additive, ``[B, 1, T, S]`` in the query's dtype; the dtype's minimum where a token may not look.
        scaling: factor on the scores.

    Returns:
        ``[B, T, H_q, D]``.
    """
    batch, heads, tokens, width = query.shape
    kv_heads, span = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * tokens, width)
    scores = torch.matmul(grouped, key.transpose(2, 3)).view(batch, heads, tokens, span)
    weights = torch.softmax((scores * scaling + mask).float(), dim=-1).to(value.dtype)
    out = torch.matmul(weights.view(batch, kv_heads, -1, span), value)
    return out.view(batch, heads, tokens, width).transpose(1, 2)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    prefix_layer: tuple[torch.Tensor, torch.Tensor] | None = None,
    prefix_rows: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention call; ``attention_mask`` is ``[B, 1, T, P + S]`` when there is a prefix."""
    if prefix_layer is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    prefix_key, prefix_value = prefix_layer
    if prefix_rows is not None:
        prefix_key, prefix_value = prefix_key[prefix_rows], prefix_value[prefix_rows]
    batch = query.shape[0]
    key = torch.cat([prefix_key.expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([prefix_value.expand(batch, -1, -1, -1), value], dim=2)
    assert attention_mask is not None
    return attend(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def _pick_layer(index: int) -> Any:
    """A forward pre-hook that turns ``prefix=PrefixKV`` into this layer's ``prefix_layer=(keys, values)``."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        prefix = kwargs.pop("prefix", None)
        if prefix is not None:
            kwargs["prefix_layer"] = (prefix.keys[index], prefix.values[index])
        return args, kwargs

    return hook


def install(model: nn.Module, layers: nn.ModuleList) -> None:
    """Makes ``model`` (a transformers model with decoder ``layers``) accept ``prefix=`` and ``prefix_rows=`` in its
    forward."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(_pick_layer(index), with_kwargs=True)
