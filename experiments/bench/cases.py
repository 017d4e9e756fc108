"""What `bench` measures: one entry a case, with its shape and the target that was set for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen_min import QwenConfig

WHATS = ("train", "evaluate", "generate", "load", "count")
RANK = 8
PEER_SERIES = 3  # of "all series": as many does the peer forecast, and the time is scaled up


@dataclass(frozen=True)
class Target:
    """A bound that was set for one measure of a case, on two CPU cores and the 0.5B checkpoint."""

    measure: str  # a key of what `compare.judge` returns
    bound: float
    most: bool = False  # the measure should be at most this; else at least

    def met(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound

    def __str__(self) -> str:
        forms = {
            "ratio": f"{self.bound:g}x",
            "share": f"{100 * self.bound:g} % of the floor",
            "peak_bytes": f"{self.bound / 1e9:g} GB",
            "added_bytes": f"{self.bound / 1e9:g} GB beside the libraries",
            "tokens_per_second": f"{self.bound:g} tokens/s",
            "seconds": f"{self.bound:g} s",
            "overhead": f"{100 * self.bound:g} %",
            "loss_error": f"loss to {self.bound:g}",
            "gradient_error": f"gradient to {self.bound:g}",
        }
        return forms[self.measure]


@dataclass(frozen=True)
class Case:
    """One line of the table.

    what: of `WHATS`, by which cases are chosen.
    job: which job of `sides` it is, and its shape; the same for both sides.
    unit: what is compared: "s", "tokens/s" (of decoding, the prefill apart) or "%".
    note: what a reader must know to read the line.
    turns: fresh processes of each side, where it takes so long that there are fewer; 0 for as many as are asked for.
    """

    what: str
    name: str
    job: dict[str, Any]
    targets: tuple[Target, ...] = ()
    unit: str = "s"
    peer: bool = True
    note: str = ""
    turns: int = 0


def cases(quick: bool, series: int, draft: int, gpu: bool = False) -> list[Case]:
    """Every case, at the sizes of the targets, or fewer at `quick` ones that show that all works.

    Args:
        series: how many validation series are forecast in one call.
        draft: nodes of the symbol tree, a forward.
        gpu: also shapes that keep a GPU busy.
    """
    batch, contexts = (2, (64,)) if quick else (4, (512, 768))
    few = min(series, PEER_SERIES)
    prompt, new, short = (40, 21, 20) if quick else (800, 100, 200)
    points, horizon = (8, 2) if quick else (80, 20)
    speed = {512: (Target("ratio", 1.7), Target("share", 0.8)), 768: (Target("ratio", 1.6),)}
    memory = {512: 2.5e9, 768: 3e9}
    exact = (Target("loss_error", 1e-6, most=True), Target("gradient_error", 1e-4, most=True))
    steps = [
        _loss("train", batch, c, *speed.get(c, ()), Target("peak_bytes", memory.get(c, 3e9), most=True), *exact)
        for c in contexts
    ]
    tree = "the floor reads the weights once a forward, of which there were as many as ours took"
    several = [(4, 3.0)] if quick else [(16, 3.0), (64, 4.0)]
    if gpu and not quick:
        steps.append(_loss("train", 16, 512))  # 8,192 tokens
        several.append((256, 4.0))
    return [
        *steps,
        _loss("train", batch, contexts[0], Target("ratio", 2.3), symbols=True),
        _loss("evaluate", batch, contexts[0], Target("ratio", 1.4)),
        _loss("evaluate", batch, contexts[0], Target("ratio", 1.9), symbols=True),
        _generate(1, prompt, new, "plain"),
        _generate(1, prompt, new, "symbols", Target("tokens_per_second", 33)),
        _generate(1, prompt, new, "tree", Target("tokens_per_second", 60), Target("ratio", 6), draft=draft, note=tree),
        *(_generate(rows, short, new, "symbols", Target("ratio", ratio)) for rows, ratio in several),
        Case(
            "generate",
            f"forecast {series} series, {points} to {horizon}",
            {"job": "series", "series": series, "compared": few, "points": points, "horizon": horizon},
            (Target("ratio", 25),),
            note="ours all in one call, as `evaluate` does, which also takes the losses of the true horizon; the peer "
            f"one by one, {few} of them, and their time scaled up; each side once",
            turns=1,
        ),
        Case(
            "load",
            "load",
            {"job": "load"},
            (Target("seconds", 0.3, most=True), Target("added_bytes", 1e9, most=True)),
            note="from safetensors to ready, the files in the page cache, the libraries imported; ours are mapped, "
            "and read when they are first used; the memory is that at the first logits",
        ),
        Case(
            "count",
            "count",
            {"job": "count", "prompt": short, "pairs": 20 if quick else 200},
            (Target("overhead", 0.01, most=True),),
            unit="%",
            peer=False,
            note="what counting its FLOPs adds to a forward of one token with a head of 13 symbols: the median of "
            "pairs, with and without, and the middle half of them",
        ),
    ]


def has_targets(config: QwenConfig, device: str, quick: bool) -> bool:
    """Whether the targets were set for this: the 0.5B model, on the CPU, at full size."""
    return config == QwenConfig.named("Qwen2.5-0.5B") and device == "cpu" and not quick


def chosen(all_cases: Sequence[Case], whats: Sequence[str]) -> list[Case]:
    """Those of `whats`, in the table's order. Raises ValueError for another name."""
    if not whats or set(whats) - set(WHATS):
        unknown = ", ".join(sorted(set(whats) - set(WHATS))) or "empty"
        raise ValueError(f"--what is {unknown}: expected {', '.join(WHATS)}, separated by commas")
    return [case for case in all_cases if case.what in whats]


def _loss(what: str, batch: int, context: int, *targets: Target, symbols: bool = False) -> Case:
    job = {"job": what, "batch": batch, "context": context, "symbols": symbols}
    job |= {"rank": RANK} if what == "train" else {}
    another = "another loss, over the 13 symbols alone; the peer's is the one over all tokens"
    name = f"{what} {batch}x{context}" + (", 13 symbols" if symbols else "")
    return Case(what, name, job, targets, note=another if symbols else "")


def _generate(batch: int, prompt: int, new: int, how: str, *targets: Target, draft: int = 0, note: str = "") -> Case:
    job = {"job": "generate", "batch": batch, "prompt": prompt, "new": new, "how": how, "draft": draft}
    kind = {"plain": "", "symbols": ", 13 symbols", "tree": ", symbol tree"}[how]
    return Case("generate", f"generate {batch}x{prompt}+{new}{kind}", job, targets, unit="tokens/s", note=note)
