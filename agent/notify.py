"""What systemd wants to hear from a service of Type=notify: ready, still alive, stopping (sd_notify(3))."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress


class Notifier:
    """Speaks to systemd where systemd listens, and is silent elsewhere. The watchdog is fed from the event loop, so
    that a hung loop is seen."""

    def __init__(self) -> None:
        self._path = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog = os.environ.pop("WATCHDOG_USEC", "0")
        self._every = int(watchdog) / 2_000_000 if watchdog.isdigit() else 0.0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ready, and alive from now on."""
        self._say("READY=1")
        if self._path and self._every:
            self._feed(loop)

    def _feed(self, loop: asyncio.AbstractEventLoop) -> None:
        self._say("WATCHDOG=1")
        self._timer = loop.call_later(self._every, self._feed, loop)

    def end(self, seconds: float = 0.0) -> None:
        """Stopping, which may take `seconds`; with 0 as long as the unit's TimeoutStopSec. That begins with this word,
        and ends in SIGKILL (sd_notify(3), EXTEND_TIMEOUT_USEC)."""
        if self._timer is not None:
            self._timer.cancel()
        self._say(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}" if seconds else "STOPPING=1")

    def tell(self, status: str) -> None:
        """What `systemctl status` shows, one line (sd_notify(3), STATUS)."""
        self._say(f"STATUS={' '.join(status.split())}")

    def _say(self, text: str) -> None:
        if self._path:
            address = "\0" + self._path[1:] if self._path.startswith("@") else self._path
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.sendto(text.encode(), address)
