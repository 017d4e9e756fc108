"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora.layer import add_logit_bias, add_lora, lora_layers
from qwen_min.model import Qwen

_PREFIX = "base_model.model."

# What each field must hold (or be absent) for the maths to be that of `LoRALinear`.
_SUPPORTED: dict[str, tuple] = {
    "peft_type": ("LORA",), "use_dora": (False, None), "use_rslora": (False, None), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "modules_to_save": ([], None), "bias": ("none", None),
    "fan_in_fan_out": (False, None), "lora_bias": (False, None), "layers_to_transform": ([], None),
    "layers_pattern": ([], None), "exclude_modules": ([], None), "layer_replication": ([], None),
    "use_qalora": (False, None), "use_bdlora": (False, None), "alora_invocation_tokens": ([], None),
    "target_parameters": ([], None), "trainable_token_indices": ([], {}, None), "arrow_config": (None,),
    "megatron_config": (None,), "corda_config": (None,),
}


def save_adapter(model: Qwen, folder: str | Path, base: str = "") -> None:
    """Write the LoRA matrices of `model` (and its logit bias, if any) into `folder`, for PEFT or `load_adapter`.

    Args:
        model: a model with LoRA, not merged: PEFT would add the update again.
        folder: made if it is missing.
        base: name of the base model, recorded for PEFT's AutoPeftModel.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA: expected one that add_lora was called on")
    one = next(iter(layers.values()))
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the adapter is merged into the weights: expected unmerge first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_a.detach().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_b.detach().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    bias = folder / "logit_bias.safetensors"
    if model.logit_bias is not None:
        save_file({"logit_bias": model.logit_bias.detach().contiguous()}, bias)
    else:
        bias.unlink(missing_ok=True)
    # PEFT reads a list as endings of module names; the shortest that tell are those add_lora was given.
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base or None, "r": one.rank,
        "lora_alpha": one.alpha, "lora_dropout": one.dropout, "bias": "none", "fan_in_fan_out": False,
        "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
        "inference_mode": True, "target_modules": _endings(layers, model),
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
            few, too many or of another shape.
    """
    folder = Path(folder)
    config, path = _read_config(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    tensors = _read(path)
    targets = config["target_modules"]
    try:
        add_lora(model, config["r"], config["lora_alpha"], targets, config.get("lora_dropout") or 0.0, seed=0)
    except ValueError as e:
        raise ValueError(f"{folder / 'adapter_config.json'}: {e}") from None
    parameters = {f"{_PREFIX}{name}.lora_{half}.weight": getattr(layer, f"lora_{half.lower()}")
                  for name, layer in lora_layers(model) for half in "AB"}
    wrong = ([f"missing {k}" for k in sorted(parameters.keys() - tensors.keys())]
             + [f"unexpected {k}" for k in sorted(tensors.keys() - parameters.keys())]
             + [f"{k} is {list(tensors[k].shape)}, not {list(p.shape)}" for k, p in parameters.items()
                if k in tensors and tensors[k].shape != p.shape])
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{path}: {'; '.join(wrong[:3])}{more}: expected the matrices of its adapter_config.json")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])
    bias = folder / "logit_bias.safetensors"
    if bias.is_file():
        held = _read(bias)
        if set(held) != {"logit_bias"} or held["logit_bias"].shape != (model.config.vocab_size,):
            raise ValueError(f"{bias}: expected one tensor, logit_bias [{model.config.vocab_size}]")
        add_logit_bias(model, held["logit_bias"])
    return model


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: cannot be read ({' '.join(str(e).split())[:200]}): "
                         "expected a complete safetensors file") from None


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror or e}: expected PEFT's adapter_config.json") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not valid JSON: expected PEFT's adapter_config.json") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds {type(config).__name__}: expected a JSON object")
    for name, allowed in _SUPPORTED.items():
        if config.get(name) not in allowed and not (name == "peft_type" and name not in config):
            raise ValueError(f"{path}: {name} is {config[name]!r}: expected {allowed[0]!r}, the only one implemented")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets) or not targets:
        raise ValueError(f"{path}: target_modules is {targets!r}: expected a list of layer names")
    for name, kinds in {"r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float, type(None))}.items():
        if type(config.get(name)) not in kinds:
            raise ValueError(f"{path}: {name} is {config.get(name)!r}: expected a number")
    return config
