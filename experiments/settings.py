"""What a run is told: one frozen record, from defaults, a TOML file and the command line, in that order."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.budget import BUDGET

POCKET = Path(__file__).parent.parent / "weights" / "pocket"

PRESETS = {"reports": (1e-5, 5e-5, 1e-4), "pocket": (1e-3, 5e-3, 1e-2)}
"""Learning rates by name. The three reports' grid; and the same, a hundred times larger, for the pocket model: at
1e-4 LoRA moves so small a model by less than .01 nats in the default run (measured)."""


@dataclass(frozen=True)
class Settings:
    """Every choice of a run; the names are those of the command line and of `config.toml`.

    Raises:
        ValueError: a value is out of its range; the message names the field, the value and the range.
    """

    model: str = str(POCKET)  # a folder, or a hub id
    revision: str = ""  # of the hub's model; "" for its newest
    offline: bool = False
    data: str = ""  # an HDF5 file; "" for the data set rebuilt by its law
    preset: str = ""  # learning rates by name, where lr is empty; "" for the model's own
    lr: tuple[float, ...] = ()
    ranks: tuple[int, ...] = (2, 4, 8)
    steps: int = 120
    batch_size: int = 4
    context: int = 512  # tokens of a training window
    dropout: float = 0.0  # on LoRA's input
    decimals: int = 2
    alpha: float = 0.0  # series are divided by this; 0 for the training part's maximum / 9.99
    val_every: int = 30  # steps between validations, each with a checkpoint
    val_series: int = 20  # series of the validation part that are used
    points: int = 80  # of a series that a forecast sees
    horizon: int = 20  # points that it forecasts
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"  # that the frozen weights are kept in
    budget: int = BUDGET  # FLOPs

    def __post_init__(self) -> None:
        for name in ("steps", "val_series", "points", "horizon", "batch_size", "context", "val_every", "budget"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.budget < 2**63, "budget", self.budget, "less than 2^63")
        _require(self.context >= 2, "context", self.context, "at least 2 tokens")
        _require(0 <= self.decimals <= 6, "decimals", self.decimals, "0 to 6")
        _require(0 <= self.alpha < float("inf"), "alpha", self.alpha, "a positive number, or 0 for the training part's")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0, less than 1")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")
        _require(all(0 < lr < 10 for lr in self.lr), "lr", self.lr, "positive numbers below 10")
        _require(bool(self.ranks) and all(r >= 1 for r in self.ranks), "ranks", self.ranks, "whole numbers from 1")
        _require(len(set(self.lr)) == len(self.lr), "lr", self.lr, "each once")
        _require(len(set(self.ranks)) == len(self.ranks), "ranks", self.ranks, "each once")
        _require(self.preset in ("", *PRESETS), "preset", self.preset, f"one of {', '.join(PRESETS)}")
        _require(self.dtype in ("float32", "bfloat16"), "dtype", self.dtype, "float32 or bfloat16")
        _require(
            self.device in ("cpu", "cuda") or self.device.startswith("cuda:"), "device", self.device, "cpu or cuda"
        )
        if self.device != "cpu":
            _require(torch.cuda.is_available(), "device", self.device, "cpu, as torch finds no CUDA device here")

    @property
    def is_pocket(self) -> bool:
        """Whether the model is the pocket model, whose every figure is a toy's."""
        return Path(self.model).resolve() == POCKET.resolve()

    @property
    def label(self) -> str:
        """What stands over every table and figure of the run."""
        return "toy: the pocket model" if self.is_pocket else ""

    @property
    def preset_name(self) -> str:
        """The preset that holds where no learning rates are given: the one asked for, or the model's own."""
        return self.preset or ("pocket" if self.is_pocket else "reports")

    @property
    def learning_rates(self) -> tuple[float, ...]:
        return self.lr or PRESETS[self.preset_name]

    @property
    def weight_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Products run in the weights' own type on a GPU, in float32 on a CPU, which is slow at anything else."""
        return torch.float32 if self.device == "cpu" else self.weight_dtype

    def updated(self, changes: dict[str, Any]) -> "Settings":
        """A copy with `changes`; a name that is unknown or a value of the wrong kind is refused by name."""
        kinds = {f.name: f.type for f in dataclasses.fields(self)}
        for name in changes:
            if name not in kinds:
                raise ValueError(f"{name} is no setting: expected one of {', '.join(kinds)}")
        return dataclasses.replace(self, **{n: _converted(n, kinds[n], v) for n, v in changes.items()})

    @classmethod
    def from_toml(cls, path: str | Path) -> "Settings":
        """Read a TOML file of settings, such as a run's `config.toml`. Errors start with the file's name."""
        try:
            return cls().updated(tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as e:
            raise ValueError(f"{path}: {e.strerror or e}: expected a TOML file of settings") from None
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: {' '.join(str(e).split())}: expected a TOML file of settings") from None

    def to_toml(self) -> str:
        """The settings as TOML, every one of them; `from_toml` reads it back equal."""
        return "".join(f"{f.name} = {_toml(getattr(self, f.name))}\n" for f in dataclasses.fields(self))


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        shown = list(value) if isinstance(value, tuple) else value
        raise ValueError(f"{name} is {shown!r}: expected {expected}")


def _converted(name: str, kind: Any, value: Any) -> Any:
    """`value` as the field's type: a list becomes a tuple, a whole number may stand for a float."""
    if kind in (tuple[float, ...], tuple[int, ...]):
        one = float if kind == tuple[float, ...] else int
        if isinstance(value, (list, tuple)):
            return tuple(_converted(name, one, v) for v in value)
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:
        return value
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, "a list")
    raise ValueError(f"{name} is {value!r}: expected {wanted}")


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        # TOML's basic string: the escapes it shares with JSON, written out
        return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or c in '"\\\x7f' else c for c in value) + '"'
    return str(value).lower() if isinstance(value, bool) else repr(value)
