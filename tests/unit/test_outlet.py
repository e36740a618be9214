"""When a host sends what its command wrote, and when it gives back what it may send; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agent.outlet import Outlet
from protocol.limits import STREAM_DELAY, STREAM_FIRST, STREAM_IDLE, STREAM_LEAST, STREAM_PIECE
from protocol.messages import Grant


class _Timer:
    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at, self.call, self.cancelled = at, call, False

    def cancel(self) -> None:
        self.cancelled = True


class _Loop:
    """What an outlet uses of an event loop."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[_Timer] = []

    def call_later(self, delay: float, call: Callable[..., None], *args: Any) -> _Timer:
        self._timers.append(_Timer(self.now + delay, lambda: call(*args)))
        return self._timers[-1]

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while due := [timer for timer in self._timers if not timer.cancelled and timer.at <= end]:
            timer = min(due, key=lambda timer: timer.at)
            self._timers.remove(timer)
            self.now = timer.at
            timer.call()
        self.now = end


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> _Loop:
    made = _Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: made)
    return made


def _outlet() -> tuple[Outlet, list[tuple[int, int, int]]]:
    sent: list[tuple[int, int, int]] = []
    return Outlet(lambda stream, offset, data, *_: sent.append((stream, offset, len(data)))), sent


def test_a_command_that_writes_nothing_leaves_others_what_it_might_have_written(loop: _Loop) -> None:
    _, sent = _outlet()
    loop.advance(STREAM_IDLE / 2)
    assert sent == []
    loop.advance(10 * STREAM_IDLE)
    assert sent == [(2, STREAM_FIRST - STREAM_LEAST, 0)], "once"


def test_who_was_granted_much_and_stops_gives_it_back_and_who_writes_on_keeps_it(loop: _Loop) -> None:
    outlet, sent = _outlet()
    outlet.granted(Grant(1, STREAM_FIRST + STREAM_PIECE, 0, 0))
    for _ in range(20):
        outlet.write(1, b"line\n")
        loop.advance(STREAM_IDLE / 2)
    assert sent == [(1, 5 * number, 5) for number in range(20)]
    loop.advance(2 * STREAM_IDLE)
    assert sent[20:] == [(2, STREAM_FIRST + STREAM_PIECE - 100 - STREAM_LEAST, 0)]
    outlet.write(1, bytes(2 * STREAM_LEAST))
    loop.advance(STREAM_DELAY)
    assert sent[21:] == [(1, 100, STREAM_LEAST)], "no more than it kept"


def test_who_waits_for_room_or_has_ended_gives_back_nothing(loop: _Loop) -> None:
    waits, sent = _outlet()
    waits.write(1, bytes(STREAM_FIRST + 1))
    ended, last = _outlet()
    ended.end()
    closed, none = _outlet()
    closed.close()
    loop.advance(10 * STREAM_IDLE)
    assert sent == [(1, 0, STREAM_FIRST)]
    assert (last, none) == ([], [])
