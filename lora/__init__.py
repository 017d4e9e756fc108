"""Low-rank adaptation (LoRA, Hu et al. 2021) as a layer of its own, saved in PEFT's format."""

from lora.checkpoint import load_adapter, save_adapter
from lora.layer import LoRALinear, add_logit_bias, add_lora, merge, unmerge

__all__ = ["LoRALinear", "add_logit_bias", "add_lora", "load_adapter", "merge", "save_adapter", "unmerge"]
