"""A soft prompt that may stand at the very start of a sequence, with what stands before it in our template baked in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from softprompt.errors import ConfigError
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.text.tokens import SOFT, Tokens


@dataclass(frozen=True, eq=False)
class Baked:
    """Numbers for the start of a sequence, and the tokens that follow them.

    Other tools put virtual tokens before everything else, also before the token that begins a sequence. A template may
    put text before the soft prompt; its tokens become virtual ones, too, so that the sequence stays what it was.

    Attributes:
        numbers: float32 ``[P', H]`` on the CPU: embeddings of the tokens before the soft prompt, and the soft prompt;
            or ``[P', L, 2, H_kv, D]``: keys (after any rotary embedding) and values of the same.
        before: the tokens that became virtual ones.
        task: the soft prompt's task.
    """

    numbers: torch.Tensor
    before: Tokens
    task: Task

    @property
    def is_kv(self) -> bool:
        """Whether the numbers are keys and values."""
        return self.numbers.dim() == 5

    @property
    def num_virtual_tokens(self) -> int:
        """``P'``."""
        return len(self.numbers)

    def rest(self, ids: Tokens) -> Tokens:
        """The tokens of a sequence of the task that follow the numbers."""
        return ids[ids.index(SOFT) + 1 :]


@torch.no_grad()
def bake(lm: FrozenLM, soft_prompt: SoftPrompt, *, kv: bool = False) -> Baked:
    """What stands for a soft prompt at the very start of a sequence.

    Args:
        lm: its base model.
        soft_prompt: what is exported.
        kv: keys and values in the place of embeddings, which a soft prompt of embeddings has, too.

    Raises:
        BaseModelError: the soft prompt is of another base model.
        ConfigError: input stands before the soft prompt; or there is a KV prefix and embeddings are asked for, or there
            are several tensors; or the base model has no shared prefix and keys and values are.
    """
    task = Task.of(lm, soft_prompt)
    kinds = [part.kind for part in task.template.parts]
    if "field" in kinds[: kinds.index("soft")]:
        raise ConfigError(
            f"Expected a template with the soft prompt before all input, found {soft_prompt.template!r}; other tools "
            f"put it first, so this one has no exact form there."
        )
    before = task.encoder.before_soft_prompt
    vectors = soft_prompt.vectors
    if soft_prompt.parts:
        raise ConfigError(
            f"Expected a soft prompt of embeddings, or of keys and values, found a {soft_prompt.kind} in "
            f"{soft_prompt.name!r}, for which other tools have no format; keep its own file."
        )
    if not kv:
        if vectors.dim() != 2:
            raise ConfigError(
                "Expected a soft prompt of embeddings for this format, found a trained KV prefix, which no embeddings "
                "stand for; export it --to prefix-tuning or cartridge."
            )
        return Baked(torch.cat([lm.look_up(_ids(lm, before)).float().cpu(), vectors]), before, task)
    if lm.trained.why_no_kv:
        raise ConfigError(
            f"Expected a base model whose keys and values can be read, which {lm.name} is not: {lm.trained.why_no_kv}; "
            f"export embeddings."
        )
    return Baked(lm.trained.numbers((*before, SOFT), vectors).cpu(), before, task)


def _ids(lm: FrozenLM, ids: Tokens) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.long, device=lm.device)
