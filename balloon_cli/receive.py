"""``balloon receive``: the other end of ``balloon migrate``."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from balloon_cli.errors import message
from balloon_cli.guests import require_room
from balloon_cli.signals import next_one_kills
from guest_driver.process import die_with_parent as bind_to_parent
from host_qemu_side.destination import Resumption, accept, receive
from host_qemu_side.linux_guest import tags
from host_qemu_side.migration.address import Address
from host_qemu_side.migration.receiver import Receiver, ReceiverState
from host_qemu_side.migration.records import Header, Ready, Report, TagsFound
from host_qemu_side.migration.stream import StreamError
from host_qemu_side.saved import resume_arguments
from vring.contents import digests_in_order
from vring.errors import PeerVanished, UsageError, VirtioError, quoted
from vring.peer import survive_lost_memory

__all__ = ["ReceiveOptions", "receive_guest"]


@dataclass(frozen=True, slots=True)
class ReceiveOptions:
    """What the command line asked for."""

    address: Address
    resume: bool = True
    """Whether to go on with the guest."""
    start: bool = False
    """Whether a guest that was stopped at the source runs here."""
    keep: bool = False
    """Whether it runs on after the checks until Ctrl-C."""
    digests_fd: int = -1
    """Descriptor to write the digest of each page into, -1 for none."""
    die_with_parent: bool = False


@dataclass(slots=True)
class _Interrupts:
    """The first Ctrl-C (or SIGTERM) interrupts, or ends the time that the guest is kept for; the second kills."""

    keeping: bool = False
    asked: bool = False
    _old: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> _Interrupts:
        self._old = {which: signal.signal(which, self._first) for which in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for which, handler in self._old.items():
            signal.signal(which, handler)

    def _first(self, number: int, frame: object) -> None:
        next_one_kills(self._old)
        self.asked = True
        if not self.keeping:
            raise KeyboardInterrupt


def receive_guest(options: ReceiveOptions, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Receive one guest and go on with it.

    Parameters
    ----------
    options
        Where from, and what to do with it.
    say
        Told what happens, a line at a time.

    Returns
    -------
    dict
        JSON values; the schema is in ``docs/cli.md``.

    Raises
    ------
    VirtioError, OSError
        What went wrong; the source has been told. The message names the address.
    KeyboardInterrupt
        On Ctrl-C.
    """
    if options.die_with_parent:
        bind_to_parent()
    survive_lost_memory()
    with _Interrupts() as interrupts:
        resumption = Resumption(start=options.start) if options.resume else None
        receiver = Receiver(
            on_header=_look_at_header(options),
            inspect=_inspect(options),
            prepare=resumption.prepare if resumption is not None else lambda now: None,
        )
        source = accept(
            options.address,
            receiver.hello(launches=resumption is not None),
            announce=lambda where: say(f"waiting for a migration at {where} (Ctrl-C to stop)"),
            on_stranger=lambda why: say(f"somebody connected, but {why}; still waiting for a migration"),
        )
        facts: dict[str, Any] = {}

        try:
            try:
                receive(source, receiver, resumption, on_record=_narrator(receiver, say))
            except VirtioError as error:
                raise _with_place(error, options.address, receiver) from error
            facts |= _facts(receiver, options)
            if receiver.state is ReceiverState.CANCELLED:
                raise PeerVanished(f"the source at {options.address} gave up: {receiver.cancelled}")
            if receiver.state is ReceiverState.COMMITTED and resumption is not None:
                _go_on(source, receiver, resumption, facts, options, interrupts, say)
            elif receiver.state is ReceiverState.COMMITTED:
                _tell(source, receiver.report(Report()))
        except KeyboardInterrupt:
            if not receiver.complete or not (resumption is None or resumption.started):
                _tell(source, receiver.refuse("interrupted at the destination"))
            raise
        finally:
            source.close()
            if resumption is not None:
                resumption.close()
            if receiver.memory is not None:
                receiver.memory.close()
    return facts


def _look_at_header(options: ReceiveOptions) -> Callable[[Header], None]:
    """Return a callback that refuses, before RAM comes, a guest that cannot be had here or not be gone on with."""

    def look(header: Header) -> None:
        require_room(header.size)
        if header.hand_over and options.resume:
            if header.guest != "python":
                what = f"a {quoted(header.guest)} guest" if header.guest else "a guest of another program"
                raise UsageError(
                    f"the stream is of {what}, and only a Python guest can go on here: --no-resume checks the stream "
                    "and leaves it at that"
                )
            resume_arguments(header)

    return look


def _inspect(options: ReceiveOptions) -> Callable[[Receiver], Ready]:
    """Return a callback that judges what can be judged of memory as it came: a Linux guest's tags."""

    def inspect(receiver: Receiver) -> Ready:
        header, memory = receiver.header, receiver.memory
        assert header is not None
        assert memory is not None
        if options.digests_fd >= 0:
            _write_digests(receiver, options.digests_fd)  # memory is as it came here
        if header.guest != "linux":
            return Ready()
        try:
            if header.tag_nonce is None:
                raise UsageError("the stream does not say whose tags they are")
            found = tags.scan(memory.arrays[0], header.tag_nonce)
        except UsageError as error:
            return Ready(tags=TagsFound(error=str(error)))
        counts = len(found.missing), len(found.stale), len(found.torn)
        return Ready(tags=TagsFound(found.count, found.found, *counts, found.updates, found.ok))

    return inspect


def _facts(receiver: Receiver, options: ReceiveOptions) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "from": str(options.address),
        "state": receiver.state.name.lower(),
        "guest": receiver.header.guest if receiver.header is not None and receiver.header.guest else None,
        "memory_bytes": 0 if receiver.memory is None else receiver.memory.size,
        "pages_received": receiver.pages,
        "zero_pages_received": receiver.zero_pages,
        "rounds": receiver.rounds,
        "resumed": None,
        **({"tags": ready.tags.to_json()} if (ready := receiver.ready) is not None and ready.tags is not None else {}),
    }


def _go_on(
    source: Any,
    receiver: Receiver,
    resumption: Resumption,
    facts: dict[str, Any],
    options: ReceiveOptions,
    interrupts: _Interrupts,
    say: Callable[[str], None],
) -> None:
    wrong: VirtioError | None = None
    try:
        resumption.start()
        say("the guest runs here" if resumption.running else "the guest is here, stopped as it was; --start starts it")
        facts["resumed"] = resumption.examine()
        _tell(source, receiver.report(Report.from_json(facts["resumed"])))
    except VirtioError as error:
        if not (options.keep and resumption.lives):
            vanished = isinstance(error, PeerVanished)
            _tell(source, receiver.refuse(str(error), vanished=vanished, started=resumption.started))
            raise
        wrong = error  # too slow to be checked, say: it is here all the same, and nobody else has it
        _tell(source, receiver.report(Report(running=resumption.running)))
    if options.keep:
        interrupts.keeping = True  # before anybody is told that Ctrl-C is fine
        how = "was checked and" if wrong is None else f"could not be checked ({message(wrong)}) and"
        say(f"the guest {how} {'runs on' if resumption.running else 'is kept'}; Ctrl-C ends it")
        resumption.serve_while(lambda: not interrupts.asked)
    if wrong is not None:
        raise wrong


def _tell(source: Any, buffers: list[bytes | memoryview]) -> None:
    """Answer the source if it is still there: the guest is no longer its."""
    with contextlib.suppress(PeerVanished):
        source.answer(buffers)


def _narrator(receiver: Receiver, say: Callable[[str], None]) -> Callable[[Receiver], None]:
    """Return a callback that says what a record brought, where that is news."""
    seen: tuple[ReceiverState, int] = (receiver.state, 0)

    def tell(now: Receiver) -> None:
        nonlocal seen
        if (now.state, now.rounds) == seen:
            return
        if now.state is not seen[0]:
            size = (
                f": a guest with {now.memory.size >> 20} MiB" if seen[0] is ReceiverState.HEADER and now.memory else ""
            )
            say(f"{now.state.value}{size}")
        if now.rounds != seen[1]:
            say(f"round {now.rounds} arrived: {now.pages} pages so far")
        seen = now.state, now.rounds

    return tell


def _write_digests(receiver: Receiver, fd: int) -> None:
    assert receiver.memory is not None
    for digests in digests_in_order(receiver.memory):
        view = memoryview(digests.astype("<u8").tobytes())
        while len(view):
            view = view[os.write(fd, view) :]


def _with_place(error: VirtioError, address: Address, receiver: Receiver) -> VirtioError:
    """Return the error with the place and what to do; its exit code stays."""
    text = f"{address.path if address.kind == 'file' else address}: {error.message}"
    if not isinstance(error, (StreamError, PeerVanished)):
        return type(error)(text)
    if address.kind == "file" and receiver.header is None:
        text += "; is it a file that `balloon migrate --to file:PATH` wrote?"
    elif address.kind == "file":
        text += f"; write it again with `balloon migrate --to {address}`"
    if isinstance(error, PeerVanished):
        return PeerVanished(text)
    return StreamError(text)
