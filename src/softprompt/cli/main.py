"""The command line, and the one place where errors become sentences.

Results go to stdout, progress and warnings to stderr. A user's mistake is one sentence and exit code 2.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import softprompt
from softprompt.cli.arguments import spread
from softprompt.cli.commands import COMMANDS
from softprompt.cli.processes import Stopped, join_for, one_of_several
from softprompt.errors import SoftPromptError
from softprompt.model.distributed import is_first, is_to_say, leave, noticing_loss
from softprompt.model.notes import as_note, hear_warnings
from softprompt.terminal.console import stderr

_WORDS = "softprompt.words"


def command_line() -> typer.Typer:
    """The command line with all commands."""
    app = typer.Typer(
        name="softprompt",
        cls=_Group,
        help=softprompt.__doc__,
        epilog="Quick start: softprompt demo",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, function in COMMANDS.items():
        app.command(name, cls=_TextsCommand if name == "predict" else _Command)(function)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # but for what notes.heard() hears of it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show must still be told apart
    with one_of_several():
        return _run(sys.argv[1:] if arguments is None else list(arguments))


def _run(arguments: list[str]) -> int:
    try:
        with warnings.catch_warnings():
            hear_warnings()
            warnings.showwarning = lambda message, *_: print(f"Note: {as_note(str(message))}.", file=sys.stderr)
            with noticing_loss():
                command_line()(arguments, prog_name="softprompt")
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except SoftPromptError as error:
        code = _fail(str(error), is_to_say(error))
    except Stopped as stopped:
        code = _fail(str(stopped), is_first())
    except OSError as error:
        place = f"{error.filename} " if error.filename else ""
        code = _fail(f"{place}cannot be read or written: {error.strerror or error}; check the disk and permissions")
    if code == 0:
        leave()  # where a process was lost, the others would be waited for
    return code if _flushed() else 1


def _fail(sentence: str, is_to_say: bool = True) -> int:
    if is_to_say and not is_first():  # of several processes, the others are silent but for what the first cannot know
        print(f"error in process {os.environ['RANK']}: {sentence}", file=sys.__stderr__)
    elif is_to_say:
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
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    join_for(context.invoked_subcommand)


class _Group(TyperGroup):
    """Commands whose options that may be repeated take several words, see ``spread``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(self, args))


class _Command(TyperCommand):
    """A command; a shell completes also the second and further words of an option that takes several."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_WORDS] = list(args)
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        found = list(super().shell_complete(ctx, incomplete))
        before = ctx.meta.get(_WORDS, [])[-2:-1]
        for param in self.params:
            if before and getattr(param, "multiple", False) and before[0] in param.opts:
                found += param.shell_complete(ctx, incomplete)
        return found


class _TextsCommand(_Command):
    """A command whose arguments are texts, which may begin with a dash as options do."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if hasattr(error, "option_name") and isinstance(getattr(error, "message", None), str):  # no such option
                error.message += "; put -- before a text that begins with a dash, and options before it"  # type: ignore[attr-defined]
            raise
