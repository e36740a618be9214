"""What a live line says, from what is known so far. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

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


def time_text(seconds: float) -> str:
    """A time as people read it: `12 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def push_line(size: int, done: Mapping[str, int], waiting: Collection[str], seconds: float, width: int = 0) -> str:
    """How far a push of `size` bytes is: a bar over all hosts, the rate, when the last one is through at its own rate,
    and the slowest of those that are not. Where `width` columns (0: any) are few, the names matter more than the bar.

    `done` holds the bytes that each host has, in the order of hosts; those of `waiting` have no outcome yet.
    """
    hosts, finished = len(done), len(done) - len(waiting)
    if waiting and not size:
        return f"{finished}/{hosts} hosts, {seconds:.0f} s"
    whole = size * hosts
    have = min(whole, sum(done.values()))
    share = have / whole if whole else 1.0
    rate = ""
    if seconds > 0 and have:
        longest = max(((size - done[host]) / done[host] for host in waiting if done[host]), default=0.0)
        left = f", {time_text(longest * seconds)} left" if have < whole and longest else ""
        rate = f", {size_text(have / seconds)}/s{left}"
    line = f"{share:4.0%} of {size_text(whole)}, {finished}/{hosts} hosts{rate}"
    behind = sorted(waiting, key=done.__getitem__)[:_NAMES]
    slowest = " ".join(f"{host} {done[host] / size:.0%}" for host in behind)
    slowest, shorter = (f", slowest {names}" if names else "" for names in (slowest, " ".join(behind)))
    tries = (_bar(share, _BAR) + line + slowest, _bar(share, _BAR // 2) + line + slowest, line.lstrip() + slowest)
    return next((one for one in tries if not width or len(one) < width), line.lstrip() + shorter)


def _bar(share: float, length: int) -> str:
    filled = round(share * length)
    return f"[{'#' * filled}{'.' * (length - filled)}] "


def pull_line(size: int, done: Mapping[str, int], hosts: int, finished: int, seconds: float) -> str:
    """How far a pull of `size` bytes is. `done` holds the bytes that came from each host so far; `finished` of `hosts`
    hosts have their outcome."""
    if not size:
        return f"{finished}/{hosts} hosts, {seconds:.0f} s, hosts look at what they have"
    have = min(size, sum(done.values()))
    left = f", {time_text((size - have) * seconds / have)} left" if 0 < have < size else ""
    rate = f", {size_text(have / seconds)}/s{left}" if seconds > 0 and have else ""
    line = f"{_bar(have / size, _BAR)}{have / size:4.0%} of {size_text(size)}"
    return f"{line}, {finished}/{hosts} hosts{rate}"


def up_line(total: int, settled: int, failed: int, seconds: float) -> str:
    """How far `ctl up` is."""
    line = f"{settled}/{total} hosts done, {seconds:.0f} s"
    return f"{line}, {failed} failed" if failed else line
