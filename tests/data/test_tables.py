"""Tables as pandas writes them, one broken row at a time, and the workbook for servers."""

from __future__ import annotations

import csv
import io
import sys
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.data.records import RecordLog
from foveate.data.tables import MAX_ROW_LINES, open_table, write_xlsx
from foveate.errors import InputError


def table(folder: Path, text: str | bytes, skip_bad: bool = False) -> tuple[Any, RecordLog]:
    path = folder / "bench.tsv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    log = RecordLog(skip_bad)
    return open_table(path, log), log


def test_quotes_lines_and_places(tmp_path: Path) -> None:
    text = '\ufeffindex\tquestion\tA\tL2_category\r\n1\t"he said ""hi""\tand\nwent"\tx"y\t\r\n\r\n2\tplain\t""\tlast'
    opened, _ = table(tmp_path, text)
    assert opened.columns == ("index", "question", "A", "l2-category")
    rows = list(opened.rows())
    assert [row.name for row in rows] == ["row 1 (line 2)", "row 2 (line 5)"]
    assert rows[0].cells == {"index": "1", "question": 'he said "hi"\tand\nwent', "A": 'x"y', "l2-category": ""}
    assert rows[1].cells == {"index": "2", "question": "plain", "A": "", "l2-category": "last"}
    for row in rows:
        assert opened.row(row.place).cells == row.cells


cells = st.text(st.sampled_from('ab"\t\n\r é'), max_size=6)


@given(st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory: Any, rows: list[list[str]]) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([["i", "j", "k"], *rows])
    opened, _ = table(tmp_path_factory.mktemp("csv"), file.getvalue())
    assert [list(row.cells.values()) for row in opened.rows()] == rows


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (b'2\t"torn\tx', "a quote is opened and not closed"),
        (b'2\t"closed" and more\tx', "text follows the quote that closes a cell"),
        (b"2\ttoo few", r"has another number of cells than the heading, 3 \(2\)"),
        (b"2\tone\ttoo\tmany", r"heading, 3 \(4\)"),
        (b"2\t\xff\tx", "is not UTF-8"),
    ],
)
def test_a_broken_row_is_named_and_can_be_left_out(tmp_path: Path, row: bytes, fault: str) -> None:
    text = b"index\tq\tz\n1\ta\tb\n" + row + b"\n3\tc\td\n"
    opened, _ = table(tmp_path, text)
    with pytest.raises(InputError, match=rf"bench\.tsv: row 2 \(line 3\): .*{fault}.*skip_bad"):
        list(opened.rows())
    opened, log = table(tmp_path, text, skip_bad=True)
    assert [row.cells["index"] for row in opened.rows()] == ["1", "3"]  # the row behind a torn quote is not lost
    assert log.skipped.total() == 1


def test_a_torn_quote_does_not_read_the_file_to_its_end(tmp_path: Path) -> None:
    rows = "".join(f"{number}\ta\tb\n" for number in range(MAX_ROW_LINES + 50))
    opened, _ = table(tmp_path, f'index\tq\tz\n1\t"torn\tb\n{rows}9\t"fine"\tb\n', skip_bad=True)
    assert sum(1 for _ in opened.rows()) == MAX_ROW_LINES + 51


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a heading"):
        table(tmp_path, "one line\n")
    with pytest.raises(InputError, match="the heading cannot be read"):
        table(tmp_path, 'index\t"torn\n')
    with pytest.raises(InputError, match=r"none\.tsv does not exist"):
        open_table(tmp_path / "none.tsv", RecordLog(False))


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "bench.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"bench\.parquet is a Parquet file, which needs pyarrow: .*\.tsv"):
        open_table(tmp_path / "bench.parquet", RecordLog(False))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    content = {
        "index": [4, 5, 6],
        "image": [{"bytes": b"one", "path": "a"}, {"bytes": b"two", "path": None}, {"bytes": b"three", "path": None}],
        "L2-category": ["x", None, "y"],
    }
    path = tmp_path / "bench.parquet"
    parquet.write_table(pyarrow.table(content), path, row_group_size=2)
    opened = open_table(path, RecordLog(False))
    rows = list(opened.rows())
    assert rows[1].cells == {"index": "5", "image": b"two", "l2-category": ""}
    assert [row.name for row in rows] == ["row 1", "row 2", "row 3"]
    assert [opened.row(row.place).cells["image"] for row in reversed(rows)] == [b"three", b"two", b"one"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="no Parquet file or damaged"):
        open_table(path, RecordLog(False))


def read_xlsx(path: Path) -> list[list[Any]]:
    """Texts and numbers of the sheet, None for an empty cell."""
    main = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    rows = []
    for row in sheet.iter(f"{main}row"):
        values: list[Any] = []
        for cell in row:
            text, number = cell.find(f"{main}is/{main}t"), cell.find(f"{main}v")
            values.append(text.text or "" if text is not None else None if number is None else float(number.text or ""))
        rows.append(values)
    return rows


def test_a_workbook(tmp_path: Path) -> None:
    path = tmp_path / "out.xlsx"
    rows: list[list[Any]] = [[1, "a < b & c", None], [1_000_001, " two\nlines\x07", ""]]
    write_xlsx(path, ["index", "prediction", "C"], rows)
    assert read_xlsx(path) == [
        ["index", "prediction", "C"],
        [1.0, "a < b & c", None],
        [1_000_001.0, " two\nlines_x0007_", ""],
    ]
    first = path.read_bytes()
    write_xlsx(path, ["index", "prediction", "C"], rows)
    assert path.read_bytes() == first
