"""What one call of an op costs, as formulas over named dimensions: FLOPs under three conventions, and bytes."""

from collections import defaultdict
from functools import cache
from typing import NamedTuple

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

    @classmethod
    def of(cls, true: int, coursework: int | None) -> "int | Dim":
        """One number, or two where `coursework` has its own."""
        return true if coursework is None or coursework == true else cls(true, coursework)


Dims = tuple["int | Dim", ...]


class Price:
    """What one call of an op costs, forward and backward.

    `product` is "m,n,p" for a matrix product (m, n) @ (n, p): m·n·p multiplies and m·(n-1)·p adds, so m·p·(2n-1).
    Other keywords are formulas for the number of primitives. The backward formulas (`d_...`) are the real ones; 0/1
    flags among the dimensions say which gradients are wanted. `coursework` does not use them: there a backward
    is twice the forward by decree. `only` restricts a price to some conventions. `component` is the part of the
    architecture, `name` by default; an empty one follows from the module (see `flops.component`).

    After the dimensions, past a colon, are the bytes that the op reads > writes; and, past a semicolon, its backward; x
    is the bytes of an activation, w of a weight. `again` is a flag where the backward costs what the forward does.

    A product follows from its sizes alone. Its backward is two products, where its last two dimensions, flags, are 1:
    the result's gradient and the second operand make the first's gradient, and the other way round. Each reads both
    operands and writes its result. The second operand is a matrix of weights; or, as activations are, one for each of
    a `batch` of products, which m is divided over.
    """

    def __init__(
        self,
        name: str,
        dims: str,
        *,
        component: str | None = None,
        product: str = "",
        batch: str = "",
        again: str = "",
        only: tuple[str, ...] = CONVENTIONS,
        **formulas: str,
    ):
        dims, _, moved = dims.partition(":")
        self.name, self.dims, self.only = name, tuple(dims.split()), only
        self.component = name if component is None else component
        self.forward = {name: f for name, f in formulas.items() if not name.startswith("d_")}
        self.backward = {name[2:]: f for name, f in formulas.items() if name.startswith("d_")}
        self.product, self.d_products = product, tuple[str, ...]()
        moves = [side.strip() for phase in moved.split(";") if phase for side in phase.split(">")]
        if again:
            self.backward = {name: f"{again}*({formula})" for name, formula in self.forward.items()}
            moves += [f"{again}*({formula})" for formula in moves]
        moves += ["0"] * (4 - len(moves))
        if product:
            m, n, p = product.split(",")
            g, h = self.dims[-2:]
            back = f"{h}*{batch}*{p},{m}//({batch}),{n}" if batch else f"{h}*{p},{m},{n}"
            self.d_products = (f"{g}*{m},{p},{n}", back)
            first, second, out = f"x*{m}*{n}", f"x*{batch}*{n}*{p}" if batch else f"w*{n}*{p}", f"x*{m}*{p}"
            d_moves = f"({g}+{h})*{out}+{g}*{second}+{h}*{first}", f"{g}*{first}+{h}*{second}"
            moves = [f"{a}+{b}" for a, b in zip((f"{first}+{second}", out, *d_moves), moves, strict=True)]
        self.moves = tuple(moves)
        assert set(self.forward) | set(self.backward) <= set(PRIMITIVES), (name, formulas)

    def formula(self, convention: str = "coursework") -> str:
        """The forward price as text, e.g. "N·O·(2·I-1)"; `matmul` has the product alone, as 2mnp.

        Empty where nothing is charged."""
        if convention not in self.only:
            return ""
        if convention == "matmul":
            return f"2*{self.product.replace(',', '*')}".replace("*", "·") if self.product else ""
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

    def numbers(self, dims: Dims, convention: str) -> dict[str, int]:
        """`values` without the 0/1 flags of gradients: what the forward's formula is filled in with."""
        return {name: n for name, n in self.values(dims, convention).items() if not name.startswith("g")}

    def cost(self, dims: Dims, convention: str) -> tuple[dict[str, int], dict[str, int]]:
        """FLOPs by primitive, forward and backward."""
        if convention not in self.only:
            return {}, {}
        values, (products, d_products) = self.values(dims, convention), self.products(dims, convention)
        forward = _evaluate(products, self.forward, values, convention)
        if convention == "coursework":
            return forward, {name: 2 * n for name, n in forward.items()}
        return forward, _evaluate(d_products, self.backward, values, convention)

    def products(self, dims: Dims, convention: str) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        """(m, n, p) of each matrix product (m, n) @ (n, p), forward and backward; m is 0 for one that is not wanted."""
        values = self.values(dims, convention)

        def sizes(product: str) -> tuple[int, int, int]:
            m, n, p = (eval(_compiled(side), {}, values) for side in product.split(","))
            return m, n, p

        return [sizes(self.product)] if self.product else [], [sizes(product) for product in self.d_products]

    def bytes(self, dims: Dims, activation: int, weight: int) -> tuple[int, int, int, int]:
        """Bytes read and written forward, read and written backward, with so many bytes in a number."""
        values = self.values(dims, "exact") | {"x": activation, "w": weight}
        read, written, d_read, d_written = (eval(_compiled(formula), {}, values) for formula in self.moves)
        return read, written, d_read, d_written


@cache
def _compiled(formula: str):
    return compile(formula.strip(), "<price>", "eval")


def _evaluate(
    products: list[tuple[int, int, int]], formulas: dict[str, str], values: dict[str, int], convention: str
) -> dict[str, int]:
    flops: dict[str, int] = defaultdict(int)
    for m, n, p in products:
        flops["multiply"] += m * n * p
        flops["add"] += m * n * p if convention == "matmul" else m * (n - 1) * p
    if convention != "matmul":
        for primitive, formula in formulas.items():
            flops[primitive] += PRIMITIVES[primitive] * eval(_compiled(formula), {}, values)
    return flops
