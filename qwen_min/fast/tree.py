"""Decoding with a tree of guesses, several of which one forward verifies: the same tokens in fewer forwards.

A forward carries the token chosen last and guesses at what follows. Each of them sees its ancestors alone, so the
logits after it are those of a forward of its own, to the rounding of products of another shape. Guesses are accepted
until the first mismatch, the others are forgotten.

Source: speculative decoding, Leviathan et al. 2023; the tree's attention of SpecInfer, Miao et al. 2023.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_min.cache import KVCache, Prefill
from qwen_min.fast.captured import forward_of_one
from qwen_min.sampling import Choice, Draft
from qwen_min.view import view_of


def decode(model, prefill: Prefill, max_new_tokens: int, choose: Choice, draft: Draft) -> Iterator[Tensor]:
    """The new token (1) of each step: see `generate.decode`.

    Raises:
        ValueError: there are several prompts or samples, or tokens are drawn.
    """
    if choose.rows > 1 or choose.options.temperature:
        asked = f"{choose.rows} rows, temperature {choose.options.temperature:g}"
        raise ValueError(f"a draft with {asked}: expected one prompt, one sample, greedy")
    return _decode(model, prefill, max_new_tokens, choose, draft)


@torch.inference_mode()
def _decode(model, prefill: Prefill, max_new_tokens: int, choose: Choice, draft: Draft) -> Iterator[Tensor]:
    cache, hidden, left = prefill.rewound(), prefill.hidden, max_new_tokens
    tree, alone = Tree(), None  # alone: the forward of a token without guesses
    while left:
        logits = choose.logits(hidden)  # (1, T, C), T nodes of the tree
        node: int | None = 0
        path = []
        while node is not None and left:  # down the tree, as long as what is chosen was guessed
            path.append(node)
            new = choose.choose(logits[:, node])
            left -= 1
            yield new
            draft.advance(int(new))
            node = tree.child(node, int(new))
        if left:
            first = cache.length - len(tree.parents)
            keep(cache, first, [first + node for node in path])
            tree = Tree.grown(draft.guess(), cache.capacity - cache.length, left, model.config.vocab_size)
            ids = torch.tensor([[int(new), *tree.tokens]], device=new.device)  # (1, T)
            if tree.tokens:
                hidden = forward(model.model, ids, cache, tree.parents, prefill.padding)
            else:
                alone = alone or forward_of_one(model.model, cache, prefill.padding)
                hidden = alone(ids)


def forward(decoder, ids: Tensor, cache: KVCache, parents: Sequence[int], padding: Tensor | None = None) -> Tensor:
    """Hidden states (B, T, E) of a tree of T tokens after those in the cache, which it extends.

    Args:
        decoder: of a `Qwen`.
        ids: (B, T).
        parents: which of them, counted from 0, each one follows; -1 for the last in the cache. Alternatives have one
            position.
        padding: (B) as in `Qwen.forward`.
    """
    lineage = ancestors(parents, ids.shape[1])
    depth, start = lineage.sum(1), cache.length  # (T)
    cache.check(*ids.shape)
    decoder.check(start + int(depth.max()))
    positions = (start + depth - 1)[None].to(ids.device)  # (1, T)
    mask = torch.cat((torch.ones(len(lineage), start, dtype=torch.bool), lineage), 1).to(ids.device)  # (T, S)
    with decoder.charged():
        hidden = decoder.run(ids, view_of(decoder.config, positions, mask, padding), cache)
    cache.advance(ids.shape[1])
    return hidden


def ancestors(parents: Sequence[int], tokens: int) -> Tensor:
    """Which tokens of a tree are an ancestor of each, or the token itself: (T, T) bool."""
    lineage = torch.eye(tokens, dtype=torch.bool)
    if len(parents) != tokens or not all(-1 <= parent < token for token, parent in enumerate(parents)):
        raise ValueError(f"parents are {list(parents)}: expected an earlier one, or -1, for each of {tokens} tokens")
    for token, parent in enumerate(parents):
        if parent >= 0:
            lineage[token] |= lineage[parent]
    return lineage


def keep(cache: KVCache, length: int, places: Sequence[int]) -> None:
    """Forget all but the first `length` tokens and those at `places` after them, which close up in that order."""
    if not all(length <= place < cache.length for place in places):
        raise ValueError(f"places to keep are {list(places)}: expected {length} to {cache.length - 1}")
    cache.rewind(length)
    cache.advance(len(places))
    if list(places) != list(range(length, cache.length)):
        cache.store[..., length : cache.length, :] = cache.store[..., list(places), :]


@dataclass(frozen=True)
class Tree:
    """The token chosen last, which is node 0, and the guesses after it: nodes 1, 2, ..., each after its parent."""

    tokens: Sequence[int] = ()  # of the guesses
    parents: Sequence[int] = (-1,)  # of all nodes

    @classmethod
    def grown(cls, guesses: Sequence[tuple[int, int]], most: int, deepest: int, vocabulary: int) -> "Tree":
        """Of the guesses those that fit: `most` nodes, `deepest` one after the other; parents come first."""
        tokens: list[int] = []
        parents, node, depth = [-1], {0: 0}, [1]  # node: that of each guess that fits
        for number, (parent, token) in enumerate(guesses, 1):
            if not 0 <= parent < number or not 0 <= token < vocabulary:
                rule = f"an earlier one or 0, and a token from 0 to {vocabulary - 1}"
                raise ValueError(f"guess {number} is token {token} after {parent}: expected {rule}")
            if parent in node and depth[node[parent]] < deepest and len(parents) < most:
                node[number] = len(parents)
                tokens.append(token)
                parents.append(node[parent])
                depth.append(depth[node[parent]] + 1)
        return cls(tokens, parents)

    def child(self, node: int, token: int) -> int | None:
        """The node with this token after another, if it was guessed."""
        pairs = zip(self.parents[1:], self.tokens, strict=True)
        return next((child for child, pair in enumerate(pairs, 1) if pair == (node, token)), None)
