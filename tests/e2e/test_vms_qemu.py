"""VmWorker with real QEMU: under a test host's libvirtd, and in a hypervisor embedded in the agent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.guest import Guest, build_guest
from deploy.testhosts import HostSpec, TestHosts
from protocol.vms import Disk, VmChange, VmPower
from tests.conftest import MakeTestHosts, need_test_hosts
from tests.e2e.vm_host import (
    AGENT,
    BOOT_S,
    BRIDGE,
    CODE,
    KILLED_SHOWS_S,
    NOBODY,
    PYTHON,
    QEMU,
    Cage,
    Driver,
    a_spec,
    add_image,
    changes,
    put_code,
    qemu_of,
    says,
)

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def guest() -> Guest:
    return build_guest()


# --- a test host with libvirtd ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(testhosts_module: MakeTestHosts) -> TestHosts:
    need_test_hosts(libvirt=True)
    fleet = testhosts_module([HostSpec("hv1", libvirt=True, vm_bridge=BRIDGE)])
    put_code(fleet.host("hv1").root / CODE.relative_to("/"))
    return fleet


def drive(fleet: TestHosts) -> Driver:
    command = ["/usr/bin/env", f"PYTHONPATH={CODE}", PYTHON, f"{CODE}/vm_driver.py"]
    process = fleet.popen(
        "hv1",
        [*command, str(AGENT), "qemu:///system"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    return Driver(process)


def pids(fleet: TestHosts, program: str, word: str = "") -> list[int]:
    """The host's processes of a program, by their pids inside, that have the word in an argument."""
    return [
        process.pid
        for process in fleet.processes("hv1")
        if process.argv and Path(process.argv[0]).name == program and any(word in given for given in process.argv)
    ]


def signal_in_host(fleet: TestHosts, how: str, pid: int) -> None:
    fleet.run("hv1", ["kill", f"-{how}", str(pid)])


def test_vms_on_a_host_live_through_what_happens_to_it(host: TestHosts, guest: Guest, tmp_path: Path) -> None:
    root = host.host("hv1").root
    images = root / AGENT.relative_to("/") / "images"
    files = root / AGENT.relative_to("/") / "vms"
    base = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "64M"], check=True)
    boot = (add_image(images, guest.kernel), add_image(images, guest.initrd))
    addresses = [str(host.vm_subnet[number]) for number in (10, 11)]
    first = a_spec("vm1", addresses[0], boot, bridge=BRIDGE)
    second = a_spec("vm2", addresses[1], boot, bridge=BRIDGE, disk=Disk(image=add_image(images, base)))

    driver = drive(host)
    assert changes(driver.create(first, second)) == {"vm1": VmChange.CREATED, "vm2": VmChange.CREATED}
    says(files / "vm1" / "console.log", f"canopy-guest vm1 ready at {addresses[0]}")
    says(files / "vm2" / "console.log", "canopy-guest vm2 disk vda of 64 MiB")
    assert driver.ask("reachable", names=["vm1", "vm2", "vm9"], deadline_s=BOOT_S / 60) == {
        "vm1": True,
        "vm2": True,
        "vm9": None,
    }
    _nobody_else_can_read(host, AGENT / "images" / boot[1])
    _nobody_else_can_read(host, AGENT / "vms" / "vm2" / "overlay.qcow2")
    running = {name: pids(host, QEMU, f"guest={name},")[0] for name in ("vm1", "vm2")}

    # The agent goes, and its VMs stay.
    driver.end(kill=True)
    driver = drive(host)
    assert changes(driver.create(first, second)) == {"vm1": VmChange.UNCHANGED, "vm2": VmChange.UNCHANGED}
    assert {name: pids(host, QEMU, f"guest={name},")[0] for name in running} == running

    # libvirtd hangs, and then dies, and nothing is said of VMs that is not known.
    [libvirtd] = pids(host, "libvirtd")
    signal_in_host(host, "STOP", libvirtd)
    driver.is_told("vm1", VmPower.UNKNOWN, BOOT_S)
    signal_in_host(host, "CONT", libvirtd)
    driver.is_told("vm1", VmPower.RUNNING, BOOT_S)
    signal_in_host(host, "KILL", libvirtd)
    driver.is_told("vm2", VmPower.UNKNOWN, BOOT_S)
    host.run("hv1", ["libvirtd", "-d"])
    driver.is_told("vm2", VmPower.RUNNING, BOOT_S)

    # A QEMU that is killed behind libvirt's back shows.
    signal_in_host(host, "KILL", running["vm1"])
    assert driver.is_told("vm1", VmPower.SHUTOFF, KILLED_SHOWS_S).reason in {"crashed", "daemon"}  # as below
    assert driver.states["vm2"].power is VmPower.RUNNING
    assert driver.ask("reachable", names=["vm1", "vm2"], deadline_s=2) == {"vm1": False, "vm2": True}
    assert changes(driver.create(first, second)) == {"vm1": VmChange.STARTED, "vm2": VmChange.UNCHANGED}

    assert driver.destroy() == {"vm1": VmChange.REMOVED, "vm2": VmChange.REMOVED}
    driver.end()
    assert pids(host, QEMU) == []
    assert list(files.iterdir()) == []
    assert host.run("hv1", ["virsh", "-c", "qemu:///system", "list", "--all", "--name"]).stdout.strip() == ""


def _nobody_else_can_read(fleet: TestHosts, file: Path) -> None:
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    assert fleet.run("hv1", ["head", "-c1", str(file)], check=False).returncode == 0
    assert fleet.run("hv1", [*nobody, "head", "-c1", str(file)], check=False).returncode != 0


# --- a hypervisor inside the agent, for fleets without root and without daemons -------------------------------------


@pytest.fixture
def cage(uid: int) -> Iterator[Cage]:
    need_test_hosts(libvirt=True)
    made = Cage(uid)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("uid", "mode", "runs_as"),
    [
        pytest.param(0, 0o755, "another user", id="root"),
        # As under /root: QEMU's own user has no way in.
        pytest.param(0, 0o700, "the same user", id="root in a closed directory"),
        pytest.param(NOBODY, 0o700, "the same user", id="an ordinary user"),
    ],
)
def test_an_embedded_hypervisor_needs_no_daemon_and_its_vms_outlive_the_agent(
    cage: Cage, guest: Guest, mode: int, runs_as: str
) -> None:
    # Not among pytest's own temporary directories, which are closed in any case.
    directory = Path("/var/tmp") / f"canopy-test-{os.getpid()}-{time.monotonic_ns()}"
    directory.mkdir(mode=mode)
    os.chown(directory, cage.uid, cage.uid)
    try:
        put_code(directory / "code")
        _embedded(cage, guest, directory, runs_as)
    finally:
        shutil.rmtree(directory)


def _embedded(cage: Cage, guest: Guest, directory: Path, runs_as: str) -> None:
    boot = (add_image(directory / "images", guest.kernel), add_image(directory / "images", guest.initrd))
    os.chown(directory / "images", cage.uid, cage.uid)
    spec = a_spec("vm1", "198.18.0.5", boot, bridge=None)
    uri = f"qemu:///embed?root={directory}/libvirt"
    driver = cage.drive(directory, uri)
    assert changes(driver.create(spec)) == {"vm1": VmChange.CREATED}
    says(directory / "vms" / "vm1" / "console.log", "canopy-guest vm1 ready at 198.18.0.5")
    [qemu] = qemu_of(directory)
    same = Path(f"/proc/{qemu}").stat().st_uid == cage.uid
    assert runs_as == ("the same user" if same else "another user")

    driver.end(kill=True)
    assert qemu_of(directory) == [qemu]
    driver = cage.drive(directory, uri)
    driver.is_told("vm1", VmPower.RUNNING, BOOT_S)
    assert changes(driver.create(spec)) == {"vm1": VmChange.UNCHANGED}
    os.kill(qemu, signal.SIGKILL)
    # "daemon": libvirt, which has only just begun, finds out as it looks for it.
    assert driver.is_told("vm1", VmPower.SHUTOFF, KILLED_SHOWS_S).reason in {"crashed", "daemon"}
    assert driver.destroy() == {"vm1": VmChange.REMOVED}
    driver.end()
    assert qemu_of(directory) == []
    assert list((directory / "vms").iterdir()) == []
