"""``balloon migrate --guest linux``: an unmodified Linux kernel (User-Mode Linux) as the guest.

It cannot go on elsewhere (its CPU state lives in processes of this host), so its destination is an image that is
checked page by page while the guest is frozen; then the guest goes on here and shows that it is alive.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from balloon_cli.errors import InvariantFailed
from balloon_cli.migrate import MigrateOptions, Progress, destination, judge_file, run_as_json, ticker
from balloon_dev.features import QueueRole
from balloon_dev.hinting import HintState
from balloon_dev.profiles import LINUX
from guest_driver.workloads import BuildSpec, ChurnSpec, WriterSpec, parse_workload
from host_qemu_side.linux_guest import LinuxGuest
from host_qemu_side.linux_guest.handle import LinuxGuestHandle
from host_qemu_side.linux_guest.kernel import find_kernel
from host_qemu_side.migration import Migration
from host_qemu_side.migration.output import FileOutput
from host_qemu_side.source import SourceHost
from host_qemu_side.witness import Witness
from vring.errors import PeerVanished, UsageError, VirtioError

__all__ = ["migrate_linux"]

TAGGED_PAGES = 1024
TAG_RATE = 500
BLOCK = 4 << 20
SETTLE_SECONDS = 5.0


def tool_commands(workload: str, seed: int) -> list[str]:
    """Return the guest tool's command lines for a workload.

    Raises
    ------
    UsageError
        If the Linux guest has no such workload.
    """
    commands = []
    for part in parse_workload(workload):
        if isinstance(part, ChurnSpec):
            commands.append(f"churn --keep {part.share * 100:g} --extent {part.extent} --seed {seed}")
        elif isinstance(part, WriterSpec):
            commands.append(f"writer --pages {part.size >> 12} --rate {part.rate >> 12} --seed {seed}")
        elif isinstance(part, BuildSpec):
            raise UsageError("the Linux guest has no 'build' workload; it has idle, churn and writer")
    return commands


class _FreeMemory:
    """Notes the guest's own MemFree as hints come and go."""

    def __init__(self, guest: LinuxGuest, handle: LinuxGuestHandle, host: SourceHost) -> None:
        self._guest, self._handle, self._host = guest, handle, host
        self.bytes: dict[str, int] = {"before": self.read()}

    def read(self) -> int:
        """Return MemFree in bytes."""
        return self._guest.meminfo(self._handle.serve)["MemFree"]

    def look(self, migration: Migration, witness: Witness) -> None:
        """After a step: once the guest has ended its first run, and again once the host has said STOP."""
        if migration.frozen or migration.finished or not migration.result.hint_runs:
            return
        state = self._host.device.hinting.state
        if "after_pass" not in self.bytes and migration.result.hint_runs[0].blocks and state is HintState.STOP:
            self.bytes["after_pass"] = self.read()
        elif "after_stop" not in self.bytes and len(migration.result.rounds) > 1:
            self.bytes["after_stop"] = self.read()

    def settle(self) -> bool:
        """After DONE: wait until the guest has its memory back, at most a few seconds; return whether it has."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            now = self.read()
            back = now > self.bytes["before"] - 8 * BLOCK
            if back or time.monotonic() > deadline:
                self.bytes["after_done"] = now
                return back


def _goes_on(guest: LinuxGuest, handle: LinuxGuestHandle, memory: _FreeMemory) -> str:
    """After a failed migration: see that the guest runs and has its memory back; say so in words.

    Raises
    ------
    InvariantFailed
        If it does not.
    """
    try:
        handle.check_alive()
    except VirtioError:
        return "there is no guest to go on with"
    try:
        if memory.settle():
            return f"the source's guest goes on: {memory.bytes['after_done'] >> 20} MiB free, as before"
    except (VirtioError, OSError) as error:
        raise InvariantFailed(f"the migration failed and the source's guest does not go on: {error}") from error
    was, now = memory.bytes["before"] >> 20, memory.bytes["after_done"] >> 20
    raise InvariantFailed(f"the migration failed and the source's guest has {now} MiB free of {was} MiB before")


def migrate_linux(
    options: MigrateOptions, hints: bool, progress: Progress, stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Migrate one Linux guest into an image; return one run's JSON values."""
    commands = tool_commands(options.workload, options.seed)
    if options.dirty_log not in ("auto", "cachestat"):
        raise UsageError(f"the Linux guest cannot use the dirty log {options.dirty_log!r}: leave it at auto")
    kernel = find_kernel(options.linux, options.modules)
    origin = kernel.origin()
    if origin.problems:
        progress.say(f"warning: the files of {origin.package} were changed: {'; '.join(origin.problems)}")
    progress.say(f"{kernel.path}, Linux {kernel.release}, {origin}")
    folder = Path(options.work_dir) if options.work_dir else Path(f"/var/tmp/virtio-balloon-{os.getuid()}")
    with contextlib.ExitStack() as stack:
        end_on_signal = ticker(progress, stopped)
        host = stack.enter_context(SourceHost(profile=LINUX))
        guest = LinuxGuest(
            options.memory,
            folder,
            host.socket_path,
            kernel=kernel,
            remove=[os.path.dirname(host.socket_path)],
            watch=host.loop.filenos,
        )
        handle = LinuxGuestHandle(guest, host.backend)
        stack.enter_context(guest)
        stack.callback(setattr, host.loop, "tick", None)  # before the guest is ended, which takes a while
        host.loop.tick = end_on_signal
        progress.say("the Linux guest boots")
        release = guest.wait_ready(60.0, handle.serve)
        guest.load_balloon(handle.serve)
        host.loop.run_until(
            lambda: host.device.queue(QueueRole.FREE_PAGE) is not None, 10.0, "the guest's balloon driver"
        )
        nonce = options.seed & 0x7FFFFFFF or 1
        guest.tool(f"tagger --pages {TAGGED_PAGES} --rate {TAG_RATE} --nonce {nonce}", serve=handle.serve)
        filled: dict[str, int | float] = {}
        for command in commands:
            progress.say(f"the guest runs its workload: {command}")
            filled |= guest.tool(command, 300.0, handle.serve)
        memory = _FreeMemory(guest, handle, host)

        def on_step(migration: Migration, witness: Witness) -> None:
            memory.look(migration, witness)
            progress.step(migration, witness, host)

        host.loop.tick = progress.tick  # from here on the migration itself asks whether to stop
        log, refusal = handle.dirty_log(host.track_device_writes())
        try:
            with destination(options, hints, host.loop.run_once) as output:
                outcome = host.migrate(
                    handle,
                    log,
                    output,
                    hints=hints and refusal is None,
                    limits=options.limits,
                    header={"guest": "linux", "tag_nonce": nonce},
                    hand_over=False,
                    on_step=on_step,
                    stop_requested=stopped,
                )
        except (VirtioError, OSError, MemoryError) as error:
            error.add_note(_goes_on(guest, handle, memory))
            raise
        if hints and refusal is not None:
            outcome.result.hints_refused = refusal
            progress.say(f"hints refused: {refusal}")
        memory.settle()
        ready = outcome.ready
        tags = None if ready is None or ready.tags is None else ready.tags.to_json()
        if isinstance(output, FileOutput):
            host.loop.tick = end_on_signal
            tags = judge_file(outcome, output.path, handle.serve).get("tags")
        alive = guest.alive(handle.serve) and guest.run("echo alive", serve=handle.serve).output.strip() == "alive"
        if not alive:
            raise PeerVanished("the Linux guest does not answer after the migration")
        xstate = guest.xstate_counts
    run = run_as_json(outcome, hints)
    run["dirty_log"] = log.name
    run["linux"] = {
        "kernel": str(kernel.path),
        "module": str(kernel.module),
        "package": origin.package,
        "release": release,
        "dpkg_verify_clean": origin.clean,
        "xstate_completed": None if xstate is None else xstate.completed,
        "filled": filled,
        "mem_free_bytes": memory.bytes,
        "alive_after": alive,
        "tags": tags,
    }
    return run
