"""One soft prompt for the rows of several tasks: a source that others start from (SPoT, Vu et al. 2022, §3.1).

Tasks are mixed in proportion to their rows, but a task counts with at most ``cap`` of them (Raffel et al. 2020,
§3.5.2), so that a large one does not crowd out the others. Ours differs in that tasks are not drawn: an epoch has
exactly ``min(rows, cap)`` rows of each, spread evenly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from softprompt.data.checks import Reading
from softprompt.data.example import Dataset, Example, check_targets
from softprompt.errors import ConfigError
from softprompt.files import StrPath
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.length import default_num_virtual_tokens
from softprompt.tasks.mix import MixedTask
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.job import Job, of_job
from softprompt.tuning.rows import RowOrder, split_rows
from softprompt.tuning.run_folder import RunFolder
from softprompt.tuning.training import Training

CAP = 2000
"""The most rows of a task in an epoch."""


class MixOrder:
    """The order of rows of several tasks: in an epoch, ``min(rows, cap)`` of each, spread evenly.

    The rows of a task come in the order that they would have alone. Of one that has more than ``cap``, each epoch takes
    the rows that follow on those of the epoch before.

    Attributes:
        rows: how many an epoch has.
        counts: how many of them are of each task.
    """

    def __init__(self, orders: Sequence[RowOrder], cap: int) -> None:
        """
        Args:
            orders: of each task's rows; those of the mix are numbered task after task.
            cap: the most rows of a task in an epoch.
        """
        self._orders = orders
        self.counts = [min(order.rows, cap) for order in orders]
        self.rows = sum(self.counts)
        self._turns = RowOrder([task for task, count in enumerate(self.counts) for _ in range(count)])
        self._first = [sum(order.rows for order in orders[:task]) for task in range(len(orders))]
        self._task_of = [task for task, count in enumerate(self.counts) for _ in range(count)]
        self._kept: tuple[tuple[int, int], list[int]] | None = None

    def batch(self, seed: int, step: int, size: int) -> list[int]:
        """As :meth:`RowOrder.batch`."""
        places = (divmod(place, self.rows) for place in range(step * size, (step + 1) * size))
        return [self._epoch(seed, epoch)[place] for epoch, place in places]

    def _epoch(self, seed: int, epoch: int) -> list[int]:
        if self._kept is None or self._kept[0] != (seed, epoch):
            own = [
                iter(order.batch(seed, epoch, count)) for order, count in zip(self._orders, self.counts, strict=True)
            ]
            tasks = [self._task_of[turn] for turn in self._turns.batch(seed, epoch, self.rows)]
            self._kept = (seed, epoch), [self._first[task] + next(own[task]) for task in tasks]
        return self._kept[1]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One soft prompt to be trained on the rows of several jobs.

    Attributes:
        name: what the soft prompt is called.
        jobs: at least two; the soft prompt is stored with the template and labels of the first.
        config: settings.
        cap: the most rows of a job in an epoch.
    """

    name: str
    jobs: tuple[Job, ...]
    config: TrainConfig
    cap: int = CAP

    def __post_init__(self) -> None:
        if len(self.jobs) < 2:
            raise ConfigError(f"A mix needs at least 2 data files, found {len(self.jobs)}; give more, or no --mix.")
        if self.cap < 1:
            raise ConfigError(f"--cap must be at least 1, not {self.cap}.")
        if self.config.loss == "labels":
            raise ConfigError("A mix learns to write its targets, with the loss lm, not 'labels'; leave --loss out.")

    @property
    def start(self) -> SoftPrompt | None:
        """A soft prompt to start from."""
        return self.jobs[0].start

    @property
    def readings(self) -> list[tuple[str, Reading]]:
        """What the data of each job were taken for."""
        return [(job.name, job.reading) for job in self.jobs]

    def on(self, lm: FrozenLM) -> Mixture:
        """The same with all that depends on the base model, see :meth:`Job.on`.

        Raises:
            SoftPromptError: as there, with the job's name.
            ConfigError: the base model is divided layer by layer.
        """
        if lm.world.shard == "fsdp":
            raise ConfigError("With --shard fsdp, several templates are not trained at once; leave out --mix.")
        config = self.config
        if config.init == "auto":  # what that is of one task is not that of several
            config = replace(config, init="text" if config.init_text else "vocab")
        if config.num_virtual_tokens is None and self.start is None:
            labels = [() if job.verbalizer is None else job.verbalizer.labels for job in self.jobs]
            length = max(default_num_virtual_tokens(lm, each) for each in labels)
            config = replace(config, num_virtual_tokens=length)
        jobs = []
        for job in self.jobs:
            with of_job(job.name):
                jobs.append(replace(job, config=config).on(lm))
        return replace(self, jobs=tuple(jobs), config=jobs[0].config)

    def training(self, lm: FrozenLM, *, folder: StrPath | RunFolder | None = None, resume: bool = False) -> Training:
        """The training of a mixture that is :meth:`on` this base model.

        Without validation rows of its own, a job gives a seeded tenth of its rows at most. All validation rows
        together are as mixed as an epoch is.

        Raises:
            SoftPromptError: as for ``Training``.
        """
        config, tasks = self.config, [job.task(lm) for job in self.jobs]
        rows, held = self._split()
        orders = []
        for job, task, own in zip(self.jobs, tasks, rows, strict=True):
            with of_job(job.name):
                for dataset in filter(None, (job.rows, job.validation)):
                    if task.verbalizer is not None:
                        check_targets(dataset, task.labels)
            orders.append(RowOrder.of(own, labelled=task.verbalizer is not None))
        if config.parametrisation == "prefix":
            self._require_one_beginning(tasks, rows)
        order = MixOrder(orders, self.cap)
        task = MixedTask.mixed(tasks, [[*own, *some] for own, some in zip(rows, held, strict=True)])
        return Training(
            task,
            self._together(rows, [job.rows for job in self.jobs]),
            self._together(held, [job.validation or job.rows for job in self.jobs]),
            replace(config, validation_rows=max(config.validation_rows, len(self.jobs))),
            name=self.name,
            start=None if self.start is None else self.start.vectors,
            folder=folder,
            resume=resume,
            order=order,
            notes={"mix": self._described(order)},
        )

    def _split(self) -> tuple[list[Sequence[Example]], list[Sequence[Example]]]:
        """The rows of each job to learn from and to validate on."""
        counts = [min(len(job.rows.examples), self.cap) for job in self.jobs]
        most = min(self.config.validation_rows, max(len(self.jobs), sum(counts) // 10))
        rows, held = list[Sequence[Example]](), list[Sequence[Example]]()
        for job, count in zip(self.jobs, counts, strict=True):
            own = max(1, most * count // sum(counts))
            with of_job(job.name):
                learned, some = split_rows(job.rows, job.validation, replace(self.config, validation_rows=own))
            rows.append(learned)
            held.append(some)
        return rows, held

    def _together(self, rows: Sequence[Sequence[Example]], sources: Sequence[Dataset]) -> Dataset:
        """The rows of all as one data set; its fingerprint is of all that the jobs differ in, and of the cap."""
        labels = [{} if job.verbalizer is None else job.verbalizer.words for job in self.jobs]
        words = [[[label, *own] for label, own in each.items()] for each in labels]
        templates = [job.template.text if isinstance(job.template, Template) else job.template for job in self.jobs]
        content = [[each.fingerprint for each in sources], templates, words, self.cap]
        return Dataset(
            examples=tuple(example for own in rows for example in own),
            source=", ".join(each.source for each in sources),
            fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        )

    def _described(self, order: MixOrder) -> list[dict[str, Any]]:
        return [
            {
                "source": job.rows.source,
                "fingerprint": job.rows.fingerprint,
                "rows_in_an_epoch": count,
                "share": count / order.rows,
            }
            for job, count in zip(self.jobs, order.counts, strict=True)
        ]

    def _require_one_beginning(self, tasks: Sequence[Task], rows: Sequence[Sequence[Example]]) -> None:
        """Refuses a KV prefix behind several texts: its keys and values begin as what stands behind one of them."""
        requests = [task.target_request(own[0]) for task, own in zip(tasks, rows, strict=True)]
        if len({request.ids[: request.ids.index(SOFT)] for request in requests}) > 1:
            raise ConfigError(
                "The parametrisation prefix needs the same text before {soft_prompt} in all templates of a mix; put "
                "{soft_prompt} first, or choose another parametrisation."
            )
