"""No verb opens a socket with --offline, a network that is not there is named in a line, and no hub token gets out."""

import argparse
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import network_guard
import pytest
from waves import INPUTS, inputs, refused

from experiments import report, run
from experiments.bench import session
from experiments.training import pocket
from experiments.verbs import arguments
from qwen_min import load

POCKET = Path(__file__).parents[1] / "weights" / "pocket"
HUB_ID = "Qwen/Qwen2.5-Coder-0.5B-Instruct"  # whose size `flops` has to look up
SECRETS = ["hf_TheTokenOfTheEnvironment0123456789", "hf_TheTokenOfTheFile0123456789"]
DATA = INPUTS[:2]
FORECAST = ["--points", "16", "--horizon", "2", "--forecast-series", "1", "--config", "small.toml"]
TRAIN = [*INPUTS[2:], "--steps", "1", "--batch-size", "1", "--context", "32", "--val-series", "1", "--val-every", "0"]
GRID = [*DATA, *TRAIN, *FORECAST, "--lr", "1e-3", "--ranks", "2"]
STAGE = [*GRID, "--best-lr", "1e-3", "--best-rank", "2", "--best-context", "32", "--out", "study"]
CASES = {
    "grid": [*GRID, "--out", "grid"],
    "report": ["grid"],
    "status": ["grid"],
    "budget": [],
    "baseline": STAGE,
    "default": STAGE,
    "context": STAGE,
    "final": STAGE,
    "study": STAGE,
    "train": [*DATA, *TRAIN, "--lr", "1e-3", "--rank", "2", "--out", "train"],
    "evaluate": [*DATA, *FORECAST, "--context", "32", "--val-series", "1", "--out", "evaluation"],
    "forecast": [*DATA, *FORECAST[:4], "--system", "17"],
    "backtest": [*DATA, *FORECAST[:4], "--series", "17"],
    "data": DATA,
    "flops": ["--model", str(POCKET), "--rank", "8", "--train"],
    "explain": ["attend"],
    "exercise": ["1.1", "'1.23,0.50;10.00,0.46;'"],
    "doctor": [],
    "verify": ["--generate", "2"],
    "generate": ["--prompt", "1.00,2.00;", "--max-new-tokens", "2"],
    "export": ["--out", "merged"],
    "bench": ["--quick", "--peer", "none", "--what", "load"],
    "pretrain-pocket": ["--steps", "1", "--out", "pocket"],
}
"""A small run of each verb."""

ABOUT_THE_GRID = ("report", "status", "budget")
"""Verbs that read what the grid's case leaves."""


def verbs() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (a.choices for a in arguments.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(choices)


def takes(flag: str) -> list[str]:
    return [name for name, parser in verbs().items() if flag in parser._option_string_actions]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with twenty damped waves of 24 points, and the sizes of a study of single steps."""
    folder = tmp_path_factory.mktemp("offline")
    inputs(24, folder)
    sizes = "default_steps = 1\ncontexts = [32]\ncontext_steps = 1\nfinal_steps = 1\nshown = [17]\n"
    (folder / "small.toml").write_text(sizes)
    return folder


@pytest.fixture(autouse=True)
def at_home(place, tmp_path, monkeypatch) -> None:
    """In the folder of the runs; with tokens in the environment and in a file; the hub's cache is empty."""
    from huggingface_hub import constants

    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_TOKEN", SECRETS[0])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # of children
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(SECRETS[1])
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def attempts(tmp_path) -> Iterator[Path]:
    record = tmp_path / "attempts"
    with network_guard.refused(record):
        yield record


def no_secret(*texts: str, folder: Path | None = None) -> None:
    for path in [] if folder is None else [p for p in folder.rglob("*") if p.is_file()]:
        assert not any(secret.encode() in path.read_bytes() for secret in SECRETS), path
    for text in texts:
        assert not any(secret in text for secret in SECRETS), text


def test_every_verb_has_a_case_and_takes_offline_if_it_takes_a_model():
    assert CASES.keys() | {"docs"} == run.VERBS.keys() == verbs().keys()  # whose cells run in processes of their own
    assert set(takes("--model")) <= set(takes("--offline"))


def small(verb: str, monkeypatch) -> list[str]:
    """The arguments of a verb's case, and what makes it smaller still."""
    if verb in ("final", "study"):  # their page is drawn by `report`, from the same records
        monkeypatch.setattr(report, "build", lambda out, progress: out)
    monkeypatch.setattr(pocket, "HELD_OUT", 4)
    fresh, rates = session.fresh, {"flops_per_second": 1e11, "bytes_per_second": 1e10, "threads": 1}
    monkeypatch.setattr(session, "fresh", lambda job, name: rates if job["job"] == "calibrate" else fresh(job, name))
    return [verb, *CASES[verb], *(["--offline"] if verb in takes("--offline") else [])]


@pytest.mark.parametrize("verb", CASES)
def test_each_verb_runs_offline_without_a_socket_and_keeps_the_token(
    verb, place, attempts, tmp_path, monkeypatch, capfd
):
    for name, value in network_guard.in_children(tmp_path / "site", attempts).items():
        monkeypatch.setenv(name, value)
    first = ["grid"] * (verb in ABOUT_THE_GRID)  # a finished one is left as it is
    codes = [run.main(small(one, monkeypatch)) for one in (*first, verb)]
    printed = capfd.readouterr()
    assert not any(codes), printed.err
    assert attempts.read_text() == ""
    no_secret(printed.out, printed.err, folder=place)
    assert not any((tmp_path / "home" / "hub").rglob("*"))


@pytest.mark.endurance
def test_bench_runs_offline_without_a_socket_beside_its_peer_too(attempts, tmp_path, monkeypatch, capfd):
    for name, value in network_guard.in_children(tmp_path / "site", attempts).items():
        monkeypatch.setenv(name, value)
    assert run.main(["bench", "--quick", "--offline", "--out", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr()
    assert attempts.read_text() == ""
    no_secret(printed.out, printed.err, folder=tmp_path / "out")


def test_the_guard_sees_this_process_and_its_children_and_lets_sockets_within_the_machine_through(attempts, tmp_path):
    """Otherwise an empty record would prove nothing."""
    for use in (
        lambda: socket.create_connection(("127.0.0.1", 9)),
        lambda: socket.getaddrinfo("huggingface.co", 443),
        lambda: socket.socket(),
        lambda: socket.gethostbyname("huggingface.co"),
    ):
        with pytest.raises(OSError, match="Network is unreachable"):
            use()
    for end in socket.socketpair():
        end.close()
    assert len(attempts.read_text().splitlines()) == 4
    environment = os.environ | network_guard.in_children(tmp_path / "site", attempts)
    code = "import socket; socket.getaddrinfo('huggingface.co', 443)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Network is unreachable" in done.stderr
    assert len(attempts.read_text().splitlines()) == 5


def missing(verb: str, *more: str) -> list[str]:
    case = CASES[verb][2:] if verb == "flops" else CASES[verb]
    return [verb, *case, "--model", HUB_ID, *more]


@pytest.mark.parametrize(
    ("flags", "said", "tries"),
    [
        (["--offline"], "not cached, and offline was asked for: expected ", (0,)),
        ([], "could not be fetched: the network could not be reached (ConnectError): expected", (1, 2)),
    ],
    ids=["offline", "without a network"],
)
@pytest.mark.parametrize("verb", [verb for verb in takes("--model") if verb != "doctor"])
def test_a_model_that_is_absent_is_named_with_the_command_that_fetches_it(verb, flags, said, tries, attempts, capsys):
    """And nothing is tried for long."""
    line = refused(capsys, *missing(verb, *flags))
    assert line.startswith(f"{HUB_ID}: {said}") and f"'hf download {HUB_ID}' fetches it" in line
    assert len(attempts.read_text().splitlines()) in tries
    no_secret(line)


@pytest.mark.parametrize("offline", [True, False])
def test_doctor_says_of_a_model_that_is_not_there_how_it_is_fetched(offline, attempts, capsys):
    assert run.main(["doctor", "--model", HUB_ID, *["--offline"] * offline]) == 0
    printed = capsys.readouterr()
    (line,) = (line for line in printed.out.splitlines() if HUB_ID in line)
    remedy = f"'hf download {HUB_ID}' fetches it, or name a folder"
    assert line == f"--  model {HUB_ID}: not cached, and doctor fetches nothing: {remedy}"
    assert ("--  the hub: not asked, offline" if offline else "is not reachable (OSError)") in printed.out
    assert bool(attempts.read_text()) != offline
    no_secret(printed.out, printed.err)


def test_a_revision_is_part_of_the_command(attempts, capsys):
    line = refused(capsys, "generate", "--prompt", "1", "--model", HUB_ID, "--revision", "v1", "--offline")
    assert f"'hf download {HUB_ID}' with '--revision v1' fetches it" in line


@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_model_runs_without_a_network(offline, attempts, tmp_path, capsys):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "home" / "hub" / "models--owner--pocket"
    shutil.copytree(POCKET, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    argv = ["generate", "--model", "owner/pocket", "--prompt", "1.00,2.00;", "--max-new-tokens", "2"]
    assert run.main([*argv, *["--offline"] * offline]) == 0
    assert bool(attempts.read_text()) != offline
    no_secret(*capsys.readouterr())


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that answers every request with its own headers, and an error."""

    status = 500
    seen: list[str] = []

    def do_GET(self) -> None:
        told = str(self.headers)
        self.seen.append(told)
        self.send_response(self.status)
        self.send_header("X-Error-Message", " ".join(told.split()))
        self.end_headers()
        self.wfile.write(f'{{"error": "{" ".join(told.split())}"}}'.encode())

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[Hub]]:
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(Hub, "seen", [])
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
def test_a_hub_error_that_quotes_the_token_reaches_no_line_or_trace(status, from_file, hub, monkeypatch, capsys, place):
    monkeypatch.setattr(hub, "status", status)
    if from_file:
        monkeypatch.delenv("HF_TOKEN")
    argv = ["data", *DATA, "--model", HUB_ID]
    line = refused(capsys, *argv)
    assert any(SECRETS[from_file] in told for told in hub.seen)  # it was sent, and came back
    assert f"'hf download {HUB_ID}' fetches it" in line and ("hub" in line)
    with pytest.raises(ValueError) as caught:
        run.main([*argv, "--debug"])
    no_secret(line, "".join(traceback.format_exception(caught.value)), *capsys.readouterr(), folder=place)


class Unforeseen(Exception):
    """As of a library that the hub's library uses."""


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, OSError, Unforeseen], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("where", ["HfApi.repo_info", "snapshot_download"])
def test_a_download_that_fails_in_any_way_is_one_line_that_quotes_nothing(where, kind, monkeypatch, capsys, place):
    def fail(*_, **__):
        raise kind(f"GET failed,\nheaders: {{'authorization': 'Bearer {SECRETS[0]}'}}")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr(f"huggingface_hub.{where}", fail)
    argv = ["data", *DATA, "--model", HUB_ID]
    line = refused(capsys, *argv)
    assert line.startswith(f"{HUB_ID}: could not be fetched ({kind.__name__}): expected")
    with pytest.raises(ValueError) as caught:
        run.main([*argv, "--debug"])
    no_secret(line, "".join(traceback.format_exception(caught.value)), *capsys.readouterr(), folder=place)


def test_a_disk_that_is_full_while_a_model_is_fetched_is_no_fault_of_the_network(monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert run.main(["data", *DATA, "--model", HUB_ID]) == 4
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1


def test_a_hub_that_never_answers_is_given_up_within_the_librarys_time_limit(monkeypatch):
    """As a network that drops what is sent; without a limit this test would not end."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        with pytest.raises(ValueError, match="could not be fetched: the network could not be reached"):
            load.resolve(HUB_ID)
