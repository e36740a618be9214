"""What is left of VMs when somebody is killed in the midst of their making or removal: nothing, or all of it.

Each row of the tables is a test: where the agent or libvirtd is killed, and what else goes down with it. Then a new
agent comes, and has only its directory and libvirt to go by.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from deploy.testhosts import HostSpec, TestHosts
from protocol.vms import Disk, Seed, VmChange, VmPower, VmSpec
from tests.conftest import MakeTestHosts, need_test_hosts
from tests.e2e.vm_host import (
    AGENT,
    BOOT_S,
    BRIDGE,
    CODE,
    DEPLOYMENT,
    PYTHON,
    QEMU,
    Cage,
    Driver,
    a_spec,
    add_image,
    changes,
    put_code,
    qemu_of,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

FOREIGN_UUID = "11111111-2222-4333-8444-555555555555"
FOREIGN = f"""<domain type='qemu'><name>foreign</name><uuid>{FOREIGN_UUID}</uuid>
<memory unit='MiB'>16</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"""


class Place:
    """An agent's directory, and a libvirt with a domain that is not Canopy's."""

    directory: Path
    spec: VmSpec

    def drive(self, dies_at: str = "") -> Driver:
        raise NotImplementedError

    def qemus(self) -> list[int]:
        raise NotImplementedError

    @property
    def request(self) -> dict[str, Any]:
        return {"deployment": DEPLOYMENT, "specs": [msgspec.to_builtins(self.spec)]}

    @property
    def left(self) -> list[str]:
        """The files that VMs and journals have."""
        folders = (self.directory / "vms", self.directory / "journal")
        return sorted(str(path.relative_to(self.directory)) for folder in folders for path in folder.glob("*"))

    def converges(self, driver: Driver) -> None:
        """A rerun makes what is missing, and a removal leaves nothing but what is not Canopy's."""
        assert set(changes(driver.create(self.spec)).values()) <= {VmChange.CREATED, VmChange.UNCHANGED}
        assert len(self.qemus()) == 1
        assert self.left == ["vms/vm1"]
        assert driver.ask("domains") == ["foreign", "vm1"]
        assert driver.destroy() == {"vm1": VmChange.REMOVED}
        assert driver.ask("domains") == ["foreign"]
        driver.end()
        assert self.left == []
        assert self.qemus() == []


@dataclass
class Embedded(Place):
    """One with the hypervisor embedded in the agent."""

    cage: Cage
    directory: Path
    spec: VmSpec

    @property
    def uri(self) -> str:
        return f"qemu:///embed?root={self.directory}/libvirt"

    def drive(self, dies_at: str = "") -> Driver:
        return self.cage.drive(self.directory, self.uri, dies_at=dies_at)

    def qemus(self) -> list[int]:
        return qemu_of(self.directory)

    def power_cut(self) -> None:
        """What a power cut takes: every process, and what is in memory alone."""
        for pid in self.qemus():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.qemus(), BOOT_S, "QEMU to end")
        shutil.rmtree(self.directory / "libvirt" / "run", ignore_errors=True)


@pytest.fixture(scope="module")
def place() -> Iterator[Embedded]:
    need_test_hosts(libvirt=True)
    cage = Cage(0)
    directory = Path("/var/tmp") / f"canopy-test-{os.getpid()}-{time.monotonic_ns()}"
    directory.mkdir(mode=0o755)
    try:
        put_code(directory / "code")
        base = directory / "base"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "64M"], check=True)
        settings = directory / "libvirt" / "etc" / "qemu.conf"
        settings.parent.mkdir(parents=True)
        # The machine's cgroups are also those of whoever tests beside.
        settings.write_text('stdio_handler = "file"\ncgroup_controllers = []\nuser = "root"\ngroup = "root"\n')
        # Its firmware finds nothing to boot and halts, which takes next to no CPU time.
        disk = Disk(image=add_image(directory / "images", base))
        spec = replace(
            a_spec("vm1", "198.18.0.5", ("", ""), bridge=None, disk=disk), boot=None, memory_mib=16, seed=Seed()
        )
        made = Embedded(cage, directory, spec)
        driver = made.drive()
        assert driver.ask("define", document=FOREIGN) == "foreign"
        driver.end()
        yield made
    finally:
        cage.close()
        shutil.rmtree(directory)


#: Where the agent is killed, what else goes down with it, and whether the VM is whole then.
MAKING = [
    ("make its directory", "agent", False),
    ("make its disk", "agent", False),
    ("make its seed", "agent", False),
    ("define it", "agent", False),
    ("start it", "agent", False),
    ("end", "agent", True),
    ("make its disk", "host", False),
    ("start it", "host", False),
    ("end", "host", False),
]


@pytest.mark.parametrize(("step", "struck", "whole"), MAKING)
def test_a_creation_cut_short_leaves_a_whole_vm_or_none(place: Embedded, step: str, struck: str, whole: bool) -> None:
    place.drive(dies_at=step).dies("create", **place.request)
    if struck == "host":
        place.power_cut()
    # A start is enough: nobody has to ask for anything.
    driver = place.drive()
    wait_until(lambda: place.left == (["vms/vm1"] if whole else []), BOOT_S, f"the repair, not {place.left}")
    assert driver.ask("domains") == (["foreign", "vm1"] if whole else ["foreign"])
    assert len(place.qemus()) == whole
    place.converges(driver)


@pytest.mark.parametrize("step", ["make its disk", "start it"])
def test_a_rerun_need_not_wait_for_the_repair(place: Embedded, step: str) -> None:
    place.drive(dies_at=step).dies("create", **place.request)
    place.converges(place.drive())


@pytest.mark.parametrize(("step", "struck"), [("remove it", "agent"), ("end", "agent"), ("remove it", "host")])
def test_a_removal_cut_short_is_finished(place: Embedded, step: str, struck: str) -> None:
    driver = place.drive()
    assert changes(driver.create(place.spec)) == {"vm1": VmChange.CREATED}
    driver.end()
    place.drive(dies_at=step).dies("destroy", deployment=DEPLOYMENT)
    if struck == "host":
        place.power_cut()
    driver = place.drive()
    wait_until(lambda: place.left == [], BOOT_S, f"the removal, not {place.left}")
    assert driver.ask("domains") == ["foreign"]
    place.converges(driver)


def test_a_qemu_killed_in_the_midst_of_its_start_leaves_a_vm_that_a_rerun_starts(place: Embedded) -> None:
    driver = place.drive()
    assert changes(driver.create(place.spec)) == {"vm1": VmChange.CREATED}
    [qemu] = place.qemus()
    os.kill(qemu, signal.SIGKILL)
    driver.is_told("vm1", VmPower.SHUTOFF, BOOT_S)
    assert changes(driver.create(place.spec)) == {"vm1": VmChange.STARTED}
    place.converges(driver)


def test_a_full_disk_leaves_nothing_and_a_rerun_after_it_makes_the_vm(place: Embedded) -> None:
    # An overlay's header takes 200 KiB.
    small = ["mount", "-t", "tmpfs", "-o", "size=128k,mode=710", "none", str(place.directory / "vms")]
    place.cage.enter(*small)
    driver = place.drive()
    [refused] = driver.create(place.spec)
    assert refused.change is VmChange.FAILED
    assert "No space left" in refused.detail
    assert place.cage.enter("ls", str(place.directory / "vms")) == ""
    assert driver.ask("domains") == ["foreign"]
    place.cage.enter("umount", str(place.directory / "vms"))
    assert place.left == []
    place.converges(driver)


def test_an_image_that_is_damaged_on_this_host_leaves_nothing_until_it_is_whole(place: Embedded) -> None:
    assert place.spec.disk is not None
    image = place.directory / "images" / place.spec.disk.image
    whole = image.read_bytes()
    driver = place.drive()
    image.chmod(0o644)
    image.write_bytes(bytes(len(whole)))
    [refused] = driver.create(place.spec)
    assert refused.change is VmChange.FAILED
    assert "qcow2" in refused.detail
    assert place.left == []
    assert driver.ask("domains") == ["foreign"]
    image.write_bytes(whole)
    place.converges(driver)


def test_a_vm_whose_name_or_uuid_is_a_foreign_domains_leaves_that_and_nothing_of_its_own(place: Embedded) -> None:
    driver = place.drive()
    named = replace(place.spec, name="foreign")
    twin = replace(place.spec, uuid=FOREIGN_UUID)
    results = driver.create(named, twin)
    assert [result.change for result in results] == [VmChange.FAILED, VmChange.FAILED]
    assert (
        driver.ask("act", deployment=DEPLOYMENT, names=["foreign"], action="start", label=None)[0]["change"] == "failed"
    )
    assert place.left == []
    assert driver.ask("domains") == ["foreign"]
    place.converges(driver)


# --- a host with libvirtd --------------------------------------------------------------------------------------------


@dataclass
class Daemonic(Place):
    """A test host with libvirtd, on a bridge with others."""

    hosts: TestHosts
    directory: Path
    spec: VmSpec

    def drive(self, dies_at: str = "", victim: str = "") -> Driver:
        command = ["/usr/bin/env", f"PYTHONPATH={CODE}", PYTHON, f"{CODE}/vm_driver.py"]
        argv = [*command, str(AGENT), "qemu:///system", dies_at, victim]
        return Driver(self.hosts.popen("hv1", argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))

    def bring_libvirtd_back(self) -> None:
        self.hosts.run("hv1", ["libvirtd", "-d"])
        ask = ["virsh", "-c", "qemu:///system", "list"]
        wait_until(lambda: self.hosts.run("hv1", ask, check=False).returncode == 0, BOOT_S, "libvirtd to answer")

    def qemus(self) -> list[int]:
        return [each.pid for each in self.hosts.processes("hv1") if each.argv and Path(each.argv[0]).name == QEMU]


@pytest.fixture(scope="module")
def daemonic(testhosts_module: MakeTestHosts) -> Daemonic:
    need_test_hosts(libvirt=True)
    hosts = testhosts_module([HostSpec("hv1", libvirt=True, vm_bridge=BRIDGE)])
    root = hosts.host("hv1").root
    put_code(root / CODE.relative_to("/"))
    directory = root / AGENT.relative_to("/")
    base = directory / "base"
    directory.mkdir(parents=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "64M"], check=True)
    disk = Disk(image=add_image(directory / "images", base))
    spec = a_spec("vm1", str(hosts.vm_subnet[77]), ("", ""), bridge=BRIDGE, disk=disk)
    made = Daemonic(hosts, directory, replace(spec, boot=None, memory_mib=16))
    driver = made.drive()
    assert driver.ask("define", document=FOREIGN) == "foreign"
    driver.end()
    return made


@pytest.mark.parametrize(
    ("step", "change", "left"),
    [
        ("make its disk", VmChange.FAILED, []),
        ("define it", VmChange.FAILED, []),
        ("start it", VmChange.FAILED, []),
        ("end", VmChange.CREATED, ["vms/vm1"]),
    ],
)
def test_a_libvirtd_killed_between_two_steps_of_a_creation_leaves_a_whole_vm_or_none(
    daemonic: Daemonic, step: str, change: VmChange, left: list[str]
) -> None:
    driver = daemonic.drive(step, "libvirtd")
    [result] = driver.create(daemonic.spec)
    assert result.change is change, result
    daemonic.bring_libvirtd_back()
    wait_until(lambda: daemonic.left == left, BOOT_S, f"the repair, not {daemonic.left}")
    driver.end()
    daemonic.converges(daemonic.drive())


def test_a_removal_during_which_libvirtd_is_killed_is_finished_when_it_is_back(daemonic: Daemonic) -> None:
    driver = daemonic.drive("remove it", "libvirtd")
    assert changes(driver.create(daemonic.spec)) == {"vm1": VmChange.CREATED}
    [result] = driver.ask("destroy", deployment=DEPLOYMENT)
    assert result["change"] == "failed", result
    daemonic.bring_libvirtd_back()
    wait_until(lambda: daemonic.left == [], BOOT_S, f"the removal, not {daemonic.left}")
    assert driver.ask("domains") == ["foreign"]
    driver.end()
    daemonic.converges(daemonic.drive())


def test_an_address_that_somebody_else_answers_for_is_not_used_until_it_is_free(daemonic: Daemonic) -> None:
    links = json.loads(subprocess.run(["ip", "-json", "address"], capture_output=True, check=True).stdout)
    [link] = [
        each["ifname"]
        for each in links
        for address in each["addr_info"]
        if address["local"] == str(daemonic.hosts.service_address)
    ]
    taken = ["dev", link, f"{daemonic.spec.ip}/32"]
    subprocess.run(["ip", "address", "add", *taken], check=True)
    driver = daemonic.drive()
    own = daemonic.hosts.host("hv1").address
    try:
        asleep = replace(daemonic.spec, name="vm2", uuid=FOREIGN_UUID.replace("1", "2"), start=False)
        as_host = replace(daemonic.spec, name="vm3", uuid=FOREIGN_UUID.replace("1", "3"), ip=str(own))
        [refused, left_asleep, hosts_own] = driver.create(daemonic.spec, asleep, as_host)
        assert refused.change is VmChange.FAILED
        assert f"its address {daemonic.spec.ip} is in use: " in refused.detail
        assert f"answers for it on {BRIDGE}" in refused.detail
        assert left_asleep.change is VmChange.CREATED, "what does not run is in nobody's way"
        [woken] = driver.ask("act", deployment=DEPLOYMENT, names=["vm2"], action="start", label=None)
        assert (woken["change"], "is in use: " in woken["detail"]) == ("failed", True)
        assert hosts_own.change is VmChange.FAILED
        assert "this host has it itself" in hosts_own.detail
        assert daemonic.left == ["vms/vm2"]
        assert daemonic.qemus() == []
    finally:
        subprocess.run(["ip", "address", "del", *taken], check=True)
    assert driver.destroy() == {"vm2": VmChange.REMOVED}
    daemonic.converges(driver)
