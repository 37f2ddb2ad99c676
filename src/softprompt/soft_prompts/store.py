"""Soft prompts by name: a folder of ``<name>.safetensors`` files, which may be copied, renamed and deleted by hand."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock

from softprompt.errors import ArtifactError, StoreError
from softprompt.files import StrPath, local_path
from softprompt.soft_prompts import artifact
from softprompt.soft_prompts.metadata import Header
from softprompt.soft_prompts.soft_prompt import SoftPrompt

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


def is_name(text: str) -> bool:
    """Whether a soft prompt may be called so in a store, see :meth:`Store.path`."""
    return _NAME.fullmatch(text) is not None and not text.endswith(artifact.SUFFIX)


@dataclass(frozen=True)
class Entry:
    """One file of the store.

    Attributes:
        name: the file's name without its suffix.
        path: where it lies.
        header: what it says, or why it cannot be read.
        bytes: size of the file.
    """

    name: str
    path: Path
    header: Header | ArtifactError
    bytes: int


class Store:
    """The folder of a user's soft prompts.

    Attributes:
        home: the folder: as given, or ``$SOFTPROMPT_HOME``, or the user's data folder. It may not exist yet.
    """

    def __init__(self, home: StrPath | None = None) -> None:
        self.home = local_path(home or os.environ.get("SOFTPROMPT_HOME") or platformdirs.user_data_dir("softprompt"))

    def path(self, name: str) -> Path:
        """Where the soft prompt ``name`` lies, or would lie.

        Raises:
            StoreError: ``name`` is not 1 to 100 letters, digits, ``-``, ``_`` and ``.``, begins with a dot, or ends in
                ``.safetensors``.
        """
        if not is_name(name):
            raise StoreError(
                f"A soft prompt's name is 1 to 100 letters a-z, digits, '-', '_' and '.', without a dot in front or "
                f"'{artifact.SUFFIX}' at the end, but {name!r} was given; choose another name."
            )
        return self.home / f"{name}{artifact.SUFFIX}"

    def run_folder(self, name: str) -> Path:
        """Where the training of ``name`` keeps its checkpoints and its log; only the path is made.

        Raises:
            StoreError: as for :meth:`path`.
        """
        return self.home / ".runs" / self.path(name).stem

    def require_free(self, name: str) -> Path:
        """The path for a new soft prompt ``name``: ask before a long training rather than after it.

        Raises:
            StoreError: as for :meth:`path`; or the name is taken, or the folder cannot be made or written.
        """
        path = self.path(name)
        self._require_writable()
        if path.exists():
            raise StoreError(
                f"The name '{name}' is taken by the soft prompt {path}; "
                f"choose another name, or remove that one first with `softprompt rm {name}`."
            )
        return path

    def save(self, soft_prompt: SoftPrompt, *, overwrite: bool = False) -> Path:
        """Stores ``soft_prompt`` under its own name and returns the path.

        Raises:
            StoreError: as for :meth:`require_free` (a taken name only without ``overwrite``), or the disk is full.
            ArtifactError: as for :func:`softprompt.soft_prompts.artifact.save`.
        """
        path = self.path(soft_prompt.name)
        with self.locked():
            if not overwrite:
                self.require_free(soft_prompt.name)
            soft_prompt.save(path)
        return path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps others from storing anything meanwhile: of two that see a name free, neither may lose its result.

        Raises:
            StoreError: the folder cannot be made or written.
        """
        self._require_writable()
        try:
            with FileLock(self.home / ".lock"):
                yield
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from error

    def find(self, name_or_path: StrPath) -> Path:
        """The file of a stored soft prompt by name, or of any by path: a ``Path``, or a text with a separator or
        ``.safetensors``. Only a name is looked up.

        Raises:
            StoreError: no soft prompt has that name.
        """
        text = os.fspath(name_or_path)
        separators = {"/", os.sep, os.altsep}
        if text is not name_or_path or text.endswith(artifact.SUFFIX) or not separators.isdisjoint(text):
            return local_path(text)
        path = self.path(text)
        if text not in self.names():
            raise self._unknown(text)
        return path

    def name_of(self, path: StrPath) -> str | None:
        """The name under which a file at ``path`` lies in this store; None if it lies elsewhere."""
        path = local_path(path)
        if path.suffix != artifact.SUFFIX or not _NAME.fullmatch(path.stem):
            return None
        return path.stem if path.parent.resolve() == self.home.resolve() else None

    def load(self, name_or_path: StrPath) -> SoftPrompt:
        """The soft prompt of a name or path, see :meth:`find`.

        Raises:
            StoreError: no soft prompt has that name.
            ArtifactError: as for :func:`softprompt.soft_prompts.artifact.load`.
        """
        return SoftPrompt.load(self.find(name_or_path))

    def load_several(self, names: str) -> list[SoftPrompt]:
        """The soft prompts of names or paths with commas between them, or of a single one.

        No name holds a comma; the path of a file that is there is one path, whatever it holds.

        Raises:
            StoreError, ArtifactError: as for :meth:`load`.
        """
        if "," not in names or local_path(names).is_file():
            return [self.load(names)]
        return [self.load(name.strip()) for name in names.split(",")]

    def names(self) -> tuple[str, ...]:
        """All names, sorted.

        Raises:
            StoreError: the folder exists and cannot be read.
        """
        try:
            files = [path for path in self.home.iterdir() if path.suffix == artifact.SUFFIX]
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise StoreError(
                f"The store {self.home} cannot be read: {error.strerror or error}; "
                f"set SOFTPROMPT_HOME to a folder that can."
            ) from error
        return tuple(sorted(path.stem for path in files if _NAME.fullmatch(path.stem)))

    def entries(self) -> tuple[Entry, ...]:
        """All soft prompts by name, without their numbers; a file that cannot be read is there with its error.

        Raises:
            StoreError: as for :meth:`names`.
        """
        return tuple(self._entry(name) for name in self.names())

    def remove(self, name: str) -> None:
        """Deletes the soft prompt ``name``, not its training run.

        Raises:
            StoreError: no soft prompt has that name, or the folder cannot be written.
        """
        path = self.path(name)
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            raise self._unknown(name) from None
        except OSError as error:
            raise StoreError(
                f"The soft prompt {path} cannot be removed: {error.strerror or error}; make the folder writable."
            ) from error

    def _entry(self, name: str) -> Entry:
        path = self.path(name)
        header: Header | ArtifactError
        try:
            header = artifact.read_header(path)
        except ArtifactError as error:
            header = error
        return Entry(name, path, header, path.stat().st_size if path.exists() else 0)

    def _require_writable(self) -> None:
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error.strerror or str(error)) from error
        if not os.access(self.home, os.W_OK | os.X_OK):
            raise self._unwritable("Permission denied")

    def _unwritable(self, reason: str) -> StoreError:
        return StoreError(
            f"The store {self.home} cannot be written: {reason}; set SOFTPROMPT_HOME to a folder that can."
        )

    def _unknown(self, name: str) -> StoreError:
        names = self.names()
        if close := difflib.get_close_matches(name, names):
            hint = f"similar names are {', '.join(map(repr, close))}"
        elif names:
            hint = f"the first names are {', '.join(map(repr, names[:3]))}"
        else:
            hint = "the store is empty"
        return StoreError(f"There is no soft prompt {name!r} in {self.home}: {hint}; see `softprompt list`.")
