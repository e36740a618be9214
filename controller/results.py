"""What comes of a command, as Python sees it, and how the service's replies become it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from controller import api
from controller.status import CtlError, ExitStatus
from protocol import ranks
from protocol.outcomes import (
    Cancelled,
    Exited,
    FailedToStart,
    Fold,
    Lost,
    Outcome,
    Output,
    Refused,
    TimedOut,
    succeeded,
)
from protocol.vms import ImageResult, VmResult


@dataclass(frozen=True)
class Result:
    """One outcome with one output, and the hosts that it is true of, in the order of their ranks."""

    hosts: tuple[str, ...]
    outcome: Outcome
    output: Output

    @property
    def ok(self) -> bool:
        """Whether the command exited with 0."""
        return succeeded(self.outcome)

    @property
    def stdout(self) -> bytes:
        """Standard output, as far as its budget went."""
        return self.output.out

    @property
    def stderr(self) -> bytes:
        """Standard error, as far as its budget went."""
        return self.output.err


@dataclass(frozen=True)
class Late:
    """What hosts answered after their outcome had been settled as lost, which it stays."""

    result: Result


@dataclass(frozen=True)
class Piece:
    """Something that a host wrote, as it came: standard output is stream 1, standard error 2."""

    host: str
    stream: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Progress:
    """How far a push has come: bytes on disk by host, of `size` each. `bypassed` names hosts that gave others nothing
    more: which, who asks another instead, and why."""

    size: int
    done: dict[str, int]
    bypassed: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Fetched:
    """How far a pull has come: bytes that each host gave so far, of `size` that all of them will have given."""

    size: int
    done: dict[str, int]


@dataclass(frozen=True)
class VmAnswer:
    """What one host did for its VMs."""

    host: str
    results: tuple[VmResult, ...]


@dataclass(frozen=True)
class VmReached:
    """Which of one host's VMs answer ping."""

    host: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class ImageAnswer:
    """What one host says of its images."""

    host: str
    results: tuple[ImageResult, ...]


Happening = Result | Late | Piece | Progress | Fetched | VmAnswer | VmReached | ImageAnswer


@dataclass
class Followed:
    """A command that was given, and how far it has come. `id` and `hosts` (rank to name) are known from the start."""

    id: int
    hosts: dict[int, str]
    #: Of a job that was asked for again: what it was, as in JobStatus.
    what: str = ""
    #: Whether every target has its outcome.
    settled: bool = False
    #: Whether nothing more comes: it is settled, or what is on record was all that was asked for.
    over: bool = False
    #: How far the service takes standard input, in bytes.
    input_room: int = 0
    _left: set[int] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self._left = set(self.hosts)

    def take(self, reply: api.Reply) -> Iterator[Happening]:
        """What a reply says. Raises CtlError for one that does not belong here."""
        match reply:
            case api.Folded(folds=folds):
                for fold in folds:
                    self._left.difference_update(ranks.each(ranks.unpack(fold.ranks)))
                    yield self._result(fold)
            case api.Late(folds=folds):
                for fold in folds:
                    yield Late(self._result(fold))
            case api.Streamed(rank=rank, stream=stream, offset=offset, data=data):
                yield Piece(self.hosts[rank], stream, offset, data)
            case api.InputRoom(upto=upto):
                self.input_room = max(self.input_room, upto)
            case api.Advanced(size=size, done=done, left=left):
                bypassed = tuple((self.hosts[whom], self.hosts[who], why) for who, whom, why in left)
                yield Progress(size, {self.hosts[rank]: count for rank, count in done.items()}, bypassed)
            case api.Fetched(size=size, done=done):
                yield Fetched(size, {self.hosts[rank]: count for rank, count in done.items()})
            case api.VmsDone(host=host, results=results):
                yield VmAnswer(host, results)
            case api.VmsReached(host=host, names=names):
                yield VmReached(host, names)
            case api.ImagesDone(host=host, results=results):
                yield ImageAnswer(host, results)
            case api.Settled():
                self.settled = self.over = True
            case api.OnRecord():
                self.over = True
            case _:
                raise CtlError(f"the service answered with a {type(reply).__name__} in the middle of a command")

    def _result(self, fold: Fold) -> Result:
        members = ranks.each(ranks.unpack(fold.ranks))
        return Result(tuple(self.hosts[rank] for rank in members), fold.outcome, fold.output)

    def waiting_for(self) -> tuple[str, ...]:
        """The hosts that have no outcome yet."""
        return tuple(self.hosts[rank] for rank in sorted(self._left))

    def merged(self, happenings: Iterable[Happening]) -> list[Result]:
        """The results among them, equal ones in one, in the order of their first hosts."""
        found: dict[tuple[Outcome, Output], list[str]] = {}
        for happening in happenings:
            if isinstance(happening, Result):
                found.setdefault((happening.outcome, happening.output), []).extend(happening.hosts)
        order = {name: rank for rank, name in self.hosts.items()}
        results = [Result(tuple(sorted(hosts, key=order.__getitem__)), *key) for key, hosts in found.items()]
        return sorted(results, key=lambda result: order[result.hosts[0]])


def exit_status(outcomes: Iterable[Outcome]) -> ExitStatus:
    """The exit code for a command with these outcomes: what is worst for the person who asked comes first.

    Refused for trust, then lost or timed out, then failed in any other way.
    """
    status = ExitStatus.OK
    for outcome in outcomes:
        match outcome:
            case Refused(trust=True):
                return ExitStatus.REFUSED
            case Lost() | TimedOut():
                status = ExitStatus.UNREACHABLE
            case Exited(code=0):
                pass
            case Exited() | FailedToStart() | Refused() | Cancelled() | _:
                status = max(status, ExitStatus.FAILED)
    return status
