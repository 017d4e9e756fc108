"""A command line in a process of its own, in which the chosen one of its calls to the system dies or fails.

The calls: folders made, files opened to be written, writes, fsync, rename and replace, SQLite's statements, and steps
of the optimizer. They are the same in the same order each time: the number of a call is a moment that can be repeated.
"""

import io
import json
import multiprocessing
import os
import pkgutil
import signal
import sqlite3
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from waves import no_figures

from experiments import run

PATIENCE = 300
"""Seconds that a process may take on a machine that is busy."""

# A process is forked from a server that has the libraries imported, which would take most of its time.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("torch.nn.parallel", "torch.distributed", "torch._dynamo", "safetensors.torch", "tokenizers", "filelock"),
        *("h5py", "matplotlib.pyplot", "scipy.integrate", "scipy.optimize", "tqdm", "pytest"),
    ]
)


class Call(NamedTuple):
    kind: str  # mkdir, open, write, fsync, rename, replace, sqlite, step
    name: str  # of the file, or the statement's first word; an fsync has none


Action = Callable[[Call, Callable[[], Any], Callable[[], Any]], Any]
"""What is done in place of a call: given it, the whole of it, and the half of it, for a write that is cut."""


def die_before(call: Call, whole: Callable, half: Callable) -> None:
    half()
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(call: Call, whole: Callable, half: Callable) -> None:
    whole()
    os.kill(os.getpid(), signal.SIGKILL)


class Calls:
    """The calls of this process from now on; `act` stands in place of the `chosen` one, from 1, and `kinds` count."""

    def __init__(self, kinds: set[str] | None = None, chosen: int = 0, act: Action | None = None):
        self.kinds, self.chosen, self.act, self.made = kinds, chosen, act, list[Call]()
        calls = self

        def first(sql: str) -> str:
            return "".join(sql.split()[:1])

        class Connection(sqlite3.Connection):
            def execute(self, sql, *values):
                return calls.call("sqlite", first(sql), lambda: super(Connection, self).execute(sql, *values))

            def executemany(self, sql, values):
                return calls.call("sqlite", first(sql), lambda: super(Connection, self).executemany(sql, values))

        connect, opened, os_open, step = sqlite3.connect, Path.open, os.open, torch.optim.Adam.step
        sqlite3.connect = lambda *args, **kwargs: connect(*args, **kwargs, factory=Connection)  # type: ignore
        for kind in ("mkdir", "rename", "replace", "fsync"):
            setattr(os, kind, self._counted(kind, getattr(os, kind)))

        def open_(path, mode="r", *args, **kwargs):
            if set(mode).isdisjoint("wax"):
                return opened(path, mode, *args, **kwargs)
            file = calls.call("open", str(path), lambda: opened(path, mode, *args, **kwargs))
            return File(calls, str(path), file)

        def low_open(path, flags, *args, **kwargs):
            if not flags & os.O_CREAT:
                return os_open(path, flags, *args, **kwargs)
            return calls.call("open", str(path), lambda: os_open(path, flags, *args, **kwargs))

        Path.open, os.open = open_, low_open  # type: ignore
        torch.optim.Adam.step = lambda self, *a, **k: calls.call("step", "Adam", lambda: step(self, *a, **k))  # type: ignore

    def _counted(self, kind: str, real: Callable) -> Callable:
        def function(*args, **kwargs):
            if kind == "mkdir" and os.path.isdir(args[0]):
                return real(*args, **kwargs)  # nothing is made
            path = args[0] if kind == "mkdir" else args[-1]
            name = "" if isinstance(path, int) else str(path)
            return self.call(kind, name, lambda: real(*args, **kwargs))

        return function

    def call(self, kind: str, name: str, whole: Callable, half: Callable = lambda: None) -> Any:
        if self.kinds is None or kind in self.kinds:
            self.made.append(Call(kind, name))
            if len(self.made) == self.chosen and self.act is not None:
                return self.act(self.made[-1], whole, half)
        return whole()


def signalled(where: str, at: int, how: signal.Signals) -> Calls:
    """Send this process a signal at the beginning of the `at`-th call of a function: no later, however busy it is."""
    owner, name = pkgutil.resolve_name(where.rpartition(".")[0]), where.rpartition(".")[2]
    true, seen = getattr(owner, name), []

    def function(*args, **kwargs):
        seen.append(1)
        if len(seen) == at:
            os.kill(os.getpid(), how)
        return true(*args, **kwargs)

    setattr(owner, name, function)
    return Calls({"step"})


class File:
    def __init__(self, calls: Calls, name: str, file):
        self.calls, self.name, self.file = calls, name, file

    def write(self, data):
        def half() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        return self.calls.call("write", self.name, lambda: self.file.write(data), half)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    calls: list[Call]


class _Nest:
    """A process that has the libraries imported and the model's prices known, and forks one for each command line.

    It has trained nothing: where torch sees a GPU, a process cannot be forked from one that has."""

    def __init__(self):
        self.connection, theirs = SERVER.Pipe()
        self.process = SERVER.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *question, patience: float | None = None) -> Any:
        self.connection.send(question)
        return self.answer(patience)

    def answer(self, patience: float | None = None) -> Any:
        if not self.connection.poll(patience):
            raise TimeoutError
        return self.connection.recv()


_nest = cache(_Nest)


def _serve(connection) -> None:
    torch.set_num_threads(1)
    no_figures(pytest.MonkeyPatch())
    while True:
        try:
            pid, *command = connection.recv()
        except EOFError:
            return
        if pid == "warm":
            connection.send(_price(*command))
        elif pid:
            connection.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        elif new := os.fork():
            connection.send(new)
        else:
            _process(*command)


def _price(argv: list[str], folder: Path) -> None:
    os.chdir(folder)
    with redirect_stdout(io.StringIO()):
        assert run.main([*argv, "--dry-run"]) == 0


def _process(argv: list[str], folder: Path, prepare: Callable[..., Any] | None, arguments: tuple) -> None:
    code = 1
    try:
        os.chdir(folder)
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{os.getpid()}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        warnings.simplefilter("error")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs after it ignore Ctrl-C
        prepared = prepare(*arguments) if prepare else None
        code = run.main(argv)
        if isinstance(prepared, Calls):
            Path(f"{os.getpid()}.calls").write_text(json.dumps(prepared.made))
    except SystemExit as e:  # of argparse
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Running:
    """A command line that runs in `folder`, in a process of its own.

    `prepare(*arguments)` is called in it first; if it returns `Calls`, those are reported at the end."""

    def __init__(self, argv: list[str], folder: Path, prepare: Callable[..., Any] | None = None, *arguments):
        self.folder = folder
        self.pid: int = _nest().ask(0, argv, folder, prepare, arguments)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, how)  # until `end` has asked for it, the number stays its own

    def end(self) -> Ended:
        try:
            code = _nest().ask(self.pid, patience=PATIENCE)
        except TimeoutError:
            self.kill()
            _nest().answer()
            pytest.fail(f"did not end: {self._take('err')}")
        calls = [Call(*call) for call in json.loads(self._take("calls") or "[]")]
        return Ended(code, self._take("out"), self._take("err"), calls)

    def _take(self, kind: str) -> str:
        path = self.folder / f"{self.pid}.{kind}"
        text = path.read_text() if path.is_file() else ""
        path.unlink(missing_ok=True)
        return text


def wait_for(*names: str) -> None:
    until = time.monotonic() + PATIENCE
    while missing := [name for name in names if not Path(name).exists()]:
        assert time.monotonic() < until, f"{missing} did not appear"
        time.sleep(0.005)


def ends(argv: list[str], folder: Path, prepare: Callable[..., Any] | None = None, *arguments) -> Ended:
    return Running(argv, folder, prepare, *arguments).end()


def warm(argv: list[str], folder: Path) -> None:
    """Let the nest itself price what a command line would do; the prices are kept."""
    _nest().connection.send(("warm", argv, folder))
    _nest().answer()
