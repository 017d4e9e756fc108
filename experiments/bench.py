"""The `bench` verb: training, evaluation, generation and loading beside transformers + PEFT, in one run.

Each measurement is a fresh process with pinned threads; ours and the peer's alternate, so that both meet the same
machine; medians are reported with their spread. Both sides return what they computed, and the parent checks that it
is the same before it prints a ratio. Floors come from a product rate and a read bandwidth measured in the same run.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WHATS = ("train", "evaluate", "generate", "load")
RANK, PROMPT, NEW_TOKENS = 8, 200, 64


def bench(
    model: Path, whats: list[str], batch: int, context: int, repeats: int, dtype: str, peer: bool
) -> dict[str, Any]:
    """Measure `whats`; returns what `--json` prints.

    Args:
        model: a folder in Hugging Face layout.
        whats: of `WHATS`.
        batch, context: the shape of a step.
        repeats: fresh processes of each side.
        dtype: that our weights are kept in; products run in float32 on both sides.
        peer: whether transformers + PEFT run too.
    """
    report: dict[str, Any] = {
        "model": str(model),
        "batch": batch,
        "context": context,
        "dtype": dtype,
        "calibration": _run({"what": "calibrate"}),
        "results": {},
    }
    for what in whats:
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for _ in range(repeats):
            for who in ("ours", "peer") if peer else ("ours",):
                runs[who].append(
                    _run(
                        {
                            "what": what,
                            "who": who,
                            "model": str(model),
                            "batch": batch,
                            "context": context,
                            "dtype": dtype,
                        }
                    )
                )
        report["results"][what] = _compare(what, {who: r for who, r in runs.items() if r})
    return report


def table(report: dict[str, Any]) -> str:
    """The report as aligned text."""
    rate, read = report["calibration"]["flops_per_second"], report["calibration"]["bytes_per_second"]
    lines = [
        f"{report['model']}, {report['batch']} x {report['context']} tokens, our weights in {report['dtype']}; "
        f"calibrated {rate / 1e9:.0f} GFLOP/s, {read / 1e9:.1f} GB/s",
        "",
        f"{'what':10} {'side':5} {'seconds':>9} {'spread':>15} {'peak':>8}   {'faster':>6} {'memory':>6}  same?",
    ]
    for what, result in report["results"].items():
        for who, side in result["sides"].items():
            low, high = side["spread"]
            line = f"{what:10} {who:5} {side['seconds']:9.2f} {low:7.2f}-{high:7.2f} {side['peak_bytes'] / 1e9:5.1f} GB"
            if who == "peer":
                line += f"   {result['ratio']:5.2f}x {result['memory_ratio']:5.2f}x  {result['same']}"
            lines.append(line)
    return "\n".join(lines)


def _compare(what: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    sides = {}
    for who, results in runs.items():
        seconds = [s for r in results for s in r["seconds"]]
        sides[who] = {
            "seconds": statistics.median(seconds),
            "spread": [min(seconds), max(seconds)],
            "peak_bytes": max(r["peak_bytes"] for r in results),
            "found": results[0]["found"],
        }
    result: dict[str, Any] = {"sides": sides}
    if "peer" in sides:
        ours, peer = sides["ours"], sides["peer"]
        result |= {
            "ratio": peer["seconds"] / ours["seconds"],
            "memory_ratio": peer["peak_bytes"] / ours["peak_bytes"],
            "same": _same(what, ours["found"], peer["found"]),
        }
    return result


def _same(what: str, ours: dict[str, Any], peer: dict[str, Any]) -> str:
    """How far apart the two computed; ValueError where they did not compute the same."""
    if what == "generate":
        if ours["tokens"] != peer["tokens"]:
            raise ValueError("bench: generate: the greedy tokens differ: expected the same from both sides")
        return f"{len(ours['tokens'])} tokens equal"
    error = abs(ours["loss"] - peer["loss"])
    # float32 cross-entropy over 151,936 classes is itself off by 4e-5
    if error > 2e-4 or what == "train" and not ours["gradient"] > 0:
        raise ValueError(
            f"bench: {what}: the losses are {ours['loss']} and {peer['loss']}: expected them equal, and a "
            "gradient that is not zero"
        )
    text = f"loss to {error:.0e}"
    if "gradient" in ours:
        text += f", gradient norm to {abs(ours['gradient'] / peer['gradient'] - 1):.0e} relative"
    return text


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a fresh process; it prints its result as one JSON object."""
    pinned = os.environ | {
        "OMP_PROC_BIND": "true",
        "OMP_PLACES": "cores",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench", json.dumps(job)], env=pinned, capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        raise ValueError(
            f"bench: {job['what']} of {job.get('who', 'the machine')} failed ({last[0][:300]}): expected "
            "a result; the peer needs transformers and peft (pip install -e '.[test]')"
        )
    return json.loads(done.stdout.splitlines()[-1])


# What follows runs in the fresh process.


def _job(job: dict[str, Any]) -> dict[str, Any]:
    import resource

    if job["what"] == "calibrate":
        return _calibrate()
    result = globals()[f"_{job['what']}"](job)
    return result | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _calibrate() -> dict[str, float]:
    import torch

    a, big = torch.ones(2048, 2048), torch.ones(2**28)  # 1 GB
    return {
        "flops_per_second": 2 * 2048**3 / min(_timed(lambda: a @ a) for _ in range(5)),
        "bytes_per_second": big.nbytes / min(_timed(big.sum) for _ in range(5)),
    }


def _timed(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _open(job: dict[str, Any]):
    """The model of one side, in float32 arithmetic."""
    import torch

    if job["who"] == "peer":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    from qwen_min import Qwen

    kept = getattr(torch, job["dtype"])
    return Qwen.from_pretrained(job["model"], dtype=kept, compute_dtype=torch.float32)


def _batch(job: dict[str, Any]):
    """Inputs and targets (B, T): random digits and separators, the same for both sides."""
    import torch

    symbols = torch.tensor([*range(15, 25), 11, 13, 26])
    draw = torch.Generator().manual_seed(0)
    ids = symbols[torch.randint(len(symbols), (job["batch"], job["context"] + 1), generator=draw)]
    return ids[:, :-1], ids[:, 1:]


def _train(job: dict[str, Any]) -> dict[str, Any]:
    """Three steps of LoRA on q and v (the first warms up and is not timed); loss and gradient of the first."""
    import torch

    model, (inputs, targets) = _open(job), _batch(job)
    ours = job["who"] == "ours"
    if ours:
        from lora import add_lora

        add_lora(model, RANK, seed=0)
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():  # the same matrices on both sides, and B not zero, so that A's gradient is not either
        draw = torch.Generator().manual_seed(1)
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.01)
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    seconds: list[float] = []
    found: dict[str, float] = {}
    for _ in range(3):
        began = time.perf_counter()
        if ours:
            from data.windows import Windows
            from experiments.train import training_step

            windows = Windows(inputs.numpy(), targets.numpy(), inputs[:, 0].numpy(), inputs[:, 0].numpy(), pad_id=0)
            loss, norm = training_step(model, windows, list(range(job["batch"])), optimizer)
        else:
            optimizer.zero_grad()
            logits = model(inputs).logits
            out = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            out.backward()
            loss, norm = out.item(), torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()
            del logits, out
            optimizer.step()
        seconds.append(time.perf_counter() - began)
        found = found or {"loss": loss, "gradient": norm}
    return {"seconds": seconds[1:], "found": found}


def _evaluate(job: dict[str, Any]) -> dict[str, Any]:
    """The loss of one batch, without gradient."""
    import torch

    model, (inputs, targets) = _open(job), _batch(job)
    seconds, loss = [], 0.0
    with torch.no_grad():
        for _ in range(3):
            began = time.perf_counter()
            if job["who"] == "ours":
                pairs = zip(inputs.split(1), targets.split(1), strict=True)
                loss = sum(model.loss(*pair)[0].item() for pair in pairs) / targets.numel()
            else:
                logits = model(inputs).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
                del logits
            seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "found": {"loss": loss}}


def _generate(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens after one prompt; the first call warms up."""
    import torch

    model, (inputs, _) = _open(job), _batch(job | {"batch": 1, "context": PROMPT})
    seconds: list[float] = []
    tokens: list[int] = []
    for _ in range(2):
        began = time.perf_counter()
        if job["who"] == "ours":
            out = model.generate(inputs, NEW_TOKENS)
        else:
            mask = torch.ones_like(inputs)
            out = model.generate(
                inputs,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=None,
                pad_token_id=0,
            )
        seconds.append(time.perf_counter() - began)
        tokens = out[0, PROMPT:].tolist()
    return {"seconds": seconds[1:], "found": {"tokens": tokens}}


def _load(job: dict[str, Any]) -> dict[str, Any]:
    """From files to the first logits of one token."""
    import torch

    began = time.perf_counter()
    model = _open(job)
    with torch.no_grad():
        out = model(torch.tensor([[15]]))
    seconds = time.perf_counter() - began
    logits = out if job["who"] == "ours" else out.logits
    return {"seconds": [seconds], "found": {"loss": -logits[0, 0].double().log_softmax(-1)[16].item()}}


if __name__ == "__main__":
    print(json.dumps(_job(json.loads(sys.argv[1]))))
