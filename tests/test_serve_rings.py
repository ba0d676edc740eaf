"""What the monitor says while a front end is there and its rings do not run: the last values, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from front_end import BIT_30, RINGS, Front
from test_serve import BALLOON, MIB, Client, Failed, Served

from balloon_dev.device import SUPPORTED_FEATURES
from balloon_dev.features import BalloonFeature
from balloon_dev.profiles import LINUX

FEATURES = SUPPORTED_FEATURES & ~int(BalloonFeature.PAGE_POISON)
STOPPED = {"rings": "stopped"}


@pytest.fixture
def served(tmp_path) -> Iterator[Served]:
    served = Served(tmp_path, features=FEATURES, profile=LINUX)
    yield served
    served.close()


@pytest.fixture
def client(served: Served) -> Client:
    return served.client()


@pytest.fixture
def front(served: Served) -> Iterator[Front]:
    front = Front(FEATURES, server=served.server)
    front.open_channel()
    yield front
    front.close()


def test_what_is_missing_is_named(client: Client, front: Front) -> None:
    """A front end that is there is not said to be missing."""
    for command in ("query-balloon", "hint-start", "hint-done"):
        with pytest.raises(Failed, match="no memory yet") as caught:
            client(command)
        assert caught.value.kind == "DeviceNotActive"
    assert (
        client("query-device")["front-end"] | {"connected": True, "memory": 0, "rings": "stopped"}
        == client("query-device")["front-end"]
    )
    front.negotiate(BIT_30)
    front.table()
    front.num()
    front.addr()
    assert client("query-balloon") == {"actual": MIB, **STOPPED}
    queue = client("query-device")["queues"][0]
    assert not queue["live"]
    assert queue["needs"] == ["SET_VRING_BASE", "SET_VRING_KICK", "SET_VRING_ENABLE"]
    assert "inflateq, stopped at 0: needs SET_VRING_BASE" in client("query-queues")["human-readable-text"]
    with pytest.raises(Failed, match="rings are stopped"):
        client("hint-run")


def test_last_values_of_a_device_that_is_stopped(client: Client, front: Front) -> None:
    front.probe(RINGS, BIT_30, rings=5)
    front.inflate(40, 41)
    front.set_config(4, (2).to_bytes(4, "little"))
    front.put(b"\x04\0" + (77).to_bytes(8, "little"), 2)
    running = {name: client(name) for name in ("query-balloon", "query-status", "query-hint")}
    assert all("rings" not in answer for answer in running.values())
    assert client("query-device")["front-end"]["rings"] == "running"
    bases = front.stop(5)
    for name, answer in running.items():
        assert client(name) == answer | STOPPED
    stats = client("qom-get", path=BALLOON, property="guest-stats")
    assert stats["stats"]["stat-free-memory"] == 77
    assert stats["rings"] == "stopped"
    device = client("query-device")
    assert (device["balloon-pages"], device["config"]["actual-pages"]) == (2, 2)
    assert [queue["next-avail"] for queue in device["queues"]] == bases
    client("balloon", value=MIB // 2)
    front.probe(RINGS, BIT_30, rings=5, bases=bases)
    assert front.get_config(0, 4) == (MIB // 2 // 4096).to_bytes(4, "little")
    assert client("query-balloon") == running["query-balloon"]


def test_a_run_whose_driver_is_gone_did_not_end_well(served: Served, client: Client, front: Front) -> None:
    """The guest resets its device in the midst of a run, and the next driver knows nothing of it."""
    other = served.client()
    front.begin()
    front.probe(RINGS, BIT_30, rings=5)
    client.send("hint-run", deadline=30)
    client.until(lambda: front.device.hinting.active)
    front.put(front.device.hinting.command_id.to_bytes(4, "little"), 3)
    front.stop(5)
    assert other("query-hint")["state"] == "start"
    front.begin(5)
    front.probe(RINGS, BIT_30, rings=5)
    answer = client.reply()
    assert (answer["completed"], answer["ended-by"]) == (False, "reset")
    assert client("query-hint")["state"] == "stop"


def test_a_front_end_that_pauses_is_told_of_once(served: Served, client: Client, front: Front) -> None:
    front.probe(RINGS, BIT_30, rings=5)
    for _ in range(3):
        front.probe(RINGS, BIT_30, rings=5, bases=front.stop(5))
    client("query-status")
    assert [name for name, _ in served.told].count("front-end-memory") == 1
    assert [name for name, _ in served.told].count("front-end-ready") == 1
