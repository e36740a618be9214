"""The spool: output beyond a command's budget, kept on its host until there is too much of it, or it is too old."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from agent.outlet import Outlet
from agent.settings import Settings
from protocol.outcomes import NO_OUTPUT, Exited, Outcome, Output, Refused

#: One read from a spool.
_READ = 256 << 10

#: The ends of the names of a command's spools: of its standard output (1) and error (2).
_ENDS = {1: "out", 2: "err"}


def spool_name(id_: int, stream: int) -> str:
    """The name of a spool: of which command, and of which of its streams."""
    return f"{id_}.{_ENDS[stream]}"


class Spools:
    """The spools of one host: never more than they may take together, also while commands write, and none for longer
    than it may stay. Who needs room takes it from the oldest that nobody writes to."""

    def __init__(self, folder: Path, settings: Callable[[], Settings]) -> None:
        """`settings` are asked for anew each time."""
        self.folder = folder
        self._settings = settings
        #: What commands that run have written.
        self._open: dict[Path, int] = {}
        #: What all of them take; None where that has to be looked up.
        self._total: int | None = None

    def room(self, path: Path, count: int) -> bool:
        """Take room for `count` bytes more in the spool `path`, which is being written; false where there is none."""
        most = self._settings().spool_total
        if self._total is None:
            self._total = sum(size for _, _, size in self._found())
        if self._total + count > most:
            self._evict(most - count)
        if self._total + count > most:
            return False
        self._total += count
        self._open[path] = self._open.get(path, 0) + count
        return True

    def close(self, path: Path) -> None:
        """Nothing more is written to this one."""
        if self._open.pop(path, None) is not None:
            self._total = None

    def trim(self) -> None:
        """Remove what is too old, or too much by settings that have changed."""
        settings = self._settings()
        oldest = time.time_ns() - round(settings.spool_days * 86_400e9)
        for modified, path, _ in self._found():
            if modified < oldest and path not in self._open:
                path.unlink(missing_ok=True)
        self._evict(settings.spool_total)

    def _evict(self, most: int) -> None:
        found = self._found()
        self._total = sum(size for _, _, size in found)
        for _, path, size in sorted(found):
            if self._total <= most:
                return
            if path not in self._open:
                path.unlink(missing_ok=True)
                self._total -= size

    def _found(self) -> list[tuple[int, Path, int]]:
        """When each was written last (ns since 1970), where it is, and its size."""
        found = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                info = entry.stat(follow_symlinks=False)
                found.append((info.st_mtime_ns, Path(entry.path), info.st_size))
        return found


async def spooled(
    folder: Path, of: int, outlet: Outlet, on_disk: Callable[[Callable[[], Any]], Awaitable[Any]]
) -> tuple[Outcome, Output]:
    """Send what there is of a command's output, as fast as the outlet takes it. Its outcome, with the totals."""
    totals = {}
    for stream in _ENDS:
        path = folder / spool_name(of, stream)
        try:
            fd = await on_disk(partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
        except FileNotFoundError:
            continue
        totals[stream] = 0
        try:
            while data := await on_disk(partial(os.pread, fd, _READ, totals[stream])):
                totals[stream] += len(data)
                outlet.write(stream, data)
                await _until(outlet, lambda: not outlet.full)
        finally:
            os.close(fd)
    if not totals:
        return Refused(f"the output of job {of} is not kept here, or no longer"), NO_OUTPUT
    outlet.end()
    await _until(outlet, lambda: outlet.empty)
    return Exited(0), Output(out_total=totals.get(1, 0), err_total=totals.get(2, 0))


async def _until(outlet: Outlet, condition: Callable[[], bool]) -> None:
    changed = asyncio.Event()
    outlet.on_room = outlet.on_empty = changed.set
    while not condition():
        changed.clear()
        await changed.wait()
