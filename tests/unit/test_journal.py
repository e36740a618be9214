"""Journals: what is written before it is done is read back, and taken back last first."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from agent import journal
from agent.journal import RemoveDomain, RemoveFiles, Step, Undo
from agent.ledger import Ledger, Pages

FILES = Step(does="make its directory", undo=(RemoveFiles(name="vm1"),))
DISK = Step(does="make its disk")
DOMAIN = Step(does="define it", undo=(RemoveDomain(name="vm1", uuid="u"),), last=True)
ALL = (FILES, DISK, DOMAIN)
WRITTEN = b"".join(map(journal.line, ALL))


def test_what_is_written_is_read_back() -> None:
    assert journal.read(WRITTEN) == ALL


@settings(derandomize=True, deadline=None)
@given(st.integers(0, len(WRITTEN)))
def test_a_journal_cut_anywhere_has_the_steps_that_were_whole(length: int) -> None:
    ends = [len(b"".join(map(journal.line, ALL[:count]))) for count in range(4)]
    whole = max(count for count, end in enumerate(ends) if end <= length)
    assert journal.read(WRITTEN[:length]) == ALL[:whole]


@settings(derandomize=True, deadline=None)
@given(st.integers(0, len(WRITTEN) - 1), st.integers(1, 255))
def test_a_journal_with_a_wrong_byte_has_the_steps_before_it(at: int, flip: int) -> None:
    damaged = bytearray(WRITTEN)
    damaged[at] ^= flip
    before = max(count for count in range(4) if len(b"".join(map(journal.line, ALL[:count]))) <= at)
    assert journal.read(bytes(damaged)) == ALL[:before]


@settings(derandomize=True, deadline=None)
@given(st.binary(max_size=300))
def test_whatever_is_in_the_file_reading_it_raises_nothing(data: bytes) -> None:
    assert journal.read(data) == ()


def test_steps_are_taken_back_last_first_and_each_in_its_own_order() -> None:
    both = Step(does="both", undo=(RemoveDomain(name="vm2", uuid="u"), RemoveFiles(name="vm2")))
    assert journal.undoing((*ALL, both, FILES)) == (
        RemoveFiles(name="vm1"),
        RemoveDomain(name="vm2", uuid="u"),
        RemoveFiles(name="vm2"),
        RemoveDomain(name="vm1", uuid="u"),
    )


class Undoer:
    """Performs undoings, all but those of `never`."""

    def __init__(self, *never: Undo) -> None:
        self.never = never
        self.done: list[Undo] = []

    async def __call__(self, undo: Undo) -> None:
        if undo in self.never:
            raise OSError(28, "No space left on device")
        self.done.append(undo)


async def noted(ledger: Ledger) -> None:
    entry = ledger.begin("vm1")
    for step in ALL:
        await entry.note(step)


def test_an_entry_that_ended_leaves_no_journal(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = Ledger(tmp_path / "journal", Undoer())
        entry = ledger.begin("vm1")
        await entry.note(FILES)
        assert ledger.names() == ["vm1"]
        assert ledger.steps("vm1") == (FILES,)
        await entry.end()
        assert ledger.names() == []
        assert ledger.steps("vm1") is None

    asyncio.run(scenario())


def test_the_next_one_finds_what_was_begun_and_takes_it_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        await noted(Ledger(tmp_path / "journal", Undoer()))
        undoer = Undoer()
        ledger = Ledger(tmp_path / "journal", undoer)
        assert ledger.steps("vm1") == ALL
        assert await ledger.found("vm1", ALL).take_back() == ""
        assert undoer.done == [*DOMAIN.undo, *FILES.undo]
        assert ledger.names() == []

    asyncio.run(scenario())


def test_what_can_not_be_taken_back_stays_on_record_with_all_that_came_before_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        undoer = Undoer(*DOMAIN.undo)
        ledger = Ledger(tmp_path / "journal", undoer)
        await noted(ledger)
        assert "No space" in await ledger.found("vm1", ALL).take_back()
        assert undoer.done == []
        assert ledger.steps("vm1") == ALL

    asyncio.run(scenario())


def test_a_step_is_on_disk_before_it_is_done_where_it_has_an_undoing(tmp_path: Path) -> None:
    synced: list[bool] = []

    class Watched(Pages):
        def append(self, path: Path, data: bytes, *, sync: bool) -> None:
            synced.append(sync)
            super().append(path, data, sync=sync)

    asyncio.run(noted(Ledger(tmp_path / "journal", Undoer(), Watched())))
    assert synced == [True, False, True]
