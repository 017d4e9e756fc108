"""The maths of training: the loss of a few windows, one update, one validation."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.windows import IGNORED, Windows
from experiments.run_folder.errors import RunFailed
from experiments.training.parallel import ALONE, Alone
from experiments.training.progress import Counted
from qwen_min import Qwen
from qwen_min.fast.limits import sequences_at_once


class Batch(NamedTuple):
    """A few windows on the model's device, (B, T) each but `padding`."""

    inputs: Tensor
    targets: Tensor
    real: Tensor  # bool: not padding
    padding: Tensor | None  # (B) how many of a window's first tokens are padding
    vocabulary: Tensor | None  # what the loss is over, if not all tokens
    weights: Tensor | None  # of targets in the training loss, if not 1


def groups(model: Qwen, windows: Windows, chosen, count_padding: bool = False) -> Iterator[Batch]:
    """The chosen windows, a few sequences at a time; with `count_padding` targets have padding as a token."""
    rows = sequences_at_once(model, windows.inputs.shape[1])
    vocabulary = None if windows.vocabulary is None else torch.from_numpy(windows.vocabulary).to(model.device)
    for start in range(0, len(chosen), rows):
        part = windows.at(chosen[start : start + rows])
        targets = part.targets_with_padding if count_padding else part.targets
        arrays = part.inputs, targets, part.targets != IGNORED, part.left_padding
        inputs, wanted, real, left = (torch.from_numpy(a).to(model.device) for a in arrays)
        weights = None if part.weights is None else torch.from_numpy(part.weights).to(model.device)
        yield Batch(inputs, wanted, real, left if left.any() else None, vocabulary, weights)


@torch.no_grad()
def validation_loss(
    model: Qwen,
    windows: Windows,
    count_padding: bool = False,
    group: Alone = ALONE,
    progress: Counted = lambda done, of: None,
) -> dict[str, float]:
    """Mean cross-entropy in nats over all windows: `validation_loss`, per real token.

    With `count_padding` also `validation_loss_with_padding`: over every place, padding as a token to be predicted.
    `progress` takes how many windows are done, and of how many.
    """
    model.eval()
    real, total, done = 0.0, 0.0, 0
    progress(0, len(windows))
    for batch in groups(model, windows, group.share(range(len(windows))), count_padding):
        each = model.token_losses(batch.inputs, batch.targets, batch.padding, batch.vocabulary)  # (B, T)
        real += each[batch.real].sum().item()
        total += each.sum().item()
        progress(done := done + len(each), len(windows))
    losses = {"validation_loss": group.sum(real) / windows.real_tokens}
    if count_padding:
        losses["validation_loss_with_padding"] = group.sum(total) / windows.targets.size
    return losses


def training_step(
    model: Qwen,
    windows: Windows,
    chosen,
    optimizer: torch.optim.Optimizer,
    count_padding: bool = False,
    group: Alone = ALONE,
    clip: float = 0.0,
    number_loss: float = 0.0,
) -> tuple[float, float]:
    """One update; returns the mean loss per token of the batch and the norm of its gradient.

    Where the windows have weights the mean is by them. Where they have `digits`, `number_loss` times the mean of
    `qwen_min.loss.number_loss` over the targets among these is added.

    A gradient that is longer than `clip` is cut to it before the update, unless that is 0.

    Gradients accumulate over groups of sequences, each weighted by its share of the batch's real tokens (of all, with
    `count_padding`). They are left in place. Several ranks divide the windows; each weight is of the whole batch, times
    the number of ranks, as the ranks' gradients are averaged.

    Raises:
        RunFailed: the loss or the gradient is not finite; the parameters are then as they were.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    batch = windows.at(chosen)
    tokens: float = batch.targets.size if count_padding else batch.real_tokens
    if batch.weights is not None:
        tokens = float(batch.weights.sum(where=count_padding | (batch.targets != IGNORED), dtype=np.float64)) or 1.0
    options: dict[str, Any] = {}
    if batch.digits is not None:
        numbers = int(np.isin(batch.targets, batch.digits).sum())
        options["digits"] = torch.from_numpy(batch.digits).to(model.device)
        options["digit_factor"] = number_loss * tokens / (numbers or 1)
    total = 0.0
    mine = list(groups(model, windows, group.share(chosen), count_padding))
    for part in mine:
        with group.averaging(part is mine[-1]):
            loss, _ = group.loss(
                model, part.inputs, part.targets, part.padding, part.vocabulary, part.weights, **options
            )
            (loss * group.world / tokens).backward()
        total += loss.item()
    total = group.sum(total)
    parameters = [p for some in optimizer.param_groups for p in some["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise RunFailed(
            f"the loss is {total / tokens:g} and the norm of its gradient {norm:g}: expected finite "
            "numbers; a lower learning rate may help"
        )
    if clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, torch.tensor(norm))
    optimizer.step()
    return total / tokens, norm
