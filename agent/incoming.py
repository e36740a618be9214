"""Files on their way in, on a host of a push and on the service node of a pull: chunks go to a staging directory, and
when all are there, each thing to its place by one rename. A destination holds the old file or the new one, never half.

What is promised of a disk that loses power: once a host says that it is done, everything is on disk under its name;
before that, each name has what it had or what it will have. A few files are synced one by one (fsync(2)), many together
with their file system (syncfs(2)), before any is renamed.

All functions block; the caller runs them in threads.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agent.compare import Comparison, Looker, State, check_room, has_content, has_holes, missing_chunks, owner_ids
from agent.paths import BadDestination, Below, open_folder
from agent.source import digest_of
from agent.staging import LISTING, Staging, key_of
from agent.walk import READ
from protocol import listing as listings
from protocol.commands import Stream
from protocol.listing import BadListing, Entry, Kind, Map, parent_of, shown
from protocol.stream import Blob, chunk_size, count_of, is_right

#: Files that are synced one by one; more are synced with all else on their file system, which is one call.
_SYNCED_EACH = 16
#: Files of several chunks that are held open, for writing and for reading.
_OPEN_MOST = 16
#: Changes that a dry run tells of one by one.
_TOLD = 200
_MAKE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def _umask() -> int:
    """This process's umask; asking for it with umask(2) would set it (proc(5), status)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next((int(line.split()[1], 8) for line in file if line.startswith("Umask:")), 0o777)


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
        first names that the listing must have.

        Raises BadDestination, OSError; nothing is changed by then.
        """
        self._stream = stream
        self._backup, self._by_time, self._exact, self.dry_run = backup, by_time, exact, dry_run
        self._only = only
        self._umask = _umask()
        self._found: Comparison | None = None
        self._head: dict[int, bytes] = {}
        self._listing_fd: int | None = None
        #: Entries whose staged file has everything; open files by entry.
        self._done = bytearray()
        self._fds: dict[int, int] = {}
        self._lock = threading.Lock()
        self._users = 0
        self._closing: bool | None = None
        self.finished = False
        self._folder = open_folder(folder)
        self._below = Below(self._folder)
        self._below_lock = threading.Lock()
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
            return self._look(b"".join(self._head[index] for index in range(self._stream.head)))

    def _adopt_head(self) -> None:
        """The head that an earlier push left, as far as it is right."""
        stream = self._stream
        with suppress(OSError):
            fd = os.open(LISTING, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._staging.fd)
            try:
                for index in range(stream.head):
                    blob = os.pread(fd, chunk_size(stream, index), index * stream.chunk)
                    if is_right(stream, index, blob):
                        self._head[index] = blob
                        self.have |= 1 << index
            finally:
                os.close(fd)

    def _look(self, packed: bytes) -> int:
        stream = self._stream
        try:
            self._listing = listings.unpack(packed)
        except BadListing as error:
            raise BadDestination(f"refused as a whole: {error}") from error
        if self._only is not None and self._only != {entry.path.partition(b"/")[0] for entry in self._listing.entries}:
            raise BadDestination("refused as a whole: it names other files than were asked for")
        self._map = Map(self._listing)
        head_bytes = stream.head * stream.chunk
        if stream.size not in ({head_bytes} if self.dry_run else {head_bytes + self._map.size}):
            raise BadDestination("refused as a whole: the stream and its listing do not agree")
        self._owners = owner_ids(self._listing)
        self._done = bytearray(len(self._listing.entries))
        looker = Looker(self._folder, self._listing, self._owners, self._is_right, self._by_time, self._exact)
        self._found = found = looker.look()
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
            is_right(stream, stream.head + i, b"".join(os.pread(fd, piece.length, piece.offset) for piece in pieces))
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
        found, entries = self._required, self._listing.entries
        there = 0
        if self._staging.adopted:
            for index in found.unit_of:
                with suppress(OSError):
                    there += (
                        os.stat(self._staged(index), dir_fd=self._staging.fd, follow_symlinks=False).st_blocks * 512
                    )
        check_room(self._folder, self._listing, found, there)
        staging = self._staging.make()
        for index in found.unit_of:
            entry = entries[index]
            if entry.kind is Kind.DIRECTORY:
                with suppress(FileExistsError):
                    os.mkdir(self._staged(index), 0o700, dir_fd=staging)
            elif entry.kind is Kind.FILE and entry.data > self._stream.chunk:
                fd = os.open(self._staged(index), _MAKE, 0o600, dir_fd=staging)
                try:
                    for offset, length in ((0, entry.size),) if entry.extents is None else entry.extents:
                        os.posix_fallocate(fd, offset, length)  # a full disk is known now, not in the middle
                    os.ftruncate(fd, entry.size)
                finally:
                    os.close(fd)

    def _head_to_disk(self) -> None:
        """The head for those who ask for it, and for who comes back after an interruption; no longer in memory."""
        if self._head:
            staging = self._staging.make()
            fd = os.open(LISTING, _MAKE, 0o600, dir_fd=staging)
            try:
                _write(fd, b"".join(self._head[index] for index in range(self._stream.head)), 0)
            except BaseException:
                os.close(fd)
                raise
            self._listing_fd = fd
            self._head.clear()

    @property
    def _required(self) -> Comparison:
        if self._found is None:
            raise OSError(errno.EINVAL, "the listing has not been looked at")
        return self._found

    # --- chunks -------------------------------------------------------------------------------------------------------

    def write(self, index: int, blob: Blob) -> None:
        """Store a chunk, whose digest is right."""
        with self._in_use():
            stream = self._stream
            if index < stream.head:
                self._head[index] = bytes(blob)
                return
            view, found = memoryview(blob), self._required
            for piece in self._map.pieces((index - stream.head) * stream.chunk, len(blob)):
                if found.states[piece.entry] != State.RIGHT and not self._done[piece.entry]:
                    entry = self._listing.entries[piece.entry]
                    data = view[piece.start : piece.start + piece.length]
                    if piece.length == entry.size:
                        self._whole(piece.entry, entry, data)
                    else:
                        with self._file(piece.entry) as fd:
                            _write(fd, data, piece.offset)

    def take(self, folder: int) -> None:
        """Instead of chunks: the files of the same listing that are in place below `folder`, a descriptor, each under
        its other name (a hard link), or copied where that can't be."""
        with self._in_use():
            found, entries, there = self._required, self._listing.entries, Below(folder)
            staging = self._staging.make() if found.units else -1
            try:
                for index in found.unit_of:
                    entry = entries[index]
                    if entry.kind is not Kind.FILE:
                        continue
                    above = parent_of(entry.path)
                    name, staged = entry.path[len(above) + 1 :] if above else entry.path, self._staged(index)
                    parent = there.directory(above)
                    with suppress(FileNotFoundError):
                        os.unlink(staged, dir_fd=staging)
                    try:
                        os.link(name, staged, src_dir_fd=parent, dst_dir_fd=staging, follow_symlinks=False)
                        self._done[index] = 1
                    except OSError as error:
                        if error.errno not in (errno.EMLINK, errno.EPERM, errno.EXDEV, errno.ENOTSUP):
                            raise
                        self._copy(index, entry, os.open(name, READ, dir_fd=parent))
            finally:
                there.close()

    def _copy(self, index: int, entry: Entry, source: int) -> None:
        try:
            with self._file(index) as fd:
                for offset, length in ((0, entry.size),) if entry.extents is None else entry.extents:
                    at, end = offset, offset + length
                    while at < end:
                        data = os.pread(source, min(1 << 20, end - at), at)
                        if not data:
                            raise OSError(errno.EIO, f"{shown(entry.path)} became shorter")
                        _write(fd, data, at)
                        at += len(data)
        finally:
            os.close(source)

    def read(self, index: int) -> bytes:
        """A chunk that is here. Raises OSError. Whoever reads it sees by its digest whether it is still right."""
        with self._in_use():
            stream = self._stream
            size = chunk_size(stream, index)
            if index < stream.head:
                if self._listing_fd is not None:
                    return os.pread(self._listing_fd, size, index * stream.chunk)
                return self._head.get(index, b"")
            parts = []
            for piece in self._map.pieces((index - stream.head) * stream.chunk, size):
                with self._file(piece.entry, reading=True) as fd:
                    parts.append(os.pread(fd, piece.length, piece.offset))
            return b"".join(parts)

    def _staged(self, index: int) -> bytes:
        """Where an entry is in the staging directory."""
        unit = self._required.unit_of[index]
        entries = self._listing.entries
        return b"%d" % unit + entries[index].path[len(entries[unit].path) :]

    def _whole(self, index: int, entry: Entry, data: memoryview) -> None:
        """A file whose data is all there at once."""
        if entry.digest:
            import hashlib

            if hashlib.sha256(data).digest() != entry.digest:
                raise OSError(errno.EIO, f"{shown(entry.path)} does not match its digest")
        staging = self._staging.make()
        path = self._staged(index)
        mode = 0o600 if entry.mode is None else entry.mode & 0o777
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, mode, dir_fd=staging)
        except FileExistsError:  # left by an earlier push, and not right
            os.unlink(path, dir_fd=staging)
            fd = os.open(path, flags, mode, dir_fd=staging)
        try:
            _write(fd, data, 0)
            self._dress(fd, entry, mode & ~self._umask)
        finally:
            os.close(fd)
        self._done[index] = 1

    def _dress(self, fd: int, entry: Entry, mode: int) -> None:
        """Owner, attributes, mode and time of an open file that has `mode` now, in this order: a change of owner takes
        set-user-ID bits away (chown(2))."""
        if entry.owner is not None:
            os.fchown(fd, *self._owners[entry.owner])
            mode = -1
        for name, value in entry.xattrs:
            os.setxattr(fd, name, value)
            mode = -1  # an access list changes it
        if entry.mode is None:
            entry_mode = 0o666 & ~self._umask if entry.kind is Kind.FILE else 0o777 & ~self._umask
        else:
            entry_mode = entry.mode
        if mode != entry_mode:
            os.fchmod(fd, entry_mode)
        if entry.mtime_ns is not None:
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    @contextmanager
    def _file(self, index: int, *, reading: bool = False) -> Iterator[int]:
        """A staged or placed file, open until the block ends."""
        with self._lock:
            fd = self._fds.get(index)
            if fd is None:
                fd = self._open_read(index) if reading else self._open_staged(index)
                while len(self._fds) >= _OPEN_MOST:
                    os.close(self._fds.pop(next(iter(self._fds))))
                self._fds[index] = fd
            fd = os.dup(fd)  # another thread may let go of the first
        try:
            yield fd
        finally:
            os.close(fd)

    def _open_staged(self, index: int) -> int:
        return os.open(self._staged(index), _MAKE, 0o600, dir_fd=self._staging.make())

    def _open_read(self, index: int) -> int:
        if self._required.states[index] != State.RIGHT and self._staging.fd is not None:
            with suppress(FileNotFoundError):  # it is in its place
                return os.open(self._staged(index), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._staging.fd)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with self._below_lock:
            try:
                parent, name = self._place(index)
                return os.open(name, flags, dir_fd=parent)
            except BadDestination as error:
                raise OSError(errno.ELOOP, str(error)) from error

    def _place(self, index: int) -> tuple[int, bytes]:
        """Where an entry goes: a directory and a name."""
        path = self._listing.entries[index].path
        above = parent_of(path)
        return self._below.directory(above), path[len(above) + 1 :] if above else path

    # --- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Put everything in its place. Raises OSError, BadDestination where something is in the way by now."""
        with self._in_use():
            if self.finished or self.dry_run:
                self.finished = True
                return
            found = self._required
            if found.units:
                self._complete(found)
                self._sync(found)
                with self._below_lock:
                    self._below.close()  # what was a directory when it was looked at may be a link now
                    for unit in found.units:
                        self._put(unit)
            with self._below_lock:
                for index in reversed(found.to_fix):
                    self._fix(index)
                if found.units:
                    self._sync_folders(found)
            self.finished = True
            self._staging.remove()

    def _complete(self, found: Comparison) -> None:
        """Make what has no data, and check and dress what came in parts."""
        entries, staging = self._listing.entries, self._staging.make()
        self._files = {entry.path: index for index, entry in enumerate(entries) if entry.kind is Kind.FILE}
        for index in found.unit_of:
            entry = entries[index]
            if self._done[index] or entry.kind is Kind.DIRECTORY:
                continue
            path = self._staged(index)
            if entry.kind is Kind.FILE:
                with self._file(index) as fd:
                    if os.fstat(fd).st_size != entry.size:
                        os.ftruncate(fd, entry.size)
                    if entry.digest and digest_of(fd, entry) != entry.digest:
                        raise OSError(errno.EIO, f"{shown(entry.path)} does not match its digest")
                    self._dress(fd, entry, -1)
                continue
            with suppress(FileNotFoundError):
                os.unlink(path, dir_fd=staging)  # left by an earlier push
            if entry.kind is Kind.LINK:
                os.symlink(entry.target, path, dir_fd=staging)
                self._dress_link(path, staging, entry)
            else:
                self._link(entry, path, staging, found)
        for index in reversed(list(found.unit_of)):
            if entries[index].kind is Kind.DIRECTORY:
                fd = os.open(self._staged(index), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=staging)
                try:
                    self._dress(fd, entries[index], -1)
                finally:
                    os.close(fd)

    def _link(self, entry: Entry, path: bytes, staging: int, found: Comparison) -> None:
        """Another name of a file that is staged, or in its place already."""
        first = self._files[entry.target]
        if found.states[first] == State.RIGHT:
            with self._below_lock:
                parent, name = self._place(first)
                os.link(name, path, src_dir_fd=parent, dst_dir_fd=staging, follow_symlinks=False)
        else:
            os.link(self._staged(first), path, src_dir_fd=staging, dst_dir_fd=staging, follow_symlinks=False)

    def _dress_link(self, path: bytes, folder: int, entry: Entry) -> None:
        if entry.owner is not None:
            os.chown(path, *self._owners[entry.owner], dir_fd=folder, follow_symlinks=False)
        if entry.mtime_ns is not None:
            os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=folder, follow_symlinks=False)

    def _sync(self, found: Comparison) -> None:
        """What is staged to disk."""
        staging = self._staging.make()
        if len(found.unit_of) > _SYNCED_EACH:
            _syncfs(staging)
            return
        for index in reversed(list(found.unit_of)):
            if self._listing.entries[index].kind in (Kind.FILE, Kind.DIRECTORY):
                fd = os.open(self._staged(index), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=staging)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    def _sync_folders(self, found: Comparison) -> None:
        """The new names to disk."""
        folders = {parent_of(self._listing.entries[unit].path) for unit in found.units}
        if len(folders) > _SYNCED_EACH:
            _syncfs(self._folder)
            return
        for folder in sorted(folders):
            os.fsync(self._below.directory(folder))

    def _put(self, unit: int) -> None:
        parent, name = self._place(unit)
        staging, staged = self._staging.make(), self._staged(unit)
        if self._backup and self._required.states[unit] == State.OTHER:
            kept = b"kept"
            with suppress(FileNotFoundError):
                os.unlink(kept, dir_fd=staging)
            with suppress(FileNotFoundError):
                os.link(name, kept, src_dir_fd=parent, dst_dir_fd=staging, follow_symlinks=False)
                os.rename(kept, name + os.fsencode(self._backup), src_dir_fd=staging, dst_dir_fd=parent)
        os.rename(staged, name, src_dir_fd=staging, dst_dir_fd=parent)

    def _fix(self, index: int) -> None:
        """Mode, time and owner of what has the right content."""
        entry = self._listing.entries[index]
        parent, name = self._place(index)
        if entry.kind is Kind.LINK:
            self._dress_link(name, parent, entry)
            return
        # By the thing itself, which can be had whatever its mode is, and never by a link (open(2), O_PATH).
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            itself = f"/proc/self/fd/{fd}"
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                raise BadDestination(f"{shown(entry.path)} has become a symbolic link")
            if entry.owner is not None:
                os.chown(itself, *self._owners[entry.owner])
            if entry.mode is not None and (self._exact or entry.kind is Kind.FILE):
                os.chmod(itself, entry.mode)
            if entry.mtime_ns is not None and (self._exact or self._by_time):
                os.utime(itself, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    # --- words --------------------------------------------------------------------------------------------------------

    @property
    def unchanged(self) -> bool:
        """Whether every content was there already."""
        return self._found is not None and not self._found.units

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
        found = self._required
        total = len(found.states) - sum(entry.kind is Kind.DIRECTORY for entry in self._listing.entries)
        if self.dry_run:
            return self._would(found)
        if not found.units:
            return "unchanged"
        changed = sum(self._listing.entries[index].kind is not Kind.DIRECTORY for index in found.unit_of)
        return "pushed" if changed == total else f"pushed {changed} of {total}"

    def _would(self, found: Comparison) -> str:
        words = {State.NEW: "new", State.OTHER: "changed"}
        lines = [f"{words[State(found.states[i])]}: {shown(self._listing.entries[i].path)}" for i in found.unit_of]
        lines += [f"mode, time or owner: {shown(self._listing.entries[i].path)}" for i in found.to_fix]
        if not lines:
            return "nothing would change"
        more = len(lines) - _TOLD
        return "\n".join(lines[:_TOLD]) + (f"\nand {more} more" if more > 0 else "")

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

    def close(self, *, keep: bool = False) -> None:
        """Let go, once nothing is written or read any more. What is not in place then is removed, or with `keep` left
        for a push that goes on with it."""
        with self._lock:
            again = self._closing is not None
            self._closing = keep
            last = not again and not self._users
        if last:
            self._release()

    def discard(self) -> None:
        """Forget the listing, which may be megabytes; nothing but `close` is called any more."""
        self._listing = listings.NOTHING
        self._map = Map(self._listing)
        self._found, self._done = None, bytearray()

    def _release(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        if self._listing_fd is not None:
            os.close(self._listing_fd)
            self._listing_fd = None
        staging: Staging | None = getattr(self, "_staging", None)
        if staging is not None:
            if self._closing and not self.finished:
                staging.close()
            else:
                staging.remove()
        self._below.close()
        os.close(self._folder)


def _write(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _syncfs(fd: int) -> None:
    """syncfs(2), which Python has no name for."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def put(incoming: Incoming, stream: Stream, blobs: Iterable[bytes]) -> None:
    """A stream whose chunks are all at hand: into place with it, whatever of it is not there. Raises as Incoming does,
    and BadDestination where a chunk does not match its digest."""
    for index, blob in enumerate(blobs):
        if not is_right(stream, index, blob):
            raise BadDestination("the bytes in the command do not match its digests")
        if not incoming.have >> index & 1:
            incoming.write(index, blob)
    incoming.finish()
