"""The name -> IP file of all VMs: written whenever one comes or goes, and brought to every host that is in the tree.

It has the form of hosts(5) and begins with a comment that tells its version, which never goes back. Hosts take it by
rename, so that a reader sees one version or the next. A host that was away is brought the present version when it is
back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Iterable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol

from agent.identity import write_atomically
from controller.jobs import Job
from controller.node import RootNode
from controller.on_record import Vm
from controller.status import CtlError, ExitStatus
from protocol import ranks
from protocol.names import IN_ETC_HOSTS, PATH
from protocol.outcomes import Fold, succeeded

log = logging.getLogger("canopy")

#: Changes wait this long for more of them, in seconds: VMs come and go in crowds.
_WINDOW = 1.0
#: A host that did not take the file is tried again after this, in seconds, as long as it is in the tree.
_AGAIN = 30.0


class PushFile(Protocol):
    """Requests.push_file."""

    def __call__(
        self, hosts: dict[int, str], source: Path, path: str, mode: int, uid: int
    ) -> Awaitable[tuple[Job, dict[int, str]]]: ...


def names_text(fleet: str, version: int, vms: Iterable[Vm], *, in_etc_hosts: bool = False) -> str:
    """The file. Where several deployments have a name, the VM that had it first keeps it; each of them has
    `NAME.DEPLOYMENT` beside it."""
    every = list(vms)
    times = Counter(vm.name for vm in every)
    had: set[str] = set()
    rows = []
    for vm in every:
        names = [] if vm.name in had else [vm.name]
        if times[vm.name] > 1:
            names.append(f"{vm.name}.{vm.deployment}")
        had.add(vm.name)
        rows.append((IPv4Address(vm.ip), "\t".join((vm.ip, " ".join(names)))))
    head = f"# canopy {fleet}, version {version}{IN_ETC_HOSTS if in_etc_hosts else ''}"
    return "\n".join([head, *(line for _, line in sorted(rows)), ""])


class Names:
    """The file of one fleet. `push_file` is Requests.push_file."""

    def __init__(self, node: RootNode, directory: Path, push_file: PushFile) -> None:
        self._node = node
        self._file = directory / "vms.hosts"
        self._push_file = push_file
        self._version = int(node.state.meta("names_version", "0"))
        self._have: dict[int, int] = {}
        self._tried_at: dict[int, float] = {}
        self._under_way: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        node.on_links.append(self.look_soon)
        node.on_vms.append(self.look_soon)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _write(self) -> None:
        """The file as it is to be, under a new version where anything else than that changed."""
        state = self._node.state
        in_etc_hosts = state.meta("names_in_etc_hosts", "no") == "yes"

        def text() -> bytes:
            return names_text(self._node.fleet, self._version, state.vms(), in_etc_hosts=in_etc_hosts).encode()

        try:
            before = self._file.read_bytes()
        except FileNotFoundError:
            before = b""
        if text() == before:
            return
        if not before and not state.vms():
            return
        self._version += 1
        self._tried_at.clear()
        state.set_meta("names_version", str(self._version))
        write_atomically(self._file, text(), 0o644)

    def look_soon(self) -> None:
        """VMs or hosts have come or gone."""
        if self._timer is None:
            self._timer = self._node.loop.call_later(_WINDOW, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._task is None or self._task.done():
            self._task = self._node.loop.create_task(self._send_where_missing())
            self._task.add_done_callback(_note)
        else:
            self.look_soon()

    async def _send_where_missing(self) -> None:
        self._write()
        node, now = self._node, self._node.loop.time()
        for rank in [rank for rank in self._have if not ranks.holds(node.relay.reachable, rank)]:
            del self._have[rank]  # nobody knows what becomes of its files
            self._tried_at.pop(rank, None)
        if not self._version:
            return
        behind = {
            rank: host
            for rank, host in self._reachable().items()
            if self._have.get(rank, 0) < self._version and rank not in self._under_way
        }
        due = {rank: host for rank, host in behind.items() if now >= self._tried_at.get(rank, -_AGAIN) + _AGAIN}
        if due:
            self._tried_at |= dict.fromkeys(due, now)
            await self._send(due, uid=0)
        elif behind and self._timer is None:
            self._timer = node.loop.call_later(_AGAIN, self._look)

    def _reachable(self) -> dict[int, str]:
        node = self._node
        return {
            rank: host.name for rank, host in node.members.present.items() if ranks.holds(node.relay.reachable, rank)
        }

    async def send(self, uid: int, *, in_etc_hosts: bool | None = None) -> tuple[Job, dict[int, str]]:
        """Bring the file to every host that is in the tree. Raises CtlError where none is.

        `in_etc_hosts` is whether hosts have the names in a block of /etc/hosts as well from now on; None as before.
        """
        hosts = self._reachable()
        if not hosts:
            raise CtlError("no host is in the tree: see `ctl status`", ExitStatus.NO_TARGET)
        if in_etc_hosts is not None:
            self._node.state.set_meta("names_in_etc_hosts", "yes" if in_etc_hosts else "no")
        self._write()
        if not self._version:
            self._version = 1
            self._node.state.set_meta("names_version", "1")
            write_atomically(self._file, names_text(self._node.fleet, 1, ()).encode(), 0o644)
        return await self._send(hosts, uid)

    async def _send(self, hosts: dict[int, str], uid: int) -> tuple[Job, dict[int, str]]:
        version = self._version
        self._under_way |= set(hosts)
        try:
            job, given = await self._push_file(hosts, self._file, PATH, 0o644, uid)
        except BaseException:
            self._under_way -= set(hosts)
            raise

        def heard(fold: Fold) -> None:
            members = set(ranks.each(ranks.unpack(fold.ranks)))
            self._under_way -= members
            if succeeded(fold.outcome):
                # The one that ended last is the one that a host has.
                self._have |= dict.fromkeys(members, version)
                if version < self._version:
                    for rank in members:
                        self._tried_at.pop(rank, None)
                    self.look_soon()
            else:
                self.look_soon()

        job.also(heard)
        return job, given


def _note(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the names file could not be sent", exc_info=error)
