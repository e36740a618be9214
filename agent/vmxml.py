"""A VM's specification as a libvirt domain. Pure: same arguments, same text.

The elements are described at https://libvirt.org/formatdomain.html. A domain carries its specification in its
metadata, so that libvirt alone tells what an agent has made, of what, and for which fleet.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from xml.etree import ElementTree as ET

import msgspec

from protocol.vms import VmSpec

#: Marks Canopy's element in a domain's metadata. A change of meaning takes another number.
NAMESPACE = "urn:canopy:vm:1"

# Machine types that boot a cloud image or a bare kernel, by architecture (`platform.machine()`). i440FX has the
# fewest devices to probe, which shows in a boot without KVM.
_MACHINES = {"x86_64": "pc", "aarch64": "virt"}
# One period is 100 ms, libvirt's own default; so one hundredth of a CPU is 1,000 us of it.
_PERIOD_US = 100_000
_HUNDREDTH_US = _PERIOD_US // 100


@dataclass(frozen=True)
class Layout:
    """Absolute paths of a VM's files on its host. `overlay` is None for a VM without a disk,
    `seed` for one without a seed."""

    console: str
    kernel: str | None = None
    initrd: str | None = None
    overlay: str | None = None
    seed: str | None = None


@dataclass(frozen=True)
class Flavour:
    """What the host's hypervisor gives. `kind` is libvirt's domain type (kvm, qemu, test), `architecture` as
    `platform.machine()` says it. `emulator` None leaves the choice to libvirt. `caps`: whether it can cap CPU time.
    """

    kind: str
    architecture: str
    emulator: str | None = None
    caps: bool = True


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """What Canopy's metadata say of a domain. `owner` names the agent that made it, by its directory.
    `spec` is None where it was written in a form that this version can't read."""

    name: str
    deployment: str
    owner: str
    digest: str
    spec: VmSpec | None = None


def spec_digest(spec: VmSpec) -> str:
    """SHA-256, in hexadecimal, of all that makes the domain what it is: everything but whether to start it."""
    return hashlib.sha256(_canonical(spec)).hexdigest()


def differences(old: VmSpec, new: VmSpec) -> list[str]:
    """`field old -> new` for each field in which the two differ, other than `start`, in order of declaration."""
    return [
        f"{field} {_shown(getattr(old, field))} -> {_shown(getattr(new, field))}"
        for field in VmSpec.__struct_fields__
        if field != "start" and getattr(old, field) != getattr(new, field)
    ]


def domain_xml(spec: VmSpec, layout: Layout, flavour: Flavour, owner: str) -> str:
    """The domain of `spec`, persistent when defined. `owner` is the agent's directory, for `Mark`.

    Raises ValueError where `layout` lacks a file that the specification asks for.
    """
    domain = ET.Element("domain", type=flavour.kind)
    _text(domain, "name", spec.name)
    _text(domain, "uuid", spec.uuid)
    ET.SubElement(domain, "metadata").append(_mark(spec, owner))
    _text(domain, "memory", str(spec.memory_mib), unit="MiB")
    _text(domain, "vcpu", str(spec.vcpus))
    if spec.cpu_quota is not None and flavour.caps:
        _add_quota(domain, spec.cpu_quota)
    _add_boot(domain, spec, layout, flavour)
    if flavour.kind == "kvm":
        # The host's own CPU is the fastest, and all that it costs is live migration between unlike hosts.
        ET.SubElement(domain, "cpu", mode="host-passthrough", check="none")
    ET.SubElement(domain, "clock", offset="utc")
    for event, action in (("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")):
        _text(domain, event, action)
    _add_devices(domain, spec, layout, flavour)
    ET.indent(domain)
    return ET.tostring(domain, encoding="unicode") + "\n"


def read_mark(element: str) -> Mark | None:
    """The mark in Canopy's metadata element as libvirt hands it out, or None where it is none of ours.

    libvirt's own XML is trusted to be small and well-formed; what is in it may have been edited by hand.
    """
    try:
        root = ET.fromstring(element)  # noqa: S314 - from libvirt, which runs with more rights than we have
        fields = {field: root.attrib[field] for field in ("name", "deployment", "owner", "digest")}
    except (ET.ParseError, KeyError):
        return None
    # libvirt drops the namespace of the element that it hands out; a whole domain document still has it.
    text = root.findtext("spec") or root.findtext(f"{{{NAMESPACE}}}spec") or ""
    try:
        spec = msgspec.json.decode(text, type=VmSpec)
    except (msgspec.DecodeError, UnicodeEncodeError):
        spec = None
    return Mark(**fields, spec=spec)


def mark_in_domain(document: str) -> Mark | None:
    """The mark in a whole domain document, or None."""
    try:
        element = ET.fromstring(document).find(f"metadata/{{{NAMESPACE}}}vm")  # noqa: S314 - a file of our own
    except ET.ParseError:
        return None
    return None if element is None else read_mark(ET.tostring(element, encoding="unicode"))


def _canonical(spec: VmSpec) -> bytes:
    fields = msgspec.to_builtins(spec)
    fields.pop("start", None)
    # omit_defaults leaves out a nested struct only where it is the default itself, not where it equals it.
    kept = {key: value for key, value in fields.items() if value != {}}
    return msgspec.json.encode(kept, order="sorted")


def _shown(value: object) -> str:
    return str(msgspec.to_builtins(value)) if isinstance(value, msgspec.Struct) else str(value)


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text


def _mark(spec: VmSpec, owner: str) -> ET.Element:
    fields = {"name": spec.name, "deployment": spec.deployment, "owner": owner, "digest": spec_digest(spec)}
    # The prefix is written out: ElementTree would make up its own, and people read this in `virsh dumpxml`.
    mark = ET.Element("canopy:vm", {"xmlns:canopy": NAMESPACE, **fields})
    _text(mark, "canopy:spec", msgspec.json.encode(spec).decode())
    return mark


def _add_quota(domain: ET.Element, hundredths: int) -> None:
    tune = ET.SubElement(domain, "cputune")
    # The global pair caps the VM as a whole; plain period and quota would cap each of its vCPUs.
    _text(tune, "global_period", str(_PERIOD_US))
    _text(tune, "global_quota", str(hundredths * _HUNDREDTH_US))


def _add_boot(domain: ET.Element, spec: VmSpec, layout: Layout, flavour: Flavour) -> None:
    system = ET.SubElement(domain, "os")
    kind = {"arch": flavour.architecture}
    if flavour.architecture in _MACHINES and flavour.kind != "test":
        kind["machine"] = _MACHINES[flavour.architecture]
    _text(system, "type", "hvm", **kind)
    if spec.boot is not None:
        _text(system, "kernel", _needed(layout.kernel, "kernel"))
        if spec.boot.initrd is not None:
            _text(system, "initrd", _needed(layout.initrd, "initrd"))
        if spec.boot.cmdline:
            _text(system, "cmdline", spec.boot.cmdline)
    else:
        ET.SubElement(system, "boot", dev="hd")
    if flavour.architecture == "x86_64":
        # Without ACPI a guest neither powers off nor hears that it should.
        features = ET.SubElement(domain, "features")
        ET.SubElement(features, "acpi")
        ET.SubElement(features, "apic")


def _add_devices(domain: ET.Element, spec: VmSpec, layout: Layout, flavour: Flavour) -> None:
    devices = ET.SubElement(domain, "devices")
    if flavour.emulator is not None:
        _text(devices, "emulator", flavour.emulator)
    if spec.disk is not None:
        disk = ET.SubElement(devices, "disk", type="file", device="disk")
        ET.SubElement(disk, "driver", name="qemu", type="qcow2", discard="unmap")
        ET.SubElement(disk, "source", file=_needed(layout.overlay, "overlay"))
        ET.SubElement(disk, "target", dev="vda", bus="virtio")
    if spec.seed is not None:
        seed = ET.SubElement(devices, "disk", type="file", device="disk")
        ET.SubElement(seed, "driver", name="qemu", type="raw")
        ET.SubElement(seed, "source", file=_needed(layout.seed, "seed"))
        # A disk of the kind that the guest has a driver for in any case; cloud-init goes by the label.
        ET.SubElement(seed, "target", dev="vdb", bus="virtio")
        ET.SubElement(seed, "readonly")
    if spec.network.bridge is not None:
        interface = ET.SubElement(devices, "interface", type="bridge")
        ET.SubElement(interface, "source", bridge=spec.network.bridge)
    else:
        interface = ET.SubElement(devices, "interface", type="user")
    ET.SubElement(interface, "mac", address=spec.mac)
    ET.SubElement(interface, "model", type="virtio")
    # A terminal for `virsh console`, and all that it shows in a file beside.
    serial = ET.SubElement(devices, "serial", type="pty")
    ET.SubElement(serial, "log", file=layout.console, append="on")
    # libvirt adds a USB controller and a video card where nothing is said; each costs a boot without KVM time.
    ET.SubElement(devices, "controller", type="usb", model="none")
    ET.SubElement(ET.SubElement(devices, "video"), "model", type="none")
    random = ET.SubElement(devices, "rng", model="virtio")
    _text(random, "backend", "/dev/urandom", model="random")


def _needed(path: str | None, what: str) -> str:
    if path is None:
        raise ValueError(f"the specification asks for a {what} and no path to it was given")
    return path
