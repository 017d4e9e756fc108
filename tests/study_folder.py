"""A small run folder of a study with every record that the page is made from, for its tests: made by code, no model.

The series are damped waves, the forecasts the truth with noise that training lessens; they are scored and their
preprocessing is recorded by the modules that do so in a study.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.llmtime import Codec
from data.lotka_volterra import Dataset
from data.splits import Split
from experiments.forecasting import baselines, judge
from experiments.forecasting.forecast import Forecasts
from experiments.run_folder import files
from experiments.settings.record import POCKET, Settings
from experiments.task.preprocessing import preprocessing
from experiments.task.task import Task
from qwen_min import Tokenizer

Row = dict[str, Any]
TOY = "toy: the pocket model"
POINTS, STEPS, SYSTEMS = 30, 40, 24
RATES, RANKS, CONTEXTS = (1e-5, 5e-5, 1e-4), (2, 4, 8), (128, 512)
PARTS = {"validation": [14, 15, 16, 17, 18, 19], "shown": [15, 17], "test": [20, 21, 22, 23]}
JUDGED = {"untrained": 0.5, "default": 0.3, "final": 0.05, "contexts/128": 0.2}
"""The runs that are evaluated, and the noise in their forecasts."""
BUDGET = 10**17
TRAINING, VALIDATION, INFERENCE = 6_776_280_778_752, 1_129_380_129_792, 903_504_103_833  # FLOPs of one

PROTOCOL = """
title = "Fung: four systems, 80 points to 20"

[settings]
points = 80

[[footnote]]
about = "forecasts"
text = "The report drew <sampled> text; the honest figure is the greedy one below."

[[footnote]]
about = "split"
text = "The split is random."

[claimed.grid]
measure = "validation loss"
cells = [{lr = 1e-5, rank = 2, value = 2.932}, {lr = 1e-4, rank = 8, value = 0.661}, {lr = 1.0, rank = 2, value = 9.5}]

[claimed.context]
measure = "MSE, scaled units"
file = "evaluation/scores.csv"
match = {part = "shown", unit = "scaled", forecaster = "model", variable = "all"}
column = "mse"
values = [{context = 128, value = 0.895}]

[claimed.context_loss]
measure = "cross-entropy"
file = "evaluation/evaluation.json"
column = "horizon_loss.shown"
values = [{context = 128, value = 2.609}, {context = 512, value = 2.0401}]

[[claimed.figure]]
stage = "final"
what = "MSE, system 17, prey, scaled units"
value = 6.177
ours = "the same system and unit"
file = "evaluation/systems_scaled.csv"
match = {unique_id = "17", forecaster = "model", variable = "prey"}
column = "mse"

[[claimed.figure]]
stage = "final"
what = "MSE, system 7, prey"
value = 0.25
file = "evaluation/systems_scaled.csv"
match = {unique_id = "7", forecaster = "model", variable = "prey"}
column = "mse"

[[claimed.figure]]
stage = "default"
what = "cross-entropy of the shown horizons"
value = 0.9651
file = "evaluation/evaluation.json"
column = "horizon_loss.shown"
"""


def write(root: Path, label: str = TOY, layers: int = 2, **settings: Any) -> Path:
    """Write the folder of a whole study and return it; `settings` are those of its forecasts."""
    task = _task(Settings(points=POINTS, **({"horizon": 8, "constrained": False} | settings)))
    runs = _write_grid(root, label, layers)
    made = [("default", "default", "default", 1e-5, 4, 512)]
    made += [("context", f"context-{c}", f"contexts/{c}", 1e-4, 8, c) for c in CONTEXTS]
    made += [("final", "final", "final", 1e-4, 8, 512)]
    runs += [_run(root, *run, label=label, layers=layers) for run in made]
    for part, systems in PARTS.items():
        files.write_csv(root / "naive" / f"{part}.csv", list(_naive_rows(task, systems)))
    for folder, noise in JUDGED.items():
        parts = ["validation", "shown"] if folder in ("untrained", "default") else ["shown"]
        parts = list(PARTS) if folder == "final" else parts
        _evaluate(root / folder, task, noise, {part: PARTS[part] for part in parts})
    files.write_csv(root / "results.csv", runs)
    files.write_csv(root / "flops.csv", list(_flops(runs)))
    files.write_text(root / "protocol.toml", PROTOCOL)
    files.write_json(root / "study.json", _plan(runs, label))
    files.write_json(root / "preprocessing.json", preprocessing(task))
    known = {"stage": "final", "part": "training", "label": "long run", "claimed": 48_000, "reproduced": 48_100}
    known |= {"exact": 101_000, "share_of_exact": 48_000 / 101_000, "note": "as printed"}
    said = dict.fromkeys(known) | {"stage": "grid", "part": "total", "label": "sweep", "claimed": 50_000}
    files.write_csv(root / "accounting.csv", [known, said])
    files.write_json(root / "accounting.json", {"mistakes": ["The backward is counted for one series of four."]})
    return root


def write_grid(root: Path, label: str = TOY, judged: Mapping[str, float] = {}) -> Path:  # noqa: B006 (not changed)
    """Write the folder of a grid alone: no plan, and the evaluations of the folders in `judged`, as in `JUDGED`."""
    runs = _write_grid(root, label, layers=1)
    later = ("stage", "folder", "context")
    files.write_csv(root / "results.csv", [{k: v for k, v in run.items() if k not in later} for run in runs])
    task = _task(Settings(points=POINTS, horizon=8, constrained=False)) if judged else None
    for folder, noise in judged.items():
        _evaluate(root / folder, task, noise, {part: PARTS[part] for part in ("validation", "shown")})
    for path in root.rglob("metrics.jsonl"):  # the study's own runs are of a version without a clock
        lines = files.read_jsonl(path)
        files.write_jsonl(
            path.with_name("clock.jsonl"), [{"step": m["step"], "seconds": 0.75 * i} for i, m in enumerate(lines, 1)]
        )
    return root


def _write_grid(root: Path, label: str, layers: int) -> list[Row]:
    files.write_text(root / "config.toml", f'protocol = "fung"\ncontext = 512\nbudget = {BUDGET}\nlr = [1e-5, 5e-5]\n')
    manifest: Row = {"label": label, "versions": {"torch": "2.13.0"}, "validation_systems": PARTS["validation"]}
    manifest["commands"] = {stage: f"python -m experiments.run {stage} --out RUN" for stage in ("grid", "final")}
    files.write_json(root / "manifest.json", manifest)
    runs = [("baseline", "untrained", "untrained", 0.0, 0, 512)]
    names = [(f"lr{lr:g}-r{rank}", lr, rank) for rank in RANKS for lr in RATES]
    runs += [("grid", name, f"cells/{name}", lr, rank, 512) for name, lr, rank in names]
    return [_run(root, *run, label=label, layers=layers) for run in runs]


def _run(
    root: Path, stage: str, name: str, folder: str, lr: float, rank: int, context: int, label: str, layers: int
) -> Row:
    """The records of one training run; returns its row of results.csv."""
    draw = np.random.default_rng(rank + context)
    steps = STEPS * (3 if stage == "final" else 1) if rank else 0
    reached = 0.4 + 1.3 * math.exp(-1e4 * lr * math.log2(2 * rank or 1))
    metrics: list[Row] = []
    for step in range(1, steps + 1):
        done = {"training": step * TRAINING, "validation": step // 10 * VALIDATION}
        loss = reached + 2 * math.exp(-step / 10)
        metrics.append({"step": step, "loss": loss + 0.05 * draw.standard_normal(), "gradient_norm": 1.0} | done)
        if step % 10 == 0:
            metrics.append({"step": step, "validation_loss": loss} | done)
    if not steps:
        metrics.append({"step": 0, "validation_loss": reached + 2, "training": 0, "validation": VALIDATION})
    files.write_jsonl(root / folder / "metrics.jsonl", metrics)
    if steps:
        vanishing = "layers.1.v_proj.B" if stage == "final" else ""
        files.write_jsonl(root / folder / "gradients.jsonl", list(_gradients(steps, layers, draw, vanishing)))
    spent = {"training": steps * TRAINING, "validation": max(1, steps // 10) * VALIDATION}
    found = [m["validation_loss"] for m in metrics if "validation_loss" in m]
    result: Row = {"cell": name, "lr": lr, "rank": rank, "steps": steps, "context": context, "label": label}
    result |= {"validation_loss": found[-1], "validation_loss_with_padding": None, "best_validation_loss": min(found)}
    result |= {"best_step": steps, "last_losses_mean": reached if steps else None, "validation_tokens": 4321}
    files.write_json(root / folder / "result.json", result | {"flops": spent, "predicted_flops": spent})
    return {"stage": stage, "name": name, "folder": folder} | result | {f"{part}_flops": n for part, n in spent.items()}


def _gradients(steps: int, layers: int, draw: np.random.Generator, vanishing: str) -> Iterator[Row]:
    names = [f"layers.{i}.{p}_proj.{half}" for i in range(layers) for p in "qv" for half in "AB"]
    for step in range(1, steps + 1, 2):
        norms = {name: 0.1 * draw.uniform(0.5, 1.5) for name in names}
        norms |= {name: 0.0 for name in names if step == 1 and name.endswith("A")}
        yield {"step": step, "norms": norms | ({vanishing: 0.1 * math.exp(-step / 6)} if vanishing else {})}


def _flops(runs: Sequence[Row]) -> Iterator[Row]:
    parts = ("training", "validation", "inference", "total")
    spent: dict[str, dict[str, int]] = {}
    for run in runs:
        own = {"training": run["training_flops"], "validation": run["validation_flops"]}
        own["inference"] = INFERENCE if run["folder"] in JUDGED else 0
        for stage in (run["stage"], "all"):
            of_stage = spent.setdefault(stage, dict.fromkeys(parts, 0))
            for part, flops in (own | {"total": sum(own.values())}).items():
                of_stage[part] += flops
    for stage in sorted(spent, key=lambda stage: stage == "all"):
        for part, flops in spent[stage].items():
            yield {"stage": stage, "part": part, "flops": flops, "predicted": flops, "share_of_budget": flops / BUDGET}


def _plan(runs: Sequence[Row], label: str) -> Row:
    stages = []
    for run in runs:
        row = {key: run[key] for key in ("stage", "name", "folder", "lr", "rank", "context", "steps")}
        predicted = {"training": run["training_flops"], "validation": run["validation_flops"], "inference": INFERENCE}
        stages.append(row | {"predicted": predicted})
    best = {"rule": "lowest validation loss per real token", "cell": "lr0.0001-r8", "lr": 1e-4, "rank": 8}
    best |= {"context": 512, "overridden": False}
    return {"protocol": "fung", "label": label, "shortened": 0.25, "stages": stages, "best": best, "budget": BUDGET}


def _task(settings: Settings) -> Task:
    """Damped and growing waves about 1.5, in order: 14 systems train, 6 validate, 4 test."""
    draw, points = np.random.default_rng(0), settings.points + settings.horizon
    time = 2 * np.arange(points, dtype=np.float64)
    phase, growth = draw.uniform(0, 6, (SYSTEMS, 1, 2)), draw.uniform(-0.02, 0.004, (SYSTEMS, 1, 1))
    waves = np.exp(growth * time[:, None]) * np.sin(time[:, None] / 5 + phase)
    series = (1.5 + np.array([1.0, 0.4]) * waves).astype(np.float32)
    dataset = Dataset(time, series, ("prey", "predator"), "0" * 64, "damped waves", Path("waves.h5"))
    split = Split(np.arange(14), np.arange(14, 20), np.arange(20, SYSTEMS))
    codec, tokenizer = Codec(settings.decimals), Tokenizer.from_pretrained(POCKET)
    return Task(settings, dataset, split, np.full(SYSTEMS, 0.5), codec, tokenizer)


def _naive(task: Task, systems: Sequence[int]) -> dict[str, np.ndarray]:
    context = task.dataset.series[systems, : task.settings.points].astype(np.float64)
    rules = {"persistence": baselines.persistence, "context mean": baselines.context_mean}
    rules["seasonal repeat"] = baselines.seasonal_repeat
    return {name: np.stack([rule(one, task.settings.horizon) for one in context]) for name, rule in rules.items()}


def _naive_rows(task: Task, systems: Sequence[int]) -> Iterator[Row]:
    points, names = task.settings.points, task.dataset.names
    for forecaster, values in _naive(task, systems).items():
        for (i, step, v), value in np.ndenumerate(values):
            row: Row = {
                "forecaster": forecaster,
                "unique_id": systems[i],
                "ds": float(task.dataset.time[points + step]),
            }
            truth = float(task.dataset.series[systems[i], points + step, v])
            yield row | {"variable": names[v], "y": truth, "y_hat": float(value)}


def _evaluate(folder: Path, task: Task, noise: float, parts: Mapping[str, list[int]]) -> None:
    """The evaluation of a model whose forecasts are the truth and some noise."""
    settings, draw = task.settings, np.random.default_rng(len(parts))
    systems = list(dict.fromkeys(system for part in parts.values() for system in part))
    series = task.dataset.series[systems].astype(np.float64)
    context, truth = series[:, :POINTS], series[:, POINTS:]
    several = settings.num_samples > 1
    samples = truth[:, None] + noise * draw.standard_normal((len(systems), settings.num_samples, *truth.shape[1:]))
    values = np.median(samples, axis=1)
    if not settings.constrained:
        values[systems.index(17), 2] = np.nan  # a step that did not parse
    tokens = [len(task.tokens(s)) - len(task.tokens(s, POINTS)) for s in systems]
    losses = [draw.exponential(noise + 0.2, count) for count in tokens]
    cut = draw.uniform(0, 0.1, len(systems)) if settings.constrained else None
    flops = {"validation": 0, "inference": INFERENCE}
    cut_mean = None if cut is None else cut / 50
    made = Forecasts(systems, context, truth, values, samples if several else None, losses, cut, cut_mean, flops)
    naive = {part: _naive(task, of) for part, of in parts.items()}
    result = files.read_json(folder / "result.json")
    judge.write(folder / "evaluation", judge.tables(task, made, naive, parts, result, flops, None))
