"""The page against Python's own HTML parser: what goes in as text comes out as text, and nothing is loaded."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from softprompt.drawing.page import Page

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn"]))
"""Text that HTML can hold. Control characters, surrogates and non-characters have a test of their own."""


class Reader(HTMLParser):
    """The text inside each kind of element, and all tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: dict[str, list[str]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data


@given(TEXT, TEXT, TEXT, TEXT, st.lists(st.tuples(TEXT, TEXT), max_size=3))
def test_text_comes_out_as_it_went_in(title: str, lead: str, more: str, code: str, rows: list[tuple[str, str]]) -> None:
    page = Page(title, lead)
    page.heading(more)
    page.paragraph(more)
    page.code(code)
    page.table(["name", ">" + more], rows)
    read = Reader(page.html())
    assert read.texts["title"] == read.texts["h1"] == [title]
    assert read.texts["p"] == [lead, more]
    assert read.texts["h2"] == [more]
    assert read.texts["pre"] == ["\n" + code]  # the line end right behind <pre> is no part of the text
    assert read.texts["th"] == ["name", more]
    assert read.texts.get("td", []) == [text for row in rows for text in row]
    assert {tag for tag, _ in read.tags} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre",
        "div", "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip


@pytest.mark.parametrize("bad", ["\x00", "\x08", "\x1b", "\x7f", "\x9f", "\ud800", "\ufffe"])
def test_characters_that_html_does_not_allow_are_replaced(bad: str, tmp_path: Path) -> None:
    page = Page("title", f"before{bad}after")
    page.save(tmp_path / "page.html")
    assert "before\ufffdafter" in (tmp_path / "page.html").read_text("utf-8")


def test_numbers_stand_at_the_right_and_strong_rows_out() -> None:
    page = Page("title", "lead")
    page.table(["name", ">value"], [["a", "1"], ["b", "2"]], strong=[1])
    tags = Reader(page.html()).tags
    assert [attributes for tag, attributes in tags if tag == "td"] == [{}, {"class": "n"}, {}, {"class": "n"}]
    assert [attributes for tag, attributes in tags if tag == "tr"] == [{}, {}, {"class": "ours"}]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError):
        Page("title", "lead").table(["name", "value"], [["a"]])


def test_a_figure_is_inside_the_page() -> None:
    def page() -> str:
        made = Page("title", "lead")
        figure = Figure()
        figure.add_subplot().plot([1, 2], [3, 4])
        made.figure(figure, "a <caption>", 'what "it" shows')
        return made.html()

    read = Reader(page())
    (image,) = (attributes for tag, attributes in read.tags if tag == "img")
    assert image["alt"] == 'what "it" shows'
    assert read.texts["figcaption"] == ["a <caption>"]
    kind, data = str(image["src"]).split(",")
    svg = base64.b64decode(data).decode()
    assert kind == "data:image/svg+xml;base64"
    assert svg.rstrip().endswith("</svg>")
    assert not re.search(r"<script|<image|href=\"(?!#)|url\((?!#)", svg)
    assert page() == page()


def test_saving_leaves_the_old_page_whole_if_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "page.html"
    Page("first", "lead").save(path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        Page("second", "lead").save(path)
    assert Reader(path.read_text("utf-8")).texts["title"] == ["first"]
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
