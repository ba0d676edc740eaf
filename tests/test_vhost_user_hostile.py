"""Front ends and monitor clients that mean ill, before `balloon serve` as a process: it answers, lives on, and ends
when it is told to.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from explore_messages import Findings, descriptors, under_watch
from raw_front_end import SIZE, USER, RawFrontEnd
from serve_process import Process, wait_for

from balloon_cli.monitor_client import MonitorClient
from vring import vhost_user as vu
from vring.vhost_user import MAX_FDS, Request

LOAD = 2.0
"""Seconds that a load lasts while the monitor is asked."""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path, guest=False)
    yield process
    process.end()
    assert process.process.returncode == 0
    assert "Traceback" not in process.log.read_text()
    assert not process.socket.exists()
    assert not process.monitor.exists()


@pytest.fixture
def front(serve: Process) -> Iterator[RawFrontEnd]:
    made = RawFrontEnd(serve.socket)
    yield made
    made.close()


def front_end_of(serve: Process) -> dict[str, object]:
    return serve.ask("query-device")["front-end"]


def gone(serve: Process) -> str:
    """Wait until there is no front end; return why."""
    wait_for(lambda: not front_end_of(serve)["connected"])
    return str(front_end_of(serve)["last-error"])


def takes_another(serve: Process) -> None:
    """The next front end is served as if nothing had been."""
    deadline = time.monotonic() + 10
    while True:
        front = RawFrontEnd(serve.socket)
        try:
            front.hello()
            break
        except OSError:  # turned away: the end of the one before was not seen yet
            front.close()
            assert time.monotonic() < deadline
    front.ring()
    front.add()
    front.ring_the_bell()
    assert select.select([front.call], [], [], 10)[0]
    assert front.used == 1
    front.close()
    gone(serve)


# -- nobody holds the loop --------------------------------------------------------------------------------------------


def flood_messages(serve: Process) -> None:
    front = RawFrontEnd(serve.socket)
    data = vu.pack_message(Request.SET_OWNER) * 4000
    while True:
        front.socket.sendall(data)


def flood_refusals(serve: Process) -> None:
    front = RawFrontEnd(serve.socket).hello()
    data = vu.pack_message(Request.SET_VRING_NUM, vu.VringState(99, 1).pack(), need_reply=True) * 100
    while True:
        front.socket.sendall(data)
        for _ in range(100):  # who does not read its replies is dropped
            assert front.reply() == 1


def refill_for_ever(serve: Process) -> None:
    front = RawFrontEnd(serve.socket).hello().ring()
    while True:
        while (front.added - front.used) & 0xFFFF < SIZE:
            front.add()
        front.ring_the_bell()


def flood_monitor(serve: Process) -> None:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(serve.monitor))
    data = b'{"execute": "qmp_capabilities"}' + b'{"execute": "query-commands"}\n' * 1000
    while True:
        _, writable, _ = select.select([client], [client], [])
        if writable:
            client.send(data, socket.MSG_DONTWAIT)
        with contextlib.suppress(BlockingIOError):
            client.recv(1 << 20, socket.MSG_DONTWAIT)


def connect_over_and_over(serve: Process) -> None:
    while True:
        for path in (serve.socket, serve.monitor):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))


def half_a_message(serve: Process) -> None:
    front = RawFrontEnd(serve.socket)
    front.socket.send(b"\1" * 5)
    time.sleep(1000)


def many_buffers(serve: Process) -> None:
    """A ring as large as can be, full of requests."""
    size, desc, avail, used = 32768, 0x100000, 0x200000, 0x280000
    front = RawFrontEnd(serve.socket).hello()
    front.map[desc : desc + 16 * size] = struct.pack("<QIHH", 0x20000, 4, 0, 0) * size
    front.map[avail + 4 : avail + 4 + 2 * size] = struct.pack(f"<{size}H", *range(size))
    front.map[0x20000:0x20004] = struct.pack("<I", 100)
    added = 0
    at = [USER + part for part in (desc, used, avail)]
    front.ask(Request.SET_VRING_NUM, vu.VringState(0, size).pack())
    front.ask(Request.SET_VRING_BASE, vu.VringState(0, 0).pack())
    front.ask(Request.SET_VRING_ADDR, vu.VringAddr(0, 0, *at, 0).pack())
    front.ask(Request.SET_VRING_KICK, vu.VringFd(0, True).pack(), [front.kick])
    front.ask(Request.SET_VRING_ENABLE, vu.VringState(0, 1).pack())
    words = memoryview(front.map).cast("H")
    while True:
        if words[used // 2 + 1] == added:
            added = added + size & 0xFFFF
            words[avail // 2 + 1] = added
            front.ring_the_bell()
        time.sleep(0.001)


def huge_tables(serve: Process) -> None:
    """Tables of terabytes that are nowhere."""
    front = RawFrontEnd(serve.socket).hello()
    size = 1 << 44
    os.ftruncate(front.ram, size)
    tables = [vu.MemoryRegion.pack_table([vu.MemoryRegion(0, size - less, USER, 0)]) for less in (0, 4096)]
    while True:
        for table in tables:
            front.send(Request.SET_MEM_TABLE, table, [front.ram])


class Load:
    """A process that does one thing over and over."""

    def __init__(self, act: Callable[[Process], None], serve: Process) -> None:
        self.pid = os.fork()
        if not self.pid:
            try:
                act(serve)
            finally:
                os._exit(1)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


@pytest.mark.parametrize(
    "act",
    [
        flood_messages,
        flood_refusals,
        refill_for_ever,
        many_buffers,
        huge_tables,
        flood_monitor,
        connect_over_and_over,
        half_a_message,
    ],
)
def test_the_monitor_and_sigterm_answer_under_load(serve: Process, act: Callable[[Process], None]) -> None:
    findings = Findings()
    with under_watch(serve, findings), Load(act, serve) as load:
        time.sleep(LOAD)
        assert load.running()
    assert not findings.wrong
    assert findings.asked > LOAD
    assert serve.log.read_text().count("refused") <= 25
    with Load(act, serve):
        time.sleep(0.3)
        began = time.monotonic()
        serve.process.terminate()
        wait_for(lambda: serve.told("SHUTDOWN"))
        assert time.monotonic() - began < 1.0
        assert serve.process.wait(10) == 0


# -- descriptors stay as their owner has them -------------------------------------------------------------------------


def test_a_call_that_is_full_keeps_nobody_waiting(serve: Process, front: RawFrontEnd) -> None:
    """An eventfd that blocks, with a full counter: a write to it would wait until its owner reads."""
    front.hello().ring()
    os.write(front.call, struct.pack("<Q", (1 << 64) - 2))
    for n in range(1, 20):
        front.add()
        front.ring_the_bell()
        wait_for(lambda n=n: front.used == n)
    assert front_end_of(serve)["connected"]
    assert os.get_blocking(front.call)
    assert os.eventfd_read(front.call) >= (1 << 64) - 2
    front.add()
    front.ring_the_bell()
    assert select.select([front.call], [], [], 10)[0], "emptied, it is signalled again"


def test_two_rings_with_one_kick(serve: Process, front: RawFrontEnd) -> None:
    """Both are told that it can be read, and the first leaves nothing for the second."""
    front.hello().ring(0).ring(1)
    for n in range(1, 50):
        front.add()
        front.ring_the_bell()
        wait_for(lambda n=n: front.used == n)
    assert os.get_blocking(front.kick)
    assert serve.ask("query-status")["status"] == "running"


def test_no_signal_is_lost_and_used_comes_first(serve: Process, front: RawFrontEnd) -> None:
    """Each buffer is used before its interrupt, and there is an interrupt for each."""
    front.hello().ring()
    began = time.monotonic()
    for n in range(1, 2001):
        front.add()
        front.ring_the_bell()
        assert select.select([front.call], [], [], 10)[0], f"no interrupt for buffer {n}"
        assert front.used == n & 0xFFFF
        os.eventfd_read(front.call)
    assert time.monotonic() - began < 20


def test_config_changes_that_nobody_reads(serve: Process, front: RawFrontEnd) -> None:
    front.hello().ring()
    mine, theirs = socket.socketpair()
    assert front.ask(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()]) == 0
    client = MonitorClient(str(serve.monitor))
    for n in range(2000):
        client.execute("balloon", {"value": (1 + n % 2) << 20})
    client.close()
    assert os.get_blocking(theirs.fileno())
    assert front_end_of(serve)["connected"]
    mine.close()
    theirs.close()


# -- what is refused --------------------------------------------------------------------------------------------------


def kinds() -> dict[str, Callable[[], list[int]]]:
    return {
        "pipe": lambda: list(os.pipe()),
        "folder": lambda: [os.open("/", os.O_RDONLY)],
        "file": lambda: [os.open(__file__, os.O_RDONLY)],
        "memory": lambda: [os.memfd_create("no doorbell")],
        "device": lambda: [os.open("/dev/zero", os.O_RDWR)],
        "name": lambda: [os.open("/", os.O_PATH)],
        "process": lambda: [os.pidfd_open(os.getpid())],
    }


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_what_cannot_be_a_doorbell(serve: Process, front: RawFrontEnd, kind: str, request_: Request) -> None:
    front.hello()
    before = descriptors(serve.process.pid)
    fds = kinds()[kind]()
    assert front.ask(request_, vu.VringFd(0, True).pack(), [fds[-1]]) == 1
    for fd in fds:
        os.close(fd)
    assert "eventfds or sockets" in str(front_end_of(serve)["last-error"])
    wait_for(lambda: descriptors(serve.process.pid) == before)
    front.ring()


def test_requests_go_to_a_socket_only(serve: Process, front: RawFrontEnd) -> None:
    front.hello()
    before = descriptors(serve.process.pid)
    for _ in range(100):
        assert front.ask(Request.SET_BACKEND_REQ_FD, fds=[front.kick]) == 1
        assert front.ask(Request.SET_BACKEND_REQ_FD, fds=[front.kick, front.kick]) == 1
        assert front.ask(Request.SET_BACKEND_REQ_FD) == 1
    wait_for(lambda: descriptors(serve.process.pid) == before)


def test_a_doorbell_for_no_queue_is_nobodys(serve: Process, front: RawFrontEnd) -> None:
    front.hello()
    before = descriptors(serve.process.pid)
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        for index in (5, 200, 255):
            assert front.ask(request, vu.VringFd(index, True).pack(), [front.call]) == 1
            assert front.ask(request, vu.VringFd(0, True).pack(), [front.call, front.call]) == 1
    wait_for(lambda: descriptors(serve.process.pid) == before)


@pytest.mark.parametrize("request_", [Request.SET_VRING_ERR, Request.SET_VRING_CALL, Request.SET_BACKEND_REQ_FD])
def test_its_own_connection_is_no_gift(serve: Process, request_: Request) -> None:
    """Held by the server, it would never be seen to end, and no other front end could come."""
    front = RawFrontEnd(serve.socket).hello()
    payload = b"" if request_ is Request.SET_BACKEND_REQ_FD else vu.VringFd(0, True).pack()
    assert front.ask(request_, payload, [front.socket.fileno()]) == 1
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(serve.monitor))
        assert front.ask(request_, payload, [client.fileno()]) == 1
    front.close()
    assert "closed" in gone(serve)
    takes_another(serve)


@pytest.mark.parametrize("at_once", [True, False])
def test_more_descriptors_than_a_message_can_have(serve: Process, at_once: bool) -> None:
    """In one piece of it, or piled up over many."""
    before = descriptors(serve.process.pid)
    front = RawFrontEnd(serve.socket)
    if at_once:
        front.send(Request.SET_MEM_TABLE, bytes(72), [front.kick] * (MAX_FDS + 1))
    else:
        front.socket.send(vu.HEADER.pack(Request.SET_OWNER, 1, 4000))
        with contextlib.suppress(OSError):
            for _ in range(40):
                socket.send_fds(front.socket, [b"x"], [front.kick])
    assert "descriptors" in gone(serve)
    front.close()
    wait_for(lambda: descriptors(serve.process.pid) == before)
    takes_another(serve)


# -- it outlives its clients ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def descriptors_left(serve: Process, more: int) -> Iterator[None]:
    """Within the block the server can have so many more."""
    pid = serve.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    free = sorted(set(range(soft)) - {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")})
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[more], hard))
    yield
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def busy_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("more", [1, 2, 5])
def test_no_descriptor_is_left(serve: Process, more: int) -> None:
    """Who comes has to wait; who is there is served; and nothing spins meanwhile."""
    first = MonitorClient(str(serve.monitor))
    held = []
    with descriptors_left(serve, more):
        for path in [serve.monitor] * (more + 2) + [serve.socket]:
            held.append(socket.socket(socket.AF_UNIX))
            held[-1].connect(str(path))
        wait_for(lambda: "have to wait" in serve.log.read_text())
        busy = busy_seconds(serve.process.pid)
        time.sleep(1)
        assert busy_seconds(serve.process.pid) - busy < 0.3
        assert first.execute("query-status")["status"] == "prelaunch"
        for client in held:
            client.close()
        wait_for(lambda: serve.ask("query-status"))
    first.close()
    takes_another(serve)


def test_no_room_for_what_a_message_brings(serve: Process) -> None:
    front = RawFrontEnd(serve.socket).hello()
    with descriptors_left(serve, 0):
        front.send(Request.SET_VRING_CALL, vu.VringFd(0, True).pack(), [front.call])
        assert front.reply() is None
    front.close()
    assert "ulimit -n" in gone(serve)
    takes_another(serve)


@pytest.mark.parametrize("size", [1 << 45, 1 << 62, (1 << 63) - 4096, (1 << 64) - 4096])
def test_silly_sizes(serve: Process, front: RawFrontEnd, size: int) -> None:
    """Of a region, from a file that may even have it."""
    fd = os.memfd_create("vast")
    os.ftruncate(fd, min(size, (1 << 62) - 1))
    table = vu.MemoryRegion.pack_table([vu.MemoryRegion(0, size, 4096, 0)])
    front.hello().ask(Request.SET_MEM_TABLE, table, [fd])
    os.close(fd)
    front.socket.close()
    gone(serve)
    takes_another(serve)


def test_memory_that_is_cut_off(serve: Process) -> None:
    """The front end ends with a reason, whoever met it; the next is served."""
    for cut in (lambda front: front.ring_the_bell(), lambda front: front.ring(1)):
        front = RawFrontEnd(serve.socket).hello().ring()
        before = serve.ask("query-device")["front-end"]["connections"]
        os.ftruncate(front.ram, 0)
        with contextlib.suppress(AssertionError):  # the answer may be the end of the connection
            cut(front)
        assert "memory is lost" in gone(serve)
        assert front_end_of(serve)["connections"] == before
        front.close()
    takes_another(serve)
