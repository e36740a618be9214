"""A VM's console, from the service's side and from that of whoever sits in front of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from controller import api
from controller.status import CtlError, ExitStatus
from protocol.commands import Console
from protocol.limits import CONSOLE_EVERY, CONSOLE_WINDOW, MAX_FEED

if TYPE_CHECKING:
    from controller.jobs import Job
    from controller.node import RootNode
    from controller.session import Connection

#: What was typed and not taken yet; who types more waits. A pasted page.
_WAITING_MOST = 64 << 10
#: What was seen is told this often, in bytes, so that the window never closes on a console that is read.
_TELL_EVERY = CONSOLE_WINDOW // 4


def open_console(node: RootNode, request: api.ConsoleOn, uid: int) -> tuple[Job, dict[int, str]]:
    """Open a console through the tree. Raises CtlError where the VM is not on record."""
    from controller.jobs import Job

    host = next(
        (vm.host for vm in node.state.vms() if (vm.deployment, vm.name) == (request.deployment, request.name)), None
    )
    if host is None:
        raise CtlError(f"{request.name} is not on record: `ctl get vms` lists all", ExitStatus.NO_TARGET)
    hosts = node.members.ranks_of([host])
    job = Job()
    what = msgspec.json.encode(["console", request.deployment, request.name]).decode()
    body = Console(deployment=request.deployment, name=request.name, force=request.force)
    node.give(job, hosts, body, uid=uid, what=what)
    job.seal()
    return job, hosts


class ConsoleEnd:
    """The end of a console at which somebody sits: bytes in order and once, whatever is lost on the way."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Condition()
        self._seen = 0
        self._told = 0
        self._taken = 0
        self._typed = bytearray()
        self._over = False
        #: Whether it was left from here.
        self.left = False

    def shown(self, shown: Callable[[bytes], None]) -> tuple[api.Folded, ...]:
        """Call `shown` with what the console shows until it ends; the outcomes that it had. Blocks."""
        outcomes: list[api.Folded] = []
        try:
            while True:
                match self._connection.receive():
                    case api.Streamed(stream=1, offset=offset, data=data):
                        self._show(offset, data, shown)
                    case api.Streamed(stream=2, offset=offset):
                        self._was_taken(offset)
                    case api.Folded() as folded:
                        outcomes.append(folded)
                    case api.Settled():
                        return tuple(outcomes)
                    case _:
                        pass
        finally:
            with self._lock:
                self._over = True
                self._connection.close()
                self._lock.notify_all()

    def _show(self, offset: int, data: bytes, shown: Callable[[bytes], None]) -> None:
        # After a gap it comes again, from what was seen on.
        fresh = data[self._seen - offset :] if offset <= self._seen else b""
        if fresh:
            shown(fresh)
            with self._lock:
                self._seen += len(fresh)
                if self._seen - self._told >= _TELL_EVERY:
                    self._say(self._taken, b"")

    def _was_taken(self, offset: int) -> None:
        with self._lock:
            new = min(max(0, offset - self._taken), len(self._typed))
            del self._typed[:new]
            self._taken += new
            self._lock.notify_all()

    def type(self, data: bytes) -> bool:
        """Type something; whether the console is still there. Blocks while much was typed that is not taken."""
        with self._lock:
            while not self._over and len(self._typed) + len(data) > _WAITING_MOST:
                self._lock.wait(CONSOLE_EVERY)
            begins = self._taken + len(self._typed)
            self._typed += data
            for at in range(0, len(data), MAX_FEED):
                self._say(begins + at, data[at : at + MAX_FEED])
            return not self._over

    def stay(self) -> None:
        """Say that somebody is there still, and again what was typed and not taken. Every CONSOLE_EVERY seconds."""
        with self._lock:
            for at in range(0, len(self._typed), MAX_FEED):
                self._say(self._taken + at, bytes(self._typed[at : at + MAX_FEED]))
            self._say(self._taken, b"", again=True)

    def leave(self) -> None:
        """Leave the console, which is closed then; `shown` returns with its outcome."""
        with self._lock:
            if not self._over:
                self.left = True
                self._connection.send(api.Cancel())

    def _say(self, offset: int, data: bytes, *, again: bool = False) -> None:
        if not self._over:
            self._told = self._seen
            self._connection.send(api.Typed(offset=offset, data=data, seen=self._seen, again=again))
