"""Files that are whole or absent: atomic writes, folders that are replaced as one, strict JSON.

A write goes to a temporary sibling, is fsynced, and takes its name by `os.replace`; whoever reads sees the
old content or the new, also after a kill or a power cut. One process at a time may write a given path.
"""

import csv
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def unwritable(path: str | Path, error: OSError) -> OSError | ValueError:
    """Return a failed write as one line: the machine is at fault, or (ValueError) a path that no file can have."""
    said = f"{path}: cannot be written ({error.strerror or error}): expected"
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return ValueError(f"{said} another path")
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return OSError(
        f"{said} {'free space on its disk' if full else 'a place on a sound disk that this process may write'}"
    )


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name `path` and the reason in one line, in an OSError from inside that does not yet (see `unwritable`)."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise unwritable(path, error) from error


def check_file(path: str | Path) -> None:
    """Raise ValueError for what no file can take the place of: a folder, or a device, as /dev/null."""
    path = Path(path)
    with writing(path):
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: is there, and is no file: expected another path")


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically, making the folders above it; a failure leaves no temporary.

    Raises OSError with one line that names the path, as every function here that writes, or ValueError (`unwritable`).
    """
    path = Path(path)
    check_file(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _fsync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, line ends as given, atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON (keys sorted, two spaces) atomically. Raises ValueError for NaN or infinity."""
    write_text(path, _dumps(path, value, indent=2) + "\n")


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line atomically: the bytes that `append_jsonl` writes one by one."""
    write_text(path, "".join(_dumps(path, record) + "\n" for record in records))


def append_jsonl(path: str | Path, record: dict[str, Any]) -> None:
    """Append `record` as one line in one write, once what a killed writer left of its last is cut off."""
    line = (_dumps(path, record) + "\n").encode()
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    end = path.read_bytes().rfind(b"\n") + 1
                    file.truncate(end)
            if file.write(line) != len(line):  # a full disk may take a part only
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys as CSV atomically: a header, "\\n" line ends, floats in full, an empty cell for None.

    Raises ValueError for NaN or infinity, and for a row of other keys than the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{path}: not written, {key} is {value}: expected a finite number or nothing")
        writer.writerow(row)
    write_text(path, text.getvalue())


def read_json(path: str | Path) -> Any:
    """Return the value in a JSON file. Raises a one-line ValueError naming file and fault (NaN is one)."""
    return _loads(_read(path), f"{path}: ")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Raises a one-line ValueError that starts with its name."""
    text = _text(_read(path), f"{path}: ")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}: expected a TOML file") from None


def read_csv(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and the rows of a CSV file, all as text. Raises a one-line ValueError naming the file."""
    text = _text(_read(path), f"{path}: ")
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}: {error}: expected comma-separated values") from None
    if not lines or len(set(lines[0])) < len(lines[0]):
        raise ValueError(f"{path}: expected a first line that names each column once")
    for at, line in enumerate(lines[1:], 2):
        if len(line) != len(lines[0]):
            raise ValueError(f"{path}: line {at} has {len(line)} values: expected {len(lines[0])}, as columns")
    return lines[0], [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file, less a last line that a kill left without its newline.

    Raises a one-line ValueError naming file, line and fault."""
    records = [_loads(line, f"{path}: line {n}: ") for n, line in enumerate(_read(path).split(b"\n")[:-1], 1)]
    for number, record in enumerate(records, 1):
        check(f"{path}: line {number}", record, {})
    return records


def check(where: object, found: Any, kinds: Mapping[str, Any], others: Mapping[str, Any] | None = None) -> None:
    """Raise ValueError unless a value from JSON is an object with all of these names, each of its kind.

    A kind is a type, several of them, or the kinds of an object's names. A whole number is from -1 to 2^63 - 1, and may
    stand for a float. `others` may be there too, and nothing else; by default anything may.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{where}: is a {type(found).__name__}: expected an object")
    if missing := [name for name in kinds if name not in found]:
        raise ValueError(f"{where}: has no {missing[0]}: expected {', '.join(kinds)}")
    for name, value in found.items():
        kind = kinds.get(name) or (others or {}).get(name)
        if isinstance(kind, Mapping):
            check(f"{where}: {name}", value, kind)
        elif kind is None and others is not None:
            raise ValueError(f"{where}: has {name!r:.60}: expected {', '.join(kinds)}")
        elif kind is not None:
            allowed = kind if isinstance(kind, tuple) else (kind,)
            holds = type(value) in allowed or (float in allowed and type(value) is int)
            if not holds or (type(value) is int and not -1 <= value < 2**63):
                wanted = {str: "text", list: "a list", dict: "an object"}.get(kind, "a number as a run writes it")
                raise ValueError(f"{where}: {name} is {value!r:.60}: expected {wanted}")


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in pieces. Raises ValueError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}): expected a file") from error


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty sibling folder that replaces `path` as a whole when the block ends well.

    If the block raises, `path` is what it was. A folder cannot be replaced in one rename, so the old one
    steps aside to `.NAME.old` for the moment between two renames; after a kill in that moment
    `recover_folder` puts it back. Call that before reading `path`."""
    path = Path(path)
    _check_folder(path)
    recover_folder(path)
    real, new, old = _beside(path)
    with writing(path):
        real.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.mkdir()
            yield new
            for folder, _, names in os.walk(new):
                for name in names:
                    _fsync(Path(folder, name))
                _fsync(Path(folder))
            if real.exists():
                os.rename(real, old)
            os.rename(new, real)
            _fsync(real.parent)
        except BaseException:
            with suppress(OSError):  # the first failure is the one to report; a later call can recover
                recover_folder(path)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file: expected a folder")


def check_own(path: str | Path, names: Collection[str]) -> None:
    """Raise ValueError if a folder that is to be replaced holds anything but what has these names, or is a file."""
    path = Path(path)
    _check_folder(path)
    other = sorted(p.name for p in path.iterdir() if p.name not in names) if path.is_dir() else []
    if other:
        raise ValueError(f"{path}: holds {other[0]!r}, which would be lost: expected a folder of its own")


def recover_folder(path: str | Path) -> bool:
    """Undo an `atomic_folder(path)` that was killed half-way; return whether there is a folder at `path`."""
    path = Path(path)
    real, new, old = _beside(path)
    with writing(path):
        if old.exists() and not real.exists():  # killed between the two renames: the previous folder is whole
            os.rename(old, real)
            _fsync(real.parent)
        for leftover in (new, old):
            if leftover.is_symlink():
                leftover.unlink()
            elif leftover.exists():
                shutil.rmtree(leftover)
    return path.is_dir()


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed writers left of files below `folder`, where nobody may be writing now."""
    for leftover in Path(folder).rglob(".*.tmp"):
        if re.search(r"\.\d+\.tmp$", leftover.name):
            with writing(leftover):
                leftover.unlink()


def _beside(path: Path) -> tuple[Path, Path, Path]:
    """The folder itself, where `path` is a link to it, and its two siblings."""
    real = path.resolve() if path.is_symlink() else path
    return real, real.with_name(f".{real.name}.new"), real.with_name(f".{real.name}.old")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _dumps(path: str | Path, value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, sort_keys=True, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"{path}: not written, JSON has no NaN and no infinity ({error})") from error


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}): expected a file") from error


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}has the byte {data[error.start]:#04x}: expected UTF-8 text") from error


def _loads(data: bytes, where: str) -> Any:
    text = _text(data, where)
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}not valid JSON ({error}): expected it as it was written") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # "NaN", "Infinity", and 1e999, which `float` takes for infinity
        raise ValueError(f"{text[:20]}: expected a finite number")
    return value
