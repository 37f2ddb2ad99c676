"""Encoder–decoders (T5, BART, T5Gemma): the encoder reads the input with the soft prompt in it, the decoder writes the
target. Another part of the soft prompt may stand before all that the decoder reads, the token that it begins with
included.

A row's input runs through the encoder once, whatever number of words is scored behind it. The decoder runs a line for
each word; a word that another one begins with needs no line of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from softprompt.errors import BaseModelError
from softprompt.model.batch import micro_batches
from softprompt.model.whole import Ahead, Growing, padded
from softprompt.text.tokens import Tokens, around

LOOK = 4
"""A line of the decoder takes keys and values of the whole input, which costs about this part of running the input's
tokens."""

SAME, SAME_IN_16_BITS = 0.02, 0.5
"""The largest difference, in nats, of three tokens' log-probability that rounding explains."""

TOGETHER = 2048
"""The most tokens, padding included, of the inputs that begin to be continued in one pass."""


class EncoderDecoder:
    """How an encoder–decoder computes rows, by the model's own forward (a ``Whole``)."""

    def __init__(self, model: Any, start: Tokens) -> None:
        """
        Args:
            model: transformers' own.
            start: the tokens that the decoder begins with.
        """
        self._model = model
        self._start = start

    def score(
        self, rows: Sequence[torch.Tensor], words: Sequence[Sequence[Tokens]], *, compare: bool, ahead: Ahead = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``Whole``."""
        lines, owners, steps = self._laid_out(words, [0] * len(rows) if ahead is None else list(map(len, ahead)))
        encoded, mask = self.encode(rows)
        device = encoded.last_hidden_state.device
        index = torch.tensor(owners, device=device)
        if ahead is None:
            inputs, of_line = _padded_ids(lines, device)
        else:
            inputs, of_line = padded([self.behind(ahead[row], line) for row, line in zip(owners, lines, strict=True)])
        states = _with_states(encoded, encoded.last_hidden_state[index])
        logits = self.decode(states, mask[index], inputs, of_line).logits
        line, column, token, slot = torch.tensor(steps, device=device).T
        read = logits[line, column].float()
        picked = read.log_softmax(dim=-1).gather(1, token[:, None])[:, 0]
        shape = (len(rows), max(map(len, words)))
        absent = torch.arange(shape[1], device=device) >= torch.tensor([[len(w)] for w in words], device=device)
        summed = torch.zeros(shape[0] * shape[1], device=device).index_add(0, slot, picked).view(shape)
        summed = summed.masked_fill(absent, -torch.inf)
        if not compare:
            return summed, None
        others = (read.argmax(dim=-1) != token).float()
        wrong = torch.zeros(shape[0] * shape[1], device=device).index_add(0, slot, others).view(shape)
        return summed, (wrong == 0) & ~absent

    def tokens(self, length: int, words: Sequence[Tokens]) -> int:
        """See ``Whole``."""
        lines = _lines(words)
        return length + sum(len(self._start) + len(line) + length // LOOK for line in lines)

    def growing(self) -> Growing:
        """See ``Whole``."""
        return _Rows(self, self._start)

    def layer_states(self, embedded: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See ``Whole``; of the encoder."""
        out = self._model.get_encoder()(inputs_embeds=embedded[None], output_hidden_states=True)
        return tuple(state[0] for state in out.hidden_states)

    def attention(self, embedded: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See ``Whole``; of the decoder, to what the encoder has made of each token."""
        encoded, mask = self.encode([embedded])
        ids, of_line = _padded_ids([self._start], embedded.device)
        out = self.decode(encoded, mask, ids, of_line, output_attentions=True)
        layers = tuple(getattr(out, "cross_attentions", None) or ())
        return () if any(layer is None for layer in layers) else tuple(layer[0, :, -1] for layer in layers)

    def encode(self, rows: Sequence[torch.Tensor]) -> tuple[Any, torch.Tensor]:
        """The encoder's own output for embedded inputs ``[T_i, H]``, and their mask, int64 ``[B, T]``."""
        embedded, mask = padded(rows)
        return self._model.get_encoder()(inputs_embeds=embedded, attention_mask=mask), mask

    def why_nothing_ahead(self, width: int) -> str:
        """Why no vectors ``[N, width]`` can stand before this model's decoder's input, in plain words; empty if they
        can: its decoder must make the same of tokens' embeddings as of the tokens."""
        decoder = self._model.get_decoder().get_input_embeddings()
        if decoder.weight.shape[1] != width:
            return f"the embeddings of its decoder have {decoder.weight.shape[1]} numbers, those of its encoder {width}"
        some = torch.arange(len(decoder.weight), device=decoder.weight.device)[-4:]
        try:
            with torch.no_grad():
                encoded, mask = self.encode([self._model.get_input_embeddings()(some)])
                ids, of_line = _padded_ids([(*self._start, *some[:3].tolist())], mask.device)
                alone = self.decode(encoded, mask, ids, of_line).logits.float()
                found = self.decode(encoded, mask, decoder(ids), of_line).logits.float()
        except Exception as error:  # of transformers alone
            return f"its decoder takes no embedded tokens ({type(error).__name__})"
        near = SAME if decoder.weight.dtype == torch.float32 else SAME_IN_16_BITS
        same = float((found.log_softmax(dim=-1) - alone.log_softmax(dim=-1)).abs().max()) <= near
        return "" if same else "its decoder makes something else of tokens' embeddings than of the tokens"

    def behind(self, ahead: torch.Tensor, line: Tokens) -> torch.Tensor:
        """A decoder's line, embedded ``[N + D, H]``, behind vectors ``[N, H]``."""
        lookup = self._model.get_decoder().get_input_embeddings()
        return torch.cat([ahead, lookup(torch.tensor(line, device=ahead.device))])

    def decode(
        self, encoded: Any, mask: torch.Tensor, inputs: torch.Tensor, of_line: torch.Tensor, **options: Any
    ) -> Any:
        """The model's output for ``D`` decoder tokens of ``N`` lines.

        Args:
            encoded, mask: as of ``encode``, for ``N`` rows.
            inputs: int64 ``[N, D]``, or embedded ``[N, D, H]``.
            of_line: int64, 1 for the tokens that are there, those of earlier passes included. It is always given: some
                models would take tokens for padding that have its id, such as the one that T5's decoder begins with.
            options: of the model's forward.
        """
        options = {"use_cache": False} | options
        kind = "decoder_inputs_embeds" if inputs.is_floating_point() else "decoder_input_ids"
        return self._model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_attention_mask=of_line,
            **{kind: inputs},
            **options,
        )

    def _laid_out(
        self, words: Sequence[Sequence[Tokens]], ahead: Sequence[int]
    ) -> tuple[list[Tokens], list[int], list[tuple[int, int, int, int]]]:
        """The decoder's lines; the row of each; and for each token of each word the line and column that it is read
        from, itself, and the word's place in ``[B, W]``. So many vectors stand ``ahead`` of each row's lines."""
        width, start = max(map(len, words)), len(self._start) - 1
        lines: list[Tokens] = []
        owners: list[int] = []
        steps: list[tuple[int, int, int, int]] = []
        for row, several in enumerate(words):
            own = _lines(several)
            for w, word in enumerate(several):
                number = next(i for i, line in enumerate(own) if line[: len(word) - 1] == word[:-1])
                for depth, token in enumerate(word):
                    steps.append((len(lines) + number, ahead[row] + start + depth, token, row * width + w))
            lines += [(*self._start, *line) for line in own]
            owners += [row] * len(own)
        return lines, owners, steps


@dataclass(eq=False)
class _Group:
    """Rows that began together: all of them have as many decoder tokens.

    Attributes:
        inputs: embedded; empty once they have run.
        encoded, mask: what the encoder has made of them.
        past: what their decoder tokens have left behind, transformers' own cache.
        count: how many decoder tokens have run.
        ids: int64 ``[B, D]``, those that have not.
        ahead: vectors ``[N, H]`` of each row before its decoder tokens; empty without, and once they have run.
    """

    inputs: list[torch.Tensor]
    ids: torch.Tensor
    ahead: list[torch.Tensor]
    encoded: Any = None
    mask: torch.Tensor | None = None
    past: Any = None
    count: int = 0


class _Rows:
    """Rows that are continued (a ``Growing``): the encoder runs once, the decoder once for each token."""

    def __init__(self, model: EncoderDecoder, start: Tokens) -> None:
        self._model = model
        self._start = start
        self._new: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._groups: list[_Group] = []
        self._places: list[tuple[_Group, int]] = []  # of each row that is no longer new

    def add(self, rows: Sequence[torch.Tensor], ahead: Ahead = None) -> None:
        """See ``Growing``."""
        self._new += zip(rows, [None] * len(rows) if ahead is None else ahead, strict=True)

    def logits(self) -> torch.Tensor:
        """See ``Growing``."""
        self._begin()
        found = {id(group): self._run(group) for group in self._groups}
        return torch.stack([found[id(group)][index] for group, index in self._places])

    def append(self, tokens: Sequence[int]) -> None:
        """See ``Growing``."""
        of_group: dict[int, list[tuple[int, int]]] = {}
        for (group, index), token in zip(self._places, tokens, strict=True):
            of_group.setdefault(id(group), []).append((index, token))
        for group in self._groups:
            next_ones = [token for _, token in sorted(of_group[id(group)])]
            group.ids = torch.tensor(next_ones, device=group.ids.device)[:, None]

    def keep(self, places: Sequence[int]) -> None:
        """See ``Growing``."""
        begun = len(self._places)
        self._new = [self._new[i - begun] for i in places if i >= begun]
        kept = [self._places[i] for i in places if i < begun]
        moved: dict[tuple[int, int], int] = {}
        for group in self._groups:
            indices = sorted(index for owner, index in kept if owner is group)
            moved |= {(id(group), index): new for new, index in enumerate(indices)}
            if 0 < len(indices) < len(group.ids):
                _select(group, indices)
        self._places = [(group, moved[id(group), index]) for group, index in kept]
        self._groups = [group for group in self._groups if any(owner is group for owner, _ in kept)]

    def _begin(self) -> None:
        """Makes groups of the rows that are new, of similar length, and with as many vectors before the decoder's
        input."""
        new, self._new = self._new, []
        places: dict[int, tuple[_Group, int]] = {}
        lengths = [0 if ahead is None else len(ahead) for _, ahead in new]
        for length in dict.fromkeys(lengths):
            alike = [i for i, own in enumerate(lengths) if own == length]
            for part in micro_batches([len(new[i][0]) for i in alike], TOGETHER):
                members = [alike[i] for i in part]
                inputs = [new[i][0] for i in members]
                ids = torch.tensor([self._start] * len(inputs), device=inputs[0].device)
                group = _Group(inputs, ids, [ahead for i in members if (ahead := new[i][1]) is not None and length])
                self._groups.append(group)
                places |= {i: (group, index) for index, i in enumerate(members)}
        self._places += [places[i] for i in range(len(new))]

    def _run(self, group: _Group) -> torch.Tensor:
        """Logits float32 ``[B, V]`` behind the decoder tokens that have not run."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        if group.inputs:
            group.encoded, group.mask = self._model.encode(group.inputs)
            group.past, group.inputs = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
        assert group.mask is not None
        inputs = group.ids
        if group.ahead:
            inputs = torch.stack([self._model.behind(ahead, self._start) for ahead in group.ahead])
            group.ahead = []
        group.count += inputs.shape[1]
        there = torch.ones(len(group.ids), group.count, dtype=torch.long, device=group.ids.device)
        out = self._model.decode(group.encoded, group.mask, inputs, there, past_key_values=group.past, use_cache=True)
        group.past = out.past_key_values
        return out.logits[:, -1].float()  # type: ignore[no-any-return]


def _select(group: _Group, indices: Sequence[int]) -> None:
    """Leaves only these rows of a group that has run."""
    chosen = torch.tensor(indices, device=group.ids.device)
    assert group.mask is not None
    group.ids, group.mask = group.ids[chosen], group.mask[chosen]
    group.encoded = _with_states(group.encoded, group.encoded.last_hidden_state[chosen])
    group.past.batch_select_indices(chosen)


def _with_states(encoded: Any, states: torch.Tensor) -> Any:
    """An encoder's output of its own kind, with other states: a mixture of experts has fields that its decoder looks
    for."""
    return type(encoded)(last_hidden_state=states)


def _lines(words: Sequence[Tokens]) -> list[Tokens]:
    """What a decoder must read to tell the probability of all words: all but the last token of each, without those that
    another one begins with."""
    read = sorted({word[:-1] for word in words}, key=lambda line: (-len(line), line))
    return [line for i, line in enumerate(read) if not any(other[: len(line)] == line for other in read[:i])]


def _padded_ids(lines: Sequence[Tokens], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Lines of decoder tokens int64 ``[N, D]``, padded on the right, and 1 for each that is there."""
    width = max(map(len, lines))
    ids = torch.tensor([[*line, *[0] * (width - len(line))] for line in lines], device=device)
    lengths = torch.tensor([[len(line)] for line in lines], device=device)
    return ids, (torch.arange(width, device=device) < lengths).long()


def decoder_start(model: Any, tokenizer: Any, name: str) -> Tokens:
    """The tokens that the decoder of a model begins with, before the target's own.

    Behind the one that the model says stand those that the tokenizer puts before a target, if they are others: BART's
    decoder begins with ``</s>``, and the targets that it has learned with ``<s>``.

    Args:
        model: an encoder–decoder of transformers.
        tokenizer: its tokenizer.
        name: what the user calls it.

    Raises:
        BaseModelError: the model says none.
    """
    config = model.config
    sources = [getattr(model, "generation_config", None), config, getattr(config, "decoder", None)]
    names = ("decoder_start_token_id", "bos_token_id")
    said = [getattr(source, which, None) for which in names for source in sources]
    first = next((token for token in said if isinstance(token, int)), None)
    if first is None:
        raise BaseModelError(
            f"the base model {name!r} ({config.model_type}) should say which token its decoder begins with, but does "
            "not; set decoder_start_token_id in its config.json"
        )
    bare = tokenizer("a", add_special_tokens=False, verbose=False).input_ids
    before, _ = around(bare, tokenizer(text_target="a", verbose=False).input_ids)
    return (first,) if before in ((), (first,)) else (first, *before)


def require_embedded(model: Any, name: str, start: Tokens) -> None:
    """Refuses an encoder–decoder that computes no gradients from embedded tokens, or other numbers from embedded and
    padded tokens than from the tokens alone.

    Args:
        model: of transformers, in evaluation mode.
        name: what the user calls it.
        start: the tokens that its decoder begins with.

    Raises:
        BaseModelError: it is one.
    """
    kind, lookup, parts = model.config.model_type, model.get_input_embeddings(), EncoderDecoder(model, start)
    some = torch.arange(len(lookup.weight), device=lookup.weight.device)[-8:]
    word = tuple(some[:3].tolist())
    try:
        with torch.enable_grad():
            leaf = lookup(some).detach().requires_grad_()
            score = parts.score([leaf[:4], leaf], [[word], [word + word]], compare=False)[0][0, 0]
            torch.autograd.grad(score, leaf)
            score = score.detach()
        with torch.no_grad():
            states = model.get_encoder()(input_ids=some[None]).last_hidden_state
            found = parts.encode([leaf])[0].last_hidden_state
            ids, of_line = _padded_ids([(*start, *word[:-1])], leaf.device)
            out = model(input_ids=some[None, :4], decoder_input_ids=ids, decoder_attention_mask=of_line)
            logprobs = out.logits[0, -len(word) :].float().log_softmax(dim=-1)
            alone = logprobs.gather(1, some[:3, None]).sum()
    except Exception as error:  # of transformers alone
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise BaseModelError(
            f"the base model {name!r} ({kind}) does not compute scores and gradients from embedded tokens "
            f"({type(error).__name__}: {reason}); give another encoder-decoder, such as T5 or BART"
        ) from error
    near = torch.allclose(states, found, rtol=1e-2, atol=1e-2 * float(states.float().square().mean().sqrt()))
    if not near or float((score - alone).abs()) > (SAME if leaf.dtype == torch.float32 else SAME_IN_16_BITS):
        raise BaseModelError(
            f"the base model {name!r} ({kind}) computes other numbers from embedded and padded tokens than from the "
            "tokens alone; give another encoder-decoder, such as T5 or BART"
        )
