"""What a push or pull brings, while it is gathered: chunks into files of the staging directory, and back from there or
from where these files are by now.

All functions block; the caller runs them in threads.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from agent.compare import Comparison, State
from agent.paths import BadDestination, Below
from agent.staging import Staging
from agent.walk import READ
from protocol.digest import content_digest
from protocol.listing import Entry, Kind, Listing, Map, parent_of, shown
from protocol.stream import Blob

#: Files of several chunks that are held open, for writing and for reading.
_OPEN_MOST = 16
#: Room on the disk is reserved for so much of a large file at first, in bytes, and for the rest at once where that took
#: less than so many seconds, as on most file systems: a full disk is known then before anything has come. On a tmpfs it
#: takes 20 ms for 64 MB, in which nothing would be asked for: there it goes on step by step, ahead of what is written.
_RESERVED, _QUICK = 8 << 20, 0.001
#: Pieces of one write; Linux takes 1,024 (writev(2), IOV_MAX).
_IOV_MOST = 64
_MAKE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NOWHERE = (b"", -1)
_MAKE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def _umask() -> int:
    """This process's umask; asking for it with umask(2) would set it (proc(5), status)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next((int(line.split()[1], 8) for line in file if line.startswith("Umask:")), 0o777)


class Staged:
    """The files of one listing that are not right where they belong, in the staging directory."""

    def __init__(
        self,
        folder: int,
        listing: Listing,
        map_: Map,
        owners: tuple[tuple[int, int], ...],
        *,
        found: Comparison,
        staging: Staging,
    ) -> None:
        """`folder`, a descriptor, is where they belong; it stays the caller's, as `staging` does."""
        self.listing, self.owners, self.found, self.staging = listing, owners, found, staging
        self._large = 0
        self._map = map_
        #: Entries whose staged file has everything, and is dressed.
        self.done = bytearray(len(listing.entries))
        #: The directories below `folder`; used with the lock held.
        self.below, self.below_lock = Below(folder), threading.Lock()
        #: The staged directory that the last small file came to, by its path in the listing.
        self._inside = _NOWHERE
        self._umask = _umask()
        #: Whether that decides on the mode of what is made, and no access list.
        self._umask_counts = False
        #: Of large files: up to where there is room for them on the disk for certain.
        self._reserved: dict[int, int] = {}
        self._fds: dict[int, int] = {}
        self._lock = threading.Lock()

    # --- names, modes and times ---------------------------------------------------------------------------------------

    def name(self, index: int) -> bytes:
        """Where an entry is in the staging directory."""
        unit = self.found.unit_of[index]
        entries = self.listing.entries
        return b"%d" % unit + entries[index].path[len(entries[unit].path) :]

    def place(self, index: int) -> tuple[int, bytes]:
        """Where an entry belongs: a directory and a name. Called with `below_lock` held."""
        path = self.listing.entries[index].path
        above = parent_of(path)
        return self.below.directory(above), path[len(above) + 1 :] if above else path

    def dress(self, fd: int, entry: Entry, mode: int = -1) -> None:
        """Owner, attributes, mode and time of an open file, in this order: a change of owner takes set-user-ID bits
        away (chown(2)). `mode` is what it has for certain."""
        if entry.owner is not None:
            os.fchown(fd, *self.owners[entry.owner])
            mode = -1
        if entry.xattrs:
            set_attributes(fd, entry)
            mode = -1  # an access list changes it
        if entry.mode is None:
            entry_mode = 0o666 & ~self._umask if entry.kind is Kind.FILE else 0o777 & ~self._umask
        else:
            entry_mode = entry.mode
        if mode != entry_mode:
            os.fchmod(fd, entry_mode)
        if entry.mtime_ns is not None:
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    # --- chunks -------------------------------------------------------------------------------------------------------

    def prepare(self, large: int) -> None:
        """Make directories, and room for what has more than `large` bytes."""
        staging, entries, self._large = self.staging.make(), self.listing.entries, large
        self._umask_counts = not _has_default_acl(staging)
        directory = Kind.DIRECTORY
        for index in self.found.changing():
            entry = entries[index]
            if entry.kind is directory:
                with suppress(FileExistsError):
                    os.mkdir(self.name(index), 0o700, dir_fd=staging)
            elif entry.size > large and entry.data > large:
                fd = os.open(self.name(index), _MAKE, 0o600, dir_fd=staging)
                try:
                    os.ftruncate(fd, entry.size)
                    if entry.extents is None:
                        self._reserve_first(index, fd, entry.size)
                    for offset, length in entry.extents or ():
                        os.posix_fallocate(fd, offset, length)
                finally:
                    os.close(fd)

    def _reserve_first(self, index: int, fd: int, size: int) -> None:
        self._reserved[index] = 0
        began = time.perf_counter()
        self.reserve(index, fd, 1)
        if time.perf_counter() - began < _QUICK:
            self.reserve(index, fd, size)

    def reserve(self, index: int, fd: int, end: int) -> None:
        """Room on the disk for a large file's bytes up to `end`, and for those that come soon. Raises OSError."""
        reserved, size = self._reserved.get(index, end), self.listing.entries[index].size
        if reserved < end:
            upto = min(size, max(end, reserved + _RESERVED))
            os.posix_fallocate(fd, reserved, upto - reserved)
            self._reserved[index] = upto

    def write(self, chunks: Iterable[tuple[int, Blob]]) -> None:
        """Store data, each with where it begins in the listing's; digests are right. What follows each other in one
        file is written at once."""
        run = _Run(self)
        entries, states, done, right = self.listing.entries, self.found.states, self.done, State.RIGHT
        for begin, blob in chunks:
            view = memoryview(blob)
            for index, offset, start, length in self._map.pieces(begin, len(blob)):
                if states[index] != right and not done[index]:
                    entry, data = entries[index], view[start : start + length]
                    if length == entry.size:
                        self._whole(index, entry, data)
                    else:
                        run.add(index, offset, data)
        run.end()

    def _whole(self, index: int, entry: Entry, data: memoryview) -> None:
        """A file whose data is all there at once: four system calls, for there may be 50,000 such."""
        if entry.digest and content_digest(data) != entry.digest:
            raise OSError(errno.EIO, f"{shown(entry.path)} does not match its digest")
        mode = 0o600 if entry.mode is None else entry.mode & 0o777
        fd = self._make(index, entry, mode)
        try:
            written = os.write(fd, data)
            if written < entry.size:
                write_all(fd, data[written:], written)
            self.dress(fd, entry, mode & ~self._umask if self._umask_counts else -1)
        finally:
            os.close(fd)
        self.done[index] = 1

    def whole(self, index: int, parts: list[memoryview], length: int) -> bool:
        """Write a file whose parts came in several chunks, if they are all of a small one."""
        entry = self.listing.entries[index]
        if length != entry.size or length > self._large:
            return False
        self._whole(index, entry, memoryview(b"".join(parts)))
        return True

    def _make(self, index: int, entry: Entry, mode: int) -> int:
        """A new staged file. Its directory stays open for the next one, which most likely is beside it."""
        above, _, name = entry.path.rpartition(b"/")
        unit = self.found.unit_of[index]
        with self._lock:
            if unit == index:
                folder, name = self.staging.make(), b"%d" % unit
            elif above == self._inside[0]:
                folder = self._inside[1]
            else:
                path = b"%d" % unit + above[len(self.listing.entries[unit].path) :]
                folder = os.open(path, _FOLDER, dir_fd=self.staging.make())
                self._leave()
                self._inside = above, folder
            try:
                return os.open(name, _MAKE_NEW, mode, dir_fd=folder)
            except FileExistsError:  # left by an earlier push, and not right
                os.unlink(name, dir_fd=folder)
                return os.open(name, _MAKE_NEW, mode, dir_fd=folder)

    def _leave(self) -> None:
        if self._inside[1] >= 0:
            os.close(self._inside[1])
        self._inside = _NOWHERE

    def take(self, folder: int) -> None:
        """Instead of chunks: the files of the same listing that are in place below `folder`, a descriptor, each under
        its other name (a hard link), or copied where that can't be."""
        entries, there = self.listing.entries, Below(folder)
        try:
            for index in self.found.changing():
                entry = entries[index]
                if entry.kind is Kind.FILE:
                    above = parent_of(entry.path)
                    name = entry.path[len(above) + 1 :] if above else entry.path
                    self._take(index, entry, there.directory(above), name)
        finally:
            there.close()

    def _take(self, index: int, entry: Entry, parent: int, name: bytes) -> None:
        staging, staged = self.staging.make(), self.name(index)
        with suppress(FileNotFoundError):
            os.unlink(staged, dir_fd=staging)
        try:
            os.link(name, staged, src_dir_fd=parent, dst_dir_fd=staging, follow_symlinks=False)
            self.done[index] = 1
        except OSError as error:
            if error.errno not in (errno.EMLINK, errno.EPERM, errno.EXDEV, errno.ENOTSUP):
                raise
            self._copy(index, entry, os.open(name, READ, dir_fd=parent))

    def _copy(self, index: int, entry: Entry, source: int) -> None:
        try:
            with self.file(index) as fd:
                for offset, length in ((0, entry.size),) if entry.extents is None else entry.extents:
                    at, end = offset, offset + length
                    while at < end:
                        data = os.pread(source, min(1 << 20, end - at), at)
                        if not data:
                            raise OSError(errno.EIO, f"{shown(entry.path)} became shorter")
                        write_all(fd, data, at)
                        at += len(data)
        finally:
            os.close(source)

    def read(self, begin: int, length: int) -> bytes:
        """So much of the listing's data. Raises OSError. Whoever reads it sees by its digest whether it is right."""
        parts = []
        for index, offset, _, part in self._map.pieces(begin, length):
            with self.file(index, reading=True) as fd:
                parts.append(os.pread(fd, part, offset))
        return b"".join(parts)

    @contextmanager
    def file(self, index: int, *, reading: bool = False) -> Iterator[int]:
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
        return os.open(self.name(index), _MAKE, 0o600, dir_fd=self.staging.make())

    def _open_read(self, index: int) -> int:
        if self.found.states[index] != State.RIGHT and self.staging.fd is not None:
            with suppress(FileNotFoundError):  # it is in its place
                return os.open(self.name(index), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.staging.fd)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with self.below_lock:
            try:
                parent, name = self.place(index)
                return os.open(name, flags, dir_fd=parent)
            except BadDestination as error:
                raise OSError(errno.ELOOP, str(error)) from error

    def close(self) -> None:
        """Let go of all descriptors."""
        self._leave()
        while self._fds:
            os.close(self._fds.popitem()[1])
        self.below.close()


class _Run:
    """Data that goes to one place in one file, in as few calls as there can be."""

    def __init__(self, staged: Staged) -> None:
        self._staged = staged
        self._entry, self._begin, self._end = -1, 0, 0
        self._views: list[memoryview] = []

    def add(self, entry: int, offset: int, data: memoryview) -> None:
        if (entry, offset) != (self._entry, self._end) or len(self._views) >= _IOV_MOST:
            self.end()
            self._entry, self._begin = entry, offset
        self._views.append(data)
        self._end = offset + len(data)

    def end(self) -> None:
        if not self._views:
            return
        views, self._views = self._views, []
        if self._begin == 0 and self._staged.whole(self._entry, views, self._end):
            return
        with self._staged.file(self._entry) as fd:
            self._staged.reserve(self._entry, fd, self._end)
            written = os.pwritev(fd, views, self._begin)
            for view in views:  # what one call left, as a disk that becomes full leaves it
                if written < len(view):
                    write_all(fd, view[max(written, 0) :], self._begin + max(written, 0))
                written -= len(view)
                self._begin += len(view)


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of it, however little one call takes. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def set_attributes(file: int | str, entry: Entry) -> None:
    """Give a file, open or by a path that leads to it alone, an entry's extended attributes. Raises OSError."""
    for name, value in entry.xattrs:
        try:
            os.setxattr(file, name, value)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{shown(entry.path)} ({name})") from error


def _has_default_acl(folder: int) -> bool:
    """Whether what is made in a directory gets its mode from an access list of that directory (acl(5))."""
    try:
        return bool(os.getxattr(folder, "system.posix_acl_default"))
    except OSError:  # none, or the file system knows none
        return False
