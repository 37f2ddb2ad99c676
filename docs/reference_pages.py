"""Writes the generated pages of the reference: the command line, the public names of Python, the fields of TrainConfig,
the architectures.

    python docs/reference_pages.py

All come from the code itself: the typer application, ``softprompt.__all__``, the docstrings, and ``FAMILIES``, whose
every type of model the tests run. The pages are not kept in the repository; ``make docs`` writes them before it builds
the site.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

import softprompt
from softprompt.cli.main import command_line
from softprompt.model.architecture import FAMILIES, REFUSED, WHOLE
from softprompt.tuning.config import TrainConfig

FOLDER = Path(__file__).parent / "reference"

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")


def main() -> None:
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"docs/reference/{name}")


def pages() -> dict[str, str]:
    """Every generated page by its file's name."""
    return {
        "architectures.md": architectures_page(),
        "commands.md": commands_page(),
        "python.md": python_page(),
        "train_config.md": train_config_page(),
    }


# --- the command line ----------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(command_line())
    parts = [
        "# Command line",
        "Results go to stdout, progress and warnings to stderr. Exit codes: 0; 2 for a user's mistake, which is one "
        "sentence on stderr; 130 after Ctrl-C. `--json`, where a command has it, prints one JSON object on stdout and "
        "nothing else there. `softprompt COMMAND --help` says the same as this page.",
        table(
            ("command", "does"),
            [(f"[`{name}`](#softprompt-{name})", first(command.help)) for name, command in group.commands.items()],
        ),
        *parameters(group),
    ]
    for name, command in group.commands.items():
        parts += [f"## softprompt {name}", *help_text(command.help), *parameters(command)]
    return "\n\n".join(parts) + "\n"


def help_text(text: str) -> Iterator[str]:
    """The paragraphs of a command's help; examples, which stand behind click's ``\\b``, in a block of code."""
    said, _, examples = inspect.cleandoc(text).partition("\b")
    yield from (marked(" ".join(paragraph.split())) for paragraph in said.strip().split("\n\n"))
    if examples.strip():
        yield f"```sh\n{textwrap.dedent(examples).strip()}\n```"


def parameters(command: Any) -> Iterator[str]:
    """A table for each panel of a command's help."""
    panels: dict[str, list[tuple[str, str, str]]] = {}
    for parameter in command.params:
        if parameter.name == "help" or parameter.hidden:
            continue
        is_option = parameter.param_type_name == "option"
        panel = getattr(parameter, "rich_help_panel", None) or ("Options" if is_option else "Arguments")
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        if not is_option:
            names = f"`{parameter.metavar or parameter.name}`"
        text = Text.from_markup(parameter.help or "").plain
        said, _, default = text.partition("[default: ")
        needed = "required" if parameter.required else default.strip().removesuffix("]")
        panels.setdefault(panel, []).append((names, said.strip(), needed))
    for panel, rows in panels.items():
        heading = "option" if rows[0][0].startswith("`-") else "argument"
        yield f"**{panel}**"
        yield table((heading, "meaning", "default"), rows)


# --- Python --------------------------------------------------------------------------------------


def python_page() -> str:
    """Every public name: functions first, then classes, then exceptions."""
    public = {name: getattr(softprompt, name) for name in softprompt.__all__ if not name.startswith("_")}
    functions = {name: value for name, value in public.items() if not inspect.isclass(value)}
    errors = {n: v for n, v in public.items() if inspect.isclass(v) and issubclass(v, BaseException | Warning)}
    classes = {name: value for name, value in public.items() if name not in functions and name not in errors}
    parts = [
        "# Python",
        "What `import softprompt` offers. Paths may be `str` or `os.PathLike` everywhere. "
        "[Quickstart](../start/quickstart.md#from-python) shows the usual lines.",
        table(
            ("name", "is"),
            [(f"[`{name}`](#{name.lower()})", first(documentation(value))) for name, value in public.items()],
        ),
        "## Functions",
    ]
    for name, value in functions.items():
        parts += [f"### {name}", *described(value, signature(name, value))]
    parts.append("## Classes")
    for name, value in classes.items():
        parts += class_parts(name, value)
    parts.append("## Exceptions")
    parts += [
        f"### {name}\n\n`{name}({value.__bases__[0].__name__})`\n\n{plain(documentation(value))}"
        for name, value in errors.items()
    ]
    return "\n\n".join(parts) + "\n"


def class_parts(name: str, value: type) -> Iterator[str]:
    """A class with its public methods and properties."""
    yield f"### {name}"
    protocol = getattr(value, "_is_protocol", False)
    if value is TrainConfig:
        yield f"{plain(documentation(value).splitlines()[0])} [Its fields](train_config.md) have a page of their own."
    else:
        yield from described(value, None if protocol else signature(name, value))
        for base in value.__bases__:
            if base.__module__.startswith("softprompt.") and not issubclass(value, BaseException):
                yield from described(base, None)  # its attributes are this class's, too
    for member, found in vars(value).items():
        if member.startswith("_"):
            continue
        inner = getattr(found, "__func__", getattr(found, "func", found))
        if isinstance(found, property):
            yield f"**`{name}.{member}`** (property)"
            yield from described(found, None)
        elif not isinstance(found, property) and hasattr(found, "func"):  # cached_property
            yield f"**`{name}.{member}`** (property)"
            yield from described(inner, None)
        elif inspect.isfunction(inner):
            yield f"**`{name}.{member}`**"
            yield from described(
                inner, signature(f"{name}.{member}", inner, method=not isinstance(found, staticmethod))
            )


def signature(name: str, value: Callable[..., Any], *, method: bool = False) -> str:
    """``name(argument: type = default) -> type``, a line an argument where one line would be long."""
    found = inspect.signature(value)
    arguments = [argument.replace(annotation=Bare(argument.annotation)) for argument in found.parameters.values()]
    if method:
        arguments = arguments[1:]
    texts = [str(argument).replace(": -", "").replace("<factory>", "...") for argument in arguments]
    for place, argument in enumerate(arguments):
        before = arguments[place - 1].kind if place else None
        keyword = argument.kind is inspect.Parameter.KEYWORD_ONLY
        if keyword and before not in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL):
            texts[place] = f"*, {texts[place]}"
    returns = (
        ""
        if found.return_annotation is inspect.Signature.empty or inspect.isclass(value)
        else (f" -> {Bare(found.return_annotation)!r}")
    )
    line = f"{name}({', '.join(texts)}){returns}"
    if len(line) <= 88:
        return line
    inner = "".join(f"    {text},\n" for text in texts).replace("    *, ", "    *,\n    ")
    return f"{name}(\n{inner}){returns}"


class Bare:
    """An annotation that is written as it stands in the source, without quotes."""

    def __init__(self, annotation: Any) -> None:
        self._annotation = annotation

    def __repr__(self) -> str:
        found = self._annotation
        if found is inspect.Parameter.empty:
            return "-"
        return found if isinstance(found, str) else inspect.formatannotation(found)


def described(value: Any, shown: str | None) -> Iterator[str]:
    """A signature, and a docstring with its sections as tables."""
    if shown is not None:
        yield f"```python\n{shown}\n```"
    text: list[str] = []
    lines: list[str] = []
    section = ""
    for line in [*documentation(value).splitlines(), "End:"]:
        match = SECTION.fullmatch(line)
        if not match and line != "End:":
            (lines if section else text).append(line)
            continue
        if section:
            yield from section_parts(section, lines)
        elif "\n".join(text).strip():
            yield plain("\n".join(text).strip())
        section, lines = (match[1], []) if match else ("", [])


def section_parts(section: str, lines: list[str]) -> Iterator[str]:
    """A section of a docstring: ``Args``, ``Attributes`` and ``Raises`` as a table."""
    text = textwrap.dedent("\n".join(lines)).strip()
    if section in ("Returns", "Yields"):
        yield f"**{section}** {plain(text)}"
        return
    heading = {"Args": "argument", "Attributes": "attribute", "Raises": "raises"}[section]
    yield table((heading, "meaning" if section != "Raises" else "when"), entries(text).items(), code=True)


def entries(text: str) -> dict[str, str]:
    """``name: text`` with further lines indented."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line[:1].strip() and ": " in f"{line} ":
            name, _, rest = line.partition(":")
            found[name] = rest.strip()
        else:
            found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return found


# --- TrainConfig ---------------------------------------------------------------------------------


def train_config_page() -> str:
    """Every field, with its type, default, option and meaning."""
    _, _, attributes = documentation(TrainConfig).partition("Attributes:\n")
    meanings = entries(textwrap.dedent(attributes).strip())
    rows = [
        (f"`{field.name}`", f"`{field.type}`", f"`{field.default!r}`", meanings[field.name])
        for field in dataclasses.fields(TrainConfig)
    ]
    return (
        "\n\n".join(
            [
                "# TrainConfig",
                "The settings of a training. In Python they are fields of `softprompt.TrainConfig`, and arguments of "
                "`softprompt.train`. On the command line `batch_size` is `--batch-size`. "
                "[Training](../guides/training.md) says which ones to try. "
                "[The study](../study/defaults.md) says how the defaults were chosen.",
                table(("field", "type", "default", "meaning"), rows),
            ]
        )
        + "\n"
    )


# --- architectures -------------------------------------------------------------------------------

REFUSED_TYPES = (("Encoders", ("bert", "roberta"), "their tokens see those behind them"),)


def architectures_page() -> str:
    """Every family of models: which path it takes, what a prefix leaves behind, and why not."""
    rows = []
    for family in FAMILIES:
        own = [r for r in family.refused if r not in REFUSED]
        unless = "; ".join(f"whole sequences with `{refusal.setting}`: {refusal.why}" for refusal in own)
        but = "; ".join(part for part in (family.but, unless) if part)
        rows.append((family.name, codes(family.model_types), "fast", family.leaves, "yes", but))
    rows += [(kind, codes((kind,)), "whole sequences", "", "no", why) for kind, why in WHOLE.items()]
    rows += [(name, codes(kinds), "refused", "", "", why) for name, kinds, why in REFUSED_TYPES]
    parts = [
        "# Architectures",
        "Each type of model that is said to be fast is tested against whole sequences: the logits of a text, mixed "
        "batches, gradients, greedy texts. [The shared prefix](../explain/shared_prefix.md) says what fast means. "
        "The type is `model_type` in `config.json`. Where a model also sees pictures, it is the type of the language "
        "model inside it.",
        "A model of any of these runs whole sequences all the same with "
        + "; ".join(f"`{refusal.setting}` (unless it is {codes(refusal.but)}): {refusal.why}" for refusal in REFUSED)
        + ". Where the angles of positions are others in long sequences (`rope_type` `longrope`, as in Phi 3.5 and 4, "
        "or `dynamic`), sequences longer than `original_max_position_embeddings` run whole, each alone, and shorter "
        "ones are fast. A text that becomes longer while it is written goes on whole.",
        "A model that is not in the table is tried when it is loaded. A few texts run on both paths. It is fast if "
        "they come out alike, and runs whole sequences otherwise. One line on stderr says which.",
        "`--parametrisation prefix` trains what a prefix leaves behind ([Trained prefixes](../explain/learned.md#kv-"
        "prefixes-and-trained-states)). It, too, is tested for each type of model that is fast.",
        table(("family", "type", "path", "what a prefix leaves behind", "can be trained", "but"), rows),
    ]
    return "\n\n".join(parts) + "\n"


def codes(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# --- Markdown ------------------------------------------------------------------------------------


def documentation(value: Any) -> str:
    """The docstring, or nothing."""
    return inspect.getdoc(value) or ""


def first(text: str | None) -> str:
    """The first sentence of a docstring or help."""
    paragraph = " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:;]) (?=[A-Z])", paragraph)[0]


def plain(text: str) -> str:
    """A docstring's text in Markdown."""
    return marked(re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", text)).replace("::\n", ":\n")


def marked(text: str) -> str:
    return text.replace("``", "`")


def table(head: tuple[str, ...], rows: Any, *, code: bool = False) -> str:
    """A table in Markdown; with ``code``, the first column is code."""
    lines = [head, tuple("---" for _ in head)]
    lines += [(f"`{row[0]}`", *row[1:]) if code else tuple(row) for row in rows]
    return "\n".join(f"| {' | '.join(cell(text) for text in line)} |" for line in lines)


def cell(text: str) -> str:
    return plain(" ".join(text.split())).replace("|", "\\|")


if __name__ == "__main__":
    main()
