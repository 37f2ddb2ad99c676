"""The options that several commands share, and groups of options that a command gets as one object."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from softprompt.data.columns import Columns
from softprompt.data.formats import FORMATS
from softprompt.data.packages import DEFAULT_BASE
from softprompt.errors import ConfigError, StoreError
from softprompt.terminal.console import stderr

SHARDS = ("none", "fsdp", "tp")

if TYPE_CHECKING:
    from softprompt.data.example import Dataset
    from softprompt.model.frozen import FrozenLM
    from softprompt.soft_prompts.soft_prompt import SoftPrompt

SEED_RANGE: dict[str, Any] = {"min": 0, "max": 2**32 - 1, "metavar": "<int>"}
"""What torch takes for sure, whatever is added to it."""


# --- how an option is declared --------------------------------------------------------------------


def completed(choices: Iterable[str], *, stored: bool = False) -> Callable[[str], list[str]]:
    """What a shell completes a value to: one of ``choices``, or with ``stored`` a name in the store, too."""

    def complete(incomplete: str) -> list[str]:
        found = (*choices, *(_stored() if stored else ()))
        return [choice for choice in found if choice.startswith(incomplete)]

    return complete


def _stored() -> tuple[str, ...]:
    from softprompt.soft_prompts.store import Store

    try:
        return Store().names()
    except StoreError:
        return ()


def option(
    help: str, default: object = None, *, panel: str | None = None, choices: Sequence[str] = (), **kwargs: Any
) -> Any:
    """An option; ``default`` is what its help says is used where it is not given, ``choices`` what shells complete."""
    shown = "" if default is None else f" [dim]\\[default: {default}][/dim]"
    if choices:
        kwargs.setdefault("autocompletion", completed(choices))
    return typer.Option(help=help + shown, rich_help_panel=panel, show_default=False, **kwargs)


def flag(name: str, help: str, *, panel: str | None = None) -> Any:
    """An option without a value, off unless given."""
    return typer.Option(name, help=help, rich_help_panel=panel)


def expanded(function: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter that is a dataclass replaced by the dataclass's fields, which are options. The
    function gets one object made of them."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for parameter in signature(function).parameters.values():
        if group := groups.get(parameter.name):
            types = get_type_hints(group, include_extras=True)
            parameters += [
                Parameter(
                    field.name,
                    Parameter.KEYWORD_ONLY,
                    default=Parameter.empty if field.default is MISSING else field.default,
                    annotation=types[field.name],
                )
                for field in fields(group)
            ]
        else:
            annotation = hints[parameter.name]
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=annotation))

    def command(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        function(**given)

    command.__doc__ = function.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command


model_option = partial(option, panel="Base model")
data_option = partial(option, panel="Data")
text_option = partial(option, panel="Generated text")

SOURCE = "JSONL, JSON, CSV, TSV, Parquet or hf:DATASET."

Json = Annotated[bool, flag("--json", "Print one JSON object on stdout and nothing else there.")]
Name = Annotated[
    str,
    typer.Argument(
        metavar="N",
        help="A soft prompt: its name in the store, or a path.",
        autocompletion=completed((), stored=True),
    ),
]
Names = Annotated[
    str,
    typer.Argument(
        metavar="N[,N…]",
        help="A soft prompt: its name in the store, or a path. Several, with commas, answer together.",
        autocompletion=completed((), stored=True),
    ),
]
Train = Annotated[str, typer.Argument(metavar="TRAIN", help=SOURCE)]
BaseOnly = Annotated[bool, flag("--base-only", "Leave the soft prompt out, keep the template.")]
Normalise = Annotated[bool, flag("--normalise-length", "Divide a label's log-probability by its tokens.")]


# --- the base model -------------------------------------------------------------------------------

Base = Annotated[str | None, model_option("The base model, where it has moved since.", "as in training")]
FROZEN = model_option("The frozen model: alias, hub id, folder or .gguf file.", DEFAULT_BASE)
"""What the option of a base model to train on says."""

Dtype = Annotated[
    str,
    model_option(
        "auto, fp32, bf16 or fp16; auto is bf16 where it is native. In 16 bits, what else is in a batch can change an "
        "answer's last digits, on a GPU its text.",
        "auto",
        choices=("auto", "fp32", "bf16", "fp16"),
    ),
]
Device = Annotated[str, model_option("auto, cpu, cuda, mps …", "auto", choices=("auto", "cpu", "cuda", "mps"))]
Sharding = Annotated[
    str,
    model_option(
        "For base models larger than a device, under torchrun: fsdp or tp (tensor parallel); none: each process has "
        "all of it.",
        "none",
        choices=SHARDS,
    ),
]
PRECISIONS = ("nf4", "int8", "int4", "fp8", "gguf")
Quantize = Annotated[
    str | None,
    model_option(
        "nf4, int8, int4 or fp8: what the linear layers of the base model are stored in. nf4 needs the library "
        "bitsandbytes. gguf: the blocks of the GGUF file.",
        "as they are",
        choices=PRECISIONS,
    ),
]
BaseDtype = Annotated[str | None, model_option("fp8: another spelling of --quantize fp8.", choices=("fp8",))]
Trust = Annotated[bool, flag("--trust-remote-code", "Run code that comes with the model.", panel="Base model")]


@dataclass(frozen=True)
class Loading:
    """How a base model is loaded."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    trust_remote_code: Trust = False
    quantize: Quantize = None
    base_dtype: BaseDtype = None

    @property
    def precision(self) -> str | None:
        """What the base model is to be quantised to.

        Raises:
            ConfigError: ``--base-dtype`` is something else than fp8, or contradicts ``--quantize``.
        """
        if self.base_dtype not in (None, "fp8") or (self.base_dtype and self.quantize not in (None, "fp8")):
            raise ConfigError(
                f"--base-dtype can only be fp8, which is --quantize fp8, not {self.base_dtype!r} with --quantize "
                f"{self.quantize}; give one of --quantize {', '.join(PRECISIONS)}, or --dtype."
            )
        return self.quantize or self.base_dtype

    def load(self, base: str) -> FrozenLM:
        """Loads a base model, which is said on stderr.

        Raises:
            BaseModelError: it cannot be found or read.
            ConfigError: an unknown dtype, device or precision, or one that this machine cannot compute with.
        """
        with stderr.status(f"loading {base}"):
            return self.load_quietly(base)

    def load_quietly(self, base: str) -> FrozenLM:
        """As :meth:`load`, without a word."""
        from softprompt.model.distributed import World
        from softprompt.model.frozen import FrozenLM
        from softprompt.model.loading import lasting

        return FrozenLM.load(
            lasting(base),
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            world=World.join(self._shard),
            quantize=self.precision,
        )

    @property
    def _shard(self) -> Any:
        """What each of several processes holds of the base model."""
        return "none"


@dataclass(frozen=True)
class SharedLoading(Loading):
    """The same for commands that several processes share."""

    shard: Sharding = "none"

    @property
    def _shard(self) -> Any:
        if self.shard not in SHARDS:
            raise ConfigError(f"--shard must be one of {', '.join(SHARDS)}, not {self.shard!r}.")
        return self.shard


# --- data -----------------------------------------------------------------------------------------

Validation = Annotated[str | None, data_option("Rows to choose the best step by.", "a tenth of TRAIN")]
Labels = Annotated[
    str | None,
    data_option(
        "a,b or a=word|word,b=word or a .json file, or names of numbers in .json or .txt; all: each target is one; "
        "none: free text.",
        "as TRAIN looks",
    ),
]
InputField = Annotated[str | None, data_option("The column that feeds {input}.", "input")]
TargetField = Annotated[str, data_option("The column of the targets.", "target")]
ReferencesField = Annotated[
    str | None,
    data_option("The column of further accepted texts, as lists; none: no such.", "references, if it holds such lists"),
]
Encoding = Annotated[str | None, data_option("The encoding of files of text, such as cp1252.", "utf-8")]
Format = Annotated[
    str | None,
    data_option(
        f"{', '.join(FORMATS[1:])}, or none: columns as named above.",
        "as the columns look, where they are not input and target",
        choices=FORMATS,
    ),
]


Form = Annotated[
    str,
    data_option(
        "default, chat, or text with {soft_prompt}, fields and {target}; \\n: line end.",
        "default",
        choices=("default", "chat"),
    ),
]


@dataclass(frozen=True)
class ColumnOptions(Columns):
    """What is where in rows with targets."""

    input_field: InputField = None
    target_field: TargetField = "target"
    references_field: ReferencesField = None
    encoding: Encoding = None
    format: Format = None

    def read(self, source: str, soft_prompt: SoftPrompt, *, require_target: bool = True) -> Dataset:
        """The rows of a file or data set for a soft prompt; a format that was told from the columns is said on stderr.

        Raises:
            ConfigError: an unknown encoding or format.
            DataError: they cannot be read.
        """
        from softprompt.data.checks import as_format
        from softprompt.tasks.reading import read_for

        rows = read_for(soft_prompt, source, self, require_target=require_target)
        if rows.recognised:
            stderr.print(f"{rows.source}: {as_format(rows.format, rows.recognised)}")
        return rows


@dataclass(frozen=True)
class OneTargetColumns:
    """What is where in rows with one target each."""

    input_field: InputField = None
    target_field: TargetField = "target"
    encoding: Encoding = None
    format: Format = None

    def read(self, source: str, soft_prompt: SoftPrompt) -> Dataset:
        """As :meth:`ColumnOptions.read`."""
        columns = ColumnOptions(self.input_field, self.target_field, None, self.encoding, self.format)
        return columns.read(source, soft_prompt)


# --- generated text -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextOptions:
    """How text is generated."""

    max_new_tokens: Annotated[
        int | None, text_option("The most tokens to generate.", "128, at most half of the room")
    ] = None
    temperature: Annotated[float | None, text_option("0 takes the most probable token.", 0)] = None
    top_p: Annotated[float | None, text_option("Draw from the tokens that hold this probability.", 1)] = None
    stop: Annotated[
        list[str] | None,
        text_option(
            "End the text before this; \\n is a line end. Several may follow, -- ends them.",
            "\\n with --base-only, else none",
        ),
    ] = None
    seed: Annotated[int | None, text_option("Seeds the drawing of tokens.", 0, **SEED_RANGE)] = None

    def given(self) -> dict[str, Any]:
        """What was given of ``Sampling``, checked.

        Raises:
            ConfigError: a value out of its range, or text that is not UTF-8.
        """
        from softprompt.model.request import Sampling

        stop = tuple(map(with_line_ends, self.stop)) if self.stop else None
        values = {field.name: getattr(self, field.name) for field in fields(self)} | {"stop": stop}
        options = {key: value for key, value in values.items() if value is not None}
        Sampling(**options)
        return options


# --- values ---------------------------------------------------------------------------------------


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


def seconds(text: str) -> float:
    """``90s``, ``10m``, ``1.5h`` or plain seconds.

    Raises:
        ConfigError: something else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if found is None:
        raise ConfigError(f"Expected a time such as 90s, 10m or 1h for --budget, found {text!r}; write one.")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]
