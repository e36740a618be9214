"""What comes of a command, as Python sees it, and how the service's replies become it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from controller import run_api
from controller.later import Later
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

if TYPE_CHECKING:
    from controller import api
    from protocol.vms import ImageResult, VmResult
else:
    api = Later("controller.api")


class Result(msgspec.Struct, frozen=True):
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


class Late(msgspec.Struct, frozen=True):
    """What hosts answered after their outcome had been settled as lost, which it stays."""

    result: Result


class Piece(msgspec.Struct, frozen=True):
    """Something that a host wrote, as it came: standard output is stream 1, standard error 2."""

    host: str
    stream: int
    offset: int
    data: bytes


class Progress(msgspec.Struct, frozen=True):
    """How far a push has come: bytes on disk by host, of `size` each. `bypassed` names hosts that gave others nothing
    more: which, who asks another instead, and why."""

    size: int
    done: dict[str, int]
    bypassed: tuple[tuple[str, str, str], ...] = ()


class Fetched(msgspec.Struct, frozen=True):
    """How far a pull has come: bytes that each host gave so far, of `size` that all of them will have given."""

    size: int
    done: dict[str, int]


class VmAnswer(msgspec.Struct, frozen=True):
    """What one host did for its VMs."""

    host: str
    results: tuple[VmResult, ...]


class VmProgress(msgspec.Struct, frozen=True):
    """How far a VM's move is, in bytes."""

    name: str
    done: int
    left: int


class VmReached(msgspec.Struct, frozen=True):
    """Which of one host's VMs answer ping."""

    host: str
    names: tuple[str, ...]


class ImageAnswer(msgspec.Struct, frozen=True):
    """What one host says of its images."""

    host: str
    results: tuple[ImageResult, ...]


Happening = Result | Late | Piece | Progress | Fetched | VmAnswer | VmProgress | VmReached | ImageAnswer


class Followed:
    """A command that was given, and how far it has come. `id` and `hosts` (rank to name) are known from the start."""

    def __init__(self, id_: int, hosts: dict[int, str], what: str = "") -> None:
        self.id = id_
        self.hosts = hosts
        #: Of a job that was asked for again: what it was, as in JobStatus.
        self.what = what
        #: Whether every target has its outcome.
        self.settled = False
        #: Whether nothing more comes: it is settled, or what is on record was all that was asked for.
        self.over = False
        #: How far the service takes standard input, in bytes.
        self.input_room = 0
        self._left = set(hosts)

    def take(self, reply: api.Reply) -> Iterator[Happening]:
        """What a reply says. Raises CtlError for one that does not belong here."""
        match reply:
            case run_api.Folded(folds=folds):
                for fold in folds:
                    members = tuple(ranks.each(ranks.unpack(fold.ranks)))
                    self._left.difference_update(members)
                    yield self._result(members, fold)
            case run_api.Late(folds=folds):
                for fold in folds:
                    yield Late(self._result(ranks.each(ranks.unpack(fold.ranks)), fold))
            case run_api.Streamed(rank=rank, stream=stream, offset=offset, data=data):
                yield Piece(self.hosts[rank], stream, offset, data)
            case run_api.InputRoom(upto=upto):
                self.input_room = max(self.input_room, upto)
            case run_api.Settled():
                self.settled = self.over = True
            case run_api.OnRecord():
                self.over = True
            case _:
                yield self._rarer(reply)

    def _rarer(self, reply: api.Reply) -> Happening:
        match reply:
            case api.Advanced(size=size, done=done, left=left):
                bypassed = tuple((self.hosts[whom], self.hosts[who], why) for who, whom, why in left)
                return Progress(size, {self.hosts[rank]: count for rank, count in done.items()}, bypassed)
            case api.Fetched(size=size, done=done):
                return Fetched(size, {self.hosts[rank]: count for rank, count in done.items()})
            case api.VmsDone(host=host, results=results):
                return VmAnswer(host, results)
            case api.VmMoving(name=name, done=count, left=rest):
                return VmProgress(name, count, rest)
            case api.VmsReached(host=host, names=names):
                return VmReached(host, names)
            case api.ImagesDone(host=host, results=results):
                return ImageAnswer(host, results)
            case _:
                raise CtlError(f"the service answered with a {type(reply).__name__} in the middle of a command")

    def _result(self, members: Iterable[int], fold: Fold) -> Result:
        return Result(tuple([self.hosts[rank] for rank in members]), fold.outcome, fold.output)

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
