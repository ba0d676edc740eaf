"""The hinting of a balloon device for a migration, whatever transport is before the device."""

from __future__ import annotations

from collections.abc import Callable

from balloon_dev.device import BalloonDevice
from host_qemu_side.migration.interfaces import U64

__all__ = ["DeviceHints"]


class DeviceHints:
    """A `host_qemu_side.migration.HintPort` over a balloon device and the transport before it.

    For a device behind virtio-mmio: ``DeviceHints(device, deliver=mmio.deliver, serve=mmio.poll)``. A migration calls
    it from its `step` only: call that where you may call the transport.

    Parameters
    ----------
    device
        The device.
    deliver
        Tells the driver what has changed: the transport's config interrupt.
    serve
        Serves the free page queue, or all queues, as far as that goes without waiting; what it returns is not looked
        at. What the transport serves by itself need not be served here.
    """

    def __init__(
        self, device: BalloonDevice, *, deliver: Callable[[], object], serve: Callable[[], object] = lambda: None
    ) -> None:
        self._device, self._deliver, self._serve = device, deliver, serve

    @property
    def sink(self) -> Callable[[int, U64, U64], None] | None:
        """Who takes the hints."""
        return self._device.hint_sink

    @sink.setter
    def sink(self, sink: Callable[[int, U64, U64], None] | None) -> None:
        self._device.hint_sink = sink

    @property
    def running(self) -> bool:
        """Whether a run is requested or started."""
        return self._device.hinting.active

    def start(self) -> int | None:
        """Issue a new id and tell the driver; None if the driver is gone."""
        if not self._device.hinting_negotiated:
            return None
        command_id = self._device.start_hinting()
        self._deliver()
        return command_id

    def stop(self) -> None:
        """End the run."""
        self._device.stop_hinting()
        self._deliver()

    def done(self) -> None:
        """Let the guest free its pages."""
        self._device.finish_hinting()
        self._deliver()

    def serve(self) -> None:
        """Serve the free page queue."""
        self._serve()
