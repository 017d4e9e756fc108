"""Measurements to a line of the table: medians and their spread, whether both sides computed the same, the targets."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safetensors.torch import load_file

from experiments.bench.cases import Case
from experiments.run_folder.errors import RunFailed

Run = Mapping[str, Any]  # what `sides.run` returns
Parting = tuple[int, tuple[int, ...], int, int]
"""Where two sides' tokens part: the row, its tokens so far, and the next on either side."""
Gaps = Callable[[Sequence[Parting]], Sequence[float]]
"""How far apart the peer's logits of the two tokens are, at each parting."""

# By the type of products: how far, relative to the value, the two losses may be apart, and a tensor and its pair. The
# project's bfloat16 is that of a GPU, where tokens that are chosen at a tie may differ: there they are not compared.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 1e-1)}
TIE = 2e-4  # of two logits: about twice what float32 leaves of each (4e-5 and 2e-5 of the 0.5B model's, measured)
ONE_TENSOR = 100  # times further apart may a single tensor be, which can be small beside its own rounding


def judge(case: Case, runs: Mapping[str, Sequence[Run]], compute: str, gaps: Gaps | None = None) -> dict[str, Any]:
    """One case as `bench.json` has it, but for what `against` adds.

    Args:
        runs: of "ours", and of "peer" if it was measured.
        compute: the type of products, a key of `TOLERANCES`.
        gaps: asked where tokens differ: a tie of two logits is no difference. None lets nothing pass.

    Raises:
        RunFailed: the two sides did not compute the same; the message names the case.
    """
    ours = _side(case, runs["ours"])
    line: dict[str, Any] = {"what": case.what, "name": case.name, "unit": case.unit, "note": case.note, "ours": ours}
    if runs.get("peer"):
        peer = _side(case, runs["peer"])
        line |= {"peer": peer} | agreement(case, runs["ours"], runs["peer"], compute, gaps)
        line["ratio"] = peer["seconds"] / ours["seconds"]
        line["memory_ratio"] = peer["peak_bytes"] / ours["peak_bytes"]
    return line


def against(case: Case, line: Mapping[str, Any], floor: float | None, targets: bool = True) -> dict[str, Any]:
    """The line with its share of the floor, in seconds (None: it has none), and whether each target was met.

    Args:
        targets: whether those of the case were set for this model and machine.
    """
    whole = dict(line)
    if floor is not None:
        whole |= {"floor_seconds": floor, "share": floor / line["ours"]["seconds"]}
    measures = line["ours"] | whole
    whole["targets"] = [
        {"target": str(target), "value": measures[target.measure], "met": target.met(measures[target.measure])}
        for target in case.targets
        if targets and target.measure in measures
    ]
    return whole


def agreement(
    case: Case, ours: Sequence[Run], peer: Sequence[Run], compute: str, gaps: Gaps | None = None
) -> dict[str, Any]:
    """How far apart the two computed, over all runs: `loss_error`, `gradient_error`, and both in words, `same`.

    Raises:
        RunFailed: further than `TOLERANCES`, other tokens, or a gradient that is zero.
    """
    loss_tolerance, tolerance = TOLERANCES[compute]
    found: dict[str, Any] = {}
    said = []
    losses = [[run["found"]["loss"] for run in side if "loss" in run["found"]] for side in (ours, peer)]
    if all(losses):
        error = max(abs(a - b) / abs(b) for a in losses[0] for b in losses[1])
        if not error <= loss_tolerance or not all(map(math.isfinite, losses[0] + losses[1])):
            raise _differ(case, f"the losses are {losses[0][0]} and {losses[1][0]}", f"equal to {loss_tolerance:g}")
        found["loss_error"] = error
        said.append(f"loss to {error:.0e}")
    if all("arrays" in run for run in (*ours, *peer)):
        what = "gradient" if case.what == "train" else "logits"
        pairs = zip(ours, peer, strict=False)
        found[f"{what}_error"] = max(_apart(case, what, a["arrays"], b["arrays"], tolerance) for a, b in pairs)
        said.append(f"{what} to {found[f'{what}_error']:.0e}")
    if compute == "float32":
        runs = (*ours, *peer)
        if tokens := [run["found"]["tokens"] for run in runs if "tokens" in run["found"]]:
            said.append(_tokens(case, tokens, gaps))
        if values := [run["found"]["values"] for run in runs if "values" in run["found"]]:
            if any(other != values[0] for other in values):
                raise _differ(case, "the forecasts differ", "the same from both sides")
            said.append(f"{sum(map(len, values[0]))} steps equal")
    return found | {"same": ", ".join(said) or "not compared"}


def _tokens(case: Case, results: Sequence[list[list[int]]], gaps: Gaps | None) -> str:
    """That the tokens of all runs are equal, but for rows that part where the two likeliest tokens tie, in words."""
    *others, peer = results
    partings: set[Parting] = set()
    for tokens in others:
        for row, (a, b) in enumerate(zip(tokens, peer, strict=True)):
            place = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
            if place is not None:
                partings.add((row, tuple(b[:place]), a[place], b[place]))
    total = sum(map(len, peer))
    if not partings:
        return f"{total} tokens equal"
    widest = max(gaps(sorted(partings))) if gaps else math.inf
    if not widest <= TIE:
        row, before, mine, theirs = min(partings, key=lambda parting: len(parting[1]))
        where = f"token {len(before) + 1} of row {row} is {mine} and {theirs}"
        problem = f"the greedy tokens differ: {where}, with logits up to {widest:.1e} apart"
        raise _differ(case, problem, "the same from both sides, but for ties")
    rows = len({p[0] for p in partings})
    return f"{total} tokens equal, but for {rows} rows that diverge at a tie (within {widest:.0e})"


def _apart(case: Case, what: str, ours: str, peer: str, tolerance: float) -> float:
    """The norm of the difference of all tensors of two files over the norm of the peer's."""
    mine, theirs = load_file(ours), load_file(peer)
    if mine.keys() != theirs.keys():
        odd = sorted(mine.keys() ^ theirs.keys())[0]
        raise _differ(case, f"the {what} has {odd} on one side alone", "the same tensors")
    differences, norms = [], []
    for name, tensor in theirs.items():
        norms.append(tensor.double().norm().item())
        differences.append((mine[name].double() - tensor.double()).norm().item())
        if not (norms[-1] > 0 and mine[name].norm() > 0):
            raise _differ(case, f"the {what} {name} is zero", "one that is not")
        if not differences[-1] <= ONE_TENSOR * tolerance * norms[-1]:
            error = differences[-1] / norms[-1]
            raise _differ(case, f"the {what} {name} is {error:.1e} apart", f"{ONE_TENSOR * tolerance:g} at most")
    error = math.hypot(*differences) / math.hypot(*norms)
    if not error <= tolerance:
        raise _differ(case, f"the {what} is {error:.1e} apart", f"{tolerance:g} at most")
    return error


def _differ(case: Case, problem: str, expected: str) -> RunFailed:
    return RunFailed(f"bench: {case.name}: {problem}: expected {expected}")


def _side(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    """All runs of one side."""
    side: dict[str, Any] = {name: max(run[name] for run in runs) for name in ("peak_bytes", "baseline_bytes")}
    side["added_bytes"] = max(run["peak_bytes"] - run["baseline_bytes"] for run in runs)
    if all("device_peak_bytes" in run for run in runs):
        side["device_peak_bytes"] = max(run["device_peak_bytes"] for run in runs)
    side |= _median("seconds", [s for run in runs for s in run["seconds"]])
    if all("whole" in run for run in runs):
        side |= _median("whole_seconds", [s for run in runs for s in run["whole"]])
    if case.unit == "tokens/s":
        rows, new = case.job["batch"], case.job["new"]
        side["tokens_per_second"] = rows * (new - 1) / side["seconds"]
        side["whole_tokens_per_second"] = rows * new / side["whole_seconds"]
        forwards = [run["found"]["forwards"] for run in runs if run["found"].get("forwards")]
        if forwards:
            side["tokens_per_forward"] = (new - 1) / statistics.median(forwards)
    if case.unit == "%":
        least, most = zip(*(run["overhead_spread"] for run in runs), strict=True)
        side["overhead"] = statistics.median(run["overhead"] for run in runs)
        side["overhead_spread"] = [min(least), max(most)]
    return side


def _median(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {name: statistics.median(values), f"{name}_spread": [min(values), max(values)]}


def calibrated(runs: Sequence[Run]) -> dict[str, Any]:
    """The best rates of all calibrations of a run, which no floor can beat, and how far apart they were."""
    best: dict[str, Any] = {"runs": [dict(run) for run in runs]}
    for rate in ("flops_per_second", "bytes_per_second"):
        values = [run[rate] for run in runs]
        best |= _median(rate, values) | {rate: max(values)}
    return best
