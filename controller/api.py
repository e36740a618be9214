"""What `ctl` and the service say to each other over the fleet's client socket: one request a connection, then replies.

Hosts go as names in requests and as ranks in what comes back; `Accepted` says once which rank is which name. What
running a command takes, and how all travels, is in `run_api`.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, TypeAlias

import msgspec

from controller.on_record import Capacity, Vm
from controller.run_api import (
    LENGTH_BYTES,
    MAX_LENGTH,
    Accepted,
    BadFrame,
    Cancel,
    Failed,
    Folded,
    InputData,
    InputRoom,
    Late,
    OnRecord,
    RunOn,
    Settled,
    Streamed,
    length_of,
    pack,
)
from protocol.messages import HostHealth
from protocol.vms import Action, ImageAction, ImageResult, VmResult, VmSpec, VmState
from protocol.wishes import Wishes

#: What is another file's and part of this interface all the same.
__all__ = [
    "LENGTH_BYTES",
    "MAX_LENGTH",
    "Accepted",
    "BadFrame",
    "Cancel",
    "Failed",
    "Folded",
    "InputData",
    "InputRoom",
    "Late",
    "OnRecord",
    "RunOn",
    "Settled",
    "Streamed",
    "length_of",
    "pack",
]


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


# --- requests ---------------------------------------------------------------------------------------------------------


class GetStatus(_Struct, frozen=True, kw_only=True, tag="status"):
    """Everything about the fleet's hosts and VMs. Answered by one Status."""


class GetHost(_Struct, frozen=True, kw_only=True, tag="host"):
    """All that is known of one host. Answered by HostKnown."""

    name: str


class Begin(_Struct, frozen=True, kw_only=True, tag="begin"):
    """`ctl up` begins: how many hosts the fleet will have, and the most children of a relay. Answered by Done."""

    hosts: int
    fanout: int


class Enrol(_Struct, frozen=True, kw_only=True, tag="enrol"):
    """A host made its keys. `digest` is that of its bundle. Answered by Enrolled."""

    name: str
    site: str
    key: str
    address: str
    control_port: int
    bulk_port: int
    digest: str
    facts: dict[str, str]


class Await(_Struct, frozen=True, kw_only=True, tag="await"):
    """Answered by Awaited when all these hosts are in the tree, or after `within_ms` with those that are not.

    Those of `newer_than` count from an incarnation above that one on: their agents are to have started anew. With
    `answering` those that are in the tree are asked to answer besides, for what is known of them may be seconds old.
    """

    hosts: tuple[str, ...]
    within_ms: int
    newer_than: dict[str, int] = {}
    answering: bool = False


class GetOutput(_Struct, frozen=True, kw_only=True, tag="output"):
    """All output of a job on one host, from its spool there. Answered like RunOn with `stream`."""

    job: int
    host: str


class PushTo(_Struct, frozen=True, kw_only=True, tag="push"):
    """Push what is at `sources` (paths on this machine) into `folder`, one source as `name` where that is not empty, or
    an image into the image store. See protocol.commands.Push. Answered like RunOn, with Advanced in between."""

    hosts: tuple[str, ...] | None
    sources: tuple[str, ...]
    folder: str
    name: str = ""
    wishes: Wishes = Wishes()
    image: bool = False
    backup: str = ""
    by_time: bool = False
    dry_run: bool = False


class Reserve(_Struct, frozen=True, kw_only=True, tag="reserve"):
    """Put VMs of a deployment on record, with their addresses, before any is made: all of them or none. `capacities`
    are the hosts as the file declares them. Answered by Done."""

    vms: tuple[Vm, ...]
    capacities: dict[str, Capacity]


class PullFrom(_Struct, frozen=True, kw_only=True, tag="pull"):
    """Bring what is at `paths` on hosts into `directory` (a path on this machine), into a folder a host.

    Hosts that have the same share the files (hard links); with `fold` one of them alone has a folder, beside a file
    that names all. Answered like RunOn, with Fetched in between.
    """

    hosts: tuple[str, ...] | None
    paths: tuple[str, ...]
    directory: str
    wishes: Wishes
    fold: bool = False


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


class CheckOn(_Struct, frozen=True, kw_only=True, tag="check"):
    """Have hosts look at themselves. Answered like RunOn, with protocol.checks.HostFacts as output."""

    hosts: tuple[str, ...] | None
    timeout_ms: int


class DomainsOn(_Struct, frozen=True, kw_only=True, tag="domains"):
    """Have hosts name all their domains, whoever made them. Answered like RunOn, with a JSON array of
    protocol.vms.SeenDomain as output."""

    hosts: tuple[str, ...] | None
    timeout_ms: int


class TuneOn(_Struct, frozen=True, kw_only=True, tag="tune"):
    """Raise settings of hosts to at least these, or with `undo` put all back. Answered like RunOn, with
    protocol.checks.TuneAnswer as output."""

    hosts: tuple[str, ...] | None
    settings: dict[str, int] = {}
    undo: bool = False
    restart_libvirt: bool = False
    timeout_ms: int


class DownOn(_Struct, frozen=True, kw_only=True, tag="down"):
    """End agents. Answered like RunOn; hosts that left are no longer members."""

    hosts: tuple[str, ...] | None
    purge: bool
    vms: bool


class GetJobs(_Struct, frozen=True, kw_only=True, tag="jobs"):
    """The latest jobs. Answered by Jobs."""

    most: int


class FollowJob(_Struct, frozen=True, kw_only=True, tag="follow"):
    """A job by its number: what came of it so far, and what still comes. Answered like RunOn; going away does not
    cancel it. Without `wait` what is on record is all, and OnRecord ends it where the job still runs."""

    id: int
    wait: bool = True


class CancelJob(_Struct, frozen=True, kw_only=True, tag="cancel job"):
    """Stop a job everywhere. Answered by Done, or Failed where it does not run."""

    id: int


class GetFailed(_Struct, frozen=True, kw_only=True, tag="failed on"):
    """Where a job (None: the last one) did not end well. Answered by FailedHosts."""

    job: int | None = None


class SetLabels(_Struct, frozen=True, kw_only=True, tag="labels"):
    """Give hosts (None: all) the labels of `put`, and take those of `drop` away. Answered by Done."""

    hosts: tuple[str, ...] | None
    put: dict[str, str]
    drop: tuple[str, ...] = ()


class Shutdown(_Struct, frozen=True, kw_only=True, tag="shutdown"):
    """End the service. Answered by Done."""


Request: TypeAlias = (
    GetStatus
    | GetHost
    | Begin
    | Enrol
    | Await
    | RunOn
    | InputData
    | GetOutput
    | PushTo
    | Reserve
    | PullFrom
    | CreateOn
    | ProbeOn
    | DestroyOn
    | ActOn
    | Disown
    | GetInfra
    | GetImages
    | ImagesOn
    | ConsoleOn
    | CreateNet
    | RemoveNet
    | GetNets
    | Typed
    | GetDeployment
    | SendNames
    | CheckOn
    | DomainsOn
    | TuneOn
    | DownOn
    | GetJobs
    | FollowJob
    | CancelJob
    | GetFailed
    | SetLabels
    | Shutdown
    | Cancel
)

# --- replies ----------------------------------------------------------------------------------------------------------


class Advanced(_Struct, frozen=True, kw_only=True, tag="advanced"):
    """How many bytes of a push hosts have, of `size`, and who left whom in its order, and why."""

    size: int
    done: dict[int, int]
    left: tuple[tuple[int, int, str], ...] = ()


class Fetched(_Struct, frozen=True, kw_only=True, tag="fetched"):
    """How many bytes of a pull came from hosts; `size` is what all of them will have sent."""

    size: int
    done: dict[int, int]


class VmsDone(_Struct, frozen=True, kw_only=True, tag="vms"):
    """What one host did for its VMs."""

    host: str
    results: tuple[VmResult, ...]


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


class Enrolled(_Struct, frozen=True, kw_only=True, tag="enrolled"):
    """The welcome document that the host must be given."""

    welcome: bytes


class Awaited(_Struct, frozen=True, kw_only=True, tag="awaited"):
    """Hosts that did not come into the tree, with what is known of each."""

    missing: dict[str, str]


class HostStatus(_Struct, frozen=True, kw_only=True):
    """One host as the service knows it. Ages are in seconds; `parent` None is the service itself."""

    name: str
    rank: int
    site: str
    address: str
    up: bool
    parent: str | None
    planned_parent: str | None
    since_s: float | None
    why: str
    digest: str
    facts: dict[str, str]
    health: HostHealth | None
    health_age_s: float | None
    #: How often its agent has started, as far as is known.
    incarnation: int | None = None
    labels: dict[str, str] = {}


class Ancestor(_Struct, frozen=True, kw_only=True):
    """A host, or the service, that another may attach to: its name, and where it listens."""

    name: str
    address: str
    control_port: int


class LostOutcome(_Struct, frozen=True, kw_only=True):
    """A job whose outcome on a host was lost. `what` as in JobStatus."""

    job: int
    what: str
    ago_s: float
    why: str


class HostKnown(_Struct, frozen=True, kw_only=True, tag="host known"):
    """One host: what `status` says of it and what only who looks closer wants to know.

    `attached` is the latest statement on its link: None where there is none since the service began. `below` is whom
    that names as its parent, None for the service. `key` is its public key (Z85). `ancestors` are the planned ones,
    nearest first. `unacknowledged` is the version from which on the host has not confirmed its part of the plan.
    """

    status: HostStatus
    attached: bool | None
    below: str | None
    epoch: int
    said: str
    key: str
    control_port: int
    bulk_port: int
    ancestors: tuple[Ancestor, ...]
    plan_version: int
    unacknowledged: int | None
    vms: int
    lost: tuple[LostOutcome, ...]


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


class Status(_Struct, frozen=True, kw_only=True, tag="status"):
    """The fleet."""

    fleet: str
    version: str
    pid: int
    uptime_s: float
    fanout: int
    hosts: tuple[HostStatus, ...]
    vms: tuple[VmStatus, ...]


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


class JobStatus(_Struct, frozen=True, kw_only=True):
    """A job in one line. `what` is who was asked for what, in JSON; counts are of hosts; times are seconds."""

    id: int
    uid: int
    what: str
    targets: int
    ok: int
    failed: int
    lost: int
    missing: int
    began_s_ago: float
    took_s: float | None


class Jobs(_Struct, frozen=True, kw_only=True, tag="jobs"):
    """Jobs, newest first."""

    jobs: tuple[JobStatus, ...]


class FailedHosts(_Struct, frozen=True, kw_only=True, tag="failed hosts"):
    """The hosts on which a job failed or was lost; those that have no outcome yet are not among them."""

    job: int
    hosts: tuple[str, ...]


class Done(_Struct, frozen=True, kw_only=True, tag="done"):
    """It is done."""


Reply: TypeAlias = (
    Accepted
    | Folded
    | Late
    | Streamed
    | InputRoom
    | Advanced
    | Fetched
    | Settled
    | OnRecord
    | VmsDone
    | VmsReached
    | InfraRecord
    | ImagesDone
    | ImageList
    | Enrolled
    | Awaited
    | Status
    | HostKnown
    | Deployment
    | NetList
    | Jobs
    | FailedHosts
    | Done
    | Failed
)


@cache
def _request_decoder() -> msgspec.msgpack.Decoder[Request]:
    # Made when first used: a client never reads requests, and to have both read takes some milliseconds.
    return msgspec.msgpack.Decoder(Request)


@cache
def _reply_decoder() -> msgspec.msgpack.Decoder[Reply]:
    return msgspec.msgpack.Decoder(Reply)


def unpack_request(body: bytes) -> Request:
    """The request in `body`. Raises BadFrame."""
    try:
        return _request_decoder().decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadFrame(str(error)) from error


def unpack_reply(body: bytes | bytearray | memoryview) -> Reply:
    """The reply in `body`. Raises BadFrame."""
    try:
        return _reply_decoder().decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadFrame(str(error)) from error
