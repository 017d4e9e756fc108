"""Qwen2.5 from scratch: a decoder that loads the official weights and counts its own FLOPs."""

from importlib.util import find_spec

from qwen_min.config import QwenConfig
from qwen_min.flops import FlopMeter
from qwen_min.model import Qwen
from qwen_min.tokenizer import Tokenizer

if find_spec("qwen_min.fast"):  # the one place that knows of it; the model is whole without
    import qwen_min.fast  # noqa: F401

__all__ = ["FlopMeter", "Qwen", "QwenConfig", "Tokenizer"]
