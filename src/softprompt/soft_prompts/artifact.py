"""A soft prompt as one ``.safetensors`` file, and the refusal of every file that is not exactly what was saved.

The file holds one tensor, ``soft_prompt`` float32 ``[P, H]``, and in its header, under the key ``softprompt``, a JSON
document: ``schema_version``, ``num_virtual_tokens`` (P), ``hidden_size`` (H), every other field of :class:`SoftPrompt`
by its own name (the verbalizer as pairs, since the order of its labels counts; ``base_settings`` and ``quantized`` only
where there are some), and ``digest``. The digest is the
SHA-256 of the document without it (sorted keys, no spaces, ASCII), followed by the tensor's bytes (little-endian, row
by row): a flipped bit anywhere is noticed. Equal soft prompts give equal files. ``word_end`` is no field of its own:
``schema_version`` is 2 where label words have an end, else 1.

Where ``parametrisation`` is ``prefix``, the tensor is a trained KV prefix ``[P, L, 2, H_kv, D]``, and ``num_layers``
(L), ``num_kv_heads`` (H_kv) and ``head_dim`` (D) stand in the place of ``hidden_size``.

A trained state has ``schema_version`` 3 and several tensors, such as ``layers.0.state``, ``layers.0.window`` and
``layers.3.keys`` ``[P, H_kv, D]``, each of its own size. ``parts`` lists their names and shapes in the order in which
the digest takes them, ``word_end`` is a field of its own, and ``num_virtual_tokens`` is 0 without keys. A soft prompt
with virtual tokens before a decoder's input is written likewise: its tensors are ``soft_prompt`` and
``decoder_soft_prompt`` ``[N, H]``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from softprompt.errors import ArtifactError, StoreError
from softprompt.files import StrPath, atomic_writer, local_path
from softprompt.soft_prompts.metadata import AHEAD, MAIN, Header, Metadata, size_names, sizes_of

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 3
"""Of several tensors, which earlier releases cannot read. All others have version 1, or 2 where label words have an
end, which the releases before would leave out."""

SUFFIX = ".safetensors"

MAX_HEADER_BYTES = 4 << 20  # a header of ours has a few kB; this bounds what a hostile file can make us parse

_TENSOR = MAIN

_DOCUMENT = "softprompt"

_TEXTS = ("name", "base", "base_fingerprint", "tokenizer_fingerprint", "template", "parametrisation", "created")

_MAPPINGS = ("training", "data", "versions")

_SETTINGS = "base_settings"  # only where there are some: files of earlier releases have none

_QUANTIZED = "quantized"  # likewise

_PARTS = "parts"  # of several tensors

_WORD_END = "word_end"  # likewise; of others the version says it

_PART = re.compile(r"layers\.\d{1,6}\.(keys|values|state|window)")
"""What the tensors of a trained state are called."""


def write(content: bytes, path: StrPath, name: str) -> None:
    """Writes a file of :func:`encode` in place of what was there, atomically; missing folders are made.

    Args:
        content: the file.
        path: where it goes.
        name: of the soft prompt, for an error.

    Raises:
        StoreError: the folder cannot be written, or is full; a file that was there before is unchanged.
    """
    path = local_path(path)
    try:
        with atomic_writer(path) as file:
            file.write(content)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"free {len(content):,} bytes there" if full else "make the folder writable"
        raise StoreError(
            f"The soft prompt '{name}' cannot be written to {path}: {error.strerror or error}; "
            f"{remedy}, or choose another folder."
        ) from error


def read(path: StrPath) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """The fields of :class:`Metadata` in a file, and its numbers.

    Raises:
        ArtifactError: there is no such file, or it is truncated, corrupted, foreign or of a newer schema.
    """
    document, numbers = _read(local_path(path))
    return _fields(document), numbers


def read_header(path: StrPath) -> Header:
    """All that the file says except its numbers, which are checked as :func:`read` does; needs no torch.

    Raises:
        ArtifactError: as for :func:`read`.
    """
    document, _ = _read(local_path(path))
    is_state = _has_parts(document) and document["parametrisation"] == "prefix"
    names = ("num_virtual_tokens",) if is_state else size_names(document["parametrisation"])
    return Header(sizes={name: document[name] for name in names}, **_fields(document))


def _read(path: Path) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """The header's document without its digest, and the numbers; both checked."""
    try:
        if path.is_dir():
            raise ArtifactError(
                f"{path} is a folder, but a soft prompt is one {SUFFIX} file that softprompt saved; "
                f"name that file, or take in a folder of PEFT with `softprompt import`."
            )
        if not path.is_file():
            raise ArtifactError(
                f"There is no soft prompt at {path}; check the path, or see the stored ones with `softprompt list`."
            )
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            _refuse(path, f"a safetensors header of at most {MAX_HEADER_BYTES:,} bytes", f"{header_bytes:,}")
        with safe_open(path, framework="np") as opened:
            document, digest = _read_document(path, (opened.metadata() or {}).get(_DOCUMENT))
            shapes = _shapes(document)
            if sorted(opened.keys()) != sorted(shapes):
                wanted = f"the one tensor '{_TENSOR}'" if list(shapes) == [_TENSOR] else f"the tensors {sorted(shapes)}"
                _refuse(path, wanted, f"the tensors {sorted(opened.keys())}")
            for name, shape in shapes.items():
                stored = opened.get_slice(name)
                if stored.get_dtype() != "F32" or stored.get_shape() != shape:
                    found = f"{stored.get_dtype()} {stored.get_shape()}"
                    _refuse(path, f"the tensor '{name}' as F32 {shape}", found)
            tensors: list[NDArray[np.float32]] = [np.array(opened.get_tensor(name)) for name in shapes]  # copies
            is_state = _has_parts(document) and document["parametrisation"] == "prefix"
            numbers = np.concatenate([t.reshape(-1) for t in tensors] if is_state else tensors)
    except SafetensorError as error:
        _refuse(path, "a whole safetensors file", f"'{error}'")
    except OSError as error:
        raise ArtifactError(
            f"The soft prompt {path} cannot be read: {error.strerror or error}; check the file and its permissions."
        ) from error
    if not np.isfinite(numbers).all():
        _refuse(path, "finite numbers", f"{int((~np.isfinite(numbers)).sum())} that are not")
    if (actual := _digest(document, numbers)) != digest:
        _refuse(path, f"content of the digest {digest}", actual)
    return document, numbers


def _has_parts(document: Mapping[str, Any]) -> bool:
    return bool(document.get("schema_version") == SCHEMA_VERSION)


def _shapes(document: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shape of each tensor of the file by name, in the order in which the digest takes them."""
    if _has_parts(document):
        return dict(document[_PARTS])
    sizes = [document[name] for name in size_names(document["parametrisation"])]
    return {_TENSOR: [*sizes[:2], 2, *sizes[2:]] if sizes[2:] else sizes}


def encode(soft_prompt: Metadata, vectors: torch.Tensor) -> bytes:
    """The whole file.

    Args:
        soft_prompt: what is known of it.
        vectors: the numbers.

    Raises:
        ArtifactError: the vectors are not finite float32 of their parametrisation's shape, or a field has no JSON form.
    """
    vectors = vectors.detach().cpu().contiguous()
    name = soft_prompt.name
    parts = soft_prompt.parts
    size = sum(map(math.prod, parts.values()))
    if parts and soft_prompt.parametrisation == "prefix":
        sound, form = vectors.ndim == 1 and len(vectors) == size, f"[{size}], the numbers of its parts, with each size"
    elif parts:
        sound, form = vectors.ndim == 2 and vectors.numel() == size, "[P + N, H], the rows of its parts, with each size"
    elif soft_prompt.parametrisation == "prefix":
        sound, form = vectors.ndim == 5 and vectors.shape[2] == 2, "[P, L, 2, H_kv, D] with P, L, H_kv and D"
    else:
        sound, form = vectors.ndim == 2, "[P, H] with P and H"
    if not sound or vectors.numel() == 0 or str(vectors.dtype) != "torch.float32":
        raise ArtifactError(
            f"The soft prompt '{name}' should be float32 {form} of at least 1, but is "
            f"{str(vectors.dtype).removeprefix('torch.')} {list(vectors.shape)}; convert it before saving."
        )
    numbers: NDArray[np.float32] = vectors.numpy()
    if not np.isfinite(numbers).all():
        raise ArtifactError(
            f"The soft prompt '{name}' should hold finite numbers, but {int((~np.isfinite(numbers)).sum())} of its "
            f"{numbers.size} are not; tune it again with a lower learning rate."
        )
    verbalizer = soft_prompt.verbalizer
    fields = {key: getattr(soft_prompt, key) for key in (*_TEXTS, *_MAPPINGS, "metrics")}
    fields |= sizes_of(soft_prompt, vectors.shape) | {
        "schema_version": SCHEMA_VERSION if parts else 2 if soft_prompt.word_end else 1,
        "verbalizer": None if verbalizer is None else list(verbalizer.items()),
    }
    if parts:
        fields |= {_PARTS: [[name, list(shape)] for name, shape in parts.items()], _WORD_END: soft_prompt.word_end}
    if soft_prompt.base_settings:
        fields[_SETTINGS] = soft_prompt.base_settings
    if soft_prompt.quantized:
        fields[_QUANTIZED] = soft_prompt.quantized
    try:
        document = json.loads(_canonical(fields))
        fault = _fault(document)
    except TypeError as error:
        fault = str(error)
    except (ValueError, RecursionError):
        fault = "a value that is not finite, too long or circular"
    if fault:
        raise ArtifactError(f"The soft prompt '{name}' has a field without a JSON form ({fault}); change that field.")
    text = _canonical(document | {"digest": _digest(document, numbers)})
    shapes = _shapes(document)
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    named = zip(shapes.items(), np.split(numbers.reshape(-1), ends[:-1]), strict=True)
    tensors = {name: np.ascontiguousarray(part.reshape(shape)) for (name, shape), part in named}
    content: bytes = safetensors_bytes(tensors, metadata={_DOCUMENT: text})
    if int.from_bytes(content[:8], "little") > MAX_HEADER_BYTES:
        raise ArtifactError(
            f"The soft prompt '{name}' should have at most {MAX_HEADER_BYTES:,} bytes of metadata, but has "
            f"{len(text):,}; shorten its template, verbalizer or training record."
        )
    return content


def _canonical(document: Mapping[str, Any]) -> str:
    return json.dumps(
        document,
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
        default=lambda value: dict(value) if isinstance(value, Mapping) else _no_json(value),
    )


def _no_json(value: object) -> NoReturn:
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _digest(document: Mapping[str, Any], numbers: NDArray[np.float32]) -> str:
    little_endian = numbers.astype("<f4", copy=False)
    return hashlib.sha256(_canonical(document).encode("ascii") + little_endian.tobytes()).hexdigest()


def _read_document(path: Path, text: str | None) -> tuple[dict[str, Any], object]:
    """The header's document without its digest, of the right types; and the digest."""
    if text is None:
        raise ArtifactError(
            f"{path} is a safetensors file, but its header has no entry '{_DOCUMENT}', which softprompt writes; take "
            f"in soft prompts of other tools with `softprompt import`."
        )
    try:
        document = json.loads(text)
        _canonical(document)
    except (ValueError, RecursionError) as error:
        _refuse(path, "a JSON document in the header", f"'{error}'")
    version = document.get("schema_version") if isinstance(document, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {version}, but this release of softprompt reads up to {SCHEMA_VERSION}; "
            f"update softprompt."
        )
    if type(version) is not int or version < 1:
        _refuse(path, f"a schema version from 1 to {SCHEMA_VERSION}", repr(version))
    digest = document.pop("digest", None)
    if fault := _fault(document):
        _refuse(path, "a complete document in the header", fault)
    return document, digest


def _fault(document: Mapping[str, Any]) -> str | None:
    """What is wrong with the types of a parsed document; None for a sound one."""
    for key in _TEXTS:
        if not isinstance(document.get(key), str):
            return f"no text under '{key}'"
    for key in _MAPPINGS:
        if not isinstance(document.get(key), dict):
            return f"no mapping under '{key}'"
    if not isinstance(document.get(_SETTINGS, {}), dict):
        return f"no mapping under '{_SETTINGS}'"
    if not isinstance(document.get(_QUANTIZED, ""), str):
        return f"no text under '{_QUANTIZED}'"
    if not all(isinstance(value, str) for value in document["versions"].values()):
        return "a version that is no text"
    metrics = document.get("metrics")
    if not isinstance(metrics, list) or not all(isinstance(metric, dict) for metric in metrics):
        return "no list of mappings under 'metrics'"
    verbalizer = document.get("verbalizer")
    if verbalizer is not None and not (isinstance(verbalizer, list) and all(map(_is_label_with_words, verbalizer))):
        return "no pairs of a label and its words under 'verbalizer'"
    if _has_parts(document):
        return _fault_of_parts(document)
    for key in size_names(document["parametrisation"]):
        if type(document.get(key)) is not int or document[key] < 1:
            return f"no positive number under '{key}'"
    return None


def _fault_of_parts(document: Mapping[str, Any]) -> str | None:
    """What is wrong with what only the document of several tensors has."""
    parts, is_state = document.get(_PARTS), document["parametrisation"] == "prefix"
    if type(document.get(_WORD_END)) is not bool:
        return f"no boolean under '{_WORD_END}'"
    if not (isinstance(parts, list) and parts and all(map(_is_part, parts))) or len(dict(parts)) < len(parts):
        return f"no pairs of a tensor's name and its shape under '{_PARTS}'"
    names = [name for name, _ in parts]
    if names != [MAIN, AHEAD] if not is_state else any(_PART.fullmatch(name) is None for name in names):
        return f"other tensors under '{_PARTS}' than its parametrisation has"
    lengths = {shape[0] for name, shape in parts if name.endswith((".keys", ".values")) or name == MAIN}
    if type(document.get("num_virtual_tokens")) is not int or {document["num_virtual_tokens"]} != (lengths or {0}):
        return "another 'num_virtual_tokens' than its tensors have"
    if not is_state and [shape[1:] for _, shape in parts] != [[document.get("hidden_size")]] * 2:
        return "another 'hidden_size' than its tensors have"
    return None


def _is_part(pair: object) -> bool:
    match pair:
        case [str(), [*shape]]:
            return bool(shape) and all(type(size) is int and size > 0 for size in shape)
    return False


def _is_label_with_words(pair: object) -> bool:
    match pair:
        case [str(), [*words]]:
            return all(isinstance(word, str) for word in words)
    return False


def _fields(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``Metadata`` that a sound document holds."""
    verbalizer = document["verbalizer"]
    return {
        "verbalizer": None if verbalizer is None else {label: tuple(words) for label, words in verbalizer},
        "word_end": document[_WORD_END] if _has_parts(document) else document["schema_version"] > 1,
        "parts": {name: tuple(shape) for name, shape in document[_PARTS]} if _has_parts(document) else {},
        "metrics": tuple(document["metrics"]),
        "base_settings": document.get(_SETTINGS, {}),
        "quantized": document.get(_QUANTIZED, ""),
        **{key: document[key] for key in (*_TEXTS, *_MAPPINGS)},
    }


def _refuse(path: Path, expected: str, found: str) -> NoReturn:
    raise ArtifactError(
        f"{path} is not a sound soft prompt: expected {expected}, found {found}; "
        f"restore it from a copy, or tune it again."
    ) from None
