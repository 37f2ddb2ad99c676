"""A model of a family that is not known is tried when it is loaded: a few texts through both paths.

Here, ``lm`` is a ``FrozenLM``, whose module imports this one.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from softprompt.errors import SoftPromptWarning
from softprompt.model.architecture import REFUSED, Family
from softprompt.model.batch import Row
from softprompt.model.request import Request
from softprompt.model.state.kv import PrefixKV
from softprompt.model.state.recurrent import RecurrentState
from softprompt.text.tokens import SOFT

BY_LENGTH = (
    "sliding_window",
    "attention_chunk_size",
    "attn_temperature_tuning",
    "llama_4_scaling_beta",
    "index_topk",
    "compress_ratios",
    "use_bidirectional_attention",
)
"""Settings by which a long text may be computed otherwise than a short one, which is all that is tried."""

KNOWN_LAYERS = {"full_attention", "linear_attention", "conv"}
INPUTS = (1, 3, 9)
"""Tokens of the inputs that are tried."""

ASKED = 256
"""Tokens whose probabilities are compared."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.06}
"""The largest distance of two rows of log-probabilities that rounding may make, in units of their spread."""


def guess(model: Any) -> Family | str:
    """The family that a model of an unknown type may be of, or why it is not tried."""
    config = model.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) or {}
    for name in BY_LENGTH:
        if getattr(config, name, None) or rotary.get(name):
            return f"its setting {name} makes long texts another thing than short ones"
    refused = [refusal.setting for refusal in REFUSED if refusal.applies(config)]
    if refused:
        return f"its setting {refused[0]} makes long texts another thing than short ones"
    others = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS
    if others:
        return f"it has layers of the kind {', '.join(sorted(map(str, others)))}"
    state = RecurrentState if getattr(model, "_is_stateful", False) else PrefixKV
    return Family(name=config.model_type, model_types=(config.model_type,), state=state)


def questions(lm: Any) -> tuple[list[Request], torch.Tensor]:
    """Requests with a soft prompt between two tokens, and its vectors, embeddings of tokens."""
    ids = [number * 37 % len(lm.embedding) for number in range(1, ASKED + 1)]
    words = tuple((token,) for token in sorted(set(ids)))
    vectors = lm.look_up(torch.tensor(ids[20:25], device=lm.device)).detach().float()
    return [Request((ids[0], SOFT, ids[1], *ids[2 : 2 + count]), 3, words, 0) for count in INPUTS], vectors


def answers(lm: Any) -> torch.Tensor:
    """Log-probabilities of tokens behind each request, a row each; behind the last one again, as it is continued token
    by token; and the gradient of their sum in the vectors."""
    requests, vectors = questions(lm)
    vectors.requires_grad_()
    asked = torch.tensor([word[0] for word in requests[0].words], device=lm.device)
    last = requests[-1]
    if lm.shares_prefix:
        rows = [Row(request.ids[request.shared :], request.words) for request in requests]
        prefix = lm.prefix_kv(last.ids[: last.shared], vectors)
        scores = lm.score_batch(lm.collate(rows, prefix.lengths), prefix)
        continued = _continued(lm, last, vectors)[:, asked]
    else:
        whole = lm.whole.growing()
        whole.add([lm.rows(request.ids, vectors) for request in requests])
        scores = whole.logits().log_softmax(dim=-1)[:, asked]
        continued = scores[-1:].detach()
    weights = torch.linspace(-1, 1, len(asked), device=lm.device)
    (gradient,) = torch.autograd.grad((scores * weights).sum(), vectors)
    width = min(len(asked), gradient.numel())
    return torch.cat([scores.detach()[:, :width], continued[:, :width], gradient.reshape(1, -1)[:, :width]])


@torch.no_grad()
def _continued(lm: Any, request: Request, vectors: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 ``[1, V]`` behind the request, its last token run by itself."""
    own = lm.rows(request.ids[request.shared :], None)[None]
    slots = lm.slots()
    slots.add([lm.prefix_kv(request.ids[: request.shared], vectors)], own.shape[1])
    lm.next_logits(slots, own[:, :-1], [own.shape[1] - 1])
    logits: torch.Tensor = lm.next_logits(slots, own[:, -1:], [1])
    return logits.log_softmax(dim=-1)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of two answers, in units of the spread of the second; the largest over rows."""
    spread = (expected - expected.mean(dim=1, keepdim=True)).norm(dim=1)
    largest = float(((found - expected).norm(dim=1) / spread).max())
    return math.inf if math.isnan(largest) else largest


def run(lm: Any) -> None:
    """Lets a model of an unknown family share prefixes if a few texts come out alike on both paths, with a
    ``SoftPromptWarning`` that says which path it takes."""
    kind, before = lm.model.config.model_type, lm.model.config._attn_implementation
    family = guess(lm.model)
    why = family if isinstance(family, str) else ""
    if not isinstance(family, str):
        try:
            expected = answers(lm)
            lm.take_up(family, "")
            if distance(answers(lm), expected) > TOLERANCE[lm.dtype]:
                why = "a few texts came out differently behind a shared prefix"
        except Exception as error:  # whatever an unknown model does
            why = f"its prefixes cannot be shared ({type(error).__name__})"
    if why:
        lm.take_up(None, f"it is of type {kind}: {why}")
        lm.model.set_attn_implementation(before)  # the hooks on its layers stay, and do nothing without a prefix
    told = f"runs whole sequences, which is slower: {why}" if why else "shares prefixes: a few texts came out alike"
    warnings.warn(
        f"the base model {lm.name!r} is of a family that is not known ({kind}); it {told}",
        SoftPromptWarning,
        stacklevel=4,
    )
