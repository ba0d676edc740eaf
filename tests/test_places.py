"""Where a migration goes: addresses, connections that take several attempts, files that are nobody else's."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host_qemu_side.migration import output
from host_qemu_side.migration.address import Address, parse_address
from host_qemu_side.migration.connecting import Connecting, connect
from host_qemu_side.migration.output import FileOutput, SocketOutput
from vring.errors import MissingFacility, PeerVanished, UsageError

# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/tmp/s", Address("unix", path="/tmp/s")),
        ("unix:a:b", Address("unix", path="a:b")),
        ("file:x y", Address("file", path="x y")),
        ("file:\udcff", Address("file", path="\udcff")),  # a name that is not UTF-8
        ("tcp:localhost:4444", Address("tcp", host="localhost", port=4444)),
        ("tcp:[::1]:1", Address("tcp", host="::1", port=1)),
        ("tcp:::1:65535", Address("tcp", host="::1", port=65535)),
        ("tcp:bücher.example:1", Address("tcp", host="bücher.example", port=1)),
        ("fd:3", Address("fd", fd=3)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    ["", "unix", "unix:", "file:", "tcp:", "tcp:h", "tcp:h:", "tcp::1", "tcp:h:²", "tcp:h:٣", "tcp:h:-1", "tcp:h:65536",
     "tcp:h:1" + "0" * 5000, "tcp:[]:1", "tcp:a..b:1", f"tcp:{'a' * 64}:1", f"tcp:{'a.' * 200}a:1", "tcp:\udcff:1",
     "tcp:a b:1", "tcp:a\0:1", "tcp:a/b:1", "fd:", "fd:²", "fd:-1", "fd:99999999999999999999", "spawn", "exec:true",
     "file:a\0b", "file:\ud800", f"unix:{'x' * 108}", "unix:a\0b", "UNIX:/tmp/s"],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_address(text)
    assert len(str(raised.value)) < 400


# -- connecting -------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def several(monkeypatch: pytest.MonkeyPatch, *targets: tuple[str, int]) -> None:
    """Let every name have these addresses, in this order, as ``localhost`` has ::1 and 127.0.0.1."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", target) for target in targets]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_all_addresses_of_a_name_are_tried(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    several(monkeypatch, ("127.0.0.1", closed_port()), ("127.0.0.1", closed_port()), listener.getsockname())
    found = connect("tcp:somewhere:1")
    assert isinstance(found, SocketOutput)
    accepted, _ = listener.accept()
    found.send([b"hello"])
    assert found.flush()
    assert accepted.recv(5) == b"hello"
    accepted.close()
    found.close()


def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that is full drops what comes, as a firewall does."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(silent.getsockname())
        time.sleep(0.1)
        several(monkeypatch, silent.getsockname(), listener.getsockname())
        connecting = Connecting("tcp:somewhere:1", timeout=2.0)
        began = time.monotonic()
        while (found := connecting.poll()) is None:
            time.sleep(0.01)
        assert 0.5 < time.monotonic() - began < 2.0
        found.close()
        for filler in fillers:
            filler.close()


def test_if_none_answers_the_last_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    several(monkeypatch, ("127.0.0.1", closed_port()), ("127.0.0.1", closed_port()))
    with pytest.raises(PeerVanished, match=r"no destination at tcp:somewhere:1: Connection refused; start `balloon"):
        connect("tcp:somewhere:1")


def test_while_it_waits_the_guest_is_served(tmp_path: Path) -> None:
    path = tmp_path / "s"
    waits = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))  # the queue is full

            def serve(seconds: float) -> None:
                waits.append(seconds)
                if len(waits) == 3:
                    server.accept()[0].close()

            connect(f"unix:{path}", serve).close()
    assert len(waits) >= 3
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as first:
        server.bind(str(tmp_path / "t"))
        server.listen(0)
        first.connect(str(tmp_path / "t"))
        with pytest.raises(KeyError):  # what the wait raises, such as on Ctrl-C, ends it
            connect(f"unix:{tmp_path}/t", lambda seconds: {}[seconds])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("unix:{0}/none", PeerVanished),
        ("unix:{0}/typo/none", UsageError),
        ("unix:{0}/file/none", UsageError),
        ("tcp:127.0.0.1:0", UsageError),
        ("tcp:name.invalid:1", PeerVanished),
        ("fd:977", UsageError),
        ("file:{0}/typo/x", UsageError),
    ],
)
def test_places_that_cannot_be_reached(text: str, kind: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(kind):
        connect(text.format(tmp_path))


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["without a name", "with one of its own"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on a file system that knows O_TMPFILE, or not."""
    if request.param == "with one of its own":
        real = os.open

        def without(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return real(path, flags, *rest, **more)

        monkeypatch.setattr(output.os, "open", without)
    return tmp_path


def written(path: Path) -> None:
    out = FileOutput(str(path))
    out.send([b"new", memoryview(b" content")])
    assert not [p for p in path.parent.iterdir() if not p.name.startswith((".balloon-", "x"))]
    out.finish()
    out.close()


def test_a_file_gets_its_name_when_it_is_whole_and_is_nobody_elses(folder: Path) -> None:
    path = folder / "x"
    before = os.umask(0)
    try:
        written(path)
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new content"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(folder.iterdir()) == [path]


def test_a_users_own_files_stay(folder: Path) -> None:
    for name in ("x.partial", "x.tmp", ".balloon-.partial", "x~"):
        (folder / name).write_text("precious")
    written(folder / "x")
    for name in ("x.partial", "x.tmp", ".balloon-.partial", "x~"):
        assert (folder / name).read_text() == "precious"
    assert len(list(folder.iterdir())) == 5


def test_the_old_file_stays_until_the_new_one_is_whole(folder: Path) -> None:
    (folder / "x").write_text("old")
    out = FileOutput(str(folder / "x"))
    out.send([b"half"])
    assert (folder / "x").read_text() == "old"
    out.close()
    assert (folder / "x").read_text() == "old"
    assert [p.name for p in folder.iterdir()] == ["x"]
    written(folder / "x")
    assert (folder / "x").read_text() == "new content"


def test_a_link_is_followed(folder: Path) -> None:
    (folder / "x-real").write_text("old")
    (folder / "x-link").symlink_to("x-real")
    written(folder / "x-link")
    assert (folder / "x-link").is_symlink()
    assert (folder / "x-real").read_text() == "new content"


def test_two_at_once_both_end_whole(folder: Path) -> None:
    first, second = FileOutput(str(folder / "x")), FileOutput(str(folder / "x"))
    first.send([b"first"])
    second.send([b"second"])
    second.finish()
    first.finish()
    first.close()
    second.close()
    assert (folder / "x").read_text() == "first"
    assert [p.name for p in folder.iterdir()] == ["x"]


def test_file_and_name_are_made_durable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(output.os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    written(folder / "x")
    assert synced[0] != str(folder)
    assert synced[-1] == str(folder)
    assert len(synced) == 2


def test_a_folder_that_goes_meanwhile_is_no_lack_of_room(folder: Path) -> None:
    (folder / "gone").mkdir()
    out = FileOutput(str(folder / "gone/x"))
    out.send([b"content"])
    shutil.rmtree(folder / "gone")
    with pytest.raises(UsageError, match="its folder was changed meanwhile"):
        out.finish()
    out.close()


@pytest.mark.parametrize("fails", ["fsync", "rename"])
def test_without_room_at_the_very_end_there_is_no_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    out = FileOutput(str(folder / "x"))
    out.send([b"content"])

    def full(*arguments: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(output.os, fails, full)
    with pytest.raises(MissingFacility, match="quota"):
        out.finish()
    out.close()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("typo/x", "No such file or directory"),
        ("file/x", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("folder", "is no regular file"),
        ("folder/", "Is a directory"),
        ("file/", "Is a directory"),
        ("new/", "Is a directory"),
        ("folder/.", "Is a directory"),
        ("typo/../x", "No such file or directory"),
        ("loop", "."),
    ],
)
def test_names_that_cannot_be_written_are_refused_at_once(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=says):
        FileOutput(f"{tmp_path}/{name}")
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("path", ["/dev/full", "/dev/null", "/sys/x", "/proc/x"])
def test_what_is_no_file_is_not_replaced(path: str) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        FileOutput(path)
