"""Tensors as one safetensors file that carries a digest of its own, in its header: written whole and checked whole.

For files that a run writes and reads again: adapters, checkpoints. The weights of a model are mapped (see `load`).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_LONGEST = 100_000_000  # bytes of a header that the library reads
_METADATA = "__metadata__"


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file whose metadata has `sha256`: of the names, types, shapes and bytes of its tensors.

    Equal tensors give equal bytes; the library itself writes two entries of metadata in any order.
    """
    data = save(dict(tensors))
    header, start = _header(data)
    metadata = {"format": "pt", "sha256": _digest(header, data[start:])}
    text = json.dumps({_METADATA: metadata} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values stay aligned
    return len(text).to_bytes(8, "little") + text + data[start:]


def from_bytes(data: bytes, path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which `data` holds and `path` names.

    A file without a digest, such as PEFT's, is taken as it is.

    Raises:
        ValueError: it is no whole safetensors file, names a tensor twice, or is not as it was written.
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, TypeError, KeyError) as e:
        raise unreadable(path, e) from None
    header, start = _header(data, path)
    recorded = header.pop(_METADATA, {}).get("sha256")
    if recorded is not None and (found := _digest(header, data[start:])) != recorded:
        unlike = f"sha256 of its tensors is {found}, recorded {recorded:.64}"
        raise ValueError(f"{path}: {unlike}: expected the file as it was written")
    return tensors


def check_names(path: Path) -> None:
    """Raise ValueError for a safetensors file that names a tensor twice: the library takes the last one silently."""
    with path.open("rb") as file:
        head = file.read(8)
        _header(head + file.read(min(int.from_bytes(head, "little"), _LONGEST)), path)


def unreadable(path: str | Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"{path}: cannot be read ({reason}): expected a complete safetensors file")


def _header(data: bytes, path: str | Path = "") -> tuple[dict[str, Any], int]:
    """What a file says of its tensors, by name, and where their bytes begin; for one that the library has read."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            name = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise ValueError(f"{path}: names {ascii(name[:200])} twice: expected each tensor once")
        return fields

    start = 8 + int.from_bytes(data[:8], "little")
    try:
        return json.loads(data[8:start], object_pairs_hook=once), start
    except ValueError as e:
        raise e if str(e).startswith(f"{path}: ") else unreadable(path, e) from None


def _digest(header: dict[str, Any], values: bytes) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + values).hexdigest()
