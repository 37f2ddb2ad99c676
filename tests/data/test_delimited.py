"""CSV and TSV: delimiters, unnamed columns, and quotation marks that are quoting in one file and text in another."""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt.data.reading import read_dataset
from softprompt.errors import SoftPromptWarning
from tests.reading import failure, read_pairs, write

PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r")).filter(lambda text: text.strip())
MARKED = st.lists(st.sampled_from(['"', '""', "a", "b c", ",", '" ', ' "', "'"]), min_size=1).map("".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(st.tuples(PLAIN | MARKED.filter(str.strip), PLAIN), min_size=1),
    line_end=st.sampled_from(["\n", "\r\n"]),
)
def test_tsv_without_quoting_gives_a_row_a_line(tmp_path: Path, rows: list[tuple[str, str]], line_end: str) -> None:
    rows = [*rows, ('the 3.5" disk', "x")]  # a mark that no CSV writer would leave so
    content = line_end.join("\t".join(row) for row in [("input", "target"), *rows])
    assert read_pairs(write(tmp_path, "a.tsv", content)) == rows


@pytest.mark.parametrize(
    "texts",
    [
        ['"I came for the music.', "thin", 'I stayed for the story."'],  # cut from a passage in quotes
        ['"I came.', 'I went."'],
        ['"I came.', "thin"],
        ['"Nightfall" is the best', "thin"],
        ['"A masterpiece."', "thin"],
        ['""', '"', '"""'],
        ['thin "as" ever', '"a, b"'],
    ],
)
def test_marks_at_the_start_of_a_cell_swallow_nothing(tmp_path: Path, texts: list[str]) -> None:
    rows = [(text, str(n % 2)) for n, text in enumerate(["one", "two", *texts, "three"])]
    first = write(tmp_path, "a.tsv", "input\ttarget\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    last = write(tmp_path, "b.tsv", "target\tinput\n" + "".join(f"{b}\t{a}\n" for a, b in rows))
    alone = write(tmp_path, "c.tsv", "input\n" + "".join(f"{a}\n" for a, _ in rows))
    assert read_pairs(first) == read_pairs(last) == rows
    assert [text for text, _ in read_pairs(alone, require_target=False)] == [text for text, _ in rows]
    assert read_dataset(last, fields=["input"]).examples[-1].where == f"b.tsv:{len(rows) + 1}"


def test_a_bad_row_between_two_marks_is_not_swallowed(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'target\tinput\n0\tthin\n1\t"I came\n0\ta\tb\n1\tfine\n0\tI went."\n')
    assert failure(path).startswith("a.tsv:4: expected 2 cells as in the header, found 3; ")


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_tsv_by_a_csv_writer_is_read_in_its_quoting(tmp_path: Path, quoting: int) -> None:
    rows = [('he said "no"', "x"), ("two\nlines", "y"), ("a\ttab", "x"), ("plain, with comma", "y"), ('"', "x")]
    file = io.StringIO(newline="")
    csv.writer(file, delimiter="\t", quoting=quoting).writerows([("input", "target"), *rows])  # type: ignore[arg-type]
    assert read_pairs(write(tmp_path, "a.tsv", file.getvalue())) == rows
    excel = 'input\ttarget\r\n"plain, with comma"\tx\r\nwithout\ty\r\n'  # which quotes at commas, too
    assert read_pairs(write(tmp_path, "b.tsv", excel)) == [("plain, with comma", "x"), ("without", "y")]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('target,input\n0,thin\n1,fine\n1,"I came\n0,dull\n1,I went."\n0,bad\n', 4),
        ('target,input\n0,thin\n1,fine\n1,"I came\n0,I went."\n0,bad\n', 4),
        ('input,target\nthin,0\nfine,1\n"I came,1\ndull,0\nI went",1\nbad,0\n', 4),
        ('id,input,target\n1,thin,a\n2,fine,b\n3,"I came,c\n4,dull,d\n5,I went",e\n6,bad,f\n', 4),  # by numbers
        ('target;input\n0;thin\n1;fine\n1;"I came\n0;dull\n1;I went."\n', 4),
    ],
)
def test_csv_whose_mark_swallows_rows_is_refused(tmp_path: Path, content: str, line: int) -> None:
    message = failure(write(tmp_path, "a.csv", content))
    assert message.startswith(
        f"a.csv:{line}: expected a row a line, found a quotation mark that opens here and closes "
    )
    assert "TSV without quoting" in message


def test_csv_cells_of_several_lines_stay_readable(tmp_path: Path) -> None:
    texts = [
        "Dear John,\nthanks",
        "one, two\nthree, four\nfive",
        "a, b\r\nc, d\r\ne, f",
        'she said "no",\nhe "yes"',
        "x\n\ny",
    ]
    rows = [(text, "01"[n % 2]) for n, text in enumerate([*texts, "short, and quoted"] * 2)]
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("input", "target"), *rows])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_pairs(write(tmp_path, "a.csv", file.getvalue())) == rows


def test_csv_cells_that_may_be_rows_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'input\none\n"I came\nI went"\ntwo\n')
    with pytest.warns(SoftPromptWarning, match=r"a\.csv:3: a quoted cell goes over 2 lines"):
        assert [text for text, _ in read_pairs(path, require_target=False)] == ["one", "I came\nI went", "two"]


def test_other_delimiters_are_seen_in_the_header(tmp_path: Path) -> None:
    wanted = [("a, b", "x"), ("c; d\te", "y")]
    assert read_pairs(write(tmp_path, "a.csv", 'input;target\na, b;x\n"c; d\te";y\n')) == wanted
    assert read_pairs(write(tmp_path, "b.csv", 'sep=;\r\ninput;target\r\na, b;x\r\n"c; d\te";y\r\n')) == wanted
    assert read_dataset(tmp_path / "b.csv", fields=["input"]).examples[0].where == "b.csv:3"
    assert read_pairs(write(tmp_path, "c.csv", 'input\ttarget\na, b\tx\n"c; d\te"\ty\n')) == wanted
    assert read_pairs(write(tmp_path, "d.tsv", 'input,target\n"a, b",x\nc; d\te,y\n')) == wanted
    # a single column with such a sign in its name
    assert read_pairs(write(tmp_path, "e.csv", "a; b\none\ntwo\n"), input_field="a; b", require_target=False) == [
        ("one", None),
        ("two", None),
    ]


def test_columns_without_a_name_are_left_out(tmp_path: Path) -> None:
    options = {"input_field": "v2", "target_field": "v1"}
    path = write(tmp_path, "a.csv", 'v1,v2,,,\nham,hello,,,\nspam,"win, now",,,\nham,short\n')
    assert read_pairs(path, **options) == [("hello", "ham"), ("win, now", "spam"), ("short", "ham")]
    assert read_pairs(write(tmp_path, "b.csv", ",v1,v2\n0,ham,hello\n1,spam,win\n"), **options)[1] == ("win", "spam")
    assert read_pairs(write(tmp_path, "c.csv", "v1,v2\nham,hello,,\nspam,win\n"), **options)[0] == ("hello", "ham")
    assert failure(write(tmp_path, "d.csv", "v1,v2,\nham,hello,,more\n"), **options).startswith(
        "d.csv:2: expected 3 cells"
    )
    assert 'found "v1"' in failure(write(tmp_path, "e.csv", "v1,,\nham,hello,\n"), **options)
    path = write(tmp_path, "f.csv", "v1,v2,,\nham,hello,,\nspam,win, now,\n")
    with pytest.warns(SoftPromptWarning, match=r"f\.csv:3: text in columns without a name is not used; 1 of 2 rows"):
        read_pairs(path, **options)


def test_a_thousand_long_quoted_cells_are_read_in_time(tmp_path: Path) -> None:
    cell = '"' + 'a ""b"", c\n' * 200 + '"'
    path = write(tmp_path, "a.csv", "input,target\n" + f"{cell},x\n" * 1000)
    assert read_pairs(path) == [('a "b", c\n' * 200, "x")] * 1000
