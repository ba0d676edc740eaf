"""All feature bits between two processes: the embedded guest over vhost-user, and its migration."""

import subprocess
import sys

import pytest
from features_pair import ALL

from balloon_cli.migrate import spawn_receiver
from balloon_dev.features import BalloonFeature
from balloon_dev.profiles import LINUX, QEMU, SPEC
from host_qemu_side.migration import Limits
from host_qemu_side.python_guest import PythonGuest
from host_qemu_side.source import SourceHost

MIB = 1 << 20
OOM = int(BalloonFeature.DEFLATE_ON_OOM)


def launch(host, *arguments, memory="96M", workload="idle"):
    return PythonGuest(
        host.loop, host.backend, host.socket_path, ["--memory", memory, "--workload", workload, *arguments]
    )


@pytest.mark.parametrize("profile", [SPEC, QEMU, LINUX])
def test_statistics_reports_and_balloon_over_vhost_user(profile):
    with SourceHost(profile=profile, features=ALL) as host:
        guest = launch(host, "--profile", profile.name, "--features", "all,-poison")
        device = host.device
        try:
            guest.wait_ready()
            assert device.negotiated == ALL & ~int(BalloonFeature.PAGE_POISON)
            host.loop.run_until(lambda: device.stats.updates == 1, 5, "statistics")
            free = device.stats.values["stat-free-memory"]
            device.set_target(2000)
            host.backend.deliver()
            host.loop.run_until(lambda: device.actual == 2000, 5, "the balloon")
            assert device.request_stats()
            host.backend.deliver()
            host.loop.run_until(lambda: device.stats.updates == 2, 5, "statistics")
            assert device.stats.values["stat-free-memory"] <= free - 2000 * 4096  # less by what is being reported
            host.loop.run_until(lambda: device.counters["bytes reported"] > 60 * MIB, 10, "reports")
            guest.run_for(0.3)
            status = guest.ask("status")
            assert status["driver"]["reported"] * 4 * MIB == device.counters["bytes reported"]
            assert not device.bad_requests
        finally:
            guest.close()


@pytest.mark.parametrize("bit", [0, OOM])
def test_balloon_that_leaves_no_memory(bit):
    """The host asks for more than there is while the guest goes on allocating: it gets pages back, or goes without."""
    with SourceHost(features=ALL & ~OOM | bit) as host:
        guest = launch(host, workload="build:200M+writer:4M@10M")
        try:
            guest.wait_ready()
            host.device.set_target(1 << 20)
            host.backend.deliver()
            host.loop.run_until(lambda: host.device.actual > 12000, 10, "the balloon")
            for _ in range(40):
                guest.run_for(0.1)
                if guest.ask("status")["driver"]["oom_deflated"]:
                    break
            assert bool(guest.status["driver"]["oom_deflated"]) is bool(bit)
            guest.check()
            assert guest.checked is not None
            assert guest.checked["wrong"] == 0
        finally:
            guest.close()


def test_poisoned_guest_is_migrated_with_everything_on():
    arguments = ["--seed", "3", "--poison", "0xaaaaaaaa", "--features", "all"]
    with SourceHost(features=ALL) as host:
        guest = launch(host, *arguments, memory="128M", workload="churn+writer:4M@2M")
        device = host.device
        try:
            guest.wait_ready()
            assert device.negotiated == ALL
            assert device.poison_val == 0xAAAAAAAA
            device.set_target(3000)
            host.backend.deliver()
            host.loop.run_until(lambda: device.actual == 3000, 10, "the balloon")
            log = guest.dirty_log("auto", host.track_device_writes())
            with spawn_receiver() as (output, _):
                outcome = host.migrate(
                    guest,
                    log,
                    output,
                    limits=Limits(bandwidth=512 * MIB),
                    journal=guest.journal,
                    header={"guest": "python", "resume": {}},
                    at_pause=lambda: guest.status,
                    report_timeout=60.0,
                )
            assert outcome.verdict is not None
            assert outcome.verdict.pages_wrong == 0
            assert outcome.result.hints_refused is None
            assert outcome.report is not None
            assert outcome.report["pages_wrong"] == outcome.report["pages_wrong_again"] == 0
            assert outcome.report["hint_run"]["blocks"] > 0
        finally:
            guest.close()


def test_features_are_parsed_by_the_guest_program():
    command = [sys.executable, "-m", "guest_driver", "--socket", "/nowhere"]
    wrong = subprocess.run([*command, "--features", "hints"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "deflate-on-oom" in wrong.stderr
    right = subprocess.run([*command, "--features", "hint,stats"], capture_output=True, text=True)
    assert right.returncode == 5
