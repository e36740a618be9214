"""What a command started and let go of: processes that left its group by setsid(2), and whose parents have ended.

Each command's processes carry two marks that proc(5) shows, and either tells. One is two variables in the environment
that a process was started with: the command's number and the agent's directory. The other stays with what clears its
environment: a soft limit that nobody else has (RLIMIT_RTTIME, of a hundred thousand years; getrlimit(2): a child
inherits it, execve(2) and setuid(2) preserve it, and it counts for nobody but real-time processes that never wait).

A control group would hold them as well, but moving a process into one waits for all of the machine's cores, each
command would pay for it, and an agent may not always make one. Two system calls cost a command nothing.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from nacl.bindings import crypto_generichash_blake2b_salt_personal

NUMBER, AGENT = "CANOPY_JOB", "CANOPY_AGENT"
#: A process that forks while it is looked for is found in the next round; one that forks for ever is not chased.
_ROUNDS = 20
#: So often none must be found before there is none.
_LOOKS = 2


def mark(environment: Mapping[str, str], id_: int, agent: str) -> dict[str, str]:
    """The environment of command `id_` of the agent whose directory is `agent`."""
    return {**environment, NUMBER: str(id_), AGENT: agent}


def _ceiling(id_: int, agent: str) -> int:
    """The limit in microseconds by which processes of command `id_` of this agent are known."""
    # hashlib would bring libcrypto with it: see `outcomes`.
    digest: bytes = crypto_generichash_blake2b_salt_personal(f"{id_} {agent}".encode(), digest_size=16)
    return 1 << 62 | int.from_bytes(digest[:7], "big")


@contextmanager
def marked(id_: int, agent: str) -> Iterator[None]:
    """Within the block, what this process starts carries the limit of command `id_`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
    if hard != resource.RLIM_INFINITY:  # somebody means it: then the environment has to do
        yield
        return
    resource.setrlimit(resource.RLIMIT_RTTIME, (_ceiling(id_, agent), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_RTTIME, (soft, hard))


def now() -> int:
    """The present in the ticks that proc(5) counts processes' starts in, rounded down."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def find(id_: int, agent: str, since: int, group: int) -> list[int]:
    """The processes of a command that can be seen, as pids: those with its mark, and all that descends from them.

    `since` is `now()` when the command began: what is older is not looked at. `group` is the command's process group,
    whose members are no orphans.
    """
    wanted = {f"{NUMBER}={id_}".encode(), f"{AGENT}={agent}".encode()}
    limit = b" %d " % _ceiling(id_, agent)
    parents: dict[int, int] = {}
    found: set[int] = set()
    members: set[int] = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        with suppress(OSError, ValueError, IndexError):
            fields = _read(f"/proc/{entry}/stat").rpartition(b")")[2].split()
            if fields[0] in (b"Z", b"X") or int(fields[19]) < since:
                continue
            parents[pid] = int(fields[1])
            if int(fields[2]) == group:
                members.add(pid)
            if limit in _read(f"/proc/{entry}/limits") or wanted <= set(_read(f"/proc/{entry}/environ").split(b"\0")):
                found.add(pid)
    more = True
    while more:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found |= children
        more = bool(children)
    return sorted(found - members - {os.getpid()})


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def end(id_: int, agent: str, since: int, group: int, *, hard: bool) -> None:
    """Signal all of a command's processes that are found; with `hard` until none is. Blocks for milliseconds."""
    empty = 0
    for _ in range(_ROUNDS if hard else 1):
        pids = find(id_, agent, since, group)
        # One that forked behind the look and ended before its turn in it is not seen, and nor is its child: look twice.
        empty = 0 if pids else empty + 1
        if empty == _LOOKS:
            return
        for pid in pids:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL if hard else signal.SIGTERM)
