"""Files of this machine as one stream: what a push reads on the service node, and a pull on a host.

All functions block; the caller runs them in a thread.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from agent.paths import BadDestination, Below
from agent.walk import READ, BadSource, Walk, extents_of, xattrs
from protocol import listing as listings
from protocol.commands import Stream
from protocol.digest import content_digest, digester
from protocol.limits import MAX_INLINE, MAX_LISTING
from protocol.listing import BadListing, Entry, Kind, Listing, Map, shown
from protocol.stream import chunk_count, chunk_for
from protocol.wishes import Wishes

#: A listing up to this size rides in the command: a message that relays pass on in milliseconds.
LISTING_INLINE = 32 << 10
#: Of files that can't be taken, so many are named.
_NAMED = 10
#: Open files of a stream that is read by chunks.
_OPEN_MOST = 16
#: Data of several files up to this size is copied as it is digested, so that it is opened and read once: a chunk of
#: small files is hundreds of them.
_COPIED_MOST = 64 << 20
#: Small files are digested and copied together, so many bytes at a time.
_FED_AT_ONCE = 64 << 10
#: What is read of a file at a time, in bytes.
_READ_AT_ONCE = 1 << 20
_NEVER = threading.Event()
_SHORTER = "it became shorter while it was read"


class _Digester:
    """The digest of each chunk of what it is fed, and a copy of it where there is to be one."""

    def __init__(self, chunk: int, copied: BinaryIO | None) -> None:
        self._chunk, self._copied = chunk, copied
        self._left = chunk
        self._hash = digester()
        self._little: list[bytes] = []
        self._waiting = 0
        self.digests = bytearray()

    def feed(self, data: bytes) -> None:
        self._little.append(data)
        self._waiting += len(data)
        if self._waiting >= _FED_AT_ONCE:
            self._take()

    def _take(self) -> None:
        data = b"".join(self._little)
        self._little, self._waiting = [], 0
        if self._copied is not None:
            self._copied.write(data)
        view = memoryview(data)
        while view:
            part = view[: self._left]
            self._hash.update(part)
            self._left -= len(part)
            if not self._left:
                self._next()
            view = view[len(part) :]

    def _next(self) -> None:
        self.digests += self._hash.digest()
        self._hash, self._left = digester(), self._chunk

    def end(self) -> None:
        self._take()
        if self._left < self._chunk:
            self._next()


class Source:
    """A listing, the stream that it describes, and the stream's chunks."""

    def __init__(self, listing: Listing, stream: Stream, head: bytes, roots: Mapping[bytes, str]) -> None:
        """`head` is the packed listing; it is part of the stream where the stream has a head. `roots` are the paths
        here of the listing's first names. Opens them: raises OSError, BadSource."""
        self.listing, self.stream, self.packed = listing, stream, head
        self._roots = dict(roots)
        self._map = Map(listing)
        self._fds: dict[bytes, int] = {}
        self._below: dict[bytes, Below] = {}
        self._files: dict[int, int] = {}
        self._copy: int | None = None
        self._lock = threading.Lock()
        if stream.size not in (stream.head * stream.chunk, stream.head * stream.chunk + self._map.size):
            raise BadSource("the stream and its listing do not agree")

    @property
    def listing_digest(self) -> str:
        """The digest of the packed listing, in hexadecimal."""
        return content_digest(self.packed).hex()

    @property
    def inline_listing(self) -> bytes | None:
        """The packed listing where it is no part of the stream."""
        return None if self.stream.head else self.packed

    def read(self, index: int) -> bytes:
        """A chunk; of another length than it should be where the files have changed. Raises OSError."""
        stream = self.stream
        begin, length = index * stream.chunk, min(stream.chunk, stream.size - index * stream.chunk)
        if index < stream.head:
            return self.packed[begin : begin + length].ljust(length, b"\0")
        begin -= stream.head * stream.chunk
        with self._lock:
            if self._copy is not None:
                return os.pread(self._copy, length, begin)
            return b"".join(
                os.pread(self._file(entry), part, offset) for entry, offset, _, part in self._map.pieces(begin, length)
            )

    def _file(self, index: int) -> int:
        fd = self._files.get(index)
        if fd is None:
            while len(self._files) >= _OPEN_MOST:
                os.close(self._files.pop(next(iter(self._files))))
            fd = self._files[index] = _open_entry(self.listing.entries[index].path, self._root, self._below)
        return fd

    def _root(self, name: bytes) -> int:
        if name not in self._fds:
            self._fds[name] = os.open(self._roots[name], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        return self._fds[name]

    def save(self, path: Path) -> None:
        """Keep what `load` needs to read the same stream again."""
        from agent.identity import write_atomically

        write_atomically(path, msgspec.msgpack.encode((self.packed, self._roots, bool(self.stream.head))))

    @classmethod
    def load(cls, path: Path, stream: Stream) -> Source:
        """What was saved. Raises OSError where it is not to be had."""
        try:
            packed, roots, _ = msgspec.msgpack.decode(path.read_bytes(), type=tuple[bytes, dict[bytes, str], bool])
            return cls(listings.unpack(packed), stream, packed, roots)
        except (msgspec.DecodeError, BadListing, BadSource) as error:
            raise OSError(errno.EINVAL, str(error), str(path)) from error

    def rename(self, name: bytes) -> None:
        """Call the one file that this is something else on the other side. Raises BadSource where it is more."""
        if len(self.listing.entries) != 1 or self.stream.head or self.listing.entries[0].kind is not Kind.FILE:
            raise BadSource(f"{next(iter(self._roots.values()))} is no single file")
        (old,) = self._roots
        entry = msgspec.structs.replace(self.listing.entries[0], path=name)
        self.listing = Listing((entry,), self.listing.owners)
        self.packed = listings.pack(self.listing)
        self._roots = {name: self._roots[old]}
        self._fds = {name: self._fds[old]}

    def keep(self, copy: int | None, fds: dict[bytes, int], below: dict[bytes, Below]) -> None:
        """Take over what was opened while the stream was digested."""
        self._copy, self._fds, self._below = copy, fds, below

    def close(self) -> None:
        """Let go of all files."""
        with self._lock:
            for one in self._below.values():
                one.close()
            for fd in (*self._files.values(), *self._fds.values(), *([] if self._copy is None else [self._copy])):
                os.close(fd)
            self._below, self._files, self._fds, self._copy = {}, {}, {}, None


def _folder_of(path: bytes, root: Callable[[bytes], int], below: dict[bytes, Below]) -> int:
    """A listed directory, open until another one below its root is asked for."""
    first, _, rest = path.partition(b"/")
    if first not in below:
        below[first] = Below(root(first))
    try:
        return below[first].directory(rest)
    except BadDestination as error:
        raise OSError(errno.ELOOP, str(error)) from error


def _open_entry(path: bytes, root: Callable[[bytes], int], below: dict[bytes, Below]) -> int:
    """A listed file, for reading."""
    above, _, name = path.rpartition(b"/")
    return os.open(name, READ, dir_fd=_folder_of(above, root, below)) if above else os.dup(root(name))


def gather(
    roots: Sequence[tuple[bytes, str]],
    wishes: Wishes,
    scratch: Path,
    *,
    data: bool = True,
    digests: bool | None = None,
    stopped: threading.Event = _NEVER,
) -> Source:
    """List and digest what is at `roots` (names on the other side, and paths here).

    Without `data` the stream is the listing alone. With `digests` every file has its own digest in the listing, by
    default where there are several; `scratch` is a directory for a temporary copy. Once `stopped` is set it ends soon.
    Raises BadSource, OSError.
    """
    walk = Walk(wishes)
    fds: dict[bytes, int] = {}
    below: dict[bytes, Below] = {}
    copy: int | None = None
    try:
        for name, path in roots:
            try:
                fds[name] = walk.root(name, path)
            except OSError as error:
                walk.troubles.append(f"{path}: {error.strerror}")
            except BadSource as error:
                walk.troubles.append(str(error))
        _raise(walk.troubles)
        several = len(walk.entries) > 1 if digests is None else digests
        size = sum(entry.size for entry in walk.entries)
        chunk = chunk_for(size + MAX_LISTING if several else size)
        if several and 0 < size <= _COPIED_MOST:
            copy = _unlinked(scratch)
        with nullcontext() if copy is None else open(copy, "wb", closefd=False) as copied:
            digester = _Digester(chunk, copied)
            _Reader(walk, wishes, fds, below, digester, stopped, each=several).all()
            digester.end()
        _raise(walk.troubles)
        listing = Listing(tuple(walk.entries), walk.owners)
        packed = listings.pack(listing)
        source = Source(listing, _stream(listing, packed, chunk, digester, wishes, data=data), packed, dict(roots))
        source.keep(copy, fds, below)
        if 0 < source.stream.size <= MAX_INLINE and not source.stream.head:
            count = chunk_count(source.stream.size, chunk)
            inline = b"".join(source.read(index) for index in range(count))
            source.stream = msgspec.structs.replace(source.stream, inline=inline)
        elif not source.stream.size:
            source.stream = msgspec.structs.replace(source.stream, inline=b"")
    except BaseException:
        for one in below.values():
            one.close()
        for fd in (*fds.values(), *([] if copy is None else [copy])):
            os.close(fd)
        raise
    return source


def _raise(troubles: list[str]) -> None:
    if troubles:
        more = len(troubles) - _NAMED
        raise BadSource("; ".join(troubles[:_NAMED]) + (f"; and {more} more" if more > 0 else ""))


def _unlinked(folder: Path) -> int:
    fd, name = tempfile.mkstemp(dir=folder)
    os.unlink(name)
    return fd


def _stream(listing: Listing, packed: bytes, chunk: int, digester: _Digester, wishes: Wishes, *, data: bool) -> Stream:
    """The stream of what was digested, with the listing before it where that is long."""
    size, digests, head = listing.data if data else 0, bytes(digester.digests) if data else b"", 0
    if len(packed) > LISTING_INLINE:
        first = _Digester(chunk, None)
        head = chunk_count(len(packed), chunk)
        first.feed(packed.ljust(head * chunk, b"\0"))
        first.end()
        digests, size = bytes(first.digests) + digests, size + head * chunk
    digest = content_digest(digests).hex()
    return Stream(size=size, chunk=chunk, digests=digests, digest=digest, head=head, compress=wishes.compress)


@dataclass
class _Reader:
    """Reads all listed files once, for their digests and parts."""

    walk: Walk
    wishes: Wishes
    fds: dict[bytes, int]
    below: dict[bytes, Below]
    digester: _Digester
    stopped: threading.Event
    #: Whether each file gets a digest of its own.
    each: bool
    #: The directory of the file that was read last, most likely the next one's too.
    folder: tuple[bytes, int] = (b"", -1)

    def all(self) -> None:
        entries = self.walk.entries
        for index, entry in enumerate(entries):
            if self.stopped.is_set():
                raise BadSource("it was stopped")
            if entry.kind is Kind.FILE:
                try:
                    entries[index] = self._one(entry)
                except (OSError, BadSource) as error:
                    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                    self.walk.troubles.append(f"{shown(entry.path)}: {why}")

    def _one(self, entry: Entry) -> Entry:
        fd = self._open(entry.path)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BadSource("it changed while it was read")
            if entry.extents is not None:
                found = extents_of(fd, entry.size)
                entry = msgspec.structs.replace(entry, extents=None if found == ((0, entry.size),) else found)
            attributes = xattrs(fd) if self.wishes.xattrs else ()
            if entry.extents is None and entry.size <= _READ_AT_ONCE:
                digest = self._small(fd, entry.size)
            else:
                digest = self._large(fd, entry)
        finally:
            os.close(fd)
        if not digest and not attributes:
            return entry
        # Once for each of maybe 50,000: a third of the time that msgspec.structs.replace takes.
        return Entry(
            entry.path,
            entry.kind,
            entry.mode,
            entry.mtime_ns,
            entry.size,
            digest,
            entry.target,
            entry.owner,
            entry.extents,
            attributes,
        )

    def _open(self, path: bytes) -> int:
        above, _, name = path.rpartition(b"/")
        if not above:
            return os.dup(self.fds[name])
        if above != self.folder[0]:
            self.folder = above, _folder_of(above, self.fds.__getitem__, self.below)
        return os.open(name, READ, dir_fd=self.folder[1])

    def _small(self, fd: int, size: int) -> bytes:
        """Read all of a file at once. Its digest, where it gets one."""
        data = os.pread(fd, size, 0)
        if len(data) < size:
            raise BadSource(_SHORTER)
        self.digester.feed(data)
        return content_digest(data) if self.each else b""

    def _large(self, fd: int, entry: Entry) -> bytes:
        whole = digester() if self.each else None
        for data in _data(fd, entry):
            if self.stopped.is_set():
                raise BadSource("it was stopped")
            if whole is not None:
                whole.update(data)
            self.digester.feed(data)
        return b"" if whole is None else whole.digest()


def _data(fd: int, entry: Entry) -> Iterator[bytes]:
    """The data of an open file, in parts."""
    for offset, length in ((0, entry.size),) if entry.extents is None else entry.extents:
        at, end = offset, offset + length
        while at < end:
            data = os.pread(fd, min(_READ_AT_ONCE, end - at), at)
            if not data:
                raise BadSource(_SHORTER)
            at += len(data)
            yield data


def digest_of(fd: int, entry: Entry) -> bytes:
    """The digest of what of an open file would be `entry`'s data, as a listing has it. Raises BadSource, OSError."""
    found = digester()
    for data in _data(fd, entry):
        found.update(data)
    return found.digest()
