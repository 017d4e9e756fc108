"""Programs that count FLOPs, asked about transformers' Qwen2 with PEFT's LoRA, without weights: on torch's meta device.

Each takes a model and (B, T) ids, and returns its own figure. They are imported when they are asked.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_min import QwenConfig


class Missing(Exception):
    """A program that is not installed, or cannot count this model: why, in a line."""


class Asked(nn.Module):
    """Transformers' model of a shape, read as (B, T) ids alone; with `labels` its loss."""

    def __init__(self, config: QwenConfig, tokens: int, rank: int, targets: Sequence[str], attention: str):
        from transformers import Qwen2Config, Qwen2ForCausalLM

        super().__init__()
        fields = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "rope_theta"}
        rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
        shape: Any = dict(fields, rope_parameters=rope, attn_implementation=attention)
        theirs: Any = Qwen2ForCausalLM(Qwen2Config(**shape))
        if rank:
            from peft import LoraConfig, get_peft_model

            modules: Any = "all-linear" if list(targets) == ["all-linear"] else list(targets)
            theirs = get_peft_model(theirs, LoraConfig(r=rank, lora_alpha=rank, target_modules=modules))
        self.model = theirs.eval()
        # Transformers looks into the ids to make a mask, which has no answer without data: it is given one.
        self.mask = torch.zeros(1, 1, tokens, tokens) if attention == "eager" else None

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        mask = {"full_attention": self.mask}
        out = self.model(input_ids, attention_mask=mask, labels=labels, use_cache=False)
        return out.logits if labels is None else out.loss


def _fvcore(model: Asked, ids: Tensor) -> int:
    from fvcore.nn import FlopCountAnalysis

    return FlopCountAnalysis(model, ids).unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


def _calflops(model: Asked, ids: Tensor, backward: bool = False) -> float:
    from calflops import calculate_flops

    options = {"print_results": False, "print_detailed": False, "output_as_string": False}
    return calculate_flops(model=model, args=[ids], include_backPropagation=backward, **options)[0]


def _thop(model: Asked, ids: Tensor) -> float:
    from thop import profile

    return profile(model, inputs=(ids,), verbose=False)[0]


def _ptflops(model: Asked, ids: Tensor, backend: str) -> int:
    from ptflops import get_model_complexity_info

    options = {"as_strings": False, "print_per_layer_stat": False, "backend": backend}
    # On meta torch makes a product with a bias of torch.mm, which would be counted a second time.
    for layer in (module for module in model.modules() if ids.is_meta and isinstance(module, nn.Linear)):
        layer.forward = partial(_bias_apart, layer)  # type: ignore[method-assign]
    return get_model_complexity_info(model, (1,), input_constructor=lambda _: {"input_ids": ids}, **options)[0]


def _bias_apart(layer: nn.Linear, x: Tensor) -> Tensor:
    y = F.linear(x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def _torchinfo(model: Asked, ids: Tensor) -> int:
    from torchinfo import summary

    return summary(model, input_data=[ids], verbose=0, device=ids.device).total_mult_adds


def _torch(model: Asked, ids: Tensor, backward: bool = False) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        if backward:
            model(ids, labels=ids).backward()
        else:
            model(ids)
    return counter.get_total_flops()


def _transformers(model: Asked, ids: Tensor) -> int:
    from transformers import Trainer

    holder: Any = SimpleNamespace(model=model.model)
    return Trainer.floating_point_ops(holder, {"input_ids": ids})


COUNTERS: dict[str, tuple[str, Callable[[Asked, Tensor], float]]] = {
    "fvcore": ("fvcore", _fvcore),
    "calflops": ("calflops", _calflops),
    "calflops with its backward": ("calflops", partial(_calflops, backward=True)),
    "thop": ("thop", _thop),
    "ptflops": ("ptflops", partial(_ptflops, backend="pytorch")),
    "ptflops by aten": ("ptflops", partial(_ptflops, backend="aten")),
    "torchinfo": ("torchinfo", _torchinfo),
    "FlopCounterMode": ("torch", _torch),
    "FlopCounterMode with its backward": ("torch", partial(_torch, backward=True)),
    "floating_point_ops": ("transformers", _transformers),
}
"""Each figure by its name: the package that it is of, and how it is asked."""


def _on_cpu(model: nn.Module) -> None:
    """Move what is on meta, tied weights as one: `Module.to` refuses torch's fake tensors."""
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                if old not in moved:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    moved[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                held[name] = moved[old]  # type: ignore[assignment]


def version(package: str) -> str:
    """The version that is installed; `Missing` where none is."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise Missing(f"{package} is not installed: pip install -e '.[audit]'") from None


def count(
    name: str,
    config: QwenConfig,
    batch: int,
    tokens: int,
    rank: int = 0,
    targets: Sequence[str] = (),
    attention: str = "sdpa",
    device: str = "meta",
) -> int:
    """What a program of `COUNTERS` says of a forward, or training step, of (batch, tokens).

    Args:
        config, rank, targets: the model, and its LoRA; rank 0 for none.
        attention: transformers' implementation, "sdpa" (its default, one call of torch's) or "eager" (written out).
        device: "meta"; "fake cpu", which takes no memory, yet runs the CPU's kernels; or "cpu".

    Raises:
        Missing: it is not installed, or fails.
    """
    package, ask = COUNTERS[name]
    for needed in (package, "transformers", *(["peft"] if rank else [])):
        version(needed)
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for redirect in (redirect_stdout, redirect_stderr):
                stack.enter_context(redirect(io.StringIO()))
            with torch.device("cpu" if device == "cpu" else "meta"):
                model = Asked(config, tokens, rank, targets, attention)
                ids = torch.zeros(batch, tokens, dtype=torch.int64)
            if device == "fake cpu":
                from torch._subclasses.fake_tensor import FakeTensorMode

                stack.enter_context(FakeTensorMode())
                ids = torch.zeros(batch, tokens, dtype=torch.int64)
                _on_cpu(model)
            return int(ask(model, ids))
    except Exception as error:  # a program that fails is one more finding
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise Missing(f"fails: {said[:160]}") from error
