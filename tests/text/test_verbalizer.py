"""Labels and the words that stand for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softprompt.errors import TemplateError
from softprompt.text.encoder import Encoder
from softprompt.text.template import Template
from softprompt.text.verbalizer import Verbalizer
from tests.text.test_template import BPE, SPM, bare, encoded, failure


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("positive,negative", {"positive": ("positive",), "negative": ("negative",)}),
        (" a , b c ", {"a": ("a",), "b c": ("b c",)}),
        ("good=positive|great,bad=negative | awful", {"good": ("positive", "great"), "bad": ("negative", "awful")}),
        ("b,a=x=y", {"b": ("b",), "a": ("x=y",)}),
    ],
)
def test_a_verbalizer_from_text(text: str, words: dict[str, tuple[str, ...]]) -> None:
    verbalizer = Verbalizer.parse(text)
    assert dict(verbalizer.words) == words
    assert verbalizer.labels == tuple(words)
    assert Verbalizer(words) == verbalizer


def test_a_verbalizer_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.JSON"
    path.write_text(json.dumps({"b, or =": "ä|b", "a": ["x", " y"]}), encoding="utf-8-sig")
    assert dict(Verbalizer.parse(str(path)).words) == {"b, or =": ("ä|b",), "a": ("x", " y")}
    assert Verbalizer.from_labels(["b", "a"]).words == {"b": ("b",), "a": ("a",)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a", "Expected at least 2 labels in the verbalizer, found a; give all labels."),
        (
            "a,b,",
            "Expected each label of the verbalizer with words that are not blank, found '' with ['']; "
            "give each label at least one word.",
        ),
        (
            "a,b=",
            "Expected each label of the verbalizer with words that are not blank, found 'b' with ['']; "
            "give each label at least one word.",
        ),
        ("a=x,a=y", "Expected each label of the verbalizer once, found 'a' twice; join its words with |."),
        (
            "a=x|y,b=z|y",
            "Expected words in the verbalizer that differ, found 'y' for 'a' and again for 'b'; remove one.",
        ),
    ],
)
def test_what_is_no_verbalizer_is_refused(text: str, sentence: str) -> None:
    assert failure(Verbalizer.parse, text) == sentence


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"{", "an error (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); correct it."),
        (b'"a, b"', 'no object; write one such as {"good": ["great"], "bad": "awful"}.'),
        (b'{"a": "x", "b": 1}', "something else for 'b'; give a string or a list of strings."),
        (b'{"a": "x", "b": ["y", null]}', "something else for 'b'; give a string or a list of strings."),
        (None, "No such file or directory; check the path."),
    ],
)
def test_a_file_that_is_no_verbalizer_is_refused(tmp_path: Path, content: bytes | None, found: str) -> None:
    path = tmp_path / "labels.json"
    if content is not None:
        path.write_bytes(content)
    prefix = f"Expected a JSON object of labels and their words in {path}, found"
    assert failure(Verbalizer.parse, str(path)) == f"{prefix}{':' if content is None else ''} {found}"


def test_a_label_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text('{"a": "x", "a": "y"}')
    assert failure(Verbalizer.parse, str(path)) == (
        "Expected each label of the verbalizer once, found 'a' twice; join its words with |."
    )


def test_words_become_the_tokens_of_targets() -> None:
    verbalizer = Verbalizer.parse("good=positive|good,bad=negative|awful !")
    for text, space in [("{input} : {target}", " "), ("{input}\n{target}", "")]:
        ids = verbalizer.token_ids(Encoder(Template(text), BPE))
        assert ids == (
            (bare(BPE, f"{space}positive"), bare(BPE, f"{space}good")),
            (bare(BPE, f"{space}negative"), bare(BPE, f"{space}awful !")),
        )
        assert encoded(text, BPE, "positive", input="a").target_ids == ids[0][0]
    assert verbalizer.token_ids(Encoder(Template("{input} : {target}"), SPM)) == (
        (bare(SPM, "positive"), bare(SPM, "good")),
        (bare(SPM, "negative"), bare(SPM, "awful !")),
    )


def test_words_that_a_tokenizer_cannot_tell_apart_are_refused() -> None:
    verbalizer = Verbalizer({"a": ("good",), "b": (" good",)})
    assert len(verbalizer.token_ids(Encoder(Template("{input}:{target}"), BPE))) == 2
    assert failure(verbalizer.token_ids, Encoder(Template("{input}: {target}"), SPM)) == (
        "Expected words in the verbalizer that the base model's tokenizer tells apart, found the same tokens for "
        "'good' and ' good'; choose another word for one of them."
    )
    prefix = Verbalizer.from_labels(["good", "good film"]).token_ids(Encoder(Template("{input}: {target}"), BPE))
    assert prefix[1][0][: len(prefix[0][0])] == prefix[0][0]  # allowed
    unknown = Verbalizer({"a": ("☃",), "b": ("☂",)})
    assert failure(unknown.token_ids, Encoder(Template("{input}: {target}"), SPM)) == (
        "Expected words in the verbalizer that the base model's tokenizer tells apart, found the same tokens for "
        "'☃' and '☂'; choose another word for one of them."
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_labels_come_with_any_byte_order_mark_and_line_end(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "labels.json"
    path.write_bytes('{\r\n "schön": "gut",\r "schlecht": ["übel"]}'.encode(encoding))
    assert Verbalizer.parse(str(path)).words == {"schön": ("gut",), "schlecht": ("übel",)}
    assert Verbalizer.parse("\ufeffgood,bad\r\n").labels == ("good", "bad")


def test_labels_that_are_half_a_letter_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(r'{"good": ["\ud83d"], "bad": "x"}')
    with pytest.raises(TemplateError, match="found other bytes in 'good'"):
        Verbalizer.parse(str(path))
