"""``softprompt sweep``: many settings of one task by successive halving, and the best of them under a name."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import typer

from softprompt.cli.groups import LearningOnce, Sweeping
from softprompt.cli.options import Loading
from softprompt.cli.place import Place
from softprompt.cli.task import Sources
from softprompt.cli.train import job_of
from softprompt.compare import sweep as report
from softprompt.data.packages import DEFAULT_BASE
from softprompt.drawing import style
from softprompt.drawing.words import duration
from softprompt.errors import ConfigError, StoreError
from softprompt.files import atomic_writer, local_path, strict_json
from softprompt.model.distributed import is_first, launched
from softprompt.soft_prompts.store import Store
from softprompt.terminal.console import say_reading, stderr, stdout
from softprompt.terminal.many import watch_together
from softprompt.terminal.training import say_alarms
from softprompt.tuning import checkpoint, history
from softprompt.tuning.config import INITS
from softprompt.tuning.job import Job
from softprompt.tuning.sweep import Selection, Sweep, cross
from softprompt.tuning.training import Training


@dataclass(frozen=True)
class _Ended:
    """What a sweep came to."""

    sweep: Sweep
    selection: Selection
    results: Path
    plot: Path


def sweep(
    sources: Sources,
    template: str,
    sweeping: Sweeping,
    learning: LearningOnce,
    base: str | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Tries the settings, stores the best, and says what came of it and how much of that is luck.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
        typer.Exit: the user pressed Ctrl-C.
    """
    began = time.perf_counter()
    with style.style():  # without matplotlib, say so now rather than after hours
        pass
    store = Store()
    place = Place.at(sweeping.name, store, overwrite=sweeping.overwrite, resume=sweeping.resume, kind="sweep")
    if is_first():  # of several processes, the others write nothing
        place.run.require_free()
        place.check()
    keep = _share(sweeping.keep)
    job = job_of(place.name, sources, template, learning, store)
    axes = axes_of(sweeping, job)
    count = len(cross(job.config, axes))
    with place.claimed():
        lm = loading.load(base or DEFAULT_BASE)
        say_reading(job.on(lm).reading)
        with stderr.status("preparing"):
            found = Sweep(lm, job, axes, place.run.path, keep=keep, resume=place.resume)
        if found.resumed:
            stderr.print(f"going on after rung {found.resumed}, with {len(found.left)} of {count} settings")
        try:
            found.run(lambda several, until: watch_together(several, until=until, planned=False), stderr.print)
        except KeyboardInterrupt:
            _keep_best(found, place)
        selection = found.selection()
        ended = _written(found, selection, place, local_path(sweeping.out) if sweeping.out else place.run.path)
        seconds = time.perf_counter() - began
        _say(ended, place, seconds, as_json)
        found.close()


def axes_of(sweeping: Sweeping, job: Job) -> dict[str, Sequence[Any]]:
    """The values of each axis that the options name.

    Raises:
        ConfigError: a value that cannot be.
    """
    if sweeping.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, not {sweeping.seeds}.")
    first = job.config.seed
    axes: dict[str, Sequence[Any]] = {"seed": range(first, first + sweeping.seeds)}
    if sweeping.inits is not None:
        if job.start is not None:
            raise ConfigError("--init names a soft prompt to start from, and --inits other starts; give one of them.")
        axes["init"] = inits = _several("--inits", sweeping.inits, str, ",".join(INITS[:3]))
        if unknown := [init for init in inits if init not in INITS]:
            raise ConfigError(f"--inits must be some of {', '.join(INITS)}, not {unknown[0]!r}; correct it.")
        if "labels" in inits and job.verbalizer is None:
            raise ConfigError("init labels needs class labels; give --labels, or other --inits.")
    if sweeping.lrs is not None:
        axes["lr"] = _several("--lrs", sweeping.lrs, float, "0.1,0.3,1")
    if sweeping.lengths is not None:
        axes["num_virtual_tokens"] = _several("--lengths", sweeping.lengths, int, "20,50")
    if sweeping.parametrisations is not None:
        axes["parametrisation"] = _several("--parametrisations", sweeping.parametrisations, str, "plain,residual")
    return axes


def _several(option: str, text: str, kind: Callable[[str], Any], example: str) -> list[Any]:
    try:
        found = [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or "" in found:
        raise ConfigError(f"{option} must be values with commas between them, for instance {example}, not {text!r}.")
    return found


def _share(text: str) -> Fraction:
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"--keep must be a share such as 1/3 or 0.5, not {text!r}.") from None
    if not 0 < share <= 1:
        raise ConfigError(f"--keep must be above 0 and at most 1, not {text}.")
    return share


def _keep_best(found: Sweep, place: Place) -> None:
    """Stores the best so far after Ctrl-C, and ends."""
    if launched():  # several processes were interrupted at different places
        stderr.print("interrupted; to go on, give the same command with --resume")
        raise typer.Exit(130)
    leader = found.leader
    if leader is None:
        stderr.print("interrupted before the first validation; nothing was stored; to go on, add --resume")
    else:
        _store(leader, place, interrupted=True)
        stderr.print(
            f"interrupted; the best so far ({leader.name}, step {leader.step:,}) is stored; to go on, give the same "
            f"command with --resume"
        )
    raise typer.Exit(130)


def _store(training: Training, place: Place, *, interrupted: bool = False) -> None:
    """Stores a setting's soft prompt under the sweep's name, and checks that the file answers as it does."""
    soft_prompt = replace(training.result(), name=place.name)
    place.save(soft_prompt)
    if not (interrupted and launched()):  # several processes were interrupted at different places
        training.watch.require_same_answers(place.path, soft_prompt)


def _written(found: Sweep, selection: Selection, place: Place, out: Path) -> _Ended:
    """Stores the best, keeps what its run left behind, and writes results and plot."""
    best = found.training(found.best)
    _store(best, place)
    say_alarms(best.alarms)
    ended = _Ended(found, selection, out / "results.json", out / "sweep.png")
    if not is_first():
        return ended
    for name in (checkpoint.LOG, history.FILE):
        with suppress(FileNotFoundError):
            shutil.copyfile(found.folder(found.best) / name, place.run.path / name)
    try:
        with atomic_writer(ended.results) as file:
            file.write(strict_json({"name": place.name, **report.document(found, selection)}).encode())
        with atomic_writer(ended.plot) as file:
            file.write(style.png(report.figure(found)))
    except OSError as error:
        raise StoreError(
            f"The results of the sweep cannot be written to {out}: {error.strerror or error}; the soft prompt is "
            f"stored; give the same command with --resume and another --out."
        ) from error
    return ended


def _say(ended: _Ended, place: Place, seconds: float, as_json: bool) -> None:
    if as_json:
        document = report.document(ended.sweep, ended.selection)
        files = {"path": str(place.path), "results": str(ended.results), "plot": str(ended.plot)}
        print(strict_json({"name": place.name, **files, "seconds": round(seconds, 3), **document}))
        return
    stdout.print(report.table(ended.sweep))
    for sentence in report.sentences(ended.sweep, ended.selection):
        stdout.print(sentence)
    stdout.print(f"stored as {place.name} in {place.path}")
    stdout.print(f"results: {ended.results}, plot: {ended.plot}")
    stdout.print(f"the whole sweep took {duration(seconds)}")
