"""The balloon device as a core without I/O: a transport feeds it calls, a hypervisor sets its targets.

Implements `vring.device.Device`. What buffers mean is in `balloon_dev.requests`; what to do with a hint, with pages
given up, or with the elements of the free page queue is the embedder's: `hint_sink`, `discard` and `tap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from balloon_dev.config import ACTUAL, CMD_ID, CONFIG_BYTES, NUM_PAGES, POISON_VAL, BalloonConfig
from balloon_dev.features import ALL_BALLOON_FEATURES, DEVICE_ID, RING_FEATURES, BalloonFeature, QueueRole, role_feature
from balloon_dev.hinting import Action, HintEvent, HintRun
from balloon_dev.profiles import SPEC, Profile
from balloon_dev.requests import MAX_REQUEST_BYTES, Discard, HintSink, LearnsDeflate, Requests, RingTap
from balloon_dev.rules import Rule
from balloon_dev.saved import SavedDevice
from vring.dirty.software import SoftwareDirtyLog
from vring.errors import DriverError, UsageError, quoted
from vring.features import Status
from vring.memory import PAGE_SIZE, GuestMemory
from vring.pages import PageLayout, PageSet
from vring.split import DeviceQueue

__all__ = ["DEFAULT_FEATURES", "MAX_REQUEST_BYTES", "SUPPORTED_FEATURES", "BalloonDevice", "RingTap"]

DEFAULT_FEATURES = int(BalloonFeature.FREE_PAGE_HINT | RING_FEATURES)
SUPPORTED_FEATURES = int(ALL_BALLOON_FEATURES | RING_FEATURES)
"""What the device serves: all of section 5.5.3."""

BALLOON_QUEUES = (QueueRole.INFLATE, QueueRole.DEFLATE)
BATCH = 256
ROUNDS_PER_CALL = 64


class BalloonDevice(Requests):
    """A virtio-balloon device.

    Parameters
    ----------
    features
        Feature bits to offer.
    profile
        The choices in which real devices differ, see `balloon_dev.profiles`.
    discard
        Called with guest addresses and lengths (bytes) of pages in the balloon, or reported free, that the host may
        drop, before their buffer is returned. Ranges are inside RAM; those of the balloon are merged and ascending.
        None: the pages are only counted. If it raises, their buffer is not returned but found again later.
    host_page
        Bytes of a page of the host. Reports must be made of whole ones.

    Raises
    ------
    UsageError
        If a feature is asked for that the device does not serve.
    """

    device_id = DEVICE_ID

    def __init__(
        self,
        features: int = DEFAULT_FEATURES,
        *,
        profile: Profile = SPEC,
        discard: Discard | None = None,
        host_page: int = PAGE_SIZE,
    ) -> None:
        super().__init__()
        if features & ~SUPPORTED_FEATURES:
            raise UsageError(
                f"features {features & ~SUPPORTED_FEATURES:#x} are not served (supported: {SUPPORTED_FEATURES:#x})"
            )
        if host_page < PAGE_SIZE or host_page & (host_page - 1):
            raise UsageError(f"a host page of {host_page} bytes")
        self.profile = profile
        self.host_page = host_page
        self.offered_features = features
        self.discard = discard
        self.hint_sink: HintSink | None = None
        """Called with (command id, addresses, lengths) of hints that count, while their run is current and before
        their buffers are returned."""
        self.tap: RingTap | None = None
        """Shown each command and each block of the free page queue, before it is judged; no other queue."""
        self.dirty_log: SoftwareDirtyLog | None = None
        """Where the device logs what it writes itself: used rings and discarded pages."""
        self.enough: Callable[[], bool] = lambda: False
        """Asked after each buffer: whether the others are left to the next call of `process`."""
        self.config = BalloonConfig(features)
        self.hinting = HintRun(profile)
        self.negotiated = 0
        self._status = Status.RESET  # stays so where the transport does not tell
        self._numbered_for: tuple[int, int] | None = None
        self._by_role: dict[QueueRole, int] = {}
        self._by_number: dict[int, QueueRole] = {}
        self._memory: GuestMemory | None = None
        self._queues: dict[int, DeviceQueue] = {}
        self._new: set[QueueRole | None] = set()
        self._calls: set[int] = set()
        self._config_change = False
        self._ballooned = PageSet(PageLayout(0))
        self.ballooned_pages = 0
        """Pages that are in the balloon by what came over the queues."""

    # -- the transport's side -------------------------------------------------------------------------------------

    @property
    def queue_sizes(self) -> Sequence[int]:
        """Largest queue sizes by queue number, under the offered features."""
        return [size for _, size in sorted(self._numbered(self.offered_features, fill=True).items())]

    @property
    def most_queues(self) -> int:
        """Queues a balloon can have at most: one for each role, by any numbering."""
        return len(QueueRole)

    @property
    def config_generation(self) -> int:
        """Generation of the config space."""
        return self.config.generation

    def set_memory(self, memory: GuestMemory | None) -> None:
        """Take the guest's memory; queues attached before are dropped. Pages still covered stay in the balloon."""
        self._queues.clear()
        self._held_stats = None
        self._memory = memory
        layout, before = memory.page_layout if memory else PageLayout(0), self.ballooned_pages
        if layout != self._ballooned.layout:  # a table may be of terabytes that are nowhere: what is empty is not read
            self._ballooned = self._ballooned.within(layout) if before else PageSet(layout)
            self.ballooned_pages = len(self._ballooned) if before else 0
        if self.ballooned_pages < before and isinstance(self.discard, LearnsDeflate):
            self.discard.reset()  # what is gone may come back as other memory, which the guest uses

    def set_features(self, features: int) -> bool:
        """Take the driver's choice, False if it has bits that were not offered."""
        if features & ~self.offered_features:
            return False
        self.negotiated = features
        for role in (QueueRole.STATS, QueueRole.FREE_PAGE):
            if not features & role_feature(role):
                self._forget(role)
        return True

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the config space."""
        return self.config.read(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """Store actual or poison_val; everything else is read-only for the driver."""
        poison, status = self.config[POISON_VAL], self._status
        written = self.config.write(offset, data)
        if written is None:
            self._bad(Rule.CONFIG_READ_ONLY)
        elif POISON_VAL in written:
            self._poison_told = True
        if status & Status.DRIVER and not status & (Status.FEATURES_OK | Status.DRIVER_OK):
            self._bad(Rule.CONFIG_UNSETTLED)
        if status & Status.DRIVER_OK and self.config[POISON_VAL] != poison:
            self._bad(Rule.POISON_CHANGED)

    def set_status(self, status: Status) -> None:
        """Learn how far the driver is, where the transport is told: some rules can be judged only then."""
        begins = status & ~self._status & Status.DRIVER_OK
        if begins and not status & Status.FEATURES_OK:
            self._bad(Rule.FEATURES_NOT_CONFIRMED)
        self._status = status

    def new_driver(self, index: int, *, sure: bool) -> None:
        """Forget what went with a queue of the driver before: another one sets it up, without a reset in between.

        The hint run goes with the free page queue, the statistics with the statsq, the balloon with inflateq and
        deflateq. `poison_val` goes with none: it is written before any queue is there, and it forbids discards.
        """
        role = self.role_of(index)
        if role in BALLOON_QUEUES:
            if not any(other is not role and self.queue(other) and other in self._new for other in BALLOON_QUEUES):
                self._forget_balloon(sure=sure)
            self._new.add(role)
        elif role is QueueRole.FREE_PAGE:
            self._forget(role)
            if not sure:
                self.hinting.scatter()
        elif role is QueueRole.STATS:
            self._forget(role)  # a driver that goes on has left a buffer with figures, which is taken in again

    def _forget(self, role: QueueRole) -> None:
        if role is QueueRole.STATS:
            self.stats.clear()
        elif role is QueueRole.FREE_PAGE:
            shown = self.config[CMD_ID]
            self.hinting.handle(HintEvent.RESET)
            self._publish(notify=False)
            self._config_change = self._config_change or self.config[CMD_ID] != shown

    def _forget_balloon(self, *, sure: bool) -> None:
        self._ballooned, self.ballooned_pages = PageSet(self._ballooned.layout), 0
        if isinstance(self.discard, LearnsDeflate):
            self.discard.reset()
        if sure and self.actual:
            self.config[ACTUAL] = 0
            self._config_change = True

    def attach_queue(self, index: int, queue: DeviceQueue) -> None:
        """Make a queue live."""
        self._queues[index] = queue
        self._log_used_ring(queue)  # its event index or flags were written

    def detach_queue(self, index: int) -> None:
        """Stop using a queue."""
        if index == self.queue_number(QueueRole.STATS):
            self._held_stats = None
        self._new.discard(self.role_of(index))
        self._queues.pop(index, None)
        self._calls.discard(index)

    def held_buffers(self, index: int) -> int:
        """How many buffers taken from a queue the device keeps: the one on the statsq, until figures are wanted.

        Whoever saves a queue's base index goes back by so many, so that they are found again.
        """
        return int(self._held_stats is not None and index == self.queue_number(QueueRole.STATS))

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
        self._new.clear()
        self._calls.clear()
        self._held_stats = None
        self.negotiated = 0
        self._status = Status.RESET
        self._forget(QueueRole.STATS)
        self._forget(QueueRole.FREE_PAGE)
        self._forget_balloon(sure=True)
        self.config[POISON_VAL] = 0
        self._poison_told = False
        self._config_change = False

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

    def request_stats(self) -> bool:
        """Ask for fresh statistics, by giving the buffer back that the driver left for that.

        Returns
        -------
        bool
            False if there is none: STATS_VQ was not negotiated, or the driver has not answered the last request.
        """
        queue = self.queue(QueueRole.STATS)
        if queue is None or self._held_stats is None:
            return False
        head, self._held_stats = self._held_stats, None
        if queue.push([head]):
            self._calls.add(queue.index)
        self._log_used_ring(queue)
        return True

    def _host(self, event: HintEvent) -> None:
        if self.hinting.handle(event) in (Action.NEW_ID, Action.PUBLISH):
            self._publish()

    def _publish(self, *, notify: bool = True) -> None:
        self.config[CMD_ID] = self.hinting.config_value
        self._config_change = self._config_change or notify

    def save(self) -> dict[str, Any]:
        """Return the device's own state for a migration; queues are the transport's to save (see `held_buffers`)."""
        first, pages = self._ballooned.runs()
        return SavedDevice(
            self.profile.name,
            self.offered_features,
            self.negotiated,
            self.config.read(0, CONFIG_BYTES),
            self._poison_told,
            self.hinting.save(),
            self.stats.save(),
            tuple(zip(first.tolist(), pages.tolist(), strict=True)),
        ).to_json()

    def load(self, saved: dict[str, Any] | SavedDevice) -> None:
        """Take over what `save` returned, checked or not. Call it after `set_memory`; the config interrupt comes again.

        Raises
        ------
        UsageError
            With nothing changed, if the state is malformed or from a device that offered other features or had another
            profile.
        """
        state = saved if isinstance(saved, SavedDevice) else SavedDevice.from_json(saved)
        if (state.profile, state.offered) != (self.profile.name, self.offered_features):
            raise UsageError(
                f"saved device state is of a {quoted(state.profile)} device offering {state.offered:#x}, "
                f"this one is {self.profile.name!r} offering {self.offered_features:#x}"
            )
        for first, pages in state.ballooned:
            if not self._ballooned.layout.has(first, pages):
                raise UsageError(f"saved device state: ballooned pages {first}+{pages} are outside RAM")
        self.hinting.load(state.hinting)
        self.stats.load(state.stats)
        self.negotiated = state.negotiated
        self._poison_told = state.poison_told
        for offset in (NUM_PAGES, ACTUAL, POISON_VAL):
            self.config[offset] = int.from_bytes(state.config[offset : offset + 4], "little")
        self._ballooned, self.ballooned_pages = PageSet(self._ballooned.layout), 0
        for first, pages in state.ballooned:
            self.ballooned_pages += self._ballooned.set_run(first, pages)
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

    def _numbers(self) -> tuple[dict[QueueRole, int], dict[int, QueueRole]]:
        """Return queue numbers by role and roles by number; worked out once for each set of features."""
        features = self.offered_features, self.negotiated
        if features != self._numbered_for:
            number = self.profile.numbering.number
            found = {role: number(role, *features) for role in QueueRole}
            self._by_role = {role: index for role, index in found.items() if index is not None}
            self._by_number = {index: role for role, index in self._by_role.items()}
            self._numbered_for = features
        return self._by_role, self._by_number

    def queue_number(self, role: QueueRole) -> int | None:
        """Return the number of a queue under the negotiated features, None if it does not exist."""
        return self._numbers()[0].get(role)

    def role_of(self, index: int) -> QueueRole | None:
        """Return what queue `index` is for under the negotiated features."""
        return self._numbers()[1].get(index)

    def queue(self, role: QueueRole) -> DeviceQueue | None:
        """Return the live queue for a role, if there is one."""
        index = self.queue_number(role)
        return None if index is None else self._queues.get(index)

    def process(self, index: int) -> int:
        """Serve a queue until it is empty, `enough`, or `ROUNDS_PER_CALL` batches; return how many buffers that was.

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
            if (n == 0 and not queue.enable_notify()) or (n and self.enough()):
                break
        self._log_used_ring(queue)  # asking for kicks wrote to it, if nothing else did
        return served

    def process_batch(self, index: int, maximum: int = BATCH) -> int:
        """Pop one batch, let it take effect until it is `enough`, return that. Return how many buffers it was, 0: none.

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
            If the ring broke, or the queue has no purpose: the driver numbers its queues by another policy.
        """
        queue = self._queues.get(index)
        if queue is None or self._memory is None:
            return 0
        role = self.role_of(index)
        batch = queue.pop(maximum)
        n = len(batch)
        if n == 0:
            return 0
        if role is None:
            queue.unpop(n)
            policy = self.profile.numbering.value
            raise DriverError(
                f"a buffer came on this queue, which has no purpose under the features {self.negotiated:#x}: the "
                f"driver numbers its queues by another policy than {policy}",
                queue=index,
                clause="balloon.queues-1",
            )
        heads = batch.heads.copy()
        back: list[int] = []
        acted = 0
        try:
            if role is QueueRole.FREE_PAGE:
                acted = n  # whatever becomes of the hint, it is not taken in twice
                self._hint_batch(batch.chains, batch.segs)
            for chain in batch.chains[acted:]:
                first = int(chain["first_seg"])
                back += self._request(role, batch.segs[first : first + int(chain["n_segs"])], chain)
                acted += 1
                if self.enough():
                    break
        finally:
            # What failed half way stays available: it is acknowledged only when it has been done.
            if acted < n:
                queue.unpop(heads=heads[acted:])
            done = heads if role is QueueRole.FREE_PAGE else np.asarray(back, dtype=np.uint32)
            if len(done) and queue.push(done):
                self._calls.add(index)
            self._log_used_ring(queue)
        return acted

    def _request(self, role: QueueRole, segs: npt.NDArray[Any], chain: Any) -> list[int]:
        """Let one buffer take effect; return the heads to give back."""
        if role is QueueRole.STATS:
            return self._stats_buffer(segs, chain)
        if role is QueueRole.REPORTING:
            self._report(segs, chain)
        else:
            self._pfn_request(role, segs, chain)
        return [int(chain["head"])]

    def _log_used_ring(self, queue: DeviceQueue) -> None:
        if self.dirty_log is not None:
            pages = queue.used_pages
            self.dirty_log.mark(pages.start, len(pages))
