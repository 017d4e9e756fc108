"""A grid over other settings than the learning rate and the rank: NAME=VALUE|VALUE, one for each setting."""

import dataclasses
from collections.abc import Iterator
from itertools import product
from typing import Any, get_origin

from experiments.settings.record import Settings

OVER = (
    *("batch_size", "betas", "clip", "context", "count_padding", "decay", "dropout", "final_lr", "logit_bias"),
    *("lora_alpha", "pad_side", "rank_stabilised", "schedule", "stride", "targets", "warmup", "weight_decay"),
)
"""The settings that leave the validation loss comparable: its series, its text and the model are the same."""


def variants(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Every combination of the values of `over`: the end of a cell's name, and the settings of its run.

    Raises:
        ValueError: a setting is not of `OVER` or given twice, a value is not one of it or given twice.
    """
    lists = [_values(one) for one in settings.over]
    if len({values[0][0] for values in lists}) < len(lists):
        raise ValueError(f"over is {list(settings.over)}: expected each setting once")
    own = {"over": (), "rungs": ()} if settings.over or settings.rungs else {}
    for chosen in product(*lists):
        end = "".join(f"-{name}={text}" for name, text, _ in chosen)
        try:
            yield end, settings.updated(own | {name: value for name, _, value in chosen})
        except ValueError as e:
            raise ValueError(f"over{end.replace('-', ' ', 1)}: {e}") from None


def _values(one: str) -> list[tuple[str, str, Any]]:
    """The name, the text and the value of each in "NAME=VALUE|VALUE"; several parts of one value have a + between."""
    name, _, texts = one.partition("=")
    if name not in OVER:
        raise ValueError(f"over is {one!r:.80}: expected NAME=VALUE|VALUE, NAME one of {', '.join(OVER)}")
    fields = {field.name: field.type for field in dataclasses.fields(Settings)}
    several = get_origin(fields[name]) is tuple
    found = [
        (name, text, tuple(map(_literal, text.split("+"))) if several else _literal(text)) for text in texts.split("|")
    ]
    if len({value for *_, value in found}) < len(found):
        raise ValueError(f"over is {one!r:.80}: expected each value once")
    return found


def _literal(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text, text)
