"""FrozenLM: a base model whose weights never change, and everything that is computed with it."""

from __future__ import annotations

import contextlib
import copy as copying
import inspect
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from softprompt.data.packages import DEFAULT_BASE
from softprompt.errors import ConfigError
from softprompt.files import StrPath, local_path
from softprompt.model import attention
from softprompt.model.architecture import (
    decoder_layers,
    embedding_table,
    family_of,
    matrix_ends,
    require_causal,
    why_whole_sequences,
    window_of,
)
from softprompt.model.attention import Masks
from softprompt.model.batch import Batch, Row, collate, micro_batches
from softprompt.model.embedder import Embedder
from softprompt.model.fast.compiled import compiled_if_possible
from softprompt.model.fast.packed import PackedWeights
from softprompt.model.fingerprint import fingerprint_model, fingerprint_tokenizer, model_settings, weights_digest
from softprompt.model.joined import Joined, apart, join, share_beginnings
from softprompt.model.loading import DTYPES, lasting, load_base, pick_device, pick_dtype
from softprompt.model.notes import heard
from softprompt.model.prefixes import PrefixCache, PrefixOf
from softprompt.model.request import Request, prompt_of
from softprompt.model.state.kv import PrefixKV
from softprompt.model.state.prefix import PrefixState
from softprompt.model.state.slots import RowKV
from softprompt.text.tokens import SOFT, Tokens, frequent_tokens

MAX_TOKENS = 2048
"""Tokens in one micro-batch on a CPU, padding included: enough for matrix products near their peak, little enough for
memory."""

MOST_TOKENS = 16384
"""On a GPU at most as many, from where on launching kernels costs little."""

GPU_SHARE = 0.1
"""Share of a GPU's memory that a micro-batch with gradient should not exceed by much."""

GAIN_TOKENS = 100
"""Frequent tokens that ``FrozenLM.first_layer_gain`` is measured with."""


class FrozenLM(Embedder):
    """A frozen causal language model with its tokenizer.

    Attributes:
        model: transformers' own; in evaluation mode, no weight requires a gradient.
        device: where it is.
        shares_prefix: whether the shared-prefix computation serves this architecture.
        why_whole_sequences: why not, in plain words; empty if it does.
        compiled: whether the decoder layers are compiled now.
        packed: its weights as a CPU's products of few rows want them; for continuing, token by token.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, dtype: str = "auto", device: str = "auto") -> None:
        fingerprint = fingerprint_model(model)  # of the weights as they are stored
        self.device, config = pick_device(device), model.config
        found = pick_dtype(dtype, self.device)
        # Not ``model.to(dtype)``: it would round the rotary frequencies too, which in bf16 is a radian at 1000 tokens.
        for weight in model.parameters():
            if weight.is_floating_point():
                weight.data = weight.data.to(found)
        self.model = model.to(self.device).eval().requires_grad_(False)
        super().__init__(
            name=name,
            tokenizer=tokenizer,
            embedding=embedding_table(model),
            window=window_of(config, tokenizer),
            fingerprint=fingerprint,
            tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
            settings=model_settings(config),
            generation_config=getattr(model, "generation_config", None),
        )
        require_causal(self.model, name, rms=self.embedding_rms)
        family = family_of(config)
        self.why_whole_sequences = why_whole_sequences(config)
        self.shares_prefix = not self.why_whole_sequences
        self._mask = Masks.of(config, family.windows if family else "none", self.dtype)
        self._layers = decoder_layers(model)
        # In 16 bits, a CPU rounds the matrix product of one row otherwise than that row's among others: where a row
        # alone is computed twice, its text is the same in any company.
        self._avoids_one_row = self.device.type == "cpu" and self.dtype != torch.float32
        self.compiled = False
        self.packed = PackedWeights(self.model)
        if self.shares_prefix:
            attention.install(model, self._layers)

    @classmethod
    def load(
        cls, base: StrPath = DEFAULT_BASE, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
    ) -> FrozenLM:
        """Loads and freezes a base model.

        Args:
            base: ``smollm2-135m``, a hub id, a folder with safetensors, or a GGUF file.
            dtype: ``fp32``, ``bf16``, ``fp16``, or ``auto``: bf16 where the processor computes it natively, else fp32.
            device: ``auto``, ``cpu``, ``cuda``, ``mps`` …
            trust_remote_code: run code that comes with the model.

        Raises:
            BaseModelError: it cannot be found or read, or is no causal language model.
            ConfigError: an unknown dtype or device.
        """
        base = os.fspath(base)
        if base.startswith("~"):
            base = str(local_path(base))
        device_found = pick_device(device)
        pick_dtype(dtype, device_found)
        with heard():
            model, tokenizer = load_base(base, trust_remote_code=trust_remote_code)
            return cls(model, tokenizer, name=base, dtype=dtype, device=device)

    @classmethod
    def wrap(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        name: str | None = None,
        copy: bool = False,
        dtype: str = "auto",
        device: str = "auto",
    ) -> FrozenLM:
        """Freezes a causal language model of transformers that is loaded already.

        It is frozen in place: it is set to evaluation mode, none of its weights requires a gradient any more, and its
        attention is computed by softprompt, with the same results. Its weights are not changed otherwise.

        Args:
            model: the model, without adapters.
            tokenizer: its tokenizer.
            name: what soft prompts remember as their base model; by default where it was loaded from.
            copy: freeze a copy, which takes its memory a second time, and leave the model as it is.
            dtype, device: as for :meth:`load`; ``auto``: the model's own.

        Raises:
            ConfigError: the model has adapters of PEFT; or an unknown dtype or device.
            BaseModelError: it is no causal language model.
        """
        if hasattr(model, "peft_config"):
            raise ConfigError(
                "Expected a base model without adapters, found one of PEFT; merge it with merge_and_unload(), or take "
                "its base with unload()."
            )
        model = copying.deepcopy(model) if copy else model
        weight = model.get_input_embeddings().weight
        own = next((known for known, torch_dtype in DTYPES.items() if torch_dtype == weight.dtype), "auto")
        return cls(
            model,
            tokenizer,
            name=name or lasting(model.config._name_or_path or type(model).__name__),
            dtype=own if dtype == "auto" else dtype,
            device=str(weight.device) if device == "auto" else device,
        )

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<FrozenLM {self.name}: {self.num_parameters:,} weights, {dtype}, {self.device}>"

    @property
    def num_layers(self) -> int:
        """``L``, the number of decoder layers."""
        return len(self._layers)

    @cached_property
    def first_layer_gain(self) -> float:
        """How many times as large as what goes in, a frequent token's embedding, is what comes out of the first decoder
        layer (RMS, median over tokens); at least 1."""
        ids = frequent_tokens(self.tokenizer, len(self.embedding), 0)[: min(GAIN_TOKENS, self.window)]
        embedded = self.embed(ids, None)[None]
        with torch.no_grad(), self.eager():
            states = self.model(inputs_embeds=embedded, use_cache=False, output_hidden_states=True).hidden_states
        before, after = (state[0, 1:].float().square().mean(dim=1).sqrt() for state in states[:2])
        return max(1.0, float((after / before).median()))

    @cached_property
    def kv_shape(self) -> tuple[int, ...]:
        """``(L, 2, H_kv, D)``, the shape of a virtual token of a trained KV prefix; only with ``shares_prefix``."""
        return tuple(self.prefix_numbers((), None).shape[1:])

    @cached_property
    def tokens_at_once(self) -> int:
        """The most tokens, padding included, in a micro-batch with gradient.

        A GPU wants more than a CPU: passes over few tokens spend their time on launching kernels. It gets as many as
        keep what backward needs, all that goes into and comes out of each matrix product, within ``GPU_SHARE``.
        """
        if self.device.type != "cuda":
            return MAX_TOKENS
        ends = matrix_ends(self._layers, self.model.config)
        logits = 2 * torch.float32.itemsize * self.embedding.shape[0]
        memory = torch.cuda.get_device_properties(self.device).total_memory
        fitting = int(GPU_SHARE * memory / (self.dtype.itemsize * ends + logits))
        return min(max(MAX_TOKENS, fitting), MOST_TOKENS)

    @property
    def num_parameters(self) -> int:
        """How many weights the base model has, shared ones counted once."""
        return sum(p.numel() for p in self.model.parameters())

    def weights_digest(self) -> str:
        """Hex digest of every bit of every weight in memory; no training may change it."""
        return weights_digest(self.model)

    @cached_property
    def digest_before(self) -> str:
        """``weights_digest()`` when it was first asked for: before the first training, what all must leave so."""
        return self.weights_digest()

    # --- the shared-prefix path --------------------------------------------------------------------------------------

    def prefix_kv(
        self, ids: Sequence[int], vectors: torch.Tensor | None, before: PrefixState | None = None
    ) -> PrefixState:
        """Computes a shared prefix once; differentiable in ``vectors``.

        Args:
            ids: the prefix's token ids, ``SOFT`` where ``vectors`` stand; may be empty.
            vectors: float ``[P, H]``, or a trained KV prefix ``[P, L, 2, H_kv, D]``, which stands at ``SOFT`` as it is:
                tokens before it do not see it, those behind it do; None if ``ids`` holds no ``SOFT``.
            before: one prefix that is known already and that ``ids`` stand behind.

        Returns:
            What all of them leave behind, ``before`` included.
        """
        assert before is None or isinstance(before, PrefixKV)
        if vectors is None or vectors.dim() == 2 or SOFT not in ids:
            return self._run_prefix(ids, vectors, before)
        place = list(ids).index(SOFT)
        known = PrefixKV.of_numbers(vectors.to(self.device, self.dtype))
        if place:
            before = self._run_prefix(ids[:place], None, before)
        if before is not None:
            known = before.join(known)
        behind = ids[place + 1 :]
        return self._run_prefix(behind, None, known) if behind else known

    @torch.no_grad()
    def prefix_numbers(self, ids: Sequence[int], vectors: torch.Tensor | None) -> torch.Tensor:
        """A prefix as the numbers of a trained KV prefix.

        Args:
            ids, vectors: as for ``prefix_kv``; only with ``shares_prefix``.

        Returns:
            float32 ``[P, L, 2, H_kv, D]``, of all of its tokens, keys after any rotary embedding.
        """
        with self.eager():
            prefix = self.prefix_kv(ids, vectors)
        assert isinstance(prefix, PrefixKV)
        return prefix.numbers().float().contiguous()

    def _run_prefix(self, ids: Sequence[int], vectors: torch.Tensor | None, before: PrefixKV | None = None) -> PrefixKV:
        """Keys and values of ``before``, and behind them of ``ids``, which see those."""
        embedded = self.embed(list(ids) or [0], vectors)
        start = 0 if before is None else before.width
        kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self._layers]
        seen = torch.arange(start + len(embedded), device=self.device)[None]
        positions = seen[:, start:]
        self.model.base_model(
            inputs_embeds=embedded[None],
            attention_mask=self._mask(positions[..., None] >= seen[:, None], positions, seen),
            position_ids=positions,
            use_cache=False,
            keep=kept,
            prefix=before,
        )
        length = embedded.shape[0] if ids else 0  # of an empty prefix only the shape is taken, from a throw-away token
        own = PrefixKV(
            keys=tuple(layer[0][0][:, :, :length] for layer in kept),
            values=tuple(layer[0][1][:, :, :length] for layer in kept),
            lengths=(length,),
        )
        return own if before is None else before.join(own)

    def kept_prefixes(self, most: int | None = None, *, capacity: int | None = None) -> PrefixCache:
        """``prefix_kv`` without gradient that keeps its last results: ``most``, ``capacity`` bytes, or all."""

        def compute(ids: Tokens, vectors: torch.Tensor | None) -> PrefixState:
            with self.eager():
                return self.prefix_kv(ids, vectors)

        return PrefixCache(compute, most=most, capacity=capacity)

    def score_batch(self, batch: Batch, prefix: PrefixState) -> torch.Tensor:
        """Log-probabilities of each row's words; differentiable in ``prefix``.

        Returns:
            float32 ``[B, W]``, natural logarithm, summed over a word's tokens; ``-inf`` where a row has fewer than
            ``W`` words.
        """
        return _summed(batch, self._read_logits(batch, prefix))

    def _read_logits(self, batch: Batch, prefix: PrefixState) -> torch.Tensor:
        """Logits float32 ``[M, V]`` at the places that the rows' words are read from."""
        hidden = self._hidden(batch, prefix)
        return self._logits(hidden[batch.read_lines, batch.read_columns])

    def _hidden(self, batch: Batch, prefix: PrefixState) -> torch.Tensor:
        """Hidden states ``[B, T, H]`` of the rows after the last layer's norm."""
        before = torch.arange(prefix.width, device=self.device).expand(len(batch.ids), -1)
        embedded = self.look_up(batch.ids)
        out = self.model.base_model(
            inputs_embeds=embedded,
            attention_mask=self._mask(batch.sees, batch.positions, torch.cat([before, batch.positions], dim=1)),
            position_ids=batch.positions,
            use_cache=False,
            prefix=prefix,
            prefix_rows=batch.prefix_rows,
        )
        return out.last_hidden_state  # type: ignore[no-any-return]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._avoids_one_row and len(hidden) == 1:
            return self._logits(hidden.expand(2, -1))[:1]
        return self.model.get_output_embeddings()(hidden).float()  # type: ignore[no-any-return]

    def next_logits(self, kv: RowKV, embedded: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Runs the next tokens of every row behind those in ``kv``, and appends them there.

        Args:
            kv: the rows so far, ``B`` of them.
            embedded: ``[B, T, H]``, padded on the right.
            counts: how many of the ``T`` tokens are each row's own, at least one.

        Returns:
            float32 ``[B, V]``, the logits after each row's last token.
        """
        columns = kv.extend(counts, embedded.shape[1])
        alone = self._avoids_one_row and embedded.shape[:2] == (1, 1)
        if alone:
            embedded, columns, counts = embedded.expand(2, -1, -1), columns.expand(2, -1), [*counts, *counts]
        own = torch.tensor(counts)
        padding = torch.arange(embedded.shape[1]) >= own[:, None]
        columns, places = columns.to(self.device), torch.arange(kv.width, device=self.device)[None]
        out = self.model.base_model(
            inputs_embeds=embedded,
            attention_mask=self._mask(columns[..., None] >= places[:, None], columns, places),
            position_ids=columns.masked_fill(padding.to(self.device), 0),
            past_key_values=kv,
            use_cache=True,
        )
        logits = self._logits(out.last_hidden_state[torch.arange(len(own)), own - 1])
        return logits[:1] if alone else logits

    # --- the concatenation path: the reference, and what serves every other architecture ----------

    def score_concatenated(self, requests: Sequence[Request], soft_prompts: Sequence[torch.Tensor]) -> torch.Tensor:
        """What ``score_batch`` computes, by running every word of every request as a whole sequence of its own.

        Differentiable in ``soft_prompts``.

        Args:
            requests: at least one.
            soft_prompts: float ``[P_k, H]`` each.

        Returns:
            float32 ``[B, W]``.
        """
        return self._concatenated(requests, soft_prompts, compare=False)[0]

    def _concatenated(
        self, requests: Sequence[Request], soft_prompts: Sequence[torch.Tensor], *, compare: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``score_concatenated``, and with ``compare`` bool ``[B, W]``: whether each token of a word is the most
        probable one."""
        places = [(r, w, word) for r, request in enumerate(requests) for w, word in enumerate(request.words)]
        rows = [
            self.embed((*requests[r].ids, *word[:-1]), prompt_of(requests[r], soft_prompts)) for r, _, word in places
        ]
        logits = self.run_whole(rows, [len(word) for _, _, word in places])
        width = max(len(request.words) for request in requests)
        scores: list[list[torch.Tensor | float]] = [[-torch.inf] * width for _ in requests]
        greedy = torch.zeros(len(requests), width, dtype=torch.bool, device=self.device) if compare else None
        for (r, w, word), part in zip(places, logits, strict=True):
            read = torch.tensor(word, device=self.device)
            scores[r][w] = part.log_softmax(dim=-1).gather(1, read[:, None]).sum()
            if greedy is not None:
                greedy[r, w] = (part.argmax(dim=-1) == read).all()
        summed = torch.stack([torch.stack([torch.as_tensor(s, device=self.device) for s in row]) for row in scores])
        return summed, greedy

    def run_whole(self, rows: Sequence[torch.Tensor], last: Sequence[int]) -> Sequence[torch.Tensor]:
        """Logits float32 ``[last, V]`` at so many last places of each embedded sequence ``[T, H]``, by the model's own
        forward. Its head leaves out what lies before them in all rows: over a large vocabulary it would cost more than
        all layers."""
        embedded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        lengths = torch.tensor([row.shape[0] for row in rows], device=self.device)
        mask = (torch.arange(embedded.shape[1], device=self.device) < lengths[:, None]).long()
        first = min(len(row) - count for row, count in zip(rows, last, strict=True))
        can_leave_out = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        options = {"logits_to_keep": embedded.shape[1] - first} if can_leave_out else {}
        with self.eager():
            logits = self.model(inputs_embeds=embedded, attention_mask=mask, use_cache=False, **options).logits.float()
        left_out = embedded.shape[1] - logits.shape[1]
        ends = [len(row) - left_out for row in rows]
        return [line[end - count : end] for line, end, count in zip(logits, ends, last, strict=True)]

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """What tokens feed into the model: ``[…, H]`` of int64 ids ``[…]``, differentiable in the weights."""
        return self.model.get_input_embeddings()(ids)  # type: ignore[no-any-return]

    # --- whole jobs without gradient ---------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self,
        requests: Sequence[Request],
        soft_prompts: Sequence[torch.Tensor] = (),
        *,
        max_tokens: int | None = None,
        prefix_of: PrefixOf | None = None,
    ) -> torch.Tensor:
        """Log-probabilities of each request's words; every request may use another soft prompt.

        Args:
            requests: each with at least one word.
            soft_prompts: float ``[P_k, H]`` each, or trained KV prefixes ``[P_k, L, 2, H_kv, D]``; ``Request.prompt``
                points into them.
            max_tokens: the most tokens, padding included, in one forward pass; by default twice ``tokens_at_once``.
            prefix_of: where prefixes come from; by default as many are kept as there are soft prompts, for as long as
                this call lasts.

        Returns:
            float32 ``[N, W]`` on the CPU, natural logarithm, summed over a word's tokens; ``-inf`` beyond a request's
            own words.
        """
        width = max((len(request.words) for request in requests), default=0)
        scores = torch.full((len(requests), width), -torch.inf)
        for places, part, _ in self._scored(requests, soft_prompts, max_tokens, prefix_of, compare=False):
            scores[places, : part.shape[1]] = part.cpu()
        return scores

    @torch.no_grad()
    def score_and_compare(
        self,
        requests: Sequence[Request],
        soft_prompts: Sequence[torch.Tensor] = (),
        *,
        prefix_of: PrefixOf | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``score``, and whether greedy decoding would write each word.

        Args:
            requests, soft_prompts, prefix_of: as for ``score``.

        Returns:
            float32 ``[N, W]`` as ``score`` gives them; bool ``[N, W]``, true where each of a word's tokens is the most
            probable one after those before it, false beyond a request's own words. Both on the CPU.
        """
        width = max((len(request.words) for request in requests), default=0)
        scores, greedy = torch.full((len(requests), width), -torch.inf), torch.zeros(len(requests), width).bool()
        for places, part, same in self._scored(requests, soft_prompts, None, prefix_of, compare=True):
            assert same is not None
            scores[places, : part.shape[1]], greedy[places, : part.shape[1]] = part.cpu(), same.cpu()
        return scores, greedy

    def _scored(
        self,
        requests: Sequence[Request],
        soft_prompts: Sequence[torch.Tensor],
        max_tokens: int | None,
        prefix_of: PrefixOf | None,
        *,
        compare: bool,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """The places of the requests of each batch, their words' scores, and with ``compare`` whether greedy decoding
        would write them."""
        prefix_of = prefix_of or self.kept_prefixes(max(1, len(soft_prompts)))
        for group in self._groups(share_beginnings(requests), max_tokens or 2 * self.tokens_at_once):
            members = [request for one in group for request in one.requests]
            with self.eager():
                if self.shares_prefix and members[0].shares_prefix:
                    rows, prefix = self._rows(group, soft_prompts, prefix_of)
                    batch = collate(rows, prefix.lengths, self.device)
                    if compare:
                        logits = self._read_logits(batch, prefix)
                        part, same = apart(_summed(batch, logits), group), apart(_greedy(batch, logits), group)
                    else:
                        part, same = apart(self.score_batch(batch, prefix), group), None
                else:
                    part, same = self._concatenated(members, soft_prompts, compare=compare)
            yield torch.tensor([place for one in group for place in one.places]), part, same

    def _groups(self, requests: Sequence[Request], max_tokens: int) -> Iterator[list[Joined]]:
        """Batches of requests that one path serves, of similar length; the answers of a conversation are together where
        they share what they begin with."""
        for shares in (True, False):
            chosen = [i for i, r in enumerate(requests) if (self.shares_prefix and r.shares_prefix) == shares]
            if shares:
                joined = [
                    Joined(tuple(chosen[place] for place in one.places), one.requests)
                    for one in join([requests[i] for i in chosen], max_tokens)
                ]
                lengths = [one.row().length for one in joined]
            else:
                joined = [Joined((i,), (requests[i],)) for i in chosen]
                lengths = [sum(len(requests[i].ids) + len(word) for word in requests[i].words or ((),)) for i in chosen]
            for group in micro_batches(lengths, max_tokens):
                yield [joined[i] for i in group]

    def _rows(
        self, joined: Sequence[Joined], soft_prompts: Sequence[torch.Tensor], prefix_of: PrefixOf
    ) -> tuple[list[Row], PrefixState]:
        """Rows and the prefixes they point at, each prefix computed once."""
        index: dict[tuple[Tokens, int | None], int] = {}
        rows, prefixes = list[Row](), list[PrefixState]()
        for one in joined:
            request = one.requests[0]
            key = (request.ids[: request.shared], request.prompt)
            if key not in index:
                index[key] = len(index)
                prefixes.append(prefix_of(key[0], prompt_of(request, soft_prompts)))
            rows.append(one.row(index[key]))
        return rows, prefixes[0].stack(prefixes[1:])

    # --- compilation ------------------------------------------------------------------------------

    def compile_layers(self) -> None:
        """Compiles the decoder layers for training (``torch.compile``, dynamic shapes); evaluation stays as it is.

        All layers share two compiled graphs, for the prefix and for the rows. The first layer stays uncompiled: its
        input needs no gradient, which would make it another graph, and much of the compile time, for one layer.
        Where the compiler turns out not to work, all layers go on as they are, with a ``SoftPromptWarning``.
        """
        if not self.compiled:
            for layer in self._layers[1:]:
                layer.forward = compiled_if_possible(layer.forward, self.uncompile_layers)
            self.compiled = True

    def uncompile_layers(self) -> None:
        """Undoes ``compile_layers``."""
        if self.compiled:
            for layer in self._layers[1:]:
                del layer.forward
            self.compiled = False

    def eager(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, layers run as they are, compiled or not; all that is not training does."""
        return torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()


def _summed(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 ``[B, W]`` of each row's words from logits ``[M, V]`` where they are read."""
    picked = logits.log_softmax(dim=-1)[batch.step_read, batch.step_token]
    scores = torch.zeros((batch.size + 1) * batch.num_words, device=logits.device)
    scores = scores.index_add(0, batch.step_slot, picked).view(-1, batch.num_words)
    return scores[: batch.size].masked_fill(_absent(batch), -torch.inf)


def _greedy(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """Whether each token of a word is the most probable one, bool ``[B, W]``, from the same logits."""
    others = (logits.argmax(dim=-1)[batch.step_read] != batch.step_token).float()
    count = torch.zeros(batch.size * batch.num_words, device=logits.device).index_add(0, batch.step_slot, others)
    return (count.view(batch.size, batch.num_words) == 0) & ~_absent(batch)


def _absent(batch: Batch) -> torch.Tensor:
    return torch.arange(batch.num_words, device=batch.ids.device) >= batch.word_counts[:, None]
