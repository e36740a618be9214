"""Running VMs from one test host to another and back: memory and disk go along, and nothing is left behind."""

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
from tests.e2e.vm_host import BOOT_S, BRIDGE
from tests.net.localfleet import ROOT
from tests.waiting import wait_until

HOSTS = ("h1", "h2")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def hosts(testhosts_module: MakeTestHosts) -> TestHosts:
    need_test_hosts(libvirt=True)
    return testhosts_module([HostSpec(name, libvirt=True, vm_bridge=BRIDGE) for name in HOSTS])


@pytest.fixture
def ctl(tmp_path: Path) -> Iterator[Ctl]:
    runner = Ctl(tmp_path / "fleets")
    yield runner
    runner.close()


def infra(path: Path, places: dict[str, str]) -> str:
    """An infra.conf with these VMs on these hosts, each of which has room for two."""
    lines = ["#list of nodes", *(f"{host} 2 200 200" for host in HOSTS), "#list of VMs"]
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


def left(hosts: TestHosts, name: str) -> dict[str, list[str]]:
    """What a host has of VMs: domains, QEMUs, directories, journals and sockets of moves."""

    def found(pattern: str) -> list[str]:
        return hosts.run(name, ["sh", "-c", f"cd /; ls -d {pattern} 2>/dev/null || true"]).stdout.split()

    return {
        "domains": sorted(hosts.run(name, ["virsh", "list", "--all", "--name"]).stdout.split()),
        "QEMUs": sorted(
            process.argv[process.argv.index("-name") + 1].removeprefix("guest=").split(",")[0]
            for process in hosts.processes(name)
            if process.argv and "qemu-system" in process.argv[0] and "-name" in process.argv
        ),
        "files": [path.rpartition("/")[2] for path in found("var/lib/canopy/*/vms/*")],
        "journals": found("var/lib/canopy/*/journal/*"),
        "sockets": found("run/libvirt/c??????/*"),
    }


def with_vms(*names: str) -> dict[str, list[str]]:
    return {"domains": [*names], "QEMUs": [*names], "files": [*names], "journals": [], "sockets": []}


def test_running_vms_move_with_memory_and_disk_and_nothing_stays(hosts: TestHosts, ctl: Ctl, tmp_path: Path) -> None:
    guest = build_guest()
    base, keys = tmp_path / "base.qcow2", tmp_path / "keys"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "64M"], check=True)
    keys.write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDummyDummyDummyDummyDummyDummyDummyDummyDumm someone\n")
    ctl("up", "-w", ",".join(HOSTS), "-F", str(hosts.ssh_config))
    ctl(
        "spawn", infra(tmp_path / "lab.conf", {"vm1": "h1", "vm2": "h1"}), "--memory-unit", "MiB", "--bridge", BRIDGE,
        "--subnet", str(hosts.subnet), "--skip-ips", str(hosts.subnet.num_addresses // 2),
        "--kernel", str(guest.kernel), "--initrd", str(guest.initrd), "--cmdline", "console=ttyS0 quiet no_timer_check",
        "--image", str(base), "--ssh-keys", str(keys), "--wait", "reachable", timeout_s=BOOT_S,
    )  # fmt: skip
    typed(ctl, "vm1", "KEPT=$((6*7)); printf ontheway >/dev/vda; sync")

    # Without the VM's images the other host refuses, and the VM runs on.
    refused = ctl("migrate", "vm1", "h2", status=1).stderr
    assert "vm1: h1 -> h2: h2: refused" in refused
    assert "is not on this host; push it as an image first" in refused
    assert left(hosts, "h1") == with_vms("vm1", "vm2")
    assert left(hosts, "h2") == with_vms()
    for image in (guest.kernel, guest.initrd, base):
        ctl("image", "add", str(image))

    ctl("migrate", "vm1", "h2")
    assert left(hosts, "h1") == with_vms("vm2")
    assert left(hosts, "h2") == with_vms("vm1")
    assert {vm["name"]: vm["host"] for vm in ctl.json("get", "vms")} == {"vm1": "h2", "vm2": "h1"}
    said = typed(ctl, "vm1", "echo 3 >/proc/sys/vm/drop_caches; echo kept-$KEPT $(head -c8 /dev/vda)-$(uname -n)")
    assert "kept-42 ontheway-vm1" in said
    wait_until(
        lambda: (
            {vm["name"]: vm["power"] for vm in ctl.json("health")["vms"]} == dict.fromkeys(("vm1", "vm2"), "running")
        ),
        BOOT_S,
        "both to be known as running",
    )
    for vm in ctl.json("get", "vms"):
        subprocess.run(["ping", "-c", "1", "-W", "5", vm["ip"]], check=True, stdout=subprocess.DEVNULL)

    # And as a file has it: back, and the other one away, each host at one move at a time.
    swapped = infra(tmp_path / "swapped.conf", {"vm1": "h1", "vm2": "h2"})
    plan = ["migrate", "--plan", swapped, "--deployment", "lab", "--memory-unit", "MiB"]
    would = json.loads(ctl(*plan, "--dry-run", "--json", status=2).stdout)
    assert [(move["vm"], move["from"], move["to"], move["round"]) for move in would["moves"]] == [
        ("vm1", "h2", "h1", 1),
        ("vm2", "h1", "h2", 2),
    ]
    ctl(*plan)
    assert left(hosts, "h1") == with_vms("vm1")
    assert left(hosts, "h2") == with_vms("vm2")
    assert "kept-42 ontheway" in typed(ctl, "vm1", "echo kept-$KEPT $(head -c8 /dev/vda)")
    assert "where they should be" in ctl(*plan).stdout

    assert "on h1 already" in ctl("migrate", "vm1", "h1", status=2).stderr
    ctl("vm", "suspend", "vm1")
    assert "only a VM that runs is moved; resume it first" in ctl("migrate", "vm1", "h2", status=1).stderr
    ctl("destroy", swapped, "--deployment", "lab")
    assert [left(hosts, name) for name in HOSTS] == [with_vms(), with_vms()]
    ctl("down", "--purge")
