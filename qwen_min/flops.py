"""FLOPs, counted where the op runs: prices, conventions, the ambient meter and `charge`.

An op declares its `Price` once, as formulas over named dimensions, and calls `charge(PRICE, *dims)` on the line
beside its arithmetic. The meter keeps how often each (module, price, dimensions) was charged and evaluates the
formulas when it is asked, so a count costs one dictionary update, is an exact Python integer, and can be read under
every convention. Nothing here looks at tensor data: a forward on the meta device charges the same integers.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

from torch import nn
from torch.compiler import is_compiling

PRIMITIVES = {"add": 1, "multiply": 1, "divide": 1, "exponential": 10, "square_root": 10, "sine_cosine": 10}
"""FLOPs of one primitive: add, subtract, negate 1; multiply 1; divide, invert 1; the rest 10. Logarithms are priced
(and listed) as exponentials."""

CONVENTIONS = ("coursework", "exact", "matmul")
"""`coursework`: the course brief's simplifications (below). `exact`: what the machine executes. `matmul`: matrix
products alone at 2mnp, the figure of torch.utils.flop_counter."""


class Dim(NamedTuple):
    """A dimension that `coursework` reads as another number (the key/value width: charged with all H heads)."""

    true: int
    coursework: int


Dims = tuple["int | Dim", ...]


class Price:
    """What one call of an op costs, forward and backward.

    `product` is "m,n,p" for a matrix product (m, n) @ (n, p): m·n·p multiplies and m·(n-1)·p adds, so m·p·(2n-1).
    The other keywords are formulas for the number of primitives. The backward formulas (`d_...`) are the real ones;
    0/1 flags among the dimensions say which gradients are wanted. `coursework` does not use them: there a backward
    is twice the forward by decree. `only` restricts a price to some conventions.
    """

    def __init__(
        self,
        component: str,
        dims: str,
        *,
        product: str = "",
        d_products: tuple[str, ...] = (),
        only: tuple[str, ...] = CONVENTIONS,
        **formulas: str,
    ):
        self.component, self.dims, self.only = component, tuple(dims.split()), only
        self.product, self.d_products = product, d_products
        self.forward = {name: f for name, f in formulas.items() if not name.startswith("d_")}
        self.backward = {name[2:]: f for name, f in formulas.items() if name.startswith("d_")}
        assert set(self.forward) | set(self.backward) <= set(PRIMITIVES), (component, formulas)

    @property
    def formula(self) -> str:
        """The forward price as text, e.g. "N·O·(2·I-1)"."""
        terms = []
        if self.product:
            m, n, p = self.product.split(",")
            terms.append(f"{m}*{p}*(2*{n}-1)")
        for primitive, text in self.forward.items():
            price = PRIMITIVES[primitive]
            terms.append(text if price == 1 else f"{price}*{text}")
        return " + ".join(terms).replace("*", "·")

    def values(self, dims: Dims, convention: str) -> dict[str, int]:
        """The dimensions by name, as `convention` reads them."""
        side = 1 if convention == "coursework" else 0
        return {name: d[side] if isinstance(d, tuple) else d for name, d in zip(self.dims, dims, strict=True)}

    def cost(self, dims: Dims, convention: str) -> tuple[dict[str, int], dict[str, int]]:
        """FLOPs by primitive, forward and backward."""
        if convention not in self.only:
            return {}, {}
        values = self.values(dims, convention)
        forward = _evaluate((self.product,) if self.product else (), self.forward, values, convention)
        if convention == "coursework":
            return forward, {name: 2 * n for name, n in forward.items()}
        return forward, _evaluate(self.d_products, self.backward, values, convention)


@cache
def _compiled(formula: str):
    return compile(formula.strip(), "<price>", "eval")


def _evaluate(
    products: tuple[str, ...], formulas: dict[str, str], values: dict[str, int], convention: str
) -> dict[str, int]:
    flops: dict[str, int] = defaultdict(int)
    for product in products:
        m, n, p = (eval(_compiled(side), {}, values) for side in product.split(","))
        flops["multiply"] += m * n * p
        flops["add"] += m * n * p if convention == "matmul" else m * (n - 1) * p
    if convention != "matmul":
        for primitive, formula in formulas.items():
            flops[primitive] += PRIMITIVES[primitive] * eval(_compiled(formula), {}, values)
    return flops


class Charge(NamedTuple):
    """One kind of charge that a meter has seen, and how many `times`."""

    module: str
    price: Price
    dims: Dims
    times: int


class FlopMeter:
    """Collects the FLOPs of every op that runs inside `with FlopMeter() as meter:`; meters nest, each sees all.

    All figures are exact integers. `total` is the forward; `backward` is what the gradient of those same ops costs
    (`coursework`: twice the forward; `exact` and `matmul`: the products autograd really runs, so record under enabled
    gradients); `training` is both.

    Args:
        convention: the convention that the figures are read under, one of `CONVENTIONS`.
    """

    def __init__(self, convention: str = "coursework"):
        if convention not in CONVENTIONS:
            raise ValueError(f"unknown FLOP convention {convention!r}: expected one of {', '.join(CONVENTIONS)}")
        self.convention = convention
        self._counts: dict[tuple[str, Price, Dims], int] = {}

    def __enter__(self) -> "FlopMeter":
        _meters.set((*_meters.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _meters.set(tuple(m for m in _meters.get() if m is not self))

    def charges(self) -> Iterator[Charge]:
        """Every kind of charge, in the order it was first seen."""
        for (module, price, dims), count in self._counts.items():
            yield Charge(module, price, dims, count)

    def add(self, other: "FlopMeter", times: int = 1, **changed: int) -> None:
        """Charge what `other` saw, `times` over, with other numbers for some dimensions of its prices, by their names.

        So is a step charged that runs without its Python code: one that is compiled, or captured and replayed.
        """
        for (module, price, dims), count in other._counts.items():
            if changed:
                dims = tuple(changed.get(name, dim) for name, dim in zip(price.dims, dims, strict=True))
            self._counts[module, price, dims] = self._counts.get((module, price, dims), 0) + times * count

    @property
    def total(self) -> int:
        """FLOPs of the forward passes."""
        return sum(self.by_primitive().values())

    @property
    def backward(self) -> int:
        """FLOPs of the backward passes that belong to those forwards."""
        return sum(self._by(lambda c, p: c.price.component, phase=1).values())

    @property
    def training(self) -> int:
        """Forward and backward."""
        return self.total + self.backward

    def by_module(self) -> dict[str, int]:
        """Forward FLOPs by the module that ran the op, by its name in the model ("model.layers.0.mlp.up_proj")."""
        return self._by(lambda c, p: c.module)

    def by_component(self) -> dict[str, int]:
        """Forward FLOPs by part of the architecture: q, k, v, scores, softmax, values, output, gate, ..., head."""
        return self._by(lambda c, p: component(c))

    def by_primitive(self) -> dict[str, int]:
        """Forward FLOPs by primitive (an exponential counts 10)."""
        return self._by(lambda c, p: p)

    def _by(self, key, phase: int = 0) -> dict[str, int]:
        flops: dict[str, int] = defaultdict(int)
        for charge in self.charges():
            for primitive, n in charge.price.cost(charge.dims, self.convention)[phase].items():
                flops[key(charge, primitive)] += n * charge.times
        return {name: n for name, n in flops.items() if n}


_meters: ContextVar[tuple[FlopMeter, ...]] = ContextVar("meters", default=())
_module: ContextVar[str] = ContextVar("module", default="")
_NAMES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "output",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "lm_head": "head",
}


def component(charge: Charge) -> str:
    """The part of the architecture that a charge belongs to; a linear layer's follows from its module's name."""
    last = charge.module.rpartition(".")[2]
    return charge.price.component or _NAMES.get(last, last)


def charge(price: Price, *dims: "int | Dim") -> None:
    """Charge one call of an op to every active meter, under the module whose forward is running.

    Compiled code charges nothing: see `compiled`, which does it in its place.
    """
    if is_compiling():
        return
    for meter in _meters.get():
        key = (_module.get(), price, dims)
        meter._counts[key] = meter._counts.get(key, 0) + 1


def charge_again(seen: FlopMeter, **changed: int) -> None:
    """Charge every active meter what `seen` saw: see `FlopMeter.add`."""
    for meter in _meters.get():
        meter.add(seen, **changed)


def metering() -> bool:
    """Whether a charge would reach a meter."""
    return bool(_meters.get())


@contextmanager
def unmetered() -> Iterator[None]:
    """Hide what runs inside from the meters around it: a prediction is no work that anyone should be charged."""
    token = _meters.set(())
    try:
        yield
    finally:
        _meters.reset(token)


class Metered(nn.Module):
    """An `nn.Module` whose name in the model (`path`) is what its ops are charged under while its forward runs."""

    path = ""

    def __call__(self, *args, **kwargs):
        if is_compiling() or not _meters.get():
            return super().__call__(*args, **kwargs)
        token = _module.set(self.path)  # as `charged` does, whose generator would cost as much as the charges
        try:
            return super().__call__(*args, **kwargs)
        finally:
            _module.reset(token)

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Charge what runs inside to this module."""
        token = _module.set(self.path)
        try:
            yield
        finally:
            _module.reset(token)
