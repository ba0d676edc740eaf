"""The destination host: receives a guest and goes on with it."""

from __future__ import annotations

import contextlib
import errno
import json
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
from host_qemu_side.discard.current import CurrentDiscarder
from host_qemu_side.loop import Loop
from host_qemu_side.migration.address import Address
from host_qemu_side.migration.receiver import Receiver
from host_qemu_side.migration.stream import StreamReader
from host_qemu_side.python_guest import PythonGuest
from host_qemu_side.saved import SavedGuest, resume_arguments
from host_qemu_side.vhost_user import VhostUserBackend
from vring.errors import PeerVanished, UsageError, VirtioError
from vring.unix_socket import UnixListener, adopted

__all__ = ["accept", "receive", "resume"]

SILENCE = 60.0
"""Seconds a source may be silent in the middle of a stream, and a connection before its first word."""
MOST_WAITING = 16
"""Connections that are kept before any of them has said a word."""


class _Source:
    """Where the stream comes from: a socket or a file."""

    def __init__(self, sock: socket.socket | None, path: str | None) -> None:
        self._socket, self._file = sock, None if path is None else open(path, "rb", buffering=0)  # noqa: SIM115
        if sock is not None:
            sock.settimeout(SILENCE)

    def read(self, into: memoryview) -> int:
        """Read what there is, at most as much as fits; return how many bytes, 0 at the end."""
        if self._file is not None:
            return self._file.readinto(into) or 0
        assert self._socket is not None
        try:
            return self._socket.recv_into(into)
        except TimeoutError as error:
            raise PeerVanished(f"the source was silent for {SILENCE:g} s") from error
        except OSError as error:
            raise PeerVanished(f"the source is gone: {error.strerror or error}") from error

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


def receive(source: _Source, receiver: Receiver, *, on_record: Callable[[Receiver], None] = lambda r: None) -> None:
    """Read the stream to its end, from a source that was greeted.

    Raises
    ------
    StreamError, PeerVanished
        If it is damaged or cut off; the source has been told.
    """
    reader = StreamReader(reuse=True)
    try:
        while not receiver.complete:
            record = reader.next()
            if record is None:
                size = source.read(reader.room())
                if not size:
                    raise PeerVanished(f"the stream is cut off {reader.position} (state: {receiver.state.value})")
                reader.filled(size)
                continue
            answer = receiver.handle(record)
            if answer:
                source.answer(answer)
            on_record(receiver)
    except VirtioError as error:
        with contextlib.suppress(PeerVanished):
            source.answer(receiver.refuse(str(error)))
        raise


def resume(
    receiver: Receiver,
    *,
    run_for: float = 0.5,
    announce: Callable[[str], None] = lambda text: None,
    on_checked: Callable[[dict[str, Any]], None] = lambda facts: None,
    keep_running: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Go on with a received guest, and see that it does well.

    The guest checks every page it has allocated, runs on, answers a run of hints, and is checked again.

    Parameters
    ----------
    receiver
        In state COMMITTED.
    run_for
        Seconds to let the workload go on before the hint run and again after it.
    announce
        Told what happens.
    on_checked
        Told the result when the checks are over.
    keep_running
        Called over and over after the checks; the guest runs on while it returns True.

    Returns
    -------
    dict
        JSON values: pages checked and wrong, blocks of the hint run, pages written since.

    Raises
    ------
    VirtioError
        If the guest or the device cannot go on.
    """
    assert receiver.memory is not None
    assert receiver.header is not None
    memory, saved = receiver.memory, SavedGuest.from_json(receiver.device_state)
    device = BalloonDevice(saved.device.offered, profile=profile_named(saved.device.profile))
    bases = {ring.index: ring.base for ring in saved.transport.rings}
    arguments = resume_arguments(receiver.header)
    device.discard = CurrentDiscarder(lambda: memory, lambda: bool(device.negotiated & BalloonFeature.MUST_TELL_HOST))
    loop = Loop()

    def go_on() -> None:
        device.load(saved.device)
        backend.resume(bases)

    backend = VhostUserBackend(device, loop, on_memory=go_on)
    guest = None
    try:
        guest = PythonGuest(loop, backend, None, [*arguments, "--bases", json.dumps(bases)], ram=memory.regions[0].fd)
        guest.wait_ready()
        announce("the guest runs here")
        allocated = int(guest.status["allocated_pages"])
        written = int(guest.status["pages_written"])
        first = _checked(guest)
        facts: dict[str, Any] = {
            "pages_checked": first["pages"],
            "pages_wrong": first["wrong"],
            "allocated_pages": allocated,
        }
        guest.run_for(run_for)
        status = guest.ask("status", "status")
        facts["hinted_pages_after_done"] = status["hinted_pages"]
        if device.hinting_negotiated:
            facts["hint_run"] = _hint_run(loop, backend, device)
        guest.run_for(run_for)
        second = _checked(guest)
        status = guest.ask("status", "status")
        facts |= {
            "pages_checked_again": second["pages"],
            "pages_wrong_again": second["wrong"],
            "pages_written_since": int(status["pages_written"]) - written,
            "hinted_pages_left": status["hinted_pages"],
        }
        on_checked(facts)
        if keep_running is not None:
            while keep_running():
                guest.run_for(0.2)
        return facts
    finally:
        if guest is not None:
            guest.close()
        backend.close()
        loop.close()


def _checked(guest: PythonGuest) -> dict[str, Any]:
    guest.ask("check", "checked", 120.0)
    assert guest.checked is not None
    return guest.checked


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
