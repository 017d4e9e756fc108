"""What three reports say that they spent, what their own formulas give, and what the same plans cost exactly.

The reports print their formulas in part only; here they stand as they were used, so that every total comes out again
to 1 % and each mistake has a size. The exact count is the model's own meter, which knows nothing of these formulas.
Letters: B batch, T tokens, E hidden, H heads, D head size, F feed-forward, V vocabulary, L layers.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, Literal

from experiments.accounting.ledger import BUDGET
from experiments.accounting.predict import generation, predict
from qwen_min import FlopMeter, QwenConfig

CONFIG = QwenConfig.named("Qwen2.5-0.5B")
L, E, F, V = CONFIG.num_hidden_layers, CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.vocab_size
H, D = CONFIG.num_attention_heads, CONFIG.hidden_size // CONFIG.num_attention_heads
B = 4

Name = Literal["baseline", "default", "grid", "context", "final", "other"]
Part = Literal["training", "validation", "inference", "total"]
PARTS: tuple[Part, ...] = ("training", "validation", "inference", "total")
Flops = dict[str, int]  # by part of the work, or by part of the architecture under the meter's names

DRAFTS: dict[str, dict[int, str]] = {
    "fung": {
        1: "The first draft trains 4,000 steps by default and 16,000 at the end, and drops q and v where LoRA is on.",
        2: "The second draft trains 3,000 steps by default and 15,000 at the end, and counts q and v again.",
    },
    "liu": {1: "There is one draft, which gives powers of ten to two decimals, of training alone."},
    "rai": {
        1: "The first draft trains 6,000 steps at the end, 62 % of the budget, and has no table of all that was spent.",
        2: "The second draft trains 5,000 steps at the end; its text still says 62 %, its table 51.90 % and 5.17e16.",
    },
}
"""What the drafts of each report say of the plan. The last one counts."""


@dataclass(frozen=True)
class Stage:
    """A number of FLOPs that a report has, or lacks.

    label: the report's own name of the row. claimed: as printed, None where it says nothing. reproduced: by its own
    formulas, None where they leave this out. exact: this project's `coursework` count of the same plan.
    """

    stage: Name
    part: Part
    label: str
    claimed: int | None
    reproduced: int | None
    exact: int | None
    note: str = ""


# Their formulas: a forward of one series, by part of the architecture.


def product(m: int, n: int, p: int) -> int:
    """(m, n) @ (n, p): m·p·(2n-1). All three have this one."""
    return m * p * (2 * n - 1)


def forward(T: int, layer: Flops) -> Flops:
    """L layers, and what all three count alike: the adding of positions, and the head."""
    return {"positions": T * E, "head": product(T, E, V)} | {name: L * flops for name, flops in layer.items()}


def adapter(T: int, rank: int) -> int:
    """LoRA of one projection with its scale and its sum: Liu and Rai."""
    return product(T, E, rank) + product(T, rank, E) + 2 * T * E if rank else 0


def fung(T: int, rank: int, draft: int = 2) -> Flops:
    """Fung, sections 2.1.1 to 2.1.7 of the second draft, table 2 of the first."""
    projection = product(T, E, E) + T * E
    adapted = 0 if rank and draft == 1 else projection
    lora = 2 * rank * E * E if draft == 1 else H * 2 * rank * D * D
    layer = {"norm": 2 * E * (5 * T + 10), "q": adapted, "k": projection, "v": adapted, "lora": 2 * lora}
    layer |= {"scores": H * product(T, D, T), "softmax": H * T * (12 * T - 1), "values": H * product(T, T, D)}
    layer |= {"output": product(T, D, E), "gate": product(T, E, F), "up": product(T, E, F)}
    return forward(T, layer | {"silu": 15 * T * F, "down": product(T, F, E)})


def liu(T: int, rank: int) -> Flops:
    """Liu, section 4.3; what it leaves to its script follows from the printed powers of ten."""
    square, wide = product(T, E, E), 4 * E
    layer = {"norm": 2 * T * (4 * E + 11), "q": square, "k": square, "v": square, "lora": 2 * adapter(T, rank)}
    layer |= {"scores": H * product(T, D, T), "softmax": H * T * (12 * T - 1), "values": H * product(T, T, D)}
    layer |= {"output": square, "up": product(T, E, wide), "silu": 14 * T * wide, "down": product(T, wide, E)}
    return forward(T, layer | {"residual": 2 * T * E})


def rai(T: int, rank: int) -> Flops:
    """Rai, section 4; its equation 6 has 10 for an exponential and a square root, its totals have 1."""
    projection = product(T, E, E) + T * E
    norm = T * 4 * E  # E squares, E - 1 adds, a root, E divides, E multiplies
    layer = {"norm": 2 * norm, "q": projection, "k": projection, "v": projection, "lora": 2 * adapter(T, rank)}
    layer |= {"scores": H * (product(T, D, T) + T * T), "softmax": H * T * (3 * T - 1), "values": H * product(T, T, D)}
    layer |= {"output": product(T, E, E), "gate": product(T, E, F), "up": product(T, E, F)}
    parts = forward(T, layer | {"silu": 5 * T * F, "down": product(T, F, E)})
    return parts | {"norm": parts["norm"] + norm}


def forward_by_report(protocol: str, T: int, rank: int, draft: int = 2) -> Flops:
    """A forward of one series of T tokens; only Fung's drafts differ."""
    return fung(T, rank, draft) if protocol == "fung" else {"liu": liu, "rai": rai}[protocol](T, rank)


def step_by_report(protocol: str, T: int, rank: int, draft: int = 2) -> int:
    """A training step on B windows of T tokens: three forwards, but that Fung's backward is that of one window."""
    one = sum(forward_by_report(protocol, T, rank, draft).values())
    return B * one + 2 * one if protocol == "fung" else 3 * B * one


# The exact count: the model's own meter.


@cache
def metered(T: int, rank: int) -> FlopMeter:
    """A forward of B windows of T tokens."""
    return predict(CONFIG, B, T, rank=rank)


@cache
def price(T: int, rank: int) -> tuple[int, int]:
    """A training step on B windows, and a forward of one: of B windows each costs the same."""
    meter = metered(T, rank)
    return meter.training, meter.total // B


@cache
def forecast(series: int, prompt: int, new: int, rank: int) -> Flops:
    """`new` tokens after each of `series` prompts, over a cache."""
    return {"inference": series * generation(CONFIG, 1, prompt, new, rank=rank)}


@dataclass(frozen=True)
class Run:
    """A training run with so many validations, of so many series of so many tokens, each token predicted once."""

    steps: int
    context: int
    rank: int
    validations: int = 0
    series: int = 0
    tokens: int = 0

    @property
    def exact(self) -> Flops:
        step, window = price(self.context, self.rank)
        windows = self.validations * self.series * ceil(self.tokens / self.context)
        return {"training": self.steps * step, "validation": windows * window}


# Their plans, and what they printed about them.


def stages(protocol: str) -> list[Stage]:
    """Every total of a report ("fung", "liu" or "rai"), row by row; ValueError for an unknown one."""
    _drafts(protocol)
    return list({"fung": _fung, "liu": _liu, "rai": _rai}[protocol]())


def _drafts(protocol: str) -> dict[int, str]:
    if protocol not in DRAFTS:
        raise ValueError(f"report is {protocol!r}: expected one of {', '.join(DRAFTS)}")
    return DRAFTS[protocol]


def _sum(amounts: Iterable[Mapping[str, int]]) -> Flops:
    return dict(sum(map(Counter, amounts), Counter()))


def _rows(
    stage: Name, label: str, claimed: Mapping[Part, float], reproduced: Flops, exact: Flops, note: str = ""
) -> Iterator[Stage]:
    """A row for each part that is claimed, and for what the plan costs beside it where the report gives no total."""
    by_report, truly = (flops | {"total": sum(flops.values())} for flops in (reproduced, exact))
    for part in PARTS:
        if part in claimed or ("total" not in claimed and part != "total" and truly.get(part)):
            said = int(claimed[part]) if part in claimed else None
            yield Stage(stage, part, label, said, by_report.get(part) or None, truly.get(part) or None, note)


FUNG_TOKENS = 12  # of a step with 3 decimals; without trailing zeros a series has 1159 to 1275 in all (counted)
FUNG_CLAIMED: dict[Name, tuple[float, float, float, float]] = {  # as PARTS; 0 for a dash
    "baseline": (0, 0, 5.416e12, 5.416e12),
    "default": (9.812e15, 1.308e14, 5.416e12, 9.948e15),
    "grid": (8.831e15, 1.177e14, 0, 8.948e15),
    "context": (2.723e15, 3.631e13, 0, 2.759e15),
    "final": (9.812e15, 1.308e14, 5.416e12, 9.948e15),
    "other": (9.659e16, 1.288e15, 1.625e13, 9.790e16),
}


def _fung() -> Iterator[Stage]:
    """Fung, section 6: a validation every 50 steps, forecasts of four systems from 80 points to 20."""

    def run(steps: int, context: int, rank: int) -> Run:
        return Run(steps, context, rank, steps // 50, series=100, tokens=100 * FUNG_TOKENS)

    plan: dict[Name, tuple[str, list[Run], list[int]]] = {  # runs, and ranks of the models that forecast
        "baseline": ("Untrained", [], [0]),
        "default": ("Default hyperparameters", [run(3000, 512, 4)], [4]),
        "grid": ("η & r tuning", [run(300, 512, rank) for rank in (2, 4, 8) for _ in range(3)], []),
        "context": ("Context length tuning", [run(300, context, 8) for context in (128, 512, 768)], []),
        "final": ("Final run", [run(15000, 768, 8)], [8]),
    }
    reproduced, exact = {}, {}
    for stage, (_, runs, ranks) in plan.items():
        reproduced[stage] = {
            "training": sum(r.steps * step_by_report("fung", r.context, r.rank) for r in runs),
            # a validation is one batch; a forecast is one forward over the whole series
            "validation": sum(r.validations * B * sum(fung(r.context, r.rank).values()) for r in runs),
            "inference": sum(4 * sum(fung(100 * FUNG_TOKENS, rank).values()) for rank in ranks),
        }
        made = (forecast(4, 80 * FUNG_TOKENS, 20 * FUNG_TOKENS, rank) for rank in ranks)
        exact[stage] = _sum([*(r.exact for r in runs), *made])
    reproduced["other"], exact["other"] = _sum(reproduced.values()), _sum(exact.values())
    repeated = "This row repeats that of the default run; the totals of the columns hold the right one."
    for stage, printed in FUNG_CLAIMED.items():
        label = "Total" if stage == "other" else plan[stage][0]
        claimed = {part: flops for part, flops in zip(PARTS, printed, strict=True) if flops}
        yield from _rows(stage, label, claimed, reproduced[stage], exact[stage], repeated if stage == "final" else "")


def _liu() -> Iterator[Stage]:
    """Liu, sections 6 and 8: training alone; after each run 100 tokens are forecast of ten series."""
    table: list[tuple[Name, str, list[Run], float, int]] = [  # with the power of ten, and the series forecast
        ("default", "Trial experiment", [Run(500, 512, 4)], 15.38, 10),
        ("grid", "Hyperparameter tuning", [Run(1000, 512, rank) for rank in (2, 4, 8) for _ in range(3)], 16.64, 10),
        *(
            ("context", f"Context length {context}", [Run(1000, context, 8)], power, 10)
            for context, power in ((128, 15.06), (512, 15.68), (768, 15.87))
        ),
        ("final", "Final experiment", [Run(3000, 768, 8)], 16.35, 20),
    ]
    untrained = forecast(10, 700, 100, 0)
    step = {"training": step_by_report("liu", 512, 8)}
    yield from _rows("baseline", "Untrained model", {}, {}, untrained)
    yield from _rows("other", "One step", {"training": 10**12.68}, step, {"training": price(512, 8)[0]})
    reproduced, exact = [], []
    for stage, label, runs, power, series in table:
        reproduced.append({"training": sum(r.steps * step_by_report("liu", r.context, r.rank) for r in runs)})
        exact.append(_sum(flops for r in runs for flops in (r.exact, forecast(series, 700, 100, r.rank))))
        yield from _rows(stage, label, {"training": 10**power}, reproduced[-1], exact[-1])
        if label == "Context length 768":
            yield from _rows("context", "All", {"training": 10**16.13}, _sum(reproduced[-3:]), _sum(exact[-3:]))
    yield from _rows("other", "Total FLOPs", {"total": 10**16.91}, _sum(reproduced), _sum([untrained, *exact]))


RAI_TOKENS = 1005  # of a series: 1004 to 1008 in the validation part (counted)
RAI_WINDOWS = 300  # that a validation of 200 series is charged as, whatever the context
RAI_NEW = 520  # that a forecast is charged as: forwards over the prompt's 499 tokens


def _rai() -> Iterator[Stage]:
    """Rai, tables 2, 3 and 6: a validation after each run, forecasts of one series and at the end of eleven."""

    def run(steps: int, context: int, rank: int) -> Run:
        return Run(steps, context, rank, validations=1, series=200, tokens=RAI_TOKENS)

    def by_report(r: Run) -> Flops:
        validation = RAI_WINDOWS * sum(rai(r.context, r.rank).values())
        return {"training": r.steps * step_by_report("rai", r.context, r.rank), "validation": validation}

    def forecasts_by_report(series: int, rank: int) -> Flops:
        return {"inference": series * RAI_NEW * sum(rai(499, rank).values())}

    untrained, zero = forecast(1, 499, 500, 0), run(0, 512, 4)
    table: list[tuple[Name, str, dict[Part, float], Flops, Flops]] = [
        ("baseline", "2b - Untrained Qwen model", {"inference": 2.85e14}, forecasts_by_report(1, 0), untrained),
        ("baseline", "3a - Untrained LoRA", {"validation": 1.69e14}, by_report(zero), zero.exact),
    ]
    trained: list[tuple[Name, str, int, int, float]] = [
        ("default", "3a - Trained LoRA", 4, 512, 4.22252e15),
        ("grid", "3b - LoRA=2, LR=5e-5, Context=512", 2, 512, 4.2212e15),
        ("grid", "3b - LoRA=4, LR=5e-5, Context=512", 4, 512, 4.22252e15),
        ("grid", "3b - LoRA=4, LR=1e-4, Context=512", 4, 512, 4.22252e15),
        ("grid", "3b - LoRA=8, LR=5e-5, Context=512", 8, 512, 4.22516e15),
        ("grid", "3b - LoRA=8, LR=1e-4, Context=512", 8, 512, 4.22516e15),
        ("context", "3b - LoRA=8, LR=1e-4, Context=128", 8, 128, 1.02421e15),
        ("context", "3b - LoRA=8, LR=1e-4, Context=768", 8, 768, 6.46607e15),
    ]
    for stage, label, rank, context, total in trained:
        cell = run(600, context, rank)
        table.append((stage, label, {"total": total}, by_report(cell), cell.exact))
    for row in table:
        yield from _rows(*row)
    final, before, exact = run(5000, 768, 8), _sum(row[3] for row in table), _sum(row[4] for row in table)
    yield from _rows("other", "Sum of pre-main model experiments", {"total": 3.328e16}, before, exact)
    printed: dict[Part, float] = {"training": 5.17e16, "total": 5.19e16}  # the two columns of one row
    yield from _rows("final", "3c - Final model", printed, by_report(final), final.exact, DRAFTS["rai"][2])
    last = forecast(11, 499, 500, 8)
    yield from _rows("final", "3c - Model evaluation", {"inference": 3.14e15}, forecasts_by_report(11, 8), last)
    spent, exact = _sum([before, by_report(final)]), _sum([exact, final.exact, last])
    without = "The report leaves the evaluation of the final model out of this one."
    yield from _rows("other", "Conclusion", {"total": 8.5e16}, spent, exact, without)
    by_report_left, left = (BUDGET - sum(flops.values()) for flops in (spent, exact))
    yield Stage("other", "total", "Remaining FLOPs", int(1.482e16), by_report_left, left, without)


# Their mistakes.

WRONG: dict[str, dict[str, str]] = {
    "fung": {
        "backward": "the backward is that of one of the batch's four windows",
        "output": "the output projection is 64 -> 896 in place of 896 -> 896",
        "lora": "LoRA is charged once, not for each token",
        "scores": "the scores' scale is left out",
        "silu": "gate times up is charged twice",
        "residual": "the residual adds are left out",
        "norm": "an RMSNorm is five operations a number in place of four, and takes its root for each feature",
    },
    "liu": {
        "gate": "one of the feed-forward's three matrices is left out",
        "up": "the feed-forward is 4 x 896 = 3584 wide in place of 4864: in the up projection",
        "down": "and in the down projection",
        "silu": "and in the activation",
        "scores": "the scores' scale is left out",
        "q": "the bias of q is left out",
        "k": "the bias of k is left out",
        "v": "the bias of v is left out",
        "norm": "the final norm is left out",
    },
    "rai": {
        "softmax": "an exponential of the softmax costs 1 in place of 10",
        "silu": "an exponential of SiLU costs 1 in place of 10",
        "residual": "the residual adds are left out",
        "norm": "a square root costs 1 in place of 10, and adding epsilon nothing",
    },
}
"""What is wrong with each part of a training step, in the order of what it matters."""


def effects(protocol: str) -> dict[str, float]:
    """What each mistake changes in a training step of B windows of 512 tokens, rank 8, as a part of the exact step.

    By part of the architecture, and "backward" for what Fung's leaves out of three of its own forwards; they add up
    to `step_by_report` / exact - 1. ValueError for an unknown report.
    """
    return {name: flops / price(512, 8)[0] for name, flops in differences(protocol, 512, 8).items()}


def differences(protocol: str, T: int, rank: int) -> Flops:
    """What each mistake changes in a training step of B windows, in FLOPs, by the names of `effects`."""
    _drafts(protocol)
    theirs, meter = forward_by_report(protocol, T, rank), metered(T, rank)
    changed = {name: 3 * (B * theirs.get(name, 0) - flops) for name, flops in meter.by_component().items()}
    changed["backward"] = step_by_report(protocol, T, rank) - 3 * B * sum(theirs.values())
    return {name: flops for name, flops in changed.items() if flops}


def mistakes(protocol: str) -> list[str]:
    """Each mistake of a report's accounting in a line, with its size as computed; ValueError for an unknown report."""
    changed = effects(protocol)
    lines = [f"{text}: {_of_a_step(changed[name])}" for name, text in WRONG[protocol].items()]
    lines.append(f"all of these together: {_of_a_step(sum(changed.values()))}")
    return lines + list(_of_the_plan(protocol))


def about(protocol: str) -> dict[str, Any]:
    """`title`, `note` and `mistakes`, for the page; ValueError for an unknown report."""
    title = f"the FLOPs that {protocol.capitalize()}'s report prints, by its own formulas, and counted by the model"
    return {"title": title, "note": " ".join(_drafts(protocol).values()), "mistakes": mistakes(protocol)}


def _of_a_step(effect: float) -> str:
    return f"{100 * effect:+.2g} % of an exact training step"


def _of_the_plan(protocol: str) -> Iterator[str]:
    """The mistakes beside those of a step."""
    rows = stages(protocol)

    def times(stage: Name, part: Part, of: str = "exact") -> float:
        """What the first such row claims, as a multiple of the exact count, or of another column."""
        row = next(s for s in rows if (s.stage, s.part) == (stage, part) and s.claimed)
        return (row.claimed or 0) / getattr(row, of)

    if protocol == "fung":
        validation, inference = 100 * times("default", "validation"), times("baseline", "inference")
        yield f"a validation is charged as one batch of four windows: {validation:.1f} % of the exact count"
        yield f"a forecast is charged as one forward over prompt and answer: {inference:.2f} times the exact count"
        final = 100 * times("final", "total", "reproduced")
        yield f"the final run's row repeats the default run's: {final:.0f} % of what the report's own formulas give"
        dropped = step_by_report("fung", 512, 8, draft=1) - step_by_report("fung", 512, 8)
        yield f"the first draft drops q and v where LoRA is on: {_of_a_step(dropped / price(512, 8)[0])}"
    elif protocol == "liu":
        left_out = sum(s.exact or 0 for s in rows if s.part == "inference" and s.label != "All")
        share = 100 * left_out / next(s.exact or 1 for s in rows if s.label == "Total FLOPs")
        yield f"forecasts, and the loss over them, are not counted: {share:.1g} % of the exact total"
    else:
        validation, inference = 100 * times("baseline", "validation"), times("baseline", "inference")
        yield f"a cache is claimed, yet a new token is charged a whole forward: {inference:.0f} times the exact count"
        yield f"a validation is charged as {RAI_WINDOWS} windows: at context 512 {validation:.0f} % of the exact count"
        short, long = (100 * n * step_by_report("rai", 768, 8) / BUDGET for n in (5000, 6000))
        yield f"the final run is 62 % and 51.90 % of the budget: 5,000 steps are {short:.1f} %, 6,000 are {long:.1f} %"
        evaluated = 100 * times("final", "inference") * forecast(11, 499, 500, 8)["inference"] / BUDGET
        yield f"what remains of the budget leaves the last evaluation out: {evaluated:.2f} % of the budget"
    total = next(s for s in rows if s.part == "total" and s.label in ("Total", "Total FLOPs", "Conclusion"))
    claimed, exact = (100 * (n or 0) / BUDGET for n in (total.claimed, total.exact))
    yield f"the whole plan is said to cost {claimed:.1f} % of the budget; counted exactly it costs {exact:.1f} %"
