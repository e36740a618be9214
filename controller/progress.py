"""What a live line says, from what is known so far. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

#: Names of hosts that a line has room for.
_NAMES = 5
_BAR = 20
_UNITS = ("KiB", "MiB", "GiB", "TiB")


def size_text(count: float) -> str:
    """Bytes as people read them: `20.0 MiB`."""
    if count < 1024:
        return f"{count:.0f} B"
    unit = 0
    while count >= 1024 and unit < len(_UNITS):
        count /= 1024
        unit += 1
    return f"{count:.1f} {_UNITS[unit - 1]}"


def waiting_line(total: int, waiting: Sequence[str], seconds: float, failed: int = 0) -> str:
    """How many of `total` hosts are done, how they did, and who is slowest.

    `61/64 done: 59 ok, 2 failed, 3 waiting, 12 s: h3 h7 h9`
    """
    done = total - len(waiting)
    line = f"{done}/{total} done: {done - failed} ok, {failed} failed, {len(waiting)} waiting, {seconds:.0f} s"
    if not waiting:
        return line
    more = len(waiting) - _NAMES
    return f"{line}: {' '.join(waiting[:_NAMES])}" + (f" and {more} more" if more > 0 else "")


def push_line(size: int, done: Collection[int], hosts: int, finished: int, seconds: float) -> str:
    """How far a push of `size` bytes to `hosts` hosts is.

    `done` holds the bytes that each host has; `finished` hosts have their outcome.
    """
    whole = size * hosts
    have = min(whole, sum(done))
    share = have / whole if whole else 1.0
    filled = round(share * _BAR)
    rate = f", {size_text(have / seconds)}/s" if seconds > 0 and have else ""
    return f"[{'#' * filled}{'.' * (_BAR - filled)}] {share:4.0%} of {size_text(whole)}, {finished}/{hosts} hosts{rate}"


def up_line(total: int, settled: int, failed: int, seconds: float) -> str:
    """How far `ctl up` is."""
    line = f"{settled}/{total} hosts done, {seconds:.0f} s"
    return f"{line}, {failed} failed" if failed else line
