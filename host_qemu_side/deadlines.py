"""How long whoever takes part in a migration waits for the others: every wait has an end, and this is where.

Seconds. All are absolute: counted from when the wait began, whatever is said meanwhile; only `SILENCE` is per record,
since how long a guest's memory takes is its owner's business while it runs. `docs/hand-over.md` shows this file.
"""

from __future__ import annotations

__all__ = ["ANSWER", "ATTACH", "CHECK", "FROZEN", "HELLO", "LAUNCH", "LAUNCHED", "PAUSE", "REPORT", "SILENCE"]

# -- at the source --
HELLO = 15.0
"""Until a destination that was reached has said HELLO."""
SILENCE = 60.0
"""Of sending without that the destination takes at least `MIN_BANDWIDTH` times as many bytes; at a destination, of
waiting for the next record (COMMIT is one), longer only as it comes at that rate, and for a connection's first word."""
LAUNCHED = 10.0
"""Before the last freeze, until the destination has launched a process for the guest; later costs downtime only."""
PAUSE = 10.0
"""Until the guest has paused, or gone on."""
FROZEN = 300.0
"""From the last freeze until the guest is handed over: the last round and all that follows."""
ANSWER = 120.0
"""From END until READY: the destination digests what it got and makes the guest ready to go on."""
REPORT = 120.0
"""From COMMIT until the destination has reported on the guest."""

# -- at the destination --
LAUNCH = 120.0
"""Until a guest process that was launched has set itself up."""
ATTACH = 60.0
"""Until a received guest has taken over its RAM and its device."""
CHECK = 120.0
"""Until a guest has checked all its pages."""
