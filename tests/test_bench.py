"""The benchmark: floors by hand, lines from made-up measurements, every job on a tiny model, and the command itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from waves import refused, tiny_model

from experiments import plots, run
from experiments.bench import cases, compare, floors, scaling, session, sides, table
from experiments.bench.cases import Case, Target
from experiments.bench.session import Options, bench
from experiments.bench.texts import Texts
from experiments.run_folder import files
from experiments.run_folder.errors import RunFailed
from qwen_min import QwenConfig

# peft asks transformers by a name that it deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EVERY_QUICK_CASE = [
    *("train 2x64", "train 2x64, 13 symbols", "evaluate 2x64", "evaluate 2x64, 13 symbols", "generate 1x40+21"),
    *("generate 1x40+21, 13 symbols", "generate 1x40+21, symbol tree", "generate 4x20+21, 13 symbols"),
    *("forecast 6 series, 8 to 2", "load", "count"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory) -> tuple[dict, Path, list[str]]:
    """Every quick case, with the jobs in this process: the report, its folder, and what was said on the way."""
    folder, said = tmp_path_factory.mktemp("bench"), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "fresh", lambda job, name: sides.run(json.loads(json.dumps(job))))
        report = bench(Options(checkpoint, repeats=1, series=6, quick=True), folder, said.append)
    return report, folder, said


# Floors


def test_the_floor_of_a_forward_is_its_products_with_half_of_the_square_of_attention(make_config):
    n, e, f, v = 2 * 8, 48, 80, 97  # 2 sequences of 8 tokens
    layer = 2 * n * (e * e + 2 * e * 16 + e * e + 3 * e * f)
    attention = 2 * 2 * (2 * 6) * (8 * 9 // 2) * 8  # scores and values of 12 heads of 8, 36 pairs of tokens
    assert floors.step(make_config(), 2, 8) == floors.Work(2 * (layer + attention) + 2 * n * e * v)
    assert floors.step(make_config(), 2, 8, symbols=13).flops == 2 * (layer + attention) + 2 * n * e * 13


def test_the_floor_of_a_step_has_no_gradient_of_a_frozen_weight_and_none_below_the_first_adapter(make_config):
    n, e, f, v, r = 2 * 8, 48, 80, 97, 4
    q, kv, mlp, head = 2 * n * e * e, 2 * n * e * 16, 3 * 2 * n * e * f, 2 * n * e * v
    product = 2 * (2 * 6) * 36 * 8  # scores of the pairs of tokens that may see each other; values cost the same
    into, out = 2 * (2 * n * e * r), 2 * n * r * e + 2 * n * r * 16  # A and B of q and v
    forward = 2 * (q + 2 * kv + q + mlp + 2 * product + into + out) + head
    second = q + 2 * kv + q + mlp + 2 * 2 * product + 2 * into + 2 * out
    # In the first layer keys have no gradient, and the input of q, k, v and A has none.
    first = q + mlp + product + 2 * product + into + 2 * out
    assert floors.step(make_config(), 2, 8, rank=r).flops == forward + first + second + head


def test_the_floor_of_decoding_reads_the_weights_as_kept_and_the_cache_once_a_forward(make_config):
    config = make_config()
    weights = 2 * (48 * 48 + 48 + 2 * (48 * 16 + 16) + 48 * 48 + 3 * 48 * 80 + 2 * 48) + 48 + 97 * 48
    token = 2 * 2 * 16 * 4  # keys and values of 2 layers, 16 wide, float32
    attended = 11 + 12 + 13 + 14  # the first of 5 new tokens is the prefill's
    one = floors.decode(config, 1, 10, 5, torch.bfloat16)
    assert one.bytes == 4 * weights * 2 + attended * token
    assert floors.decode(config, 3, 10, 5, torch.float32).bytes == 4 * weights * 4 + 3 * attended * token
    symbols = floors.decode(config, 1, 10, 5, torch.bfloat16, symbols=13)
    assert one.bytes - symbols.bytes == 4 * (97 - 13) * 48 * 2
    assert one.flops - symbols.flops == 4 * (97 - 13) * 48 * 2
    assert floors.decode(config, 1, 10, 5, torch.bfloat16, forwards=2).bytes == 2 * weights * 2 + 25 * token
    assert floors.decode(config, 1, 10, 1, torch.bfloat16) == floors.Work(0, 0)


def test_a_floor_is_the_longer_of_products_and_reads():
    assert floors.Work(600, 10).seconds(100, 10) == 6
    assert floors.Work(600, 90).seconds(100, 10) == 9


# Lines from made-up measurements

STEP = Case("train", "a step", {"job": "train"}, (Target("ratio", 1.7), Target("share", 0.8)))
TOKENS = Case("generate", "tokens", {"job": "generate", "batch": 2, "new": 3}, unit="tokens/s")


def measured(*seconds: float, peak: int = 10**9, **found) -> dict:
    return {"seconds": list(seconds), "peak_bytes": peak, "baseline_bytes": 10**8, "found": found}


def generated(tokens: list[list[int]], **more) -> dict:
    return measured(2.0, tokens=tokens, forwards=2) | {"whole": [3.0]} | more


def test_a_line_has_medians_spreads_the_ratio_and_the_share_of_the_floor():
    runs = {
        "ours": [measured(3.0, 2.0, loss=1.0), measured(2.5, 9.0, peak=2 * 10**9, loss=1.0)],
        "peer": [measured(5.0, peak=8 * 10**9, loss=1.0), measured(5.5, 6.0, loss=1.0)],
    }
    line = compare.against(STEP, compare.judge(STEP, runs, "float32"), floor=2.2)
    assert (line["ours"]["seconds"], line["ours"]["seconds_spread"]) == (2.75, [2.0, 9.0])
    assert (line["peer"]["seconds"], line["peer"]["seconds_spread"]) == (5.5, [5.0, 6.0])
    assert line["ratio"] == 2.0 and line["memory_ratio"] == 4.0 and line["share"] == pytest.approx(0.8)
    assert [t["met"] for t in line["targets"]] == [True, True]
    slower = compare.against(STEP, compare.judge(STEP, runs, "float32"), floor=1.0)
    assert [t["met"] for t in slower["targets"]] == [True, False]
    assert compare.against(STEP, line, floor=1.0, targets=False)["targets"] == []


def test_a_target_is_met_from_its_bound_on():
    ratio, peak = Target("ratio", 1.7), Target("peak_bytes", 2.5e9, most=True)
    met = ratio.met(1.7), ratio.met(1.69), peak.met(2.5e9), peak.met(2.6e9)
    assert met == (True, False, True, False)


def test_decoding_is_measured_apart_from_the_prefill():
    tokens = [[1, 2, 3], [4, 5, 6]]
    peer = generated(tokens) | {"seconds": [4.0], "whole": [9.0]}
    line = compare.judge(TOKENS, {"ours": [generated(tokens)], "peer": [peer]}, "float32")
    assert line["ours"]["tokens_per_second"] == 2.0  # of each of two rows two, in two seconds
    assert line["ours"]["whole_tokens_per_second"] == 2.0 and line["ours"]["tokens_per_forward"] == 1.0
    assert line["ratio"] == 2.0 and line["same"] == "6 tokens equal"
    report = fake_report([compare.against(TOKENS, line, None)])
    assert "tokens: with the prefill 2.0 tokens/s, the peer 0.7, 3.00x" in table.text(report)


def fake_report(lines: list[dict]) -> dict:
    rates = {"flops_per_second": 3e11, "bytes_per_second": 2e10}
    machine = {"processor": "a processor", "threads": 2, "versions": {"torch": "2"}}
    texts = {"model": "m", "label": "", "device": "cpu", "dtype": "bfloat16", "compute": "float32", "kernels": "torch"}
    return {"cases": lines, "calibration": compare.calibrated([rates]), "machine": machine, "repeats": 3} | texts


def test_the_table_has_an_aligned_line_for_each_case_and_says_what_was_met():
    runs = {"ours": [measured(3.0, loss=1.0)], "peer": [measured(6.0, loss=1.0)]}
    line = compare.against(STEP, compare.judge(STEP, runs, "float32"), floor=1.5)
    alone = compare.against(STEP, compare.judge(STEP, {"ours": [measured(0.5)]}, "float32"), None)
    lines = table.text(fake_report([line, alone | {"name": "another step"}])).splitlines()
    start = next(i for i, text in enumerate(lines) if text.startswith("case "))
    head, first, second = lines[start : start + 3]
    assert first.split("  ")[0] == "a step" and second.split("  ")[0] == "another step"
    for name, cell in {"ours": "3.00 s (3.00-3.00)", "faster": "2.00x", "of the floor": "50 %"}.items():
        assert first[head.index(name) :].startswith(cell)
    assert first.endswith("1.7x met, 80 % of the floor MISSED")
    assert second[head.index("peer") :].split() == ["-", "-", "-", "1.00", "GB", "-", "-"]
    assert table.markdown(fake_report([line])).count("\n| a step |") == 1


def test_of_all_calibrations_the_best_rate_counts():
    found = compare.calibrated([{"flops_per_second": f, "bytes_per_second": b} for f, b in ((1, 6), (3, 5), (2, 4))])
    assert (found["flops_per_second"], found["bytes_per_second"]) == (3, 6)
    assert (found["flops_per_second_spread"], found["bytes_per_second_spread"]) == ([1, 3], [4, 6])


# A case whose two sides differ


LOSSES = [(2.0, 2.0001), (float("nan"), 2.0), (2.0, float("nan")), (0.0, 2.0)]


@pytest.mark.parametrize(
    ("name", "ours", "peer", "said"),
    [*(("loss", *pair, "losses are") for pair in LOSSES), ("values", [[1.0]], [[1.01]], "forecasts differ")],
)
def test_another_loss_and_other_forecasts_are_refused_by_the_name_of_the_case(name, ours, peer, said):
    runs = {"ours": [measured(1.0, **{name: ours})], "peer": [measured(1.0, **{name: peer})]}
    with pytest.raises(RunFailed, match=f"bench: a step: the {said}"):
        compare.judge(STEP, runs, "float32")
    near = {"ours": [measured(1.0, loss=2.0)], "peer": [measured(1.0, loss=2.000001)]}
    assert compare.judge(STEP, near, "float32")["loss_error"] == pytest.approx(5e-7, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t | {"b": torch.zeros(3)}, "gradient b is zero"),
        (lambda t: {"a": t["a"]}, "has b on one side alone"),
        (lambda t: t | {"a": t["a"] * 1.001}, "gradient is .* apart: expected 0.0001 at most"),
        (lambda t: t | {"b": -t["b"]}, "gradient b is 2.0e[+]00 apart"),
        (lambda t: t | {"a": t["a"] * float("nan")}, "a is zero|apart"),
    ],
)
def test_another_gradient_is_refused_by_the_name_of_the_case(tmp_path, change, problem):
    gradients = {"a": torch.ones(400), "b": 1e-6 * torch.ones(3)}
    save_file(gradients, tmp_path / "peer")
    for name, tensors in {"near": {n: g * (1 + 5e-5) for n, g in gradients.items()}, "far": change(gradients)}.items():
        save_file(tensors, tmp_path / name)
    peer = measured(1.0) | {"arrays": str(tmp_path / "peer")}
    near, far = (measured(1.0) | {"arrays": str(tmp_path / name)} for name in ("near", "far"))
    line = compare.judge(STEP, {"ours": [near], "peer": [peer]}, "float32")
    assert line["gradient_error"] == pytest.approx(5e-5, rel=1e-2) and line["same"] == "gradient to 5e-05"
    with pytest.raises(RunFailed, match=f"bench: a step: the .*{problem}"):
        compare.judge(STEP, {"ours": [near, far], "peer": [peer, peer]}, "float32")


def test_other_tokens_are_refused_unless_the_two_likeliest_tie():
    ours, peer = [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 7]]
    runs = {"ours": [generated(peer), generated(ours)], "peer": [generated(peer)]}
    with pytest.raises(RunFailed, match="bench: tokens: the greedy tokens differ: token 2 of row 1 is 5 and 9"):
        compare.judge(TOKENS, runs, "float32")
    tie, wide = {(1, (4,), 5, 9): 1e-5}, {(1, (4,), 5, 9): 1e-2}
    same = compare.judge(TOKENS, runs, "float32", lambda partings: [tie[one] for one in partings])["same"]
    assert same == "6 tokens equal, but for 1 rows that diverge at a tie (within 1e-05)"
    with pytest.raises(RunFailed, match="1.0e-02 apart: expected the same from both sides, but for ties"):
        compare.judge(TOKENS, runs, "float32", lambda partings: [wide[one] for one in partings])


# Every job on a tiny model, beside transformers and PEFT


def test_every_case_computes_the_same_as_the_peer(whole):
    lines = {line["name"]: line for line in whole[0]["cases"]}
    assert list(lines) == EVERY_QUICK_CASE
    for name, line in lines.items():
        if name != "count":
            assert line["peer"]["seconds"] > 0 and line["ratio"] > 0
        assert (line.get("share", 0) > 0) == (name not in ("load", "count"))
        assert line["ours"]["peak_bytes"] >= line["ours"]["baseline_bytes"] > 10**7
        assert line["targets"] == [], "the targets are those of the 0.5B model"
    for name in EVERY_QUICK_CASE[:4]:
        assert lines[name]["loss_error"] < 1e-5
    for name in EVERY_QUICK_CASE[:2]:
        assert 0 < lines[name]["gradient_error"] < 1e-4
    same = [lines[name]["same"] for name in EVERY_QUICK_CASE[4:9]]
    assert same == [*["21 tokens equal"] * 3, "84 tokens equal", "6 steps equal"]
    load = lines["load"]["ours"]
    assert lines["load"]["same"].startswith("logits to ") and load["whole_seconds"] > load["seconds"]
    assert f"load: to the first logits ours {load['whole_seconds']:.2f} s, peer " in table.text(whole[0])
    assert lines["generate 1x40+21, 13 symbols"]["ours"]["tokens_per_forward"] == 1
    assert lines["generate 1x40+21, symbol tree"]["ours"]["tokens_per_forward"] >= 1
    low, high = lines["count"]["ours"]["overhead_spread"]
    assert low <= lines["count"]["ours"]["overhead"] <= high


def test_the_files_hold_what_is_returned(whole):
    report, folder, said = whole
    assert files.read_json(folder / "bench.json") == json.loads(json.dumps(report))
    assert (folder / "bench.md").read_text() == table.markdown(report)
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in folder.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert said[0] == said[-1] == "calibration: matrix products, reads"
    assert said[1:3] == ["train 2x64: ours, 1 of 1", "train 2x64: peer, 1 of 1"] and len(said) == 2 * 11 - 1 + 2
    assert report["calibration"]["flops_per_second"] > 0 and report["machine"]["threads"] >= 1


def test_tokens_of_jobs_are_the_text_of_validation_series(checkpoint):
    texts = Texts(checkpoint)
    first, second = texts.windows(2, 1500)
    decode = texts.task.tokenizer.decode
    assert decode(first).startswith(texts.task.text(700)) and decode(second).startswith(texts.task.text(701))
    assert texts.task.text(701)[:40] in decode(first)  # after the end of series 700
    assert len(first) == len(second) == 1500
    prompts = texts.prompts(200, 40)
    assert all(decode(p).endswith(";") and decode(p).count(";") == 4 for p in prompts) and prompts[0] != prompts[1]
    with pytest.raises(ValueError, match="no series ends a step at token 41: expected a multiple of 10"):
        texts.prompts(1, 41)


def test_a_side_that_computes_something_else_is_refused(checkpoint, tmp_path, monkeypatch):
    """The peer reads other weights: each case must see it."""
    other = tiny_model(tmp_path / "other", seed=1)

    def fresh(job, name):
        return sides.run(job | ({"model": str(other)} if job["who"] == "peer" else {}))

    monkeypatch.setattr(session, "fresh", fresh)
    options = Options(checkpoint, repeats=1, series=2, quick=True)
    one = session.Session(options, lambda line: None)
    (tmp_path / "arrays").mkdir()
    one.arrays = tmp_path / "arrays"
    for case in cases.cases(quick=True, series=2, draft=4):
        if case.name != "count":
            with pytest.raises(RunFailed, match=f"^bench: {case.name.replace('+', '[+]')}: "):
                one.measure(case)


# Interrupted, and the sizes


RATES = {"flops_per_second": 1e11, "bytes_per_second": 1e10, "threads": 2}


def pretended(monkeypatch, stop_at: str = "") -> list[dict]:
    """Jobs that only say what they were asked; the one of the case `stop_at` is interrupted."""
    jobs = []

    def fresh(job, name):
        jobs.append(job)
        if name == stop_at:
            raise KeyboardInterrupt
        if job["job"] == "calibrate":
            return RATES
        overhead = {"overhead": 0.01, "overhead_spread": [0.0, 0.02]}
        return measured(2.0, forwards=job.get("new", 1) - 1) | {"whole": [3.0]} | overhead

    monkeypatch.setattr(session, "fresh", fresh)
    return jobs


def test_an_interrupted_run_keeps_what_it_measured(checkpoint, tmp_path, monkeypatch, capsys):
    pretended(monkeypatch, stop_at="generate 1x40+21")
    argv = ["bench", "--model", str(checkpoint), "--quick", "--peer", "none", "--out", str(tmp_path)]
    assert run.main(argv) == 130
    captured = capsys.readouterr()
    kept = files.read_json(tmp_path / "bench" / "bench.json")
    assert [line["name"] for line in kept["cases"]] == EVERY_QUICK_CASE[:4]
    assert captured.out == "" and captured.err.splitlines()[-1].endswith(f"until then is in {tmp_path / 'bench'}")
    begun = ["bench: calibration: matrix products, reads", "bench: train 2x64: ours, 1 of 1"]
    assert captured.err.splitlines()[:2] == begun


def test_sides_take_turns_between_calibrations(checkpoint, tmp_path, monkeypatch):
    jobs = pretended(monkeypatch)
    bench(Options(checkpoint, whats=("evaluate",), peer="transformers", repeats=2, series=3), tmp_path)
    assert [job.get("job") if job["job"] == "calibrate" else job["who"] for job in jobs] == [
        "calibrate",
        *(*["ours", "peer"] * 2, "calibrate"),
        *(*["ours", "peer"] * 2, "calibrate"),
    ]
    sizes = {(len(job["ids"]), len(job["ids"][0])) for job in jobs if job["job"] == "evaluate"}
    assert sizes == {(4, 513)}


def test_targets_are_those_of_the_real_model_on_a_cpu_at_full_size():
    real = QwenConfig.named("Qwen2.5-0.5B")
    assert cases.has_targets(real, "cpu", quick=False)
    assert not cases.has_targets(real, "cuda", quick=False) and not cases.has_targets(real, "cpu", quick=True)
    assert not cases.has_targets(QwenConfig.named("Qwen2.5-1.5B"), "cpu", quick=False)
    every = {case.name: ", ".join(map(str, case.targets)) for case in cases.cases(False, 150, 12)}
    assert every["train 4x512"] == "1.7x, 80 % of the floor, 2.5 GB, loss to 1e-06, gradient to 0.0001"
    assert every["generate 1x800+100, symbol tree"] == "60 tokens/s, 6x"
    assert (every["load"], every["count"]) == ("0.3 s, 1 GB beside the libraries", "1 %")


def test_scaling_sweeps_each_size_and_omits_what_the_model_cannot_read(checkpoint, tmp_path, monkeypatch, make_config):
    jobs, said = pretended(monkeypatch), list[str]()
    short = make_config(vocab_size=259, max_position_embeddings=1024)
    monkeypatch.setattr(session.QwenConfig, "from_file", lambda path: short)
    report = scaling.scale(Options(checkpoint, peer="none", repeats=1), tmp_path, said.append)
    sizes: dict[str, list[int]] = {}
    for point in report["points"]:
        sizes.setdefault(point["axis"], []).append(point["value"])
    assert sizes == {
        "context of a step, batch 1": [128, 256, 512, 1024],
        "batch of a step, 256 tokens": [1, 2, 4, 8],
        "rank of a step, 1x512 tokens": [2, 4, 8, 16, 32, 64],
        "prompt of a generation, one series": [100, 200, 400, 800],
        "series of a generation, prompt 200": [1, 4, 16, 64],
    }
    assert [line for line in said if "left out" in line] == [
        "context of a step, batch 1, 2048: left out, the model reads 1024 tokens at most",
        "prompt of a generation, one series, 1600: left out, the model reads 1024 tokens at most",
    ]
    assert all(job["who"] == "ours" for job in jobs)
    columns, rows = files.read_csv(tmp_path / "scaling.csv")
    assert len(rows) == 22 and rows[0]["ours_seconds"] == "2.0" and rows[0]["peer_seconds"] == ""
    floor = {row["size"]: float(row["floor_seconds"]) for row in rows[:4]}
    assert floor["128"] == floors.step(short, 1, 128, rank=8).flops / 1e11
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert len(table.scaling_text(report).splitlines()) == 4 + 1 + 1 + 22


# The command


def test_the_command_measures_in_fresh_processes_and_prints_the_table(checkpoint, monkeypatch, capfd):
    """But for the rates, which are made up, and our side, which the offline run of the verb measures in one."""
    true = session.fresh

    def fresh(job, name):
        return RATES if job["job"] == "calibrate" else sides.run(job) if job["who"] == "ours" else true(job, name)

    monkeypatch.setattr(session, "fresh", fresh)
    assert run.main(["bench", "--model", str(checkpoint), "--quick", "--what", "load,"]) == 0
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("case "))
    assert [line.split("  ")[0] for line in lines[start + 1 : start + 3]] == ["load", ""]
    calibration = "bench: calibration: matrix products, reads"
    turns = ["bench: load: ours, 1 of 1", "bench: load: peer, 1 of 1"]
    assert printed.err.splitlines() == [calibration, *turns, calibration]
    assert sorted(p.name for p in Path("runs/bench").iterdir()) == ["bench.json", "bench.md", "bench.png"]


def test_two_sides_that_differ_are_one_line_and_exit_code_4(tmp_path, monkeypatch, capsys):
    """Weights that are no bfloat16 numbers, kept in bfloat16: another model than the peer's."""
    monkeypatch.setattr(session, "fresh", lambda job, name: sides.run(job))
    model = tiny_model(tmp_path / "model", torch.float32)
    argv = ["bench", "--model", str(model), "--quick", "--what", "load", "--out", str(tmp_path)]
    assert run.main(argv) == 4
    captured = capsys.readouterr()
    *progress, error = captured.err.splitlines()
    assert captured.out == "" and all(line.startswith("bench: ") for line in progress) and len(progress) == 3
    assert error.startswith("bench: load: the logits") and "apart: expected" in error
    assert not (tmp_path / "bench").exists()
    assert run.main([*argv, "--dtype", "float32"]) == 0


def test_a_process_that_fails_is_named_by_its_case():
    with pytest.raises(RunFailed, match="^bench: my case: the process of ours failed .KeyError: 'compute'.: expected"):
        session.fresh({"job": "calibrate", "who": "ours"}, "my case")


def test_json_is_one_object_and_nothing_else(checkpoint, tmp_path, monkeypatch, capsys):
    pretended(monkeypatch)
    monkeypatch.setattr(plots, "bench_scaling", lambda *_: None)
    argv = ["bench", "--model", str(checkpoint), "--quick", "--peer", "none", "--json", "--out", str(tmp_path)]
    assert run.main([*argv, "--what", "count"]) == 0
    assert json.loads(capsys.readouterr().out) == files.read_json(tmp_path / "bench" / "bench.json")
    assert run.main([*argv, "--scaling"]) == 0
    assert json.loads(capsys.readouterr().out) == files.read_json(tmp_path / "bench" / "scaling.json")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--what", "train,sleep"], "sleep: expected train, evaluate, generate, load, count"),
        (["--what", ","], "--what is empty"),
        (["--peer", "llama.cpp"], "transformers or none"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--series", "0"], "--series is 0"),
        (["--draft", "0"], "--draft is 0"),
        (["--dtype", "float16"], "float32 or bfloat16"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--device", "cuda:999"], "device is 'cuda:999': expected cpu, "),
        (["--model", "./nowhere"], "no such folder"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(argv, named, tmp_path, capsys):
    assert named in refused(capsys, "bench", *argv)
    assert list(tmp_path.iterdir()) == []


def test_a_peer_that_is_not_installed_is_said_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(session.util, "find_spec", lambda name: None if name == "peft" else True)
    with pytest.raises(ValueError, match="the peer needs peft, not installed here: expected .* or --peer none"):
        Options(tmp_path)
    assert Options(tmp_path, peer="none").peer == "none"


@pytest.mark.parametrize("flags", [["--quick"], ["--scaling"]])
def test_a_damaged_checkpoint_is_one_line_and_exit_code_2_before_anything_runs(flags, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(session, "fresh", None)
    shutil.copytree(checkpoint, "model")
    weights = Path("model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    assert f"{weights}: cannot be read" in refused(capsys, "bench", "--model", "model", "--out", "out", *flags)
