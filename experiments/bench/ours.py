"""This project's side of every job, by the functions that its commands run."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from data.windows import Windows
from experiments.bench.allowed import constraint, draft
from experiments.training.cell import training_step, validation_loss
from lora import add_lora
from lora.layer import lora_layers
from qwen_min import FlopMeter, Qwen
from qwen_min.generate import decode, prefill


class Side:
    """Weights kept in the job's `dtype`, products in its `compute`."""

    def __init__(self, job: dict[str, Any]):
        kept, self.compute = getattr(torch, job["dtype"]), getattr(torch, job["compute"])
        self.model = Qwen.from_pretrained(job["model"], kept, job["device"], compute_dtype=self.compute)
        if job["compile"]:
            self.model.compile()
        self.forwards = 0
        self.model.model.embed_tokens.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T, V)."""
        with torch.no_grad():
            return self.model(ids)

    def add_lora(self, rank: int) -> dict[str, torch.nn.Parameter]:
        """LoRA on q and v; its matrices, A and B of each layer, by name."""
        add_lora(self.model, rank)
        layers = dict(lora_layers(self.model))
        return {f"{name}.{half}": m for name, x in layers.items() for half, m in (("A", x.lora_a), ("B", x.lora_b))}

    def step(self, optimizer: torch.optim.Optimizer, ids: Tensor, symbols: Tensor | None, exact: bool) -> float:
        """One update on (B, T + 1) tokens; the mean loss before it. `exact` is for the peer: ours always is."""
        return training_step(self.model, _windows(ids, symbols), range(len(ids)), optimizer)[0]

    def loss(self, ids: Tensor, symbols: Tensor | None, exact: bool) -> float:
        """The mean loss of (B, T + 1) tokens."""
        return validation_loss(self.model, _windows(ids, symbols))["validation_loss"]

    def generate(self, prompts: Tensor, new: int, how: str, job: dict[str, Any], tick: Callable[[], None]) -> Tensor:
        """(B, new) greedy tokens; `tick` is called when the first of them are there."""
        options: dict[str, Any] = {}
        if how != "plain":
            options["constraint"] = constraint(job, len(prompts), self.model.config.vocab_size)
        if how == "tree":
            options["draft"] = draft(job, prompts[0].tolist())
        room = new - 1 + (job["draft"] if how == "tree" else 0)
        tokens: list[Tensor] = []
        for token in decode(self.model, prefill(self.model, prompts, room), new, **options):
            if not tokens:
                tick()
            tokens.append(token)
        if how != "tree":
            self.forwards = new  # a captured step calls no hook
        return torch.stack(tokens, 1)

    def counted(self, prompts: Tensor, job: dict[str, Any]) -> Callable[[bool], None]:
        """The fastest forward of one token after the prompts, to be run with or without a meter around it."""
        read, token = prefill(self.model, prompts, 1), prompts[:, -1:]
        symbols = torch.tensor(job["symbol_ids"], device=job["device"])

        @torch.inference_mode()
        def forward(metered: bool) -> None:
            cache = read.rewound()
            with FlopMeter() if metered else nullcontext():
                self.model.head(self.model.model(token, cache), symbols)

        return forward


def _windows(ids: Tensor, symbols: Tensor | None) -> Windows:
    tokens, rows = ids.cpu().numpy(), torch.arange(len(ids)).numpy()
    vocabulary = None if symbols is None else symbols.cpu().numpy()
    return Windows(tokens[:, :-1], tokens[:, 1:], rows, rows, pad_id=0, vocabulary=vocabulary)
