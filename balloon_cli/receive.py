"""``balloon receive``: the other end of ``balloon migrate``."""

from __future__ import annotations

import json
import sys
from typing import Any

from guest_driver.process import die_with_parent as bind_to_parent
from host_qemu_side.destination import accept, receive, resume
from host_qemu_side.linux_guest import tags
from host_qemu_side.migration.receiver import Receiver, ReceiverState
from vring.errors import PeerVanished, UsageError, VirtioError

__all__ = ["receive_guest"]


def receive_guest(address: str, *, quiet: bool, die_with_parent: bool, as_json: bool) -> dict[str, Any]:
    """Receive one guest and go on with it; return what is known of it."""
    if die_with_parent:
        bind_to_parent()

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    source = accept(address, announce=lambda where: say(f"waiting for a migration at {where}"))
    receiver = Receiver(inspect=_inspect)
    try:
        receive(source, receiver)
        facts: dict[str, Any] = {"state": receiver.state.name}
        if receiver.state is ReceiverState.COMMITTED:
            try:
                facts["resumed"] = resume(receiver, announce=say)
                source.answer(receiver.report(facts["resumed"]))
            except VirtioError as error:
                source.answer(receiver.refuse(str(error)))
                raise
        elif receiver.state is ReceiverState.CANCELLED:
            raise PeerVanished(f"the source gave up: {receiver.cancelled}")
    finally:
        source.close()
        if receiver.memory is not None:
            receiver.memory.close()
    if not quiet:
        print(json.dumps(facts, indent=None if as_json else 1))
    return facts


def _inspect(receiver: Receiver) -> dict[str, Any]:
    """Judge what can be judged of an image alone: a Linux guest's tagged pages."""
    if receiver.header.get("guest") != "linux" or receiver.memory is None:
        return {}
    try:
        report = tags.scan(receiver.memory.arrays[0], int(receiver.header["tag_nonce"]))
    except (UsageError, KeyError, ValueError) as error:
        return {"tags": {"error": str(error)}}
    return {
        "tags": {
            "pages": report.count,
            "found": report.found,
            "missing": len(report.missing),
            "stale": len(report.stale),
            "torn": len(report.torn),
            "updates": report.updates,
            "ok": report.ok,
        }
    }
