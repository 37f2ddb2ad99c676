"""A method of adapting a base model: what it is called, does and needs, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from softprompt.drawing.style import GREY

if TYPE_CHECKING:
    from pathlib import Path

    from softprompt.errors import SoftPromptError
    from softprompt.methods.problem import Learned, Problem

Kind = Literal["floor", "hard prompt", "soft prompt", "weights"]
"""What it adapts: nothing of a language model, the text in front, vectors or keys and values in front, or weights."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to adapt a base model to a task.

    Attributes:
        name: what it is called in results and options.
        words: what it is, in one line.
        run: learns from the problem's rows.
        together: learns for several seeds in shared passes, with a folder for its checkpoints; None: it cannot. Of
            each, what was learned or why nothing was.
        kind: what it adapts.
        needs_labels: it cannot do free text.
        reads_instructions: the user's hard prompts change what it does.
        needs_instructions: it cannot do without one.
        seeded: it draws something, and runs once for every seed.
        validated: it is validated while it is trained, on the same rows as the others that are.
        of_several_seeds: it is made of the soft prompts of all seeds.
        alone: of several processes, the first one runs it while the others wait: it trains weights, or by another
            library's loop.
        if_asked: it runs only where it is named.
        calibrates: the method whose answers it calibrates; None: it calibrates none.
        colour: of its marks and lines in figures.
        marker: of its marks, as matplotlib names them.
        hollow: its marks are filled with white.
    """

    name: str
    words: str
    run: Callable[[Problem], Learned]
    together: Callable[[Sequence[Problem], Path], list[Learned | SoftPromptError]] | None = None
    kind: Kind
    needs_labels: bool = False
    reads_instructions: bool = False
    needs_instructions: bool = False
    seeded: bool = False
    validated: bool = False
    of_several_seeds: bool = False
    alone: bool = False
    if_asked: bool = False
    calibrates: str | None = None
    colour: str = GREY
    marker: str = "o"
    hollow: bool = False
