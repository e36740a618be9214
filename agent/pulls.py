"""Pulls on a host: what the root asks for is listed, digested and kept open, and then given over a link of its own.

The host opens that link, to the root, since every host may have to attach there anyway; nobody has to be admitted for
it who is not admitted already, and no push's link is in its way.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import msgspec

from agent.identity import HostDirectory
from agent.paths import OWN, resolved
from agent.pushes import sentence
from protocol import codec
from protocol.codec import MalformedMessage
from protocol.commands import Offer, Offered, Send
from protocol.messages import PULL_DOWNWARDS, Ask, Chunk, Have, NoChunk
from protocol.outcomes import NO_OUTPUT, Exited, FailedToStart, Outcome, Output, Refused
from protocol.stream import Blob

if TYPE_CHECKING:
    from agent.links import Uplink
    from agent.packing import Packer
    from agent.shell import Shell
    from agent.source import Source

_Read = TypeVar("_Read")

#: What was offered stays open for so long, in seconds: the root fetches from 16 hosts at a time, and a pull of large
#: files from many takes hours.
_KEPT_S = 4 * 3600.0
#: And so many offers at a time: each has up to 20 open files.
_KEPT_MOST = 8


def names_of(paths: tuple[str, ...]) -> list[tuple[bytes, str]]:
    """What each path is called on the other side: its own last name. Raises BadSource, with all that is wrong."""
    from agent.walk import BadSource

    found: dict[bytes, str] = {}
    troubles = []
    for path in paths:
        name = path.rstrip("/").rpartition("/")[2].encode("utf-8", "surrogateescape")
        if not path.startswith(("/", OWN)) or name in (b"", b".", b".."):
            troubles.append(f"{path} names nothing from / on")
        elif name in found:
            troubles.append(f"{path} and {found[name]} would both be {name.decode('utf-8', 'replace')}")
        else:
            found[name] = path
    if troubles:
        raise BadSource("; ".join(troubles))
    return list(found.items())


class Pulls:
    """What this host offers, and to whom it is giving it."""

    def __init__(self, shell: Shell, directory: HostDirectory, finish: Callable[[int, Outcome, Output], None]) -> None:
        """`finish` is told each command's outcome."""
        self._shell = shell
        self._directory = directory
        self._finish = finish
        self._loop = asyncio.get_running_loop()
        #: A thread of its own, since digesting takes long, and pushes' chunks have to get to the disk meanwhile.
        self._thread: ThreadPoolExecutor | None = None
        self._offers: dict[int, Source] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._giving: dict[int, _Giving] = {}

    def _executor(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pull")
        return self._thread

    # --- offering -----------------------------------------------------------------------------------------------------

    async def offer(self, id_: int, offer: Offer) -> None:
        """List and digest."""
        from agent.source import gather
        from agent.walk import BadSource
        from protocol.listing import BadListing

        stopped = threading.Event()

        def work() -> Source:
            roots = [(name, resolved(path, self._directory.path)) for name, path in names_of(offer.paths)]
            return gather(roots, offer.wishes, self._directory.parts, stopped=stopped)

        gathering = self._loop.run_in_executor(self._executor(), work)
        try:
            source = await asyncio.shield(gathering)
        except asyncio.CancelledError:
            stopped.set()
            gathering.add_done_callback(_close_result)
            raise
        except (BadSource, BadListing, ValueError) as error:
            self._finish(id_, Refused(str(error)), NO_OUTPUT)
            return
        except OSError as error:
            self._finish(id_, FailedToStart(sentence(error)), NO_OUTPUT)
            return
        self._keep(id_, source)
        offered = Offered(source.stream.digest, source.listing_digest, source.stream.size, len(source.listing.entries))
        self._finish(id_, Exited(0), Output(out=msgspec.msgpack.encode(offered)))

    def _keep(self, id_: int, source: Source) -> None:
        while len(self._offers) >= _KEPT_MOST:
            self._drop(next(iter(self._offers)))
        self._offers[id_] = source
        self._timers[id_] = self._loop.call_later(_KEPT_S, self._drop, id_)

    def _drop(self, id_: int) -> None:
        self._timers.pop(id_).cancel()
        source = self._offers.pop(id_)
        self._executor().submit(source.close)

    # --- giving -------------------------------------------------------------------------------------------------------

    def send(self, id_: int, send: Send) -> None:
        """Give what was offered."""
        source = self._offers.get(send.of)
        if source is None:
            self._finish(id_, Refused("what was to be pulled is no longer open here: pull it again"), NO_OUTPUT)
            return
        self._giving[id_] = _Giving(self, id_, send, source)

    def ended(self, id_: int, of: int, outcome: Outcome) -> None:
        """The link of a Send is over."""
        self._giving.pop(id_, None)
        if of in self._offers and not any(giving.of == of for giving in self._giving.values()):
            self._drop(of)
        self._finish(id_, outcome, NO_OUTPUT)

    def stop(self, id_: int) -> bool:
        """End a Send; whether there is one."""
        giving = self._giving.get(id_)
        if giving is not None:
            giving.end("it was stopped")
        return giving is not None

    def dial(self, port: int, heard: Callable[[list[Blob]], None], lost: Callable[[str], None]) -> Uplink:
        """A link to the root."""
        return self._shell.dial_root(port, heard=heard, lost=lost)

    def read(self, work: Callable[[], _Read], then: Callable[[_Read | None], None]) -> None:
        """Read on a thread; `then` gets what was read, or None."""

        def done(future: asyncio.Future[_Read]) -> None:
            if not future.cancelled():
                then(None if future.exception() else future.result())

        self._loop.run_in_executor(self._executor(), work).add_done_callback(done)

    async def close(self) -> None:
        """End all of it."""
        from agent.lanes import aside

        for giving in list(self._giving.values()):
            giving.end("the agent ends")
        for id_ in list(self._offers):
            self._drop(id_)
        if self._thread is not None:
            await aside(self._thread.shutdown)


def _close_result(gathering: asyncio.Future[Source]) -> None:
    if not gathering.cancelled() and gathering.exception() is None:
        gathering.result().close()


class _Giving:
    """One link to the root, which asks for chunks."""

    def __init__(self, pulls: Pulls, id_: int, send: Send, source: Source) -> None:
        self._pulls, self._id, self.of, self._source = pulls, id_, send.of, source
        self._count = -(-source.stream.size // source.stream.chunk)
        self._packer: Packer | None = None
        if source.stream.compress:
            from agent.packing import Packer

            self._packer = Packer()
        self._over = False
        self._link = pulls.dial(send.port, self._heard, self._lost)
        # What is small enough to be in a push's command is asked for here like the rest.
        stream = msgspec.structs.replace(source.stream, inline=None)
        self._link.send(codec.encode(Have(send.of, stream, source.inline_listing)))

    def _heard(self, frames: list[Blob]) -> None:
        try:
            message, _ = codec.decode(frames)
            if type(message) not in PULL_DOWNWARDS:
                raise MalformedMessage(f"a pull does not send {type(message).__name__}")
        except MalformedMessage as error:
            self.end(f"the service sent a malformed message: {error}")
            return
        if isinstance(message, Ask) and message.id == self.of:
            for index in message.indices:
                if index >= self._count:
                    self.end(f"the service asked for chunk {index} of {self._count}")
                    return
                self._give(index)

    def _give(self, index: int) -> None:
        def read() -> tuple[bytes, bytes | None]:
            blob = self._source.read(index)
            return blob, None if self._packer is None else self._packer.pack(blob)

        def then(chunk: tuple[bytes, bytes | None] | None) -> None:
            if self._over:
                return
            if chunk is None:
                self._link.send(codec.encode(NoChunk(self.of, index, "it can't be read any more", True)))
            else:
                blob, packed = chunk
                self._link.send(codec.encode(Chunk(self.of, index, packed is not None), packed or blob))

        self._pulls.read(read, then)

    def _lost(self, why: str) -> None:
        # The root closes it when it has all, or wants no more; which of them, it knows itself.
        self._end(Exited(0) if why == "connection closed" else FailedToStart(f"no link to the service: {why}"))

    def end(self, why: str) -> None:
        """Close the link."""
        self._end(FailedToStart(why))

    def _end(self, outcome: Outcome) -> None:
        if not self._over:
            self._over = True
            self._link.close()
            self._pulls.ended(self._id, self.of, outcome)
