"""Where ``softprompt train`` puts a soft prompt: what is looked at before the training is what is written after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from softprompt.errors import ConfigError, StoreError
from softprompt.files import local_path
from softprompt.model.distributed import is_first
from softprompt.soft_prompts import artifact
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tuning.run_folder import RunFolder


@dataclass(frozen=True)
class Place:
    """Where a tuned soft prompt goes: what is looked at before the training is what is written after it.

    Attributes:
        name: what it is called.
        path: its file.
        run: the folder of what the run leaves behind: checkpoint, log and history.
        store: the store, even if ``path`` is elsewhere.
        stored_as: its name in the store; None if ``path`` is elsewhere.
        overwrite: whether what is there at the start may be replaced.
        resume: whether a run that was stopped is gone on with.
    """

    name: str
    path: Path
    run: RunFolder
    store: Store
    stored_as: str | None
    overwrite: bool
    resume: bool

    @classmethod
    def of(cls, name: str | None, out: Path | None, *, overwrite: bool, resume: bool) -> Place:
        """The place that the options name, if it can be written.

        Raises:
            ConfigError: neither a name nor a path, or a path of another kind.
            StoreError: as for :meth:`check`, or the name is none.
        """
        store = Store()
        if out is not None:
            path = local_path(out)
            if path.suffix != artifact.SUFFIX or path.is_dir():
                raise ConfigError(f"--out needs the path of a file that ends with {artifact.SUFFIX}, not {out}.")
            stored_as = store.name_of(path)
        elif name is None:
            raise ConfigError("A soft prompt needs a name to be stored under; give --name, or --out with a path.")
        else:
            path, stored_as = store.path(name), name
        if stored_as is not None:
            place = cls.at(stored_as, store, overwrite=overwrite, resume=resume)
            place = replace(place, name=name or place.name, path=path)
        else:
            run = RunFolder(Path(f"{path}.run"), path.stem)
            place = cls(name or path.stem, path, run, store, None, overwrite=overwrite, resume=resume)
        if is_first():  # of several processes, the others write nothing
            place.run.require_free()
            place.check()
        return place

    @classmethod
    def at(cls, name: str, store: Store, *, overwrite: bool, resume: bool, kind: str = "training") -> Place:
        """The place of a name in the store, whatever is there.

        Raises:
            StoreError: the name is none.
        """
        run = RunFolder(store.run_folder(name), name, kind)
        return cls(name, store.path(name), run, store, name, overwrite=overwrite, resume=resume)

    def check(self) -> None:
        """Refuses a place that a training must not write to.

        Raises:
            StoreError: a run was stopped there, or a soft prompt is there that may not be replaced.
        """
        stopped = self.run.stopped
        if self.overwrite:
            return
        if other := self.run.stopped_other:
            raise StoreError(
                f"A {other} of {self.path.stem!r} was stopped before its end, see {self.run.path}; go on with it by "
                f"its own command and --resume, or add --overwrite to start anew."
            )
        if stopped and not self.resume:
            what = "A sweep of" if self.run.kind == "sweep" else "A training of"
            raise StoreError(
                f"{what} {self.path.stem!r} was stopped before its end, see {self.run.path}; "
                f"add --resume to go on with it, or --overwrite to start anew."
            )
        if stopped:
            if self._taken():
                raise StoreError(
                    f"The soft prompt {self.path} is not of the {self.run.kind} that was stopped, see {self.run.path}; "
                    f"move it away, or add --overwrite to --resume to replace it."
                )
        elif self.stored_as is not None:
            self.store.require_free(self.stored_as)
        elif self.path.exists():
            raise StoreError(f"The file {self.path} exists; choose another --out, or add --overwrite to replace it.")

    def _taken(self) -> bool:
        return self.path.exists() and not self.run.may_replace(self.path)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps the place for this run until the block ends.

        Raises:
            StoreError: as for :meth:`check`; or another run has the place, or the folder cannot be written.
        """
        if not is_first():
            yield
            return
        with self.run:
            self.check()
            given_up = [self.path.read_bytes()] if self.overwrite and self.path.is_file() else []
            self.run.allow(*given_up, anew=not (self.resume and self.run.stopped))
            yield

    def save(self, soft_prompt: SoftPrompt) -> None:
        """Writes the soft prompt.

        Raises:
            StoreError: the file cannot be written, or another soft prompt was put there in the meantime.
        """
        if not is_first():
            return
        with nullcontext() if self.stored_as is None else self.store.locked():
            if self._taken():
                raise StoreError(
                    f"Another soft prompt was put at {self.path} while this one was trained; the training is not "
                    f"lost: give the same command with --resume after moving that file away, or with --resume and "
                    f"--overwrite to replace it."
                )
            try:
                self.run.allow(soft_prompt.encoded())
                soft_prompt.save(self.path)
            except StoreError as error:
                saved = f"{error}".rstrip(".")
                raise StoreError(f"{saved}; the training is not lost: give the same command with --resume.") from error
