"""Guesses at how a text goes on: always grammatical, likeliest first, right about what is regular; and the flag."""

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
from waves import refused

from data.draft import SeriesDraft
from data.grammar import Grammar
from data.llmtime import Codec, training_maximum
from data.lotka_volterra import load
from experiments import run
from experiments.forecasting import forecast as evaluate
from experiments.settings.record import Settings
from experiments.task.model import prepare
from qwen_min import FlopMeter

CODECS = [Codec(2), Codec(0), Codec(1, 2), Codec(3, shortest=True), Codec(2, point=False), Codec(separator=" ")]


def paths(guesses: list[tuple[int, str]]) -> list[str]:
    said = [""]
    for number, (parent, symbol) in enumerate(guesses, 1):
        assert 0 <= parent < number
        said.append(said[parent] + symbol)
    return said[1:]


def wave(variables: int, steps: int, seed: int = 0) -> np.ndarray:
    """A smooth series, (steps, V), between 0.5 and 9.5."""
    phase = np.random.default_rng(seed).uniform(0, 6, variables)
    return 5 + 4.5 * np.sin(np.arange(steps)[:, None] / 3 + phase) * np.cos(np.arange(steps)[:, None] / 17)


def tokens_a_forward(draft: SeriesDraft, text: str, nodes: int) -> float:
    """How many symbols of `text` a forward of so many nodes yields: those guessed, and the one that ends them."""
    forwards, place = 0, 0
    while place < len(text):
        said = set(paths(draft.guess(nodes - 1)))
        start = place
        while place < len(text) and text[start : place + 1] in said:
            place += 1
        place += 1
        forwards += 1
        for symbol in text[start:place]:
            draft.advance(symbol)
    return len(text) / forwards


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("variables", [1, 2, 3])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_every_guess_is_grammatical_and_fewer_guesses_are_the_first_of_more(codec, variables, signed):
    grammar = Grammar(codec, variables, 3, signed)
    series = (wave(variables, 30) - 5 * signed) * np.linspace(1, 30, 30)[:, None]
    whole = codec.encode(series)
    prompt = codec.encode(series[:20])
    draft = SeriesDraft(grammar, prompt)
    for end, symbol in enumerate(whole[len(prompt) :], len(prompt)):
        guesses = draft.guess(15)
        said = paths(guesses)
        assert len(said) == len(set(said)) == 15 and draft.guess(6) == guesses[:6]
        for path in said:
            state = grammar.step_ends
            for written in whole[:end].rpartition(";")[2] + path:
                state = grammar.next[state, grammar.symbols.index(written)]
                assert state >= 0, (whole[end - 12 : end], path)
        draft.advance(symbol)


def test_what_the_grammar_forces_is_guessed_wherever_it_comes_next():
    draft, forced = SeriesDraft(Grammar(Codec(2), 2), "1.00,2.00;5.00,0.30;4.00,9.30;"), 0
    for symbol in "3.14,1.59;2.65,3.58;":
        if symbol in ".,;":
            forced += 1
            assert draft.guess(1) == [(0, symbol)]
        draft.advance(symbol)
    assert forced == 8


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_parabola_is_guessed_without_a_branch(codec):
    time = np.arange(15)
    series = np.stack((10 + time, 200 - time**2), 1) / 10**codec.decimals
    text, end = codec.encode(series[:14]), codec.encode(series[14:])
    draft = SeriesDraft(Grammar(codec, 2, 3), text)
    assert paths(draft.guess(len(end))) == [end[:n] for n in range(1, len(end) + 1)]


def test_a_series_that_repeats_itself_is_guessed_without_a_branch():
    period = ["1.07,2.11;", "8.90,0.20;", "0.33,7.14;", "4.01,4.44;", "9.15,5.06;"]
    draft = SeriesDraft(Grammar(Codec(2), 2), "".join(period * 6) + "1.07,2.11;8.90,0.20;0")
    ahead = ".33,7.14;4.01,4.44;"
    assert paths(draft.guess(len(ahead))) == [ahead[:n] for n in range(1, len(ahead) + 1)]


def test_a_rule_that_is_always_right_is_believed_over_one_that_is_nearly():
    ahead = "5.00;5.01;" * 4
    draft = SeriesDraft(Grammar(Codec(2), 1), "5.00;5.01;" * 15)  # the parabola expects 5.04 and 4.97
    assert paths(draft.guess(len(ahead))) == [ahead[:n] for n in range(1, len(ahead) + 1)]


def test_where_the_last_digit_is_uncertain_its_alternatives_are_guessed_nearest_first():
    errors = np.random.default_rng(0).integers(-2, 3, 40)
    text = Codec(2).encode((500 + errors)[:, None] / 100)
    draft = SeriesDraft(Grammar(Codec(2), 1), text + "5.0")
    digits = [symbol for parent, symbol in draft.guess(20) if parent == 0]
    middle = int(digits[0])
    assert len(digits) >= 4
    distances = [abs(int(digit) - middle) for digit in digits]
    assert distances[1] == 1 and max(distances) <= 5


def test_a_number_like_none_that_was_expected_is_guessed_by_the_grammar_alone():
    draft = SeriesDraft(Grammar(Codec(2), 1), "1.00;" * 20 + "9")
    assert draft.guess(1) == [(0, ".")]
    assert {symbol for parent, symbol in draft.guess(11) if parent == 1} == set("0123456789")


@pytest.mark.parametrize("text", ["", "1.00,2.00;", "1.00,2.00;1.00,2.00;", "1.00,2.00;1.0"])
def test_few_steps_or_none_are_no_error(text):
    draft = SeriesDraft(Grammar(Codec(2), 2), text)
    for symbol in "1.10,2.10;1.20,2.20;1.30,2.30;1.40,2.40;" if text[-1:] in ("", ";") else "0,2.00;1.00,2.00;":
        assert 1 <= len(draft.guess(9)) <= 9
        draft.advance(symbol)


def test_text_that_is_no_series_ends_the_guesses_until_the_next_step_and_teaches_nothing():
    text = Codec(2).encode(wave(2, 20))
    clean, spoiled = (SeriesDraft(Grammar(Codec(2), 2), text) for _ in range(2))
    for symbol in "1.x,9":
        spoiled.advance(symbol)
        assert ("x" in spoiled._step) == (spoiled.guess(5) == [])
    spoiled.advance(";")
    assert spoiled.guess(30) == clean.guess(30) != []


def test_no_guesses_are_made_where_none_are_asked_for():
    assert SeriesDraft(Grammar(Codec(2), 2), "1.00,2.00;" * 5).guess(0) == []


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("codec", "least"), list(zip(CODECS, [4.0, 3.0, 4.5, 3.0, 3.5, 5.0], strict=True)), ids=str)
def test_a_smooth_series_of_any_encoding_goes_several_tokens_a_forward(codec, least, signed):
    series = wave(2, 60) - 5 * signed
    draft = SeriesDraft(Grammar(codec, 2, 2, signed), codec.encode(series[:40]))
    assert tokens_a_forward(draft, codec.encode(series[40:]), 12) > least


def test_on_true_series_twelve_nodes_yield_six_tokens_a_forward():
    series, codec = load().series.astype(float), Codec(2)
    series /= training_maximum(series[:700])
    for nodes, least in ((1, 1.0), (4, 2.9), (12, 5.5)):
        got = []
        for one in series[700:850:50]:
            draft = SeriesDraft(Grammar(codec, 2), codec.encode(one[:80]))
            got.append(tokens_a_forward(draft, codec.encode(one[80:]), nodes))
        assert np.mean(got) >= least and (nodes > 1 or got == [1.0] * 3)


@pytest.fixture
def file(tmp_path):
    with h5py.File("d.h5", "w") as hdf5:
        hdf5["trajectories"] = np.stack([wave(2, 30, seed) for seed in range(20)])
    return tmp_path / "d.h5"


def flags(file, *more: str) -> list[str]:
    return ["forecast", "--system", "17", "--data", str(file), "--points", "20", "--horizon", "4", *more]


def test_a_forecast_with_a_draft_is_the_same_and_is_charged_what_ran(file, capsys):
    printed, spent = [], []
    for draft in ("0", "12"):
        assert run.main(flags(file, "--draft", draft, "--ledger", f"{draft}.sqlite")) == 0
        printed.append(capsys.readouterr().out.splitlines()[:-1])
        assert run.main(["budget", "--ledger", f"{draft}.sqlite", "--json"]) == 0
        totals = json.loads(capsys.readouterr().out)["totals"]
        spent.append((totals["validation"], totals["inference"]))
    assert printed[0] == printed[1] and any("model" in line for line in printed[0])
    assert spent[0][0] == spent[1][0] and spent[0][1] != spent[1][1]


@pytest.mark.parametrize("constrained", [True, False])
def test_what_is_reserved_for_a_draft_is_enough_and_what_is_spent_is_what_the_meter_saw(file, constrained):
    task, model = prepare(Settings(data=str(file), points=20, horizon=4, constrained=constrained), None)
    plain = evaluate.forecast(task, model, [17])
    for nodes in (1, 2, 12, 40):
        expected = evaluate.predicted(task, model.config, [17], rank=0, draft=nodes)
        with FlopMeter() as meter:
            made = evaluate.forecast(task, model, [17], nodes)
        assert sum(made.flops.values()) == meter.total
        assert made.flops["validation"] == expected["validation"]
        assert made.flops["inference"] <= expected["inference"]
        np.testing.assert_array_equal(made.values, plain.values)
        assert made.cut is None and (plain.cut is not None) == constrained
    # A tree of one node is no guess: without a constraint the prediction is exact, but for text that ends early.
    one, none = (evaluate.predicted(task, model.config, [17], rank=0, draft=nodes) for nodes in (1, 0))
    assert one == none


def test_a_draft_needs_no_positions_beyond_those_of_the_forecast(file):
    task, model = prepare(Settings(data=str(file), points=20, horizon=4), None)
    config = replace(model.config, max_position_embeddings=239)  # the last token is not read
    model.config = model.model.config = config
    plain, drafted = (evaluate.forecast(task, model, [17], nodes) for nodes in (0, 12))
    np.testing.assert_array_equal(drafted.values, plain.values)
    assert drafted.flops["inference"] <= evaluate.predicted(task, config, [17], rank=0, draft=12)["inference"]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--draft", "-1"], "draft is -1: expected 0 (off) to 1000"),
        (["--draft", "100000"], "draft is 100000: expected 0 (off) to 1000"),
        (["--draft", "12", "--temperature", "1"], "draft is 12 with sampling (temperature 1, constrained"),
        (["--draft", "12", "--num-samples", "3"], "samples, constrained to valid text): expected greedy"),
    ],
    ids=str,
)
def test_a_draft_with_sampling_is_refused_in_one_line(more, problem, file, capsys):
    assert problem in refused(capsys, *flags(file, *more))


def test_a_draft_of_several_systems_is_refused(file):
    task, model = prepare(Settings(data=str(file), points=20, horizon=4), None)
    with pytest.raises(ValueError, match="draft is 12 with 2 systems: expected one"):
        evaluate.forecast(task, model, [17, 18], 12)
