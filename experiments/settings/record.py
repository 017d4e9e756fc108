"""A run's settings: one frozen record, from defaults, a TOML file and the command line, in that order."""

import dataclasses
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin

import torch

from data.frames import FILLS
from data.llmtime import SEPARATORS
from experiments.accounting.ledger import BUDGET
from experiments.run_folder.files import read_toml
from experiments.settings import schedule
from qwen_min.fast import compiled

POCKET = Path(__file__).parents[2] / "weights" / "pocket"
FORECASTER = POCKET.with_name("forecaster")
"""What is left of the run whose adapter is named "forecaster": it, its settings and its result."""

PRESETS = {"reports": (1e-5, 5e-5, 1e-4), "pocket": (1e-3, 5e-3, 1e-2)}
"""Learning rates by name. The three reports' grid; and the same, a hundred times larger, for the pocket model: at
1e-4 LoRA moves so small a model by less than .01 nats in the default run (measured)."""

SPLITS = ("in order", "shuffled", "held out first", "time")
SCALINGS = ("training maximum", "context percentile", "series percentile")
"""What a series is divided by: the training part's largest value / 9.99, for all; or the larger of its variables' 95th
percentiles / 10, of the points that a forecast sees, or of all: the horizon that it is to forecast included."""

WINDOWS = ("strided", "anywhere")
"""Training windows `stride` apart, in an order drawn for each pass; or of series in such an order, drawn anew for each
step: a window begins at any point of its series that leaves enough to fill it. Those of validation do not overlap."""

SCRATCH = ("", "same", "small")  # a pretrained model with LoRA; the same shape; a small one with its tokenizer
BEYOND = ("refuse", "clip")
POINT_FORECASTS = ("median", "mean")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_VALIDATIONS = 12  # of a run of a shortened study
FEWEST_SERIES = 20  # that tell something of a forecaster


@dataclass(frozen=True)
class Settings:
    """Every choice of a run; the names are those of the command line and of `config.toml`.

    Raises:
        ValueError: a value is out of its range; the message names the field, the value and the range.
    """

    protocol: str = ""  # a file of settings/protocols; "" for the default's way, at sizes that take minutes
    model: str = str(POCKET)  # a folder, or a hub id
    revision: str = ""  # of the hub's model; "" for its newest
    offline: bool = False
    device: str = "cpu"
    dtype: str = "stored"  # that the frozen weights are kept in: the type of their file, or another
    compute_dtype: str = ""  # of activations and products; "" for float32, on a GPU bfloat16 unless dtype is float32
    compile: bool = False  # blocks and loss as torch's compiler makes them
    seed: int = 0
    budget: int = BUDGET  # FLOPs

    # the data as text
    data: str = ""  # an HDF5, CSV or Parquet file; "" for the data set rebuilt by its law
    id_column: str = ""  # of a table: see `frames.series_of`, as for the next four
    time_column: str = ""
    target: tuple[str, ...] = ()
    wide: bool = False
    fill: str = ""
    beyond: str = "refuse"  # of BEYOND: a table's value that is wider than `task.WIDEST` digits before the point
    split: str = "in order"  # of SPLITS: whole series, or each by time into its first, next and last part
    split_seed: int = 0
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)  # of the systems: training, validation, test
    scaling: str = "training maximum"  # of SCALINGS: what series are divided by
    alpha: float = 0.0  # series are divided by this instead, unless it is 0
    decimals: int = 2
    trailing_zeros: bool = True  # False: as Python's str(), so that the width of a number varies
    point: bool = True  # False: the last digits are the decimals
    separator: str = ""  # between the digits of a number, the point among them: of SEPARATORS

    # windows and the loss
    windows: str = "strided"  # of WINDOWS: where those of training begin
    stride: float = 1.0  # between strided training windows: tokens, or a part of the window if at most 1
    pad_side: str = "right"
    count_padding: bool = False  # padding as tokens to be predicted
    vocabulary: str = "full"  # what the loss's softmax runs over: "symbols" is the text's own alone, another loss
    digit_weights: tuple[float, ...] = ()  # of digits in the training loss: whole, of each decimal, of the rest
    number_loss: float = 0.0  # times the mean distance of the digits' probabilities from the true digit: added to it

    # a training run, and the grid
    preset: str = ""  # learning rates by name, where lr is empty; "" for the model's own
    lr: tuple[float, ...] = ()
    ranks: tuple[int, ...] = (2, 4, 8)
    skip: tuple[str, ...] = ()  # cells of the grid that are left out, by name
    over: tuple[str, ...] = ()  # NAME=VALUE|VALUE: the grid has a cell for each value of another setting too
    seeds: int = 1  # the grid trains every cell with so many, from `seed` on, and goes by their mean
    rungs: tuple[int, ...] = ()  # steps after which the grid's worst cells go no further; the last is `steps`
    survivors: float = 1 / 3  # part of the cells that goes on after a rung
    steps: int = 30
    batch_size: int = 2
    context: int = 999  # tokens of a training window; so many are to be predicted of 100 steps of 10
    targets: tuple[str, ...] = ("all-linear",)  # linear layers that LoRA adapts, or their names
    lora_alpha: float = 0.0  # the update is scaled by lora_alpha / rank; 0 for the rank, so by 1
    rank_stabilised: bool = False  # by lora_alpha / sqrt(rank) (Kalajdzievski 2023)
    dropout: float = 0.0  # on LoRA's input
    scratch: str = ""  # of SCRATCH: train all of a model from random weights instead of LoRA
    schedule: str = "constant"  # of SCHEDULES: the learning rate after the warm-up
    warmup: float = 0.0  # steps in which it rises, or a part of the run's below 1
    decay: float = 0.2  # last steps, or a part of the run's, in which warmup-stable-decay falls
    final_lr: float = 0.0  # what it falls to, as a part of the learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    weight_decay: float = 0.0  # of AdamW, times the learning rate
    clip: float = 0.0  # the longest gradient, by its norm over all LoRA matrices; 0 for any
    logit_bias: bool = False  # train a bias on the logits too
    val_every: int = 15  # steps between validations; 0 for one after training
    checkpoint_every: int = 100  # steps between checkpoints, besides those of the validations
    keep: str = "last"  # the adapter of the last validation, of the "best" by its loss, or by the "horizon" error
    keep_series: int = 4  # series of the validation part whose horizon error that is; 0 for all
    patience: int = 0  # a run stops after so many validations in a row without a lower loss; 0: it never does
    val_series: int = 20  # series of the validation part whose loss is taken; 0 for all

    # the other stages of a study
    default_lr: float = 0.0  # of the run before the grid; 0 for the least learning rate
    default_rank: int = 4
    default_steps: int = 30
    contexts: tuple[int, ...] = (128, 512, 999)
    context_steps: int = 30
    final_steps: int = 60
    best_lr: float = 0.0  # what the context sweep and the final run take; 0 for the grid's best
    best_rank: int = 0
    best_context: int = 0  # what the final run takes; 0 for the sweep's best
    control_lr: float = 1e-3  # of the models from random weights that a study's --controls trains

    # forecasts
    points: int = 80  # of a series that a forecast sees
    horizon: int = 20  # points that it forecasts
    origins: int = 1  # cut-offs of a series that forecasts start at, evenly spaced; see `Task.origins`
    origin_step: int = 0  # points between those of a table, counted back from its end; 0 for the horizon
    forecast_series: int = 20  # of a part that are forecast; 0 for all
    forecast_cells: bool = True  # forecast with each cell and context too; of a protocol's, the shown series alone
    shown: tuple[int, ...] = ()  # systems drawn one by one; none for the first of each class
    shown_series: int = 0  # or so many of the validation part's first
    constrained: bool = True  # only text that is a valid encoding
    num_samples: int = 1  # continuations of a series; with more than one the forecast is their `point_forecast`
    point_forecast: str = "median"  # of POINT_FORECASTS: of the samples that parse, at each step
    temperature: float = 0.0  # 0 is greedy; several samples are drawn at 1 unless this is set
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    shortened: float = 1.0  # part of the steps and series that a study was cut to

    def __post_init__(self) -> None:
        for names, holds, expected in _RULES:
            for name in names.split():
                _require(holds(getattr(self, name)), name, getattr(self, name), expected)
        _require(self.trailing_zeros or self.decimals > 0, "decimals", 0, "at least 1 without trailing zeros")
        _require(self.trailing_zeros or self.point, "point", False, "true where trailing_zeros is false")
        never = self.patience and not self.val_every
        _require(not never, "patience", self.patience, "0 where no validation comes before the last, as val_every is 0")
        both = self.patience and self.rungs
        _require(not both, "patience", self.patience, "0 with rungs, which end runs themselves")
        _require(self.seeds == 1 or not self.rungs, "seeds", self.seeds, "1 with rungs, where most cells never end")
        by_loss = not self.rungs or self.keep != "horizon"
        _require(by_loss, "keep", self.keep, "last or best with rungs, judged by their loss")
        last = self.rungs[-1] if self.rungs else self.steps
        _require(self.steps == last, "steps", self.steps, f"{last}, the last of rungs")
        schedule.check(self.schedule, self.steps, self.warmup, self.decay)
        symbols_alone = self.vocabulary == "symbols" and self.count_padding
        _require(not symbols_alone, "vocabulary", "symbols", "full where padding counts, which is no symbol")

    def check_device(self) -> None:
        """Raise ValueError if the device is not here, or nothing can be compiled for it where that was asked for.

        No check of a field: a run's `config.toml` is read anywhere.
        """
        number, there = int(self.device.partition(":")[2] or 0), torch.cuda.device_count()
        found = f"or one of the {there} CUDA devices here" if there else "as torch finds no CUDA device here"
        _require(self.device == "cpu" or number < there, "device", self.device, f"cpu, {found}")
        if self.compile:
            compiled.check(self.device)

    @property
    def is_pocket(self) -> bool:
        """Whether the model is the pocket model, whose every figure is a toy's."""
        return Path(self.model).resolve() == POCKET.resolve()

    @property
    def label(self) -> str:
        """What stands over every table and figure of the run."""
        toy = "toy: the pocket model" if self.is_pocket else ""
        another = "another loss: over the text's symbols alone" if self.vocabulary == "symbols" else ""
        return "; ".join(filter(None, (toy, another)))

    @property
    def preset_name(self) -> str:
        """The preset that holds where no learning rates are given: the one asked for, or the model's own."""
        return self.preset or ("pocket" if self.is_pocket else "reports")

    @property
    def learning_rates(self) -> tuple[float, ...]:
        return self.lr or PRESETS[self.preset_name]

    @property
    def kept_in(self) -> torch.dtype | None:
        """The type of the frozen weights; None for that of their file."""
        return TYPES.get(self.dtype)

    @property
    def computed_in(self) -> torch.dtype:
        """The type of activations and products. Few CPUs are fast at any but float32."""
        usual = torch.float32 if self.device == "cpu" or self.dtype == "float32" else torch.bfloat16
        return TYPES.get(self.compute_dtype, usual)

    @property
    def at_most(self) -> str:
        """What stands before the price of a run that may need less: it, or text that it forecasts, may end early."""
        return "at most " if self.patience or self.keep == "horizon" else ""

    @property
    def judged(self) -> str:
        """How forecasts are made, in words."""
        if self.num_samples == 1 and not self.temperature:
            how = "greedy"
        else:
            how = f"temperature {self.sampling_temperature:g}"
            how += f", top_k {self.top_k}" if self.top_k else ""
            how += f", top_p {self.top_p:g}" if self.top_p < 1 else ""
        how += f", repetition penalty {self.repetition_penalty:g}" if self.repetition_penalty != 1 else ""
        how += f", the {self.point_forecast} of {self.num_samples} samples" if self.num_samples > 1 else ""
        return how + (", constrained to valid text" if self.constrained else "")

    @property
    def sampling_temperature(self) -> float:
        """The temperature that tokens are drawn at: several greedy samples would all be the same."""
        return self.temperature or (1.0 if self.num_samples > 1 else 0.0)

    @property
    def default_rate(self) -> float:
        """The learning rate of the run before the grid."""
        return self.default_lr or min(self.learning_rates)

    def trained(self, rank: int) -> dict[str, Any]:
        """What a run of this rank trains, as `predict` takes it: nothing where the rank is 0."""
        adapted = rank and not self.scratch
        return {"rank": rank, "targets": self.targets, "logit_bias": self.logit_bias} if adapted else {}

    def alpha_of(self, rank: int) -> float:
        """LoRA's alpha where the update is scaled by alpha / rank."""
        return (self.lora_alpha or rank) * (math.sqrt(rank) if self.rank_stabilised else 1)

    def rate(self, lr: float, step: int) -> float:
        """The learning rate of the update after `step` others, where its largest is `lr`."""
        return lr * schedule.factor(self.schedule, step, self.steps, self.warmup, self.decay, self.final_lr)

    def series_of(self, part: int, wanted: int) -> int:
        """How many of a part's series are used where `wanted` are asked for (0 for all) and the study is shortened."""
        whole = min(wanted or part, part)
        return min(whole, max(FEWEST_SERIES, round(whole * self.shortened)))

    def shorten(self, fraction: float) -> "Settings":
        """The same study in little: every stage's steps times `fraction`, at least one; series as `series_of` says.

        Validations keep their distance in proportion, but no run has more than `MOST_VALIDATIONS`: with the fewest
        series that still tell something, each costs as much as many of so few steps.
        """
        _require(0 < fraction <= 1, "scale", fraction, "more than 0, at most 1")
        stages = ("steps", "default_steps", "context_steps", "final_steps")
        fewer = {name: max(1, round(getattr(self, name) * fraction)) for name in stages}
        if self.val_every:
            longest = max(fewer.values())
            fewer["val_every"] = max(round(self.val_every * fraction), math.ceil(longest / MOST_VALIDATIONS))
        rungs = tuple(max(1, round(rung * fraction)) for rung in self.rungs)
        return dataclasses.replace(self, **fewer, rungs=rungs, shortened=self.shortened * fraction)

    def updated(self, changes: dict[str, Any]) -> "Settings":
        """A copy with `changes`; a name that is unknown or a value of the wrong kind is refused by name.

        Rungs without steps set the steps to the last of them.
        """
        kinds = {f.name: f.type for f in dataclasses.fields(self)}
        for name in changes:
            if name not in kinds:
                raise ValueError(f"{name!r:.60} is no setting: expected one of {', '.join(kinds)}")
        converted = {n: _converted(n, kinds[n], v) for n, v in changes.items()}
        if converted.get("rungs"):
            converted.setdefault("steps", converted["rungs"][-1])
        return dataclasses.replace(self, **converted)

    @classmethod
    def from_toml(cls, path: str | Path, base: "Settings | None" = None) -> "Settings":
        """Settings with what a TOML file says, such as a run's `config.toml`; the rest is `base`'s or the default.

        Errors start with the file's name.
        """
        try:
            return (base or cls()).updated(read_toml(path))
        except ValueError as e:
            raise ValueError(e if str(e).startswith(f"{path}: ") else f"{path}: {e}") from None

    def to_toml(self) -> str:
        """The settings as TOML, every one of them; `from_toml` reads it back equal."""
        return "".join(f"{f.name} = {_toml(getattr(self, f.name))}\n" for f in dataclasses.fields(self))


_LARGEST = 2**20  # far above what any run needs: a damaged file must not ask for all memory
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("steps default_steps context_steps final_steps points horizon origins", lambda v: v >= 1, "at least 1"),
    ("checkpoint_every default_rank", lambda v: v >= 1, "at least 1"),
    ("val_every val_series forecast_series shown_series keep_series patience", lambda v: v >= 0, "0 or more"),
    ("best_rank best_context top_k origin_step", lambda v: v >= 0, "0 or more"),
    ("alpha temperature lora_alpha warmup decay", lambda v: 0 <= v < math.inf, "0 or more"),
    ("weight_decay clip number_loss", lambda v: 0 <= v < math.inf, "0 or more"),
    ("budget", lambda v: 1 <= v < 2**63, "at least 1, less than 2^63"),
    ("seeds", lambda v: 1 <= v <= 1000, "1 to 1000"),
    ("batch_size", lambda v: 1 <= v <= _LARGEST, f"1 to {_LARGEST}"),
    ("num_samples", lambda v: 1 <= v <= 10_000, "1 to 10000"),
    ("context", lambda v: 2 <= v <= _LARGEST, f"2 to {_LARGEST} tokens"),
    ("contexts", lambda v: bool(v) and all(2 <= one <= _LARGEST for one in v), f"2 to {_LARGEST} tokens each"),
    ("ranks", lambda v: bool(v) and all(1 <= one <= 4096 for one in v), "whole numbers from 1 to 4096"),
    ("lr", lambda v: all(0 < one < 10 for one in v), "positive numbers below 10"),
    ("control_lr", lambda v: 0 < v < 10, "a positive number below 10"),
    ("default_lr best_lr", lambda v: 0 <= v < 10, "0, or a positive number below 10"),
    ("rungs", lambda v: all(one < other for one, other in pairwise((0, *v))), "growing numbers of steps, from 1"),
    ("survivors", lambda v: 0 < v < 1, "a part of the cells, more than 0 and less than 1"),
    ("lr ranks contexts shown targets target", lambda v: len(set(v)) == len(v), "each once"),
    ("preset", lambda v: v in ("", *PRESETS), f"one of {', '.join(PRESETS)}"),
    ("split", SPLITS.__contains__, f"one of {', '.join(SPLITS)}"),
    ("fill", FILLS.__contains__, f"one of {', '.join(FILLS[1:])}"),
    ("beyond", BEYOND.__contains__, f"one of {', '.join(BEYOND)}"),
    ("scaling", SCALINGS.__contains__, f"one of {', '.join(SCALINGS)}"),
    ("windows", WINDOWS.__contains__, f"one of {', '.join(WINDOWS)}"),
    ("pad_side", ("right", "left").__contains__, "one of right, left"),
    ("dtype", ("stored", *TYPES).__contains__, f"one of stored, {', '.join(TYPES)}"),
    ("compute_dtype", ("", *TYPES).__contains__, f"one of {', '.join(TYPES)}"),
    ("vocabulary", ("full", "symbols").__contains__, "one of full, symbols"),
    ("stride", lambda v: 0 < v <= 1 or (v > 1 and v % 1 == 0), "a part of the window up to 1, or whole tokens"),
    ("fractions", lambda v: len(v) == 3 and min(v) > 0 and math.isclose(sum(v), 1), "three positive numbers of sum 1"),
    ("decimals", lambda v: 0 <= v <= 6, "0 to 6"),
    ("separator", SEPARATORS.__contains__, f"one of {', '.join(map(repr, SEPARATORS))}"),
    ("targets", lambda v: bool(v) and all(v), "names of linear layers"),
    ("schedule", schedule.SCHEDULES.__contains__, f"one of {', '.join(schedule.SCHEDULES)}"),
    ("scratch", SCRATCH.__contains__, "same, small, or nothing"),
    ("point_forecast", POINT_FORECASTS.__contains__, f"one of {', '.join(POINT_FORECASTS)}"),
    ("keep", ("last", "best", "horizon").__contains__, "one of last, best, horizon"),
    ("final_lr", lambda v: 0 <= v <= 1, "0 to 1, a part of the learning rate"),
    ("digit_weights", lambda v: all(0 <= one < math.inf for one in v), "numbers of 0 or more, not all 0"),
    ("digit_weights", lambda v: not v or any(v), "numbers of 0 or more, not all 0"),
    ("betas", lambda v: len(v) == 2 and all(0 <= one < 1 for one in v), "two numbers of at least 0, less than 1"),
    ("dropout", lambda v: 0 <= v < 1, "at least 0, less than 1"),
    ("top_p shortened", lambda v: 0 < v <= 1, "more than 0, at most 1"),
    ("repetition_penalty", lambda v: 0 < v < math.inf, "a positive number"),
    ("seed split_seed", lambda v: 0 <= v < 2**32, "0 to 2^32 - 1"),
    ("device", lambda v: bool(re.fullmatch(r"cpu|cuda(:\d{1,3})?", v)), "cpu or cuda"),
)
"""Fields, what holds of the value of each, and that in words."""


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        shown = list(value) if isinstance(value, tuple) else value
        raise ValueError(f"{name} is {shown!r:.200}: expected {expected}")


def _converted(name: str, kind: Any, value: Any) -> Any:
    """`value` as the field's type: a list becomes a tuple, a whole number may stand for a float."""
    if isinstance(value, int) and not abs(value) < 2**63:  # which a hexadecimal one in TOML can pass by far
        raise ValueError(f"{name} is beyond 2^63: expected a smaller number")
    if get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_converted(name, get_args(kind)[0], v) for v in value)
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:
        return os.path.expanduser(value) if name in ("model", "data") else value
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, "a list")
    raise ValueError(f"{name} is {value!r:.200}: expected {wanted}")


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        # TOML's basic string: the escapes it shares with JSON, written out
        return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or c in '"\\\x7f' else c for c in value) + '"'
    return str(value).lower() if isinstance(value, bool) else repr(value)
