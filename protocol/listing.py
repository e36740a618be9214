"""What a push or a pull is made of: entries below one folder, and where each file's bytes lie in the stream. Pure.

A stream is the packed listing, zeros up to a chunk's end, and then every file's data in the order of the listing. A
short listing travels beside the stream instead, so that a single file's stream is that file and nothing else.

    entries            stream (data)
    etc/               -
    etc/hosts  120 B   0..120
    etc/motd   0 B     -
    etc/image  1 GiB, data at 0+4096 and 8192+4096     120..4216, 4216..8312
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from enum import IntEnum
from typing import Annotated, NamedTuple

import msgspec

from protocol.limits import MAX_ENTRIES, MAX_EXTENTS, MAX_LISTING, MAX_PATH
from protocol.wishes import OwnerName

#: Linux's NAME_MAX (limits.h).
_NAME_MOST = 255
#: Of what a message about a bad entry shows.
_SHOWN = 200
_LENGTH = 4
#: Names that no file has.
_ODD = frozenset((b"", b".", b".."))

Place = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Raw = Annotated[bytes, msgspec.Meta(max_length=MAX_PATH)]


class BadListing(ValueError):
    """The listing will not be followed, not even in part; the text says why."""


class Kind(IntEnum):
    """What an entry is. Append; never renumber."""

    FILE = 0
    DIRECTORY = 1
    LINK = 2  # symbolic; made, never followed
    SAME = 3  # another name of a file earlier in the listing (a hard link)


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One name below the folder. Paths are bytes, as Linux has them.

    `mode` is the permission bits and `mtime_ns` nanoseconds since 1970, each None where the host is to choose. `size`
    is the file's length in bytes; `extents` (offset and length) are the parts of it that are data, None where all of it
    is. `digest` is the SHA-256 of its data; empty where the stream is this one file, whose chunks vouch for it.
    `target` is what a LINK says, or the path of the entry that a SAME is another name of. `owner` is an index into
    the listing's owners.
    """

    path: Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_PATH)]
    kind: Kind
    mode: Annotated[int, msgspec.Meta(ge=0, le=0o7777)] | None = None
    mtime_ns: Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)] | None = None
    size: Place = 0
    digest: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    target: Raw = b""
    owner: Place | None = None
    extents: tuple[tuple[Place, Place], ...] | None = None
    xattrs: tuple[
        tuple[Annotated[str, msgspec.Meta(max_length=255)], Annotated[bytes, msgspec.Meta(max_length=65_536)]], ...
    ] = ()

    @property
    def data(self) -> int:
        """How many bytes of the stream are this entry's."""
        if self.kind is not Kind.FILE:
            return 0
        return self.size if self.extents is None else sum(length for _, length in self.extents)


class Listing(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The entries, each directory before what is in it. `owners` are pairs of a user and a group, by name or number,
    empty where that one is not to change."""

    entries: Annotated[tuple[Entry, ...], msgspec.Meta(min_length=1, max_length=MAX_ENTRIES)]
    owners: Annotated[tuple[tuple[OwnerName, OwnerName], ...], msgspec.Meta(max_length=MAX_ENTRIES)] = ()

    @property
    def data(self) -> int:
        """How many bytes of data its files have."""
        return sum(entry.data for entry in self.entries)


NOTHING = Listing(())


def shown(path: bytes) -> str:
    """A path for people: one line, cut where it is very long."""
    text = path.decode("utf-8", "backslashreplace")
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def parent_of(path: bytes) -> bytes:
    """The path of the directory that an entry is in; empty where that is the folder itself."""
    return path.rpartition(b"/")[0]


def check(listing: Listing) -> None:
    """Raise BadListing unless every entry stays below the folder, whoever made the listing."""
    kinds: dict[bytes, Kind] = {}
    extents = 0
    for entry in listing.entries:
        path = entry.path
        above, slash, name = path.rpartition(b"/")
        if name in _ODD or len(name) > _NAME_MOST or b"\0" in name:
            _check_path(path)
        if slash and kinds.get(above) is not Kind.DIRECTORY:  # else it was looked at itself
            _check_path(path)
            what = "which is no directory" if above in kinds else "which is not listed before it"
            raise BadListing(f"{shown(path)} is below {shown(above)}, {what}")
        if path in kinds:
            raise BadListing(f"{shown(path)} is listed twice")
        if entry.owner is not None and entry.owner >= len(listing.owners):
            raise BadListing(f"{shown(path)} has an owner that is not listed")
        match entry.kind:
            case Kind.LINK:
                if not entry.target or b"\0" in entry.target:
                    raise BadListing(f"{shown(path)} is a symbolic link to nowhere")
            case Kind.SAME:
                if kinds.get(entry.target) is not Kind.FILE:
                    raise BadListing(f"{shown(path)} is another name of {shown(entry.target)}, no file before it")
            case Kind.FILE:
                if entry.extents is not None:
                    extents += len(entry.extents)
                    _check_extents(entry)
            case Kind.DIRECTORY:
                pass
        if entry.kind is not Kind.FILE and (entry.size or entry.extents is not None or entry.digest):
            raise BadListing(f"{shown(path)} is no file and has data")
        if len(entry.digest) not in (0, 32):
            raise BadListing(f"{shown(path)} has a digest of {len(entry.digest)} bytes")
        if entry.xattrs and any("\0" in name or "." not in name for name, _ in entry.xattrs):
            raise BadListing(f"{shown(path)} has an extended attribute whose name is none")
        kinds[path] = entry.kind
    if extents > MAX_EXTENTS:
        raise BadListing(f"its sparse files have {extents} parts, and {MAX_EXTENTS} are the most")


def _check_path(path: bytes) -> None:
    if path.startswith(b"/"):
        raise BadListing(f"{shown(path)} is an absolute path")
    if b"\0" in path:
        raise BadListing(f"{shown(path)} has a NUL byte")
    for part in path.split(b"/"):
        if part in _ODD:
            raise BadListing(f"{shown(path)} has a part {shown(part)!r}")
        if len(part) > _NAME_MOST:
            raise BadListing(f"{shown(path)} has a part of {len(part)} bytes, and {_NAME_MOST} are the most")


def _check_extents(entry: Entry) -> None:
    end = 0
    for offset, length in entry.extents or ():
        if offset < end or not length:
            raise BadListing(f"the parts of {shown(entry.path)} are not in order")
        end = offset + length
    if end > entry.size:
        raise BadListing(f"the parts of {shown(entry.path)} go beyond its end")


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Listing)


def pack(listing: Listing) -> bytes:
    """The listing as it travels: its length (4 bytes, big-endian) and MessagePack. Raises BadListing for one that
    nobody would take."""
    if len(listing.entries) > MAX_ENTRIES:
        raise BadListing(f"{len(listing.entries)} entries are too many: {MAX_ENTRIES} are the most at a time")
    check(listing)
    body = _encoder.encode(listing)
    if len(body) > MAX_LISTING:
        raise BadListing(f"a list of {len(body)} bytes is too long, {MAX_LISTING} are the most: push fewer at a time")
    return len(body).to_bytes(_LENGTH, "big") + body


def unpack(data: bytes) -> Listing:
    """The listing that `data` begins with; behind it may be zeros, up to a chunk's end. Raises BadListing."""
    length = int.from_bytes(data[:_LENGTH], "big")
    if length > MAX_LISTING:
        raise BadListing(f"a list of {length} bytes is too long, {MAX_LISTING} are the most")
    if len(data) < _LENGTH + length or data[_LENGTH + length :].strip(b"\0"):
        raise BadListing("the list is cut short, or has more behind it")
    try:
        listing: Listing = _decoder.decode(memoryview(data)[_LENGTH : _LENGTH + length])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadListing(f"the list is malformed: {error}") from error
    check(listing)
    return listing


class Piece(NamedTuple):
    """A part of a chunk that lies in one file: `length` bytes at `start` of the chunk, at `offset` of entry `entry`."""

    entry: int
    offset: int
    start: int
    length: int


class Map:
    """Where the bytes of a stream lie in the files of its listing."""

    def __init__(self, listing: Listing) -> None:
        self._entries = listing.entries
        #: Entries with data, and where in the stream's data each of them begins.
        self._files, self._starts = array("L"), array("Q")
        at = 0
        for index, entry in enumerate(listing.entries):
            data = entry.size if entry.extents is None else entry.data  # of what is no file, 0
            if data:
                self._files.append(index)
                self._starts.append(at)
                at += data
        #: How many bytes of data there are.
        self.size = at

    def pieces(self, begin: int, length: int) -> Iterator[Piece]:
        """The parts that `length` bytes of data from `begin` on are made of, in order."""
        end = min(begin + length, self.size)
        which = bisect_right(self._starts, begin) - 1
        at = begin
        while at < end:
            index = self._files[which]
            entry = self._entries[index]
            inside, last = at - self._starts[which], min(end, self._starts[which] + entry.data)
            if entry.extents is None:
                yield Piece(index, inside, at - begin, last - at)
            else:
                yield from self._sparse(index, entry.extents, inside, at - begin, last - at)
            at = last
            which += 1

    @staticmethod
    def _sparse(
        index: int, extents: tuple[tuple[int, int], ...], inside: int, start: int, length: int
    ) -> Iterator[Piece]:
        before = 0
        for offset, size in extents:
            if before + size > inside and length:
                skipped = max(0, inside - before)
                part = min(size - skipped, length)
                yield Piece(index, offset + skipped, start, part)
                start, length, inside = start + part, length - part, inside + part
            before += size

    def span(self, index: int) -> tuple[int, int]:
        """Where in the stream's data entry `index`, which has some, begins and ends."""
        start = self._starts[bisect_right(self._files, index) - 1]
        return start, start + self._entries[index].data
