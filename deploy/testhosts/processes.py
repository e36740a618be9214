"""Processes as /proc shows them: those of a test host, and those below a process of the service node."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# A process that has just ended; or one that even root may not look at, which is then none of ours.
_NOT_TO_BE_SEEN = (FileNotFoundError, ProcessLookupError, PermissionError)


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process: ``pid`` in its own PID namespace, ``outer_pid`` on this machine (0 where not looked up)."""

    pid: int
    argv: tuple[str, ...]
    outer_pid: int = 0


@dataclass(frozen=True, kw_only=True)
class _Stat:
    pid: int
    name: str
    state: str
    parent: int


def _numbers(directory: str) -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(directory) if name.isdigit())
    except FileNotFoundError:
        return []


def _read(path: str) -> str:
    """A /proc file's text, empty where its process has ended."""
    try:
        return Path(path).read_text(errors="replace")
    except _NOT_TO_BE_SEEN:
        return ""


def _stat(pid: int) -> _Stat | None:
    text = _read(f"/proc/{pid}/stat")
    if not text:
        return None
    # proc(5): the name is in parentheses and may itself hold parentheses and blanks.
    name, _, rest = text.partition("(")[2].rpartition(")")
    state, parent = rest.split()[:2]
    return _Stat(pid=pid, name=name, state=state, parent=int(parent))


def in_pid_namespace(init: int) -> list[int]:
    """Pids, as this machine counts, of all processes in the PID namespace of ``init``, itself among them."""
    try:
        wanted = os.readlink(f"/proc/{init}/ns/pid")
    except _NOT_TO_BE_SEEN:
        return []
    found = []
    for pid in _numbers("/proc"):
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") == wanted:
                found.append(pid)
        except _NOT_TO_BE_SEEN:
            continue
    return found


def is_over(init: int) -> bool:
    """Whether a host whose init was killed is dead: nothing runs in it, and its init has let go of its namespaces.

    The init itself can remain for a while: it waits for zombies whose parents are outside (those of nsenter(1)), and
    when those are reaped is up to the machine's own init.
    """
    try:
        os.readlink(f"/proc/{init}/ns/net")
    except FileNotFoundError:
        return all(pid == init or is_stopped(pid) is None for pid in in_pid_namespace(init))
    except ProcessLookupError:
        return True
    return False


def is_stopped(pid: int) -> bool | None:
    """True for a stopped process, False for another, None for one that has ended (or is a zombie)."""
    stat = _stat(pid)
    if stat is None or stat.state in "ZX":
        return None
    return stat.state in "Tt"


def of_host(init: int) -> list[Process]:
    """The processes of the test host whose init is ``init``, by their pid inside; zombies are left out."""
    result = []
    for outer in in_pid_namespace(init):
        status = _read(f"/proc/{outer}/status")
        inner = next((line.split()[-1] for line in status.splitlines() if line.startswith("NSpid:")), None)
        argv = tuple(_read(f"/proc/{outer}/cmdline").split("\0")[:-1])
        if inner is not None and argv:
            result.append(Process(pid=int(inner), argv=argv, outer_pid=outer))
    return sorted(result, key=lambda process: process.pid)


def descendants(pid: int) -> set[int]:
    """Pids of all processes below ``pid`` that live now, without itself."""
    children: dict[int, list[int]] = {}
    for other in _numbers("/proc"):
        stat = _stat(other)
        if stat is not None:
            children.setdefault(stat.parent, []).append(other)
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found


def ssh_clients(pid: int) -> list[int]:
    """Pids of the ``ssh`` client processes below ``pid`` in this process's own PID namespace, for counting.

    A process that a test host runs is in another PID namespace, so that it is never counted.
    """
    own = os.readlink("/proc/self/ns/pid")
    result = []
    for other in sorted(descendants(pid)):
        stat = _stat(other)
        if stat is None or stat.name != "ssh" or stat.state in "ZX":
            continue
        try:
            if os.readlink(f"/proc/{other}/ns/pid") == own:
                result.append(other)
        except _NOT_TO_BE_SEEN:
            continue
    return result
