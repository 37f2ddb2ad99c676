"""What is learned in place of a soft prompt's own numbers, and how it folds into them.

Every learned tensor is scaled so that one Adam step of learning rate ``lr`` moves each virtual token by about ``lr``
times the RMS that it started with, as it does for free vectors: one default learning rate serves all. Where
several tensors move it side by side, each has an equal part of that. And all start at the chosen initial vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from softprompt.errors import ConfigError
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.model.trained import apart
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT, frequent_tokens
from softprompt.tuning.config import PARAMETRISATIONS

BOTTLENECK = 800
"""Width of the residual network, at most H: the default of the authors' code."""

SAMPLED = 128
"""Vocabulary embeddings in a superposition; more gained nothing in the paper (SuperPos-Prompt, §5)."""


@dataclass(frozen=True, eq=False)
class Parametrisation:
    """What is learned, and what it stands for.

    Attributes:
        tensors: float32 leaves by name: what optimizer, clipping and checkpoint see.
        fold: the soft prompt ``[P, H]``, ``[P, L, 2, H_kv, D]`` or ``[N]`` that they stand for, in ``unit``;
            differentiable in all of them.
        unit: what ``fold()`` is to be multiplied by: ``[P, 1]``, the RMS of each initial vector; for a KV prefix ``[P,
            L, 2, 1, 1]``, a tenth of the RMS of each virtual token's initial key and value in each layer; for a trained
            state ``[N]``, that, and likewise of each head's state and of each window.
    """

    tensors: dict[str, torch.Tensor]
    fold: Callable[[], torch.Tensor]
    unit: torch.Tensor


def parametrise(
    lm: FrozenLM, kind: str, start: torch.Tensor, *, seed: int, scale: float, before: Sequence[int]
) -> Parametrisation:
    """What is to be learned, standing for ``start``.

    Args:
        lm: the base model.
        kind: one of ``config.PARAMETRISATIONS``.
        start: float32 ``[P, H]``; for ``prefix`` that or a trained prefix.
        seed: seeds what is drawn.
        scale: the largest unit, in RMS of the embedding table.
        before: for ``prefix``, the token ids before the soft prompt.

    Raises:
        ConfigError: another kind.
    """
    if kind not in PARAMETRISATIONS:
        raise ConfigError(f"The parametrisation must be one of {', '.join(PARAMETRISATIONS)}, not {kind!r}.")
    if kind == "prefix":
        start = prefix_of(lm, before, start) if start.dim() == 2 else start
        return _prefix(start) if start.dim() == 5 else _state(lm, start)
    rms = start.square().mean(dim=1, keepdim=True).sqrt()
    unit = rms.clamp(lm.embedding_rms, scale * lm.embedding_rms)
    vectors, generator = start / unit, torch.Generator().manual_seed(seed)
    if kind == "plain":
        learned = {"vectors": vectors.requires_grad_()}
        return Parametrisation(learned, lambda: learned["vectors"], unit)
    if kind == "superpos":
        sampled = (
            lm.embedding[frequent_tokens(lm.tokenizer, len(lm.embedding), seed)[:SAMPLED]].detach().float()
            / lm.embedding_rms
        )
        parts, tensors, formula = 2, *_superpos(vectors, sampled)
    elif kind == "residual":
        parts, tensors, formula = 3, *_residual(vectors, generator)
    else:
        parts, tensors, formula = 1, *_mlp(vectors, generator)  # one behind the other
    scaled = {name: (tensor * parts).requires_grad_() for name, tensor in tensors.items()}
    return Parametrisation(scaled, lambda: formula({name: tensor / parts for name, tensor in scaled.items()}), unit)


Tensors = dict[str, torch.Tensor]
Formula = Callable[[Tensors], torch.Tensor]


def _layer(inputs: int, outputs: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Weights ``[inputs, outputs]`` of a layer that keeps the RMS of its input, times their number of inputs.

    A step of Adam moves all weights of an output in the direction that their inputs agree on, so the output moves by
    up to the number of inputs times as much as a weight. Learned times that number, it moves by about ``lr``
    (Yang et al. 2022, Tensor Programs V, table 3: an Adam learning rate of 1 / inputs for hidden layers).
    """
    return (torch.randn(inputs, outputs, generator=generator) * math.sqrt(inputs)).to(device)


def _through(inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``inputs`` ``[P, inputs]`` through a layer as ``_layer`` makes it."""
    return inputs @ weights / weights.shape[0]


def _residual(vectors: torch.Tensor, generator: torch.Generator) -> tuple[Tensors, Formula]:
    """Residual prompt tuning (Razdaibiedina et al. 2023, §3): ``P' = P + LayerNorm(W_up · ReLU(W_down · P))``, one
    network with biases for all virtual tokens.

    Ours differs: the layer norm's gain starts at 0 instead of 1, so that training starts at the chosen vectors.
    """
    width, device = vectors.shape[1], vectors.device
    narrow = min(BOTTLENECK, width)
    tensors = {
        "vectors": vectors,
        "down": _layer(width, narrow, generator, device),
        "down_bias": torch.zeros(narrow, device=device),
        "up": _layer(narrow, width, generator, device),
        "up_bias": torch.zeros(width, device=device),
        "gain": torch.zeros(width, device=device),
        "bias": torch.zeros(width, device=device),
    }

    def formula(t: Tensors) -> torch.Tensor:
        hidden = functional.relu(_through(t["vectors"], t["down"]) + t["down_bias"])
        shift = _through(hidden, t["up"]) + t["up_bias"]
        return t["vectors"] + functional.layer_norm(shift, (width,), t["gain"], t["bias"])

    return tensors, formula


def _mlp(vectors: torch.Tensor, generator: torch.Generator) -> tuple[Tensors, Formula]:
    """P-tuning (Liu et al. 2021, §3.2) with the network of two layers alone, without the LSTM before it:
    ``P' = W_up · ReLU(W_down · P)``, with biases.

    Ours differs: the second layer starts at the least-squares solution that gives the chosen vectors back.
    """
    width, device = vectors.shape[1], vectors.device
    tensors = {
        "vectors": vectors,
        "down": _layer(width, width, generator, device),
        "down_bias": torch.zeros(width, device=device),
        "up_bias": torch.zeros(width, device=device),
    }

    def hidden(t: Tensors) -> torch.Tensor:
        return functional.relu(_through(t["vectors"], t["down"]) + t["down_bias"])

    solution = torch.linalg.pinv(hidden(tensors).double().cpu(), rtol=1e-6) @ vectors.double().cpu()
    tensors["up"] = (solution * width).float().to(device)
    return tensors, lambda t: _through(hidden(t), t["up"]) + t["up_bias"]


def _superpos(vectors: torch.Tensor, sampled: torch.Tensor) -> tuple[Tensors, Formula]:
    """SuperPos-Prompt (Ali Sadraei Javaheri et al. 2024, §3): ``p_i = (E + ΔE_i) w_i``, each virtual token a sum of
    embeddings, which may change, with weights of any sign and size.

    Ours differs: the chosen vector stands beside the sampled embeddings with weight 1, all others beginning at 0, and
    of ``ΔE_i`` only what belongs to that vector is learned, so ``p_i = v_i + E w_i``. With no ``ΔE_i`` at all, so few
    embeddings span too little: on CR with SmolLM2-135M, 60 steps end at 79 % instead of 88 %.

    The weights are learned in units in which a step of 1 by each, against a random gradient g, moves the sum by 1 RMS:
    its mean square is ``Σ_jk E[sign(e_j·g) sign(e_k·g)] e_j·e_k``, the expectation being ``2/π arcsin cos(e_j, e_k)``.
    """
    products = sampled @ sampled.T
    lengths = products.diagonal().sqrt()
    cosines = (products / torch.outer(lengths, lengths)).clamp(-1, 1)
    unit = float((2 / math.pi * cosines.asin() * products).sum() / sampled.shape[1]) ** -0.5
    weights = torch.zeros(len(vectors), len(sampled), device=vectors.device)
    return {"vectors": vectors, "weights": weights}, lambda t: t["vectors"] + unit * t["weights"] @ sampled


def _prefix(kv: torch.Tensor) -> Parametrisation:
    """Trained keys and values for every layer, learned directly (Li and Liang 2021, §4; P-tuning v2, Liu et al. 2022,
    §3.3, which found that a reparametrisation does not always help).

    A step moves them by ``lr`` tenths of their RMS: what they do adds up over the layers, and steps of 0.3 RMS do not
    learn at all. The RMS is each token's own: the first token, at which heads look that look at nothing else, has
    values a fraction of the others' (an attention sink, Xiao et al. 2024, §3.1), and steps of their size would drown
    it in noise.
    """
    rms = kv.square().mean(dim=(3, 4), keepdim=True).sqrt()
    unit = torch.where(rms > 0, rms, 1.0) / 10
    learned = {"kv": (kv / unit).requires_grad_()}
    return Parametrisation(learned, lambda: learned["kv"], unit)


def _state(lm: FrozenLM, numbers: torch.Tensor) -> Parametrisation:
    """A trained state (S₀ tuning, arXiv 2604.01168), learned directly, and with it the keys and values, or latents, of
    the layers with attention.

    Ours differs: it starts from what the initial vectors leave behind instead of zeros, windows and keys and values are
    learned, too, and steps are of the size that they are of for a KV prefix, by heads for a state.
    """
    shapes = lm.trained.shapes(lm.trained.length(numbers.shape))
    tensors = apart(numbers, shapes)
    units = {}
    for name, tensor in tensors.items():
        over = tuple(range(0 if name.endswith("window") else 1, tensor.dim()))
        rms = tensor.square().mean(dim=over, keepdim=True).sqrt()
        units[name] = (torch.where(rms > 0, rms, 1.0) / 10).expand_as(tensor)
    learned = {name: (tensor / units[name]).requires_grad_() for name, tensor in tensors.items()}
    unit = torch.cat([own.flatten() for own in units.values()])
    return Parametrisation(learned, lambda: torch.cat([own.flatten() for own in learned.values()]), unit)


def require_shared_prefix(lm: FrozenLM, template: Template, requests: Sequence[Request]) -> None:
    """Refuses what a trained prefix cannot be learned with.

    Args:
        lm: the base model.
        template: of the task.
        requests: its training rows.

    Raises:
        ConfigError: the base model has no keys, values or states to learn, or input stands before the soft prompt.
    """
    if lm.trained.why_none:
        raise ConfigError(
            f"the parametrisation prefix needs a base model with keys, values or states to learn, but {lm.name} has "
            f"none: {lm.trained.why_none}; choose another base model or parametrisation"
        )
    if not all(request.shares_prefix for request in requests):
        raise ConfigError(
            f"the parametrisation prefix needs {{soft_prompt}} before every input field, and no empty input, but "
            f"the template is {template.text!r}; move {{soft_prompt}} to the front, or choose another parametrisation"
        )


def prefix_of(lm: FrozenLM, before: Sequence[int], vectors: torch.Tensor) -> torch.Tensor:
    """The numbers that a soft prompt of vectors has in every layer of the base model.

    Args:
        lm: a base model with a shared prefix.
        before: the token ids before the soft prompt.
        vectors: float ``[P, H]``.

    Returns:
        float32 ``[P, L, 2, H_kv, D]``, keys after any rotary embedding; or a trained state ``[N]``, in which the
        recurrent layers have read ``before``, too.
    """
    return lm.trained.numbers((*before, SOFT), vectors, len(before))
