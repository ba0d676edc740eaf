"""Listening on a Unix socket: for its user only, and nobody loses a name to it or through it."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vring.errors import UsageError
from vring.unix_socket import MAX_PATH, UnixListener, socket_path, why_misnamed


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_only_its_user_may_connect_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "s"
    before = os.umask(umask)
    try:
        listener = UnixListener(str(path))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
    listener.close()
    assert not path.exists()
    listener.close()  # a second time is no error


def test_what_a_dead_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    subprocess.run([sys.executable, "-c", f"import socket; socket.socket(socket.AF_UNIX).bind({str(path)!r})"])
    assert path.is_socket()
    UnixListener(str(path)).close()
    assert not path.exists()


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_what_a_live_process_has_stays(tmp_path: Path, kind: socket.SocketKind, listens: bool) -> None:
    """Also in the moment between its bind and its listen, and without a connection that it would see."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, kind) as first:
        first.bind(str(path))
        if listens and kind is not socket.SOCK_DGRAM:
            first.listen()
            first.setblocking(False)
        with pytest.raises(UsageError, match="another process listens there already"):
            UnixListener(str(path))
        assert path.is_socket()
        if listens and kind is not socket.SOCK_DGRAM:
            with pytest.raises(BlockingIOError):
                first.accept()


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("file", "folder", "link"):
        with pytest.raises(UsageError, match="is no socket"):
            UnixListener(str(tmp_path / name))
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "link"]


@pytest.mark.parametrize("replaced", ["by a file", "by a socket", "not"])
def test_only_ones_own_name_is_removed(tmp_path: Path, replaced: str) -> None:
    path = tmp_path / "s"
    listener = UnixListener(str(path))
    path.unlink()
    other = socket.socket(socket.AF_UNIX)
    if replaced == "by a file":
        path.write_text("precious")
    elif replaced == "by a socket":
        other.bind(str(path))
    listener.close()
    assert path.exists() == (replaced != "not")
    other.close()


def test_of_many_that_find_a_left_over_one_gets_it(tmp_path: Path) -> None:
    """Each looks whether it is alive, removes it and binds: taking turns, or the second would remove the first's."""
    path = tmp_path / "s"
    code = f"""
import sys
from vring.errors import UsageError
from vring.unix_socket import UnixListener
sys.stdin.readline()
try:
    listener = UnixListener({str(path)!r})
    print("listens", flush=True)
except UsageError as error:
    print("already" in str(error) and "refused", flush=True)
sys.stdin.readline()
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    for turn in range(5):
        left = socket.socket(socket.AF_UNIX)
        path.unlink(missing_ok=True)
        left.bind(str(path))
        left.close()
        if turn:
            processes = [
                subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                for _ in range(6)
            ]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        said = []
        for process in processes:
            assert process.stdout is not None
            said.append(process.stdout.readline().strip())
        for process in processes:
            process.communicate("\n", timeout=10)
        assert sorted(said) == ["listens", *["refused"] * 5]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "cannot be the path"),
        ("a\0b", "cannot be the path"),
        ("\ud800", "no file can have this name"),
        ("x" * (MAX_PATH + 1), f"{MAX_PATH + 1} bytes are too long"),
        ("é" * 54, "108 bytes are too long"),
    ],
)
def test_names_that_cannot_be(path: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        socket_path(path)
    with pytest.raises(UsageError, match=says):
        UnixListener(path)


def test_the_longest_name_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "x" * MAX_PATH
    UnixListener(name).close()
    assert not list(tmp_path.iterdir())


def test_who_is_not_there_and_what_is_misnamed_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "left"))
    for name in ("none", "left"):
        assert why_misnamed(str(tmp_path / name)) == ""
    assert why_misnamed("s") == ""
    assert why_misnamed(str(tmp_path / "typo/s")) == "there is no such folder"
    assert why_misnamed(str(tmp_path / "file/s")) == "there is no such folder"
    assert why_misnamed(str(tmp_path / "file")) == "it is no socket"
    assert why_misnamed(str(tmp_path)) == "it is no socket"


def test_a_name_that_was_taken_in_vain_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", refuse)
    with pytest.raises(UsageError, match="not permitted"):
        UnixListener(str(tmp_path / "s"))
    assert list(tmp_path.iterdir()) == []
