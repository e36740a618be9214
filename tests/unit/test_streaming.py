"""Outcomes and the output that they wait for."""

from __future__ import annotations

import asyncio

from controller.streaming import Recorded, Streaming
from protocol.flow import Window
from protocol.outcomes import Exited, Fold, Output


def test_an_outcome_is_told_after_the_last_piece_of_its_output_and_not_before() -> None:
    told: list[Recorded] = []

    async def run() -> list[list[Recorded]]:
        streaming = Streaming([0], 100, Window(), grant=lambda _: None, tell=told.extend)
        fold = Fold(b"\x01", Exited(0), Output(b"", b"", 6, 0))
        seen = [streaming.outcomes([fold], [7])]
        assert streaming.arrived(0, 1, 0, b"abc") == b"abc"
        streaming.passed_on()
        seen.append(list(told))
        assert streaming.arrived(0, 1, 3, b"def") == b"def"
        seen.append(list(told))
        streaming.passed_on()
        streaming.unread()
        return [*seen, told]

    assert asyncio.run(run()) == [[], [], [], [(7, b"\x01")]]
