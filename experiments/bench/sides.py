"""What runs in a fresh process: one job of one side. The job comes as JSON on stdin, what it found goes to stdout.

echo '{"job": "calibrate", ...}' | python -m experiments.bench.sides
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file

from qwen_min.fast.product import product

STEPS = 2  # that are timed, after one that warms up and is compared


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job and return its measurement.

    Args:
        job: `job`, its name; `who`, "ours" or "peer"; `model`, a folder; `dtype`, that our weights are kept in;
            `compute`, the type of products; `device`; `ids`, (rows, tokens); `arrays`, where to save the tensors that
            are compared; and what the job's own function reads.

    Returns:
        `seconds`, each time it took; `peak_bytes`, the most memory resident until the last of them ended, and
        `baseline_bytes`, until the libraries were imported; what was computed, under `found`.
    """
    if job["job"] == "calibrate":
        return _calibrate(job)
    if job["who"] == "peer":
        from experiments.bench import peer as side
    else:
        from experiments.bench import ours as side  # type: ignore[no-redef]
    baseline = peak_bytes()
    measured = _JOBS[job["job"]](job, side.Side)
    return measured | {"baseline_bytes": baseline, "threads": torch.get_num_threads()}


def _train(job: dict[str, Any], open_side: Callable[..., Any]) -> dict[str, Any]:
    """Steps of LoRA. The first, from the same matrices on both sides, is compared: its loss, and every gradient."""
    side, ids, symbols = open_side(job), _ids(job), _symbols(job)
    matrices = side.add_lora(job["rank"])
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # B not zero, so that A's gradient is not either
        for _, matrix in sorted(matrices.items()):
            matrix.copy_(torch.randn(matrix.shape, generator=draw) * 0.01)
    optimizer = torch.optim.Adam(matrices.values(), lr=1e-4)
    loss = side.step(optimizer, ids, symbols, exact=True)
    gradients = {name: m.grad.clone() for name, m in matrices.items() if m.grad is not None}
    seconds = [_clock(job, lambda: side.step(optimizer, ids, symbols, exact=False)) for _ in range(STEPS)]
    measured = _measured(job, seconds, loss=loss)
    _save(gradients, job)
    return measured


def _evaluate(job: dict[str, Any], open_side: Callable[..., Any]) -> dict[str, Any]:
    """The loss of a batch, without gradient."""
    side, ids, symbols = open_side(job), _ids(job), _symbols(job)
    loss = side.loss(ids, symbols, exact=True)
    seconds = [_clock(job, lambda: side.loss(ids, symbols, exact=False)) for _ in range(STEPS)]
    return _measured(job, seconds, loss=loss)


def _generate(job: dict[str, Any], open_side: Callable[..., Any]) -> dict[str, Any]:
    """Greedy tokens after prompts. `seconds` are those of decoding, from the first token to the last."""
    side, prompts, new = open_side(job), _ids(job), job["new"]
    side.generate(prompts[:, -20:], 3, job["how"], job, lambda: None)  # warms up
    at: list[float] = []
    tick = lambda: at.append(_now(job))  # noqa: E731
    side.forwards = 0
    began = _now(job)
    tokens = side.generate(prompts, new, job["how"], job, tick)
    ended, (first,) = _now(job), at
    found = {"tokens": tokens.tolist(), "forwards": max(0, side.forwards - 1)}
    return _measured(job, [ended - first], **found) | {"whole": [ended - began]}


def _series(job: dict[str, Any], open_side: Callable[..., Any]) -> dict[str, Any]:
    """Forecast the validation series: ours all in one call, the peer the first few one by one, scaled up."""
    from experiments.forecasting import forecast as evaluate
    from experiments.settings.record import Settings
    from experiments.task.task import Task
    from qwen_min import Tokenizer

    names = ("model", "device", "dtype", "points", "horizon")
    settings = Settings(**{name: job[name] for name in names}, forecast_series=job["series"])
    task = Task.prepare(settings, Tokenizer.from_pretrained(settings.model))
    systems, side = task.forecast_systems("validation"), open_side(job)
    some = systems[: job["compared"]]
    values: list[Any] = []

    def ours() -> None:
        values.append(evaluate.forecast(task, side.model, systems).values[: len(some)].tolist())

    def peer() -> None:
        for system in some:
            prompt = torch.tensor([task.tokens(system, settings.points)], device=job["device"])
            new = side.generate(prompt, task.tokens_to_forecast, "symbols", job, lambda: None)
            values.append(task.read_forecast(new[0].tolist(), system).tolist())

    if job["who"] == "ours":
        return _measured(job, [_clock(job, ours)], values=values[0])
    seconds = _clock(job, peer) * len(systems) / len(some)
    return _measured(job, [seconds], values=values)


def _load(job: dict[str, Any], open_side: Callable[..., Any]) -> dict[str, Any]:
    """From safetensors to a model that is ready, and on to the first logits."""
    began = _now(job)
    side = open_side(job)
    ready = _now(job)
    logits = side.logits(_ids(job)[:, :1])
    measured = _measured(job, [ready - began]) | {"whole": [_now(job) - began]}
    _save({"logits": logits}, job)
    return measured


def _count(job: dict[str, Any], open_side: Callable[..., Any]) -> dict[str, Any]:
    """What a meter adds to a forward of one token: pairs of forwards with and without, in turns."""
    forward = open_side(job).counted(_ids(job), job)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(job["pairs"] + 1):
        for metered in (pair % 2 == 0, pair % 2 == 1):
            seconds[metered].append(_clock(job, partial(forward, metered)))
    plain = seconds[False][1:]  # the first pair warmed up
    added = [with_meter - without for without, with_meter in zip(plain, seconds[True][1:], strict=True)]
    usual, quarters = statistics.median(plain), statistics.quantiles(added, n=4)
    return _measured(job, plain) | {
        "overhead": statistics.median(added) / usual,
        "overhead_spread": [quarters[0] / usual, quarters[2] / usual],
    }


def _gaps(job: dict[str, Any], open_side: Callable[..., Any]) -> dict[str, Any]:
    """How far apart the logits of two tokens are, after each text; the two are `pairs`."""
    side, gaps = open_side(job), []
    for text, (a, b) in zip(job["ids"], job["pairs"], strict=True):
        last = side.logits(torch.tensor([text], device=job["device"]))[0, -1]
        gaps.append((last[a] - last[b]).abs().item())
    return _measured(job, [], gaps=gaps)


def _calibrate(job: dict[str, Any]) -> dict[str, Any]:
    """The best rate of a few matrix products, each by torch's own choice of library and by ours, and of a few ways
    to read a large tensor with all threads."""
    dtype, device = getattr(torch, job["compute"]), job["device"]
    side = job["square"]
    square = torch.ones(side, side, dtype=dtype, device=device)
    tokens = torch.ones(job["tokens"], job["hidden"], dtype=dtype, device=device)
    matrix = torch.ones(job["feed_forward"], job["hidden"], dtype=dtype, device=device)
    large = torch.ones(2**15, job["columns"], device=device)
    vector, copy = torch.ones(job["columns"], device=device), torch.empty_like(large)
    products = {}
    for name, multiply in (("torch", torch.nn.functional.linear), ("ours", product)):  # of one library or of two
        seconds = _best(job, partial(multiply, square, square))
        products[f"{side} square, {name}"] = 2 * side**3 / seconds
        seconds = _best(job, partial(multiply, tokens, matrix))
        products[f"feed-forward, {name}"] = 2 * len(tokens) * matrix.numel() / seconds
    reads = {
        "sum": large.nbytes / _best(job, large.sum),
        "matrix-vector": large.nbytes / _best(job, partial(torch.mv, large, vector)),
        "copy": 2 * large.nbytes / _best(job, partial(copy.copy_, large)),  # read and written
    }
    return {
        "flops_per_second": max(products.values()),
        "bytes_per_second": max(reads.values()),
        "products": products,
        "reads": reads,
        "threads": torch.get_num_threads(),
    }


def peak_bytes() -> int:
    """The most memory that this process has had resident, interpreter, libraries and mapped files included.

    Linux's VmHWM is this process's alone; `ru_maxrss`, which serves elsewhere, starts at what its parent held.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _measured(job: dict[str, Any], seconds: list[float], **found: Any) -> dict[str, Any]:
    measured: dict[str, Any] = {"seconds": seconds, "peak_bytes": peak_bytes(), "found": found}
    if job["device"] != "cpu":
        measured["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return measured


def _save(tensors: dict[str, torch.Tensor], job: dict[str, Any]) -> None:
    """Keep what the parent compares."""
    save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, job["arrays"])


def _now(job: dict[str, Any]) -> float:
    if job["device"] != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def _clock(job: dict[str, Any], work: Callable[[], Any]) -> float:
    began = _now(job)
    work()
    return _now(job) - began


def _best(job: dict[str, Any], work: Callable[[], Any]) -> float:
    return min(_clock(job, work) for _ in range(6))


def _ids(job: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(job["ids"], device=job["device"])


def _symbols(job: dict[str, Any]) -> torch.Tensor | None:
    return torch.tensor(sorted(job["symbol_ids"]), device=job["device"]) if job.get("symbols") else None


_JOBS = {job.__name__[1:]: job for job in (_train, _evaluate, _generate, _series, _load, _count, _gaps)}

if __name__ == "__main__":
    print(json.dumps(run(json.load(sys.stdin))))
