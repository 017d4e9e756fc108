"""`bench --scaling`: how a training step grows with context, batch and rank, and generation with prompt and batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import plots
from experiments.bench import cases
from experiments.bench.cases import Case
from experiments.bench.session import Options, Session
from experiments.run_folder import files

NEW = 33  # tokens that a generation writes; the first is the prefill's


def points(quick: bool) -> list[tuple[str, int, Case]]:
    """(axis, size, case) of every point."""
    contexts = (32, 64, 128) if quick else (128, 256, 512, 1024, 2048)
    batches = (1, 2) if quick else (1, 2, 4, 8)
    ranks = (2, 8) if quick else (2, 4, 8, 16, 32, 64)
    prompts = (20, 40) if quick else (100, 200, 400, 800, 1600)
    rows = (1, 4) if quick else (1, 4, 16, 64)
    tokens, of_batch = (64, 32) if quick else (512, 256)
    prompt = 20 if quick else 200
    return [
        *(("context of a step, batch 1", c, _train(1, c, cases.RANK)) for c in contexts),
        *((f"batch of a step, {of_batch} tokens", b, _train(b, of_batch, cases.RANK)) for b in batches),
        *((f"rank of a step, 1x{tokens} tokens", r, _train(1, tokens, r)) for r in ranks),
        *(("prompt of a generation, one series", p, _generate(1, p)) for p in prompts),
        *((f"series of a generation, prompt {prompt}", b, _generate(b, prompt)) for b in rows),
    ]


def scale(options: Options, folder: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure every point, and write scaling.csv and scaling.json (both after each point) and scaling.png.

    Points that are longer than the model can read are left out. Arguments, result and errors as of `bench`.
    """
    session = Session(options, say)
    longest, fitting = session.config.max_position_embeddings, []
    for point in points(options.quick):
        job = point[2].job
        if (job["context"] if "context" in job else job["prompt"] + NEW) <= longest:
            fitting.append(point)
        else:
            say(f"{point[0]}, {point[1]}: left out, the model reads {longest} tokens at most")

    def write(lines: list[dict[str, Any]]) -> dict[str, Any]:
        placed = zip(fitting, lines, strict=False)
        lines = [line | {"axis": axis, "value": value, "per": case.note} for (axis, value, case), line in placed]
        report = session.head() | {"points": lines}
        files.write_json(folder / "scaling.json", report)
        files.write_csv(folder / "scaling.csv", [_row(line) for line in lines])
        return report

    report = session.run([case for _, _, case in fitting], folder, write)
    plots.bench_scaling(report["points"], folder / "scaling.png", "Time and memory by size", report["label"])
    return report


def _train(batch: int, context: int, rank: int) -> Case:
    job = {"job": "train", "batch": batch, "context": context, "rank": rank}
    return Case("train", f"train {batch}x{context}, rank {rank}", job, note="a training step")


def _generate(batch: int, prompt: int) -> Case:
    job = {"job": "generate", "batch": batch, "prompt": prompt, "new": NEW, "how": "symbols", "draft": 0}
    name = f"{batch} series, {prompt} + {NEW}"
    return Case("generate", name, job, unit="tokens/s", note=f"decoding {NEW - 1} tokens of each series")


def _row(line: dict[str, Any]) -> dict[str, Any]:
    """A line of scaling.csv."""
    row: dict[str, Any] = {"axis": line["axis"], "size": line["value"], "of": line["per"]}
    for who in ("ours", "peer"):
        side = line.get(who, {})
        least, most = side.get("seconds_spread", (None, None))
        row |= {
            f"{who}_seconds": side.get("seconds"),
            f"{who}_seconds_least": least,
            f"{who}_seconds_most": most,
            f"{who}_seconds_with_prefill": side.get("whole_seconds"),
            f"{who}_peak_bytes": side.get("device_peak_bytes", side.get("peak_bytes")),
        }
    return row | {"floor_seconds": line["floor_seconds"]}
