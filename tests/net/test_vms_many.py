"""Many VMs on many hosts, from their spawn to their end; `make bench-vms` does the same with 2,000 on 64."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.spawn import destroy, reserved
from protocol.vms import VmChange
from tests.net.localfleet import DEADLINE_S, LocalFleet
from tests.net.vmfleet import DEPLOYMENT, by_change, infra_text, prepared, spawned, vm_fleet
from tests.waiting import wait_until

pytest.importorskip("libvirt", reason="VMs need libvirt's Python binding: apt-get install python3-libvirt")


def whole_life(fleet: LocalFleet, vms: int, kernel: Path) -> dict[str, float]:
    """Spawn, spawn again, lose a tenth, spawn again, destroy; the seconds that each took."""
    session, text = fleet.session, infra_text(fleet.names, vms)
    everybody = {f"vm{n:05}" for n in range(vms)}
    took: dict[str, float] = {}

    report, took["spawn"] = spawned(session, text, kernel)
    assert (report.troubles, report.not_running, report.unnamed) == ({}, (), {}), report
    assert by_change(report) == {VmChange.CREATED: everybody}
    addresses = session.deployment(DEPLOYMENT).addresses
    assert len(set(addresses.values())) == vms

    report, took["rerun"] = spawned(session, text, kernel)
    assert by_change(report) == {VmChange.UNCHANGED: everybody}

    # What the test driver has is gone with its agent.
    struck = fleet.names[: max(1, len(fleet.names) // 10)]
    lost = {vm.name for vm in session.status().vms if vm.host in struck}
    fleet.kill(*struck)
    fleet.restart(*struck)
    report, took["rerun after a tenth was lost"] = spawned(session, text, kernel)
    assert by_change(report) == {VmChange.CREATED: lost, VmChange.UNCHANGED: everybody - lost}
    assert session.deployment(DEPLOYMENT).addresses == addresses

    began = time.monotonic()
    done = destroy(session, {DEPLOYMENT: sorted(everybody)})
    took["destroy"] = time.monotonic() - began
    assert {result.change for results in done.answers.values() for result in results} == {VmChange.REMOVED}
    assert session.deployment(DEPLOYMENT).addresses == {}
    assert all(not list((fleet.directory(name).path / "vms").iterdir()) for name in fleet.names)
    return took


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with vm_fleet(tmp_path_factory.mktemp("many"), [f"h{n}" for n in range(8)], fanout=3) as made:
        yield made


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"kernel")
    return path


def names_of(fleet: LocalFleet, host: str) -> list[str]:
    path = fleet.directory(host).path / "vms.hosts"
    return [line.split()[1] for line in path.read_text().splitlines()[1:]] if path.exists() else []


def test_a_deployments_whole_life(fleet: LocalFleet, kernel: Path) -> None:
    took = whole_life(fleet, 200, kernel)
    print(took, file=sys.stderr)


def test_hosts_hear_of_names_that_came_and_went_while_they_were_away(fleet: LocalFleet, kernel: Path) -> None:
    text = infra_text(["h1"], 2)
    fleet.kill("h7")
    fleet.wait_until_down("h7")
    spawned(fleet.session, text, kernel)
    assert names_of(fleet, "h0") == ["vm00000", "vm00001"]
    assert names_of(fleet, "h7") == []
    fleet.restart("h7")
    wait_until(lambda: names_of(fleet, "h7") == ["vm00000", "vm00001"], DEADLINE_S, "h7 to be told the names")
    list(fleet.session.destroy_vms(DEPLOYMENT))
    wait_until(lambda: not any(names_of(fleet, host) for host in fleet.names), DEADLINE_S, "all to forget them")


def test_a_service_killed_in_the_middle_of_a_spawn_leaks_no_address(fleet: LocalFleet, kernel: Path) -> None:
    text = infra_text(fleet.names, 64)
    job = fleet.session.create_vms(DEPLOYMENT, prepared(fleet.session, text, kernel).slices)
    fleet.kill_service()
    job.close()
    fleet.start_service()
    fleet.wait_until_up(fleet.names)
    kept = fleet.session.deployment(DEPLOYMENT).addresses
    assert len(kept) == 64
    report, _ = spawned(fleet.session, text, kernel)
    assert {name for names in by_change(report).values() for name in names} == set(kept)
    assert fleet.session.deployment(DEPLOYMENT).addresses == kept

    job = fleet.session.destroy_vms(DEPLOYMENT)
    fleet.kill_service()
    job.close()
    fleet.start_service()
    fleet.wait_until_up(fleet.names)
    # What was asked before the kill goes on without whoever asked it.
    wait_until(lambda: not fleet.session.deployment(DEPLOYMENT).addresses, DEADLINE_S, "all addresses to be free")


def test_a_spawn_whose_ctl_was_killed_is_ended_and_the_rerun_converges(fleet: LocalFleet, kernel: Path) -> None:
    text = infra_text(fleet.names, 64)
    plan = prepared(fleet.session, text, kernel)
    fleet.session.reserve_vms(reserved(plan), plan.capacities)
    kept = fleet.session.deployment(DEPLOYMENT).addresses
    assert len(kept) == 64
    fleet.session.create_vms(DEPLOYMENT, plan.slices).close()  # as its end does
    report, _ = spawned(fleet.session, text, kernel)
    assert not report.troubles
    changes = by_change(report)
    assert set(changes) <= {VmChange.CREATED, VmChange.STARTED, VmChange.UNCHANGED}
    assert {name for names in changes.values() for name in names} == set(kept)
    assert fleet.session.deployment(DEPLOYMENT).addresses == kept
    list(fleet.session.destroy_vms(DEPLOYMENT))
    assert not fleet.session.deployment(DEPLOYMENT).addresses
