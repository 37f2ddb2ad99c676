"""Soft prompts carried over to another base model without training (Lester et al. 2022, "Reducing Retraining by
Recycling Parameter-Efficient Prompts")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from softprompt.errors import ConfigError
from softprompt.exchange.formats import RECYCLING
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.verbalizer import Verbalizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEAREST, COMBINED = 5, 64
"""Common tokens that a virtual token is carried over by."""

_RIDGE = 1e-3
"""Of the combination, in squared norms of the tokens: keeps weights of nearly parallel tokens small."""

_SURFACE = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})
"""How byte-level and SentencePiece tokenizers spell blanks."""


def recycle(
    source: FrozenLM, target: FrozenLM, soft_prompt: SoftPrompt, *, name: str, method: str = "least-squares"
) -> SoftPrompt:
    """The soft prompt in the embedding space of another base model, by the tokens that both vocabularies have.

    Each virtual token keeps its length as a multiple of the mean length of the common tokens. Nothing is trained, and
    nothing says that the new base model understands it: measure it, or take it as the start of a training.

    Args:
        source: the base model that it was tuned on.
        target: the other one.
        soft_prompt: vectors, no KV prefix.
        name: of the new one.
        method: ``least-squares``: the linear map that takes the embeddings of the common tokens of one model to those
            of the other with the least squared error (the paper's v2v-lin). ``nearest``: the mean of the target's
            embeddings of the 5 common tokens nearest by cosine. ``combination``: the 64 nearest, with the weights that
            rebuild the virtual token best (ridge regression); over all tokens that would be the linear map again.

    Raises:
        BaseModelError: it was tuned on another model than ``source``.
        ConfigError: an unknown method, a KV prefix, the same base model, or too few common tokens for the method.
        TemplateError: its template or labels do not fit the other model.
    """
    if method not in RECYCLING:
        raise ConfigError(f"The method must be one of {', '.join(RECYCLING)}, not {method!r}; choose one.")
    Task.of(source, soft_prompt)
    if soft_prompt.kind != "soft prompt":
        raise ConfigError(
            f"{soft_prompt.name!r} is a {soft_prompt.kind}, which cannot be carried over to another base model; "
            f"recycle a soft prompt of vectors alone."
        )
    if source.fingerprint == target.fingerprint:
        raise ConfigError(f"{soft_prompt.name!r} was tuned on {target.name} already; give another base model.")
    pairs = common_tokens(source, target)
    least = source.hidden_size if method == "least-squares" else COMBINED if method == "combination" else NEAREST
    if len(pairs) < least:
        raise ConfigError(
            f"Expected at least {least:,} tokens that {source.name} and {target.name} both have for {method}, found "
            f"{len(pairs):,}; choose a base model with a vocabulary that is more alike."
        )
    ours, theirs = zip(*pairs, strict=True)
    vectors = carried(
        soft_prompt.vectors,
        source.embedding[list(ours)].detach().float().cpu(),
        target.embedding[list(theirs)].detach().float().cpu(),
        method,
    )
    verbalizer = None if soft_prompt.verbalizer is None else Verbalizer(dict(soft_prompt.verbalizer))
    task = Task(target, Template(soft_prompt.template), verbalizer, soft_prompt.num_virtual_tokens, target.window)
    return task.soft_prompt(
        vectors,
        name=name,
        parametrisation=soft_prompt.parametrisation,
        training={
            "recycled_from": {"name": soft_prompt.name, "base": soft_prompt.base, "fingerprint": source.fingerprint},
            "method": method,
            "common_tokens": len(pairs),
        },
        data=soft_prompt.data,
    )


def carried(vectors: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor, method: str) -> torch.Tensor:
    """Vectors of one embedding space in another.

    Args:
        vectors: float32 ``[P, H1]``.
        ours: float32 ``[N, H1]``, the embeddings of the common tokens.
        theirs: float32 ``[N, H2]``, their embeddings in the other space.
        method: see :func:`recycle`.

    Returns:
        float32 ``[P, H2]``.
    """
    if method == "least-squares":
        found = vectors @ torch.linalg.lstsq(ours.double(), theirs.double(), driver="gelsd").solution.float()
    else:
        unit = torch.nn.functional.normalize
        cosines = unit(vectors, dim=1) @ unit(ours, dim=1).T
        near = cosines.topk(NEAREST if method == "nearest" else COMBINED, dim=1).indices
        if method == "nearest":
            found = theirs[near].mean(dim=1)
        else:
            found = torch.stack([_combined(v, ours[i], theirs[i]) for v, i in zip(vectors, near, strict=True)])
    lengths = vectors.norm(dim=1) / ours.norm(dim=1).mean() * theirs.norm(dim=1).mean()
    made: torch.Tensor = torch.nn.functional.normalize(found, dim=1) * lengths[:, None]
    return made


def _combined(vector: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """``[H2]``: the tokens ``theirs`` ``[k, H2]`` with the weights that make ``vector`` ``[H1]`` of ``ours``."""
    gram = (ours @ ours.T).double()
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weights = torch.linalg.solve(gram, (ours @ vector).double())
    found: torch.Tensor = weights.float() @ theirs
    return found


def common_tokens(source: FrozenLM, target: FrozenLM) -> list[tuple[int, int]]:
    """The ids of the tokens that both vocabularies have, by their text with its leading blank, in the order of the
    first; special tokens apart."""
    theirs = _surfaces(target.tokenizer, len(target.embedding))
    return [
        (token, theirs[text])
        for text, token in _surfaces(source.tokenizer, len(source.embedding)).items()
        if text in theirs
    ]


def _surfaces(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    special = set(tokenizer.all_special_ids)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    found: dict[str, int] = {}
    for token, number in vocabulary:
        if number < rows and number not in special:
            found.setdefault(token.translate(_SURFACE), number)
    return found
