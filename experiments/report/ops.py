"""What a training step costs: a table of modules that folds, and flops.html beside the page, which prices any step."""

import re
from typing import Any, NamedTuple

from experiments.accounting import explorer
from experiments.accounting.predict import predict
from experiments.report.document import Block, Column, Kind, Number, Table, Text
from experiments.report.study import Study
from experiments.settings.record import Settings
from qwen_min import QwenConfig

FILE = "flops.html"
RECORDS = ["manifest.json", "config.toml"]


class Step(NamedTuple):
    """The step of the run that the page is about."""

    config: QwenConfig
    batch: int
    context: int
    rank: int
    targets: tuple[str, ...]


def step(study: Study) -> Step | None:
    """None where the manifest, of an earlier version, has no shape of the model, or LoRA is on one layer's targets."""
    if "model_config" not in study.manifest.values:
        return None
    settings = Settings.from_toml(study.root / "config.toml")
    if any(re.search(r"\d", target) for target in settings.targets):
        return None
    shape = study.manifest.fields("model_config")
    try:
        config = QwenConfig.from_dict(dict(shape.values))
    except ValueError as e:
        raise ValueError(f"{shape.where}: {e}") from None
    run: dict[str, Any] = study.answer[0].row if study.answer else {}
    context, rank = run.get("context") or settings.context, run.get("rank") or settings.default_rank
    return Step(config, settings.batch_size, context, rank, tuple(settings.targets))


def by_module(study: Study) -> list[Block]:
    """The step as a table, and a link to the explorer."""
    if not (found := step(study)):
        return []
    config, batch, context, rank, targets = found
    tree = predict(config, batch, context, rank=rank, targets=targets, training=True).tree(fold=True)
    whole, rows = tree.forward.total + tree.backward.total, []
    for _, node in tree.walk():
        if (both := node.forward.total + node.backward.total) and not node.charge:
            rows.append(
                [node.path or "the model", node.layers, node.forward.total, node.backward.total, both, both / whole]
            )
    kinds: dict[str, Kind] = {"part": "text", "layers": "integer", "share": "share"}
    names = ("part", "layers", "forward", "backward", "both", "share")
    columns = [Column(name, name, kinds.get(name, "flops")) for name in names]
    said = "FLOPs of a training step, module by module; each line holds what is inside it. Convention coursework."
    size: list[str | Number] = ["A step of ", Number(batch, "integer"), " x ", Number(context, "integer"), " tokens "]
    size += ["with LoRA of rank ", Number(rank, "integer"), f" on {', '.join(targets)}, op by op, and any other:"]
    table = Table("flops-by-module", said, columns, rows, RECORDS, folded=True, model=False)
    return [Text(["A training step, op by op"], "heading"), Text(size), Text([FILE], "link"), table]


def page(study: Study) -> str | None:
    """The explorer, opened at the step."""
    if not (found := step(study)):
        return None
    start: dict[str, Any] = {
        "batch": found.batch,
        "context": found.context,
        "cache": 0,
        "rank": found.rank,
        "guesses": 13,
    }
    start |= {"targets": found.targets, "phase": "training", "convention": "coursework", "x": 4, "w": 4}
    return explorer.page(str(study.manifest.values.get("model", "the model")), found.config, start)
