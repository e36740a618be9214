"""Outcomes and the output that they wait for, and input on its way to hosts."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from controller.shelf import DiskShelf
from controller.streaming import Recorded, Sending, Streaming
from protocol import ranks
from protocol.commands import Input
from protocol.feeding import InputWindow
from protocol.flow import Window
from protocol.limits import INPUT_CREDIT, INPUT_WINDOW
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


def test_an_input_that_cant_be_read_back_ends_its_command_once_and_sends_no_more(tmp_path: Path) -> None:
    given: list[tuple[int, int]] = []  # to which hosts, and up to where
    rooms: list[int] = []
    errors: list[OSError] = []
    window, shelf = InputWindow(), DiskShelf(tmp_path)

    def give(who: ranks.Ranks, piece: Input) -> None:
        given.append((who, piece.offset + len(piece.data)))

    sending = Sending(1, [0, 1], window, shelf, give=give, room=rooms.append, broken=errors.append)
    for rank in (0, 1):
        sending.taken(rank, 0, is_open=True, anew=True)
    sending.add(bytes(INPUT_WINDOW), last=False)
    for upto in range(INPUT_CREDIT, INPUT_WINDOW + 1, INPUT_CREDIT):
        sending.taken(0, upto, is_open=True, anew=False)
    assert rooms[-1] > INPUT_WINDOW, "some was put away, for the other host"
    assert shelf._file is not None
    os.truncate(shelf._file.fileno(), 0)
    given.clear()
    rooms.clear()
    for upto in range(INPUT_CREDIT // 4, INPUT_CREDIT + 1, INPUT_CREDIT // 4):
        sending.taken(1, upto, is_open=True, anew=False)
    sending.add(b"more", last=True)
    sending.over([Fold(ranks.pack(ranks.only(0)), Exited(0))])
    sending.taken(1, 0, is_open=True, anew=True)
    assert len(errors) == 1
    assert (given, rooms) == ([], [])
    sending.over([Fold(ranks.pack(ranks.only(1)), Exited(0))])
    sending.close()
    assert (given, rooms, window.ahead, len(errors)) == ([], [], 0, 1)
