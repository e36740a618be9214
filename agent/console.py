"""A VM's serial console over libvirt's stream: what it shows goes up in pieces that somebody has room for, and what is
typed goes down in order and once.

libvirt tells of a stream's readiness on the thread of its event loop; a stream that does not block is read and written
there, in one go (https://libvirt.org/html/libvirt-libvirt-stream.html).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from agent import domains
from agent.hypervisor import Connection, load_libvirt
from agent.vmactions import CannotAct
from protocol.limits import CONSOLE_SILENT, CONSOLE_WINDOW

#: virStreamRecv's answer where there is nothing to read, and virStreamSend's where there is no room.
_NOT_NOW = -2
#: A piece of output: what libvirt reads from a terminal at a time, and four of them to a window.
_PIECE = 8 << 10
#: What is typed waits for a guest that does not read, up to here; what is more is not taken, and sent again.
_WAITING_MOST = 64 << 10


class Console:
    """One console that is open. Its methods are for the event loop; `wrote(stream, offset, data)` is called there."""

    def __init__(self, wrote: Callable[[int, int, bytes], None]) -> None:
        self._wrote = wrote
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._stream: Any = None
        self._events = 0
        self._typed = bytearray()
        #: What was shown and is not known to have been seen, and where it begins.
        self._unseen = bytearray()
        self._seen = 0
        self._taken = 0
        self._heard = self._loop.time()
        self._ended: asyncio.Future[None] = self._loop.create_future()

    def open(self, connection: Connection, name: str, owner: str, deployment: str, *, force: bool) -> None:
        """Open the console of a VM. Blocks. Raises CannotAct, domains.NotOurs, and libvirt's errors."""
        libvirt = load_libvirt()
        domain = domains.mine(connection, name, owner, deployment)
        if domain is None:
            raise CannotAct("there is no such VM on this host")
        if not domain.isActive():
            raise CannotAct("it is off, and a console shows nothing; start it first")
        stream = connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
        # Without it a second reader would get every other byte.
        flags = libvirt.VIR_DOMAIN_CONSOLE_FORCE if force else libvirt.VIR_DOMAIN_CONSOLE_SAFE
        try:
            domain.openConsole(None, stream, flags)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED and not force:
                raise CannotAct("somebody has its console open; take it from them with --force") from None
            raise
        with self._lock:
            self._stream = stream
            self._events = libvirt.VIR_STREAM_EVENT_READABLE
            stream.eventAddCallback(self._events, self._ready, None)

    async def wait(self) -> None:
        """Until the console ends, or nobody has been heard of for CONSOLE_SILENT seconds."""
        try:
            while not self._ended.done():
                left = self._heard + CONSOLE_SILENT - self._loop.time()
                if left <= 0:
                    return
                await asyncio.wait({self._ended}, timeout=left)
        finally:
            await asyncio.to_thread(self._close)

    def feed(self, offset: int, data: bytes, seen: int, *, again: bool) -> None:
        """Something was typed, or seen, or only said to be there still."""
        self._heard = self._loop.time()
        with self._lock:
            new = min(max(0, seen - self._seen), len(self._unseen))
            del self._unseen[:new]
            self._seen += new
            fresh = data[self._taken - offset :] if offset <= self._taken else b""
            if fresh and len(self._typed) + len(fresh) <= _WAITING_MOST:
                self._typed += fresh
                self._taken += len(fresh)
            self._want()
            # It may have been lost with a link; whoever has it already drops it.
            lost = bytes(self._unseen) if again else b""
            shown, taken = self._seen, self._taken
        if lost:
            self._wrote(1, shown, lost)
        self._wrote(2, taken, b"")

    # --- on libvirt's thread, or with the lock ----------------------------------------------------------------------

    def _want(self) -> None:
        """Ask to be called for what can be done now."""
        if self._stream is None:
            return
        libvirt = load_libvirt()
        events = 0
        if len(self._unseen) < CONSOLE_WINDOW:
            events |= libvirt.VIR_STREAM_EVENT_READABLE
        if self._typed:
            events |= libvirt.VIR_STREAM_EVENT_WRITABLE
        if events != self._events:
            self._events = events
            self._stream.eventUpdateCallback(events)

    def _ready(self, _stream: Any, events: int, _opaque: object) -> None:
        libvirt = load_libvirt()
        with self._lock:
            if self._stream is None:
                return
            try:
                if events & libvirt.VIR_STREAM_EVENT_WRITABLE and self._typed:
                    sent = self._stream.send(bytes(self._typed))
                    if sent != _NOT_NOW:
                        del self._typed[:sent]
                if events & libvirt.VIR_STREAM_EVENT_READABLE:
                    self._read()
                self._want()
            except libvirt.libvirtError:
                self._over()
                return
            if events & (libvirt.VIR_STREAM_EVENT_ERROR | libvirt.VIR_STREAM_EVENT_HANGUP):
                self._over()

    def _read(self) -> None:
        room = CONSOLE_WINDOW - len(self._unseen)
        data: bytes | int = self._stream.recv(min(_PIECE, room)) if room > 0 else _NOT_NOW
        if isinstance(data, int):
            return
        if not data:
            self._over()
            return
        offset = self._seen + len(self._unseen)
        self._unseen += data
        self._in_loop(self._wrote, 1, offset, bytes(data))

    def _over(self) -> None:
        self._in_loop(self._end)

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def _in_loop(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop may have ended before libvirt's
            self._loop.call_soon_threadsafe(function, *arguments)

    def _close(self) -> None:
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            for close in (stream.eventRemoveCallback, stream.abort):
                with contextlib.suppress(Exception):
                    close()
