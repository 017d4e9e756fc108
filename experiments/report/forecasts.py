"""The systems that are shown: their forecasts, phase plane, running RMSE, and the loss of every token of one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments import plots
from experiments.forecasting import scores
from experiments.forecasting.baselines import PARROT, SEASONAL
from experiments.report.document import Block, Column, Figure, Section, Table, Text, named
from experiments.report.evaluation import LAW, MODEL, NAIVE, Evaluation, Floats, System
from experiments.report.records import Records
from experiments.report.study import Run, Study
from experiments.task.shapes import RULE

UNAIDED = (PARROT, SEASONAL, LAW)
"""The forecasts without a model that are drawn over the model's, as far as they are recorded."""


def forecasts(study: Study) -> Section:
    """Every shown system under the final, the default and the untrained model, and what needs no model."""
    judged = [*reversed(study.main()), *([study.best_cell] if study.best_cell else [])]
    shown = [(run, evaluation) for run, evaluation in judged if evaluation.shown]
    blocks: list[Block] = [Text(["Class of a system: ", RULE])] if shown else []
    for run, evaluation in shown:
        blocks += _of_run(study, run, evaluation)
    if shown and study.records.has(NAIVE):
        run, evaluation = shown[0]
        blocks += [Text(["Without a model"], "heading"), _systems(run, evaluation, "naive")]
    return Section("forecasts", "Forecasts of the shown systems", blocks)


def _of_run(study: Study, run: Run, evaluation: Evaluation) -> list[Block]:
    names, systems, said = evaluation.names, evaluation.forecasts, {"label": study.label}
    files = [evaluation.file(name) for name in ("forecasts.csv", "history.csv", "systems.csv")]
    shown = drawn(evaluation)
    running = {system.id: _running(system) for system in systems}
    lines = [{"title": system.title, "values": running[system.id]} for system in systems]
    bands = ", with the bands of its samples" if any(system.quantiles for system in systems) else ""
    title = run.title
    blocks: list[Block] = [Text([title.capitalize()], "heading"), *_names(evaluation, systems)]
    caption = f"Forecasts of the {title}{bands}, with the class that is computed for each system"
    caption += f", over them {' and '.join(shown[0]['copies'])}." if shown[0]["copies"] else "."
    draw = partial(plots.forecast_grid, shown, names, title=f"Forecasts, {title}", **said)
    blocks.append(Figure(f"forecasts-{run.stage}", caption, draw, files, [run.stage]))
    blocks += [_systems(run, evaluation, "raw"), _systems(run, evaluation, "scaled")]
    caption = f"Root of the mean squared error up to each step, {title}, raw units; a step that did not parse counts"
    draw = partial(plots.running_rmse, lines, names, title=f"Running RMSE, {title}", **said)
    blocks.append(Figure(f"running-rmse-{run.stage}", f"{caption} as persistence.", draw, files, [run.stage]))
    blocks.append(_running_table(run, evaluation, running, {}))
    if scales := _scales(evaluation):
        blocks.append(_running_table(run, evaluation, running, scales))
    if len(names) == 2:
        caption = f"Phase plane of the shown systems, {title}: {names[0]} against {names[1]}."
        draw = partial(plots.phase_plane, shown, names, title=f"Phase plane, {title}", **said)
        blocks.append(Figure(f"phase-{run.stage}", caption, draw, files, [run.stage]))
    return blocks + _tokens(study, run, evaluation)


def _names(evaluation: Evaluation, systems: Sequence[System]) -> list[Block]:
    """Where the report has another word for a system than its computed class."""
    given = evaluation.about.fields("shown_names").values if "shown_names" in evaluation.about.values else {}
    other = [s for s in systems if s.id in given and given[s.id] != s.shape]
    said = "; ".join(f"system {s.id} is {given[s.id]} there and {s.shape} by the computed class" for s in other)
    return [Text([f"The report's names differ: {said}."])] if other else []


def _systems(run: Run, evaluation: Evaluation, kind: str) -> Table:
    """Errors of each shown system and species: the model's in "raw" or "scaled" units, or the "naive" forecasters'."""
    unaided, scaled = kind == "naive", kind == "scaled"
    by, of = ("forecaster ", "") if unaided else ("", " unparsed_steps")
    columns = named(f"unique_id class variable {by}mse rmse mae mape r2{of}")
    rows = [
        [row[column.name] for column in columns]
        for row in (evaluation.systems_scaled if scaled else evaluation.systems)
        if row["unique_id"] in evaluation.shown and (row["forecaster"] == MODEL) != unaided
    ]
    rows.sort(key=lambda row: evaluation.shown.index(row[0]))
    about = "forecasts without a model" if unaided else run.title
    unit = "scaled units" if scaled else "raw units"
    caption = f"Errors of each shown system over its horizon, {about}, {unit}{', as the reports have them' * scaled}."
    name = f"systems-{'naive' if unaided else run.stage}{'-scaled' if scaled else ''}"
    files = [evaluation.file("systems_scaled.csv" if scaled else "systems.csv")]
    made = Table(name, caption, columns, rows, files, [run.stage], heads=3, choice="" if unaided else unit)
    return replace(made, folded=unaided, model=not unaided)


def _running(system: System) -> Floats:
    """Running RMSE of each variable, (h, V); a step that did not parse is persistence, as in every score."""
    fallback = np.broadcast_to(system.context[-1], system.truth.shape)
    forecast, _ = scores.filled(system.forecast[None], fallback[None])
    truth = system.truth[None]
    each = [scores.by_step(truth[..., [v]], forecast[..., [v]])["running_rmse"] for v in range(truth.shape[-1])]
    return np.stack(each, axis=1)


def _scales(evaluation: Evaluation) -> dict[str, float]:
    """Scaled over raw units by system: the ratio of the largest of its RMSE in both records."""
    found = {}
    for system in evaluation.shown:
        raw, scaled = (
            {(r["forecaster"], r["variable"]): r["rmse"] for r in rows if r["unique_id"] == system}
            for rows in (evaluation.systems, evaluation.systems_scaled)
        )
        best = max((key for key in raw if key in scaled), key=lambda key: raw[key], default=None)
        if best and raw[best]:
            found[system] = scaled[best] / raw[best]
    return found


def _running_table(
    run: Run, evaluation: Evaluation, running: Mapping[str, Floats], scales: Mapping[str, float]
) -> Table:
    """Running RMSE by step, a column for each system and species; in scaled units where `scales` are given."""
    columns, values = named("step"), []
    for system, raw in running.items():
        if not scales or system in scales:
            columns += [Column(f"{system}_{name}", f"{system} {name}") for name in evaluation.names]
            values.append(raw * scales.get(system, 1.0))
    steps = min(map(len, values), default=0)
    rows = [[step + 1, *(float(x) for one in values for x in one[step])] for step in range(steps)]
    records = ["forecasts.csv", "history.csv"] + (["systems.csv", "systems_scaled.csv"] if scales else [])
    files, name = [evaluation.file(record) for record in records], f"running-rmse-{run.stage}"
    name, choice = (f"{name}-scaled", "scaled units") if scales else (name, "raw units")
    by = ", by the ratio of the RMSE in both units" if scales else ""
    caption = f"Running RMSE of each shown system and species by step, {run.title}, {choice}{by}."
    return Table(name, caption, columns, rows, files, [run.stage], folded=True, choice=choice)


def _tokens(study: Study, run: Run, evaluation: Evaluation) -> list[Block]:
    """The loss of every token of one system's true horizon."""
    system = next((s for s in evaluation.shown if any(row["unique_id"] == s for row in evaluation.tokens)), None)
    if system is None:
        return []
    rows = sorted((r for r in evaluation.tokens if r["unique_id"] == system), key=lambda row: row["position"])
    nats, steps, texts = ([row[name] for row in rows] for name in ("nats", "step", "text"))
    caption = f"Loss of each token of system {system}'s true horizon under the {run.title}, in nats"
    title, file = f"Loss by token, system {system}, {run.title}", [evaluation.file("tokens.csv")]
    draw = partial(plots.token_loss, nats, steps, texts, title=title, label=study.label)
    figure = Figure(f"token-loss-{run.stage}", f"{caption}, along the horizon.", draw, file, [run.stage])
    columns = named("position step token text nats")
    values = [[row[column.name] for column in columns] for row in rows]
    return [figure, Table(f"tokens-{run.stage}", f"{caption}.", columns, values, file, [run.stage], folded=True)]


def draw_shown(root: Path, run: str, path: Path, label: str) -> None:
    """Draw the shown systems as the run of a folder below `root` forecast them, beside truth and copy."""
    evaluation = Evaluation(Records(root), run)
    systems = drawn(evaluation, best_only=True)
    plots.forecast_grid(systems, evaluation.names, path, f"Forecasts, {Path(run).name}", label)


def drawn(evaluation: Evaluation, best_only: bool = False) -> list[dict[str, Any]]:
    """The shown systems as the figures take them, over each the copies, the best of them first, and the law's fit."""
    best = scores.best_copy(evaluation.mse("shown"))
    names = [best] if best_only else [best, *(name for name in UNAIDED if name != best)]
    copies = {name: {one.id: one.forecast for one in evaluation.naive(name)} for name in names}
    systems = []
    for one in evaluation.forecasts:
        known = {name: of[one.id] for name, of in copies.items() if of}
        fields = ("id", "title", "time", "context", "truth", "forecast", "quantiles")
        systems.append({field: getattr(one, field) for field in fields} | {"copies": known})
    return systems
