"""What `ctl` and the service say to each other of VMs: themselves, their images, networks, names and consoles.

A part of `controller.api`, under whose name all of it is used.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from controller.on_record import Capacity, Vm
from protocol.vms import Action, ImageAction, ImageResult, VmResult, VmSpec, VmState


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


# --- requests ---------------------------------------------------------------------------------------------------------


class Reserve(_Struct, frozen=True, kw_only=True, tag="reserve"):
    """Put VMs of a deployment on record, with their addresses, before any is made: all of them or none. `capacities`
    are the hosts as the file declares them. Answered by Done."""

    vms: tuple[Vm, ...]
    capacities: dict[str, Capacity]


class CreateOn(_Struct, frozen=True, kw_only=True, tag="create"):
    """Make VMs: for each host its own. Their addresses are kept by name until they are destroyed.

    Each makes `in_flight` of them at a time, None: as it sees fit. Answered by Accepted, VmsDone for each host as it
    answers, Folded where a host could not, Settled.
    """

    deployment: str
    slices: dict[str, tuple[VmSpec, ...]]
    timeout_ms: int
    in_flight: int | None = None


class ProbeOn(_Struct, frozen=True, kw_only=True, tag="probe"):
    """Wait until these VMs answer ping, or with `address` until they have their addresses.

    Answered by Accepted, VmsReached for each host, Folded, Settled."""

    deployment: str
    names: tuple[str, ...]
    timeout_ms: int
    address: bool = False


class DestroyOn(_Struct, frozen=True, kw_only=True, tag="destroy"):
    """Remove VMs of a deployment (None: all of them) and free their addresses. Answered like CreateOn."""

    deployment: str
    names: tuple[str, ...] | None
    timeout_ms: int


class ActOn(_Struct, frozen=True, kw_only=True, tag="act"):
    """Start, stop, reboot, suspend, resume or snapshot VMs of a deployment (None: all of them). Answered like CreateOn.

    Only VMs on `hosts` are meant where they are given. `hard` and `label` as in protocol.commands.VmAction.
    """

    deployment: str
    names: tuple[str, ...] | None
    action: Action
    hosts: tuple[str, ...] | None = None
    hard: bool = False
    label: str | None = None
    timeout_ms: int


class VmMove(_Struct, frozen=True, kw_only=True):
    """One VM that is to move, and the host that it goes to."""

    deployment: str
    name: str
    target: str


class MoveOn(_Struct, frozen=True, kw_only=True, tag="move"):
    """Move VMs while they run: of a host at most `per_host` at a time, between two sites at most `per_link`, and none
    to a host without room, unless `overcommit`. Answered by VmMoving for how far they are and VmsDone for each VM that
    has ended, its host being the one that it is on then; Settled at the end."""

    moves: tuple[VmMove, ...]
    per_host: int
    per_link: int
    overcommit: bool
    timeout_ms: int


class Disown(_Struct, frozen=True, kw_only=True, tag="disown"):
    """Forget VMs of a deployment whose hosts are out of reach: their addresses are free at once, and the hosts remove
    them when they come back. Answered by Done."""

    deployment: str
    names: tuple[str, ...]


class GetInfra(_Struct, frozen=True, kw_only=True, tag="infra"):
    """What is on record of VMs and of hosts' sizes. Answered by InfraRecord."""


class GetImages(_Struct, frozen=True, kw_only=True, tag="images"):
    """The images that the service knows. Answered by ImageList."""


class ImagesOn(_Struct, frozen=True, kw_only=True, tag="images on"):
    """List, verify or remove images (None: all) on `hosts` (None: all). One that a VM on record is made of is not
    removed. Answered by Accepted, ImagesDone for each host as it answers, Folded where a host could not, Settled."""

    hosts: tuple[str, ...] | None
    action: ImageAction
    digests: tuple[str, ...] | None


class ConsoleOn(_Struct, frozen=True, kw_only=True, tag="console"):
    """Open a VM's console. Answered by Accepted, Streamed, Folded, Settled; Typed may follow on the connection."""

    deployment: str
    name: str
    force: bool


class Typed(_Struct, frozen=True, kw_only=True, tag="typed"):
    """On the connection of a console: what was typed, and how much of its output was seen (`Feed`). No
    answer."""

    offset: int
    data: bytes
    seen: int
    again: bool


class CreateNet(_Struct, frozen=True, kw_only=True, tag="create net"):
    """Make a network of VMs on every host. Answered like RunOn."""

    name: str
    subnet: str
    isolated: bool


class RemoveNet(_Struct, frozen=True, kw_only=True, tag="remove net"):
    """Remove a network from every host. Answered like RunOn."""

    name: str


class GetNets(_Struct, frozen=True, kw_only=True, tag="nets"):
    """Networks on record. Answered by NetList."""


class GetDeployment(_Struct, frozen=True, kw_only=True, tag="deployment"):
    """What is on record of a deployment. Answered by Deployment."""

    name: str


class SendNames(_Struct, frozen=True, kw_only=True, tag="names"):
    """Bring the name -> IP file to every host. `in_etc_hosts` says whether names go into a block of /etc/hosts as well,
    from now on; None leaves that as it is. Answered like RunOn."""

    in_etc_hosts: bool | None = None


class DomainsOn(_Struct, frozen=True, kw_only=True, tag="domains"):
    """Have hosts name all their domains, whoever made them. Answered like RunOn, with a JSON array of
    protocol.vms.SeenDomain as output."""

    hosts: tuple[str, ...] | None
    timeout_ms: int


# --- replies ----------------------------------------------------------------------------------------------------------


class VmsDone(_Struct, frozen=True, kw_only=True, tag="vms"):
    """What one host did for its VMs."""

    host: str
    results: tuple[VmResult, ...]


class VmMoving(_Struct, frozen=True, kw_only=True, tag="moving"):
    """How far a VM's move is, in bytes of memory and disk."""

    deployment: str
    name: str
    done: int
    left: int


class VmsReached(_Struct, frozen=True, kw_only=True, tag="reached"):
    """Which of one host's VMs answer."""

    host: str
    names: tuple[str, ...]


class InfraRecord(_Struct, frozen=True, kw_only=True, tag="infra record"):
    """The VMs on record, what those were made of whose hosts have told, and hosts as files declared them last."""

    vms: tuple[Vm, ...]
    specs: tuple[VmSpec, ...]
    capacities: dict[str, Capacity]


class ImagesDone(_Struct, frozen=True, kw_only=True, tag="images done"):
    """What one host says of its images."""

    host: str
    results: tuple[ImageResult, ...]


class KnownImage(_Struct, frozen=True, kw_only=True):
    """An image that was pushed to hosts. `name` is that of its file then; `vms` are those on record that are made of
    it, as DEPLOYMENT/NAME, the first few, and `used` is how many they are."""

    digest: str
    name: str
    size: int
    format: Literal["qcow2", "raw"]
    added_s_ago: float
    used: int
    vms: tuple[str, ...] = ()


class ImageList(_Struct, frozen=True, kw_only=True, tag="image list"):
    """The images on record, in the order in which they were added."""

    images: tuple[KnownImage, ...]


class VmStatus(_Struct, frozen=True, kw_only=True):
    """One VM as the service knows it: what was asked for, and what its host says of it. `age_s` is the age of that
    word."""

    name: str
    deployment: str
    host: str
    ip: str
    mac: str
    vcpus: int
    memory_mib: int
    state: VmState | None
    age_s: float | None


class Deployment(_Struct, frozen=True, kw_only=True, tag="deployment"):
    """A deployment on record: each VM's host and address. Empty where there is none of that name.

    `taken` are addresses of other deployments; they are not to be given again. `specs` are what VMs were made of, of
    those whose hosts have said that they made them.
    """

    name: str
    hosts: dict[str, str]
    addresses: dict[str, str]
    taken: tuple[str, ...]
    specs: tuple[VmSpec, ...] = ()


class NetStatus(_Struct, frozen=True, kw_only=True):
    """A network of VMs. `bridge` is its bridge on each host, `vni` its number in VXLAN."""

    name: str
    subnet: str
    isolated: bool
    bridge: str
    vni: int
    vms: int


class NetList(_Struct, frozen=True, kw_only=True, tag="net list"):
    """Networks, by name."""

    nets: tuple[NetStatus, ...]
