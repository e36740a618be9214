"""Whether the processor is what limits a push here, and not the links."""

from __future__ import annotations

import time

#: How often it is looked at, in seconds.
_EVERY = 0.5
#: Of the event loop's time, and of all processors' time: at the first this process alone is the limit, at the second
#: whatever else runs on the host. 32 hosts on two processors behind links of 80 Mbit/s use 7/10 of these.
_LOOP, _ALL = 0.5, 0.9


class Pressure:
    """Of the thread that makes it."""

    def __init__(self, now: float) -> None:
        self._at, self._ran = now, time.thread_time()
        self._used: tuple[float, float] | None = None
        self._pressed = False

    def look(self, now: float) -> bool:
        """Whether the processor is the limit, as of the last half second or longer."""
        if now - self._at >= _EVERY:
            ran, used = time.thread_time(), _used()
            loop, self._at, self._ran = (ran - self._ran) / (now - self._at), now, ran
            idle, total = (b - a for a, b in zip(self._used or used, used, strict=True))
            self._used = used
            self._pressed = loop >= _LOOP or idle < (1 - _ALL) * total
        return self._pressed


def _used() -> tuple[float, float]:
    """Seconds that this host's processors were idle, and all their seconds."""
    import psutil  # a host without pushes does without

    times = psutil.cpu_times()
    idle = times.idle + times.iowait
    # A guest's time is part of user's as well (proc(5), /proc/stat).
    return idle, sum(times) - times.guest - times.guest_nice
