"""What a fleet's root can ask of its agents.

A command is signed once, at the root, and verified by every agent that it names.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from protocol.limits import (
    INPUT_PIECE,
    MAX_BITMAP,
    MAX_CHUNK,
    MAX_CHUNKS,
    MAX_COMMAND_TEXT,
    MAX_ENV,
    MAX_FEED,
    MAX_IN_FLIGHT,
    MAX_INLINE,
    MAX_KILL_AFTER,
    MAX_OFFERED,
    MAX_OUTPUT,
    MAX_PATH,
    MAX_RANK,
    MAX_SCRIPT,
    STREAM_FIRST,
)
from protocol.nets import Net
from protocol.vms import DIGEST_PATTERN, NAME_PATTERN, Action, ImageAction, Uuid, VmSpec
from protocol.wishes import Wishes

Text = Annotated[str, msgspec.Meta(max_length=MAX_COMMAND_TEXT)]
Path = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_PATH)]
Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
HexDigest = Annotated[str, msgspec.Meta(pattern=DIGEST_PATTERN)]
#: A CURVE public key, raw.
Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65_535)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Rank = Annotated[int, msgspec.Meta(ge=0, le=MAX_RANK)]
#: An IP address, v4 or v6.
Address = Annotated[str, msgspec.Meta(min_length=1, max_length=45)]


#: The name of an environment variable (POSIX.1-2017, Base Definitions, 8.1: all but "=" and NUL).
EnvName = Annotated[str, msgspec.Meta(min_length=1, max_length=1_000, pattern="^[^=\0]+$")]
#: The name of a resource limit, without RLIMIT_ and in small letters: nofile, as, cpu (setrlimit(2)).
LimitName = Annotated[str, msgspec.Meta(pattern="^[a-z]{2,20}$")]
#: A resource limit; -1 is none.
LimitValue = Annotated[int, msgspec.Meta(ge=-1, le=2**62)]


#: What a host may send of its output unasked.
First: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=STREAM_FIRST)]


class Run(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="run", forbid_unknown_fields=True):
    """Run an argument vector in its own process group. `output_limit` is the budget of each stream in bytes.

    `script` is a program to run instead of a file of the host; argv[0] is then only its name. `cwd` is absolute.
    `user` is whom it runs as, by name or number; empty: whom the agent runs as. `nice` is added to the agent's own
    priority, `limits` are set soft and hard alike. `kill_after` is how long it has between the polite signal and the
    certain one, in seconds; None for KILL_AFTER. `input` is all of its standard input; with `feed` that comes in Input
    commands instead, and without either there is none. With `stream` its output is sent as it comes, `first` bytes
    of it before anything is granted.
    """

    argv: Annotated[tuple[Text, ...], msgspec.Meta(min_length=1, max_length=4_096)]
    output_limit: Annotated[int, msgspec.Meta(ge=0, le=MAX_OUTPUT)]
    stream: bool = False
    first: First = STREAM_FIRST
    script: Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_SCRIPT)] | None = None
    cwd: Annotated[str, msgspec.Meta(pattern="^/[^\0]*$", max_length=MAX_PATH)] | None = None
    env: Annotated[dict[EnvName, Text], msgspec.Meta(max_length=MAX_ENV)] = {}
    user: Annotated[str, msgspec.Meta(max_length=256)] = ""
    nice: Annotated[int, msgspec.Meta(ge=-20, le=19)] = 0
    limits: Annotated[dict[LimitName, LimitValue], msgspec.Meta(max_length=MAX_ENV)] = {}
    kill_after: Annotated[float, msgspec.Meta(ge=0, le=MAX_KILL_AFTER)] | None = None
    input: Annotated[bytes, msgspec.Meta(max_length=MAX_SCRIPT)] | None = None
    feed: bool = False


class FetchOutput(msgspec.Struct, frozen=True, kw_only=True, tag="fetch output", forbid_unknown_fields=True):
    """Stream what the host has in its spool of the output of command `of`: standard output as stream 1, error as 2.

    Its outcome's totals say how much there is. `first` bytes may be sent before anything is granted.
    """

    of: Natural
    first: First = STREAM_FIRST


class Hop(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A host that takes part in a push: where it serves chunks, and the key by which it is known."""

    rank: Rank
    address: Address
    bulk_port: Port
    key: Key


class Stream(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`size` bytes that travel in chunks: all that the bulk path knows of what is pushed.

    `digests` holds the digest of each chunk of `chunk` bytes (see `protocol.digest`), one after the other; `digest` is
    the digest of `digests`, so that chunk digests vouch for the whole. A host stores the first `head` chunks (a
    directory's listing) before it asks for others: only then does it know which it has. A small stream has its bytes in
    `inline`. `order` names the targets in the order in which chunks pass through them; each asks the one before it, the
    first the root. The root puts it in when the command is given. `compress` allows chunks to travel compressed.
    """

    size: Natural
    chunk: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNK)]
    digests: Annotated[bytes, msgspec.Meta(max_length=MAX_CHUNKS * 32)]
    digest: HexDigest
    head: Annotated[int, msgspec.Meta(ge=0, le=MAX_CHUNKS)] = 0
    inline: Annotated[bytes, msgspec.Meta(max_length=MAX_INLINE)] | None = None
    order: Annotated[tuple[Hop, ...], msgspec.Meta(max_length=MAX_RANK + 1)] = ()
    compress: bool = True


class Push(msgspec.Struct, frozen=True, kw_only=True, tag="push", forbid_unknown_fields=True):
    """Put what a listing names, with the data of `stream`, below `folder` (see protocol.listing).

    `folder` is a directory that is there; one that begins with @/ is in the agent's own. `listing` is the packed
    listing, None where it is the stream's head. With `image` the one file goes into the host's image store, under the
    stream's digest. With `backup` what is replaced is kept under its name with that at its end. With `by_time` a file
    that is there with the same size and time is taken for the same. Modes and times of files that are there are put
    right, with `exact` those of all that is there. With `dry_run` the stream is the head alone, nothing is changed, and
    the output says what would be.
    """

    folder: Path
    stream: Stream
    listing: Annotated[bytes, msgspec.Meta(max_length=MAX_INLINE)] | None = None
    image: bool = False
    backup: Annotated[str, msgspec.Meta(max_length=64, pattern="^[^/\0]*$")] = ""
    by_time: bool = False
    exact: bool = False
    dry_run: bool = False


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer", forbid_unknown_fields=True):
    """List and digest what is at `paths` (one that begins with @/ is in the agent's own directory), and keep it open
    for a Send. Answers with an Offered in the output, which is equal where the contents are."""

    paths: Annotated[tuple[Path, ...], msgspec.Meta(min_length=1, max_length=MAX_OFFERED)]
    wishes: Wishes


class Offered(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an Offer found: the digests of its stream and of its packed listing, how many bytes the stream has and how
    many names are listed."""

    digest: HexDigest
    listing: HexDigest
    size: Natural
    names: Natural


class Send(msgspec.Struct, frozen=True, kw_only=True, tag="send", forbid_unknown_fields=True):
    """Connect to the root at `port` and give it the chunks of what command `of` offered, as it asks for them. Has its
    outcome when the root has ended the connection."""

    of: Natural
    port: Port


class CreateVms(msgspec.Struct, frozen=True, kw_only=True, tag="create vms", forbid_unknown_fields=True):
    """Bring this host's VMs of a deployment to what the plan says. Answers with VmResults in the output.

    `in_flight` are worked on at a time; None leaves it to the host.
    """

    deployment: Name
    specs: tuple[VmSpec, ...]
    in_flight: Annotated[int, msgspec.Meta(ge=1, le=MAX_IN_FLIGHT)] | None = None


class DestroyVms(msgspec.Struct, frozen=True, kw_only=True, tag="destroy vms", forbid_unknown_fields=True):
    """Remove a deployment's VMs from this host, all of them where `names` is None. Answers with VmResults."""

    deployment: Name
    names: tuple[Name, ...] | None = None


class VmAction(msgspec.Struct, frozen=True, kw_only=True, tag="vm action", forbid_unknown_fields=True):
    """Do something to a deployment's VMs on this host, all of them where `names` is None. Answers with VmResults.

    A VM that is in the wanted state already is `unchanged`. `hard` stops and reboots without asking the guest.
    `label` names a snapshot.
    """

    deployment: Name
    names: tuple[Name, ...] | None = None
    action: Action
    hard: bool = False
    label: Name | None = None


class ListVms(msgspec.Struct, frozen=True, kw_only=True, tag="list vms", forbid_unknown_fields=True):
    """Name all domains of this host's libvirt, those that Canopy did not make as well. Changes nothing. Answers with
    SeenDomains, as JSON, in the output."""


class Console(msgspec.Struct, frozen=True, kw_only=True, tag="console", forbid_unknown_fields=True):
    """Open a VM's serial console. What it shows comes as OUTPUT of stream 1, at most CONSOLE_WINDOW bytes more than
    `feed` says were seen; stream 2 has no bytes, and its offset says how much of what was typed has been taken.

    `force` takes the console from whoever has it. Exits when the console ends, or nobody is heard of any more.
    """

    deployment: Name
    name: Name
    force: bool = False


class ReceiveVm(msgspec.Struct, frozen=True, kw_only=True, tag="receive vm", forbid_unknown_fields=True):
    """Make ready to take in a running VM from `source`, which connects at a port of this host's choice (its
    `bulk_port` is not used). Answers with an Awaiting in the output, and waits MOVE_WITHIN for it."""

    deployment: Name
    spec: VmSpec
    source: Hop


class Awaiting(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A host is ready to take a VM in: where it listens, and its agent's directory, which is in the VM's paths."""

    port: Port
    directory: Annotated[str, msgspec.Meta(pattern="^/[\x20-\x7e]*$", max_length=MAX_PATH)]


class MoveVm(msgspec.Struct, frozen=True, kw_only=True, tag="move vm", forbid_unknown_fields=True):
    """Move a running VM with its disk to the host `to`, which awaits it (command `of`, in `directory`) at its
    `bulk_port`. Answers with VmResults; how far it is comes as OUTPUT of stream 1: Moving, one after the other."""

    deployment: Name
    name: Name
    to: Hop
    of: Natural
    directory: Annotated[str, msgspec.Meta(pattern="^/[\x20-\x7e]*$", max_length=MAX_PATH)]


class Moving(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How far a move is, in bytes of memory and disk."""

    done: Natural
    left: Natural


class SettleMove(msgspec.Struct, frozen=True, kw_only=True, tag="settle move", forbid_unknown_fields=True):
    """Say what became of a move. At the host that had the VM (`keep` None): finish or take back what is left of it;
    `unchanged` says that the VM is there, `absent` or `removed` that it has gone. At the other one `keep` says whether
    the VM, which arrived and waits, is to go on there, or to be removed. Answers with VmResults; may come twice."""

    deployment: Name
    name: Name
    uuid: Uuid
    keep: bool | None = None


class ProbeVms(msgspec.Struct, frozen=True, kw_only=True, tag="probe vms", forbid_unknown_fields=True):
    """Wait until the VMs answer ping at their addresses, or with `address` until they have these, until the command's
    deadline. A VM has its address when it answers ping, or when ARP finds it there.

    Answers with a list of names that did.
    """

    deployment: Name
    names: tuple[Name, ...]
    address: bool = False


class Images(msgspec.Struct, frozen=True, kw_only=True, tag="images", forbid_unknown_fields=True):
    """List, verify or remove images of this host's store, all of them where `digests` is None. Answers with
    ImageResults. One that VMs are made of is never removed."""

    action: ImageAction
    digests: Annotated[tuple[HexDigest, ...], msgspec.Meta(max_length=10_000)] | None = None


class CheckHost(msgspec.Struct, frozen=True, kw_only=True, tag="check host", forbid_unknown_fields=True):
    """Look at the host itself: KVM, libvirt, QEMU, disk, network, limits. Answers with HostFacts in the output."""


class Setting(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one of the host's settings should be at least. Which keys there are is the host's to say."""

    key: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    least: Natural


class TuneHost(msgspec.Struct, frozen=True, kw_only=True, tag="tune host", forbid_unknown_fields=True):
    """Raise settings of the host, or with `undo` put all back that was raised. Answers with TuneAnswer in the output.

    `restart_libvirt` lets libvirt's daemon begin anew where it must to take its settings.
    """

    settings: Annotated[tuple[Setting, ...], msgspec.Meta(max_length=64)] = ()
    undo: bool = False
    restart_libvirt: bool = False


class Member(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One entry of the membership. The root has rank None."""

    rank: Rank | None
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=253)]
    address: Address
    control_port: Port
    bulk_port: Port
    key: Key


class Below(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A host planned below the reader.

    All that a relay must know to admit it. `parent` is its planned parent's rank.
    """

    rank: Rank
    parent: Rank | None
    key: Key


class Plan(msgspec.Struct, frozen=True, kw_only=True, tag="plan", forbid_unknown_fields=True):
    """One host's part of the membership: who it is, its ancestors (parent first, root last) and all that is below it.

    A plan replaces an older one, told by `version`; never the other way.
    """

    version: Natural
    you: Member
    ancestors: Annotated[tuple[Member, ...], msgspec.Meta(min_length=1, max_length=64)]
    below: Annotated[tuple[Below, ...], msgspec.Meta(max_length=MAX_RANK + 1)] = ()


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel", forbid_unknown_fields=True):
    """Stop command `of`. The outcome of `of` tells what came of it; a cancel has none of its own."""

    of: Natural


class Input(msgspec.Struct, frozen=True, kw_only=True, tag="input", forbid_unknown_fields=True):
    """More of the standard input of command `of`, from byte `offset` of it on; with `last` its end. Has no outcome."""

    of: Natural
    offset: Natural
    data: Annotated[bytes, msgspec.Meta(max_length=INPUT_PIECE)]
    last: bool = False


class Settled(msgspec.Struct, frozen=True, kw_only=True, tag="settled", forbid_unknown_fields=True):
    """The root has all outcomes of the commands `ids` on record: agents may forget theirs. Has no outcome."""

    ids: Annotated[tuple[Natural, ...], msgspec.Meta(max_length=10_000)]


class Feed(msgspec.Struct, frozen=True, kw_only=True, tag="feed", forbid_unknown_fields=True):
    """What was typed into console `of`, from byte `offset` on, and how many bytes of its output were `seen`. What comes
    twice is taken once; what does not follow on what was taken is dropped, and sent again. `again` asks for all output
    from `seen` on. Has no outcome."""

    of: Natural
    offset: Natural
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_FEED)]
    seen: Natural
    again: bool = False


class SetNets(msgspec.Struct, frozen=True, kw_only=True, tag="set nets", forbid_unknown_fields=True):
    """Make this host's networks of VMs these, and no others. `version` never goes back: an older one is not followed.
    Exits with what was done, a line each."""

    version: Natural
    nets: tuple[Net, ...]


class Leave(msgspec.Struct, frozen=True, kw_only=True, tag="leave", forbid_unknown_fields=True):
    """End the agent, once this command is settled and nobody hangs below it. `purge` removes its directory too,
    `vms` the VMs of every deployment first."""

    purge: bool = False
    vms: bool = False


Work: TypeAlias = (
    Run
    | FetchOutput
    | Push
    | Offer
    | Send
    | CreateVms
    | DestroyVms
    | VmAction
    | ListVms
    | Console
    | ReceiveVm
    | MoveVm
    | SettleMove
    | ProbeVms
    | Images
    | CheckHost
    | TuneHost
    | SetNets
    | Plan
    | Leave
)
#: Commands that end in no outcome, for they are about other commands.
Quiet: TypeAlias = Cancel | Settled | Feed | Input
Body: TypeAlias = Work | Quiet


class Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is signed. `targets` are packed ranks; an agent outside them refuses, whatever the header says.

    `issued_ms` and `expires_ms` are by the root's clock (see `protocol.trust.RootTime`).
    """

    fleet: str
    id: Natural
    targets: Annotated[bytes, msgspec.Meta(max_length=MAX_BITMAP)]
    issued_ms: Natural
    expires_ms: Natural
    body: Body
