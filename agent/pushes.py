"""Pushes on a host: chunks from the bulk links to the disk and back, each push to exactly one Finished."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.batches import Batches
from agent.identity import HostDirectory
from agent.paths import BadDestination, resolved
from protocol import events
from protocol.commands import Push
from protocol.limits import UNSTORED_MOST
from protocol.outcomes import NO_OUTPUT, Exited, FailedToStart, Outcome, Output, Refused
from protocol.stream import Blob, count_of, is_consistent
from protocol.transfer import Role

if TYPE_CHECKING:
    from agent.incoming import Incoming
    from agent.leaving import Ending
    from agent.shell import Shell

#: How often a push's progress is told, in seconds: often enough for a moving bar.
_PROGRESS_EVERY = 0.5
#: How often what interrupted pushes left is looked at, in seconds: it is kept for a day.
_TRIM_EVERY = 3_600.0
#: Bytes that are written at a time, and how long the first wait for them, in seconds: a quarter of what may wait for
#: the disk, since several pushes of one time share that, and what a link of 80 Mbit/s brings.
_WRITTEN_MOST, _WRITE_LINGER = UNSTORED_MOST // 4, 0.1
#: Chunks that are read at a time: the first goes out when the last is read.
_READ_MOST = 8


def sentence(error: BaseException) -> str:
    """An exception in the words that people read."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def outcome_of(error: BaseException) -> Outcome:
    """What becomes of a push that ended so."""
    return Refused(str(error)) if isinstance(error, BadDestination) else FailedToStart(sentence(error))


def _close(incoming: Incoming) -> None:
    """Close what is over, and give the memory that it took back to the system. Blocks.

    glibc keeps what was freed below what is still in use, by thread (malloc_trim(3)); another libc has no such call.
    """
    incoming.close(keep=True)  # what is not through: the service has done without this host
    incoming.discard()
    import ctypes

    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _end(incoming: Incoming, *, keep: bool) -> None:
    """Close it. Blocks. Raises NotEnded where a disk hangs."""
    from agent.leaving import NotEnded

    if not incoming.close(keep=keep):
        raise NotEnded("its disk does not answer")


def written_most(chunk: int) -> int:
    """How many chunks of `chunk` bytes are written at a time."""
    return max(1, _WRITTEN_MOST // chunk)


class Pushes:
    """All pushes that this host is a target of."""

    def __init__(
        self,
        shell: Shell,
        directory: HostDirectory,
        disk: ThreadPoolExecutor,
        finish: Callable[[int, Outcome, Output], None],
        placed: Callable[[str, str], None],
    ) -> None:
        """`finish` is told each push's outcome; `placed`, on a thread of `disk`, the folder of one that is in its place
        and the first name in it."""
        self._shell = shell
        self._directory = directory
        self._disk = disk
        self._finish = finish
        self._placed = placed
        self._folders: dict[int, str] = {}
        self._loop = asyncio.get_running_loop()
        self._incoming: dict[int, Incoming] = {}
        self._writing: dict[int, Batches[tuple[int, Blob], None]] = {}
        self._reading: dict[int, Batches[int, list[bytes | None]]] = {}
        self._progress_at: dict[int, float] = {}
        self._trimming = self._loop.call_later(_TRIM_EVERY, self._trim)

    def _trim(self) -> None:
        from agent.staging import trim

        self._trimming = self._loop.call_later(_TRIM_EVERY, self._trim)
        self._disk.submit(trim, self._directory.parts)

    def __contains__(self, id_: int) -> bool:
        return id_ in self._incoming

    async def begin(self, id_: int, push: Push) -> None:
        """Look at the destination, and take part."""
        if not is_consistent(push.stream):
            self._finish(id_, Refused("the push's sizes and digests do not agree"), NO_OUTPUT)
            return
        try:
            if push.stream.inline is not None:
                said = await self._loop.run_in_executor(self._disk, self._put, push)
                self._finish(id_, Exited(0), Output(out=said.encode()))
                return
            incoming = await self._open(push)
        except (BadDestination, OSError) as error:
            # Those below get it through here all the same.
            self._shell.begin_transfer(id_, push.stream, Role.CARRIER)
            self._finish(id_, outcome_of(error), NO_OUTPUT)
            return
        self._take_in(id_, incoming)
        self._folders[id_] = push.folder
        self._shell.begin_transfer(id_, push.stream, Role.TARGET, incoming.have)

    def _make(self, push: Push) -> Incoming:
        from agent.incoming import Incoming
        from protocol.listing import BadListing, Kind, unpack

        if push.image:
            try:
                entries = unpack(push.listing or b"").entries
            except BadListing as error:
                raise BadDestination(str(error)) from error
            if len(entries) != 1 or entries[0].kind is not Kind.FILE or entries[0].path != push.stream.digest.encode():
                raise BadDestination("an image is one file, under its digest")
        folder = str(self._directory.images) if push.image else resolved(push.folder, self._directory.path)
        if not push.image and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(self._directory.images)):
            raise BadDestination(f"{push.folder} is the image store, whose files never change: use `ctl image add`")
        return Incoming(
            folder,
            push.stream,
            push.listing,
            self._directory.parts,
            backup=push.backup,
            by_time=push.by_time,
            exact=push.exact,
            dry_run=push.dry_run,
        )

    def _put(self, push: Push) -> str:
        """A push whose bytes came with the command. Blocks."""
        from agent.incoming import put

        incoming = self._make(push)
        try:
            data, chunk = push.stream.inline or b"", push.stream.chunk
            put(incoming, push.stream, [data[at : at + chunk] for at in range(0, len(data), chunk)])
            return self._said(push.folder, incoming)
        finally:
            incoming.close()

    async def _open(self, push: Push) -> Incoming:
        opening = self._loop.run_in_executor(self._disk, self._make, push)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:

            def close(opened: asyncio.Future[Incoming]) -> None:
                if not opened.cancelled() and opened.exception() is None:
                    self._disk.submit(opened.result().close)

            opening.add_done_callback(close)  # the thread can't be stopped, and what it opens would stay
            raise

    def _in_background(self, work: Callable[[], Any], then: Callable[[Any, BaseException | None], None]) -> None:
        """Run blocking work on the disk's threads, and `then` on the event loop."""

        def done(future: asyncio.Future[Any]) -> None:
            if not future.cancelled():
                error = future.exception()
                then(None if error else future.result(), error)

        self._loop.run_in_executor(self._disk, work).add_done_callback(done)

    def _for(self, id_: int, work: Callable[[Incoming], Any], then: Callable[[Any], None]) -> None:
        """Work on a push that this host takes part in; one that fails ends the push here."""
        incoming = self._incoming.get(id_)
        if incoming is None:
            return

        def done(result: Any, error: BaseException | None) -> None:
            if self._incoming.get(id_) is not incoming:
                return  # it was ended meanwhile
            if error is not None:
                self.end(id_, outcome_of(error))
            else:
                then(result)

        self._in_background(lambda: work(incoming), done)

    # --- what the transfers want --------------------------------------------------------------------------------------

    def _take_in(self, id_: int, incoming: Incoming) -> None:
        def written(batch: list[tuple[int, Blob]], _: None, error: BaseException | None) -> None:
            if self._incoming.get(id_) is not incoming:
                return  # it was ended meanwhile
            if error is not None:
                self.end(id_, outcome_of(error))
                return
            done = self._shell.was_stored(id_, [index for index, _ in batch])
            now = self._loop.time()
            if done is not None and now >= self._progress_at.get(id_, 0.0):
                self._progress_at[id_] = now + _PROGRESS_EVERY
                self._shell.feed(events.Advanced(id_, done))

        def read(batch: list[int]) -> list[bytes | None]:
            return [incoming.read_or_none(index) for index in batch]

        def was_read(batch: list[int], blobs: list[bytes | None] | None, _: BaseException | None) -> None:
            read = zip(batch, blobs or [None] * len(batch), strict=True)
            self._shell.was_read(id_, [(index, blob, None) for index, blob in read])

        self._incoming[id_] = incoming
        lasts = {incoming.stream.head - 1, count_of(incoming.stream) - 1}
        self._writing[id_] = Batches(
            self._disk,
            incoming.write,
            written,
            most=written_most(incoming.stream.chunk),
            linger=_WRITE_LINGER,
            last=lambda items: not lasts.isdisjoint(map(itemgetter(0), items)),
        )
        self._reading[id_] = Batches(self._disk, read, was_read, most=_READ_MOST)

    def _let_go(self, id_: int) -> Incoming | None:
        self._folders.pop(id_, None)
        self._progress_at.pop(id_, None)
        self._writing.pop(id_, None)
        self._reading.pop(id_, None)
        return self._incoming.pop(id_, None)

    def read(self, id_: int, index: int) -> None:
        """A chunk from this host's own copy."""
        reading = self._reading.get(id_)
        if reading is None:
            self._shell.was_read(id_, [(index, None, None)])
        else:
            reading.add(index)

    def store(self, id_: int, chunks: Sequence[tuple[int, Blob]]) -> None:
        """Chunks to disk."""
        writing = self._writing.get(id_)
        if writing is not None:
            writing.add(*chunks)

    def headed(self, id_: int) -> None:
        """The listing is there: look at what it names."""
        self._for(id_, lambda incoming: incoming.headed(), lambda have: self._shell.was_headed(id_, have))

    def complete(self, id_: int) -> None:
        """The last chunk is stored: into place with it. The transfer goes on, for the hosts below."""

        def then(said: str) -> None:
            self._progress_at.pop(id_, None)
            self._finish(id_, Exited(0), Output(out=said.encode()))

        folder = self._folders.get(id_, "")

        def work(incoming: Incoming) -> str:
            incoming.finish()
            return self._said(folder, incoming)

        self._for(id_, work, then)

    def _said(self, folder: str, incoming: Incoming) -> str:
        """What came of a push that is through; before, what follows from it is seen to. Blocks."""
        if not incoming.dry_run:
            self._placed(folder, incoming.first)
        return incoming.said()

    def end(self, id_: int, outcome: Outcome, *, keep: bool = False) -> None:
        """Give a push up here: nothing of it stays, or with `keep` what has come, for one that goes on with it. What
        the hosts below lack still goes through here."""
        incoming = self._let_go(id_)
        self._shell.demote_transfer(id_)
        if incoming is not None:
            self._in_background(
                lambda: incoming.close(keep=keep), lambda _result, _error: self._finish(id_, outcome, NO_OUTPUT)
            )
        else:
            self._finish(id_, outcome, NO_OUTPUT)

    def forget(self, id_: int) -> None:
        """The root has its outcome: it need no longer be served."""
        incoming = self._let_go(id_)
        if incoming is not None:
            self._disk.submit(_close, incoming)

    async def close(self, ending: Ending, *, keep: bool) -> None:
        """End all of them, each by itself. With `keep` what has come stays for a push that goes on with it."""
        from agent.leaving import LET_GO_WITHIN

        self._trimming.cancel()
        for writing in self._writing.values():
            writing.drop()
        for reading in self._reading.values():
            reading.drop()
        parts = []
        for id_ in list(self._incoming):
            incoming = self._let_go(id_)
            if incoming is not None:
                closing = self._loop.run_in_executor(self._disk, partial(_end, incoming, keep=keep))
                parts.append(ending.part(f"push {id_}", closing, LET_GO_WITHIN))
        await asyncio.gather(*parts)
