"""What other libraries say while they work for us: a user hears what concerns them, as our own notes, and no noise.

Transformers and PEFT tell users and programmers alike, through ``logging`` and ``warnings``. Their records of the
thread that listens are taken off the terminal; whatever is not known as noise becomes a ``SoftPromptWarning``. Other
threads, and ``sys.stderr``, are left alone.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from softprompt.errors import SoftPromptWarning

LIBRARIES = ("transformers", "peft", "accelerate", "huggingface_hub")
LONGEST = 500
"""Characters of a note."""

NOISE = (
    "LOAD REPORT",  # its findings are refused, or said in our own words
    "unauthenticated requests to the HF Hub",
    "hf_xet",
    "Token indices sequence length is longer",  # what is too long is cut or refused
    "without finding the associated sub-model",  # what reads images, which is taken out
    "Ignoring clean_up_tokenization_spaces=True",
    "Setting `pad_token_id` to `eos_token_id`",
    "`loss_type=",
    # to programmers
    r"`(torch_dtype|use_return_dict|rope_scaling|rope_config_validation|layer_type_validation)` is deprecated",
    "MXFP4 inference on CPU requires use_kernels",  # said in our own words
    "fan_in_fan_out is set to",  # PEFT sets it right by itself
)
"""Patterns of what concerns no user."""
OF_BITSANDBYTES = ("MatMul8bitLt: inputs will be cast", "Failed to load CPU gemm_4bit_forward")
"""What it says in every pass, or of a kernel that it can do without."""
_NOISE = re.compile("|".join(NOISE))
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Within the block, what the libraries log from this thread at level WARNING or above is a ``SoftPromptWarning``
    unless it is noise, and transformers shows no progress bars."""
    from transformers.utils import logging as untyped

    quieten_bitsandbytes()
    own: Any = untyped
    level, bars = own.get_verbosity(), own.is_progress_bar_enabled()
    ear = _Ear()
    loggers = [logging.getLogger(library) for library in LIBRARIES]
    others = {handler for logger in (*loggers, logging.getLogger()) for handler in logger.handlers}
    for handler in others:
        handler.addFilter(ear.is_for_others)
    for logger in loggers:
        logger.addHandler(ear)
    own.set_verbosity(min(level, logging.WARNING))
    own.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            own.enable_progress_bar()
        own.set_verbosity(level)
        for logger in loggers:
            logger.removeHandler(ear)
        for handler in others:
            handler.removeFilter(ear.is_for_others)


class _Ear(logging.Handler):
    """Takes the libraries' records of the thread that made it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._thread = threading.get_ident()
        self._said = set[str]()

    def is_for_others(self, record: logging.LogRecord) -> bool:
        """True for a record that other handlers are to write as ever."""
        library = record.name.partition(".")[0]
        return record.thread != self._thread or library not in LIBRARIES or record.levelno < logging.WARNING

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if not self.is_for_others(record) and not _NOISE.search(text) and text not in self._said:
            self._said.add(text)
            say(f"{record.name.partition('.')[0]} says: {as_note(text)}")


def quieten_bitsandbytes() -> None:
    """Has bitsandbytes leave out, from now on, what it says in every pass, and when it is imported."""
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).addFilter(_tells)  # which adds it once


def _tells(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(OF_BITSANDBYTES)


def say(note: str) -> None:
    """Tells the user something that the run goes on with."""
    warnings.warn(note, SoftPromptWarning, stacklevel=3)


def as_note(text: str) -> str:
    """Another library's message as one line without a full stop, colours and what is beyond ``LONGEST``."""
    line = " ".join(_COLOURS.sub("", text).split()).rstrip(".")
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def hide_noise() -> None:
    """Has Python ignore the noise among warnings until the end of the ``warnings.catch_warnings`` around it."""
    warnings.filterwarnings("ignore", message=f"(?s).*({'|'.join(NOISE)})")


def hear_warnings() -> None:
    """As ``hide_noise``; of all other warnings, Python shows ours and what transformers and PEFT tell users."""
    quieten_bitsandbytes()  # other libraries import it where it is installed
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=UserWarning, module=r"(transformers|peft)\b")
    hide_noise()
    warnings.simplefilter("default", SoftPromptWarning)
