"""The command line: one line and exit code 2 for bad input, JSON alone on stdout, an example in every --help."""

import csv
import io
import json
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import pytest
from waves import refused

from experiments import run
from experiments.accounting.predict import generation
from experiments.verbs import arguments
from qwen_min import QwenConfig, Tokenizer
from qwen_min.fast import product
from qwen_min.prices import PRIMITIVES

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "weights" / "pocket"


@pytest.mark.parametrize("verb", arguments.EXAMPLES)
def test_every_help_shows_an_example_that_parses(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # a narrow terminal's help breaks a path at its hyphens
    with pytest.raises(SystemExit) as e:
        run.main([verb, "--help"])
    assert e.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    example = arguments.EXAMPLES[verb]
    assert example in printed
    assert arguments.parser().parse_args(shlex.split(example)[3:]).verb == verb


def test_the_version_is_that_of_what_is_installed(capsys):
    with pytest.raises(SystemExit) as e:
        run.main(["--version"])
    assert (e.value.code, capsys.readouterr().out) == (0, f"qwen_min {version('qwen_min')}\n")


@pytest.mark.parametrize(("mistyped", "said"), [("gird", ": did you mean grid"), ("xyzzy", "")])
def test_a_mistyped_verb_gets_the_nearest_one(mistyped, said, capsys):
    assert refused(capsys, mistyped) == f"experiments.run: no verb '{mistyped}'{said}: see --help\n"


BAD = """
grid --lr fast; grid --steps 0; grid --ranks 0; grid --lr -1; grid --device tpu; grid --budget 1.5; grid --unknown;
train --rank 0; grid --preset x; grid --model ./nowhere; grid --config absent.toml; grid --data absent.h5;
evaluate --adapter absent; flops --model Qwen2.5-8B; flops --model Qwen/Qwen2.5-8B-Instruct --offline;
flops --model Qwen/Qwen2.5-Math-7B --offline; flops --batch 0; flops --convention paper; flops --depth -1;
flops --rank 2 --targets z_proj; flops --csv .; flops --html .; flops --calibrate;
flops --rank 2 --targets 1.mlp.up_proj --html f.html; flops --dtype float16; flops --compute-dtype int8; budget;
forecast; forecast --system 1000; generate --prompt ''; generate --prompt 1 --top-p 2;
generate --prompt 1 --sample-seed 18446744073709551616; generate --prompt '1<|im_end|>2' --chat;
generate --prompt 1 --temperature -1; data --decimals 9; data --alpha 1e300; doctor --device tpu;
pretrain-pocket --steps 0 --out p; grid --model Qwen/Qwen2.5-0.5B-Instruct --offline; grid --protocol gauss;
study --protocol gauss; study --scale 0; study --scale 2; study --best-lr -1; study --data absent.h5 --dry-run;
final --points 90 --horizon 20; baseline --num-samples 0; context --top-p 0; default --model ./nowhere; report;
report absent; report .; evaluate --part train; evaluate --repetition-penalty 0
"""


@pytest.mark.parametrize("argv", [[], *map(shlex.split, BAD.split(";"))], ids=" ".join)
def test_a_bad_argument_is_one_line_and_exit_code_2_and_nothing_is_written(argv, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    refused(capsys, *argv)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--audit", "--train"], "--audit with --train: expected one of the two"),
        (["--audit", "--csv", "x"], "--audit with --csv: expected one of the two"),
        (["--audit", "--cache", "5"], "--cache is 5 with --audit: expected 0, as most programs know no cache"),
        (["--audit", "--convention", "matmul"], "--convention is 'matmul' with --audit: expected exact, which it uses"),
        (["--audit", "--rank", "-1"], "--rank is -1: expected at least 0"),
        (["--audit", "--model", "Qwen2.5-9B"], "'Qwen2.5-9B' is not a known size: expected one of Qwen2.5-0.5B"),
        (["--markdown", "x"], "--markdown without --audit: expected both"),
        (["--measure"], "--measure with --model Qwen2.5-0.5B: expected a folder with its weights"),
        (["--measure", "--model", str(POCKET), "--train"], "--measure with --train: expected one of the two"),
        (["--measure", "--model", str(POCKET), "--audit"], "--audit with --measure: expected one of the two"),
        (["--memory", "--fit", "-1"], "--fit is -1: expected gigabytes above 0"),
        (["--memory", "--fit", "nan"], "--fit is nan: expected gigabytes above 0"),
        (["--fit", "8"], "--fit without --memory: expected both"),
        (["--memory", "--audit"], "--memory with --audit: expected one of the two"),
        (["--memory", "--measure"], "--measure with --model Qwen2.5-0.5B: expected a folder with its weights"),
        (["--memory", "--dtype", "int8"], "--dtype is 'int8': expected float32 or bfloat16"),
        (["--memory", "--context", "40000"], "40000 tokens are too long: expected at most max_position_embeddings"),
    ],
    ids=str,
)
def test_flags_of_flops_that_do_not_go_together_are_refused(flags, message, capsys):
    assert refused(capsys, "flops", *flags).startswith(message)


def hdf5(path: Path, values) -> Path:
    with h5py.File(path, "w") as file:
        file["trajectories"] = values
    return path


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (np.full((20, 100, 2), np.nan, np.float32), "nan"),
        (np.ones((20, 100)), "shape"),
        (np.ones((2, 100, 2)), "systems"),
    ],
)
def test_bad_data_is_refused_by_what_is_wrong(tmp_path, capsys, values, named):
    path = hdf5(tmp_path / "bad.h5", values)
    error = refused(capsys, "data", "--data", str(path))
    assert named in error.lower()


def test_flops_knows_a_size_by_the_hubs_name_without_a_download_but_a_folder_of_that_name_wins(capsys, monkeypatch):
    totals = []
    for name in ("Qwen2.5-7B", "Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"):
        assert run.main(["flops", "--model", name, "--offline", "--json"]) == 0
        totals.append(json.loads(capsys.readouterr().out)["forward"])
    assert len(set(totals)) == 1
    shutil.copytree(POCKET, "Qwen/Qwen2.5-7B-Instruct")
    assert run.main(["flops", "--model", "Qwen/Qwen2.5-7B-Instruct", "--offline", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forward"] < totals[0] / 1000


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, capsys, monkeypatch):
    """A shell expands that of `--out ~/x`, not that of `--out=~/x`, and nobody that of a TOML file."""
    from lora import add_lora, load_adapter, save_adapter
    from qwen_min import Qwen, Tokenizer

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(POCKET, tmp_path / "home" / "model")
    save_adapter(add_lora(Qwen.from_pretrained("~/model"), 2), "~/adapter")
    load_adapter(Qwen.from_pretrained("~/model"), "~/adapter")
    assert len(Tokenizer.from_pretrained("~/model")) == len(Tokenizer("~/model/tokenizer.json"))
    hdf5(tmp_path / "home" / "d.h5", np.linspace(0.5, 2, 1200).reshape(20, 30, 2))
    flags = ["--config=~/c.toml", "--adapter=~/adapter", "--ledger=~/l", "--out=~/f.png", "--system", "17"]
    (tmp_path / "home" / "c.toml").write_text('model = "~/model"\ndata = "~/d.h5"\npoints = 20\nhorizon = 4\n')
    assert run.main(["forecast", *flags]) == 0, capsys.readouterr().err
    assert run.main(["flops", "--model=~/model", "--plot=~/flops.png"]) == 0
    assert {"f.png", "flops.png", "l"} <= {path.name for path in (tmp_path / "home").iterdir()}
    assert run.main(["data", "--model=~/model", "--data=~/d.h5"]) == 0 and not Path("~").exists()


def test_the_flops_table_shows_formulas_whose_lines_add_up(capsys, tmp_path):
    assert run.main(["flops", "--rank", "8", "--train", "--per-layer", "--plot", "f.png"]) == 0
    printed = capsys.readouterr().out
    lines = printed[printed.index("component") :].split("\n\n")[0].splitlines()[1:]
    assert sum(int(line.split()[2].replace(",", "")) for line in lines) == 2_258_760_259_584
    assert "N·O·(2·I-1) [N=2048, I=896, O=4864]" in printed and printed.endswith("\n\nwritten: f.png\n")
    layer = next(line for line in printed.splitlines() if line.startswith("     down_proj"))
    assert layer.split()[1:] == ["428,378,947,584", "856,757,895,168", "1,285,136,842,752", "18.97%", "#"]
    assert Path("f.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("convention", ["coursework", "exact"])
def test_per_layer_a_module_has_its_own_flops_and_those_of_the_modules_inside_it(convention, capsys):
    printed = {}
    for flags in ((), ("--per-layer", "--plot", "f.png")):
        assert run.main(["flops", "--rank", "8", "--train", "--convention", convention, "--json", *flags]) == 0
        printed[flags] = json.loads(capsys.readouterr().out)
    plain, both = printed.values()
    if convention == "coursework":
        assert (plain["forward"], plain["training"]) == (2_258_760_259_584, 6_776_280_778_752)
    assert plain["convention"] == convention
    for part in ("by_module", "by_component", "by_primitive"):
        assert sum(plain[part].values()) == plain["forward"]
    layers, ops = both.pop("per_layer"), both.pop("ops")
    assert sum(op["forward"] for op in ops) == plain["forward"]
    assert both == plain | {"plot": "f.png"}
    assert layers[""] == {"forward": plain["forward"], "backward": plain["backward"]}
    for name, flops in layers.items():
        inside = [child for child in layers if child and child.rpartition(".")[0] == name]
        own = plain["by_module"].get(name, 0)
        assert flops["forward"] == own + sum(layers[child]["forward"] for child in inside), name


def tree_lines(capsys, *flags: str) -> list[str]:
    assert run.main(["flops", *flags]) == 0
    return capsys.readouterr().out.rpartition("\n\n")[2].splitlines()


def test_the_tree_of_a_model_fits_100_columns_and_goes_as_deep_as_it_is_asked_to(capsys):
    large = ("--model", "Qwen2.5-72B", "--batch", "400", "--context", "900")
    for flags in ((), ("--train",), (*large, "--train", "--convention", "exact"), large):
        lines = tree_lines(capsys, *flags, "--per-layer")
        assert max(map(len, lines)) <= 100 and any("24 x 0-23" in line or "80 x 0-79" in line for line in lines), lines
    assert tree_lines(capsys, "--rank", "8", "--depth", "1") == [
        "                     forward   share",
        "the model  2,258,760,259,584 100.00% ####################",
        " model     1,701,463,873,536  75.33% ###############",
        " lm_head     557,296,386,048  24.67% #####",
    ]


def test_the_tree_is_written_as_csv_as_speedscopes_profiles_and_as_trace_events(capsys):
    flags = ["--model", str(POCKET), "--rank", "2", "--train", "--convention", "exact"]
    files = [*("--csv", "a.csv"), *("--speedscope", "s.json"), *("--chrome", "t.json")]
    assert run.main(["flops", *flags, *files, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["csv"], shown["speedscope"], shown["chrome"]) == ("a.csv", "s.json", "t.json")
    whole = {phase: shown[phase] for phase in ("forward", "backward")}

    rows = list(csv.DictReader(Path("a.csv").read_text().splitlines()))
    assert {phase: sum(int(row[phase]) for row in rows) for phase in whole} == whole
    for row in rows:
        assert int(row["forward"]) == sum(int(row[f"forward_{name}"]) for name in PRIMITIVES)
        numbers = {name: int(n) for name, n in (pair.split("=") for pair in row["numbers"].split())}
        formula = row["formula"].replace("·", "*") or "0"
        assert int(row["forward"]) == int(row["times"]) * eval(formula, {}, numbers), row

    profiles = json.loads(Path("s.json").read_text())
    frames = [frame["name"] for frame in profiles["shared"]["frames"]]
    for profile in profiles["profiles"]:
        assert profile["endValue"] == sum(profile["weights"]) == whole[profile["name"]]
        assert len(profile["samples"]) == len(profile["weights"])
        assert all(frames[stack[0]].startswith(str(POCKET)) and len(stack) > 2 for stack in profile["samples"])
    assert "model.layers.1.mlp.up_proj linear" in frames

    events = json.loads(Path("t.json").read_text())["traceEvents"]
    roots = [event for event in events if event["name"] in whole]
    assert {event["name"]: event["args"]["flops"] for event in roots} == whole
    layers = [event for event in events if event["name"] == "1"]
    assert [event["cat"] for event in layers] == ["forward", "backward"]
    for event, root in zip(layers, roots, strict=True):
        assert root["ts"] <= event["ts"] and event["ts"] + event["dur"] <= root["ts"] + root["dur"]


def test_generate_streams_a_greedy_continuation_to_stdout(capsys):
    assert run.main(["generate", "--prompt", "1.00,2.00;1.00,2.00;1.00,2.00;", "--max-new-tokens", "30"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out) == 31 and captured.err == "[toy: the pocket model]\n"
    chat = ["--prompt", "1.00,2.00;", "--chat", "--max-new-tokens", "3", "--temperature", "1"]
    assert run.main(["generate", *chat]) == 0
    captured = capsys.readouterr()
    assert captured.out and "the pocket model cannot chat" in captured.err


def test_generate_reads_a_conversation_or_a_prompt_and_counts_what_it_cost(capsys, monkeypatch):
    """The same text by each way; a prompt of its own, whose line end is the shell's."""
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "1.00,2.00;"}]
    Path("talk.json").write_text(json.dumps(talk))
    ways: list[tuple[str, list[str]]] = [
        ("", ["--chat", "talk.json"]),
        (json.dumps(talk), ["--chat", "-"]),
        (json.dumps(talk[1:]), ["--chat", "-", "--system", "S"]),
        ("1.00,2.00;", ["--chat", "--system", "S"]),
        ("", ["--prompt", "1.00,2.00;", "--chat", "--system", "S"]),
        ("", ["--prompt", Tokenizer.chat([("system", "S"), ("user", "1.00,2.00;")])]),
        ("1.00,2.00;\n", []),
    ]
    reports = []
    for stdin, flags in ways:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        assert run.main(["generate", *flags, "--max-new-tokens", "6", "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[:-1] == [reports[0]] * 6
    config, asked = QwenConfig.from_file(POCKET / "config.json"), {**reports[-1]}
    assert asked["prompt_tokens"] == 10 and asked["new_tokens"] == len(asked["text"]) == 6 and not asked["stopped"]
    assert asked["flops"] == asked["most_flops"] == generation(config, 1, 10, 6)
    third = Tokenizer(POCKET / "tokenizer.json").encode(asked["text"])[2]
    monkeypatch.setattr("qwen_min.load.stop_ids", lambda *_: (third,))  # as the weights' folder says
    assert run.main(["generate", "--prompt", "1.00,2.00;", "--max-new-tokens", "6", "--json"]) == 0
    short = json.loads(capsys.readouterr().out)
    assert short["text"] == asked["text"][:2] and (short["new_tokens"], short["stopped"]) == (3, True)
    assert short["flops"] == generation(config, 1, 10, 3) and short["most_flops"] == asked["flops"]


@pytest.mark.parametrize(
    ("stdin", "flags", "message"),
    [
        ("{", ["--chat", "-"], "standard input: not valid JSON: expected a list of messages"),
        ("[" * 9999, ["--chat", "-"], "standard input: not valid JSON"),
        ('{"role": "user"}', ["--chat", "-"], "standard input: the conversation is {'role': 'user'}: expected a list"),
        ('[{"role": "user", "content": 3}]', ["--chat", "-"], "standard input: message 1 is {'role': 'user'"),
        ('[{"role": "tool", "content": "3"}]', ["--chat", "-"], "standard input: role is 'tool': expected one"),
        ('[{"role": "system", "content": ""}]', ["--chat", "-", "--system", "S"], "standard input: it has a sys"),
        ("", ["--chat", "nowhere"], "nowhere: No such file or directory: expected a file to read"),
        ("", ["--chat", "t.json", "--prompt", "1"], "--prompt stands beside --chat t.json: expected one of the two"),
        ("", ["--system", "S"], "--system stands without --chat: expected both"),
        ("\n", [], "the prompt is empty: expected text"),
    ],
    ids=str,
)
def test_a_conversation_that_is_none_is_one_line(stdin, flags, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    assert refused(capsys, "generate", *flags).startswith(message)


def test_data_shows_two_worked_examples(capsys, tmp_path):
    path = hdf5(tmp_path / "d.h5", np.linspace(0.5, 2, 4000).reshape(20, 100, 2))
    assert run.main(["data", "--data", str(path), "--alpha", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("text    0.50,0.50;0.50,0.50;\n") == 1
    assert "[15, 13, 20, 15, 11, 15, 13, 20, 15, 26" in printed and "a series is 1000 tokens" in printed
    assert "round trip of 3 series" in printed


def test_doctor_finds_the_pocket_model_and_says_what_to_do_about_the_rest(capsys):
    assert run.main(["doctor", "--offline"]) == 0
    printed = capsys.readouterr().out
    assert "ok  model.safetensors sha256" in printed and "--  no ledger.sqlite yet" in printed
    assert ("ok  the kernel for bfloat16" in printed) == product.available()
    assert run.main(["doctor", "--offline", "--model", "./nowhere"]) == 0
    assert "--  model ./nowhere: no such folder" in capsys.readouterr().out


def test_help_and_a_mistyped_verb_need_no_torch():
    code = (
        "import sys; sys.argv = ['run', 'nonsense']\ntry:\n from experiments import run; run.main()\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_a_closed_pipe_is_no_error():
    command = ["bash", "-o", "pipefail", "-c", '"$0" -m experiments.run flops --per-layer | head -1', sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Broken" not in done.stderr, done.stderr
