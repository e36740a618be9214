"""This host's own figures, by psutil, told when they change."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

from protocol.messages import HostHealth

#: How often a host looks at itself.
EVERY = 5.0
#: A host whose figures do not change says so this seldom, so that their age stays known.
AT_LEAST_EVERY = 30.0
_MIB = 1 << 20
#: Changes below this share of the whole are noise.
_NOISE = 0.02


class Health:
    """What this host says of itself. `directory` tells which file system's room counts."""

    def __init__(self, directory: Path, version: str) -> None:
        self._directory = directory
        self._version = version
        self._process = psutil.Process()
        self._began = time.monotonic()
        self._told: HostHealth | None = None
        self._told_at = float("-inf")

    def look(self) -> HostHealth:
        """The figures now."""
        memory = psutil.virtual_memory()
        disk = os.statvfs(self._directory)
        load1, load5, _ = os.getloadavg()
        return HostHealth(
            load1=round(load1, 2),
            load5=round(load5, 2),
            cpus=psutil.cpu_count() or 1,
            memory_mib=memory.total // _MIB,
            memory_free_mib=memory.available // _MIB,
            disk_mib=disk.f_blocks * disk.f_frsize // _MIB,
            disk_free_mib=disk.f_bavail * disk.f_frsize // _MIB,
            agent_rss_mib=round(self._process.memory_info().rss / _MIB, 1),
            uptime_s=int(time.monotonic() - self._began),
            version=self._version,
        )

    def news(self, *, anyway: bool = False) -> HostHealth | None:
        """The figures, where they changed enough to be told or have not been told for long."""
        now, seen = time.monotonic(), self.look()
        if (
            not anyway
            and self._told is not None
            and now < self._told_at + AT_LEAST_EVERY
            and not _differ(seen, self._told)
        ):
            return None
        self._told, self._told_at = seen, now
        return seen


def _differ(new: HostHealth, old: HostHealth) -> bool:
    return (
        abs(new.load1 - old.load1) > 0.1 * max(1, new.cpus)
        or abs(new.memory_free_mib - old.memory_free_mib) > _NOISE * new.memory_mib
        or abs(new.disk_free_mib - old.disk_free_mib) > _NOISE * new.disk_mib
    )
