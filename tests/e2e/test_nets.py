"""Networks of VMs across test hosts: VMs find one another by name, other networks don't find them, nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.guest import build_guest
from deploy.testhosts import HostSpec, TestHosts
from tests.conftest import MakeTestHosts, need_test_hosts
from tests.e2e.ctl import Ctl
from tests.e2e.vm_host import BOOT_S
from tests.net.localfleet import ROOT
from tests.waiting import wait_until

HOSTS = ("h1", "h2")
RED, BLUE = "10.77.0.0/24", "10.78.0.0/24"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def hosts(testhosts_module: MakeTestHosts) -> TestHosts:
    need_test_hosts(libvirt=True)
    return testhosts_module([HostSpec(name, libvirt=True) for name in HOSTS])


@pytest.fixture
def ctl(tmp_path: Path) -> Iterator[Ctl]:
    runner = Ctl(tmp_path / "fleets")
    yield runner
    runner.close()


def infra(path: Path, places: dict[str, str]) -> str:
    """An infra.conf with these VMs on these hosts."""
    lines = ["#list of nodes", *(f"{host} 2 200 4096" for host in HOSTS), "#list of VMs"]
    lines += [*(f"{vm} 1 10 96" for vm in places), "#initial configuration"]
    lines += [f"{host} {' '.join(vm for vm in places if places[vm] == host)}" for host in sorted(set(places.values()))]
    path.write_text("\n".join([*lines, "#end of configuration", ""]))
    return str(path)


def typed(ctl: Ctl, vm: str, text: str) -> str:
    """What a VM's console shows after a line was typed there."""
    done = subprocess.run(
        [sys.executable, "-m", "controller.cli", "console", vm, "--quiet", "--force"],
        input=f"\r{text}\r".encode(),
        capture_output=True,
        timeout=BOOT_S,
        check=True,
        env={**os.environ, **ctl.environment, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout.decode(errors="replace")


def links(hosts: TestHosts, name: str) -> set[str]:
    return {link["ifname"] for link in json.loads(hosts.run(name, ["ip", "-json", "link"]).stdout)}


def test_vms_of_a_network_reach_each_other_by_name_and_no_other_network_does(
    hosts: TestHosts, ctl: Ctl, tmp_path: Path
) -> None:
    before = {name: links(hosts, name) for name in HOSTS}
    guest = build_guest()
    boot = [
        "--kernel",
        str(guest.kernel),
        "--initrd",
        str(guest.initrd),
        "--cmdline",
        "console=ttyS0 quiet no_timer_check",
    ]
    ctl("up", "-w", ",".join(HOSTS), "-F", str(hosts.ssh_config))
    ctl("net", "create", "red", "--subnet", RED, "--isolated")
    ctl("net", "create", "red", "--subnet", RED, "--isolated")
    ctl("net", "create", "blue", "--subnet", BLUE)
    assert links(hosts, "h1") - before["h1"] == {"cn-red", "cx-red", "cn-blue", "cx-blue"}

    red = infra(tmp_path / "red.conf", {"r1": "h1", "r2": "h2"})
    blue = infra(tmp_path / "blue.conf", {"b1": "h2"})
    ctl("spawn", red, "--subnet", RED, "--bridge", "cn-red", "--memory-unit", "MiB", *boot, timeout_s=BOOT_S)
    ctl("spawn", blue, "--subnet", BLUE, "--skip-ips", "1", "--bridge", "cn-blue", "--memory-unit", "MiB", *boot,
        "--wait", "reachable", timeout_s=BOOT_S)  # fmt: skip
    addresses = {vm["name"]: vm["ip"] for vm in ctl.json("get", "vms")}
    log = ["sh", "-c", "cat /var/lib/canopy/*/vms/r1/console.log"]
    wait_until(lambda: f"ready at {addresses['r1']}" in hosts.run("h1", log).stdout, BOOT_S, "r1 to be there")

    # Each VM gets the names that its host has.
    names = hosts.run("h1", ["sh", "-c", "cat /var/lib/canopy/*/vms.hosts"]).stdout
    known = " ".join(f"{ip}\\t{name}\\n" for ip, name in (line.split() for line in names.splitlines()[1:]))
    typed(ctl, "r1", f"mkdir -p /etc; printf '{known.replace(' ', '')}' >/etc/hosts")
    wait_until(lambda: "1 packets received" in typed(ctl, "r1", "ping -c1 -W2 r2"), BOOT_S, "r2 to answer r1")

    # The other network is not there, not even for whoever gives himself an address of it.
    typed(ctl, "r1", "ip addr add 10.78.0.99/24 dev eth0")
    assert "0 packets received" in typed(ctl, "r1", "ping -c1 -W1 b1")
    # Nothing was learnt, and nothing is sent to whoever is not known.
    table = json.loads(hosts.run("h1", ["bridge", "-json", "fdb", "show", "dev", "cx-red"]).stdout)
    away = [entry["mac"] for entry in table if "dst" in entry]
    assert away == ["00:16:3e" + "".join(f":{int(part):02x}" for part in addresses["r2"].split(".")[1:])]

    # A network with VMs stays.
    assert "destroy them first" in ctl("net", "rm", "red", status=1).stderr
    ctl("destroy", red)
    ctl("destroy", blue)
    ctl("net", "rm", "red")
    for name in HOSTS:
        assert links(hosts, name) - before[name] == {"cn-blue", "cx-blue"}
    ctl("down", "--purge")
    wait_until(lambda: {name: links(hosts, name) for name in HOSTS} == before, BOOT_S, "no interface to be left")
