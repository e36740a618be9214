"""Listings: what they may name, how they travel, and where files' bytes lie in a stream."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import listing as listings
from protocol.limits import MAX_ENTRIES, MAX_LISTING
from protocol.listing import BadListing, Entry, Kind, Listing, Map

D, F, L, S = Kind.DIRECTORY, Kind.FILE, Kind.LINK, Kind.SAME


def listing(*entries: Entry, owners: tuple[tuple[str, str], ...] = ()) -> Listing:
    return Listing(entries, owners)


#: As short listings are read, and as long ones are.
EITHER_WAY = (MAX_LISTING, 0)


def test_a_listing_travels_and_may_have_zeros_behind_it() -> None:
    whole = listing(
        Entry(b"a", D, 0o755),
        Entry(b"a/b", F, 0o4711, -7, 10, b"d" * 32, owner=0, extents=((0, 3), (5, 2)), xattrs=(("user.x", b"\xff"),)),
        Entry(b"a/\xff\n", L, target=b"../../etc"),
        Entry(b"a/c", S, target=b"a/b"),
        owners=(("root", ""),),
    )
    packed = listings.pack(whole)
    for data, above in itertools.product((packed, packed.ljust(1 << 18, b"\0")), EITHER_WAY):
        found = listings.unpack(data, packed_above=above)
        assert (tuple(found.entries), found.owners) == (whole.entries, whole.owners)
        assert listings.pack(found) == packed


def test_a_long_listing_is_the_same_from_wherever_it_is_looked_at() -> None:
    entries = (Entry(b"a", D), *(Entry(b"a/%05d" % i, F, 0o644, i, i, bytes(32)) for i in range(20_000)))
    packed = listings.pack(listing(*entries))
    found = listings.unpack(packed).entries
    assert not isinstance(found, tuple)
    assert len(found) == len(entries)
    assert list(found) == list(entries)
    for index in (0, 255, 256, 5_000, 256, 20_000, -1, -20_001):
        assert found[index] == entries[index]
    assert found[1_000:1_600:7] == list(entries[1_000:1_600:7])
    for index in (20_001, -20_002):
        with pytest.raises(IndexError):
            found[index]
    ends = [start.size for start in (found[300], found[20_000])]
    assert ends == [299, 19_999]
    assert Map(listings.unpack(packed)).size == sum(range(20_000))


@pytest.mark.parametrize("where", [1, 10_000, 20_000])
def test_a_long_listing_that_is_malformed_or_odd_anywhere_is_refused_whole(where: int) -> None:
    good = [msgspec.msgpack.encode(Entry(b"%05d" % i, F, 0o644, i, i, bytes(32))) for i in range(20_001)]
    for bad, why in (
        (b"\xc0", "malformed"),
        (msgspec.msgpack.encode([b"x", 9]), "malformed"),
        (msgspec.msgpack.encode([b"x" * 5_000, 0]), "malformed"),
        (msgspec.msgpack.encode(Entry(b"../x", F)), "part '..'"),
        (good[0], "twice"),
        (msgspec.msgpack.encode(Entry(b"x", F, owner=0)), "owner"),
    ):
        entries = b"".join([*good[:where], bad, *good[where + 1 :]])
        body = b"\x91\xdc" + len(good).to_bytes(2, "big") + entries
        with pytest.raises(BadListing, match=why):
            listings.unpack(len(body).to_bytes(4, "big") + body)


@pytest.mark.parametrize("nested", [b"\x91", b"\x81\xa1x"], ids=["arrays", "maps"])
@pytest.mark.parametrize("above", EITHER_WAY)
def test_an_entry_that_is_nested_deeper_than_python_goes_is_refused(nested: bytes, above: int) -> None:
    body = b"\x91\x91" + nested * 5_000 + b"\xc0"
    with pytest.raises(BadListing, match="malformed"):
        listings.unpack(len(body).to_bytes(4, "big") + body, packed_above=above)


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([Entry(b"/etc", D)], "absolute"),
        ([Entry(b"..", D)], "part '..'"),
        ([Entry(b"a", D), Entry(b"a/../../b", F)], "part '..'"),
        ([Entry(b"a", D), Entry(b"a/.", F)], "part '.'"),
        ([Entry(b"a", D), Entry(b"a//b", F)], "part ''"),
        ([Entry(b"a/", D)], "part ''"),
        ([Entry(b"a\0b", F)], "NUL"),
        ([Entry(b"a", D), Entry(b"a/\0/b", F)], "NUL"),
        ([Entry(b".", D)], "part '.'"),
        ([Entry(b"a", D), Entry(b"a/..", D)], "part '..'"),
        ([Entry(b"a" * 250, D), Entry(b"a" * 250 + b"/" + b"b" * 256, F)], "256 bytes"),
        ([Entry(b"x" * 256, F)], "256 bytes"),
        ([Entry(b"a", F), Entry(b"a", F)], "twice"),
        ([Entry(b"a", D), Entry(b"a", L, target=b"/etc")], "twice"),
        ([Entry(b"a", L, target=b"/etc"), Entry(b"a/passwd", F)], "no directory"),
        ([Entry(b"a", F), Entry(b"a/b", F)], "no directory"),
        ([Entry(b"a", F), Entry(b"b", S, target=b"a"), Entry(b"b/c", F)], "no directory"),
        ([Entry(b"a/b", F)], "not listed before"),
        ([Entry(b"a/b", F), Entry(b"a", D)], "not listed before"),
        ([Entry(b"a", S, target=b"/etc/passwd")], "no file before it"),
        ([Entry(b"a", L, target=b"/etc"), Entry(b"b", S, target=b"a")], "no file before it"),
        ([Entry(b"a", S, target=b"b"), Entry(b"b", F)], "no file before it"),
        ([Entry(b"a", L)], "to nowhere"),
        ([Entry(b"a", L, target=b"a\0b")], "to nowhere"),
        ([Entry(b"a", D, size=1)], "has data"),
        ([Entry(b"a", L, target=b"b", extents=())], "has data"),
        ([Entry(b"a", F, digest=b"x")], "digest of 1"),
        ([Entry(b"a", F, owner=0)], "owner that is not listed"),
        ([Entry(b"a", F, size=10, extents=((5, 2), (0, 2)))], "not in order"),
        ([Entry(b"a", F, size=10, extents=((0, 3), (2, 2)))], "not in order"),
        ([Entry(b"a", F, size=10, extents=((0, 0),))], "not in order"),
        ([Entry(b"a", F, size=10, extents=((8, 3),))], "beyond its end"),
        ([Entry(b"a", F, xattrs=(("user.\0", b""),))], "extended attribute"),
    ],
)
def test_a_listing_that_is_odd_anywhere_is_refused_whole(entries: list[Entry], why: str) -> None:
    bad = listing(Entry(b"good", F), *entries, Entry(b"good too", F))
    with pytest.raises(BadListing, match=why):
        listings.pack(bad)
    body = msgspec.msgpack.encode(bad)
    for above in EITHER_WAY:
        with pytest.raises(BadListing, match=why):
            listings.unpack(len(body).to_bytes(4, "big") + body, packed_above=above)


def test_a_listing_of_too_many_or_too_much_is_refused() -> None:
    many = Listing(tuple(Entry(b"%d" % number, F) for number in range(MAX_ENTRIES + 1)))
    with pytest.raises(BadListing, match="too many"):
        listings.pack(many)
    body = msgspec.msgpack.encode(many)
    with pytest.raises(BadListing, match="malformed"):
        listings.unpack(len(body).to_bytes(4, "big") + body)
    with pytest.raises(BadListing, match="too long"):
        listings.pack(listing(*(Entry(b"%d" % i, L, target=b"x" * 4_000) for i in range(MAX_LISTING // 4_000 + 1))))
    with pytest.raises(BadListing, match="too long"):
        listings.unpack(b"\xff\xff\xff\xff" + b"x" * 100)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.sampled_from(EITHER_WAY))
def test_whatever_comes_is_a_listing_or_refused(data: bytes, above: int) -> None:
    for raw in (data, len(data).to_bytes(4, "big") + data):
        with contextlib.suppress(BadListing):
            listings.check(listings.unpack(raw, packed_above=above))


def test_a_listing_that_is_cut_short_or_goes_on_is_refused() -> None:
    packed = listings.pack(listing(Entry(b"a", F)))
    for wrong in (packed[:-1], packed + b"x", packed[:3], b""):
        with pytest.raises(BadListing):
            listings.unpack(wrong)


_parts = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=4)


@st.composite
def _files(draw: Any) -> list[Entry]:
    entries = []
    for number in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            entries.append(Entry(b"%d" % number, F, size=draw(st.integers(0, 20))))
        else:
            at, extents = 0, []
            for gap, length in draw(_parts):
                extents.append((at + gap, length))
                at += gap + length
            entries.append(Entry(b"%d" % number, F, size=at + 3, extents=tuple(extents)))
    return entries


@settings(derandomize=True, deadline=None, max_examples=200)
@given(_files(), st.integers(1, 12))
def test_the_pieces_of_all_chunks_are_the_data_of_all_files_once(entries: list[Entry], chunk: int) -> None:
    whole = listing(*entries)
    listings.check(whole)
    places = Map(whole)
    assert places.size == whole.data
    wanted = [
        (index, offset + at)
        for index, entry in enumerate(entries)
        for offset, length in (((0, entry.size),) if entry.extents is None else entry.extents)
        for at in range(length)
    ]
    found = []
    for begin in range(0, max(places.size, 1), chunk):
        at = 0
        for index, offset, start, length in places.pieces(begin, chunk):
            assert start == at
            at += length
            found += [(index, offset + i) for i in range(length)]
        assert at == min(chunk, places.size - begin)
    assert found == wanted
    for index, entry in enumerate(entries):
        if entry.data:
            begin, end = places.span(index)
            assert {place[0] for place in found[begin:end]} == {index}
            assert end - begin == entry.data
