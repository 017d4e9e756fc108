"""Constrained decoding end to end: whatever the model, its text parses; what was cut off is the model's own mass."""

import itertools

import numpy as np
import pytest
import torch

from data.grammar import Grammar
from data.llmtime import Codec
from data.lotka_volterra import load
from experiments.settings.record import POCKET
from experiments.task.constrain import Constrained, Drafted
from lora import add_logit_bias
from qwen_min import FlopMeter, Qwen, Tokenizer
from qwen_min.generate import decode, left_padded, prefill
from qwen_min.loss import continuation_losses

CODECS = [Codec(2), Codec(0), Codec(1, 2), Codec(3, shortest=True), Codec(2, point=False), Codec(separator=" ")]
IDS = [3, 90, 17, 50, 51, 52, 8, 7, 96, 0, 33, 44, 21]
"""Tokens of the symbols, for the random model of 97 tokens."""
LIMITS = {"rows": 1, "steps": 20, "vocabulary": 259}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(POCKET)


@pytest.fixture(scope="module")
def pocket():
    return Qwen.from_pretrained(POCKET)


def written(grammar: Grammar, tokens: list[int]) -> str:
    """The text of tokens that are all symbols'; "?" for any other."""
    symbols = dict(zip(ids_of(grammar), grammar.symbols, strict=True))
    return "".join(symbols.get(t, "?") for t in tokens)


def ids_of(grammar: Grammar) -> list[int]:
    return [*IDS, 60][: len(grammar.symbols)]


def run(model, constraint: Constrained, ids: torch.Tensor, **options) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(len(constraint.done))]
    for new in decode(model, prefill(model, ids, 119), 120, constraint=constraint, **options):
        for row, token in zip(rows, new.tolist(), strict=True):
            row.append(token)
        if constraint.done.all():
            return rows
    raise AssertionError("the rows did not end")


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 5.0, "repetition_penalty": 2.0}], ids=str
)
@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("widest", [2, 3])
def test_a_random_models_constrained_text_always_parses(codec, widest, options, random_model):
    grammar, steps = Grammar(codec, 2, widest), 4
    for seed in range(3):
        model = random_model(seed)
        constraint = Constrained(grammar, ids_of(grammar), 97, rows=6, steps=steps)
        for tokens in run(model, constraint, torch.tensor([[21, 9, 44], [1, 2, 21]]), samples=3, seed=seed, **options):
            text = written(grammar, tokens)
            end = [i for i, character in enumerate(text) if character == ";"][steps - 1] + 1
            decoded = codec.decode(text[:end], 2)
            assert (decoded.rejected, decoded.steps) == (0, steps)
            assert (decoded.values >= 0).all() and (decoded.values < 10**widest).all()
        assert (constraint.cut > 0.5).all()  # the model is random: it would have left the grammar


@torch.inference_mode()
def test_the_pocket_model_writes_steps_that_parse_and_what_was_cut_is_its_own_mass(pocket, tokenizer):
    """The independent count: which symbols have a completion that `Codec.decode` reads, and a full pass's softmax."""
    codec, steps = Codec(2), 3
    time = np.arange(12)
    wave = np.stack((3 + 2 * np.sin(time / 2), 1 + 0.5 * np.cos(time / 2)), 1)
    prompts = [tokenizer.encode(codec.encode(series)) for series in (wave, wave[3:] / 2)]
    ids, padding = left_padded(prompts, tokenizer.token_id("<|endoftext|>"))
    constraint = Constrained.for_tokenizer(tokenizer, Grammar(codec, 2), rows=4, steps=steps, vocabulary=259)
    read = prefill(pocket, ids, 40, padding)
    options = {"temperature": 1.5, "top_k": 20, "repetition_penalty": 1.1, "seed": 0}
    new = torch.stack(list(decode(pocket, read, 33, samples=2, constraint=constraint, **options)), 1).tolist()
    width = codec.step_width(2)
    assert constraint.done.all()

    endings = ["0.00,0.00;"[n:] for n in range(11)]
    for row, tokens in enumerate(new):
        text = tokenizer.decode(tokens[: steps * width])
        assert len(text) == steps * width and codec.decode(text, 2).rejected == 0
        whole = torch.tensor([prompts[row // 2] + tokens])
        chances = pocket(whole)[0].double().softmax(-1)[len(prompts[row // 2]) - 1 :]
        kept = []
        for place in range(steps * width):
            before = text[place - place % width : place]
            follow = [s for s in "0123456789.,;" if any(reads(before + s + ending, codec) for ending in endings)]
            kept.append(float(chances[place, [tokenizer.encode(s)[0] for s in follow]].sum()))
        assert float(constraint.cut[row]) == pytest.approx(1 - np.prod(kept), rel=1e-4)
        assert float(constraint.cut_mean[row]) == pytest.approx(np.mean(1 - np.array(kept)), rel=1e-4)
    assert (constraint.cut > 1e-6).all() and constraint.cut.dtype == constraint.cut_mean.dtype == torch.float64


def reads(step: str, codec: Codec) -> bool:
    decoded = codec.decode(step, 2)
    return step.endswith(";") and (decoded.steps, decoded.rejected) == (1, 0) and bool((decoded.values < 10).all())


@torch.inference_mode()
def test_the_pocket_models_free_greedy_text_is_that_of_full_passes(pocket, tokenizer):
    ids = torch.tensor([tokenizer.encode("1.00,2.00;1.10,1.90;1.20,1.80;")])
    expected = ids
    for _ in range(20):
        expected = torch.cat((expected, pocket(expected)[:, -1:].argmax(-1)), 1)
    read = prefill(pocket, ids, 20)
    assert torch.equal(torch.stack(list(decode(pocket, read, 20)), 1), expected[:, ids.shape[1] :])
    # Text that stays in the grammar by itself is not changed by a constraint.
    text = tokenizer.decode(expected[0, ids.shape[1] :].tolist())
    assert Codec(2).decode(text, 2).rejected == 0
    constraint = Constrained.for_tokenizer(tokenizer, Grammar(Codec(2), 2), rows=1, steps=2, vocabulary=259)
    got = torch.stack(list(decode(pocket, read, 20, constraint=constraint)), 1)
    assert torch.equal(got, expected[:, ids.shape[1] :]) and constraint.done.all()
    losses = continuation_losses(pocket, read, got)
    likeliest = pocket(expected)[:, ids.shape[1] - 1 : -1].double().log_softmax(-1).amax(-1)
    torch.testing.assert_close(losses, -likeliest, atol=1e-4, rtol=1e-4)


def test_rows_are_done_one_by_one_and_then_free():
    grammar = Grammar(Codec(1), 1, 2)
    constraint = Constrained(grammar, IDS, 97, rows=3, steps=2)
    token = dict(zip(grammar.symbols, IDS, strict=True))
    texts = ["1.0;2.5;??", "10.0;0.1;?", "1.0;10.0;?"]
    for place, column in enumerate(zip(*texts, strict=True)):
        allowed = constraint.allowed()
        new = torch.tensor([token.get(character, 60) for character in column])
        assert allowed.gather(1, new[:, None]).all()
        done = [text[:place].count(";") == 2 for text in texts]
        assert constraint.done.tolist() == done
        assert allowed.all(1).tolist() == done
        # A done row's mass is 1, whatever is said of it.
        constraint.advance(new, torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64))
    assert constraint.done.all()
    torch.testing.assert_close(constraint.cut, torch.tensor([1 - 0.5**8, 1 - 0.75**9, 0], dtype=torch.float64))
    torch.testing.assert_close(constraint.cut_mean, torch.tensor([0.5, 0.25, 0], dtype=torch.float64))


def test_before_the_first_token_nothing_is_cut_and_a_step_may_begin():
    constraint = Constrained(Grammar(Codec(), 2), IDS, 97, rows=2, steps=1)
    assert constraint.cut.tolist() == constraint.cut_mean.tolist() == [0, 0] and not constraint.done.any()
    expected = torch.zeros(2, 97, dtype=torch.bool)
    expected[:, IDS[:10]] = True
    assert torch.equal(constraint.allowed(), expected)


def test_a_token_that_may_not_come_is_refused():
    for symbol, start in itertools.product((60, IDS[10]), (0, 1)):  # no symbol's token; a point at the start
        constraint = Constrained(Grammar(Codec(), 2), IDS, 97, rows=2, steps=1)
        new = torch.full((2,), IDS[4])
        new[start] = symbol
        with pytest.raises(ValueError, match=f"row {start}: token {symbol} may not come here"):
            constraint.advance(new, torch.ones(2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 4.0},
        {"temperature": 1.5, "seed": 3},
        {"temperature": 9.0, "top_k": 3, "top_p": 0.8, "repetition_penalty": 1.3, "seed": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_without_measuring_only_the_symbols_logits_run_and_the_same_tokens_are_chosen(bias, options, random_model):
    for seed, codec in enumerate(CODECS):
        model, grammar = random_model(seed), Grammar(codec, 2, 2)
        if bias:
            add_logit_bias(model, 3 * torch.randn(97))
        both = [Constrained(grammar, ids_of(grammar), 97, 1, 3, measure=measure) for measure in (True, False)]
        rows = [run(model, constraint, torch.tensor([[21, 9, 44]]), **options) for constraint in both]
        assert rows[0] == rows[1] and len(rows[0][0]) > 6


def test_without_measuring_the_head_costs_its_symbols_and_no_figure_of_what_was_cut_is_made_up(random_model):
    model, read = random_model(), prefill(random_model(), torch.tensor([[21]]), 5)
    constraint = Constrained(Grammar(Codec(), 2), IDS, 97, rows=1, steps=1, measure=False)
    with FlopMeter("matmul") as meter:
        assert len(list(decode(model, read, 5, constraint=constraint))) == 5
    assert meter.by_component()["head"] == 5 * 2 * 48 * 13
    for name in ("cut", "cut_mean"):
        with pytest.raises(ValueError, match="expected a constraint with measure=True"):
            getattr(constraint, name)


def test_of_equal_logits_the_same_token_wins_without_measuring(random_model):
    """Columns in the order of the grammar's symbols would let another of them win than the full head does."""
    model = random_model()
    model.lm_head.weight.data.zero_()
    read, got = prefill(model, torch.tensor([[21]]), 30), []
    for measure in (True, False):
        constraint = Constrained(Grammar(Codec(), 2), IDS, 97, rows=1, steps=3, measure=measure)
        got.append([int(new) for new in decode(model, read, 30, constraint=constraint)])
    assert got[0] == got[1]


@pytest.fixture(scope="module")
def prompt(tokenizer):
    """80 points of a series of the data set as text, and its tokens."""
    text = Codec(2).encode(load().series[703, :80].astype(float) / 1.4)
    return text, torch.tensor([tokenizer.encode(text)])


@pytest.mark.parametrize(("constrained", "penalty"), [(True, 1.0), (True, 1.2), (False, 1.0)])
@torch.inference_mode()
def test_a_forecast_of_the_pocket_model_is_the_same_with_any_draft(constrained, penalty, pocket, tokenizer, prompt):
    text, ids = prompt
    grammar, read = Grammar(Codec(2), 2), prefill(pocket, ids, 230)

    def forecast(draft: Drafted | None, measure: bool) -> list[int]:
        constraint = Constrained.for_tokenizer(tokenizer, grammar, **LIMITS, measure=measure) if constrained else None
        options = {"repetition_penalty": penalty}
        return [int(new) for new in decode(pocket, read, 200, constraint=constraint, draft=draft, **options)]

    plain = forecast(None, measure=True)
    for nodes, measure in ((3, False), (8, False), (12, False), (12, True), (30, False)):
        assert forecast(Drafted.for_tokenizer(tokenizer, grammar, text, nodes), measure) == plain
    # A draft of another text is wrong most of the time.
    assert forecast(Drafted.for_tokenizer(tokenizer, grammar, "9.99,9.99;" * 9, 12), False) == plain


@torch.inference_mode()
def test_a_draft_saves_four_of_five_forwards_on_a_series(pocket, tokenizer, prompt):
    text, ids = prompt
    read, seen = prefill(pocket, ids, 230), []
    table = pocket.model.embed_tokens
    handle = table.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[1]))
    constraint = Constrained.for_tokenizer(tokenizer, Grammar(Codec(2), 2), **LIMITS, measure=False)
    draft = Drafted.for_tokenizer(tokenizer, Grammar(Codec(2), 2), text, 12)
    list(decode(pocket, read, 200, constraint=constraint, draft=draft))
    handle.remove()
    assert len(seen) <= 40 and max(seen) == 12


def test_a_token_that_is_no_symbol_ends_the_guesses_until_the_next_step(tokenizer):
    draft = Drafted.for_tokenizer(tokenizer, Grammar(Codec(2), 2), "1.00,2.00;1.10,1.90;1.20,1.80;", 12)
    assert len(draft.guess()) == 11
    draft.advance(tokenizer.encode("x")[0])
    assert draft.guess() == []
    draft.advance(tokenizer.encode(";")[0])
    assert len(draft.guess()) == 11
    with pytest.raises(ValueError, match="draft has 0 nodes: expected at least 1"):
        Drafted.for_tokenizer(tokenizer, Grammar(Codec(2), 2), "", 0)


class TwoTokens:
    path = "tokenizer.json"

    def encode(self, text: str) -> list[int]:
        return [1, 2] if text == ";" else [ord(text)]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda g: Constrained(g, IDS[:-1], 97, 1, 1), "expected 13 different ones, 0 to 96"),
        (lambda g: Constrained(g, [*IDS[:-1], IDS[0]], 97, 1, 1), "expected 13 different ones, 0 to 96"),
        (lambda g: Constrained(g, [*IDS[:-1], 97], 97, 1, 1), "expected 13 different ones, 0 to 96"),
        (lambda g: Constrained(g, IDS, 97, 0, 1), "0 rows of 1 steps: expected at least 1 of each"),
        (lambda g: Constrained(g, IDS, 97, 1, 0), "1 rows of 0 steps: expected at least 1 of each"),
        (lambda g: Constrained.for_tokenizer(TwoTokens(), g), r"';' is the tokens \[1, 2\]"),
    ],
)
def test_what_cannot_be_constrained_is_refused_in_one_line(make, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        make(Grammar(Codec(), 2))
    assert "\n" not in str(caught.value)
