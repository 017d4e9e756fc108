"""One code path for full, chunked, one-token and padded passes; and generation on top of it."""

import random
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora import add_logit_bias
from qwen_min import FlopMeter, ops
from qwen_min.cache import KVCache
from qwen_min.fast.captured import CapturedStep
from qwen_min.fast.limits import FEED_FORWARD_AT_ONCE, sequences_at_once
from qwen_min.fast.tree import forward, keep
from qwen_min.generate import decode, left_padded, prefill, stream
from qwen_min.loss import IGNORED
from qwen_min.view import View

TOLERANCE = 1e-5
"""Logits are near 1; other products' shapes sum in another order: 3e-6 was the most seen."""

LENGTHS = [1, 2, 3, 5, 8, 11, 13, 17]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def prompts(lengths: list[int], vocabulary: int = 97) -> list[list[int]]:
    return [torch.randint(vocabulary, (n,)).tolist() for n in lengths]


@torch.inference_mode()
def in_chunks(model, ids: Tensor, sizes: list[int], padding: Tensor | None = None) -> Tensor:
    """The logits of all tokens, from passes of the given sizes over one cache."""
    cache = KVCache(model.config, ids.shape[0], ids.shape[1])
    assert sum(sizes) == ids.shape[1]
    return torch.cat([model(part, cache, padding) for part in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("sizes", [[17], [1] * 17, [7, 1, 9], [1, 15, 1], [2, 3, 12], [16, 1]], ids=str)
@torch.inference_mode()
def test_a_chunked_pass_equals_the_full_one(sizes, way, random_model):
    """The kernel's own `is_causal` aligns the triangle to the top left: a token of a chunk would see too little."""
    model = random_model()
    ids = torch.tensor(prompts([17, 17]))
    close(in_chunks(model, ids, sizes), model(ids))


@pytest.mark.parametrize("sizes", [[17], [1] * 17, [7, 1, 9], [15, 2]], ids=str)
@torch.inference_mode()
def test_a_left_padded_batch_equals_each_row_alone(sizes, way, random_model):
    model = random_model()
    rows = prompts(LENGTHS)
    ids, padding = left_padded(rows)
    logits = in_chunks(model, ids, sizes, padding)
    for row, tokens in enumerate(rows):
        close(logits[row, -len(tokens) :], model(torch.tensor([tokens]))[0])


@torch.inference_mode()
def test_a_padded_row_starts_at_position_0_after_its_padding(random_model, monkeypatch):
    """Logits cannot tell (the rotation is relative), but a shifted row would leave the model's positions too early."""
    seen, angles = [], ops.rotation_angles

    def record(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        seen.append(positions.tolist())
        return angles(positions, head_dim, theta)

    monkeypatch.setattr(ops, "rotation_angles", record)
    model, cache = random_model(), KVCache(random_model().config, batch=2, capacity=6)
    model(torch.zeros(2, 4, dtype=torch.int64), cache, torch.tensor([2, 0]))
    model(torch.zeros(2, 2, dtype=torch.int64), cache, torch.tensor([2, 0]))
    assert seen == [[[0, 0, 0, 1], [0, 1, 2, 3]], [[2, 3], [4, 5]]]


def test_a_full_cache_names_what_is_needed_and_what_it_has(make_config, random_model):
    model, cache = random_model(), KVCache(make_config(), batch=1, capacity=6)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3, 4]]), cache)
        with pytest.raises(ValueError, match="hold 4 [+] 3 tokens: expected at most 6"):
            model(torch.tensor([[1, 2, 3]]), cache)
        assert cache.length == 4
        model(torch.tensor([[1, 2]]), cache)  # what was refused has changed nothing: two more still fit
        with pytest.raises(ValueError, match="2 sequences for a cache: expected the 1 that"):
            model(torch.tensor([[1], [2]]), cache)


def test_the_cache_counts_a_forward_once_and_returns_views(make_config, random_model):
    model, cache = random_model(), KVCache(make_config(), batch=1, capacity=6)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]), cache)
    assert cache.length == 3
    keys, values = cache.append(1, *(torch.zeros(1, 2, 2, 8) for _ in "kv"))
    assert keys.shape == values.shape == (1, 2, 5, 8) and keys.data_ptr() == cache.store[0, 1].data_ptr()


@torch.inference_mode()
def test_a_cache_goes_back_and_what_follows_takes_the_place_of_what_was_there(random_model):
    model, ids = random_model(), torch.tensor(prompts([9, 9]))
    cache = KVCache(model.config, batch=2, capacity=9)
    model(torch.cat((ids[:, :4], ids[:, :5]), 1), cache)
    cache.rewind(4)
    close(model(ids[:, 4:], cache), model(ids)[:, 4:])
    for length in (-1, 10):
        with pytest.raises(ValueError, match=f"go back to {length} tokens: expected 0 to 9"):
            cache.rewind(length)


@torch.inference_mode()
def test_a_repeated_cache_is_a_copy_with_each_sequence_several_times_in_a_row(random_model):
    model, ids = random_model(), torch.tensor(prompts([6, 6]))
    cache = KVCache(model.config, batch=2, capacity=6)
    model(ids[:, :4], cache)
    longer = cache.repeat(3)
    assert (longer.batch, longer.length, longer.capacity, cache.batch, cache.length) == (6, 4, 6, 2, 4)
    close(model(ids[:, 4:].repeat_interleave(3, 0), longer), model(ids)[:, 4:].repeat_interleave(3, 0))
    assert cache.length == 4
    close(model(ids[:, 4:], cache), model(ids)[:, 4:])


@torch.inference_mode()
def test_a_cache_keeps_the_tokens_of_one_branch_and_they_close_up(random_model):
    model, (tokens,) = random_model(), prompts([10])
    cache = KVCache(model.config, batch=1, capacity=12)
    model(torch.tensor([tokens[:4]]), cache)
    # After place 4 the places 5, 6 and 7 are alternatives; 8 follows 5, and 9 follows 8.
    forward(model.model, torch.tensor([tokens[4:]]), cache, [-1, 0, 0, 0, 1, 4])
    keep(cache, 4, [4, 5, 8])
    assert (cache.length, cache.capacity) == (7, 12)
    kept = [*tokens[:4], tokens[4], tokens[5], tokens[8]]
    close(model(torch.tensor([[1, 2]]), cache), model(torch.tensor([[*kept, 1, 2]]))[:, -2:])
    keep(cache, 5, [])
    assert cache.length == 5
    for length, places, problem in ((2, [1], "2 to 4"), (2, [5], "2 to 4"), (6, [], "0 to 5")):
        with pytest.raises(ValueError, match=f"expected {problem}"):
            keep(cache, length, places)


@pytest.mark.parametrize(
    ("ids", "padding", "message"),
    [
        (torch.zeros(2, 5), None, "ids are torch.float32 [2, 5]: expected whole numbers (batch, tokens)"),
        (torch.zeros(5).long(), None, "ids are torch.int64 [5]: expected"),
        (torch.zeros(1, 2, 5).long(), None, "ids are torch.int64 [1, 2, 5]: expected"),
        (torch.full((2, 5), 97), None, "a token is outside of the vocabulary: expected 0 to 96"),
        (torch.full((2, 5), -100), None, "a token is outside of the vocabulary"),
        (torch.zeros(2, 5).long(), torch.tensor([1]), "padding is torch.int64 [1]: expected 2 whole numbers"),
        (torch.zeros(2, 5).long(), torch.tensor([1.5, 0.0]), "padding is torch.float32 [2]: expected 2 whole"),
        (torch.zeros(2, 5).long(), torch.ones(2, 5).long(), "padding is torch.int64 [2, 5]: expected 2 whole"),
    ],
    ids=str,
)
@torch.inference_mode()
def test_ids_and_padding_of_another_kind_are_refused_and_a_cache_is_as_before(ids, padding, message, random_model):
    model, first = random_model(), torch.tensor(prompts([6, 6]))
    cache = KVCache(model.config, batch=2, capacity=12)
    model(first, cache)
    for options in ({}, {"cache": cache}):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            model(ids, padding=padding, **options)
    close(model(first, cache), model(first.repeat(1, 2))[:, 6:])


def test_an_error_inside_of_a_forward_leaves_the_cache_as_it_was(random_model):
    model, ids = random_model(), torch.tensor(prompts([9, 9]))
    cache = KVCache(model.config, batch=2, capacity=9)

    def fail(*_) -> None:
        raise RuntimeError

    with torch.inference_mode():
        model(ids[:, :4], cache)
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError):
            model(ids[:, 4:], cache)
        hook.remove()
        close(model(ids[:, 4:], cache), model(ids)[:, 4:])


def test_rows_that_are_all_padding_and_batches_of_nothing_give_no_nan(way, random_model):
    model, ids = random_model(), torch.tensor(prompts([7, 7]))
    targets, padding = ids.clone(), torch.tensor([7, 0])
    targets[0] = IGNORED
    got = model(ids, padding=padding)
    close(got[1:], model(ids[1:]))
    assert got.isfinite().all()
    total, count = model.loss(ids, targets, padding)
    assert (count, total.item()) == (7, pytest.approx(model.loss(ids[1:], ids[1:])[0].item()))
    assert model.token_losses(ids, targets, padding)[0].eq(0).all()
    for nothing in (ids[:0], ids[:, :0]):
        assert model(nothing).shape == (*nothing.shape, 97) and model.loss(nothing, nothing)[1] == 0
        with torch.inference_mode():
            assert model.token_losses(nothing, nothing).shape == nothing.shape


@pytest.mark.parametrize("other", [{"num_hidden_layers": 3}, {"num_key_value_heads": 1}, {"rope_theta": 1e6}], ids=str)
def test_a_cache_serves_models_of_its_configuration_alone(other, random_model):
    model, cache = random_model(**other), KVCache(random_model().config, batch=1, capacity=4)
    with torch.inference_mode(), pytest.raises(ValueError, match="cache was made for another model: expected one of"):
        model(torch.tensor([[1, 2]]), cache)


def test_a_cache_takes_nothing_that_wants_a_gradient(random_model):
    """Torch says that a view was created in no_grad mode."""
    model = random_model()
    with pytest.raises(ValueError, match="want a gradient: expected a cache under torch.inference_mode"):
        model(torch.tensor([[1, 2]]), KVCache(model.config, batch=1, capacity=4))


def test_a_mask_has_the_shape_that_a_view_promises(random_model, monkeypatch):
    """(B, 1, T, S), 1 in the place of B where all rows are alike; None where it is plainly causal."""
    model, seen = random_model(), []
    run, ids, padding = model.model.run, torch.tensor(prompts([4, 4])), torch.tensor([1, 0])

    def record(ids: Tensor, view: View, cache: KVCache | None) -> Tensor:
        seen.append((*view.cos.shape, *(view.mask.shape if view.mask is not None else ())))
        return run(ids, view, cache)

    monkeypatch.setattr(model.model, "run", record)
    with torch.inference_mode():
        for left, rows in ((None, 1), (padding, 2)):
            cache = KVCache(model.config, batch=2, capacity=12)
            model(ids, cache, left)
            model(ids[:, :3], cache, left)
            forward(model.model, ids[:, :3], cache, [-1, 0, 0], left)
            CapturedStep(model.model, cache, left)
            first = (rows, 4, 1, 8) + (() if left is None else (rows, 1, 4, 4))
            later = [(rows, 3, 1, 8, rows, 1, 3, 7), (rows, 3, 1, 8, rows, 1, 3, 10), (rows, 1, 1, 8, rows, 1, 1, 12)]
            assert seen == [first, *later]
            seen.clear()


def test_a_context_beyond_the_positions_of_the_model_is_refused(random_model):
    model = random_model(max_position_embeddings=8)
    with pytest.raises(ValueError, match="9 tokens are too long: .*max_position_embeddings, which is 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="9 tokens are too long"):
        model.generate([[1, 2, 3]], max_new_tokens=7)
    assert len(model.generate([[1, 2, 3]], max_new_tokens=6)[0]) == 9  # the last token is not read, so it fits


@torch.inference_mode()
def test_50_prompts_have_the_same_logits_and_tokens_without_a_cache_with_one_and_in_padded_eights(way, random_model):
    """Each prompt and 8 greedy tokens, by full passes; the same tokens must come of a cache alone and beside others."""
    model, draw = random_model(), random.Random(0)
    rows = prompts([draw.randint(1, 40) for _ in range(50)])
    expected: list[Tensor] = []  # (8, V) logits of each prompt
    tokens: list[list[int]] = []
    for row in rows:
        line, logits = list(row), []
        for _ in range(8):
            logits.append(model(torch.tensor([line]))[0, -1])
            line.append(int(logits[-1].argmax()))
        expected.append(torch.stack(logits))
        tokens.append(line[len(row) :])
    assert min(logits.topk(2).values.diff().abs().min() for logits in expected) > 2 * TOLERANCE  # no token is a tie

    def cached(batch: list[int]) -> Tensor:
        """(rows, 8, V) logits of one prefill and a forward for each token."""
        ids, padding = left_padded([rows[i] for i in batch])
        cache = KVCache(model.config, len(batch), ids.shape[1] + 7)
        logits = [model(ids, cache, padding)[:, -1]]
        for _ in range(7):
            logits.append(model(logits[-1].argmax(-1, keepdim=True), cache, padding)[:, -1])
        return torch.stack(logits, 1)

    alone, eights = [[i] for i in range(50)], [[i % 50 for i in range(start, start + 8)] for start in range(0, 50, 8)]
    for batch in alone + eights:
        for i, logits in zip(batch, cached(batch), strict=True):
            close(logits, expected[i])
            assert logits.argmax(-1).tolist() == tokens[i]
        got = model.generate([rows[i] for i in batch], max_new_tokens=8)
        assert got == [rows[i] + tokens[i] for i in batch]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_prompts_read_a_few_rows_at_a_time_leave_the_cache_and_charge_of_all_at_once(rows, random_model, monkeypatch):
    random = random_model()
    ids, padding = left_padded(prompts(LENGTHS))
    expected, read = [], []
    for at_once, into in ((8, expected), (rows, read)):
        wide = at_once * ids.shape[1] * random.config.intermediate_size
        monkeypatch.setitem(FEED_FORWARD_AT_ONCE, "cpu", wide)
        assert sequences_at_once(random, ids.shape[1]) == at_once
        with FlopMeter("exact") as meter:
            made = prefill(random, ids, 4, padding)
        into += [made.hidden, made.cache.store[..., : ids.shape[1], :], torch.tensor([made.cache.length, meter.total])]
        into += list(decode(random, made, 5))
    for got, wanted in zip(read, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)


def test_a_tensor_of_prompts_gives_a_tensor_and_a_list_gives_lists(random_model):
    model = random_model()
    ids = torch.tensor(prompts([4, 4, 4]), dtype=torch.int32)
    got = model.generate(ids, max_new_tokens=7)
    assert got.shape == (3, 11) and got.dtype == torch.int32 and torch.equal(got[:, :4], ids)
    assert model.generate(ids.tolist(), max_new_tokens=7) == got.tolist()
    assert model.generate(ids, max_new_tokens=0).tolist() == ids.tolist()
    got += 1  # an ordinary tensor, which the caller may change


def test_a_stop_token_ends_its_own_prompt_and_is_kept(random_model):
    model = random_model()
    rows = prompts([5, 3, 6])
    free = model.generate(rows, max_new_tokens=12)
    stop = free[0][5 + 4]  # the fifth new token of the first prompt
    stopped = model.generate(rows, max_new_tokens=12, stop=[stop])
    for row, whole, cut in zip(rows, free, stopped, strict=True):
        new = whole[len(row) :]
        assert cut == row + (new[: new.index(stop) + 1] if stop in new else new)
    assert len(stopped[0]) <= 10 and [len(row) for row in free] == [17, 15, 18]  # nothing stops unless it is passed


def test_a_stopped_row_of_a_tensor_is_filled_up_and_all_stopped_ends_early(random_model):
    model = random_model()
    ids = torch.tensor(prompts([5, 5]))
    free = model.generate(ids, max_new_tokens=12)
    first, second = free[0, 5].item(), free[1, 7].item()
    got = model.generate(ids, max_new_tokens=12, stop=[first, second], pad_id=33)
    ends = [next(i for i, t in enumerate(row[5:].tolist()) if t in (first, second)) for row in free]
    assert got.shape == (2, 5 + max(ends) + 1)
    for row, end in enumerate(ends):
        assert torch.equal(got[row, : 6 + end], free[row, : 6 + end]) and (got[row, 6 + end :] == 33).all()


def test_a_seed_repeats_a_sample_and_another_seed_does_not(random_model):
    model = random_model()
    draws = [model.generate([[1, 2, 3]], max_new_tokens=30, temperature=1.0, seed=seed) for seed in (7, 7, 8)]
    assert draws[0] == draws[1] != draws[2]
    state = torch.get_rng_state()
    model.generate([[1, 2, 3]], max_new_tokens=3, temperature=1.0, seed=7)
    assert torch.equal(torch.get_rng_state(), state)  # torch's global generator is left alone


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-300, 5e-324])
def test_a_temperature_towards_zero_is_greedy(temperature, random_model):
    """A division by a tiny temperature once overflowed to infinity, and the softmax to NaN."""
    model = random_model()
    rows = prompts(LENGTHS)
    assert model.generate(rows, 10, temperature=temperature, seed=0) == model.generate(rows, 10)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        *((ids, {}, "prompts are empty or not") for ids in ([], [[1], []], [1, 2], "ab", torch.tensor([1, 2]))),
        (torch.empty(1, 0, dtype=torch.int64), {}, "prompts are empty"),
        ([[1, 97]], {}, "token 97 is outside of the vocabulary: expected 0 to 96"),
        ([[-1]], {}, "token -1 is outside"),
        ([[1]], {"stop": [97]}, "token 97 is outside"),
        ([[1]], {"pad_id": -5}, "token -5 is outside"),
        ([[1.0]], {}, "ids are torch.float32"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1: expected 0 or more"),
        *(([[1]], {"temperature": t}, f"temperature is {t}: expected 0") for t in (-0.1, float("nan"), float("inf"))),
        *(([[1]], {"top_p": p}, f"top_p is {p}: expected more than 0, at most 1") for p in (0.0, 1.01)),
        *(([[1]], {"top_k": k}, f"top_k is {k}: expected a whole number, 0") for k in (-1, 3.0, "3")),
        *(([[1]], {"seed": seed}, f"seed is {seed}: expected a whole number, 0 to") for seed in (2**64, -1, 1.5)),
        *(
            ([[1]], {"repetition_penalty": p}, f"repetition_penalty is {p}: expected more than 0")
            for p in (0.0, torch.nan)
        ),
        ([[1]], {"repetition_penalty": 1e-45}, "the highest logits are .*inf.*: expected finite ones"),
    ],
    ids=str,
)
def test_a_bad_prompt_or_option_is_refused_with_what_was_expected(ids, options, message, random_model):
    with pytest.raises(ValueError, match=message):
        random_model().generate(ids, **({"max_new_tokens": 2} | options))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 5}], ids=str)
def test_logits_that_are_no_numbers_make_no_token(options, random_model):
    """As where float16 overflows: greedy, it wrote token 0 for ever. Large ones are no trouble."""
    model = random_model()
    torch.nn.init.normal_(model.lm_head.weight, std=1e4)
    assert model.generate([[1]], 5, seed=0, **options) == model.generate([[1]], 5)
    torch.nn.init.constant_(model.model.embed_tokens.weight[3], torch.nan)
    with pytest.raises(ValueError, match=r"the highest logits are \[\d.*, nan\]: expected finite ones"):
        model.generate([[1], [3]], max_new_tokens=1, **options)


TREE = [-1, 0, 0, 1, 1, -1, 4, 2, 5, 6]
"""Two roots; nodes 1 and 2, and 3 and 4, are alternatives."""


def line(parents: list[int], node: int) -> list[int]:
    return [] if node < 0 else [*line(parents, parents[node]), node]


@pytest.mark.parametrize("cached", [0, 6])
@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
def test_each_node_of_a_tree_has_the_logits_of_its_branch_alone(padded, cached, way, random_model):
    model, (before, tokens) = random_model(), prompts([cached, len(TREE)])
    padding = torch.tensor([2]) if padded else None
    cache = KVCache(model.config, batch=1, capacity=20)
    start = [0, 0, *before] if padded else before
    if start:
        model(torch.tensor([start]), cache, padding)
    got = model.head(forward(model.model, torch.tensor([tokens]), cache, TREE, padding))
    for node in range(len(TREE)):
        branch = [tokens[n] for n in line(TREE, node)]
        close(got[:, node], model(torch.tensor([before + branch]))[:, -1])


@pytest.mark.parametrize("parents", [[-1], [-1, 0, 2], [-1, 1, 0], [-1, -2, 0]], ids=str)
def test_a_tree_without_an_earlier_parent_for_each_token_is_refused(parents, random_model, make_config):
    with pytest.raises(ValueError, match="expected an earlier one, or -1, for each of 3 tokens"):
        forward(random_model().model, torch.tensor([[1, 2, 3]]), KVCache(make_config(), 1, 3), parents)


@torch.inference_mode()
def test_a_tree_takes_as_many_positions_as_it_is_deep(random_model):
    model = random_model(max_position_embeddings=4)
    ids, cache = torch.zeros(1, 7, dtype=torch.int64), KVCache(model.config, batch=1, capacity=7)
    with pytest.raises(ValueError, match="5 tokens are too long: .*max_position_embeddings, which is 4"):
        forward(model.model, ids, cache, [-1, 0, 0, 1, 1, 3, 5])
    forward(model.model, ids, cache, [-1, 0, 0, 1, 1, 3, 3])


class Scripted:
    """A draft that knows what will be chosen, and makes of it the tree that is asked for."""

    def __init__(self, future: list[int], tree: Callable[[list[int]], list[tuple[int, int]]]):
        self.future, self.tree, self.seen = future, tree, []  # type: ignore[var-annotated]

    def guess(self) -> list[tuple[int, int]]:
        return self.tree(self.future[len(self.seen) :])

    def advance(self, token: int) -> None:
        self.seen.append(token)


def chain(tokens: list[int]) -> list[tuple[int, int]]:
    return list(enumerate(tokens))


def scattered(future: list[int]) -> list[tuple[int, int]]:
    """Seven guesses at random places, each right with probability .7 if all before it are."""
    tree, depth = [], [0]
    for number in range(1, 8):
        parent = random.randrange(number)
        right = future[depth[parent]] if depth[parent] < len(future) else 5
        tree.append((parent, right if random.random() < 0.7 else random.randrange(97)))
        depth.append(depth[parent] + 1)
    return tree


TREES: dict[str, Callable[[list[int]], list[tuple[int, int]]]] = {
    "nothing": lambda future: [],
    "the next three": lambda future: chain(future[:3]),
    "all that is left and more": lambda future: chain([*future, *range(90)]),
    "all wrong": lambda future: chain([(token + 1) % 97 for token in future[:4]]),
    "ninety-seven alternatives": lambda future: [(0, token) for token in range(97)],
    "twice the same": lambda future: [(0, future[0]), (0, future[0]), (1, 3), (2, *future[1:2])] if future[1:] else [],
    "the second after a wrong first": lambda future: [(0, 96 - future[0]), (0, future[0]), (1, 7), (2, 7)],
    "scattered": scattered,
}


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 3.0}], ids=str)
@pytest.mark.parametrize("room", [0, 30])
@pytest.mark.parametrize("tree", TREES)
@torch.inference_mode()
def test_a_draft_changes_no_token_whatever_it_guesses(tree, room, options, random_model):
    random.seed(tree)
    for seed in range(4):
        model = random_model(seed, max_position_embeddings=31)  # as many as are read, the last is not
        ids = torch.tensor(prompts([7]))
        read = prefill(model, ids, 24 + room)
        plain = [int(new) for new in decode(model, read, 25, **options)]
        draft = Scripted(plain, TREES[tree])
        got = [int(new) for new in decode(model, read, 25, draft=draft, **options)]
        assert got == plain and draft.seen == plain[: len(draft.seen)] and len(draft.seen) >= 24


@torch.inference_mode()
def test_right_guesses_save_forwards_and_all_nodes_are_charged(random_model):
    model, ids, seen = random_model(), torch.tensor([[4, 5, 6]]), []
    read = prefill(model, ids, 12)
    plain = [int(new) for new in decode(model, read, 13)]
    model.model.embed_tokens.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[1]))
    with FlopMeter() as meter:
        steps = decode(model, read, 13, draft=Scripted(plain, lambda future: chain(future[:3])))
        assert [int(new) for new in steps] == plain
    assert seen == [4, 4, 4]  # the first comes of the prefill, then four a forward
    with FlopMeter() as forwards:
        cache = KVCache(model.config, 1, 15)
        cache.advance(3)
        model.head(torch.zeros(1, 1, 48))
        for _ in range(3):
            model(torch.zeros(1, 4, dtype=torch.int64), cache)
    assert meter.by_component() == forwards.by_component()


def test_a_draft_works_after_padding_and_from_a_stream(random_model):
    model = random_model()
    ids, padding = torch.tensor([[0, 0, 8, 9, 10]]), torch.tensor([2])
    plain = [int(new) for new in stream(model, torch.tensor([[8, 9, 10]]), 12)]
    for tree in (TREES["the next three"], TREES["scattered"]):
        assert [int(new) for new in stream(model, ids, 12, padding=padding, draft=Scripted(plain, tree))] == plain


@pytest.mark.parametrize(
    ("rows", "options"), [(2, {}), (1, {"samples": 2}), (1, {"temperature": 1.0}), (1, {"temperature": 1e-9})], ids=str
)
def test_a_draft_is_for_one_greedy_series(rows, options, random_model):
    model = random_model()
    read = prefill(model, torch.ones(rows, 3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="expected one prompt, one sample, greedy$"):
        next(decode(model, read, 5, draft=Scripted([], chain), **options))


@pytest.mark.parametrize("guess", [(-1, 5), (1, 5), (0, 97), (0, -1)], ids=str)
def test_a_guess_that_is_no_token_or_after_none_is_refused(guess, random_model):
    model = random_model()
    steps = decode(model, prefill(model, torch.tensor([[1, 2]]), 9), 9, draft=Scripted([], lambda future: [guess]))
    with pytest.raises(ValueError, match="guess 1 is token .*expected an earlier one or 0, and a token from 0 to 96"):
        list(steps)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_some_tokens_are_those_of_all_and_cost_what_they_are(tied, bias, random_model):
    model, hidden = random_model(tie_word_embeddings=tied), torch.randn(2, 3, 48)
    if bias:
        add_logit_bias(model, torch.randn(97))
    tokens = torch.tensor([5, 90, 7])
    close(model.head(hidden, tokens), model.head(hidden)[..., tokens])
    with FlopMeter("matmul") as meter:
        model.head(hidden, tokens)
    assert meter.by_component() == {"head": 2 * 6 * 48 * 3} and meter.by_module() == {"lm_head": 2 * 6 * 48 * 3}
