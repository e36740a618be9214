"""The channels of one move of a VM: byte streams between sockets of two hosts, over one link between their agents.

Each end says how much it has taken (ROOM), and sends at most CARRY_WINDOW beyond that, so that neither agent holds more
for a channel, whichever side is slow. A channel ends when both sides have said SHUT, or one that it is broken.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

from protocol.limits import CARRY_MOST, CARRY_WINDOW, MOVE_CHANNELS
from protocol.messages import Carry, LeadsTo, Message, Open, Room, Shut
from protocol.stream import Blob

#: Puts a message on the link.
Send: TypeAlias = Callable[[Message, bytes | None], None]
#: What passes of the bytes that came; raises where they must not.
Sift: TypeAlias = Callable[[bytes], bytes]
#: What a new channel leads to: its ends, and what sifts the bytes that come for it.
Leads: TypeAlias = Callable[[LeadsTo], Awaitable["tuple[asyncio.StreamReader, asyncio.StreamWriter, Sift | None]"]]

#: How much is taken before the other side is told, in bytes: an eighth of what may be on its way.
_TELL_EVERY = CARRY_WINDOW // 8


class Broken(Exception):
    """The other end broke the rules of the link; the text says how."""


class Passage:
    """One end. `broke(why)` is called where something came that its sender must not send."""

    def __init__(self, id_: int, send: Send, *, leads: Leads | None = None) -> None:
        """`leads` is what channels of the other end lead to, None where it may open none."""
        self._id = id_
        self._send = send
        self._leads = leads
        self._channels: dict[int, _Channel] = {}
        self._next = 0
        #: Why a channel was broken from this side, the first of them.
        self.trouble = ""

    def heard(self, message: Message, blob: Blob | None) -> None:
        """A message of the link. Raises Broken."""
        match message:
            case Open(channel=number, to=to):
                if self._leads is None or number != self._next:
                    raise Broken(f"it opened channel {number}")
                self._begin(partial(self._leads, to))
            case Carry(channel=number) if blob is not None:
                self._known(number).came(bytes(blob))
            case Room(channel=number, taken=taken):
                self._known(number).has_room(taken)
            case Shut(channel=number, broken=broken):
                self._known(number).is_shut(broken=broken)
            case _:
                raise Broken(f"it sent {type(message).__name__}")

    def _known(self, number: int) -> _Channel:
        try:
            return self._channels[number]
        except KeyError:
            raise Broken(f"there is no channel {number}") from None

    def open(self, to: LeadsTo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> asyncio.Task[None]:
        """A new channel from a socket of this end; the task ends with it. Raises Broken where there are too many."""

        async def there() -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Sift | None]:
            return reader, writer, None

        if self._next >= MOVE_CHANNELS:
            raise Broken("the move has no more channels")
        self._send(Open(self._id, self._next, to), None)
        task = self._begin(there)
        task.add_done_callback(lambda _: writer.close())  # also where it ended before it began
        return task

    def _begin(
        self, leads: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter, Sift | None]]]
    ) -> asyncio.Task[None]:
        channel = _Channel(self._id, self._next, self._send)
        self._channels[self._next] = channel
        self._next += 1
        channel.task = asyncio.get_running_loop().create_task(self._run(channel, leads))
        return channel.task

    async def _run(
        self,
        channel: _Channel,
        leads: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter, Sift | None]]],
    ) -> None:
        try:
            reader, writer, sift = await leads()
        except Exception as error:  # whatever keeps this end from its socket is told, and ends the channel alone
            self._fail(channel, error)
            return
        try:
            await channel.run(reader, writer, sift)
        except (OSError, Forbidding) as error:
            self._fail(channel, error)
        finally:
            writer.close()

    def _fail(self, channel: _Channel, error: Exception) -> None:
        self.trouble = self.trouble or str(error) or type(error).__name__
        channel.break_off()

    async def close(self) -> None:
        """End all channels."""
        tasks = [channel.task for channel in self._channels.values() if channel.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class Forbidding(Exception):
    """What came for a channel must not pass; the text says why. The channel ends."""


class _Channel:
    """One channel, seen from one end."""

    def __init__(self, id_: int, number: int, send: Send) -> None:
        self._id, self._number, self._send = id_, number, send
        self.task: asyncio.Task[None] | None = None
        self._sent = 0
        self._room = CARRY_WINDOW
        self._waiting: deque[bytes] = deque()
        #: Bytes that came, and those of them that were written.
        self._came = 0
        self._taken = 0
        self._told = 0
        self._shut = False
        self._over = False
        self._moved = asyncio.Event()

    # --- from the link ------------------------------------------------------------------------------------------------

    def came(self, data: bytes) -> None:
        """Bytes from the other end."""
        self._came += len(data)
        if self._shut or not 0 < len(data) <= CARRY_MOST or self._came - self._taken > CARRY_WINDOW:
            raise Broken(f"it sent more on channel {self._number} than it may")
        if not self._over:
            self._waiting.append(data)
            self._moved.set()

    def has_room(self, taken: int) -> None:
        """The other end has taken so much."""
        if not self._room - CARRY_WINDOW <= taken <= self._sent:
            raise Broken(f"it has taken {taken} bytes of channel {self._number}, and {self._sent} were sent")
        self._room = taken + CARRY_WINDOW
        self._moved.set()

    def is_shut(self, *, broken: bool) -> None:
        """The other end sends no more, or is gone altogether."""
        self._shut = True
        if broken:
            self._over = True
            if self.task is not None:
                self.task.cancel()
        self._moved.set()

    # --- to the socket ------------------------------------------------------------------------------------------------

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sift: Sift | None) -> None:
        """Carry both ways until both have ended."""
        ways = {asyncio.ensure_future(self._outwards(reader)), asyncio.ensure_future(self._inwards(writer, sift))}
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
            for way in done:
                way.result()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)
        self._over = True

    async def _outwards(self, reader: asyncio.StreamReader) -> None:
        while True:
            while self._sent >= self._room:
                await self._wait()
            data = await reader.read(min(CARRY_MOST, self._room - self._sent))
            if not data:
                break
            self._sent += len(data)
            self._send(Carry(self._id, self._number), data)
        self._send(Shut(self._id, self._number), None)

    async def _inwards(self, writer: asyncio.StreamWriter, sift: Sift | None) -> None:
        while True:
            while not self._waiting:
                if self._shut:
                    with contextlib.suppress(OSError):
                        writer.write_eof()
                    return
                await self._wait()
            data = self._waiting.popleft()
            passed = data if sift is None else sift(data)
            if passed:
                writer.write(passed)
                await writer.drain()
            self._taken += len(data)
            if self._taken - self._told >= _TELL_EVERY:
                self._told = self._taken
                self._send(Room(self._id, self._number, self._taken), None)

    async def _wait(self) -> None:
        """Until the link has moved something. Two ways may wait, so the event is cleared by whoever waits next."""
        self._moved.clear()
        await self._moved.wait()

    def break_off(self) -> None:
        """Tell the other end that nothing of this channel goes on."""
        self._over = True
        self._waiting.clear()
        self._send(Shut(self._id, self._number, True), None)
