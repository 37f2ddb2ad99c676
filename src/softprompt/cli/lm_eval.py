"""``softprompt lm-eval``: tasks of lm-evaluation-harness, with a soft prompt or with its base model alone."""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt.cli.options import Loading, OneTargetColumns
from softprompt.drawing.words import simple_table
from softprompt.errors import ConfigError, SoftPromptError
from softprompt.files import local_path
from softprompt.model.notes import heard
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.tasks.reading import require_no_chat
from softprompt.terminal.console import print_json, stderr, stdout


@dataclass(frozen=True)
class Asked:
    """What is to be run.

    Attributes:
        tasks: names of the harness, or paths of YAML files.
        data: rows of the soft prompt's own task, instead of tasks.
        columns: what is where in them.
        include_path: a folder with more tasks.
        num_fewshot: worked examples before each row; None: as the task says.
        limit: the first so many rows of each task, or below 1 that share of them.
        base_only: leave the soft prompt out.
        template: wrap the tasks' contexts in the soft prompt's template.
        chat_template: write contexts as messages of the base model's chat template.
    """

    tasks: Sequence[str]
    data: str | None
    columns: OneTargetColumns
    include_path: Path | None
    num_fewshot: int | None
    limit: float | None
    base_only: bool
    template: bool
    chat_template: bool

    def check(self) -> None:
        """Raises a ``ConfigError`` where options contradict each other."""
        if bool(self.tasks) == (self.data is not None):
            raise ConfigError("Expected tasks of the harness or rows of the soft prompt's own; give --tasks or --data.")
        if self.data is not None and (self.num_fewshot or self.chat_template or self.template):
            raise ConfigError(
                "With --data the soft prompt's own template is all there is; leave --num-fewshot, --chat-template and "
                "--template out."
            )
        if self.template and self.chat_template:
            raise ConfigError("--template and --chat-template both say what stands around a context; leave one out.")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit.is_integer())):
            raise ConfigError(f"--limit must be a number of rows or a share below 1, not {self.limit:g}.")


def run(name: str, asked: Asked, base: str | None, loading: Loading, as_json: bool) -> None:
    """Runs the tasks and prints what they measured.

    Raises:
        SoftPromptError: a mistake of the user's, see each step.
    """
    asked.check()
    soft_prompt = Store().load(name)
    with _quiet():
        from softprompt.evaluation.lm_eval import SoftPromptLM

        manager, tasks = _loaded(asked, soft_prompt)
        lm = loading.load(base or soft_prompt.base)
        model = SoftPromptLM(
            lm, soft_prompt, use_template=asked.template or asked.data is not None, base_only=asked.base_only
        )
        began = time.perf_counter()
        found = _run(model, manager, tasks, asked)
    what = f"{lm.name} without a soft prompt" if asked.base_only else f"{soft_prompt.name} on {lm.name}"
    if as_json:
        from lm_eval import __version__ as version

        print_json(
            {
                "name": soft_prompt.name,
                "base": lm.name,
                "base_only": asked.base_only,
                "num_virtual_tokens": model.num_virtual_tokens,
                "template": asked.template or asked.data is not None,
                "chat_template": asked.chat_template,
                "limit": asked.limit,
                "results": _plain(found["results"]),
                "n-shot": _plain(found["n-shot"]),
                "n-samples": _plain(found["n-samples"]),
                "versions": _plain(found["versions"]),
                "lm_eval": version,
                "dtype": str(lm.dtype).removeprefix("torch."),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )
        return
    stdout.print(what)
    _show(found)


@contextlib.contextmanager
def _quiet() -> Any:
    """What the harness prints goes to stderr, so that stdout holds the results only."""
    with contextlib.redirect_stdout(sys.stderr), heard():
        yield


def _loaded(asked: Asked, soft_prompt: SoftPrompt) -> tuple[Any, list[Any]]:
    """The harness's list of tasks, and those that were asked for, with their data.

    Raises:
        ConfigError: an unknown task, or one that cannot be loaded or is not for a language model alone.
    """
    from lm_eval.tasks import TaskManager

    if asked.data is not None:
        from softprompt.evaluation.lm_eval import task_of_rows

        dataset = asked.columns.read(asked.data, soft_prompt)
        require_no_chat(dataset, "lm-eval --data")
        name = Path(asked.data).stem or "rows"
        return TaskManager(include_defaults=False), [task_of_rows(soft_prompt, dataset, name)]
    if asked.include_path is not None and not local_path(asked.include_path).is_dir():
        raise ConfigError(f"--include-path must be a folder with tasks, not {asked.include_path}.")
    manager = TaskManager(include_path=None if asked.include_path is None else str(local_path(asked.include_path)))
    found: list[Any] = []
    for task in asked.tasks:
        known = task in manager.all_tasks
        if not known and not local_path(task).is_file():
            close = difflib.get_close_matches(task, manager.all_tasks, n=3)
            raise ConfigError(
                f"lm-evaluation-harness has no task {task!r}, and there is no such file; "
                + (f"did you mean {', '.join(close)}?" if close else "see `lm-eval ls tasks`.")
            )
        with stderr.status(f"loading {task}"), _failing(f"the task {task!r} could not be loaded"):
            loaded = manager.load([task if known else str(local_path(task))])
        _require_text(loaded["tasks"])
        inner = {name for names in loaded["group_map"].values() for name in names}
        groups = [group for name, group in loaded["groups"].items() if name not in inner]
        found += groups or loaded["tasks"].values()
    return manager, found


def _require_text(tasks: Mapping[str, Any]) -> None:
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"The task {name!r} runs code that the model writes, which is not done here; leave it out."
            )
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"The task {name!r} shows pictures or sound to the model; leave it out.")


@contextlib.contextmanager
def _failing(what: str) -> Any:
    """Inside, whatever the harness raises is told in a sentence: tasks are code and files of many authors."""
    try:
        yield
    except SoftPromptError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise ConfigError(f"In lm-evaluation-harness, {what} ({reason.rstrip('.')}); see the task's README.") from error


def _run(model: Any, manager: Any, tasks: list[Any], asked: Asked) -> Mapping[str, Any]:
    import lm_eval
    import lm_eval.evaluator

    # It notes the state of the current folder's repository, and where there is none git says so on the terminal.
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    if asked.data is not None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its advice is for authors of tasks, and this one is ours
    limit = asked.limit if asked.limit is None or asked.limit < 1 else int(asked.limit)
    with _failing("the tasks could not be run"):
        found: Mapping[str, Any] = lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            num_fewshot=asked.num_fewshot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=asked.chat_template,
            log_samples=False,
        )
    return found


def _plain(value: Any) -> Any:
    """The harness's results as JSON values."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.item() if hasattr(value, "item") else value


def _show(found: Mapping[str, Any]) -> None:
    """A row a metric of each task, by the harness's names."""
    table = simple_table("task", "metric", ">value", ">± stderr", ">shots", ">n")
    for task, measured in found["results"].items():
        shots, rows = found["n-shot"].get(task, "–"), found["n-samples"].get(task, {}).get("effective", "–")
        for key, value in measured.items():
            metric, _, variant = key.partition(",")
            if not variant or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = measured.get(f"{metric}_stderr,{variant}")
            shown = metric if variant == "none" else f"{metric}, {variant}"
            spread = f"{error:.4f}" if isinstance(error, int | float) else "–"
            table.add_row(task, shown, f"{value:.4f}", spread, str(shots), str(rows))
    stdout.print(table)
