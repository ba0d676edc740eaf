"""A vhost-user back end: puts any `vring.device.Device` behind a Unix socket.

The front end (User-Mode Linux, this project's guest process) brings memory and rings, this side serves them from one
`Loop`. Every acknowledged request may block the whole guest, so the reply goes out first and the work is done after.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import Any

from host_qemu_side.loop import TURN, Loop
from host_qemu_side.vhost_user.descriptors import (
    NoDoorbell,
    check_held,
    close_fd,
    receive,
)
from host_qemu_side.vhost_user.messages import Messages
from host_qemu_side.vhost_user.rings import Rings
from vring import vhost_user as vu
from vring.device import Device
from vring.errors import VirtioError, reason
from vring.memory import GuestMemory
from vring.unix_socket import UnixListener
from vring.vhost_user import ProtocolFeature, VhostUserError

__all__ = ["VhostUserBackend"]

log = logging.getLogger(__name__)
REFUSALS_TOLD = 20
"""Of one connection, in warnings: a front end that is refused for ever fills no disk."""


class VhostUserBackend:
    """Serves one device to one front end at a time.

    Parameters
    ----------
    device
        The device type behind it.
    loop
        Who watches the descriptors.
    on_disconnect
        Called with the reason when the front end is gone. The device has been reset by then, and a new front end may
        connect if there is a listener.
    on_memory
        Called when the device has got its memory and no queue runs yet: the moment to load saved device state.
    """

    def __init__(
        self,
        device: Device,
        loop: Loop,
        *,
        on_disconnect: Callable[[str], None] | None = None,
        on_memory: Callable[[], None] | None = None,
    ) -> None:
        self.device = device
        self.loop = loop
        self.connections = 0
        self._on_disconnect = on_disconnect
        self._listener: UnixListener | None = None
        self._socket: socket.socket | None = None
        self._rings = Rings(device, loop, self.deliver)
        self._messages = Messages(device, self._rings, on_memory)
        self._header: vu.Header | None = None
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._refusals = 0

    # -- connecting -----------------------------------------------------------------------------------------------

    def listen(self, path: str) -> None:
        """Wait for front ends on a Unix socket, one at a time.

        Raises
        ------
        UsageError
            If one cannot listen there, such as where another process does.
        """
        self._listener = UnixListener(path, 1)
        self.loop.listen(self._listener, self._accept)

    def serve(self, connection: socket.socket) -> None:
        """Serve a front end that is connected already."""
        connection.setblocking(False)
        self._socket = connection
        self._refusals = 0
        self.connections += 1
        self.loop.watch(connection.fileno(), self._readable)

    def _accept(self, connection: socket.socket) -> None:
        if self._socket is not None:
            log.warning("vhost-user: a second front end tried to connect and was turned away")
            connection.close()
            return
        self.serve(connection)

    @property
    def memory(self) -> GuestMemory | None:
        """RAM of the guest that is connected."""
        return self._rings.table.memory

    @property
    def features(self) -> int:
        """Features negotiated, with vhost-user's own."""
        return self._rings.features or 0

    @property
    def running(self) -> bool:
        """Whether the driver's rings run, or at least one of them."""
        return self._rings.running

    def at_rest(self, index: int) -> dict[str, Any]:
        """Return the last values of a ring that does not run, and what it needs for that, in names of messages."""
        ring = self._rings[index]
        return {"size": ring.size, "next-avail": ring.base, "needs": self._rings.missing(index)}

    @property
    def last_error(self) -> str | None:
        """What a front end did wrong last, or why it went."""
        return self._rings.last_error

    @property
    def connected(self) -> bool:
        """Whether a front end is there."""
        return self._socket is not None

    @property
    def can_tell_config(self) -> bool:
        """Whether config changes reach the driver (BACKEND_REQ)."""
        return self._messages.channel is not None

    def close(self) -> None:
        """Give everything back."""
        self.disconnect(None)
        if self._listener is not None:
            self.loop.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None
        self._rings.close()

    def disconnect(self, why: str | None = "the back end closed the connection") -> None:
        """End the connection and reset the device; with a listener another front end may come.

        Parameters
        ----------
        why
            Told to `on_disconnect`; None: it is not told.
        """
        if self._socket is None:
            return
        self.loop.unwatch(self._socket.fileno())
        self._socket.close()
        self._socket = None
        self._messages.forget()
        memory = self.memory
        self._rings.clear()
        for fd in self._fds:
            close_fd(fd)
        self._fds.clear()
        self._buffer.clear()
        self._header = None
        self.device.reset()
        self.device.set_memory(None)
        if memory is not None:
            memory.close()
        if why is not None:
            self._rings.last_error = why
            log.info("vhost-user: front end gone: %s", why)
            if self._on_disconnect is not None:
                self._on_disconnect(why)

    # -- messages in ----------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        """Read exactly one header, then exactly its body: two messages may arrive glued, and a descriptor read with
        the wrong one has no owner.
        """
        until = time.monotonic() + TURN
        try:
            while self._socket is not None:
                wanted = (vu.HEADER_SIZE if self._header is None else self._header.size) - len(self._buffer)
                if wanted > 0:
                    data, fds = receive(self._socket, wanted)
                    self._fds += fds
                    if len(self._fds) > vu.MAX_FDS:
                        raise VhostUserError(f"vhost-user: a message with more than {vu.MAX_FDS} descriptors")
                    if not data:
                        self.disconnect("it closed the socket")
                        return
                    self._buffer += data
                    if len(data) < wanted:
                        continue
                if self._header is None:
                    self._header = vu.Header.unpack(bytes(self._buffer))
                    self._buffer.clear()
                    continue
                header, payload, fds = self._header, bytes(self._buffer), self._fds
                self._header, self._fds = None, []
                self._buffer.clear()
                self._handle(header, payload, fds)
                if time.monotonic() > until:
                    return  # what is left to read is still there the next time round
        except BlockingIOError:
            pass
        except (VhostUserError, ConnectionError) as error:
            self.disconnect(str(error))
        except Exception as error:  # no memory for what it asked, a fault of ours: it ends, and nobody else
            log.debug("vhost-user: a front end could not be served", exc_info=True)
            self.disconnect(f"it could not be served: {reason(error)}")

    def _handle(self, header: vu.Header, payload: bytes, fds: list[int]) -> None:
        log.debug("vhost-user: %s, %d bytes, %d fds", header.name, len(payload), len(fds))
        assert self._socket is not None
        result: bytes | None = None
        failed: VirtioError | None = None
        try:
            check_held(fds, self._socket)
            result = self._messages.obey(header.request, payload, fds)
        except (VirtioError, OSError) as error:
            failed = error if isinstance(error, VirtioError) else VhostUserError(f"vhost-user: {header.name}: {error}")
        finally:
            for fd in fds:
                close_fd(fd)
        self._rings.rest()
        if result is not None:
            self._send(vu.pack_message(header.request, result, reply=True))
        elif header.need_reply and self._messages.protocol & ProtocolFeature.REPLY_ACK:
            self._send(vu.pack_message(header.request, vu.pack_u64(1 if failed else 0), reply=True))
        elif isinstance(failed, NoDoorbell) and failed.queue is not None:
            self._rings.no_doorbell(failed.queue, failed)
        elif failed is not None:
            raise VhostUserError(f"vhost-user: {header.name} failed: {failed}") from failed
        if failed is not None:
            self._rings.last_error = str(failed)
            self._refusals += 1
            level = logging.WARNING if self._refusals <= REFUSALS_TOLD else logging.DEBUG
            log.log(level, "vhost-user: %s refused: %s", header.name, failed)
        self._rings.wake()  # the guest has its reply
        self.deliver()

    def _send(self, message: bytes) -> None:
        assert self._socket is not None
        try:
            self._socket.sendall(message)
        except BlockingIOError as error:
            raise VhostUserError("vhost-user: the front end does not read its replies") from error

    # -- the host's side ------------------------------------------------------------------------------------------

    def process(self, index: int) -> None:
        """Serve a queue now, without a kick; used buffers are notified."""
        if index < len(self._rings):
            self._rings.process(index)
            self.deliver()

    def check_memory(self) -> None:
        """End the connection of a front end that has cut off the memory it gave."""
        if self.memory is not None and self.memory.lost:
            self.disconnect("the guest's memory is lost: its file was made shorter, or its storage is full")

    def deliver(self) -> None:
        """Notify the driver of whatever the device has to say.

        A config change waits until a ring runs: told of one while its driver is reset or stopped, QEMU 11.1 dies.
        """
        self.check_memory()
        self._rings.call()
        if self._messages.channel is not None and self.running and self.device.take_config_change():
            try:
                message = vu.pack_message(vu.BackendRequest.CONFIG_CHANGE)
                self._messages.channel.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                pass  # notifications that were not read yet are pending: it will look at the config space
            except OSError as error:  # the front end is gone, which its socket will say
                log.info("vhost-user: config change not delivered: %s", error)

    def resume(self, bases: dict[int, int]) -> None:
        """Expect the driver whose state was loaded into the device, with rings that start at these bases by number.

        Call it from `on_memory`. A ring that starts elsewhere is taken for another driver's, which begins afresh.
        """
        self._rings.resume(bases)

    def hold(self) -> None:
        """Serve no queue until `release`: the VM is paused."""
        self._rings.hold()

    def release(self) -> None:
        """Go on serving."""
        self._rings.release()
        self.deliver()

    def save(self) -> dict[str, Any]:
        """Return features and rings for a migration: sizes and base indices. Call it while held."""
        return {"features": self.features & ~vu.F_PROTOCOL_FEATURES, "rings": self._rings.save()}
