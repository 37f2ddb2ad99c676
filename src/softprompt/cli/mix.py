"""``softprompt train --mix``: one soft prompt of several data files, which others start from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from softprompt.cli.groups import Mixing
from softprompt.cli.many import given_in
from softprompt.cli.place import Place
from softprompt.cli.plan_file import Wanted, is_plan, read_plan
from softprompt.cli.task import Sources, task_name
from softprompt.cli.train import Options, job_of, train_and_store
from softprompt.data.packages import DEFAULT_BASE
from softprompt.drawing.words import simple_table
from softprompt.errors import ConfigError
from softprompt.terminal.console import say_reading, stderr, warn_truncated
from softprompt.tuning.job import of_job
from softprompt.tuning.mix import CAP, Mixture
from softprompt.tuning.training import Training


def tune_mix(files: Sequence[str], mixing: Mixing, options: Options) -> None:
    """Trains one soft prompt on all data files, or on the jobs of a plan, each with its own template and labels.

    Raises:
        SoftPromptError: a mistake of the user's.
        typer.Exit: the user pressed Ctrl-C.
    """
    began, output = time.perf_counter(), options.output
    place = Place.of(output.one_name, output.out, overwrite=output.overwrite, resume=output.resume)
    base, loading = options.base, options.loading
    if is_plan(files[0]):
        plan = read_plan(files[0], given_in(options))
        wanted, base, loading = plan.jobs, base or plan.base, plan.loaded_as(loading)
    else:
        wanted = _of_files(files, options)
    mixture = _mixture(wanted, place, CAP if mixing.cap is None else mixing.cap)
    with place.claimed():
        lm = loading.load(base or DEFAULT_BASE)
        with stderr.status("preparing"):
            mixture = mixture.on(lm)
            training = mixture.training(lm, folder=place.run, resume=place.resume)
        for name, reading in mixture.readings:
            say_reading(reading, name)
        _say_shares(training, [name for name, _ in mixture.readings])
        warn_truncated(training.truncated, training.task.max_length)
        taken = {"mix": [{"name": name, **reading.as_dict()} for name, reading in mixture.readings]}
        train_and_store(training, place, taken, began, output.track, options.as_json)


def _of_files(files: Sequence[str], options: Options) -> tuple[Wanted, ...]:
    sources = options.sources
    if sources.validation is not None:
        raise ConfigError(
            "--validation is of one task; leave it out, and a tenth of each file is held back, or write a plan in "
            "which each job has its own."
        )
    if sources.labels is not None:
        raise ConfigError("--labels are those of one task; write a plan in which each job has its own.")
    own = [Sources(file, None, None, sources.columns) for file in files]
    return tuple(Wanted(task_name(each.train), each, options.template, options.learning) for each in own)


def _mixture(wanted: Sequence[Wanted], place: Place, cap: int) -> Mixture:
    """What is wanted, read and checked.

    Raises:
        ConfigError: two jobs have one name, or learn with other settings.
    """
    first = wanted[0]
    if other := next((each.name for each in wanted if each.learning != first.learning), None):
        raise ConfigError(
            f"A mix is one training, but the job {other!r} has other settings than {first.name!r}; write them once, as "
            f"defaults or as options."
        )
    names = Counter(each.name for each in wanted)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"Two data files of the mix are called {twice[0]!r}; write a plan that gives each a name.")
    jobs = []
    for each in wanted:
        with of_job(each.name):
            jobs.append(job_of(each.name, each.sources, each.template, each.learning, place.store))
    return Mixture(name=place.name, jobs=tuple(jobs), config=jobs[0].config, cap=cap)


def _say_shares(training: Training, names: Sequence[str]) -> None:
    table = simple_table("file", ">rows in an epoch", ">share")
    for name, part in zip(names, training.notes["mix"], strict=True):
        table.add_row(name, f"{part['rows_in_an_epoch']:,}", f"{100 * part['share']:.1f} %")
    stderr.print(table)
