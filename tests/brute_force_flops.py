"""FLOPs counted a second time, from the accounting convention alone: plain Python over the equations of the model.

Nothing of `qwen_min.flops` or its prices is used here: the two counts share the convention's text and no code.
Each function returns FLOPs by component, so that two errors cannot cancel.
"""

from collections import Counter
from collections.abc import Collection
from math import prod

ADD = MULTIPLY = DIVIDE = NEGATE = 1
EXPONENTIAL = SQUARE_ROOT = SINE = COSINE = 10
Q_AND_V = ("q_proj", "v_proj")


def product(m: int, n: int, p: int, convention: str) -> int:
    """(m, n) times (n, p): each of the m·p results takes n multiplies and n-1 adds; `matmul` counts n adds."""
    adds = n if convention == "matmul" else n - 1
    return m * p * (n * MULTIPLY + adds * ADD)


def rms_norm(width: int) -> int:
    """One token: squares, their sum, the mean, eps, the root, then every element divided and weighted."""
    squares, total, mean = width * MULTIPLY, (width - 1) * ADD, DIVIDE
    return squares + total + mean + ADD + SQUARE_ROOT + width * DIVIDE + width * MULTIPLY


def softmax(length: int) -> int:
    """One row: exponentials, their sum, a division each. No maximum is subtracted."""
    return length * EXPONENTIAL + (length - 1) * ADD + length * DIVIDE


def silu_times_up() -> int:
    """One element of x / (1 + e^-x) times the other branch."""
    return NEGATE + EXPONENTIAL + ADD + DIVIDE + MULTIPLY


def rotation_of_a_vector(width: int) -> int:
    """x · cos + (-second half, first half) · sin."""
    return width * MULTIPLY + width * MULTIPLY + width // 2 * NEGATE + width * ADD


def rotation_angles(width: int) -> int:
    """One position: an angle for each pair of dimensions, its sine and cosine."""
    return width // 2 * (MULTIPLY + SINE + COSINE)


def loss(tokens: int, vocabulary: int) -> int:
    """Cross-entropy from logits: exponentials, their sum, its logarithm, and the target's logit off it."""
    return tokens * (vocabulary * EXPONENTIAL + (vocabulary - 1) * ADD + EXPONENTIAL + ADD)


def forward(
    config,
    batch: int,
    new: int,
    cached: int = 0,
    *,
    rank: int = 0,
    targets: Collection[str] = Q_AND_V,
    logit_bias: bool = False,
    head_tokens: int | None = None,
    padded: bool = False,
    convention: str = "coursework",
) -> Counter[str]:
    """One forward of `new` tokens per sequence after `cached` ones.

    Args:
        config: anything with Hugging Face's field names.
        rank: of LoRA on `targets`; 0 for none.
        logit_bias: whether there is one.
        head_tokens: tokens that the head runs for, if not all (generation reads the last of each prompt).
        padded: sequences have positions of their own, so the angles are made for each (`exact` alone sees it).
        convention: coursework, exact or matmul.
    """
    products_only = convention == "matmul"
    d, h, f, v = (config.hidden_size, config.num_attention_heads, config.intermediate_size, config.vocab_size)
    head = d // h
    # coursework charges grouped-query attention as plain multi-head attention
    kv = (h if convention == "coursework" else config.num_key_value_heads) * head
    n, s = batch * new, cached + new
    rows = batch * h * new
    read = n if head_tokens is None else head_tokens
    linears = {"q": (d, h * head), "k": (d, kv), "v": (d, kv), "o": (h * head, d)}
    linears |= {"gate": (d, f), "up": (d, f), "down": (f, d)}

    flops: Counter[str] = Counter()
    if convention == "coursework":
        flops["positions"] += n * d * ADD
    if convention == "exact":
        flops["rotation"] += (batch if padded else 1) * new * rotation_angles(head)
    for _ in range(config.num_hidden_layers):
        for name, (inputs, outputs) in linears.items():
            part = "output" if name == "o" else name
            flops[part] += product(n, inputs, outputs, convention)
            if name in ("q", "k", "v") and not products_only:
                flops[part] += n * outputs * ADD
            if rank and f"{name}_proj" in targets:
                flops["lora"] += product(n, inputs, rank, convention) + product(n, rank, outputs, convention)
                if not products_only:
                    flops["lora"] += n * outputs * MULTIPLY + n * outputs * ADD
        flops["scores"] += rows * product(1, head, s, convention)
        flops["values"] += rows * product(1, s, head, convention)
        if products_only:
            continue
        flops["scores"] += rows * s * MULTIPLY
        flops["softmax"] += rows * softmax(s)
        flops["norm"] += 2 * n * rms_norm(d)
        flops["residual"] += 2 * n * d * ADD
        flops["silu"] += n * f * silu_times_up()
        if convention == "exact":
            flops["rotation"] += n * (h + config.num_key_value_heads) * rotation_of_a_vector(head)
    flops["head"] += product(read, d, v, convention)
    if not products_only:
        flops["norm"] += n * rms_norm(d)
        flops["logit_bias"] += logit_bias * read * v * ADD
    return +flops


def rms_norm_backward(tokens: int, width: int, weight: bool) -> int:
    """dx = w·g/r - x · sum(w·g·x) / (E·r³) for x / r · w; and dw = sum over tokens of g·x/r, if it is wanted."""
    cube, sum_of_products = 2 * MULTIPLY, width * MULTIPLY + (width - 1) * ADD
    along = sum_of_products + cube + MULTIPLY + DIVIDE
    total = tokens * (width * MULTIPLY + along + width * MULTIPLY + width * (MULTIPLY + ADD))
    return total + weight * (tokens * 2 * width * MULTIPLY + (tokens - 1) * width * ADD)


def silu_times_up_backward() -> int:
    """One element: s = 1 / (1 + e^-x) again, x·s·g for the other branch, (1 + x·(1 - s))·s·u·g for this one."""
    again = NEGATE + EXPONENTIAL + ADD + DIVIDE
    return again + 2 * MULTIPLY + (ADD + MULTIPLY + ADD + 3 * MULTIPLY)


def softmax_backward(length: int) -> int:
    """One row: y · (g - sum(g · y))."""
    return length * MULTIPLY + (length - 1) * ADD + length * ADD + length * MULTIPLY


def backward(config, batch: int, new: int, *, rank: int = 0, convention: str = "coursework") -> int:
    """The backward of a training step's loss: of LoRA on q and v, the rest frozen, or of every parameter at rank 0.

    Walks the equations from the loss down. Nothing is wanted below the lowest trained matrix: with LoRA the first
    layer's input, and so its norm and its keys, have no gradient.
    """
    if convention == "coursework":
        return 2 * forward(config, batch, new, rank=rank).total()
    d, h, k = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    f, v, head, n, everything = config.intermediate_size, config.vocab_size, d // h, batch * new, not rank
    rows = batch * h * new
    products = other = 0  # `other` is what is not a matrix product

    # Logits and loss: the hidden states' gradient is divided by the softmax's sum, less the target's row, times the
    # incoming gradient; the head's likewise, from its own factors.
    products += product(n, v, d, convention)
    other += n * d * (DIVIDE + ADD + MULTIPLY)
    if everything:
        products += product(v, n, d, convention)
        other += n * DIVIDE + n * v * MULTIPLY + n * d * ADD + v * d * MULTIPLY
        other += n * d * ADD  # each token's gradient, into the embedding table
        other += v * d * ADD * config.tie_word_embeddings  # the one table's two gradients meet
    other += rms_norm_backward(n, d, everything)
    for layer in range(config.num_hidden_layers):
        below = everything or layer > 0  # whether the layer's input has a gradient

        def linear(inputs: int, outputs: int, wanted: bool = True) -> int:
            x = product(n, outputs, inputs, convention) if wanted else 0
            return x + (product(outputs, n, inputs, convention) if everything else 0)

        products += linear(f, d) + 2 * linear(d, f)  # down; gate and up
        other += n * f * silu_times_up_backward()
        other += n * d * ADD  # gate's and up's gradients meet
        other += rms_norm_backward(n, d, everything)
        other += n * d * ADD  # and the branch's and the residual's
        products += linear(h * head, d)
        products += rows * product(1, head, new, convention)  # the weights' gradient
        products += batch * k * product(new, h // k * new, head, convention)  # v's, over the queries of its group
        other += rows * (softmax_backward(new) + new * MULTIPLY)
        products += rows * product(1, new, head, convention)  # q's
        other += n * h * rotation_of_a_vector(head)
        if below:
            products += batch * k * product(new, h // k * new, head, convention)  # k's
            other += n * k * rotation_of_a_vector(head)
        for outputs in (h * head, k * head, k * head):
            products += linear(d, outputs, below)
            other += everything * outputs * (n - 1) * ADD  # the bias
        if rank:
            for outputs in (h * head, k * head):
                other += n * outputs * MULTIPLY  # the scale
                products += product(outputs, n, rank, convention) + product(n, outputs, rank, convention)  # B, and A·x
                products += product(rank, n, d, convention)
                if below:
                    products += product(n, rank, d, convention)
                    other += n * d * ADD  # to what the frozen matrix gives x
        if below:
            other += 2 * n * d * ADD  # q's, k's and v's gradients meet
            other += rms_norm_backward(n, d, everything)
            other += n * d * ADD  # and the residual's
    return products + (0 if convention == "matmul" else other)


# What autograd runs, priced op by op from what torch dispatches: an op's name to the FLOPs of each element it returns.
ELEMENTWISE = {"add": ADD, "sub": ADD, "rsub": ADD, "neg": NEGATE, "mul": MULTIPLY, "div": DIVIDE}
ELEMENTWISE |= {"addcmul": MULTIPLY + ADD, "sigmoid": NEGATE + EXPONENTIAL + ADD + DIVIDE}
FREE = "_to_copy _unsafe_view alias cat clone detach empty_like expand masked_fill new_empty".split()
FREE += "permute slice split squeeze t transpose unsqueeze view".split()


def dispatched(name: str, args: tuple, kwargs: dict, out) -> int:
    """FLOPs of one aten op of a backward. An op that is not known here is an error, not free."""
    if name in FREE:
        return 0
    elements = prod(out.shape)
    if name in ("mm", "bmm"):
        return elements * product(1, args[0].shape[-1], 1, "exact")
    if name == "sum":
        return (prod(args[0].shape) - elements) * ADD
    if name == "pow":  # x^n by n-1 multiplies
        return elements * (int(args[1]) - 1) * MULTIPLY
    if name == "_softmax_backward_data":  # y · (g - sum(g · y)): a row's products, their sum, a difference, a product
        return 2 * elements * MULTIPLY + (2 * elements - elements // out.shape[-1]) * ADD
    if name == "embedding_dense_backward":  # every token's gradient is added to its row
        return prod(args[0].shape) * ADD
    if name in ("add", "sub") and kwargs.get("alpha", 1) != 1:
        return elements * (MULTIPLY + ADD)
    return elements * ELEMENTWISE[name]
