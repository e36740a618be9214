"""The spool: output beyond a command's budget, kept on its host until there is too much of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from agent.outlet import Outlet
from protocol.outcomes import NO_OUTPUT, Exited, Outcome, Output, Refused

#: One read from a spool.
_READ = 256 << 10

#: The ends of the names of a command's spools: of its standard output (1) and error (2).
_ENDS = {1: "out", 2: "err"}
#: What all spools of a host may take in bytes: four commands that wrote as much as one may.
SPOOLS_MOST = 1 << 30


def spool_name(id_: int, stream: int) -> str:
    """The name of a spool: of which command, and of which of its streams."""
    return f"{id_}.{_ENDS[stream]}"


def trim(folder: Path, most: int = SPOOLS_MOST) -> None:
    """Remove the oldest spools until the others have at most `most` bytes. Blocks."""
    found = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            info = entry.stat(follow_symlinks=False)
            found.append((info.st_mtime_ns, entry.path, info.st_size))
    total = sum(size for _, _, size in found)
    for _, path, size in sorted(found):
        if total <= most:
            return
        with suppress(FileNotFoundError):
            os.unlink(path)
        total -= size


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
    outlet.flush()
    await _until(outlet, lambda: outlet.empty)
    return Exited(0), Output(out_total=totals.get(1, 0), err_total=totals.get(2, 0))


async def _until(outlet: Outlet, condition: Callable[[], bool]) -> None:
    changed = asyncio.Event()
    outlet.on_room = outlet.on_empty = changed.set
    while not condition():
        changed.clear()
        await changed.wait()
