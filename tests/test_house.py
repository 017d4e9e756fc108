"""Rules of the house that a program can check: the direction of imports, and what may never be in the code."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each room may import of ours, itself aside.
ROOMS: dict[str, set[str]] = {
    "qwen_min": set(),
    "lora": {"qwen_min"},
    "data": set(),
    "experiments": {"qwen_min", "lora", "data"},
}
FLOORS = (
    *("run_folder", "accounting", "settings", "plots", "task", "training", "forecasting", "study", "report", "bench"),
    *("forecaster", "parity", "book"),
    *("verbs", "run"),
)
"""The rooms of `experiments`: what is in one may import what is in it or in an earlier one."""
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
"""Modules whose reading of a file can run what the file says."""


def files(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms or ROOMS for path in (ROOT / room).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), path.name)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(module: ast.Module) -> Iterator[str]:
    """The full name of everything a module imports, inside of functions too."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import: expected absolute ones, which these tests can follow"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in ("__import__", "import_module"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def dotted(node: ast.AST) -> str:
    """ "torch.load" for such an expression; empty for another."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe_reads(module: ast.Module) -> Iterator[str]:
    yield from (f"import {m}" for m in imported(module) if m.partition(".")[0] in UNSAFE)
    yield from (f"import {m}" for m in imported(module) if m in ("torch.load", "pandas.read_pickle"))
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        options = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if called.endswith("read_pickle") or options.get("allow_pickle"):
            yield f"{called}(...)"
        if called == "torch.load" and options.get("weights_only") is not True:
            yield "torch.load(...) without weights_only=True"


def test_there_is_something_to_check():
    assert all(files(room) for room in ROOMS)


@pytest.mark.parametrize("path", files(), ids=name)
def test_imports_only_point_down(path):
    room = path.relative_to(ROOT).parts[0]
    ours = {m.partition(".")[0] for m in imported(tree(path))} & (ROOMS.keys() | {"tests"})
    assert ours <= ROOMS[room] | {room}, f"{name(path)} imports {ours - ROOMS[room] - {room}}"


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def ours() -> dict[str, set[str]]:
    known = {module(path): path for path in files()}
    return {m: {i for i in imported(tree(path)) if i in known and i != m} for m, path in known.items()}


@pytest.mark.parametrize("path", files("experiments"), ids=name)
def test_rooms_of_experiments_only_import_earlier_ones(path):
    mine = module(path)
    above = set(FLOORS[FLOORS.index(mine.split(".")[1]) + 1 :]) if "." in mine else set(FLOORS)
    assert not {i for i in ours()[mine] if i.partition(".")[2].split(".")[0] in above}


def test_no_file_imports_itself_by_way_of_others():
    graph = {m: {i for i in names if not m.startswith(f"{i}.")} for m, names in ours().items()}  # a package is no file
    while leaves := {m for m, names in graph.items() if not names & graph.keys()}:
        graph = {m: names for m, names in graph.items() if m not in leaves}
    assert not graph


@pytest.mark.parametrize("path", files("qwen_min", "lora"), ids=name)
def test_no_plain_file_imports_the_wing_for_speed(path):
    if path.parent.name != "fast" and path != ROOT / "qwen_min" / "__init__.py":  # which turns it on
        assert not {m for m in imported(tree(path)) if m.startswith("qwen_min.fast")}


def test_the_way_from_token_ids_to_a_greedy_token_is_850_lines():
    way = ("model", "layers", "view", "cache", "ops", "generate")
    assert sum(len((ROOT / "qwen_min" / f"{file}.py").read_text().splitlines()) for file in way) <= 850


def test_what_a_run_left_in_its_folder_is_read_without_torch():
    rooms = " ".join(module(path) for path in files("experiments/run_folder"))
    script = f"import sys\nfor m in {rooms!r}.split(): __import__(m)\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", files(), ids=name)
def test_no_pickle_is_ever_read(path):
    """A checkpoint of a run may be torch's own format, read with weights_only=True."""
    module = tree(path)
    assert not list(unsafe_reads(module))
    if path.relative_to(ROOT).parts[0] != "experiments":
        assert "torch.load" not in {dotted(node) for node in ast.walk(module)}


@pytest.mark.parametrize("path", files("qwen_min", "lora", "data"), ids=name)
def test_no_behaviour_comes_from_environment_variables(path):
    used = {dotted(node) for node in ast.walk(tree(path))} | set(imported(tree(path)))
    assert not {"os.environ", "os.getenv", "os.environb", "os.putenv"} & used


def test_importing_every_file_prints_nothing_and_the_packages_leave_the_heavy_libraries_out():
    """transformers and peft are for tests alone; a plot's library and the hub's are loaded when they are needed."""
    script = (
        "import sys, qwen_min, lora, data; heavy = {'transformers', 'peft', 'matplotlib', 'huggingface_hub'}; "
        f"assert not heavy & sys.modules.keys(); [__import__(m) for m in {[*map(module, files())]}]"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('a')",
        "from torch import load",
        "import torch\ntorch.load('a', weights_only=False)",
        "import numpy as np\nnp.load('a', allow_pickle=True)",
        "def f():\n    import joblib",
        "__import__('pickle')",
        "import pandas as pd\npd.read_pickle('a')",
    ],
)
def test_the_rule_about_pickles_sees_each_way_to_read_one(text):
    assert list(unsafe_reads(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    [
        "import experiments.run",
        "from experiments import run",
        "def f():\n    import experiments",
        "import importlib\nimportlib.import_module('experiments.run')",
    ],
)
def test_the_rule_about_imports_sees_each_way_to_import(text):
    assert "experiments" in {m.partition(".")[0] for m in imported(ast.parse(text))}
