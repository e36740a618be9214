"""Outcomes as people read them, and as receivers take them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.limits import MAX_OUTPUT, MAX_TEXT
from protocol.outcomes import (
    NO_OUTPUT,
    Cancelled,
    Exited,
    FailedToStart,
    Killed,
    Lost,
    Outcome,
    Output,
    Refused,
    TimedOut,
    describe,
    fitting,
    sentence,
    succeeded,
)


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (Exited(0), "ok"),
        (Exited(3), "exited with exit code 3"),
        (Killed(9), "killed by signal 9"),
        (TimedOut(), "timed out"),
        (Cancelled(ran=True), "cancelled"),
        (Cancelled(ran=False), "cancelled before it began"),
        (Refused("no"), "refused: no"),
        (FailedToStart("no such file"), "failed to start: no such file"),
        (Lost("link h1 - h2"), "lost: link h1 - h2"),
    ],
)
def test_each_outcome_has_its_words(outcome: Outcome, words: str) -> None:
    assert describe(outcome) == words
    assert succeeded(outcome) == (words == "ok")


@given(st.text(st.characters(), max_size=3_000))
def test_a_sentence_is_never_too_long_and_always_utf8(text: str) -> None:
    fits = sentence(text)
    assert len(fits) <= MAX_TEXT
    fits.encode()


def test_what_fits_is_left_as_it_is() -> None:
    assert fitting(Lost("why"), NO_OUTPUT) == (Lost("why"), NO_OUTPUT)
    assert fitting(Exited(1), Output(out=b"x", out_total=1))[1].out_total == 1


def test_what_does_not_fit_is_cut_and_its_true_size_stays() -> None:
    outcome, output = fitting(Refused("x" * 5_000, trust=True), Output(err=b"y" * (MAX_OUTPUT + 5), err_total=2**21))
    assert isinstance(outcome, Refused)
    assert (len(outcome.why), outcome.trust) == (MAX_TEXT, True)
    assert (len(output.err), output.err_total) == (MAX_OUTPUT, 2**21)
