"""Mutated streams, saved states and answers of a destination: what comes of them is a value or a `VirtioError`.

Usage: python tests/explore_streams.py [RECORDS [SEED]]
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from real_stream import MIB, Parts, Still, join, real_stream

from balloon_dev.device import BalloonDevice
from host_qemu_side.migration import Kind, Limits, Migration, Receiver, ReceiverState, Record, StreamReader
from host_qemu_side.migration.records import Header, Hello, Ready, Refused, Report
from host_qemu_side.saved import SavedGuest, resume_arguments
from vring.dirty.software import SoftwareDirtyLog
from vring.errors import MissingFacility, VirtioError
from vring.memory import GuestMemory
from vring.mmio import MmioDevice

REAL = real_stream()
ANSWERS: Parts = [
    (Kind.DIGESTS, bytes(range(128))),
    (Kind.READY, b'{"tags":{"pages":9,"found":9,"missing":0,"stale":0,"torn":0,"updates":7,"ok":true},'
     b'"pages":7,"zero_pages":4,"digest_seconds":0.1}'),
    (Kind.REFUSED, b'{"why":"no room","vanished":false,"returned":true}'),
    (Kind.REPORT, b'{"pages_checked":9,"pages_wrong":0,"hint_run":{"command_id":7,"blocks":3,"seconds":0.1}}'),
    (Kind.HELLO, b'{"version":2}'),
]  # fmt: skip
DEEP = 100_000
ODD = [
    *("null", "true", "false", "0", "-1", "-0", "1e999", "-1e999", "NaN", "Infinity", "1e-999", "0.5", "1e3", '""'),
    *("1" + "0" * 400, str(1 << 31), str(1 << 32), str(1 << 52), str((1 << 63) + 1), str((1 << 64) - 1), str(1 << 64)),
    *("[]", "{}", "[[]]", "[[0]]", "[[0,1,2]]", "[[0,0]]", "[[0,4096],[0,4096]]", '["a","b"]', '{"a":{}}'),
    *('"\\u0000"', '"\\ud800"', '"\\u001b[2J"', '"[/bold]"', '"python"', '"linux"', '"../../a\\u0000b"', '"\\u202e"'),
    *("[[1152921504606846976,4096]]", "[[17592186040320,4096]]", "[[0,18446744073709551615]]", '"' + "x" * 5000 + '"'),
    *("[" * DEEP + "]" * DEEP, '{"a":' * 40 + "1" + "}" * 40, "x", ""),
]
"""What stands in place of a value, as JSON text or what is none."""
WORDS = [0, 1, 2, 255, 256, 257, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
SLOW = 5.0
"""Seconds of a processor that one stream may take at the most."""


@dataclass
class Findings:
    """What came of it."""

    records: int = 0
    """Mutated ones."""
    streams: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    wrong: Counter[str] = field(default_factory=Counter)
    """What should not have been, and how often; of an exception its kind and where it came from."""

    def note(self, error: BaseException) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        self.wrong[f"{type(error).__name__} in {os.path.basename(frame.filename)}:{frame.lineno}: {error}"[:300]] += 1


class Mutator:
    """Changes what somebody says."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.mutated = 0

    def payload(self, kind: int, data: bytes) -> bytes:
        """Change one payload: as JSON, if it is that, as words, or as mere bytes."""
        if data[:1] == b"{" and self.rng.random() < 0.8:
            with contextlib.suppress(ValueError, RecursionError):  # it may be mutated already
                return self._json(json.loads(data))
        if kind in (Kind.PAGES, Kind.ZERO) and self.rng.random() < 0.7:
            at = 4 * self.rng.randrange(min(len(data) // 4, 6))
            return data[:at] + self.rng.choice(WORDS).to_bytes(4, "little") + data[at + 4 :]
        return self.bytes(data)

    def bytes(self, data: bytes) -> bytes:
        """Flip, drop, double or add some bytes."""
        at, some = self.rng.randrange(len(data) + 1), self.rng.randrange(1, 20)
        match self.rng.randrange(4):
            case 0 if data:
                at = min(at, len(data) - 1)
                return data[:at] + bytes([data[at] ^ 1 << self.rng.randrange(8)]) + data[at + 1 :]
            case 1:
                return data[:at] + data[at + some :]
            case 2:
                return data[:at] + data[max(at - some, 0) :]
            case _:
                return data[:at] + self.rng.randbytes(some) + data[at:]

    def _json(self, value: Any) -> bytes:
        """Replace, remove, rename or double one member or item, somewhere within."""
        holder, key = self.rng.choice(_places(value) or [({"": value}, "")])
        how = self.rng.random()
        if how < 0.1:
            del holder[key]
        elif how < 0.15 and isinstance(holder, dict):
            holder[self.rng.choice(["", "x", "\x1b[2J", "\0", "version"])] = holder.pop(key)
        elif how < 0.2 and isinstance(holder, list):
            holder += [holder[key]] * self.rng.choice([1, 100, 20_000])
        else:
            holder[key] = "@odd@"
        text = json.dumps(value).replace('"@odd@"', self.rng.choice(ODD))
        if self.rng.random() < 0.03:
            text = text.replace("{", '{"version":2,"version":2,', 1)
        return text.encode()

    def parts(self, parts: Parts) -> Parts:
        """Change one payload of a stream; sometimes more, or which records there are."""
        parts = list(parts)
        for _ in range(self.rng.choice([1, 1, 1, 1, 2, 3])):
            self.mutated += 1
            at = self.rng.randrange(len(parts))
            match self.rng.randrange(12):
                case 0:
                    del parts[at]
                case 1:
                    parts.insert(at, parts[self.rng.randrange(len(parts))])
                case 2:
                    parts[at] = (self.rng.choice(list(Kind)), parts[at][1])
                case _:  # seldom the pages, there are enough of them
                    small = [i for i, (_, each) in enumerate(parts) if each[:1] == b"{"] or [at]
                    at = self.rng.choice([at, *small * 2])
                    parts[at] = (parts[at][0], self.payload(*parts[at]))
            if not parts:
                break
        return parts or [(Kind.COMMIT, b"")]


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += _places(value[key])
    return found


def _bounded(header: Header) -> None:
    """As a program looks at a header before it makes memory: no more of it than this machine has."""
    if header.size > 64 * MIB:
        raise MissingFacility(f"{header.size} bytes")


def receive(data: bytes, rng: random.Random) -> Receiver:
    """Feed a stream in pieces to a receiver, to its end or as far as it goes; its memory is the caller's to close."""
    reader, receiver = StreamReader(reuse=rng.random() < 0.5), Receiver(on_header=_bounded)
    try:
        while data and not receiver.complete:
            size = rng.choice([7, 1000, 1 << 16, len(data)])
            reader.feed(data[:size])
            data = data[size:]
            while not receiver.complete and (record := reader.next()) is not None:
                receiver.handle(record)
    except BaseException:
        if receiver.memory is not None:
            receiver.memory.close()
        raise
    return receiver


def load(receiver: Receiver) -> str:
    """Load what arrived into devices, as a destination does; return how far that came."""
    assert receiver.memory is not None
    assert receiver.header is not None
    resume_arguments(receiver.header)
    guest = SavedGuest.from_json(receiver.device_state)
    device = BalloonDevice(guest.device.offered)
    mmio = MmioDevice(device, receiver.memory)
    before = device.save()
    try:
        device.load(guest.device)
    except VirtioError:
        if device.save() != before:
            raise AssertionError("a device that refused a state is not as it was") from None
        raise
    try:
        mmio.load(receiver.device_state.get("mmio", {}))
    except VirtioError:
        if mmio.status or mmio.held or device.negotiated or device.ballooned_pages:
            raise AssertionError("registers that refused a state were not reset") from None
        raise
    mmio.release()
    mmio.dump()
    json.dumps({"device": device.save(), "mmio": mmio.save()}, allow_nan=False)
    return "loaded"


class Answering:
    """An output to a destination that says what it likes."""

    two_way = True

    def __init__(self, data: bytes) -> None:
        self._reader = StreamReader()
        self._data = data

    def send(self, buffers: Any) -> None:
        if any(len(piece) == 24 and piece[0] == Kind.END for piece in buffers):
            self._reader.feed(self._data)

    def flush(self) -> bool:
        return True

    def answer(self) -> Record | None:
        return self._reader.next()

    def retract(self) -> bool:
        return True

    def finish(self) -> None:
        pass


def ask(parts: Parts) -> str:
    """Have a source hear answers; return what it made of them."""
    for kind, payload in parts:
        record = Record(Kind(kind), memoryview(payload))
        for said in (Hello, Ready, Report, Refused):
            if record.kind is said.kind:
                try:
                    text = json.dumps(said.of(record).to_json(), allow_nan=False)
                    if not text.isprintable():
                        raise AssertionError(f"not printable: {text!r}")
                except VirtioError:
                    pass
    with GuestMemory.create(1 << 16) as memory:
        guest = Still()
        output = Answering(join(parts))
        limits = Limits(bandwidth=0, answer=1.0)
        migration = Migration(memory, SoftwareDirtyLog.for_memory(memory), output, guest, limits=limits)
        now = 0.0
        while not migration.finished:
            now = max(migration.step(now), now + 0.1)
    return "believed"


def once(mutator: Mutator, findings: Findings) -> None:
    """Mutate one stream, or what a destination says, and see what becomes of it."""
    rng, began = mutator.rng, time.process_time()
    receiver = None
    try:
        if rng.random() < 0.3:
            parts = mutator.parts(ANSWERS[:2] if rng.random() < 0.7 else rng.sample(ANSWERS, 2))
            outcome = ask(parts)
        else:
            parts = mutator.parts(REAL)
            data = join(parts)
            receiver = receive(mutator.bytes(data) if rng.random() < 0.05 else data, rng)
            outcome = f"ended in {receiver.state.name}"
            if receiver.state in (ReceiverState.COMMITTED, ReceiverState.IMAGE):
                outcome = load(receiver)
    except VirtioError as error:
        outcome = f"refused: {type(error).__name__}"
    except Exception as error:
        findings.note(error)
        outcome = "WRONG"
    finally:
        if receiver is not None and receiver.memory is not None:
            receiver.memory.close()
    findings.records = mutator.mutated
    findings.outcomes[outcome] += 1
    findings.streams += 1
    findings.slowest = max(findings.slowest, time.process_time() - began)


def explore(records: int, seed: int, tell: Callable[[Findings], None] = lambda findings: None) -> Findings:
    """Mutate until so many records were read; return what came of it."""
    findings, mutator = Findings(), Mutator(random.Random(seed))
    descriptors = len(os.listdir("/proc/self/fd"))
    while findings.records < records:
        once(mutator, findings)
        if findings.streams % 1000 == 0:
            tell(findings)
    if len(os.listdir("/proc/self/fd")) > descriptors:
        findings.wrong["descriptors left open"] += 1
    if findings.slowest > SLOW:
        findings.wrong[f"a stream took {findings.slowest:.1f} s"] += 1
    return findings


def main() -> int:
    records = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    print(f"explore: {records} mutated records of streams and answers, seed {seed}", flush=True)
    began = time.monotonic()
    found = explore(records, seed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"explore: {found.records} records in {found.streams} streams, {time.monotonic() - began:.0f} s, "
        f"the slowest {found.slowest:.2f} s, peak {peak} MiB"
    )
    for what, count in found.outcomes.most_common():
        print(f"explore: {count:8} {what}")
    for what, count in found.wrong.most_common():
        print(f"explore: WRONG ({count} times): {what}")
    return bool(found.wrong)


if __name__ == "__main__":
    sys.exit(main())
