"""The records of a run's folder, read strictly: what is missing or broken is one line naming file and fault."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.run_folder import files

Row = dict[str, Any]


@dataclass(frozen=True)
class Fields:
    """A JSON object and where it stands; a value that is missing or of another kind is a ValueError.

    A key with dots goes down: "flops.validation"."""

    where: str
    values: Mapping[str, Any]

    def number(self, key: str) -> float:
        return self._of(key, "a number", lambda v: type(v) in (int, float) and math.isfinite(v))

    def number_or_none(self, key: str) -> float | None:
        """A number; None where it is null or there is no such key."""
        return self.number(key) if self._find(key) is not None else None

    def count(self, key: str) -> int:
        return self._of(key, "a whole number", lambda v: type(v) is int)

    def text(self, key: str) -> str:
        return self._of(key, "text", lambda v: isinstance(v, str))

    def flag(self, key: str) -> bool:
        return self._of(key, "true or false", lambda v: isinstance(v, bool))

    def fields(self, key: str) -> "Fields":
        return Fields(f"{self.where}: {key}", self._of(key, "an object", lambda v: isinstance(v, dict)))

    def objects(self, key: str) -> list["Fields"]:
        found = self._list(key, "a list of objects", lambda v: isinstance(v, dict))
        return [Fields(f"{self.where}: {key}[{i}]", o) for i, o in enumerate(found)]

    def texts(self, key: str) -> list[str]:
        return self._list(key, "a list of texts", lambda v: isinstance(v, str))

    def counts(self, key: str) -> list[int]:
        return self._list(key, "a list of whole numbers", lambda v: type(v) is int)

    def numbers(self, key: str) -> list[float]:
        return self._list(key, "a list of numbers", lambda v: type(v) in (int, float))

    def matrix(self, key: str) -> list[list[float]]:
        holds = lambda v: isinstance(v, list) and all(type(x) in (int, float) for x in v)  # noqa: E731
        return self._list(key, "a list of lists of numbers", holds)

    def _list(self, key: str, wanted: str, holds: Callable[[Any], bool]) -> list[Any]:
        return self._of(key, wanted, lambda v: isinstance(v, list) and all(map(holds, v)))

    def _find(self, key: str) -> Any:
        """The value at `key`, first as it stands, then down its dots; None where there is none."""
        if key in self.values:
            return self.values[key]
        found: Any = self.values
        for name in key.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def _of(self, key: str, wanted: str, holds: Callable[[Any], bool]) -> Any:
        found = self._find(key)
        if found is None:
            raise ValueError(f"{self.where}: has no {key}: expected {wanted}")
        if not holds(found):
            raise ValueError(f"{self.where}: {key} is {str(found)[:40]!r}: expected {wanted}")
        return found


class Records:
    """The files of a run's folder by their names in it, each read once; `digests` has those that were read."""

    def __init__(self, root: Path):
        self.root = root
        self.digests: dict[str, str] = {}
        self._read: dict[str, Any] = {}

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def json(self, name: str) -> Fields:
        value = self._once(name, files.read_json)
        files.check(self.root / name, value, {})
        return Fields(str(self.root / name), value)

    def jsonl(self, name: str) -> list[Fields]:
        lines = self._once(name, files.read_jsonl)
        return [Fields(f"{self.root / name}: line {i}", line) for i, line in enumerate(lines, 1)]

    def toml(self, name: str) -> Row:
        return self._once(name, files.read_toml)

    def csv(self, name: str, /, **columns: str) -> list[Row]:
        """The rows of a CSV file, the named columns as "text", "number" or "count", a whole number. An empty cell
        is None in a "number or nothing"; with a "?" after, the file may lack the column, which is then None.
        Other columns stay text."""
        head, rows = self._once(name, files.read_csv)
        for column, kind in columns.items():
            if column not in head and not kind.endswith("?"):
                raise ValueError(f"{self.root / name}: has no column {column}: expected {', '.join(columns)}")
        read = []
        for at, row in enumerate(rows, 2):
            new: Row = dict(row)
            for column, kind in columns.items():
                kind, nothing, _ = kind.removesuffix("?").partition(" or nothing")
                convert, wanted = _KINDS[kind]
                there = column in row and (row[column] or not nothing)
                try:
                    new[column] = convert(row[column]) if there else None
                except ValueError:
                    fault = f"{column} is {row[column][:40]!r}: expected {wanted}{nothing}"
                    raise ValueError(f"{self.root / name}: line {at}: {fault}") from None
            read.append(new)
        return read

    def _once(self, name: str, read: Callable[[Path], Any]) -> Any:
        if name not in self._read:
            self._read[name] = read(self.root / name)
            self.digests[name] = files.file_digest(self.root / name)
        return self._read[name]


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


_KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "text": (str, "text"),
    "number": (_number, "a finite number"),
    "count": (int, "a whole number"),
}
