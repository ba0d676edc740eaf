"""Everything a driver can do wrong, a row each: sent to QEMU and to our device, by the same raw driver."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from raw_driver import (
    BLOCK,
    DATA,
    FEATURES,
    HINT,
    INDIRECT,
    INFLATE,
    MEMORY,
    MIB,
    NEXT,
    REPORT,
    WRITE,
    Desc,
    RawDriver,
)

from vring.features import CommonFeature, Status
from vring.memory import PAGE_SIZE

PAGE = 12 * MIB // PAGE_SIZE
"""Page number that inflate requests name."""
TABLE = DATA + 0x10000


@dataclass(frozen=True)
class Reaction:
    """What a device did."""

    text: str
    strictness: int
    """0: took it as good; 1: gave it back without effect, or refused it; 2: stopped and asked for a reset."""


def judged(raw: RawDriver, returned: int, effect: int, what: str) -> Reaction:
    """Return the reaction to a request whose effect would be `effect` pages."""
    if raw.needs_reset:
        return Reaction("DEVICE_NEEDS_RESET", 2)
    if returned != 1:
        return Reaction(f"accepted: {returned} entries processed" if returned else "not served", 0 if returned else 1)
    if effect:
        return Reaction(f"accepted: {effect} {'page' if effect == 1 else 'pages'} {what}", 0)
    return Reaction("returned, no effect", 1)


def inflate(raw: RawDriver, *descriptors: Desc, returned: int | None = None) -> Reaction:
    """Send an inflate request that names `PAGE`."""
    if returned is None:
        raw.junk(PAGE * PAGE_SIZE)
        returned = raw.send(INFLATE, *descriptors)
    return judged(raw, returned, raw.dropped(PAGE * PAGE_SIZE), "dropped")


def zero_length(raw: RawDriver) -> Reaction:
    return inflate(raw, Desc(DATA, 0))


def loop(raw: RawDriver) -> Reaction:
    first = raw.pfns(PAGE)
    return inflate(raw, Desc(first.addr, 4, NEXT, 1), Desc(first.addr, 4, NEXT, 0))


def next_out_of_range(raw: RawDriver) -> Reaction:
    return inflate(raw, Desc(raw.pfns(PAGE).addr, 4, NEXT, 128))


def head_out_of_range(raw: RawDriver) -> Reaction:
    raw.junk(PAGE * PAGE_SIZE)
    raw.put(INFLATE, raw.pfns(PAGE))
    raw.offer(INFLATE, 128)
    return inflate(raw, returned=raw.kick(INFLATE))


def in_before_out(raw: RawDriver) -> Reaction:
    return inflate(raw, Desc(DATA + 64, 4, WRITE | NEXT, 1), raw.pfns(PAGE))


def indirect_length(raw: RawDriver) -> Reaction:
    raw.memory.write(TABLE, raw.pfns(PAGE).pack() * 2)
    return inflate(raw, Desc(TABLE, 17, INDIRECT))


def avail_ahead(raw: RawDriver) -> Reaction:
    raw.junk(PAGE * PAGE_SIZE)
    raw.put(INFLATE, raw.pfns(PAGE))
    raw.offer(INFLATE, index=5000)
    return judged(raw, raw.kick(INFLATE, 5.0), 0, "")


def avail_back(raw: RawDriver) -> Reaction:
    assert raw.send(INFLATE, raw.pfns(PAGE)) == 1
    raw.offer(INFLATE, index=0)
    return judged(raw, raw.kick(INFLATE, 10.0), 0, "")


def indirect_not_negotiated(raw: RawDriver) -> Reaction:
    raw.start(FEATURES & ~int(CommonFeature.INDIRECT_DESC))
    raw.memory.write(TABLE, raw.pfns(PAGE).pack())
    return inflate(raw, Desc(TABLE, 16, INDIRECT))


def indirect_in_indirect(raw: RawDriver) -> Reaction:
    inner = TABLE + 0x1000
    raw.memory.write(inner, raw.pfns(PAGE).pack())
    raw.memory.write(TABLE, Desc(inner, 16, INDIRECT).pack())
    reaction = inflate(raw, Desc(TABLE, 16, INDIRECT))
    return Reaction("accepted: the inner table is taken for PFNs", 0) if reaction.strictness == 1 else reaction


def hint(raw: RawDriver, addr: int, length: int = 4 * MIB) -> Reaction:
    """Send one hint."""
    got = raw.send(HINT, Desc(addr, length, WRITE))
    reaction = judged(raw, got, 0, "")
    return Reaction("accepted: the hint counts", 0) if reaction.strictness == 1 and raw.peer.hinted() else reaction


def hint_past_end(raw: RawDriver) -> Reaction:
    raw.run()
    return hint(raw, MEMORY + 4 * MIB)


def hint_across_end(raw: RawDriver) -> Reaction:
    raw.run()
    return hint(raw, MEMORY - 4 * MIB + PAGE_SIZE)


def hint_before_start(raw: RawDriver) -> Reaction:
    raw.peer.new_run()
    return hint(raw, BLOCK)


def hint_after_stop(raw: RawDriver) -> Reaction:
    raw.run()
    raw.command(0)
    return hint(raw, BLOCK)


def wrong_id(raw: RawDriver) -> Reaction:
    raw.peer.new_run()
    raw.command(raw.command_id() + 7)
    return hint(raw, BLOCK)


def stale_start(raw: RawDriver) -> Reaction:
    old = raw.run()
    raw.peer.new_run()
    raw.command(old)
    return hint(raw, BLOCK)


def command_of(raw: RawDriver, length: int) -> Reaction:
    """Open a run with a command of another length; whether it opened shows in whether a hint counts."""
    raw.peer.new_run()
    got = raw.command(raw.command_id(), length)
    if raw.needs_reset or not got:
        return judged(raw, got, 0, "")
    opened = hint(raw, BLOCK)
    return Reaction("accepted: the run is open", 0) if opened.strictness == 0 else opened


def hint_unaligned(raw: RawDriver) -> Reaction:
    raw.run()
    got = raw.send(HINT, Desc(BLOCK + 0x800, 4 * MIB, WRITE))
    if raw.needs_reset or got != 1:
        return judged(raw, got, 0, "")
    pages = raw.peer.hinted()
    if pages >= 1024:
        return Reaction("accepted: a page that was hinted in part is skipped", 0)
    return Reaction("accepted: only whole pages inside are hinted", 1)


def report(raw: RawDriver, descriptor: Desc, at: int = BLOCK) -> Reaction:
    """Send one report of a range filled with junk."""
    if at + 4 * MIB <= MEMORY:
        raw.junk(at, 4 * MIB)
    got = raw.send(REPORT, descriptor)
    return judged(raw, got, raw.dropped(at, 4 * MIB) if at + 4 * MIB <= MEMORY else 0, "dropped")


def report_past_end(raw: RawDriver) -> Reaction:
    return report(raw, Desc(MEMORY + 4 * MIB, 4 * MIB, WRITE), MEMORY + 4 * MIB)


def report_across_end(raw: RawDriver) -> Reaction:
    return report(raw, Desc(MEMORY - 4 * MIB + PAGE_SIZE, 4 * MIB, WRITE), MEMORY - 4 * MIB)


def report_unaligned(raw: RawDriver) -> Reaction:
    return report(raw, Desc(BLOCK + 0x800, 2 * MIB, WRITE))


def report_readable(raw: RawDriver) -> Reaction:
    return report(raw, Desc(BLOCK, 4 * MIB))


def report_poisoned(raw: RawDriver) -> Reaction:
    raw.start(ok=False)
    raw.set_poison(0xAA)
    raw.set(0x70, 15)  # type: ignore[arg-type]
    return report(raw, Desc(BLOCK, 4 * MIB, WRITE))


def pfn_outside(raw: RawDriver) -> Reaction:
    return inflate(raw, raw.pfns(MEMORY // PAGE_SIZE + 5, 0xFFFFFFFF))


def length_3(raw: RawDriver) -> Reaction:
    return inflate(raw, Desc(raw.pfns(PAGE).addr, 3))


def in_descriptor(raw: RawDriver) -> Reaction:
    return inflate(raw, Desc(raw.pfns(PAGE).addr, 4, WRITE))


def split_pfn(raw: RawDriver) -> Reaction:
    raw.memory.write(DATA, struct.pack("<I", PAGE))
    return inflate(raw, Desc(DATA, 2, NEXT, 1), Desc(DATA + 2, 2))


def actual_too_large(raw: RawDriver) -> Reaction:
    raw.set_actual(0xFFFFFFFF)
    size = raw.peer.size_said()
    raw.set_actual(0)
    return Reaction("accepted: the size the host computes is negative" if size < 0 else "not taken", int(size >= 0))


def features_not_offered(raw: RawDriver) -> Reaction:
    kept = raw.start(FEATURES | 1 << 50 | 1 << 20) & Status.FEATURES_OK
    return Reaction("FEATURES_OK stays set", 0) if kept else Reaction("FEATURES_OK does not stay set", 1)


def no_version_1(raw: RawDriver) -> Reaction:
    kept = raw.start(FEATURES & ~int(CommonFeature.VERSION_1)) & Status.FEATURES_OK
    return Reaction("FEATURES_OK stays set", 0) if kept else Reaction("FEATURES_OK does not stay set", 1)


def kick_before_ok(raw: RawDriver) -> Reaction:
    raw.start(ok=False)
    raw.junk(PAGE * PAGE_SIZE)
    return inflate(raw, returned=raw.send(INFLATE, raw.pfns(PAGE), timeout=0.3))


@dataclass(frozen=True)
class Row:
    """One thing done wrong."""

    name: str
    act: Callable[[RawDriver], Reaction]
    why_laxer: str = ""
    """Why ours may be laxer than QEMU here; then and only then it may."""


ROWS = [
    Row("zero-length buffer", zero_length),
    Row("descriptor loop", loop),
    Row("next out of range", next_out_of_range),
    Row("head out of range", head_out_of_range),
    Row("device-writable descriptor before a readable one", in_before_out),
    Row("indirect table of 17 bytes", indirect_length),
    Row("avail index 5000 ahead, entries valid", avail_ahead),
    Row("avail index moved back by 1", avail_back),
    Row("indirect, not negotiated", indirect_not_negotiated),
    Row("indirect inside indirect", indirect_in_indirect),
    Row("hint past the end of RAM", hint_past_end),
    Row("hint that reaches across the end of RAM", hint_across_end),
    Row("report past the end of RAM", report_past_end),
    Row("report that reaches across the end of RAM", report_across_end),
    Row("hint before START", hint_before_start),
    Row("hint after STOP", hint_after_stop),
    Row("hint under an id never issued", wrong_id),
    Row("hint under the id of the run before", stale_start),
    Row(
        "command buffer of 2 bytes",
        lambda raw: command_of(raw, 2),
        "the ring is sound and the buffer is only a bad request: it is counted and given back, other queues live on",
    ),
    Row("command buffer of 8 bytes", lambda raw: command_of(raw, 8)),
    Row("unaligned hint", hint_unaligned),
    Row("unaligned report", report_unaligned),
    Row("device-readable report", report_readable),
    Row("report while the poison value is not 0", report_poisoned),
    Row("PFN outside RAM", pfn_outside),
    Row("inflate request of 3 bytes", length_3),
    Row("device-writable inflate request", in_descriptor),
    Row("PFN split over two descriptors", split_pfn),
    Row("actual = 0xffffffff", actual_too_large),
    Row("features accepted that were never offered", features_not_offered),
    Row("VERSION_1 not accepted", no_version_1),
    Row("kick before DRIVER_OK", kick_before_ok),
]
