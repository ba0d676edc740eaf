"""`balloon serve` as a process: signals, options, `balloon ctl`, an unmodified Linux kernel."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from serve_process import BALLOON, MIB, Process, receiver, wait_for

from balloon_cli.monitor_client import CommandFailed
from host_qemu_side.linux_guest import LinuxGuest
from vring.errors import MissingFacility


@pytest.fixture
def serve(tmp_path):
    process = Process(tmp_path)
    yield process
    process.end()
    assert "Traceback" not in process.log.read_text()
    assert not process.socket.exists()
    assert not process.monitor.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_says_done_and_removes_the_sockets(tmp_path, number, code):
    serve = Process(tmp_path, guest=False)
    command = [sys.executable, "-m", "guest_driver", "--socket", str(serve.socket), "--memory", "64M"]
    guest = subprocess.Popen([*command, "--workload", "idle"], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: serve.told("front-end-ready"))
        wait_for(lambda: serve.ask("query-device")["queues"][0]["live"])
        serve.ask("hint-start")
        wait_for(lambda: serve.ask("query-hint")["state"] == "stop")
        serve.process.send_signal(number)
        assert serve.process.wait(10) == code
        assert serve.told("HINT_STATE")[-1]["state"] == "stop"  # DONE comes after the last event
        assert not serve.socket.exists()
        assert not serve.monitor.exists()
        assert guest.wait(10) == 5
    finally:
        guest.kill()
        guest.communicate()


def test_a_signal_cancels_a_migration(tmp_path):
    serve = Process(tmp_path)
    serve.ask("migrate-set-parameters", **{"max-bandwidth": MIB})
    with receiver(f"unix:{tmp_path}/d.sock") as destination:
        serve.ask("migrate", uri=f"unix:{tmp_path}/d.sock")
        wait_for(lambda: serve.ask("query-migrate").get("ram", {}).get("transferred", 0) > 256 << 10)
        serve.process.send_signal(signal.SIGINT)
        assert serve.process.wait(10) == 130
        _, error = destination.communicate(timeout=10)
        assert destination.returncode == 5
        assert "gave up" in error
    assert not serve.socket.exists()
    assert serve.told("MIGRATION")[-1] == {"status": "cancelled"}


def test_ctl_for_people(serve):
    text = serve.ctl()
    assert "hint-run" in text
    assert "[deadline=number]" in text
    assert json.loads(serve.ctl("query-status", "--json")) == {
        "schema_version": 1,
        "command": "query-status",
        "return": {"status": "running", "running": True},
    }
    assert serve.ctl("balloon", "value=48M") == ""
    wait_for(lambda: serve.ask("query-balloon")["actual"] == 48 * MIB)
    assert "48.0 MiB" in serve.ctl("query-balloon")
    assert "0x80000001" in serve.ctl("hint-run")
    assert "avail ring:" in serve.ctl("query-queues")
    assert "'value' is missing; write `balloon value=int`" in serve.ctl("balloon", code=2)
    assert "write `balloon value=int`" in serve.ctl("balloon", "value=x", code=2)
    assert "write `balloon value=int`" in serve.ctl("balloon", "valu=1", code=2)
    assert "`query-status` takes no arguments" in serve.ctl("query-status", "value=1", code=2)
    assert "[hints=bool]" in serve.ctl("migrate", code=2)
    assert "expects 0 or an integer" in serve.ctl("migrate-set-parameters", "max-bandwidth=1", code=2)
    assert "lists the commands" in serve.ctl("nonsense", code=2)
    assert "key=value" in serve.ctl("balloon", "value", code=2)
    assert "freeze" not in serve.ctl("stop")


def test_ctl_without_a_monitor(tmp_path):
    run = [*BALLOON, "ctl", str(tmp_path / "m.sock")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=20)
    assert done.returncode == 5
    assert "balloon serve" in done.stderr
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "m.sock"))
        listener.listen(1)
        process = subprocess.Popen([*run, "query-status"], stderr=subprocess.PIPE, text=True)
        connection, _ = listener.accept()
        connection.send(b"220 hello, this is a mail server\r\n")
        _, error = process.communicate(timeout=20)
        assert process.returncode == 4
        assert "JSON" in error
        connection.close()


def test_wrong_options(tmp_path):
    for arguments, words in [
        (["--features", "levitation"], "deflate-on-oom"),
        (["--target", "many"], "no size"),
        (["--guest", "python", "--memory", "many"], "no size"),
        (["--features", "0x8000000000"], "not served"),
        (["--monitor", "/nowhere/m.sock"], "cannot listen"),
    ]:
        run = [*BALLOON, "serve", str(tmp_path / "b.sock"), *arguments]
        done = subprocess.run(run, capture_output=True, text=True, timeout=20)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert not os.listdir(tmp_path)


@pytest.mark.uml
def test_an_unmodified_linux_kernel_twice(tmp_path):
    serve = Process(tmp_path, "--profile", "linux", guest=False)
    try:
        for number in (1, 2):
            guest = LinuxGuest(128 * MIB, tmp_path / "work", serve.socket, cache=tmp_path / "cache")
            with guest:
                guest.wait_ready()
                guest.load_balloon()
                wait_for(lambda: serve.ask("query-device")["front-end"]["memory"])
                device = serve.ask("query-device")
                assert device["front-end"]["connections"] == number
                ram = device["front-end"]["memory"]
                if number == 1:
                    serve.ask("balloon", value=ram - 16 * MIB)
                wait_for(lambda size=ram - 16 * MIB: serve.ask("query-balloon")["actual"] == size)
                hint = serve.ask("hint-run", deadline=20)
                assert hint["completed"]
                assert hint["blocks"] > 3
                guest.unload_balloon()
                guest.load_balloon()
                wait_for(lambda: serve.ask("query-device")["features"]["negotiated"])
                assert serve.ask("hint-run", deadline=20)["completed"]
                with pytest.raises(CommandFailed, match="freeze control"):
                    serve.ask("stop")
            wait_for(lambda: not serve.ask("query-device")["front-end"]["connected"])
            assert serve.ask("query-hint")["running"] is False
    except MissingFacility as missing:
        pytest.skip(str(missing))
    finally:
        serve.end()
        print(serve.log.read_text())
    assert "Traceback" not in serve.log.read_text()
