"""Outcomes whose credit is scarce: whatever strikes a tree, no honest relay is taken for one that ignores it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from protocol import folding, pacing, relay
from protocol.commands import Body
from protocol.outcomes import Exited, Outcome, Output
from protocol.pacing import Pace
from tests.sim.schedule import Performance, Step, drawn

#: As the outputs here to those of people: a hundredth.
_CREDIT, _LAST, _FOLD_BYTES = 5_000, 8_000, 2_600
_SEEDS = range(40_000, 40_060)
_MOST = 25


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Credits are small; how often a relay had to wait for one is counted in the only element."""
    for module in (pacing, folding):
        monkeypatch.setattr(module, "FOLD_BYTES", _FOLD_BYTES)
    monkeypatch.setattr(pacing, "OUTCOME_CREDIT", _CREDIT)
    monkeypatch.setattr(pacing, "OUTCOME_LAST", _LAST)
    found = [0]

    class Counted(Pace):
        @property
        def room(self) -> bool:
            there = super().room
            found[0] += not there
            return there

    monkeypatch.setattr(relay, "Pace", Counted)
    return found


def _work(rank: int, id_: int, _body: Body) -> tuple[float, Outcome, Output]:
    chooser = random.Random(f"{rank} {id_}")
    return chooser.choice((0.001, 0.1, 1.0)), Exited(0), Output(out=chooser.randbytes(chooser.choice((0, 900, 4_000))))


def test_under_any_schedule_no_relay_is_cut_off_for_the_outcomes_that_it_sends(waits: list[int]) -> None:
    for seed in _SEEDS:
        schedule = drawn(seed, _MOST)
        more = tuple(Step("broadcast") for _ in range(8))
        steps = [part for step in schedule.steps for part in (*more[: step.number % 6], step)]
        performance = Performance(replace(schedule, steps=(*more, *steps)))
        performance.tree.work = _work
        performance.play()
    assert waits[0] > 1_000, "the credit was used up"
