"""What is said about VMs on the wire: the specification that the plan gives an agent, and what the agent says back.

Pure data. `controller/` makes specifications from infra.conf, `agent/` makes libvirt domains of them.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

import msgspec

# Patterns end in \Z, since $ would let a final line feed pass.

#: A VM or deployment name: a domain name, a directory name and a host name at once, so the strictest of the three.
NAME_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?\Z"
#: Lower-case hexadecimal: the digest of an image, as protocol.commands.Push has it; also its file name on a host.
DIGEST_PATTERN = r"^[0-9a-f]{64}\Z"

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Digest = Annotated[str, msgspec.Meta(pattern=DIGEST_PATTERN)]
Uuid = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
Mac = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}\Z")]
Ipv4 = Annotated[
    str, msgspec.Meta(pattern=r"^((25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])\Z")
]
#: Printable ASCII, since XML 1.0 has no way to write control characters. Linux reads 2,047 bytes and drops the rest
#: (COMMAND_LINE_SIZE, arch/x86/include/asm/setup.h).
Cmdline = Annotated[str, msgspec.Meta(pattern=r"^[\x20-\x7e]*\Z", max_length=2047)]
#: A Linux interface name: at most IFNAMSIZ - 1 bytes (netdevice(7)).
Bridge = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{1,15}\Z")]
#: Up to 1 PiB: more than a host has, and still 64 bits in bytes.
Mib = Annotated[int, msgspec.Meta(ge=1, le=2**30)]
#: A name or a word in a report. 253 is the longest host name (RFC 1123, section 2.1); a domain that somebody else
#: made may have a longer one, and is reported under its beginning.
Short = Annotated[str, msgspec.Meta(max_length=253)]


class DirectBoot(
    msgspec.Struct, frozen=True, kw_only=True, tag="direct", forbid_unknown_fields=True, omit_defaults=True
):
    """Boot a kernel without a boot loader. `kernel` and `initrd` are image digests."""

    kernel: Digest
    initrd: Digest | None = None
    cmdline: Cmdline = ""


class Disk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A qcow2 overlay over the base image with digest `image`. `size_mib` None keeps the base's size."""

    image: Digest
    image_format: Literal["qcow2", "raw"] = "qcow2"
    size_mib: Mib | None = None


class Seed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What cloud-init finds at the first boot, on a NoCloud disk: host name, address, and these.

    `user_data` is the image digest of a template in which the host fills in $name, $ip, $prefix, $gateway, $mac,
    $deployment and $host (string.Template); None has none. `ssh_keys` may log in, each a line of authorized_keys.
    """

    user_data: Digest | None = None
    ssh_keys: tuple[Annotated[str, msgspec.Meta(pattern=r"^[\x20-\x7e]{1,8192}\Z")], ...] = ()


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the VM's one interface reaches the world.

    `bridge` names an existing bridge on the host; None is QEMU's user-mode network, which needs no privilege
    and can't be reached from outside.
    """

    bridge: Bridge | None = None


class VmSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One VM as the plan wants it. Same specification, same domain: it holds nothing that differs from run to run.

    Units: memory in MiB; `cpu_quota` in hundredths of one CPU (150 is a CPU and a half), None for no cap.
    `ip` is dotted IPv4 with `prefix` bits of network; `mac` is 00:16:3E + the last three octets of `ip`.
    A field that is added later has a default and is left out of what is sent while it holds that default
    (`omit_defaults`), so that VMs made before it still are what their specification says.
    """

    name: Name
    uuid: Uuid
    deployment: Name
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    memory_mib: Mib
    mac: Mac
    ip: Ipv4
    prefix: Annotated[int, msgspec.Meta(ge=0, le=32)]
    gateway: Ipv4 | None = None
    cpu_quota: Annotated[int, msgspec.Meta(ge=1, le=409_600)] | None = None
    start: bool = True
    boot: DirectBoot | None = None
    disk: Disk | None = None
    network: Network = Network()
    seed: Seed | None = None


def images_of(spec: VmSpec) -> set[str]:
    """The digests of the images that a VM is made of."""
    found = {spec.boot.kernel, spec.boot.initrd} if spec.boot is not None else set()
    if spec.disk is not None:
        found.add(spec.disk.image)
    if spec.seed is not None:
        found.add(spec.seed.user_data)
    return {digest for digest in found if digest is not None}


class Action(str, Enum):
    """What can be done to a VM that is there."""

    START = "start"
    STOP = "stop"
    REBOOT = "reboot"
    SUSPEND = "suspend"
    RESUME = "resume"
    SNAPSHOT = "snapshot"


class VmChange(str, Enum):
    """What an agent did for one VM of a request."""

    CREATED = "created"
    STARTED = "started"  # it was defined already and only had to be started
    UNCHANGED = "unchanged"
    DIFFERS = "differs"  # it is there and is not what the plan says; left as it is
    STOPPED = "stopped"
    REBOOTED = "rebooted"
    SUSPENDED = "suspended"
    RESUMED = "resumed"
    SNAPSHOT = "snapshot"  # one was taken
    MOVED = "moved"  # to another host, where it goes on
    REMOVED = "removed"
    ABSENT = "absent"  # asked to remove or to act on, and was not there
    FAILED = "failed"


class VmResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of an agent's answer. `detail` is one sentence where there is something to say."""

    name: str
    change: VmChange
    detail: str = ""


class ImageAction(str, Enum):
    """What can be asked about a host's image store."""

    LIST = "list"
    VERIFY = "verify"  # read them all again, against their digests
    REMOVE = "remove"


class ImageState(str, Enum):
    """What an agent says of one image."""

    PRESENT = "present"
    RIGHT = "right"  # its bytes are those of its digest
    WRONG = "wrong"  # they are not, or it is writable
    REMOVED = "removed"
    IN_USE = "in use"  # VMs here are made of it, so it stays
    ABSENT = "absent"
    FAILED = "failed"


class ImageResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One image of a host. `size` in bytes; `vms` is how many VMs of this agent are made of it."""

    digest: Digest
    state: ImageState
    size: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    vms: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    detail: str = ""


class VmPower(str, Enum):
    """libvirt's domain states, as users say them, and two that libvirt can't say."""

    RUNNING = "running"
    BLOCKED = "blocked"
    PAUSED = "paused"
    SHUTDOWN = "in shutdown"
    SHUTOFF = "shut off"
    CRASHED = "crashed"
    SUSPENDED = "pmsuspended"
    GONE = "gone"  # its domain is no longer known to libvirt
    UNKNOWN = "unknown"  # the agent can't tell, for example because libvirtd does not answer


class VmState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The state of one VM at its host. `age_ms` is how long ago it entered `power`, by the agent's clock;
    `reason` is libvirt's word for why (`crashed`, `destroyed`, `booted`…)."""

    name: Short
    deployment: Short
    power: VmPower
    reason: Short = ""
    age_ms: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    reachable: bool | None = None


class SeenDomain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A domain of a host's libvirt, whoever made it. `owner` is the directory of the agent that did, empty where
    Canopy did not; `mine` is whether that is the agent that answers."""

    name: Short
    uuid: Uuid
    power: VmPower
    owner: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    deployment: Short = ""
    mine: bool = False
