"""Cells of one method that learn together: which they are, and where what they have learned so far is kept.

Each group has a folder, until every cell of the group is done, so that a comparison that was stopped goes on
in the middle of a training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from softprompt.compare.plan import Key
from softprompt.files import atomic_writer

FOLDER, CELLS = "training", "cells.json"


@dataclass(frozen=True)
class Group:
    """Cells that learn together.

    Attributes:
        keys: the cells that are left, alike but for their seeds.
        seeds: those of all that began together.
        path: their folder.
    """

    keys: tuple[Key, ...]
    seeds: tuple[int, ...]
    path: Path

    @classmethod
    def of(cls, folder: Path, key: Key, todo: Sequence[Key]) -> Group:
        """The group of a cell: the one that it was stopped in, or else all that are left of its method and in no group.

        Args:
            folder: the comparison's.
            key: the cell.
            todo: the cells that are left to run, ``key`` among them.
        """
        there = list(filter(None, map(_kept, sorted((folder / FOLDER).glob(f"*/{CELLS}")))))
        for group in there:
            if key in group.keys:
                return replace(group, keys=tuple(one for one in group.keys if one in todo))
        taken = {one for group in there for one in group.keys}
        keys = tuple(
            one for one in todo if (one.base, one.method) == (key.base, key.method) and (one == key or one not in taken)
        )
        own = cls(keys, tuple(one.seed for one in keys), folder / FOLDER / _free(folder, key))
        shutil.rmtree(own.path, ignore_errors=True)
        own._keep()
        return own

    def done(self, key: Key) -> None:
        """A cell needs what was learned no more."""
        there = _kept(self.path / CELLS)
        left = () if there is None else tuple(one for one in there.keys if one != key)
        if any(one in self.keys for one in left):
            replace(self, keys=left)._keep()
        else:
            self.drop()

    def drop(self) -> None:
        """Gives up what was learned."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # others are there
            self.path.parent.rmdir()

    def _keep(self) -> None:
        first = self.keys[0]
        left = [key.seed for key in self.keys]
        document = {"base": first.base, "method": first.method, "seeds": list(self.seeds), "left": left}
        with atomic_writer(self.path / CELLS) as file:
            file.write(json.dumps(document).encode())


def _free(folder: Path, key: Key) -> str:
    """A name for a new folder."""
    name = key.file_name
    while (folder / FOLDER / name / CELLS).exists():
        name += "+"
    return name


def _kept(path: Path) -> Group | None:
    """A group that was stopped; None where its file is damaged."""
    try:
        found = json.loads(path.read_bytes())
        keys = tuple(Key(str(found["base"]), str(found["method"]), int(seed)) for seed in found["left"])
        return Group(keys, tuple(map(int, found["seeds"])), path.parent)
    except (OSError, ValueError, TypeError, KeyError):
        return None
