"""Pushes from host to host among real agents, some of which freeze, die or begin anew in between."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.session import Job, Progress, Result
from controller.status import CtlError
from protocol.limits import MAX_INLINE
from protocol.outcomes import Exited, Lost
from tests.net.localfleet import LocalFleet, local_fleet
from tests.waiting import wait_until

NAMES = tuple(f"h{number}" for number in range(6))
#: In the middle of the order: it has hosts before and behind it.
MIDDLE, NEXT = "h2", "h3"
DATA = random.Random(4).randbytes(64 * MAX_INLINE + 17)
DEADLINE_S = 40.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with local_fleet(tmp_path_factory.mktemp("chain"), NAMES, 32) as made:
        yield made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def place(fleet: LocalFleet, name: str, file: str) -> Path:
    return fleet.directory(name).path / file


class Watched:
    """A push and what became of it."""

    def __init__(self, job: Job) -> None:
        self._happenings = iter(job)
        self.results: dict[str, Result] = {}
        self.bypassed: set[tuple[str, str]] = set()
        self.whys: set[str] = set()

    def until(self, *names: str) -> None:
        """Follow it until these hosts have an outcome."""
        while not self.results.keys() >= set(names):
            self._take(next(self._happenings))

    def end(self) -> None:
        """Follow it until its end."""
        for happening in self._happenings:
            self._take(happening)

    def _take(self, happening: object) -> None:
        if isinstance(happening, Result):
            self.results |= dict.fromkeys(happening.hosts, happening)
        elif isinstance(happening, Progress):
            self.bypassed |= {(whom, who) for whom, who, _ in happening.bypassed}
            self.whys |= {why for _, _, why in happening.bypassed}


def test_who_is_frozen_is_bypassed_and_named_and_gets_the_rest_when_it_thaws(fleet: LocalFleet, source: Path) -> None:
    os.kill(fleet.pid(MIDDLE), signal.SIGSTOP)
    try:
        push = Watched(fleet.session.push(source, "@/frozen"))
        push.until(*(name for name in NAMES if name != MIDDLE))
    finally:
        os.kill(fleet.pid(MIDDLE), signal.SIGCONT)
    push.end()
    assert (MIDDLE, NEXT) in push.bypassed, (push.bypassed, push.whys)
    assert push.whys
    assert {name: result.outcome for name, result in push.results.items()} == dict.fromkeys(NAMES, Exited(0))
    assert all(place(fleet, name, "frozen").read_bytes() == DATA for name in NAMES)


def test_who_dies_costs_only_itself(fleet: LocalFleet, source: Path) -> None:
    os.kill(fleet.pid(MIDDLE), signal.SIGSTOP)
    push = Watched(fleet.session.push(source, "@/killed"))
    push.until("h1")
    fleet.kill(MIDDLE)
    push.end()
    assert isinstance(push.results.pop(MIDDLE).outcome, Lost)
    assert {result.outcome for result in push.results.values()} == {Exited(0)}
    assert all(place(fleet, name, "killed").read_bytes() == DATA for name in NAMES if name != MIDDLE)
    fleet.restart(MIDDLE)


def test_a_service_that_begins_anew_goes_on_with_the_push(fleet: LocalFleet, source: Path) -> None:
    os.kill(fleet.pid(MIDDLE), signal.SIGSTOP)
    try:
        push = Watched(fleet.session.push(source, "@/again"))
        push.until("h1")
        fleet.kill_service()
        with pytest.raises(CtlError):
            push.end()
        fleet.start_service()
    finally:
        os.kill(fleet.pid(MIDDLE), signal.SIGCONT)
    wait_until(
        lambda: all(place(fleet, name, "again").exists() for name in NAMES), DEADLINE_S, "the file to be everywhere"
    )
    fleet.wait_until_home()
    assert all(place(fleet, name, "again").read_bytes() == DATA for name in NAMES)


def test_two_pushes_at_a_time_both_arrive(fleet: LocalFleet, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(DATA[::-1])
    pushes = [Watched(fleet.session.push(source, "@/one")), Watched(fleet.session.push(other, "@/two", NAMES[1:]))]
    for push in pushes:
        push.end()
    assert all({result.outcome for result in push.results.values()} == {Exited(0)} for push in pushes)
    assert all(place(fleet, name, "one").read_bytes() == DATA for name in NAMES)
    assert all(place(fleet, name, "two").read_bytes() == DATA[::-1] for name in NAMES[1:])


@pytest.mark.parametrize("compress", [True, False])
def test_what_can_be_packed_arrives_whole_packed_or_plain(fleet: LocalFleet, tmp_path: Path, compress: bool) -> None:
    text = b"".join(b"line %d says what every line before it said\n" % number for number in range(50_000))
    (tmp_path / "text").write_bytes(text + DATA[: 1 << 20] + text)
    push = Watched(fleet.session.push(tmp_path / "text", f"@/text-{compress}", compress=compress))
    push.end()
    assert {name: result.outcome for name, result in push.results.items()} == dict.fromkeys(NAMES, Exited(0))
    assert all(place(fleet, name, f"text-{compress}").read_bytes() == text + DATA[: 1 << 20] + text for name in NAMES)
    assert not push.bypassed
