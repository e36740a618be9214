"""What comes of a command, as Python sees it, and how the service's replies become it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from controller import api
from controller.session import Happening, ImageAnswer, Late, Piece, Progress, Result, VmAnswer, VmReached
from controller.status import CtlError
from protocol import ranks
from protocol.outcomes import Fold, Outcome, Output


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
            case api.Advanced(size=size, done=done):
                yield Progress(size, {self.hosts[rank]: count for rank, count in done.items()})
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
