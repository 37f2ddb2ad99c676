"""The folder that a run leaves behind, which one run at a time may hold, over all processes of a machine.

A training keeps its checkpoint, ``log.jsonl`` and history there (``checkpoint.py``, ``history.py``); ``stored.json``
lists the SHA-256 digests of the soft prompts that the run may replace: those that it stored itself, and what
``--overwrite`` gave up.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from softprompt.errors import StoreError
from softprompt.files import StrPath, atomic_writer, local_path, strict_json
from softprompt.tuning import checkpoint, history

STORED = "stored.json"
SWEEP = "sweep.json"
"""What a sweep goes on from, see ``sweep.py``."""
_LOCK, _PROCESS = ".lock", ".process"


class RunFolder:
    """A folder that is held by one run at a time; the system frees it when a process dies.

    Attributes:
        path: the folder; it is made when it is held.
        name: what runs there is called.
        kind: what runs there: ``training``, ``sweep`` or ``comparison``.
    """

    def __init__(self, path: StrPath, name: str, kind: str = "training") -> None:
        """Names a folder.

        Args:
            path: the folder.
            name: of the soft prompt or task.
            kind: ``training``, ``sweep`` or ``comparison``.
        """
        self._held, self._made = 0, False
        self.path, self.name, self.kind = local_path(path), name, kind
        self._lock = FileLock(self.path / _LOCK, thread_local=False)

    def hold(self) -> None:
        """Takes the folder, or takes it once more; to be given back as often, see :meth:`release`.

        Raises:
            StoreError: another run holds it, or it cannot be written.
        """
        if not self._held:
            try:
                self._made = not self.path.exists()
                self.path.mkdir(parents=True, exist_ok=True)
                self._acquire()
                (self.path / _PROCESS).write_text(f"{os.getpid()} {platform.node()}", encoding="utf-8")
            except OSError as error:
                self._lock.release()
                raise self.unwritable(error) from error
        self._held += 1

    def _acquire(self) -> None:
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            gc.collect()  # a Training that nobody refers to any more frees its folder
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise StoreError(
                    f"A {self.kind} of {self.name!r} is running ({self._holder()}), see {self.path}; "
                    f"wait until it has ended, or stop it, or choose another name or folder."
                ) from None

    def _holder(self) -> str:
        """The process that holds the folder, as it wrote it down."""
        try:
            process, _, machine = (self.path / _PROCESS).read_text(encoding="utf-8").partition(" ")
        except (OSError, ValueError):
            return "another process"
        if machine != platform.node():
            return f"process {process} on {machine}"
        return "this process" if process == str(os.getpid()) else f"process {process}"

    def release(self) -> None:
        """Gives back what one :meth:`hold` took; a folder that it made, with nothing in it, is removed."""
        self._held -= 1
        if not self._held:
            with suppress(OSError):
                (self.path / _PROCESS).unlink(missing_ok=True)
                (self.path / _LOCK).unlink(missing_ok=True)  # while it is held: who waits for it looks again
                if self._made:
                    self.path.rmdir()
            self._lock.release()

    def __del__(self) -> None:
        if self._held:
            self._held = 1
            self.release()

    def require_free(self) -> None:
        """Refuses a folder that another run holds at the moment; nothing is made.

        Raises:
            StoreError: it is held.
        """
        if (self.path / _LOCK).exists():
            with self:
                pass

    def __enter__(self) -> RunFolder:
        self.hold()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    @property
    def stopped(self) -> bool:
        """Whether there is a checkpoint to go on from, or what is left of a sweep."""
        return (self.path / (SWEEP if self.kind == "sweep" else checkpoint.FILE)).exists()

    @property
    def stopped_other(self) -> str:
        """``training`` or ``sweep`` where one of the other kind was stopped; else empty."""
        other, name = ("training", checkpoint.FILE) if self.kind == "sweep" else ("sweep", SWEEP)
        return other if (self.path / name).exists() else ""

    def stamp(self) -> tuple[int, int] | None:
        """Changes whenever a checkpoint is written or removed."""
        try:
            found = (self.path / checkpoint.FILE).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def clear(self) -> None:
        """Removes what an earlier training left, and begins an empty log; the folder must be held.

        Raises:
            StoreError: the folder cannot be written.
        """
        try:
            for name in (checkpoint.FILE, checkpoint.EARLIER, checkpoint.LOG, history.FILE, SWEEP):
                (self.path / name).unlink(missing_ok=True)
            (self.path / checkpoint.LOG).touch()
        except OSError as error:
            raise self.unwritable(error) from error

    def remove(self) -> None:
        """Deletes the folder; it must be held."""
        shutil.rmtree(self.path)

    def log(self, line: Mapping[str, Any]) -> None:
        """Adds a line to the log.

        Raises:
            OSError: the folder cannot be written.
        """
        with open(self.path / checkpoint.LOG, "a", encoding="utf-8") as file:
            file.write(strict_json(line) + "\n")

    def may_replace(self, path: Path) -> bool:
        """Whether a soft prompt's file is one that the run stored, or was allowed to replace."""
        try:
            known = json.loads((self.path / STORED).read_text(encoding="utf-8"))
            return hashlib.sha256(path.read_bytes()).hexdigest() in known
        except (OSError, ValueError, TypeError):
            return False

    def allow(self, *contents: bytes, anew: bool = False) -> None:
        """Lets the run replace soft prompts of these contents.

        Args:
            contents: of whole files.
            anew: nothing that was allowed before.

        Raises:
            StoreError: the folder cannot be written.
        """
        known: list[str] = []
        if not anew:
            with suppress(OSError, ValueError, TypeError):
                known = list(json.loads((self.path / STORED).read_text(encoding="utf-8")))
        known += [hashlib.sha256(content).hexdigest() for content in contents]
        try:
            if not known:
                (self.path / STORED).unlink(missing_ok=True)
                return
            with atomic_writer(self.path / STORED) as file:
                file.write(strict_json(list(dict.fromkeys(known))).encode())
        except OSError as error:
            raise self.unwritable(error) from error

    def unwritable(self, error: OSError) -> StoreError:
        """What to tell the user of an error in writing here."""
        return StoreError(
            f"the {self.kind}'s folder {self.path} cannot be written: {error.strerror or error}; "
            "free some space there, or set SOFTPROMPT_HOME to a folder that can"
        )


class Hold:
    """One training's hold on its folder: given back while it pauses, and taken again unless another had it since."""

    def __init__(self, run: RunFolder | None) -> None:
        """Takes nothing yet; a training without a folder has nothing to take."""
        self._run, self._has = run, False
        self._left: list[tuple[int, int] | None] = []  # what was there when it was given back last

    def take(self) -> None:
        """Takes the folder, if it has not got it.

        Raises:
            StoreError: another training has it, or has written a checkpoint there since it was given back.
        """
        if self._run is None or self._has:
            return
        self._run.hold()
        if self._left and self._run.stamp() != self._left[-1]:
            self._run.release()
            raise StoreError(
                f"Another training has used {self._run.path} since this one was interrupted; "
                "make a new one, with resume=True to go on from what is there."
            )
        self._has = True

    def give_back(self) -> None:
        """Gives the folder back, if it has got it."""
        if self._run is not None and self._has:
            self._left, self._has = [self._run.stamp()], False
            self._run.release()
