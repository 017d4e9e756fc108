"""One training run: a cell of the grid, from its seed or its last checkpoint to its result."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.windows import Windows
from experiments.accounting import predict
from experiments.accounting.ledger import Ledger
from experiments.run_folder import cell_records, files
from experiments.run_folder.errors import RunFailed
from experiments.run_folder.folder import RunFolder
from experiments.settings.record import Settings
from experiments.task.model import load_model, save_trained
from experiments.task.task import Task
from experiments.training.parallel import ALONE, Alone
from experiments.training.signals import stoppable
from experiments.training.step import training_step, validation_loss
from lora import add_lora
from lora.layer import add_logit_bias, lora_layers
from qwen_min import FlopMeter, Qwen
from qwen_min.tensors import from_bytes, to_bytes

Progress = Callable[[dict[str, Any]], None]


GRADIENT_RECORDS = 400
"""At most how often a run writes the gradient norm of every LoRA matrix: a line has one number for each of 96."""


@dataclass(frozen=True)
class Cell:
    """One training run: a learning rate and a rank, and a name. Rank 0 is the untrained model, validated once."""

    lr: float
    rank: int
    called: str = ""

    @property
    def name(self) -> str:
        return self.called or (f"lr{self.lr:g}-r{self.rank}" if self.rank else "untrained")


def predicted(task: Task, cell: Cell, config, until: int | None = None, horizon: int = 0) -> dict[str, int]:
    """FLOPs of a cell by ledger stage, before it runs: of the whole, or of its first `until` steps.

    With `patience` the most, as it may stop early; `horizon`: of the forecasts that each validation makes, the most."""
    settings = task.settings
    steps = (until or settings.steps) if cell.rank else 0
    share = steps / settings.val_every if settings.val_every else 0
    validations = int(share) if until else max(1, math.ceil(share))
    flops = predict.training_run(
        config,
        steps=steps,
        batch=settings.batch_size,
        context=settings.context,
        validations=validations,
        validation_windows=len(task.validation_windows),
        symbols=task.symbols,
        **settings.trained(cell.rank),
    )
    return flops | {"validation": flops["validation"] + validations * horizon}


def run_cell(
    task: Task,
    cell: Cell,
    expected: dict[str, int],
    folder: RunFolder,
    ledger: Ledger,
    run: str,
    progress: Progress,
    horizon_error: Callable[[Task, Qwen], float],
    group: Alone = ALONE,
    until: int | None = None,
    prefix: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Train and validate one cell in `folder`, from where it stopped; returns its `result.json`.

    A finished cell is left as it is. The FLOPs `expected` of it by stage (see `predicted`) are reserved before the
    first step, debited as they are spent and settled at the end. Of a group's ranks the first one alone reads and
    writes the folder and the ledger, which is charged what all ran. Where `keep` is "horizon" each validation takes the
    `horizon_error` of the model too, as a part of its price.

    Args:
        until: pause after this step, with a checkpoint, and return nothing; `expected` is then of the steps up to it,
            which are settled.
        prefix: FLOPs by stage that the folder began with, for which another cell was charged.

    Raises:
        BudgetExceeded: before anything ran. RunFailed: a loss or a gradient is not finite; `failure.json` says so until
        the cell is started again. KeyboardInterrupt: stopped by a signal, with a checkpoint after the step that was
        running.
    """
    if summary := group.tell(_finished, task, cell, folder, ledger, run, prefix):
        return summary
    settings, windows = task.settings, task.validation_windows
    with group.together():
        model = load_model(settings)
        state = _State(model, cell, settings, group)
    metrics = state.resume(folder)
    error = partial(horizon_error, task, model) if cell.rank and settings.keep == "horizon" else None
    own = (less(flops, prefix) for flops in (expected, state.flops))
    entry = group.tell(ledger.reserve, run, cell.name, *own)

    def note(record: dict[str, Any]) -> None:
        metrics.append(record)
        group.first(files.append_jsonl, folder.metrics, record)
        if state.began is not None:
            seconds = round(time.perf_counter() - state.began, 3)
            group.first(files.append_jsonl, folder.clock, {"step": state.step, "seconds": seconds})
        known = {"cell": cell.name, "folder": folder.path, "steps": state.steps, "context": settings.context}
        progress(known | record)

    def finish() -> dict[str, Any]:
        summary = _summary(task, cell, model, metrics, state.flops, expected)
        if cell.rank:
            if settings.keep == "last":
                state.keep(folder)
            summary["adapter_sha256"] = {p.name: files.file_digest(p) for p in sorted(folder.adapter.iterdir())}
        files.write_json(folder.result, summary)
        ledger.settle(entry)
        return summary

    try:
        with stoppable() as stopped:
            while not state.ended and state.step != until:
                if state.step < state.steps:
                    with group.together():
                        note(state.train(task, ledger, entry))
                        if (state.step - 1) % state.norms_every == 0:
                            group.first(files.append_jsonl, folder.gradients, state.gradient_norms())
                last = state.step == state.steps
                if last or (settings.val_every and state.step % settings.val_every == 0):
                    with group.together():
                        note(state.validate(windows, ledger, entry, error))
                        if settings.keep != "last" and state.best:
                            group.first(state.keep, folder)
                        group.first(state.save, folder)
                elif state.step % settings.checkpoint_every == 0 or state.step == until:
                    group.tell(state.save, folder)
                if not state.ended and group.any(stopped()):
                    group.tell(state.save, folder)
                    raise KeyboardInterrupt
    except RunFailed as e:
        ledger.fail(entry)
        with suppress(OSError):  # the failure itself is the one to report
            group.first(files.write_json, folder.failure, {"step": state.step, "error": str(e)})
        raise RunFailed(f"{folder.path}: {e}") from None
    summary = {} if state.step == until else group.tell(finish)
    if not summary:
        group.first(ledger.settle, entry)
    if group.any(stopped()):  # in the last step or its validation
        raise KeyboardInterrupt
    return summary


def less(flops: Mapping[str, int], part: Mapping[str, int] | None) -> dict[str, int]:
    """FLOPs by stage without a part of them."""
    return {stage: amount - (part or {}).get(stage, 0) for stage, amount in flops.items()}


def _finished(
    task: Task, cell: Cell, folder: RunFolder, ledger: Ledger, run: str, prefix: Mapping[str, int] | None
) -> dict[str, Any] | None:
    """The result of a cell that is finished, now settled too; else None, with the folder ready for work."""
    if not folder.result.exists():
        folder.path.mkdir(parents=True, exist_ok=True)
        files.recover_folder(folder.checkpoint)
        with files.writing(folder.failure):
            folder.failure.unlink(missing_ok=True)
        return None
    summary, settings = cell_records.read_result(folder), task.settings
    asked = {"cell": cell.name, "lr": cell.lr, "rank": cell.rank, "context": settings.context}
    steps = settings.steps if cell.rank else 0
    early = settings.patience and summary.get("stopped_early") or steps
    asked |= {"steps": min(steps, early), "data_sha256": task.dataset.digest}
    for name, wanted in asked.items():
        if summary[name] != wanted:
            raise ValueError(
                f"{folder.result}: {name} is {summary[name]!r}, now {wanted!r}: expected the run that was asked for; "
                "delete its folder to run it again, or choose another --out"
            )
    for name, recorded in summary.get("adapter_sha256", {}).items():
        if (found := files.file_digest(folder.adapter / name)) != recorded:
            raise ValueError(
                f"{folder.adapter / name}: its sha256 is {found}, recorded in {folder.result.name} {recorded!r:.66}: "
                "expected it as it was written; delete its cell's folder to run it again"
            )
    ledger.settle_finished(run, cell.name, less(summary["flops"], prefix))
    return summary


class _State:
    """What a checkpoint holds: LoRA matrices, Adam's moments, the step, the FLOPs so far; draws come from the step."""

    def __init__(self, model: Qwen, cell: Cell, settings: Settings, group: Alone = ALONE):
        self.model, self.cell, self.step, self.steps = model, cell.name, 0, settings.steps if cell.rank else 0
        self.validated_at, self.group = -1, group
        self.flops = {"training": 0, "validation": 0}
        self.metrics: list[dict[str, Any]] = []  # the lines of metrics.jsonl, which whoever runs this adds to
        self.began: float | None = None  # on the clock, had the work been done in one go; None where that is not known
        self.settings, self.norms_every = settings, math.ceil(self.steps / GRADIENT_RECORDS) or 1
        if cell.rank:
            if not settings.scratch:
                if settings.logit_bias:
                    add_logit_bias(model)
                alpha = settings.alpha_of(cell.rank)
                add_lora(model, cell.rank, alpha, settings.targets, settings.dropout, settings.seed)
            trainable = [p for p in model.parameters() if p.requires_grad]
            self.lr = cell.lr
            self.optimizer = torch.optim.AdamW(trainable, betas=settings.betas, weight_decay=settings.weight_decay)
            self.group = group.of(model)

    def train(self, task: Task, ledger: Ledger, entry: int) -> dict[str, Any]:
        """One step; returns its line of `metrics.jsonl`."""
        settings = self.settings
        batch = task.train_batch(self.step)
        self.group.draw(settings.seed, self.step)
        self.optimizer.param_groups[0]["lr"] = settings.rate(self.lr, self.step)
        options, failure = (settings.count_padding, self.group, settings.clip, settings.number_loss), None
        with FlopMeter() as meter:
            try:
                loss, norm = training_step(self.model, batch, range(len(batch)), self.optimizer, *options)
            except RunFailed as e:
                failure = e
        self._spend(ledger, entry, "training", meter.training)
        if failure:  # its FLOPs are spent all the same
            raise RunFailed(f"step {self.step + 1}: {failure}")
        self.step += 1
        return {"step": self.step, "loss": loss, "gradient_norm": norm} | self.flops

    def validate(
        self, windows: Windows, ledger: Ledger, entry: int, error: Callable[[], float] | None = None
    ) -> dict[str, Any]:
        """One pass over the validation windows, and the horizon's `error`; returns its line of `metrics.jsonl`."""
        with FlopMeter() as meter:
            losses = validation_loss(self.model, windows, self.settings.count_padding, self.group)
            finite = all(map(math.isfinite, losses.values()))
            if error and finite:
                losses["horizon_mse"] = self.group.tell(error)
        self._spend(ledger, entry, "validation", meter.total)
        if not finite:
            found = ", ".join(f"{name} is {loss:g}" for name, loss in losses.items())
            raise RunFailed(f"after step {self.step}: {found}: expected finite numbers; a lower learning rate may help")
        self.validated_at = self.step
        return {"step": self.step} | losses | self.flops

    @property
    def ended(self) -> bool:
        """Whether this step is validated, and is the last one or that at which patience ends."""
        if self.validated_at < self.step:
            return False
        return self.step == self.steps or 0 < self.settings.patience <= cell_records.waited(self.metrics)

    @property
    def best(self) -> bool:
        """Whether no earlier validation was as good as the last one; the untrained model has no adapter to keep."""
        if not self.steps:
            return False
        by = "horizon_mse" if self.settings.keep == "horizon" else "validation_loss"
        *before, last = (line[by] for line in self.metrics if by in line)
        return all(last < one for one in before)

    def keep(self, folder: RunFolder) -> None:
        """Write the adapter as it is now."""
        with files.atomic_folder(folder.adapter) as adapter:
            save_trained(self.model, adapter, self.settings)

    def gradient_norms(self) -> dict[str, Any]:
        """The norm of the last gradient of every LoRA matrix: a line of `gradients.jsonl`."""
        norms = {}
        for name, layer in lora_layers(self.model):
            short = name.removeprefix("model.").replace("self_attn.", "")
            for half, matrix in (("A", layer.lora_a), ("B", layer.lora_b)):
                norms[f"{short}.{half}"] = 0.0 if matrix.grad is None else matrix.grad.norm().item()
        return {"step": self.step, "norms": norms}

    def _spend(self, ledger: Ledger, entry: int, stage: str, flops: int) -> None:
        flops = self.group.sum(flops)
        self.flops[stage] += flops
        ledger.spend(entry, stage, flops)

    def save(self, folder: RunFolder) -> None:
        """Write the checkpoint of this step; the previous one stays until it is whole."""
        if not self.steps:
            return
        with files.atomic_folder(folder.checkpoint) as new:
            (new / "state.safetensors").write_bytes(to_bytes(self._tensors()))
            state = {"cell": self.cell, "step": self.step, "validated_at": self.validated_at, "flops": self.flops}
            state["metrics_sha256"] = cell_records.digest(self.metrics)
            files.write_json(new / "state.json", state)

    def resume(self, folder: RunFolder) -> list[dict[str, Any]]:
        """Go back to the last checkpoint, if there is one; returns the metrics up to it, and drops later ones."""
        checkpoint, tell = folder.checkpoint, self.group.tell
        saved = None
        if self.steps and tell(checkpoint.is_dir):
            saved = tell(cell_records.read_state, checkpoint / "state.json", self.steps, self.cell)
            path = checkpoint / "state.safetensors"
            self.step, self.validated_at, self.flops = saved["step"], saved["validated_at"], saved["flops"]
            self._load(path, tell(_read, path))
        self.metrics = tell(self._records, folder, saved)
        return self.metrics

    def _records(self, folder: RunFolder, saved: dict[str, Any] | None) -> list[dict[str, Any]]:
        """The metrics up to this step, once the lines of later ones are cut off."""
        metrics = cell_records.upto(saved, folder) if saved else []
        clock = cell_records.read_clock(folder.clock, metrics)
        norms = cell_records.read_gradients(folder.gradients) if saved and folder.gradients.is_file() else []
        files.write_jsonl(folder.metrics, metrics)
        files.write_jsonl(folder.clock, clock)
        if clock or not metrics:
            self.began = time.perf_counter() - (clock[-1]["seconds"] if clock else 0)
        if self.steps:
            files.write_jsonl(folder.gradients, [line for line in norms if line["step"] <= self.step])
        return metrics

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._trainable():
            tensors[name] = parameter.detach()
            for kind, value in self.optimizer.state[parameter].items():
                tensors[f"{name}/{kind}"] = value
        return tensors

    def _load(self, path: Path, data: bytes) -> None:
        """Take up the tensors of a checkpoint, which `data` holds and `path` names."""
        held = from_bytes(data, path)
        for name, parameter in self._trainable():
            for kind in ("", "/exp_avg", "/exp_avg_sq", "/step"):
                like, tensor = torch.zeros(()) if kind == "/step" else parameter, held.get(name + kind)
                if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
                    raise _unreadable(path, f"{name}{kind} is not there, or not {list(like.shape)} in {like.dtype}")
            if (counted := held[f"{name}/step"].item()) != self.step:
                raise _unreadable(path, f"{name} has made {counted:g} steps, not {self.step} as state.json says")
        with torch.no_grad():
            for name, parameter in self._trainable():
                parameter.copy_(held[name])
                self.optimizer.state[parameter] = {
                    kind: held[f"{name}/{kind}"].to(parameter.device if kind != "step" else "cpu")
                    for kind in ("step", "exp_avg", "exp_avg_sq")
                }

    def _trainable(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise _unreadable(path, e.strerror or str(e)) from None


def _unreadable(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path}: cannot be read ({why}): expected a checkpoint of this run; delete its cell's folder to begin again"
    )


def _summary(task: Task, cell: Cell, model: Qwen, metrics, flops, expected) -> dict[str, Any]:
    """`result.json`: nothing in it depends on the clock, so a resumed run writes the same bytes."""
    last = metrics[-1]["step"]
    stopped_early = last if cell.rank and last < task.settings.steps else None
    return cell_records.summary(metrics, task.settings.keep) | {
        "cell": cell.name,
        "lr": cell.lr,
        "rank": cell.rank,
        "context": task.settings.context,
        "label": task.settings.label,
        "flops": flops,
        "predicted_flops": expected,
        "convention": "coursework",
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train_windows": task.train_window_count,
        "validation_windows": len(task.validation_windows),
        "validation_tokens": task.validation_windows.real_tokens,
        "data_sha256": task.dataset.digest,
        "metrics_sha256": cell_records.digest(metrics),
        **({} if task.settings.keep == "last" else {"keep": task.settings.keep}),
        **({"stopped_early": stopped_early} if task.settings.patience else {}),
    }
