"""Both ends of a console against what links do: what comes twice, late, or with a gap is told apart by its offset."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from agent.console import Console
from controller import api
from controller.console import ConsoleEnd
from protocol.limits import CONSOLE_WINDOW


class Line:
    """A connection to a service that answers with these replies."""

    def __init__(self, replies: Iterable[api.Reply] = ()) -> None:
        self._replies = iter((*replies, api.Settled()))
        self.sent: list[api.Request] = []

    def receive(self) -> api.Reply:
        return next(self._replies)

    def send(self, request: api.Request) -> None:
        self.sent.append(request)

    def close(self) -> None:
        pass


def piece(offset: int, data: bytes, stream: int = 1) -> api.Streamed:
    return api.Streamed(rank=0, stream=stream, offset=offset, data=data)


def end_of(line: Line) -> ConsoleEnd:
    return ConsoleEnd(line)  # type: ignore[arg-type]


def test_what_comes_twice_is_shown_once_and_after_a_gap_nothing_until_it_is_filled() -> None:
    line = Line([piece(0, b"abc"), piece(0, b"abc"), piece(5, b"fg"), piece(1, b"bcdef"), piece(6, b"g")])
    shown = bytearray()
    end_of(line).shown(shown.extend)
    assert bytes(shown) == b"abcdefg"


def test_what_was_typed_is_sent_again_until_it_is_taken() -> None:
    line = Line([piece(3, b"", stream=2)])
    end = end_of(line)
    end.type(b"hello")
    end.stay()
    typed = [request for request in line.sent if isinstance(request, api.Typed)]
    assert [(each.offset, each.data, each.again) for each in typed] == [
        *((0, b"hello", False), (0, b"hello", False), (0, b"", True)),
    ]
    end.shown(lambda data: None)
    assert not end.type(b"more")


def test_an_agent_takes_what_follows_on_what_it_took_and_says_how_far_it_came() -> None:
    told: list[tuple[int, int, bytes]] = []

    async def scenario() -> None:
        console = Console(lambda *what: told.append(what))
        for offset, data in ((0, b"ab"), (0, b"ab"), (4, b"ef"), (1, b"bcd"), (4, b"ef")):
            console.feed(offset, data, 0, again=False)
        assert bytes(console._typed) == b"abcdef"

    asyncio.run(scenario())
    assert told == [(2, taken, b"") for taken in (2, 2, 2, 4, 6)]


def test_an_agent_keeps_what_was_not_seen_and_shows_it_again_where_that_is_asked() -> None:
    told: list[tuple[int, int, bytes]] = []

    async def scenario() -> None:
        console = Console(lambda *what: told.append(what))
        console._unseen += b"0123456789"
        console.feed(0, b"", 4, again=True)
        console.feed(0, b"", 2, again=True)  # an older word
        console.feed(0, b"", 10**6, again=True)  # nobody has seen what was not shown
        assert not console._unseen

    asyncio.run(scenario())
    assert [what for what in told if what[0] == 1] == [(1, 4, b"456789"), (1, 4, b"456789")]


def test_no_more_is_typed_ahead_than_there_is_room_for() -> None:
    async def scenario() -> None:
        console = Console(lambda *what: None)
        for turn in range(40):
            console.feed(turn * 4096, bytes(4096), 0, again=False)
        assert len(console._typed) == 2 * CONSOLE_WINDOW

    asyncio.run(scenario())
