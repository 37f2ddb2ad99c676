"""The options that several commands share."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompt.data.packages import DEFAULT_BASE
from softprompt.errors import ConfigError
from softprompt.files import local_path
from softprompt.terminal.console import stderr

if TYPE_CHECKING:
    from softprompt.model.frozen import FrozenLM

SEED_RANGE: dict[str, Any] = {"min": 0, "max": 2**32 - 1, "metavar": "<int>"}
"""What torch takes for sure, whatever is added to it."""


def option(help: str, default: object = None, *, panel: str | None = None, **kwargs: Any) -> Any:
    """An option; ``default`` is what its help says is used where it is not given."""
    shown = "" if default is None else f" [dim]\\[default: {default}][/dim]"
    return typer.Option(help=help + shown, rich_help_panel=panel, show_default=False, **kwargs)


def flag(name: str, help: str, *, panel: str | None = None) -> Any:
    """An option without a value, off unless given."""
    return typer.Option(name, help=help, rich_help_panel=panel)


model_option = partial(option, panel="Base model")
data_option = partial(option, panel="Data")
text_option = partial(option, panel="Generated text")

Json = Annotated[bool, flag("--json", "Print one JSON object on stdout and nothing else there.")]
Name = Annotated[str, typer.Argument(metavar="N", help="A soft prompt: its name in the store, or a path.")]
BaseOnly = Annotated[bool, flag("--base-only", "Leave the soft prompt out, keep the template.")]
Normalise = Annotated[bool, flag("--normalise-length", "Divide a label's log-probability by its tokens.")]

Base = Annotated[str | None, model_option("The base model, where it has moved since.", "as in training")]
Dtype = Annotated[
    str,
    model_option(
        "auto, fp32, bf16 or fp16; auto is bf16 where it is native. In 16 bits, what else is in a batch can change an "
        "answer's last digits, on a GPU its text.",
        "auto",
    ),
]
Device = Annotated[str, model_option("auto, cpu, cuda, mps …", "auto")]
Trust = Annotated[bool, flag("--trust-remote-code", "Run code that comes with the model.", panel="Base model")]

SOURCE = "JSONL, JSON, CSV, TSV, Parquet or hf:DATASET."
LABELS = "a,b or a=word|word,b=word or a .json file; all: each target is one; none: free text."

InputField = Annotated[str | None, data_option("The column that feeds {input}.", "input")]
TargetField = Annotated[str, data_option("The column of the targets.", "target")]
ReferencesField = Annotated[
    str | None,
    data_option("The column of further accepted texts, as lists; none: no such.", "references, if it holds such lists"),
]
Encoding = Annotated[str | None, data_option("The encoding of files of text, such as cp1252.", "utf-8")]

MaxNewTokens = Annotated[int | None, text_option("The most tokens to generate.", "128, at most half of the room")]
Temperature = Annotated[float | None, text_option("0 takes the most probable token.", 0)]
TopP = Annotated[float | None, text_option("Draw from the tokens that hold this probability.", 1)]
Stop = Annotated[
    list[str] | None,
    text_option(
        "End the text before this; \\n is a line end. Several may follow, -- ends them.",
        "\\n with --base-only, else none",
    ),
]
SampleSeed = Annotated[int | None, text_option("Seeds the drawing of tokens.", 0, **SEED_RANGE)]


def with_line_ends(text: str) -> str:
    r"""The text with ``\n``, as one types it in a shell, for a line end.

    Raises:
        ConfigError: it is not UTF-8.
    """
    return in_utf8(text).replace("\\n", "\n")


def in_utf8(text: str) -> str:
    """The text, if a tokenizer can take it: a shell may hand over any bytes, which come as halves of surrogate pairs.

    Raises:
        ConfigError: it is not UTF-8.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"Expected UTF-8 in the text {text!r}, found other bytes; convert it.")
    return text


def lasting(base: str) -> str:
    """The base model's id, a path on this machine by its full name, so that it is found again from another folder."""
    path = local_path(base)
    return str(path.resolve()) if base != DEFAULT_BASE and path.exists() else base


def load_base_model(base: str, dtype: str, device: str, trust_remote_code: bool) -> FrozenLM:
    """Loads a base model.

    Raises:
        BaseModelError: it cannot be found or read.
        ConfigError: an unknown dtype or device.
    """
    from softprompt.model.frozen import FrozenLM

    with stderr.status(f"loading {base}"):
        return FrozenLM.load(lasting(base), dtype=dtype, device=device, trust_remote_code=trust_remote_code)
