"""Jobs that are asked for again, and what is known of a host, on a fleet of real agents."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller import tables
from controller.render_why import why
from controller.session import Job, Result
from protocol.limits import VERSION_MAX, VERSION_MIN
from protocol.outcomes import Lost
from tests.net.localfleet import DEADLINE_S, ROOT, LocalFleet, local_fleet
from tests.waiting import wait_until

#: The versions of an agent that nobody here can speak with.
FOREIGN = "VERSION_MIN = 7\nVERSION_MAX = 8\n"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """Four agents, h2 below h0 and h3 below h1."""
    with local_fleet(tmp_path_factory.mktemp("fleet"), ("h0", "h1", "h2", "h3"), 2) as started:
        yield started


def done(job: Job) -> set[str]:
    """Hosts with an outcome."""
    return {host for happening in job if isinstance(happening, Result) for host in happening.hosts}


def test_a_detached_job_is_found_by_its_number_while_it_runs_and_afterwards(fleet: LocalFleet, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    command = f"[ $CANOPY_HOST = h3 ] && while [ ! -e {gate} ]; do sleep 0.05; done; echo $CANOPY_HOST"
    begun = fleet.session.run(command, detach=True)
    begun.close()
    number = begun.id
    wait_until(
        lambda: done(fleet.session.job(number, wait=False)) == {"h0", "h1", "h2"}, DEADLINE_S, "three of four outcomes"
    )
    so_far = fleet.session.job(number, wait=False)
    done(so_far)
    assert (so_far.settled, so_far.waiting_for()) == (False, ("h3",))
    (status,) = fleet.session.jobs(1)
    assert (status.id, status.ok, status.missing, status.took_s) == (number, 3, 1, None)
    gate.touch()
    waited = fleet.session.job(number)
    assert done(waited) == {"h0", "h1", "h2", "h3"}
    assert waited.settled
    again = fleet.session.job(number, wait=False)
    assert done(again) == {"h0", "h1", "h2", "h3"}
    assert again.settled
    assert '"/bin/sh"' in again.what
    (status,) = fleet.session.jobs(1)
    assert (status.ok, status.missing) == (4, 0)


def test_why_tells_of_a_relay_that_died_and_of_its_child(fleet: LocalFleet) -> None:
    before = fleet.session.host("h3")
    assert (before.attached, before.below, before.status.parent, before.lost) == (True, "h1", "h1", ())
    assert [above.name for above in before.ancestors] == ["h1", "service"]
    job = fleet.session.run("sleep 60", ["h1"])
    fleet.kill("h1")
    (lost,) = job.results()
    assert isinstance(lost.outcome, Lost)
    fleet.wait_until_down("h1")
    wait_until(lambda: fleet.hosts()["h3"].up, DEADLINE_S, "the child to be back")

    known = fleet.session.host("h1")
    assert (known.attached, known.status.up) == (False, False)
    assert [one.job for one in known.lost] == [job.id]
    assert "(sleep 60)" in why(known)
    assert "planned below h1" in why(fleet.session.host("h3"))
    assert "h3  (planned below h1, which is not in the tree: " in tables.tree(fleet.session.status())

    fleet.restart("h1")
    back = fleet.session.host("h1")
    assert back.status.up
    assert back.status.incarnation is not None
    assert known.status.incarnation is not None
    assert back.status.incarnation > known.status.incarnation
    wait_until(lambda: fleet.session.host("h3").unacknowledged is None, DEADLINE_S, "the plan to be acknowledged again")


def test_that_an_agent_speaks_no_version_that_its_parent_does_is_told_to_people(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    code = tmp_path / "code"
    for package in ("agent", "protocol"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    limits = code / "protocol" / "limits.py"
    text = limits.read_text()
    assert f"VERSION_MIN = {VERSION_MIN}\nVERSION_MAX = {VERSION_MAX}\n" in text
    limits.write_text(text.replace(f"VERSION_MIN = {VERSION_MIN}\nVERSION_MAX = {VERSION_MAX}\n", FOREIGN))
    fleet.kill("h3")
    fleet.start("h3", path=code)
    said = "its parent refused it: it speaks protocol versions 7 to 8, and its parent 1 to 1: run `ctl up` again"
    wait_until(lambda: said in fleet.hosts()["h3"].why, DEADLINE_S, "the service to know why")
    assert said in tables.summary(fleet.session.status())
    assert said in why(fleet.session.host("h3"))
    assert said in fleet.session.wait_for(["h3"], 0.1)["h3"], "as `ctl up` tells it"
    fleet.kill("h3")
    fleet.restart("h3")
    assert set(fleet.answers("true")) == {"h0", "h1", "h2", "h3"}


def test_who_only_seems_to_be_there_does_not_answer(fleet: LocalFleet) -> None:
    assert fleet.session.wait_for(("h0", "h1", "h2", "h3"), 10, answering=True) == {}
    jobs = fleet.session.jobs()
    os.kill(fleet.pid("h1"), signal.SIGSTOP)
    fleet.kill("h3")
    try:
        # Nothing has told the service yet that h1 is frozen, and h3 below it dead.
        silent = fleet.session.wait_for(("h0", "h1", "h2", "h3"), 6, answering=True)
    finally:
        os.kill(fleet.pid("h1"), signal.SIGCONT)
    assert silent.keys() == {"h1", "h3"}
    assert fleet.session.jobs()[0].id == jobs[0].id, "that was nobody's job"
    fleet.restart("h3")
