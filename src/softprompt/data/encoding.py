"""From bytes to text: encodings, byte order marks and compression, wherever text comes in."""

from __future__ import annotations

import bz2
import codecs
import gzip
import re
import warnings
import zlib
from collections.abc import Callable

from softprompt.data.wording import counted, first_line
from softprompt.errors import ConfigError, DataError, SoftPromptWarning

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which is its start
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}


def decode(data: bytes, encoding: str | None = None) -> str:
    """The text without a byte order mark, line ends as they are.

    Args:
        data: the text's bytes.
        encoding: a name that Python's codecs know; UTF-8 if None. A byte order mark counts for more than either.

    Raises:
        ConfigError: there is no such encoding of text.
        UnicodeError: the bytes are not text in this encoding.
    """
    for mark, marked in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(marked)
    try:
        return data.decode(encoding or "utf-8")
    except LookupError as error:
        raise ConfigError(
            f"--encoding must be an encoding of text such as utf-8, latin-1, cp1252 or gb18030, not {encoding!r}."
        ) from error


def text_of(data: bytes, name: str, encoding: str | None = None) -> str:
    """The text of a source of data, decoded and checked.

    Args:
        data: its bytes, compressed or not.
        name: its name, for messages.
        encoding: see ``decode``.

    Raises:
        ConfigError: there is no such encoding of text.
        DataError: the bytes are cut off, or no text in this encoding.
    """
    data = _decompressed(data, name)
    if data.startswith(b"version https://git-lfs"):
        raise DataError(
            f"Expected rows of data in {name}, found a pointer of Git LFS; fetch the file by `git lfs pull`."
        )
    if data.startswith(b"PK\x03\x04"):
        raise DataError(
            f"Expected text in {name}, found a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV."
        )
    try:
        text = decode(data, encoding)
    except UnicodeDecodeError as error:  # error.object lacks the byte order mark where there is one
        line = error.object[: error.start].decode(error.encoding, errors="replace").count("\n") + 1
        found = f"0x{error.object[error.start]:02x}"
        expected = error.encoding.upper() if error.encoding.startswith("utf") else error.encoding
        raise DataError(
            f"{name}:{line}: expected {expected}, found the byte {found}; "
            f"name the right encoding with --encoding, for instance {_likely(data)}, or save the file as UTF-8."
        ) from None
    except UnicodeError as error:
        raise DataError(
            f"Expected the encoding {encoding} in {name}, found: {first_line(error)}; "
            f"name the right one with --encoding, or save the file as UTF-8."
        ) from error
    if _wide(data) and "\0" in text:
        raise DataError(
            f"Expected {encoding or 'UTF-8'} in {name}, found a zero byte beside most letters; "
            f"name the right encoding with --encoding, for instance {_wide(data)}, or save the file as UTF-8."
        )
    if encoding is not None:
        _warn_of_encoding(data, text, name, encoding)
    return text


def _likely(data: bytes) -> str:
    return _wide(data) or ("cp1252" if re.search(rb"[\x80-\x9f]", data) else "latin-1")


def _wide(data: bytes) -> str:
    """The form of UTF-16 that the bytes look like, or nothing."""
    even, odd = data[0::2].count(0), data[1::2].count(0)
    if even + odd <= len(data) // 4:
        return ""
    return "utf-16-le" if odd > even else "utf-16-be"


def _warn_of_encoding(data: bytes, text: str, name: str, encoding: str) -> None:
    """Says where a named encoding reads without an error what was written in another."""
    if codecs.lookup(encoding).name == "iso8859-1" and re.search(r"[\x80-\x9f]", text):
        warnings.warn(
            f"{name} holds control characters when it is read as {encoding}; files of Windows have the encoding cp1252",
            SoftPromptWarning,
            stacklevel=2,
        )
    try:
        read = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return
    if read.removeprefix("\ufeff") != text:
        foreign = sum(letter > "\x7f" for letter in read)
        warnings.warn(
            f"{name} is valid UTF-8 with {counted(foreign, 'letter')} beyond ASCII, but is read as {encoding}; "
            f"leave --encoding out if they come out wrong",
            SoftPromptWarning,
            stacklevel=2,
        )


def _decompressed(data: bytes, name: str) -> bytes:
    """The bytes as they were before gzip, bzip2 or xz, told by the first bytes rather than by the name."""
    method = next((method for mark, method in _COMPRESSED.items() if data.startswith(mark)), None)
    if method is None or (method == "bzip2" and data[4:10] != b"1AY&SY"):
        return data
    import lzma  # some builds of Python lack it

    open_up: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.decompress,
        "bzip2": bz2.decompress,
        "xz": lzma.decompress,
    }
    try:
        return open_up[method](data)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"Expected whole {method} data in {name}, found: {first_line(error)}; "
            f"the file may be cut off, fetch it again."
        ) from error
