"""The pocket checkpoint: a toy of Qwen2.5's architecture, trained from scratch on generic synthetic series.

It has 2.5 million parameters, knows waves, decays, growth, autoregressions and noise, written as LLMTIME text, and
copies what recurs; not the predator-prey law, which is left for LoRA to teach. Dimension letters: P points; B and T
as in `qwen_min.model`.
"""

import io
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import tokenizers
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.llmtime import Codec
from experiments.run_folder.files import atomic_folder, check_own, file_digest, write_bytes
from experiments.training.signals import stoppable
from qwen_min import FlopMeter, Qwen, QwenConfig

Series = NDArray[np.float64]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG = QwenConfig(
    vocab_size=256 + len(SPECIAL),
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
LARGEST = 9.99  # value of a series, but for one in ten
SHORT, CONTEXT, TOKENS = 256, 998, 3992  # tokens of a window in the first part of training and after, and of a step
SHORT_PART, PATTERNS = 0.25, (0.5, 0.2)  # share of the steps in the first part; of repeated random values in both
LOOSE_PART = 0.3  # share of the steps after which the past returns nearly, not to the digit
"""A window is at last nearly the whole of a series of 100 steps of 10 tokens: forecasts run at its end. Measured:
without the short windows, and without the series that repeat to the digit, 4 million tokens of training taught no
copying from the context; with both it begins after 0.6 million. A trial model that saw 512 tokens alone lost the
format after them."""

LEARNING_RATE, AGAIN, WARM_UP, WEIGHT_DECAY, CLIP = 6e-3, 3e-3, 30, 0.1, 1.0  # AGAIN: the rate of a model trained on
"""Measured, loss of the last 25 of 200 steps of 4 windows of 512 tokens: with Muon 0.81 at 6e-3, 0.80 at 1.2e-2, 0.82
at 2.5e-2; with AdamW alone 0.88 at 2e-3, 0.93 at 4e-3."""

STEPS = 5000
CHECKPOINT_EVERY = 100
HELD_OUT = 128  # windows

# Qwen's chat format (ChatML), less tools.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_README = Path(__file__).with_name("pocket_readme.md")
_COMMAND = "    python -m experiments.run pretrain-pocket"
_TRAINING = "- Training: {steps:,} steps, {tokens:,} tokens, {flops:,} FLOPs, {minutes:.1f} minutes."


def pretrain(
    out: Path, steps: int = STEPS, seed: int = 0, progress: Callable[[str], None] = print, start: Path | None = None
) -> None:
    """Train the pocket model from scratch and write it to `out` in Hugging Face layout, whole or not at all.

    Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW (Loshchilov and Hutter 2019) for the rest, with
    linear warm-up and a cosine to zero; every batch is of new series. Stopped, it leaves OUT.checkpoint, from which it
    continues, to the same file.

    Args:
        out: the folder; one that is there is replaced, if it holds a model of this kind and nothing else.
        steps: updates, of about 3992 tokens.
        seed: of the weights and the series, 0 .. 2^32 - 1. One seed, on one kind of machine, gives one file.
        progress: takes a line of text now and then.
        start: a folder that this wrote, to train on from its weights: on long windows of what returns nearly, at half
            the rate. It wants a seed of its own, as a seed's series are the same.

    Raises:
        ValueError: steps or seed out of range, a start of another shape, a folder of other files, a checkpoint of
            other steps, seed or start, or a loss that is not finite; `out` is then as it was.
        KeyboardInterrupt: stopped, with a checkpoint.
    """
    if steps < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"pretrain-pocket: steps is {steps}, seed {seed}: expected 1 or more, and 0 to 2^32 - 1")
    check_own(out, ("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"))
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen.from_pretrained(start).float().requires_grad_() if start else Qwen(CONFIG)
    if model.config != CONFIG:
        raise ValueError(f"{start}: a model of another shape: expected one that pretrain-pocket wrote")
    asked = {"steps": steps, "seed": seed, "start": file_digest(start / "model.safetensors") if start else ""}
    commands, trainings = (_past(start, begin) if start else [] for begin in (_COMMAND, "- Training: "))
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    spent = _train(model, tokenizer, asked, checkpoint, progress)
    with atomic_folder(out) as folder:
        _save(model, tokenizer, folder)
        # What is measured is what was written, so with the rounding to bfloat16.
        loss = held_out_loss(Qwen.from_pretrained(folder), tokenizer, seed)
        commands.append(f"{_COMMAND}{f' --start {start}' if start else ''} --steps {steps} --seed {seed}")
        trainings.append(_TRAINING.format(**spent, steps=steps, minutes=spent["seconds"] / 60))
        said: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "loss": loss}
        said |= {"commands": "\n".join(commands), "trainings": "\n".join(trainings), "held_out": HELD_OUT}
        said |= {"context": CONTEXT, "threads": torch.get_num_threads(), "python": platform.python_version()}
        said |= {module.__name__: module.__version__ for module in (torch, np, tokenizers, safetensors)}
        readme = _README.read_text(encoding="utf-8").format(**said)
        (folder / "README.md").write_text(readme, encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    progress(f"{out}: toy: held-out loss {loss:.4f} nats per token, {spent['tokens']:,} tokens")


def _past(folder: Path, begin: str) -> list[str]:
    """Lines of a folder's README: the commands that made it, or what each took."""
    try:
        lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{folder / 'README.md'}: {e}: expected that of a folder that pretrain-pocket wrote") from None
    return [line for line in lines if line.startswith(begin)]


def held_out_loss(model: Qwen, tokenizer: tokenizers.Tokenizer, seed: int) -> float:
    """Mean loss in nats per token on windows of synthetic series from a stream that training never draws."""
    ids = draw_tokens(np.random.RandomState([seed, 1]), tokenizer, HELD_OUT, CONTEXT)
    with torch.no_grad():
        parts = [model.loss(part[:, :-1], part[:, 1:]) for part in ids.split(TOKENS // CONTEXT)]
    return sum(total.item() for total, _ in parts) / sum(count for _, count in parts)


def draw_tokens(
    rng: np.random.RandomState, tokenizer: tokenizers.Tokenizer, batch: int, context: int, loose: bool = True
) -> Tensor:
    """Token ids (B, T+1) of windows at random offsets, each in a new series."""
    rows = []
    for _ in range(batch):
        decimals = 3 if rng.rand() < 0.1 else 2
        text = Codec(decimals).encode(draw_series(rng, context // 8 + 2, PATTERNS[context > SHORT], loose))
        text = text.replace(".", "") if rng.rand() < 0.15 else text
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        start = rng.randint(len(ids) - context)
        rows.append(ids[start : start + context + 1])
    return torch.tensor(rows)


def _train(
    model: Qwen,
    tokenizer: tokenizers.Tokenizer,
    asked: dict[str, Any],
    checkpoint: Path,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Run the updates that a checkpoint has not; returns their tokens, FLOPs and seconds, with those it has.

    `asked` is steps, seed and the digest of the weights to start from, empty for none."""
    steps, seed, again = asked["steps"], asked["seed"], bool(asked["start"])
    peak, short, strict = (AGAIN, 0.0, 0.0) if again else (LEARNING_RATE, SHORT_PART * steps, LOOSE_PART * steps)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    optimizers = muon, torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    parts: tuple[Any, ...] = model, *optimizers
    spent: dict[str, Any] = {"step": 0, "tokens": 0, "flops": 0, "seconds": 0.0}
    if checkpoint.exists():
        try:
            held = torch.load(checkpoint, weights_only=True)
            if (found := {name: held[name] for name in asked}) != asked:
                raise ValueError(f"it has {found}, not {asked}")
            for part, state in zip(parts, held["parts"], strict=True):
                part.load_state_dict(state)
            spent = held["spent"]
        except Exception as e:  # whatever a damaged file leads to
            why = " ".join(str(e).split())[:200]
            raise ValueError(f"{checkpoint}: {why}: expected a checkpoint of this training; delete it") from None

    def save() -> None:
        data = io.BytesIO()
        torch.save(asked | {"spent": spent, "parts": [part.state_dict() for part in parts]}, data)
        write_bytes(checkpoint, data.getvalue())

    with stoppable() as stopped, _products_in_bfloat16():
        while (step := spent["step"]) < steps:
            started = time.monotonic()
            rate = peak * min((step + 1) / min(WARM_UP, 1 + steps // 20), (1 + math.cos(math.pi * step / steps)) / 2)
            context = SHORT if step < short else CONTEXT
            rng = np.random.RandomState([seed, 0, step])  # frozen (NEP 19)
            ids = draw_tokens(rng, tokenizer, TOKENS // context, context, step >= strict)
            with FlopMeter("coursework") as meter:
                total, count = model.loss(ids[:, :-1], ids[:, 1:])
                loss = total / count
                if not math.isfinite(loss.item()):
                    said = f"the loss of step {step + 1} is {loss.item()}"
                    raise ValueError(f"pretrain-pocket: {said}: expected a finite number")
                model.zero_grad()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
            new = {"step": 1, "tokens": count, "flops": meter.training, "seconds": time.monotonic() - started}
            spent = {name: spent[name] + amount for name, amount in new.items()}
            if spent["step"] % 50 == 0 or step in (0, steps - 1):
                speed = spent["tokens"] / spent["seconds"]
                progress(f"toy: step {step + 1} of {steps}, loss {loss.item():.3f}, {speed:,.0f} tokens/s")
            if stopped():
                save()
                raise KeyboardInterrupt
            if spent["step"] % CHECKPOINT_EVERY == 0 and spent["step"] < steps:
                save()
    return spent


@contextmanager
def _products_in_bfloat16() -> Iterator[None]:
    """Round the factors of float32 products, where the processor has units for that: a fifth of the time of a step."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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


def draw_series(
    rng: np.random.RandomState, points: int = 126, patterns: float = PATTERNS[1], loose: bool = True
) -> Series:
    """One bivariate series (P, 2) in 0..9.99, one in ten in 0..14.99: a shape, perhaps a second one, noise, a range.

    The share `patterns` is of random values that repeat. If `loose`, what recurs fades, grows, drifts or jitters, so
    that the past returns nearly, but not to the digit."""
    first, second = rng.choice(len(_SHAPES), 2, p=_CHANCES)
    x = _unit((_pattern if rng.rand() < patterns else _SHAPES[first])(rng, points, loose))
    if rng.rand() < 0.08:
        x = _unit(x + rng.uniform(0.1, 0.6) * _unit(_SHAPES[second](rng, points, loose)))
    if rng.rand() < 0.08:
        x = _unit(x + _log_uniform(rng, 0.003, 0.1) * rng.randn(points, 2))
    top = LARGEST * _log_uniform(rng, 0.03, 1, (1, 2)) * (1.5 if rng.rand() < 0.1 else 1)
    bottom = top * rng.uniform(0, 0.9, (1, 2)) * (rng.rand(1, 2) < 0.5)
    return bottom + (top - bottom) * x


def _waves(rng: np.random.RandomState, points: int, loose: bool) -> Series:
    """One period for both variables, any phase: from sines to skewed ones, shoulders, plateaus and narrow spikes.

    Where they fade, spikes become sines on their way to rest."""
    rate = _rate(rng, loose)
    cycles = _cycles(rng, points, loose, rate)
    skew = rng.uniform(-0.9, 0.9, 2) * (rng.rand(2) < 0.5)
    harmonics = rng.randint(1, 4) if rng.rand() < 0.5 else 1
    return _peaks(rng, cycles + skew * np.sin(cycles), harmonics, _height(rate, points))


def _recurring(rng: np.random.RandomState, points: int, loose: bool) -> Series:
    """A random Fourier series of up to 8 terms: smooth, and foretold by nothing but its own past."""
    rate = _rate(rng, loose)
    angle = _cycles(rng, points, loose, rate)
    most = int(min(8, 2 * math.pi / (angle[1, 0] - angle[0, 0]) / 3))  # three points for the shortest wave
    terms = range(1, 1 + rng.randint(1, 1 + max(1, most)))
    phases = 2 * math.pi * rng.rand(len(terms), 2)
    x = sum(rng.randn(2) / h ** rng.rand() * np.cos(h * angle + phases[h - 1]) for h in terms)
    return x * _height(rate, points)


def _two_periods(rng: np.random.RandomState, points: int, loose: bool) -> Series:
    cycles = [_cycles(rng, points, loose, 0.0) for _ in range(2)]
    return _peaks(rng, cycles[0]) + rng.uniform(0.1, 1) * _peaks(rng, cycles[1])


def _trend(rng: np.random.RandomState, points: int, loose: bool) -> Series:
    """Exponential decay or growth, saturation, a logistic step: the two variables apart."""
    t = np.linspace(0, 1, points)
    columns = []
    for _ in range(2):
        a, middle = _log_uniform(rng, 0.5, 12), rng.rand()
        curves = (np.exp(-a * t), np.exp(a * (t - 1)), 1 / (1 + np.exp(-3 * a * (t - middle))), 1 / (1 + a * t), t)
        columns.append(rng.choice([-1, 1]) * curves[rng.randint(len(curves))])
    return np.stack(columns, 1)


def _autoregression(rng: np.random.RandomState, points: int, loose: bool) -> Series:
    """AR(2) with poles r e^(±iθ), from red noise to a wandering oscillation; or with one pole, AR(1)."""
    radius, angle = rng.uniform(0.6, 0.995), rng.uniform(0, 1.0)
    a, b = (radius, 0.0) if rng.rand() < 0.4 else (2 * radius * math.cos(angle), -(radius**2))
    x = rng.randn(points + 50, 2)  # the first 50 forget the start
    for i in range(2, len(x)):
        x[i] += a * x[i - 1] + b * x[i - 2]
    return x[50:]


def _random_walk(rng: np.random.RandomState, points: int, loose: bool) -> Series:
    x = np.cumsum(rng.randn(points, 2), 0)
    return np.cumsum(x, 0) if rng.rand() < 0.3 else x


def _pattern(rng: np.random.RandomState, points: int, loose: bool) -> Series:
    """Random values that repeat: nothing but copying from the context tells what follows."""
    period = rng.randint(2, points // 3)
    x = rng.rand(period, 2)[np.arange(points) % period]
    return _height(_rate(rng, loose), points) * (x + loose * _log_uniform(rng, 0.001, 0.1) * rng.randn(points, 2))


def _constant(rng: np.random.RandomState, points: int, loose: bool) -> Series:
    return np.zeros((points, 2))


_SHAPES = (_waves, _recurring, _two_periods, _trend, _autoregression, _random_walk, _constant)
_CHANCES = (0.5, 0.32, 0.04, 0.05, 0.04, 0.02, 0.03)


def _cycles(rng: np.random.RandomState, points: int, loose: bool, rate: float) -> Series:
    """Angles (P, 2) of one period of 6 steps to 0.45 of the series, the second variable shifted in phase.

    Some periods are whole numbers of steps, so that the text repeats itself to the digit; others drift, most of those
    longer as the wave grows and shorter as it fades."""
    period = _log_uniform(rng, 6, 0.45 * points)
    period = round(period) if rng.rand() < (0.3 if loose else 0.5) else period
    drift = rng.uniform(0, 0.18) * (loose and rng.rand() < (0.6 if rate else 0.3))
    drift *= -np.sign(rate) if rate and rng.rand() < 0.8 else rng.choice([-1, 1])
    steps = np.arange(points)[:, None]
    return 2 * math.pi * (steps / period * (1 + drift * steps / points) + rng.rand(2))


def _rate(rng: np.random.RandomState, loose: bool) -> float:
    """Of growth (> 0) or decay over the whole of a series; 0 for neither."""
    return rng.choice([-1, 1]) * _log_uniform(rng, 0.2, 3) * (loose and rng.rand() < 0.6)


def _height(rate: float, points: int) -> Series:
    """e^(rate t), t = 0..1 (P, 1)."""
    return np.exp(rate * np.linspace(0, 1, points)[:, None])


def _peaks(rng: np.random.RandomState, angle: Series, harmonics: int = 1, height: Series | float = 1.0) -> Series:
    """e^(k Σ a_h cos(h angle + φ_h)), upside down now and then: a sine for small k, narrow spikes for large."""
    k, wave = _log_uniform(rng, 0.1, 10, 2) * height, np.cos(angle)
    for h in range(2, harmonics + 1):
        wave = wave + rng.uniform(0, 1, 2) / h**1.5 * np.cos(h * angle + 2 * math.pi * rng.rand(2))
    return np.exp(k * wave) * np.where(rng.rand(2) < 0.15, -1, 1)


def _log_uniform(rng: np.random.RandomState, low: float, high: float, size=None):
    return np.exp(rng.uniform(math.log(low), math.log(high), size))


def _unit(x: Series) -> Series:
    """Each column on 0..1, a constant one on 0."""
    low, width = x.min(0), np.ptp(x, 0)
    return (x - low) / np.where(width > 0, width, 1)
