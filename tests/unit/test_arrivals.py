"""A domain that comes from another host: taken where it is the VM that is awaited and names nothing else of this."""

from __future__ import annotations

import re
import uuid

import pytest

from agent.arrivals import check_arrival, rehomed
from agent.vmxml import Flavour, Layout, domain_xml, mark_in_domain
from protocol.vms import DirectBoot, Disk, Network, Seed, VmSpec

OLD, NEW = "/var/lib/canopy/lab", "/home/canopy"


def layout(owner: str) -> Layout:
    vm, images = f"{owner}/vms/vm1", f"{owner}/images"
    return Layout(
        console=f"{vm}/console.log",
        kernel=f"{images}/{'a' * 64}",
        initrd=f"{images}/{'b' * 64}",
        overlay=f"{vm}/overlay.qcow2",
        seed=f"{vm}/seed.iso",
    )


SPEC = VmSpec(
    name="vm1",
    uuid=str(uuid.uuid5(uuid.NAMESPACE_DNS, "vm1")),
    deployment="lab",
    vcpus=1,
    memory_mib=96,
    mac="00:16:3e:12:28:0a",
    ip="198.18.40.10",
    prefix=15,
    boot=DirectBoot(kernel="a" * 64, initrd="b" * 64, cmdline="console=ttyS0 root=/dev/vda ip=198.18.40.10"),
    disk=Disk(image="c" * 64),
    network=Network(bridge="br0"),
    seed=Seed(ssh_keys=("ssh-ed25519 AAAA someone",)),
)


def as_libvirt_has_it(owner: str, spec: VmSpec = SPEC) -> str:
    """What libvirt makes of the domain: units in KiB, an emulator, addresses, terminals, and what it adds itself."""
    text = domain_xml(spec, layout(owner), Flavour(kind="qemu", architecture="x86_64"), owner)
    text = re.sub(r'<memory unit="MiB">(\d+)<', lambda found: f'<memory unit="KiB">{int(found[1]) * 1024}<', text)
    text = text.replace("<devices>", "<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>")
    text = text.replace('<serial type="pty">', '<serial type="pty"><source path="/dev/pts/3"/>')
    address = '<address type="pci" domain="0x0000" bus="0x00" slot="0x03" function="0x0"/><alias name="a"/>'
    text = text.replace('<model type="virtio" />', f'<model type="virtio" /><target dev="vnet0"/>{address}')
    text = text.replace("<readonly />", "<readonly /><backingStore/>")
    return text.replace("</devices>", f'<memballoon model="virtio">{address}</memballoon></devices>')


def check(text: str, spec: VmSpec = SPEC) -> None:
    check_arrival(text, spec, layout(NEW), "qemu", NEW)


def test_a_domain_put_into_the_words_of_the_other_host_is_taken_there() -> None:
    text = rehomed(as_libvirt_has_it(OLD), layout(OLD), layout(NEW), NEW)
    assert OLD not in text
    mark = mark_in_domain(text)
    assert mark is not None
    assert (mark.owner, mark.spec) == (NEW, SPEC)
    check(text)


def test_labels_of_the_host_that_it_leaves_are_taken_off_and_taken_nowhere() -> None:
    labelled = as_libvirt_has_it(OLD).replace("</domain>", '<seclabel type="none" model="dac"/></domain>')
    check(rehomed(labelled, layout(OLD), layout(NEW), NEW))
    with pytest.raises(ValueError, match="seclabel"):
        check(as_libvirt_has_it(NEW).replace("</domain>", '<seclabel type="none" model="dac"/></domain>'))


def test_hosts_whose_agents_have_the_same_directory_are_the_usual_case() -> None:
    check(rehomed(as_libvirt_has_it(NEW), layout(NEW), layout(NEW), NEW))


GOOD = as_libvirt_has_it(NEW)
DISK = f'<source file="{NEW}/vms/vm1/overlay.qcow2" />'

#: What is altered, and what is put there. Each would give a host to whoever has another one.
EVIL = {
    "a disk of the host": (DISK, '<source file="/dev/sda"/>'),
    "another VM's disk": (DISK, f'<source file="{NEW}/vms/vm2/overlay.qcow2"/>'),
    "a way around": (DISK, f'<source file="{NEW}/vms/vm1/../vm2/overlay.qcow2"/>'),
    "the image itself": (DISK, f'<source file="{NEW}/images/{"c" * 64}"/>'),
    "a disk by another attribute": (DISK, '<source dev="/dev/sda"/>'),
    "a base of the disk": (DISK, f'{DISK}<backingStore type="file"/>'),
    "an end of its chain": (DISK, f"{DISK}<backingStore/>"),
    "a block device": ('<disk type="file" device="disk">', '<disk type="block" device="disk">'),
    "a seed that is read as qcow2": ('name="qemu" type="raw"', 'name="qemu" type="qcow2"'),
    "a seed that is written": ("<readonly />", ""),
    "a program": ("/usr/bin/qemu-system-x86_64", "/bin/sh"),
    "a program that looks like it": ("/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-system-x/../../../tmp/x"),
    "arguments of QEMU": (
        "</devices>",
        '</devices><commandline xmlns="http://libvirt.org/schemas/domain/qemu/1.0"><arg value="-x"/></commandline>',
    ),
    "a device of the host": ("</devices>", '<hostdev mode="subsystem" type="pci"/></devices>'),
    "a directory of the host": ("</devices>", '<filesystem type="mount"/></devices>'),
    "a channel": ("</devices>", '<channel type="unix"/></devices>'),
    "a graphical console": ("</devices>", '<graphics type="vnc" listen="0.0.0.0"/></devices>'),
    "a second network": (
        "</devices>",
        '<interface type="bridge"><mac address="00:16:3e:12:28:0a"/><source bridge="br9"/></interface></devices>',
    ),
    "a network of another kind": ('<interface type="bridge">', '<interface type="direct">'),
    "a serial port into a file": ('<serial type="pty">', '<serial type="file">'),
    "a serial port to a socket": ("/dev/pts/3", "/run/secret"),
    "a log elsewhere": (f"{NEW}/vms/vm1/console.log", "/etc/cron.d/x"),
    "another kernel": (f"{NEW}/images/{'a' * 64}", f"{NEW}/images/{'d' * 64}"),
    "another command line": ("root=/dev/vda", "root=/dev/vdb"),
    "random numbers from a disk": (">/dev/urandom<", ">/dev/sda<"),
    "random numbers from a socket": ('model="random"', 'model="egd"'),
    "more memory": (f">{96 * 1024}<", f">{96 << 20}<"),
    "memory in another unit": ('unit="KiB"', 'unit="MiB"'),
    "more CPUs": ("<vcpu>1<", "<vcpu>4000<"),
    "another name": ("<name>vm1<", "<name>vm2<"),
    "another UUID": (f"<uuid>{SPEC.uuid}<", f"<uuid>{uuid.UUID(int=1)}<"),
    "another address": ('<mac address="00:16:3e:12:28:0a"', '<mac address="00:16:3e:00:00:01"'),
    "another type": ('type="qemu"', 'type="kvm"'),
    "a dump at its crash": ("<on_crash>destroy<", "<on_crash>coredump-destroy<"),
    "another agent's mark": (f'owner="{NEW}"', f'owner="{OLD}"'),
    "another deployment's mark": ('deployment="lab"', 'deployment="other"'),
    "a mark of something else": ('"vcpus":1', '"vcpus":2'),
    "no mark": ("canopy:vm", "other"),
    "declarations": ("<domain", '<!DOCTYPE d [<!ENTITY e "x">]><domain'),
    "half of it": ("</domain>", ""),
}


@pytest.mark.parametrize("what", EVIL)
def test_nothing_else_is_taken(what: str) -> None:
    old, new = EVIL[what]
    assert old in GOOD, what
    check(GOOD)
    with pytest.raises(ValueError, match=r"^it|^devices|^os|^resource"):
        check(GOOD.replace(old, new))


def test_a_vm_without_disk_seed_and_bridge_may_have_none() -> None:
    bare = VmSpec(
        **{
            field: getattr(SPEC, field)
            for field in SPEC.__struct_fields__
            if field not in ("disk", "seed", "network", "boot")
        },
        boot=DirectBoot(kernel="a" * 64),
    )
    own = Layout(console=f"{NEW}/vms/vm1/console.log", kernel=f"{NEW}/images/{'a' * 64}")
    text = domain_xml(bare, own, Flavour(kind="qemu", architecture="x86_64"), NEW)
    text = re.sub(r'unit="MiB">96<', f'unit="KiB">{96 * 1024}<', text)
    check_arrival(text, bare, own, "qemu", NEW)
    disk = f'<disk type="file" device="disk"><driver name="qemu" type="qcow2"/>{DISK}</disk>'
    with pytest.raises(ValueError, match="disk"):
        check_arrival(text.replace("<devices>", f"<devices>{disk}"), bare, own, "qemu", NEW)
