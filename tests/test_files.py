"""Files are whole or absent, whatever fails, and a bad one is named in one line."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.run_folder import files

ROOT = Path(__file__).parents[1]


def test_what_is_written_is_what_is_read(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"ä": "ö\n"}, "flops": 10**17 + 1}
    files.write_json(tmp_path / "new" / "value.json", value)
    assert files.read_json(tmp_path / "new" / "value.json") == value
    files.write_text(tmp_path / "text", "a\r\nö")
    assert (tmp_path / "text").read_bytes() == "a\r\nö".encode()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["new", "text", "value.json"]


def test_json_bytes_do_not_depend_on_the_order_of_keys(tmp_path):
    files.write_json(tmp_path / "one", {"a": 1, "b": 2})
    files.write_json(tmp_path / "two", {"b": 2, "a": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == b'{\n  "a": 1,\n  "b": 2\n}\n'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_lacks_is_refused_and_nothing_is_written(tmp_path, value):
    path = tmp_path / "value.json"
    for write in (files.write_json, files.append_jsonl):
        with pytest.raises(ValueError, match="value.json: not written"):
            write(path, {"loss": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content_and_no_temporary(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    files.write_text(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_is_synced_before_it_takes_its_name_and_the_folder_after(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), replace(*a)))
    files.write_bytes(tmp_path / "file", b"x")
    assert events == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": NaN}', "finite"),
        (b'{"a": 1e999}', "finite"),
        (b"\xff\xfe", "UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 10_000, "not valid JSON"),
    ],
)
def test_a_bad_json_file_is_named_in_one_line(tmp_path, content, fault):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=fault) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [files.read_json, files.read_jsonl, files.file_digest])
def test_a_missing_file_and_a_folder_are_named_in_one_line(tmp_path, read):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match="cannot be read") as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_records_are_appended_one_a_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    records = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    for record in records:
        files.append_jsonl(path, record)
    assert files.read_jsonl(path) == records
    assert path.read_bytes().count(b"\n") == 3
    files.write_jsonl(tmp_path / "again.jsonl", records)
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


@given(kept=st.integers(0, 4), cut=st.integers(1, 20))
def test_a_torn_last_line_is_dropped_and_the_next_record_does_not_join_it(tmp_path_factory, kept, cut):
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    records = [{"step": step, "loss": 0.25} for step in range(kept)]
    for record in [*records, {"step": 99, "loss": 0.5}]:
        files.append_jsonl(path, record)
    path.write_bytes(path.read_bytes()[:-cut])  # a record is 26 bytes: only the last is torn
    assert files.read_jsonl(path) == records
    files.append_jsonl(path, {"step": 7})
    assert files.read_jsonl(path) == [*records, {"step": 7}]


def test_a_torn_line_in_the_middle_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl: line 2: not valid JSON"):
        files.read_jsonl(path)
    path.write_text('{"step": 1}\n3\n')
    with pytest.raises(ValueError, match="line 2: is a int: expected an object"):
        files.read_jsonl(path)


def test_the_digest_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.file_digest(tmp_path / "file") == expected


def _save(path, text):
    with files.atomic_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "weights").write_text(text)
        (folder / "deep" / "step").write_text(text)


def _content(path):
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "run" / "checkpoint"
    _save(path, "old")
    with files.atomic_folder(path) as folder:
        (folder / "weights").write_text("new")
        assert _content(path) == {"weights": "old", "deep/step": "old"}
    assert _content(path) == {"weights": "new"}
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_folder(tmp_path):
    path = tmp_path / "checkpoint"
    _save(path, "old")
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(path) as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    assert _content(path) == {"weights": "old", "deep/step": "old"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", range(9))
def test_a_folder_survives_a_failure_at_each_of_its_9_system_calls(tmp_path, monkeypatch, call):
    """Fsync of 2 files and 2 folders, 2 renames, fsync of the parent; the last two points never come."""
    path = tmp_path / "checkpoint"
    _save(path, "old")
    calls = []

    def failing(real):
        def function(*arguments):
            calls.append(real)
            if len(calls) == call + 1:
                raise OSError(5, "Input/output error")
            return real(*arguments)

        return function

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(os, "rename", failing(os.rename))
    try:
        _save(path, "new")
        failed = False
    except OSError:
        failed = True
    assert failed == (call < 7)
    survivor = "new" if call >= 6 else "old"  # after the second rename the new folder is there, and whole
    assert _content(path) == {"weights": survivor, "deep/step": survivor}
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from experiments.run_folder import files
path, point = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def dying(real):
    def function(*arguments):
        global calls
        calls += 1
        if calls == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    return function
os.fsync, os.rename = dying(os.fsync), dying(os.rename)
with files.atomic_folder(path) as folder:
    (folder / "weights").write_text("new")
"""


@pytest.mark.parametrize("point", [1, 3, 4, 5])
def test_a_folder_survives_a_kill_at_any_point(tmp_path, point):
    """The calls: fsync of a file and of the folder, two renames, fsync of the parent."""
    path = tmp_path / "checkpoint"
    _save(path, "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, path, str(point)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert files.recover_folder(path)
    expected = {"weights": "new"} if point == 5 else {"weights": "old", "deep/step": "old"}
    assert _content(path) == expected
    assert list(tmp_path.iterdir()) == [path]
    _save(path, "newer")
    assert _content(path) == {"weights": "newer", "deep/step": "newer"}


def test_a_folder_does_not_take_the_place_of_a_file(tmp_path):
    (tmp_path / "checkpoint").write_text("mine")
    with pytest.raises(ValueError, match="checkpoint: is a file: expected a folder"):
        _save(tmp_path / "checkpoint", "new")
    assert _content(tmp_path) == {"checkpoint": "mine"}


def test_a_folder_that_is_a_link_is_replaced_where_it_is(tmp_path):
    """Bug: the link was replaced, stayed aside as .checkpoint.old, and no later run could remove it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "checkpoint"
    path.symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".elsewhere.old").symlink_to(tmp_path)
    assert files.recover_folder(path)
    for text in ("old", "new"):
        _save(path, text)
        assert path.is_symlink() and _content(tmp_path / "elsewhere")["weights"] == text
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["checkpoint", "deep", "elsewhere", "run", "step", "weights"]


def test_a_path_that_no_file_can_have_is_bad_input_and_no_fault_of_the_machine(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    for name in ("file/x", "loop/x", "x" * 300, "pipe", "."):
        for write in (files.write_json, files.append_jsonl)[: 1 if name == "pipe" else 2]:
            with pytest.raises(ValueError, match="expected another path") as caught:
                write(tmp_path / name, {})
            assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert sorted(tmp_path.iterdir()) == before


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "cells").mkdir()
    for name in ("cells/.result.json.123.tmp", "cells/result.json", "notes.tmp", ".hidden"):
        (tmp_path / name).write_text(json.dumps(name))
    files.remove_leftovers(tmp_path)
    assert sorted(_content(tmp_path)) == [".hidden", "cells/result.json", "notes.tmp"]
