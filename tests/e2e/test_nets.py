"""Networks of VMs across test hosts: VMs find one another by name, other networks don't find them, nothing is left."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.guest import build_guest
from deploy.testhosts import HostSpec, TestHosts
from tests.conftest import MakeTestHosts, need_test_hosts
from tests.e2e.ctl import Ctl
from tests.e2e.vm_host import BOOT_S
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

    # One deployment in two networks, by the names of its VMs.
    lab = infra(tmp_path / "lab.conf", {"r1": "h1", "r2": "h2", "b1": "h2"})
    profile = tmp_path / "lab.toml"
    profile.write_text('[vm."r*"]\nnetwork = "red"\n[vm."b*"]\nnetwork = "blue"\n')
    spawn = ["spawn", lab, "--profile", str(profile), "--memory-unit", "MiB", *boot]
    assert "no host is in an isolated network (red)" in ctl(*spawn, "--wait", "reachable", status=2).stderr
    assert ctl.json("get", "vms") == []
    # No host has an address in the isolated one, and yet it is known when its VMs have theirs.
    ctl(*spawn, "--wait", "address", timeout_s=400)
    addresses = {vm["name"]: vm["ip"] for vm in ctl.json("get", "vms")}
    assert addresses == {"r1": "10.77.0.1", "r2": "10.77.0.2", "b1": "10.78.0.2"}

    # Each VM gets the names that its host has.
    names = hosts.run("h1", ["sh", "-c", "cat /var/lib/canopy/*/vms.hosts"]).stdout
    known = " ".join(f"{ip}\\t{name}\\n" for ip, name in (line.split() for line in names.splitlines()[1:]))
    ctl.typed("r1", f"mkdir -p /etc; printf '{known.replace(' ', '')}' >/etc/hosts")
    wait_until(lambda: "1 packets received" in ctl.typed("r1", "ping -c1 -W2 r2"), BOOT_S, "r2 to answer r1")

    # The other network is not there, not even for whoever gives himself an address of it; its VM answers others.
    ctl.typed("r1", "ip addr add 10.78.0.99/24 dev eth0")
    heard = wait_until(
        lambda: re.search(r"(\d) packets received", ctl.typed("r1", "ping -c1 -W1 b1")), BOOT_S, "r1 to have asked"
    )
    assert heard is not None
    assert heard[1] == "0"
    hosts.run("h2", ["ping", "-c1", f"-W{BOOT_S:.0f}", addresses["b1"]])

    # A guest that has its address and answers no ping is not reachable.
    alone = infra(tmp_path / "blue.conf", {"b1": "h2"})
    again = ["spawn", alone, "--deployment", "lab", *spawn[2:], "--wait"]
    ctl(*again, "reachable")
    ctl.typed("b1", "echo 1 >/proc/sys/net/ipv4/icmp_echo_ignore_all")
    ask = ["ping", "-c1", "-W1", addresses["b1"]]
    wait_until(lambda: hosts.run("h2", ask, check=False).returncode != 0, BOOT_S, "b1 to be silent")
    silent = ctl(*again, "reachable", "--timeout", "6", status=3)
    assert "b1" in silent.stderr
    ctl(*again, "address")
    # Nothing was learnt, and nothing is sent to whoever is not known.
    table = json.loads(hosts.run("h1", ["bridge", "-json", "fdb", "show", "dev", "cx-red"]).stdout)
    away = [entry["mac"] for entry in table if "dst" in entry]
    assert away == ["00:16:3e" + "".join(f":{int(part):02x}" for part in addresses["r2"].split(".")[1:])]

    # A network with VMs stays.
    assert "destroy them first" in ctl("net", "rm", "red", status=1).stderr
    ctl("destroy", lab)
    ctl("net", "rm", "red")
    for name in HOSTS:
        assert links(hosts, name) - before[name] == {"cn-blue", "cx-blue"}
    ctl("down", "--purge")
    wait_until(lambda: {name: links(hosts, name) for name in HOSTS} == before, BOOT_S, "no interface to be left")
