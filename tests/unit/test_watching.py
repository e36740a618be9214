"""Descriptors that are waited for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from agent.watching import Watching

DEADLINE_S = 30.0


def watched(test: Callable[[Watching, asyncio.Event], None]) -> None:
    """Run `test`, and the loop until it sets the event."""

    async def run() -> None:
        watching, over = Watching(), asyncio.Event()
        test(watching, over)
        await asyncio.wait_for(over.wait(), DEADLINE_S)
        watching.close()

    asyncio.run(run())


def test_a_call_comes_for_as_long_as_there_is_something_to_read() -> None:
    read, write = os.pipe()
    got: list[bytes] = []

    def test(watching: Watching, over: asyncio.Event) -> None:
        def call() -> None:
            got.append(os.read(read, 1))
            if not got[-1]:
                watching.remove(read)
                over.set()

        watching.add(read, call)
        os.write(write, b"ab")
        os.close(write)

    watched(test)
    os.close(read)
    assert got == [b"a", b"b", b""]


def test_whoever_was_removed_in_the_same_turn_is_not_called_and_nor_is_who_has_its_number_now() -> None:
    calls: list[str] = []

    def test(watching: Watching, over: asyncio.Event) -> None:
        pipes = [os.pipe() for _ in range(3)]

        def first_of_the_turn(own: int) -> Callable[[], None]:
            def call() -> None:
                calls.append("first")
                for read, _ in pipes:
                    watching.remove(read)
                for read, write in pipes:
                    if read != own:
                        os.close(read)
                        os.close(write)
                fresh, end = os.pipe()
                assert fresh in {read for read, _ in pipes}, "the number of one that was ready in this turn"
                watching.add(fresh, lambda: calls.append("of nothing to read"))
                asyncio.get_running_loop().call_later(0, over.set)
                assert end

            return call

        for read, write in pipes:
            os.write(write, b"x")
            watching.add(read, first_of_the_turn(read))

    watched(test)
    assert calls == ["first"]
