"""The destination host: receives a guest and goes on with it."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from balloon_dev.device import BalloonDevice
from balloon_dev.features import BalloonFeature
from balloon_dev.hinting import HintState
from balloon_dev.profiles import profile_named
from host_qemu_side import deadlines
from host_qemu_side.deadlines import SILENCE
from host_qemu_side.discard.current import CurrentDiscarder
from host_qemu_side.loop import Loop
from host_qemu_side.migration import MIN_BANDWIDTH
from host_qemu_side.migration.address import Address
from host_qemu_side.migration.receiver import Receiver, ReceiverState
from host_qemu_side.migration.stream import StreamError, StreamReader
from host_qemu_side.python_guest import PythonGuest
from host_qemu_side.saved import SavedGuest, resume_arguments
from host_qemu_side.vhost_user import VhostUserBackend
from vring.errors import MissingFacility, PeerVanished, UsageError, VirtioError
from vring.unix_socket import UnixListener, adopted

__all__ = ["Resumption", "accept", "receive"]

MOST_WAITING = 16
"""Connections that are kept before any of them has said a word."""


class _Source:
    """Where the stream comes from: a socket or a file."""

    def __init__(self, sock: socket.socket | None, path: str | None) -> None:
        self._socket, self._file = sock, None if path is None else open(path, "rb", buffering=0)  # noqa: SIM115
        if sock is not None:
            sock.settimeout(SILENCE)

    def read(self, into: memoryview, until: float) -> int:
        """Read what there is and fits, waiting until a monotonic time; return how many bytes, 0 at the end."""
        if self._file is not None:
            return self._file.readinto(into) or 0
        assert self._socket is not None
        try:
            self._socket.settimeout(max(until - time.monotonic(), 0.001))
            return self._socket.recv_into(into)
        except TimeoutError as error:
            raise PeerVanished(f"the source was silent for {SILENCE:g} s, or nearly") from error
        except OSError as error:
            raise PeerVanished(f"the source is gone: {error.strerror or error}") from error

    @property
    def is_file(self) -> bool:
        """Whether nobody is there to be answered."""
        return self._socket is None

    def fileno(self) -> int:
        """Return the socket's descriptor, to wait for."""
        assert self._socket is not None
        return self._socket.fileno()

    def has_spoken(self) -> bool:
        """Return whether there is a first word of a source, once its socket can be read; nothing is taken.

        Raises
        ------
        PeerVanished
            If it went without one.
        """
        assert self._socket is not None
        try:
            if self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return True
        except BlockingIOError:
            return False
        except OSError as error:
            raise PeerVanished(f"it went without a word: {error.strerror or error}") from error
        raise PeerVanished("it went without a word")

    def answer(self, buffers: list[bytes | memoryview]) -> None:
        """Send records to the source; a file takes none."""
        if self._socket is None:
            return
        try:
            self._socket.settimeout(SILENCE)  # for each buffer as a whole
            for buffer in buffers:
                self._socket.sendall(buffer)
        except OSError as error:
            raise PeerVanished(f"the source is gone: {error.strerror or error}") from error

    def close(self) -> None:
        """Close it."""
        if self._socket is not None:
            self._socket.close()
        if self._file is not None:
            self._file.close()


def accept(
    address: Address,
    greeting: list[bytes | memoryview],
    *,
    announce: Callable[[Address], None] = lambda where: None,
    on_stranger: Callable[[str], None] = lambda why: None,
) -> _Source:
    """Wait for a source at a ``unix`` or ``tcp`` address and greet it, or open a ``file``.

    Who connects and goes, or stays, without a word (a look whether the port is open) is no source: the wait goes on.

    Parameters
    ----------
    address
        Where; TCP port 0 takes a free one.
    greeting
        What a source is told first: `Receiver.hello`.
    announce
        Told where the program listens.
    on_stranger
        Told why a connection was none of a source.

    Raises
    ------
    UsageError
        If one cannot listen there or the file cannot be read.
    PeerVanished
        If the source that a descriptor leads to takes no greeting.
    """
    if address.kind == "file":
        try:
            return _Source(None, address.path)
        except OSError as error:
            raise UsageError(f"cannot read {address.path}: {error.strerror}") from error
    if address.kind == "fd":
        source = _Source(adopted(address.fd), None)
        source.answer(greeting)
        return source
    with contextlib.ExitStack() as stack:
        if address.kind == "unix":
            unix = UnixListener(address.path)
            stack.callback(unix.close)
            listener = unix.socket
        else:
            listener = stack.enter_context(_listen_tcp(address))
            address = replace(address, port=listener.getsockname()[1])
        announce(address)
        return _first_word(listener, greeting, on_stranger)


def _first_word(
    listener: socket.socket, greeting: list[bytes | memoryview], on_stranger: Callable[[str], None]
) -> _Source:
    """Return the first connection that says something; one that only stays does not keep the others out."""
    waiting: list[tuple[_Source, float]] = []
    try:
        while True:
            watched: list[socket.socket | _Source] = [listener, *(source for source, _ in waiting)]
            readable, _, _ = select.select(watched, [], [], 1.0)
            for source, until in list(waiting):
                try:
                    if source in readable and source.has_spoken():
                        waiting.remove((source, until))
                        return source
                    if time.monotonic() > until:
                        raise PeerVanished(f"it was silent for {SILENCE:g} s")
                except PeerVanished as error:
                    waiting.remove((source, until))
                    source.close()
                    on_stranger(str(error))
            if listener in readable:
                source = _Source(listener.accept()[0], None)
                waiting.append((source, time.monotonic() + SILENCE))
                with contextlib.suppress(PeerVanished):  # the next turn sees it, too
                    source.answer(greeting)
            if len(waiting) > MOST_WAITING:
                waiting.pop(0)[0].close()
                on_stranger("it said nothing, and others came")
    finally:
        for source, _ in waiting:
            source.close()


def _listen_tcp(address: Address) -> socket.socket:
    """Listen at the first address of the host that can be listened at."""
    failed: Exception | None = None
    try:
        for family, _, _, _, target in socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                return socket.create_server(target, family=family, backlog=MOST_WAITING)
            except OSError as error:
                failed = failed or error
                # Another address is no way round somebody who listens at this one: sources would reach him.
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    break
    except (OSError, ValueError) as error:
        failed = error
    # What follows in an error of Python's own only repeats the address.
    why = (getattr(failed, "strerror", None) or str(failed)).partition(" (while")[0]
    raise UsageError(f"cannot listen on {address}: {why}") from failed


def receive(
    source: _Source,
    receiver: Receiver,
    resumption: Resumption | None = None,
    *,
    on_record: Callable[[Receiver], None] = lambda r: None,
) -> None:
    """Read the stream to its end, from a source that was greeted.

    Parameters
    ----------
    source, receiver
        From where and to whom.
    resumption
        Who goes on with the guest, if anybody: it is launched meanwhile, and is prepared by the receiver.
    on_record
        Called when a record has taken effect.

    Raises
    ------
    StreamError, PeerVanished
        If it is damaged, cut off or comes too slowly; the source has been told.
    VirtioError
        If the guest cannot go on here; the source has been told.
    """
    reader = StreamReader(reuse=True)
    began, got = time.monotonic(), 0
    try:
        while not receiver.complete:
            record = reader.next()
            if record is None:
                until = began + SILENCE + got / MIN_BANDWIDTH
                if resumption is not None and resumption.wait_launched(source, until):
                    source.answer(receiver.launched())
                size = source.read(reader.room(), until)
                if not size:
                    raise PeerVanished(f"the stream is cut off {reader.position} (state: {receiver.state.value})")
                reader.filled(size)
                got += size
                continue
            answer = receiver.handle(record)
            if answer:
                source.answer(answer)
            if resumption is not None and receiver.hands_over and not resumption.launched:
                resumption.launch(receiver)
            on_record(receiver)
            began, got = time.monotonic(), 0
    except VirtioError as error:
        with contextlib.suppress(PeerVanished):
            source.answer(receiver.refuse(str(error), started=receiver.state is ReceiverState.COMMITTED))
        raise


class Resumption:
    """A received guest on its way to run here.

    It is launched when the header has come, so that its process is up when its memory is; it is made whole, with its
    device, before READY; and it starts on COMMIT, not before. Everything that can fail has then been done.

    Parameters
    ----------
    start
        Whether a guest that was stopped at the source runs here.
    """

    def __init__(self, *, start: bool = False) -> None:
        self._loop = Loop()
        self._start_stopped = start
        self._backend: VhostUserBackend | None = None
        self._device: BalloonDevice | None = None
        self._guest: PythonGuest | None = None
        self._running = True
        self._told = False
        self.started = False
        """Whether COMMIT was obeyed: the guest may have run here."""

    @property
    def launched(self) -> bool:
        """Whether the guest's process was started."""
        return self._guest is not None

    @property
    def running(self) -> bool:
        """Whether the guest runs once it is started."""
        return self._running

    def launch(self, receiver: Receiver) -> None:
        """Start the guest's process, once the header has come; it waits for its memory to be complete.

        Raises
        ------
        StreamError
            If this program has no use for such a guest.
        MissingFacility
            If this machine cannot run it.
        """
        assert receiver.memory is not None
        assert receiver.header is not None
        arguments = resume_arguments(receiver.header)
        try:
            self._guest = PythonGuest(self._loop, None, None, arguments, ram=receiver.memory.regions[0].fd)
        except OSError as error:
            raise MissingFacility(f"the guest cannot be launched here: {error.strerror}") from error

    def wait_launched(self, source: _Source, until: float) -> bool:
        """Wait until a monotonic time, or until the source says more, or the guest's process is up: True, once.

        Raises
        ------
        VirtioError
            If the process is gone.
        """
        guest = self._guest
        if guest is None or self._told or source.is_file:
            return False
        said: list[None] = []
        self._loop.watch(source.fileno(), lambda: said.append(None))
        try:
            while not said and not guest.waiting and time.monotonic() < until:
                guest.check_alive()
                self._loop.run_once(min(max(until - time.monotonic(), 0.0), 0.1))
        finally:
            self._loop.unwatch(source.fileno())
        self._told = guest.waiting
        return self._told

    def prepare(self, receiver: Receiver) -> None:
        """Make the guest whole, with its device, and see that both answer; nothing runs yet.

        Raises
        ------
        VirtioError
            If it cannot go on here.
        """
        assert receiver.memory is not None
        assert self._guest is not None
        memory, saved = receiver.memory, SavedGuest.from_json(receiver.device_state)
        self._running = saved.running or self._start_stopped
        try:
            device = BalloonDevice(saved.device.offered, profile=profile_named(saved.device.profile))
            device.set_memory(memory)
            device.load(saved.device)  # again when the guest has connected; but this says what is wrong
        except UsageError as error:
            raise StreamError(f"the guest cannot go on here: {error}") from error
        device.discard = CurrentDiscarder(
            lambda: memory, lambda: bool(device.negotiated & BalloonFeature.MUST_TELL_HOST)
        )
        self._device = device
        bases = {ring.index: ring.base for ring in saved.transport.rings}

        def connected() -> None:
            device.load(saved.device)
            backend.resume(bases)

        self._backend = backend = VhostUserBackend(device, self._loop, on_memory=connected)
        backend.hold()
        try:
            self._guest.attach(backend, bases)
        except PeerVanished as error:
            if self._guest.refusal is None:
                raise
            raise StreamError(f"the guest cannot go on here: {self._guest.refusal}") from error
        self._told = True  # READY says more, and nothing but REPORT or REFUSED may follow it

    def start(self) -> None:
        """Obey COMMIT: the guest runs, unless it was stopped at the source.

        Raises
        ------
        PeerVanished
            If it is gone; if it is not `started` it has never run here.
        """
        assert self._guest is not None
        self._guest.check_alive()
        self.started = True
        if self._running:
            self._guest.thaw()

    @property
    def lives(self) -> bool:
        """Whether the guest was started and is there."""
        try:
            if self._guest is not None:
                self._guest.check_alive()
        except VirtioError:
            return False
        return self.started

    def examine(self, run_for: float = 0.5) -> dict[str, Any]:
        """See that the guest does well; return what was found as JSON values.

        It checks every page it has allocated. One that runs goes on for a while, answers a run of hints, and is
        checked again.

        Parameters
        ----------
        run_for
            Seconds to let the workload go on before the hint run and again after it.

        Raises
        ------
        VirtioError
            If the guest or the device cannot go on.
        """
        assert self._guest is not None
        guest = self._guest
        allocated = int(guest.status["allocated_pages"])
        written = int(guest.status["pages_written"])
        first = guest.check(deadlines.CHECK)
        facts: dict[str, Any] = {
            "running": self._running,
            "pages_checked": first["pages"],
            "pages_wrong": first["wrong"],
            "allocated_pages": allocated,
        }
        if not self._running:
            return facts
        guest.run_for(run_for)
        facts["hinted_pages_after_done"] = guest.ask("status")["hinted_pages"]
        assert self._backend is not None
        assert self._device is not None
        if self._device.hinting_negotiated:
            facts["hint_run"] = _hint_run(self._loop, self._backend, self._device)
        guest.run_for(run_for)
        second = guest.check(deadlines.CHECK)
        status = guest.ask("status")
        return facts | {
            "pages_checked_again": second["pages"],
            "pages_wrong_again": second["wrong"],
            "pages_written_since": int(status["pages_written"]) - written,
            "hinted_pages_left": status["hinted_pages"],
        }

    def serve_while(self, wanted: Callable[[], bool]) -> None:
        """Serve the guest while it is wanted.

        Raises
        ------
        PeerVanished
            If it is gone.
        """
        assert self._guest is not None
        while wanted():
            self._guest.run_for(0.2)

    def close(self) -> None:
        """End the guest, if there is one, and its device."""
        if self._guest is not None:
            self._guest.close()
        if self._backend is not None:
            self._backend.close()
        self._loop.close()


def _hint_run(loop: Loop, backend: VhostUserBackend, device: BalloonDevice) -> dict[str, Any]:
    """One run of hints to its end, then DONE; nobody uses the hints, the guest only has to answer."""
    blocks = 0

    def count(command_id: int, addr: Any, length: Any) -> None:
        nonlocal blocks
        blocks += len(addr)

    device.hint_sink = count
    began = time.monotonic()
    command_id = device.start_hinting()
    backend.deliver()
    try:
        loop.run_until(lambda: device.hinting.state is HintState.STOP, 10.0, "the guest to answer a hint run")
    finally:
        device.hint_sink = None
        device.finish_hinting()
        backend.deliver()
    return {"command_id": command_id, "blocks": blocks, "seconds": time.monotonic() - began}
