"""What is left of VMs when somebody is killed in the midst of their making or removal: nothing, or all of it.

Each row of the tables is a test: where the agent is killed, and what else goes down with it. Then a new agent comes,
and has only its directory and libvirt to go by.
"""

from __future__ import annotations

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

from protocol.vms import Disk, Seed, VmChange, VmPower, VmSpec
from tests.conftest import need_test_hosts
from tests.e2e.vm_host import BOOT_S, DEPLOYMENT, Cage, Driver, a_spec, add_image, changes, put_code, qemu_of
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

FOREIGN_UUID = "11111111-2222-4333-8444-555555555555"
FOREIGN = f"""<domain type='qemu'><name>foreign</name><uuid>{FOREIGN_UUID}</uuid>
<memory unit='MiB'>16</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"""


@dataclass
class Place:
    """An agent's directory with a hypervisor embedded in it, and a domain there that is not Canopy's."""

    cage: Cage
    directory: Path
    spec: VmSpec

    @property
    def uri(self) -> str:
        return f"qemu:///embed?root={self.directory}/libvirt"

    def drive(self, dies_at: str = "") -> Driver:
        return self.cage.drive(self.directory, self.uri, dies_at=dies_at)

    @property
    def request(self) -> dict[str, Any]:
        return {"deployment": DEPLOYMENT, "specs": [msgspec.to_builtins(self.spec)]}

    @property
    def left(self) -> list[str]:
        """The files that VMs and journals have."""
        folders = (self.directory / "vms", self.directory / "journal")
        return sorted(str(path.relative_to(self.directory)) for folder in folders for path in folder.glob("*"))

    def power_cut(self) -> None:
        """What a power cut takes: every process, and what is in memory alone."""
        for pid in qemu_of(self.directory):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not qemu_of(self.directory), BOOT_S, "QEMU to end")
        shutil.rmtree(self.directory / "libvirt" / "run", ignore_errors=True)

    def converges(self, driver: Driver) -> None:
        """A rerun makes what is missing, and a removal leaves nothing but what is not Canopy's."""
        assert set(changes(driver.create(self.spec)).values()) <= {VmChange.CREATED, VmChange.UNCHANGED}
        assert len(qemu_of(self.directory)) == 1
        assert self.left == ["vms/vm1"]
        assert driver.ask("domains") == ["foreign", "vm1"]
        assert driver.destroy() == {"vm1": VmChange.REMOVED}
        assert driver.ask("domains") == ["foreign"]
        driver.end()
        assert self.left == []
        assert qemu_of(self.directory) == []


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
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
        made = Place(cage, directory, spec)
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
def test_a_creation_cut_short_leaves_a_whole_vm_or_none(place: Place, step: str, struck: str, whole: bool) -> None:
    place.drive(dies_at=step).dies("create", **place.request)
    if struck == "host":
        place.power_cut()
    # A start is enough: nobody has to ask for anything.
    driver = place.drive()
    wait_until(lambda: place.left == (["vms/vm1"] if whole else []), BOOT_S, f"the repair, not {place.left}")
    assert driver.ask("domains") == (["foreign", "vm1"] if whole else ["foreign"])
    assert len(qemu_of(place.directory)) == whole
    place.converges(driver)


@pytest.mark.parametrize("step", ["make its disk", "start it"])
def test_a_rerun_need_not_wait_for_the_repair(place: Place, step: str) -> None:
    place.drive(dies_at=step).dies("create", **place.request)
    place.converges(place.drive())


@pytest.mark.parametrize(("step", "struck"), [("remove it", "agent"), ("end", "agent"), ("remove it", "host")])
def test_a_removal_cut_short_is_finished(place: Place, step: str, struck: str) -> None:
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


def test_a_qemu_killed_in_the_midst_of_its_start_leaves_a_vm_that_a_rerun_starts(place: Place) -> None:
    driver = place.drive()
    assert changes(driver.create(place.spec)) == {"vm1": VmChange.CREATED}
    [qemu] = qemu_of(place.directory)
    os.kill(qemu, signal.SIGKILL)
    driver.is_told("vm1", VmPower.SHUTOFF, BOOT_S)
    assert changes(driver.create(place.spec)) == {"vm1": VmChange.STARTED}
    place.converges(driver)


def test_a_full_disk_leaves_nothing_and_a_rerun_after_it_makes_the_vm(place: Place) -> None:
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


def test_an_image_that_is_damaged_on_this_host_leaves_nothing_until_it_is_whole(place: Place) -> None:
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


def test_a_vm_whose_name_or_uuid_is_a_foreign_domains_leaves_that_and_nothing_of_its_own(place: Place) -> None:
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
