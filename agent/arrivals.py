"""The domain of a VM that moves, as libvirt has it: put into the words of the host that it goes to, and looked at there
before it is taken in. Pure.

A domain's XML can name any file, device or program of its host. The one that comes with a VM was written on another
host; nothing in it may name more than what this host has made ready for that VM.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from agent.vmxml import NAMESPACE, Layout, read_mark, spec_digest
from protocol.vms import VmSpec

_KIB_OF_MIB = 1024
#: Where a disk's chain, a port's number or an alias stand: they name nothing of the host.
_EVERYWHERE = ("address", "alias")
_DEVICES: dict[str, tuple[str, ...]] = {
    "emulator": (),
    "disk": ("driver", "source", "target", "readonly", "backingStore"),
    "controller": ("model", "target"),
    "interface": ("mac", "source", "target", "model"),
    "serial": ("log", "source", "target", "target/model"),
    "console": ("log", "source", "target", "target/model"),
    "input": (),
    "video": ("model",),
    "memballoon": ("stats",),
    "rng": ("model", "backend"),
    "audio": (),
}
_ELSEWHERE = (
    *("name", "uuid", "memory", "currentMemory", "vcpu", "cputune", "cputune/global_period", "cputune/global_quota"),
    *("resource", "resource/partition", "os", "os/type", "os/kernel", "os/initrd", "os/cmdline", "os/boot"),
    *("features", "features/acpi", "features/apic", "features/gic"),
    *("cpu", "cpu/model", "cpu/vendor", "cpu/topology", "cpu/feature", "cpu/cache", "cpu/maxphysaddr"),
    *("clock", "clock/timer", "on_poweroff", "on_reboot", "on_crash", "pm", "pm/suspend-to-mem", "pm/suspend-to-disk"),
    "devices",
)
_TAGS = {*_ELSEWHERE} | {
    f"devices/{device}{rest}"
    for device, parts in _DEVICES.items()
    for rest in ("", *(f"/{part}" for part in (*parts, *_EVERYWHERE)))
}
#: Where distributions have QEMU: root's directories.
_EMULATOR = re.compile(r"/usr/(local/)?(bin|libexec)/(qemu-system-[a-z0-9_]+|qemu-kvm|kvm)\Z")
_TERMINAL = re.compile(r"/dev/pts/[0-9]+\Z")
_FIXED = {"devices/rng/backend": "/dev/urandom", "resource/partition": "/machine"}
_SPECIAL = ("os/cmdline", "os/kernel", "os/initrd")


def rehomed(document: str, old: Layout, new: Layout, owner: str) -> str:
    """A domain's XML with the files of another host's layout, and `owner` as the agent whose it is."""
    root = ET.fromstring(document)  # noqa: S314  from this host's own libvirt
    places = {
        getattr(old, field): getattr(new, field)
        for field in Layout.__dataclass_fields__
        if getattr(old, field) is not None
    }
    for element in root.iter():
        if element.text in places:
            element.text = places[element.text]
        for key, value in element.attrib.items():
            if value in places:
                element.set(key, places[value])
    for label in root.findall("seclabel"):
        # Each host confines its QEMUs by its own rules, and labels of another's mean nothing there.
        root.remove(label)
    for disk in root.findall("devices/disk"):
        # What a disk is based on is read from the disk itself, which the other host has made.
        for chain in disk.findall("backingStore"):
            disk.remove(chain)
    mark = root.find(f"metadata/{{{NAMESPACE}}}vm")
    if mark is not None:
        mark.set("owner", owner)
    ET.register_namespace("canopy", NAMESPACE)
    return ET.tostring(root, encoding="unicode")


def check_arrival(document: str, spec: VmSpec, layout: Layout, kind: str, owner: str) -> None:
    """Raises ValueError where a domain is anything else than the VM of `spec`, of libvirt's type `kind`, with the
    files of `layout`, or names anything else of this host."""
    if "<!" in document or "<?" in document:
        raise ValueError("it has declarations")
    try:
        root = ET.fromstring(document)  # noqa: S314  without declarations there are no entities to expand
    except ET.ParseError as error:
        raise ValueError(f"it is no XML: {error}") from error
    if root.tag != "domain" or root.get("type") != kind or set(root.attrib) - {"type", "id"}:
        raise ValueError(f"it is no domain of type {kind}")
    _check_mark(root, spec, owner)
    _check_tree(root, "", _files(spec, layout))
    _check_words(root, spec, layout)
    for device in root.findall("devices/disk"):
        _check_disk(device, layout)
    _check_interfaces(root, spec)


def _files(spec: VmSpec, layout: Layout) -> dict[str, set[str]]:
    """The paths that may stand at each place."""
    found: dict[str, set[str | None]] = {
        "devices/disk/source": {layout.overlay, layout.seed},
        "devices/serial/log": {layout.console},
        "devices/console/log": {layout.console},
        "os/kernel": {layout.kernel},
        "os/initrd": {layout.initrd},
        "os/cmdline": {None if spec.boot is None else spec.boot.cmdline},
    }
    return {place: {path for path in paths if path is not None} for place, paths in found.items()}


def _check_mark(root: ET.Element, spec: VmSpec, owner: str) -> None:
    for metadata in root.findall("metadata"):
        root.remove(metadata)
        marks = list(metadata)
        if len(marks) != 1 or marks[0].tag != f"{{{NAMESPACE}}}vm":
            raise ValueError("its metadata are not Canopy's")
        mark = read_mark(ET.tostring(marks[0], encoding="unicode"))
        wanted = (spec.name, spec.deployment, owner, spec_digest(spec))
        if mark is None or (mark.name, mark.deployment, mark.owner, mark.digest) != wanted:
            raise ValueError("its mark is another's")
        if mark.spec is None or spec_digest(mark.spec) != mark.digest:
            raise ValueError("its mark is not what it was made of")
        return
    raise ValueError("it has no mark")


def _check_tree(parent: ET.Element, above: str, files: dict[str, set[str]]) -> None:
    for element in parent:
        place = f"{above}{element.tag}"
        if place not in _TAGS:
            raise ValueError(f"it has {place[:100]}")
        for value in (*element.attrib.values(), (element.text or "").strip()):
            if "/" in value and not _may_name(place, value, files):
                raise ValueError(f"{place} names {value[:200]}")
        _check_tree(element, f"{place}/", files)


def _may_name(place: str, value: str, files: dict[str, set[str]]) -> bool:
    if place in files:
        return value in files[place]
    if place == "devices/emulator":
        return _EMULATOR.match(value) is not None
    if place in ("devices/serial", "devices/console", "devices/serial/source", "devices/console/source"):
        return _TERMINAL.match(value) is not None
    return _FIXED.get(place) == value


def _check_words(root: ET.Element, spec: VmSpec, layout: Layout) -> None:
    boot = spec.boot
    wanted = {
        "name": spec.name,
        "uuid": spec.uuid,
        "memory": str(spec.memory_mib * _KIB_OF_MIB),
        "vcpu": str(spec.vcpus),
        "os/kernel": None if boot is None else layout.kernel,
        "os/initrd": None if boot is None else layout.initrd,
        "os/cmdline": None if boot is None or not boot.cmdline else boot.cmdline,
    }
    for place, value in wanted.items():
        found = [element.text for element in root.findall(place)]
        if found != ([] if value is None else [value]):
            raise ValueError(f"its {place} is {str(found[0] if found else None)[:200]}")
    for tag in ("memory", "currentMemory"):
        if any(element.get("unit") != "KiB" for element in root.findall(tag)):
            raise ValueError("its memory is in another unit")
    if any(element.text != wanted["memory"] for element in root.findall("currentMemory")):
        raise ValueError("its memory is another now")
    for tag in ("on_poweroff", "on_reboot", "on_crash"):
        if any(element.text not in ("destroy", "restart") for element in root.findall(tag)):
            raise ValueError(f"its {tag} is another")
    if len(root.findall("devices")) != 1:
        raise ValueError("it has no devices, or some twice")
    types = {"serial": "pty", "console": "pty", "memballoon": None, "rng": None}
    for tag, type_ in types.items():
        if any(element.get("type") != type_ for element in root.findall(f"devices/{tag}")):
            raise ValueError(f"its {tag} is of another type")
    if any(element.get("model") != "random" for element in root.findall("devices/rng/backend")):
        raise ValueError("its random numbers come from elsewhere")
    if any(set(element.attrib) - {"path"} for element in root.findall("devices/serial/source")):
        raise ValueError("its serial port leads elsewhere")


def _check_disk(disk: ET.Element, layout: Layout) -> None:
    if disk.get("type") != "file" or disk.get("device") != "disk":
        raise ValueError("it has a disk that is no file")
    source, driver = disk.findall("source"), disk.findall("driver")
    if len(source) != 1 or len(driver) != 1 or set(source[0].attrib) - {"file", "index"}:
        raise ValueError("it has a disk with another source")
    file, form = source[0].get("file"), driver[0].get("type")
    if any(chain.attrib or file != layout.seed for chain in disk.findall("backingStore")):
        raise ValueError(f"it has a disk {file} with a base")
    # A seed that were read as qcow2 could name any file of the host as its base.
    is_seed = file == layout.seed and form == "raw" and disk.find("readonly") is not None
    is_overlay = file == layout.overlay and form == "qcow2"
    if file is None or not (is_seed or is_overlay) or driver[0].get("name") != "qemu":
        raise ValueError(f"it has a disk {file} of the format {form}")


def _check_interfaces(root: ET.Element, spec: VmSpec) -> None:
    bridge = spec.network.bridge
    for interface in root.findall("devices/interface"):
        source = interface.find("source")
        mac = interface.find("mac")
        at = None if source is None else source.get("bridge")
        if interface.get("type") != ("user" if bridge is None else "bridge") or at != bridge:
            raise ValueError(f"it has an interface of {interface.get('type')} {at}")
        if source is not None and set(source.attrib) - {"bridge", "portid"}:
            raise ValueError("it has an interface that leads elsewhere")
        if mac is None or (mac.get("address") or "").lower() != spec.mac.lower():
            raise ValueError("it has an interface of another address")
