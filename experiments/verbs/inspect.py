"""Verbs that show what is there: `data`, `doctor`."""

from argparse import Namespace

from experiments.task.preprocessing import preprocessing
from experiments.task.task import Task
from experiments.verbs.common import gather
from experiments.verbs.doctor import lines
from qwen_min import Tokenizer


def data(args: Namespace) -> None:
    settings = gather(args)
    tokenizer = Tokenizer.from_pretrained(settings.model, settings.revision or None, settings.offline)
    task = Task.prepare(settings, tokenizer)
    dataset, worked = task.dataset, preprocessing(task)
    shape: tuple[int | str, ...] = dataset.series.shape
    if dataset.frame:
        lengths = [*map(len, dataset.frame.values)]
        shape = len(lengths), f"{min(lengths)}-{max(lengths)}", len(dataset.names)
    print(f"{dataset.path}: {dataset.source}; series ({', '.join(map(str, shape))}); sha256 {dataset.digest}")
    print(
        f"train {len(task.split.train)} / validation {len(task.split.validation)} / test {len(task.split.test)} "
        f"systems, {settings.split}; {worked['alpha_rule']}; {settings.decimals} decimals"
        + (f", {task.layout}" if task.layout else "")
    )
    for example in worked["examples"]:
        print(
            f"\nsystem {example['system']}, first {example['points']} of {len(task.raw(example['system']))} points "
            f"({', '.join(example['names'])})"
        )
        for name in ("raw", "scaled"):
            print(f"{name:7}", "  ".join("(" + ", ".join(f"{v:.4f}" for v in row) + ")" for row in example[name]))
        print("text   ", example["text"])
        print("tokens ", example["ids"])
    trip, tokens = worked["round_trip"], len(task.tokens(int(task.split.train[0])))
    print(
        f"\nround trip of {trip['series']} series: largest error {trip['max_abs_error_scaled']:.3g} scaled (half a "
        f"unit is {trip['half_unit_scaled']:g}), {trip['max_abs_error_raw']:.3g} raw; a series is {tokens} tokens"
    )


def doctor(args: Namespace) -> None:
    for line in lines(gather(args)):
        print(line, flush=True)
