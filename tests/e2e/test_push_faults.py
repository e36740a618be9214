"""A push over slow links to test hosts of which one loses its cable, one freezes and one loses its power: those behind
them ask others, and who comes back goes on with what it has."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.session import Happening, Progress, Result
from deploy.testhosts import HostSpec
from protocol.outcomes import Exited, Lost
from tests.conftest import MakeTestHosts, need_test_hosts
from tests.e2e.faultfleet import FaultFleet, fault_fleet
from tests.waiting import wait_until

NAMES = tuple(f"h{number}" for number in range(6))
#: 16 MB at 32 Mbit/s are four seconds: time for faults in the middle.
RATE_MBIT = 32.0
SIZE = 16_000_000
DEADLINE_S = 60.0


@pytest.fixture
def fleet(testhosts_module: MakeTestHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultFleet]:
    need_test_hosts()
    hosts = testhosts_module([HostSpec(name, rate_mbit=RATE_MBIT) for name in NAMES])
    with fault_fleet(tmp_path_factory.mktemp("fleets"), hosts, 32) as made:
        yield made


def received(fleet: FaultFleet, name: str) -> int:
    """The bytes that came to a host over its link."""
    done = fleet.hosts.run(name, ["cat", "/sys/class/net/eth0/statistics/rx_bytes"])
    return int(done.stdout)


def test_who_loses_its_cable_freezes_or_dies_is_bypassed_and_who_comes_back_goes_on(
    fleet: FaultFleet, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(7).randbytes(SIZE))
    order = [host.name for host in sorted(fleet.status().values(), key=lambda host: host.rank)]
    cut, frozen, killed = order[1], order[3], order[4]
    others = [order[0], order[2], order[5]]
    before = received(fleet, cut)

    results: dict[str, Result] = {}
    bypassed: set[str] = set()
    far: dict[str, int] = {}
    push = fleet.session.push(source, "/root/pushed")
    happenings = iter(push)

    def take(happening: Happening) -> None:
        if isinstance(happening, Result):
            results.update(dict.fromkeys(happening.hosts, happening))
        elif isinstance(happening, Progress):
            far.update(happening.done)
            bypassed.update(whom for whom, _, _ in happening.bypassed)

    while not {cut, frozen, killed} <= far.keys() or min(far[cut], far[frozen], far[killed]) < SIZE // 8:
        take(next(happenings))
    assert not results
    fleet.hosts.cut(cut)
    fleet.hosts.freeze(frozen)
    fleet.hosts.power_off(killed)
    while not bypassed >= {cut, killed}:  # the frozen one is followed by the killed one, which asks nobody any more
        take(next(happenings))
    fleet.hosts.heal(cut)
    fleet.hosts.thaw(frozen)
    for happening in happenings:
        take(happening)
    came = received(fleet, cut) - before

    assert {name: result.outcome for name, result in results.items() if name != killed} == dict.fromkeys(
        (*others, cut, frozen), Exited(0)
    )
    assert isinstance(results[killed].outcome, Lost)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    for name in (*others, cut, frozen):
        assert fleet.hosts.run(name, ["sha256sum", "/root/pushed"]).stdout.split()[0] == digest
    wait_until(
        lambda: not any(leftovers(fleet, name) for name in (*others, cut, frozen)), DEADLINE_S, "nothing half anywhere"
    )
    assert came < 1.4 * SIZE, "it did not begin anew"


def leftovers(fleet: FaultFleet, name: str) -> str:
    """What a push has left on a host beside its files."""
    look = "ls -d /root/.canopy-* /var/lib/canopy/*/parts/* 2>/dev/null"
    return fleet.hosts.run(name, ["sh", "-c", look], check=False).stdout
