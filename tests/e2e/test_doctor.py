"""`ctl doctor` on hosts that are well and on hosts that are ill, each in a way of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.testhosts import HostSpec, TestHosts
from tests.conftest import MakeTestHosts, need_test_hosts
from tests.e2e.ctl import Ctl
from tests.waiting import wait_until

SPECS = [
    HostSpec("healthy", libvirt=True),
    HostSpec("killed"),
    HostSpec("forged"),
    HostSpec("bare"),
    HostSpec("snakeless", mode="no_python"),
    HostSpec("hung", mode="hung"),
    HostSpec("refusing", mode="refusing"),
]
FLEET = ("healthy", "killed", "forged")


@pytest.fixture(scope="module")
def hosts(testhosts_module: MakeTestHosts) -> TestHosts:
    need_test_hosts(libvirt=True)
    return testhosts_module(SPECS)


@pytest.fixture(scope="module")
def ctl(hosts: TestHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ctl]:
    """A fleet of three, of which one lost its agent and another its key."""
    runner = Ctl(tmp_path_factory.mktemp("fleets"))
    try:
        runner("up", "-w", ",".join(FLEET), "-F", str(hosts.ssh_config))
        hosts.run("killed", ["sh", "-c", "kill -9 $(cat /var/lib/canopy/*/agent.pid)"])
        # As where a host's disk was put back from another's: the agent that runs still has the old key.
        other = "rm /var/lib/canopy/*/identity; cd /var/lib/canopy/*/ && PYTHONPATH=current python3 -m agent enrol"
        hosts.run("forged", ["sh", "-c", f"{other} --dir $PWD --address {hosts.host('forged').address}"])
        wait_until(lambda: not host(runner, "killed")["up"], 20, "the lost agent to be missed")
        yield runner
    finally:
        runner.close()


def host(ctl: Ctl, name: str) -> Any:
    """What the service says of a host."""
    return next(found for found in ctl.json("status")["hosts"] if found["name"] == name)


@pytest.fixture(scope="module")
def examined(hosts: TestHosts, ctl: Ctl) -> dict[str, dict[str, dict[str, str]]]:
    """All hosts' findings by check, of one run; bad ones have a next step."""
    names = [spec.name for spec in SPECS]
    done = ctl("doctor", *names, "-F", str(hosts.ssh_config), "--connect-timeout", "2", "--json", status=1)
    found = json.loads(done.stdout)
    assert [one["host"] for one in found] == names
    assert [one["host"] for one in found if one["well"]] == ["healthy"], found
    assert all(bool(each["step"]) == (each["state"] == "bad") for one in found for each in one["findings"])
    return {one["host"]: {each["check"]: each for each in one["findings"]} for one in found}


def bad(found: dict[str, dict[str, str]]) -> set[str]:
    return {check for check, finding in found.items() if finding["state"] == "bad"}


Examined = dict[str, dict[str, dict[str, str]]]


def test_a_healthy_host_is_all_well_and_that_is_exit_code_0(hosts: TestHosts, ctl: Ctl, examined: Examined) -> None:
    assert {finding["state"] for finding in examined["healthy"].values()} == {"ok"}
    assert "libvirt" in examined["healthy"]
    done = ctl("doctor", "healthy", "-F", str(hosts.ssh_config))
    assert done.stdout.startswith("healthy: all well\n  OK   tree     in the tree below the service")


def test_an_agent_that_was_killed_is_told_from_one_that_was_never_there(examined: Examined) -> None:
    assert bad(examined["killed"]) >= {"tree", "agent", "port"}
    assert "is installed and does not run" in examined["killed"]["agent"]["text"]
    assert "`ctl up -w killed`" in examined["killed"]["agent"]["step"]
    assert bad(examined["bare"]) >= {"tree", "agent"}
    assert examined["bare"]["agent"]["text"] == "is not installed"
    assert examined["bare"]["ssh"]["state"] == "ok"


def test_a_key_that_is_not_the_one_on_record_is_found(examined: Examined) -> None:
    assert "another than the one on record" in examined["forged"]["key"]["text"]
    assert examined["forged"]["agent"]["state"] == "ok"


def test_what_keeps_ssh_from_a_host_is_told(examined: Examined) -> None:
    assert examined["snakeless"]["python"]["text"] == "no Python 3.10 or newer: found none"
    assert examined["snakeless"]["ssh"]["state"] == "ok"
    assert examined["hung"]["ssh"]["text"] == "no answer to SSH within 2 s"
    assert examined["refusing"]["ssh"]["text"] == "connection refused"


def test_the_next_steps_do_mend_what_was_bad(hosts: TestHosts, ctl: Ctl, examined: Examined) -> None:
    config = str(hosts.ssh_config)
    ctl("down", "-w", "forged")
    ctl("up", "-w", "killed,forged", "-F", config)
    for name in ("killed", "forged"):
        found = ctl("doctor", name, "-F", config, "--json", status=None)
        assert '"check": "key",\n        "state": "ok"' in found.stdout, found.stdout
        assert host(ctl, name)["up"]
