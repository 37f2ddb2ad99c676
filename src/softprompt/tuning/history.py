"""The soft prompt at each validation of a training: what its run folder keeps of the way, for ``softprompt inspect``.

One file of tensors ``start.K.step.N``, float32 ``[P, H]``: start ``K`` after ``N`` optimizer steps of the run, the
first of each start being what it began with. It is written at each validation before the checkpoint, so that nothing
that a resumed run goes on from is missing; what is in it too early is dropped then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from softprompt.errors import StoreError
from softprompt.files import StrPath, atomic_writer, local_path

FILE = "history.safetensors"
MOST = 32
"""Validations of which all are kept; of more, every second, every fourth …"""

Entries = dict[tuple[int, int], torch.Tensor]
"""Number of the start, optimizer steps of the run → float32 ``[P, H]`` on the CPU."""
_NAME = re.compile(r"start\.(\d{1,9})\.step\.(\d{1,12})")


class History:
    """The history of a training in the making."""

    def __init__(self, folder: StrPath | None) -> None:
        """Begins without entries.

        Args:
            folder: the run folder; None keeps nothing.
        """
        self._folder = None if folder is None else local_path(folder)
        self._entries: Entries = {}

    def add(self, start: int, step: int, vectors: torch.Tensor) -> None:
        """Takes vectors ``[P, H]`` that nobody changes any more; a trained prefix, and numbers that are not finite, are
        left out."""
        if self._folder is not None and vectors.dim() == 2 and bool(vectors.isfinite().all()):
            self._entries[start, step] = vectors.detach().cpu()

    def write(self, validations: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> None:
        """Writes the file, whole or not at all, with what is to be kept of the entries.

        That depends on the validations so far alone, so that a resumed run keeps the same: what each start began with,
        the best and the last validation; of the others all, or every second, fourth … if there were more than ``MOST``,
        twice, four times … as many.

        Args:
            validations: all of the run, in their order, by ``start`` and ``step``.
            best: that of the best soft prompt so far.

        Raises:
            OSError: the folder cannot be written, or is full.
        """
        if self._folder is None or not self._entries:
            return
        every = 1
        while len(validations) > MOST * every:
            every *= 2
        keys = [(found["start"], found["step"]) for found in validations]
        kept = {key for i, key in enumerate(keys, start=1) if i % every == 0} | set(keys[-1:])
        dropped = set(keys) - kept - (set() if best is None else {(best["start"], best["step"])})
        self._entries = {key: vectors for key, vectors in self._entries.items() if key not in dropped}
        tensors = {f"start.{start}.step.{step}": vectors for (start, step), vectors in self._entries.items()}
        with atomic_writer(self._folder / FILE) as file:
            file.write(to_bytes(tensors))

    def resume(self, step: int) -> None:
        """Takes up what the file has up to that step; what is behind it will be made again.

        Raises:
            StoreError: the file is damaged.
        """
        if self._folder is not None and (self._folder / FILE).is_file():
            self._entries |= {key: vectors for key, vectors in load(self._folder).items() if key[1] <= step}


def load(folder: StrPath) -> Entries:
    """Reads the history in a run folder.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    path = local_path(folder) / FILE
    if not path.is_file():
        raise StoreError(
            f"There is no training's history in {path.parent}; expected the file {FILE} of a run folder there."
        )
    entries: Entries = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                match, vectors = _NAME.fullmatch(name), file.get_tensor(name)
                if match is None or vectors.dtype != torch.float32 or vectors.dim() != 2:
                    raise ValueError(f"it holds {name!r}, {str(vectors.dtype).removeprefix('torch.')}")
                if not vectors.isfinite().all():
                    raise ValueError(f"{name} is not finite")
                entries[int(match[1]), int(match[2])] = vectors
        shapes = {(start, vectors.shape) for (start, _), vectors in entries.items()}
        if not entries or len(shapes) != len({start for start, _ in shapes}):
            raise ValueError("its vectors have not all one shape")
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(
            f"The training's history {path} is damaged ({error}); move it away to go on without."
        ) from error
    return entries
