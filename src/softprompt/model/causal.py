"""Whether a model computes logits and gradients of embedded tokens as a causal language model does."""

from __future__ import annotations

from typing import Any

import torch

from softprompt.errors import BaseModelError
from softprompt.model.architecture import core_of
from softprompt.model.per_layer import arguments, has_parts, read, read_virtual

LEAST_SIGHT = 1e-6
"""Share of the largest gradient that one in a later token must have to count: rounding is far below, sight above."""


ROUNDED = 0.02
"""Share of the size of logits that computing them again in 16 bits may change them by."""


def require_causal(model: Any, name: str, *, rms: float) -> None:
    """Refuses a model in which a token sees those behind it (of a causal one, the gradient of early logits in later
    tokens is zero), or that makes more of a token than its embedding.

    Args:
        model: of transformers, in evaluation mode.
        name: what the user calls it.
        rms: root mean square of its embeddings.

    Raises:
        BaseModelError: it is an encoder, takes no embedded tokens, or feeds its layers more than those.
    """
    kind, lookup = model.config.model_type, model.get_input_embeddings()
    more = BaseModelError(
        f"the base model {name!r} ({kind}) feeds its layers more of a token than its embedding, which is all that a "
        "virtual token has; give another base model"
    )
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None) and not has_parts(model):
        raise more
    noise = rms * torch.randn(1, 4, lookup.weight.shape[1], generator=torch.Generator().manual_seed(0))
    leaf = noise.to(lookup.weight.device, lookup.weight.dtype).requires_grad_()
    ids = torch.arange(4, device=leaf.device)[None]

    def computed(by: Any, **given: torch.Tensor) -> torch.Tensor:
        out = by(**given, attention_mask=torch.ones_like(ids), use_cache=False)
        return (out.last_hidden_state if by is core else out.logits).float()  # type: ignore[no-any-return]

    # Of a model of images and text, the language model: what reads ids outside may look for images' among them.
    core = core_of(model)
    alone = core if core is not model.base_model and core is not getattr(model, "model", None) else model

    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(
                computed(model, **arguments(model, read_virtual(model, leaf[0] + 0)[None]))[:, :2].square().mean(), leaf
            )
        with torch.no_grad():
            by_ids = computed(alone, input_ids=ids)
            by_vectors = computed(alone, **arguments(model, read(model, ids)))
    except Exception as error:  # of transformers alone
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise BaseModelError(
            f"the base model {name!r} ({kind}) does not compute logits and gradients from embedded "
            f"tokens ({type(error).__name__}: {reason}); give another causal language model"
        ) from error
    found = gradient.float().nan_to_num(0.0).abs()  # an overflow is no sign of sight
    if found[:, 2:].max() > LEAST_SIGHT * found.max():
        raise BaseModelError(
            f"the base model {name!r} is an encoder ({kind}): its tokens see those behind them; "
            "give a causal language model"
        )
    if (by_ids - by_vectors).norm() > ROUNDED * by_ids.norm():
        raise more
