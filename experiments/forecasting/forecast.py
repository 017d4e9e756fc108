"""Forecasts of a model: prompts, continuations, and what the model says of the true horizon; priced before they run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.windows import IGNORED
from experiments.accounting import predict
from experiments.forecasting.scores import QUANTILES, mean, quantiles
from experiments.task.constrain import Constrained, Drafted
from experiments.task.task import Task
from experiments.training.progress import Counted
from qwen_min import FlopMeter, Qwen
from qwen_min.generate import decode, left_padded, prefill
from qwen_min.loss import continuation_losses

ROWS_AT_ONCE, ROWS_AT_ONCE_ON_A_GPU = 32, 256  # sequences that are decoded together; samples of one series count


@dataclass(frozen=True)
class Forecasts:
    """Forecasts of N systems in raw units; a step that did not parse is NaN.

    context (N, P, V), truth and values (N, h, V), the truth NaN where the data has ended; samples (N, S, h, V) where
    several were drawn, whose median or mean is `values`; `losses`: for each system the nats of every token of its true
    horizon; `cut`, `cut_mean` (N,): the probability that free text would have left the grammar on the way, and the mass
    cut off per token, if constrained. Of several origins (see `joined`) P and h are the sums of theirs.
    """

    systems: list[int]
    context: NDArray[np.float64]
    truth: NDArray[np.float64]
    values: NDArray[np.float64]
    samples: NDArray[np.float64] | None
    losses: list[NDArray[np.float64]]
    cut: NDArray[np.float64] | None
    cut_mean: NDArray[np.float64] | None
    flops: dict[str, int]  # validation (scoring the true horizon), inference

    @property
    def quantiles(self) -> NDArray[np.float64] | None:
        """(Q, N, h, V) at `QUANTILES`, of the samples."""
        return None if self.samples is None else quantiles(self.samples)

    def of(self, systems: Sequence[int]) -> "Forecasts":
        """Those of some of the systems, in their order."""
        rows = [self.systems.index(system) for system in systems]
        chosen = self._each("context truth values samples cut cut_mean", lambda array: array[rows])
        return replace(self, systems=list(systems), losses=[self.losses[row] for row in rows], **chosen)

    @classmethod
    def joined(cls, made: Sequence["Forecasts"]) -> "Forecasts":
        """Forecasts of the same systems at several origins, their points and steps one after the other."""
        if len(made) == 1:
            return made[0]
        joined: dict[str, Any] = {}
        for name, axis in (("context", 1), ("truth", 1), ("values", 1), ("samples", 2)):
            parts = [getattr(one, name) for one in made]
            joined[name] = None if parts[0] is None else np.concatenate(parts, axis)
        for name in ("cut", "cut_mean"):
            parts = [getattr(one, name) for one in made]
            joined[name] = None if parts[0] is None else np.mean(parts, 0)
        joined["losses"] = [np.concatenate(of) for of in zip(*(one.losses for one in made), strict=True)]
        joined["flops"] = {stage: sum(one.flops[stage] for one in made) for stage in made[0].flops}
        return replace(made[0], **joined)

    def at(self, origin: int, of: int) -> "Forecasts":
        """Context, truth, values and samples of one of the origins that were joined."""
        shown = self._each("context truth values", lambda array: np.split(array, of, 1)[origin])
        return replace(self, **shown, **self._each("samples", lambda array: np.split(array, of, 2)[origin]))

    def _each(self, names: str, change: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> dict[str, Any]:
        """Some of the arrays, changed, where they are there."""
        found = {name: getattr(self, name) for name in names.split()}
        return {name: None if array is None else change(array) for name, array in found.items()}


MOST_GUESSES = 1000  # a forward: no tree gains by more, and a far larger one fills the memory


def check_draft(task: Task, draft: int) -> None:
    """Raise ValueError unless forecasts can be made with `draft` nodes a forward."""
    settings = task.settings
    if not 0 <= draft <= MOST_GUESSES:
        raise ValueError(f"draft is {draft}: expected 0 (off) to {MOST_GUESSES}")
    if draft and (settings.num_samples > 1 or settings.sampling_temperature):
        raise ValueError(f"draft is {draft} with sampling ({settings.judged}): expected greedy, one sample")


def forecast(
    task: Task,
    model: Qwen,
    systems: Sequence[int],
    draft: int = 0,
    progress: Counted = lambda done, of: None,
    scored: bool = True,
) -> Forecasts:
    """Forecast `horizon` points after the first `points` of each system, and score those that are known on the way.

    A prompt's prefill runs once: its true continuation and all its samples go on from there.

    Args:
        draft: at most so many tokens in a forward, guesses included, for one system; 0 for one token. The forecast is
            the same; what a constraint cuts off is not measured.
        progress: takes how many steps of all horizons are written, samples included, and of how many.
        scored: whether to take the losses of the true horizons' tokens, whose price is "validation".

    Raises:
        ValueError: there is no such system, or there are several, or samples, with a draft.
    """
    task.check(systems, scored=False)
    settings, series = task.settings, task.series.astype(np.float64)
    check_draft(task, draft)
    if draft and len(systems) != 1:
        raise ValueError(f"draft is {draft} with {len(systems)} systems: expected one")
    measured = settings.constrained and not draft
    samples = np.full((len(systems), settings.num_samples, settings.horizon, series.shape[2]), np.nan)
    losses: list[NDArray[np.float64]] = [np.empty(0)] * len(systems)
    cut = np.zeros((2, len(systems), settings.num_samples))
    flops = {"validation": 0, "inference": 0}
    before, of = 0, len(systems) * settings.num_samples * settings.horizon

    def written(steps: int) -> None:
        progress(before + steps, of)

    for batch in _batches(task, systems, model.device, scored):
        written(0)
        rows = len(batch.places) * settings.num_samples
        constraint = guesses = None
        if settings.constrained:
            limits: dict[str, Any] = {"vocabulary": model.config.vocab_size, "rows": rows, "steps": settings.horizon}
            limits |= {"device": model.device, "measure": measured}
            constraint = Constrained.for_tokenizer(task.tokenizer, task.grammar, **limits)
        if draft:
            text = task.text(systems[0], settings.points)
            guesses = Drafted.for_tokenizer(task.tokenizer, task.grammar, text, draft)
        with FlopMeter() as meter:
            # A true number can be wider than any of the training part.
            room = max(task.tokens_to_forecast + draft, batch.targets.shape[1])
            prompts = prefill(model, batch.ids, room, batch.padding)
        nats = np.empty(batch.targets.shape)
        if nats.size:
            with FlopMeter() as scoring:
                nats = continuation_losses(model, prompts, batch.targets).cpu().numpy()
            flops["validation"] += scoring.total
        with meter:
            seed = settings.seed + batch.places[0]
            new = _continue(task, model, prompts, constraint, guesses, seed, written)
        before += rows * settings.horizon
        flops["inference"] += meter.total
        for row, place in enumerate(batch.places):
            losses[place] = nats[row, : batch.lengths[row]]
            for sample in range(settings.num_samples):
                ids_of = new[row * settings.num_samples + sample]
                samples[place, sample] = task.read_forecast(ids_of, systems[place])
        if constraint is not None and measured:
            for kind, masses in enumerate((constraint.cut, constraint.cut_mean)):
                cut[kind, batch.places] = np.asarray(masses).reshape(len(batch.places), -1)
    written(0)
    chosen, points = series[np.asarray(systems, int)], settings.points
    known = chosen[:, points : points + settings.horizon]
    values = samples[:, 0]
    if several := settings.num_samples > 1:
        by_mean = settings.point_forecast == "mean"
        values = mean(samples) if by_mean else quantiles(samples)[QUANTILES.index(0.5)]
    return Forecasts(
        systems=list(systems),
        context=chosen[:, :points],
        truth=np.pad(known, ((0, 0), (0, settings.horizon - known.shape[1]), (0, 0)), constant_values=np.nan),
        values=values,
        samples=samples if several else None,
        losses=losses,
        cut=cut[0].mean(1) if measured else None,
        cut_mean=cut[1].mean(1) if measured else None,
        flops=flops,
    )


@dataclass(frozen=True)
class _Batch:
    places: list[int]  # of the systems among those asked for
    ids: torch.Tensor  # (B, T) prompts, padded on the left
    padding: torch.Tensor | None  # (B)
    targets: torch.Tensor  # (B, n) tokens of the true horizon as far as it is known, IGNORED after a shorter one
    lengths: list[int]  # of the true horizons, in tokens


def _batches(
    task: Task, systems: Sequence[int], device: torch.device | str = "cpu", scored: bool = True
) -> Iterator[_Batch]:
    """Prompts and true horizons, a few systems at a time, those of like length together."""
    settings = task.settings
    prompts = [task.tokens(system, settings.points) for system in systems]
    known = settings.points + settings.horizon * scored
    wholes = [task.tokens(system, known) for system in systems]
    order = sorted(range(len(systems)), key=lambda place: len(prompts[place]))
    most = ROWS_AT_ONCE if settings.device == "cpu" else ROWS_AT_ONCE_ON_A_GPU
    at_once = max(1, most // settings.num_samples)
    for start in range(0, len(order), at_once):
        places = order[start : start + at_once]
        ids, padding = left_padded([prompts[place] for place in places], device=device)
        true = [wholes[place][len(prompts[place]) :] for place in places]
        lengths = [len(tokens) for tokens in true]
        targets = [tokens + [IGNORED] * (max(lengths) - len(tokens)) for tokens in true]
        true_ids = torch.tensor(targets, dtype=torch.int64, device=device)  # of no token, too
        yield _Batch(places, ids, padding, true_ids, lengths)


def _continue(
    task: Task, model: Qwen, prompts, constraint, draft, seed: int, written: Callable[[int], None]
) -> list[list[int]]:
    """New tokens of every sample, until each has written `horizon` steps or the most tokens that they can take.

    `written` takes how many steps of all samples are written so far.
    """
    settings, end = task.settings, task.step_end
    options = {name: getattr(settings, name) for name in ("top_k", "top_p", "repetition_penalty")}
    options |= {"samples": settings.num_samples, "temperature": settings.sampling_temperature, "seed": seed}
    steps = decode(model, prompts, task.tokens_to_forecast, constraint=constraint, draft=draft, **options)
    new: list[torch.Tensor] = []
    ended: Any = 0
    for tokens in steps:
        new.append(tokens)
        ended = ended + (tokens == end).long()  # (rows,)
        written(done := int(ended.clamp(max=settings.horizon).sum()))
        if done == settings.horizon * len(ended):
            break
    return torch.stack(new, 1).tolist()


def predicted(
    task: Task, config, systems: Sequence[int], draft: int = 0, scored: bool = True, **trained: Any
) -> dict[str, int]:
    """The most FLOPs that forecasts of these systems take, by ledger stage, at all origins; text that ends early takes
    less.

    `trained` is rank, targets and logit_bias, as in `predict`.

    With a `draft` that is a full tree and all logits for every token, as if no guess came true.
    """
    settings, most = task.settings, config.max_position_embeddings
    flops = {"training": 0, "validation": 0, "inference": 0}
    options = trained | {"samples": settings.num_samples}
    for origin, batch in ((one, batch) for one in task.origins for batch in _batches(one, systems, scored=scored)):
        b, prompt, true = len(batch.places), batch.ids.shape[1], batch.targets.shape[1]
        if (tokens := prompt + origin.tokens_to_forecast - 1) > most:
            given = f"points is {settings.points}, horizon {settings.horizon}"
            wide = f"{tokens} tokens with {len(task.dataset.names)} variables"
            raise ValueError(f"{given}: {wide}: expected at most {most}, the model's max_position_embeddings")
        price = partial(predict.generation, config, b, prompt, origin.tokens_to_forecast, **options)
        alone, both = price(scored=0), price(scored=true)
        flops["inference"] += alone if not draft else _drafted(task, config, prompt, draft, **trained)
        flops["validation"] += both - alone
    return flops


def _drafted(task: Task, config, prompt: int, nodes: int, **trained: Any) -> int:
    """FLOPs of a prompt's prefill and of a forward of so many nodes for each token but the first."""
    forwards = task.tokens_to_forecast - 1
    # A tree is no deeper than what is left, but priced as a chain, which would leave the model's positions.
    config = replace(config, max_position_embeddings=config.max_position_embeddings + nodes)
    total = predict.generation(config, 1, prompt, 1, **trained)
    price = partial(predict.predict, config, 1, nodes, **trained)
    first, last = (price(cached=prompt + chosen).total for chosen in (0, forwards - 1))
    return total + (first + last) * forwards // 2  # affine in what is cached


def predicted_loss(task: Task, config, **trained: Any) -> int:
    """FLOPs of one pass over the validation windows."""
    windows, context = len(task.validation_windows), task.settings.context
    one = predict.predict(config, 1, context, symbols=task.symbols, **trained)
    return windows * one.total
