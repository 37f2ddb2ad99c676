"""One self-contained HTML page: headings, text, tables and pictures, nothing from outside, no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt.drawing import style
from softprompt.files import atomic_writer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --accent: #2a6fdb; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
p, figcaption { max-width: 48rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.lead { font-size: 1.15rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th, td.n, td:first-child { white-space: nowrap; } th.n, td.n { text-align: right; }
thead th { border-bottom-width: 2px; } tbody tr:hover { background: var(--soft); }
tr.ours td { font-weight: 600; background: var(--soft); }
figure { margin: 1.5rem 0; } figure img { width: 62rem; max-width: 100%; background: #fff; border-radius: 6px; }
figcaption { opacity: .8; } pre { background: var(--soft); padding: .8rem; overflow-x: auto; }
"""
_NOT_IN_HTML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Page:
    """A page in the making; all text is escaped."""

    def __init__(self, title: str, lead: str) -> None:
        self._title = title
        self._body = [f"<h1>{_text(title)}</h1>", f'<p class="lead">{_text(lead)}</p>']

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._body.append(f"<h2>{_text(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """A paragraph of plain text."""
        self._body.append(f"<p>{_text(text)}</p>")

    def code(self, text: str) -> None:
        """Text as it is, in a fixed-width face."""
        # a parser drops the line end behind <pre>
        self._body.append(f"<pre>\n{_text(text)}</pre>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, strong: Sequence[int] = ()) -> None:
        """A table; a column's name with ``>`` in front is aligned to the right; rows in ``strong`` stand out."""
        right = [column.startswith(">") for column in columns]

        def cells(tag: str, values: Sequence[str]) -> str:
            marks = (' class="n"' if is_right else "" for is_right in right)
            return "".join(f"<{tag}{mark}>{_text(value)}</{tag}>" for mark, value in zip(marks, values, strict=True))

        head = cells("th", [column.removeprefix(">") for column in columns])
        body = "".join(
            f"<tr{' class=ours' if i in strong else ''}>{cells('td', row)}</tr>" for i, row in enumerate(rows)
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        self._body.append(f'<div class="scroll">{table}</div>')

    def figure(self, figure: Figure, caption: str, alt: str) -> None:
        """A picture with a caption, and ``alt``: what it shows, for who cannot see it."""
        data = base64.b64encode(style.svg(figure)).decode()
        image = f'<img src="data:image/svg+xml;base64,{data}" alt="{_text(alt)}">'
        self._body.append(f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>")

    def html(self) -> str:
        """The whole page."""
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_text(self._title)}</title><style>{_STYLE}</style>"
        )
        return (
            f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
            + "\n".join(self._body)
            + "\n</body></html>\n"
        )

    def save(self, path: Path) -> None:
        """Writes the page atomically.

        Raises:
            OSError: the folder cannot be written.
        """
        with atomic_writer(path) as file:
            file.write(self.html().encode())


def _text(text: str) -> str:
    """The text as HTML: nothing in it is markup, and a character that HTML does not allow becomes U+FFFD."""
    return escape(_NOT_IN_HTML.sub("\ufffd", text))
