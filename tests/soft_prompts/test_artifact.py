"""The file on disk: read back by hand, damaged in every way, and written where writing fails."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import pickle
import struct
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes

from softprompt.errors import ArtifactError, StoreError
from softprompt.files import atomic_writer
from softprompt.soft_prompts.artifact import MAX_HEADER_BYTES
from softprompt.soft_prompts.soft_prompt import SoftPrompt, check_base, load, save
from tests.soft_prompts.made import BASE, make, make_prefix, sentence

SENTENCE_END = "restore it from a copy, or tune it again."


def fields_of(soft_prompt: SoftPrompt) -> dict[str, Any]:
    """Everything but the vectors; the verbalizer with the order of its labels."""
    fields = {field.name: getattr(soft_prompt, field.name) for field in dataclasses.fields(soft_prompt)}
    del fields["vectors"]
    if soft_prompt.verbalizer is not None:
        fields["verbalizer"] = list(soft_prompt.verbalizer.items())
    return fields


def equal(a: SoftPrompt, b: SoftPrompt) -> bool:
    return a.vectors.equal(b.vectors) and fields_of(a) == fields_of(b)


def document_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    document: dict[str, Any] = json.loads(header["__metadata__"]["softprompt"])
    return document


def write_document(path: Path, document: object, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """A file with a header of our choice."""
    text = document if isinstance(document, str) else json.dumps(document)
    path.write_bytes(safetensors_bytes(tensors or {"soft_prompt": make().vectors}, metadata={"softprompt": text}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "sst2.safetensors"


# --- what is saved comes back ---------------------------------------------------------------------------------------


def test_round_trip(path: Path) -> None:
    original = make()
    save(original, path)
    loaded = load(path)
    assert equal(loaded, original)
    assert loaded.vectors.dtype == torch.float32
    assert loaded.metrics == original.metrics
    assert not (path.stat().st_mode & 0o111)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_file_is_what_the_docstring_says(path: Path) -> None:
    """Read with struct, json and numpy alone."""
    original = make()
    save(original, path)
    content = path.read_bytes()
    header_bytes = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + header_bytes])
    assert sorted(header) == ["__metadata__", "soft_prompt"]
    assert header["soft_prompt"] == {"dtype": "F32", "shape": [3, 8], "data_offsets": [0, 96]}
    raw = content[8 + header_bytes :]
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4").reshape(3, 8), original.vectors.numpy())
    document = json.loads(header["__metadata__"]["softprompt"])
    assert (document["schema_version"], document["num_virtual_tokens"], document["hidden_size"]) == (1, 3, 8)
    assert document["verbalizer"] == [["positive", ["great", "good"]], ["negative", ["terrible"]]]
    digest = document.pop("digest")
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    assert digest == hashlib.sha256(canonical + raw).hexdigest()


def test_a_kv_prefix_round_trip(path: Path) -> None:
    original = make_prefix()
    save(original, path)
    loaded = load(path)
    assert equal(loaded, original)
    assert loaded.num_virtual_tokens == 3
    assert loaded.sizes == {"num_virtual_tokens": 3, "num_layers": 4, "num_kv_heads": 1, "head_dim": 5}
    document = document_of(path)
    assert document["schema_version"] == 1
    assert {key: document.get(key) for key in loaded.sizes} == loaded.sizes
    assert "hidden_size" not in document
    raw = path.read_bytes()[-3 * 4 * 2 * 5 * 4 :]
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4").reshape(3, 4, 2, 1, 5), original.vectors.numpy())


def test_files_of_release_0_1_0_are_read_and_written_bit_for_bit(path: Path) -> None:
    """Its digest of this soft prompt, which covers every bit of document and numbers."""
    original = make(torch.arange(24, dtype=torch.float32).reshape(3, 8) / 7, training={"steps": 400})
    save(original, path)
    assert document_of(path)["digest"] == "513c96c01d91504d887f1f5d20e7b8eb067e7ae257433bda07189830ff14106d"
    assert equal(load(path), original)


def test_equal_soft_prompts_give_equal_files(tmp_path: Path) -> None:
    original = make()
    reordered = make(
        training=dict(reversed(list(original.training.items()))), vectors=original.vectors.t().contiguous().t()
    )
    save(original, tmp_path / "a")
    save(reordered, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_parameter_can_be_saved_and_stays_one(path: Path) -> None:
    vectors = torch.nn.Parameter(torch.ones(2, 4))
    save(make(vectors), path)
    assert vectors.requires_grad
    assert not load(path).vectors.requires_grad


def test_twenty_virtual_tokens_of_width_576_stay_under_60_kb(path: Path) -> None:
    """46,080 bytes of numbers; the rest is the header, here with 100 metrics."""
    save(make(torch.randn(20, 576), metrics=make().metrics * 100), path)
    assert path.stat().st_size <= 60_000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)

mappings = st.dictionaries(st.text(max_size=8), json_values, max_size=4)

finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def soft_prompts(draw: st.DrawFn) -> SoftPrompt:
    p, h = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    numbers = draw(st.lists(finite32, min_size=p * h, max_size=p * h))
    words = st.lists(st.text(max_size=5), max_size=3).map(tuple)
    return make(
        torch.tensor(numbers, dtype=torch.float32).reshape(p, h),
        name=draw(st.text(max_size=20)),
        template=draw(st.text()),
        verbalizer=draw(st.none() | st.dictionaries(st.text(max_size=8), words, max_size=4)),
        training=draw(mappings),
        data=draw(mappings),
        metrics=tuple(draw(st.lists(mappings, max_size=3))),
        versions=draw(st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)),
    )


@given(soft_prompt=soft_prompts())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_soft_prompt_survives(tmp_path: Path, soft_prompt: SoftPrompt) -> None:
    save(soft_prompt, tmp_path / "x")
    assert equal(load(tmp_path / "x"), soft_prompt)


# --- damage is noticed ----------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_changed_byte_goes_unnoticed(tmp_path: Path, data: st.DataObject) -> None:
    original = make()
    save(original, tmp_path / "x")
    content = bytearray((tmp_path / "x").read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(content)
    try:
        loaded = load(tmp_path / "x")
    except ArtifactError:
        return
    assert equal(loaded, original)


def test_a_flipped_bit_in_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save(make(), path)
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(ArtifactError):
            load(path)


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_or_lengthened_file_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    save(make(), tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content += data.draw(st.binary(min_size=1, max_size=40))
    (tmp_path / "x").write_bytes(content)
    assert SENTENCE_END in sentence(tmp_path / "x")


@given(content=st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert SENTENCE_END in sentence(tmp_path / "x")


def test_every_bit_of_the_numbers_counts(path: Path) -> None:
    """The lowest bit of the last number: still finite, and found by the digest alone."""
    save(make(), path)
    digest = document_of(path)["digest"]
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    document = document_of(path)
    del document["digest"]
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    actual = hashlib.sha256(canonical + content[-96:]).hexdigest()
    assert sentence(path) == (
        f"{path} is not a sound soft prompt: expected content of the digest {digest}, found {actual}; {SENTENCE_END}"
    )


def test_an_edited_document_is_refused(path: Path) -> None:
    save(make(), path)
    path.write_bytes(path.read_bytes().replace(b"smollm2-135m", b"smollm2-360m"))
    assert "expected content of the digest" in sentence(path)


def test_missing_file(path: Path) -> None:
    assert sentence(path) == (
        f"There is no soft prompt at {path}; check the path, or see the stored ones with `softprompt list`."
    )


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert sentence(tmp_path).startswith(f"{tmp_path} is a folder, but a soft prompt is one .safetensors file")


def test_unreadable_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(make(), path)

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert sentence(path) == (
        f"The soft prompt {path} cannot be read: Permission denied; check the file and its permissions."
    )


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"")
    text = sentence(path)
    assert text.startswith(f"{path} is not a sound soft prompt: expected a whole safetensors file, found '")
    assert text.endswith(f"'; {SENTENCE_END}")


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.write_text, (tmp_path / "exploded", "!"))

    for content in (pickle.dumps(Bomb()), b"\x80\x02" + b"\x00" * 6 + pickle.dumps(Bomb())):
        (tmp_path / "x").write_bytes(content)
        assert SENTENCE_END in sentence(tmp_path / "x")
    torch.save({"soft_prompt": torch.ones(2, 2)}, tmp_path / "x")
    assert SENTENCE_END in sentence(tmp_path / "x")
    assert not (tmp_path / "exploded").exists()


def test_another_tools_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(safetensors_bytes({"prompt_embeddings": torch.ones(2, 2)}, metadata={"format": "pt"}))
    for metadata in ({"format": "pt"}, None):
        path.write_bytes(safetensors_bytes({"prompt_embeddings": torch.ones(2, 2)}, metadata=metadata))
        said = sentence(path)
        assert said.startswith(f"{path} is a safetensors file, but its header has no entry 'softprompt'")
        assert "softprompt import" in said
    said = sentence(tmp_path)
    assert said.startswith(f"{tmp_path} is a folder, ")
    assert "softprompt import" in said


def test_a_newer_schema(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_document(path, {"schema_version": 4, "whatever": "comes"})
    assert sentence(path) == (
        f"{path} has schema version 4, but this release of softprompt reads up to 3; update softprompt."
    )


@pytest.mark.parametrize("version", [0, -1, "1", None, True, 1.5, [1]])
def test_a_schema_version_that_never_was(tmp_path: Path, version: object) -> None:
    path = tmp_path / "x"
    write_document(path, {"schema_version": version})
    assert f"a schema version from 1 to 3, found {version!r}; " in sentence(path)


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        *[(key, 7, f"no text under '{key}'") for key in ("name", "base", "template", "parametrisation", "created")],
        *[(key, [], f"no mapping under '{key}'") for key in ("training", "data", "versions")],
        ("base_fingerprint", None, "no text under 'base_fingerprint'"),
        ("tokenizer_fingerprint", ..., "no text under 'tokenizer_fingerprint'"),
        ("versions", {"torch": 2}, "a version that is no text"),
        ("metrics", {}, "no list of mappings under 'metrics'"),
        ("metrics", [1], "no list of mappings under 'metrics'"),
        ("verbalizer", {"positive": ["great"]}, "no pairs of a label and its words under 'verbalizer'"),
        ("verbalizer", [["positive", "great"]], "no pairs of a label and its words under 'verbalizer'"),
        ("verbalizer", [["positive", [1]]], "no pairs of a label and its words under 'verbalizer'"),
        ("verbalizer", [[1, ["great"]]], "no pairs of a label and its words under 'verbalizer'"),
        ("num_virtual_tokens", 0, "no positive number under 'num_virtual_tokens'"),
        ("num_virtual_tokens", True, "no positive number under 'num_virtual_tokens'"),
        ("hidden_size", 8.0, "no positive number under 'hidden_size'"),
    ],
)
def test_a_document_of_wrong_types(path: Path, key: str, value: object, found: str) -> None:
    save(make(), path)
    document = document_of(path)
    if value is ...:
        del document[key]
    else:
        document[key] = value
    write_document(path, document)
    assert sentence(path) == (
        f"{path} is not a sound soft prompt: expected a complete document in the header, found {found}; {SENTENCE_END}"
    )


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"schema_version": 1, "name": NaN}', '{"a": ' + "9" * 5000 + "}", "1e999"],
    ids=["empty", "cut", "deep", "nan", "long number", "infinite"],
)
def test_a_document_that_is_not_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    write_document(path, text)
    assert sentence(path).startswith(
        f"{path} is not a sound soft prompt: expected a JSON document in the header, found '"
    )


@pytest.mark.parametrize("text", ["[]", '"x"', "null", "__import__('os').abort()"])
def test_a_document_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    write_document(path, text)
    assert SENTENCE_END in sentence(path)


@pytest.mark.parametrize(
    ("tensors", "expected", "found"),
    [
        ({"prompt": torch.ones(3, 8)}, "the one tensor 'soft_prompt'", "the tensors ['prompt']"),
        (
            {"soft_prompt": torch.ones(3, 8), "more": torch.ones(1)},
            "the one tensor 'soft_prompt'",
            "the tensors ['more', 'soft_prompt']",
        ),
        ({"soft_prompt": torch.ones(8, 3)}, "the tensor 'soft_prompt' as F32 [3, 8]", "F32 [8, 3]"),
        ({"soft_prompt": torch.ones(24)}, "the tensor 'soft_prompt' as F32 [3, 8]", "F32 [24]"),
        (
            {"soft_prompt": torch.ones(3, 8, dtype=torch.bfloat16)},
            "the tensor 'soft_prompt' as F32 [3, 8]",
            "BF16 [3, 8]",
        ),
        ({"soft_prompt": torch.tensor([[0.0] * 7 + [float("nan")]] * 3)}, "finite numbers", "3 that are not"),
        ({"soft_prompt": torch.full((3, 8), float("inf"))}, "finite numbers", "24 that are not"),
    ],
)
def test_a_tensor_that_is_not_the_one_described(
    path: Path, tensors: dict[str, torch.Tensor], expected: str, found: str
) -> None:
    save(make(), path)
    write_document(path, document_of(path), tensors)
    assert sentence(path) == (f"{path} is not a sound soft prompt: expected {expected}, found {found}; {SENTENCE_END}")


@pytest.mark.parametrize(
    ("changes", "expected", "found"),
    [
        ({}, "the tensor 'soft_prompt' as F32 [3, 4, 2, 1, 5]", "F32 [3, 4, 2, 5, 1]"),
        ({"num_layers": 5}, "the tensor 'soft_prompt' as F32 [3, 5, 2, 1, 5]", "F32 [3, 4, 2, 5, 1]"),
        ({"num_kv_heads": 0}, "a complete document in the header", "no positive number under 'num_kv_heads'"),
        ({"head_dim": None}, "a complete document in the header", "no positive number under 'head_dim'"),
        ({"parametrisation": "plain"}, "a complete document in the header", "no positive number under 'hidden_size'"),
        (
            {"parametrisation": "plain", "hidden_size": 8},
            "the tensor 'soft_prompt' as F32 [3, 8]",
            "F32 [3, 4, 2, 5, 1]",
        ),
    ],
)
def test_a_kv_prefix_that_is_not_the_one_described(
    path: Path, changes: dict[str, Any], expected: str, found: str
) -> None:
    save(make_prefix(), path)
    write_document(path, document_of(path) | changes, {"soft_prompt": torch.ones(3, 4, 2, 5, 1)})
    assert sentence(path) == (f"{path} is not a sound soft prompt: expected {expected}, found {found}; {SENTENCE_END}")


def test_a_header_beyond_the_cap_is_not_parsed(path: Path) -> None:
    save(make(), path)
    document = document_of(path) | {"padding": "x" * MAX_HEADER_BYTES}
    write_document(path, document)
    header_bytes = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert sentence(path) == (
        f"{path} is not a sound soft prompt: expected a safetensors header of at most 4,194,304 bytes, "
        f"found {header_bytes:,}; {SENTENCE_END}"
    )


# --- what cannot be saved -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vectors": torch.ones(3, 8, dtype=torch.float16)},
            "The soft prompt 'sst2' should be float32 [P, H] with P and H of at least 1, but is float16 [3, 8]; "
            "convert it before saving.",
        ),
        (
            {"vectors": torch.ones(0, 8)},
            "The soft prompt 'sst2' should be float32 [P, H] with P and H of at least 1, but is float32 [0, 8]; "
            "convert it before saving.",
        ),
        *[
            (
                {"vectors": torch.ones(shape), "parametrisation": "prefix"},
                "The soft prompt 'sst2' should be float32 [P, L, 2, H_kv, D] with P, L, H_kv and D of at least 1, "
                f"but is float32 {shape}; convert it before saving.",
            )
            for shape in ([3, 8], [3, 4, 3, 1, 5], [3, 4, 2, 0, 5])
        ],
        (
            {"vectors": torch.ones(3, 4, 2, 1, 5)},
            "The soft prompt 'sst2' should be float32 [P, H] with P and H of at least 1, but is float32 "
            "[3, 4, 2, 1, 5]; convert it before saving.",
        ),
        (
            {"vectors": torch.full((1, 1, 2, 1, 1), float("nan")), "parametrisation": "prefix"},
            "The soft prompt 'sst2' should hold finite numbers, but 2 of its 2 are not; "
            "tune it again with a lower learning rate.",
        ),
        (
            {"vectors": torch.tensor([[1.0, float("nan"), float("-inf")]])},
            "The soft prompt 'sst2' should hold finite numbers, but 2 of its 3 are not; "
            "tune it again with a lower learning rate.",
        ),
        (
            {"training": {"folder": Path("x")}},
            f"The soft prompt 'sst2' has a field without a JSON form ({type(Path()).__name__} is not a JSON value); "
            "change that field.",
        ),
        (
            {"training": {"loss": float("nan")}},
            "The soft prompt 'sst2' has a field without a JSON form "
            "(a value that is not finite, too long or circular); change that field.",
        ),
        (
            {"versions": {"torch": None}},
            "The soft prompt 'sst2' has a field without a JSON form (a version that is no text); change that field.",
        ),
    ],
)
def test_a_soft_prompt_that_cannot_be_saved(path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        save(make(**changes), path)
    assert str(caught.value) == message
    assert not path.exists()


def test_more_metadata_than_could_be_loaded_is_not_saved(path: Path) -> None:
    save(make(template=""), path)
    size = len(json.dumps(document_of(path), separators=(",", ":"))) + MAX_HEADER_BYTES
    with pytest.raises(ArtifactError) as caught:
        save(make(template="x" * MAX_HEADER_BYTES), path)
    assert str(caught.value) == (
        f"The soft prompt 'sst2' should have at most 4,194,304 bytes of metadata, but has {size:,}; "
        f"shorten its template, verbalizer or training record."
    )
    assert load(path).template == ""


class FullDisk:
    """A file on a disk with room for ``room`` more bytes."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> int:
        self.file.write(content[: self.room])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("when", ["write", "fsync"])
def test_a_full_disk_leaves_the_earlier_file_alone(path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    earlier = make()
    save(earlier, path)
    before = path.read_bytes()
    really_open = Path.open

    def open_full(self: Path, mode: str = "r") -> Any:
        return FullDisk(really_open(self, mode), 100) if "x" in mode else really_open(self, mode)

    def full_fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if when == "write":
            patch.setattr(Path, "open", open_full)
        else:
            patch.setattr("os.fsync", full_fsync)
        with pytest.raises(StoreError) as caught:
            save(make(torch.zeros(3, 8)), path)
    # Only the vectors differ, so both files have one size.
    assert str(caught.value) == (
        f"The soft prompt 'sst2' cannot be written to {path}: No space left on device; "
        f"free {len(before):,} bytes there, or choose another folder."
    )
    assert path.read_bytes() == before
    assert equal(load(path), earlier)
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    path = tmp_path / "file" / "sst2.safetensors"
    with pytest.raises(StoreError) as caught:
        save(make(), path)
    assert str(caught.value) == (
        f"The soft prompt 'sst2' cannot be written to {path}: File exists; "
        f"make the folder writable, or choose another folder."
    )


def test_atomic_writer_keeps_the_old_content_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with suppress(KeyboardInterrupt), atomic_writer(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert [(entry, entry.read_bytes()) for entry in tmp_path.iterdir()] == [(path, b"old")]


def test_settings_go_through_the_file_and_compare_equal(path: Path) -> None:
    settings = {"rms_norm_eps": 1e-05, "scale": 0.1 + 0.2, "layer_types": ["full", "sliding"], "sliding_window": None}
    save(make(base_settings=settings), path)
    loaded = load(path)
    assert loaded.base_settings == settings
    check_base(loaded, **{**BASE, "base_settings": settings})


def test_a_file_without_settings_is_as_before_there_were_any(path: Path) -> None:
    save(make(), path)
    assert "base_settings" not in document_of(path)
    check_base(load(path), **BASE)


def test_settings_that_are_no_mapping(path: Path) -> None:
    save(make(), path)
    write_document(path, document_of(path) | {"base_settings": [1]})
    assert "no mapping under 'base_settings'" in sentence(path)
