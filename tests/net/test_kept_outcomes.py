"""What an agent has finished and written down survives it; what it had not finished is lost, and nothing runs twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.session import Result
from protocol.outcomes import RESTARTED, UNREADABLE, Exited, Lost
from tests.net.localfleet import DEADLINE_S, LocalFleet, local_fleet
from tests.waiting import wait_until

HOSTS = ("whole", "damaged", "working", "alive")


@pytest.fixture
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with local_fleet(tmp_path_factory.mktemp("fleets"), HOSTS, 8) as fleet:
        yield fleet


@pytest.mark.timeout(180)
def test_a_finished_outcome_survives_the_kill_of_its_agent_and_an_unfinished_one_does_not(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    job = fleet.session.run(
        f"echo run >> {tmp_path}/$CANOPY_HOST; echo $CANOPY_HOST; "
        f"until [ -e {tmp_path}/go.$CANOPY_HOST ]; do sleep 0.05; done; exit 3",
        detach=True,
    )
    wait_until(lambda: all((tmp_path / host).exists() for host in HOSTS), DEADLINE_S, "the command to run everywhere")
    job.close()
    fleet.kill_service()
    for host in ("whole", "damaged", "alive"):
        (tmp_path / f"go.{host}").touch()
    files = {host: fleet.directory(host).outcomes / str(job.id) for host in HOSTS}
    finished = ("whole", "damaged", "alive")
    wait_until(lambda: all(files[host].exists() for host in finished), DEADLINE_S, "outcomes on disk")
    fleet.kill("whole", "damaged", "working")
    data = files["damaged"].read_bytes()
    files["damaged"].write_bytes(data[: len(data) // 2])
    for host in ("whole", "damaged", "working"):
        fleet.start(host)
    fleet.start_service()
    found: dict[str, Result] = {}
    for result in fleet.session.job(job.id).results():
        found |= dict.fromkeys(result.hosts, result)
    assert {host: (result.outcome, result.stdout) for host, result in found.items()} == {
        "whole": (Exited(3), b"whole\n"),
        "damaged": (Lost(UNREADABLE), b""),
        "working": (Lost(RESTARTED), b""),
        "alive": (Exited(3), b"alive\n"),
    }
    assert {host: (tmp_path / host).read_text() for host in HOSTS} == dict.fromkeys(HOSTS, "run\n")
    wait_until(lambda: not any(file.exists() for file in files.values()), DEADLINE_S, "acknowledged ones to be removed")
    (tmp_path / "go.working").touch()
