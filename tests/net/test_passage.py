"""The channels of a move: bytes arrive whole and in order both ways, nobody holds more than a window, and an end that
breaks the rules is cut off."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

import pytest

from agent.moveways import pair
from agent.passage import Broken, Forbidding, Passage, Sift
from protocol.limits import CARRY_MOST, CARRY_WINDOW, MOVE_CHANNELS
from protocol.messages import Carry, LeadsTo, Message, Open, Room, Shut

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
WITHIN = 30.0


class Two:
    """Two ends of a link that is as fast as the loop, and what each led to."""

    def __init__(self, sift: Callable[[bytes], bytes] | None = None) -> None:
        self.far: asyncio.Queue[Ends] = asyncio.Queue()
        self._sift = sift
        self._ends: list[asyncio.StreamWriter] = []
        self.sent: list[Message] = []
        loop = asyncio.get_running_loop()

        def up(message: Message, blob: bytes | None) -> None:
            self.sent.append(message)
            loop.call_soon(self.there.heard, message, blob)

        def down(message: Message, blob: bytes | None) -> None:
            self.sent.append(message)
            loop.call_soon(self.here.heard, message, blob)

        self.here = Passage(1, up)
        self.there = Passage(1, down, leads=self._lead)

    async def _lead(self, to: LeadsTo) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Sift | None]:
        if to is LeadsTo.DISK:
            raise ConnectionRefusedError("nobody listens there")
        ours, theirs = await pair()
        self._ends.append(theirs[1])
        await self.far.put(theirs)
        return (*ours, self._sift)

    async def opened(self, to: LeadsTo = LeadsTo.MEMORY) -> tuple[Ends, asyncio.Task[None]]:
        ours, theirs = await pair()
        self._ends.append(theirs[1])
        return theirs, self.here.open(to, *ours)

    async def close(self) -> None:
        await self.here.close()
        await self.there.close()
        for end in self._ends:
            end.transport.abort()
        for _ in range(10):  # transports close in turns of the loop
            await asyncio.sleep(0)


def run(work: Callable[[], object]) -> None:
    async def within() -> None:
        await asyncio.wait_for(work(), WITHIN)  # type: ignore[arg-type]

    asyncio.run(within())


def test_bytes_arrive_whole_both_ways_and_each_way_ends_by_itself() -> None:
    async def work() -> None:
        two = Two()
        (reader, writer), task = await two.opened()
        far_reader, far_writer = await two.far.get()
        data = bytes(range(256)) * (3 * CARRY_WINDOW // 256)

        async def say(to: asyncio.StreamWriter) -> None:
            to.write(data)
            await to.drain()
            to.write_eof()

        heard = await asyncio.gather(reader.read(-1), far_reader.read(-1), say(writer), say(far_writer))
        assert [hashlib.sha256(one).digest() for one in heard[:2]] == [hashlib.sha256(data).digest()] * 2
        await task
        assert {type(message) for message in two.sent} == {Open, Carry, Room, Shut}
        await two.close()

    run(work)


def test_no_more_than_a_window_is_on_its_way_to_a_reader_that_reads_nothing() -> None:
    async def work() -> None:
        two = Two()
        (_, writer), _ = await two.opened()
        far_reader, _ = await two.far.get()
        writer.write(bytes(4 * CARRY_WINDOW))
        channel = two.here._channels[0]
        for _ in range(2_000):  # turns of the loop, not time
            await asyncio.sleep(0)
        taken = two.there._channels[0]._taken
        assert channel._sent <= taken + CARRY_WINDOW
        assert channel._sent < 4 * CARRY_WINDOW
        # And it goes on as soon as it is read.
        assert len(await far_reader.readexactly(4 * CARRY_WINDOW)) == 4 * CARRY_WINDOW
        await two.close()

    run(work)


def test_a_channel_that_leads_nowhere_ends_at_both_ends_and_says_why() -> None:
    async def work() -> None:
        two = Two()
        (reader, _), task = await two.opened(LeadsTo.DISK)
        assert await reader.read(1) == b""
        await asyncio.wait({task})
        assert two.there.trouble == "nobody listens there"
        # Others are not touched by that.
        (_, writer), _ = await two.opened()
        writer.write(b"on")
        far_reader, _ = await two.far.get()
        assert await far_reader.readexactly(2) == b"on"
        await two.close()

    run(work)


def test_what_must_not_pass_ends_its_channel() -> None:
    def sift(data: bytes) -> bytes:
        if b"evil" in data:
            raise Forbidding("it is evil")
        return data

    async def work() -> None:
        two = Two(sift)
        (reader, writer), task = await two.opened()
        far_reader, _ = await two.far.get()
        writer.write(b"good")
        assert await far_reader.readexactly(4) == b"good"
        writer.write(b"evil")
        assert await reader.read(1) == b""
        assert await far_reader.read(-1) == b""
        await asyncio.wait({task})
        assert two.there.trouble == "it is evil"
        await two.close()

    run(work)


HOSTILE: dict[str, tuple[Message, bytes | None]] = {
    "a channel out of turn": (Open(1, 5, LeadsTo.MEMORY), None),
    "a channel twice": (Open(1, 0, LeadsTo.MEMORY), None),
    "bytes of no channel": (Carry(1, 7), b"x"),
    "no bytes": (Carry(1, 0), b""),
    "a piece too large": (Carry(1, 0), bytes(CARRY_MOST + 1)),
    "room for what was not sent": (Room(1, 0, 1), None),
    "an end of no channel": (Shut(1, 7), None),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_who_breaks_the_rules_is_found_out(what: str) -> None:
    async def work() -> None:
        two = Two()
        two.there.heard(Open(1, 0, LeadsTo.MEMORY), None)
        await two.far.get()
        with pytest.raises(Broken):
            two.there.heard(*HOSTILE[what])
        await two.close()

    run(work)


def test_who_sends_beyond_the_window_or_after_the_end_is_found_out() -> None:
    async def work() -> None:
        two = Two()
        two.there.heard(Open(1, 0, LeadsTo.MEMORY), None)
        for _ in range(CARRY_WINDOW // CARRY_MOST):  # nothing is taken before the loop turns
            two.there.heard(Carry(1, 0), bytes(CARRY_MOST))
        with pytest.raises(Broken, match="more on channel 0"):
            two.there.heard(Carry(1, 0), b"x")
        two.there.heard(Open(1, 1, LeadsTo.MEMORY), None)
        two.there.heard(Shut(1, 1), None)
        with pytest.raises(Broken, match="more on channel 1"):
            two.there.heard(Carry(1, 1), b"x")
        await two.close()

    run(work)


def test_channels_are_opened_by_one_end_and_are_counted() -> None:
    async def work() -> None:
        two = Two()
        with pytest.raises(Broken):
            two.here.heard(Open(1, 0, LeadsTo.MEMORY), None)
        for _ in range(MOVE_CHANNELS):
            await two.opened()
            await two.far.get()
        ours, theirs = await pair()
        with pytest.raises(Broken, match="no more channels"):
            two.here.open(LeadsTo.MEMORY, *ours)
        two._ends += [ours[1], theirs[1]]
        await two.close()

    run(work)
