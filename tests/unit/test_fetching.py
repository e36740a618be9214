"""A pull's fetch believes nothing that a host says: it asks, checks and stores, or gives the host up."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.incoming import Incoming
from agent.packing import Packer
from agent.source import Source, gather
from controller.fetching import Failed, Fetch, Unwritable
from protocol import codec
from protocol.commands import Offered, Stream
from protocol.limits import ASK_WINDOW, CHUNK
from protocol.listing import PACKED_MOST, Entry, Kind, Listing, pack
from protocol.messages import Ask, Beat, Chunk, Have, Message, NoChunk
from protocol.stream import Blob, count_of
from protocol.wishes import Wishes

OFFER = 7


class Bench:
    """A fetch of what is at `top`, and a host that the test plays."""

    def __init__(self, top: Path, out: Path, *, only: frozenset[bytes] | None = None, compress: bool = True) -> None:
        self.source: Source = gather([(b"top", str(top))], Wishes(times=False), out.parent)
        self.out, self.notes, self.only = out, out.parent / "notes", only
        self.notes.mkdir()
        self.out.mkdir()
        self.asked: list[int] = []
        self.most = 0
        stream = self.source.stream
        self.offered = Offered(stream.digest, self.source.listing_digest, stream.size, 1)
        self.fetch = Fetch(
            OFFER,
            self.offered,
            send=self._sent,
            make=self._make,
            on_thread=self._now,
            advanced=lambda _: None,
            compress=compress,
        )

    def _make(self, stream: Stream, listing: bytes | None) -> Incoming:
        return Incoming(str(self.out), stream, listing, self.notes, only=self.only)

    def _now(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)
        return done

    def _sent(self, frames: Sequence[Blob]) -> None:
        message, _ = codec.decode(frames)
        assert isinstance(message, Ask)
        self.asked += message.indices
        self.most = max(self.most, len(self.asked))

    async def say(self, message: Message, blob: bytes | None = None) -> None:
        self.fetch.heard(codec.encode(message, blob))
        for _ in range(3):  # what was done on a thread is heard of on the next turns
            await asyncio.sleep(0)

    async def have(self, **changes: Any) -> None:
        stream = msgspec.structs.replace(self.source.stream, inline=None, **changes)
        await self.say(Have(OFFER, stream, self.source.inline_listing))

    async def give(self) -> None:
        while self.asked:
            index = self.asked.pop(0)
            await self.say(Chunk(OFFER, index), self.source.read(index))

    def close(self) -> None:
        if isinstance(self.fetch.store, Incoming):
            self.fetch.store.close()
        self.source.close()


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A directory whose listing is long and whose data has many chunks."""
    made = tmp_path / "top"
    made.mkdir()
    for number in range(700):
        (made / f"{number}").write_bytes(os.urandom(40))
    (made / "z").write_bytes(os.urandom((ASK_WINDOW + 3) * CHUNK))
    return made


def play(top: Path, part: Callable[[Bench], Any], **options: Any) -> Bench:
    """Play a host's part, and end."""

    async def run() -> Bench:
        bench = Bench(top, top.parent / "out", **options)
        try:
            await part(bench)
        finally:
            bench.fetch.fail(Failed("the test is over"))
            bench.close()
        return bench

    return asyncio.run(run())


def test_everything_is_asked_for_within_the_credit_and_arrives(top: Path) -> None:
    async def part(bench: Bench) -> None:
        await bench.have()
        assert bench.asked == list(range(bench.source.stream.head))
        await bench.give()
        assert bench.fetch.result.done()
        assert bench.fetch.result.result() is bench.fetch.store

    bench = play(top, part)
    assert bench.most <= ASK_WINDOW
    there = bench.out / "top"
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {
        path.name: path.read_bytes() for path in top.iterdir()
    }


def failing(top: Path, part: Callable[[Bench], Any], error: type[Exception], why: str, **options: Any) -> None:
    """The part ends the fetch for this reason, and nothing is left of it."""

    async def whole(bench: Bench) -> None:
        await part(bench)
        with pytest.raises(error, match=why):
            await asyncio.wait_for(bench.fetch.result, 5)

    bench = play(top, whole, **options)
    assert list(bench.out.iterdir()) == []
    assert list(bench.notes.iterdir()) == []


def test_chunks_may_come_packed(top: Path) -> None:
    (top / "z").write_bytes(b"a line like all others\n" * 20_000)
    packer, frames = Packer(), 0

    async def part(bench: Bench) -> None:
        nonlocal frames
        await bench.have()
        while bench.asked:
            index = bench.asked.pop(0)
            frame = packer.pack(bench.source.read(index))
            frames += frame is not None
            await bench.say(Chunk(OFFER, index, frame is not None), frame or bench.source.read(index))
        assert bench.fetch.result.done()

    bench = play(top, part)
    assert frames > 3
    assert (bench.out / "top" / "z").read_bytes() == (top / "z").read_bytes()


@pytest.mark.parametrize(
    ("frame", "compress", "why"),
    [(b"no frame", True, "can't be unpacked"), (b"", True, "can't be unpacked"), (b"frame", False, "none was to be")],
)
def test_a_frame_that_is_bad_or_was_not_to_be_ends_it(top: Path, frame: bytes, compress: bool, why: str) -> None:
    async def part(bench: Bench) -> None:
        await bench.have()
        await bench.say(Chunk(OFFER, 0, True), frame)

    failing(top, part, Failed, why, compress=compress)


def test_a_chunk_that_does_not_match_its_digest_ends_it(top: Path) -> None:
    async def part(bench: Bench) -> None:
        await bench.have()
        blob = bytearray(bench.source.read(0))
        blob[-1] ^= 1
        await bench.say(Chunk(OFFER, 0), bytes(blob))

    failing(top, part, Failed, "does not match its digest")


def test_what_was_not_asked_for_ends_it(top: Path) -> None:
    async def unasked(bench: Bench) -> None:
        await bench.have()
        await bench.say(Chunk(OFFER, 30_000), b"x")

    async def early(bench: Bench) -> None:
        await bench.say(Chunk(OFFER, 0), b"x")

    async def of_another(bench: Bench) -> None:
        await bench.have()
        await bench.say(Chunk(OFFER + 1, 0), bench.source.read(0))

    async def twice(bench: Bench) -> None:
        await bench.have()
        await bench.have()

    for number, part in enumerate((unasked, early, of_another, twice)):
        place = top.parent / f"run{number}"
        place.mkdir()
        top = top.rename(place / "top")
        failing(top, part, Failed, "not asked for")


def test_a_message_that_no_host_sends_ends_it(top: Path) -> None:
    async def wrong(bench: Bench) -> None:
        await bench.say(Beat())

    failing(top, wrong, Failed, "a host does not send Beat there")


def test_bytes_that_are_no_message_end_it(top: Path) -> None:
    async def noise(bench: Bench) -> None:
        bench.fetch.heard([b"noise", os.urandom(50)])

    failing(top, noise, Failed, "malformed")


def test_a_host_that_declines_is_given_up(top: Path) -> None:
    async def part(bench: Bench) -> None:
        await bench.have()
        await bench.say(NoChunk(OFFER, 0, "gone", True))

    failing(top, part, Failed, "gone")


@pytest.mark.parametrize(
    "changes", [{"digest": "0" * 64}, {"size": 1}, {"digests": b""}, {"chunk": 1}, {"head": 30_000}]
)
def test_a_host_with_something_else_than_it_offered_is_given_up(top: Path, changes: dict[str, Any]) -> None:
    async def part(bench: Bench) -> None:
        await bench.have(**changes)

    failing(top, part, Failed, "something else than it offered")


def test_a_head_that_is_longer_than_any_listing_is_not_asked_for(top: Path) -> None:
    (top.parent / "file").write_bytes(bytes(PACKED_MOST + (1 << 20)))

    async def part(bench: Bench) -> None:
        await bench.have(head=count_of(bench.source.stream))  # which its digest does not vouch for
        assert bench.asked == []

    failing(top.parent / "file", part, Unwritable, "refused as a whole: the head")


def test_names_that_were_not_asked_for_are_not_written(top: Path) -> None:
    async def part(bench: Bench) -> None:
        await bench.have()
        await bench.give()

    failing(top, part, Unwritable, "other files than were asked for", only=frozenset({b"another"}))


@pytest.mark.parametrize("path", [b"../out2", b"/tmp/out2", b"top/../../out2"])
def test_a_listing_that_leads_out_of_its_folder_is_not_followed(top: Path, path: bytes) -> None:
    (top.parent / "small").write_bytes(b"x")

    async def part(bench: Bench) -> None:
        hostile = msgspec.msgpack.encode(Listing((Entry(path, Kind.FILE, 0o644, size=1),)))
        stream = msgspec.structs.replace(bench.source.stream, inline=None)
        await bench.say(Have(OFFER, stream, len(hostile).to_bytes(4, "big") + hostile))

    failing(top.parent / "small", part, Unwritable, "refused as a whole")
    assert not (top.parent / "out2").exists()


def test_a_listing_in_the_command_of_other_size_is_not_followed(top: Path) -> None:
    (top.parent / "small").write_bytes(b"x")

    async def part(bench: Bench) -> None:
        listing = pack(Listing((Entry(b"top", Kind.FILE, 0o644, size=1 << 40),)))
        stream = msgspec.structs.replace(bench.source.stream, inline=None)
        await bench.say(Have(OFFER, stream, listing))

    failing(top.parent / "small", part, Unwritable, "do not agree")


def test_a_host_that_says_nothing_is_given_up(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.fetching.SILENT_S", 0.05)

    async def part(bench: Bench) -> None:
        await bench.have()

    failing(top, part, Failed, "nothing came from it")
