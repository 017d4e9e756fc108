"""The LoRA layer, and how a model gets it."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_min import ops
from qwen_min.layers import Linear
from qwen_min.model import Qwen

TARGETS = ("q_proj", "v_proj")


class LoRALinear(Linear):
    """y = x Wᵀ + b + (alpha / r) · dropout(x) Aᵀ Bᵀ, with W and b frozen (Hu et al. 2021, section 4.1).

    `weight` and `bias` keep their names, so a base checkpoint loads with `lora_a` (r, in) and `lora_b` (out, r)
    missing. A starts Kaiming-uniform and B at zero, so training starts from the base model.

    Args:
        base: the layer to adapt; its parameters are shared, not copied.
        rank: r, at least 1.
        alpha: scale of the update is alpha / r.
        dropout: probability of an input of A being dropped in training.
        generator: draws A.
    """

    def __init__(
        self, base: Linear, rank: int, alpha: float, dropout: float = 0.0, generator: torch.Generator | None = None
    ):
        nn.Module.__init__(self)
        self.weight, self.bias, self.path = base.weight, base.bias, base.path
        self.coursework_outputs = base.coursework_outputs
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.merged = False
        outputs, inputs = base.weight.shape
        device = base.weight.device
        # float32 whatever the base is kept in: the updates are too small for bfloat16. PEFT does the same.
        a = torch.empty(rank, inputs, dtype=torch.float32, device="meta" if device.type == "meta" else "cpu")
        if not a.is_meta:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_a = nn.Parameter(a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32, device=device))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # (..., out)
        if self.merged:
            return y
        dropped = F.dropout(x, self.dropout, self.training)
        return ops.add_low_rank(y, dropped, self.lora_a, self.lora_b, self.scale, self.coursework_outputs)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # the update is in the weight: the state is that of a base model
            del destination[f"{prefix}lora_a"], destination[f"{prefix}lora_b"]

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        if self.merged:
            raise ValueError(f"{self.path} is merged: expected unmerge before other weights are loaded")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def fold(self, sign: int) -> None:
        """Add (+1) the update to the weight, or take it out again (-1)."""
        update = self.scale * (self.lora_b @ self.lora_a)
        self.weight.copy_(self.weight + sign * update)  # in the wider type of the two


def add_lora(
    model: Qwen,
    rank: int = 8,
    alpha: float | None = None,
    targets: str | Sequence[str] = TARGETS,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Qwen:
    """Freeze `model` (all but its logit bias, if it has one) and give its target layers LoRA, in place.

    Args:
        model: a `Qwen` without LoRA.
        rank: r of every layer.
        alpha: the update is scaled by alpha / r; r by default, as the three reports have it.
        targets: names of linear layers, the last parts of their paths ("q_proj", "mlp.up_proj"), or one of them;
            "all-linear", which is PEFT's word, for all but the head.
        dropout: on the input of A.
        seed: of A's draw; None draws from torch's global generator.

    Returns:
        The same model.

    Raises:
        ValueError: the rank, alpha or dropout is out of range, a target matches no linear layer, or there is LoRA
            already.
    """
    alpha = rank if alpha is None else alpha
    layers = check(model, rank, alpha, targets, dropout)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return adapt(model, dict.fromkeys(layers, (rank, alpha)), dropout, generator)


def adapt(
    model: Qwen, sizes: Mapping[str, tuple[int, float]], dropout: float = 0.0, generator: torch.Generator | None = None
) -> Qwen:
    """As `add_lora`, unchecked: each layer that `sizes` names gets its own rank and alpha."""
    linear = linear_layers(model)
    model.requires_grad_(False)
    if model.logit_bias is not None:
        model.logit_bias.requires_grad_(True)
    for name, (rank, alpha) in sizes.items():
        base, (parent, _, child) = linear[name], name.rpartition(".")
        layer = LoRALinear(base, rank, alpha, dropout, generator).train(base.training)
        setattr(model.get_submodule(parent), child, layer)
    return model


def check(model: Qwen, rank: int, alpha: float, targets: str | Sequence[str], dropout: float) -> dict[str, Linear]:
    """The layers that `add_lora` would adapt, by name; raises what it raises. Nothing is changed."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank is {rank!r}: expected a whole number of at least 1")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is {alpha!r}: expected a positive number")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}: expected at least 0, less than 1")
    if any(True for _ in lora_layers(model)):
        raise ValueError("the model has LoRA already: expected one without")
    linear = linear_layers(model)
    targets = [targets] if isinstance(targets, str) else list(targets)
    if targets == ["all-linear"]:
        targets = list(linear)
    for target in targets or [""]:
        if not any(_matches(name, target) for name in linear):
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"target {target!r} matches no linear layer: expected one of {', '.join(kinds)}")
    return {name: m for name, m in linear.items() if any(_matches(name, target) for target in targets)}


def linear_layers(model: Qwen) -> dict[str, Linear]:
    """The linear layers by name, all but the head."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and name != "lm_head"}


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def add_logit_bias(model: Qwen, bias: Tensor | None = None) -> Qwen:
    """Give the model a trainable (V) bias on its logits, the option of the course's starter code; zero by default."""
    size = model.config.vocab_size
    start = torch.zeros(size) if bias is None else bias.float()
    if start.shape != (size,):
        raise ValueError(f"the logit bias is {list(start.shape)}: expected [{size}]")
    model.logit_bias = nn.Parameter(start.to(model.device))
    return model


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, layer) of every LoRA layer."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))


def merge(model: Qwen) -> Qwen:
    """Fold every update into its weight, in place: as fast as the base model, same outputs to rounding.

    Raises:
        ValueError: there is nothing to merge.
    """
    return _fold_all(model, 1)


def unmerge(model: Qwen) -> Qwen:
    """Undo `merge`: the weights are restored to rounding in their own type (1e-7 relative in float32)."""
    return _fold_all(model, -1)


def _fold_all(model: Qwen, sign: int) -> Qwen:
    layers = [layer for _, layer in lora_layers(model) if layer.merged != (sign > 0)]
    if not layers:
        what, state = ("merge", "not merged") if sign > 0 else ("unmerge", "merged")
        raise ValueError(f"nothing to {what}: expected a model with LoRA layers that are {state}")
    for layer in layers:
        layer.fold(sign)
        layer.merged = sign > 0
    return model
