"""The exercises of the book, by number. What is right is computed by the code that the chapter shows."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.llmtime import Codec
from data.windows import make_windows
from experiments.accounting.ledger import Ledger
from experiments.accounting.predict import on_meta, predict
from experiments.book.checks import Exercise, function, same
from experiments.forecasting import scores
from experiments.forecasting.baselines import PARROT, SEASONAL
from experiments.parity.defects import DEFECTS, moved, randomise, unseen
from lora import LoRALinear
from qwen_min import Qwen, QwenConfig, ops, sampling
from qwen_min.cache import KVCache
from qwen_min.costs import component
from qwen_min.fast.tree import ancestors
from qwen_min.layers import Linear
from qwen_min.ops import LINEAR
from qwen_min.sampling import Sampling

HALF_B = QwenConfig.named("Qwen2.5-0.5B")
HEADS: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY = replace(HALF_B, vocab_size=50, intermediate_size=48, num_hidden_layers=2, **HEADS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TEXTS = (
    "1.23,0.45;1.30,0.50;",
    "1.23,0.45;1.3,0.50;1.31,0.55;",
    "1.23;0.45,1.30,0.50;7.00,8.00;",
    "1.23,-0.45;12.30,01.50;-0.00,1.00;0.00,0.01",
    "x,y;;1.00,2.00;",
)


def rotations() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries (B, T, heads, D), with the cosines and sines of their positions."""
    for seed, (tokens, heads, size) in enumerate(((3, 2, 4), (5, 1, 8))):
        yield normal(2, tokens, heads, size, seed=seed), *ops.rotation_angles(torch.arange(tokens)[None], size, 1e4)


def attentions() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries (B, H, T, D), keys and values (B, K, S, D): a prompt, and two tokens after three that are cached."""
    for seed, (heads, keys, new, seen) in enumerate(((4, 2, 5, 5), (6, 2, 2, 5), (3, 3, 1, 4))):
        shapes = ((2, heads, new, 8), (2, keys, seen, 8), (2, keys, seen, 8))
        yield tuple(normal(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes))  # type: ignore[misc]


def padded() -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, T, V), and targets of which some do not count, unlike many in each row."""
    targets = torch.tensor([[3, 1, 4, -100], [2, -100, -100, -100]])
    yield normal(2, 4, 6), targets
    yield normal(2, 4, 6, seed=1), targets.clamp(min=0)


def passed(prompt: int, new: int) -> int:
    """How many tokens a prompt and its continuation take through the layers."""
    through: list[int] = []
    model, ids = Qwen(TINY).eval(), torch.zeros(1, prompt, dtype=torch.int64)
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: through.append(inputs[0].shape[1]))
    model.generate(ids, new)
    return sum(through)


def trained(config: QwenConfig, rank: int) -> int:
    model, _, _ = on_meta(config, 1, 1, rank)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapted(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    layer = LoRALinear(Linear(weight.shape[1], weight.shape[0]), len(a), alpha)
    for parameter, values in zip((layer.weight, layer.lora_a, layer.lora_b), (weight, a, b), strict=True):
        parameter.data = values
    return layer(x)


def scores_shape() -> tuple[int, ...]:
    cache, new = KVCache(HALF_B, 3, 12, device="meta"), torch.empty(3, HALF_B.num_key_value_heads, 7, HALF_B.head_dim)
    cache.advance(5)
    keys, _ = cache.append(0, new.to("meta"), new.to("meta"))
    return (3, HALF_B.num_attention_heads, 7, keys.shape[2])


def left() -> int:
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.sqlite", budget=1000) as ledger:
        first = ledger.reserve("grid", "a", {"training": 700})
        ledger.spend(first, "training", 450)
        ledger.settle(first)
        ledger.reserve("grid", "b", {"training": 400})
        return ledger.totals()["left"]


def reported_skill() -> float:
    mse = {"model": 0.03, SEASONAL: 0.04, PARROT: 0.02}
    return scores.skill(mse["model"], mse[scores.reference(mse)]) or 0.0


def crps_of(samples: Tensor, y: float) -> float:
    return float(scores.crps(np.full((1, 1, 1), y), samples.numpy().reshape(1, -1, 1, 1))[0, 0, 0])


def nucleus(probabilities: Tensor, p: float) -> Tensor:
    return sampling.probabilities(probabilities.log()[None], Sampling(temperature=1, top_p=p))[0][0]


def parts() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Attention of one query over two parts of its keys: outputs (D), and logarithms of the sums of exponentials."""
    q, keys, values = normal(4), normal(7, 4, seed=1), normal(7, 4, seed=2)
    scored = [(part @ q, some) for part, some in zip(keys.split((5, 2)), values.split((5, 2)), strict=True)]
    (a, log_a), (b, log_b) = (((x.softmax(0) @ some), x.logsumexp(0)) for x, some in scored)
    yield a, log_a, b, log_b


def joined(first: Tensor, log_first: Tensor, second: Tensor, log_second: Tensor) -> Tensor:
    return torch.stack((log_first, log_second)).softmax(0) @ torch.stack((first, second))


def norm_gradient(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> Tensor:
    with torch.enable_grad():
        ops.rms_norm(x.requires_grad_(), weight, eps).backward(grad)
    return x.grad if x.grad is not None else x


def counted(price: str, part: str) -> int:
    """What one layer of the 0.5B model charges by a price, of a part of the architecture, for 4 x 512 tokens."""
    charges = predict(replace(HALF_B, num_hidden_layers=1), 4, 512).charges()
    one = next(c for c in charges if c.price.name == price and component(c) == part)
    return sum(one.price.cost(one.dims, "coursework")[0].values())


def fresh(**fields: Any) -> Qwen:
    torch.manual_seed(0)
    return Qwen(replace(TINY, **fields)).eval()


def randomised(**fields: Any) -> Qwen:
    """With biases and norm weights as trained models have them."""
    randomise(model := fresh(**fields), seed=0)
    return model


IDS = torch.arange(7)[None] * 5


def wrong_in(name: str) -> set[str]:
    """Which of the rotated queries and keys of layer 0 a defect makes wrong, where what is before them is right."""
    off = moved(name, randomised(), IDS)
    if max(off[f"layers.0.{part}"] for part in "qkv") > 1e-6:
        return set()
    return {at for at in ("layers.0.q_rotated", "layers.0.k_rotated") if off[at] > 1e-6}


EXERCISES: dict[str, Exercise] = {
    "1.1": Exercise(
        "Write `[[1.234, 0.5], [10, 0.456]]` as text, as `Codec(decimals=2)` does. The answer is a text in quotes.",
        "Every number has two decimals, and every step ends with a semicolon, the last one too.",
        "'1.23,0.50;10.00,0.46;'",
        "'1.23,0.5;10.0,0.46'",
        same(lambda: Codec(2).encode([[1.234, 0.5], [10, 0.456]])),
    ),
    "1.2": Exercise(
        "How many tokens are 80 steps of two variables with 3 decimals, without a point, with a space between digits?",
        "1.234 is written `1 2 3 4`; then comes a comma or a semicolon.",
        "80 * 2 * (4 + 3 + 1)",
        "80 * 2 * (4 + 1)",
        same(lambda: 80 * Codec(3, point=False, separator=" ").step_width(2)),
    ),
    "1.3": Exercise(
        "Write `answer(text)`: the steps of two variables in a text of `Codec(2)`, as a list of pairs of floats. "
        "Steps that `encode` could not have written are left out.",
        "`float` accepts too much: 1.3, 01.50, -0.00. Say what a number looks like by a regular expression.",
        r"""import re

NUMBER = re.compile(r"(?!-0\.00)-?(0|[1-9]\d*)\.\d\d")

def answer(text):
    steps = [step.split(",") for step in text.split(";")]
    return [[float(x) for x in step] for step in steps if len(step) == 2 and all(map(NUMBER.fullmatch, step))]""",
        """def answer(text):
    rows = []
    for step in text.split(";"):
        try:
            rows.append([float(number) for number in step.split(",")])
        except ValueError:
            pass
    return [row for row in rows if len(row) == 2]""",
        function(lambda text: Codec(2).decode(text, 2).values.tolist(), lambda: ((text,) for text in TEXTS)),
    ),
    "2.1": Exercise(
        "Qwen2.5-0.5B has 14 query heads and 2 key/value heads of size 64. Three sequences with 5 tokens in the "
        "cache get 7 new tokens each. Which shape do the scores have, as a tuple?",
        "(B, H, T, S): S counts cached and new tokens.",
        "(3, 14, 7, 12)",
        "(3, 2, 7, 7)",
        same(scores_shape),
    ),
    "2.2": Exercise(
        "Write `answer(x, cos, sin)`, the rotation of queries x (B, T, heads, D) as Qwen2.5's weights expect it. "
        "`cos` and `sin` (1, T, 1, D) hold each angle twice, for both dimensions of its pair.",
        "Dimension i is paired with i + D/2. Of a pair (a, b) become (a cos - b sin, b cos + a sin).",
        """def answer(x, cos, sin):
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return x * cos + torch.cat((-b, a), -1) * sin""",
        """def answer(x, cos, sin):
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half].repeat_interleave(2, -1), sin[..., :half].repeat_interleave(2, -1)
    return x * cos + torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2) * sin""",
        function(ops.rotate, rotations),
    ),
    "2.3": Exercise(
        "Write `answer(q, k, v)`: grouped-query attention for q (B, H, T, D), k and v (B, K, S, D). The last query "
        "is that of the last of the S tokens, and each looks at itself and at earlier tokens.",
        "Query t stands at place S - T + t. `repeat_interleave` along the heads gives each query head its keys.",
        """def answer(q, k, v):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    tokens, seen = q.shape[2], k.shape[2]
    mask = torch.ones(tokens, seen, dtype=torch.bool).tril(seen - tokens)
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v""",
        """def answer(q, k, v):
    k, v = (t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v""",
        function(lambda q, k, v: ops.attend(q, k, v, None), attentions),
    ),
    "3.1": Exercise(
        "What is the loss, in nats per token, of a model that finds the 13 symbols of a text equally likely?",
        "It is minus the *natural* logarithm of the probability of each.",
        "math.log(13)",
        "math.log2(13)",
        same(lambda: F.cross_entropy(torch.zeros(1, 13), torch.tensor([4])).item(), 1e-6),
    ),
    "3.2": Exercise(
        "Write `answer(blocks)`: the logarithm of the sum of exponentials of all numbers in an iterator of tensors, "
        "holding one block at a time. The numbers may be in the thousands.",
        "Keep the highest number so far, and the sum of exp(x - highest); shrink the sum when a higher one comes.",
        """def answer(blocks):
    top, total = torch.tensor(-math.inf), torch.tensor(0.0)
    for block in blocks:
        higher = torch.maximum(top, block.max())
        total = total * (top - higher).exp() + (block - higher).exp().sum()
        top = higher
    return top + total.log()""",
        """def answer(blocks):
    return sum(block.exp().sum() for block in blocks).log()""",
        function(
            lambda blocks: torch.cat(blocks).logsumexp(0),
            lambda: (([5 * f * normal(7, seed=i) + f for i in range(4)],) for f in (1, 1000)),
        ),
    ),
    "3.3": Exercise(
        "Write `answer(logits, targets)`: the mean loss of a batch, for logits (B, T, V) and targets (B, T), where "
        "a target of -100 does not count.",
        "Divide by the number of targets that count, of the whole batch.",
        """def answer(logits, targets):
    real = targets != -100
    each = -logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return each[real].sum() / real.sum()""",
        """def answer(logits, targets):
    real = targets != -100
    each = -logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return (each * real).mean()""",
        function(lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten()), padded),
    ),
    "4.1": Exercise(
        "How many bytes does the cache of Qwen2.5-0.5B take for one sequence of 1,000 tokens in float32? It has 24 "
        "layers, 14 query heads and 2 key/value heads of size 64.",
        "Keys *and* values, of every layer, of the key/value heads alone; 4 bytes a number.",
        "2 * 24 * 2 * 1000 * 64 * 4",
        "2 * 24 * 14 * 1000 * 64 * 4",
        same(lambda: KVCache(HALF_B, 1, 1000, device="meta").store.nbytes),
    ),
    "4.2": Exercise(
        "A prompt of 800 tokens is continued by 200 tokens, with a cache. How many tokens pass through the layers "
        "in all?",
        "The prompt passes once, and each new token once; but is the last new one ever read?",
        "800 + 199",
        "200 * 800 + 199 * 200 // 2",
        same(lambda: passed(800, 200)),
    ),
    "4.3": Exercise(
        "Write `answer(parents)`, the mask of a tree of guesses: a (T, T) bool tensor, true where a node may look. "
        "`parents[i]` is the node that i follows, an earlier one, or -1 for none.",
        "A node sees itself and all that its parent sees.",
        """def answer(parents):
    sees = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees""",
        """def answer(parents):
    return torch.ones(len(parents), len(parents), dtype=torch.bool).tril()""",
        function(lambda parents: ancestors(parents, len(parents)), lambda: (([-1, 0, 1],), ([-1, 0, 0, 1, 1, 4],))),
    ),
    "5.1": Exercise(
        "How many numbers does LoRA of rank 8 on `q_proj` and `v_proj` train in Qwen2.5-0.5B? E = 896, 24 layers, 2 "
        "key/value heads of size 64.",
        "A is (r, in), B is (out, r). What is the width of v?",
        "24 * 8 * ((896 + 896) + (896 + 128))",
        "24 * 8 * ((896 + 896) + (896 + 896))",
        same(lambda: trained(HALF_B, 8)),
    ),
    "5.2": Exercise(
        "Write `answer(x, weight, a, b, alpha)`: the output of a linear layer without bias with LoRA, for x (N, "
        "in), weight (out, in), a (r, in), b (out, r).",
        "The rank is a's number of rows.",
        """def answer(x, weight, a, b, alpha):
    return x @ weight.T + alpha / len(a) * (x @ a.T @ b.T)""",
        """def answer(x, weight, a, b, alpha):
    return x @ weight.T + alpha * (x @ a.T @ b.T)""",
        function(adapted, lambda: ((normal(3, 6), normal(5, 6), normal(r, 6), normal(5, r), 16.0) for r in (2, 4))),
    ),
    "5.3": Exercise(
        "An adapter of rank 32 was trained with alpha = 64 and the scale alpha/r. Which alpha gives the same model "
        "with the scale alpha/√r?",
        "The scale itself must stay what it was.",
        "64 / 32 * math.sqrt(32)",
        "64 / 32",
        same(lambda: LoRALinear(Linear(4, 4), 32, 64).scale * 32**0.5, 1e-6),
    ),
    "6.1": Exercise(
        "How many FLOPs, by `coursework`, does `q_proj` of one layer of Qwen2.5-0.5B cost in a forward of 4 x 512 "
        "tokens, without its bias? E = 896.",
        "A product (m, n) @ (n, p) is m·p·(2n - 1); m counts all tokens.",
        "2048 * 896 * (2 * 896 - 1)",
        "2048 * 896 * 896",
        same(lambda: counted("linear", "q")),
    ),
    "6.2": Exercise(
        "And the softmax of that layer? It has 14 heads, every exponential costs 10, and the mask saves nothing.",
        "For each of the B·H·T rows: S exponentials, S - 1 additions, S divisions.",
        "4 * 14 * 512 * (10 * 512 + 511 + 512)",
        "4 * 14 * 512 * (512 + 511 + 512)",
        same(lambda: counted("softmax", "softmax")),
    ),
    "6.3": Exercise(
        "A linear layer is *frozen*; the gradient of its input is wanted. By `matmul`, how many times its forward "
        "does its backward cost?",
        "Of the two products of a backward, which one changes the weight?",
        "1",
        "2",
        same(lambda: sum(LINEAR.cost((7, 5, 3, 1, 0), "matmul")[1].values()) // 210),
    ),
    "7.1": Exercise(
        "A budget is 1,000. Run a reserves 700, spends 450 and is settled; run b reserves 400. How much is left?",
        "What was settled keeps what it spent, and frees the rest.",
        "1000 - 450 - 400",
        "1000 - 700 - 400",
        same(left),
    ),
    "7.2": Exercise(
        "A series of 1,000 tokens is cut into windows of 128 tokens with a stride of 32. How many windows are "
        "there, if each must have a target that no earlier one has?",
        "A window that starts at s has targets up to token s + 128; the last one is token 999, counted from 0.",
        "len(range(0, 999 - 128 + 32, 32))",
        "1000 // 32",
        same(lambda: len(make_windows([range(1000)], 128, 32, pad_id=0))),
    ),
    "7.3": Exercise(
        "A batch was split into pieces. Write `answer(means, counts)`: the batch's mean loss per token, of the "
        "pieces' mean losses and how many tokens each of them counted.",
        "A piece with more tokens weighs more.",
        """def answer(means, counts):
    return sum(m * c for m, c in zip(means, counts)) / sum(counts)""",
        """def answer(means, counts):
    return sum(means) / len(means)""",
        function(
            lambda means, counts: float(np.average(means, weights=counts)),
            lambda: (([1.0, 3.0], [30, 10]), ([0.5], [4])),
        ),
    ),
    "8.1": Exercise(
        "On the same series a model has an MSE of 0.03, the seasonal repeat 0.04, context parroting 0.02. What is "
        "the skill that this project reports?",
        "The reference is the better of the two copies.",
        "1 - 0.03 / 0.02",
        "1 - 0.03 / 0.04",
        same(reported_skill, 1e-6),
    ),
    "8.2": Exercise(
        "Write `answer(samples, y)`: the continuous ranked probability score of samples (S) of one number whose "
        "true value is y.",
        "The mean distance from y, less half of the mean distance over all pairs of samples.",
        """def answer(samples, y):
    pairs = (samples[:, None] - samples[None]).abs()
    return (samples - y).abs().mean() - pairs.mean() / 2""",
        """def answer(samples, y):
    return (samples.mean() - y).abs()""",
        function(crps_of, lambda: ((normal(size, seed=size), y) for size, y in ((1, 0.3), (5, 0.1), (8, -2.0)))),
    ),
    "8.3": Exercise(
        "Write `answer(probabilities, p)`: the probabilities (V), with all set to 0 but the fewest likeliest that "
        "together have at least p. Nothing is divided afterwards.",
        "A token is kept if the likelier ones have less than p together.",
        """def answer(probabilities, p):
    ordered, index = probabilities.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < p
    return torch.zeros_like(probabilities).scatter(0, index, ordered * kept)""",
        """def answer(probabilities, p):
    ordered, index = probabilities.sort(descending=True)
    kept = ordered.cumsum(0) < p
    return torch.zeros_like(probabilities).scatter(0, index, ordered * kept)""",
        function(nucleus, lambda: ((normal(9, seed=i).softmax(0), p) for i, p in enumerate((0.3, 0.8, 0.99)))),
    ),
    "9.1": Exercise(
        "The keys of a query were attended to in two parts: each gave an output (D) and the logarithm of its sum of"
        " exponentials. Write `answer(first, log_first, second, log_second)`: the output over all keys.",
        "Each part's weight is its sum over both sums; the weights add up to 1.",
        """def answer(first, log_first, second, log_second):
    weight = torch.sigmoid(log_first - log_second)
    return weight * first + (1 - weight) * second""",
        """def answer(first, log_first, second, log_second):
    return (first + second) / 2""",
        function(joined, parts),
    ),
    "9.2": Exercise(
        "How many bytes are the float32 logits of 4 x 512 tokens of Qwen2.5-0.5B, whose vocabulary is 151,936?",
        "One logit for each token of the batch and each of the vocabulary.",
        "4 * 512 * 151936 * 4",
        "512 * 151936 * 4",
        same(lambda: torch.empty(4, 512, HALF_B.vocab_size, device="meta").nbytes),
    ),
    "9.3": Exercise(
        "Write `answer(x, weight, eps, grad)`: the gradient by x (N, E) of RMSNorm, whose output has the gradient "
        "`grad` (N, E).",
        "With i = 1 / sqrt(mean(x²) + eps) and g = grad · weight it is i g - i³ x mean(g x).",
        """def answer(x, weight, eps, grad):
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    scaled = grad * weight
    return inverse * scaled - inverse**3 * x * (scaled * x).mean(-1, keepdim=True)""",
        """def answer(x, weight, eps, grad):
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt() * grad * weight""",
        function(norm_gradient, lambda: ((normal(3, 8), normal(8, seed=1), 1e-6, normal(3, 8, seed=2)),)),
    ),
    "10.1": Exercise(
        "In layer 0 the rotated queries are wrong at every place but the first, and the rotated keys are right. "
        "Which defect is it? The answer is its name, in quotes.",
        "At place 0 every angle is 0, so no rotation is seen there. Which defect touches the queries alone?",
        "'backward-queries'",
        "'interleaved-rotation'",
        same(lambda: next(name for name in DEFECTS if wrong_in(name) == {"layers.0.q_rotated"})),
    ),
    "10.2": Exercise(
        "Which defects change nothing in a model with as many key/value heads as query heads (K = H)? The answer is"
        " a set of names.",
        "They are about which query head reads which key head. There are three.",
        "{'wrong-groups', 'missing-heads', 'averaged-heads'}",
        "{'wrong-groups', 'missing-heads'}",
        same(lambda: unseen(randomised(num_key_value_heads=TINY.num_attention_heads), IDS)),
    ),
    "10.3": Exercise(
        "Which defects does a comparison of logits at initial weights not see? Biases are 0 and norm weights 1 "
        "there. The answer is a set of names.",
        "What is multiplied by 1, or has 0 added, can be left out or exchanged.",
        "{'swapped-norms', 'no-q-bias', 'no-k-bias', 'no-v-bias', 'no-final-norm'}",
        "{'no-q-bias', 'no-k-bias', 'no-v-bias'}",
        same(lambda: unseen(fresh(), IDS)),
    ),
}
