"""When a host that hangs elsewhere than planned is asked to go where it was planned.

It leaves a parent that works for one that it must try first, and is out of the tree meanwhile. So it is asked only
where the planned parent is known to be well.
"""

from __future__ import annotations

from protocol.limits import BEAT_EVERY, SILENT_AFTER

#: A parent that has just come is left this long to hear its own plan, in seconds.
SETTLE = 1.0
#: A parent whose cable was cut looks well until it was silent for so long, in seconds: silence counts from the last
#: beat, and its news has to travel.
DOUBT = SILENT_AFTER + BEAT_EVERY + 1.0


def may_go_home(now: float, host_since: float, parent_since: float) -> bool:
    """Whether a host that has hung elsewhere since `host_since` may go to its planned parent, in the tree since
    `parent_since` (all in seconds, monotonic).

    A parent that came after the host had settled elsewhere is the one that it had lost, back again. One that was there
    all along is the one that the host gave up, and perhaps the root has yet to learn why.
    """
    if parent_since > host_since:
        return now - parent_since >= SETTLE
    return now - host_since >= DOUBT
