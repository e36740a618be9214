"""What a cancelled command let go of is hunted until none is left."""

from __future__ import annotations

import os
import signal

import pytest

from agent import orphans


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: found.append((pid, number)))
    return found


def looks(monkeypatch: pytest.MonkeyPatch, *rounds: list[int]) -> list[list[int]]:
    """What the next looks find; those that are left over."""
    left = list(rounds)
    monkeypatch.setattr(orphans, "find", lambda *_: left.pop(0) if left else [])
    return left


def test_one_that_forked_behind_a_look_and_ended_does_not_save_its_child(
    monkeypatch: pytest.MonkeyPatch, killed: list[tuple[int, int]]
) -> None:
    # 5 ends by itself when the second look comes to it, and 6, its child, was not there when that look began.
    left = looks(monkeypatch, [4, 5], [], [6], [], [], [7])
    orphans.end(1, "/agent", 0, 4, hard=True)
    assert killed == [(4, signal.SIGKILL), (5, signal.SIGKILL), (6, signal.SIGKILL)]
    assert left == [[7]], "two looks in a row found none"


def test_the_polite_signal_is_given_once(monkeypatch: pytest.MonkeyPatch, killed: list[tuple[int, int]]) -> None:
    looks(monkeypatch, [5], [6])
    orphans.end(1, "/agent", 0, 4, hard=False)
    assert killed == [(5, signal.SIGTERM)]


def test_one_that_forks_for_ever_is_not_chased_for_ever(
    monkeypatch: pytest.MonkeyPatch, killed: list[tuple[int, int]]
) -> None:
    looks(monkeypatch, *([pid] for pid in range(1_000)))
    orphans.end(1, "/agent", 0, 4, hard=True)
    assert len(killed) < 100
