"""Running VMs from one test host to another and back: memory and disk go along, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
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


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A guest's kernel and initial RAM disk, and a base disk."""
    guest, base = build_guest(), tmp_path_factory.mktemp("images") / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "64M"], check=True)
    return [guest.kernel, guest.initrd, base]


@pytest.fixture(scope="module")
def ctl(hosts: TestHosts, images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ctl]:
    """A fleet with vm1 and vm2 on h1, of images that h2 has not got."""
    home = tmp_path_factory.mktemp("fleets")
    runner = Ctl(home)
    kernel, initrd, base = map(str, images)
    (home / "keys").write_text(f"ssh-ed25519 {'A' * 68} someone\n")
    runner("up", "-w", ",".join(HOSTS), "-F", str(hosts.ssh_config))
    runner(
        "spawn", infra(home / "lab.conf", {"vm1": "h1", "vm2": "h1"}), "--memory-unit", "MiB", "--bridge", BRIDGE,
        "--subnet", str(hosts.subnet), "--skip-ips", str(hosts.subnet.num_addresses // 2),
        "--kernel", kernel, "--initrd", initrd, "--cmdline", "console=ttyS0 quiet no_timer_check",
        "--image", base, "--ssh-keys", str(home / "keys"), "--wait", "reachable", timeout_s=3 * BOOT_S,
    )  # fmt: skip
    yield runner
    runner("down", "--vms", "--purge", status=None)
    runner.close()


@pytest.fixture(scope="module")
def brought(ctl: Ctl, images: list[Path]) -> None:
    """The images are on both hosts."""
    for image in images:
        ctl("image", "add", str(image))


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


def test_running_vms_move_with_memory_and_disk_and_nothing_stays(
    hosts: TestHosts, ctl: Ctl, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    typed(ctl, "vm1", "KEPT=$((6*7)); printf ontheway >/dev/vda; sync")

    # Without the VM's images the other host refuses, and the VM runs on.
    refused = ctl("migrate", "vm1", "h2", status=1).stderr
    assert "vm1: h1 -> h2: h2: refused" in refused
    assert "is not on this host; push it as an image first" in refused
    assert [left(hosts, name) for name in HOSTS] == [with_vms("vm1", "vm2"), with_vms()]
    request.getfixturevalue("brought")

    ctl("migrate", "vm1", "h2")
    assert [left(hosts, name) for name in HOSTS] == [with_vms("vm2"), with_vms("vm1")]
    assert {vm["name"]: vm["host"] for vm in ctl.json("get", "vms")} == {"vm1": "h2", "vm2": "h1"}
    said = typed(ctl, "vm1", "echo 3 >/proc/sys/vm/drop_caches; echo kept-$KEPT $(head -c8 /dev/vda)-$(uname -n)")
    assert "kept-42 ontheway-vm1" in said
    wait_until(
        lambda: {vm["name"]: vm["power"] for vm in ctl.json("health")["vms"]} == {"vm1": "running", "vm2": "running"},
        BOOT_S,
        "both to be known as running",
    )
    for vm in ctl.json("get", "vms"):
        subprocess.run(["ping", "-c", "1", "-W", "5", vm["ip"]], check=True, stdout=subprocess.DEVNULL)

    # And as a file has it, the other one away and this one back, each host at one move at a time.
    swapped = infra(tmp_path / "swapped.conf", {"vm1": "h1", "vm2": "h2"})
    plan = ["migrate", "--plan", swapped, "--deployment", "lab", "--memory-unit", "MiB"]
    would = json.loads(ctl(*plan, "--dry-run", "--json", status=2).stdout)
    assert [(move["name"], move["from"], move["to"], move["round"]) for move in would["moves"]] == [
        ("vm1", "h2", "h1", 1),
        ("vm2", "h1", "h2", 2),
    ]
    ctl(*plan)
    assert [left(hosts, name) for name in HOSTS] == [with_vms("vm1"), with_vms("vm2")]
    assert "kept-42 ontheway" in typed(ctl, "vm1", "echo kept-$KEPT $(head -c8 /dev/vda)")
    assert "where they should be" in ctl(*plan).stdout
    ctl("vm", "suspend", "vm2")
    assert "only a VM that runs is moved; resume it first" in ctl("migrate", "vm2", "h1", status=1).stderr
    ctl("vm", "destroy", "vm2")


def agent_of(hosts: TestHosts, name: str) -> int:
    """The agent of a host, by its pid there."""
    [pid] = [one.pid for one in hosts.processes(name) if "-m" in one.argv and "agent" in one.argv]
    return pid


def libvirtd_of(hosts: TestHosts, name: str) -> int:
    [pid] = [one.pid for one in hosts.processes(name) if one.argv and one.argv[0].endswith("libvirtd")]
    return pid


def kill_agent(hosts: TestHosts, ctl: Ctl, name: str) -> None:
    hosts.run(name, ["kill", "-9", str(agent_of(hosts, name))])
    ctl("up", "-w", ",".join(HOSTS), "-F", str(hosts.ssh_config))


def kill_libvirtd(hosts: TestHosts, ctl: Ctl, name: str) -> None:
    del ctl
    hosts.run(name, ["kill", "-9", str(libvirtd_of(hosts, name))])
    hosts.run(name, ["libvirtd", "-d"])


def kill_service(hosts: TestHosts, ctl: Ctl, name: str) -> None:
    del name
    [service] = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "controller.service" in (process.info["cmdline"] or []) and str(ctl.home / "default") in process.cmdline()
    ]
    service.kill()
    service.wait()
    ctl("up", "-w", ",".join(HOSTS), "-F", str(hosts.ssh_config))


#: Who is struck while the VM's memory is on its way, and how.
STRUCK = [
    pytest.param(kill_agent, "h1", id="the agent that lets it go"),
    pytest.param(kill_agent, "h2", id="the agent that takes it in"),
    pytest.param(kill_libvirtd, "h1", id="the libvirt that lets it go"),
    pytest.param(kill_libvirtd, "h2", id="the libvirt that takes it in"),
    pytest.param(kill_service, "", id="the service"),
]


@pytest.mark.usefixtures("brought")
@pytest.mark.parametrize(("strike", "name"), STRUCK)
def test_whoever_dies_in_mid_move_the_vm_runs_on_one_host_and_nothing_stays(
    hosts: TestHosts, ctl: Ctl, strike: Callable[[TestHosts, Ctl, str], None], name: str
) -> None:
    typed(ctl, "vm1", f"STRIKE={len(name)}")
    slowly(hosts, 1)
    moving = ctl.start("migrate", "vm1", "h2")
    wait_until(lambda: "vm1" in left(hosts, "h2")["QEMUs"] and on_its_way(hosts), BOOT_S, "vm1 to be on its way")
    strike(hosts, ctl, name)
    slowly(hosts, 8_000)
    moving.communicate(timeout=BOOT_S)
    home = wait_until(lambda: settled(hosts, ctl), BOOT_S, "one of the hosts to have it")
    assert "running" in hosts.run(home, ["virsh", "domstate", "vm1"]).stdout
    assert f"strike-{len(name)}" in typed(ctl, "vm1", "echo strike-$STRIKE")
    if home == "h2":  # what was struck did not stop it
        ctl("migrate", "vm1", "h1")


def slowly(hosts: TestHosts, mib_s: int) -> None:
    """How fast libvirt moves the VM from now on."""
    hosts.run("h1", ["virsh", "migrate-setspeed", "vm1", str(mib_s)], check=False)


def on_its_way(hosts: TestHosts) -> bool:
    said = hosts.run("h1", ["virsh", "domjobinfo", "vm1"], check=False).stdout
    return "Memory processed" in said and "Memory processed: 0.000" not in " ".join(said.split())


def settled(hosts: TestHosts, ctl: Ctl) -> str:
    """The host that vm1 is on by the service's word, once each host has the VMs that it should, whole, and nothing else
    of any; else nothing."""
    where = {vm["name"]: vm["host"] for vm in ctl.json("get", "vms")}
    whole = all(left(hosts, host) == with_vms(*sorted(vm for vm in where if where[vm] == host)) for host in HOSTS)
    return where["vm1"] if whole else ""


@pytest.mark.usefixtures("brought")
def test_ctrl_c_leaves_a_vm_where_it_was(hosts: TestHosts, ctl: Ctl) -> None:
    slowly(hosts, 1)
    moving = ctl.start("migrate", "vm1", "h2")
    wait_until(lambda: on_its_way(hosts), BOOT_S, "vm1 to be on its way")
    moving.send_signal(signal.SIGINT)
    moving.communicate(timeout=BOOT_S)
    assert moving.returncode == 130
    assert settled(hosts, ctl) == "h1"
    slowly(hosts, 8_000)
    assert "running" in hosts.run("h1", ["virsh", "domstate", "vm1"]).stdout
