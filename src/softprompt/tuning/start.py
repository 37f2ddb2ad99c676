"""What a training starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from softprompt.errors import ConfigError
from softprompt.model.embedder import Embedder, tokens_of
from softprompt.model.frozen import FrozenLM
from softprompt.tasks.length import label_list
from softprompt.tasks.task import Task
from softprompt.text.tokens import frequent_tokens
from softprompt.tuning.config import TrainConfig

AHEAD_SEED = 1 << 20
"""Added to the seed of what stands before a decoder's input, so that it is drawn apart."""


def initial_vectors(
    lm: Embedder,
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
    if init not in ("vocab", "text", "labels"):
        raise ConfigError(f"init must be random, vocab, text or labels, not {init!r}")
    vectors = table[_tokens(lm, num_virtual_tokens, (text or "") if init == "text" else None, seed)].float().cpu()
    if init == "labels":
        if not label_words:
            raise ConfigError("init labels needs class labels; give --labels, or another init")
        for row, word in zip(range(num_virtual_tokens), label_words, strict=False):
            vectors[row] = table[list(word)].float().mean(dim=0).cpu()
    return vectors


def _tokens(lm: Embedder, count: int, text: str | None, seed: int) -> list[int]:
    """So many tokens of a text, or without one drawn."""
    if text is None:
        drawn = frequent_tokens(lm.tokenizer, len(lm.embedding), seed)
        return [drawn[i % len(drawn)] for i in range(count)]
    tokens = list(tokens_of(lm, text))
    if not tokens:
        raise ConfigError("init text needs an init_text of at least one token; give a longer one")
    while len(tokens) < count:
        tokens = (tokens + tokens)[-count:]
    return tokens[:count]


def first_numbers(
    task: Task, config: TrainConfig, number: int, given: torch.Tensor | None, before: Sequence[int] = ()
) -> torch.Tensor:
    """What the start of that number begins with: float32 ``[P, H]`` or a trained prefix, on the model's device.

    Args:
        task: what is learned.
        config: of the training.
        number: of the start.
        given: the numbers to start from; None: ``first_vectors``, or where a trained prefix is learned and layers get
            more of a token than its vector, what the tokens themselves leave behind.
        before: the token ids before the soft prompt.

    Raises:
        ConfigError: what is given has another shape, or is of another kind than what is learned.
    """
    lm = task.model
    if given is None:
        length, init, text, seed = _rule(task, config, number)
        if lm.reads_parts and config.parametrisation == "prefix" and init in ("text", "vocab"):
            return lm.trained.numbers((*before, *_tokens(lm, length, text, seed)), None, len(before))
        vectors = first_vectors(task, config, number)
        if config.decoder_virtual_tokens:
            vectors = torch.cat([vectors, _ahead(task, config, number)])
        return vectors.to(lm.device)
    length, _ = config.start(number)
    expected: tuple[int, ...] = (length + config.decoder_virtual_tokens, lm.hidden_size)
    if given.dim() != 2:
        if config.parametrisation != "prefix":
            kind = "KV prefix" if given.dim() == 5 else "state"
            raise ConfigError(
                f"the soft prompt to start from is a trained {kind}, which only the parametrisation prefix can go on "
                f"from, not {config.parametrisation}; choose that, or another start"
            )
        expected = lm.trained.shape(length)
    if tuple(given.shape) != expected:
        raise ConfigError(
            f"the soft prompt to start from has shape {list(given.shape)}, but {list(expected)} is needed; "
            "set num_virtual_tokens to its length and use it with a base model of its width"
        )
    return given.detach().float().cpu().clone().to(lm.device)


def first_vectors(task: Task, config: TrainConfig, number: int = 0) -> torch.Tensor:
    """What the start of that number begins with by the rule ``config.init``: float32 ``[P, H]`` on the CPU.

    All but the first are ``config.init_scale`` times as long as embeddings; that one is left as it is, since a sequence
    begins with it and heads look at it that look at nothing else.
    """
    lm = task.lm
    length, init, text, seed = _rule(task, config, number)
    vectors = initial_vectors(lm, length, init=init, seed=seed, text=text, label_words=task.label_words)
    vectors[1:] *= init_scale(lm, config)
    return vectors


def _rule(task: Task, config: TrainConfig, number: int) -> tuple[int, str, str | None, int]:
    """Of the start of that number: P, ``init``, the text if that is ``text``, and the seed of what is drawn."""
    lm, words, init, text = task.lm, task.label_words, config.init, config.init_text
    length, draw = config.start(number)
    if init == "auto" and text is None and words and draw == 0:
        options = label_list(lm, task.labels)
        if len(tokens_of(lm, options)) <= length:
            text = options
    if init == "auto":
        init = "text" if text and draw == 0 else "labels" if words else "vocab"
    return length, init, (text or "") if init == "text" else None, config.seed + draw


def _ahead(task: Task, config: TrainConfig, number: int) -> torch.Tensor:
    """What the virtual tokens before a decoder's input begin with, ``[N, H]``: the labels' words, or frequent tokens,
    as long as embeddings; with ``random``, noise."""
    init = "random" if config.init == "random" else "labels" if task.label_words else "vocab"
    seed = config.seed + number + AHEAD_SEED
    return initial_vectors(task.lm, config.decoder_virtual_tokens, init=init, seed=seed, label_words=task.label_words)


def init_scale(lm: Embedder, config: TrainConfig) -> float:
    """How many times as long as embeddings the initial vectors are: those of a KV prefix, in which every layer has
    numbers of its own, as long as they are."""
    if config.parametrisation == "prefix":
        return 1.0
    if config.init_scale is not None:
        return config.init_scale
    assert isinstance(lm, FrozenLM), "what a layer does to an embedding takes a whole model"
    return lm.first_layer_gain
