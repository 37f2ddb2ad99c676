"""Input texts behind a soft prompt, embedded, for transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from softprompt.data.example import Example
from softprompt.errors import ConfigError
from softprompt.model.frozen import FrozenLM
from softprompt.model.whole import padded
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.predict import default_sampling
from softprompt.tasks.task import Task


@torch.no_grad()
def embedded(
    lm: FrozenLM, soft_prompt: SoftPrompt, examples: Sequence[Example], max_new_tokens: int | None = None
) -> dict[str, torch.Tensor]:
    """What ``model.generate`` takes for these examples, padded on the left as it wants, or of an encoder–decoder on the
    right.

    Args:
        lm: the base model of the soft prompt.
        soft_prompt: of embeddings.
        examples: at least one; targets are not looked at.
        max_new_tokens: tokens that are kept free behind each text; None: those of ``default_sampling``.

    Returns:
        ``inputs_embeds`` ``[B, T, H]`` in the base model's dtype, and ``attention_mask`` int64 ``[B, T]``, on its
        device; of an encoder–decoder also ``decoder_input_ids`` int64 ``[B, 1]`` or more, what its decoder begins with.

    Raises:
        BaseModelError: the soft prompt is of another base model.
        ConfigError: it is a KV prefix or a trained state, which are no embeddings, there are no examples, or the
            model's layers get more of a token than its embedding.
    """
    if lm.reads_parts:
        raise ConfigError(
            f"transformers' own generate takes embeddings alone, and the layers of {lm.name} get more of each token; "
            "take softprompt.predict."
        )
    task = Task.of(lm, soft_prompt)
    if soft_prompt.kind != "soft prompt":
        remedy = "answer with softprompt" if soft_prompt.parts else "export it --to cartridge and load that with PEFT"
        raise ConfigError(
            f"Expected a soft prompt of embeddings, found a {soft_prompt.kind}, which no embeddings of an input stand "
            f"for; {remedy}."
        )
    if not examples:
        raise ConfigError("Expected at least one input text, found none.")
    free = default_sampling(task).max_new_tokens if max_new_tokens is None else max_new_tokens
    requests = [task.open_request(example, free) for example in examples]
    rows = [lm.embed(request.ids, soft_prompt.vectors) for request in requests]
    if lm.encoder_decoder:
        beside, mask = padded(rows)
        start = torch.tensor([lm.decoder_start] * len(rows), device=lm.device)
        return {"inputs_embeds": beside, "attention_mask": mask, "decoder_input_ids": start}
    longest = max(map(len, rows))
    shifted = torch.stack([torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
    places = torch.arange(longest, device=lm.device)
    lengths = torch.tensor([len(row) for row in rows], device=lm.device)
    return {"inputs_embeds": shifted, "attention_mask": (places >= longest - lengths[:, None]).long()}
