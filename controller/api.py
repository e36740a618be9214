"""What `ctl` and the service say to each other over the fleet's client socket: one request a connection, then replies.

Hosts go as names in requests and as ranks in what comes back; `Accepted` says once which rank is which name. What
running a command takes, and how all travels, is in `run_api`.
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import msgspec

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
from controller.vm_api import (
    ActOn,
    ConsoleOn,
    CreateNet,
    CreateOn,
    Deployment,
    DestroyOn,
    Disown,
    DomainsOn,
    GetDeployment,
    GetImages,
    GetInfra,
    GetNets,
    ImageList,
    ImagesDone,
    ImagesOn,
    InfraRecord,
    KnownImage,
    MoveOn,
    NetList,
    NetStatus,
    ProbeOn,
    RemoveNet,
    Reserve,
    SendNames,
    Typed,
    VmMove,
    VmMoving,
    VmsDone,
    VmsReached,
    VmStatus,
)
from protocol.messages import HostHealth
from protocol.wishes import Wishes

#: What is another file's and part of this interface all the same.
__all__ = [
    "LENGTH_BYTES",
    "MAX_LENGTH",
    "Accepted",
    "ActOn",
    "BadFrame",
    "Cancel",
    "ConsoleOn",
    "CreateNet",
    "CreateOn",
    "Deployment",
    "DestroyOn",
    "Disown",
    "DomainsOn",
    "Failed",
    "Folded",
    "GetDeployment",
    "GetImages",
    "GetInfra",
    "GetNets",
    "ImageList",
    "ImagesDone",
    "ImagesOn",
    "InfraRecord",
    "InputData",
    "InputRoom",
    "KnownImage",
    "Late",
    "MoveOn",
    "NetList",
    "NetStatus",
    "OnRecord",
    "ProbeOn",
    "RemoveNet",
    "Reserve",
    "RunOn",
    "SendNames",
    "Settled",
    "Streamed",
    "Typed",
    "VmMove",
    "VmMoving",
    "VmStatus",
    "VmsDone",
    "VmsReached",
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


class CheckOn(_Struct, frozen=True, kw_only=True, tag="check"):
    """Have hosts look at themselves. Answered like RunOn, with protocol.checks.HostFacts as output."""

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
    | MoveOn
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


class Status(_Struct, frozen=True, kw_only=True, tag="status"):
    """The fleet."""

    fleet: str
    version: str
    pid: int
    uptime_s: float
    fanout: int
    hosts: tuple[HostStatus, ...]
    vms: tuple[VmStatus, ...]


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
    | VmMoving
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
