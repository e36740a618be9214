"""The messages between a parent and a child, and the append-only table that gives each kind its number.

PROTOCOL.md says what each means and who may send it. The codec turns them into frames.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, TypeAlias

import msgspec

from protocol.commands import Natural, Rank, Stream
from protocol.limits import (
    ASK_WINDOW,
    CONDUIT_TICKET,
    MAX_BITMAP,
    MAX_CHUNKS,
    MAX_FOLDS,
    MAX_INLINE,
    MAX_LEFT,
    MAX_PAYLOAD,
    MAX_RANK,
    MAX_REASON,
    MAX_TEXT,
    MAX_VMS,
    MOVE_CHANNELS,
    STREAM_PIECE,
)
from protocol.outcomes import Fold
from protocol.vms import VmState

Sentence = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Reason = Annotated[str, msgspec.Meta(max_length=MAX_REASON)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
ConduitKey = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class Kind(IntEnum):
    """The number of each kind of message. Append; never renumber, never reuse."""

    ATTACH = 1
    ATTACHED = 2
    REJECTED = 3
    BEAT = 4
    LINKS = 5
    DELIVER = 6
    OUTCOMES = 7
    OUTPUT = 8
    REPORTS = 9
    CLOCK_ASK = 10
    CLOCK_TELL = 11
    PROGRESS = 12
    ASK = 13
    CHUNK = 14
    NO_CHUNK = 15
    HOLD = 16
    HAVE = 17
    CREDIT = 18
    TAKEN = 19
    OPEN = 20
    CARRY = 21
    ROOM = 22
    SHUT = 23
    GONE = 24
    CONDUIT_WANTED = 25
    CONDUIT = 26
    HEARD = 27


class Manner(IntEnum):
    """What relays on the way of a command must know of it. Append; never renumber."""

    WORK = 0  # outcomes will come
    BULK = 1  # outcomes will come, and chunks pass through relays that are no targets
    QUIET = 2  # about other commands: nothing comes back
    RECALL = 3  # outcomes will come, from memory alone: whoever has not begun the command never will


class Link(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """That `rank` hangs below `parent` (None: the root), or no longer does.

    Links are ordered by (`incarnation`, `epoch`, down before up): of two about one rank the later one is true,
    and at equal numbers "down" beats "up". `incarnation` counts the agent's starts, `epoch` its attachments since.
    """

    rank: Rank
    parent: Rank | None
    incarnation: Natural
    epoch: Natural
    up: bool
    why: Sentence = ""


class Attach(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Child to parent, first of all: the protocol versions that I speak, and the links of my subtree, mine first.

    `unsaid` are those in it whose children may be more than the list says: they were not theirs to tell by my plan.
    """

    version_min: Natural
    version_max: Natural
    links: Annotated[tuple[Link, ...], msgspec.Meta(min_length=1, max_length=MAX_RANK + 1)]
    unsaid: Annotated[bytes, msgspec.Meta(max_length=MAX_BITMAP)] = b""


class Attached(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Parent to child: you are in, we speak `version`. `epoch` is that of the attachment that it answers."""

    version: Natural
    epoch: Natural


class Rejected(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Parent to child: you are not attached here; `why`. An agent answers by attaching again, here or elsewhere."""

    why: Sentence


class Beat(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Either way: this event loop is alive."""


class Links(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Child to parent: what has changed below me."""

    links: Annotated[tuple[Link, ...], msgspec.Meta(min_length=1, max_length=MAX_RANK + 1)]


class Deliver(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Parent to child: a command for those of your subtree in `targets` (packed).

    `ttl_ms` is the time that remains to its deadline, None without one. `payload` is an encoded Command and stays as
    the root signed it.
    """

    id: Natural
    targets: Annotated[bytes, msgspec.Meta(max_length=MAX_BITMAP)]
    ttl_ms: Natural | None
    manner: Manner
    payload: Annotated[bytes, msgspec.Meta(max_length=MAX_PAYLOAD)]
    signature: Signature


class Outcomes(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Child to parent: outcomes of command `id` in my subtree, equal ones folded."""

    id: Natural
    folds: Annotated[tuple[Fold, ...], msgspec.Meta(min_length=1, max_length=MAX_FOLDS)]


class Streamed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Child to parent: what `id` wrote at `rank`, from byte `offset` of its standard output (1) or error (2).

    `has` is how many bytes of both streams there are so far, sent or not; `fast` says that more follow at once.
    """

    id: Natural
    rank: Rank
    stream: Annotated[int, msgspec.Meta(ge=1, le=2)]
    offset: Natural
    data: Annotated[bytes, msgspec.Meta(max_length=STREAM_PIECE)]
    has: Natural
    fast: bool


class Grant(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What `rank` may send of a command's output: `limit` bytes of both streams together, counted from its beginning.

    The root has the first `out` bytes of its standard output and `err` of its error. `limit` None: nobody reads any
    more.
    """

    rank: Rank
    limit: Natural | None
    out: Natural
    err: Natural


class Credit(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Parent to child: how much of the output of `id` these hosts of its subtree may send."""

    id: Natural
    grants: Annotated[tuple[Grant, ...], msgspec.Meta(min_length=1, max_length=MAX_RANK + 1)]


class Heard(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Parent to child: of the outcomes that came since it attached, `total` bytes have been passed on."""

    total: Natural


class Taken(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Child to parent: the command `id` at `rank` has read `taken` bytes of its input, and reads on if `open`.

    `anew`: what was sent beyond that may not have come; send it (again).
    """

    id: Natural
    rank: Rank
    taken: Natural
    open: bool
    anew: bool


class HostHealth(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A host's own figures. Loads as in uptime(1); memory and disk in MiB; `uptime_s` of the agent, in seconds."""

    load1: float
    load5: float
    cpus: int
    memory_mib: int
    memory_free_mib: int
    disk_mib: int
    disk_free_mib: int
    agent_rss_mib: float
    uptime_s: int
    version: Annotated[str, msgspec.Meta(max_length=100)]
    vms_known: bool | None = None
    note: Sentence = ""


class Report(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an agent says of itself unasked: its health where that changed, and each VM whose state changed.

    `whole` says that `vms` is the full list, so that a VM which is not in it is not there.
    """

    rank: Rank
    host: HostHealth | None
    vms: Annotated[tuple[VmState, ...], msgspec.Meta(max_length=MAX_VMS)]
    whole: bool = False


def newest(old: Report, new: Report) -> Report:
    """Two reports of one host as one, so that what waits for a way up does not grow with the time that it waits.

    Above MAX_VMS the older states go: the host itself reports all anew when it is attached anew.
    """
    if new.whole:
        return msgspec.structs.replace(new, host=new.host or old.host)
    changed = {(vm.deployment, vm.name) for vm in new.vms}
    kept = [vm for vm in old.vms if (vm.deployment, vm.name) not in changed]
    return Report(new.rank, new.host or old.host, (*kept, *new.vms)[-MAX_VMS:], old.whole)


class Reports(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Child to parent: reports from my subtree."""

    reports: Annotated[tuple[Report, ...], msgspec.Meta(min_length=1, max_length=MAX_RANK + 1)]


class ClockAsk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Upwards, to the root: what time is it? `nonce` is drawn afresh by the asker."""

    rank: Rank
    nonce: Nonce


class ClockTell(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Downwards, to `rank`: the root's clock in milliseconds, signed together with rank and nonce."""

    rank: Rank
    nonce: Nonce
    time_ms: Natural
    signature: Signature


class Progress(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Child to parent: how many bytes of push `id` each of these ranks has, and who left whom in its order, and why."""

    id: Natural
    done: Annotated[tuple[tuple[Rank, Natural], ...], msgspec.Meta(max_length=MAX_RANK + 1)]
    left: Annotated[tuple[tuple[Rank, Rank, Reason], ...], msgspec.Meta(max_length=MAX_LEFT)] = ()


class Ask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """To one before me in the order of push `id`, or to the root: send me these chunks; none: tell me how far you are.

    At most ASK_WINDOW are asked for and not yet there: that is the credit which bounds what is in flight.
    """

    id: Natural
    indices: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHUNKS)], ...],
        msgspec.Meta(max_length=ASK_WINDOW),
    ]


class Chunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The answer to Ask: the chunk itself is the message's blob. `packed`: as a Zstandard frame (RFC 8878)."""

    id: Natural
    index: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHUNKS)]
    packed: bool = False


class Have(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Host to root, first on a pull link: what I can give of offer `id`. `listing` is the packed listing, None where it
    is the stream's head."""

    id: Natural
    stream: Stream
    listing: Annotated[bytes, msgspec.Meta(max_length=MAX_INLINE)] | None


class NoChunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The answer to Ask: I can't give you that. `final` says that asking again is of no use."""

    id: Natural
    index: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHUNKS)]
    why: Sentence
    final: bool


class Hold(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """I am alive and have the first `front` chunks: to whoever asked for none, or waits for some."""

    id: Natural
    front: Annotated[int, msgspec.Meta(ge=0, le=MAX_CHUNKS)]


class ConduitWanted(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """To a source, on the bulk link: I would have a conduit beside this link (protocol.conduit)."""


class Conduit(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The answer to ConduitWanted: connect to this port of mine and show the ticket. `up` is the key for what you send
    there, `down` for what I send."""

    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)]
    ticket: Annotated[bytes, msgspec.Meta(min_length=CONDUIT_TICKET, max_length=CONDUIT_TICKET)]
    up: ConduitKey
    down: ConduitKey


class LeadsTo(IntEnum):
    """What a channel of a move leads to at the host that takes the VM in. Append; never renumber."""

    LIBVIRT = 0  # its libvirt, through a gate that lets pass what this move needs
    MEMORY = 1  # where its QEMU awaits the VM's memory
    DISK = 2  # where its QEMU awaits the VM's disk
    SEED = 3  # the VM's seed disk, as a file


#: A channel's number, for the whole life of a move.
Channel = Annotated[int, msgspec.Meta(ge=0, lt=MOVE_CHANNELS)]


class Open(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """To the host that takes a VM in: a new channel of the move that its command `id` awaits."""

    id: Natural
    channel: Channel
    to: LeadsTo


class Carry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Either way: the next bytes of a channel, which are the message's blob."""

    id: Natural
    channel: Channel


class Room(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Either way: so many bytes of the channel have been taken since it was opened."""

    id: Natural
    channel: Channel
    taken: Natural


class Shut(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Either way: no more bytes of the channel come from here. `broken`: and none are taken any more."""

    id: Natural
    channel: Channel
    broken: bool = False


class Gone(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """To the host that takes a VM in: it is no longer where it was, and may go on there."""

    id: Natural


Message: TypeAlias = (
    Attach
    | Attached
    | Rejected
    | Beat
    | Links
    | Deliver
    | Outcomes
    | Streamed
    | Reports
    | ClockAsk
    | ClockTell
    | Progress
    | Ask
    | Chunk
    | NoChunk
    | Hold
    | Have
    | Credit
    | Taken
    | Open
    | Carry
    | Room
    | Shut
    | Gone
    | ConduitWanted
    | Conduit
    | Heard
)

TYPES: dict[Kind, type[Message]] = {
    Kind.ATTACH: Attach,
    Kind.ATTACHED: Attached,
    Kind.REJECTED: Rejected,
    Kind.BEAT: Beat,
    Kind.LINKS: Links,
    Kind.DELIVER: Deliver,
    Kind.OUTCOMES: Outcomes,
    Kind.OUTPUT: Streamed,
    Kind.REPORTS: Reports,
    Kind.CLOCK_ASK: ClockAsk,
    Kind.CLOCK_TELL: ClockTell,
    Kind.PROGRESS: Progress,
    Kind.ASK: Ask,
    Kind.CHUNK: Chunk,
    Kind.NO_CHUNK: NoChunk,
    Kind.HOLD: Hold,
    Kind.HAVE: Have,
    Kind.CREDIT: Credit,
    Kind.TAKEN: Taken,
    Kind.OPEN: Open,
    Kind.CARRY: Carry,
    Kind.ROOM: Room,
    Kind.SHUT: Shut,
    Kind.GONE: Gone,
    Kind.CONDUIT_WANTED: ConduitWanted,
    Kind.CONDUIT: Conduit,
    Kind.HEARD: Heard,
}
KINDS: dict[type[Message], Kind] = {message: kind for kind, message in TYPES.items()}

#: Directions: children report, they don't command. A message that comes the other way costs its sender the connection.
UPWARDS: frozenset[type[Message]] = frozenset(
    {Attach, Beat, Links, Outcomes, Streamed, Reports, ClockAsk, Progress, Taken},
)
DOWNWARDS: frozenset[type[Message]] = frozenset({Attached, Rejected, Beat, Deliver, ClockTell, Credit, Heard})
BULK_UPWARDS: frozenset[type[Message]] = frozenset({Ask, ConduitWanted})
BULK_DOWNWARDS: frozenset[type[Message]] = frozenset({Chunk, NoChunk, Hold, Conduit})
#: On the link that a host opens for a pull chunks go the other way.
PULL_UPWARDS: frozenset[type[Message]] = frozenset({Have, Chunk, NoChunk})
PULL_DOWNWARDS: frozenset[type[Message]] = frozenset({Ask})
#: On the link of a move, from the host that has the VM to the one that takes it in, and back.
MOVE_UPWARDS: frozenset[type[Message]] = frozenset({Open, Carry, Room, Shut, Gone})
MOVE_DOWNWARDS: frozenset[type[Message]] = frozenset({Carry, Room, Shut})
