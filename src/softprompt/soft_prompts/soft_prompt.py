"""A soft prompt: ``P`` vectors of the base model's embedding width, a trained KV prefix or a trained state, and the
metadata needed to use it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softprompt.drawing.words import amount, html_table, plain_metric
from softprompt.errors import BaseModelError, PrecisionWarning
from softprompt.files import StrPath
from softprompt.soft_prompts import artifact
from softprompt.soft_prompts.metadata import Metadata, sizes_of, virtual_tokens

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(Metadata):
    """``P`` virtual tokens and their metadata (Lester et al. 2021, §2; for a KV prefix Li and Liang 2021, §4).

    Attributes:
        vectors: float32 ``[P, H]`` on the CPU, finite; row ``i`` is virtual token ``i``. Of a trained KV prefix
            ``[P, L, 2, H_kv, D]``: for each virtual token the keys (after any rotary embedding) and values of every
            layer. Of a trained state ``[N]``: the tensors of ``parts``, one after the other. The virtual tokens before
            a decoder's input are the last rows.
    """

    vectors: torch.Tensor

    @property
    def num_virtual_tokens(self) -> int:
        """``P``: how many places it takes in a sequence; none if it is a state alone."""
        return virtual_tokens(self.parts) if self.parts else int(self.vectors.shape[0])

    @property
    def extent(self) -> str:
        """How much it is, in words: ``64 virtual tokens``; of a trained state its numbers, too."""
        tokens = f"{self.num_virtual_tokens} virtual tokens"
        if self.decoder_virtual_tokens:
            return f"{tokens}, and {self.decoder_virtual_tokens} before the decoder's input"
        if not self.parts:
            return tokens
        numbers = f"a trained state of {self.vectors.numel():,} numbers"
        if not self.num_virtual_tokens:
            return numbers
        everywhere = all(name.endswith((".keys", ".values")) for name in self.parts)
        return f"{numbers}, {tokens}" + ("" if everywhere else " where there is attention")

    @property
    def is_chat(self) -> bool:
        """Whether it was tuned on conversations, each by the base model's own chat template, and stands before them."""
        train = self.data.get("train", {})
        return isinstance(train, Mapping) and bool(train.get("chat"))

    def __repr__(self) -> str:
        """``<SoftPrompt sst2: 64 virtual tokens on smollm2-135m, validation accuracy 0.9072 ± 0.0068 (n = 872)>``."""
        kind = "layers' keys and values of " if self.kind == "trained KV prefix" else ""
        metric = self.metrics[0] if self.metrics else None
        worth = "" if metric is None else f", {metric['split']} {plain_metric(metric)}"
        return f"<SoftPrompt {self.name}: {kind}{self.extent} on {self.base}{worth}>"

    def _repr_html_(self) -> str:
        """What there is to know of it at a glance, as a table for a notebook."""
        numbers = self.vectors.numel()
        rows = [
            ("name", self.name),
            ("base model", self.base),
            ("virtual tokens", f"{self.num_virtual_tokens:,}"),
            ("numbers", f"{numbers:,} ({amount(4 * numbers, 'B')})"),
            ("template", self.template),
            ("labels", "free text" if self.verbalizer is None else ", ".join(self.verbalizer)),
            *((str(metric["split"]), plain_metric(metric)) for metric in self.metrics),
        ]
        return html_table(("soft prompt", ""), rows)

    @classmethod
    def load(cls, path: StrPath) -> SoftPrompt:
        """Reads what :meth:`save` wrote; vectors float32 on the CPU.

        Sequences inside ``training``, ``data`` and ``metrics`` come back as lists, as JSON has it. A stored soft prompt
        is found by its name with ``Store().load(name)``.

        Args:
            path: the ``.safetensors`` file.

        Raises:
            ArtifactError: there is no such file, or it is truncated, corrupted, foreign or of a newer schema.
        """
        import torch

        fields, numbers = artifact.read(path)
        return cls(vectors=torch.from_numpy(numbers), **fields)

    def save(self, path: StrPath) -> None:
        """Writes it to ``path``, in place of what was there, atomically; missing folders are made.

        Raises:
            ArtifactError: the vectors are not finite float32 of their parametrisation's shape, or a field has no JSON
                form.
            StoreError: the folder cannot be written, or is full; a file that was there before is unchanged.
        """
        artifact.write(self.encoded(), path, self.name)

    def encoded(self) -> bytes:
        """The whole file, as :meth:`save` writes it.

        Raises:
            ArtifactError: as for :meth:`save`.
        """
        return artifact.encode(self, self.vectors)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of ``vectors`` by name."""
        return sizes_of(self, self.vectors.shape)


load, save = SoftPrompt.load, SoftPrompt.save


def check_base(
    soft_prompt: SoftPrompt,
    *,
    base: str,
    base_fingerprint: str,
    tokenizer_fingerprint: str,
    hidden_size: int,
    base_settings: Mapping[str, Any],
    quantized: str = "",
) -> None:
    """Refuses every base model but the one that ``soft_prompt`` was tuned on; the same model under another id passes.
    So does that model in another precision, with a ``PrecisionWarning``.

    Args:
        soft_prompt: what is to be used.
        base: id of the loaded base model.
        base_fingerprint: hex digest of its type and weights.
        tokenizer_fingerprint: hex digest of its tokenizer.
        hidden_size: its embedding width H, which a trained KV prefix does not show; its fingerprint does.
        base_settings: the settings of its configuration. Those that only one of both has are not compared: a file of an
            earlier release has none, and another release of transformers knows others.
        quantized: what its linear layers are quantised to; empty: they are not.

    Raises:
        BaseModelError: width, weights, tokenizer or a setting differ.
    """
    width = soft_prompt.sizes.get("hidden_size", hidden_size)
    if width != hidden_size:
        tuned, loaded = f"width {width}", f"width {hidden_size}"
    elif soft_prompt.base_fingerprint != base_fingerprint:
        tuned, loaded = f"fingerprint {soft_prompt.base_fingerprint[:12]}", f"fingerprint {base_fingerprint[:12]}"
    elif soft_prompt.tokenizer_fingerprint != tokenizer_fingerprint:
        tuned = f"tokenizer {soft_prompt.tokenizer_fingerprint[:12]}"
        loaded = f"tokenizer {tokenizer_fingerprint[:12]}"
    elif differing := [
        key for key, value in soft_prompt.base_settings.items() if base_settings.get(key, value) != value
    ]:
        key = differing[0]
        tuned, loaded = f"{key} {soft_prompt.base_settings[key]!r}", f"{key} {base_settings[key]!r}"
    else:
        if quantized != soft_prompt.quantized:
            precisions = [one for one in (soft_prompt.quantized, quantized) if one]
            tuned, now = (one or "unquantised" for one in (soft_prompt.quantized, quantized))
            warnings.warn(
                f"the soft prompt '{soft_prompt.name}' was trained on its base model {tuned}, and is used on it {now}; "
                f"`softprompt evaluate {soft_prompt.name} TEST --on {' '.join(precisions)}` measures what that costs",
                PrecisionWarning,
                stacklevel=1,  # one place, so that it is said once
            )
        return
    wanted = f"the '{base}' of that time" if soft_prompt.base == base else f"'{soft_prompt.base}'"
    raise BaseModelError(
        f"The soft prompt '{soft_prompt.name}' was tuned on the base model '{soft_prompt.base}' ({tuned}), "
        f"but the one loaded is '{base}' ({loaded}); load {wanted}, or tune a new soft prompt on '{base}'."
    )
