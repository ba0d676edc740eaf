"""`balloon serve` as a process, driven by QEMU's own QMP library: migrations."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient
from serve_process import BALLOON, MIB, Process, receiver, wait_for

from balloon_cli.monitor_client import CommandFailed, MonitorClient


@pytest.fixture
def serve(tmp_path):
    process = Process(tmp_path)
    yield process
    process.end()
    assert "Traceback" not in process.log.read_text()
    assert not process.socket.exists()
    assert not process.monitor.exists()


def in_qmp(serve, script):
    async def talk():
        client = QMPClient("test")
        await client.connect(str(serve.monitor))
        try:
            return await asyncio.wait_for(script(client), 60)
        finally:
            await client.disconnect()

    return asyncio.run(talk())


def test_qemus_library_balloons_and_migrates(serve, tmp_path):
    async def script(qmp):
        assert qmp.greeting.QMP.version["package"].startswith("virtio-balloon")
        names = {command["name"] for command in await qmp.execute("query-commands")}
        assert {"balloon", "migrate", "hint-run", "quit", "qmp_capabilities"} <= names
        assert await qmp.execute("query-balloon") == {"actual": 64 * MIB}
        changes = EventListener("BALLOON_CHANGE")
        with qmp.listen(changes):
            await qmp.execute("balloon", {"value": 48 * MIB})
            async for event in changes:
                if event["data"]["actual"] == 48 * MIB:
                    break
        with pytest.raises(ExecuteError, match="is missing"):
            await qmp.execute("balloon")
        with pytest.raises(ExecuteError) as caught:
            await qmp.execute("device_add")
        assert caught.value.error_class == "CommandNotFound"
        balloon = {"path": "/machine/peripheral/balloon0"}
        await qmp.execute("qom-set", {**balloon, "property": "guest-stats-polling-interval", "value": 1})
        while not (stats := await qmp.execute("qom-get", {**balloon, "property": "guest-stats"}))["last-update"]:
            await asyncio.sleep(0.05)
        assert 0 < stats["stats"]["stat-free-memory"] < 64 * MIB
        hint = await qmp.execute("hint-run", {"deadline": 10})
        assert hint["completed"]
        assert hint["blocks"] > 0

        events = EventListener(("MIGRATION", "MIGRATION_REPORT"))
        statuses = []
        with qmp.listen(events), receiver(f"unix:{tmp_path}/d.sock") as destination:
            await qmp.execute("migrate", {"uri": f"unix:{tmp_path}/d.sock", "verify": True})
            async for event in events:
                if event["event"] == "MIGRATION_REPORT":
                    report = event["data"]
                    break
                statuses.append(event["data"]["status"])
                state = await qmp.execute("query-migrate")
            out, _ = destination.communicate(timeout=20)
            assert destination.returncode == 0
        assert statuses == ["setup", "active", "completed"]
        assert report["pages_checked"] > 0
        assert report["pages_wrong"] == report["pages_wrong_again"] == 0
        assert json.loads(out)["resumed"]["pages_checked"] == report["pages_checked"]
        assert await qmp.execute("query-status") == {"status": "postmigrate", "running": False}
        for command, arguments in [("cont", {}), ("migrate", {"uri": f"unix:{tmp_path}/d.sock"})]:
            with pytest.raises(ExecuteError, match="destination"):
                await qmp.execute(command, arguments)
        state = await qmp.execute("query-migrate")
        await qmp.execute("quit")
        return state

    state = in_qmp(serve, script)
    assert state["status"] == "completed"
    ram = state["ram"]
    assert ram["total"] == 64 * MIB
    assert ram["remaining"] == 0
    assert ram["dirty-sync-count"] >= 2
    assert ram["normal-bytes"] == ram["normal"] * 4096
    assert ram["transferred"] > ram["normal-bytes"] > 0
    assert ram["duplicate"] > 16 * MIB // 4096
    assert state["total-time"] >= state["downtime"] >= 0
    assert state["hints"]["runs"] >= 1
    assert state["hints"]["pages-spared"] > 0
    assert state["verify"]["pages_wrong"] == 0
    assert state["verify"]["pages_checked"] == 64 * MIB // 4096
    assert serve.process.wait(10) == 0


def test_two_clients_see_each_others_events(serve):
    async def script(one):
        two = QMPClient("two")
        await two.connect(str(serve.monitor))
        with two.listener("BALLOON_CHANGE") as changes:
            await one.execute("balloon", {"value": 60 * MIB})
            async for event in changes:
                if event["data"]["actual"] == 60 * MIB:
                    break
        assert await two.execute("query-balloon") == await one.execute("query-balloon")
        await two.disconnect()
        assert (await one.execute("query-status"))["running"]

    in_qmp(serve, script)


def test_stop_and_cont(serve):
    async def script(qmp):
        with qmp.listener(("STOP", "RESUME")) as events:
            await qmp.execute("stop")
            await qmp.execute("stop")
            assert await qmp.execute("query-status") == {"status": "paused", "running": False}
            with pytest.raises(ExecuteError, match="stopped"):
                await qmp.execute("hint-run")
            await qmp.execute("cont")
            await qmp.execute("cont")
            assert await qmp.execute("query-status") == {"status": "running", "running": True}
            assert (await qmp.execute("hint-run"))["completed"]
            assert [(await events.get())["event"] for _ in range(2)] == ["STOP", "RESUME"]
            assert events.empty()

    in_qmp(serve, script)


def test_cancel_then_migrate_over_tcp_with_limits_changed_on_the_way(serve):
    serve.ctl("migrate-set-parameters", "max-bandwidth=1M", "downtime-limit=0")
    assert serve.ask("query-migrate-parameters") == {"max-bandwidth": MIB, "downtime-limit": 0}
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"tcp:127.0.0.1:{port}"
    with receiver(address) as destination:
        serve.ask("migrate", uri=address)
        wait_for(lambda: serve.ask("query-migrate").get("ram", {}).get("transferred", 0) > 256 << 10)
        assert serve.ask("query-migrate")["status"] == "active"
        assert serve.ask("query-migrate")["ram"]["remaining"] > 0
        assert serve.ask("query-hint")["migration"] is True
        for command in ("hint-start", "hint-run", "hint-done", "hint-stop"):
            with pytest.raises(CommandFailed, match="migration is going on"):
                serve.ask(command)
        with pytest.raises(CommandFailed, match="in progress"):
            serve.ask("migrate", uri=address)
        serve.ask("migrate_cancel")
        wait_for(lambda: serve.ask("query-migrate")["status"] == "cancelled")
        destination.communicate(timeout=20)
        assert destination.returncode == 5
    assert serve.ask("query-status")["running"] is True
    assert serve.ask("query-hint")["state"] == "done"
    assert serve.ask("hint-run")["completed"] is True
    with receiver(address):
        serve.ask("migrate", uri=address)
        wait_for(lambda: serve.ask("query-migrate")["status"] == "active")
        began = time.monotonic()
        serve.ask("migrate-set-parameters", **{"max-bandwidth": 0, "downtime-limit": 300})
        wait_for(lambda: serve.ask("query-migrate")["status"] == "completed")
        assert time.monotonic() - began < 6  # at 1 MiB/s it would take longer
        wait_for(lambda: "destination" in serve.ask("query-migrate"))
    assert serve.ask("query-migrate")["destination"]["pages_wrong"] == 0


def test_a_stopped_guest_migrates_and_a_failed_migration_leaves_it_stopped(serve, tmp_path):
    serve.ask("stop")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "d.sock"))
    listener.listen(1)
    serve.ask("migrate", uri=f"unix:{tmp_path}/d.sock")
    connection, _ = listener.accept()
    connection.send(b"I am no receiver, but I have a lot to say. " * 10)
    wait_for(lambda: serve.ask("query-migrate")["status"] == "failed")
    assert serve.ask("query-migrate")["error-desc"]
    connection.close()
    listener.close()
    os.unlink(tmp_path / "d.sock")
    assert serve.ask("query-status")["status"] == "paused"
    with receiver(f"unix:{tmp_path}/d.sock"):
        serve.ctl("migrate", f"uri=unix:{tmp_path}/d.sock", "verify=true", "--wait")
        assert serve.ask("query-migrate")["verify"]["pages_wrong"] == 0


def test_a_destination_that_dies(serve, tmp_path):
    serve.ask("migrate-set-parameters", **{"max-bandwidth": MIB})
    with receiver(f"unix:{tmp_path}/d.sock") as destination:
        serve.ask("migrate", uri=f"unix:{tmp_path}/d.sock")
        wait_for(lambda: serve.ask("query-migrate").get("ram", {}).get("transferred", 0) > 256 << 10)
        destination.kill()
        wait_for(lambda: serve.ask("query-migrate")["status"] == "failed")
    assert "destination" in serve.ask("query-migrate")["error-desc"]
    assert serve.ask("query-status")["running"] is True
    assert serve.ask("hint-run")["completed"] is True


def test_into_a_file_and_from_it(serve, tmp_path):
    path = tmp_path / "guest.img"
    assert "completed" in serve.ctl("migrate", f"uri=file:{path}", "hints=false", "--wait")
    assert serve.ask("query-migrate")["hints"]["runs"] == 0
    done = subprocess.run([*BALLOON, "receive", f"file:{path}", "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"]["pages_wrong"] == 0
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("uri", "code", "words"),
    [
        ("unix:/nowhere", 5, "no destination"),
        ("tcp:127.0.0.1:1", 5, "no destination"),
        ("fd:0", 2, "no descriptors"),
        ("exec:true", 2, "no place"),
        ("file:/nowhere/at/all", 2, "cannot write"),
    ],
)
def test_places_that_cannot_be(serve, uri, code, words):
    if uri.startswith("tcp:"):  # told by query-migrate, or at once
        text = subprocess.run(
            [*BALLOON, "ctl", str(serve.monitor), "migrate", f"uri={uri}", "--wait"], capture_output=True, text=True
        )
        assert text.returncode == 5
        assert words in text.stderr
    else:
        assert words in serve.ctl("migrate", f"uri={uri}", code=code)
    assert serve.ask("query-status")["running"] is True


@pytest.mark.slow
def test_a_guest_that_hangs_is_told_and_others_are_answered_meanwhile(serve, tmp_path):
    pid = serve.told("guest-ready")[0]["pid"]
    with receiver(f"unix:{tmp_path}/d.sock") as destination:
        serve.ask("migrate-set-parameters", **{"max-bandwidth": 0})
        os.kill(pid, signal.SIGSTOP)
        try:
            serve.ask("migrate", uri=f"unix:{tmp_path}/d.sock")
            wait_for(lambda: serve.ask("query-status")["status"] == "finish-migrate")
            serve.ask("migrate_cancel")
            for _ in range(20):
                began = time.monotonic()
                assert serve.ask("query-migrate")["status"] == "cancelling"
                assert time.monotonic() - began < 1
            wait_for(lambda: serve.ask("query-migrate")["status"] in ("cancelled", "failed"), 15)
            client = MonitorClient(str(serve.monitor))
            with pytest.raises(CommandFailed, match="did not pause"):
                client.execute("stop")
            client.close()
        finally:
            os.kill(pid, signal.SIGCONT)
        destination.communicate(timeout=20)
    assert "did not say 'paused'" in serve.ask("query-migrate")["error-desc"]
    assert serve.ask("query-status") == {"status": "running", "running": True}
    wait_for(lambda: serve.ask("hint-run", deadline=10)["completed"])
    serve.ask("stop")
    assert serve.ask("query-status")["status"] == "paused"
