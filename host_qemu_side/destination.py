"""The destination host: receives a guest and goes on with it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import stat
import time
from collections.abc import Callable
from typing import Any

from balloon_dev.device import BalloonDevice
from balloon_dev.features import BalloonFeature
from balloon_dev.hinting import HintState
from balloon_dev.profiles import profile_named
from host_qemu_side.discard.current import CurrentDiscarder
from host_qemu_side.loop import Loop
from host_qemu_side.migration.output import parse_address
from host_qemu_side.migration.receiver import Receiver
from host_qemu_side.migration.stream import StreamReader
from host_qemu_side.python_guest import PythonGuest
from host_qemu_side.vhost_user import VhostUserBackend
from vring.errors import PeerVanished, UsageError, VirtioError

__all__ = ["accept", "receive", "resume"]

RESUME_OPTIONS = {
    "profile": re.compile(r"[a-z]+"),
    "batch": re.compile(r"[1-9][0-9]{0,3}"),
    "free_at": re.compile(r"done|stop"),
    "dirty_log": re.compile(r"auto|wp-async|software"),
}
"""Options of the guest that a stream's header carries, and what they may say."""
SILENCE = 60.0
"""Seconds a source may be silent in the middle of a stream."""


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


def accept(address: str, *, announce: Callable[[str], None] = lambda text: None) -> _Source:
    """Wait for a source at ``unix:PATH`` or ``tcp:HOST:PORT``, or open ``file:PATH``.

    Parameters
    ----------
    address
        See `parse_address`; TCP port 0 takes a free one.
    announce
        Told where the program listens.

    Raises
    ------
    UsageError
        If one cannot listen there or the file cannot be read.
    """
    kind, rest = parse_address(address)
    if kind == "file":
        try:
            return _Source(None, rest)
        except OSError as error:
            raise UsageError(f"cannot read {rest}: {error.strerror}") from error
    if kind == "fd":
        return _Source(socket.socket(fileno=int(rest)), None)
    path = None
    try:
        if kind == "unix":
            _remove_left_over(rest)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(rest)
            path = rest
            listener.listen(1)
        else:
            host, _, port = rest.rpartition(":")
            listener = socket.create_server((host.strip("[]"), int(port)))
            address = f"tcp:{host}:{listener.getsockname()[1]}"
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[0]  # the rest only repeats the address
        raise UsageError(f"cannot listen on {address}: {why}") from error
    announce(address)
    try:
        with listener:
            connection, _ = listener.accept()
    finally:
        if path is not None:
            os.unlink(path)
    return _Source(connection, None)


def _remove_left_over(path: str) -> None:
    """Remove a socket that a dead process left behind.

    Raises
    ------
    UsageError
        If somebody listens there, or if it is no socket.
    """
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise UsageError(f"cannot listen on unix:{path}: it exists and is no socket; choose another path")
    except FileNotFoundError:
        return
    # A socket of the wrong type tells whether there is a live one behind the name without connecting to it.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
    raise UsageError(f"cannot listen on unix:{path}: another process listens there already")


def receive(source: _Source, receiver: Receiver, *, on_record: Callable[[Receiver], None] = lambda r: None) -> None:
    """Read the stream to its end.

    Raises
    ------
    StreamError, PeerVanished
        If it is damaged or cut off; the source has been told.
    """
    reader = StreamReader(reuse=True)
    source.answer(receiver.hello())
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
    memory, saved = receiver.memory, receiver.device_state
    try:
        state, transport = saved["device"], saved["transport"]
        device = BalloonDevice(int(state["offered"]), profile=profile_named(str(state["profile"])))
        bases = {int(r["index"]): int(r["base"]) for r in transport["rings"]}
        arguments = _resume_arguments(receiver.header.get("resume", {}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the device state in the stream is malformed: {error!r}") from error
    device.discard = CurrentDiscarder(lambda: memory, lambda: bool(device.negotiated & BalloonFeature.MUST_TELL_HOST))
    loop = Loop()
    backend = VhostUserBackend(device, loop, on_memory=lambda: device.load(state))
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


def _resume_arguments(wanted: dict[str, Any]) -> list[str]:
    """Return the guest's command line for what the header asks; it came from outside, so only what is known passes."""
    found = []
    for name, value in ((name, str(value)) for name, value in wanted.items()):
        if name not in RESUME_OPTIONS or RESUME_OPTIONS[name].fullmatch(value) is None:
            raise ValueError(f"{name} {value!r}")
        found += [f"--{name.replace('_', '-')}", value]
    return found


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
