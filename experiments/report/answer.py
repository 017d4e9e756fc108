"""The first screen of the page: what training did, four numbers, one picture, and what to do next."""

import shlex
from dataclasses import dataclass
from functools import partial

from experiments import plots
from experiments.forecasting.scores import best_copy, compared, paired_interval
from experiments.report.accounting import spent_of_budget, total
from experiments.report.document import Block, Facts, Figure, Inline, Number, Section, Text, over_seeds
from experiments.report.evaluation import LAW, MODEL, Evaluation
from experiments.report.forecasts import drawn
from experiments.report.records import Row
from experiments.report.study import CONTROLS, STAGES, TITLES, Run, Study
from experiments.run_folder.cells import spread
from experiments.run_folder.command import program
from experiments.settings.record import FEWEST_SERIES

TERMS = {"baseline": "untrained", "default": "default run", "final": "final", "grid": "best cell"}
REAL = "--model Qwen/Qwen2.5-0.5B-Instruct --dry-run"


@dataclass(frozen=True)
class _Answer:
    """The run that the page is about, on one part: its scores by forecaster, and the untrained model's evaluation."""

    run: Run
    evaluation: Evaluation
    part: str
    rows: dict[str, Row]
    best: str
    untrained: Evaluation | None


def summary(study: Study) -> Section:
    """What a reader takes away from one screen: the verdict, four numbers, one picture, and what to do next."""
    if not study.runs:
        return Section("summary", "", [Text(["Nothing has run yet."], "verdict")])
    if not study.answer:
        return Section("summary", "", [Text(_losses(study), "verdict"), Text(_next(study))])
    run, evaluation = study.answer
    part = next(part for part in ("validation", "test", "shown") if evaluation.score(part))
    best, untrained = best_copy(evaluation.mse(part)), study.untrained_beside(evaluation, part)
    answer = _Answer(run, evaluation, part, evaluation.by_forecaster(part), best, untrained)
    blocks: list[Block] = [Text(_verdict(study, answer), "verdict"), _numbers(answer), Text(_certain(study, answer))]
    return Section("summary", "", [*blocks, *_picture(study, run, evaluation), Text(_next(study))])


def _verdict(study: Study, answer: _Answer) -> Inline:
    """What training did, and what the forecasts are worth beside a copy of the past, in one sentence."""
    model, few = answer.rows[MODEL], "."
    if model["series"] < FEWEST_SERIES:
        few = "; one series tells little." if model["series"] == 1 else f"; {model['series']} series tell little."
    copy = f"{' '.join(compared(model['mse'], answer.rows[answer.best]['mse']))} copying the past ({answer.best}){few}"
    if answer.run.stage == "baseline":
        return [f"Before any training the forecasts are {copy}"]
    after: Inline = ["After ", Number(total(study)["flops"], "flops"), " FLOPs "]
    untrained = answer.untrained.by_forecaster(answer.part)[MODEL]["mse"] if answer.untrained else None
    if untrained is None:
        return [*after, f"the forecasts are {copy}"]
    said, link = compared(model["mse"], untrained)
    if link == "as":
        return [*after, f"training has left the forecasts {said} as the untrained model's, and they are {copy}"]
    if model["mse"] > untrained:
        return [*after, f"training has made the forecasts {said} than the untrained model's, and they are {copy}"]
    still = "still " if model["mse"] > answer.rows[answer.best]["mse"] else ""
    return [*after, f"the forecasts are {said} than the untrained model's, and {still}{copy}"]


def _numbers(answer: _Answer) -> Facts:
    """MSE and interval: untrained, trained, the best copy, the law."""
    files, found = [answer.evaluation.file("scores.csv")], dict[str, Row]()
    if answer.untrained:
        files.append(answer.untrained.file("scores.csv"))
        found["untrained"] = answer.untrained.by_forecaster(answer.part)[MODEL]
    found[TERMS[answer.run.stage]] = answer.rows[MODEL]
    found[f"best copy: {answer.best}"] = answer.rows[answer.best]
    if LAW in answer.rows:
        found["the law, fitted"] = answer.rows[LAW]
    facts: list[tuple[str, Inline]] = []
    for term, row in found.items():
        low, high = (Number(row[f"mse_{end}"]) for end in ("low", "high"))
        interval: Inline = ["\n", low, " to ", high] if low.exact else []
        facts.append((term, [Number(row["mse"]), *interval]))
    return Facts(facts, files, [answer.run.stage])


def _certain(study: Study, answer: _Answer) -> Inline:
    """What the numbers are, whether the differences may be chance, by a bootstrap over the series, and the cost."""
    ours = answer.evaluation.series_mse(answer.part, MODEL)
    others = {"the best copy": answer.evaluation.series_mse(answer.part, answer.best)}
    if answer.untrained:
        others = {"the untrained model": answer.untrained.series_mse(answer.part, MODEL)} | others
    said = []
    for name, theirs in others.items():
        if ours and ours.keys() <= theirs.keys():
            low, high = paired_interval([*ours.values()], [theirs[series] for series in ours], seed=0)
            said.append(f"the difference from {name} {'may be' if low <= 0 <= high else 'is not'} chance")
    chance = f"By a bootstrap over the series {', '.join(said)}. " if said else ""
    count = Number(answer.rows[MODEL]["series"], "integer")
    what = f" {answer.part} series: mean squared error, raw units, lower is better, and its 95 % interval. {chance}"
    return ["Over ", count, what, *_lowered(study, answer), "Cost: ", *spent_of_budget(study), "."]


def _lowered(study: Study, answer: _Answer) -> Inline:
    """The validation loss before and after, on windows of one length: few series tell more of it than of forecasts."""
    untrained, run = study.untrained, answer.run
    if untrained is None or run.stage == "baseline" or untrained.row["context"] != run.row["context"]:
        return []
    before, after = Number(untrained.row["validation_loss"]), over_seeds(study.losses(run))
    return ["Validation loss: ", before, " untrained, ", *after, " after training. "]


def _losses(study: Study) -> Inline:
    """The verdict where no forecast was judged: validation losses."""
    after: Inline = ["After ", Number(total(study)["flops"], "flops"), " FLOPs "]
    lowest = next((run for stage in ("final", "default") for run in study.of(stage)), study.best)
    untrained = study.untrained
    if lowest is None:
        return [*after, "no trained run has ended, and no forecast has been judged."]
    losses = study.losses(lowest)
    ours: Inline = [f"the validation loss of {lowest.title} is ", *over_seeds(losses)]
    if untrained is None:
        return [*after, *ours, " nats per token. No forecast was judged."]
    theirs = untrained.row["validation_loss"]
    said = "lower than" if spread(losses)[0] < theirs else "not lower than"
    beside: Inline = [f" nats per token, {said} the untrained model's ", Number(theirs), ". No forecast was judged."]
    return [*after, *ours, *beside]


def _next(study: Study) -> Inline:
    """What one would do next, and its command."""
    start = program()
    verb = "train" if study.alone else "study" if study.plan else "grid"
    protocol = f" --protocol {study.settings['protocol']}" if study.settings.get("protocol") else ""
    if (run := study.alone) and not study.evaluation(run):
        here = ["--config", f"{study.root}/config.toml", "--adapter", f"{study.root}/{run.folder}/adapter"]
        return ["Next: forecasts with this adapter, scored: ", Number(f"{start} evaluate {shlex.join(here)}", "code")]
    if study.plan and not study.alone:
        planned = {one.text("stage") for one in study.plan.objects("stages")} | {"final"}
        missing = [stage for stage in STAGES if stage in planned and not study.of(stage) and stage not in CONTROLS]
        if missing:
            name = {"grid": "grid", "context": "contexts"} | TITLES
            return [f"Next: the {name[missing[0]]}, not run yet: ", Number(study.commands[missing[0]], "code")]
    if study.label.startswith("toy"):
        said = "Next: the same on real weights, of which a toy's numbers say nothing: "
        return [said, Number(f"{start} {verb}{protocol} {REAL}", "code")]
    if study.alone:
        said = "Next: other learning rates and ranks beside it: "
        return [said, Number(f"{start} {'study' if study.plan else 'grid'}{protocol}", "code")]
    if not study.plan:
        said = "Next: a default run, this grid, contexts and a final run, each judged: "
        return [said, Number(f"{start} study", "code")]
    if (share := study.plan.number("shortened")) < 1:
        whole = Number(f"{start} {verb}{protocol}", "code")
        return ["Next: the whole protocol, of which ", Number(share, "share"), " ran: ", whole]
    return ["Next: the same with another ", Number("--seed", "code"), ", to see how much of this is chance."]


def _picture(study: Study, run: Run, evaluation: Evaluation) -> list[Figure]:
    """One shown system of each class: the end of its context, truth, forecast and the best copy."""
    first = {system.shape: system.id for system in reversed(evaluation.forecasts)} if evaluation.shown else {}
    systems = [one for one in drawn(evaluation, best_only=True) if one["id"] in first.values()] if first else []
    if not systems:
        return []
    band = " with the bands of its samples" if any(one["quantiles"] for one in systems) else ""
    title = "best cell" if run.stage == "grid" else run.title
    caption = (
        f"One system of each class: the end of its context, the truth, the forecast of the {title}{band}, "
        "and the best copy."
    )
    draw = partial(plots.glance, systems, evaluation.names, title=f"Forecasts, {title}", label=study.label)
    files = [evaluation.file(name) for name in ("forecasts.csv", "history.csv", "systems.csv")]
    return [Figure("glance", caption, draw, files, [run.stage])]
