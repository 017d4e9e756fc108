"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, which carries a digest."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from lora.layer import adapt, add_logit_bias, check, linear_layers, lora_layers
from qwen_min.config import read_object
from qwen_min.load import expanded, listed
from qwen_min.model import Qwen
from qwen_min.tensors import from_bytes, to_bytes, unreadable

# Fields of PEFT's with one or more values that leave the maths that of `LoRALinear`, and those that never touch it.
# Every other one must be off: null, false or empty.
_SUPPORTED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
    "use_rslora": (True,),
}
_HARMLESS = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern"),
    *("task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "runtime_config", "ensure_weight_tying"),
}


def save_adapter(model: Qwen, folder: str | Path, base: str = "", dtype: torch.dtype = torch.float32) -> None:
    """Write the LoRA matrices of `model` (and its logit bias, if any) into `folder`, for PEFT or `load_adapter`.

    Args:
        model: a model with LoRA, not merged: PEFT would add the update again.
        folder: made if it is missing.
        base: name of the base model, recorded for PEFT's AutoPeftModel.
        dtype: of the matrices in the file; `weights/forecaster` has bfloat16.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA: expected one that add_lora was called on")
    one = next(iter(layers.values()))
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the adapter is merged into the weights: expected unmerge first")
    folder = expanded(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in layers.items():
        tensors[_key(name, "A")] = layer.lora_a.detach().to(dtype).contiguous()
        tensors[_key(name, "B")] = layer.lora_b.detach().to(dtype).contiguous()
    (folder / "adapter_model.safetensors").write_bytes(to_bytes(tensors))
    bias = folder / "logit_bias.safetensors"
    if model.logit_bias is not None:
        bias.write_bytes(to_bytes({"logit_bias": model.logit_bias.detach().contiguous()}))
    else:
        bias.unlink(missing_ok=True)
    # PEFT reads a list as endings of module names; the shortest that tell are those add_lora was given.
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": one.rank,
        "lora_alpha": one.alpha,
        "lora_dropout": one.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != one.rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != one.alpha},
        "modules_to_save": None,
        "inference_mode": True,
        "target_modules": _endings(layers, model),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _endings(layers: dict, model: Qwen) -> list[str]:
    """Names of the adapted layers: short where the short name means just them ("q_proj"), else in full."""
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in kinds}
    return kinds if meant == set(layers) else sorted(layers)


def load_adapter(model: Qwen, folder: str | Path) -> Qwen:
    """Give `model` the LoRA layers of an adapter folder, ours or PEFT's, in place.

    Raises:
        ValueError: the files are missing or damaged, ask for what is not implemented (by name), or hold a key too
            few, too many, of another shape or with NaN.
    """
    folder = expanded(folder)
    config, path = _read_config(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    tensors, bias = _read(path), _read_bias(folder / "logit_bias.safetensors", model.config.vocab_size)
    dropout = config.get("lora_dropout") or 0.0
    try:
        sizes = _sizes(model, config, dropout)
    except (ValueError, re.error, OverflowError, RecursionError) as e:
        said = e if isinstance(e, ValueError) else f"a pattern is no regular expression ({e}): expected one"
        raise ValueError(f"{folder / 'adapter_config.json'}: {said}") from None
    shapes, linear = dict[str, list[int]](), linear_layers(model)
    for name, (rank, _) in sizes.items():
        outputs, inputs = linear[name].weight.shape
        shapes |= {_key(name, "A"): [rank, inputs], _key(name, "B"): [outputs, rank]}
    wrong = (
        [f"missing {k}" for k in sorted(shapes.keys() - tensors.keys())]
        + [f"unexpected {listed([k])}" for k in sorted(tensors.keys() - shapes.keys())]
        + [
            f"{k} is {list(tensors[k].shape)}, not {shape}"
            for k, shape in shapes.items()
            if k in tensors and list(tensors[k].shape) != shape
        ]
        + [f"{listed([k])} is of type {t.dtype}" for k, t in tensors.items() if not t.is_floating_point()]
        + [f"{listed([k])} holds NaN or infinity" for k, t in tensors.items() if not t.float().isfinite().all()]
    )
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{path}: {'; '.join(wrong[:3])}{more}: expected the matrices of its adapter_config.json")
    # Everything is checked: only now is the model changed.
    adapt(model, sizes, dropout, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, layer in lora_layers(model):
            layer.lora_a.copy_(tensors[_key(name, "A")])
            layer.lora_b.copy_(tensors[_key(name, "B")])
    return model if bias is None else add_logit_bias(model, bias)


def _sizes(model: Qwen, config: dict[str, Any], dropout: float) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each layer that PEFT would adapt, by its `check_target_module_exists` and `get_pattern_key`.

    A text as target is a regular expression of whole names; of a pattern's, which are of their ends, the first holds.
    """
    rank, alpha, targets = config["r"], config["lora_alpha"], config["target_modules"]
    if isinstance(targets, str) and targets != "all-linear":
        targets = [name for name in linear_layers(model) if re.fullmatch(config["target_modules"], name)]
        if not targets:
            what = f"target_modules is {config['target_modules']!r:.200}, which matches no linear layer"
            raise ValueError(f"{what}: expected a regular expression of whole names")

    def own(pattern: str, name: str, default: Any) -> Any:
        given = config.get(pattern) or {}
        return next((value for key, value in given.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    sizes = {
        name: (own("rank_pattern", name, rank), own("alpha_pattern", name, alpha))
        for name in check(model, rank, alpha, targets, dropout)
    }
    for one in set(sizes.values()):
        check(model, *one, targets, dropout)
    root = config.get("use_rslora")  # the scale is alpha / sqrt(r)
    return {name: (r, a * r**0.5 if root else a) for name, (r, a) in sizes.items()}


def _key(layer: str, half: str) -> str:
    return f"base_model.model.{layer}.lora_{half}.weight"


def _read_bias(path: Path, vocabulary: int) -> torch.Tensor | None:
    if not path.is_file():
        return None
    held = _read(path)
    if set(held) != {"logit_bias"} or held["logit_bias"].shape != (vocabulary,):
        raise ValueError(f"{path}: holds another tensor: expected one, logit_bias [{vocabulary}]")
    return held["logit_bias"]


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise unreadable(path, e) from None
    return from_bytes(data, path)


def _read_config(path: Path) -> dict:
    config = read_object(path, "PEFT's adapter_config.json")
    for name, value in config.items():
        if value and name not in _HARMLESS and value not in _SUPPORTED.get(name, ()):
            expected = " or ".join(map(repr, _SUPPORTED.get(name, ()))) or "null, false or empty"
            wrong = f"{listed([name])} is {value!r:.200}"
            raise ValueError(f"{path}: {wrong}: expected {expected}: no other is implemented")
    targets = config.get("target_modules")
    if not targets or not isinstance(targets, str | list) or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"{path}: target_modules is {targets!r:.200}: expected layer names or a regular expression")
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise ValueError(f"{path}: {name} is {pattern!r:.200}: expected an object of numbers")
    numbers: list[tuple[str, Any, tuple[type, ...]]] = [
        *(("r", value, (int,)) for value in (config.get("r"), *patterns["rank_pattern"].values())),
        *(("lora_alpha", v, (int, float)) for v in (config.get("lora_alpha"), *patterns["alpha_pattern"].values())),
        ("lora_dropout", config.get("lora_dropout"), (int, float, type(None))),
    ]
    for name, value, kinds in numbers:
        if type(value) not in kinds or (isinstance(value, int) and abs(value) >= 2**63):
            raise ValueError(f"{path}: {name} is {value!r:.200}: expected a number")
    return config
