"""`flops --audit`: one forward or training step as others count it, each beside ours, the difference in named terms.

Ours is the `exact` convention. What another counts is described by what it knows of each part of the model: a product
(m, n) @ (n, p) as m·n·p multiply-adds, as 2·m·n·p, or as m·p·(2n-1), which is ours, or not at all. From that the terms
follow by formulas, never from the difference itself; what they leave over is a term of its own, "unexplained".
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from experiments.accounting import counters, three_reports
from experiments.accounting.counters import Missing
from experiments.accounting.predict import predict
from experiments.run_folder.table import markdown
from lora.layer import TARGETS
from qwen_min import FlopMeter, QwenConfig
from qwen_min.costs import component
from qwen_min.prices import Dim

MATRICES = ("q", "k", "v", "output", "gate", "up", "down")
GQA = "k and v with all heads"
PHASES = ("forward", "training step")
KINDS = {"scale": "softmax", "angles": "rotation", "silu": "activation", "shared": "sums of gradients"}
KINDS |= {"lora": "LoRA's sums", "lora_out": "LoRA's sums", "residual": "residual sums", "norm": "norms"}
"""What an op does beside products, where it is not called by the op's name."""


class Work(NamedTuple):
    """A forward or a backward: by part m·n·p and m·p of its products, by kind the FLOPs of all else."""

    multiplies: Counter[str]
    results: Counter[str]
    other: Counter[str]


def work(meter: FlopMeter, phase: int, convention: str = "exact") -> Work:
    """What a meter saw, forward (0) or backward (1), under the true sizes whatever the convention."""
    found = Work(Counter(), Counter(), Counter())
    for charge in meter.charges():
        dims = tuple(d.true if isinstance(d, Dim) else d for d in charge.dims)
        part = {"scores": "attention", "values": "attention"}.get(name := component(charge), name)
        other = sum(charge.price.cost(dims, convention)[phase].values())
        for m, n, p in charge.price.products(dims, convention)[phase]:
            found.multiplies[part] += charge.times * m * n * p
            found.results[part] += charge.times * m * p
            other -= m * p * (2 * n - 1)
        found.other[KINDS.get(charge.price.name, charge.price.name)] += charge.times * other
    return found


def _product(way: str, multiplies: int, results: int) -> int:
    return {"multiply-add": multiplies, "2n": 2 * multiplies, "2n-1": 2 * multiplies - results}[way]


WAYS = {"multiply-add": "multiply-add as one", "2n": "n additions in place of n-1", "2n-1": ""}


@dataclass(frozen=True)
class Row:
    """Who counts, and what: `way` of a product (`WAYS`) `but` for the parts left out; the forward's `own` figures for
    other kinds; `extra` terms; whether a training step's backward is that of autograd or twice the forward."""

    name: str
    phase: str
    count: Callable[[], int]
    way: str
    but: Sequence[str] = ()
    own: dict[str, int] = field(default_factory=dict)
    extra: dict[str, int] = field(default_factory=dict)
    twice: bool = True
    package: str = ""
    source: str = ""


def terms(row: Row, forward: Work, backward: Work | None, frozen: bool) -> Counter[str]:
    """The named parts of what `row` counts less ours; `backward` is None where a forward alone is counted."""
    found = Counter(row.extra)
    run = [forward] if backward is None else [forward, backward]
    for part in forward.multiplies:
        ours = [(done.multiplies[part], done.results[part]) for done in run]
        if part in row.but:
            found[f"{part} left out"] -= sum(_product("2n-1", *done) for done in ours)
            continue
        found[WAYS[row.way]] += sum(_product(row.way, *done) - _product("2n-1", *done) for done in ours)
        if backward is not None and row.twice:
            each = 1 if row.way == "multiply-add" else 2
            (m, _), (real, _) = ours
            more = 2 * _product(row.way, *ours[0]) - _product(row.way, *ours[1])
            weights = each * m if frozen and part in (*MATRICES, "head") else 0
            unneeded = each * (2 * m - real) - weights
            found["gradients of frozen weights"] += weights
            found["gradients below the first LoRA"] += unneeded
            found["additions of a backward's products"] += more - weights - unneeded
    kinds = dict.fromkeys((*forward.other, *(backward.other if backward else ()), *row.own))
    for kind in kinds:
        theirs = row.own.get(kind, 0) * (3 if backward is not None and row.twice else 1)
        ours_of_kind = sum(done.other[kind] for done in run)
        how = "left out" if not theirs else "otherwise" if ours_of_kind else "that do not run"
        found[f"{kind} {how}"] += theirs - ours_of_kind
    return Counter({name: n for name, n in found.items() if n})


def rows(config: QwenConfig, batch: int, tokens: int, rank: int, targets: Sequence[str]) -> list[Row]:
    """Everyone who is asked, with what is known of how they count."""
    n, e, layers = batch * tokens, config.hidden_size, config.num_hidden_layers
    table = config.vocab_size * e
    bias = layers * (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    weights = {"bias": n * bias, "norms": n * (2 * layers + 1) * e}  # one for each parameter and token
    twice = {kind: 2 * number for kind, number in weights.items()}
    numbers = {"activation": n * layers * config.intermediate_size}
    scores = {"softmax": batch * layers * config.num_attention_heads * tokens**2}
    meter = predict(config, batch, tokens, rank=rank, targets=targets)
    forward = work(meter, 0)
    attended, written = ("attention",), {"attention": "eager"}
    in_products = sum(forward.multiplies[part] for part in (*MATRICES, "head", "lora"))

    def tool(name: str, phase: str, way: str, label: str = "", **known: Any) -> Row:
        asked = {key: known.pop(key) for key in ("attention", "device") if key in known}
        ask = partial(counters.count, name, config, batch, tokens, rank, targets, **asked)
        return Row(f"{name}{label}", phase, ask, way, package=counters.COUNTERS[name][0], **known)

    eager, cpu, first, step = ", eager attention", " on a CPU", *PHASES
    once = {"a sequence's tokens as one": in_products // tokens - in_products}
    once |= {"the embedding table as a product": batch * table}
    of_one = {kind: count // tokens for kind, count in weights.items()}
    not_seen = ("attention", *["head"] * config.tie_word_embeddings)  # which then has no parameters of its own
    found = [
        tool("fvcore", first, "multiply-add", but=attended),
        tool("fvcore", first, "multiply-add", eager, **written),
        tool("calflops", first, "2n", but=attended, own=numbers),
        tool("calflops", first, "2n", eager, own=numbers | scores, **written),
        tool("calflops with its backward", step, "2n", but=attended, own=numbers),
        tool("calflops with its backward", step, "2n", eager, own=numbers | scores, **written),
        tool("thop", first, "multiply-add", but=attended),
        tool("ptflops", first, "multiply-add", but=attended, own=numbers | {"bias": n * bias}),
        tool("ptflops", first, "multiply-add", eager, own=numbers | scores | {"bias": n * bias}, **written),
        tool("ptflops by aten", first, "multiply-add", but=attended, own={"bias": n * bias}, device="fake cpu"),
        tool("torchinfo", first, "multiply-add", but=attended, own=of_one, extra=once),
        tool("FlopCounterMode", first, "2n"),
        tool("FlopCounterMode", first, "2n", cpu, but=attended, device="fake cpu"),
        tool("FlopCounterMode with its backward", step, "2n", twice=False),
        tool("FlopCounterMode with its backward", step, "2n", cpu, but=attended, twice=False, device="fake cpu"),
        tool("floating_point_ops", step, "2n", but=not_seen, own=twice),
    ]
    return found + formulas(config, batch, tokens, rank, targets, meter, twice, scores)


def formulas(
    config: QwenConfig,
    batch: int,
    tokens: int,
    rank: int,
    targets: Sequence[str],
    meter: FlopMeter,
    weights: dict[str, int],
    scores: dict[str, int],
) -> list[Row]:
    """What was published, each formula computed from the sizes as its source has it, of a training step.

    - Kaplan et al. 2020, section 2.1 and table 1: a token's forward is 2N + 2·n_layer·n_ctx·d_attn, the second term the
      half of attention that a causal mask leaves; N are the matrices of the layers, without embeddings, biases and
      norms; the backward is twice that; C = 6N leaves attention out.
    - PaLM, Chowdhery et al. 2022, appendix B: 6N + 12·L·H·Q·T, N all parameters (with them it gives the 46.2 % of the
      peak that the paper states).
    - Chinchilla, Hoffmann et al. 2022, appendix F: products at 2mnp, the table's among them; the softmax at 3 a score;
      two matrices d_model x ffw_size; the backward is twice that.
    """
    c, n, step = config, batch * tokens, PHASES[1]
    e, f, v, layers = c.hidden_size, c.intermediate_size, c.vocab_size, c.num_hidden_layers
    wide, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    done = work(meter, 0)
    matrices = layers * (e * (2 * wide + 2 * narrow) + 3 * e * f) + done.multiplies["lora"] // n
    everything = matrices + sum(weights.values()) // (2 * n) + (1 if c.tie_word_embeddings else 2) * v * e
    product = {"the embedding table as a product": 6 * n * v * e}
    table = {} if c.tie_word_embeddings else product
    attention = 4 * layers * wide * tokens  # scores and values of a token, at 2n
    hoffmann = 2 * v * e * 2 + layers * (2 * 3 * e * wide + 3 * c.num_attention_heads * tokens + 2 * wide * e)
    hoffmann += layers * (2 * 2 * e * f) + attention
    half = {"the causal half of attention": -3 * done.multiplies["attention"]}
    kaplan, palm = n * (6 * matrices + 3 * attention // 2), n * (6 * everything + 3 * attention)
    softmax, repeated = {"softmax": 3 * scores["softmax"]}, {GQA: 3 * 2 * n * e * 2 * (wide - narrow) * layers}

    def row(name: str, count: int, source: str, **known: Any) -> Row:
        return Row(name, step, lambda: count, "2n", source=source, **known)

    def matmul() -> int:
        return predict(c, batch, tokens, rank=rank, targets=targets, training=True, convention="matmul").training

    found = [
        row("6N", 6 * n * everything, "N: all parameters", but=("attention",), own=weights, extra=table),
        row("6N without embeddings", 6 * n * matrices, "Kaplan et al. 2020, section 2.1", but=("attention", "head")),
        row("6N + 6·L·T·H·Q", kaplan, "Kaplan et al. 2020, table 1", but=("head",), extra=half),
        row("6N + 12·L·H·Q·T", palm, "PaLM, Chowdhery et al. 2022, appendix B", own=weights, extra=table),
    ]
    source, left_out = "Hoffmann et al. 2022, appendix F", ("gate", "lora")
    found.append(row("Chinchilla", 3 * n * hoffmann, source, but=left_out, own=softmax, extra=repeated | product))
    found.append(Row("matmul, ours", step, matmul, "2n", twice=False))
    theirs, extra = work(meter, 0, "coursework"), {GQA: 0}
    for charge in meter.charges():
        true = tuple(d.true if isinstance(d, Dim) else d for d in charge.dims)
        costs = [sum(charge.price.cost(dims, "coursework")[0].values()) for dims in (charge.dims, true)]
        extra[GQA] += 3 * charge.times * (costs[0] - costs[1])
    ours = Row("coursework, ours", step, lambda: 3 * meter.total, "2n-1", own=dict(theirs.other), extra=extra)
    found.append(ours)
    for name, wrong in three_reports.WRONG.items():
        count: Callable[[], int] = partial(three_reports.step_by_report, name, tokens, rank)
        more = {}
        if c != three_reports.CONFIG or batch != three_reports.B or (rank and tuple(targets) != TARGETS):
            count = _of_one_shape
        else:
            found_wrong = three_reports.differences(name, tokens, rank)
            more = {f"{wrong.get(part, part)} ({part})": flops for part, flops in found_wrong.items()}
        called, source = f"{name.capitalize()}'s report", "its own formulas, as coursework"
        found.append(Row(called, step, count, ours.way, own=ours.own, extra=extra | more, source=source))
    return found


def _of_one_shape() -> int:
    raise Missing(f"its formulas are of Qwen2.5-0.5B, {three_reports.B} sequences, LoRA on {' and '.join(TARGETS)}")


def audit(config: QwenConfig, batch: int, tokens: int, rank: int, targets: Sequence[str]) -> list[dict[str, Any]]:
    """A record for each: `name, phase, version, source, ours` and `count, difference, terms`, or why there is none.

    The terms add up to the difference, count - ours, to the integer.
    """
    options: dict[str, Any] = {"rank": rank, "targets": targets, "convention": "exact"}
    alone = predict(config, batch, tokens, **options)
    trained = predict(config, batch, tokens, training=True, **options)
    found = []
    for row in rows(config, batch, tokens, rank, targets):
        training = row.phase != PHASES[0]
        forward = work(trained if training else alone, 0)
        backward = work(trained, 1) if training else None
        ours = trained.training if training else alone.total
        record: dict[str, Any] = {"name": row.name, "phase": row.phase, "source": row.source, "ours": ours}
        found.append(record)
        try:
            version = counters.version(row.package) if row.package else ""
            count = row.count()
        except Missing as why:
            record["missing"] = str(why)
            continue
        named = terms(row, forward, backward, frozen=bool(rank))
        named["unexplained"] = count - ours - named.total()
        record |= {"version": version, "count": count, "difference": count - ours}
        record["terms"] = dict(sorted(((k, v) for k, v in named.items() if v), key=lambda term: -abs(term[1])))
    return found


def table(records: Sequence[dict[str, Any]]) -> str:
    """Each with its count, ours, and the terms of the difference in lines of their own."""
    lines = []
    for phase in PHASES:
        chosen = [record for record in records if record["phase"] == phase]
        lines += [f"{phase}: ours, exact, {chosen[0]['ours']:,}", ""]
        for record in chosen:
            if "missing" in record:
                lines += [f"{who(record)}: {record['missing']}", ""]
                continue
            share = record["count"] / record["ours"]
            lines += [f"{who(record)}", f"  {record['count']:30,}  {share:8.2%} of ours; the difference"]
            for name, flops in (*record["terms"].items(), ("in all", record["difference"])):
                lines.append(f"  {flops:+30,}  {flops / record['ours']:+8.2%} {name}")
            lines.append("")
    return "\n".join(lines)


def who(record: dict[str, Any]) -> str:
    """Its name, with its version or source."""
    more = record.get("version") or record["source"]
    return f"{record['name']} ({more})" if more else record["name"]


def page(records: Sequence[dict[str, Any]]) -> str:
    """The same as tables in Markdown, one for each phase."""
    lines = []
    for phase in PHASES:
        chosen = [record for record in records if record["phase"] == phase]
        shown = [["who", "its count", "of ours", "its count less ours, in terms that add up to it"]]
        for record in chosen:
            if "missing" in record:
                shown.append([who(record), "", "", record["missing"]])
                continue
            named = "; ".join(f"{name} {flops:+,}" for name, flops in record["terms"].items())
            count, share = f"{record['count']:,}", f"{record['count'] / record['ours']:.2%}"
            shown.append([who(record), count, share, f"{record['difference']:+,}: {named}"])
        lines += [f"A {phase} is {chosen[0]['ours']:,}.", "", *markdown(shown), ""]
    return "\n".join(lines)
