"""Files and JSON Lines: whole after a kill at any system call, a cut last line, a full disk, one run in a folder."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from vismem import files, jsonl

ODD = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\ud800", "\N{SNOWMAN}", "\x00"]


def test_lines_are_split_only_at_newlines(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    entries = [{"text": f"one{odd}two"} for odd in ODD]
    jsonl.append(path, entries[:3])
    jsonl.append(path, entries[3:])
    assert jsonl.read(path) == entries
    jsonl.write(path, entries[::-1])
    assert jsonl.read(path) == entries[::-1]


def test_a_file_truncated_anywhere_keeps_its_complete_lines(tmp_path):
    path, entries = tmp_path / "lines.jsonl", [{"n": 1, "t": "Z\u00fcrich"}, {"n": 2, "t": "\u2028\N{SNOWMAN}"}]
    whole = jsonl.dumps(entries)
    first = whole.index(b"\n") + 1
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = (length >= first - 1) + (length >= len(whole) - 1)  # also without the last newline
        assert jsonl.read(path) == entries[:kept], length
        jsonl.append(path, [{"n": 3}])
        assert jsonl.read(path) == [*entries[:kept], {"n": 3}], length


@pytest.mark.parametrize("tail", [b'{"n": 2}\0\0', b"\0\0\0\n", b'{"n": 2\n', b'{"t": "\xe2\x80"}\n', b"[" * 100_000])
def test_a_broken_last_line_is_dropped(tmp_path, tail):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": 1}\n' + tail)
    assert jsonl.read(path) == [{"n": 1}]
    jsonl.append(path, [{"n": 3}])
    assert jsonl.read(path) == [{"n": 1}, {"n": 3}]


@pytest.mark.parametrize("broken", [b"{", b'{"t": "\xe2\x80"}', b"[1]", b"word"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, broken):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": 1}\n\n' + broken + b'\n{"n": 2}\n')
    with pytest.raises(jsonl.BrokenLineError, match=rf"{path}, line 3 is not "):
        jsonl.read(path)


def test_a_failed_write_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as partial:
        partial.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_error_names_the_disk(tmp_path, monkeypatch, number):
    files.write_text(tmp_path / "file.txt", "old")

    def full(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    for write in (files.write_text, lambda path, text: files.write_pair((path, b"new"), (path, b"new"), bool)):
        with pytest.raises(
            files.DiskFullError, match=rf"^(no space left|disk quota exceeded) on /.* \(writing to {tmp_path}\)$"
        ):
            write(tmp_path / "file.txt", "new")
    assert (tmp_path / "file.txt").read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_a_failed_write_of_torch_and_safetensors_is_a_full_disk(tmp_path):
    """Neither library raises OSError; a file size limit makes writes fail like a full disk."""
    import safetensors.torch
    import torch

    many = {"x": torch.zeros(2**18)}
    writers = {"a": lambda path: torch.save(many, path), "b": lambda path: safetensors.torch.save_file(many, path)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, write in writers.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, before[1]))
        try:
            with pytest.raises(files.DiskFullError, match="file size limit exceeded"), files.disk_errors(tmp_path):
                write(tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


HOLDER = """
import sys, time
from vismem.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_killed_one_holds_no_lock(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        said = rf"{tmp_path} is in use .*process {holder.pid} on "
        with pytest.raises(files.FolderInUseError, match=said), files.locked(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with files.locked(tmp_path), files.locked(tmp_path):
            assert json.loads((tmp_path / files.OWNER).read_text())["pid"] == os.getpid()
        assert not (tmp_path / files.OWNER).exists()
    finally:
        holder.kill()
        holder.wait()
