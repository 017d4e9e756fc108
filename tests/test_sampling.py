"""How tokens are chosen, beside transformers' own processors; what one prefill serves; the true continuation's loss."""

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process

from qwen_min import Qwen
from qwen_min.fast import loss
from qwen_min.generate import decode, left_padded, prefill
from qwen_min.loss import continuation_losses
from qwen_min.sampling import Sampling, penalise, probabilities

ROWS = [[4, 8, 15], [16, 23, 42, 4, 8, 15, 16], [23]]
OPTIONS: list[dict] = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 1.0, "top_k": 500},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.5, "repetition_penalty": 1.1},
    {"temperature": 1.5, "repetition_penalty": 0.5},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1},  # the hub's, for Qwen2.5-Instruct
    {"temperature": 2.0, "top_k": 3, "top_p": 0.5, "repetition_penalty": 2.0},
]


def processors(options: Sampling) -> logits_process.LogitsProcessorList:
    """Transformers' own, in the order that its `generate` puts them."""
    chain: list = [logits_process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)]
    if options.temperature:
        chain.append(logits_process.TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        chain.append(logits_process.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        chain.append(logits_process.TopPLogitsWarper(options.top_p))
    return logits_process.LogitsProcessorList(chain)


def distribution(logits: Tensor, options: Sampling) -> Tensor:
    weights, tokens = probabilities(logits, options)
    if tokens is not None:
        weights = torch.zeros_like(logits).scatter(1, tokens, weights)
    return weights / weights.sum(-1, keepdim=True)


@pytest.fixture
def padded(random_model) -> tuple[Qwen, Tensor, Tensor]:
    return random_model(), *left_padded(ROWS)


def collected(steps) -> Tensor:
    return torch.stack(list(steps), 1)


@pytest.mark.parametrize("options", [Sampling(**o) for o in OPTIONS], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_options_act_as_in_transformers_and_in_its_order(options, seed):
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(50, 300, generator=draw)
    ids = torch.randint(300, (50, 40), generator=draw)
    expected = processors(options)(ids, logits.clone()).softmax(-1)
    seen = torch.zeros(50, 300, dtype=torch.bool).scatter(1, ids, True)
    got = distribution(penalise(logits, seen, options.repetition_penalty), options)
    assert torch.equal(got > 0, expected > 0)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_of_equal_logits_transformers_keeps_the_same():
    """Logits of a bfloat16 model are often equal: top_k keeps all that equal the last, top_p the later of them."""
    logits = torch.randn(200, 60, generator=torch.Generator().manual_seed(0)).mul(2).round().div(2)
    for options in (Sampling(1.0, top_k=7), Sampling(1.0, top_p=0.6)):
        expected = processors(options)(torch.zeros(200, 1, dtype=torch.int64), logits.clone()).softmax(-1)
        assert torch.equal(distribution(logits, options) > 0, expected > 0)
    assert (distribution(torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]]), Sampling(1.0, top_k=2)) > 0).sum() == 4


def test_only_what_survives_top_k_and_a_constraint_is_drawn_from():
    """To sort a large vocabulary takes as long as the model; with fewer allowed than k, top_k once kept all of it."""
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    for columns, allowed in ((20, 300), (4, 4)):
        logits[:, allowed:] = float("-inf")
        weights, tokens = probabilities(logits, Sampling(1.0, top_k=20))
        assert weights.shape == tokens.shape == (2, columns)
    assert probabilities(logits, Sampling(1.0))[0].shape == (2, 4)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_greedy_generation_with_a_penalty_equals_transformers(penalty, reference):
    folder, theirs = reference()
    ids = torch.tensor([[3, 14, 15, 92, 65], [35, 89, 79, 32, 38]])
    greedy = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(ids, max_new_tokens=25, repetition_penalty=penalty, **greedy)
    got = Qwen.from_pretrained(folder).generate(ids, 25, repetition_penalty=penalty)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("options", [Sampling(0.8, top_p=0.9, repetition_penalty=1.2), Sampling(1.0)], ids=str)
@torch.inference_mode()
def test_sampled_tokens_equal_draws_from_transformers_distribution_over_full_passes(options, random_model):
    model = random_model()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected, generator = ids, torch.Generator().manual_seed(3)
    for _ in range(12):
        weights = processors(options)(expected, model(expected)[:, -1]).softmax(-1)
        expected = torch.cat((expected, torch.multinomial(weights, 1, generator=generator)), 1)
    got = collected(decode(model, prefill(model, ids, 12), 12, seed=3, **vars(options)))
    assert torch.equal(got, expected[:, 3:])


@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_a_padded_row_generates_what_it_does_alone_whatever_pads_it(penalty, random_model):
    """Padding once counted as seen would be penalised; so the first token that the short rows choose pads them."""
    model = random_model()
    alone = [model.generate([row], 9, repetition_penalty=penalty)[0] for row in ROWS]
    for pad_id in (0, 4, *(row[len(prompt)] for row, prompt in zip(alone, ROWS, strict=True))):
        assert model.generate(ROWS, 9, pad_id=pad_id, repetition_penalty=penalty) == alone


def test_the_prefill_runs_once_however_many_samples_are_drawn(padded):
    (model, ids, padding), bodies, heads = padded, [], []
    model.model.register_forward_pre_hook(lambda module, given: bodies.append(tuple(given[0].shape)))
    model.lm_head.register_forward_pre_hook(lambda module, given: heads.append(tuple(given[0].shape[:2])))
    list(decode(model, prefill(model, ids, 3, padding), 4, samples=5))
    assert bodies == [(3, 7), (15, 1), (15, 1), (15, 1)] and heads == [(3, 1), (15, 1), (15, 1), (15, 1)]


def test_row_b_times_samples_plus_s_is_sample_s_of_prompt_b(padded):
    model, ids, padding = padded
    read = prefill(model, ids, 8, padding)
    alone = [model.generate([row], 9)[0][len(row) :] for row in ROWS]
    assert collected(decode(model, read, 9)).tolist() == alone
    assert collected(decode(model, read, 9, samples=2)).tolist() == [row for row in alone for _ in "12"]
    nearly = collected(decode(model, read, 9, samples=2, temperature=1e-9, repetition_penalty=1.4, seed=0))
    penalised = [model.generate([row], 9, repetition_penalty=1.4)[0][len(row) :] for row in ROWS]
    assert nearly.tolist() == [row for row in penalised for _ in "12"]


def test_samples_differ_and_a_seed_repeats_them(random_model):
    model = random_model()
    read = prefill(model, torch.tensor([[1, 2, 3]]), 19)
    draws = [collected(decode(model, read, 20, samples=4, temperature=1.0, seed=seed)) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert len({tuple(row) for row in draws[0].tolist()}) == 4


@pytest.mark.parametrize("samples", [1, 3])
def test_a_prefill_serves_again_whatever_ran_before(samples, padded):
    """Decoding that was left halfway once stayed in the cache, before the next use."""
    model, ids, padding = padded
    targets = torch.randint(97, (3, 6))
    read = prefill(model, ids, 8, padding)
    first = collected(decode(model, read, 9, samples=samples))
    losses = continuation_losses(model, read, targets)
    assert read.cache.length == ids.shape[1]
    half = decode(model, read, 9, samples=samples, temperature=1.0)
    next(half), next(half), next(half)
    assert torch.equal(continuation_losses(model, read, targets), losses)
    assert torch.equal(collected(decode(model, read, 9, samples=samples)), first)


def test_a_prefill_without_room_is_refused_before_a_token_is_made(random_model):
    model = random_model()
    read = prefill(model, torch.tensor([[1, 2, 3]]), 4)
    assert len(list(decode(model, read, 5))) == 5  # the last token is not read
    for samples in (1, 2):
        with pytest.raises(ValueError, match="hold 3 [+] 5 tokens: expected at most 7"):
            next(decode(model, read, 6, samples=samples))
    assert continuation_losses(model, read, torch.ones(1, 5, dtype=torch.int64)).shape == (1, 5)
    with pytest.raises(ValueError, match="hold 3 [+] 5 tokens: expected at most 7"):
        continuation_losses(model, read, torch.ones(1, 6, dtype=torch.int64))


def test_no_tokens_and_no_samples(random_model):
    model = random_model()
    read = prefill(model, torch.tensor([[1, 2, 3]]), 0)
    assert list(decode(model, read, 0)) == []
    with pytest.raises(ValueError, match="samples is 0: expected at least 1"):
        next(decode(model, read, 1, samples=0))


@pytest.mark.parametrize("at_once", [97 * 4, 2**26])
@pytest.mark.parametrize("tokens", [1, 2, 7])
@torch.inference_mode()
def test_the_losses_of_a_continuation_are_those_of_a_full_pass(tokens, at_once, padded, monkeypatch):
    monkeypatch.setitem(loss.LOGITS_AT_ONCE, "cpu", at_once)
    model, ids, padding = padded
    targets = torch.randint(97, (3, tokens))
    got = continuation_losses(model, prefill(model, ids, tokens - 1, padding), targets)
    assert got.dtype == torch.float64
    for row, prompt in enumerate(ROWS):
        whole = torch.tensor([prompt + targets[row].tolist()])
        logs = model(whole[:, :-1])[0, len(prompt) - 1 :].double().log_softmax(-1)
        torch.testing.assert_close(got[row], -logs.gather(1, targets[row, :, None])[:, 0], atol=1e-5, rtol=0)


def test_continuations_of_other_lengths_end_in_ignored_targets_which_cost_nothing(padded):
    model, ids, padding = padded
    read, targets = prefill(model, ids, 6, padding), torch.randint(97, (3, 7))
    whole = continuation_losses(model, read, targets)
    real = torch.arange(7) < torch.tensor([4, 7, 0])[:, None]
    got = continuation_losses(model, read, targets.masked_fill(~real, -100))
    torch.testing.assert_close(got, whole.masked_fill(~real, 0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[1, 2]], r"targets are \[1, 2\]: expected 2 rows"),
        ([1, 2], r"targets are \[2\]: expected 2 rows"),
        ([[], []], r"targets are \[2, 0\]: expected 2 rows of at least one"),
        ([[1, 97], [2, 3]], "a target is outside of the vocabulary: expected 0 to 96"),
        ([[1, 2], [-100, 3]], "a target comes after -100"),
    ],
)
def test_bad_targets_are_refused_with_what_was_expected(targets, message, random_model):
    model = random_model()
    with pytest.raises(ValueError, match=message):
        continuation_losses(model, prefill(model, torch.tensor([[1], [2]]), 4), torch.tensor(targets))


class Cycle:
    """A constraint that lets each row choose in turn among given tokens, and notes what it is given."""

    tokens = None

    def __init__(self, turns: list[list[int]], rows: int):
        self.tables = [torch.zeros(rows, 97, dtype=torch.bool) for _ in turns]
        for table, tokens in zip(self.tables, turns, strict=True):
            table[:, tokens] = True
        self.seen: list[tuple[Tensor, Tensor]] = []

    def allowed(self) -> Tensor:
        return self.tables[len(self.seen) % len(self.tables)]

    def advance(self, new: Tensor, kept: Tensor) -> None:
        self.seen.append((new, kept))


TURNS = [[5, 6, 7], [11], [40, 41, 42, 96]]


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 5.0}, OPTIONS[-2] | {"seed": 1}, {"temperature": 9.0, "seed": 2}], ids=str
)
@torch.inference_mode()
def test_a_constraint_is_kept_and_is_given_the_mass_of_the_models_own_distribution(options, samples, padded):
    model, ids, padding = padded
    constraint = Cycle(TURNS, len(ROWS) * samples)
    read = prefill(model, ids, 8, padding)
    new = collected(decode(model, read, 9, samples=samples, constraint=constraint, **options))
    assert torch.equal(new, torch.stack([tokens for tokens, _ in constraint.seen], 1))
    for row, prompt in enumerate(prompt for prompt in ROWS for _ in range(samples)):
        logits = model(torch.tensor([prompt + new[row].tolist()]))[0, len(prompt) - 1 : -1].double()
        for step, (tokens, kept) in enumerate(constraint.seen):
            turn = TURNS[step % 3]
            assert int(tokens[row]) in turn and kept.dtype == torch.float64
            expected = float(logits[step].softmax(-1)[turn].sum())
            assert float(kept[row]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@torch.inference_mode()
def test_greedy_under_a_constraint_takes_the_likeliest_of_what_is_allowed(random_model):
    model, ids = random_model(), torch.tensor([[1, 2, 3]])
    expected = ids
    for step in range(9):
        logits = model(expected)[0, -1]
        best = max(TURNS[step % 3], key=lambda token: float(logits[token]))
        expected = torch.cat((expected, torch.tensor([[best]])), 1)
    got = collected(decode(model, prefill(model, ids, 8), 9, constraint=Cycle(TURNS, 1)))
    assert torch.equal(got, expected[:, 3:])


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "seed": 4}], ids=str)
def test_a_constraint_that_allows_everything_changes_nothing_and_cuts_nothing(options, random_model):
    model, ids = random_model(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    read, free = prefill(model, ids, 14), Cycle([list(range(97))], 2)
    assert torch.equal(
        collected(decode(model, read, 15, constraint=free, **options)), collected(decode(model, read, 15, **options))
    )
    assert all((kept == 1).all() for _, kept in free.seen)
