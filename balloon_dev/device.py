"""The balloon device as a core without I/O: a transport feeds it calls, a hypervisor sets its targets.

Implements `vring.device.Device`. What to do with a hint, with pages given up, or with what happened on the ring is the
embedder's: `hint_sink`, `discard` and `tap`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from balloon_dev.config import ACTUAL, CMD_ID, NUM_PAGES, POISON_VAL, BalloonConfig
from balloon_dev.features import DEVICE_ID, BalloonFeature, QueueRole
from balloon_dev.hinting import Action, HintEvent, HintRun
from balloon_dev.profiles import SPEC, Profile
from vring import bitmap
from vring.dirty.software import SoftwareDirtyLog
from vring.errors import UsageError
from vring.features import CommonFeature
from vring.memory import PAGE_SHIFT, GuestMemory
from vring.split import DeviceQueue

__all__ = ["DEFAULT_FEATURES", "BalloonDevice", "RingTap"]

U64 = npt.NDArray[np.uint64]
HintSink = Callable[[int, U64, U64], None]
Discard = Callable[[U64, U64], None]

RING_FEATURES = CommonFeature.VERSION_1 | CommonFeature.EVENT_IDX | CommonFeature.INDIRECT_DESC
DEFAULT_FEATURES = int(BalloonFeature.FREE_PAGE_HINT | RING_FEATURES)
SUPPORTED_FEATURES = int(
    BalloonFeature.MUST_TELL_HOST | BalloonFeature.DEFLATE_ON_OOM | BalloonFeature.FREE_PAGE_HINT | RING_FEATURES
)
"""What the device serves today. STATS_VQ, PAGE_POISON and REPORTING are defined (`QueueRole`, `POISON_VAL`) and are
refused until their queues are served."""

BATCH = 256
ROUNDS_PER_CALL = 64
MAX_REQUEST_BYTES = 1 << 20
"""A list of PFNs longer than this is a bad request: no driver sends one."""


class RingTap(Protocol):
    """Sees what the driver put on the free page queue, before the device judges it."""

    def command(self, command_id: int) -> None:
        """See a 4-byte command."""

    def pages(self, addr: U64, length: U64) -> None:
        """See blocks of pages, guest addresses and bytes."""


class BalloonDevice:
    """A virtio-balloon device.

    Parameters
    ----------
    features
        Feature bits to offer.
    profile
        The choices in which real devices differ, see `balloon_dev.profiles`.
    discard
        Called with guest addresses and lengths (bytes) of pages in the balloon that the host may drop, before their
        buffer is returned. Ranges are merged, ascending and inside RAM. None: the pages are only counted.

    Raises
    ------
    UsageError
        If a feature is asked for that the device does not serve.
    """

    device_id = DEVICE_ID

    def __init__(
        self, features: int = DEFAULT_FEATURES, *, profile: Profile = SPEC, discard: Discard | None = None
    ) -> None:
        if features & ~SUPPORTED_FEATURES:
            raise UsageError(
                f"features {features & ~SUPPORTED_FEATURES:#x} are not served (supported: {SUPPORTED_FEATURES:#x})"
            )
        self.profile = profile
        self.offered_features = features
        self.discard = discard
        self.hint_sink: HintSink | None = None
        """Called with (command id, addresses, lengths) of hints that count, while their run is current and before
        their buffers are returned."""
        self.tap: RingTap | None = None
        self.dirty_log: SoftwareDirtyLog | None = None
        """Where the device logs what it writes itself: used rings and discarded pages."""
        self.config = BalloonConfig(features)
        self.hinting = HintRun(profile)
        self.bad_requests: Counter[str] = Counter()
        """Requests returned without effect, by reason."""
        self.negotiated = 0
        self._memory: GuestMemory | None = None
        self._queues: dict[int, DeviceQueue] = {}
        self._calls: set[int] = set()
        self._config_change = False
        self._ballooned = bitmap.empty(0)

    # -- the transport's side -------------------------------------------------------------------------------------

    @property
    def queue_sizes(self) -> Sequence[int]:
        """Largest queue sizes by queue number, under the offered features."""
        return [size for _, size in sorted(self._numbered(self.offered_features, fill=True).items())]

    @property
    def config_generation(self) -> int:
        """Generation of the config space."""
        return self.config.generation

    def set_memory(self, memory: GuestMemory | None) -> None:
        """Take the guest's memory; queues attached before are dropped."""
        self._queues.clear()
        self._memory = memory
        self._ballooned = bitmap.empty(memory.page_span if memory else 0)

    def set_features(self, features: int) -> bool:
        """Take the driver's choice, False if it has bits that were not offered."""
        if features & ~self.offered_features:
            return False
        self.negotiated = features
        return True

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the config space."""
        return self.config.read(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """Store actual or poison_val; everything else is read-only for the driver."""
        if not self.config.write(offset, data):
            self.bad_requests["config write to a read-only field"] += 1

    def attach_queue(self, index: int, queue: DeviceQueue) -> None:
        """Make a queue live."""
        self._queues[index] = queue
        self._log_used_ring(queue)  # its event index or flags were written

    def detach_queue(self, index: int) -> None:
        """Stop using a queue."""
        self._queues.pop(index, None)
        self._calls.discard(index)

    def take_config_change(self) -> bool:
        """Whether a config change notification is due; asking clears it."""
        due, self._config_change = self._config_change, False
        return due

    def take_calls(self) -> Sequence[int]:
        """Queues whose driver is to be notified; asking clears them."""
        calls = sorted(self._calls)
        self._calls.clear()
        return calls

    def reset(self) -> None:
        """Forget the driver: queues, negotiated features, balloon; the command id counter is kept."""
        self._queues.clear()
        self._calls.clear()
        self._config_change = False
        self.negotiated = 0
        self.hinting.handle(HintEvent.RESET)
        self._publish(notify=False)
        self.config[ACTUAL] = 0
        self.config[POISON_VAL] = 0
        self._ballooned[:] = 0

    # -- the hypervisor's side ------------------------------------------------------------------------------------

    @property
    def hinting_negotiated(self) -> bool:
        """Whether the driver took FREE_PAGE_HINT."""
        return bool(self.negotiated & BalloonFeature.FREE_PAGE_HINT)

    def set_target(self, pages: int) -> None:
        """Ask for a balloon of `pages` pages of 4096 bytes."""
        if not 0 <= pages <= 0xFFFFFFFF:
            raise UsageError(f"balloon target of {pages} pages does not fit num_pages")
        self.config[NUM_PAGES] = pages
        self._config_change = True

    @property
    def actual(self) -> int:
        """Size of the balloon in pages of 4096 bytes, as the driver says."""
        return self.config[ACTUAL]

    @property
    def ballooned_pages(self) -> int:
        """Pages that are in the balloon by what came over the queues."""
        return bitmap.count(self._ballooned)

    def start_hinting(self) -> int:
        """Ask for hints; return the new command id.

        Raises
        ------
        UsageError
            If FREE_PAGE_HINT was not negotiated.
        """
        if not self.hinting_negotiated:
            raise UsageError("the driver did not accept FREE_PAGE_HINT: there is nobody to ask for hints")
        self._host(HintEvent.HOST_START)
        return self.hinting.command_id

    def stop_hinting(self) -> None:
        """End the run, if there is one: the guest keeps its pages."""
        self._host(HintEvent.HOST_STOP)

    def finish_hinting(self) -> None:
        """Say DONE: the guest may release all hinted pages."""
        if self.hinting_negotiated:
            self._host(HintEvent.HOST_DONE)

    def _host(self, event: HintEvent) -> None:
        if self.hinting.handle(event) in (Action.NEW_ID, Action.PUBLISH):
            self._publish()

    def _publish(self, *, notify: bool = True) -> None:
        self.config[CMD_ID] = self.hinting.config_value
        self._config_change = self._config_change or notify

    def save(self) -> dict[str, Any]:
        """Return the device's own state for a migration; queues are the transport's to save."""
        return {
            "profile": self.profile.name,
            "offered": self.offered_features,
            "negotiated": self.negotiated,
            "config": self.config.read(0, 16).hex(),
            "hinting": self.hinting.save(),
            "ballooned": [[int(a), int(n)] for a, n in zip(*bitmap.runs(self._ballooned), strict=True)],
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Take over what `save` returned. Call it after `set_memory`; the config interrupt is raised again.

        Raises
        ------
        UsageError
            If the state is malformed or from a device that offered other features or had another profile; nothing has
            changed then.
        """
        try:
            same = (saved["profile"], saved["offered"]) == (self.profile.name, self.offered_features)
            negotiated, config = int(saved["negotiated"]), bytes.fromhex(saved["config"])
            hinting, runs = saved["hinting"], [(int(a), int(n)) for a, n in saved["ballooned"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"saved device state is malformed: {error!r}") from error
        if not same:
            raise UsageError(
                f"saved state is of a {saved['profile']!r} device offering {saved['offered']!r}, "
                f"this one is {self.profile.name!r} offering {self.offered_features!r}"
            )
        if negotiated & ~self.offered_features or len(config) != 16:
            raise UsageError(
                "saved device state is malformed: features that were not offered, or a config of wrong size"
            )
        for first, pages in runs:
            if not 0 <= first <= first + pages <= self._ballooned.size * 64:
                raise UsageError(f"saved device state is malformed: ballooned pages {first}+{pages} are outside RAM")
        self.hinting.load(hinting)
        self.negotiated = negotiated
        for offset in (NUM_PAGES, ACTUAL, POISON_VAL):
            self.config[offset] = int.from_bytes(config[offset : offset + 4], "little")
        for first, pages in runs:
            bitmap.set_run(self._ballooned, first, pages)
        self._publish()

    # -- queues ---------------------------------------------------------------------------------------------------

    def _numbered(self, negotiated: int, *, fill: bool = False) -> dict[int, int]:
        """Queue number -> largest size; with `fill`, gaps of absent queues are given a size too."""
        numbers: dict[int, int] = {}
        for position, role in enumerate(QueueRole):
            number = self.profile.numbering.number(role, self.offered_features, negotiated)
            if number is not None:
                numbers[number] = self.profile.queue_sizes[position]
        if fill:
            for number in range(max(numbers)):
                numbers.setdefault(number, self.profile.queue_sizes[number])
        return numbers

    def queue_number(self, role: QueueRole) -> int | None:
        """Return the number of a queue under the negotiated features, None if it does not exist."""
        return self.profile.numbering.number(role, self.offered_features, self.negotiated)

    def role_of(self, index: int) -> QueueRole | None:
        """Return what queue `index` is for under the negotiated features."""
        for role in QueueRole:
            if self.queue_number(role) == index:
                return role
        return None

    def queue(self, role: QueueRole) -> DeviceQueue | None:
        """Return the live queue for a role, if there is one."""
        index = self.queue_number(role)
        return None if index is None else self._queues.get(index)

    def process(self, index: int) -> int:
        """Serve a queue until it is empty, or for `ROUNDS_PER_CALL` batches; return how many buffers that was.

        Raises
        ------
        DriverError
            If the ring broke.
        """
        queue = self._queues.get(index)
        if queue is None or self._memory is None:
            return 0
        served = 0
        for _ in range(ROUNDS_PER_CALL):
            n = self.process_batch(index)
            served += n
            if n == 0 and not queue.enable_notify():
                break
        self._log_used_ring(queue)  # asking for kicks wrote to it, if nothing else did
        return served

    def process_batch(self, index: int, maximum: int = BATCH) -> int:
        """Pop one batch, let it take effect, return it. Return how many buffers it had, 0 if none is there.

        For whoever wants to choose what comes between two batches; kicks are not asked for again, `process` does that.

        Parameters
        ----------
        index
            Number of the queue.
        maximum
            Buffers at most.

        Raises
        ------
        DriverError
            If the ring broke.
        """
        queue = self._queues.get(index)
        if queue is None or self._memory is None:
            return 0
        role = self.role_of(index)
        batch = queue.pop(maximum)
        chains, segs = batch.chains, batch.segs
        n = len(chains)
        if n == 0:
            return 0
        if role is QueueRole.FREE_PAGE:
            self._hint_batch(chains, segs)
        elif role in (QueueRole.INFLATE, QueueRole.DEFLATE):
            for chain in chains:
                self._pfn_request(role, segs[chain["first_seg"] : chain["first_seg"] + chain["n_segs"]], chain)
        else:
            self.bad_requests["buffer on a queue without a purpose"] += n
        if queue.push(chains["head"], np.zeros(n, dtype=np.uint32)):
            self._calls.add(index)
        self._log_used_ring(queue)
        return n

    def _log_used_ring(self, queue: DeviceQueue) -> None:
        if self.dirty_log is not None:
            pages = queue.used_pages
            self.dirty_log.mark(pages.start, len(pages))

    def _gather(self, segs: npt.NDArray[Any]) -> bytes:
        assert self._memory is not None
        return b"".join(self._memory.read(int(s["addr"]), int(s["len"])) for s in segs)

    # -- free page hinting ----------------------------------------------------------------------------------------

    def _hint_batch(self, chains: npt.NDArray[Any], segs: npt.NDArray[Any]) -> None:
        """Handle chains in order; runs of page chains between commands are handled as one."""
        commands = np.flatnonzero(chains["n_readable"] > 0)
        start = 0
        for at in [*commands.tolist(), len(chains)]:
            if at > start:
                first = int(chains[start]["first_seg"])
                end = int(chains[at - 1]["first_seg"]) + int(chains[at - 1]["n_segs"])
                self._hint_pages(segs["addr"][first:end].copy(), segs["len"][first:end].astype(np.uint64))
            if at < len(chains):
                self._hint_command(chains[at], segs)
            start = at + 1

    def _hint_command(self, chain: Any, segs: npt.NDArray[Any]) -> None:
        first, count = int(chain["first_seg"]), int(chain["n_segs"])
        if int(chain["readable"]) != 4 or int(chain["n_readable"]) != count:
            self.bad_requests["hint command that is not exactly 4 readable bytes"] += 1  # balloon.hint.driver-1
            return
        command_id = int.from_bytes(self._gather(segs[first : first + count]), "little")
        if self.tap is not None:
            self.tap.command(command_id)
        if self.hinting.guest_command(command_id) is Action.IGNORE:
            self.bad_requests["hint command without effect in this state"] += 1
        self._publish(notify=False)  # START and STOP may read differently; the driver caused it and needs no interrupt

    def _hint_pages(self, addr: U64, length: U64) -> None:
        if self.tap is not None:
            self.tap.pages(addr, length)
        if self.hinting.handle(HintEvent.GUEST_PAGES) is not Action.APPLY:
            self.bad_requests["hint outside a run"] += len(addr)
        elif self.hint_sink is not None:
            self.hint_sink(self.hinting.command_id, addr, length)

    # -- inflate and deflate --------------------------------------------------------------------------------------

    def _pfn_request(self, role: QueueRole, segs: npt.NDArray[Any], chain: Any) -> None:
        """One array of 32-bit little-endian PFNs of 4096 bytes, however it is cut into descriptors."""
        if int(chain["n_readable"]) != len(segs) or int(chain["readable"]) > MAX_REQUEST_BYTES:
            self.bad_requests[f"{role.value}: buffer that is writable or too long"] += 1
            return
        data = self._gather(segs)
        if len(data) % 4:
            self.bad_requests[f"{role.value}: length that is no multiple of 4"] += 1
        pfns = np.unique(np.frombuffer(data, dtype="<u4", count=len(data) // 4).astype(np.uint64))
        assert self._memory is not None
        inside = np.zeros(len(pfns), dtype=np.bool_)
        for region in self._memory.regions:
            inside |= (pfns >= region.gpa >> PAGE_SHIFT) & (pfns < region.end >> PAGE_SHIFT)
        if not inside.all():
            self.bad_requests[f"{role.value}: PFN outside RAM"] += int((~inside).sum())
            pfns = pfns[inside]
        if not len(pfns):
            return
        breaks = np.flatnonzero(np.diff(pfns) != 1) + 1
        firsts = pfns[np.concatenate(([0], breaks))]
        counts = np.diff(np.concatenate(([0], breaks, [len(pfns)]))).astype(np.uint64)
        for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
            if role is QueueRole.INFLATE:
                bitmap.set_run(self._ballooned, first, count)
            else:
                bitmap.clear_run(self._ballooned, first, count)
        if role is QueueRole.INFLATE and self.discard is not None:
            addr, length = firsts << np.uint64(PAGE_SHIFT), counts << np.uint64(PAGE_SHIFT)
            self.discard(addr, length)
            if self.dirty_log is not None:  # no guest-side tracker sees the device drop a page
                self.dirty_log.mark_ranges(addr, length)
