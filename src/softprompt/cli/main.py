"""The command line: a command's module is imported when it is used; the one place where errors become sentences.

Results go to stdout, progress and warnings to stderr. A user's mistake is one sentence and exit code 2.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import softprompt
from softprompt.cli.arguments import spread
from softprompt.errors import SoftPromptError
from softprompt.model.notes import as_note, hear_warnings
from softprompt.terminal.console import stderr

COMMANDS = {
    "train": ("train", "Tune a soft prompt on labelled or free-text examples and store it."),
    "compare": (
        "compare",
        "Measure soft prompts against prompt engineering, LoRA and fine-tuning on your own data.",
    ),
    "inspect": (
        "inspect",
        "See what a soft prompt says and does, each figure beside its null; or how alike several are.",
    ),
    "harden": (
        "inspect",
        "Search a readable hard prompt that does what a soft prompt does, and say how much is lost.",
    ),
    "serve": (
        "serve",
        "Serve the base model and soft prompts on it over OpenAI's API; a request's model names the soft prompt.",
    ),
    "evaluate": ("predict", "Measure a soft prompt on rows with targets."),
    "predict": ("predict", "Answer input texts: a label with probabilities, or generated text."),
    "list": ("store", "List the stored soft prompts."),
    "show": ("store", "Show all that a soft prompt's file says, except its numbers."),
    "rm": ("store", "Delete soft prompts from the store, and what their trainings left behind."),
    "demo": (
        "demo",
        "The whole way on real data: tune, measure, keep and swap, in minutes on two cores.",
    ),
}
"""Every command: the module that it is in, and the first line of its help. Modules are imported when they are used, so
that the list of commands needs no torch."""


def command_line(commands: Iterable[str] = COMMANDS) -> typer.Typer:
    """The command line with these commands; of all others only the first line of their help is there."""
    app = typer.Typer(
        name="softprompt",
        help=softprompt.__doc__,
        epilog="Quick start: softprompt demo",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    wanted = set(commands)
    for name, (module, help) in COMMANDS.items():
        if name in wanted:
            function = getattr(import_module(f"softprompt.cli.{module}"), f"{name}_command")
            app.command(name, cls=_TextsCommand if name == "predict" else None)(function)
        else:
            app.command(name, help=help)(_root)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # but for what notes.heard() hears of it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show must still be told apart
    try:
        with warnings.catch_warnings():
            hear_warnings()
            warnings.showwarning = lambda message, *_: print(f"Note: {as_note(str(message))}.", file=sys.stderr)
            typed = sys.argv[1:] if arguments is None else arguments
            app = command_line([word for word in typed if not word.startswith("-")][:1])
            app(spread(typer.main.get_command(app), typed), prog_name="softprompt")
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except SoftPromptError as error:
        code = _fail(str(error))
    except OSError as error:
        place = f"{error.filename} " if error.filename else ""
        code = _fail(f"{place}cannot be read or written: {error.strerror or error}; check the disk and permissions")
    return code if _flushed() else 1


def _fail(sentence: str) -> int:
    stderr.print(f"error: {sentence}")
    return 2


def _flushed() -> bool:
    """Writes out what is left, silently where the reader has gone (``softprompt list | head -1``)."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"softprompt {softprompt.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


class _TextsCommand(TyperCommand):
    """A command whose arguments are texts, which may begin with a dash as options do."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if hasattr(error, "option_name") and isinstance(getattr(error, "message", None), str):  # no such option
                error.message += "; put -- before a text that begins with a dash, and options before it"  # type: ignore[attr-defined]
            raise
