"""Attention over a prefix that rows share: the one place where we stand inside a transformers model.

A row's tokens attend to the keys and values of their shared prefix and, causally, to each other. Transformers gives
every architecture the same attention call (``AttentionInterface``) and hands extra keyword arguments of the model's
``forward`` down to it, so one function serves all of them; a hook on each decoder layer picks that layer's part of
the prefix. Without a prefix the function is transformers' own ``sdpa``.

With gradient, plain matrix products instead of ``scaled_dot_product_attention``: at the lengths of classification and
short generation the backward of PyTorch's CPU flash attention takes about a quarter of a training step. Without, it is
up to seven times faster than they are, and needs no room for the scores of long sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from softprompt.errors import BaseModelError
from softprompt.model.architecture import Family
from softprompt.model.fast.blocks import attend_blocks, block_mask

NAME = "softprompt"

INSTALLED = "_softprompt_installed"
"""The attribute of a transformers model whose layers have our hooks."""

SLIDING = "sliding_attention"
"""Transformers' name of layers whose tokens see the last few tokens only."""

CHUNKED = "chunked_attention"
"""Its name of layers whose tokens see those of the same chunk only; chunks are counted from the first position."""

WITHOUT_ATTENTION = ("linear_attention", "conv")
"""Its names of recurrent layers, whose mask is for padding on the left, of which there is none."""

WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "dropout",  # 0 outside training
        "is_causal",  # the mask says it
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""What transformers hands to attention besides, and a mask and embedded positions have taken care of."""

TEMPERATURE = "attn_temperature_tuning"
"""Transformers' name of the switch by which a layer's attention scales its queries by position."""

BLOCK = 512
"""Keys that PyTorch's attention on a CPU works on at once."""

UNDIVIDED = 192
"""As many keys and fewer are added up in one go in 16 bits; more, in parts of a size that depends on their number."""


@dataclass(frozen=True)
class Masks:
    """Makes what a transformers model takes as its attention mask, with the sliding window or chunks that some have.

    Attributes:
        window: how many tokens, itself included, a token of a sliding layer sees; None without such layers.
        chunk: how many tokens a chunk has; None without chunked layers.
        everywhere: whether all layers are of one such kind.
        dtype: the model's.
        recurrent: whether some layers are without attention.
        attention: whether some layers have attention.
        capped: whether scores are capped.
    """

    window: int | None
    chunk: int | None
    everywhere: bool
    dtype: torch.dtype
    recurrent: bool = False
    attention: bool = True
    capped: bool = False

    @classmethod
    def of(cls, config: Any, family: Family | None, dtype: torch.dtype) -> Masks:
        """Those of a model of this configuration and family. The configuration alone does not tell: some hold settings
        of the model that they were made from, which transformers does not look at."""
        windows = "none" if family is None else family.windows
        kinds = {"none": (), "every layer": (SLIDING,), "by layer_types": getattr(config, "layer_types", ())}[windows]
        window = getattr(config, "sliding_window", None) if SLIDING in kinds else None
        chunk = getattr(config, "attention_chunk_size", None) if CHUNKED in kinds else None
        recurrent = family is not None and family.recurrent
        attention = family is None or family.attention
        capped = bool(getattr(config, "attn_logit_softcapping", None))
        return cls(window, chunk, set(kinds) in ({SLIDING}, {CHUNKED}), dtype, recurrent, attention, capped)

    @property
    def fits_blocks(self) -> bool:
        """Whether ``blocks`` says the same."""
        return self.attention and not (self.recurrent or self.capped or self.chunk)

    def __call__(self, sees: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor) -> Any:
        """
        Args:
            sees: bool ``[B, T, S]``, what a token may look at, were it not for the window.
            positions: int64 ``[B, T]``, of these tokens.
            seen: int64 ``[B, S]``, of what is looked at.

        Returns:
            Additive, ``[B, 1, T, S]``, or one for each kind of layer if there are two; None without attention.
        """
        if not self.attention:
            return None
        positions, seen = positions[..., None], seen[:, None]
        masks: dict[str, torch.Tensor | None] = dict.fromkeys(WITHOUT_ATTENTION) if self.recurrent else {}
        if self.window is not None:
            masks[SLIDING] = self._additive(sees & (positions - seen < self.window))
        if self.chunk is not None:
            masks[CHUNKED] = self._additive(sees & (positions // self.chunk == seen // self.chunk))
        if not masks:
            return self._additive(sees)
        return next(iter(masks.values())) if self.everywhere else masks | {"full_attention": self._additive(sees)}

    def blocks(self, ends: torch.Tensor, positions: torch.Tensor) -> Any:
        """The same for a stream on a GPU, where attention goes by blocks.

        Args:
            ends, positions: int64 ``[T]``, of ``Batch``.

        Returns:
            A ``BlockMask``, or one for each kind of layer if there are two.
        """
        if self.window is None:
            return block_mask(ends, positions)
        near = block_mask(ends, positions, self.window)
        return near if self.everywhere else {SLIDING: near, "full_attention": block_mask(ends, positions)}

    def _additive(self, sees: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(sees.shape, dtype=self.dtype, device=sees.device)
        return zeros.masked_fill_(~sees, torch.finfo(self.dtype).min)[:, None]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention with grouped queries, every row with keys and values of its own.

    Args:
        query: ``[B, H_q, T, D]``.
        key: ``[B, H_kv, S, D]``; ``H_q`` is a multiple of ``H_kv``.
        value: ``[B, H_kv, S, D_v]``.
        mask: additive, ``[B, 1, T, S]`` in the query's dtype; the dtype's minimum where a token may not look.
        scaling: factor on the scores.
        softcap: keeps scores below this size, by a hyperbolic tangent; None: they may have any.
        sinks: ``[H_q]``, the score of one more key of each head, whose value is 0; None: there is none.

    Returns:
        ``[B, T, H_q, D_v]``.
    """
    batch, heads, tokens, width = query.shape
    kv_heads, span = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * tokens, width)
    scores = torch.matmul(grouped, key.transpose(2, 3)).view(batch, heads, tokens, span) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(batch, -1, tokens, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :span]
    out = torch.matmul(weights.reshape(batch, kv_heads, -1, span), value)
    return out.view(batch, heads, tokens, value.shape[3]).transpose(1, 2)


def attend_fast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float, *, grouped: bool
) -> torch.Tensor:
    """What ``attend`` computes, by PyTorch's own kernel, which is the faster one without gradient.

    Args:
        query, key, value, mask, scaling: as for ``attend``.
        grouped: hand over each key head once, for all of its query heads. On CUDA, a mask and grouped heads together
            would take the slow path that writes all scores down. So there the query heads of a key head stand below
            each other where they have one token each; else each gets a copy of the keys of its own.
    """
    batch, heads, tokens, width = query.shape
    if not grouped and tokens == 1 and heads != key.shape[1]:
        below = query.reshape(batch, key.shape[1], -1, width)
        out = nn.functional.scaled_dot_product_attention(below, key, value, attn_mask=mask, scale=scaling)
        return out.reshape(batch, 1, heads, value.shape[3])
    if not grouped:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2)


# The same for rows that share prefixes, or have none, the hot spot of training, as an operator of its own so that
# torch.compile leaves it alone: PyTorch's own bf16 softmax is two to three times faster than the kernels that it would
# generate. Inside, B * H_kv is one batch dimension, and the G = H_q / H_kv query heads of a key head stand below each
# other as N = G * T rows. torch's compile cache knows an operator by its name alone: change the name with the outputs'
# shapes.


def _joined(shared: torch.Tensor, own: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Those of ``[K, H_kv, P, D]`` that ``rows`` name, or the only one, before ``[B, H_kv, T, D]``: ``[B * H_kv, P + T,
    D]``."""
    before = shared.expand(len(own), -1, -1, -1) if rows is None else shared[rows]
    return torch.cat([before, own], dim=2).flatten(0, 1)


def _product(a: torch.Tensor, b: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """Batched matrix product times a factor, in one pass."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scaling)


@torch.library.custom_op("softprompt::attend_shared", mutates_args=())
def attend_shared(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    prefix_rows: torch.Tensor | None,
    mask: torch.Tensor,
    scaling: float,
    whole: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with grouped queries of rows that share prefixes.

    Args:
        query: ``[B, H_q, T, D]``.
        key, value: ``[B, H_kv, T, D]``, ``[B, H_kv, T, D_v]``.
        prefix_key, prefix_value: ``[K, H_kv, P, D]``, ``[K, H_kv, P, D_v]``; without a prefix, P is 0.
        prefix_rows: int64 ``[B]``, the prefix of each row; None if there is one.
        mask: additive, ``[B, 1, T, P + T]`` in the query's dtype.
        scaling: factor on the scores.
        whole: every row sees its whole prefix, so that only the last ``T`` columns of the mask count.

    Returns:
        ``[B, T, H_q, D_v]``, and the weights ``[B * H_kv, N, P + T]`` that its backward needs.
    """
    batch, heads, tokens, width = query.shape
    kv_heads, length = key.shape[1], prefix_key.shape[2]
    rows = query.reshape(batch * kv_heads, -1, width)
    weights = _product(rows, _joined(prefix_key, key, prefix_rows).transpose(1, 2), scaling)
    first = length if whole else 0
    masked = weights.view(batch, kv_heads, -1, tokens, length + tokens)[..., first:]
    masked.add_(mask[:, :, None, :, first:])
    weights = torch.softmax(weights, dim=-1)
    out = torch.bmm(weights, _joined(prefix_value, value, prefix_rows))
    return out.view(batch, heads, tokens, value.shape[3]).transpose(1, 2).contiguous(), weights


@attend_shared.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    prefix_rows: torch.Tensor | None,
    mask: torch.Tensor,
    scaling: float,
    whole: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, tokens, _ = query.shape
    kv_heads = key.shape[1]
    weights = query.new_empty(batch * kv_heads, heads // kv_heads * tokens, prefix_key.shape[2] + tokens)
    return query.new_empty(batch, tokens, heads, value.shape[3]), weights


@torch.library.custom_op("softprompt::attend_shared_backward", mutates_args=())
def _attend_shared_backward(
    grad: torch.Tensor,
    weights: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    prefix_rows: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value, prefix_key and prefix_value, from that of ``attend_shared``'s output ``[B, T,
    H_q, D_v]``."""
    batch, heads, tokens, width = query.shape
    kv_heads, length = key.shape[1], prefix_key.shape[2]
    rows = query.reshape(batch * kv_heads, -1, width)
    out = grad.transpose(1, 2).reshape(batch * kv_heads, -1, value.shape[3])
    grad_values = torch.bmm(weights.transpose(1, 2), out)
    grad_weights = torch.bmm(out, _joined(prefix_value, value, prefix_rows).transpose(1, 2))
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_rows = _product(grad_scores, _joined(prefix_key, key, prefix_rows), scaling)
    grad_keys = _product(grad_scores.transpose(1, 2), rows, scaling)

    def apart(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = both.view(batch, kv_heads, -1, both.shape[2])
        if prefix_rows is None:
            shared = both[:, :, :length].sum(dim=0, keepdim=True, dtype=torch.float32)
        else:
            zeros = both.new_zeros((len(prefix_key), kv_heads, length, both.shape[3]), dtype=torch.float32)
            shared = zeros.index_add_(0, prefix_rows, both[:, :, :length].float())
        return shared.to(both.dtype), both[:, :, length:].contiguous()

    (grad_prefix_key, grad_key), (grad_prefix_value, grad_value) = apart(grad_keys), apart(grad_values)
    grad_query = grad_rows.view(batch, heads, tokens, width)
    return grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value


@_attend_shared_backward.register_fake
def _(
    grad: torch.Tensor,
    weights: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    prefix_rows: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    like = [query, key, value, prefix_key, prefix_value]
    a, b, c, d, e = (tensor.new_empty(tensor.shape) for tensor in like)
    return a, b, c, d, e


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, prefix_key, prefix_value, prefix_rows, _, ctx.scaling, _ = inputs
    ctx.save_for_backward(output[1], query, key, value, prefix_key, prefix_value, prefix_rows)
    ctx.set_materialize_grads(False)  # the weights' own gradient would be as many zeros


def _differentiate(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    gradients = _attend_shared_backward(grad, *ctx.saved_tensors, ctx.scaling)
    return (*gradients, None, None, None, None)


attend_shared.register_autograd(_differentiate, setup_context=_keep)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    prefix_layer: tuple[torch.Tensor, torch.Tensor] | None = None,
    prefix_rows: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    keep: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    scaled_at: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention call: with a floating-point mask ``[B, 1, T, P + S]`` it is ours, else ``sdpa``'s, which
    knows neither capped scores nor sinks (``s_aux``).

    Raises:
        BaseModelError: it is to do something else as well (a bias, dropout), which would be left out.
    """
    asked = [name for name, value in kwargs.items() if value is not None and name not in WITHOUT_EFFECT]
    if asked or kwargs.get("dropout"):
        raise BaseModelError(
            f"the attention of the base model ({type(module).__name__}) is to be computed with "
            f"{', '.join(asked or ['dropout'])}, which the shared prefix does not know; give another base model, or "
            "the release of transformers that softprompt was tested with"
        )
    plain = softcap is None and s_aux is None
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(attention_mask, BlockMask):
        assert plain, "Masks.blocks is for plain attention"
        return attend_blocks(query, key, value, attention_mask, factor), None
    if attention_mask is None or not attention_mask.is_floating_point():
        if not plain:
            mask = _additive(attention_mask, query, key)
            return attend(query, key, value, mask, factor, softcap=softcap, sinks=s_aux), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if keep is not None:
        keep.append((key, value))
    if scaled_at is not None:
        of: Any = module  # as transformers' Llama4TextAttention has it
        scales = torch.log1p(torch.floor((scaled_at.float() + 1.0) / of.floor_scale)) * of.attn_scale + 1.0
        query = (query * scales[:, None, :, None]).to(query.dtype)
    if prefix_layer is not None and not prefix_layer[0].shape[2]:
        prefix_layer = None  # an empty prefix
    if prefix_layer is not None and hasattr(module, "expand_kv"):
        expand: Any = module.expand_kv
        prefix_layer = expand(*prefix_layer)  # the prefix's latents, once for all rows
    if torch.is_grad_enabled() and key.shape[2] == query.shape[2] and plain:
        prefix_key, prefix_value = prefix_layer or (key[:1, :, :0], value[:1, :, :0])
        # What has slid out of a window, or lies in another chunk, is in the mask, and so are prefixes' ends.
        sizes = sliding_window, getattr(getattr(module, "config", None), "attention_chunk_size", None)
        sees_all = all(size is None or attention_mask.shape[-1] <= size for size in sizes)
        rows, whole = prefix_rows, prefix_rows is None and sees_all
        return attend_shared(query, key, value, prefix_key, prefix_value, rows, attention_mask, factor, whole)[0], None
    if prefix_layer is not None:
        prefix_key, prefix_value = prefix_layer
        if prefix_rows is not None:
            prefix_key, prefix_value = prefix_key[prefix_rows], prefix_value[prefix_rows]
        key = torch.cat([prefix_key.expand(len(key), -1, -1, -1), key], dim=2)
        value = torch.cat([prefix_value.expand(len(value), -1, -1, -1), value], dim=2)
    if torch.is_grad_enabled() or not plain:
        return attend(query, key, value, attention_mask, factor, softcap=softcap, sinks=s_aux), None
    if query.shape[2] > 1 and prefix_layer is None and query.device.type == "cpu" and query.dtype != torch.float32:
        key, value, attention_mask = _in_whole_blocks(key, value, attention_mask)
    return attend_fast(query, key, value, attention_mask, factor, grouped=query.device.type != "cuda"), None


def _additive(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Transformers' mask of whole sequences, bool ``[B, 1, T, S]`` or None for a causal one, as ``attend`` takes it."""
    if mask is None:
        tokens, span = query.shape[2], key.shape[2]
        mask = torch.ones(tokens, span, dtype=torch.bool, device=query.device).tril(span - tokens)[None, None]
    zeros = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    return zeros.masked_fill_(~mask, torch.finfo(query.dtype).min)


def _in_whole_blocks(
    key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values ``[B, H_kv, S, D]`` and their mask, with unseen ones behind up to whole blocks of the kernel: how
    it rounds depends on the size of the last block, and with it on the longest row's length."""
    extra = -key.shape[2] % BLOCK if key.shape[2] > UNDIVIDED else 0
    if not extra:
        return key, value, mask
    key, value = (nn.functional.pad(tensor, (0, 0, 0, extra)) for tensor in (key, value))
    return key, value, nn.functional.pad(mask, (0, extra), value=torch.finfo(mask.dtype).min)


def _pick_layer(index: int, layer: nn.Module) -> Any:
    """A forward pre-hook that hands a layer its own part of ``prefix`` (a state) and its own list in ``keep``; where
    its queries are scaled by positions that it would count itself (Llama 4), also those that are meant."""
    scaling = [m for m in layer.modules() if getattr(m, TEMPERATURE, False) and not getattr(m, "use_rope", True)]

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        prefix = kwargs.pop("prefix", None)
        if prefix is not None:
            kwargs["prefix_layer"] = prefix.layer(index)
        if kwargs.get("keep") is not None:
            kwargs["keep"] = kwargs["keep"][index]
        for module in scaling:
            mask = kwargs.get("attention_mask")
            ours = isinstance(mask, torch.Tensor) and mask.is_floating_point()
            setattr(module, TEMPERATURE, not ours)
            if ours:
                kwargs["scaled_at"] = kwargs["position_ids"]
        return args, kwargs

    return hook


def install(model: nn.Module, layers: nn.ModuleList) -> None:
    """Makes ``model`` (a transformers model with decoder ``layers``) accept ``prefix=`` and ``prefix_rows=`` in its
    forward. A second time it does nothing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    if getattr(model, INSTALLED, False):
        return
    setattr(model, INSTALLED, True)
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(_pick_layer(index, layer), with_kwargs=True)
