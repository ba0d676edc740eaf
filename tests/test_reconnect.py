"""The vhost-user socket breaks and comes back: the guest takes back what the device had, and begins anew."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from features_pair import ALL
from serve_process import Process, wait_for

from balloon_dev.device import BalloonDevice
from balloon_dev.features import QueueRole
from host_qemu_side.python_guest import PythonGuest
from host_qemu_side.source import SourceHost

TARGET = 3000
ARGUMENTS = ["--memory", "96M", "--workload", "churn:20%@1M+writer:4M@8M", "--features", "all", "--reconnect", "20"]


def start_hints(host: SourceHost) -> None:
    host.device.start_hinting()
    host.backend.deliver()


def hinted(guest: PythonGuest) -> int:
    return int(guest.ask("status")["hinted_pages"])


def hints_requested(host: SourceHost, guest: PythonGuest) -> None:
    start_hints(host)


def hints_held(host: SourceHost, guest: PythonGuest) -> None:
    start_hints(host)
    host.loop.run_until(lambda: not host.device.hinting.active, 10.0, "the guest to end its run")
    assert hinted(guest)


def balloon_on_its_way(host: SourceHost, guest: PythonGuest) -> None:
    host.device.set_target(2 * TARGET)
    host.backend.deliver()
    host.loop.run_until(lambda: host.device.actual > TARGET + 256, 10.0, "the balloon to grow")


def everything_unanswered(host: SourceHost, guest: PythonGuest) -> None:
    host.backend.hold()
    host.device.set_target(TARGET // 2)
    host.device.request_stats()
    start_hints(host)
    guest.run_for(0.2)


def between_two_pieces_of_hints(host: SourceHost, guest: PythonGuest) -> None:
    start_hints(host)
    index = host.device.queue_number(QueueRole.FREE_PAGE)
    assert index is not None
    host.backend.hold()
    guest.run_for(0.1)
    host.device.process_batch(index, 3)


def guest_paused(host: SourceHost, guest: PythonGuest) -> None:
    hints_held(host, guest)
    guest.freeze()


MOMENTS = [
    hints_requested,
    hints_held,
    balloon_on_its_way,
    everything_unanswered,
    between_two_pieces_of_hints,
    guest_paused,
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_the_back_end_closes_the_socket(moment) -> None:
    """Whatever was in flight is the guest's again; then a balloon and a run of hints as if nothing had been."""
    with SourceHost(features=ALL) as host:
        guest = PythonGuest(host.loop, host.backend, host.socket_path, ARGUMENTS)
        device: BalloonDevice = host.device
        try:
            guest.wait_ready()
            device.set_target(TARGET)
            host.backend.deliver()
            host.loop.run_until(lambda: device.actual == TARGET, 10.0, "the balloon")
            before = guest.ask("status")
            moment(host, guest)
            host.backend.disconnect("the test closed it")
            host.backend.release()
            device.set_target(TARGET)
            if moment is guest_paused:
                guest._send("resume")  # `thaw` asks whether the device is there
            host.loop.run_until(lambda: device.actual == TARGET, 20.0, "the guest to come back and fill its balloon")
            assert host.backend.connections == 2
            after = guest.ask("status")
            assert after["hinted_pages"] == 0
            assert after["ballooned_pages"] == device.ballooned_pages == TARGET
            assert after["total_pages"] == before["total_pages"]
            start_hints(host)
            host.loop.run_until(lambda: not device.hinting.active, 10.0, "a run of hints")
            assert hinted(guest)
            device.finish_hinting()
            host.backend.deliver()
            host.loop.run_until(lambda: hinted(guest) == 0, 10.0, "the guest to free its hinted pages")
            guest.check()
            assert guest.checked is not None
            assert guest.checked["pages"]
            assert guest.checked["wrong"] == 0
            assert not device.bad_requests
        finally:
            guest.close()


def start_guest(socket: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "guest_driver", "--socket", str(socket), "--memory", "64M", "--workload", "idle"]
    return subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)


def ready(serve: Process) -> bool:
    """Whether there is a front end whose driver has negotiated hinting, and whose last queue is up."""
    device = serve.ask("query-device")
    up = {queue["name"]: queue["live"] for queue in device["queues"]}
    return "FREE_PAGE_HINT" in device["features"]["negotiated"] and up.get("free_page_vq", False)


def test_serve_is_killed_and_started_again(tmp_path: Path) -> None:
    serve = Process(tmp_path, guest=False)
    guest = start_guest(serve.socket, "--reconnect", "20")
    try:
        for _ in range(2):
            wait_for(partial(ready, serve))
            run = serve.ask("hint-run", deadline=5)
            assert run["completed"]
            assert run["blocks"] > 5
            serve.process.kill()
            serve.process.wait()
            serve = Process(tmp_path, guest=False)
        wait_for(partial(ready, serve))
        assert guest.poll() is None
    finally:
        guest.kill()
        guest.communicate()
        serve.end()


def test_a_device_that_does_not_come_back(tmp_path: Path) -> None:
    serve = Process(tmp_path, guest=False)
    guest = start_guest(serve.socket, "--reconnect", "0.5")
    wait_for(partial(ready, serve))
    assert serve.ask("hint-run", deadline=5)["completed"]  # so it has booted
    serve.end()
    _, said = guest.communicate(timeout=20)
    assert guest.returncode == 5
    assert "not back within 0.5 s" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_descriptor_connects_once() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "guest_driver", "--socket", "fd:9", "--reconnect", "5"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--reconnect needs --socket with a path" in done.stderr
