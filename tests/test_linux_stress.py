"""All features at once with an unmodified Linux kernel: a long random mixture, and a migration in the middle of it."""

from __future__ import annotations

import os
import random
import time
from collections import Counter

import pytest
from conftest import IN_CI
from linux_pair import ALL, BLOCK, MIB, NONCE, PAGE, RACES, LinuxPair, kernel_complains, linux_pair

from balloon_cli.migrate import spawn_receiver
from balloon_dev.features import QueueRole
from balloon_dev.hinting import HintState
from balloon_dev.profiles import LINUX
from host_qemu_side.linux_guest import LinuxGuest
from host_qemu_side.linux_guest.handle import LinuxGuestHandle
from host_qemu_side.migration import Limits
from host_qemu_side.source import SourceHost
from vring.errors import MissingFacility

pytestmark = [pytest.mark.uml, pytest.mark.slow]

STEPS = 200
MEMORY = 512 * MIB
LARGEST = int(0.45 * MEMORY) // PAGE


class Actions:
    """What may happen at a step; each returns when the host has nothing to wait for."""

    def __init__(self, pair: LinuxPair, rng: random.Random) -> None:
        self.pair, self.rng = pair, rng
        self.weights = {
            *[(self.resize, 6), (self.resize_and_go_on, 5), (self.stats, 4), (self.hints, 5), (self.part_of_hints, 5)],
            *[(self.rest_of_hints, 4), (self.stop, 5), (self.done, 4), (self.five_ids, 2), (self.file, 6)],
            *[(self.pressure, 1), (self.reload, 2), (self.rebind, 2), (self.replug, 1), (self.freeze, 2)],
            *[(self.copy, 3), (self.wait, 3)],
        }

    def resize(self) -> None:
        """A target that is waited for. Hints are given up first: they may leave no memory for it."""
        self.done()
        self.rest_of_hints()
        self.pair.set_target(self.rng.randrange(LARGEST))

    def resize_and_go_on(self) -> None:
        self.pair.set_target(self.rng.choice([0, 1, 255, 256, 257, self.rng.randrange(LARGEST)]), wait=False)

    def stats(self) -> None:
        assert self.pair.stats()["stat-total-memory"] > 0

    def hints(self) -> None:
        self.rest_of_hints()
        self.pair.start_hints()

    def part_of_hints(self) -> None:
        self.pair.device.allowed[QueueRole.FREE_PAGE] = self.rng.randrange(40)
        self.pair.start_hints()

    def rest_of_hints(self) -> None:
        self.pair.device.allowed.pop(QueueRole.FREE_PAGE, None)
        self.pair.serve_queue(QueueRole.FREE_PAGE)

    def stop(self) -> None:
        self.pair.stop_hints()

    def done(self) -> None:
        self.pair.done()

    def five_ids(self) -> None:
        for _ in range(5):
            self.pair.start_hints()

    def file(self) -> None:
        """Some memory is used and freed: something to report."""
        size = self.rng.randrange(1, 40)
        self.pair.run(f"dd if=/dev/urandom of=/fill/x bs=1M count={size} 2>/dev/null; rm -f /fill/x")

    def copy(self) -> None:
        """What is written to memory that was given up comes back."""
        copy = "dd if=/dev/urandom of=/fill/a bs=1M count=8 2>/dev/null && cp /fill/a /fill/b && cmp /fill/a /fill/b"
        assert "same" in self.pair.run(f"{copy} && echo same; rm -f /fill/a /fill/b")

    def pressure(self) -> None:
        """A process that wants more than there is with this balloon."""
        self.rest_of_hints()
        self.pair.run("dd if=/dev/zero of=/dev/null bs=280M count=1 2>/dev/null", 60.0, check=False)

    def reload(self) -> None:
        self.pair.unload()
        self.pair.load()

    def rebind(self) -> None:
        self.pair.rebind()

    def replug(self) -> None:
        self.pair.replug(ALL)

    def freeze(self) -> None:
        """The guest stands still while the host says all sorts of things."""
        with self.pair.frozen():
            self.pair.set_target(self.rng.randrange(LARGEST), wait=False)
            self.pair.start_hints()
            self.rng.choice([self.stop, self.done, lambda: None])()

    def wait(self) -> None:
        end = time.monotonic() + self.rng.random() * 0.3
        self.pair.until(lambda: time.monotonic() > end)

    def step(self) -> str:
        ordered = sorted(self.weights, key=lambda item: item[0].__name__)
        chosen = self.rng.choices([a for a, _ in ordered], [w for _, w in ordered])[0]
        chosen()
        return chosen.__name__


def test_stress(tmp_path) -> None:
    """200 steps in random order; the host is sane after each, and in the end the guest has all its memory back.

    ``STRESS_SEED`` in the environment repeats the choices of a run (the guest's timing is its own).
    """
    seed = int(os.environ.get("STRESS_SEED") or (1 if IN_CI else random.SystemRandom().randrange(1 << 32)))
    print(f"STRESS_SEED={seed}")
    rng = random.Random(seed)
    trail: list[str] = []
    with linux_pair(tmp_path, memory=MEMORY) as pair:
        pair.start_tagger(pages=512, rate=400)
        pair.tool("writer --pages 256 --rate 400 --seed 3")
        free = pair.meminfo()
        actions = Actions(pair, rng)
        try:
            for number in range(STEPS):
                trail.append(actions.step())
                pair.check(look_at_tags=number % 10 == 0)
            pair.device.allowed.clear()
            pair.serve_queue(QueueRole.FREE_PAGE)
            pair.done()
            pair.set_target(0)
            back = pair.until_free(free - 8 * MIB)
            pair.check()
            assert pair.device.ballooned_pages == 0
            assert not kernel_complains(pair)
        except BaseException as error:
            error.add_note(f"STRESS_SEED={seed}, step {len(trail)}, after {trail[-6:]}, {pair.device.hinting.state}")
            raise
        print(f"{Counter(trail)}; MemFree {free >> 20} MiB before, {back >> 20} MiB after")


def test_migration_with_everything_active(tmp_path) -> None:
    """Hints, a balloon that changes its size and reports, all during the rounds: the oracle finds no page wrong."""
    with SourceHost(profile=LINUX, features=ALL) as host, spawn_receiver() as (output, _):
        try:
            guest = LinuxGuest(MEMORY, tmp_path, host.socket_path, watch=host.loop.filenos)
        except MissingFacility as missing:
            pytest.skip(str(missing))
        handle = LinuxGuestHandle(guest, host.backend)
        with guest:
            guest.wait_ready(60.0, handle.serve)
            guest.load_balloon(handle.serve)
            device = host.device
            host.loop.run_until(lambda: device.queue(QueueRole.REPORTING) is not None, 10.0, "the driver")
            guest.tool(f"tagger --pages 1024 --rate 500 --nonce {NONCE}", serve=handle.serve)
            guest.tool("churn --keep 20 --seed 5", serve=handle.serve)
            guest.tool("writer --pages 1024 --rate 1000 --seed 5", serve=handle.serve)
            free = guest.meminfo(handle.serve)["MemFree"]
            device.set_target(64 * MIB // PAGE)
            host.backend.deliver()
            host.loop.run_until(lambda: device.actual == 64 * MIB // PAGE, 20.0, "the balloon")
            log, refusal = handle.dirty_log(host.track_device_writes())
            assert refusal is None, refusal
            rng, before = random.Random(1), Counter(device.counters)
            seen: Counter[str] = Counter()

            def on_step(migration, witness) -> None:
                """Every so often the host changes its mind, and the guest frees a file."""
                if migration.frozen or migration.finished or migration.phase.value != "round":
                    return
                seen["steps"] += 1
                if seen["steps"] % 12 == 0:
                    device.set_target(rng.randrange(20 * MIB // PAGE, 100 * MIB // PAGE))
                    host.backend.deliver()
                if seen["steps"] % 20 == 0:
                    make = "dd if=/dev/urandom of=/fill/y bs=1M count=6 2>/dev/null; rm -f /fill/y"
                    guest.run(make, serve=handle.serve)
                if seen["steps"] % 30 == 0:
                    device.request_stats()

            outcome = host.migrate(
                handle,
                log,
                output,
                limits=Limits(bandwidth=48 * MIB, downtime=0.05, max_rounds=6),
                header={"guest": "linux", "tag_nonce": NONCE},
                hand_over=False,
                on_step=on_step,
            )
            done = device.counters - before
            runs = [(run.blocks, run.pages_spared) for run in outcome.result.hint_runs]
            print(f"{outcome.verdict}; {dict(done)}; blocks and pages spared in each run of hints: {runs}")
            assert outcome.verdict is not None
            assert outcome.verdict.pages_wrong == 0, outcome.verdict.as_dict()
            assert outcome.ready.tags.ok
            assert sum(run.blocks for run in outcome.result.hint_runs) > 20
            assert done["pages inflated"] > 1000
            assert done["pages deflated"] > 1000
            assert done["bytes reported"] > BLOCK
            assert not device.bad_requests.keys() - RACES
            device.set_target(0)
            host.backend.deliver()
            host.loop.run_until(lambda: device.actual == 0, 20.0, "the balloon to be empty")
            assert device.hinting.state is HintState.DONE
            end = time.monotonic() + 10
            while guest.meminfo(handle.serve)["MemFree"] < free - 8 * MIB:
                assert time.monotonic() < end
            assert guest.alive(handle.serve)
