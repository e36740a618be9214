"""libvirt for asyncio: calls with deadlines, lifecycle events at once, and a connection that comes back by itself.

libvirt-python blocks on every call, so calls run on threads: `Lane`s of daemon threads, each lane with a connection of
its own. What a call that hangs holds up is its own lane. The module libvirt is imported with the first connection and
not before, since it costs an agent without VMs memory for nothing.

Sources: https://libvirt.org/html/libvirt-libvirt-host.html, .../libvirt-libvirt-event.html, and
https://libvirt.org/kbase/ for max_client_requests (5 to a connection, beyond which keep-alive starves).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from agent.embedded import EmbeddedError, embedded_root, prepare_embedded
from agent.lanes import GivenUp, Lane, within

_T = TypeVar("_T")
#: libvirt-python has no types.
Connection = Any

#: One below libvirtd's max_client_requests, so that keep-alive always gets through.
CALLS_IN_FLIGHT = 4
# Silence of 15 s is a dead libvirtd; a loaded one answers a ping well within 5.
_KEEPALIVE_SECONDS = 5
_KEEPALIVE_TRIES = 3
# A socket that is there answers in milliseconds; a libvirtd that starts up takes a few seconds.
_OPEN_SECONDS = 10.0
# libvirtd restarts in about a second; a host without one is asked at most this often.
_FIRST_RETRY_SECONDS = 0.5
_LAST_RETRY_SECONDS = 10.0
# A call waits so long for a libvirtd that restarts; what is away for longer is said at once.
_PATIENCE_SECONDS = 5.0


# The second lane lists states while the first is busy with creations; the third is for what may hang.
_LANES = {"work": CALLS_IN_FLIGHT, "watch": 1, "risky": CALLS_IN_FLIGHT}


def _lane(name: str) -> Lane:
    return Lane(f"vm-{name}", _LANES[name])


class HypervisorError(Exception):
    """libvirt said no; the text says why. `code` is libvirt's VIR_ERR_* number, None where the reason is another."""

    def __init__(self, text: str, code: int | None = None) -> None:
        super().__init__(text)
        self.code = code


class Unavailable(HypervisorError):
    """There is no connection to libvirt, or it did not answer in time. What was asked may still happen.

    `pending` is a call that was given up and has not returned.
    """

    def __init__(self, text: str, pending: Future[Any] | None = None) -> None:
        super().__init__(text)
        self.pending = pending


class Unusable(Unavailable):
    """There is no connection and waiting brings none: the binding is not installed, or the URI can't be served."""


def default_uri() -> str:
    """The hypervisor that this user may use without any set-up."""
    return "qemu:///system" if os.geteuid() == 0 else "qemu:///session"


def load_libvirt() -> Any:
    """The module libvirt, its event loop running. Raises Unusable."""
    try:
        module = importlib.import_module("libvirt")
    except ImportError as error:
        raise Unusable(
            f"VMs need libvirt's Python binding, and `import libvirt` says: {error}; "
            "install it on this host with `apt-get install python3-libvirt`."
        ) from error
    _EVENTS.start(module)
    return module


class _EventLoop:
    """libvirt's own event loop: one for a process, registered before the first connection, and never ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = False

    def start(self, module: Any) -> None:
        with self._lock:
            if self._started:
                return
            # It would print every error to standard error, also those that are expected.
            module.registerErrorHandler(lambda _context, _error: None, None)
            module.virEventRegisterDefaultImpl()
            threading.Thread(target=self._run, args=(module,), name="libvirt-events", daemon=True).start()
            self._started = True

    @staticmethod
    def _run(module: Any) -> None:
        while True:
            try:
                module.virEventRunDefaultImpl()
            except Exception:
                time.sleep(1)


_EVENTS = _EventLoop()


class Hypervisor:
    """One libvirt, reached for as long as this object lives. For use in one event loop.

    `on_link(problem)` is called in the event loop whenever the connection comes (None) or goes (why, one sentence);
    `on_event()` whenever some domain of the host has changed its state or definition. After either, list anew:
    events are lost while there is no connection.
    """

    def __init__(self, uri: str, *, on_link: Callable[[str | None], None], on_event: Callable[[], None]) -> None:
        self.uri = uri
        #: Why there is no connection, None while there is one.
        self.problem: str | None = f"{uri} has not been opened yet"
        self._on_link = on_link
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._lanes = {name: _lane(name) for name in _LANES}
        self._opener = Lane("vm-open", 1)
        self._connections: dict[str, Connection] = {}
        self._era = 0
        self._was_open = False
        # Set while there is a connection, or no hope of one.
        self._settled = asyncio.Event()
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to connect. Does nothing where that has begun."""
        if self._task is None:
            self._task = self._loop.create_task(self._keep_connected(), name=f"libvirt {self.uri}")

    async def close(self) -> None:
        """Let go of libvirt. Calls that hang are left to their threads."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})  # however it ends
        self._drop_connections()
        for lane in (*self._lanes.values(), self._opener):
            lane.stop()

    async def call(self, function: Callable[[Connection], _T], deadline_s: float) -> _T:
        """`function(connection)` on one of four threads, in at most `deadline_s` seconds. Waits for a connection.

        Raises Unavailable, and HypervisorError for libvirt's own errors.
        """
        return await self._call("work", function, deadline_s)

    async def watch(self, function: Callable[[Connection], _T], deadline_s: float) -> _T:
        """The same on a connection and thread of its own, for calls that never block on a VM."""
        return await self._call("watch", function, deadline_s)

    async def risk(self, function: Callable[[Connection], _T], deadline_s: float) -> _T:
        """The same for calls that hang when a VM's QEMU does: balloon and block statistics, suspension, snapshots, the
        guest agent. One that is given up costs the lane its connection and thread, and it goes on with others."""
        return await self._call("risky", function, deadline_s)

    async def _call(self, lane: str, function: Callable[[Connection], _T], deadline_s: float) -> _T:
        self.start()
        until = self._loop.time() + deadline_s
        with contextlib.suppress(asyncio.TimeoutError):
            await within(min(deadline_s, _PATIENCE_SECONDS), self._settled.wait())
        connection = self._connections.get(lane)
        if connection is None:
            raise Unavailable(self.problem or f"{self.uri} is not open")
        remaining = max(0.0, until - self._loop.time())
        try:
            return await self._lanes[lane].run(lambda: _in_our_words(function, connection), remaining)
        except GivenUp as error:
            if error.call is not None:
                self._retire(lane, connection)
            raise Unavailable(f"libvirt at {self.uri} did not answer within {deadline_s:g} s", error.call) from None
        except HypervisorError as error:
            if _alive(connection):
                raise
            # The close callback comes a moment before the error, or after it.
            if self._connections.get(lane) is connection:
                self._lost.set()
            raise Unavailable(f"the connection to libvirt at {self.uri} was lost meanwhile: {error}") from None

    def _retire(self, lane: str, connection: Connection) -> None:
        """Leave a lane's connection and threads to the call that hangs on it, and go on with others: QEMUs that hang
        must not take all four threads, one after the other, from those that don't."""
        if lane == "watch" or self._connections.get(lane) is not connection:
            return
        self._lanes[lane].stop()
        self._lanes[lane] = _lane(lane)
        if self.uri.startswith("test:"):
            return
        era = self._era

        def opened(opening: Future[Connection]) -> None:
            if opening.cancelled() or opening.exception() is not None or era != self._era:
                return  # the connections are lost as a whole, and made anew as one
            self._connections[lane] = opening.result()

        opening = self._opener.submit(lambda: self._open_one(era))
        opening.add_done_callback(lambda ended: self._loop.call_soon_threadsafe(opened, ended))

    # --- the connection -----------------------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        pause = _FIRST_RETRY_SECONDS
        while True:
            self._era += 1
            self._lost.clear()
            try:
                await self._open()
            except HypervisorError as error:
                self._say(str(error))
                # Only a libvirt that was there is worth a wait.
                if isinstance(error, Unusable) or not self._was_open:
                    self._settled.set()
                # Jitter, so that the hosts of a fleet don't all come back to a shared disk in one moment.
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
                pause = min(2 * pause, _LAST_RETRY_SECONDS)
                continue
            pause = _FIRST_RETRY_SECONDS
            self._was_open = True
            self._settled.set()
            self._say(None)
            await self._lost.wait()
            self._settled.clear()
            self._drop_connections()
            self._say(f"the connection to libvirt at {self.uri} is lost")

    def _say(self, problem: str | None) -> None:
        self.problem = problem
        self._on_link(problem)

    async def _open(self) -> None:
        era = self._era
        opening = asyncio.wrap_future(self._opener.submit(lambda: self._open_all(era)))
        # Where this is cancelled, nobody else looks at how it ended.
        opening.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        done, _ = await asyncio.wait({opening}, timeout=_OPEN_SECONDS)
        if not done:
            self._say(f"libvirt at {self.uri} accepts a connection and says nothing")
        # Another try beside it would hang as this one does, and take another thread.
        self._connections = await opening

    def _open_all(self, era: int) -> dict[str, Connection]:
        libvirt = load_libvirt()
        try:
            prepare_embedded(self.uri)
        except EmbeddedError as error:
            raise Unusable(str(error)) from error
        opened: dict[str, Connection] = {}
        try:
            for lane in self._lanes:
                # Each connection to the test driver is a world of its own.
                if opened and self.uri.startswith("test:"):
                    opened[lane] = next(iter(opened.values()))
                    continue
                opened[lane] = self._open_one(era)
            lifecycle = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
            opened["watch"].domainEventRegisterAny(None, lifecycle, self._event_in_loop, None)
        except libvirt.libvirtError as error:
            _close_all(list(opened.values()))
            raise Unavailable(_cannot_open(self.uri, _one_line(error))) from error
        return opened

    def _open_one(self, era: int) -> Connection:
        libvirt = load_libvirt()
        connection = libvirt.open(self.uri)
        # Drivers without a daemon can be neither lost nor kept alive.
        with contextlib.suppress(libvirt.libvirtError):
            connection.registerCloseCallback(self._closed_in_loop, era)
            connection.setKeepAlive(_KEEPALIVE_SECONDS, _KEEPALIVE_TRIES)
        return connection

    def _closed_in_loop(self, _connection: Connection, _reason: int, era: int) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop may have ended before libvirt's
            self._loop.call_soon_threadsafe(self._closed, era)

    def _closed(self, era: int) -> None:
        # Three connections end with one libvirtd, and the last may say so after the next three are open.
        if era == self._era:
            self._lost.set()

    def _event_in_loop(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._on_event)

    def _drop_connections(self) -> None:
        dropped, self._connections = list(self._connections.values()), {}
        if dropped:
            # Closing asks libvirtd, which may be what hangs.
            threading.Thread(target=_close_all, args=(dropped,), name="vm-close", daemon=True).start()


def _in_our_words(function: Callable[[Connection], _T], connection: Connection) -> _T:
    try:
        return function(connection)
    except load_libvirt().libvirtError as error:
        raise HypervisorError(_one_line(error), error.get_error_code()) from None


def _one_line(error: Any) -> str:
    """libvirt's message: QEMU's last words come with line feeds."""
    return " ".join((error.get_error_message() or str(error)).split())


def _cannot_open(uri: str, message: str) -> str:
    if embedded_root(uri) is not None:
        return f"libvirt can't run QEMU from within the agent at {uri}: {message}."
    if uri == "qemu:///system":
        return f"libvirtd does not answer at {uri}: {message}; start it with `systemctl start libvirtd`."
    return f"libvirt does not answer at {uri}: {message}."


def _alive(connection: Connection) -> bool:
    try:
        return bool(connection.isAlive())
    except Exception:
        return False


def _close_all(connections: list[Connection]) -> None:
    for connection in connections:
        with contextlib.suppress(Exception):
            connection.unregisterCloseCallback()
        with contextlib.suppress(Exception):
            connection.close()
