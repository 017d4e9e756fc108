"""The pocket checkpoint: a toy of Qwen2.5's architecture, trained from scratch on generic synthetic series.

It has about a million parameters and knows waves, decays, growth, autoregressions and noise, written as
LLMTIME text; not the predator-prey law, which is left for LoRA to teach. Dimension letters: P points; B and T
as in `qwen_min.model`.
"""

import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import tokenizers
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.llmtime import Codec
from experiments.run_folder.files import atomic_folder, check_own
from qwen_min import FlopMeter, Qwen, QwenConfig

Series = NDArray[np.float64]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG = QwenConfig(
    vocab_size=256 + len(SPECIAL),
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
POINTS, LARGEST = 100, 9.99  # steps of a series, and its largest value
CONTEXT, BATCH = 512, 4
LONG_EVERY, LONG_CONTEXT = 4, 998
"""Every fourth batch holds half as many windows of nearly a whole series, so that the positions after 512, where
forecasts run, are trained too. Measured: the loss there is 0.02 below that of the positions before; of a trial model
that saw 512 alone it was 0.05 above, and its forecasts lost the format."""

LEARNING_RATE, WARM_UP, WEIGHT_DECAY, CLIP = 1.5e-3, 100, 0.1, 1.0
"""Measured, in batches of 8: at a rate of 3e-3 the loss stayed at 1.2 from step 200 to 550, at 1.5e-3 it was 1.1
after 150 steps. After a million tokens, batches of 4 were 0.04 better than of 8, rope theta 1e4 0.01 than 1e6."""

STEPS = 2000
HELD_OUT = 256  # windows

# Qwen's chat format (ChatML), less tools.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_README = Path(__file__).with_name("pocket_readme.md")


def pretrain(out: Path, steps: int = STEPS, seed: int = 0, progress: Callable[[str], None] = print) -> None:
    """Train the pocket model from scratch and write it to `out` in Hugging Face layout, whole or not at all.

    AdamW (Loshchilov and Hutter 2019) with linear warm-up and a cosine to zero; every batch is of new series.

    Args:
        out: the folder; one that is there is replaced, if it holds a model of this kind and nothing else.
        steps: updates, of 2048 tokens (every fourth of 1996).
        seed: of the weights and the series, 0 .. 2^32 - 1. One seed, on one kind of machine, gives one file.
        progress: takes a line of text now and then.

    Raises:
        ValueError: steps or seed out of range, a folder of other files, or a loss that is not finite; `out` is then as
            it was.
    """
    if steps < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"pretrain-pocket: steps is {steps}, seed {seed}: expected 1 or more, and 0 to 2^32 - 1")
    check_own(out, ("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"))
    started = time.monotonic()
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen(CONFIG)
    with FlopMeter("coursework") as meter:
        tokens = _train(model, tokenizer, steps, seed, progress)
    with atomic_folder(out) as folder:
        _save(model, tokenizer, folder)
        # What is measured is what was written, so with the rounding to bfloat16.
        loss = held_out_loss(Qwen.from_pretrained(folder), tokenizer, seed)
        minutes = (time.monotonic() - started) / 60
        said: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "steps": steps, "seed": seed}
        said |= {"tokens": tokens, "flops": meter.training, "loss": loss, "held_out": HELD_OUT, "context": CONTEXT}
        said |= {"minutes": minutes, "threads": torch.get_num_threads(), "python": platform.python_version()}
        said |= {module.__name__: module.__version__ for module in (torch, np, tokenizers, safetensors)}
        readme = _README.read_text(encoding="utf-8").format(**said)
        (folder / "README.md").write_text(readme, encoding="utf-8")
    progress(f"{out}: toy: held-out loss {loss:.4f} nats per token, {tokens:,} tokens, {minutes:.1f} minutes")


def held_out_loss(model: Qwen, tokenizer: tokenizers.Tokenizer, seed: int) -> float:
    """Mean loss in nats per token on windows of synthetic series from a stream that training never draws."""
    ids = draw_tokens(np.random.RandomState([seed, 1]), tokenizer, HELD_OUT, CONTEXT)
    with torch.no_grad():
        parts = [model.loss(part[:, :-1], part[:, 1:]) for part in ids.split(BATCH)]
    return sum(total.item() for total, _ in parts) / sum(count for _, count in parts)


def draw_tokens(rng: np.random.RandomState, tokenizer: tokenizers.Tokenizer, batch: int, context: int) -> Tensor:
    """Token ids (B, T+1) of windows at random offsets, each in a new series of 1000 tokens."""
    rows = []
    for _ in range(batch):
        ids = tokenizer.encode(Codec(decimals=2).encode(draw_series(rng)), add_special_tokens=False).ids
        start = rng.randint(len(ids) - context)
        rows.append(ids[start : start + context + 1])
    return torch.tensor(rows)


def _train(model: Qwen, tokenizer: tokenizers.Tokenizer, steps: int, seed: int, progress: Callable[[str], None]) -> int:
    """Run the updates; returns how many tokens they saw."""
    rng = np.random.RandomState([seed, 0])  # its stream is frozen (NEP 19)
    groups = [  # norms and biases do not decay
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    warm_up = min(WARM_UP, 1 + steps // 20)
    tokens, started = 0, time.monotonic()
    for step in range(steps):
        share = min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * share
        long = step % LONG_EVERY == LONG_EVERY - 1
        ids = draw_tokens(rng, tokenizer, *((BATCH // 2, LONG_CONTEXT) if long else (BATCH, CONTEXT)))
        total, count = model.loss(ids[:, :-1], ids[:, 1:])
        loss = total / count
        if not math.isfinite(loss.item()):
            raise ValueError(f"pretrain-pocket: the loss of step {step + 1} is {loss.item()}: expected a finite number")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        tokens += count
        if (step + 1) % 50 == 0 or step in (0, steps - 1):
            speed = tokens / (time.monotonic() - started)
            progress(f"toy: step {step + 1} of {steps}, loss {loss.item():.3f}, {speed:,.0f} tokens/s")
    return tokens


def _save(model: Qwen, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write configuration, weights in bfloat16 (the tied head once) and tokenizer."""
    text, _, end = (tokenizer.token_to_id(token) for token in SPECIAL)
    config = CONFIG.to_dict() | {"torch_dtype": "bfloat16", "bos_token_id": text, "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {n: t.to(torch.bfloat16) for n, t in model.state_dict().items() if n != "lm_head.weight"}
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "model_max_length": CONFIG.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer whose 256 byte tokens have Qwen's (GPT-2's) ids, without merges, and Qwen's chat tokens.

    Bytes that print (!..~, ¡..¬, ®..ÿ) come first and stand for themselves, the other 68 follow as the
    characters from U+0100 (Radford et al. 2019, `encoder.py`). As with Qwen, text is NFC-normalised first.
    """
    letters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]
    vocabulary = {chr(letter): number for number, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def draw_series(rng: np.random.RandomState, points: int = POINTS) -> Series:
    """One bivariate series (P, 2) with values in 0..9.99: a shape, perhaps a second one, noise, a range."""
    first, second = rng.choice(len(_SHAPES), 2, p=_CHANCES)
    x = _unit(_SHAPES[first](rng, points))
    if rng.rand() < 0.3:
        x = _unit(x + rng.uniform(0.1, 0.6) * _unit(_SHAPES[second](rng, points)))
    if rng.rand() < 0.3:
        x = _unit(x + _log_uniform(rng, 0.003, 0.1) * rng.randn(points, 2))
    top = LARGEST * _log_uniform(rng, 0.03, 1, (1, 2))
    bottom = top * rng.uniform(0, 0.9, (1, 2)) * (rng.rand(1, 2) < 0.5)
    return bottom + (top - bottom) * x


def _waves(rng: np.random.RandomState, points: int) -> Series:
    """One period for both variables, any phase: from sines to skewed ones, plateaus and narrow spikes."""
    cycles = _cycles(rng, points)
    skew = rng.uniform(-0.9, 0.9, 2) * (rng.rand(2) < 0.5)
    return _peaks(rng, cycles + skew * np.sin(cycles))


def _two_periods(rng: np.random.RandomState, points: int) -> Series:
    return _peaks(rng, _cycles(rng, points)) + rng.uniform(0.1, 1) * _peaks(rng, _cycles(rng, points))


def _swelling(rng: np.random.RandomState, points: int) -> Series:
    """A damped or growing oscillation around its rest, e^(±t/τ) cos(ωt + φ)."""
    rate = rng.choice([-1, 1]) * _log_uniform(rng, 0.5, 8) / points
    return np.exp(rate * np.arange(points)[:, None]) * np.cos(_cycles(rng, points))


def _trend(rng: np.random.RandomState, points: int) -> Series:
    """Exponential decay or growth, saturation, a logistic step: the two variables apart."""
    t = np.linspace(0, 1, points)
    columns = []
    for _ in range(2):
        a, middle = _log_uniform(rng, 0.5, 12), rng.rand()
        curves = (np.exp(-a * t), np.exp(a * (t - 1)), 1 / (1 + np.exp(-3 * a * (t - middle))), 1 / (1 + a * t), t)
        columns.append(rng.choice([-1, 1]) * curves[rng.randint(len(curves))])
    return np.stack(columns, 1)


def _autoregression(rng: np.random.RandomState, points: int) -> Series:
    """AR(2) with poles r e^(±iθ), from red noise to a wandering oscillation; or with one pole, AR(1)."""
    radius, angle = rng.uniform(0.6, 0.995), rng.uniform(0, 1.0)
    a, b = (radius, 0.0) if rng.rand() < 0.4 else (2 * radius * math.cos(angle), -(radius**2))
    x = rng.randn(points + 50, 2)  # the first 50 forget the start
    for i in range(2, len(x)):
        x[i] += a * x[i - 1] + b * x[i - 2]
    return x[50:]


def _random_walk(rng: np.random.RandomState, points: int) -> Series:
    x = np.cumsum(rng.randn(points, 2), 0)
    return np.cumsum(x, 0) if rng.rand() < 0.3 else x


def _constant(rng: np.random.RandomState, points: int) -> Series:
    return np.zeros((points, 2))


_SHAPES = (_waves, _two_periods, _swelling, _trend, _autoregression, _random_walk, _constant)
_CHANCES = (0.5, 0.1, 0.12, 0.12, 0.08, 0.05, 0.03)


def _cycles(rng: np.random.RandomState, points: int) -> Series:
    """Angles (P, 2) of one period of 5 to 150 steps, the second variable shifted in phase."""
    period = _log_uniform(rng, 5, 150)
    return 2 * math.pi * (np.arange(points)[:, None] / period + rng.rand(2))


def _peaks(rng: np.random.RandomState, angle: Series) -> Series:
    """e^(k cos(angle)) on 0..1, upside down now and then: a sine for small k, narrow spikes for large."""
    k = _log_uniform(rng, 0.1, 20, 2)
    x = np.exp(k * (np.cos(angle) - 1))
    return (x - np.exp(-2 * k)) / (1 - np.exp(-2 * k)) * np.where(rng.rand(2) < 0.2, -1, 1)


def _log_uniform(rng: np.random.RandomState, low: float, high: float, size=None):
    return np.exp(rng.uniform(math.log(low), math.log(high), size))


def _unit(x: Series) -> Series:
    """Each column on 0..1, a constant one on 0."""
    low, width = x.min(0), np.ptp(x, 0)
    return (x - low) / np.where(width > 0, width, 1)
