"""What happens to a relay (events) and what it wants done (effects). Plain data: tests compare lists of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from protocol.commands import Body, Feed, Leave, Member, Plan
from protocol.messages import Deliver, Grant, HostHealth, Link, Message, Report
from protocol.outcomes import NO_OUTPUT, Fold, Outcome, Output
from protocol.ranks import NONE, Ranks
from protocol.vms import VmState

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """The process is up. First of all events."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; `next_wakeup` asked for it."""


@dataclass(frozen=True, slots=True)
class FromParent:
    """A control message from the parent that the last `Connect` named."""

    message: Message


@dataclass(frozen=True, slots=True)
class FromChild:
    """A control message from the holder of `rank`'s key."""

    rank: int
    message: Message


@dataclass(frozen=True, slots=True)
class ParentLost:
    """The connection to the parent broke, or could not be made."""

    why: str


@dataclass(frozen=True, slots=True)
class ChildLost:
    """The connection from a child broke, or a message to it could not be sent."""

    rank: int
    why: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Local work has ended, as the shell saw it: by itself or because it was stopped."""

    id: int
    outcome: Outcome
    output: Output = NO_OUTPUT


@dataclass(frozen=True, slots=True)
class Kept:
    """A `Keep` was done: the outcome is on disk, and will be found there by whoever begins anew; or it could not be."""

    id: int
    well: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """A `Load` was done: what was kept of that very command; None where it is gone, damaged, or another command's."""

    id: int
    found: tuple[Outcome, Output] | None


@dataclass(frozen=True, slots=True)
class Wrote:
    """Local work wrote something, and its command asked for a stream; `has` and `fast` are Streamed's."""

    id: int
    stream: int
    offset: int
    data: bytes
    has: int = 0
    fast: bool = False


@dataclass(frozen=True, slots=True)
class Took:
    """Local work has read `taken` bytes of its input so far, and reads on if `open`; with `anew` from there."""

    id: int
    taken: int
    open: bool
    anew: bool


@dataclass(frozen=True, slots=True)
class Grants:
    """Root only: these hosts may send so much of the output of `id`."""

    id: int
    grants: tuple[Grant, ...]


@dataclass(frozen=True, slots=True)
class Observed:
    """This host's own report."""

    host: HostHealth | None
    vms: tuple[VmState, ...]
    whole: bool


@dataclass(frozen=True, slots=True)
class LeftSource:
    """In a push's order this host asks another than `source` from now on: that one is lost, silent or slow."""

    id: int
    source: int
    why: str


@dataclass(frozen=True, slots=True)
class Advanced:
    """A push has `done` bytes here."""

    id: int
    done: int


@dataclass(frozen=True, slots=True)
class Submit:
    """Root only: a signed command. `body` is what its payload holds; a quiet one is sent and not accounted for.

    `missing` is for a command that was given before the service itself began anew: those that still owe an outcome, and
    `reborn` those of them whose agents have begun anew since, so that its predecessor may have been given it.
    """

    delivery: Deliver
    body: Body
    missing: Ranks | None = None
    reborn: Ranks = NONE


@dataclass(frozen=True, slots=True)
class Replan:
    """A new plan that did not come down the tree: the root's own, whose `below` holds everybody, or that of an agent
    which was enrolled anew while it ran."""

    plan: Plan


Event: TypeAlias = (
    Begin
    | Tick
    | FromParent
    | FromChild
    | ParentLost
    | ChildLost
    | Finished
    | Kept
    | Loaded
    | Wrote
    | Took
    | Grants
    | Observed
    | Advanced
    | LeftSource
    | Submit
    | Replan
)

# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToParent:
    """Send to the parent."""

    message: Message


@dataclass(frozen=True, slots=True)
class ToChild:
    """Send to a child."""

    rank: int
    message: Message


@dataclass(frozen=True, slots=True)
class Connect:
    """Leave the present parent, if any, and connect to this one with fresh sockets."""

    member: Member


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Leave the present parent; what is queued for it is of no use any more."""


@dataclass(frozen=True, slots=True)
class DropChild:
    """Cut this child's connection and refuse its key for a while: it broke the rules."""

    rank: int
    why: str


@dataclass(frozen=True, slots=True)
class Admit:
    """From now on these keys, and no others, may connect: key to rank."""

    keys: tuple[tuple[bytes, int], ...]


@dataclass(frozen=True, slots=True)
class Start:
    """Do this work, and say Finished exactly once."""

    id: int
    body: Body
    ttl: float | None


@dataclass(frozen=True, slots=True)
class Stop:
    """End this work: politely (SIGTERM), or for certain (`hard`, SIGKILL). Finished comes as always."""

    id: int
    hard: bool


@dataclass(frozen=True, slots=True)
class Granted:
    """Local work may send so much of its output."""

    id: int
    grant: Grant


@dataclass(frozen=True, slots=True)
class Pour:
    """A piece of local work's input, from byte `offset` of it on; with `last` its end."""

    id: int
    offset: int
    data: bytes
    last: bool


@dataclass(frozen=True, slots=True)
class Type:
    """Give this to the console that it is for."""

    feed: Feed


@dataclass(frozen=True, slots=True)
class Keep:
    """Write this outcome to disk, where it survives this process, and say Kept. `signature` is the command's."""

    id: int
    signature: bytes
    outcome: Outcome
    output: Output


@dataclass(frozen=True, slots=True)
class Load:
    """Read what was kept of the command with this number and signature, and say Loaded."""

    id: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class Forget:
    """The root has these commands' outcomes: what was kept of them, and transfers of theirs, may go."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SavePlan:
    """Keep this signed plan for the next start."""

    delivery: Deliver


@dataclass(frozen=True, slots=True)
class Depart:
    """End this agent."""

    leave: Leave


@dataclass(frozen=True, slots=True)
class Arrived:
    """This agent is attached now, perhaps to a root that knows nothing of it: report everything anew."""


@dataclass(frozen=True, slots=True)
class Warn:
    """Something for the log: one sentence."""

    text: str


@dataclass(frozen=True, slots=True)
class Tell:
    """Root only: outcomes that are now final, each rank once in a command's life."""

    id: int
    folds: tuple[Fold, ...]


@dataclass(frozen=True, slots=True)
class TellLate:
    """Root only: what hosts answered after they had been settled, as lost as far as is known here. It changes nothing
    of that; perhaps it is told more than once."""

    id: int
    folds: tuple[Fold, ...]


@dataclass(frozen=True, slots=True)
class TellSettled:
    """Root only: every target of the command has its outcome."""

    id: int


@dataclass(frozen=True, slots=True)
class TellStream:
    """Root only: a piece of a command's output; `has` and `fast` are Streamed's."""

    id: int
    rank: int
    stream: int
    offset: int
    data: bytes
    has: int
    fast: bool


@dataclass(frozen=True, slots=True)
class TellTaken:
    """Root only: how much of a command's input a host has read, and whether it reads on."""

    id: int
    rank: int
    taken: int
    open: bool
    anew: bool


@dataclass(frozen=True, slots=True)
class TellProgress:
    """Root only: bytes that hosts have of a push, and who left whom in its order, and why."""

    id: int
    done: tuple[tuple[int, int], ...]
    left: tuple[tuple[int, int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class TellReports:
    """Root only: what hosts said of themselves."""

    reports: tuple[Report, ...]


@dataclass(frozen=True, slots=True)
class TellLinks:
    """Root only: links of the tree that changed."""

    links: tuple[Link, ...]


Effect: TypeAlias = (
    ToParent
    | ToChild
    | Connect
    | Disconnect
    | DropChild
    | Admit
    | Start
    | Stop
    | Type
    | Granted
    | Pour
    | Keep
    | Load
    | Forget
    | SavePlan
    | Depart
    | Arrived
    | Warn
    | Tell
    | TellLate
    | TellSettled
    | TellStream
    | TellTaken
    | TellProgress
    | TellReports
    | TellLinks
)
