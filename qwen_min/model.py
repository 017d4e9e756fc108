"""The Qwen2.5 decoder.

Dimension letters, here and in every module:
    B batch, T new tokens, S tokens attended (cached + T), E hidden_size, H query heads, K key/value heads,
    D head size, F feed-forward width, V vocabulary, L layers.
Parameter names are Hugging Face's, so official weights load without a map.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_min import habits, load, loss, ops, trace
from qwen_min.cache import KVCache
from qwen_min.config import QwenConfig
from qwen_min.flops import Metered
from qwen_min.layers import Attention, Embedding, Linear, RMSNorm, SwiGLU
from qwen_min.view import View, causal


class Block(Metered):
    """One layer: x + attention(norm(x)), then x + swiglu(norm(x))."""

    def __init__(self, config: QwenConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, view: View, cache: KVCache | None) -> Tensor:
        x = ops.add_residual(x, self.self_attn(self.input_layernorm(x), view, cache))
        return ops.add_residual(x, self.mlp(self.post_attention_layernorm(x)))


class Decoder(Metered):
    """Embedding, L blocks, final norm: token ids (B, T) to hidden states (B, T, E)."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.tie_word_embeddings)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, cache: KVCache | None = None, padding: Tensor | None = None) -> Tensor:
        if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"ids are {ids.dtype} {list(ids.shape)}: expected whole numbers (batch, tokens)")
        batch, tokens = ids.shape
        if padding is not None and (padding.shape != (batch,) or padding.is_floating_point()):
            raise ValueError(f"padding is {padding.dtype} {list(padding.shape)}: expected {batch} whole numbers")
        start = 0 if cache is None else cache.length
        if cache is not None:
            cache.check(batch, tokens)
        self.check(start + tokens)
        hidden = self.run(ids, causal(self.config, start, tokens, padding, ids.device), cache)
        if cache is not None:
            cache.advance(tokens)
        return hidden

    def run(self, ids: Tensor, view: View, cache: KVCache | None) -> Tensor:
        """Hidden states (B, T, E) of (B, T) ids at the positions of `view`, with its mask."""
        if cache is not None and cache.config != self.config:
            raise ValueError("the cache was made for another model: expected one of this model's configuration")
        x = self.embed_tokens(ids)  # (B, T, E)
        for block in self.layers:
            x = block(x, view, cache)
        return self.norm(x)

    def check(self, tokens: int) -> None:
        """Raise ValueError if a sequence of so many `tokens` has places that the model was not made for."""
        if tokens > (most := self.config.max_position_embeddings):
            raise ValueError(f"{tokens} tokens are too long: expected at most max_position_embeddings, which is {most}")


class Qwen(Metered):
    """A Qwen2.5 causal language model: `model(ids)` gives logits.

    Args:
        config: its shape.

    The parameters are initialised as Hugging Face does (normal, .02); `from_pretrained` loads released ones.
    """

    stop_ids: tuple[int, ...] = ()  # tokens that end what is generated, as the weights' folder says
    trace = trace.trace
    generate = habits.generate

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.logit_bias: nn.Parameter | None
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.register_parameter("logit_bias", None)  # (V), the course's option: see `lora.add_logit_bias`
        self.tie_weights()
        for name, module in self.named_modules():
            if isinstance(module, Metered):
                module.path = name
        if self.device.type != "meta":
            self.reset_parameters()

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        dtype: torch.dtype | str | None = torch.float32,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        offline: bool = False,
        *,
        compute_dtype: torch.dtype | str | None = None,
        **others: Any,
    ) -> "Qwen":
        """A model with the weights of a folder in Hugging Face layout, or of a hub id (fetched once, then cached).

        Args:
            name_or_folder: a folder with config.json and model*.safetensors, or "Qwen/Qwen2.5-0.5B-Instruct".
            dtype: the type the weights are kept in, or its name ("bfloat16"); None or "auto" for that of each file's
                tensors, which are then not copied.
            device: where to.
            revision: the hub's branch, tag or commit.
            offline: never open a connection; what is not cached is an error.
            compute_dtype: the type of activations and products, `dtype` by default. With `dtype=torch.bfloat16,
                compute_dtype=torch.float32` the weights take half the memory and are widened in each product.
            others: Hugging Face's `torch_dtype`, `device_map`, `local_files_only` for dtype, device and offline.

        Raises:
            ValueError: a file is missing, damaged, or does not fit the configuration, or a type is not floating-point;
                the message names it.
        """
        return load.from_pretrained(cls, name_or_folder, dtype, device, revision, offline, compute_dtype, others)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, in the type of the weights; ValueError: LoRA that is not merged."""
        load.save_pretrained(self, load.expanded(folder))

    def forward(self, ids: Tensor, cache: KVCache | None = None, padding: Tensor | None = None) -> Tensor:
        """Logits for the token after each of `ids`.

        Args:
            ids: (B, T) token ids, which follow those in the cache.
            cache: keys and values of earlier tokens; extended by T.
            padding: (B) how many of a sequence's first tokens are padding.

        Returns:
            (B, T, V) in the compute type.
        """
        return self.head(self.model(ids, cache, padding))

    def head(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits (..., V) of hidden states (..., E); with `tokens` (N), theirs alone: (..., N), at their cost."""
        bias: Tensor | None = self.logit_bias
        if tokens is None:
            logits = self.lm_head(hidden)
        else:
            with self.lm_head.charged():
                logits = ops.linear(hidden, self.lm_head.weight[tokens])
            bias = None if bias is None else bias[tokens]
        return logits if bias is None else ops.add_logit_bias(logits, bias)

    def loss(self, ids: Tensor, targets: Tensor, padding: Tensor | None = None, *options, **more) -> tuple[Tensor, int]:
        """Summed cross-entropy in nats of `targets` (B, T) after `ids` (B, T), and how many targets counted.

        Targets of -100 (padding) do not count. The sum is float64; divide by the count for the mean per real token.
        `padding` as in `forward`; more (a smaller vocabulary, weights, digits) as in `loss.linear_cross_entropy`.
        """
        hidden = self.model(ids, padding=padding)
        return loss.linear_cross_entropy(hidden, self.lm_head, targets, self.logit_bias, *options, **more)

    def token_losses(
        self, ids: Tensor, targets: Tensor, padding: Tensor | None = None, vocabulary: Tensor | None = None
    ) -> Tensor:
        """What `loss` sums: the cross-entropy of each token in nats, (B, T) float64, without a gradient."""
        hidden = self.model(ids, padding=padding)
        return loss.token_cross_entropy(hidden, self.lm_head, targets, self.logit_bias, vocabulary)

    def tie_weights(self) -> None:
        """Make the head the embedding table, where the configuration ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_parameters(self) -> None:
        """Weights from N(0, .02), norms 1, biases 0, from torch's global generator."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of activations: that of the weights, unless they are kept narrower."""
        return self.model.embed_tokens.compute_dtype or self.model.embed_tokens.weight.dtype
