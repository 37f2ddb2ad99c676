"""FrozenLM: a base model whose weights never change, and everything that is computed with it."""

from __future__ import annotations

import contextlib
import copy as copying
import math
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from softprompt.data.packages import DEFAULT_BASE
from softprompt.errors import ConfigError
from softprompt.files import StrPath, local_path
from softprompt.model import attention, continuing, quantized, trial
from softprompt.model.architecture import (
    WHOLE,
    Family,
    Head,
    core_of,
    decoder_layers,
    embedding_table,
    family_of,
    feed,
    leave_out_images,
    longest_steady,
    why_whole_sequences,
    window_of,
)
from softprompt.model.attention import Masks
from softprompt.model.batch import Batch, Row, collate
from softprompt.model.causal import require_causal
from softprompt.model.chains import collate_chains
from softprompt.model.distributed import ALONE, World, own_device
from softprompt.model.embedder import Embedder
from softprompt.model.encoder_decoder import EncoderDecoder, decoder_start, require_embedded
from softprompt.model.fast.blocks import can_use_blocks
from softprompt.model.fast.fixed_rows import FixedRows
from softprompt.model.fast.layers import LayerModes
from softprompt.model.fast.packed import PackedWeights
from softprompt.model.fingerprint import fingerprint_tokenizer, model_settings, weights_digest
from softprompt.model.loading import fingerprint_of, lasting, load_base, own_dtype, pick_device, pick_dtype
from softprompt.model.memory import less_at_once, tokens_that_fit
from softprompt.model.notes import heard
from softprompt.model.passes import Passes
from softprompt.model.per_layer import read, read_virtual
from softprompt.model.prefixes import PrefixCache, PrefixOf
from softprompt.model.reading import summed
from softprompt.model.request import Request, prompt_of
from softprompt.model.scoring import scores, scores_and_greedy
from softprompt.model.sharding import divide
from softprompt.model.state.prefix import PrefixState
from softprompt.model.state.recurrent import RowStates, Slots
from softprompt.model.state.slots import RowKV, give_back_freed
from softprompt.model.trained import TrainedPrefixes
from softprompt.model.whole import Whole, WholeSequences
from softprompt.text.tokens import SOFT, Tokens, frequent_tokens

GAIN_TOKENS = 100
"""Frequent tokens that ``FrozenLM.first_layer_gain`` is measured with."""


class FrozenLM(Embedder):
    """A frozen causal language model, or encoder–decoder, with its tokenizer. Of a model of images and text, the
    language model: ``text_only`` takes out what reads images.

    Attributes:
        model: transformers' own; in evaluation mode, no weight requires a gradient.
        device: where it is.
        shares_prefix: whether the shared-prefix computation serves this architecture.
        why_whole_sequences: why not, in plain words; empty if it does.
        longest_steady: the most tokens of a sequence whose prefix can be computed once.
        recurrent: whether some layers that prefixes enter have a state of one size for a memory.
        layers: how its decoder layers run in training.
        keeps_latents: whether its layers with attention keep latents.
        hands_over: whether some of its layers read the keys and values of others.
        passes: how it computes with shared prefixes.
        fixed_rows: passes over the last tokens of rows that are continued, as CUDA graphs.
        whole: how it computes whole sequences, with nothing shared.
        avoids_one_row: whether a row alone is computed twice.
        packed: its weights as a CPU's products of few rows want them; for continuing, token by token.
        world: the processes that share the work. All of them must ask for the same, in the same order.
        num_parameters: how many weights the base model has, shared ones counted once.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str | None = None,
        text_only: bool = False,
        world: World = ALONE,
    ) -> None:
        fingerprint = fingerprint_of(model)  # as its weights are stored
        if text_only:
            leave_out_images(model)
        self.world, self.device, config = world, pick_device(device), model.config
        stored, found = quantized.stored_precision(config), pick_dtype(dtype, self.device)
        self.num_parameters, self.longest_steady = quantized.count_weights(model), longest_steady(config)
        self.quantized = stored or quantize or ""
        self._layers = decoder_layers(model)
        if world.shard != "none":
            if self.quantized:
                raise ConfigError(
                    f"--shard {world.shard} divides weights in 16 or 32 bits, found {self.quantized}; leave one of "
                    "both out."
                )
            for weight in model.parameters():
                if weight.is_floating_point():
                    weight.data = weight.data.to(found)
            self.model = model.eval().requires_grad_(False)
            divide(model, self._layers, world, self.device, name)
            self.model.to(self.device)
        else:
            if quantize not in (None, stored):
                quantized.quantize_layers(model, quantize, self.device, name)
            self.model = quantized.placed(model, found, self.device, name).eval().requires_grad_(False)
        super().__init__(
            name=name,
            tokenizer=tokenizer,
            embedding=embedding_table(model),
            window=window_of(config, tokenizer),
            fingerprint=fingerprint,
            tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
            settings=model_settings(config),
            quantized=self.quantized,
            generation_config=getattr(model, "generation_config", None),
            decoder_start=decoder_start(model, tokenizer, name) if config.is_encoder_decoder else (),
        )
        self.whole: Whole
        if self.encoder_decoder:
            require_embedded(self.model, name, self.decoder_start)
            self.whole = EncoderDecoder(self.model, self.decoder_start)
        else:
            require_causal(self.model, name, rms=self.embedding_rms)
            self.whole = WholeSequences(self.model, self.longest_steady)
        # In 16 bits, a CPU rounds the matrix product of one row otherwise than that row's among others: where a row
        # alone is computed twice, its text is the same in any company.
        self.avoids_one_row = self.device.type == "cpu" and self.dtype != torch.float32
        self.packed, self.layers = PackedWeights(self.model), LayerModes(self._layers)
        self.fixed_rows = FixedRows(wanted=self.device.type == "cuda" and world.shard == "none")
        self.take_up(family := family_of(config), why_whole_sequences(config))
        if family is None and config.model_type not in WHOLE and not self.encoder_decoder:
            trial.run(self)

    def take_up(self, family: Family | None, why_whole_sequences: str) -> None:
        """Goes on as is right for a family; without one, or with a reason, by whole sequences."""
        self.why_whole_sequences = why_whole_sequences
        self.shares_prefix = not self.why_whole_sequences
        self.recurrent = self.shares_prefix and family is not None and family.recurrent
        self._text_config = self.model.config.get_text_config()
        self._head = family.head if family else Head()
        self.keeps_latents = family is not None and family.latent
        self.hands_over = bool(getattr(self._text_config, "num_kv_shared_layers", 0))
        mask = Masks.of(self._text_config, family, self.dtype)
        by_blocks = self.plain and mask.fits_blocks and can_use_blocks(self.device)
        core, layers = core_of(self.model), len(self._layers)
        self.passes = Passes(core, layers, mask, self.recurrent, self.keeps_latents, by_blocks)
        if self.shares_prefix:
            attention.install(self.model, self._layers)

    @classmethod
    def load(
        cls,
        base: StrPath = DEFAULT_BASE,
        *,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        quantize: str | None = None,
        world: World = ALONE,
    ) -> FrozenLM:
        """Loads and freezes a base model.

        Args:
            base: ``smollm2-135m``, a hub id, a folder with safetensors, or a GGUF file.
            dtype: ``fp32``, ``bf16``, ``fp16``, or ``auto``: bf16 where the processor computes it natively, else fp32.
            device: ``auto``, ``cpu``, ``cuda``, ``mps`` …
            trust_remote_code: run code that comes with the model.
            quantize: ``nf4``, ``int8``, ``int4``, ``fp8`` or ``gguf``: how its layers are stored; None: as they are.
            world: the processes that share the work, see ``World.join``.

        Raises:
            BaseModelError: it cannot be found or read, or is neither a causal language model nor an encoder–decoder; or
                it is stored quantised already, as another than ``quantize``, or so that this machine cannot compute it.
            ConfigError: an unknown dtype or device, or a precision that this machine cannot compute with.
        """
        base = str(local_path(base)) if os.fspath(base).startswith("~") else os.fspath(base)
        device = own_device(device) if world.size > 1 else device
        device_found = pick_device(device)
        pick_dtype(dtype, device_found)
        if quantize is not None:
            quantized.require_precision(quantize, device_found)
        with heard():
            where: Any = {"device": device_found, "quantize": quantize}
            model, tokenizer = load_base(base, trust_remote_code=trust_remote_code, **where)
            if quantized.stored_precision(model.config) and dtype == "auto" and not quantized.is_own(model):
                dtype = own_dtype(model)
            options: Any = {"dtype": dtype, "device": device, "quantize": quantize, "world": world}
            lm = cls(model, tokenizer, name=base, text_only=True, **options)
        give_back_freed()  # what quantising took
        return lm

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
        quantize: str | None = None,
    ) -> FrozenLM:
        """Freezes a causal language model, or an encoder–decoder, of transformers that is loaded already.

        It is frozen in place: it is set to evaluation mode, none of its weights requires a gradient any more, and its
        attention is computed by softprompt, with the same results. Its weights are not changed otherwise, unless it is
        to be quantised.

        Args:
            model: the model, without adapters; it may be quantised already.
            tokenizer: its tokenizer.
            name: what soft prompts remember as their base model; by default where it was loaded from.
            copy: freeze a copy, which takes its memory a second time, and leave the model as it is.
            dtype, device: as for :meth:`load`; ``auto``: the model's own.
            quantize: as for :meth:`load`.

        Raises:
            ConfigError: the model has adapters of PEFT; or an unknown dtype or device.
            BaseModelError: it is neither of the two.
        """
        if hasattr(model, "peft_config"):
            raise ConfigError(
                "Expected a base model without adapters, found one of PEFT; merge it with merge_and_unload(), or take "
                "its base with unload()."
            )
        model = copying.deepcopy(model) if copy else model
        weight = model.get_input_embeddings().weight
        return cls(
            model,
            tokenizer,
            name=name or lasting(model.config._name_or_path or type(model).__name__),
            dtype=own_dtype(model) if dtype == "auto" else dtype,
            device=str(weight.device) if device == "auto" else device,
            quantize=quantize,
        )

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        precision = f"{self.quantized}, computed in {dtype}" if self.quantized else dtype
        return f"<FrozenLM {self.name}: {self.num_parameters:,} weights, {precision}, {self.device}>"

    @property
    def num_layers(self) -> int:
        """``L``, how many layers read the soft prompt: of the decoder, or of an encoder–decoder's encoder."""
        return len(self._layers)

    @cached_property
    def first_layer_gain(self) -> float:
        """How many times as large as what goes in, a frequent token's embedding, is what comes out of the first layer
        (RMS, median over tokens); at least 1."""
        ids = frequent_tokens(self.tokenizer, len(self.embedding), 0)[: min(GAIN_TOKENS, self.window)]
        with torch.no_grad(), self.eager():
            states = self.whole.layer_states(self.rows(ids, None))
        before, after = (state[1:].float().square().mean(dim=1).sqrt() for state in states[:2])
        gain = float((after / before).median())
        return max(1.0, gain) if math.isfinite(gain) else 1.0

    @property
    def compiles(self) -> bool:
        """Whether all layers can share compiled graphs: what is not ``plain``, and quantised layers, cannot."""
        return self.plain and not self.quantized

    @property
    def plain(self) -> bool:
        """Whether passes of one shape do the same and wait for nothing: layers that ask a cache by number or choose
        experts do not, nor do those that hand keys and values to others or that others than us have quantised."""
        experts = any("experts" in name for name, _ in self._layers.named_parameters())
        whole = self.world.shard == "none" and quantized.is_own(self.model) and not self.hands_over
        return whole and self.shares_prefix and not (self.recurrent or self.keeps_latents or experts)

    @cached_property
    def trained(self) -> TrainedPrefixes:
        """What this model can take as a trained prefix."""
        return TrainedPrefixes(self)

    @cached_property
    def tokens_at_once(self) -> int:
        """The most tokens, padding included, in a micro-batch with gradient."""
        return tokens_that_fit(self._layers, self.model.config, self.dtype, len(self.embedding), self.device)

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
            vectors: float ``[P, H]``, or a trained prefix, ``[P, L, 2, H_kv, D]`` or ``[N]``, which stands at ``SOFT``
                as it is: tokens before it do not see it, those behind it do. What tokens before it left in recurrent
                layers, a trained state replaces. None if ``ids`` holds no ``SOFT``.
            before: one prefix that is known already and that ``ids`` stand behind.

        Returns:
            What all of them leave behind, ``before`` included.
        """
        if vectors is None or vectors.dim() == 2 or SOFT not in ids:
            return self._run_prefix(ids, vectors, before)
        place, known = list(ids).index(SOFT), self.trained.state(vectors)
        if place:
            before = self._run_prefix(ids[:place], None, before)
        if before is not None:
            known = before.join(known)
        behind = ids[place + 1 :]
        return self._run_prefix(behind, None, known) if behind else known

    def prefixes_kv(self, prefixes: Sequence[Sequence[int]], vectors: Sequence[torch.Tensor]) -> PrefixState:
        """Several shared prefixes beside each other; those of plain soft prompts are computed in one pass.

        Args:
            prefixes, vectors: of each, as for ``prefix_kv``; none is empty.
        """
        if self.recurrent or any(numbers.dim() != 2 for numbers in vectors):
            first, *others = [self.prefix_kv(ids, own) for ids, own in zip(prefixes, vectors, strict=True)]
            return first.stack(others)
        rows = [self.rows(ids, own) for ids, own in zip(prefixes, vectors, strict=True)]
        return self.passes.prefixes(rows, [len(row) for row in rows], None)

    def _run_prefix(self, ids: Sequence[int], vectors: torch.Tensor | None, before: PrefixState | None) -> PrefixState:
        """What ``before`` leaves behind, and behind it ``ids``, which see it."""
        embedded = self.rows(list(ids) or [0], vectors)
        length = len(embedded) if ids else 0  # of an empty prefix only the shape is taken, from a throw-away token
        own = self.passes.prefix(embedded, length, before)
        return own if before is None else before.join(own)

    def collate(self, rows: Sequence[Row], prefix_lengths: Sequence[int], device: torch.device | None = None) -> Batch:
        """Rows as one batch, laid out for this model, on its device unless another is given; as ``batch.collate``."""
        lay_out = collate_chains if self.recurrent else collate
        return lay_out(rows, prefix_lengths, device or self.device)

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
        return summed(batch, self.read_logits(batch, prefix))

    def score_stream(self, batch: Batch, vectors: torch.Tensor) -> torch.Tensor:
        """What ``score_batch`` returns, from a stream that holds its prefixes.

        Args:
            batch: a stream.
            vectors: float ``[S, H]``, those of its soft prompts one after the other; differentiable.
        """
        return summed(batch, self.read_logits(batch, None, vectors))

    def read_logits(
        self, batch: Batch, prefix: PrefixState | None, vectors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits float32 ``[M, V]`` at the places that the rows' words are read from."""
        embedded = self.read(batch.ids)
        if batch.soft is not None:
            assert vectors is not None
            embedded = embedded.index_copy(1, batch.soft, read_virtual(self.model, vectors.to(self.dtype))[None])
        hidden = self.passes.batch(batch, embedded, prefix)
        return self.logits(hidden[batch.read_lines, batch.read_columns])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 ``[M, V]`` of hidden states ``[M, H]``."""
        if self.avoids_one_row and len(hidden) == 1:
            return self.logits(hidden.expand(2, -1))[:1]
        hidden = hidden.to(self.dtype)  # Mamba 2 adds its layers up in fp32
        return self._head(self.model.get_output_embeddings()(hidden).float(), self._text_config)

    def slots(self, *, fixed: bool = False) -> Slots:
        """Where rows of this model grow; ``fixed``: to be continued token by token, where captured graphs find them."""
        if fixed and (self.recurrent or not self.shares_prefix):
            self.fixed_rows.without("its layers have states" if self.recurrent else "it runs whole sequences")
        if self.recurrent:
            return RowStates()
        return self.fixed_rows.slots() if fixed else RowKV()

    def next_logits(self, kv: Slots, embedded: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Runs the next tokens of every row behind those in ``kv``, and appends them there (``continuing``)."""
        return continuing.next_logits(self, kv, embedded, counts)

    def last_logits(self, kv: Slots, tokens: Sequence[int]) -> torch.Tensor:
        """``next_logits`` of one token a row, by id. On a GPU nothing waits for it."""
        return continuing.last_logits(self, kv, tokens)

    # --- the concatenation path: the reference, and what serves every other architecture ----------

    def score_concatenated(self, requests: Sequence[Request], soft_prompts: Sequence[torch.Tensor]) -> torch.Tensor:
        """What ``score_batch`` computes, by running every word of every request as a whole sequence of its own, or for
        an encoder–decoder every request's input once.

        Differentiable in ``soft_prompts``.

        Args:
            requests: at least one.
            soft_prompts: float ``[P_k, H]`` each.

        Returns:
            float32 ``[B, W]``.
        """
        return self.concatenated(requests, soft_prompts, compare=False)[0]

    def concatenated(
        self, requests: Sequence[Request], soft_prompts: Sequence[torch.Tensor], *, compare: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``score_concatenated``, and with ``compare`` bool ``[B, W]``: whether each token of a word is the most
        probable one."""
        inputs = [self.inputs(request, prompt_of(request, soft_prompts)) for request in requests]
        ahead = [own for _, own in inputs] if any(request.ahead for request in requests) else None
        with self.eager():
            words = [request.words for request in requests]
            return self.whole.score([row for row, _ in inputs], words, compare=compare, ahead=ahead)

    def inputs(self, request: Request, vectors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A request for ``whole``: its embedded input ``[T, H]``, and the vectors ``[N, H]`` before the decoder's.

        Raises:
            ConfigError: there are some, and this model's decoder cannot take them.
        """
        if vectors is None or not request.ahead:
            return self.rows(request.ids, vectors), self.embedding.new_zeros(0, self.hidden_size, dtype=self.dtype)
        self.require_ahead()
        own, ahead = vectors[: -request.ahead], vectors[-request.ahead :]
        return self.embed(request.ids, own), ahead.to(self.device, self.dtype)

    def require_ahead(self) -> None:
        """Raises a ``ConfigError`` where no virtual tokens can stand before a decoder's input."""
        if self._why_nothing_ahead:
            raise ConfigError(
                f"Expected a base model whose decoder takes virtual tokens before its input, which {self.name} is not: "
                f"{self._why_nothing_ahead}; leave decoder_virtual_tokens out."
            )

    @cached_property
    def _why_nothing_ahead(self) -> str:
        with self.eager():
            whole = self.whole if isinstance(self.whole, EncoderDecoder) else None
            return whole.why_nothing_ahead(self.hidden_size) if whole else "it is no encoder-decoder"

    def tokens_of(self, request: Request, num_virtual_tokens: int = 0) -> int:
        """How many tokens ``score_concatenated`` computes for a request."""
        length = len(request.ids) + (num_virtual_tokens - 1 if SOFT in request.ids else 0)
        return self.whole.tokens(length, request.words or ((),))

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """What tokens feed into the model: ``[…, H]`` of int64 ids ``[…]``, differentiable in the weights."""
        return feed(self.model, ids)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """``look_up``, and behind it what layers get of each token besides."""
        return read(self.model, ids)

    def rows(self, ids: Sequence[int], vectors: torch.Tensor | None) -> torch.Tensor:
        """``embed``, of all that the model reads."""
        return self._placed(ids, vectors, self.read, lambda own: read_virtual(self.model, own))

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
            soft_prompts: float ``[P_k, H]`` each, or trained prefixes; ``Request.prompt`` points into them.
            max_tokens: the most tokens, padding included, in one forward pass; by default twice ``tokens_at_once``.
            prefix_of: where prefixes come from; by default as many are kept as there are soft prompts, for as long as
                this call lasts.

        Returns:
            float32 ``[N, W]`` on the CPU, natural logarithm, summed over a word's tokens; ``-inf`` beyond a request's
            own words.
        """
        return scores(self, requests, soft_prompts, max_tokens, prefix_of)

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
        return scores_and_greedy(self, requests, soft_prompts, prefix_of)

    def eager(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, layers run as they are, compiled or not; all that is not training does."""
        return self.layers.eager()

    def take_less_at_once(self, tokens: int) -> None:
        """After a pass of so many tokens did not fit into memory: ``tokens_at_once`` becomes half of them at most, with
        a ``SoftPromptWarning``."""
        self.fixed_rows.free()
        self.tokens_at_once = less_at_once(min(self.tokens_at_once, tokens), self.device)
