"""How conduits give way to commands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent.traffic import _PAUSE, Traffic
from protocol.limits import CONDUIT_TAKEN

_WITHIN_S = 20.0


class Member:
    def __init__(self) -> None:
        self.paused = False
        self.said: list[str] = []

    def pause(self) -> None:
        self.paused = True
        self.said.append("pause")

    def go_on(self) -> None:
        self.paused = False
        self.said.append("go on")

    def flush(self) -> None:
        self.said.append("flush")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def until(condition: Callable[[], bool]) -> None:
    deadline = asyncio.get_running_loop().time() + _WITHIN_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come to that"
        await asyncio.sleep(0.001)


def test_when_a_command_comes_by_a_pressed_host_nothing_is_read_for_a_moment_and_less_at_a_time_for_a_while() -> None:
    async def run() -> None:
        clock, member, late = Clock(), Member(), Member()
        traffic = Traffic(clock)
        traffic.pressed = True
        traffic.join(member)
        assert traffic.taken() == CONDUIT_TAKEN
        traffic.give_way()
        traffic.join(late)
        assert member.paused
        assert late.paused
        await until(lambda: not member.paused and not late.paused)
        assert traffic.taken() < CONDUIT_TAKEN
        clock.now += 1.0
        assert traffic.taken() == CONDUIT_TAKEN

    asyncio.run(run())


def test_beside_commands_without_end_half_of_the_time_is_left() -> None:
    async def run() -> None:
        clock, member = Clock(), Member()
        traffic = Traffic(clock)
        traffic.pressed = True
        traffic.join(member)
        begun = clock.now
        for count in range(40):
            clock.now = begun + 2 * _PAUSE * count / 40
            traffic.give_way()
        assert member.said == ["pause"]
        await until(lambda: not member.paused)
        clock.now = begun + 2 * _PAUSE
        traffic.give_way()
        assert member.said == ["pause", "go on", "pause"]
        await until(lambda: not member.paused)

    asyncio.run(run())


def test_who_has_something_to_send_is_flushed_once_and_who_has_left_is_not() -> None:
    first, second = Member(), Member()
    traffic = Traffic(Clock())
    for member in (first, second):
        traffic.join(member)
        traffic.unsent[member] = None
    traffic.leave(second)
    traffic.flush()
    traffic.flush()
    assert first.said == ["flush"]
    assert second.said == []


def test_who_has_left_is_not_woken_up() -> None:
    async def run() -> None:
        traffic, member, other = Traffic(Clock()), Member(), Member()
        traffic.pressed = True
        traffic.join(member)
        traffic.join(other)
        traffic.give_way()
        traffic.leave(member)
        await until(lambda: not other.paused)
        assert member.said == ["pause"]

    asyncio.run(run())


def test_where_there_is_time_for_all_nobody_pauses_and_less_is_taken_at_a_time() -> None:
    traffic, member = Traffic(Clock()), Member()
    traffic.join(member)
    traffic.give_way()
    assert member.said == []
    assert traffic.taken() < CONDUIT_TAKEN
