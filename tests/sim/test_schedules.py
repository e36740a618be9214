"""A sample of the schedules that `make sim` plays, and what makes a failing one useful: one seed, one trace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim import schedule
from tests.sim.schedule import Performance, Schedule, Step, drawn, shape, shrink

_ROOT = Path(__file__).parents[2]
#: With the 200 of test_faults these are 500. Small trees: a sample must not take long.
_SAMPLE = range(20_000, 20_300)
_MOST = 25
_DIGEST = """
import sys
from tests.sim.schedule import Performance, drawn
for seed in range(3):
    performance = Performance(drawn(seed, 25), keep_digest=True)
    performance.play()
    print(performance.tree.digest.hexdigest())
"""


@pytest.mark.parametrize("seed", _SAMPLE)
def test_under_any_schedule_each_target_has_one_outcome_nothing_runs_twice_and_the_tree_heals(seed: int) -> None:
    Performance(drawn(seed, _MOST)).play()


def test_one_seed_gives_one_trace_in_every_process() -> None:
    traces = [
        subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=_ROOT,
            check=True,
            capture_output=True,
            timeout=100,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert traces[0] == traces[1]
    assert len(set(traces[0].split())) == 3


def test_sizes_stand_around_powers_of_the_fanout_and_reach_five_levels() -> None:
    import random

    chooser = random.Random(0)
    shapes = {shape(chooser, 2_000) for _ in range(3_000)}
    assert {(2**5 + near, 2) for near in (-1, 0, 1)} <= shapes
    assert {(64 + near, 64) for near in (-1, 0, 1)} <= shapes
    assert {fanout for _, fanout in shapes} >= {1, 2, 3, 64}
    assert max(hosts for hosts, _ in shapes) == 2_000


def test_a_failing_schedule_shrinks_to_what_makes_it_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_after_a_kill(candidate: Schedule) -> str | None:
        return "killed" if any(step.what == "kill" for step in candidate.steps) else None

    monkeypatch.setattr(schedule, "failure", fails_after_a_kill)
    steps = tuple(Step(what, ttl=5.0, pause=8.0) for what in ("broadcast", "cut", "kill", "heal", "join"))
    assert shrink(Schedule(1, 20, 3, False, steps)) == Schedule(1, 2, 3, True, (Step("kill"),))


def test_what_breaks_a_promise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks are alive: a relay that takes each delivery for a new one runs commands twice."""
    from protocol.duty import Duty

    monkeypatch.setattr(Duty, "known", lambda _self, _id: (False, None))
    assert any(schedule.failure(drawn(seed, _MOST)) for seed in range(20))
