"""`balloon serve` in this process: front ends that come, go and do not answer, and what the monitor says of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from balloon_dev.device import DEFAULT_FEATURES
from balloon_dev.features import BalloonFeature
from balloon_dev.hinting import HintState
from host_qemu_side.monitor.balloon import STATS
from host_qemu_side.serve import ServeOptions, Server
from vring.errors import PeerVanished, UsageError

MIB = 1 << 20
BALLOON = "/machine/peripheral/balloon0"


class Failed(Exception):
    def __init__(self, error):
        super().__init__(error["desc"])
        self.kind = error["class"]


class Client:
    """A monitor client whose waiting turns the server's crank."""

    def __init__(self, served):
        self.served, self.events, self._lines, self._buffer = served, [], deque(), b""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(served.options.monitor)
        self.sock.setblocking(False)
        self.greeting = self.receive()
        self("qmp_capabilities")

    def poll(self):
        try:
            data = self.sock.recv(1 << 20)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionError
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self._lines.extend(json.loads(text) for text in lines)

    def receive(self, timeout=10.0):
        end = time.monotonic() + timeout
        while not self._lines:
            assert time.monotonic() < end, "no reply"
            self.served.server.step(0.01)
            self.poll()
        return self._lines.popleft()

    def send(self, command, **arguments):
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.sock.send(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")

    def reply(self, timeout=10.0):
        while True:
            message = self.receive(timeout)
            if "event" not in message:
                break
            self.events.append(message)
        if "error" in message:
            raise Failed(message["error"])
        return message["return"]

    def __call__(self, command, **arguments):
        self.send(command, **arguments)
        return self.reply()

    def event(self, name, timeout=10.0):
        """Return the data of the next event of that name."""
        while True:
            for at, message in enumerate(self.events):
                if message["event"] == name:
                    del self.events[: at + 1]
                    return message.get("data")
            self.events.append(self.receive(timeout))

    def until(self, what, timeout=10.0):
        end = time.monotonic() + timeout
        while not what():
            assert time.monotonic() < end, "it did not happen"
            self.served.server.step(0.01)


class Served:
    def __init__(self, folder, **options):
        self.told = []
        self.folder, self.guests, self.server = folder, [], None
        self.options = ServeOptions(str(folder / "b.sock"), str(folder / "m.sock"), **options)
        self.server = Server(self.options, lambda name, facts: self.told.append((name, facts)))

    def client(self):
        return Client(self)

    def guest(self, client, *arguments):
        """Start a front end of its own; return when its driver is up."""
        before = len([name for name, _ in self.told if name == "front-end-ready"])
        command = [sys.executable, "-m", "guest_driver", "--socket", self.options.socket, "--memory", "64M"]
        guest = subprocess.Popen([*command, "--workload", "idle", *arguments], stdin=subprocess.DEVNULL)
        self.guests.append(guest)
        client.until(lambda: len([name for name, _ in self.told if name == "front-end-ready"]) > before)
        client.until(lambda: client("query-device")["queues"][0]["live"])
        return guest

    def close(self):
        for guest in self.guests:
            guest.kill()
            guest.wait()
        self.server.close()


@pytest.fixture
def served(tmp_path):
    served = Served(tmp_path)
    yield served
    served.close()
    assert not os.listdir(tmp_path)


@pytest.fixture
def client(served):
    return served.client()


def test_without_a_front_end(client):
    assert client("query-status") == {"status": "prelaunch", "running": False}
    assert client("query-hint")["state"] == "stop"
    assert client("query-migrate") == {"status": "none"}
    assert client("query-queues") == {"human-readable-text": "no queue is live"}
    device = client("query-device")
    assert device["front-end"]["connected"] is False
    assert "FREE_PAGE_HINT" in device["features"]["offered"]
    for command, arguments in [("query-balloon", {}), ("balloon", {"value": MIB}), ("hint-start", {}), ("hint-run", {}),
                               ("hint-done", {}), ("hint-stop", {})]:  # fmt: skip
        with pytest.raises(Failed, match="no front end") as caught:
            client(command, **arguments)
        assert caught.value.kind == "DeviceNotActive"


def test_balloon_and_its_event(served, client):
    served.guest(client)
    other = served.client()
    assert client("query-balloon") == {"actual": 64 * MIB}
    assert client("balloon", value=48 * MIB) == {}
    while client.event("BALLOON_CHANGE") != {"actual": 48 * MIB}:
        pass
    while other.event("BALLOON_CHANGE") != {"actual": 48 * MIB}:
        pass
    assert client("query-balloon") == {"actual": 48 * MIB}
    assert client("query-device")["balloon-pages"] == 16 * MIB // 4096
    client("balloon", value=2**62)  # more than it has: all of it, as in QEMU
    while client.event("BALLOON_CHANGE") != {"actual": 64 * MIB}:
        pass
    for value in (0, -1):
        with pytest.raises(Failed, match="expects a size"):
            client("balloon", value=value)


def test_a_run_of_hints_by_hand(served, client):
    served.guest(client)
    answer = client("hint-start")
    assert answer == {"command-id": 0x80000001}
    client.until(lambda: served.server.device.hinting.state is HintState.STOP)
    hint = client("query-hint")
    assert (hint["state"], hint["running"], hint["ended-by"]) == ("stop", False, "guest")
    assert hint["command-id"] == 0x80000001
    assert hint["blocks"] > 5
    assert hint["bytes"] == hint["blocks"] * 4 * MIB
    assert abs(hint["since"] - time.time()) < 10
    assert client("hint-start") == {"command-id": 0x80000002}
    client.until(lambda: served.server.device.hinting.state is HintState.STOP)
    assert client("query-hint")["blocks"] == 0  # the guest holds what it has
    client("hint-done")
    assert client("query-hint")["state"] == "done"
    states = [client.event("HINT_STATE")["state"] for _ in range(2)]
    assert set(states) <= {"requested", "start", "stop", "done"}


def test_hint_run(served, client):
    served.guest(client)
    other = served.client()
    for expected in (0x80000001, 0x80000002):
        answer = client("hint-run")
        assert answer["completed"] is True
        assert answer["ended-by"] == "guest"
        assert answer["command-id"] == expected
        assert answer["blocks"] > 5  # DONE let it have its pages back in between
        assert client("query-hint")["state"] == "done"
        # A guest that has not yet looked when the next id comes never sees DONE, and keeps what it hinted.
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            served.server.step(0.05)
    assert other.event("HINT_STATE")
    for deadline in (0, -1, 1e9):
        with pytest.raises(Failed, match="deadline"):
            client("hint-run", deadline=deadline)


def test_hint_run_says_so_at_the_deadline(served, client):
    guest = served.guest(client)
    other = served.client()
    guest.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    client.send("hint-run", deadline=0.3)
    assert other("query-hint")["state"] == "requested"  # others do not wait
    with pytest.raises(Failed, match="going on"):
        other("hint-start")
    answer = client.reply()
    assert 0.25 < time.monotonic() - began < 3
    assert answer["completed"] is False
    assert answer["ended-by"] == "deadline"
    assert answer["blocks"] == 0
    assert client("query-hint")["state"] == "done"
    guest.send_signal(signal.SIGCONT)
    assert client("hint-run", deadline=10)["completed"] is True


def test_hint_run_ended_by_another_client(served, client):
    guest = served.guest(client)
    other = served.client()
    guest.send_signal(signal.SIGSTOP)
    client.send("hint-run", deadline=30)
    other("hint-stop")
    answer = client.reply()
    assert (answer["completed"], answer["ended-by"]) == (False, "host")
    assert other("query-hint")["state"] == "stop"
    guest.send_signal(signal.SIGCONT)


def test_a_front_end_that_dies_during_a_run(served, client):
    guest = served.guest(client)
    guest.send_signal(signal.SIGSTOP)
    client.send("hint-run", deadline=30)
    client.until(lambda: served.server.device.hinting.active)
    guest.kill()
    with pytest.raises(Failed, match="went away") as caught:
        client.reply()
    assert caught.value.kind == "DeviceNotActive"
    assert client("query-hint")["ended-by"] == "reset"
    served.guest(client)
    assert client("hint-run")["command-id"] == 0x80000002  # the counter goes on


def test_front_ends_come_and_go_and_the_target_stays(served, client):
    for number in range(1, 4):
        guest = served.guest(client, "--memory", f"{32 * number + 32}M")
        if number == 1:
            client("balloon", value=40 * MIB)
        while client.event("BALLOON_CHANGE") != {"actual": 40 * MIB}:
            pass
        facts = client("query-device")["front-end"]
        assert facts["connections"] == number
        assert facts["memory"] == (32 * number + 32) * MIB
        assert client("hint-run")["completed"] is True
        (guest.kill if number % 2 else guest.terminate)()
        guest.wait()
        client.until(lambda: not served.server.backend.connected)
        assert client("query-status")["status"] == "prelaunch"
    assert [name for name, _ in served.told].count("front-end-gone") == 3


def test_a_target_from_the_start(tmp_path):
    served = Served(tmp_path, target=50 * MIB)
    try:
        client = served.client()
        served.guest(client)
        client.until(lambda: served.server.device.actual == 14 * MIB // 4096)
        assert client("query-balloon") == {"actual": 50 * MIB}
    finally:
        served.close()


def test_a_front_end_without_hinting(tmp_path):
    served = Served(tmp_path, features=1 << 32)
    try:
        client = served.client()
        served.guest(client)
        with pytest.raises(Failed, match="FREE_PAGE_HINT"):
            client("hint-run")
        assert client("query-device")["features"] == {"offered": ["VERSION_1"], "negotiated": ["VERSION_1"]}
    finally:
        served.close()


@pytest.mark.parametrize("command", ["migrate", "stop", "cont"])
def test_a_guest_of_somebody_else_cannot_be_migrated(served, client, command):
    served.guest(client)
    with pytest.raises(Failed, match="freeze control") as caught:
        client(command, **({"uri": "unix:/nowhere"} if command == "migrate" else {}))
    assert "dirty log" in str(caught.value)
    assert client("query-migrate") == {"status": "none"}
    assert client("migrate_cancel") == {}


def test_device_in_detail(served, client):
    served.guest(client)
    client("hint-run")
    device = client("query-device")
    free = next(queue for queue in device["queues"] if queue["name"] == "free_page_vq")
    assert free["live"]
    assert free["next-avail"] == free["used-idx"] == free["avail-idx"] > 5
    assert (free["waiting"], free["in-flight"], free["broken"]) == (0, 0, False)
    assert (device["bad-requests"], device["late"]) == ([], {})
    text = client("query-queues")["human-readable-text"]
    assert f"avail idx {free['avail-idx']}, used idx {free['used-idx']}" in text


def test_statistics_need_a_device_that_has_them(tmp_path):
    served = Served(tmp_path, features=DEFAULT_FEATURES & ~BalloonFeature.STATS_VQ)
    try:
        client = served.client()
        with pytest.raises(Failed, match="STATS_VQ"):
            client("qom-get", path=BALLOON, property="guest-stats")
        assert client("qom-get", path=BALLOON, property="guest-stats-polling-interval") == 0
        with pytest.raises(Failed, match="STATS_VQ"):
            client("qom-set", path=BALLOON, property="guest-stats-polling-interval", value=1)
        client("qom-set", path=BALLOON, property="guest-stats-polling-interval", value=0)
    finally:
        served.close()


def test_statistics_as_qemu_names_them(served, client, monkeypatch):
    device, asked = served.server.device, []
    figures = SimpleNamespace(values={"stat-free-memory": 5, "stat-new": 7}, updates=0)
    monkeypatch.setattr(device, "offered_features", device.offered_features | BalloonFeature.STATS_VQ)
    monkeypatch.setattr(device, "stats", figures, raising=False)
    monkeypatch.setattr(device, "request_stats", lambda: asked.append(1) or True, raising=False)
    client("qom-set", path=BALLOON, property="guest-stats-polling-interval", value=1)
    assert client("qom-get", path=BALLOON, property="guest-stats-polling-interval") == 1
    client.until(lambda: len(asked) == 2)
    assert client("qom-get", path=BALLOON, property="guest-stats")["last-update"] == 0
    figures.updates = 1
    client("query-status")
    answer = client("qom-get", path=BALLOON, property="guest-stats")
    assert abs(answer["last-update"] - time.time()) < 5
    assert answer["stats"] == {**dict.fromkeys(STATS, -1), "stat-free-memory": 5, "stat-new": 7}


def test_statistics_of_a_guest(tmp_path):
    features = DEFAULT_FEATURES | BalloonFeature.STATS_VQ
    served = Served(tmp_path, features=features)
    try:
        client = served.client()
        served.guest(client, "--features", hex(features))
        client("qom-set", path=BALLOON, property="guest-stats-polling-interval", value=1)
        client.until(lambda: client("qom-get", path=BALLOON, property="guest-stats")["last-update"])
        stats = client("qom-get", path=BALLOON, property="guest-stats")["stats"]
        assert 0 < stats["stat-free-memory"] <= stats["stat-total-memory"] <= 64 * MIB
    finally:
        served.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"path": "/machine", "property": "guest-stats", "value": 1}, "not found"),
        ({"path": BALLOON, "property": "size", "value": 1}, "not found"),
        ({"path": BALLOON, "property": "guest-stats", "value": 1}, "not writable"),
        ({"path": BALLOON, "property": "guest-stats-polling-interval", "value": -1}, "timer value"),
        ({"path": BALLOON, "property": "guest-stats-polling-interval", "value": 2**32}, "timer value"),
        ({"path": BALLOON, "property": "guest-stats-polling-interval", "value": "1"}, "integer"),
    ],
)
def test_qom_errors(client, arguments, words):
    with pytest.raises(Failed, match=words):
        client("qom-set", **arguments)


def test_ending_says_done_first(served, client):
    served.guest(client)
    client("hint-start")
    client.until(lambda: served.server.device.hinting.state is HintState.STOP)
    reads = served.server.device.id_reads
    client.send("quit")
    served.server.run()
    assert served.server.device.hinting.state is HintState.DONE
    assert served.server.device.id_reads > reads  # the guest has looked
    client.poll()
    assert {"return": {}} in client._lines
    assert {"guest": False, "reason": "host-qmp-quit"} in [message.get("data") for message in client._lines]


def test_a_socket_in_use(served, tmp_path):
    with pytest.raises(UsageError, match="another process listens"):
        Server(served.options)
    assert served.client()("query-status")


def test_a_launched_guest_that_dies(tmp_path):
    served = Served(tmp_path, guest_arguments=["--memory", "64M"])
    try:
        client = served.client()
        client.until(lambda: served.server.host.guest.ready)
        os.kill(served.server.host.guest.guest.pid, signal.SIGKILL)
        with pytest.raises(PeerVanished, match="signal 9"):
            served.server.run()
        client.poll()
        assert client.event("SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}
    finally:
        served.close()


NAMES = ["balloon", "query-balloon", "hint-start", "hint-stop", "hint-done", "hint-run", "query-hint", "query-device",
         "query-queues", "qom-get", "qom-set", "migrate", "query-migrate", "migrate_cancel", "stop", "cont",
         "migrate-set-parameters", "query-migrate-parameters", "query-status", "query-version"]  # fmt: skip
values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=6),
    st.sampled_from([BALLOON, "guest-stats", "guest-stats-polling-interval", "unix:/nowhere", "fd:0", 2**63, 1 << 25]),
)  # fmt: skip
commands = st.fixed_dictionaries(
    {"execute": st.sampled_from(NAMES)},
    optional={
        "arguments": st.dictionaries(
            st.sampled_from(
                ["value", "path", "property", "deadline", "uri", "hints", "max-bandwidth", "downtime-limit"]
            ),
            values,
            max_size=3,
        )
    },
).map(lambda message: json.dumps(message).encode() + b"\n")


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("busy"))
    served.guest(served.client())
    yield served
    served.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(commands | st.binary(max_size=60), max_size=12))
def test_random_commands_to_a_device_in_use(busy, chunks):
    client = busy.client()
    for chunk in chunks:
        client.sock.send(chunk)
    client.sock.send(b'\n{"execute": "query-status", "id": "end"}\n')
    end = time.monotonic() + 10
    while (message := client.receive()).get("id") != "end":
        assert message.keys() & {"return", "error", "event"}
        assert time.monotonic() < end
        if "internal error" in message.get("error", {}).get("desc", ""):
            raise AssertionError(message)
    assert message["return"] == {"status": "running", "running": True}
    client.sock.close()
    other = busy.client()
    if other("query-hint")["running"]:
        other("hint-stop")
    other.sock.close()
