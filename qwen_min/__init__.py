"""Qwen2.5 from scratch: a decoder that loads the official weights and counts its own FLOPs."""

from qwen_min.config import QwenConfig
from qwen_min.flops import FlopMeter
from qwen_min.model import Qwen
from qwen_min.tokenizer import Tokenizer

__all__ = ["FlopMeter", "Qwen", "QwenConfig", "Tokenizer"]
