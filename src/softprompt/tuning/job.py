"""What is to be learned, read and checked before there is a base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from inspect import signature
from typing import Any

from softprompt.data.checks import Reading
from softprompt.data.columns import AS_FOUND, Columns
from softprompt.data.example import Dataset
from softprompt.data.sources import Source
from softprompt.errors import ConfigError, SoftPromptError
from softprompt.files import StrPath
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.metadata import start_length
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.length import default_num_virtual_tokens
from softprompt.tasks.reading import Labels, form_of, read_task, require_no_chat, taken_for
from softprompt.tasks.task import Task
from softprompt.text.chat import with_answers
from softprompt.text.template import Template, chat_template
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.run_folder import RunFolder
from softprompt.tuning.training import Training


@dataclass(frozen=True, kw_only=True)
class Job:
    """One soft prompt to be trained.

    Attributes:
        name: what the soft prompt is called.
        rows: what it learns from.
        validation: what the best step is chosen by; None: a tenth of ``rows``.
        verbalizer: the labels; None: free text.
        template: ``"default"``, ``"chat"`` or one of the user's own.
        config: settings.
        start: a soft prompt to start from.
        labels, columns: what the user said of the targets and of the rows.
    """

    name: str
    rows: Dataset
    validation: Dataset | None
    verbalizer: Verbalizer | None
    template: str | Template = "default"
    config: TrainConfig
    start: SoftPrompt | None = None
    labels: Labels | None = None
    columns: Columns = AS_FOUND

    @classmethod
    def read(
        cls,
        data: Source | Dataset,
        validation: Source | Dataset | None = None,
        *,
        name: str = "soft-prompt",
        template: str | Template = "default",
        labels: Labels | None = None,
        columns: Columns = AS_FOUND,
        start: SoftPrompt | None = None,
        config: TrainConfig | None = None,
    ) -> Job:
        """Reads its rows; the arguments are those of :func:`softprompt.train`, ``columns`` being several of them.

        Raises:
            DataError, TemplateError: data or a template that cannot be meant.
            ConfigError: settings that contradict each other.
        """
        form = Template(template) if template not in ("default", "chat") and isinstance(template, str) else template
        own = isinstance(form, Template)
        rows, held_out, verbalizer = read_task(
            data,
            validation,
            labels,
            form.fields if isinstance(form, Template) else ("input",) if form == "chat" else None,
            replace(columns, format="none") if own and columns.format is None else columns,
        )
        if own:
            require_no_chat(rows, "A template of your own")
        return cls(
            name=name,
            rows=rows,
            validation=held_out,
            verbalizer=verbalizer,
            template=form,
            config=config or TrainConfig(),
            start=start,
            labels=labels,
            columns=columns,
        )

    @classmethod
    def of(cls, given: Mapping[str, Any], number: int) -> Job:
        """The ``number``-th of several jobs, from 1, read.

        Args:
            given: arguments of :func:`softprompt.train` by name, ``data`` among them.

        Raises:
            SoftPromptError: as for :meth:`read`, or an argument is unknown; the sentence names the job.
        """
        name = given.get("name", f"soft-prompt-{number}")
        with of_job(name):
            settings, columns = ([field.name for field in fields(kind)] for kind in (TrainConfig, Columns))
            known = [name for name in signature(cls.read).parameters if name != "columns"]
            require_known(given, [*known, *columns, *settings], "argument", "a job has")
            if "data" not in given:
                raise ConfigError("expected data to train on, found none; give a path or rows as data.")
            options = {key: value for key, value in given.items() if key in known}
            chosen = {key: value for key, value in given.items() if key in settings}
            options["config"] = with_settings(options.get("config"), chosen)
            options["columns"] = Columns(**{key: value for key, value in given.items() if key in columns})
            return cls.read(**{**options, "name": name})

    def on(self, lm: FrozenLM) -> Job:
        """The same with all that depends on the base model: its template, how answers are written, the length.

        Raises:
            BaseModelError: ``start`` is of another base model.
            DataError, TemplateError: conversations that the base model's chat template does not take.
        """
        if self.start is not None:
            Task.of(lm, self.start)  # refuses vectors of another base model: they mean nothing here
        rows = with_answers(self.rows, lm.tokenizer)
        held_out = None if self.validation is None else with_answers(self.validation, lm.tokenizer)
        form = self.template
        if form == "chat" and not rows.is_chat:
            form = chat_template(lm.tokenizer)
        if not isinstance(form, Template):
            form = form_of(rows, lm.tokenizer, self.verbalizer is not None)
        config = self.config
        if config.num_virtual_tokens is None and self.start is not None:
            config = replace(config, num_virtual_tokens=start_length(self.start, self.start.num_virtual_tokens))
        if config.num_virtual_tokens is None:
            length = default_num_virtual_tokens(lm, () if self.verbalizer is None else self.verbalizer.labels)
            config = replace(config, num_virtual_tokens=length)
        return replace(self, rows=rows, validation=held_out, template=form, config=config)

    @property
    def reading(self) -> Reading:
        """What the data were taken for."""
        return taken_for(self.rows, self.validation, None, self.verbalizer, self.labels, self.columns)

    def task(self, lm: FrozenLM) -> Task:
        """The task of a job that is :meth:`on` this base model.

        Raises:
            SoftPromptError: as for ``Task``.
        """
        assert isinstance(self.template, Template), "on() comes first"
        config = self.config
        length, ahead = config.max_length or lm.window, config.decoder_virtual_tokens
        return Task(lm, self.template, self.verbalizer, config.longest, length, decoder_virtual_tokens=ahead)

    def training(
        self,
        lm: FrozenLM,
        *,
        folder: StrPath | RunFolder | None = None,
        resume: bool = False,
        task: Task | None = None,
    ) -> Training:
        """The training of a job that is :meth:`on` this base model.

        Args:
            lm: the base model.
            folder, resume: as for ``Training``.
            task: that of :meth:`task`, of a job that differs at most in its settings.

        Raises:
            SoftPromptError: as for ``Training``.
        """
        task = self.task(lm) if task is None else task.of_length(self.config.longest)
        vectors = None if self.start is None else self.start.vectors
        return Training(
            task, self.rows, self.validation, self.config, name=self.name, start=vectors, folder=folder, resume=resume
        )


def with_settings(config: TrainConfig | None, settings: Mapping[str, Any]) -> TrainConfig:
    """The settings with those changed that are given by name.

    Raises:
        ConfigError: there is no setting of that name, or it has no such value.
    """
    require_known(settings, [field.name for field in fields(TrainConfig)], "setting", "TrainConfig has")
    return replace(config or TrainConfig(), **settings)


def require_known(given: Mapping[str, Any], known: list[str], what: str, has: str) -> None:
    """Refuses a name that is none of those known, with the nearest of them.

    Raises:
        ConfigError: there is one.
    """
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"{has} {', '.join(known)}."
            raise ConfigError(f"There is no {what} {name!r}; {meant}")


@contextmanager
def of_job(name: str) -> Iterator[None]:
    """Puts a job's name before what a mistake in it says."""
    try:
        yield
    except SoftPromptError as error:
        raise type(error)(f"job {name!r}: {error}") from error
