"""`balloon`, with one thing that dies at a named moment: a program for tests to run.

``python kill_program.py WHEN WHAT balloon-arguments...`` runs the command line as a user does, and at WHEN (a phase of
the migration, or ``boot``, ``hello``, ``resuming``) it does WHAT from inside, so that nothing depends on timing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from balloon_cli import __main__ as program
from balloon_cli import migrate, migrate_linux
from host_qemu_side import runner
from host_qemu_side.migration import Migration, Phase


class World:
    """What there is to kill."""

    guest: Any = None
    host: Any = None
    receiver: Any = None
    output: Any = None
    done = False


def shut(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(how)


def interrupt_later(seconds: float) -> None:
    threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT)).start()


def interrupt_stopped_receiver() -> None:
    os.kill(World.receiver.pid, signal.SIGSTOP)
    interrupt_later(0.7)


def twice() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def close_device_in_loop() -> None:
    """As after a message that makes no sense: while the loop serves the socket, never in the middle of a step."""
    loop, backend = World.host.loop, World.host.backend
    serve = loop.run_once

    def once(timeout: float = 0.0) -> None:
        loop.run_once = serve
        serve(0.0)
        backend.disconnect("the test closed it")

    loop.run_once = once


def keeper_of(linux: Any) -> int:
    return int(linux._keeper.pid)


def kill_guest_there() -> None:
    """Kill the destination's guest as soon as it is started."""

    def hunt() -> None:
        children = f"/proc/{World.receiver.pid}/task/{World.receiver.pid}/children"
        while True:
            with open(children) as stream:
                for pid in stream.read().split():
                    with open(f"/proc/{pid}/cmdline") as line:
                        if "guest_driver" in line.read():
                            os.kill(int(pid), signal.SIGKILL)
                            return
            time.sleep(0.01)

    threading.Thread(target=hunt, daemon=True).start()


def fill_disk() -> None:
    """Files of this process can grow no more (its guest has its memory already)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))


ACTIONS: dict[str, Callable[[], object]] = {
    "kill-guest": lambda: os.kill(World.guest.pid, signal.SIGKILL),
    "kill-keeper": lambda: os.kill(keeper_of(World.guest), signal.SIGKILL),
    "kill-receiver": lambda: os.kill(World.receiver.pid, signal.SIGKILL),
    "kill-guest-there": kill_guest_there,
    "disk-full": fill_disk,
    "kill-source": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "ctrl-c": lambda: os.kill(os.getpid(), signal.SIGINT),
    "ctrl-c-twice": twice,
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "device-closed-by-guest": lambda: shut(World.host.backend._socket, socket.SHUT_RD),
    "device-closed-by-host": close_device_in_loop,
    "control-closed-by-guest": lambda: shut(World.guest._control, socket.SHUT_RD),
    "control-closed-by-host": lambda: shut(World.guest._control, socket.SHUT_WR),
    "stream-closed-by-receiver": lambda: shut(World.output._socket, socket.SHUT_RDWR),
    "stream-closed-by-source": lambda: shut(World.output._socket, socket.SHUT_WR),
    "stopped-receiver-then-ctrl-c": interrupt_stopped_receiver,
}


def main() -> None:
    when, what, *arguments = sys.argv[1:]

    def act() -> None:
        if not World.done:
            World.done = True
            ACTIONS[what]()

    def noting(cls: type, name: str) -> type:
        class Noted(cls):  # type: ignore[misc,valid-type]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                setattr(World, name, self)
                super().__init__(*args, **kwargs)

        Noted.__name__ = cls.__name__
        return Noted

    for module in (migrate, migrate_linux):
        for kind, name in (("PythonGuest", "guest"), ("LinuxGuest", "guest"), ("SourceHost", "host")):
            if hasattr(module, kind):
                setattr(module, kind, noting(getattr(module, kind), name))
    spawn = migrate.spawn_receiver

    @contextlib.contextmanager
    def spawn_receiver(*args: str) -> Iterator[Any]:
        with spawn(*args) as (output, process):
            World.output, World.receiver = output, process
            yield output, process

    migrate.spawn_receiver = spawn_receiver  # type: ignore[assignment]

    def before(cls: type, method: str, moment: str) -> None:
        original = getattr(cls, method)

        @functools.wraps(original)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            if when == moment:
                act()
            return original(self, *args, **kwargs)

        setattr(cls, method, wrapped)

    before(runner.MigrationRunner, "_hello", "hello")
    before(runner.MigrationRunner, "_report", "resuming")
    before(Migration, "_setup", "setup")
    for guest in filter(None, (getattr(migrate, "PythonGuest", None), getattr(migrate_linux, "LinuxGuest", None))):
        original_wait = guest.wait_ready

        def wait_ready(self: Any, *args: Any, original: Any = original_wait, **kwargs: Any) -> Any:
            if when == "boot":
                if hasattr(self, "wait_hello"):
                    self.wait_hello(30.0)
                act()
            return original(self, *args, **kwargs)

        guest.wait_ready = wait_ready
    enter, step = Migration._enter, Migration.step

    def entering(self: Migration, phase: Phase) -> None:
        enter(self, phase)
        if phase.value == when and phase is not Phase.ROUND:
            act()

    def stepping(self: Migration, now: float) -> float:
        # In the middle of a round: something was sent, and the guest holds pages for hints.
        if when == "round" and self.phase is Phase.ROUND and self.current_round.bytes_sent > 1 << 20:
            act()
        return step(self, now)

    Migration._enter, Migration.step = entering, stepping  # type: ignore[method-assign]
    program.main(arguments)


if __name__ == "__main__":
    main()
