"""Outcomes that nobody has acknowledged: written in time, within budgets, and never cut without a word."""

from __future__ import annotations

import pytest

from protocol import keeping
from protocol.events import Effect, Keep, Kept, Load, Loaded, Warn
from protocol.keeping import Keeping
from protocol.limits import KEEP_AFTER
from protocol.outcomes import NO_OUTPUT, UNREADABLE, Exited, Lost, Output

_SIGNATURE = b"s" * 64


@pytest.fixture(autouse=True)
def small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred bytes in memory, and two files of a hundred on disk."""
    monkeypatch.setattr(keeping, "KEEP_MEMORY", 100)
    monkeypatch.setattr(keeping, "KEEP_DISK", 2 * (100 + keeping._OVERHEAD))


def _wrote(size: int) -> Output:
    return Output(out=b"x" * size, out_total=size)


def _add(kept: Keeping, id_: int, size: int = 0, now: float = 0.0) -> list[Effect]:
    return kept.add(id_, _SIGNATURE, Exited(0), _wrote(size), now)


def _keep(id_: int, size: int = 0) -> Keep:
    return Keep(id_, _SIGNATURE, Exited(0), _wrote(size))


def test_what_is_acknowledged_in_time_never_touches_the_disk() -> None:
    kept = Keeping({})
    assert _add(kept, 1) == []
    kept.forget(1)
    assert kept.wakeup() is None
    assert kept.advance(KEEP_AFTER) == []
    assert (len(kept), kept.memory, kept.disk) == (0, 0, 0)


def test_what_is_not_goes_there_once() -> None:
    kept = Keeping({})
    _add(kept, 1, 10, now=5.0)
    assert kept.wakeup() == 5.0 + KEEP_AFTER
    assert kept.advance(5.0 + KEEP_AFTER - 0.1) == []
    assert kept.advance(5.0 + KEEP_AFTER) == [_keep(1, 10)]
    assert kept.advance(100.0) == []
    assert kept.kept(Kept(1, well=True)) == []
    assert kept.answer(1) == (Exited(0), _wrote(10)), "it is in memory too, while there is room"


def test_above_the_memory_budget_output_moves_to_disk_and_is_read_when_it_is_asked_for() -> None:
    kept = Keeping({})
    _add(kept, 1, 60)
    assert _add(kept, 2, 60) == [_keep(1, 60), _keep(2, 60)]
    assert kept.answer(1) is not None, "before it is on disk it stays"
    kept.kept(Kept(1, well=True))
    assert kept.memory == 60
    assert kept.answer(1) is None
    assert kept.load(1, b"as it was asked for") == [Load(1, _SIGNATURE)]
    assert kept.load(1, b"again") == [], "it is being read"
    assert kept.loaded(Loaded(1, (Exited(0), _wrote(60)))) == (Exited(0), _wrote(60))


def test_an_outcome_whose_file_is_damaged_is_answered_without_its_output_and_says_how_much_there_was() -> None:
    kept = Keeping({})
    _add(kept, 1, 60)
    _add(kept, 2, 60)
    kept.kept(Kept(1, well=True))
    kept.load(1, _SIGNATURE)
    assert kept.loaded(Loaded(1, None)) == (Exited(0), Output(out_total=60))


def test_above_both_budgets_only_output_goes_and_the_outcome_says_how_much_there_was() -> None:
    kept = Keeping({})
    for id_ in (1, 2):
        _add(kept, id_, 100)
        assert kept.advance(KEEP_AFTER) == [_keep(id_, 100)]
        kept.kept(Kept(id_, well=True))
    assert _add(kept, 3, 90) == [], "the disk is full with those two, and memory has room"
    effects = _add(kept, 4, 90)
    assert [type(effect) for effect in effects] == [Warn]
    assert "3" in str(effects)
    assert kept.answer(3) == (Exited(0), Output(out_total=90))
    assert kept.answer(4) == (Exited(0), _wrote(90))
    kept.forget(1)
    assert _add(kept, 5, 100)[0] == _keep(4, 90), "there is room for one again"


def test_a_disk_that_takes_nothing_costs_what_memory_has_no_room_for() -> None:
    kept = Keeping({})
    _add(kept, 1, 80)
    assert _add(kept, 2, 80) == [_keep(1, 80), _keep(2, 80)]
    effects = kept.kept(Kept(1, well=False))
    assert [type(effect) for effect in effects] == [Warn]
    assert kept.answer(1) == (Exited(0), Output(out_total=80))
    assert kept.answer(2) == (Exited(0), _wrote(80))
    assert kept.disk == 80 + keeping._OVERHEAD


def test_what_a_predecessor_kept_is_read_under_the_signature_that_it_is_asked_for_with() -> None:
    kept = Keeping({7: 50})
    assert 7 in kept
    assert kept.answer(7) is None
    assert kept.load(7, _SIGNATURE) == [Load(7, _SIGNATURE)]
    assert kept.loaded(Loaded(7, (Exited(3), NO_OUTPUT))) == (Exited(3), NO_OUTPUT)
    assert kept.load(7, _SIGNATURE) == [Load(7, _SIGNATURE)], "it may be asked for again"
    kept.forget(7)
    assert kept.loaded(Loaded(7, (Exited(3), NO_OUTPUT))) is None, "nobody waits for it any more"
    assert (len(kept), kept.disk) == (0, 0)


def test_what_a_predecessor_kept_and_is_damaged_is_lost_and_stays_so() -> None:
    kept = Keeping({7: 50})
    kept.load(7, _SIGNATURE)
    assert kept.loaded(Loaded(7, None)) == (Lost(UNREADABLE), NO_OUTPUT)
    assert kept.answer(7) == (Lost(UNREADABLE), NO_OUTPUT)
    assert kept.disk == 0


def test_an_agent_that_ends_writes_what_is_not_written() -> None:
    kept = Keeping({})
    _add(kept, 1)
    kept.advance(KEEP_AFTER)
    _add(kept, 2)
    kept.add(3, None, Exited(0), NO_OUTPUT, 0.0)
    assert kept.write_all() == [_keep(2)]


def test_the_word_that_it_was_written_may_come_after_it_was_forgotten() -> None:
    kept = Keeping({})
    _add(kept, 1, 10)
    kept.advance(KEEP_AFTER)
    kept.forget(1)
    assert kept.kept(Kept(1, well=True)) == []
    assert kept.kept(Kept(1, well=False)) == []
    assert (len(kept), kept.memory, kept.disk) == (0, 0, 0)
