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
from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import pairwise
from operator import eq
from typing import Annotated

import msgspec

from protocol.limits import MAX_ENTRIES, MAX_EXTENTS, MAX_LISTING, MAX_PATH
from protocol.packed import Packed
from protocol.wishes import OwnerName

#: Linux's NAME_MAX (limits.h).
_NAME_MOST = 255
#: Of what a message about a bad entry shows.
_SHOWN = 200
_LENGTH = 4
#: A packed listing's bytes at most.
PACKED_MOST = _LENGTH + MAX_LISTING
#: Entries of a listing above so many bytes are decoded when they are looked at. Decoded, an entry takes four times as
#: much memory as packed; of a listing of this size that is 5 MB.
_PACKED_ABOVE = 1 << 20
#: Paths that are looked at together.
_PATHS_AT_ONCE = 4_096
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


_FILE, _DIRECTORY = Kind.FILE, Kind.DIRECTORY  # found faster than a class's: a listing is gone through several times
#: Lengths of a file's digest: none, or that of `protocol.digest`.
_DIGESTS = (0, 32)


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One name below the folder. Paths are bytes, as Linux has them.

    `mode` is the permission bits and `mtime_ns` nanoseconds since 1970, each None where the host is to choose. `size`
    is the file's length in bytes; `extents` (offset and length) are the parts of it that are data, None where all of it
    is. `digest` is the digest of its data; empty where the stream is this one file, whose chunks vouch for it.
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


_Owners = Annotated[tuple[tuple[OwnerName, OwnerName], ...], msgspec.Meta(max_length=MAX_ENTRIES)]
_Some = msgspec.Meta(min_length=1, max_length=MAX_ENTRIES)


class Listing(msgspec.Struct, frozen=True, array_like=True):
    """The entries, each directory before what is in it. `owners` are pairs of a user and a group, by name or number,
    empty where that one is not to change."""

    entries: Sequence[Entry]
    owners: _Owners = ()

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
    entries = listing.entries
    _check_paths([entry.path for entry in entries])
    directories, inside = {b""}, b""
    extents, owners, named = 0, len(listing.owners), False
    for entry in entries:
        above = entry.path.rpartition(b"/")[0]
        if above != inside:  # else it was seen with the entry before
            if above not in directories:
                before = (other.path for other in entries[: entries.index(entry)])
                what = "which is no directory" if above in before else "which is not listed before it"
                raise BadListing(f"{shown(entry.path)} is below {shown(above)}, {what}")
            inside = above
        if entry.owner is not None and entry.owner >= owners:
            raise BadListing(f"{shown(entry.path)} has an owner that is not listed")
        if entry.xattrs and any("\0" in name or "." not in name for name, _ in entry.xattrs):
            raise BadListing(f"{shown(entry.path)} has an extended attribute whose name is none")
        if entry.kind is _FILE:
            if len(entry.digest) not in _DIGESTS:
                raise BadListing(f"{shown(entry.path)} has a digest of {len(entry.digest)} bytes")
            if entry.extents is not None:
                extents += len(entry.extents)
                _check_extents(entry)
        else:
            _check_no_file(entry)
            if entry.kind is _DIRECTORY:
                directories.add(entry.path)
            named = named or entry.kind is Kind.SAME
    if extents > MAX_EXTENTS:
        raise BadListing(f"its sparse files have {extents} parts, and {MAX_EXTENTS} are the most")
    if named:
        _check_names(entries)


def _check_paths(paths: list[bytes]) -> None:
    """Many at once, since there may be 50,000: each part is between two slashes, and between two paths is one NUL.
    Leaves them sorted."""
    for at in range(0, len(paths), _PATHS_AT_ONCE):
        some = paths[at : at + _PATHS_AT_ONCE]
        joined = b"".join((b"/", b"/\0/".join(some), b"/"))
        odd = b"//" in joined or b"/./" in joined or b"/../" in joined or joined.count(b"\0") >= len(some)
        for path in some:
            if odd or len(path) > _NAME_MOST:
                _check_path(path)
    paths.sort()
    if any(map(eq, paths, paths[1:])):
        twice = next(path for path, after in pairwise(paths) if path == after)
        raise BadListing(f"{shown(twice)} is listed twice")


def _check_no_file(entry: Entry) -> None:
    if entry.size or entry.extents is not None or entry.digest:
        raise BadListing(f"{shown(entry.path)} is no file and has data")
    if entry.kind is Kind.LINK and (not entry.target or b"\0" in entry.target):
        raise BadListing(f"{shown(entry.path)} is a symbolic link to nowhere")


def _check_names(entries: Sequence[Entry]) -> None:
    """Further names are those of files before them."""
    files: set[bytes] = set()
    for entry in entries:
        if entry.kind is _FILE:
            files.add(entry.path)
        elif entry.kind is Kind.SAME and entry.target not in files:
            raise BadListing(f"{shown(entry.path)} is another name of {shown(entry.target)}, no file before it")


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


class _Whole(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A listing as it travels."""

    entries: Annotated[tuple[Entry, ...], _Some]
    owners: _Owners = ()


class _Raw(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The same, with nothing in it looked at."""

    entries: Annotated[tuple[msgspec.Raw, ...], _Some]
    owners: msgspec.Raw = msgspec.Raw()


_encoder = msgspec.msgpack.Encoder(enc_hook=list)  # of Packed
_decoder, _raw_decoder = msgspec.msgpack.Decoder(_Whole), msgspec.msgpack.Decoder(_Raw)
_entries_decoder, _owners_decoder = msgspec.msgpack.Decoder(tuple[Entry, ...]), msgspec.msgpack.Decoder(_Owners)
#: The first byte of an array whose length the next two bytes say (MessagePack's array 16).
_ARRAY = b"\xdc"


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


def unpack(data: bytes | bytearray, *, packed_above: int = _PACKED_ABOVE) -> Listing:
    """The listing that `data`, which must stay as it is, begins with; behind it may be zeros, up to a chunk's end. Of
    more than `packed_above` bytes the entries stay packed. Raises BadListing."""
    length = int.from_bytes(data[:_LENGTH], "big")
    if length > MAX_LISTING:
        raise BadListing(f"a list of {length} bytes is too long, {MAX_LISTING} are the most")
    if len(data) < _LENGTH + length or data[_LENGTH + length :].strip(b"\0"):
        raise BadListing("the list is cut short, or has more behind it")
    body = memoryview(data)[_LENGTH : _LENGTH + length]
    try:
        listing = _read(body) if length <= packed_above else _read_packed(body)
        check(listing)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadListing(f"the list is malformed: {error}") from error
    return listing


def _read(body: memoryview) -> Listing:
    whole = _decoder.decode(body)
    return Listing(whole.entries, whole.owners)


def _read_packed(body: memoryview) -> Listing:
    """The same where entries stay packed. Those that are malformed raise when they are looked at, as `check` does."""
    raw = _raw_decoder.decode(body)
    sizes = array("L", map(len, raw.entries))
    owners = _owners_decoder.decode(raw.owners) if len(raw.owners) else ()
    begin = len(body) - len(raw.owners) - sum(sizes)  # behind two arrays' first bytes, however they were written
    return Listing(Packed(body, begin, sizes, _some_entries), owners)


def _some_entries(count: int, packed: memoryview) -> tuple[Entry, ...]:
    return _entries_decoder.decode(b"".join((_ARRAY, count.to_bytes(2, "big"), packed)))


#: A part of a chunk that lies in one file: the entry, where in its file, where in the chunk, how many bytes.
Piece = tuple[int, int, int, int]


class Map:
    """Where the bytes of a stream lie in the files of its listing."""

    def __init__(self, listing: Listing) -> None:
        self._entries = listing.entries
        #: Entries with data, and where in the stream's data each of them begins; behind the last, where that ends.
        self._files, self._starts = array("L"), array("Q")
        at = 0
        for index, entry in enumerate(listing.entries):
            data = entry.size if entry.extents is None else entry.data  # of what is no file, 0
            if data:
                self._files.append(index)
                self._starts.append(at)
                at += data
        self._starts.append(at)
        #: How many bytes of data there are.
        self.size = at

    def pieces(self, begin: int, length: int) -> Iterator[Piece]:
        """The parts that `length` bytes of data from `begin` on are made of, in order."""
        files, starts, entries = self._files, self._starts, self._entries
        end = min(begin + length, self.size)
        which = bisect_right(starts, begin) - 1
        at = begin
        while at < end:
            index, start = files[which], starts[which]
            which += 1
            last = min(end, starts[which])
            extents = entries[index].extents
            if extents is None:
                yield index, at - start, at - begin, last - at
            else:
                yield from self._sparse(index, extents, at - start, at - begin, last - at)
            at = last

    @staticmethod
    def _sparse(
        index: int, extents: tuple[tuple[int, int], ...], inside: int, start: int, length: int
    ) -> Iterator[Piece]:
        before = 0
        for offset, size in extents:
            if before + size > inside and length:
                skipped = max(0, inside - before)
                part = min(size - skipped, length)
                yield index, offset + skipped, start, part
                start, length, inside = start + part, length - part, inside + part
            before += size

    def span(self, index: int) -> tuple[int, int]:
        """Where in the stream's data entry `index`, which has some, begins and ends."""
        which = bisect_right(self._files, index) - 1
        return self._starts[which], self._starts[which + 1]
