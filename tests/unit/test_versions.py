"""Agents that are one version of the protocol apart: which version travels on which link."""

from __future__ import annotations

import msgpack
import pytest

from protocol import codec, relay
from protocol.events import ToChild, ToParent
from protocol.limits import VERSION_MAX
from protocol.messages import Attach, Attached, Beat, Link, Links, Rejected
from tests.unit.test_relay import _agent


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> int:
    """This code as if it spoke one version more; that version."""
    monkeypatch.setattr(relay, "VERSION_MAX", VERSION_MAX + 1)
    return VERSION_MAX + 1


def _answers(low: int, high: int) -> list[Attached | Rejected]:
    """What a relay answers a child with that range."""
    bench = _agent(children=False)
    effects = bench.child(2, Attach(low, high, (Link(2, 1, 1, 1, True),)))
    return [one.message for one in effects if isinstance(one, ToChild) and isinstance(one.message, Attached | Rejected)]


def test_the_highest_version_that_both_speak_is_agreed_on(newer: int) -> None:
    assert _answers(VERSION_MAX, VERSION_MAX) == [Attached(VERSION_MAX, 1)]
    assert _answers(VERSION_MAX, newer) == [Attached(newer, 1)]
    assert _answers(newer, newer + 1) == [Attached(newer, 1)]
    (refused,) = _answers(newer + 1, newer + 2)
    assert isinstance(refused, Rejected)
    assert f"protocol versions {newer + 1} to {newer + 2}, and its parent 1 to {newer}" in refused.why


def test_a_relay_that_comes_back_tells_each_child_the_version_agreed_on_with_that_one(newer: int) -> None:
    bench = _agent(children=False)
    bench.child(2, Attach(VERSION_MAX, VERSION_MAX, (Link(2, 1, 1, 1, True),)))
    bench.child(3, Attach(VERSION_MAX, newer, (Link(3, 1, 1, 1, True),)))
    effects = bench.parent(Attached(VERSION_MAX, 1))
    told = {one.rank: one.message for one in effects if isinstance(one, ToChild) and isinstance(one.message, Attached)}
    assert told == {2: Attached(VERSION_MAX, 1), 3: Attached(newer, 1)}


def test_a_message_has_the_version_of_its_link_in_its_header() -> None:
    assert msgpack.unpackb(codec.encode(Beat(), version=VERSION_MAX)[0])[0] == VERSION_MAX
    with pytest.raises(KeyError):
        codec.encode(Beat(), version=VERSION_MAX + 1)


def test_that_versions_do_not_meet_is_told_to_those_above_as_well(newer: int) -> None:
    bench = _agent(children=False)
    bench.parent(Attached(VERSION_MAX, 1))
    effects = bench.child(2, Attach(newer + 1, newer + 2, (Link(2, 1, 5, 7, True),)))
    (told,) = [one.message for one in effects if isinstance(one, ToParent) and isinstance(one.message, Links)]
    (link,) = told.links
    assert (link.rank, link.parent, link.incarnation, link.epoch, link.up) == (2, 1, 5, 7, False)
    assert link.why.startswith(f"its parent refused it: it speaks protocol versions {newer + 1} to {newer + 2}")
    assert "run `ctl up` again" in link.why
    # Once it speaks a version that is known here it is in, by its next attempt.
    assert Attached(VERSION_MAX, 8) in [
        one.message
        for one in bench.child(2, Attach(VERSION_MAX, VERSION_MAX, (Link(2, 1, 5, 8, True),)))
        if isinstance(one, ToChild)
    ]
