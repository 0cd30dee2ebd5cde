"""Tables of benchmarks: tab-separated files with pictures in base64, Parquet files, and workbooks for servers.

A table is read row by row, and any row again by its place, so that a file of gigabytes of pictures is never whole in
memory. Cells are those that pandas writes: a cell with a quote, a tab or a line end stands in quotes, quotes doubled.
"""

from __future__ import annotations

import binascii
import io
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from xml.sax.saxutils import escape

from foveate.data.records import BadRecord, RecordLog
from foveate.errors import InputError
from foveate.files import atomic_write

MAX_ROW_BYTES = 64 * 2**20
MAX_ROW_LINES = 1000
"""A quote that stays open over more is torn; the pictures of all rows behind it would be read into one cell."""
LONGEST_REFERENCE = 64
"""A shorter text in the place of a picture is the index of the row that has it (VLMEvalKit)."""

_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table.

    Attributes:
        number: counted from 1; the heading is none.
        place: what `Table.row` finds it by.
        name: as an error calls it, "row 3 (line 4)".
        cells: by column, in the form of `column_name`; texts, but for the encoded pictures (bytes) of Parquet files.
    """

    number: int
    place: int
    name: str
    cells: dict[str, Any]


class Table(Protocol):
    """Rows below a heading."""

    path: Path
    columns: tuple[str, ...]

    def rows(self) -> Iterator[Row]:
        """Every row from the first; broken ones go to the log that the table was opened with."""
        ...

    def row(self, place: int) -> Row:
        """The row at a place that `rows` gave; `InputError` where the file has been changed since."""
        ...


def open_table(path: Path, log: RecordLog) -> Table:
    """A .tsv or .parquet file.

    Raises:
        InputError: it does not exist, is of another kind, has no heading, or is a Parquet file and pyarrow is not
            installed.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; docs/datasets.md says which files a benchmark needs.")
    if path.suffix.lower() == ".parquet":
        return ParquetTable(path)
    return TsvTable(path, log)


def column_name(heading: str) -> str:
    """A column by one name whatever the release calls it: "L2-category" and "l2_category" are "l2-category"; the
    capitals of options stay."""
    name = heading.strip().replace("_", "-")
    return name if len(name) == 1 else name.lower()


def require_columns(table: Table, names: Iterable[str]) -> None:
    """Whether the table has these columns.

    Raises:
        InputError: one is missing.
    """
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise InputError(
            f"{table.path} has no column {missing[0]!r}, its columns are {', '.join(table.columns)}; is it the file of "
            "another benchmark?"
        )


class TsvTable:
    """A tab-separated file in UTF-8. A row that is broken by a torn quote ends with its line."""

    def __init__(self, path: Path, log: RecordLog) -> None:
        self.path, self._log = path, log
        with path.open("rb") as file:
            try:
                cells, self._heading_lines = _complete(file.readline(MAX_ROW_BYTES), file)
                texts = [cell.decode("utf-8-sig") for cell in cells]
            except (BadRecord, UnicodeDecodeError) as error:
                raise InputError(f"{path}: the heading cannot be read ({error}); is it a .tsv file?") from error
            self._first = file.tell()
        self.columns = tuple(column_name(text) for text in texts)
        if len(self.columns) < 2 or len(set(self.columns)) < len(self.columns):
            raise InputError(f"{path}: the first line is not a heading of columns with tabs between; get it again.")

    def rows(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            file.seek(self._first)
            line, number, place = self._heading_lines, 0, self._first
            while text := file.readline(MAX_ROW_BYTES):
                line += 1
                after = file.tell()
                if text.strip(b"\r\n"):
                    number += 1
                    name = f"row {number} (line {line})"
                    try:
                        cells, lines = _complete(text, file)
                        row = Row(number, place, name, self._cells(cells))
                    except BadRecord as error:
                        self._log.bad(self.path, name, error)
                        file.seek(after)
                    else:
                        line, after = line + lines - 1, file.tell()
                        yield row
                place = after

    def row(self, place: int) -> Row:
        with self.path.open("rb") as file:
            file.seek(place)
            try:
                cells, _ = _complete(file.readline(MAX_ROW_BYTES), file)
                return Row(0, place, "", self._cells(cells))
            except BadRecord as error:
                raise InputError(f"{self.path} has been changed while it was read ({error}); start again.") from error

    def _cells(self, cells: Sequence[bytes]) -> dict[str, Any]:
        if len(cells) != len(self.columns):
            raise BadRecord(f"has another number of cells than the heading, {len(self.columns)}", len(cells))
        try:
            return {column: cell.decode("utf-8") for column, cell in zip(self.columns, cells, strict=True)}
        except UnicodeDecodeError as error:
            raise BadRecord(f"is not UTF-8 (byte {error.start} of a cell)") from error


def _complete(text: bytes, file: BinaryIO) -> tuple[list[bytes], int]:
    """The cells of the row that begins with the line `text`, and its number of lines.

    Raises:
        BadRecord: a quote is not closed, or text follows one that is.
    """
    lines = 1
    cells = _split(_without_end(text))
    while cells is None:
        more = file.readline(MAX_ROW_BYTES)
        lines += 1
        text += more
        if not more or lines > MAX_ROW_LINES or len(text) > MAX_ROW_BYTES:
            raise BadRecord("a quote is opened and not closed")
        if b'"' in more:
            cells = _split(_without_end(text))
    return cells, lines


def _without_end(text: bytes) -> bytes:
    return text.removesuffix(b"\n").removesuffix(b"\r")


def _split(text: bytes) -> list[bytes] | None:
    """The cells of a row; None where a quote is still open at its end."""
    if b'"' not in text:
        return text.split(b"\t")
    cells: list[bytes] = []
    place = 0
    while place <= len(text):
        if text.startswith(b'"', place):
            end = place + 1
            while (end := text.find(b'"', end)) >= 0 and text.startswith(b'"', end + 1):
                end += 2
            if end < 0:
                return None
            cells.append(text[place + 1 : end].replace(b'""', b'"'))
            place = end + 1
            if place < len(text) and not text.startswith(b"\t", place):
                raise BadRecord("text follows the quote that closes a cell", text[place : place + 20])
        else:
            end = text.find(b"\t", place)
            end = len(text) if end < 0 else end
            cells.append(text[place:end])
            place = end
        place += 1
    return cells


class ParquetTable:
    """A Parquet file, through pyarrow. Pictures are bytes, or `{"bytes", "path"}` as in Hugging Face's data sets."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow  # pyright: ignore[reportMissingImports]
            from pyarrow import parquet  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError(
                f"{path} is a Parquet file, which needs pyarrow: `pip install pyarrow`, or give the benchmark's .tsv."
            ) from None
        self.path, self._errors = path, (pyarrow.ArrowException, OSError)
        with self._readable():
            self._file: Any = parquet.ParquetFile(path)
        self._names = tuple(self._file.schema_arrow.names)
        self.columns = tuple(column_name(name) for name in self._names)
        self._group: tuple[int, list[dict[str, Any]]] | None = None  # the last one read

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise InputError(f"{self.path} is no Parquet file or damaged ({error}); get it again.") from None

    def rows(self) -> Iterator[Row]:
        number = 0
        with self._readable():
            for batch in self._file.iter_batches(batch_size=64):
                for record in batch.to_pylist():
                    number += 1
                    yield self._row(number, record)

    def row(self, place: int) -> Row:
        first = 0
        for group in range(self._file.num_row_groups):
            count = self._file.metadata.row_group(group).num_rows
            if place < first + count:
                if self._group is None or self._group[0] != group:
                    with self._readable():
                        self._group = (group, self._file.read_row_group(group).to_pylist())
                return self._row(place + 1, self._group[1][place - first])
            first += count
        raise InputError(f"{self.path} has {first} rows, not {place + 1}; it has been changed while it was read.")

    def _row(self, number: int, record: Mapping[str, Any]) -> Row:
        cells = {column: _plain(record[name]) for column, name in zip(self.columns, self._names, strict=True)}
        return Row(number, number - 1, f"row {number}", cells)


def _plain(value: Any) -> Any:
    """A value of a Parquet file as the cell of a .tsv would hold it; encoded pictures stay bytes."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    if isinstance(value, str | bytes):
        return value
    return "" if value is None else repr(value) if isinstance(value, list) else str(value)


def decode_picture(cell: str | bytes) -> bytes:
    """The encoded picture of a cell: base64, or the bytes themselves.

    Raises:
        BadRecord: it is not base64.
    """
    if isinstance(cell, bytes):
        return cell
    try:
        return binascii.a2b_base64(cell.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise BadRecord(f'"image" is not base64 ({str(error).lower()})', cell[:20]) from error


# -------------------------------------------------------------------- workbooks

_TYPES = "http://schemas.openxmlformats.org/package/2006/content-types"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"
_SHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_KIND = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_PARTS = {
    "[Content_Types].xml": f'<Types xmlns="{_TYPES}"><Default Extension="rels" '
    'ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Default Extension="xml" '
    f'ContentType="application/xml"/><Override PartName="/xl/workbook.xml" ContentType="{_KIND}.sheet.main+xml"/>'
    f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{_KIND}.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}"><Relationship Id="rId1" Type="{_OFFICE}/officeDocument" '
    'Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{_SHEET}" xmlns:r="{_OFFICE}"><sheets><sheet name="Sheet1" sheetId="1" '
    'r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}"><Relationship Id="rId1" '
    f'Type="{_OFFICE}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}


def write_xlsx(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str | int | float | None]]) -> None:
    """A workbook with one sheet: a heading and rows of texts and numbers. The same content gives the same bytes.

    Raises:
        InputError, OSError: `path` cannot be written.
    """
    with atomic_write(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in _PARTS.items():
            archive.writestr(_entry(name), _DECLARATION + content)
        with archive.open(_entry("xl/worksheets/sheet1.xml"), "w") as sheet:
            text = io.TextIOWrapper(sheet, encoding="utf-8", newline="\n")
            text.write(f'{_DECLARATION}<worksheet xmlns="{_SHEET}"><sheetData>')
            text.write(_row_xml(columns))
            text.writelines(_row_xml(row) for row in rows)
            text.write("</sheetData></worksheet>")
            text.close()


_DECLARATION = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # of 1980, whenever it is written
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


def _row_xml(row: Sequence[str | int | float | None]) -> str:
    return f"<row>{''.join(map(_cell_xml, row))}</row>"


def _cell_xml(value: str | int | float | None) -> str:
    if value is None:
        return "<c/>"
    if isinstance(value, str):
        # What XML cannot hold is written as spreadsheets write it.
        text = _NOT_XML.sub(lambda found: f"_x{ord(found.group()):04X}_", value)
        return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(text)}</t></is></c>'
    return f"<c><v>{value}</v></c>"
