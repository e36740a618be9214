"""agent.vmxml: a specification as a libvirt domain."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.vmxml import NAMESPACE, Flavour, Layout, differences, domain_xml, mark_in_domain, read_mark, spec_digest
from protocol.vms import DirectBoot, Disk, Network, VmSpec

KERNEL, INITRD, IMAGE = "a" * 64, "b" * 64, "c" * 64
LAYOUT = Layout(console="/d/console.log", kernel="/i/kernel", initrd="/i/initrd", overlay="/d/overlay.qcow2")
QEMU = Flavour(kind="qemu", architecture="x86_64")
SPEC = VmSpec(
    name="vm00",
    uuid="5f3f6c1e-0f0f-5a5a-8b8b-000000000001",
    deployment="lab",
    vcpus=2,
    memory_mib=128,
    mac="00:16:3e:12:00:01",
    ip="198.18.0.1",
    prefix=15,
    boot=DirectBoot(kernel=KERNEL, initrd=INITRD, cmdline="console=ttyS0 quiet"),
)


def a_spec(**changes: object) -> VmSpec:
    return msgspec.structs.replace(SPEC, **changes)


def domain(spec: VmSpec = SPEC, flavour: Flavour = QEMU, layout: Layout = LAYOUT) -> ET.Element:
    return ET.fromstring(domain_xml(spec, layout, flavour, owner="/var/lib/canopy/lab"))


def text(element: ET.Element, path: str) -> str | None:
    return element.findtext(path)


def attributes(element: ET.Element, path: str) -> dict[str, str] | None:
    found = element.find(path)
    return None if found is None else dict(found.attrib)


def test_same_specification_same_text() -> None:
    assert domain_xml(SPEC, LAYOUT, QEMU, "/o") == domain_xml(a_spec(), LAYOUT, QEMU, "/o")


def test_a_domain_has_what_its_specification_says() -> None:
    made = domain()
    assert made.get("type") == "qemu"
    assert [text(made, path) for path in ("name", "uuid", "memory", "vcpu")] == [SPEC.name, SPEC.uuid, "128", "2"]
    assert attributes(made, "memory") == {"unit": "MiB"}
    assert attributes(made, "devices/interface/mac") == {"address": SPEC.mac}


def test_a_kernel_boots_directly_and_without_a_disk() -> None:
    made = domain()
    assert text(made, "os/kernel") == "/i/kernel"
    assert text(made, "os/initrd") == "/i/initrd"
    assert text(made, "os/cmdline") == "console=ttyS0 quiet"
    assert made.find("devices/disk") is None


def test_a_disk_boots_where_there_is_no_kernel() -> None:
    made = domain(a_spec(boot=None, disk=Disk(image=IMAGE)))
    assert made.find("os/kernel") is None
    assert attributes(made, "os/boot") == {"dev": "hd"}
    assert attributes(made, "devices/disk/source") == {"file": "/d/overlay.qcow2"}
    assert attributes(made, "devices/disk/target") == {"dev": "vda", "bus": "virtio"}


def test_the_network_is_the_bridge_or_the_users_own() -> None:
    assert attributes(domain(a_spec(network=Network(bridge="br0"))), "devices/interface/source") == {"bridge": "br0"}
    assert attributes(domain(), "devices/interface") == {"type": "user"}


def test_the_console_is_a_terminal_and_a_file() -> None:
    made = domain()
    assert attributes(made, "devices/serial") == {"type": "pty"}
    assert attributes(made, "devices/serial/log") == {"file": "/d/console.log", "append": "on"}


def test_a_cpu_cap_holds_for_the_whole_vm_and_only_where_the_host_can_cap() -> None:
    capped = a_spec(cpu_quota=150)
    made = domain(capped)
    period, quota = text(made, "cputune/global_period"), text(made, "cputune/global_quota")
    assert period is not None
    assert quota is not None
    assert int(quota) / int(period) == 1.5
    assert domain(capped, Flavour(kind="qemu", architecture="x86_64", caps=False)).find("cputune") is None
    assert domain().find("cputune") is None


def test_the_hosts_cpu_is_passed_on_with_kvm_alone() -> None:
    assert domain(flavour=Flavour(kind="kvm", architecture="x86_64")).find("cpu") is not None
    assert domain().find("cpu") is None


def test_a_file_that_is_asked_for_and_has_no_path_is_an_error() -> None:
    with pytest.raises(ValueError, match="kernel"):
        domain(layout=Layout(console="/c"))


@given(
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=200),
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=50),
)
def test_whatever_a_command_line_or_a_path_holds_comes_out_as_it_went_in(cmdline: str, path: str) -> None:
    spec = a_spec(boot=DirectBoot(kernel=KERNEL, cmdline=cmdline))
    document = domain_xml(spec, Layout(console=path, kernel=path), QEMU, owner=path)
    made = ET.fromstring(document)
    assert (text(made, "os/cmdline") or "") == cmdline
    assert text(made, "os/kernel") == path
    mark = mark_in_domain(document)
    assert mark is not None
    assert (mark.owner, mark.spec) == (path, spec)


def test_a_mark_is_read_as_libvirt_hands_it_out() -> None:
    # libvirt gives the element alone, without its namespace.
    digest = spec_digest(SPEC)
    spec = msgspec.json.encode(SPEC).decode().replace('"', "&quot;")
    handed = f"<vm name='vm00' deployment='lab' owner='/o' digest='{digest}'>\n  <spec>{spec}</spec>\n</vm>"
    mark = read_mark(handed)
    assert mark is not None
    assert (mark.name, mark.deployment, mark.owner, mark.digest, mark.spec) == ("vm00", "lab", "/o", digest, SPEC)


@pytest.mark.parametrize("element", ["", "<vm/>", "<vm name='a' deployment='b' owner='c'/>", "not XML", "<vm"])
def test_metadata_of_another_form_is_no_mark(element: str) -> None:
    assert read_mark(element) is None


def test_a_mark_whose_specification_is_of_another_version_still_says_whose_it_is() -> None:
    mark = read_mark("<vm name='a' deployment='b' owner='c' digest='d'><spec>{\"new\": 1}</spec></vm>")
    assert mark is not None
    assert (mark.owner, mark.spec) == ("c", None)


def test_a_domain_of_others_has_no_mark() -> None:
    assert mark_in_domain("<domain type='qemu'><name>x</name></domain>") is None
    assert mark_in_domain("") is None
    assert NAMESPACE in domain_xml(SPEC, LAYOUT, QEMU, "/o")


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_mib": 256},
        {"mac": "00:16:3e:00:00:02"},
        {"cpu_quota": 100},
        {"network": Network(bridge="br0")},
        {"boot": None},
        {"disk": Disk(image=IMAGE)},
        {"uuid": "5f3f6c1e-0f0f-5a5a-8b8b-000000000002"},
    ],
)
def test_what_makes_another_domain_makes_another_digest(changes: dict[str, object]) -> None:
    other = a_spec(**changes)
    assert spec_digest(other) != spec_digest(SPEC)
    assert [line.split()[0] for line in differences(SPEC, other)] == list(changes)


def test_whether_to_start_a_vm_is_no_part_of_what_it_is() -> None:
    assert spec_digest(a_spec(start=False)) == spec_digest(SPEC)
    assert differences(SPEC, a_spec(start=False)) == []


def test_a_digest_stays_when_a_specification_has_been_sent_and_when_versions_change() -> None:
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(SPEC), type=VmSpec)
    assert spec_digest(sent) == spec_digest(SPEC) == spec_digest(a_spec(network=Network()))
    # VMs that run carry this in their metadata: another value would make every one of them "differ".
    assert spec_digest(SPEC) == "d1b3fe99c70fa668947ca33d1a239e7f8d674ade874a14506bb64f7c5133408f"
