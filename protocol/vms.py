"""What is said about VMs on the wire: the specification that the plan gives an agent, and what the agent says back.

Pure data. `controller/` makes specifications from infra.conf, `agent/` makes libvirt domains of them.
"""

from __future__ import annotations

from enum import Enum

import msgspec

#: A VM or deployment name: a domain name, a directory name and a host name at once, so the strictest of the three.
NAME_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"
#: Lower-case hexadecimal SHA-256 of an image's bytes; also its file name on a host.
DIGEST_PATTERN = r"^[0-9a-f]{64}$"


class DirectBoot(msgspec.Struct, frozen=True, kw_only=True, tag="direct", forbid_unknown_fields=True):
    """Boot a kernel without a boot loader. `kernel` and `initrd` are image digests."""

    kernel: str
    initrd: str | None = None
    cmdline: str = ""


class Disk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A qcow2 overlay over the base image with digest `image`. `size_mib` None keeps the base's size."""

    image: str
    image_format: str = "qcow2"
    size_mib: int | None = None


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the VM's one interface reaches the world.

    `bridge` names an existing bridge on the host; None is QEMU's user-mode network, which needs no privilege
    and can't be reached from outside.
    """

    bridge: str | None = None


class VmSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One VM as the plan wants it. Same specification, same domain: it holds nothing that differs from run to run.

    Units: memory in MiB; `cpu_quota` in hundredths of one CPU (150 is a CPU and a half), None for no cap.
    `ip` is dotted IPv4 with `prefix` bits of network; `mac` is 00:16:3E + the last three octets of `ip`.
    """

    name: str
    uuid: str
    deployment: str
    vcpus: int
    memory_mib: int
    mac: str
    ip: str
    prefix: int
    gateway: str | None = None
    cpu_quota: int | None = None
    start: bool = True
    boot: DirectBoot | None = None
    disk: Disk | None = None
    network: Network = Network()


class VmChange(str, Enum):
    """What an agent did for one VM of a request."""

    CREATED = "created"
    STARTED = "started"  # it was defined already and only had to be started
    UNCHANGED = "unchanged"
    DIFFERS = "differs"  # it is there and is not what the plan says; left as it is
    REMOVED = "removed"
    ABSENT = "absent"  # asked to remove, and was not there
    FAILED = "failed"


class VmResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of an agent's answer. `detail` is one sentence where there is something to say."""

    name: str
    change: VmChange
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

    name: str
    deployment: str
    power: VmPower
    reason: str = ""
    age_ms: int = 0
    reachable: bool | None = None
