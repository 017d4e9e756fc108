"""The `verify` verb: a model of ours beside the peer's, activation by activation, and what follows from them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from experiments.parity.defects import DEFECTS, planted
from experiments.run_folder.table import aligned
from lora import load_adapter, save_adapter
from qwen_min import Qwen, Tokenizer
from qwen_min.tokenizer import SYSTEM

if TYPE_CHECKING:
    from experiments.parity.peer import Peer

PEERS = ("transformers",)


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    against: of `PEERS`. prompt: what both read. generate: greedy tokens after it. gradients: of its loss, too; with an
    adapter of that alone. adapter: a folder, for both. exact: a float64 reference as well. defect: of
    `defects.DEFECTS`, planted into ours. tolerance: the most that a value of ours may be off, as a part of the largest
    value of the peer's tensor; ten times as much in a gradient.

    The default tolerance is float32's: 1e-6 is usual, and in the first layer of the 0.5B model, whose scores reach
    1,500, attention is off by 1e-5, and either side by twice that from float64. Gradients are off by up to
    2e-4: the fast loss takes the target's row of the head from the softmax's mean of all, almost equal where a token
    is almost certain; those of the plain maths are off by 1e-6 (measured).

    Raises:
        ValueError: a value is out of its range, or the peer is not installed.
    """

    prompt: str = "1.00,0.50;1.20,0.60;1.40,0.75;1.60,0.95;"
    against: str = "transformers"
    generate: int = 20
    gradients: bool = False
    adapter: Path | None = None
    exact: bool = False
    defect: str | None = None
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if self.against not in PEERS:
            raise ValueError(f"--against is {self.against!r}: expected {' or '.join(PEERS)}")
        if self.defect is not None and self.defect not in DEFECTS:
            raise ValueError(f"--break is {self.defect!r}: expected one of {', '.join(DEFECTS)}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"--tolerance is {self.tolerance}: expected more than 0, less than 1")
        if self.generate < 0:
            raise ValueError(f"--generate is {self.generate}: expected 0 or more")
        lacking = [name for name in ("transformers", *["peft"] * bool(self.adapter)) if not find_spec(name)]
        if lacking:
            wrong = f"verify needs {' and '.join(lacking)}, not installed here"
            raise ValueError(f"{wrong}: expected pip install '.[test]'")


class Row(NamedTuple):
    """One tensor of ours beside the peer's: the largest value of the peer's, the largest difference, also as a part of
    that value; and, as such a part, how far ours and the peer's are from float64, if that was asked for."""

    name: str
    shape: str
    largest: float
    difference: float
    relative: float
    ours: float | None = None
    peer: float | None = None


class Check(NamedTuple):
    """One thing that must hold, and what was seen."""

    passed: bool
    text: str


class Report(NamedTuple):
    rows: list[Row]
    first: Row | None  # the first beyond the tolerance
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify(folder: Path, options: Options) -> Report:
    """Compare. Raises ValueError for a folder, adapter or prompt that cannot be read."""
    tokenizer = Tokenizer(folder / "tokenizer.json")
    ours = Qwen.from_pretrained(folder)
    tokenizer.check_fits(ours.config.vocab_size)
    numbers = tokenizer.encode(options.prompt)
    if len(numbers) < 2:
        raise ValueError(f"--prompt is {options.prompt!r}: expected text of at least two tokens")
    if options.adapter is not None and load_adapter(ours, options.adapter).logit_bias is not None:
        wrong = "has a logit bias, which PEFT knows nothing of"
        raise ValueError(f"{options.adapter}: {wrong}: expected an adapter without")
    ids = torch.tensor([numbers])
    ours.model.check(len(numbers) + options.generate)
    from experiments.parity.peer import Peer  # its libraries take seconds to load

    peer = Peer(folder, options.adapter)
    with planted(options.defect, ours):
        found, theirs = ours.trace(ids), peer.trace(ids)
        checks = list(_checks(ours, peer, tokenizer, ids, options, folder))
    exact = peer.exact_trace(ids) if options.exact else {}
    rows = []
    for name, mine, letters in found:
        shape = " ".join(f"{letter}={size}" for letter, size in zip(letters.split(), mine.shape, strict=True))
        away = [_apart(side, exact[name])[2] for side in (mine, theirs[name])] if exact else []
        rows.append(Row(name, shape, *_apart(mine, theirs[name]), *away))
    first, check = _judged("activations", rows, options.tolerance)
    return Report(rows, first, [check, *checks])


def _checks(
    ours: Qwen, peer: "Peer", tokenizer: Tokenizer, ids: Tensor, options: Options, folder: Path
) -> Iterator[Check]:
    """All but the activations."""
    numbers, other = ids[0].tolist(), peer.tokens(options.prompt)
    yield Check(numbers == other, f"{len(numbers)} token ids" + _unlike(numbers, other))
    text = [("system", SYSTEM), ("user", options.prompt)]
    template = peer.chat(text)
    if template is not None:
        yield Check(Tokenizer.chat(text) == template, "chat template" + _unlike(Tokenizer.chat(text), template))
    if options.generate:
        made: Any = ours.generate(ids, options.generate, stop=())
        tokens, expected = made[0].tolist(), peer.generate(ids, options.generate)[0].tolist()
        yield Check(tokens == expected, f"{options.generate} greedy tokens" + _unlike(tokens, expected))
    if options.gradients:
        total, count = ours.loss(ids[:, :-1], ids[:, 1:])
        (total / count).backward()
        mine = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
        ours.zero_grad()
        yield _judged("gradients", _rows(mine, peer.gradients(ids)), 10 * options.tolerance)[1]
    if options.adapter is not None:
        yield from _adapters(ours, peer, ids, options, folder)


def _adapters(ours: Qwen, peer: "Peer", ids: Tensor, options: Options, folder: Path) -> Iterator[Check]:
    """What each side wrote, read by the other, against what the other computed with the adapter itself."""
    with TemporaryDirectory() as place, torch.no_grad():
        by_peft, by_us = Path(place) / "peft", Path(place) / "ours"
        peer.save_adapter(by_peft)
        save_adapter(ours, by_us)
        again = load_adapter(Qwen.from_pretrained(folder), by_peft)
        rows = _rows({"logits": again(ids)}, {"logits": ours(ids)})
        yield _judged("PEFT's adapter read here: logits", rows, options.tolerance)[1]
        before = peer.logits(ids)
        peer.read_adapter(by_us)
        rows = _rows({"logits": peer.logits(ids)}, {"logits": before})
        yield _judged("our adapter read by PEFT: logits", rows, options.tolerance)[1]


def _rows(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[Row]:
    """Of tensors by name; one that a side lacks is infinitely far away."""
    apart = {name: _apart(ours[name], theirs[name]) for name in ours.keys() & theirs.keys()}
    names = [*theirs, *(name for name in ours if name not in theirs)]
    return [Row(name, "", *apart.get(name, (float("nan"),) * 3)) for name in names]


def _apart(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """The largest value of b, the largest difference of a from it, and that as a part of the value."""
    largest, difference = b.abs().max().item(), (a - b).abs_().max().item()
    return largest, difference, difference / largest if largest else difference and float("inf")


def _judged(what: str, rows: Iterable[Row], tolerance: float) -> tuple[Row | None, Check]:
    """The first row beyond the tolerance, which a NaN is too, and the verdict."""
    rows = list(rows)
    first = next((row for row in rows if not row.relative <= tolerance), None)
    if first is not None:
        return first, Check(False, f"{what}: beyond {tolerance:g} first at {first.name} ({first.relative:.1e})")
    most = max(rows, key=lambda row: row.relative)
    farthest = f"the farthest {most.name} ({most.relative:.1e})"
    return None, Check(True, f"{what}: {len(rows)} within {tolerance:g}, {farthest}")


def _unlike(ours, theirs) -> str:
    """Where two sequences part, in words."""
    if ours == theirs:
        return " equal"
    pairs = zip(ours, theirs, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return f" differ from place {place} on: ours {ours[place : place + 5]!r}, the peer's {theirs[place : place + 5]!r}"


def text(report: Report) -> str:
    """The table of activations, a line for each check, and PASS or FAIL."""
    exact = report.rows[0].ours is not None
    head = ["activation", "shape", "largest", "difference", "relative", *["ours to float64", "peer to float64"] * exact]
    table = [[*head, ""]]
    for row in report.rows:
        figures = [f"{number:.1e}" for number in row[2:] if number is not None]
        table.append([row.name, row.shape, *figures, "<- first beyond the tolerance" if row is report.first else ""])
    lines = [*aligned(table, left=2), ""]
    lines += [f"{'PASS' if check.passed else 'FAIL'}  {check.text}" for check in report.checks]
    return "\n".join([*lines, "PASS" if report.passed else "FAIL"])
