"""One run of the benchmark: its options, its fresh processes in turns, its calibrations, and the files it writes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from experiments import plots
from experiments.bench import cases, compare, floors, table
from experiments.bench.cases import Case
from experiments.bench.texts import Texts
from experiments.run_folder import files
from experiments.run_folder.errors import RunFailed
from experiments.settings.record import Settings
from experiments.study.manifest import processor
from qwen_min import Qwen, QwenConfig
from qwen_min.fast import product
from qwen_min.load import weight_files

PEERS = ("transformers", "none")
LIBRARIES = ("torch", "transformers", "peft")
Report = dict[str, Any]  # what a command returns and writes as JSON


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    model: a folder in Hugging Face layout. whats: of `cases.WHATS`. peer: of `PEERS`. repeats: fresh processes of each
    side. dtype: that our weights are kept in. compile: ours as torch's compiler makes it. series: how many validation
    series are forecast in one call. draft: nodes of the symbol tree, a forward.

    Raises:
        ValueError: a value is out of its range, or the peer is not installed.
    """

    model: Path
    whats: tuple[str, ...] = cases.WHATS
    peer: str = "transformers"
    repeats: int = 3
    dtype: str = "bfloat16"
    device: str = "cpu"
    compile: bool = False
    quick: bool = False
    series: int = 150
    draft: int = 12

    def __post_init__(self) -> None:
        Settings(device=self.device, compile=self.compile).check_device()
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype is {self.dtype!r}: expected float32 or bfloat16")
        cases.chosen([], self.whats)
        for name in ("repeats", "series", "draft"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: expected at least 1")
        if self.peer not in PEERS:
            raise ValueError(f"--peer is {self.peer!r}: expected {' or '.join(PEERS)}")
        lacking = [name for name in LIBRARIES if not util.find_spec(name)] if self.peer != "none" else []
        if lacking:
            wrong = f"the peer needs {' and '.join(lacking)}, not installed here"
            raise ValueError(f"{wrong}: expected them (pip install -e '.[test]'), or --peer none")

    @property
    def compute(self) -> str:
        """The type of products on both sides."""
        return str(Settings(dtype=self.dtype, device=self.device).computed_in).removeprefix("torch.")


def bench(options: Options, folder: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure the cases asked for, and write bench.json, bench.md (both after each case) and bench.png.

    Args:
        folder: where to.
        say: takes a line that says what starts.

    Returns:
        What `bench.json` holds.

    Raises:
        RunFailed: the two sides of a case did not compute the same, or a process failed. The cases before it are kept.
    """
    session = Session(options, say)
    targets = cases.has_targets(session.config, options.device, options.quick)
    series = min(options.series, len(session.texts.systems))
    every = cases.cases(options.quick, series, options.draft, gpu=options.device != "cpu")

    def write(lines: list[dict[str, Any]]) -> dict[str, Any]:
        report = session.head() | {"cases": lines}
        files.write_json(folder / "bench.json", report)
        files.write_text(folder / "bench.md", table.markdown(report))
        return report

    report = session.run(cases.chosen(every, options.whats), folder, write, targets)
    plots.bench_bars(report["cases"], folder / "bench.png", "Ours beside the peer", report["label"])
    return report


class Session:
    """One run of the benchmark: the tokens of its jobs, its fresh processes, its calibrations."""

    def __init__(self, options: Options, say: Callable[[str], None]):
        self.options, self.say, self.calibrations = options, say, list[dict[str, Any]]()
        self.texts, self.config = Texts(options.model), QwenConfig.from_file(options.model / "config.json")
        Qwen.from_pretrained(options.model, dtype=None)  # maps the files: a bad one is refused here, as by any verb
        serves = (options.dtype, options.compute, options.device) == ("bfloat16", "float32", "cpu")
        self.kernels = "C++" if serves and product.available() else "torch"  # compiled here, not under a clock
        if options.compile:
            self.kernels = "torch's compiler"
        self.common = {name: getattr(options, name) for name in ("dtype", "compute", "device", "compile")}
        self.common["model"] = str(options.model.resolve())

    def run(self, of: Iterable[Case], folder: Path, write: Callable[..., Report], targets: bool = False) -> Report:
        """Measure one case after the other, and the machine in between (quick: before and after all).

        Args:
            write: is given all lines so far after each case, and at the end, when what it returns is returned.
            targets: whether those of the cases were set for this model and machine.

        Raises:
            KeyboardInterrupt: stopped; the message says that what was measured is in `folder`.
        """
        measured: list[tuple[Case, dict[str, Any]]] = []

        def written() -> Report:
            return write([compare.against(case, line, self.floor(case, line), targets) for case, line in measured])

        try:
            with tempfile.TemporaryDirectory() as arrays:
                self.arrays = Path(arrays)  # the tensors that are compared
                self.calibrate()
                for case in of:
                    measured.append((case, self.measure(case)))
                    if not self.options.quick:
                        self.calibrate()
                    written()
                if self.options.quick:
                    self.calibrate()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; what was measured until then is in {folder}") from None
        return written()

    def measure(self, case: Case) -> dict[str, Any]:
        """Both sides of a case in turns, compared: a line of the report, without floor and targets."""
        sides = ("ours", "peer") if case.peer and self.options.peer != "none" else ("ours",)
        runs: dict[str, list[dict[str, Any]]] = {who: [] for who in sides}
        if case.what == "load":  # into the page cache
            for path in weight_files(self.options.model):
                files.file_digest(path)
        ids, turns = self.ids(case.job), min(self.options.repeats, case.turns or self.options.repeats)
        for turn in range(turns):
            for who in sides:
                self.say(f"{case.name}: {who}, {turn + 1} of {turns}")
                arrays = {"arrays": str(self.arrays / f"{who}-{turn}")} if case.what in ("train", "load") else {}
                job = self.common | self.texts.grammar() | case.job | arrays | {"who": who, "ids": ids}
                runs[who].append(arrays | fresh(job, case.name))
        line = compare.judge(case, runs, self.options.compute, partial(self._gaps, case, ids))
        for path in self.arrays.iterdir():
            path.unlink()
        return line

    def _gaps(self, case: Case, ids: list[list[int]], partings: Sequence[compare.Parting]) -> list[float]:
        texts = [ids[row] + list(before) for row, before, *_ in partings]
        job = self.common | {"job": "gaps", "who": "peer", "ids": texts, "pairs": [parting[2:] for parting in partings]}
        return fresh(job, case.name)["found"]["gaps"]

    def calibrate(self) -> None:
        """Measure the machine's rates once more."""
        self.say("calibration: matrix products, reads")
        on_cpu, quick = self.options.device == "cpu", self.options.quick
        sizes = {
            "hidden": self.config.hidden_size,
            "feed_forward": self.config.intermediate_size,
            "columns": 2**10 if quick else 2**13,  # of 2^15 rows of float32: 128 MB or 1 GB
            "square": (2**10 if quick else 2**11) if on_cpu else 2**13,  # that fills the device
            "tokens": 2**9 if on_cpu else 2**13,
        }
        self.calibrations.append(fresh(self.common | sizes | {"job": "calibrate", "who": "ours"}, "calibration"))

    def ids(self, job: Mapping[str, Any]) -> list[list[int]]:
        """The tokens of a job."""
        if "context" in job:
            return self.texts.windows(job["batch"], job["context"] + 1)
        return self.texts.prompts(job.get("batch", 1), job.get("prompt", self.texts.step))

    def floor(self, case: Case, line: Mapping[str, Any]) -> float | None:
        """The least seconds that a case can take at the calibrated rates; None where nothing says so."""
        job, config, rates = case.job, self.config, compare.calibrated(self.calibrations)
        kept, computed = (getattr(torch, t) for t in (self.options.dtype, self.options.compute))
        symbols = len(self.texts.symbols) if job.get("symbols") or job.get("how", "plain") != "plain" else 0
        if job["job"] in ("train", "evaluate"):
            parts = [floors.step(config, job["batch"], job["context"], rank=job.get("rank", 0), symbols=symbols)]
        elif job["job"] == "generate":
            forwards = round((job["new"] - 1) / line["ours"].get("tokens_per_forward", 1))
            shape = job["batch"], job["prompt"], job["new"]
            parts = [floors.decode(config, *shape, kept, computed, symbols=symbols, forwards=forwards)]
        elif job["job"] == "series":  # all at once: the weights are read once for all
            rows, prompt, new = job["series"], job["points"] * self.texts.step, job["horizon"] * self.texts.step
            parts = [
                floors.prefill(config, rows, prompt, symbols=len(self.texts.symbols)),
                floors.decode(config, rows, prompt, new, kept, computed, symbols=len(self.texts.symbols)),
            ]
        else:
            return None
        return sum(work.seconds(rates["flops_per_second"], rates["bytes_per_second"]) for work in parts)

    def head(self) -> dict[str, Any]:
        """What a report says of itself."""
        options, on_cpu = self.options, self.options.device == "cpu"
        asked = {name: getattr(options, name) for name in ("device", "dtype", "compute", "repeats", "quick", "peer")}
        libraries = LIBRARIES if options.peer != "none" else LIBRARIES[:1]
        return asked | {
            "model": str(options.model),
            "label": Settings(model=str(options.model)).label,
            "kernels": self.kernels,
            "calibration": compare.calibrated(self.calibrations),
            "machine": {
                "processor": processor() if on_cpu else torch.cuda.get_device_name(options.device),
                "threads": self.calibrations[-1]["threads"],
                "versions": {name: metadata.version(name) for name in libraries},
            },
        }


def fresh(job: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Run one job in a fresh process with pinned threads. Raises RunFailed, naming the case, where it fails."""
    pinned = os.environ | {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    pinned |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # The command line sets it for runs that share a machine; here both sides have OpenMP's own way of waiting.
    pinned.pop("OMP_WAIT_POLICY", None)
    command, root = [sys.executable, "-m", "experiments.bench.sides"], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=pinned, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise RunFailed(f"bench: {name}: the process of {job['who']} failed ({last[:300]}): expected a measurement")
    return json.loads(done.stdout.splitlines()[-1])
