"""The peer: transformers' Qwen2, with PEFT's adapters, watched by hooks of the same names as `model.trace`."""

import warnings
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoTokenizer, Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2

from qwen_min.trace import hooked, keep_rotated, replaced

NAME = f"transformers {transformers.__version__}"


class Peer:
    """A model's folder as transformers loads it, in float32 on the CPU, attention written out; with PEFT's adapter."""

    def __init__(self, folder: Path, adapter: Path | None = None):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.folder = folder
        self.model: Any = Qwen2ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()
        self.wrapped: Any = self.model
        if adapter is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from peft import PeftModel
            self.wrapped = PeftModel.from_pretrained(self.model, adapter, is_trainable=True).eval()

    @torch.no_grad()
    def trace(self, ids: Tensor) -> dict[str, Tensor]:
        """What `Qwen.trace` gives of (1, T) ids, by name."""
        found: dict[str, Tensor] = {}
        rotate, layer = modeling_qwen2.apply_rotary_pos_emb, count()

        def keep(name: str, tensor: Tensor, shape: str) -> None:
            found[name] = tensor.clone()

        def watched(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            rotated = rotate(*args, **options)
            keep_rotated(keep, next(layer), *rotated)
            return rotated

        with hooked(self.model, keep), replaced(modeling_qwen2, "apply_rotary_pos_emb", watched):
            keep("logits", self.logits(ids), "B T V")
        return found

    @torch.no_grad()
    def exact_trace(self, ids: Tensor) -> dict[str, Tensor]:
        """`trace` in float64 throughout, also where transformers computes in float32. The model stays in float64."""
        self.wrapped.double()
        with _InFloat64():
            self.model.model.rotary_emb = type(self.model.model.rotary_emb)(self.model.config)
            return self.trace(ids)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """(1, T, V)."""
        return self.model(ids, use_cache=False).logits

    def gradients(self, ids: Tensor) -> dict[str, Tensor]:
        """Of the mean loss of each of (1, T) ids after the first, by this project's names; the loss from float64."""
        logits = self.model(ids[:, :-1], use_cache=False).logits[0]
        F.cross_entropy(logits.double(), ids[0, 1:]).backward()
        found = {_ours(name): p.grad for name, p in self.wrapped.named_parameters() if p.grad is not None}
        self.wrapped.zero_grad()
        return found

    @torch.no_grad()
    def generate(self, ids: Tensor, new: int) -> Tensor:
        """(1, T + new) greedy tokens, whatever a generation_config.json says."""
        options: dict[str, Any] = {"repetition_penalty": 1.0, "eos_token_id": None, "pad_token_id": 0, "num_beams": 1}
        mask = torch.ones_like(ids)
        return self.model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)

    def tokens(self, text: str) -> list[int]:
        return self._tokenizer()(text, add_special_tokens=False)["input_ids"]

    def chat(self, messages: Sequence[tuple[str, str]]) -> str | None:
        """The text of (role, text) pairs by the folder's own template, or None where it has none."""
        tokenizer, said = self._tokenizer(), [{"role": role, "content": text} for role, text in messages]
        if not tokenizer.chat_template:
            return None
        return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)

    def save_adapter(self, folder: Path) -> None:
        self.wrapped.save_pretrained(folder)

    def read_adapter(self, folder: Path) -> None:
        """Run with the adapter of this folder, in place of the one it has."""
        self.wrapped.load_adapter(folder, "other")
        self.wrapped.set_adapter("other")

    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)


class _InFloat64(TorchFunctionMode):
    """Whatever asks torch for float32 gets float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(widened, args), **{name: widened(value) for name, value in (kwargs or {}).items()})


def _ours(name: str) -> str:
    """A parameter's name here, of that in PEFT or transformers."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return name.replace("lora_A.default.weight", "lora_a").replace("lora_B.default.weight", "lora_b")
