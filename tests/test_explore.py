"""Short versions of what `./run explore` does for long with odd peers of a server."""

from explore_messages import explore as explore_messages
from explore_qmp import explore as explore_qmp

PATIENT = 3.0
"""Seconds in which the monitor answers on a machine that does other things, too; the exploration asks for one."""


def test_vhost_user_messages(tmp_path):
    found = explore_messages(tmp_path, 8000, seed=8, within=PATIENT)
    assert not found.wrong, found
    assert found.messages >= 8000
    assert found.asked


def test_qmp_messages(tmp_path):
    found, replies = explore_qmp(tmp_path, 500, seed=8, within=PATIENT)
    assert not found.wrong, found
    assert replies["return"] > 100
    assert replies["GenericError"] > 50
