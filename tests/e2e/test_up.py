"""`ctl up` on 64 bare hosts, three of which can't come up, and what a person does with the fleet then."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.testhosts import HostSpec, TestHosts
from tests.conftest import MakeTestHosts, need_test_hosts
from tests.e2e.ctl import Ctl
from tests.waiting import wait_until

NAMES = [f"h{number}" for number in range(64)]
BAD = {"h5": "hung", "h20": "refusing", "h40": "no_python"}
UP = sorted(set(NAMES) - set(BAD))

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def hosts(testhosts_module: MakeTestHosts) -> TestHosts:
    need_test_hosts()
    return testhosts_module([HostSpec(name, mode=BAD.get(name, "ok")) for name in NAMES])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ctl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ctl]:
    runner = Ctl(tmp_path_factory.mktemp("fleets"))
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def fleet(hosts: TestHosts, ctl: Ctl) -> tuple[str, int, int]:
    """The fleet, brought up: what `ctl up` said, its exit code, and the most ssh processes that it had at a time."""
    process = ctl.start("up", "-w", "h[0-63]", "-F", str(hosts.ssh_config), "--connect-timeout", "3")
    most = 0
    while process.poll() is None:
        most = max(most, hosts.ssh_count(process.pid))
        time.sleep(0.02)
    said, complained = process.communicate()
    return said + complained, process.returncode, most


def test_all_but_the_three_come_up_each_with_its_reason(fleet: tuple[str, int, int], ctl: Ctl) -> None:
    said, status, _ = fleet
    assert status == 0, said  # 61 is at least 95 % of 64, rounded down
    assert "61 of 64" in said
    assert "h5: no answer to SSH within 3 s" in said
    assert "h20: connection refused" in said
    assert "h40: no Python 3.10 or newer" in said
    assert sorted(host["name"] for host in ctl.json("status")["hosts"] if host["up"]) == UP


def test_the_service_node_never_had_more_than_32_ssh_processes(fleet: tuple[str, int, int]) -> None:
    assert 0 < fleet[2] <= 32


def test_the_exit_code_tells_that_the_minimum_was_not_met(
    fleet: tuple[str, int, int], hosts: TestHosts, ctl: Ctl
) -> None:
    agents = {name: _agents(hosts, name) for name in UP}
    again = ctl(
        "up", "-w", "h[0-63]", "-F", str(hosts.ssh_config), "--connect-timeout", "3", "--tries", "1",
        "--min-up", "62", status=3,
    )  # fmt: skip
    assert "61 of 64" in again.stdout + again.stderr
    assert {name: _agents(hosts, name) for name in UP} == agents, "what runs is left alone"


def test_a_broadcast_reaches_all_61(fleet: tuple[str, int, int], ctl: Ctl) -> None:
    answers = ctl.json("broadcast", "hostname")
    assert sorted(host for fold in answers for host in fold["hosts"]) == UP
    assert all(fold["stdout"].strip() == fold["hosts"][0] for fold in answers)


def test_ctrl_c_ends_a_command_on_all_hosts(fleet: tuple[str, int, int], hosts: TestHosts, ctl: Ctl) -> None:
    process = ctl.start("broadcast", "sleep 987")
    wait_until(lambda: all(_running(hosts, name, "987") for name in UP), 20, "the command runs on all hosts")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not any(_running(hosts, name, "987") for name in UP)


def test_a_host_that_loses_its_power_is_lost_and_the_others_answer(
    fleet: tuple[str, int, int], hosts: TestHosts, ctl: Ctl, tmp_path: Path
) -> None:
    process = ctl.start("broadcast", "--json", "sleep 3; hostname")
    wait_until(lambda: all(_running(hosts, name, "3") for name in UP), 20, "the command runs on all hosts")
    hosts.power_off("h63")
    said, _ = process.communicate(timeout=60)
    folds = json.loads(said)
    outcomes = {host: fold["outcome"]["kind"] for fold in folds for host in fold["hosts"]}
    assert outcomes.pop("h63") == "lost"
    assert sorted(outcomes) == sorted(set(UP) - {"h63"})
    assert set(outcomes.values()) == {"exited"}
    assert process.returncode == 3


def test_a_host_that_comes_back_is_started_by_the_next_up(
    fleet: tuple[str, int, int], hosts: TestHosts, ctl: Ctl
) -> None:
    hosts.power_on("h63")
    ctl("up", "-w", "h[60-63]", "-F", str(hosts.ssh_config))
    assert ctl("broadcast", "-w", "h63", "hostname").stdout.splitlines()[-1] == "h63"


def test_down_with_purge_leaves_nothing(fleet: tuple[str, int, int], hosts: TestHosts, ctl: Ctl) -> None:
    ctl("down", "--purge")
    wait_until(lambda: not any(_agents(hosts, name) for name in UP), 20, "all agents end")
    for name in UP:
        assert not Path(f"{hosts.host(name).root}/var/lib/canopy").exists()
    assert ctl("status", status=6).returncode == 6


def _agents(hosts: TestHosts, name: str) -> list[int]:
    return [process.pid for process in hosts.processes(name) if "agent" in process.argv and "run" in process.argv]


def _running(hosts: TestHosts, name: str, seconds: str) -> bool:
    return any(process.argv[:2] == ("sleep", seconds) for process in hosts.processes(name))
