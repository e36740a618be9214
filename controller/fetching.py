"""One content of a pull, fetched from one host over the link that it opened: asked for by chunks, checked, stored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from agent.packing import BadFrame, Unavailable, unpack
from agent.paths import BadDestination
from agent.pushes import sentence
from protocol import codec
from protocol.codec import MalformedMessage
from protocol.commands import Offered, Stream
from protocol.limits import ASK_WINDOW
from protocol.messages import PULL_UPWARDS, Ask, Chunk, Have, NoChunk
from protocol.stream import Blob, chunk_size, count_of, is_consistent, is_right

#: A host that was asked and gives nothing for so long, in seconds, is given up: a disk that wakes up takes 10.
SILENT_S = 30.0


class Store(Protocol):
    """Where chunks go: agent.incoming.Incoming. Its methods block."""

    have: int

    def headed(self) -> int: ...
    def write(self, chunks: Iterable[tuple[int, Blob]]) -> None: ...
    def finish(self) -> None: ...


class Failed(Exception):
    """The host did not give it; the text says why. Another one may."""


class Unwritable(Exception):
    """It can't be written here; no other host will do."""


class Fetch:
    """Takes what the host sends in `heard`; `result` is done when everything is in its place, and holds the store."""

    def __init__(
        self,
        offer: int,
        offered: Offered,
        *,
        send: Callable[[Sequence[Blob]], object],
        make: Callable[[Stream, bytes | None], Store],
        on_thread: Callable[[Callable[[], Any]], asyncio.Future[Any]],
        advanced: Callable[[int], None],
        compress: bool = True,
    ) -> None:
        """`offered` is what the host must have. `make` makes the store, on a thread; `advanced(n)` is told how many
        bytes are stored. With `compress` chunks may come so."""
        self._compress = compress
        self._offer, self._offered = offer, offered
        self._send, self._make, self._on_thread, self._advanced = send, make, on_thread, advanced
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[Store] = self._loop.create_future()
        self.store: Store | None = None
        self._stream: Stream | None = None
        self._missing: list[int] = []
        self._asked: set[int] = set()
        self._unstored = 0
        self._done = 0
        self._headed = False
        self._timer = self._loop.call_later(SILENT_S, self._silent)

    def fail(self, error: Exception) -> None:
        """It is over."""
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # whoever awaits it hears of it; nobody else is to be told that nobody did
        self._timer.cancel()

    def _silent(self) -> None:
        self.fail(Failed(f"nothing came from it for {SILENT_S:g} s"))

    def _heard_of(self) -> None:
        self._timer.cancel()
        if not self.result.done():
            self._timer = self._loop.call_later(SILENT_S, self._silent)

    def heard(self, frames: Sequence[Blob]) -> None:
        """A message of the host's. Whatever is not as it must be ends the fetch."""
        if self.result.done():
            return
        self._heard_of()
        try:
            message, blob = codec.decode(frames)
            if type(message) not in PULL_UPWARDS:
                raise MalformedMessage(f"a host does not send {type(message).__name__} there")
        except MalformedMessage as error:
            self.fail(Failed(f"it sent a malformed message: {error}"))
            return
        match message:
            case Have(id=self._offer) if self._stream is None:
                self._have(message)
            case Chunk(id=self._offer, index=index, packed=packed) if blob is not None and index in self._asked:
                self._chunk(index, self._unpacked(index, blob) if packed else blob)
            case NoChunk(id=self._offer, index=index, why=why) if index in self._asked:
                self.fail(Failed(why))
            case _:
                self.fail(Failed(f"it sent a {type(message).__name__} that was not asked for"))

    def _have(self, have: Have) -> None:
        stream, offered = have.stream, self._offered
        if (stream.digest, stream.size) != (offered.digest, offered.size) or not is_consistent(stream):
            self.fail(Failed("it has something else than it offered"))
            return
        if stream.compress and not self._compress:
            stream = msgspec.structs.replace(stream, compress=False)
        self._stream = stream

        def made(store: Store) -> None:
            self.store = store
            self._begin(store.have)

        self._work(lambda: self._make(stream, have.listing), made)

    def _work(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Do what blocks on a thread, and go on."""

        def done(future: asyncio.Future[Any]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if isinstance(error, BadDestination):
                self.fail(Unwritable(str(error)))
            elif error is not None:
                self.fail(Unwritable(sentence(error)))
            elif self.result.done():
                self._late(future.result())
            else:
                then(future.result())

        self._on_thread(work).add_done_callback(done)

    def _late(self, made: Any) -> None:
        """It is over, and what was made meanwhile is still to be let go by whoever ended it."""
        if self.store is None and hasattr(made, "have"):
            self.store = made
            self._on_thread(made.close)

    def _begin(self, have: int) -> None:
        stream = self._stream
        assert stream is not None  # noqa: S101  what mypy can't see
        in_head = stream.head > 0 and not self._headed
        wanted = range(stream.head) if in_head else range(stream.head, count_of(stream))
        self._missing = [index for index in reversed(wanted) if not have >> index & 1]
        self._go_on()

    def _go_on(self) -> None:
        new: list[int] = []
        while self._missing and len(self._asked) + self._unstored + len(new) < ASK_WINDOW:
            new.append(self._missing.pop())
        if new:
            self._asked.update(new)
            self._send(codec.encode(Ask(self._offer, tuple(new))))
        elif not self._asked and not self._unstored:
            self._stage_over()

    def _stage_over(self) -> None:
        store, stream = self.store, self._stream
        assert store is not None  # noqa: S101
        assert stream is not None  # noqa: S101
        if stream.head and not self._headed:
            self._headed = True
            self._work(store.headed, self._begin)
        else:
            self._timer.cancel()
            self._work(store.finish, lambda _: self.result.set_result(store))

    def _unpacked(self, index: int, frame: Blob) -> Blob | None:
        """The chunk in a frame; None where it may not come so, or the frame is bad: then it is over."""
        stream = self._stream
        assert stream is not None  # noqa: S101
        try:
            if stream.compress:
                return unpack(frame, chunk_size(stream, index))
            self.fail(Failed("it sent a compressed chunk, and none was to be"))
        except (BadFrame, Unavailable) as error:
            self.fail(Failed(f"chunk {index} can't be unpacked: {error}"))
        return None

    def _chunk(self, index: int, blob: Blob | None) -> None:
        stream, store = self._stream, self.store
        assert store is not None  # noqa: S101
        assert stream is not None  # noqa: S101
        if blob is None:
            return
        self._asked.discard(index)
        if not is_right(stream, index, blob):
            self.fail(Failed(f"chunk {index} does not match its digest: it changed while it was pulled"))
            return
        self._unstored += 1

        def stored(_: object) -> None:
            self._unstored -= 1
            self._done += len(blob)
            self._advanced(self._done)
            self._go_on()

        self._work(lambda: store.write([(index, blob)]), stored)
