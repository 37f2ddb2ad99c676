"""Several tasks that one soft prompt is tuned for: each row has the template and the words of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from softprompt.data.example import Example
from softprompt.model.request import Request
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task


@dataclass(frozen=True)
class MixedTask(Task):
    """A task of several parts. All targets are texts to it; what is stored is the first part's task.

    Attributes:
        parts: the tasks, alike in base model, length of the soft prompt and longest sequence.
        part_of: ``id`` of an example → the number of its part. The examples must be kept as long as this is.
    """

    parts: tuple[Task, ...] = ()
    part_of: Mapping[int, int] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def mixed(cls, parts: Sequence[Task], examples: Sequence[Sequence[Example]]) -> MixedTask:
        """The tasks together, and the examples of each."""
        first = parts[0]
        part_of = {id(example): number for number, own in enumerate(examples) for example in own}
        return cls(
            first.lm,
            first.template,
            None,
            first.num_virtual_tokens,
            first.max_length,
            parts=tuple(parts),
            part_of=part_of,
        )

    def soft_prompt(self, vectors: torch.Tensor, **said: Any) -> SoftPrompt:
        return self.parts[0].soft_prompt(vectors, **said)

    def asks(self, example: Example) -> bool:
        return self.part_of[id(example)] == 0

    def target_request(self, example: Example, prompt: int | None = 0) -> Request:
        return self.parts[self.part_of[id(example)]].target_request(example, prompt)

    def remember(self) -> None:
        for part in self.parts:
            part.remember()

    def of_length(self, num_virtual_tokens: int) -> Task:
        parts = tuple(part.of_length(num_virtual_tokens) for part in self.parts)
        return replace(cast(MixedTask, super().of_length(num_virtual_tokens)), parts=parts)

    def without_soft_prompt(self, hard_text: str = "") -> Task:
        parts = tuple(part.without_soft_prompt(hard_text) for part in self.parts)
        return MixedTask(self.lm, parts[0].template, None, 0, self.max_length, parts=parts, part_of=self.part_of)
