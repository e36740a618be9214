"""Files on their way in, on a host of a push and on the service node of a pull: chunks go to a staging directory, and
when all are there, each thing to its place by one rename (agent.placing). A destination holds the old file or the new
one, never half.

All functions block; the caller runs them in threads.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from agent.compare import Comparison, Looker, check_room, has_content, has_holes, missing_chunks, owner_ids
from agent.paths import BadDestination, open_folder
from agent.placing import Placing
from agent.staged import Staged, write_all
from agent.staging import LISTING, Staging, key_of
from protocol import listing as listings
from protocol.commands import Stream
from protocol.listing import PACKED_MOST, BadListing, Listing, Map
from protocol.stream import Blob, chunk_count, chunk_size, count_of, is_right

#: How long whoever lets go waits for what is being written, in seconds: once a push is said to have ended nothing of it
#: stays, unless a disk hangs.
_RELEASED_WITHIN_S = 10.0
_MAKE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class Incoming:
    """What one push or pull brings here."""

    def __init__(
        self,
        folder: str,
        stream: Stream,
        listing: bytes | None,
        notes: Path,
        *,
        backup: str = "",
        by_time: bool = False,
        exact: bool = False,
        dry_run: bool = False,
        only: frozenset[bytes] | None = None,
    ) -> None:
        """`listing` is the packed listing, None where it is the stream's head. `notes` is where the notes of staging
        directories are. With `backup`, what is replaced is kept under its name and that suffix. See Looker for
        `by_time` and `exact`. With `dry_run` nothing is changed and nothing but the head is wanted. `only` are the
        first names that the listing must have; who made it is not trusted then, and unless `exact` no file of theirs
        runs as another user.

        Raises BadDestination, OSError; nothing is changed by then.
        """
        if stream.head > chunk_count(PACKED_MOST, stream.chunk):  # memory for all of it is taken with its first chunk
            raise BadDestination("refused as a whole: the head of the stream is longer than any list of files")
        self._stream = stream
        self._backup, self._by_time, self._exact, self.dry_run = backup, by_time, exact, dry_run
        self._only = only
        self._found: Comparison | None = None
        self._staged: Staged | None = None
        #: The stream's head, as far as it has come, in one piece: the listing is read where it lies.
        self._head = bytearray()
        self._head_came: set[int] = set()
        self._listing_fd: int | None = None
        self._lock = threading.Lock()
        self._users = 0
        self._closing: bool | None = None
        self._released = threading.Event()
        self.finished = False
        self._folder = open_folder(folder)
        #: The chunks that are here already (bit i: chunk i); all of the head before anything else is known.
        self.have = 0
        try:
            self._staging = Staging(notes, key_of(folder, stream, listing), folder, self._folder)
            if listing is not None:
                self.have = self._look(listing)
            elif self._staging.adopted:
                self._adopt_head()
        except BaseException:
            self.close()
            raise

    # --- looking ------------------------------------------------------------------------------------------------------

    def headed(self) -> int:
        """The head is there: look at what it lists. The chunks that are here already.

        Raises BadDestination, OSError.
        """
        with self._in_use():
            return self._look(self._head)

    def _adopt_head(self) -> None:
        """The head that an earlier push left, as far as it is right."""
        stream = self._stream
        with suppress(OSError):
            fd = os.open(LISTING, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._staging.fd)
            try:
                for index in range(stream.head):
                    blob = os.pread(fd, chunk_size(stream, index), index * stream.chunk)
                    if is_right(stream, index, blob):
                        self._keep_head(index, blob)
                        self.have |= 1 << index
            finally:
                os.close(fd)

    def _look(self, packed: bytes | bytearray) -> int:
        stream = self._stream
        try:
            self._listing = listings.unpack(packed)
        except BadListing as error:
            raise BadDestination(f"refused as a whole: {error}") from error
        if self._only is not None and self._only != {entry.path.partition(b"/")[0] for entry in self._listing.entries}:
            raise BadDestination("refused as a whole: it names other files than were asked for")
        if self._only is not None and not self._exact:
            self._listing = _without_special_bits(self._listing)
        self._map = Map(self._listing)
        head_bytes = stream.head * stream.chunk
        if stream.size not in ({head_bytes} if self.dry_run else {head_bytes + self._map.size}):
            raise BadDestination("refused as a whole: the stream and its listing do not agree")
        owners = owner_ids(self._listing)
        looker = Looker(self._folder, self._listing, owners, self._is_right, self._by_time, self._exact)
        self._found = found = looker.look()
        self._staged = Staged(self._folder, self._listing, self._map, owners, found=found, staging=self._staging)
        count = count_of(stream) - stream.head
        if self.dry_run:
            return (1 << count_of(stream)) - 1
        missing = missing_chunks(self._listing, self._map, found, stream.chunk, count)
        if found.units:
            self._prepare()
        if self._staging.adopted:
            for index in range(count):
                if missing[index] and self._is_here(index + stream.head):
                    missing[index] = 0
        if found.units:
            self._head_to_disk()
        have = int.from_bytes(
            bytes(sum((not missing[i + bit]) << bit for bit in range(min(8, count - i))) for i in range(0, count, 8)),
            "little",
        )
        return have << stream.head | (1 << stream.head) - 1

    def _is_right(self, index: int, fd: int) -> bool:
        entry = self._listing.entries[index]
        if entry.digest:
            return has_content(entry, fd)
        stream = self._stream
        if entry.data != self._map.size or not has_holes(entry, fd):
            return False
        return all(
            is_right(stream, stream.head + i, b"".join(os.pread(fd, length, offset) for _, offset, _, length in pieces))
            for i, pieces in (
                (i, self._map.pieces(i * stream.chunk, stream.chunk)) for i in range(count_of(stream) - stream.head)
            )
        )

    def _is_here(self, index: int) -> bool:
        try:
            return is_right(self._stream, index, self.read(index))
        except OSError:
            return False

    def _prepare(self) -> None:
        """The staging directory, its own directories, and room for what is large."""
        found, staged = self._required, self._to_stage
        there = 0
        if self._staging.adopted:
            for index in found.changing():
                with suppress(OSError):
                    info = os.stat(staged.name(index), dir_fd=self._staging.fd, follow_symlinks=False)
                    there += info.st_blocks * 512
        check_room(self._folder, self._listing, found, there)
        staged.prepare(self._stream.chunk)

    def _head_to_disk(self) -> None:
        """The head for those who ask for it, and for who comes back after an interruption; no longer in memory."""
        if self._head:
            staging = self._staging.make()
            fd = os.open(LISTING, _MAKE, 0o600, dir_fd=staging)
            try:
                write_all(fd, self._head, 0)
            except BaseException:
                os.close(fd)
                raise
            self._listing_fd = fd
            self._head = bytearray()

    @property
    def _required(self) -> Comparison:
        if self._found is None:
            raise OSError(errno.EINVAL, "the listing has not been looked at")
        return self._found

    @property
    def _to_stage(self) -> Staged:
        if self._staged is None:
            raise OSError(errno.EINVAL, "the listing has not been looked at")
        return self._staged

    # --- chunks -------------------------------------------------------------------------------------------------------

    def write(self, chunks: Iterable[tuple[int, Blob]]) -> None:
        """Store chunks, whose digests are right."""
        with self._in_use():
            stream, staged = self._stream, self._staged
            data = []
            for index, blob in chunks:
                if staged is None or index < stream.head:
                    self._keep_head(index, blob)
                else:
                    data.append(((index - stream.head) * stream.chunk, blob))
            if staged is not None:
                staged.write(data)

    def _keep_head(self, index: int, blob: Blob) -> None:
        stream = self._stream
        if index >= stream.head:
            raise OSError(errno.EINVAL, "a chunk came before the listing was looked at")
        if self._found is None and index not in self._head_came:  # else it is in use
            self._head = self._head or bytearray(stream.head * stream.chunk)
            self._head[index * stream.chunk : (index + 1) * stream.chunk] = blob
            self._head_came.add(index)

    def take(self, folder: int) -> None:
        """Instead of chunks: the files of the same listing that are in place below `folder`, a descriptor."""
        with self._in_use():
            self._to_stage.take(folder)

    def read(self, index: int) -> bytes:
        """A chunk that is here. Raises OSError. Whoever reads it sees by its digest whether it is still right."""
        with self._in_use():
            stream = self._stream
            size = chunk_size(stream, index)
            if index < stream.head:
                if self._listing_fd is not None:
                    return os.pread(self._listing_fd, size, index * stream.chunk)
                begin = index * stream.chunk
                return bytes(self._head[begin : begin + size]) if index in self._head_came else b""
            return self._to_stage.read((index - stream.head) * stream.chunk, size)

    def read_or_none(self, index: int) -> bytes | None:
        """The same, None where it can't be read."""
        try:
            return self.read(index)
        except OSError:
            return None

    # --- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Put everything in its place. Raises OSError, BadDestination where something is in the way by now."""
        with self._in_use():
            if self.finished or self.dry_run:
                self.finished = True
                return
            placing = Placing(self._folder, self._to_stage, self._backup, self._exact)
            placing.finish()
            self.finished = True
            self._staging.remove()

    # --- words --------------------------------------------------------------------------------------------------------

    @property
    def stream(self) -> Stream:
        """The stream."""
        return self._stream

    @property
    def listing(self) -> bytes:
        """The packed listing, once it is there."""
        return listings.pack(self._listing)

    @property
    def first(self) -> str:
        """The listing's first name."""
        return os.fsdecode(self._listing.entries[0].path)

    def said(self) -> str:
        """What came of it, in words that fold: `pushed`, `unchanged`, `pushed 3 of 10`; of a dry run what would."""
        return self._required.would(self._listing) if self.dry_run else self._required.said(self._listing)

    # --- letting go ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Nothing is closed before the block ends."""
        with self._lock:
            if self._closing is not None:
                raise OSError(errno.EBADF, "the push is over here")
            self._users += 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._closing is not None and not self._users
        if last:
            self._release()

    def close(self, *, keep: bool = False) -> bool:
        """Let go, once nothing is written or read any more, and wait for that; whether it came to that. What is not in
        place then is removed, or with `keep` left for a push that goes on with it."""
        with self._lock:
            again = self._closing is not None
            self._closing = keep
            last = not again and not self._users
        if last:
            self._release()
        return self._released.wait(_RELEASED_WITHIN_S)

    def discard(self) -> None:
        """Forget the listing, which may be megabytes; nothing but `close` is called any more."""
        self._listing = listings.NOTHING
        self._map = Map(self._listing)
        self._found = None
        self._head = bytearray()

    def _release(self) -> None:
        if self._staged is not None:
            self._staged.close()
            self._staged = None
        if self._listing_fd is not None:
            os.close(self._listing_fd)
            self._listing_fd = None
        staging: Staging | None = getattr(self, "_staging", None)
        if staging is not None:
            if self._closing and not self.finished:
                staging.close()
            else:
                staging.remove()
        os.close(self._folder)
        self._released.set()


def _without_special_bits(listing: Listing) -> Listing:
    """The listing without set-user-ID, set-group-ID and sticky bits."""
    if not any(entry.mode is not None and entry.mode & 0o7000 for entry in listing.entries):
        return listing
    entries = (
        entry if entry.mode is None else msgspec.structs.replace(entry, mode=entry.mode & 0o777)
        for entry in listing.entries
    )
    return Listing(tuple(entries), listing.owners)


def put(incoming: Incoming, stream: Stream, blobs: Iterable[bytes]) -> None:
    """A stream whose chunks are all at hand: into place with it, whatever of it is not there. Raises as Incoming does,
    and BadDestination where a chunk does not match its digest."""
    for index, blob in enumerate(blobs):
        if not is_right(stream, index, blob):
            raise BadDestination("the bytes in the command do not match its digests")
        if not incoming.have >> index & 1:
            incoming.write([(index, blob)])
    incoming.finish()
