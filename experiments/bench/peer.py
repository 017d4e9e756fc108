"""The peer's side of every job: transformers and PEFT, used as their manuals have it, in float32 on a CPU."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LogitsProcessor, Qwen2ForCausalLM, logging
from transformers.generation.streamers import BaseStreamer

from experiments.bench.allowed import constraint


class Side:
    """`transformers` with the weights in the type that is computed in, which is what it offers."""

    def __init__(self, job: dict[str, Any]):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model: Any = Qwen2ForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["compute"]))
        self.model.to(job["device"]).eval()
        self.forwards = 0  # one a token

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T, V)."""
        with torch.no_grad():
            return self.model(ids, use_cache=False).logits

    def add_lora(self, rank: int) -> dict[str, torch.nn.Parameter]:
        """LoRA on q and v; its matrices, A and B of each layer, by this project's names."""
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
        self.model = get_peft_model(self.model, config)
        return {
            name.removeprefix("base_model.model.").replace(".lora_", ".").removesuffix(".default.weight"): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def step(self, optimizer: torch.optim.Optimizer, ids: Tensor, symbols: Tensor | None, exact: bool) -> float:
        """One update on (B, T + 1) tokens; the mean loss before it, over all tokens.

        `exact`: of the same logits, the loss and its gradient come from float64, over the `symbols` if there are any.
        """
        self.model.train()
        optimizer.zero_grad()
        logits, targets = self.model(ids[:, :-1], use_cache=False).logits, ids[:, 1:]
        if exact:
            gradient = torch.zeros_like(logits)
            found = exact_loss(logits.detach(), targets, symbols, gradient)
            logits.backward(gradient)
        else:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            loss.backward()
            found = loss.item()
        optimizer.step()
        return found

    @torch.no_grad()
    def loss(self, ids: Tensor, symbols: Tensor | None, exact: bool) -> float:
        """The mean loss of (B, T + 1) tokens, over all tokens unless `exact`, as in `step`."""
        self.model.eval()
        logits, targets = self.model(ids[:, :-1], use_cache=False).logits, ids[:, 1:]
        if exact:
            return exact_loss(logits, targets, symbols)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).item()

    @torch.no_grad()
    def generate(self, prompts: Tensor, new: int, how: str, job: dict[str, Any], tick: Callable[[], None]) -> Tensor:
        """(B, new) greedy tokens; `tick` is called when the first of them are there."""
        # Each is set: a checkpoint's generation_config.json may have others.
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
        options |= {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new, "streamer": _Ticks(tick)}
        if how != "plain":
            options["logits_processor"] = [_Allowed(job, prompts, self.model.config.vocab_size)]
        out = self.model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        return out[:, prompts.shape[1] :]


def exact_loss(logits: Tensor, targets: Tensor, symbols: Tensor | None, gradient: Tensor | None = None) -> float:
    """Mean cross-entropy in float64, a few tokens at a time; its gradient for the logits goes into `gradient`, zeros.

    In float32, over 151,936 classes, the loss is itself off by 4e-5 and LoRA's gradients by 3e-4 (relative, measured on
    the 0.5B model), more than the two sides are apart.
    """
    rows, wanted = logits.flatten(0, 1), targets.flatten()[:, None]
    if symbols is not None:  # where among them each stands
        wanted = (wanted == symbols).long().argmax(-1, keepdim=True)
    total = 0.0
    for start in range(0, len(rows), 32):
        part = slice(start, start + 32)
        scores = (rows[part] if symbols is None else rows[part][:, symbols]).double()
        logs = scores.log_softmax(-1)
        total -= logs.gather(1, wanted[part]).sum().item()
        if gradient is not None:
            slope = logs.exp_().scatter_add_(1, wanted[part], -torch.ones_like(wanted[part], dtype=logs.dtype))
            columns = slice(None) if symbols is None else symbols
            gradient.flatten(0, 1)[part][:, columns] = (slope / len(rows)).to(gradient.dtype)
    return total / len(rows)


class _Allowed(LogitsProcessor):
    """The same constraint as ours, at the cost of one mask a token."""

    def __init__(self, job: dict[str, Any], prompts: Tensor, vocabulary: int):
        self.constraint, self.prompt = constraint(job, len(prompts), vocabulary, measure=True), prompts.shape[1]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > self.prompt:
            self.constraint.advance(ids[:, -1], None)
        return scores.masked_fill(~self.constraint.allowed(), float("-inf"))


class _Ticks(BaseStreamer):
    """Given the prompt first, then each token: the time between the first two is the prefill's."""

    def __init__(self, tick: Callable[[], None]):
        self.seen, self.tick = 0, tick

    def put(self, value: Tensor) -> None:
        self.seen += 1
        if self.seen == 2:
            self.tick()

    def end(self) -> None:
        pass
