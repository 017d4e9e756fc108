"""Tables that people have: CSV by the standard library, Parquet by pyarrow, data frames; as columns of cells.

A cell is what the source holds: text of a CSV; numbers, times, text or None of the others.
"""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_LINE = 2**20  # bytes: a row of a thousand series takes 20,000
SUFFIXES = {".csv": "CSV", ".tsv": "CSV", ".txt": "CSV", ".parquet": "Parquet", ".pq": "Parquet"}
OTHERS = {
    b"PK\x03\x04": "an Excel file or an archive",
    b"\xd0\xcf\x11\xe0": "an old Excel file",
    b"\x89HDF": "HDF5",
    b"PAR1": "Parquet",
    b"\x1f\x8b": "compressed",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"%PDF": "a PDF",
    b"SQLite": "a database",
}


@dataclass(frozen=True)
class Table:
    """Columns of equal length by name, in their order. Errors call cell i that of row `first` + i.

    digest: SHA-256 of the file's bytes; of a frame, that of its cells.
    """

    columns: dict[str, list[Any]]
    first: int
    name: str
    digest: str

    def fault(self, row: int, said: str) -> ValueError:
        """An error about the cell at `row`, from 0."""
        return ValueError(f"{self.name}: row {self.first + row}: {said}")


def read(path: Path) -> Table:
    """The table in a CSV or Parquet file, by its suffix.

    Raises ValueError with one line: the file, the row (a CSV's header is row 1), what is wrong, what was expected.
    """
    kind = SUFFIXES[path.suffix.lower()]
    if not path.is_file():
        raise ValueError(f"{path}: {'is not a file' if path.exists() else 'no such file'}: expected a {kind} file")
    try:
        with path.open("rb") as file:
            start = file.read(6)
            holds = next((what for magic, what in OTHERS.items() if start.startswith(magic)), "")
            if not start or holds not in ("", "Parquet") or (holds == "Parquet") != (kind == "Parquet"):
                raise ValueError(f"{path}: is {holds or ('empty' if not start else 'not Parquet')}: expected {kind}")
            file.seek(0)
            return _parquet(path) if kind == "Parquet" else _csv(path, file)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}): expected a {kind} file") from None


def of_frame(frame: Any) -> Table:
    """The table in a pandas data frame; rows count from 0."""
    columns = {str(name): frame[name].tolist() for name in frame.columns}
    digest = hashlib.sha256(repr(columns).encode()).hexdigest()
    return Table(_checked("frame", columns, list(map(str, frame.columns))), 0, "frame", digest)


def _checked(name: str, columns: dict[str, list[Any]], header: list[str]) -> dict[str, list[Any]]:
    for column in header:
        if not column.strip() or header.count(column) > 1:
            raise ValueError(f"{name}: row 1: column {column!r:.60}: expected names, each once")
    if not columns or not next(iter(columns.values())):
        raise ValueError(f"{name}: has no rows: expected a header, and a row for each time")
    return columns


def _csv(path: Path, file: Any) -> Table:
    digest, rows, header, delimiter = hashlib.sha256(), [], [""], ","
    for row, line in _lines(path, file, digest):
        if row == 1:
            delimiter = max(",;\t", key=line.count)
        try:
            cells = next(csv.reader([line], delimiter=delimiter, strict=True), [])
        except csv.Error as error:
            wrong = "a quote that never closes" if "unexpected end" in str(error) else str(error)
            raise ValueError(f"{path}: row {row}: {wrong}: expected a whole row in each line") from None
        if row == 1:
            header = [cell.strip() for cell in cells] or [""]
            _checked(str(path), {"": [0]}, header)
        elif len(cells) == len(header) or not cells:
            rows.append(cells)
        else:
            raise ValueError(f"{path}: row {row}: has {len(cells)} cells: expected {len(header)}, as the header has")
    while rows and not rows[-1]:
        rows.pop()
    if [] in rows:
        raise ValueError(f"{path}: row {rows.index([]) + 2}: is empty: expected {len(header)} cells")
    columns = {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}
    return Table(_checked(str(path), columns, header), 2, str(path), digest.hexdigest())


def _lines(path: Path, file: Any, digest: Any) -> Iterator[tuple[int, str]]:
    row = 0
    while raw := file.readline(LONGEST_LINE + 1):
        row += 1
        digest.update(raw)
        if len(raw) > LONGEST_LINE:
            raise ValueError(f"{path}: row {row}: is longer than {LONGEST_LINE:,} bytes: expected shorter lines")
        try:
            line = raw.decode("utf-8-sig" if row == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            at = raw[error.start]
            raise ValueError(f"{path}: row {row}: byte 0x{at:02x} is no UTF-8: expected text in UTF-8") from None
        if wrong := next((one for one in line if ord(one) < 32 and one != "\t"), ""):
            raise ValueError(f"{path}: row {row}: holds the control character {wrong!r}: expected text")
        yield row, line


def _parquet(path: Path) -> Table:
    try:
        from pyarrow import parquet
    except ImportError:
        missing = "is Parquet, and pyarrow is not installed"
        raise ValueError(f"{path}: {missing}: expected pip install 'qwen_min[frames]', or a CSV") from None
    try:
        table = parquet.ParquetFile(path).read()
        header = table.column_names
        columns = {name: column.to_pylist() for name, column in zip(header, table.columns, strict=True)}
    except Exception as error:  # pyarrow's, and whatever a damaged file leads to
        said = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: is not readable as Parquet ({said}): expected a Parquet file") from None
    return Table(_checked(str(path), columns, header), 1, str(path), hashlib.sha256(path.read_bytes()).hexdigest())
